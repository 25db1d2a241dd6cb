"""Preprocessing inside a file: an image of any height and width becomes what the network takes, as the test images did.

The same arithmetic twice, in whole numbers: as a module, which TorchScript compiles, and as operators of ONNX. An image
of the network's own size is taken as it is, so that a file answers prepared images as it would without.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import interpolate


class Cut(nn.Module):
    """images (N, C, h, w) → (N, C, height, width): `distill.data.augment.CenterCrop`, of floats in [0, 1].

    Args:
        covered: px, height and width that an image covers once it is resized, bilinear and antialiased.
        size: px, height and width of the middle that is cut out then.
        own: px, the network's height and width; an image of that size is returned unchanged.
    """

    def __init__(self, covered: tuple[int, int], size: tuple[int, int], own: tuple[int, int]):
        from distill.data.augment import LONGEST  # not what a file's own process loads

        super().__init__()
        self.high, self.wide = covered
        self.height, self.width = size
        self.own_height, self.own_width = own
        self.longest = LONGEST

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2], images.shape[3]
        most = self.longest * width * self.high // self.wide, self.longest * height * self.wide // self.high
        images = _middle(images, max(1, most[0]), max(1, most[1]))
        height, width = images.shape[2], images.shape[3]
        if height != self.own_height or width != self.own_width:
            # of the side that must grow more what is covered, of the other one at least that, as it is rounded down
            sizes = [max(self.high, self.wide * height // width), max(self.wide, self.high * width // height)]
            images = interpolate(images, sizes, mode="bilinear", antialias=True)
        return _middle(images, self.height, self.width).contiguous()


def _middle(images: Tensor, height: int, width: int) -> Tensor:
    """At most so many px of the middle; where it can't be the middle, torchvision's: halves are rounded to even."""
    height, width = min(height, images.shape[2]), min(width, images.shape[3])
    down, across = images.shape[2] - height, images.shape[3] - width
    top, left = (down + down // 2 % 2) // 2, (across + across // 2 % 2) // 2
    return images[:, :, top : top + height, left : left + width]


def described_with(described: Mapping, resize: bool) -> dict:
    """A file's description of itself, `runtimes.artifact.describe`'s, where the file is to resize or not.

    Images of a set that is kept at their own size cover that size once, as in distill/data/prepare.py.
    """
    given = described["input"]
    if not resize:
        return {**described}
    height, width = given["height"], given["width"]
    covers = {"short_side": height} if height == width else {"covered": [height, width]}
    known = {"short_side", "covered"} & given.keys()
    return {**described, "input": {**given, **({} if known else covers), "resize": True}}


def cuts(given: Mapping) -> list[Cut]:
    """An image's way to the network inside a file, as its description's "input" says; none where it is outside."""
    if not given.get("resize"):
        return []
    own = given["height"], given["width"]
    covered = given.get("covered") or [given["short_side"]] * 2
    packed = given.get("pack")
    steps = [(covered, own)] if packed is None else [(packed, packed), (covered, own)]
    return [Cut(tuple(covered), tuple(size), own) for covered, size in steps]


def before(net: nn.Module, cuts: list[Cut]) -> nn.Module:
    """images (N, C, h, w) of any size to logits (N, K)."""
    return nn.Sequential(*cuts, net).eval()


def shown(net: nn.Module, example: Tensor, cuts: list[Cut]) -> tuple[nn.Module, Tensor]:
    """What a file is compared with before it is kept, and on which images: one that resizes on other sizes, too."""
    if not cuts:
        return net, example
    height, width = example.shape[2:]
    return before(net, cuts), interpolate(example, (2 * height + 1, 3 * width), mode="bilinear")


PREPARED = "prepared"  # the name of what the network takes, in a graph of ONNX that takes photos

_MIDDLE = """
  down{n} = Sub (sides{n}, part{n})
  half{n} = Div (down{n}, two)
  odd{n} = Mod (half{n}, two)
  even{n} = Add (down{n}, odd{n})
  start{n} = Div (even{n}, two)
  end{n} = Add (start{n}, part{n})
  middle{n} = Slice (whole{n}, start{n}, end{n}, axes)
