"""distill.data: augmentations and mixes against torchvision's, one image at a time."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning_fabric.utilities import move_data_to_device  # what the Trainer uses
from omegaconf import OmegaConf
from scipy.stats import beta, kstest
from sets import fake
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.data._utils.collate import default_convert
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms.v2 import RandAugment as TorchvisionRandAugment
from torchvision.transforms.v2 import functional as F

from distill.data import augment, color, policies
from distill.data.augment import Chain, Cutout, Flip, RandomResizedCrop, ShiftFlip, chain
from distill.data.color import ColorJitter
from distill.data.draws import draws
from distill.data.mix import CutMix, Mixup
from distill.data.policies import LEVELS, OPERATIONS, RandAugment, TrivialAugment
from distill.errors import UsageError
from distill.losses.ce import CE
from distill.types import Batch, Outputs

CONF = Path(__file__).parents[2] / "conf" / "augment"
N = 96


def uniforms(count: int, number: int = N, seed: int = 0):
    return draws(seed, torch.arange(number), torch.zeros(number, dtype=torch.int64), count)


@pytest.fixture(scope="module")
def images():
    """Smooth colours with a little noise, as photographs have, in every brightness."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(N, 3, 5, 5, generator=generator) * torch.rand(N, 1, 1, 1, generator=generator) * 255
    smooth = functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    return (smooth + 5 * torch.randn(N, 3, 32, 32, generator=generator)).clamp(0, 255).to(torch.uint8)


def differing(one, two) -> float:
    """Share of the values that differ."""
    return (one != two).double().mean().item()


# ---- single augmentations --------------------------------------------------------------------------------


def test_flip_and_cutout_equal_a_loop(images):
    numbers = uniforms(3)
    flipped = Flip()(images, numbers[:, :1], 32)
    cut = Cutout(size=10, fill=7)(images, numbers[:, 1:], 32)
    for row, (mirror, down, right) in enumerate(numbers.tolist()):
        assert torch.equal(flipped[row], images[row].flip(2) if mirror < 0.5 else images[row])
        expected, top, left = images[row].clone(), int(down * 32) - 5, int(right * 32) - 5
        expected[:, max(top, 0) : top + 10, max(left, 0) : left + 10] = 7
        assert torch.equal(cut[row], expected)
    assert 0.3 < (numbers[:, 0] < 0.5).double().mean() < 0.7


@pytest.mark.parametrize("name, theirs", [
    ("brightness", F.adjust_brightness), ("contrast", F.adjust_contrast), ("saturation", F.adjust_saturation),
    ("sharpness", F.adjust_sharpness),
])  # fmt: skip
def test_colours_equal_torchvisions(images, name, theirs):
    factors = 0.05 + 1.9 * uniforms(1)[:, 0]
    made = getattr(color, name)(images, factors)
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors.tolist(), strict=True)])
    # theirs cuts 0.3 · 99 + 0.7 · 99 down to 98 where it is a bit less than 99
    assert (made.int() - expected.int()).abs().max() <= 1 and differing(made, expected) < 0.01
    assert torch.equal(getattr(color, name)(images, torch.ones(N)), images)
    flat = torch.full_like(images, 99)
    assert name != "sharpness" or torch.equal(getattr(color, name)(flat, factors), flat)
    assert differing(made, images) > 0.5


def test_color_jitter_is_a_factor_each_in_order(images):
    numbers = uniforms(3)
    expected = images
    for change, strength, number in zip(
        (color.brightness, color.contrast, color.saturation), (0.4, 0.3, 0.2), numbers.unbind(1), strict=True
    ):
        expected = change(expected, 1 - strength + 2 * strength * number)
    made = ColorJitter(0.4, 0.3, 0.2)(images, numbers, 32)
    assert (made.int() - expected.int()).abs().max() <= 1 and differing(made, expected) < 1e-3
    assert torch.equal(ColorJitter(0, 0, 0)(images, numbers, 32), images)


