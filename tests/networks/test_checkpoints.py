"""Weights from files and back: what is read, what is refused, and what the refusal says."""

import importlib.util
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

from distill.errors import UserError
from distill.networks import timm_models, torchvision_models, weights
from distill.networks.deit import deit
from distill.networks.weights import load_weights, read_metadata, read_state, save_weights


def make(classes=10, width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def error_of(call, *arguments, **options):
    """The UserError's text, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_save_and_load_give_the_same_network(tmp_path):
    net, other = make(seed=1), make(seed=2)
    net[1].running_mean.fill_(0.25)
    path = tmp_path / "new" / "student.safetensors"
    save_weights(net, path, {"classes": '["a", "b"]'})
    assert load_weights(other, path) == []
    assert same(net.state_dict(), other.state_dict())
    assert read_metadata(path) == {"classes": '["a", "b"]'}
    assert [file.name for file in path.parent.iterdir()] == ["student.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    save_weights(make(seed=1), path, {})
    before = path.read_bytes()

    def disk_full(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", disk_full)
    message = error_of(save_weights, make(seed=2), path, {})
    assert str(path) in message and "No space left" in message
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_content_decides_not_the_ending(tmp_path):
    state = make().state_dict()
    save_file(state, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("weights.pt", "weights.safetensors", "old.pth"):
        assert same(read_state(tmp_path / name), state)


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model_state_dict"], ["net"], ["ema", "state_dict"]])
def test_the_state_dict_is_found_where_programs_keep_it(tmp_path, keys):
    state = make().state_dict()
    content = dict(state)
    for key in reversed(keys):
        content = {"epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}, key: content}
    torch.save(content, tmp_path / "a.pt")
    assert same(read_state(tmp_path / "a.pt"), state)


def test_averaged_weights_come_last(tmp_path):
    plain, averaged = make(seed=1).state_dict(), make(seed=2).state_dict()
    torch.save({"state_dict_ema": averaged, "state_dict": plain}, tmp_path / "a.pt")
    assert same(read_state(tmp_path / "a.pt"), plain)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "student.net.", "module.model._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix):
    net, other = make(seed=1), make(seed=2)
    torch.save({prefix + key: value for key, value in net.state_dict().items()}, tmp_path / "a.pt")
    assert load_weights(other, tmp_path / "a.pt") == []
    assert same(net.state_dict(), other.state_dict())


def test_of_a_training_checkpoint_only_the_student_is_taken(tmp_path):
    student, teacher, other = make(seed=1), make(seed=2), make(seed=3)
    state = {f"student.net.{key}": value for key, value in student.state_dict().items()}
    state |= {f"teacher.net.{key}": value for key, value in teacher.state_dict().items()}
    torch.save({"state_dict": {**state, "losses.fitnet.weight": torch.zeros(2)}}, tmp_path / "a.ckpt")
    load_weights(other, tmp_path / "a.ckpt")
    assert same(student.state_dict(), other.state_dict())


def test_a_networks_own_name_is_no_prefix(tmp_path):
    net, other = nn.ModuleDict({"net": make(seed=1)}), nn.ModuleDict({"net": make(seed=2)})
    save_weights(net, tmp_path / "a.safetensors", {})
    load_weights(other, tmp_path / "a.safetensors")
    assert same(net.state_dict(), other.state_dict())


def test_half_precision_is_converted_and_the_batch_count_may_miss(tmp_path):
    net, other = make(seed=1), make(seed=2)
    half = {key: value.half() for key, value in net.state_dict().items() if "num_batches" not in key}
    save_file(half, tmp_path / "a.safetensors")
    load_weights(other, tmp_path / "a.safetensors")
    assert other[0].weight.dtype == torch.float32
    assert torch.equal(other[0].weight, net[0].weight.half().float())


def test_a_mismatch_is_told_by_key_and_changes_nothing(tmp_path):
    net = make(width=8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = make(width=4).state_dict()
    del state["0.bias"]
    state |= {f"extra.{number}": torch.zeros(1) for number in range(9)}
    save_file(state, tmp_path / "a.safetensors")
    message = error_of(load_weights, net, tmp_path / "a.safetensors", new_head=True)
    assert str(tmp_path / "a.safetensors") in message
    assert "missing: 0.bias" in message
    assert "extra.0" in message and "extra.4" in message and "extra.5" not in message and "4 more" in message
    assert "0.weight (4, 3, 3, 3), expected (8, 3, 3, 3)" in message
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("head", [nn.Linear, lambda width, classes: nn.Conv2d(width, classes, 1)])
def test_other_classes_need_a_new_head(tmp_path, head):
    torch.manual_seed(0)
    many = nn.Sequential(nn.Conv2d(3, 4, 3), head(4, 1000))
    few = nn.Sequential(nn.Conv2d(3, 4, 3), head(4, 10))
    fresh = few[1].weight.clone()
    path = tmp_path / "a.safetensors"
    save_weights(many, path, {})
    message = error_of(load_weights, few, path)
    assert "the checkpoint has 1000 classes, the data 10" in message and "fit.epochs" in message
    assert not torch.equal(few[0].weight, many[0].weight)
    assert load_weights(few, path, new_head=True) == ["1.weight", "1.bias"]
    assert torch.equal(few[0].weight, many[0].weight) and torch.equal(few[1].weight, fresh)


def test_a_new_head_does_not_excuse_other_shapes(tmp_path):
    save_weights(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1000)), tmp_path / "a.safetensors", {})
    other = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 10))
    message = error_of(load_weights, other, tmp_path / "a.safetensors", new_head=True)
    assert "0.weight (5, 3), expected (6, 3)" in message and "1.weight (1000, 5), expected (10, 6)" in message


def test_a_new_head_does_not_excuse_a_head_of_another_width(tmp_path):
    save_weights(nn.Linear(5, 1000), tmp_path / "a.safetensors", {})
    message = error_of(load_weights, nn.Linear(6, 10), tmp_path / "a.safetensors", new_head=True)
    assert "weight (1000, 5), expected (10, 6)" in message


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_one_key_too_few_or_too_many_is_an_error(tmp_path, change):
    state = make().state_dict()
    if change == "missing":
        del state["1.running_var"]
    else:
        state["1.running_var_too"] = torch.zeros(4)
    save_file(state, tmp_path / "a.safetensors")
    assert f"{change}: 1.running_var" in error_of(load_weights, make(), tmp_path / "a.safetensors")


class Payload:
    """Unpickled, it makes a file: the proof that code ran."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_not_run(tmp_path, save):
    path, marker = tmp_path / "a.pt", tmp_path / "ran"
    save({"state_dict": make().state_dict(), "note": Payload(marker)}, path)
    message = error_of(read_state, path)
    assert str(path) in message and "could run code" in message and "torch.save(net.state_dict(), PATH)" in message
    assert not marker.exists()


BROKEN = {  # what becomes of a whole safetensors file and a whole torch file, and what is said
    "truncated safetensors": (lambda tensors, zipped: tensors[:-100], "broken"),
    "truncated header": (lambda tensors, zipped: tensors[:50], "broken"),
    "truncated torch": (lambda tensors, zipped: zipped[: len(zipped) // 2], "broken"),
    "text": (lambda tensors, zipped: b"<html>404 Not Found</html>", "broken"),
    "noise": (lambda tensors, zipped: bytes(range(1, 200)), "broken"),
    "empty": (lambda tensors, zipped: b"", "is empty"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path, kind):
    damage, expected = BROKEN[kind]
    save_file(make().state_dict(), tmp_path / "whole.safetensors")
    torch.save(make().state_dict(), tmp_path / "whole.pt")
    path = tmp_path / "a.pt"
    path.write_bytes(damage((tmp_path / "whole.safetensors").read_bytes(), (tmp_path / "whole.pt").read_bytes()))
    message = error_of(load_weights, make(), path)
    assert str(path) in message and expected in message


def test_no_file_and_a_folder(tmp_path):
    assert f"no file {tmp_path / 'none.pt'}" in error_of(read_state, tmp_path / "none.pt")
    assert f"{tmp_path} is a folder" in error_of(read_state, tmp_path)
    assert "none.safetensors" in error_of(read_metadata, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.zeros(2)], "list"),
        ({"epoch": 3, "lr": 0.1}, "epoch, lr"),
        ({}, "nothing"),
        (torch.zeros(3), "Tensor"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, named):
    torch.save(content, tmp_path / "a.pt")
    message = error_of(read_state, tmp_path / "a.pt")
    assert "no state dict" in message and named in message


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
def test_torchscript_and_numpy_scalars_are_refused_in_words(tmp_path):
    torch.jit.trace(make().eval(), torch.zeros(1, 3, 3, 3)).save(tmp_path / "script.pt")
    assert "TorchScript" in error_of(read_state, tmp_path / "script.pt")
    torch.save({"state_dict": make().state_dict(), "best": np.float64(0.9)}, tmp_path / "numpy.pt")
    assert "more than tensors" in error_of(read_state, tmp_path / "numpy.pt")


# ---- files as the world has them


def resnet(classes=10, image_size=96):
    return torchvision_models.classifier("resnet18", classes, image_size)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["backbone.", "encoder.", "teacher.", "module.backbone.", "model.net.", "module.encoder_q.", "learner.f."]
)
def test_any_name_in_front_is_dropped(tmp_path, prefix):
    net, other = make(seed=1), make(seed=2)
    path = saved(tmp_path, {"state_dict": {**under(prefix, net.state_dict()), "projector.weight": torch.zeros(2)}})
    assert load_weights(other, path) == []
    assert same(net.state_dict(), other.state_dict())


def test_a_vision_transformers_encoder_is_its_own(tmp_path):
    net, other = deit(10, 16, width=12, depth=2), deit(10, 16, width=12, depth=2)
    assert load_weights(other, saved(tmp_path, under("backbone.", net.state_dict()))) == []
    assert same(net.state_dict(), other.state_dict())


def test_body_and_head_may_lie_under_names_of_their_own(tmp_path):
    net, other = make(seed=1), make(seed=2)
    state = {("head." if key.startswith("3.") else "backbone.") + key: value for key, value in net.state_dict().items()}
    assert load_weights(other, saved(tmp_path, {"meta": {"epoch": 3}, "state_dict": state})) == []
    assert same(net.state_dict(), other.state_dict())


@pytest.mark.parametrize("key", ["ema_state_dict", "weights", "params", "params_ema", "my_model"])
def test_the_state_dict_is_found_under_any_key_but_the_optimizers(tmp_path, key):
    state = make().state_dict()
    optimizer = {
        "state": {0: {"exp_avg": torch.zeros(2)}},
        "param_groups": [],
        "extra": {str(n): torch.zeros(1) for n in range(99)},
    }
    assert same(read_state(saved(tmp_path, {"optimizer": optimizer, "epoch": 3, key: state})), state)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_file_with_auxiliary_classifiers_fits_a_network_without_and_one_with(tmp_path, name):
    options = {"weights": None, "init_weights": False}
    state = get_model(name, **options).state_dict()
    path = saved(tmp_path, state)
    assert any(key.lower().startswith("aux") for key in state)
    net = torchvision_models.classifier(name, 1000, 96)
    assert load_weights(net, path) == []
    assert torch.equal(net.fc.weight, state["fc.weight"])
    few = get_model(name, num_classes=7, **options)
    left = load_weights(few, path, new_head=True, heads=["fc"])
    assert {"fc.weight", "fc.bias"} < {*left} and all("fc" in key for key in left)
    assert len(left) == (6 if name == "googlenet" else 4)  # the auxiliary ones' too


def test_both_heads_of_a_deit_start_anew(tmp_path):
    path = saved(tmp_path, deit(10, 16, width=12, depth=1).state_dict())
    few = deit(7, 16, width=12, depth=1)
    assert "10 classes, the data 7" in error_of(load_weights, few, path)
    new = ["heads.weight", "heads.bias", "dist_head.weight", "dist_head.bias"]
    assert load_weights(few, path, new_head=True) == new


def test_a_file_without_a_classifier_starts_a_new_one(tmp_path):
    net, other = make(seed=1), make(seed=2)
    body = {key: value for key, value in net.state_dict().items() if not key.startswith("3.")}
    path = saved(tmp_path, under("encoder.", body) | {"projector.0.weight": torch.zeros(3, 3)})
    assert load_weights(other, path, new_head=True, heads=["3"]) == ["3.weight", "3.bias"]
    assert torch.equal(other[0].weight, net[0].weight)
    assert "missing: 3.weight, 3.bias" in error_of(load_weights, other, path, heads=["3"])
    assert "missing: 3.weight" in error_of(load_weights, other, path, new_head=True, heads=["0"])


def interpolated(table, side):
    """(1, S², D) → (1, side², D), by torchvision's and timm's way."""
    old = int(len(table[0]) ** 0.5)
    grid = table.view(1, old, old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (side, side), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_position_embeddings_follow_the_images_size(tmp_path, tokens):
    def table(side):
        net = nn.Module()
        net.pos_embed = nn.Parameter(torch.randn(1, tokens + side * side, 3))
        return net

    net, other = table(14), table(12)
    assert load_weights(other, saved(tmp_path, net.state_dict())) == []
    torch.testing.assert_close(other.pos_embed[:, :tokens], net.pos_embed[:, :tokens])
    torch.testing.assert_close(other.pos_embed[:, tokens:], interpolated(net.pos_embed[:, tokens:].detach(), 12))


def test_a_vit_of_224_px_is_read_at_192_px(tmp_path):
    files = {
        torchvision_models.classifier("vit_b_16", 10, 192): get_model("vit_b_16", num_classes=10),
        deit(10, 48, width=12, depth=1, patch_size=4): deit(10, 32, width=12, depth=1, patch_size=4),
    }
    if importlib.util.find_spec("timm"):
        import timm

        for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pit_ti_224", "volo_d1_224"):
            files[timm_models.classifier(name, 10, 192)] = timm.create_model(name, num_classes=10)
    for net, original in files.items():
        assert load_weights(net, saved(tmp_path, original.state_dict())) == []
        assert torch.equal(net.state_dict()[last := list(net.state_dict())[-1]], original.state_dict()[last])


def test_the_first_layer_for_small_images_starts_anew(tmp_path):
    state = get_model("resnet18", num_classes=10).state_dict()
    path, small = saved(tmp_path, state), resnet(image_size=32)
    fresh = small.conv1.weight.clone()
    text = error_of(load_weights, small, path)
    assert "conv1.weight is (64, 3, 7, 7) for images of another size" in text and "teacher.fit.epochs" in text
    assert load_weights(small, path, new_head=True) == ["conv1.weight"]
    assert torch.equal(small.conv1.weight, fresh) and torch.equal(small.fc.weight, state["fc.weight"])
    few = resnet(7, 32)
    assert load_weights(few, path, new_head=True, heads=["fc"]) == ["conv1.weight", "fc.weight", "fc.bias"]
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)  # another kernel inside is another network
    assert "layer1.0.conv1.weight (64, 64, 5, 5)" in error_of(load_weights, few, saved(tmp_path, state), True)


def test_tables_that_differ_like_a_head_are_none(tmp_path):
    def net(rows):
        found = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        found.table = nn.Parameter(torch.zeros(rows, 4))
        return found

    path = saved(tmp_path, net(10).state_dict())
    assert "table (10, 4), expected (7, 4)" in error_of(load_weights, net(7), path, new_head=True, heads=["1"])


def test_an_archive_that_unfolds_to_more_than_it_is_stays_closed(tmp_path):
    good, bomb = tmp_path / "good.pt", tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(1 << 25, dtype=torch.uint8)}, good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in archive.infolist():
            packed.writestr(member.filename, archive.read(member))
    assert read_state(good)["weight"].shape == (1 << 25,)
    assert bomb.stat().st_size < 1 << 17
    with pytest.raises(UserError, match=r"bomb\.pt is not opened: it unfolds to 33,5"):
        read_state(bomb)
