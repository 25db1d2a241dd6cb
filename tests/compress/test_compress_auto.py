import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from sets import fake
from torch import nn

from distill import compress
from distill.cli import build, config
from distill.cli.roles import finetuning
from distill.compress import auto as search
from distill.compress.auto import Candidate, auto, exceeded, pareto, table
from distill.compress.static_int8 import static_int8
from distill.errors import OverBudget, UsageError, UserError
from distill.export import torch_export, torchscript
from distill.files import CONF, read_json, write_json
from distill.report.tables import Row
from distill.runtimes.coverage import int8_share
from distill.runtimes.measure import parameters


@pytest.fixture(scope="module")
def data():
    return fake(16, 0, image_size=8, train_size=64)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


@pytest.fixture
def no_timing(monkeypatch):
    """Every file takes a millisecond."""
    monkeypatch.setattr(
        search, "latency", lambda timers, *_, **__: ({each: {"latency_ms": 1.0} for each in timers}, {})
    )


def as_it_is(trained: list):
    def finetune(net, name, **options):
        trained.append(name)
        return net

    return finetune


def test_the_smallest_within_the_budget_is_taken_and_only_what_fits_is_trained(net, data, capsys):
    trained = []
    options = dict(ratios=[0.0, 0.5], quantizers=["none", "static_int8"])
    found = auto(net, as_it_is(trained), data, "onnx", accuracy_drop=1.0, **options)
    assert int8_share(found) > 0.9 and parameters(found) < parameters(net) / 2
    assert trained == ["auto-0.5-prune"]  # the smallest was good enough: no other was made
    shown = capsys.readouterr().out
    assert shown.count("not measured") == 3 and "→* prune 0.5 + static_int8" in shown
    whole = auto(net, as_it_is(trained), data, accuracy_drop=1.0, ratios=[0.0], quantizers=["none"], bytes="1MB")
    assert parameters(whole) == parameters(net) and int8_share(whole) == 0


def test_a_budget_that_cannot_be_met_names_what_came_closest(net, data, no_timing):
    with pytest.raises(UserError, match=r"no candidate is within 100 bytes, .*closest: static_int8, which takes"):
        auto(net, as_it_is([]), data, bytes=100, ratios=[0.0], quantizers=["none", "static_int8"])
    with pytest.raises(UserError, match=r"closest: as it is, which loses 0.0% of validation accuracy"):
        auto(net, as_it_is([]), data, accuracy_drop=-1, ratios=[0.0], quantizers=["none"])
    with pytest.raises(UserError, match="within 1e-09 ms"):
        auto(net, as_it_is([]), data, latency_ms=1e-9, ratios=[0.0], quantizers=["none"])


@pytest.mark.parametrize("options", [{"quantizers": ["int4"]}, {"ratios": [1.5]}, {"latency_ms": "fast"}])
def test_wrong_options(net, data, options):
    with pytest.raises(UsageError, match=r"compress.auto|latency_ms=fast"):
        auto(net, as_it_is([]), data, **options)


def test_the_pareto_front_is_what_nothing_else_beats_in_both():
    small, fast, both_worse, twin = (
        Candidate(0.0, name, size, ms)
        for name, size, ms in (("a", 10, 5.0), ("b", 20, 1.0), ("c", 20, 5.0), ("d", 10, 5.0))
    )
    assert pareto([small, fast, both_worse, twin]) == [small, fast, twin]
    assert table([small, fast, both_worse], [fast]).count("*") == 2