@pytest.mark.parametrize("size", [20, 32, 48])
def test_crops_of_a_batch_equal_crops_of_each(images, size):
    numbers, crop = uniforms(RandomResizedCrop.count), RandomResizedCrop(scale=(0.1, 1.0))
    batchwise = crop(images, numbers, size)
    assert batchwise.shape == (N, 3, size, size) and batchwise.dtype == torch.uint8
    one_by_one = crop(list(images), numbers, size)  # torchvision's, rounded twice too
    exact = crop(list(images.double()), numbers, size)
    assert (batchwise - exact).abs().max() < 1.001 and (batchwise - exact).abs().mean() < 0.3
    assert differing(batchwise, one_by_one) < 0.06
    white = torch.full_like(images, 255)
    assert crop(white, numbers, size).unique().tolist() == [255]


@pytest.mark.parametrize("size", [20, 150])
def test_lots_change_no_pixel(monkeypatch, images, size):
    """A batch is worked on in parts that fit into caches."""
    given = [image[:, : 20 + row % 10].repeat(1, 5, 5) for row, image in enumerate(images[:24])]
    transform = chain({"crop": RandomResizedCrop(), "color": ColorJitter(), "rand": RandAugment()}, None)
    numbers = uniforms(transform.count, 24)
    monkeypatch.setattr(augment, "LOT", 24 * 3 * size**2)
    whole = transform(given, numbers, size)
    monkeypatch.setattr(augment, "LOT", 7 * 3 * size**2)
    assert whole.shape == (24, 3, size, size) and torch.equal(transform(given, numbers, size), whole)
    monkeypatch.setattr(augment, "LOT", 1)
    assert torch.equal(transform(given, numbers, size), whole)


# ---- policies --------------------------------------------------------------------------------------------


def torchvision_op(image, name, strength):
    """One operation of torchvision's policies, which name them ShearX for shear_x."""
    title = {"autocontrast": "AutoContrast"}.get(name, name.title().replace("_", ""))
    policy = TorchvisionRandAugment()
    return policy._apply_image_or_video_transform(image, title, strength, policy.interpolation, policy._fill)


SHIFTS = {"translate_x": 150 / 331 * 32, "translate_y": 150 / 331 * 32}
NARROW = {"shear": 0.3, **SHIFTS, "rotate": 30, "blend": 0.9, "posterize": 4}
WIDE = {"shear": 0.99, "translate_x": 32, "translate_y": 32, "rotate": 135, "blend": 0.99, "posterize": 6}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("limits", [NARROW, WIDE], ids=["narrow", "wide"])
def test_operations_equal_torchvisions(images, name, limits):
    levels, signs = (uniforms(2)[:, 0] * (LEVELS + 1)).floor() / LEVELS, uniforms(2)[:, 1]
    which = torch.full((N,), (OPERATIONS.index(name) + 0.5) / len(OPERATIONS))
    made = policies._apply(images, which, levels, signs, limits)
    key = {"solarize": None, "autocontrast": None, "equalize": None, "identity": None}.get(name, name.split("_")[0])
    key = "blend" if name in policies.BLENDED else name if name in limits and key else key
    expected = []
    for image, level, sign in zip(images, levels.tolist(), signs.tolist(), strict=True):
        strength = level * limits[key] if key else 1 - level
        if name == "posterize":
            strength = int(torch.tensor(8 - strength).round())
        elif key and sign < 0.5:
            strength = -strength
        expected.append(torchvision_op(image, name, strength))
    expected = torch.stack(expected)
    # their grid is float32, so that a pixel half-way between two may be the other one; see also the colours above
    tolerance = 0.01 if name in policies.GEOMETRIC or name in policies.BLENDED else 0
    assert differing(made, expected) <= tolerance
    assert (differing(made, images) > 0.05) == (name != "identity")


@pytest.mark.parametrize("policy", [RandAugment(ops=1, magnitude=20), TrivialAugment()])
def test_policies_draw_every_operation_for_each_image(images, policy):
    assert policy(images, uniforms(policy.count), 32).shape == images.shape
    same = images[:1].expand(2000, -1, -1, -1)
    made = policy(same, uniforms(policy.count, 2000), 32)
    assert len({image.numpy().tobytes() for image in made}) > 20
    untouched = (made == same).flatten(1).all(1).double().mean()
    assert 0.05 < untouched < 0.15  # 1/14, and level 0


