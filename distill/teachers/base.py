"""Who teaches. A teacher answers to a batch: `Frozen` is a trained network, or a `Committee` of several, `Peer` a
second student, or several, that learn along, `Ema` the student's own past."""

from collections.abc import Callable

from torch import Tensor, nn

from distill.networks.network import Network
from distill.types import Batch, Outputs


class Teacher(nn.Module):
    """Answers to a batch: `forward(batch) -> Outputs`. What the losses see of it is detached."""

    network: nn.Module  # whose taps the losses choose: `record(names)`, `tensors()`, `images -> Outputs`
    fixed: bool = True  # it answers the same at every time of a run
    kept: Callable | None = None  # (rows, view) -> what is kept of its answers, for workers: see Batch.answers
    learns: bool = False  # its parameters are trained along with the student's, by `loss`

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """What a teacher that learns is trained by: its outputs with gradient, the student's without."""
        raise NotImplementedError

    def after_step(self, student: Network) -> None:
        """Called after every step of the optimizer."""
