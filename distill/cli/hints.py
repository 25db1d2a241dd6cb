"""What was probably meant by an option that isn't there: another program's name for it, or a slip."""

from collections.abc import Sequence

from distill.schema.values import nearest

SPELLINGS = {  # other programs' names whose last part is not ours
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "bs": "data.batch_size",
    "workers": "data.num_workers",
    "dataset": "data",
    "data_dir": "data.root",
    "model": "student",
    "arch": "student",
    "student_model": "student",
    "teacher_model": "teacher",
    "optim": "optimizer",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "temp": "loss.kd.temperature",
    "device": "trainer.accelerator",
    "gpus": "trainer.devices",
    "amp": "trainer.precision",
    "fp16": "trainer.precision",
    "grad_clip": "trainer.gradient_clip_val",
    "patience": "early_stopping",
    "resume": "run",
    "output_dir": "name",
    "quantize": "compress",
    "quantization": "compress",
}


def meant(name: str, known: Sequence[str]) -> str | None:
    """The key of `known` that `name` probably stands for: another program's spelling of it, its last part (that of the
    fewest parts, the student's before the teacher's), or a near word."""
    name = name.lstrip("-+~").replace("-", "_")
    if SPELLINGS.get(name) in known:
        return SPELLINGS[name]
    ends = [key for key in known if key.endswith(f".{name}")]
    if ends:
        return min(ends, key=lambda key: (key.count("."), not key.startswith("student")))
    return nearest(name, [*known]).partition("did you mean ")[2].rstrip("?") or None
