"""compress=auto: the smallest file within a budget, found by making and measuring candidates.

A candidate is a share of channels to prune and a way to quantize what is left. Bytes and latency need no training:
they are measured first, on the files that the run's exporters write of it, each in its own runtime, for all candidates.
The budget is that of every file, or (`files=one`, as under target=) of one in whichever runtime. Candidates within it
are then trained and scored on the validation images, the smallest first, until one is accurate enough. What was chosen
is kept in the run's folder: a later command exports the same, although times measured again would differ.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Len
from torch import nn

from distill.compress import beside
from distill.compress.dynamic_int8 import dynamic_int8
from distill.compress.prune import prune
from distill.compress.qat_int8 import qat_int8
from distill.compress.static_int8 import static_int8
from distill.compress.tuning import tuning
from distill.compress.weight_only_int8 import weight_only_int8
from distill.data.base import Data
from distill.errors import OverBudget, UsageError, UserError
from distill.files import content_key, parse_bytes, read_json, scratch, write_json
from distill.files import size as bytes_of
from distill.networks.sources import describe
from distill.networks.weights import content_hash
from distill.progress import say
from distill.runtimes.artifact import Artifact
from distill.runtimes.graph import reason
from distill.runtimes.measure import accuracy_on, latency
from distill.runtimes.serve import serve
from distill.schema.ranges import BelowOne, Number, Positive, Share, Size

RUNTIMES = {"fx": "torchscript", "xnnpack": "executorch", "onnx": "onnx"}  # where no run says what it exports
QUANTIZERS = {
    "none": None,
    "weight_only_int8": weight_only_int8,
    "dynamic_int8": dynamic_int8,
    "static_int8": static_int8,
    "qat_int8": qat_int8,
}


class File(NamedTuple):
    bytes: int
    latency_ms: float | None = None  # of one image; None: it isn't executed here


@dataclass(frozen=True)
class Candidate:
    """What is done to the student, and what was measured of it; None: not measured."""

    ratio: float  # of channels pruned
    quantizer: str
    bytes: int | None = None  # of the largest file, or of the one that counts
    latency_ms: float | None = None  # of the slowest, or of the one that counts
    counts: str = ""  # the ending of the file whose bytes these are
    drop: float | None = None  # of validation accuracy, to the float student's, in [0, 1]
    files: Mapping[str, File] = field(default_factory=dict)  # by ending

    def __str__(self) -> str:
        steps = [f"prune {self.ratio}"] * (self.ratio > 0) + [self.quantizer] * (self.quantizer != "none")
        return " + ".join(steps) or "as it is"


def auto(
    net: nn.Module,
    finetune: Callable | None = None,
    data: Data | None = None,
    flow: str = "fx",
    *,
    bytes: Size | None = None,
    latency_ms: Positive | None = None,
    accuracy_drop: Share = 0.01,
    files: Literal["every", "one"] = "every",
    ratios: Annotated[Sequence[BelowOne], Len(1)] = (0.0, 0.3, 0.5, 0.7),
    quantizers: Annotated[
        Sequence[Literal["none", "weight_only_int8", "dynamic_int8", "static_int8", "qat_int8"]], Len(1)
    ] = ("weight_only_int8", "static_int8", "qat_int8"),
    epochs: Number = 5,
    lr: Positive = 5e-3,
    **steps: Callable,
) -> nn.Module:
    """`net` compressed as the smallest that is within the budget in all files of `flow`; what was measured is shown.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K); untouched.
        finetune: trains candidates, see distill/training/finetune.py. Where it has a `folder`, the choice is kept in
            folder/compress/auto-FLOW.json, and taken from there for the same weights, images and options; where it has
            `ship`, that writes the files that are measured, else the exporter of RUNTIMES does.
        data: training images calibrate, validation images decide.
        bytes: of each file, at most: a number or "1MB"; None: any.
        latency_ms: of one image on one thread of this machine, in each file, at most; None: any.
        accuracy_drop: of validation accuracy, in [0, 1], at most, to that of `net`.
        files: whether every file has to be within bytes and latency, or one is enough: that which will ship.
        ratios: shares of channels to prune, see distill/compress/prune.py; 0: none.
        quantizers: of QUANTIZERS.
        epochs, lr: of the fine-tuning after pruning.
        steps: those of QUANTIZERS that have options of their own, by name.

    Raises:
        UsageError: an unknown quantizer, a ratio out of range.
        UserError: no candidate is within the budget: says which came closest and what it misses. With files="one" it
            is an OverBudget: another flow's file may be within.
    """
    unknown = {*quantizers, *steps} - QUANTIZERS.keys()
    if unknown or not all(0 <= ratio < 1 for ratio in ratios) or not (ratios and quantizers):
        raise UsageError(
            f"compress.auto: ratios={list(ratios)} must be in [0, 1), quantizers={list(quantizers)} some of "
            f"{', '.join(QUANTIZERS)}"
        )
    if latency_ms is not None and not isinstance(latency_ms, (int, float)):
        raise UsageError(f"budget.latency_ms={latency_ms}: expected milliseconds, such as 5")
    if finetune is None:
        raise UserError("compress=auto trains: it needs a run with data and losses")
    limit = None if bytes is None else parse_bytes(bytes, "budget.bytes")
    steps = QUANTIZERS | steps
    ship = getattr(finetune, "ship", partial(_files, data=data))
    narrow = cache(lambda ratio: _pruned(net, data, ratio))

    @cache
    def trained(ratio: float) -> nn.Module:
        train = tuning("auto", _named(finetune, ratio), epochs if ratio else 0, lr)
        return train(narrow(ratio), "prune")

    def made(candidate: Candidate) -> nn.Module:
        step = steps[candidate.quantizer]
        start = trained(candidate.ratio)
        return start if step is None else step(start, _named(finetune, candidate.ratio), data, flow)

    options = [limit, latency_ms, accuracy_drop, files, list(ratios), list(quantizers), epochs, lr]
    options += [describe({name: steps[name] for name in quantizers}), getattr(finetune, "exports", None)]
    key = content_key({"flow": flow, "start": content_hash(net), "images": data.fingerprint, "options": options})
    folder = getattr(finetune, "folder", None)
    kept = None if folder is None else folder / "compress" / f"auto-{flow}.json"
    found, chosen = _recall(kept, key)
    if chosen is not None:
        say(f"  auto: chosen before, read from {kept} (without that file the search begins anew)")
        say(table(found, [chosen]))
        return made(chosen)
    for ratio in ratios:
        if narrow(ratio) is not None:
            measured = _measured(narrow(ratio), {name: steps[name] for name in quantizers}, data, flow, ship)
            for name, several in measured.items():
                found.append(Candidate(ratio, name, *_counted(several, files, latency_ms), files=several))
    wanted = accuracy_on(net, data.val_loader())
    small_enough = [
        candidate
        for candidate in sorted(found, key=lambda each: (each.bytes, each.quantizer == "qat_int8"))
        if (limit is None or candidate.bytes <= limit) and (latency_ms is None or candidate.latency_ms <= latency_ms)
    ]
    for candidate in small_enough:
        result = made(candidate)
        drop = wanted - accuracy_on(result, data.val_loader())
        sizes = _sizes(result, flow, ship)  # trained, it may be packed otherwise
        several = {ending: File(sizes[ending], file.latency_ms) for ending, file in candidate.files.items()}
        bytes_now, _, counts = _counted(several, files, latency_ms)
        now = replace(candidate, drop=drop, bytes=bytes_now, counts=counts, files=several)
        found[found.index(candidate)] = now
        say(f"  auto: {now}: {drop:+.2%} of validation accuracy lost")
        if drop <= accuracy_drop and (limit is None or bytes_now <= limit):
            chosen = now
            break
    say(table(found, [chosen]))
    if chosen is None:
        kind = UserError if files == "every" else OverBudget
        raise kind(_miss(found, limit, latency_ms, accuracy_drop, flow))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        record = {"key": key, "chosen": found.index(chosen), "found": [asdict(one) for one in found]}
        write_json(kept, record)
    return result


def attempt(net: nn.Module, data: Data, flow: str, *, quantizers=tuple(QUANTIZERS), **others) -> None:
    """Capture `net` for the quantizers, of which one is enough."""
    failures = []
    for name in quantizers:
        step = others.get(name, QUANTIZERS[name])
        tries = None if step is None else beside(step)
        if tries is None:
            return
        try:
            return tries(net, data, flow, **getattr(step, "keywords", {}))
        except UserError as error:
            failures.append(str(error))
    raise UserError(f"compress=auto: none of {', '.join(quantizers)} can take it: {failures[0]}")


def exceeded(rows: Iterable, bytes: int | str | None, latency_ms: float | None) -> dict[str, str]:
    """{file: what of it is beyond the budget} of the report's rows.

    Args:
        bytes, latency_ms: as for `auto`.
    """
    limit, found = None if bytes is None else parse_bytes(bytes, "budget.bytes"), {}
    for row in (row for row in rows if row.format != "eager"):
        over = []
        if limit is not None and row.bytes > limit:
            over.append(f"{row.bytes:,} bytes, over the budget of {limit:,}")
        if latency_ms is not None and row.latency_ms is not None and row.latency_ms > latency_ms:
            over.append(f"{row.latency_ms:.3f} ms, over the budget of {latency_ms}")
        if over:
            found[row.name] = f"{row.name}: {'; '.join(over)}"
    return found


def _counted(files: Mapping[str, File], which: str, latency_ms: float | None) -> tuple[int, float, str]:
    """Bytes, ms and ending of the files of a candidate that count: the largest and the slowest of `every`, or the
    smallest `one` of those that are fast enough."""
    timed = {ending: file for ending, file in files.items() if file.latency_ms is not None}
    if which == "every":
        largest = max(files, key=lambda ending: files[ending].bytes)
        return files[largest].bytes, max(file.latency_ms for file in timed.values()), largest
    fast = {ending: file for ending, file in timed.items() if latency_ms is None or file.latency_ms <= latency_ms}
    ending = min(fast or timed, key=lambda ending: timed[ending])
    return *timed[ending], ending


def _recall(kept: Path | None, key: str) -> tuple[list[Candidate], Candidate | None]:
    """All candidates and the chosen one of an earlier search under `key`; [] and None where there was none."""
    try:
        record = read_json(kept) if kept is not None and kept.exists() else {}
        if record.get("key") != key:
            return [], None
        found = [_read(one) for one in record["found"]]
        return found, found[record["chosen"]]
    except (UserError, LookupError, TypeError) as error:
        say(f"  warning: the search begins anew: {error if isinstance(error, UserError) else f'{kept} is damaged'}")
        return [], None


def _read(one: Mapping) -> Candidate:
    return Candidate(**{**one, "files": {ending: File(*file) for ending, file in one["files"].items()}})


def together(folder: Path, flows: Iterable[str]) -> str | None:
    """All files that the searches for several runtimes measured in a run's folder, smallest first, with the Pareto
    front over all of them; None where there are no two.

    Args:
        folder: the run's.
        flows: those of this command.
    """
    rows, chosen = [], []
    for flow in dict.fromkeys(flows):
        path = folder / "compress" / f"auto-{flow}.json"
        if not path.exists():
            continue
        record = read_json(path)
        for number, candidate in enumerate(map(_read, record["found"])):
            for ending, file in candidate.files.items():
                if file.latency_ms is not None:
                    rows.append(replace(candidate, bytes=file.bytes, latency_ms=file.latency_ms, counts=ending))
                    chosen += [rows[-1]] if number == record["chosen"] else []
    if len({row.counts for row in rows}) < 2:
        return None
    return "  auto: all runtimes together\n" + table(rows, chosen)


def pareto(found: Sequence[Candidate]) -> list[Candidate]:
    """Those than which no other is both smaller and faster (or as small and as fast)."""

    def beaten(one: Candidate) -> bool:
        return any(
            other.bytes <= one.bytes
            and other.latency_ms <= one.latency_ms
            and (other.bytes, other.latency_ms) != (one.bytes, one.latency_ms)
            for other in found
        )

    return [one for one in found if not beaten(one)]


def table(found: Sequence[Candidate], chosen: Sequence[Candidate]) -> str:
    """All candidates, smallest first; * on the Pareto front of bytes and latency, → chosen."""
    front = pareto(found)
    lines = [f"  {'':2} {'candidate':<32} {'file':<9} {'kB':>9} {'ms':>8} {'accuracy lost':>14}"]
    for one in sorted(found, key=lambda each: each.bytes):
        mark = ("→" if any(one is each for each in chosen) else "") + ("*" if one in front else "")
        lost = "not measured" if one.drop is None else f"{one.drop:+.2%}"
        figures = f"{one.bytes / 1000:>9,.1f} {one.latency_ms:>8.3f} {lost:>14}"
        lines.append(f"  {mark:2} {one!s:<32} {one.counts:<9} {figures}")
    return "\n".join(lines)


def _pruned(net: nn.Module, data: Data, ratio: float) -> nn.Module | None:
    """`net` with fewer channels, not trained; None where its channels are too few for that ratio."""
    if ratio == 0:
        return net
    try:
        return prune(net, None, data, ratio=ratio, epochs=0)
    except UsageError:
        raise
    except UserError as error:
        say(f"  auto: ratio {ratio} is left out: {error}")
        return None


def _measured(
    net: nn.Module, steps: Mapping[str, Callable | None], data: Data, flow: str, ship: Callable
) -> dict[str, dict[str, File]]:
    """Bytes and latency of each file, by its ending, of each way to quantize `net`, in one round of turns. QAT's files
    are as static int8's."""
    example = data.val[torch.arange(2) % len(data.val), 0].images
    with scratch() as folder:
        files: dict[str, list[Artifact]] = {}
        for name, step in steps.items():
            if name == "qat_int8":
                skip = getattr(step, "keywords", {}).get("skip", ())
                step = partial(static_int8, skip=skip, bias_correction=False)
            try:
                small = net if step is None else step(net, None, data, flow)
                files[name] = ship(small, flow, folder / name)
            except UsageError:
                raise
            except Exception as error:  # whatever a step or an exporter stumbles over in this network
                say(f"  auto: {name} is left out: {error if isinstance(error, UserError) else reason(error)}")
        executed = {name: [file for file in several if not file.elsewhere] for name, several in files.items()}
        each_file = {f"{name} {file.path.name}": file for name, several in executed.items() for file in several}
        with serve(each_file) as served:
            times, failed = latency({name: each.time for name, each in served.items()}, example, seconds=1)
        found = {}
        for name, several in files.items():
            asked = [f"{name} {file.path.name}" for file in executed[name]]
            unable = [failed[each] for each in asked if each in failed]
            if not asked or unable:
                say(f"  auto: {name} is left out: {(unable or ['no file of it runs here'])[0]}")
                continue
            found[name] = {
                file.path.suffix: File(bytes_of(file.path), times.get(f"{name} {file.path.name}", {}).get("latency_ms"))
                for file in several
            }
    return found


