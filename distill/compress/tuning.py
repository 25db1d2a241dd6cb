"""Fine-tuning as an option of a compression step."""

from collections.abc import Callable

from torch import nn

from distill.errors import UserError


def tuning(step: str, finetune: Callable | None, epochs: int, lr: float) -> Callable[[nn.Module, str], nn.Module]:
    """`train(net, name)` for a step's `epochs` and `lr`; with epochs=0 it returns `net` as it is.

    Raises:
        UserError: nothing to fine-tune with.
    """
    if epochs == 0:
        return lambda net, name: net
    if finetune is None:
        raise UserError(f"compress.{step} trains: it needs a run with data and losses, or compress.{step}.epochs=0")
    return lambda net, name: finetune(net, name, epochs=epochs, lr=lr)
