"""Wrong values are refused before anything is made, by the option's name; right ones pass. The signatures that say so
are read without importing what they belong to."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval
from conftest import ROOT
from hydra import compose, initialize_config_dir
from pydantic import TypeAdapter

from distill import files
from distill.cli import config, options
from distill.errors import UsageError
from distill.schema.definitions import absent, find
from distill.schema.signatures import Object, read
from distill.schema.values import describe, mismatch

CONF = Path(files.CONF)
LISTS = ("loss", "augment", "logger", "compress", "export")
MUST = {
    "data=imagefolder": ["data.root=nowhere"],
    "data=webdataset": ["data.train=nowhere"],
    **{
        f"{role}={name}": [f"{role}.{word}" for word in words]
        for role in ("teacher", "student")
        for name, words in {
            "custom": ["_target_=torch.nn.Flatten"],
            "timm": ["name=resnet18"],
            "torchvision": ["name=resnet18"],
        }.items()
    },
}


def checked(*words: str) -> None:
    config.register(["train.py"])
    with initialize_config_dir(files.CONF, version_base="1.3"):
        cfg = compose("train", [*words, "name=test"])
    config.check(cfg, list(words))


# (words, the option that is named and what came, of what is expected)
WRONG = [
    # a run
    ("ema=1.5", "from 0 to below 1"),
    ("ema=-0.1", "from 0 to below 1"),
    ("ema=high", "a number"),
    ("seed=99999999999999999999", "a whole number from 0"),
    ("seed=-1", "a whole number from 0"),
    ("seed=1.5", "a whole number"),
    ("seed=true", "a whole number"),
    ("seed=null", "a whole number"),
    ("early_stopping=-1", "null or a whole number of at least 1"),
    ("early_stopping=2.5", "a whole number"),
    ("checkpoint_every=0", "of at least 1"),
    ("checkpoint_every=often", "a whole number"),
    ("select=lats", "did you mean last?"),
    ("stages=[teacher,distil]", "did you mean distill?"),
    ("stages=teacher", "a list"),
    ("baseline=maybe", "true or false"),
    ("baseline=1", "true or false"),
    ("compile=yes", "true or false"),
    ("trust=1", "true or false"),
    ("store=null", "text"),
    ("run=3", "text"),
    ("+epochs=3", "did you mean trainer.max_epochs?"),
    # cache, budget, tolerance
    ("cache.keep=foo", "one of auto, logits, features, off"),
    ("cache.keep=logit", "did you mean logits?"),
    ("cache.views=0", "of at least 1"),
    ("cache.views=many", "a whole number"),
    ("cache.top_k=many", "a whole number"),
    ("cache.top_k=0", "of at least 1"),
    ("cache.dtype=float8", "one of float32, float16, bfloat16; did you mean"),
    ("cache.budget=many", "such as 500MB"),
    ("cache.budget=0", "such as 500MB"),
    ("cache.seed=-3", "from 0"),
    ("teacher=ema cache=logits cache.keep=logits", "changes while it teaches"),
    ("+cache.view=3", "did you mean views?"),
    ("budget.bytes=small", "such as 500MB"),
    ("budget.bytes=-5", "such as 500MB"),
    ("budget.latency_ms=0", "greater than 0"),
    ("budget.latency_ms=fast", "a number"),
    ("budget.accuracy_drop=2", "from 0 to 1"),
    ("tolerance.file.agreement=2", "from 0 to 1"),
    ("tolerance.rounding.beside=-1", "of at least 0"),
    ("tolerance.compressed.least=high", "a number"),
    # roles
    ("student.mean=[.5,.5]", "one number (grey images) or three"),
    ("student.mean=0.5", "one number (grey images) or three"),
    ("student.std=[.5]", "as many numbers as student.mean has, 3"),
    ("student.std=[0,1,1]", "greater than 0"),
    ("teacher.std=[a,b,c]", "one number"),
    ("student.taps=layer1", "a mapping"),
    ("student.checkpoint=3", "text"),
    ("student.checkpoint=nowhere.pt", "no file nowhere.pt"),
    ("teacher.checkpoint=nowhere.pt", "no file nowhere.pt"),
    ("teacher.fit.epochs=-1", "at least 0"),
    ("teacher.fit.epochs=1.5", "a whole number"),
    ("teacher.fit.lr=-1", "of at least 0"),
    ("+teacher.fit.epoch=3", "did you mean epochs?"),
    ("teacher.precision=int4", "did you mean int8?"),
    ("teacher.untrained=1", "true or false"),
    ("teacher=ensemble teacher.weights=[1,0]", "greater than 0"),
    ("teacher=ensemble teacher.weights=[1,2,3]", "one for each of the 2 members"),
    ("teacher=ensemble teacher.members.second.fit.epochs=-1", "at least 0"),
    ("teacher=peer teacher.temperature=0", "greater than 0"),
    ("teacher=peer teacher.network.depth=9", "6n + 2"),
    ("teacher=ema teacher.decay=1", "to below 1"),
    ("~student.mean", "student.mean must be given: student.mean=VALUE"),
    ("~teacher.fit", "teacher.fit must be given: teacher.fit=VALUE"),
    ("~cache.views", "cache.views must be given: cache.views=VALUE"),
    ("~optimizer.lr", "optimizer.lr must be given: optimizer.lr=VALUE"),
    ("~data", "data must be given: data=VALUE"),
    ("~optimizer", "optimizer must be given: optimizer=VALUE"),
    ("tolerance.file=3", "a mapping"),
    ("tolerance=3", "a mapping"),
    # networks
    ("student.depth=9", "6n + 2"),
    ("student.depth=deep", "6n + 2"),
    ("student=resnet8x4 student.widths=[16,32]", "[a whole number of at least 1, "),
    ("student=resnet8x4 student.stem=0", "of at least 1"),
    ("student=resnet8x4 student.shortcut=C", "one of A, B"),
    ("student=wrn_16_2 student.depth=17", "6n + 4"),
    ("student=vgg8 student.depth=9", "one of 8, 13"),
    ("student=deit_tiny student.heads=0", "of at least 1"),
    ("student=simkd student.body.depth=9", "6n + 2"),
    ("student=timm student.name=resnet18 student.pretrained=3", "true or false"),
    ("+student.dept=14", "did you mean depth?"),
    ("student=custom student._target_=distill.networks.resnet_cifar.resnett", "did you mean resnet?"),
    ("student=custom student._target_=nowhere_at_all.net", "no module 'nowhere_at_all'"),
    (
        "student=custom student._target_=distill.networks.resnet_cifar.resnet",
        "student.depth must be given: student.depth=VALUE",
    ),
    # data and augmentations
    ("data.batch_size=0", "of at least 1"),
    ("data.batch_size=1.5", "a whole number"),
    ("data.num_workers=-1", "of at least 0"),
    ("data.val_fraction=0", "greater than 0 and less than 1"),
    ("data.test_fraction=1", "greater than 0 and less than 1"),
    ("data.split_seed=-1", "from 0"),
    ("data=fake data.image_size=0", "px of 1 to 8192"),
    ("data=fake data.num_classes=1", "of at least 2"),
    ("data=imagefolder data.root=x data.pack=0", "px of 1 to 8192"),
    ("data=imagefolder data.root=5", "text"),
    ("augment=[cutout] augment.cutout.fill=256", "from 0 to 255"),
    ("augment=[cutout] augment.cutout.size=0", "of at least 1"),
    ("augment=[shift_flip] augment.shift_flip.padding=-1", "of at least 0"),
    ("augment=[resized_crop] augment.resized_crop.scale=[0,1]", "[low, high] within 0 and 1"),
    ("augment=[resized_crop] augment.resized_crop.ratio=[2,1]", "[low, high]"),
    ("augment=[color] augment.color.contrast=2", "from 0 to 1"),
    ("augment=[randaugment] augment.randaugment.magnitude=31", "from 0 to 30"),
    ("augment=[mixup] augment.mixup.alpha=0", "greater than 0"),
    ("augment=[flip] +augment.flip.p=0.5", "takes no 'p'"),
    # losses
    ("loss.kd.temperature=-1", "a number greater than 0"),
    ("loss.kd.temperature=cold", "a number greater than 0"),
    ("loss.kd.temperature=[1,2]", "a number greater than 0"),
    ("loss.kd.temperature=null", "a number greater than 0"),
    ("loss.kd.temperature=nan", "a number greater than 0"),
    ("loss.kd.temperature=inf", "a number greater than 0"),
    ("loss.kd.standardize=1", "true or false"),
    ("loss.kd.weight=-1", "of at least 0"),
    ("loss.kd.weight=heavy", "of at least 0"),
    ("loss.kd.weight=true", "of at least 0"),
    ("loss.kd.weight=[[3,1],[1,0]]", "rising epochs"),
    ("loss.kd.weight=[[0,-1],[5,1]]", "of at least 0"),
    ("loss=[ce] loss.ce.weight=0", "all losses weigh 0"),
    ("loss=[ce] loss.ce.weight=[[0,0],[5,0]]", "all losses weigh 0"),
    ("loss.ce.label_smoothing=1", "to below 1"),
    ("loss=[ce,ce]", "more than once"),
    ("loss=[]", "at least one loss"),
    ("+loss.kd.temp=3", "takes no 'temp'"),
    ("loss.kd=3", "_target_"),
    ("loss=[crd] loss.crd.momentum=1", "to below 1"),
    ("loss=[crd] loss.crd.mode=exactly", "did you mean exact?"),
    ("loss=[crd] loss.crd.negatives=0", "of at least 1"),
    ("loss=[at] loss.at.taps=[]", "at least 1 of them"),
    ("loss=[at] loss.at.taps=stage1", "a list"),
    ("loss=[mgd] loss.mgd.masked=1", "to below 1"),
    ("loss=[mlkd] loss.mlkd.temperatures=[2,0]", "greater than 0"),
    ("loss=[sdd] loss.sdd.scales=[1.5]", "a whole number"),
    ("loss=[tfkd] loss.tfkd.correct=0", "greater than 0 and at most 1"),
    ("loss=[vid] loss.vid.variance=0", "greater than 1e-05"),
    ("loss=[srd] loss.srd.exponent=1", "of at least 2"),
    ("loss=[wkd_logit] loss.wkd_logit.iterations=0", "of at least 1"),
    ("loss=[rkd] loss.rkd.angle_weight=-1", "of at least 0"),
    ("loss=[ft] loss.ft.rate=0", "greater than 0"),
    ("loss=[fitnet] loss.fitnet.student_tap=2", "text"),
    # optimizer, schedule, trainer
    ("optimizer.lr=-1", "of at least 0"),
    ("optimizer.lr=fast", "a number"),
    ("optimizer.lr=null", "a number"),
    ("optimizer.momentum=2", "to below 1"),
    ("optimizer.momentum=0", "optimizer.nesterov=true: expected a momentum"),
    ("optimizer.weight_decay=-1", "of at least 0"),
    ("+optimizer.wieght_decay=1", "did you mean weight_decay?"),
    ("optimizer=adamw optimizer.betas=[0.9]", "[a number from 0 to below 1, "),
    ("optimizer=adamw optimizer.betas=[0.9,1]", "from 0 to below 1"),
    ("schedule.warmup=-1", "of at least 0"),
    ("schedule.warmup=20", "schedule.warmup=20: expected less than trainer.max_epochs=10"),
    ("schedule.warmup=5 teacher.fit.epochs=3", "schedule.warmup=5: expected less than teacher.fit.epochs=3"),
    ("schedule.floor=2", "from 0 to 1"),
    ("schedule=multistep schedule.gamma=0", "greater than 0 and at most 1"),
    ("schedule=multistep schedule.milestones=5", "a list"),
    ("trainer.max_epochs=0", "at least 1"),
    ("trainer.max_epochs=ten", "at least 1"),
    ("trainer.max_epochs=null", "at least 1"),
    ("trainer.precision=16bit", "one of auto"),
    ("trainer.accumulate_grad_batches=0", "of at least 1"),
    ("trainer.gradient_clip_val=-1", "of at least 0"),
    ("trainer.devices=0", "how many"),
    ("trainer.devices=all", "how many"),
    ("trainer.accelerator=cuba", "did you mean cuda?"),
    ("trainer.strategy=dpp", "one of Lightning's strategies"),
    ("+trainer.limit_train_batches=0", "at least 1"),
    ("+trainer.limit_train_batches=1.5", "at most 1"),
    ("+trainer.limit_val_batches=0", "what ships is chosen on validation images"),
    ("+trainer.gradient_clip_algorithm=max", "one of norm, value"),
    ("+trainer.deterministic=3", "true or false"),
    ("+trainer.max_steps=3", "give trainer.max_epochs"),
    ("+trainer.presicion=16", "did you mean precision?"),
    ("ema=0.9 trainer.precision=bf16-true", "trainer.precision=bf16-true: too few digits"),
    # compression, export, loggers
    ("compress=[prune,prune]", "more than once"),
    ("compress=[prune] compress.prune.ratio=1", "greater than 0 and less than 1"),
    ("compress=[prune] compress.prune.macs=0", "greater than 0 and less than 1"),
    ("compress=[prune] compress.prune.norm=3", "one of 1, 2"),
    ("compress=[prune] compress.prune.spread=globally", "did you mean global?"),
    ("compress=[prune] compress.prune.round_to=0", "of at least 1"),
    ("compress=[prune] compress.prune.epochs=-1", "of at least 0"),
    ("compress=[sparsify] compress.sparsify.rounds=0", "of at least 1"),
    ("compress=[low_rank] compress.low_rank.energy=1", "less than 1"),
    ("compress=[fp16] compress.fp16.dtype=float32", "one of float16, bfloat16"),
    ("compress=[static_int8] compress.static_int8.observer=minmaxx", "did you mean minmax?"),
    ("compress=[static_int8] compress.static_int8.images=8", "of at least 32"),
    ("compress=[static_int8] compress.static_int8.skip=conv1", "a list"),
    ("compress=[qat_int8] compress.qat_int8.epochs=0", "of at least 1"),
    ("compress=[qat_int8] compress.qat_int8.freeze=2", "from 0 to 1"),
    ("compress.dynamic_int8.conv=flaot", "did you mean float?"),
    ("compress=[auto] compress.auto.ratios=[1.0]", "to below 1"),
    ("compress=[auto] compress.auto.quantizers=[int8]", "one of none, weight_only_int8"),
    ("compress=[auto] compress.auto.static_int8.images=8", "of at least 32"),
    ("compress=[auto] +compress.auto.ratio=0.5", "callable"),
    ("export=[onnx] export.onnx.opset=17", "from 18 to 23"),
    ("export=[onnx] export.onnx.resize=300", "true or false"),
    ("export=[onnx,onnx]", "more than once"),
    ("logger=[wandb] logger.wandb.project=3", "text"),
]


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_value_is_refused_by_its_name(words, expected):
    given = words.split()
    with pytest.raises(UsageError) as refused:
        checked(*MUST.get(given[0], []) if "_target_" not in words else [], *given)
    told = str(refused.value)
    option, _, value = given[-1].lstrip("+").partition("=")
    assert expected in told
    assert told.startswith(expected if "=" in expected else f"{option}={'' if '[' in value else value}")
    assert "\n" not in told and not re.search(r"class '|typing|Annotated|pydantic", told)


RIGHT = [
    "loss.kd.weight=[[0,0],[5,1]] loss.ce.weight=0",
    "loss.kd.temperature=3",
    "loss=[at] ~loss.at.taps +loss.at.taps={stage1:stage2}",
    "ema=0",
    "ema=null early_stopping=null",
    "seed=9223372036854775807",
    "name=2024",
    "cache.views=null cache.top_k=null cache.budget=500MB",
    "cache.budget=1000000",
    "budget.bytes=null budget.latency_ms=5",
    "teacher.fit.epochs=0 stages=[teacher]",
    "teacher.precision=16",
    "student.mean=[0.5] student.std=[0.5]",
    "student=resnet8x4 student.widths=[16,32,64]",
    "trainer.precision=16-mixed",
    "trainer.precision=32",
    "trainer.devices=2 trainer.strategy=ddp trainer.accelerator=cpu",
    "trainer.devices=[0,1]",
    "trainer.gradient_clip_val=0.5 +trainer.gradient_clip_algorithm=value",
    "+trainer.limit_train_batches=10 +trainer.limit_val_batches=0.5",
    "+trainer.deterministic=warn",
    "optimizer.lr=1 optimizer.momentum=0 optimizer.nesterov=false",
    "optimizer._target_=torch.optim.Adam ~optimizer.momentum ~optimizer.nesterov +optimizer.amsgrad=true",
    "schedule.warmup=2.5",
    "compress=[static_int8] compress.static_int8.skip=auto",
    "compress=[static_int8] compress.static_int8.skip=[conv1,linear]",
    "compress=[auto] budget.bytes=1MB",
    "compress=[prune] compress.prune.macs=0.5",
    "compress=[] export=[] loss=[ce]",
    "data=imagefolder data.root=x data.num_workers=null data.image_size=null",
    "student=custom student._target_=torchvision.models.resnet18 +student.progress=false",
    "student=custom student._target_=torch.nn.Flatten",
    "+width=2 student=wrn_16_2 student.width=${width}",
    "tolerance.file.logit=0.1 tolerance.file.snr=null",
]


@pytest.mark.parametrize("words", RIGHT)
def test_a_right_value_passes(words):
    checked(*words.split())


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(CONF.glob("*/*.yaml")) if file.parent.name not in ("role", "recipe", "sweep")],
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_every_choice_passes(file):
    group, name = file.parent.name, file.stem
    for role in ("teacher", "student") if group == "network" else (group,):
        choice = f"{role}=[{name}]" if role in LISTS else f"{role}={name}"
        checked(choice, *MUST.get(choice, []))


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_target_is_found_and_its_defaults_are_of_its_types(file):
    """A signature whose default its own type refuses would refuse what is shipped."""
    for target in re.findall(r"_target_: ([\w.]+)", file.read_text()):
        if not target.startswith("distill."):
            continue
        signature = read(target)
        assert signature is not None and absent(target) is None
        assert all(kind is not Any or name in ("finetune", "data") for name, kind in signature.types.items())


# a user's own


OWN = """
from __future__ import annotations
import typing as t
from dataclasses import dataclass
from typing import Annotated, Literal, Optional
from annotated_types import Gt, Interval
from torch import Tensor, nn
from elsewhere import Unknown