def _sizes(net: nn.Module, flow: str, ship: Callable) -> dict[str, int]:
    """Bytes of the files that ship of `net`, by their endings."""
    with scratch() as folder:
        return {file.path.suffix: bytes_of(file.path) for file in ship(net, flow, folder)}


def _files(net: nn.Module, flow: str, folder: Path, *, data: Data) -> list[Artifact]:
    example = data.val[torch.arange(2) % len(data.val), 0].images
    return import_module(f"distill.export.{RUNTIMES[flow]}").export(net, example, folder / "student", {})


def _named(finetune: Callable, ratio: float) -> Callable:
    """`finetune` into folders of one ratio's own: its candidates share what was pruned."""

    def train(net: nn.Module, name: str, **options) -> nn.Module:
        return finetune(net, f"auto-{ratio}-{name}", **options)

    return train


def _miss(found: Sequence[Candidate], limit: int | None, latency_ms: float | None, drop: float, flow: str) -> str:
    """The one line for a budget that can't be met."""
    asked = ", ".join(
        text
        for text in (
            limit is not None and f"{limit:,} bytes",
            latency_ms is not None and f"{latency_ms} ms",
            f"{drop:.1%} of accuracy lost",
        )
        if text
    )
    scored = [one for one in found if one.drop is not None]
    if scored:
        closest = min(scored, key=lambda one: one.drop)
        came = f"loses {closest.drop:.1%} of validation accuracy"
    elif found:

        def excess(one: Candidate) -> float:
            return max(one.bytes / (limit or one.bytes), one.latency_ms / (latency_ms or one.latency_ms))

        closest = min(found, key=excess)
        came = f"takes {closest.bytes:,} bytes ({closest.counts}) and {closest.latency_ms:.3f} ms"
    else:
        return f"compress=auto ({flow}): no candidate could be made; see the lines above"
    return f"compress=auto ({flow}): no candidate is within {asked}; closest: {closest}, which {came}"
