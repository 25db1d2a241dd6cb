"""Files of a stranger's making, and what a user would do with them: no code of theirs runs, no environment is read, no
file is made elsewhere, the end is one line, and it comes soon and in little memory."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import distill
from distill import runs
from distill.cli import pilots
from distill.data.imagefolder import imagefolder
from distill.data.webdataset import webdataset
from distill.errors import UserError
from distill.export import onnx, torchscript
from distill.files import CONF
from distill.networks.weights import load_weights
from distill.progress import say, shown
from distill.report import page, tables
from distill.report.tables import Row
from distill.runtimes.serve import serve

WORDS = ["stages=[teacher,distill]", "baseline=false", "compress=[]", "export=[]", "cache=off", "name=theirs"]
SECRET = "s3cr3t-of-the-user"
SECONDS, MEGABYTES = 60, 400  # of a test, on a machine that has other work too


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("hostile")
    assert train(*QUICK, *WORDS, cwd=cwd) == 0
    return cwd / "outputs" / "theirs"


@pytest.fixture
def theirs(folder, tmp_path):
    """A copy of the run's folder, to be made hostile."""
    shutil.copytree(folder.parent, tmp_path / "outputs")
    return tmp_path / "outputs" / "theirs"


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """A secret in the environment; at the end, how long it took and how much memory more than all before."""
    monkeypatch.setenv("SECRET", SECRET)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000 * MEGABYTES


def every(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.name not in (".lock", "outputs")}


# a run's folder


def opens(path: Path) -> str:
    """A group's choice that leads to a YAML file."""
    return os.path.relpath(path, Path(CONF, "recipe"))


def words(tmp: Path) -> dict[str, list[str]]:
    """Words of a run.json, by what they try; `tmp`/ran is what code would make."""
    ran, evil = tmp / "ran", tmp / "evil"
    made = f"{{_target_:os.mkdir,path:{ran}}}"
    candidate = f"student=custom,student._target_=os.mkdir,+student.path={ran}"
    levels = [f"+b{n}=" + (f"${{b{n - 1}}}" if n else "0123456789") * 10 for n in range(9)]
    pairs = [f"+c{n}.{side}=${{c{n - 1}}}" for n in range(1, 30) for side in "xy"]
    return {
        "os.system": [f"student={{_target_:os.system,command:'touch {ran}'}}"],
        "eval": ["student._target_=builtins.eval", f"+student._args_=[\"open('{ran}','w')\"]"],
        "torch.load": ["student._target_=torch.load", f"+student.f={evil}.pt", "+student.weights_only=false"],
        "hydra's own call": ["+student.x={_target_:hydra.utils.call,config:" + made + "}"],
        "partial": [f"+student.x={{_target_:functools.partial,_args_:[{made}]}}"],
        "partially": [f"+optimizer.x={{_target_:os.mkdir,_partial_:true,path:{ran}}}"],
        "in lists": [f"+loss.kd.x=[[[{{y:[{made}]}}]]]"],
        "in _args_": [f"+loss.kd._args_=[{made}]"],
        "with _convert_": [f"+loss.kd.x={{_convert_:all,_recursive_:true,y:{made}}}"],
        "pointed at": [f"+x={made}", "+loss.kd.x=${x}"],
        "our own files": [f"+loss.kd.x={{_target_:distill.files.own_temporary,path:{ran}}}"],
        "a network as a loss": ["loss.kd._target_=distill.networks.resnet_cifar.resnet"],
        "a loss as a network": ["student._target_=distill.losses.kd.KD"],
        "a published set": [f"data={{_target_:torchvision.datasets.CIFAR10,root:{ran},download:true}}"],
        "hub": [f"student={{_target_:torch.hub.load,repo_or_dir:{tmp},model:net,source:local}}"],
        "a hub by another name": ["student=timm", "student.name=' HF-HUB:them/net'"],
        "pretrained from a file": [
            "student._target_=timm.models.resnet.resnet18",
            f"+student.checkpoint_path={evil}.pt",
        ],
        "trusts itself": ["trust=true", "student._target_=os.getcwd"],
        "trusts itself harder": ["++trust=true", "student._target_=os.getcwd"],
        "a candidate's target": ["recipe=auto", f"recipe.candidates=[{{words:['{candidate}'],rate:1}}]"],
        "the environment": ["store=${oc.env:SECRET}"],
        "the environment, assembled": ["+e=env", "store=${oc.${e}:SECRET}"],
        "the environment in a name": ["+student.x=${oc.env:SECRET}"],
        "the environment, escaped": ["+x='\\${oc.env:SECRET}'"],
        "the environment, decoded": ["+x=${oc.decode:'${oc.env:SECRET}'}"],
        "hydra's resolver": ["store=${hydra:runtime.cwd}"],
        "a resolver of ours": ["store=${run_dir:null,outputs/x}"],
        "configuration beside it": [f"recipe={opens(evil)}"],
        "configuration from the root": [f"experiment=/{evil}"],
        "configuration under a key": [f"+recipe@student={opens(evil)}"],
        "configuration in a list": [f"loss=[ce,{opens(evil)}]"],
        "configuration by a path of groups": ["+loss/../recipe=auto"],
        "configuration by expression": [f"+x={opens(evil)}", "recipe=${x}"],
        "a folder to search": [f"--config-dir={tmp}"],
        "hydra's search path": [f"hydra.searchpath=[{tmp}]"],
        "hydra's folder": [f"hydra.run.dir={ran}"],
        "hydra's launcher": ["+hydra/launcher=x"],
        "a sweep": ["seed=range(0,100000000)"],
        "text that doubles": levels,
        "nodes that double": ["+c0={x:1,y:2}", *pairs],
        "nested": ["+x=" + "[" * 5000 + "]" * 5000],
        "long": ["+x=[" + ",".join(["1"] * 100_000) + "]"],
        "many": [f"+x{n}=1" for n in range(20_000)],
        "a store elsewhere": [f"store={tmp.parent}/elsewhere"],
        "a store above": ["store=../../../elsewhere"],
        "a store at home": ["store=~/elsewhere"],
        "a cache elsewhere": [f"cache.folder={tmp.parent}/elsewhere"],
        "packs elsewhere": ["data=imagefolder", f"data.root={tmp}", f"data.store={tmp.parent}/elsewhere"],
        "logs elsewhere": [f"+trainer.default_root_dir={tmp.parent}/elsewhere"],
        "a step named like a path": ["+compress={'../../../x':{_target_:distill.compress.fp16.fp16}}"],
        "a name that steers": ['+loss.x={"\\u001b[2J":1}'],
    }