Rate = Annotated[float, Interval(ge=0, le=1)]


class Base(nn.Module):
    def __init__(self, scale: float, kind: Literal["a", "b"] = "a", rate: Rate = 0.5, size: int = None):
        super().__init__()


class Net(Base):
    pass


class Open(nn.Module):
    def __init__(self, width: t.Optional[int], *rest, **options):
        super().__init__()


@dataclass
class Options:
    depth: Annotated[int, Gt(2 ** 3)]
    names: "list[str]" = ()
    other: Unknown | None = None
    tensor: Tensor | float = 0.0
    weird: Unknown[int] = 3


class Pair(t.NamedTuple):
    first: int
    second: int


@t.overload
def twice(a: int): ...
@t.overload
def twice(a: str): ...
def twice(a, scale: float = 1.0):
    return None


@registered
class Made:
    first: int


@dataclass
class Keywords(nn.Module):
    _: KW_ONLY
    first: int = 3


def replaced(a: int):
    return None


replaced = registered(replaced)


def plain(a, b=3, *, c: bool = False, d: t.Union[int, t.Sequence[int]] = 1):
    return None


alias = plain
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets/__init__.py").write_text(
        "from .parts import Base as Root, Net, Open, Options, plain, alias\n"
    )
    (tmp_path / "own_nets/parts.py").write_text(OWN)
    (tmp_path / "own_nets/broken.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert "own_nets" not in sys.modules  # read, not imported


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Net +student.scale=wide", "student.scale=wide: expected a number"),
        ("Net +student.scale=true", "student.scale=true: expected a number"),
        ("Net", "student.scale must be given: student.scale=VALUE (own_nets.Net needs it)"),
        ("Root +student.scale=1 +student.kind=c", "student.kind=c: expected one of a, b"),
        ("Net +student.scale=1 +student.rate=2", "student.rate=2: expected a number from 0 to 1"),
        ("Net +student.scale=1 +student.scal=2", "takes no 'scal'; did you mean scale?"),
        ("Open +student.width=1.5", "student.width=1.5: expected null or a whole number"),
        ("Options +student.depth=8", "student.depth=8: expected a whole number greater than 8"),
        ("Options +student.depth=9 +student.names=[1]", "student.names=[1]: expected a list, each entry text"),
        ("Options +student.depth=9 +student.tensor=x", "student.tensor=x: expected a node with _target_ or a number"),
        (
            "alias +student.a=1 +student.d=x",
            "student.d=x: expected a whole number or a list, each entry a whole number",
        ),
        ("parts.plain +student.a=1 +student.c=3", "student.c=3: expected true or false"),
        ("parts.twice +student.a=1 +student.scale=x", "student.scale=x: expected a number"),
        ("Nett", "there is no 'Nett' in own_nets; did you mean Net?"),
    ],
)
def test_plain_annotations_of_a_users_own_are_kept(own, words, expected):
    target, *rest = words.split()
    with pytest.raises(UsageError, match=re.escape(expected)):
        checked("student=custom", f"student._target_=own_nets.{target}", *rest)


