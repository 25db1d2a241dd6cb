"""Paths reach the program as the shell hands them over."""

import os

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from distill.cli.paths import quoted

ODD = [
    *(
        "my photos",
        "a=b",
        "photos [new]",
        "[new]",
        "a(b)",
        "it's",
        "C:\\x",
        "C:\\x\\",
        "it\\'s",
        "a{b}",
        "a{000..009}.tar",
    ),
    *(
        "$x",
        "ü é",
        "a#b",
        "a&b;c",
        "100%",
        "a:b",
        "2024",
        "true",
        "1e3",
        "a,b",
        "a, b",
        "📷 photos",
        "a\tb",
        "(",
        "null x",
    ),
    *("choice(a)", '"', "a'b'c", "-x", "a|b", "*", "@home", "x!"),
]


def value(word: str):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("path", ODD)
@pytest.mark.parametrize("key", ["data.root", "teacher.checkpoint", "run", "+data.classes", "store", "cache.folder"])
def test_a_path_is_a_text(path, key):
    [word] = quoted([f"{key}={path}"])
    assert value(word) == path
    assert quoted([word]) == [word] or path == '"'  # again changes nothing


def test_home_is_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me you")
    assert [value(word) for word in quoted(["data.root=~", "data.root=~/x", "data.root=a~b"])] == [
        *("/home/me you", "/home/me you/x", "a~b"),
    ]


@pytest.mark.parametrize(
    "word",
    [
        *("data.root=null", "data.root=", "data.root='a b'", 'data.train="x-{000..009}.tar"', "data.root=${oc.env:X}"),
        *("loss=[ce,kd]", "optimizer.lr=0.1", "teacher.mean=[.5,.5,.5]", "--config-dir=a=b", "name=a", "data.root"),
    ],
)
def test_what_is_written_for_hydra_stays(word):
    assert quoted([word]) == [word]


def test_a_sweep_over_paths_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quoted(["-m", "data.root=a,b"]) == ["-m", "data.root=a,b"]
    os.mkdir("a,b")
    assert quoted(["-m", "data.root=a,b"]) == ["-m", "data.root='a,b'"]


@pytest.mark.parametrize("name", ["photos [new]", "it's = 1", "2024"])
def test_photos_in_such_a_folder_are_found(train, tmp_path, capfd, name):
    assert train("data=imagefolder", f"data.root={tmp_path / name}", "stages=[check]", "name=x", cwd=tmp_path) == 1
    assert f"no folder {tmp_path / name}: " in capfd.readouterr().err