def test_a_later_command_takes_the_choice_and_measures_nothing(net, data, tmp_path, monkeypatch, no_timing, capsys):
    finetune = as_it_is([])
    finetune.folder = tmp_path
    options = dict(ratios=[0.0], quantizers=["none", "static_int8"], accuracy_drop=1.0)
    first = auto(net, finetune, data, **options)
    (kept,) = (tmp_path / "compress").iterdir()
    record = read_json(kept)
    assert record["found"][record["chosen"]]["quantizer"] == "static_int8"
    record["chosen"] = 0  # as if times had been others then
    write_json(kept, record)
    with monkeypatch.context() as patch:
        patch.setattr(search, "latency", None)
        again = auto(net, finetune, data, **options)
    assert int8_share(first) > 0.9 and int8_share(again) == 0
    assert f"chosen before, read from {kept}" in capsys.readouterr().out
    other = auto(net, finetune, data, **options | {"accuracy_drop": 0.99})  # other options: searched anew
    assert int8_share(other) > 0.9
    for harm in ("[]", kept.read_text().replace('"chosen": 1', '"chosen": 0')):
        kept.write_text(harm)
        assert int8_share(auto(net, finetune, data, **options)) > 0.9
        assert f"the search begins anew: {kept} is damaged" in capsys.readouterr().out


def composed(*words: str):
    config.register(["train.py"])
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("train", ["name=test", *words])


