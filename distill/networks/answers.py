"""What a network answers with: logits alone, or among other things in a tuple, a dict or an object of its own."""

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.fx import Proxy

TENSORS = (Tensor, Proxy)  # also while torch.fx traces
LOGITS = ("logits", "out")  # Hugging Face's and timm's name, and torchvision's of segmentation


def logits_of(answer):
    """The logits of what a network's `forward` returned.

    A tensor is the logits. Of a named tuple, a dict or an object (Hugging Face's outputs) they are what is called
    "logits" or "out"; of anything else, tuples and lists included, the first tensor: GoogLeNet's and Inception's in
    training, DeiT's of its class token. What else it holds is not read. What holds no tensor is returned as it is.
    """
    if isinstance(answer, TENSORS):
        return answer
    named = _names(answer)
    for name in LOGITS:
        if named.get(name) is not None:
            return logits_of(named[name])
    found = first_tensor(answer)
    return answer if found is None else found


def first_tensor(value) -> Tensor | None:
    """The first tensor in nested tuples, lists, dicts and dataclasses, or None."""
    if isinstance(value, TENSORS):
        return value
    return next((found for part in _parts(value) if (found := first_tensor(part)) is not None), None)


def _names(value) -> Mapping:
    if isinstance(value, Mapping):
        return value
    if hasattr(type(value), "_asdict"):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: getattr(value, name) for name in LOGITS if hasattr(value, name)}


def _parts(value) -> Iterator:
    yield from value if isinstance(value, (tuple, list)) else _names(value).values()