def test_randaugment_takes_its_numbers_in_pairs(images):
    numbers = uniforms(4)
    once = RandAugment(ops=1, magnitude=12)
    assert torch.equal(
        RandAugment(2, 12)(images, numbers, 32), once(once(images, numbers[:, :2], 32), numbers[:, 2:], 32)
    )
    assert torch.equal(RandAugment(magnitude=0)(images[:0], numbers[:0], 32), images[:0])


# ---- chains and views ------------------------------------------------------------------------------------

EVERYTHING = {
    "shift_flip": ShiftFlip(), "resized_crop": RandomResizedCrop(), "flip": Flip(), "color": ColorJitter(),
    "randaugment": RandAugment(), "trivialaugment": TrivialAugment(), "cutout": Cutout(), "mixup": Mixup(1.0),
    "cutmix": CutMix(),
}  # fmt: skip


def test_a_chain_gives_each_step_its_numbers(images):
    made = chain({"shift_flip": ShiftFlip(2), "cutout": Cutout(4)}, Flip())
    assert made == Chain((ShiftFlip(2), Cutout(4))) and made.count == 5
    numbers = uniforms(5)
    expected = Cutout(4)(ShiftFlip(2)(images, numbers[:, :3], 32), numbers[:, 3:], 32)
    assert torch.equal(made(images, numbers, 32), expected)
    assert chain({}, Flip()) == chain(None, Flip()) == Chain((Flip(),))
    assert chain({"mixup": Mixup()}, Flip()) == Chain((Flip(),), (Mixup(),))
    assert repr(made) != repr(chain({"shift_flip": ShiftFlip(2), "cutout": Cutout(5)}, Flip()))


@pytest.mark.parametrize("mixed", [False, True])
def test_views_do_not_depend_on_the_batch(mixed):
    augment = {key: step for key, step in EVERYTHING.items() if mixed or not hasattr(step, "mix")}
    train = fake(16, 0, train_size=200, image_size=24, augment=augment).train
    rows = torch.arange(100)
    whole, other = train[rows, 0], train[rows, 1]
    parts = [train[some, 0] for some in rows.flip(0).split(7)]
    for name, one, several in zip(Batch._fields, whole, zip(*parts, strict=True), strict=True):
        if one is None:
            assert name == "answers" or (name in ("partner", "share") and not mixed)
        elif name == "view":
            assert one == 0 == max(several)
        else:
            assert torch.equal(one, torch.cat(several).flip(0)), name
    assert whole.images.dtype == torch.float32 and whole.images.min() >= 0 and whole.images.max() <= 1
    assert not torch.equal(whole.images, other.images)


# ---- mixing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_shares_follow_the_larger_half_of_a_beta_distribution(alpha):
    _, share = Mixup(alpha).mix(torch.zeros(4000, 1, 1, 1), torch.ones(4000, 1, 1, 1), uniforms(1, 4000))
    assert share.min() >= 0.5 and share.max() <= 1
    assert kstest(share.numpy(), lambda x: 2 * beta(alpha, alpha).cdf(x) - 1).pvalue > 0.01


def test_mixup_blends_the_partners_own_view():
    data = fake(16, 0, train_size=60, augment={"shift_flip": ShiftFlip(), "mixup": Mixup(1.0)})
    plain = fake(16, 0, train_size=60, augment={"shift_flip": ShiftFlip()}).train
    rows = torch.arange(60)
    batch, own = data.train[rows, 3], plain[rows, 3]
    assert torch.equal(batch.labels, own.labels) and torch.equal(batch.index, rows)
    assert own.partner is None and own.share is None
    found = 0
    for row in range(60):
        rest = (batch.images[row] - batch.share[row] * own.images[row]) / (1 - batch.share[row])
        distance = (own.images - rest).abs().amax((1, 2, 3))
        if batch.share[row] < 0.95:  # otherwise the division drowns the partner in rounding
            found += 1
            assert distance.min() < 1e-4 and own.labels[distance.argmin()] == batch.partner[row]
    assert found > 40 and batch.partner.unique().numel() > 5
    other = data.train[rows, 4]
    assert not torch.equal(other.share, batch.share) and not torch.equal(other.partner, batch.partner)


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    mixed, share = CutMix().mix(torch.zeros(500, 2, 20, 30), torch.ones(500, 2, 20, 30), uniforms(3, 500))
    assert torch.allclose(share, 1 - mixed[:, 0].mean((1, 2))) and torch.equal(mixed[:, 0], mixed[:, 1])
    for image in mixed[:, 0]:
        rows, columns = image.any(1).sum(), image.any(0).sum()
        assert image.sum() == rows * columns  # filled: one box
        if rows in range(4, 19) and columns in range(4, 29) and not (image[0].any() or image[-1].any()):
            assert image[:, 0].any() or image[:, -1].any() or abs(columns / rows - 1.5) < 0.6  # the image's shape
    assert share.min() >= 0.5 and 0.7 < share.mean() < 0.9