@pytest.mark.parametrize("attack", words(Path("/tmp")))
def test_words(train, theirs, tmp_path, capfd, monkeypatch, attack):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "evil.yaml").write_text(
        f"# @package _global_\nstore: ${{oc.env:SECRET}}\nstudent: {{_target_: os.mkdir, path: {tmp_path / 'ran'}}}\n"
    )
    torch.save({"x": Makes(tmp_path / "ran")}, tmp_path / "evil.pt")
    record = json.loads((theirs / "run.json").read_text())
    (theirs / "run.json").write_text(json.dumps(record | {"overrides": record["overrides"] + words(tmp_path)[attack]}))
    before = every(tmp_path)
    stages = "[report]" if len(attack) % 2 else "[teacher,distill]"
    assert train(f"run={theirs}", f"stages={stages}", cwd=tmp_path) in (1, 2)
    out, error = capfd.readouterr()
    assert [line.startswith("error: ") for line in error.splitlines()] == [True]
    assert len(error) < 1000 and SECRET not in error + out and "\x1b" not in error + out
    assert "HYDRA_FULL_ERROR" not in error  # it was meant
    assert every(tmp_path) == before
    assert not (tmp_path.parent / "elsewhere").exists()
    assert all(SECRET not in path.read_text() for path in (theirs / "run.json", theirs / "config.yaml"))


