"""Self-describing checkpoints, which cannot execute code.

A checkpoint is one file of tensors, numbers and strings: the weights, their average, the state of
the optimiser, and the *recipe*, a tree of plain values in which ``_target_`` names a class. It is
read with ``weights_only``, so nothing in it is executed; see :mod:`scoresde.recipe` for what may
be built from it.
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
_LATER = ("state",)  # fields missing in the first checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """Saved state of a training run.

    Arguments:
        recipe: Plain values that describe the run: ``model``, ``data`` and other sections.
        model: The weights.
        ema: Their moving average.
        step: The number of updates done.
        seed: The run's seed.
        optimizer: The optimiser's state.
        state: The remaining state needed for an exact resume: the number of averaged updates,
            the states of torch's generators, and so on.
        source: The recipe as stored in the file, with the class names of its release; empty
            without a file.
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
        """Writes the file atomically: to a temporary file, flushed, then renamed."""
        parts = _shallow(self)
        content = {"format": _FORMAT, "version": _VERSION, **parts, "digest": tree_digest(parts)}
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def save_shards(self, folder: Path) -> None:
        """Writes a checkpoint of sharded tensors as a folder, atomically.

        All processes must call it.
        """
        from scoresde.train.shards import write_shards  # slow to import

        temporary = folder.with_name(folder.name + ".part")
        if ProcessGroup.here().first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        ProcessGroup.here().agree(None)  # no process writes before this point
        parts = write_shards(_shallow(self), temporary)
        if ProcessGroup.here().first:
            parts["state"]["files"] = _files(temporary)
            Checkpoint(**parts).save(temporary / INDEX)
            temporary.replace(folder)
        ProcessGroup.here().agree(None)  # no process reads before this point

    @staticmethod
    def load(path: str | Path, pattern: Mapping[str, Any] | None = None) -> "Checkpoint":
        """Reads a checkpoint without executing anything in it.

        Arguments:
            path: The file, or the folder of the run that holds it.
            pattern: Tensors that define the sharding between the processes; by default tensors
                are read whole.

        Raises:
            InputError: If there is no such file, or it is not a scoresde checkpoint.
        """
        file = Path(path).expanduser()
        file = file / NAME if (file / NAME).exists() else file
        if file.is_dir() and (file / INDEX).is_file():
            return _load_shards(file, pattern)
        file = file / NAME if file.is_dir() else file
        if not file.is_file():
            raise InputError(
                f"checkpoint must be a run's folder or its {NAME}, got {path}: {file} does not "
                "exist."
            )
        content = _read(file)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(
                f"checkpoint must be a run's folder or its {NAME}, got {file}, which is not a "
                "scoresde checkpoint."
            )
        if content.get("version") != _VERSION:
            raise InputError(
                f"{file} must have format version {_VERSION}, got {content.get('version')!r}; use "
                "the release of scoresde that wrote it."
            )
        names = [name for name in _PARTS if name in content]
        missing = {*_PARTS} - {*names, *_LATER}
        if missing:
            raise InputError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}.")
        parts = {name: content[name] for name in names}
        kinds = dict.fromkeys(names, dict) | {"step": int, "seed": int}
        odd = [name for name in names if not isinstance(parts[name], kinds[name])]
        if odd:
            wanted, found = kinds[odd[0]].__name__, type(parts[odd[0]]).__name__
            raise InputError(f"{file} is damaged: {odd[0]} must be of type {wanted}, got {found}.")
        if "digest" in content and content["digest"] != tree_digest(parts):
            raise InputError(f"{file} is damaged: its contents do not match its digest.")
        recipe = updated(parts["recipe"])
        return Checkpoint(**{**parts, "recipe": recipe, "source": parts["recipe"]})

    @staticmethod
    def load_best(path: str | Path) -> "Checkpoint":
        """Reads ``best.pt``, the weights with the lowest held-out loss.

        Arguments:
            path: The run's folder, or a checkpoint in it.

        Raises:
            InputError: If the run has no ``best.pt``, or as in :meth:`load`.
        """
        place = Path(path)
        folders = [place, *place.parents[:2]]  # checkpoints/00001000.pt is one deeper
        found = next((f / BEST for f in folders if (f / BEST).is_file()), None)
        if found is None:
            raise InputError(
                f"weights=best requires {BEST}, got {path} without it; train with "
                "train.keep_best=true and more than one validation (train.validate_every), or "
                "use weights=average."
            )
        return Checkpoint.load(found)

    def build_model(self, allow: Iterable[str] = (), average: bool = True) -> Trainable:
        """Rebuilds the model.

        Arguments:
            allow: Packages besides ``scoresde`` whose classes may be built.
            average: Whether to use the averaged weights, rather than the raw ones.

        Raises:
            InputError: If a class is not allowed or not found, or the weights do not match.
        """
        weights = self.ema if average else self.model
        with _no_larger_than(_count(weights)):
            model = self._built("model", Trainable, allow)
        try:
            model.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(
                f"The checkpoint's weights do not match its model ({brief(error)}); the file is "
                "damaged, or a class in it has changed since."
            ) from error
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise InputError("The checkpoint's weights are not finite: its training run diverged.")
        return model.eval()

    def with_value(self, section: str, key: str, value: Any) -> "Checkpoint":
        """Returns the checkpoint with one value ``a.b`` of a section of its recipe changed."""
        recipe = copy.deepcopy(self.recipe)
        *path, last = key.split(".")
        place = recipe[section]
        for part in path:
            # Sections that older releases did not write are built from the user's values.
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
        return replace(self, recipe=recipe)

    def build(self, section: str, kind: type, allow: Iterable[str] = ()) -> Any:
        """Builds a section of the recipe.

        Arguments:
            section: The name of the section.
            kind: The required class.
            allow: Packages besides ``scoresde`` whose classes may be built.

        Raises:
            InputError: If it is missing, cannot be built, or is of another kind.
        """
        plan = self.recipe.get(section) if isinstance(self.recipe, Mapping) else None
        with _no_larger_than(_count(plan)):  # for example a codec with its weights
            return self._built(section, kind, allow)

    def _built(self, section: str, kind: type, allow: Iterable[str]) -> Any:
        if not isinstance(self.recipe, Mapping) or section not in self.recipe:
            raise InputError(f"The checkpoint is damaged: its recipe lacks {section}.")
        part = build(self.recipe[section], allow)
        if not isinstance(part, kind):
            raise InputError(
                f"The checkpoint is damaged: {section} must be a {kind.__name__}, got "
                f"{type(part).__name__}."
            )
        return part


def _count(tree: Any) -> int:
    """Returns the total number of elements of the tensors in a tree."""
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
    """Raises if a model has more weights than ``count``, before allocating their memory."""
    built = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        # Older files lack the entry for "none"; the weight of its layer is at least as large.
        later = isinstance(module, VectorCondition) and name == "none"
        built += 0 if parameter is None or later else parameter.numel()
        if built > count:
            raise InputError(
                f"The checkpoint is damaged: its model has more weights than the {count} in the "
                "file."
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
        raise InputError(f"{folder} is damaged: its files do not match their digests.")
    parts = read_shards(_shallow(index), folder, pattern)
    return Checkpoint(**parts, source=index.source)


def _files(folder: Path) -> dict[str, str]:
    """Returns the digests of the files with tensors in a folder."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != INDEX:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return digests


def _read(file: Path) -> Any:
    try:
        return _copied(read_tensors(file))  # the file may be deleted while the numbers are in use
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f"Cannot read {file} as a scoresde checkpoint: it is damaged, from another program, "
            "or contains objects other than plain tensors and numbers (nothing was executed)."
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
    """Returns a digest of 32 digits that depends on every number, name and text of a tree."""
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