def test_with_two_mixes_each_image_draws_one():
    made = Chain((Flip(),), (Mixup(8.0), CutMix()))
    mixed, share = made.mix(torch.zeros(400, 1, 8, 8), torch.ones(400, 1, 8, 8), uniforms(made.mix_count, 400))
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
    assert 0.4 < blended.double().mean() < 0.6 and torch.allclose(1 - mixed.mean((1, 2, 3)), share)


def test_cross_entropy_of_mixed_images():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], requires_grad=True)
    rows = torch.arange(2)
    batch = Batch(
        torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]), rows, rows, torch.tensor([2, 1]), torch.tensor([0.7, 0.6])
    )
    soft = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])
    for smoothing in (0.0, 0.1):
        expected = functional.cross_entropy(logits, soft, label_smoothing=smoothing)
        assert CE(smoothing)(Outputs(logits, {}), None, batch).item() == pytest.approx(expected.item(), rel=1e-6)
    plain = CE()(Outputs(logits, {}), None, Batch(*batch[:4]))
    assert plain.item() == pytest.approx(functional.cross_entropy(logits, batch.labels).item())
    CE()(Outputs(logits, {}), None, batch).backward()
    assert torch.allclose(logits.grad, (logits.detach().softmax(1) - soft) / 2)


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_can_be_collated_pinned_and_moved(mixed, monkeypatch):
    batch = fake(8, 0, train_size=60, augment={"mixup": Mixup()} if mixed else None).train[[1, 2], 0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)  # needs an accelerator
    for moved in (default_convert(batch), pin_memory(batch), move_data_to_device(batch, torch.device("cpu"))):
        assert isinstance(moved, Batch) and (moved.share is None) != mixed
        assert torch.equal(moved.images, batch.images) and moved.view == batch.view


# ---- configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_file_gives_its_augmentation(name, images):
    text = (CONF / f"{name}.yaml").read_text()
    built = instantiate(OmegaConf.create(text), _convert_="all")
    assert text.startswith("#") and list(built) == [name]
    step = built[name]
    options = set(OmegaConf.create(text)[name]) - {"_target_"}
    assert options == set(getattr(step, "__dataclass_fields__", ()))  # every option is in the file
    assert all(f"{option}=" in repr(step) for option in options)
    train = fake(8, 0, train_size=40, augment=built).train
    assert train[[0, 1], 0].images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("make", [
    lambda: Cutout(size=0), lambda: Cutout(fill=256), lambda: ColorJitter(brightness=1.5), lambda: RandAugment(ops=0),
    lambda: RandAugment(magnitude=31), lambda: Mixup(0), lambda: CutMix(-1.0),
])  # fmt: skip
def test_impossible_augmentations_are_refused(make):
    with pytest.raises(UsageError) as raised:
        make()
    assert "\n" not in str(raised.value) and "must be" in str(raised.value)


@pytest.mark.parametrize("step", [ShiftFlip(), Flip(), Cutout(), ColorJitter(), RandomResizedCrop()])
def test_images_on_an_accelerator_stay_there(step):
    """Fake tensors know no values, but refuse to mix devices as real ones do."""
    with FakeTensorMode():
        images, uniforms = (
            torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="cuda"),
            torch.empty(4, step.count, device="cuda"),
        )
        assert step(images, uniforms, 8).device.type == "cuda"
        if step.count:
            with pytest.raises(RuntimeError, match="device"):
                step(images, uniforms.cpu(), 8)
