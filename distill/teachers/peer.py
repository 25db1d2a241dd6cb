"""Students that teach while they learn."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.ce import CE
from distill.losses.kd import kd
from distill.networks.network import Network
from distill.schema.ranges import BelowOne, Count, NotNegative, Positive
from distill.teachers.base import Teacher
from distill.types import Batch, Outputs


class Peer(Teacher):
    """Mutual learning: Zhang, Xiang, Hospedales & Lu, "Deep Mutual Learning", CVPR 2018, eq. 4–10.

        L_p = CE(z_p, y) + w · 1/(K-1) Σ_{l≠p} T² KL(softmax(z_l / T) ‖ softmax(z_p / T)),   T = w = 1

    of each of K - 1 peers, and the student's side is 'loss=[ce,kd]' loss.kd.temperature=1. Each takes the others'
    answers as constants. All step at once from the same batch, in one optimizer, where the paper lets them take turns.
    The student ships; the peers are in the checkpoint.

    Several peers answer the student with the mean of their probabilities at T, as logits: KL to that has the gradient
    of the mean of the KLs. The features are those of the first.

    Args:
        network: the first peer.
        temperature, weight: T, w.
        label_smoothing: of its cross-entropy, see distill.losses.ce, which takes mixed images' labels by their shares.
        peers: K - 1.
        another: a further peer's network from its number, 1 to K - 2.
    """

    fixed, learns = False, True

    def __init__(
        self,
        network: Network,
        temperature: Positive = 1.0,
        weight: NotNegative = 1.0,
        label_smoothing: BelowOne = 0.0,
        peers: Count = 1,
        another: Callable[[int], Network] | None = None,
    ):
        super().__init__()
        self.network = network
        self.others = nn.ModuleList(another(number) for number in range(1, peers))
        self.temperature, self.weight = temperature, weight
        self.labels = CE(label_smoothing)

    def forward(self, batch: Batch) -> Outputs:
        first = self.network(batch.images)
        if not self.others:
            return first
        logits = torch.stack([first.logits, *(other(batch.images).logits for other in self.others)])  # (K-1, N, C)
        probabilities = F.softmax(logits.float() / self.temperature, dim=2).mean(0)
        mean = self.temperature * probabilities.clamp(min=1e-30).log()
        return Outputs(mean, {**first.features, "peers": logits})

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        peers = [*teacher.features["peers"]] if self.others else [teacher.logits]
        return sum(self._one(number, [student.logits, *peers], batch) for number in range(1, 1 + len(peers)))

    def _one(self, number: int, everyone: list[Tensor], batch: Batch) -> Tensor:
        """L_p of one of the K answers (N, C)."""
        mine = everyone[number]
        rest = [other.detach() for place, other in enumerate(everyone) if place != number]
        divergence = sum(kd(mine, other, self.temperature) for other in rest) / len(rest)
        return self.labels(Outputs(mine, {}), None, batch) + self.weight * divergence
