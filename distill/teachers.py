"""Who teaches. A teacher answers to a batch: `Frozen` is a trained network, or a `Committee` of several, `Peer` a
second student that learns along, `Ema` the student's own past."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from distill.compress.dynamic_int8 import fold_batch_norm
from distill.errors import UserError
from distill.losses.ce import CE
from distill.losses.kd import kd
from distill.network import Network
from distill.types import Batch, Outputs


def content_hash(module: nn.Module) -> str:
    """Hexadecimal SHA-256 of all parameters and buffers, names and dtypes included."""
    return tensors_hash([*module.named_parameters(), *module.named_buffers()])


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hexadecimal SHA-256 of tensors with their names and dtypes, in whatever order they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Teacher(nn.Module):
    """Answers to a batch: `forward(batch) -> Outputs`. What the losses see of it is detached."""

    network: nn.Module  # whose taps the losses choose: `keep(names)`, `tensors()`, `images -> Outputs`
    fixed: bool = True  # it answers the same at every time of a run
    learns: bool = False  # its parameters are trained along with the student's, by `loss`

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """What a teacher that learns is trained by: its outputs with gradient, the student's without."""
        raise NotImplementedError

    def after_step(self, student: Network) -> None:
        """Called after every step of the optimizer."""


class Frozen(Teacher):
    """A trained network that only answers: eval mode, no gradients, nothing of it in the checkpoint but its hash.

    The network is kept out of the module tree, so no optimizer, gradient hook, `train()` or checkpoint reaches
    it; it moves between devices and dtypes with its owner. Where it isn't looked into, a faster copy answers for it.

    Args:
        network: trained.
        precision: what it computes in, whatever the student does; see distill.precision.teaching.
        quicken: the faster copy of a plain net, images to logits: its batch norms folded, or in int8.
    """

    def __init__(
        self,
        network: "Network | Committee",
        precision: str = "32-true",
        quicken: Callable[[nn.Module], nn.Module] = fold_batch_norm,
    ):
        super().__init__()
        self._outside_the_tree = [network.eval().requires_grad_(False)]  # and the copy, when it is first asked
        self.precision, self.quicken = precision, quicken
        self.fingerprint = content_hash(network)

    @property
    def network(self) -> "Network | Committee":
        return self._outside_the_tree[0]

    def _apply(self, fn, recurse=True):
        for net in self._outside_the_tree:
            net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # no_grad, not inference_mode: an inference tensor saved for the backward of a loss fails
    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        if self.network.recording:
            return self._looked_into(batch.images)
        if len(self._outside_the_tree) == 1:
            with _autocast(batch.images, None):
                self._outside_the_tree.append(self._quick(batch.images))
        with _autocast(batch.images, self.precision):
            return Outputs(self._outside_the_tree[1](batch.images), self.network.tensors())

    def _looked_into(self, images: Tensor) -> Outputs:
        if self.precision == "int8":
            raise UserError(
                "teacher.precision=int8 answers with logits only, and a loss reads the teacher's features: choose "
                "another precision"
            )
        with _autocast(images, self.precision):
            return self.network(images)

    def _quick(self, images: Tensor) -> nn.Module:
        """The copy that answers without features; an unchanged one where the faster does not answer alike."""
        wanted = self.network(images).logits
        place = next(chain(self.network.parameters(), self.network.buffers()))
        plain = self.network.plain()
        quick = self.quicken(plain)
        quick, plain = (net.to(place).to(memory_format=torch.channels_last) for net in (quick, plain))
        came = quick(images)
        near = torch.allclose(came, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())
        return quick if near or self.precision == "int8" else plain

    def get_extra_state(self) -> str:
        return self.fingerprint

    def set_extra_state(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise UserError(
                f"this run was taught by another teacher (its content hash is {fingerprint[:12]}, the present "
                f"one's {self.fingerprint[:12]}): give the same teacher again or start a new run"
            )


def _autocast(images: Tensor, precision: str | None):
    """The mixed precision of that name, or none, whatever is on around it."""
    mixed = precision is not None and precision.endswith("-mixed")
    kind = images.device.type
    half = torch.float16 if precision == "16-mixed" and kind != "cpu" else torch.bfloat16  # as Lightning does
    return torch.autocast(kind, half, enabled=mixed)


class Committee(nn.Module):
    """Several networks as one: images to the weighted mean of their logits and the features of the first.

    Each member normalises the images for itself. Logits are averaged, not probabilities: softmax(mean(z) / T) is the
    normalised geometric mean of the members' softened predictions (Hinton et al. 2015, §1 names it beside the
    arithmetic one) at every temperature T, which a loss chooses later, and losses on raw logits keep their scale.

    Args:
        members: networks or plain nets, answering with equally many logits.
        weights: one a member, positive; None: all equal. They are divided by their sum.

    Raises:
        UserError: no members, weights that don't fit, members of different classes.
    """

    def __init__(self, members: Iterable[nn.Module], weights: Sequence[float] | None = None):
        super().__init__()
        self.members = nn.ModuleList(members)
        weights = [1.0] * len(self.members) if weights is None else list(weights)
        if not weights or len(weights) != len(self.members) or min(weights) <= 0:
            raise UserError(
                f"teacher.weights={weights}: expected one positive number for each of the {len(self.members)} members"
            )
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))

    def keep(self, names: Iterable[str]) -> "Committee":
        self.members[0].keep(names)
        return self

    @property
    def recording(self) -> bool:
        return self.members[0].recording

    def tensors(self) -> dict[str, Tensor]:
        return self.members[0].tensors()

    def forward(self, images: Tensor) -> Outputs:
        answers = [member(images) for member in self.members]
        shapes = [tuple(answer.logits.shape) for answer in answers]
        if len(set(shapes)) > 1:
            raise UserError(f"the members of teacher=ensemble answer with different shapes: {shapes}")
        return Outputs(self.mean([answer.logits for answer in answers]), answers[0].features)

    def mean(self, logits: Sequence[Tensor]) -> Tensor:
        return torch.einsum("m,mnk->nk", self.weights.to(logits[0].dtype), torch.stack(list(logits)))

    def plain(self) -> "PlainCommittee":
        """A copy without taps, in eval mode on the CPU: images in [0, 1] to logits."""
        return PlainCommittee([member.plain() for member in self.members], self.weights.tolist()).eval()


class PlainCommittee(Committee):
    """Images to the weighted mean of the members' logits."""

    def forward(self, images: Tensor) -> Tensor:
        return self.mean([member(images) for member in self.members])


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

    def __init__(self, network: Network, temperature: float = 1.0, weight: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        self.network = network
        self.temperature, self.weight = temperature, weight
        self.labels = CE(label_smoothing)

    def forward(self, batch: Batch) -> Outputs:
        return self.network(batch.images)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        own = self.labels(teacher, None, batch)
        return own + self.weight * kd(teacher.logits, student.logits, self.temperature)


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

    def __init__(self, student: Network, decay: float = 0.999):
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
