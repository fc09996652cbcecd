"""Checkpoints that describe themselves, and that cannot run code.

A checkpoint is one file of tensors, numbers and strings: the weights, their average, the state of
the optimiser, and the *recipe*, a tree of plain values in which ``_target_`` names a class. It is
read with ``weights_only``, so that nothing in it is executed; see :mod:`scoresde.recipe` for what
may be built from it.
"""

import contextlib
import copy
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from scoresde.errors import InputError
from scoresde.model import Trainable
from scoresde.nn.conditions import VectorCondition
from scoresde.recipe import brief, build, updated
from scoresde.tensors import read_tensors
from scoresde.train.engine import ProcessGroup

NAME, BEST, INDEX = "checkpoint.pt", "best.pt", "index.pt"
_FORMAT = "scoresde checkpoint"
_VERSION = 1
_PARTS = ("recipe", "model", "ema", "step", "seed", "optimizer", "state")
_LATER = ("state",)  # what the first checkpoints did not have


@dataclass(frozen=True)
class Checkpoint:
    """What a training leaves.

    Arguments:
        recipe: Plain values: ``model`` and ``data`` and whatever else describes the run.
        model: The weights.
        ema: Their moving average.
        step: The number of updates done.
        seed: The run's seed.
        optimizer: The optimiser's state.
        state: What else a training needs to go on as if nothing had happened: the number of
            averaged updates, and the states of torch's generators.
        source: The recipe as the file has it, with the names of its time; empty if there is no
            file.
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    ema: dict[str, Any]
    step: int
    seed: int
    optimizer: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all: to a temporary one, flushed, then renamed."""
        parts = _shallow(self)
        content = {"format": _FORMAT, "version": _VERSION, **parts, "digest": tree_digest(parts)}
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def save_shards(self, folder: Path) -> None:
        """Writes a checkpoint of tensors in parts: a folder, whole or not at all.

        All processes must ask.
        """
        from scoresde.train.shards import write_shards  # slow to import

        temporary = folder.with_name(folder.name + ".part")
        if ProcessGroup.here().first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        ProcessGroup.here().agree(None)  # nobody writes before
        parts = write_shards(_shallow(self), temporary)
        if ProcessGroup.here().first:
            parts["state"]["files"] = _files(temporary)
            Checkpoint(**parts).save(temporary / INDEX)
            temporary.replace(folder)
        ProcessGroup.here().agree(None)  # nobody reads before

    @staticmethod
    def load(path: str | Path, pattern: Mapping[str, Any] | None = None) -> "Checkpoint":
        """Reads a checkpoint without executing anything in it.

        Arguments:
            path: The file, or the folder of the run that holds it.
            pattern: How tensors in parts are to be divided between the processes; by default
                they are read whole.

        Raises:
            InputError: If there is no such file, or it is not a checkpoint of ours.
        """
        file = Path(path).expanduser()
        file = file / NAME if (file / NAME).exists() else file
        if file.is_dir() and (file / INDEX).is_file():
            return _load_shards(file, pattern)
        file = file / NAME if file.is_dir() else file
        if not file.is_file():
            raise InputError(
                f"checkpoint={path}: there is no file {file}; give a run's folder or its {NAME}."
            )
        content = _read(file)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(f"{file} is not a checkpoint of scoresde; give a run's {NAME}.")
        if content.get("version") != _VERSION:
            raise InputError(
                f"{file} has format version {content.get('version')!r} and this is scoresde for "
                f"version {_VERSION}; use the release that wrote it."
            )
        names = [name for name in _PARTS if name in content]
        missing = {*_PARTS} - {*names, *_LATER}
        if missing:
            raise InputError(f"{file} lacks {', '.join(sorted(missing))}; the file is damaged.")
        parts = {name: content[name] for name in names}
        kinds = dict.fromkeys(names, dict) | {"step": int, "seed": int}
        odd = [name for name in names if not isinstance(parts[name], kinds[name])]
        if odd:
            raise InputError(f"{file}: {odd[0]} is no {kinds[odd[0]].__name__}; it is damaged.")
        if "digest" in content and content["digest"] != tree_digest(parts):
            raise InputError(f"{file} is damaged: its numbers are not those that were written.")
        recipe = updated(parts["recipe"])
        return Checkpoint(**{**parts, "recipe": recipe, "source": parts["recipe"]})

    @staticmethod
    def load_best(path: str | Path) -> "Checkpoint":
        """Reads the weights of the least held-out loss, which a training keeps as ``best.pt``.

        Arguments:
            path: The run's folder, or a checkpoint in it.

        Raises:
            InputError: If the run has none, or as in :meth:`load`.
        """
        place = Path(path)
        folders = [place, *place.parents[:2]]  # checkpoints/00001000.pt is one deeper
        found = next((f / BEST for f in folders if (f / BEST).is_file()), None)
        if found is None:
            raise InputError(
                f"weights=best needs {BEST}, got {path} without one; train with "
                "train.keep_best=true and more than one validation (train.validate_every), or "
                "use weights=average."
            )
        return Checkpoint.load(found)

    def build_model(self, allow: Iterable[str] = (), average: bool = True) -> Trainable:
        """Rebuilds the model.

        Arguments:
            allow: Packages besides ``scoresde`` whose classes may be built.
            average: Whether to take the averaged weights (or else the raw ones).

        Raises:
            InputError: If a class is not allowed or not found, or the weights do not fit.
        """
        weights = self.ema if average else self.model
        with _no_larger_than(_count(weights)):
            model = self._built("model", Trainable, allow)
        try:
            model.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(
                f"The checkpoint's weights do not fit its model ({brief(error)}); the file is "
                "damaged, or a class in it has changed since."
            ) from error
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise InputError("The checkpoint's weights are not finite; its training had diverged.")
        return model.eval()

    def with_value(self, section: str, key: str, value: Any) -> "Checkpoint":
        """Returns the checkpoint with one value ``a.b`` of a section of its recipe changed."""
        recipe = copy.deepcopy(self.recipe)
        *path, last = key.split(".")
        place = recipe[section]
        for part in path:
            # What an older program did not write is built from what the user says of it.
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
        return replace(self, recipe=recipe)

    def build(self, section: str, kind: type, allow: Iterable[str] = ()) -> Any:
        """Builds a section of the recipe.

        Arguments:
            section: Its name.
            kind: What it must be.
            allow: Packages besides ``scoresde`` whose classes may be built.

        Raises:
            InputError: If it is missing, cannot be built, or is of another kind.
        """
        plan = self.recipe.get(section) if isinstance(self.recipe, Mapping) else None
        with _no_larger_than(_count(plan)):  # such as a codec with its weights
            return self._built(section, kind, allow)

    def _built(self, section: str, kind: type, allow: Iterable[str]) -> Any:
        if not isinstance(self.recipe, Mapping) or section not in self.recipe:
            raise InputError(f"The checkpoint does not say its {section}; the file is damaged.")
        part = build(self.recipe[section], allow)
        if not isinstance(part, kind):
            raise InputError(
                f"The checkpoint's {section} is a {type(part).__name__} and no {kind.__name__}; "
                "the file is damaged."
            )
        return part


