"""What the README says a user can do, done as it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import yaml
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, command.strip())
    for page in PAGES
    for command in re.findall(
        r"^[^`|\n]*?\bpython train\.py +([^#`\n]*)", re.sub(r" \\\n +", " ", page.read_text(encoding="utf-8")), re.M
    )
    if "--config-dir" not in command and "GROUP" not in command and not command.startswith(("…", "run=outputs/small"))
]


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_of_readme_and_docs_is_one(train, tmp_path, capfd, page, command):
    """All of its options exist and go together: the only thing wrong is a stage that doesn't exist."""
    words = [word for word in shlex.split(command) if word not in ("-m", "&&", "…")]
    words = [re.sub(r"\b(NAME|FILE|PATH|FOLDER)\b", "nowhere", word).replace("seeds=", "seed=") for word in words]
    words = [word for word in words if not word.startswith(("run=", "sweep=", "stages=", "hydra")) and "(" not in word]
    words = [re.sub(r"^(\w+=\[[^]]*\]),\[.*", r"\1", word) for word in words]  # a sweep's first job
    words = [word if "[" in word or not re.search(r"=[\w.]+,\w", word) else word.partition(",")[0] for word in words]
    assert train(*words, "stages=[none]", cwd=tmp_path) == 2
    assert "error: stages=[none]: expected" in capfd.readouterr().err


def test_jobs_of_schedulers_are_commands_that_go_on(train, tmp_path, capfd):
    """Each names its run, which is what makes the same command go on, and has options that exist."""
    sky = yaml.safe_load((ROOT / "docs/jobs/skypilot.yaml").read_text(encoding="utf-8"))
    [command] = [line for line in sky["run"].splitlines() if line.startswith("python train.py ")]
    job = yaml.safe_load((ROOT / "docs/jobs/kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (job["kind"], container["command"], pod["restartPolicy"]) == ("Job", ["distill"], "Never")
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounted.keys() == {each["name"] for each in pod["volumes"]} and mounted["work"] == container["workingDir"]
    assert "ln -sfn /outputs outputs" in sky["run"] and [*sky["file_mounts"]] == ["/outputs"]
    for words in (shlex.split(command)[2:], container["args"]):
        assert "name=mine" in words
        assert train(*words, "stages=[none]", cwd=tmp_path) == 2
        assert "error: stages=[none]: expected" in capfd.readouterr().err


def test_a_sweep_of_wandb_gives_words(train, tmp_path, capfd):
    """Its agent puts key=value, each value of the space, in the place of args_no_hyphens."""
    sweep = yaml.safe_load((ROOT / "conf/sweep/wandb.yaml").read_text(encoding="utf-8"))
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["command"][:3] == ["${env}", "python", "${program}"] and sweep["command"][-1] == "${args_no_hyphens}"
    drawn = [f"{key}={values['max']}" for key, values in sweep["parameters"].items()]
    assert sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}  # as the trackers are told it
    words = [word for word in sweep["command"][3:-1] if not word.startswith("stages=")]
    assert train(*words, *drawn, "stages=[none]", cwd=tmp_path) == 2
    assert "error: stages=[none]: expected" in capfd.readouterr().err


def test_no_line_of_the_readme_is_longer_than_a_screen():
    assert [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
            assert anchor in slugs, target


def test_every_page_is_in_the_sites_contents():
    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [
        page
        for section in contents
        for part in section.values()
        for page in ([part] if isinstance(part, str) else part)
    ]
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("zensical", reason="the documentation's extra is not installed: pip install -e '.[docs]'")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "distill").symlink_to(ROOT / "distill")
    for name in ("mkdocs.yml", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "zensical", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs/site/index.html").is_file()


def test_the_tables_are_those_of_the_files():
    from benchmarks.results import pages

    for page, text in pages().items():
        assert page.read_text(encoding="utf-8") == text, "python -m benchmarks.results writes them anew"