"""
_CUT = """
  whole{n} = Identity ({image})
  sides{n} = Shape <start = 2> (whole{n})
  turned{n} = Gather (sides{n}, swap)
  longest{n} = Constant <value_ints = [{longest_high}, {longest_wide}]> ()
  crossed{n} = Constant <value_ints = [{wide}, {high}]> ()
  product{n} = Mul (turned{n}, longest{n})
  quotient{n} = Div (product{n}, crossed{n})
  most{n} = Max (quotient{n}, one)
  part{n} = Min (sides{n}, most{n})
{part}
  covered{n} = Constant <value_ints = [{high}, {wide}]> ()
  back{n} = Gather (part{n}, swap)
  times{n} = Mul (part{n}, crossed{n})
  other{n} = Div (times{n}, back{n})
  grown{n} = Max (covered{n}, other{n})
  own{n} = Constant <value_ints = [{own_height}, {own_width}]> ()
  equal{n} = Equal (part{n}, own{n})
  number{n} = Cast <to = 7> (equal{n})
  every{n} = ReduceMin <keepdims = 1> (number{n})
  same{n} = Cast <to = 9> (every{n})
  sides{m} = Where (same{n}, part{n}, grown{n})
  planes{n} = Shape <end = 2> (whole{n})
  sizes{n} = Concat <axis = 0> (planes{n}, sides{m})
  whole{m} = Resize <antialias = 1, exclude_outside = 1, mode = "linear",
    coordinate_transformation_mode = "half_pixel"> (middle{n}, "", "", sizes{n})
  size{n} = Constant <value_ints = [{height}, {width}]> ()
  part{m} = Min (sides{m}, size{n})
{middle}
"""
# the last shape is the input's batch and known sizes: runtimes fuse what they know the shapes of
_GRAPH = """photo (float[batch, channels, h, w] images) => (float[batch, {channels}, {height}, {width}] {prepared}) {{
  axes = Constant <value_ints = [2, 3]> ()
  swap = Constant <value_ints = [1, 0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
{cuts}
  batch = Shape <end = 1> (images)
  planes = Constant <value_ints = [{channels}, {height}, {width}]> ()
  shape = Concat <axis = 0> (batch, planes)
  {prepared} = Reshape ({last}, shape)
}}
"""


def put_before(model, cuts: list[Cut]) -> None:
    """Changes a model of ONNX, opset 18 or newer, whose input is called PREPARED: it takes "images" (batch, C, height,
    width) of any size."""
    from onnx.parser import parse_graph

    (given,) = model.graph.input
    channels, height, width = (dim.dim_value for dim in given.type.tensor_type.shape.dim[1:])
    image, steps = "images", []
    for number, cut in enumerate(cuts):
        n, m = f"{number}a", f"{number}b"
        values = {name: value for name, value in vars(cut).items() if isinstance(value, int)}
        values |= {"longest_high": cut.longest * cut.high, "longest_wide": cut.longest * cut.wide}
        parts = {"part": _MIDDLE.format(n=n), "middle": _MIDDLE.format(n=m)}
        steps.append(_CUT.format(n=n, m=m, image=image, **parts, **values))
        image = f"middle{m}"
    sizes = {"channels": channels, "height": height, "width": width}
    front = parse_graph(_GRAPH.format(prepared=PREPARED, cuts="".join(steps), last=image, **sizes))
    kept = {"images", PREPARED, ""}
    for node in front.node:  # a network may have weights called `one` or `shape`
        for names in (node.input, node.output):
            names[:] = [name if name in kept else f"photo/{name}" for name in names]
    nodes = [*front.node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.value_info.add().CopyFrom(given)  # with the batch's name, without which not all layers are fused
    given.name = "images"
    for dim, name in zip(given.type.tensor_type.shape.dim[2:], ("height", "width"), strict=True):
        dim.dim_param = name
