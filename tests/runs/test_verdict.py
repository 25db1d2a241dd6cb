"""Whether a student gained, by statistics computed here anew, and why not, of students that were made to fail."""

import json
from math import comb, sqrt

import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp
from torch import nn

from distill.networks.resnet_cifar import resnet
from distill.report import diagnosis
from distill.report.diagnosis import Figures
from distill.report.jobs import over_seeds
from distill.runs import verdict
from distill.teachers.frozen import Frozen


def answers(both: int, first: int, second: int, neither: int):
    """Who was right, of so many images each."""
    counts = torch.tensor([both, first, second, neither])
    one = torch.tensor([True, True, False, False]).repeat_interleave(counts)
    other = torch.tensor([True, False, True, False]).repeat_interleave(counts)
    return one, other


def exact(won: int, lost: int) -> float:
    """McNemar's exact two-sided p: twice the tail of Binomial(won + lost, 1/2), at most 1."""
    total, least = won + lost, min(won, lost)
    return min(1.0, 2 * sum(comb(total, k) for k in range(least + 1)) / 2**total)


@pytest.mark.parametrize(("both", "won", "lost", "neither"), [(300, 20, 10, 42), (50, 3, 3, 0), (9000, 400, 250, 350)])
def test_two_models_on_the_same_images(both, won, lost, neither):
    found = verdict.on_images(*answers(both, won, lost, neither))
    images = both + won + lost + neither
    assert (found.won, found.lost, found.images) == (won, lost, images)
    assert found.gain == pytest.approx((won - lost) / images)
    assert found.p == pytest.approx(exact(won, lost), rel=1e-9)
    # Agresti and Min: half an image more in each of the four cells
    n, b, c = images + 2, won + 0.5, lost + 0.5
    half = 1.959964 * sqrt((b + c) / n - ((b - c) / n) ** 2) / sqrt(n)
    assert (found.low, found.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half), abs=1e-7)


def test_the_sentence_says_what_can_be_said():
    few = verdict.on_images(*answers(300, 20, 17, 35))
    assert not few.shown
    # (1.96 + 0.84)² · 37/372 / 0.01² = 7807
    assert str(few).startswith("no gain can be shown with 372 test images: +0.8 points (95 % interval -2.4 to +4.0, p")
    assert str(few).endswith("about 7,807 would show one point")
    assert str(verdict.on_images(*answers(9000, 400, 250, 350))).startswith("distilling helped: +1.5 points")
    assert str(verdict.on_images(*answers(9000, 250, 400, 350))).startswith("distilling HURT: -1.5 points")
    same = verdict.on_images(*answers(300, 0, 0, 72))
    assert (same.gain, same.p, same.shown) == (0, 1, False)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Two models that are right for 80 % and 78 % of 400 images, alike on 88 %."""
    generator, kept = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        drawn = torch.rand(400, generator=generator)
        first, second = drawn < 0.80, (drawn < 0.73) | ((drawn >= 0.80) & (drawn < 0.85))
        found = verdict.on_images(first, second)
        kept += found.low <= 0.02 <= found.high
    assert 0.94 < kept / 2000 < 0.965


def test_over_seeds():
    gains = [0.021, 0.034, 0.012, 0.025]
    found, reference = verdict.over_seeds(gains, 10_000), ttest_1samp(gains, 0)
    assert found.p == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.gain == pytest.approx(0.023)
    assert str(found).endswith("against the student alone on 10,000 test images, 4 seeds")
    assert not verdict.over_seeds([0.05, -0.02], 372).shown
    assert verdict.over_seeds([0.0, 0.0], 372).p == 1


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        (Figures(lead=verdict.on_images(*answers(300, 20, 17, 35))), "little to hand on"),
        (Figures(lead=verdict.on_images(*answers(9000, 250, 400, 350))), "little to hand on"),
        (Figures(teacher_train=0.1, teacher_test=0.9), "other images or classes"),
        (Figures(teacher_train=0.7, teacher_test=0.75), "what it gets wrong"),
        (Figures(teacher_train=1.0, teacher_val=0.8, confidence_train=0.99), "by heart"),
        (Figures(least_student=0.0, least_teacher=-4.0), "ends in a ReLU"),
        (Figures(agreement=0.8, agreement_added=0.03), "still rose"),
    ],
)
def test_findings_name_an_option(figures, word):
    (line,) = diagnosis.findings(figures)
    assert word in line
    assert any(option in line for option in ("teacher.fit.epochs", "cache=off", "relu_head", "max_epochs"))


def test_nothing_is_found_where_all_is_well():
    lead = verdict.on_images(*answers(8000, 900, 200, 900))
    assert not diagnosis.findings(Figures(lead, 0.9, 0.95, 0.9, 0.9, 0.8, -3.0, -2.0, 0.8, 0.001))


class EndsInReLU(nn.Sequential):
    def __init__(self, num_classes: int):
        super().__init__(resnet(8, num_classes, [4, 8, 16], stem=4), nn.ReLU())


WORDS = ["teacher=resnet8_tiny", "compress=[]", "export=[]", "trainer.accelerator=cpu", "trainer.max_epochs=4"]


@pytest.mark.parametrize(
    ("name", "words", "finding"),
    [
        ("twin", ["student=resnet8_tiny"], "there is little to hand on"),
        ("shuffled", ["student=resnet8_tiny"], "belong to other images or classes"),
        ("relu", ["student=custom", f"student._target_={__name__}.EndsInReLU"], "ends in a ReLU"),
    ],
)
def test_a_student_that_was_made_to_fail_is_diagnosed(train, tmp_path_factory, monkeypatch, name, words, finding):
    cwd = tmp_path_factory.getbasetemp() / "diagnosed"
    cwd.mkdir(exist_ok=True)
    if name == "shuffled":  # what it says in training, not what it is
        forward = Frozen.forward
        monkeypatch.setattr(Frozen, "forward", lambda self, batch: rolled(forward(self, batch)))
        words = [*words, "cache=off"]
    assert train(*WORDS, *words, f"name={name}", cwd=cwd) == 0
    report = json.loads((cwd / "outputs" / name / "report.json").read_text())
    assert any(finding in line for line in report["findings"]), report
    assert report["verdict"]["images"] == report["context"]["test images"] == 539
    by_name = {row["name"]: row["top1"] for row in report["rows"]}
    assert report["verdict"]["gain"] == pytest.approx(by_name["student"] - by_name["student alone"], abs=1e-6)
    text = (cwd / "outputs" / name / "report.md").read_text()
    assert report["verdict"]["sentence"][1:] in text and finding in text


def rolled(outputs):
    return outputs.__class__(outputs.logits.roll(1, 1), outputs.features)


def test_runs_that_differ_in_the_seed_alone_get_one_verdict():
    runs = [("a=1", 0, 0.60, 0.62), ("a=1", 1, 0.61, 0.625), ("a=2", 0, 0.60, 0.50), ("a=1", 2, 0.59, 0.62)]
    table = pd.DataFrame(
        [
            {"options": a, "seed": seed, "status": "done", "test images": 1000, "gain": taught - alone}
            | {"student alone top-1": alone, "student top-1": taught}
            for a, seed, alone, taught in runs
        ]
    )
    (line,) = over_seeds(table)
    assert line.startswith(
        "a=1, seeds 0, 1, 2 (mean ± standard deviation): student alone 60.00 ± 1.00 %, student 62.17 "
    )
    assert "distilling helped: +2.2 points (95 % interval +0.3 to +4.1" in line
