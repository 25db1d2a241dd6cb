import json

import pytest
import torch
from torch import nn

from distill.compress import auto as search
from distill.compress.auto import Candidate, auto, pareto, table
from distill.compress.coverage import int8_share
from distill.data.fake import fake
from distill.errors import UsageError, UserError
from distill.measure import parameters


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


def as_it_is(trained: list):
    def finetune(net, name, **options):
        trained.append(name)
        return net

    return finetune


def test_the_smallest_within_the_budget_is_taken_and_only_what_fits_is_trained(net, data, capsys):
    trained = []
    options = dict(ratios=[0.0, 0.5], quantizers=["none", "static_int8"])
    found = auto(net, as_it_is(trained), data, accuracy_drop=1.0, **options)
    assert int8_share(found) > 0.9 and parameters(found) < parameters(net) / 2
    assert trained == ["auto-0.5-prune"]  # the smallest was good enough: no other was made
    shown = capsys.readouterr().out
    assert shown.count("not measured") == 3 and "→* prune 0.5 + static_int8" in shown
    whole = auto(net, as_it_is(trained), data, accuracy_drop=1.0, ratios=[0.0], quantizers=["none"], bytes="1MB")
    assert parameters(whole) == parameters(net) and int8_share(whole) == 0


def test_a_budget_that_cannot_be_met_names_what_came_closest(net, data):
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
    assert table([small, fast, both_worse], fast).count("*") == 2


def test_a_later_command_takes_the_choice_and_measures_nothing(net, data, tmp_path, monkeypatch, capsys):
    finetune = as_it_is([])
    finetune.folder = tmp_path
    options = dict(ratios=[0.0], quantizers=["none", "static_int8"], accuracy_drop=1.0)
    first = auto(net, finetune, data, **options)
    (kept,) = (tmp_path / "compress").iterdir()
    record = json.loads(kept.read_text())
    assert record["found"][record["chosen"]]["quantizer"] == "static_int8"
    record["chosen"] = 0  # as if times had been others then
    kept.write_text(json.dumps(record))
    with monkeypatch.context() as patch:
        patch.setattr(search, "latency", None)
        again = auto(net, finetune, data, **options)
    assert int8_share(first) > 0.9 and int8_share(again) == 0
    assert f"chosen before, read from {kept}" in capsys.readouterr().out
    other = auto(net, finetune, data, **options | {"accuracy_drop": 0.99})  # other options: searched anew
    assert int8_share(other) > 0.9
    kept.write_text("[]")
    assert int8_share(auto(net, finetune, data, **options)) > 0.9
