"""Small images: a network made for 224 px keeps more of the resolution in its first layers."""

from functools import partial

from torch import nn

from distill.networks.taps import dry_run

SMALL = 64  # px: up to here a stem is changed
PROBE = 128  # px: which every convolutional network of torchvision takes


def for_small_images(net: nn.Module) -> nn.Module:
    """Change `net` in place, so that 32 px end as a map of about 4 × 4 instead of one pixel.

    Of the layers that see a map of more than a quarter of the image's size, convolutions lose their stride
    and keep their weights, pooling layers are left out, and two kinds of first convolution are special:
    patches of 4 × 4 (ConvNeXt, Swin) overlap by half, 7 × 7 and larger (ResNet, DenseNet) become 3 × 3,
    freshly initialised. This is what is usually done by hand for CIFAR, one family at a time.
    """
    strided: list[str] = []

    def record(path, module, inputs):
        if inputs[0].shape[-1] > PROBE // 4:
            strided.append(path)

    hooks = [
        module.register_forward_pre_hook(partial(record, path))
        for path, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and _pair(module.stride) > (1, 1)
    ]
    try:
        dry_run(net, PROBE)
    finally:
        for hook in hooks:
            hook.remove()
    for path in strided:
        net.set_submodule(path, _without_stride(net.get_submodule(path)))
    return net


def _without_stride(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, nn.Conv2d):
        return nn.Identity()
    kernel = layer.kernel_size[0]
    if layer.kernel_size == layer.stride and kernel == 4:
        layer.stride, layer.padding = (2, 2), (1, 1)
        return layer
    if kernel >= 7:
        bias = layer.bias is not None
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, 1, 1, groups=layer.groups, bias=bias)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv
    layer.stride = (1, 1)
    return layer


def _pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