class Makes:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved_config(tmp: Path) -> dict[str, str]:
    """Lines of a config.yaml."""
    made = f"{{_target_: os.mkdir, path: {tmp / 'ran'}}}"
    return {
        "a target": f"student: {made}",
        "a target of no role": f"tolerance: {made}",
        "an expression": "student: {_target_: '${oc.env:SECRET}'}",
        "the environment": "store: '${oc.env:SECRET}'",
        "a tag": f"student: !!python/object/apply:os.mkdir [{tmp / 'ran'}]",
        "a store elsewhere": f"store: {tmp.parent}/elsewhere",
        "a step named like a path": "compress: {../../x: {_target_: distill.compress.half.fp16}}",
        "a loss named like one": "loss: {../../x: {_target_: distill.losses.kd.KD}}",
    }


@pytest.mark.parametrize("attack", saved_config(Path("/tmp")))
def test_a_saved_configuration(train, theirs, tmp_path, capfd, attack):
    line = saved_config(tmp_path)[attack]
    kept = (theirs / "config.yaml").read_text().splitlines()
    (theirs / "config.yaml").write_text("\n".join([*_without(kept, line.partition(":")[0]), line, ""]))
    assert train(f"run={theirs}", "stages=[report]", cwd=tmp_path) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and SECRET not in error
    assert not (tmp_path / "ran").exists() and not (tmp_path.parent / "elsewhere").exists()


