"""The rooms of the package: imports go downward, and only some rooms know some libraries."""

import ast
import tomllib
from pathlib import Path

import pytest

import scoresde

ROOT = Path(scoresde.__file__).parent
LAYERS = {  # the design's table; a room that serves others of its layer stands half a step lower
    "errors": 0,  # 0 is what everybody may know
    "recipe": 0.5,  # names rooms by text alone, and imports none
    "shapes": 0.5,  # knows errors
    "tensors": 0.5,
    "sde": 1,
    "streams": 1,
    "nn": 1,
    "model": 2,
    "times": 2,
    "divergence": 2,
    "solvers": 2,
    "flow": 2.5,  # carries points and densities, for samplers and likelihoods
    "cutoff": 2.5,
    "guidance": 3,
    "loss": 3,
    "bound": 3,
    "sample": 3,
    "likelihood": 3,
    "__init__": 3.5,  # names the parts for users: everything up to the likelihood
    "data": 4,
    "metrics": 4,
    "interop": 4,
    "train": 5,
    "plots": 5.5,
    "report": 5.5,
    "tasks": 6,
    "configuration": 6.5,
    "commands": 6.7,
    "run": 7,
    "__main__": 7,
}
GUESTS = {  # the rooms that a library may be imported from
    "hydra": {"run", "configuration"},
    "omegaconf": {"run", "configuration", "commands"},
    "torchdiffeq": {"solvers"},
    "torchsde": {"solvers"},
}
FILES = sorted(ROOT.rglob("*.py"))

each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def room(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path, source):
    """The dotted names that a file imports, at its top or inside of its functions."""
    package = ("scoresde", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms(path, source):
    """The rooms of the package that a file imports from."""
    for name in imports(path, source):
        if name.split(".")[0] == "scoresde":
            part = name.split(".")[1:2]
            yield part[0] if part and part[0] in LAYERS else "__init__"


def source(path):
    return path.read_text(encoding="utf-8")


def test_every_room_has_a_layer():
    assert {room(path) for path in FILES} <= LAYERS.keys()


@each_file
def test_imports_go_downward(path):
    here = room(path)
    above = {
        there
        for there in rooms(path, source(path))
        if there != here and LAYERS[there] >= LAYERS[here]
    }
    assert not above, f"{here} (layer {LAYERS[here]}) imports {above}"


@each_file
def test_only_stated_rooms_know_a_library(path):
    libraries = {name.split(".")[0] for name in imports(path, source(path))} & GUESTS.keys()
    strangers = {library for library in libraries if room(path) not in GUESTS[library]}
    assert not strangers


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("import scoresde.train", "train"),
        ("import scoresde.train.loop as loop", "train"),
        ("from scoresde import train", "train"),
        ("from scoresde.train import Trainer", "train"),
        ("def f():\n    from scoresde.train.loop import train", "train"),
        ("from ..train import Trainer", "train"),
        ("from .. import train", "train"),
        ("from .base import Sampler", "sample"),
        ("import scoresde", "__init__"),
        ("from scoresde import VPSDE", "__init__"),
    ],
)
def test_imports_of_every_form_are_seen(line, wanted):
    assert list(rooms(ROOT / "sample" / "some.py", line)) == [wanted]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    found = {
        ".".join(("scoresde", *path.relative_to(ROOT).parent.parts))
        for path in ROOT.rglob("__init__.py")
    }
    assert set(listed["tool"]["setuptools"]["packages"]) == found | {"scoresde.conf"}
