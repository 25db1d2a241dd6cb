"""Jobs of a sweep where a scheduler puts them: queued again when their time is up, and none takes others with it."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import QUICK, ROOT
from harness import run
from omegaconf import OmegaConf
from safetensors.torch import load_file

from distill.cli import clusters, launcher
from distill.errors import UsageError, UserError
from distill.files import read_json, write_json
from distill.runs.sweeps import unstarted

JOB = """
import os, signal, sys, time
from pathlib import Path

words = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(words["hydra.run.dir"].strip("'"))
with open(run / "begun", "a") as file:
    file.write("x")
def save(number, frame):
    (run / "saved").write_text(signal.Signals(number).name)
    sys.exit(140)
signal.signal(signal.SIGUSR2, save)
if words["x"] == "fails":
    sys.exit("error: it is broken")
if words["x"] == "vanishes":
    os.kill(os.getppid(), signal.SIGKILL)
if words["x"] == "interrupted" and not (run / "saved").exists():
    os.kill(os.getppid(), signal.SIGUSR2)
    time.sleep(30)
(run / "run.json").write_text("{}")
"""
SBATCH = """#!/bin/sh
for script in "$@"; do :; done
cp "$script" {folder}/script
export SLURM_ARRAY_JOB_ID=17 SLURM_JOB_ID=17 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
export SLURM_JOB_NUM_NODES=1 PATH={folder}/bin:$PATH
for task in 0 1; do
    (
        export SLURM_ARRAY_TASK_ID=$task
        sh "$script"
        while [ -e {folder}/requeue-17_$task ]; do rm {folder}/requeue-17_$task; sh "$script"; done
    ) > /dev/null 2>&1 &
done
echo Submitted batch job 17
"""
SLURM = {  # what stands in for SLURM's commands
    "sbatch": SBATCH,
    "srun": '#!/bin/sh\nwhile [ "$1" != {python} ]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/sh\ntouch {folder}/requeue-$2\n",
    "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'; echo '17_0|RUNNING|here'; echo '17_1|RUNNING|here'\n",
}
needed = pytest.mark.skipif(find_spec("submitit") is None, reason="the extra is not installed: pip install submitit")


def launched(plugin, options: dict, folder: Path, monkeypatch, *jobs: str) -> list[int]:
    """Exit codes of jobs x=…, each of which is JOB."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launcher, "program", lambda: [sys.executable, "-c", JOB])
    write_json(folder / "sweep" / "sweep.json", {"fixed": [], "command": []})
    made = plugin(**options)
    made.setup(hydra_context=None, task_function=None, config=OmegaConf.create({"hydra": {"sweep": {"dir": "sweep"}}}))
    return [each.return_value for each in made.launch([[f"x={name}"] for name in jobs], 0)]


@needed
def test_jobs_of_submitit_are_queued_again_and_one_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep").mkdir()
    options = {**clusters.LOCAL, "side_by_side": 3}
    codes = launched(clusters.Local, options, tmp_path, monkeypatch, "interrupted", "fails", "whole")
    assert codes == [0, 1, 0]
    begun = {place.name: (place / "begun").read_text() for place in (tmp_path / "sweep").glob("x=*")}
    assert begun == {"x=interrupted": "xx", "x=fails": "x", "x=whole": "x"}
    assert (tmp_path / "sweep/x=interrupted/saved").read_text() == "SIGUSR2"
    assert unstarted(tmp_path / "sweep") == {"x=fails": "it is broken"}
    said = capsys.readouterr().out
    assert "job 0: done" in said and "job 1: it is broken" in said and "job 2: done" in said


@needed
@pytest.mark.matrix
def test_jobs_whose_process_vanishes_leave_the_others_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep").mkdir()
    assert launched(clusters.Local, clusters.LOCAL, tmp_path, monkeypatch, "vanishes", "whole") == [1, 0]
    assert re.search(r"^job 0: local's job \d+ ended without a word: ", capsys.readouterr().out, re.MULTILINE)


@needed
def test_jobs_of_slurm_are_one_array_and_queued_again(tmp_path, monkeypatch):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        text = text.replace("{folder}", str(tmp_path)).replace("{python}", sys.executable)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    options = {**clusters.SLURM, "partition": "gpu", "cpus_per_task": 4, "array_parallelism": 2, "gpus_per_node": 1}
    assert launched(clusters.Slurm, options, tmp_path, monkeypatch, "interrupted", "whole") == [0, 0]
    assert (tmp_path / "sweep/x=interrupted/begun").read_text() == "xx"
    asked = {line.removeprefix("#SBATCH --") for line in (tmp_path / "script").read_text().splitlines()}
    wanted = {"partition=gpu", "cpus-per-task=4", "array=0-1%2", "gpus-per-node=1", "time=60", "job-name=distill"}
    assert wanted <= asked and any(line.startswith("signal=") and line.endswith("USR2@120") for line in asked)


