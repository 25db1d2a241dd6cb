"""Images per second beside torchdistill (pip install torchdistill) on the same pair, images and batch, online.

    python -m benchmarks.peer teacher=resnet56 student=resnet20 data=imagefolder data.root=cifar10 data.batch_size=128 \
        --rows 2560 --json benchmarks/peer.json

torchdistill runs as its examples do: its DistillationBox with KDLoss, per-sample torchvision transforms in a
DataLoader, float32, contiguous tensors. Then what makes the difference is taken in step by step, in its loop: memory
format, precision, our images; and last our loop, and in it a teacher in int8. All take turns in one process.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchdistill.core.distillation import DistillationBox
from torchvision.transforms import v2

from benchmarks.epochs import ours, setting
from benchmarks.paired import in_turns, ratio, record
from distill.cli import roles
from distill.data.base import Data
from distill.networks.build import build_network
from distill.training.precision import on_cpu

PER_SAMPLE = v2.Compose(
    [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
)


class Samples(Dataset):
    """One image at a time, as torchvision's data sets give them: PIL, then transforms."""

    def __init__(self, data: Data):
        self.images = [v2.functional.to_pil_image(image) for image in data.train.images]
        self.labels = data.train.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int):
        return PER_SAMPLE(self.images[row]), self.labels[row]


class Plain(torch.nn.Module):
    """A network of ours as torchdistill takes them: images to logits, the logits at the output of a module."""

    def __init__(self, network, channels_last: bool):
        super().__init__()
        self.normalize, self.net, self.out = network.normalize, network.net, torch.nn.Identity()
        self.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def forward(self, images):
        return self.out(self.net(self.normalize(images)))


def peer(cfg, data: Data, samples: Samples, channels_last=False, half=False, our_images=False) -> Callable[[], float]:
    """An epoch of torchdistill's DistillationBox."""
    networks = [
        Plain(build_network(part, data.num_classes, data.image_size, 0), channels_last)
        for part in (cfg.teacher, cfg.student)
    ]
    criterion = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": "out",
            "student_module_io": "output",
            "teacher_module_path": "out",
            "teacher_module_io": "output",
            "temperature": cfg.loss.kd.temperature,
            "alpha": 0.5,
        },
    }
    sgd = {"lr": cfg.optimizer.lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    hook = {"forward_hook": {"input": [], "output": ["out"]}}
    loader = {
        "dataset_id": "train",
        "random_sample": True,
        "kwargs": {"batch_size": data.batch_size, "num_workers": 0, "drop_last": True},
        "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
    }
    box = DistillationBox(
        *networks,
        {"train": samples},
        {
            "num_epochs": 1,
            "train_data_loader": loader,
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False, **hook},
            "student": {"forward_proc": "forward_batch_only", "requires_grad": True, **hook},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": criterion, "weight": 1.0}}},
            },
            "optimizer": {"key": "SGD", "kwargs": sgd},
        },
        torch.device("cpu"),
        None,
        False,
        1,
    )

    def batches():
        if not our_images:
            yield from box.train_data_loader
        else:
            for batch in data.train_loader(0):
                yield batch.images, batch.labels, {}

    def epoch() -> float:
        start = time.perf_counter()
        box.pre_epoch_process(epoch=0)
        for images, labels, supplement in batches():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss=loss)
        return time.perf_counter() - start

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of train.py: teacher=resnet56 student=resnet20 …")
    parser.add_argument("--rows", type=int, default=2560, help="training images of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs of each contender")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg, data, teacher = setting([f"cache.folder={folder}", *options.words], options.rows)
        samples = Samples(data)
        contenders = {
            "torchdistill": peer(cfg, data, samples),
            "+ channels last": peer(cfg, data, samples, channels_last=True),
            "+ bf16": peer(cfg, data, samples, channels_last=True, half=True),
            "+ our images": peer(cfg, data, samples, channels_last=True, half=True, our_images=True),
            "ours, online": ours(cfg, data, teacher, ("ce", "kd"), keep="off"),
            "ours, cached": ours(cfg, data, teacher, ("ce", "kd"), keep="logits", views=1),
        }
        if on_cpu(cfg.trainer.accelerator):
            cfg.teacher.precision = "int8"
            in_int8 = roles.frozen(cfg, teacher.network, data)
            contenders["ours, online, int8 teacher"] = ours(cfg, data, in_int8, ("ce", "kd"), keep="off")
        found = in_turns(contenders, options.rounds)
    steps = len(data.train) // data.batch_size * data.batch_size
    speed = {name: [steps / seconds for seconds in runs] for name, runs in found.items()}
    ratios = {name: ratio(speed, name, "torchdistill") for name in contenders}
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} x torchdistill's images per second")
    record("benchmarks.peer", options.json, rows=len(data.train), images_per_second=speed, ratios=ratios)


if __name__ == "__main__":
    main()
