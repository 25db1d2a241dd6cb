"""Fashion-MNIST: 70,000 grey images of 28×28 pixels, 10 classes (Xiao et al. 2017), padded to 32×32."""

from collections.abc import Callable, Mapping

from torch.nn.functional import pad
from torchvision.datasets import FashionMNIST

from distill.data.base import Data, cut, from_arrays
from distill.data.download import fetch
from distill.schema.ranges import Count, Inside, Number, Seed


def fashion_mnist(
    root: str,
    batch_size: Count,
    num_workers: Number,
    val_fraction: Inside = 0.1,
    split_seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
) -> Data:
    """The official test set; validation is cut from training. By default shifted and mirrored."""
    names = ", ".join(name for name, _ in FashionMNIST.resources)
    remedy = f"put {names} from {FashionMNIST.mirrors[0]}, unpacked, into its subfolder FashionMNIST/raw"
    classes, (images, labels), (test_images, test_labels) = fetch(FashionMNIST, root, remedy)
    images, test = pad(images, [2] * 4), (pad(test_images, [2] * 4), test_labels)
    train, val = ((images[rows], labels[rows]) for rows in cut(labels, (val_fraction,), split_seed, classes))
    return from_arrays(classes, train, val, test, augment, batch_size, num_workers)
