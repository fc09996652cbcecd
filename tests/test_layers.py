"""The rooms of the package: imports go downward, and only some rooms know some libraries."""

import ast
import tomllib
from pathlib import Path

import pytest

import scoresde

ROOT = Path(scoresde.__file__).parent
FLOORS = {  # the design's table; a room that serves others of its floor stands half a step lower
    "errors": 0,  # 0 to 0.3 is the ground: what is independent of the subject
    "recipe": 0.1,  # names rooms by text alone, and imports none
    "shapes": 0.1,
    "passes": 0.1,
    "progress": 0.1,
    "tensors": 0.1,
    "streams": 0.1,
    "sde": 1,
    "nn": 1,
    "solvers": 1,
    "divergence": 1,
    "trainable": 1.2,
    "operators": 1.7,
    "times": 1.5,
    "codec": 1.5,
    "model": 2,
    "likelihood": 2.5,
    "sample": 3,
    "loss": 3.3,  # a design of noise levels has its sampler
    "guidance": 3,
    "inverse": 3.5,
    "data": 4,
    "metrics": 4,
    "interop": 4,
    "train": 5,
    "__init__": 5.5,  # the names for users, imported when they are used
    "report": 6,
    "tasks": 7,
    "configuration": 7.3,
    "commands": 7.6,
    "run": 8,
    "__main__": 8,
}
OLD = {"bound", "cutoff", "flow"}  # modules that moved, for one release: names alone
GUESTS = {  # the rooms that a library may be imported from
    "hydra": {"run", "configuration"},
    "omegaconf": {"run", "configuration", "commands"},
    "torchdiffeq": {"solvers"},
    "torchsde": {"solvers"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.stem not in OLD or path.parent != ROOT)

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
            yield part[0] if part and part[0] in FLOORS else "__init__"


def source(path):
    return path.read_text(encoding="utf-8")


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} <= FLOORS.keys()


@each_file
def test_imports_go_downward(path):
    here = room(path)
    above = {
        there
        for there in rooms(path, source(path))
        if there != here and FLOORS[there] >= FLOORS[here]
    }
    assert not above, f"{here} (floor {FLOORS[here]}) imports {above}"


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
