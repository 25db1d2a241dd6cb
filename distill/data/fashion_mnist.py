"""Fashion-MNIST: 70,000 grey images of 28×28 pixels, 10 classes (Xiao et al. 2017), padded to 32×32."""

from collections.abc import Callable, Mapping

from torchvision.datasets import FashionMNIST

from distill.data.base import Data
from distill.data.download import published
from distill.schema.ranges import Inside, Seed


def fashion_mnist(
    root: str, val_fraction: Inside = 0.1, split_seed: Seed = 0, augment: Mapping[str, Callable] | None = None
) -> Data:
    """See `published`."""
    names = ", ".join(name for name, _ in FashionMNIST.resources)
    remedy = f"put {names} from {FashionMNIST.mirrors[0]}, unpacked, into its subfolder FashionMNIST/raw"
    return published(FashionMNIST, root, remedy, val_fraction, split_seed, augment, padding=2)