def test_every_file_that_ships_counts(net, data, tmp_path, no_timing):
    small = static_int8(net, data=data)
    example = torch.rand(2, 3, 8, 8)
    script, lite = (file.path.stat().st_size for file in torchscript.export(small, example, tmp_path / "student", {}))
    assert script != lite  # one of the two would pass
    options = dict(ratios=[0.0], quantizers=["static_int8"], accuracy_drop=1.0)
    larger = ".ptl" if lite > script else ".pt"
    with pytest.raises(UserError, match=rf"closest: static_int8, which takes [\d,]+ bytes \({larger}\)"):
        auto(net, as_it_is([]), data, bytes=(script + lite) // 2, **options)
    auto(net, as_it_is([]), data, bytes=max(script, lite) + 1000, **options)


def test_the_files_are_the_runs_own(net, data, tmp_path, no_timing):
    """Of its exporters, with what it writes into them."""
    cfg = composed("compress=auto", "export=[torch_export]", "compress.auto.quantizers=[static_int8]")
    finetune = finetuning(cfg, None, data, tmp_path, build.steps(cfg.export), {"run": "x" * 5000})
    (file,) = finetune.ship(static_int8(net, data=data, flow="xnnpack"), "xnnpack", tmp_path)
    assert file.path.name == "student-auto.pt2" and torch_export.read_metadata(file.path)["run"] == "x" * 5000
    size = file.path.stat().st_size
    options = dict(ratios=[0.0], quantizers=["static_int8"], accuracy_drop=1.0)
    auto(net, finetune, data, "xnnpack", bytes=size + 100, **options)
    record = json.loads(Path(tmp_path, "compress", "auto-xnnpack.json").read_text())
    assert record["found"][0]["counts"] == ".pt2" and abs(record["found"][0]["bytes"] - size) <= 100
    with pytest.raises(UserError, match=r"\(\.pt2\)"):
        auto(net, finetune, data, "xnnpack", bytes=size - 1000, **options)


def test_its_steps_have_the_options_of_their_own_files():
    cfg = composed("compress=auto", "compress.auto.qat_int8.epochs=7", "compress.auto.static_int8.skip=auto", "seed=3")
    step = build.steps(cfg.compress)["auto"]
    assert step.keywords["qat_int8"].keywords["epochs"] == 7 and step.keywords["qat_int8"].keywords["seed"] == 3
    assert step.keywords["static_int8"].keywords["skip"] == "auto"


def test_the_options_arrive_and_each_ratio_is_pruned_once(net, data, monkeypatch, no_timing):
    pruned, asked, plain = [], [], search.prune

    def counted(net, *args, ratio, **options):
        pruned.append(ratio)
        return plain(net, *args, ratio=ratio, **options)

    def spy(net, finetune=None, data=None, flow="fx", *, images):
        asked.append(images)
        return static_int8(net, data=data, flow=flow, images=images)

    monkeypatch.setattr(search, "prune", counted)
    options = dict(ratios=[0.0, 0.3, 0.5], quantizers=["none", "static_int8"], accuracy_drop=1.0)
    auto(net, as_it_is([]), data, **options, static_int8=partial(spy, images=40))
    assert pruned == [0.3, 0.5] and set(asked) == {40}
    with pytest.raises(UsageError, match=r"compress\.auto"):
        auto(net, as_it_is([]), data, **options, int4=spy)


def test_what_the_report_finds_over_the_budget_is_told():
    rows = [Row("student", bytes=90_000), Row("student-auto.pt", format="lite", bytes=30_001, latency_ms=1.0)]
    over = {"student-auto.pt": "student-auto.pt: 30,001 bytes, over the budget of 30,000"}
    assert exceeded(rows, "30kB", 2) == over
    assert exceeded(rows, None, 0.5) == {"student-auto.pt": "student-auto.pt: 1.000 ms, over the budget of 0.5"}
    assert exceeded(rows, 30_001, 1.0) == {}


def test_under_a_target_one_file_is_enough_and_the_table_spans_the_runtimes(net, data, tmp_path, monkeypatch, capsys):
    times = {".pt": 3.0, ".ptl": 1.0, ".onnx": 1.0}

    def latency(timers, *_, **__):
        return {name: {"latency_ms": times["." + name.rpartition(".")[2]]} for name in timers}, {}

    monkeypatch.setattr(search, "latency", latency)
    finetune = as_it_is([])
    finetune.folder = tmp_path
    options = dict(ratios=[0.0], quantizers=["static_int8"], accuracy_drop=1.0, latency_ms=2.0)
    with pytest.raises(UserError, match=r"3\.000 ms") as told:
        auto(net, finetune, data, **options)
    assert not isinstance(told.value, OverBudget)
    assert int8_share(auto(net, finetune, data, files="one", **options)) > 0.9
    record = read_json(tmp_path / "compress" / "auto-fx.json")
    assert record["found"][0]["counts"] == ".ptl" and set(record["found"][0]["files"]) == {".pt", ".ptl"}
    with pytest.raises(OverBudget, match=r"1\.000 ms"):
        auto(net, finetune, data, "onnx", files="one", **options | {"latency_ms": 0.5})
    shown = search.together(tmp_path, ["fx", "onnx", "fx"])
    rows = {line.split()[-4]: line.split()[0] for line in shown.splitlines()[2:]}
    assert rows == {".pt": "→*" if record["found"][0]["files"][".pt"][0] < record["found"][0]["bytes"] else "→",
                    ".ptl": "→*"}  # fmt: skip
    assert search.together(tmp_path, ["onnx"]) is None


def test_another_runtimes_file_over_the_budget_fails_no_run(net, data, capsys):
    def step(net, *, finetune, data, flow):
        if flow == "onnx":
            raise OverBudget("no candidate is within 1 ms")
        return net

    nets, failures = compress.compress({"auto": step}, net, data, None, ["fx", "onnx"])
    assert (set(nets), failures) == ({"fx"}, []) and "onnx: no candidate is within 1 ms" in capsys.readouterr().out
    nets, failures = compress.compress({"auto": step}, net, data, None, ["onnx"])
    assert not nets and failures == ["compress for onnx: no candidate is within 1 ms"]


@pytest.mark.parametrize("target", ["android", "ios", "edge", "server"])
def test_a_targets_budget_is_that_of_one_file(target):
    cfg = composed(f"target={target}", "compress=auto", "budget.bytes=1MB")
    assert cfg.compress.auto.files == "one" and composed("compress=auto").compress.auto.files == "every"
    assert set(cfg.compress) == {"auto"} and cfg.compress.auto.bytes == "1MB"


def test_the_budgets_drop_is_what_the_gate_allows():
    cfg = composed("compress=auto", "budget.accuracy_drop=0.3")
    assert build.tolerance(cfg)["compressed"] == {**cfg.tolerance.compressed, "accuracy_drop": 0.3}
    assert build.tolerance(composed("compress=prune"))["compressed"]["accuracy_drop"] == 0.02
