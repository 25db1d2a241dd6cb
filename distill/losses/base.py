"""What every loss is: one term of the total, computed from two networks' outputs."""

from collections.abc import Sequence

from torch import Tensor, nn

from distill.types import Batch, Outputs


class Loss(nn.Module):
    """One term. Its parameters are learned with the student; its buffers (memory banks) are checkpointed.

    A subclass names the features it reads in `student_taps` and `teacher_taps`, so that only those are
    recorded. Neither its weight nor its name is its own: both belong to the configuration.
    """

    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    needs_teacher: bool = True

    def build(self, student: Outputs, teacher: Outputs | None, data) -> None:
        """Make the layers whose shapes depend on the networks. Called once, with the outputs of one dry run.

        Args:
            student, teacher: outputs for the same two images; `teacher` is None where a run has none.
            data: the `distill.data.Data` of the run (number of training rows, classes).
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The term as a scalar: mean over the batch, unweighted, float32."""
        raise NotImplementedError
