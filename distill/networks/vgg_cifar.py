"""VGG with batch normalisation for small images, one linear layer as its head.

Source: Simonyan and Zisserman, 2014 (arXiv:1409.1556), in the form of the CRD benchmark: Tian et al., 2020
(arXiv:1910.10699), section 4 (convolutions keep their bias, so that parameter counts agree).
"""

from typing import Literal

from torch import Tensor, nn

from distill.errors import UserError
from distill.schema.ranges import Count
from distill.types import ImageSize, sides

CONVOLUTIONS = {8: 1, 13: 2}  # depth: convolutions in each of the five blocks
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images (N, 3, H, W) to logits (N, K); see `vgg`."""

    def __init__(self, convolutions: int, num_classes: int, pools: int):
        super().__init__()
        in_channels = (3, *WIDTHS[:-1])
        self.blocks = nn.ModuleList(_block(convolutions, *pair) for pair in zip(in_channels, WIDTHS, strict=True))
        self.halve = nn.ModuleList(
            nn.MaxPool2d(2) if number < pools else nn.Identity() for number in range(len(WIDTHS) - 1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[0](images)  # (N, 64, H, W)
        for halve, block in zip(self.halve, self.blocks[1:], strict=True):
            x = block(halve(x))
        return self.linear(self.pool(x).flatten(1))  # from (N, 512, H/8, W/8), or H/16 above 32 px


def _block(convolutions: int, in_channels: int, out_channels: int) -> nn.Sequential:
    layers = []
    for number in range(convolutions):
        conv = nn.Conv2d(in_channels if number == 0 else out_channels, out_channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


def vgg(depth: Literal[8, 13], num_classes: Count, image_size: ImageSize) -> VGG:
    """VGG-8 or VGG-13: (N, 3, H, W) to (N, num_classes). With sides above 32 px the last block but one halves too.

    Raises:
        UserError: another depth, or images of less than 8 px.
    """
    if depth not in CONVOLUTIONS:
        raise UserError(f"the CIFAR VGG has depth {' or '.join(map(str, CONVOLUTIONS))}, not {depth}")
    side = min(sides(image_size))
    if side < 8:
        raise UserError(f"the CIFAR VGG needs images of at least 8 px, not {side}")
    return VGG(CONVOLUTIONS[depth], num_classes, pools=3 if side <= 32 else 4)
