"""Wide residual networks for small images, pre-activation.

Source: Zagoruyko and Komodakis, Wide Residual Networks, 2016 (arXiv:1605.07146), table 1.
"""

from torch import Tensor, nn

from distill.errors import UserError
from distill.schema.ranges import Count, WideDepth


class PreActivationBlock(nn.Module):
    """shortcut(x) + conv(relu(bn(conv(relu(bn(x)))))); a projection reads relu(bn(x)), as in the authors'."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()  # never in place: the identity path and taps still need its input
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, K); see `wrn`."""

    def __init__(self, blocks: int, width: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(blocks, 16, 16 * width, 1)
        self.layer2 = _stage(blocks, 16 * width, 32 * width, 2)
        self.layer3 = _stage(blocks, 32 * width, 64 * width, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer1(self.conv1(images))  # (N, 16·width, H, W)
        x = self.layer2(x)  # (N, 32·width, H/2, W/2)
        x = self.layer3(x)  # (N, 64·width, H/4, W/4)
        x = self.relu(self.bn(x))
        return self.linear(self.pool(x).flatten(1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def wrn(depth: WideDepth, width: Count, num_classes: Count) -> WideResNet:
    """WRN-`depth`-`width`, `depth` = 6n + 4, without dropout: (N, 3, H, W) to (N, num_classes).

    Raises:
        UserError: a depth that is not 6n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"a wide ResNet has depth 6n + 4 (10, 16, 22, 28, 40 …), not {depth}")
    return WideResNet((depth - 4) // 6, width, num_classes)