def _without(lines: list[str], key: str) -> list[str]:
    """A YAML file's lines without a part at its top."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith(f"{key}:") or (inside and line.startswith((" ", "-")))
        kept += [] if inside else [line]
    return kept


def test_a_candidate_of_an_honest_looking_run(theirs, tmp_path, monkeypatch):
    """pilots.py composes its words again."""
    from test_configs import composed

    monkeypatch.setattr("sys.argv", ["train.py", f"run={theirs}"])
    cfg = composed(*QUICK, "name=x")
    monkeypatch.setattr(pilots, "compose", lambda name, words: composed(*words))
    for word in (
        f"+student.x={{_target_:os.mkdir,path:{tmp_path / 'ran'}}}",
        "store=${oc.env:SECRET}",
        f"recipe={opens(tmp_path)}",
    ):
        with pytest.raises(UserError, match="trust=true"):
            pilots._composed([*QUICK, "name=x"], [word], cfg)


@pytest.mark.parametrize("name", ["export", "metrics", "checkpoints", "compress/x", "pilots", "report.md"])
def test_links_out_of_a_folder(train, theirs, tmp_path, capfd, name):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "README.md").write_text("mine")
    shutil.rmtree(theirs / name, ignore_errors=True)
    (theirs / name).parent.mkdir(exist_ok=True)
    (theirs / name).symlink_to(tmp_path / "victim")
    assert train(f"run={theirs}", "stages=[export,report]", cwd=tmp_path) == 1
    assert "leads out of the folder" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "student.safetensors"])
def test_pipes_and_devices(train, theirs, tmp_path, capfd, name):
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (theirs / name).unlink()
        make(theirs / name)
        assert train(f"run={theirs}", "stages=[report]", cwd=tmp_path) in (1, 2)
        assert len(capfd.readouterr().err.splitlines()) == 1
        runs.summary(tmp_path / "outputs")
        assert ("theirs is left out" in capfd.readouterr().out) == (name != "student.safetensors")
        if name == "student.safetensors":
            with pytest.raises(UserError):
                distill.load_student(theirs)


REPORTS = {
    "rows of numbers": {"rows": [1], "context": {}},
    "no rows": {"context": {}},
    "a mapping of rows": {"rows": {"a": 1}, "context": {}},
    "text for a number": {"rows": [{"name": "a.pt", "top1": "<script>"}], "context": {}},
    "no name": {"rows": [{"top1": 1.0}], "context": {}},
    "a list of context": {"rows": [], "context": []},
    "endless": '{"rows": [{"name": "a.pt", "top1": 1e999}], "context": {}}',
    "no number": '{"rows": [{"name": "a.pt", "top1": NaN}], "context": {}}',
    "twice": '{"rows": [], "rows": [], "context": {}}',
    "deep": "[" * 100_000,
    "digits": '{"rows": ' + "9" * 100_000 + "}",
    "list": "[]",
}


@pytest.mark.parametrize("attack", REPORTS)
def test_a_report(theirs, tmp_path, capsys, attack):
    content = REPORTS[attack]
    (theirs / "report.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for read in (runs.summary, runs.models):
        assert read(tmp_path / "outputs").empty
        said = capsys.readouterr().out
        assert said.startswith("warning: ") and "theirs is left out: " in said and "report.json is damaged" in said
    rows = [Row("student", 0.5)]
    assert tables.with_earlier(rows, theirs) == (rows, [])


METRICS = {
    "no epochs": "a,b\n1,2\n",
    "text": "epoch,train/loss\n0,=cmd|' /C calc'!A0\n",
    "bytes": b"\xff\xfe\x00\x01" * 100,
    "ragged": "epoch,a\n0,1,2,3\n0\n",
    "no number": "epoch,a\nnan,1\n",
    "endless": "epoch,a\ninf,1\n",
}


@pytest.mark.parametrize("attack", METRICS)
def test_metrics(theirs, attack):
    shutil.rmtree(theirs / "metrics")
    (theirs / "metrics" / "version_x").mkdir(parents=True)
    content = METRICS[attack]
    (theirs / "metrics" / "version_x" / "metrics.csv").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        runs.curves(theirs)


def test_metrics_without_end(theirs):
    (file,) = theirs.glob("metrics/version_0/metrics.csv")
    os.truncate(file, 10**12)
    with pytest.raises(UserError, match="longer than"):
        runs.curves(theirs)


@pytest.mark.parametrize(
    "content", ['{"pilots": [1]}', '{"pilots": {"a": 1}}', '{"pilots": {}, "table": [1]}', "{}", "["]
)
def test_pilots(theirs, content):
    (theirs / "pilots.json").write_text(content)
    with pytest.raises(UserError, match=r"pilots\.json is damaged"):
        pilots.told(theirs)


# weights


def safetensors(header: dict | bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def packed(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name.replace('_', '.')}", content)
    return buffer.getvalue()


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def holding_itself() -> dict:
    content = {}
    content["x"] = content["state_dict"] = content
    return content


def doubled() -> dict:
    content = {"a": 1}
    for _ in range(60):
        content = {"x": content, "y": content}
    return content


def files(ran: Path) -> dict[str, bytes]:
    """Files of weights, by what they try."""
    endless = torch.zeros(1).expand(10**6, 10**6)
    return {
        "a header without end": safetensors({}, length=2**63),
        "a header longer than the file": safetensors({}, length=10**7),
        "a deep header": safetensors(b"[" * 10**6),
        "a header that is no text": safetensors(b"{\xff\xfe}"),
        "offsets beyond the end": safetensors({"weight": tensor([4], 0, 16), "bias": tensor([2**40], 16, 2**42)}),
        "offsets that overlap": safetensors({"weight": tensor([4], 0, 16), "bias": tensor([4], 8, 24)}),
        "offsets backwards": safetensors({"weight": tensor([4], 16, 0)}),
        "a shape that overflows": safetensors({"weight": tensor([2**62, 4], 0, 64)}),
        "negative shapes": safetensors({"weight": tensor([-4], 0, 64)}),
        "a type that is none": safetensors({"weight": tensor([16], 0, 64, "OBJECT")}),
        "metadata that is no text": safetensors({"__metadata__": {"a": [1]}, "weight": tensor([16], 0, 64)}),
        "code": saved({"weight": Makes(ran)}),
        "code, the old way": saved({"weight": Makes(ran)}, _use_new_zipfile_serialization=False),
        "a bare pickle": pickle.dumps(Makes(ran)),
        "code in a state": saved({"weight": torch.zeros(3, 4), "_extra_state": Makes(ran)}),
        "a zip bomb": packed(data_pkl=bytes(10**8)),
        "a TorchScript program": packed(code_x=b"x", data_pkl=b"", constants_pkl=b""),
        "a tensor that is not there": saved({"weight": endless, "bias": torch.zeros(3)}),
        "a sparse tensor": saved({"weight": torch.zeros(3, 4).to_sparse(), "bias": torch.zeros(3)}),
        "a tensor without memory": saved({"weight": torch.zeros(3, 4, device="meta"), "bias": torch.zeros(3)}),
        "a quantized tensor": saved({"weight": torch.quantize_per_tensor(torch.zeros(3, 4), 1, 0, torch.quint8)}),
        "a mapping that holds itself": saved(holding_itself()),
        "mappings that double": saved(doubled()),
        "no mapping": saved([1, 2]),
        "nothing": b"",
        "noise": bytes(range(256)) * 9,
    }


@pytest.mark.parametrize("attack", files(Path("/tmp/ran")))
@pytest.mark.filterwarnings("ignore")
def test_weights(tmp_path, attack):
    (tmp_path / "evil.pt").write_bytes(files(tmp_path / "ran")[attack])
    for read in (lambda path: load_weights(nn.Linear(4, 3), path), distill.load_student):
        with pytest.raises(UserError) as error:
            read(tmp_path / "evil.pt")
        assert "evil.pt" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


NETWORKS = {
    "of odd arguments": {"depth": "x", "widths": {"a": []}},
    "without statistics": {"mean": None},
    "deep": {"depth": 6 * 10**8 + 2},
    "wide": {"widths": [16, 32, 10**6]},
    "of endless classes": {},
    "of a hub": {"_target_": "distill.networks.timm_models.classifier", "name": "hf\t_hub:them/net"},
    "of a folder": {"_target_": "distill.networks.timm_models.classifier", "name": "LOCAL-DIR:/tmp"},
}


@pytest.mark.parametrize("attack", NETWORKS)
def test_a_students_file_of_a_network_that_it_cannot_hold(folder, tmp_path, attack):
    file, meta = folder / "student.safetensors", {}
    with open(file, "rb") as opened:
        meta = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))["__metadata__"]
    meta["network"] = json.dumps(json.loads(meta["network"]) | NETWORKS[attack])
    if attack == "of endless classes":
        meta["classes"] = json.dumps([0] * 10**7)
    save_file(load_file(file), tmp_path / "evil.safetensors", meta)
    with pytest.raises(
        UserError, match=r"evil\.safetensors (describes what is not built|takes student.name=.* from elsewhere)"
    ):
        distill.load_student(tmp_path / "evil.safetensors")


# images and shards


def png(size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, io.BytesIO(content)


def shard(path: Path, *members: tuple) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(20):
            for name, content in ((f"{number}.png", png()), (f"{number}.cls", b"%d" % (number % 2))):
                tar.addfile(*member(name, content))
        for info, content in members:
            tar.addfile(info, content)
    return path


@pytest.mark.parametrize("name", ["{tmp}/out.png", "../../out.png", "/{tmp}/out.cls", "a/../../../out.png"])
def test_members_stay_where_they_are(tmp_path, name):
    name = name.format(tmp=tmp_path)
    (tmp_path / "in").mkdir()
    content = png() if name.endswith("png") else b"1"
    beside = name.replace(".png", ".cls") if name.endswith("png") else name.replace(".cls", ".png")
    path = shard(
        tmp_path / "in" / "a.tar", member(name, content), member(beside, b"1" if name.endswith("png") else png())
    )
    data = webdataset(str(path), store=str(tmp_path / "in" / "store"))
    assert len(data.train) + len(data.val) + len(data.test) == 21
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_left_out(tmp_path, kind):
    path = shard(tmp_path / "a.tar", member("x.png", kind=kind, link="/etc/passwd"), member("x.cls", b"0"))
    data = webdataset(str(path))
    assert len(data.train) + len(data.val) + len(data.test) == 20


@pytest.mark.parametrize(
    "name", ["a compressed shard", "no tar", "a label of many digits", "a deep label", "a member without end"]
)
def test_hostile_shards(tmp_path, name):
    path = tmp_path / "a.tar"
    if name == "a compressed shard":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(*member("0.png", bytes(10**6)))
    elif name == "no tar":
        path.write_bytes(b"x" * 5000)
    elif name == "a member without end":
        shard(path)
        info = tarfile.TarInfo("x.png")
        info.size = 8**11 - 1
        path.write_bytes(path.read_bytes().rstrip(b"\0") + bytes(512) + info.tobuf() + bytes(1024))
    else:
        label = b"9" * 10**5 if "digits" in name else b"[" * 10**6
        shard(path, member("x.png", png()), member("x.cls" if "digits" in name else "x.json", label))
    with pytest.raises(UserError) as error:
        webdataset(str(path))
    assert len(str(error.value).splitlines()) == 1


def arrays(**changed) -> bytes:
    good = {
        "names": np.array(["0"] * 20),
        "offsets": np.full(20, 512),
        "sizes": np.full(20, 80),
        "labels": np.arange(20) % 2,
    }
    compressed = changed.pop("compressed", False)
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **{**good, **changed})
    return buffer.getvalue()


INDICES = {
    "an object": lambda ran: arrays(names=np.array([Makes(ran)] * 20, dtype=object)),
    "a bomb": lambda ran: arrays(names=np.zeros(10**8, np.uint8), compressed=True),
    "places outside": lambda ran: arrays(offsets=np.full(20, 2**50)),
    "places before it": lambda ran: arrays(offsets=np.full(20, -5)),
    "sizes without end": lambda ran: arrays(sizes=np.full(20, 2**60)),
    "other lengths": lambda ran: arrays(labels=np.arange(3)),
    "no numbers": lambda ran: arrays(labels=np.array([0.5] * 20)),
    "a pickle": lambda ran: pickle.dumps(Makes(ran)),
}


@pytest.mark.parametrize("attack", INDICES)
def test_a_strangers_index(tmp_path, capfd, attack):
    path = shard(tmp_path / "a.tar")
    wanted = webdataset(str(path), store=str(tmp_path / "store")).fingerprint
    (kept,) = (tmp_path / "store").glob("*.npz")
    kept.write_bytes(INDICES[attack](tmp_path / "ran"))
    assert webdataset(str(path), store=str(tmp_path / "store")).fingerprint == wanted
    assert "is damaged; it is made anew" in capfd.readouterr().out
    assert not (tmp_path / "ran").exists()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


PACKS = {
    "objects": lambda ran: npy(np.array([Makes(ran)], dtype=object)),
    "a pickle": lambda ran: pickle.dumps(Makes(ran)),
    "other numbers": lambda ran: npy(np.zeros((20, 3, 8, 8))),
    "another shape": lambda ran: npy(np.zeros((20, 3, 8, 9), np.uint8)),
    "a zip file": lambda ran: arrays(),
    "a header that is code": lambda ran: (
        b"\x93NUMPY\x01\x00\x50\x00" + f"__import__('os').mkdir({str(ran)!r})".encode().ljust(80)
    ),
    "a shape without end": lambda ran: (
        npy(np.zeros((20, 3, 8, 8), np.uint8)).replace(b"(20, ", b"(2000000000, ").replace(b"        }", b"}")
    ),
}


@pytest.mark.parametrize("attack", PACKS)
def test_a_strangers_pack(tmp_path, capfd, attack):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "set" / name / f"{number}.png").write_bytes(png())
    wanted = imagefolder(str(tmp_path / "set"), store=str(tmp_path / "store")).train.images.clone()  # it is mapped
    (kept,) = (tmp_path / "store").glob("*.npy")
    kept.write_bytes(PACKS[attack](tmp_path / "ran"))
    assert torch.equal(imagefolder(str(tmp_path / "set"), store=str(tmp_path / "store")).train.images, wanted)
    assert "is damaged; it is made anew" in capfd.readouterr().out
    assert not (tmp_path / "ran").exists()


# what is shown


ODD = ["\x1b[2J\x1b]0;x\x07", "\u202egnp.exe", "a\rb", "\x9b31m", "\x00", "\x7f"]


@pytest.mark.parametrize("text", ODD)
def test_a_terminal_is_not_steered(capfd, text):
    say(f"class {text}")
    out = capfd.readouterr().out
    assert out == shown(f"class {text}") + "\n" and out[:-1].isprintable()


def test_what_people_write_is_shown_as_it_is():
    for text in ("Größe", "日本", "שלום", "👩‍👩‍👧", "a\tb\nc", "50 %"):
        assert shown(text) == text


MARKED = "<script>alert(1)</script> ![x](http://them/p.png) [a](javascript:b) `c` **d** | e\n# f"


def test_a_report_escapes_what_it_shows(tmp_path):
    rows = [Row("student", 0.5), Row(MARKED, 0.5, format="onnx", measured=MARKED)]
    page.write(rows, tmp_path, {"run": MARKED, "test images": 5, "command": f"x `{MARKED}`"}, [f"{MARKED}: bad"])
    text = (tmp_path / "report.md").read_text()
    plain = [line for line in text.splitlines() if not line.startswith("- command")]
    for bad in ("<script", "![x]", "[a](", "`c`", "**d**"):
        assert not any(bad in line.replace(f"\\{bad[0]}", "") for line in plain), bad
    assert not any(line.startswith("# f") for line in plain)
    (command,) = (line for line in text.splitlines() if line.startswith("- command"))
    assert command == "- command: `` x `" + MARKED.replace("\n", " ") + "` ``"


def test_files_of_a_report_have_names_of_ours(tmp_path):
    """Their names stand in the programs of export/README.md."""
    names = [
        'student");__import__("os").system("id")#.onnx',
        "../student.onnx",
        "student\n.onnx",
        "/etc/passwd",
        "student.onnx",
    ]
    (tmp_path / "export").mkdir()
    for name in ("student.onnx", names[0], "../student.onnx", "student\n.onnx"):
        (tmp_path / "export" / name).write_bytes(b"x")
    page.write([Row(name, 0.5, bytes=1, format="onnx") for name in names], tmp_path, {})
    rows, _ = tables.with_earlier([Row("student", 0.5)], tmp_path)
    assert [row.name for row in rows] == ["student", "student.onnx"]


def test_tables_in_a_notebook_are_escaped(theirs, tmp_path):
    record = json.loads((theirs / "run.json").read_text())
    record["overrides"].append("+x='<script>alert(1)</script>'")
    (theirs / "run.json").write_text(json.dumps(record))
    page.write([Row("<img src=x onerror=alert(1)>.pt", 0.5, bytes=1)], theirs, {})
    for found in (runs.summary(tmp_path / "outputs"), runs.models(tmp_path / "outputs")):
        assert "<script" not in found._repr_html_() and "<img" not in found._repr_html_()


# exported files


@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
@pytest.mark.parametrize("runtime", ["its own", "1.23.2"])
def test_an_onnx_file_reads_nothing_outside_of_its_folder(tmp_path, monkeypatch, where, runtime):
    """A runtime before 1.24, Python 3.10's last, reads what is named."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if runtime != "its own":
        monkeypatch.setattr(onnxruntime, "__version__", runtime)
    (tmp_path / "secret").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "beside").write_bytes((tmp_path / "secret").read_bytes())
    (tmp_path / "export" / "link").symlink_to("../secret")
    for place in ("beside", str(tmp_path / "secret"), "../secret", "link", "x/../../secret"):
        weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": place, "offset": "0", "length": "16"}.items():
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
        nodes, functions = [helper.make_node("Add", ["images", "w"], ["logits"])], []
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        if where != "initializer":
            nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
        if where == "function":
            functions = [helper.make_function("own", "Sum", ["images"], ["logits"], nodes, opsets[:1])]
            nodes = [helper.make_node("Sum", ["images"], ["logits"], domain="own")]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 4])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
            [weight] if where == "initializer" else [],
        )
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)
        (tmp_path / "export" / "student.onnx").write_bytes(model.SerializeToString())
        refused = pytest.raises(UserError, match="is not in its folder" if runtime != "its own" else "xternal data")
        with contextlib.nullcontext() if place == "beside" else refused:
            onnx.load(tmp_path / "export" / "student.onnx")(torch.zeros(1, 4))


@pytest.mark.parametrize("name", ["student.pt", "student.ptl"])
def test_a_strangers_program_is_asked_in_a_process_of_its_own(tmp_path, name):
    """One that answers nonsense ends that, and no other."""

    class Odd(nn.Module):
        def forward(self, x):
            return {"no": x}

    script = torch.jit.script(Odd())
    (tmp_path / name).write_bytes(
        script._save_to_buffer_for_lite_interpreter() if name.endswith("l") else script.save_to_buffer()
    )
    (file,) = (each for each in torchscript.reload(tmp_path / "student"))
    with serve({name: file}) as served, pytest.raises(UserError, match=name):
        served[name](torch.zeros(1, 3, 8, 8))
