"""Teacher-free KD: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR 2020, §5.

    L = KL(softmax(u / T) ‖ p),   u(k) = a for the label, (1 - a) / (K - 1) for the others,   batch mean

Tf-KD_reg: a hand-made teacher u that is always right, with probability a. As in the released code, the softmax goes
over u, already a distribution, and the student's p has temperature 1 (the paper softens it by T too); there is no
factor T². That code averages over classes too and multiplies by 100: on CIFAR-100 the batch mean, as here for any K.
Defaults a = 0.99, T = 20 and weight 0.1 beside loss.ce.weight=0.9: its configuration of ResNet-18 on CIFAR-100.

Tf-KD_self, the paper's other half, is plain KD whose teacher is an earlier run of the same network:
`teacher=resnet18 teacher.checkpoint=EARLIER student=resnet18 'loss=[ce,kd]'`. `standardize` has no meaning here: there
is no second scale of logits to agree with.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.base import Loss
from distill.schema.ranges import Positive, UpToOne


def tfkd(student_logits: Tensor, labels: Tensor, temperature: float, correct: float) -> Tensor:
    """Scalar from logits (N, K), K ≥ 2, and labels (N,); zero where p is the hand-made teacher's softmax."""
    made = torch.full_like(student_logits, (1 - correct) / (student_logits.shape[1] - 1))
    made = made.scatter(1, labels[:, None], correct)
    teacher = F.log_softmax(made / temperature, dim=1)
    return F.kl_div(F.log_softmax(student_logits, dim=1), teacher, reduction="batchmean", log_target=True)


class TfKD(Loss):
    """`tfkd` of the student alone.

    Args:
        temperature: T > 0, of the hand-made teacher.
        correct: a, its probability of the label, in (0, 1].
    """

    needs_teacher = False

    def __init__(self, temperature: Positive = 20.0, correct: UpToOne = 0.99):
        super().__init__()
        self.temperature, self.correct = temperature, correct

    def forward(self, student, teacher, batch) -> Tensor:
        return tfkd(student.logits, batch.labels, self.temperature, self.correct)
