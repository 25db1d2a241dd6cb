"""What every loss is: one term of the total, computed from two networks' outputs."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from distill.errors import UsageError
from distill.own import place_of, prefixed
from distill.types import Batch, Outputs


class Loss(nn.Module):
    """One term. Its parameters are learned with the student; its buffers (memory banks) are checkpointed.

    A subclass names the features it reads in `student_taps` and `teacher_taps`, so that only those are
    recorded. Neither its weight nor its name is its own: both belong to the configuration.
    """

    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()
    survey_taps: Sequence[str] = ()  # of the teacher, in `survey` alone
    needs_teacher: bool = True
    epoch: float = 0.0  # of the training, set before every step; counts from 0, in parts of an epoch

    def build(self, student: Outputs, teacher: Outputs | None, data) -> None:
        """Make the layers whose shapes depend on the networks. Called once, with the outputs of one dry run.

        Args:
            student, teacher: outputs for the same two images; `teacher` is None where a run has none.
            data: the `distill.data.Data` of the run (number of training rows, classes).
        """

    def survey(self, teacher: Callable[[Batch], Outputs], data) -> None:
        """Look at training images through the teacher's eyes. Called once, after `build`, where `survey_taps` names
        what of its features is looked at."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The term as a scalar: mean over the batch, unweighted, float32."""
        raise NotImplementedError


def terms_of(losses: Mapping[str, Loss], student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
    """What each loss answers, by name, unweighted.

    Raises:
        UsageError: one answers with something else than a scalar.
    """
    terms = {}
    for name, loss in losses.items():
        term = terms[name] = loss(student, teacher, batch)
        if not isinstance(term, Tensor) or term.dim():
            came = f"a tensor {tuple(term.shape)}" if isinstance(term, Tensor) else f"{term!r:.60}"
            line = f"loss {name} answers with {came}: forward has to return a scalar tensor, the mean over the batch"
            raise UsageError(prefixed(place_of(type(loss).forward), line))
    return terms
