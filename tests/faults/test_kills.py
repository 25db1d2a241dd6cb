"""Kill it anywhere, again and again: it ends as if nobody had, and no file was ever half there.

The short form is ten kills of one run; the long one (`pytest -m faults`) some two hundred, over stages, exporters,
cached features, loader processes and signals, and a flipped bit in every file that a run leaves.
"""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from harness import QUICK, Done, finished, run, started
from safetensors.torch import load_file

from distill.errors import UserError
from distill.files import read_json, read_yaml
from distill.networks.weights import read_state
from distill.training.resume import read

WORDS = [*QUICK, "name=x", "checkpoint_every=3", "optimizer.lr=0.01", "teacher.fit.epochs=1", "ema=0.9"]
SHORT = [*WORDS, "baseline=false", "compress=[]"]
RENAMED = """
import random
draw, replace, seen = random.Random({seed}), os.replace, []
def counted(source, target, **options):
    seen.append(target)
    if len(seen) == {number} and {when!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **options)
    if len(seen) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = counted
"""  # every file of ours is written by a rename


def whole(folder: Path) -> None:
    """Fails where a file that has its name isn't all there."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".yaml":
            read_yaml(path)
        elif path.suffix == ".safetensors":
            read_state(path)
        elif path.suffix == ".ckpt":
            read(path)
        elif path.suffix == ".csv":
            header, *rows = path.read_text().splitlines()
            assert rows and all(row.count(",") == header.count(",") for row in rows), path


def outcome(run_folder: Path) -> dict:
    """What a run ended with: weights, measured figures, metrics, and the bytes of files that can be compared."""
    found = {}
    for name in ("student.safetensors", "student_last.safetensors"):
        found |= {f"{name} {key}": value for key, value in load_file(run_folder / name).items()}
    timed = ("latency", "times", "memory", "measured", "load")
    for row in read_json(run_folder / "report.json")["rows"]:
        figures = {key: value for key, value in row.items() if not key.startswith(timed)}
        found[row["name"]] = json.dumps(figures, sort_keys=True)
    found["metrics"] = (run_folder / "metrics" / "version_0" / "metrics.csv").read_text()
    for path in sorted((run_folder / "export").glob("*.pte")):
        found[path.name] = path.read_bytes()
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        assert same, key


def undisturbed(folder: Path, *words: str) -> dict:
    folder.mkdir()
    done = run(folder, *words)
    assert done.code in (0, 1), done.err  # made images: a file may miss a bound of the report
    whole(folder / "outputs")
    return outcome(folder / "outputs" / "x")


def chain(folder: Path, words: list[str], kills: int, seed: int, most: int = 14) -> tuple[Done, int]:
    """The run killed at drawn renames and moments until it ends or `kills` are through; then left alone."""
    draw, done, count = random.Random(seed), Done(-9, "", ""), 0
    folder.mkdir(exist_ok=True)
    while done.code not in (0, 1) and count < kills:
        if draw.random() < 0.7:
            fault = RENAMED.format(seed=seed, number=draw.randint(1, most), when=draw.choice(["before", "after"]))
            done = run(folder, *words, fault=fault)
        else:
            process = started(folder, *words)
            try:
                process.wait(timeout=draw.uniform(1, 6))
            except Exception:  # it is still at work
                process.send_signal(draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            done = finished(process)
            assert done.code in (0, 1, -9, 143), done.err
        count += done.code not in (0, 1)
        whole(folder / "outputs") if (folder / "outputs").exists() else None
    if done.code not in (0, 1):
        done = run(folder, *words)
    return done, count


def killed_often(folder: Path, words: list[str], kills: int, seed: int = 0, most: int = 14) -> int:
    """As many kills, of one run after the other; each ends as if nobody had killed it. How many runs that took."""
    expected, total, number = undisturbed(folder / "whole", *words), 0, 0
    while total < kills:
        place = folder / f"killed{number}"
        done, count = chain(place, words, kills=kills - total, seed=seed + number, most=most)
        assert done.code in (0, 1), done.err
        assert_same(expected, outcome(place / "outputs" / "x"))
        left = [path for path in place.rglob(".*.tmp") if path.parent.name == "x"]
        assert left == []  # what killed processes had begun was swept
        total, number = total + count, number + 1
    return number


def test_ten_kills(tmp_path):
    assert killed_often(tmp_path, SHORT, kills=10, most=9) < 6


LONG = {
    "all stages": [*WORDS, "stages=[teacher,cache,distill,compress,export,report]"],
    "features": [*WORDS, "loss=[ce,fitnet]", "cache=features", "export=[]", "compress=[]"],
    "exporters": [*WORDS, "export=[torchscript,executorch,onnx,torch_export]", "compress=[static_int8]"],
    "fine-tuning": [*WORDS, "compress=[prune,qat_int8]", "compress.prune.epochs=2", "compress.qat_int8.epochs=2"],
    "loaders": [*WORDS, "data.num_workers=2", "export=[]", "compress=[]"],
    "sums": [*WORDS, "trainer.accumulate_grad_batches=4", "checkpoint_every=1", "export=[]", "compress=[]"],
    "stops": [*WORDS, "early_stopping=1", "trainer.max_epochs=5", "export=[]", "compress=[]"],
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", LONG)
def test_many_kills(tmp_path, kind):
    begun = time.monotonic()
    runs = killed_often(tmp_path, LONG[kind], kills=30, seed=len(kind), most=30)
    print(f"{kind}: 30 kills of {runs} runs, all ended alike, {time.monotonic() - begun:.0f} s")


@pytest.mark.faults
def test_two_processes_killed(tmp_path):
    words = [*WORDS, "trainer.devices=2", "trainer.strategy=ddp", "export=[]", "compress=[]", "cache=off"]
    expected = undisturbed(tmp_path / "whole", *words)
    draw, folder = random.Random(0), tmp_path / "killed"
    folder.mkdir()
    for _ in range(6):
        process = started(folder, *words, start_new_session=True)
        time.sleep(draw.uniform(4, 14))
        process.kill()  # the second process notices
        finished(process)
    done = run(folder, *words)
    assert done.code in (0, 1), done.err
    assert_same(expected, outcome(folder / "outputs" / "x"))


@pytest.mark.faults
def test_a_storm_of_terminations(tmp_path):
    expected = undisturbed(tmp_path / "whole", *WORDS)
    draw, folder = random.Random(1), tmp_path / "storm"
    folder.mkdir()
    for _ in range(8):
        process = started(folder, *WORDS)
        time.sleep(draw.uniform(2, 8))
        for _ in range(40):
            process.send_signal(draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]))
            time.sleep(0.005)
        done = finished(process)
        assert done.code in (0, 1, 138, 143, -15, -10), done.err
        whole(folder / "outputs") if (folder / "outputs").exists() else None
    assert run(folder, *WORDS).code in (0, 1)
    assert_same(expected, outcome(folder / "outputs" / "x"))


@pytest.mark.faults
def test_a_flipped_bit_in_every_file_that_a_run_leaves(tmp_path):
    """It is found and said, or changes nothing that the run ends with."""
    expected = undisturbed(tmp_path / "whole", *SHORT, "stages=[teacher,distill,compress,export,report]")
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "outputs").rglob("*")]
    files = [path for path in files if (tmp_path / "whole" / path).is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.suffix != ".csv" and (tmp_path / "whole" / path).stat().st_size]
    draw, silent = random.Random(2), []
    for file in files:
        folder = tmp_path / "flipped"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        content = bytearray((folder / file).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(content)
        done = run(folder, *SHORT)
        said = done.out + done.err
        try:
            assert done.code in (0, 1)
            assert_same(expected, outcome(folder / "outputs" / "x"))
        except (AssertionError, UserError, ValueError):
            if "damaged" not in said and "checksum" not in said:
                silent.append(str(file))
    assert silent == []