@pytest.mark.parametrize(
    "words",
    [
        "Net +student.scale=1",
        "Net +student.scale=1 +student.size=null +student.kind=b",
        "Open +student.width=null +student.anything=[1,x]",
        "Options +student.depth=9 +student.other=5 +student.weird=x +student.tensor=2",
        "plain +student.a=x +student.b=[1] +student.d=[1,2]",
        "alias +student.a=1",
        "parts.Pair +student.first=1 +student.second=2",
        "parts.twice +student.a=x",
        "parts.Made +student.first=1 +student.other=x",
        "parts.Keywords",
        "parts.replaced +student.b=3",
        "broken.nett",
    ],
)
def test_what_is_not_known_of_a_users_own_is_let_through(own, words):
    target, *rest = words.split()
    checked("student=custom", f"student._target_=own_nets.{target}", *rest)


def test_of_several_wrong_values_the_command_lines_own_is_told():
    with pytest.raises(UsageError, match=r"^optimizer\.lr=-1"):
        checked("optimizer.lr=-1")  # which teacher.fit.lr and others take over


# types in words, and YAML's values against them


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, [3, -1], [True, 3.0, "3", None, [3]]),
        (float, [3, 0.5], [True, "3", None]),
        (bool, [True], [1, 0, "true", None]),
        (str, ["3"], [3, True, None]),
        (int | None, [None, 3], ["null"]),
        (tuple[int, int], [[1, 2]], [[1], [1, 2, 3], 1]),
        (list[float], [[1, 2.5], []], ["12", 1, [True]]),
        (dict[str, int], [{"a": 1}], [[1], {"a": "b"}]),
        (Path, ["a/b"], [3]),
        (Literal["a", 1], ["a", 1], ["b", True]),
        (Annotated[float, Gt(0)], [1], [0, -1, float("nan")]),
        (Object, [{"a": 1}, [1]], [1, "x", True]),
        (Any, [1, None, "x"], []),
    ],
)
def test_values_are_taken_as_yaml_gives_them(kind, right, wrong):
    assert [value for value in right if mismatch(kind, value) is not None] == []
    assert [value for value in wrong if mismatch(kind, value) is None] == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Annotated[float, Gt(0)], "a number greater than 0"),
        (Annotated[int, Ge(1)] | None, "null or a whole number of at least 1"),
        (Annotated[float, Interval(ge=0, lt=1)], "a number from 0 to below 1"),
        (Annotated[float, Interval(gt=0, le=1)], "a number greater than 0 and at most 1"),
        (int | float, "a number"),
        (Literal["a", "b"] | None, "null or one of a, b"),
        (list[int], "a list, each entry a whole number"),
    ],
)
def test_types_are_told_in_words(kind, words):
    assert describe(kind) == words