def _count(tree: Any) -> int:
    """Returns how many numbers the tensors in a tree of values have."""
    match tree:
        case torch.Tensor():
            return tree.numel()
        case Mapping():
            return sum(_count(value) for value in tree.values())
        case list() | tuple():
            return sum(_count(value) for value in tree)
    return 0


@contextlib.contextmanager
def _no_larger_than(count: int) -> Iterator[None]:
    """Refuses to build a model of more weights than there are, before it takes their memory."""
    built = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        # What stands for "none" is missing in older files; its layer's weight is no smaller.
        later = isinstance(module, VectorCondition) and name == "none"
        built += 0 if parameter is None or later else parameter.numel()
        if built > count:
            raise InputError(
                f"The checkpoint's model has more than the {count} weights that it holds; the "
                "file is damaged."
            )

    handle = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _load_shards(folder: Path, pattern: Mapping[str, Any] | None) -> Checkpoint:
    from scoresde.train.shards import read_shards  # slow to import

    index = Checkpoint.load(folder / INDEX)
    if index.state.pop("files", None) != _files(folder):
        raise InputError(f"{folder} is damaged: its files are not those that were written.")
    parts = read_shards(_shallow(index), folder, pattern)
    return Checkpoint(**parts, source=index.source)


def _files(folder: Path) -> dict[str, str]:
    """Returns the digests of the files of a folder that hold tensors."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != INDEX:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return digests


def _read(file: Path) -> Any:
    try:
        return _copied(read_tensors(file))  # the file may go while the numbers are in use
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"{file} cannot be read as a checkpoint of scoresde: it is damaged, of another "
            "program, or holds objects that are not plain tensors and numbers (nothing was "
            "executed)."
        ) from error


def _copied(tree: Any) -> Any:
    match tree:
        case torch.Tensor():
            return tree.clone()
        case dict():
            return {key: _copied(value) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(_copied(value) for value in tree)
    return tree


def tree_digest(parts: Mapping[str, Any]) -> str:
    """Returns 32 digits that change with any number, name or text of a tree."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        match value:
            case torch.Tensor():
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
            case Mapping():
                for key, part in value.items():
                    digest.update(repr(key).encode())
                    add(part)
            case list() | tuple():
                digest.update(f"[{len(value)}".encode())
                for part in value:
                    add(part)
            case _:
                digest.update(repr(value).encode())

    add(parts)
    return digest.hexdigest()


def _shallow(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: getattr(checkpoint, name) for name in _PARTS}