def test_where_there_is_no_scheduler_it_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "submitit", sys)
    with pytest.raises(UsageError, match=r"submitit_slurm: no SLURM here \(no sbatch\)"):
        clusters.Slurm(**clusters.SLURM)
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"submitit is not installed: pip install 'distill\[submitit\]'"):
        clusters.Local(**clusters.LOCAL)
    with pytest.raises(UsageError, match=r"ray is not installed: pip install 'distill\[ray\]'"):
        clusters.Ray(**clusters.RAY)


@pytest.mark.parametrize(("option", "value"), [("timeout_min", "x"), ("nodes", 0), ("gpus_per_node", -1)])
def test_a_wrong_option_is_told(option, value):
    with pytest.raises(UsageError, match=f"hydra.launcher.{option}={value}: expected a whole number"):
        clusters.Local(**{**clusters.LOCAL, option: value})


def test_a_ray_that_does_not_answer_is_told_at_once():
    with pytest.raises(UserError, match=r"ray.init.address=ray://127.0.0.1:1: no answer there: .*refused"):
        clusters._reached("ray://127.0.0.1:1")
    clusters._reached("auto")
    clusters._reached(None)


def test_a_job_ends_with_what_started_it(tmp_path):
    """Else a job that is called again finds itself at work."""
    parent = (
        "import os, subprocess, sys, time; "
        "job = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={**os.environ, 'DISTILL_PARENT': "
        "str(os.getpid())}); time.sleep(60)"
    )
    job = (
        "import sys, time; import distill.cli.command as c; sys.argv = ['x', '--version']; "
        "c.command(lambda cfg: None)(); sys.stdout.flush(); time.sleep(60)"
    )
    command = [sys.executable, "-c", parent, job]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1, text=True)
    assert process.stdout.readline().startswith("distill ")
    process.kill()
    began = time.monotonic()
    assert process.stdout.read() == ""  # its end of the pipe is closed when it has ended
    assert time.monotonic() - began < 20


FAULT = """
def change(module):
    step, steps = module.Distill.training_step, []
    def interrupted(self, *args):
        steps.append(0)
        if len(steps) == 10 and "sweep" in os.getcwd() + " ".join(sys.argv) and not os.path.exists("interrupted"):
            open("interrupted", "w").close()
            os.kill(os.getppid(), signal.SIGUSR2)
        return step(self, *args)
    module.Distill.training_step = interrupted
after_import("distill.training.module", change)
"""


@needed
@pytest.mark.matrix
def test_a_training_that_is_queued_again_ends_with_the_same_bits(tmp_path):
    words = [*QUICK, "-m", "seed=3", "loss.kd.temperature=2,4", "sweep=x", "baseline=false", "checkpoint_every=100"]
    words += ["compress=[]", "export=[]", "optimizer.lr=0.01"]
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", *words).code == 0
    done = run(tmp_path / "interrupted", *words, "hydra/launcher=submitit_local", fault=FAULT)
    assert done.code == 0 and "2 of 2 jobs are done" in done.out, done
    said = "".join(file.read_text() for file in (tmp_path / "interrupted").glob("outputs/sweeps/x/*/output.txt"))
    assert "out of time: saving" in said and re.search("continuing after . epochs and [1-6] of 7 batches", said)
    for job in ("kd.temperature=2", "kd.temperature=4"):
        one, other = (tmp_path / name / "outputs/sweeps/x" / job for name in ("whole", "interrupted"))
        assert read_json(other / "run.json")["status"] == "done"
        weights, others = (load_file(place / "student_last.safetensors") for place in (one, other))
        assert weights.keys() == others.keys() and all(weights[key].equal(others[key]) for key in weights)


@needed
@pytest.mark.matrix
def test_a_search_on_submitit(tmp_path):
    words = [*QUICK, "-m", "hydra/sweeper=search", "loss.kd.temperature=interval(1.0,8.0)", "sweep=x", "baseline=false"]
    words += ["compress=[]", "export=[]", "hydra.sweeper.trials=3", "hydra/launcher=submitit_local"]
    done = run(tmp_path, *words, "hydra.launcher.side_by_side=2")
    assert done.code == 0 and "trials: 3 complete" in done.out and "3 of 3 jobs are done" in done.out, done


@pytest.mark.skipif(find_spec("ray") is None, reason="the extra is not installed: pip install ray")
@pytest.mark.matrix
def test_a_job_whose_ray_worker_is_killed_goes_on(tmp_path):
    words = [*QUICK, "-m", "seed=3", "loss.kd.temperature=2,4", "sweep=x", "baseline=false", "checkpoint_every=2"]
    words += ["compress=[]", "export=[]", "hydra/launcher=ray"]
    done = run(tmp_path, *words, fault=FAULT.replace("SIGUSR2", "SIGKILL"))
    assert done.code == 0 and "2 of 2 jobs are done" in done.out, done
    said = "".join(file.read_text() for file in tmp_path.glob("outputs/sweeps/x/*/output.txt"))
    assert "continuing after" in said


def test_ones_own_signals_are_not_submitits(monkeypatch):
    from distill.cli import command

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("queued twice"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert command._requeue() is None
    assert signal.SIGUSR2 in command.signals.SAID
