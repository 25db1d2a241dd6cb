"""Whether a file may ship: it answers like the network that it came from."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.report.tables import Row, stale
from distill.runtimes import measure

SLOWER = 1.5  # times that a file may take of its float one's time before that is remarked
SOURCE = "the network it was exported from"


def check(
    name: str,
    logits: Tensor,
    source: Tensor,
    student: Tensor,
    labels: Tensor,
    to_source: Mapping[str, float | None],
    to_student: Mapping[str, float | None],
) -> list[str]:
    """Why the file `name` may not ship, one line a reason; an empty list when it may.

    Args:
        logits: (N, K), answered by the reloaded file.
        source: (N, K), of the eager network that the file was exported from, asked in the same way.
        student: (N, K), of the float student.
        labels: (N,) int64.
        to_source, to_student: bounds against each, see `difference`.
    """
    bad = (~torch.isfinite(logits).all(1)).sum().item()
    if bad:
        return [f"{name}: answers NaN or infinity for {bad} of {len(logits)} images"]
    return [
        f"{name}: {line}"
        for other, reference, bounds in ((source, SOURCE, to_source), (student, "the float student", to_student))
        for line in difference(logits, other, reference, student, bounds, labels)
    ]


def difference(
    logits: Tensor,
    other: Tensor,
    reference: str,
    student: Tensor,
    bounds: Mapping[str, float | None],
    labels: Tensor | None = None,
) -> list[str]:
    """How logits (N, K) differ from those of the `reference` by more than the bounds allow, one line a reason.

    Args:
        bounds: what is missing or None is not asked for. "snr": least signal to noise in dB; "agreement": least share
            of equal top-1; "logit": largest |Δlogit|. With "beside", in dB, the first two are no stricter than what
            the reference itself keeps of the float student, its signal to noise lessened by `beside`: a depth that
            amplifies its roundings amplifies those of a file; of the share two standard errors are chance. But never
            laxer than "floor" (dB) and "least" (share).
            With "accuracy_drop", in [0, 1], logits that agree too seldom, but on "least" of the images, may still do
            if they are as accurate as the reference's but for that drop: fine-tuning may change answers.
        labels: (N,) int64; None: agreement is not asked for.
    """
    failures, limit = [], bounds.get("logit")
    # "not <=" and "not >=" also catch a reference that is NaN
    if limit is not None and not (delta := measure.logit_delta(logits, other)) <= limit:
        failures.append(f"logits differ by up to {delta:.3g} from {reference} (allowed: {limit:g})")
    snr, agreement, beside = bounds.get("snr"), bounds.get("agreement"), bounds.get("beside")
    if beside is not None:
        snr = max(bounds["floor"], min(snr, measure.signal_to_noise(other, student) - beside))
        expected = min(agreement, measure.agreement(other, student))
        agreement = max(bounds["least"], expected - 2 * math.sqrt(expected * (1 - expected) / len(logits)))
    if snr is not None and not (found := measure.signal_to_noise(logits, other)) >= snr:
        failures.append(f"logits differ from those of {reference}: signal to noise {found:.1f} dB (needed: {snr:.1f})")
    if labels is not None and agreement is not None and not (same := measure.agreement(logits, other)) >= agreement:
        lost = measure.accuracy(other, labels) - measure.accuracy(logits, labels)
        allowed = bounds.get("accuracy_drop")
        if allowed is None or not lost <= allowed or same < bounds.get("least", 0):
            failures.append(
                f"top-1 agrees with {reference} on {same:.2%} of the images (needed: {agreement:.2%})"
                + ("" if allowed is None else f" and is {lost:.2%} less accurate (allowed: {allowed:.2%})")
            )
    return failures


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader should know of files that may ship: one that is of another student, was not executed, or is larger
    or much slower than the float student's of the same format."""
    floats = {row.format: row for row in rows if row.format != "eager" and Path(row.name).stem == "student"}
    told = [f"{name} is stale: it was made from a student that has changed since" for name in stale(rows)]
    told += [
        f"{row.name} was not executed here, where its runtime does not run: its structure was read back and checked"
        for row in rows
        if row.format != "eager" and row.top1 is None and row.latency_ms is None
    ]
    for row in rows:
        plain = floats.get(row.format)
        if plain is None or row.name == plain.name:
            continue
        if None not in (row.bytes, plain.bytes) and row.bytes > plain.bytes:
            told.append(f"{row.name} is larger than {plain.name}: {row.bytes:,} against {plain.bytes:,} bytes")
        if None not in (row.latency_ms, plain.latency_ms) and row.latency_ms > SLOWER * plain.latency_ms:
            told.append(f"{row.name} is {row.latency_ms / plain.latency_ms:.1f} times slower than {plain.name}")
    return told
