"""The student's own past that teaches it."""

import copy

import torch
from torch import Tensor

from distill.errors import UserError
from distill.networks.network import Network
from distill.schema.ranges import BelowOne
from distill.teachers.base import Teacher
from distill.types import Batch, Outputs


class Ema(Teacher):
    """The exponential moving average of the student: Tarvainen & Valpola, "Mean teachers", NeurIPS 2017, §2.

        θ' ← α θ' + (1 - α) θ after every step of the optimizer,   α = min(decay, 1 - 1/(steps + 1)) as in their code

    Batch norm's statistics are averaged likewise and it answers in eval mode, where their teacher uses the batch's.
    It is in the checkpoint.

    Args:
        student: copied as it is now.
        decay: in [0, 1); 0.999 is the paper's.
    """

    fixed = False

    def __init__(self, student: Network, decay: BelowOne = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"teacher.decay={decay}: expected a number from 0 to below 1, such as 0.999")
        self.network = copy.deepcopy(student).requires_grad_(False).eval()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "Ema":
        super().train(mode)
        self.network.eval()
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        return self.network(batch.images)

    @torch.no_grad()
    def after_step(self, student: Network) -> None:
        self.steps += 1
        share = (1 / (self.steps + 1)).clamp(min=1 - self.decay)  # of the new weights
        averages, values = self.network.state_dict(), student.state_dict()
        for name, average in averages.items():
            if not isinstance(average, Tensor):  # a module's extra state
                continue
            if average.is_floating_point():
                average.lerp_(values[name].to(average.dtype), share.to(average.dtype))
            else:
                average.copy_(values[name])
