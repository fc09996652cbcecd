"""The rooms of the package: imports go downward, and only some rooms know some libraries."""

import ast
from pathlib import Path

import pytest

import scoresde

ROOT = Path(scoresde.__file__).parent
LAYERS = {  # the design's table; 0 is what everybody may know
    "errors": 0,
    "shapes": 0,
    "sde": 1,
    "streams": 1,
    "nn": 1,
    "model": 2,
    "times": 2,
    "divergence": 2,
    "solvers": 2,
    "loss": 3,
    "sample": 3,
    "likelihood": 3,
    "data": 4,
    "metrics": 4,
    "train": 5,
    "tasks": 6,
    "plots": 6,
    "report": 6,
    "run": 7,
    "__main__": 7,
    "__init__": 8,  # names the parts for users, and nobody imports it
}
GUESTS = {  # the rooms that a library may be imported from
    "hydra": {"run"},
    "omegaconf": {"run"},
    "torchdiffeq": {"solvers"},
    "torchsde": {"solvers"},
}
FILES = sorted(ROOT.rglob("*.py"))

each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def room(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """The dotted names of what a file imports, at its top or inside of its functions."""
    package = ("scoresde", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).rstrip(".")
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from names if module == "scoresde" else [module]


def own(path):
    """The rooms of the package that a file imports from."""
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "scoresde":
            yield parts[1] if len(parts) > 1 else "__init__"


def test_every_room_has_a_layer():
    assert {room(path) for path in FILES} <= LAYERS.keys()


@each_file
def test_imports_go_downward(path):
    here = room(path)
    upward = {
        there for there in own(path) if there != here and LAYERS.get(there, 8) > LAYERS[here]
    }
    assert not upward, f"{here} (layer {LAYERS[here]}) imports {upward}"


@each_file
def test_the_lowest_rooms_do_not_know_each_other(path):
    """SDEs, streams and networks: a network knows no SDE, and an SDE no network."""
    if LAYERS[room(path)] == 1:
        assert {there for there in own(path) if LAYERS.get(there, 8) == 1} <= {room(path)}


@each_file
def test_only_stated_rooms_know_a_library(path):
    strangers = {
        library
        for library in {name.split(".")[0] for name in imported(path)} & GUESTS.keys()
        if room(path) not in GUESTS[library]
    }
    assert not strangers


def test_the_rule_sees_imports_of_every_form(tmp_path):
    """The test's own eyes: each of these lines names a room above."""
    forms = {
        "import scoresde.train": "train",
        "import scoresde.train.loop as loop": "train",
        "from scoresde import train": "train",
        "from scoresde.train import Trainer": "train",
        "def f():\n    from scoresde.train.loop import train": "train",
        "import scoresde": "__init__",
        "from . import train": "train",
        "from .train import Trainer": "train",
    }
    for i, (line, wanted) in enumerate(forms.items()):
        path = ROOT / f"room_{i}.py"
        source = tmp_path / path.name
        source.write_text(line)
        fake = type(path)(source)
        names = list(imported_of(fake, path))
        assert wanted in names, line


def imported_of(source, path):
    """As :func:`own`, for a text that stands elsewhere than it pretends to."""

    class Elsewhere(type(path)):
        def read_text(self, encoding=None):
            return source.read_text(encoding=encoding)

    return own(Elsewhere(path))
