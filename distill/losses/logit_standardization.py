"""Logits as z-scores: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, alg. 1.

    Z(x) = (x - mean(x)) / std(x)   for each row of logits;   L = τ² · KL(softmax(Z(t) / τ) ‖ softmax(Z(s) / τ))

Student and teacher are matched in the shape of their logits, not in their scale. It goes in front of any loss on
logits (`loss.kd.standardize=true`, `loss.dkd.standardize=true`, …); `loss=[ce,logit_standardization]` is KD with
it, at the authors' base temperature τ = 2 and weight 9 beside loss.ce.weight=0.1 (their released CIFAR-100 command
line). As in their code the standard deviation is unbiased, and the factor is that of τ alone.

A row flatter than 1e-4 becomes zeros without a gradient, where the released code multiplies the gradient by 1e7.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FLAT = 1e-4


def logit_standardization(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """KD of the z-scores: scalar from logits (N, K); zero where one row is a·(the other) + b with a > 0."""
    student, teacher = (
        F.log_softmax(standardize(logits) / temperature, dim=-1) for logits in (student_logits, teacher_logits)
    )
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardize(logits: Tensor) -> Tensor:
    """Z-scores of each row of (…, K); the same for a·logits + b with a > 0."""
    centred = logits - logits.mean(-1, keepdim=True)
    varies = centred.pow(2).sum(-1, keepdim=True) / (logits.shape[-1] - 1) > FLAT**2
    centred = torch.where(varies, centred, 0.0)
    spread = torch.where(varies, centred, 1.0).pow(2).sum(-1, keepdim=True) / (logits.shape[-1] - 1)
    return centred / spread.sqrt()
