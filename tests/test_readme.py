"""What the README says a user can do, done as it says."""

import os
import re
import subprocess
import sys
import textwrap

from conftest import QUICK, ROOT

README = re.sub(r" \\\n +", " ", (ROOT / "README.md").read_text())  # commands over several lines


def block(marker: str) -> str:
    """The indented block that opens with a comment `# marker`, without that line, up to the next such comment."""
    lines = README[README.index(f"    # {marker}\n") :].splitlines()[1:]
    kept = []
    for line in lines:
        if (line and not line.startswith("    ")) or re.match(r"    # \S+\.(py|yaml)$", line):
            break
        kept.append(line)
    return textwrap.dedent("\n".join(kept))


def test_a_loss_of_the_users_own_is_a_class_and_a_yaml(tmp_path):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(block("mine.py"))
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text(block("conf/loss/mine.yaml").partition("\n\n")[0])
    command = next(line for line in README.splitlines() if "--config-dir conf" in line)
    words = re.search(r"train\.py (.*)", command)[1].replace("'", "").split()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words, *QUICK, "stages=[teacher,distill]", "baseline=false"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "under 0.1 ce + 0.9 kd + 0.1 mine" in done.stdout
    [metrics] = tmp_path.glob("outputs/*/metrics/version_0/metrics.csv")
    assert "train/mine" in metrics.read_text()


def test_every_option_that_the_readme_names_exists(train, tmp_path, capfd):
    commands = re.findall(r"^    python train\.py (.*?)(?:\s{2,}#.*)?$", README, re.M)
    assert len(commands) > 8
    for command in commands:
        if "--config-dir" in command or "run=" in command:
            continue
        words = re.findall(r"'[^']*'|\S+", command)
        words = [
            word.strip("'").replace("seeds=", "seed=").replace("PATH", "nowhere").replace("FILE", "nowhere")
            for word in words
            if word != "-m" and not word.startswith("sweep=")
        ]
        words = [word if not re.search(r"=\w+,\w", word) else word.partition(",")[0] for word in words]
        words = [
            f"{word.partition('],[')[0]}]" if word.startswith("loss=") and "],[" in word else word for word in words
        ]  # a sweep's first job
        # the only thing wrong is a stage that doesn't exist, so that nothing starts
        assert train(*words, "stages=[none]", cwd=tmp_path) == 2
        assert "error: stages=[none]: expected" in capfd.readouterr().err, command