def test_every_option_model_is_one_that_pydantic_knows():
    for _, model in options.MODELS:
        for kind in options.hints_of(model).values():
            TypeAdapter(kind, config={"arbitrary_types_allowed": True})


def test_names_are_followed_to_where_they_are_defined():
    assert find("pytorch_lightning.Trainer")[0].name == "pytorch_lightning.trainer.trainer"
    assert find("torch.optim.SGD")[0].name == "torch.optim.sgd"
    assert read("torch.optim.SGD").types["nesterov"] is bool
    assert read("os.getcwd") is None and read("nowhere.at.all") is None


# the program


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ema=1.5", "ema=1.5: expected null or a number from 0 to below 1"),
        ("loss.kd.temperature=-1", "loss.kd.temperature=-1: expected a number greater than 0"),
        ("--epochs 3", "no option '--epochs'; options are words without dashes: trainer.max_epochs=3"),
        ("--batch-size=8", "options are words without dashes: data.batch_size=8"),
        ("lr=0.1", "no option 'lr'; did you mean optimizer.lr?"),
        ("epochs=3", "no option 'epochs'; did you mean trainer.max_epochs?"),
        ("batch_size=8", "no option 'batch_size'; did you mean data.batch_size?"),
        ("optimizer=null", "optimizer=null: expected the name of a choice"),
        ("temperature=2", "no option 'temperature'; did you mean loss.kd.temperature?"),
    ],
)
def test_the_program_says_one_line_and_leaves_nothing(tmp_path, words, expected):
    program = [sys.executable, str(ROOT / "train.py"), "name=x"]
    done = subprocess.run([*program, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and expected in done.stderr
    assert not (tmp_path / "outputs/x").exists()


def test_the_version_is_ours():
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "distill 0.1.0\n")
