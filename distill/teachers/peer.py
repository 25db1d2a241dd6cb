"""A second student that teaches while it learns."""

from torch import Tensor

from distill.losses.ce import CE
from distill.losses.kd import kd
from distill.networks.network import Network
from distill.schema.ranges import BelowOne, NotNegative, Positive
from distill.teachers.base import Teacher
from distill.types import Batch, Outputs


class Peer(Teacher):
    """Mutual learning: Zhang, Xiang, Hospedales & Lu, "Deep Mutual Learning", CVPR 2018, eq. 4–8.

        L_peer = CE(z_p, y) + w · T² KL(softmax(z_s / T) ‖ softmax(z_p / T)),   T = w = 1

    and the student's side is 'loss=[ce,kd]' loss.kd.temperature=1. Each takes the other's answer as a constant. Both
    step at once from the same batch, in one optimizer, where the paper lets them take turns. The student ships; the
    peer is in the checkpoint.

    Args:
        network: the second student.
        temperature, weight: T, w.
        label_smoothing: of its cross-entropy, see distill.losses.ce, which takes mixed images' labels by their shares.
    """

    fixed, learns = False, True

    def __init__(
        self, network: Network, temperature: Positive = 1.0, weight: NotNegative = 1.0, label_smoothing: BelowOne = 0.0
    ):
        super().__init__()
        self.network = network
        self.temperature, self.weight = temperature, weight
        self.labels = CE(label_smoothing)

    def forward(self, batch: Batch) -> Outputs:
        return self.network(batch.images)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        own = self.labels(teacher, None, batch)
        return own + self.weight * kd(teacher.logits, student.logits, self.temperature)
