"""Data from NumPy files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Standardisation
from scoresde.data import _arrays
from scoresde.data.base import SPLITS, Dataset
from scoresde.data.checks import as_path, as_raw, check_finite
from scoresde.data.examples import MappedExamples
from scoresde.data.splits import FRACTIONS, check_fractions, split_indices
from scoresde.errors import InputError
from scoresde.recipe import brief

_SUFFIXES = (".npy", ".npz")
_LABELS = ("labels", "label", "y")
_EXAMPLES = ("{}", "x_{}", "{}_images")  # names of the examples of a split
_BESIDE = ("{{}}_{}".format, "{}_{{}}".format)  # names of their labels or conditions
_SHORT = {"validation": ("val", "valid")}
_TOGETHER = 2**23  # bytes of a mapped array that are checked together


def array(
    path: str | Path,
    key: str | None = None,
    levels: int | None = None,
    channels_last: bool = False,
    flip: bool = False,
    standardise: bool | Standardisation = True,
    fractions: Sequence[float] | None = FRACTIONS,
    seed: int = 0,
    labels: str | None = None,
    conditions: Sequence[str] = (),
) -> Dataset:
    """Loads examples from a ``.npy`` or ``.npz`` file.

    A ``.npy`` file above 256 MiB stays on disk, and examples are read on demand. The first axis is
    the examples. Floats are real-valued data, integers quantised data of ``levels`` levels, and
    booleans quantised data of two. Arrays ``(N,)`` become ``(N, 1)``, and integers ``(N, H, W)``
    grey images ``(N, 1, H, W)``; floats ``(N, C, L)`` are unchanged.

    A ``.npz`` file may contain its own splits, as arrays ``train``, ``test`` and optionally
    ``validation`` (by default a part of ``train``). They are used as they are, so make sure that
    no test example is also a training example. ``x_train`` or ``train_images`` are accepted for
    ``train``, and ``val`` for ``validation``.

    Classes are read from an array ``labels``, ``label`` or ``y`` with an integer or a string for
    each example; those of splits from ``train_labels``, ``labels_train``, ``y_train`` and so on.
    Strings are numbered in sorted order. Other arrays are ignored.

    Arguments:
        path: The file.
        key: Name of the array to read and split, if a ``.npz`` file has several.
        levels: Number of levels of integers; 256 for uint8 by default, required for other types.
        channels_last: Whether examples are ``(H, W, C)`` rather than ``(C, H, W)``.
        flip: Whether training images are mirrored at random.
        standardise: Whether each column or channel of real-valued data is scaled to mean 0 and
            standard deviation 1, or a standardisation such as ``Whole()``, with one scale for all
            values.
        fractions: Fractions of training, validation and test examples. If None, each split
            contains all examples in the order of the file, for evaluation.
        seed: Seed of the splits.
        labels: Name of the array of classes in a ``.npz`` file, if it has another name. For
            splits, the part of the name without the split's.
        conditions: Names of arrays of floats ``(N, n)`` that are conditions; for splits likewise.

    Raises:
        InputError: If the file is missing, damaged, pickled or not a NumPy file, or its array is
            not valid data.
    """
    path = as_path(path)
    arrays, companions = _load(path, key, labels, conditions)
    mapped = arrays.get("")
    if isinstance(mapped, np.memmap):
        parts, kind = _mapped(mapped, _Convert(levels, channels_last), fractions, seed)
        data = Dataset.of(path.stem, parts, kind, flip, standardise)
        return replace(data, undivided=fractions is None)
    raws = {
        name: as_raw(_arrange(values, channels_last), levels) for name, values in arrays.items()
    }
    kinds = {kind for _, kind in raws.values()}
    if len(kinds) > 1:
        raise InputError(
            f"The arrays {', '.join(raws)} of {path} must all be real-valued, or have the same "
            f"number of levels, got levels {', '.join(str(kind) for _, kind in raws.values())}; "
            "convert them to one type."
        )
    dealt = _split({name: raw for name, (raw, _) in raws.items()}, fractions, seed)
    names, known = _told(path, arrays, companions, labels)
    data = Dataset.of(
        path.stem,
        [raws[name][0][rows] for name, rows in dealt],
        kinds.pop(),
        flip,
        standardise,
        conditions={
            name: [values[part][rows] for part, rows in dealt] for name, values in known.items()
        },
        class_names=names,
    )
    return replace(data, undivided=fractions is None and len(raws) == 1)


def load_array(path: str | Path) -> np.ndarray:
    """Reads the array of a ``.npy`` file, or of a ``.npz`` file with a single array.

    Raises:
        InputError: As in :func:`array`.
    """
    arrays, _ = _load(as_path(path), None)
    return next(iter(arrays.values()))


_Companions = dict[str, dict[str, np.ndarray]]  # by condition, then by array of examples


def _load(
    path: Path, key: str | None, labels: str | None = None, conditions: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], _Companions]:
    """Reads the requested arrays; the array of a ``.npy`` file is called ''.

    Conditions are returned separately.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"path must be a file that ends in {' or '.join(_SUFFIXES)}, got {path}; save the "
            "array with numpy.save."
        )
    if not path.is_file():
        raise InputError(
            f"path must be an existing .npy or .npz file, got {path} in {Path.cwd()}; set "
            "data.path=FILE."
        )
    wanted = {"label": [labels] if labels else _LABELS} | {name: [name] for name in conditions}
    try:
        with path.open("rb") as file:
            loaded: Any = _arrays.load(file)  # a large array is mapped
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else loaded
            found = _Names(list(arrays), path, [*conditions, *([labels] if labels else [])])
            chosen = found.examples(key, [word for words in wanted.values() for word in words])
            companions = {name: found.companions(chosen, words) for name, words in wanted.items()}
            return (
                {name: np.asanyarray(arrays[own]) for name, own in chosen.items()},
                {
                    name: {part: np.asanyarray(arrays[own]) for part, own in owns.items()}
                    for name, owns in companions.items()
                },
            )
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any parser below
        if "pickle" in str(error).lower():
            raise InputError(
                f"{path} must contain plain NumPy arrays, got pickled objects (which can run any "
                "code when loaded) or another format; save an array of numbers with numpy.save."
            ) from error
        raise InputError(
            f"Cannot read {path} ({brief(error) or type(error).__name__}); if it is damaged or "
            "incomplete, save it again with numpy.save or numpy.savez."
        ) from error


@dataclass(frozen=True)
class _Names:
    """Names of the arrays of a file.

    Arguments:
        names: The names.
        path: The file.
        needed: Names that must be found.
    """

    names: Sequence[str]
    path: Path
    needed: Sequence[str] = ()

    def examples(self, key: str | None, other: Sequence[str]) -> dict[str, str]:
        """Returns the name of the array to split, or the names of the splits in the file.

        Arguments:
            key: Name requested by the user.
            other: Names of arrays that are not examples.
        """
        if key is not None:
            if key not in self.names:
                raise InputError(f"key must be an array of {self.path} ({self}), got {key!r}.")
            return {key: key}
        own = {split: self._first(split, _EXAMPLES) for split in SPLITS}
        if own["train"] and own["test"]:
            return {split: name for split, name in own.items() if name}
        rest = [name for name in self.names if name not in other] or list(self.names)
        if len(rest) != 1:
            raise InputError(
                f"{self.path} must contain one array of examples, or arrays named train and "
                f"test, got {len(rest)} ({self}); use key=NAME (on the command line "
                "data.key=NAME), or rename the arrays."
            )
        return {rest[0]: rest[0]}

    def companions(self, chosen: Mapping[str, str], words: Sequence[str]) -> dict[str, str]:
        """Returns the array that belongs to each array of examples, if all have one."""
        splits = chosen.keys() <= {*SPLITS}
        found = {
            part: self._first(part, [f(word) for word in words for f in _BESIDE])
            if splits
            else next((word for word in words if word in self.names), None)
            for part in chosen
        }
        there = {part: name for part, name in found.items() if name}
        missing = [part for part in chosen if part not in there]
        if missing and (there or {*words} & {*self.needed}):
            name = f"{missing[0]}_{words[0]}" if splits else words[0]
            raise InputError(
                f"{self.path} must contain the array {name}, got {self}; add it, or set "
                "data.labels or data.conditions to another name."
            )
        return there

    def _first(self, split: str, patterns: Sequence[str]) -> str | None:
        splits = (split, *_SHORT.get(split, ()))
        options = (pattern.format(name) for pattern in patterns for name in splits)
        return next((name for name in options if name in self.names), None)

    def __str__(self) -> str:
        return ", ".join(name or "one without a name" for name in self.names) or "none"


def _told(
    path: Path, arrays: Mapping[str, np.ndarray], companions: _Companions, labels: str | None
) -> tuple[Sequence[str], dict[str, dict[str, Tensor]]]:
    """Returns the names of the classes, if they are strings, and the conditions."""
    known = {
        name: {part: _continuous(path, name, v, len(arrays[part])) for part, v in parts.items()}
        for name, parts in companions.items()
        if name != "label" and parts
    }
    classes = companions.get("label") or {}
    fits = all(values.size == len(values) == len(arrays[part]) for part, values in classes.items())
    kinds = {values.dtype.kind for values in classes.values()}
    if not classes or (labels is None and not (fits and kinds <= {*"biuU"})):
        return (), known
    if not (fits and (kinds <= {*"biu"} or kinds <= {*"U"})):
        shapes = [f"{v.dtype} of shape {v.shape}" for v in classes.values()]
        raise InputError(
            f"{labels or 'labels'} must be integers, or strings, one for each example of {path}, "
            f"got {', '.join(shapes)}; convert them."
        )
    flat = {part: values.reshape(-1) for part, values in classes.items()}
    names: Sequence[str] = ()
    if kinds == {"U"}:
        words, numbers = np.unique(np.concatenate(list(flat.values())), return_inverse=True)
        ends = np.cumsum([len(values) for values in flat.values()])[:-1]
        flat = dict(zip(flat, np.split(numbers, ends), strict=True))
        names = words.tolist()
    return names, {
        **known,
        "label": {part: torch.from_numpy(v.astype(np.int64)) for part, v in flat.items()},
    }


@dataclass(frozen=True)
class _Convert:
    """Converter from rows of an array to raw examples; arguments as for :func:`array`."""

    levels: int | None
    channels_last: bool

    def __call__(self, values: np.ndarray) -> Tensor:
        return self.checked(values, 0)[0]

    def checked(self, values: np.ndarray, first: int) -> tuple[Tensor, int | None]:
        """Returns checked raw examples and their levels."""
        return as_raw(_arrange(values, self.channels_last), self.levels, first)


def _mapped(
    values: np.memmap, convert: _Convert, fractions: Sequence[float] | None, seed: int
) -> tuple[list[MappedExamples], int | None]:
    """Returns the splits of a mapped array and its levels, with the memory of a few rows."""
    digests, kind = [], None
    rows = max(1, _TOGETHER * len(values) // values.nbytes)
    for first in range(0, len(values), rows):
        raw, kind = convert.checked(np.asarray(values[first : first + rows]), first)
        digests += [blake2b(row.tobytes(), digest_size=16).digest() for row in raw.numpy()]
    if fractions is None:
        return [MappedExamples(values, np.arange(len(values)), convert)] * 3, kind
    distinct = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(-1, 16)
    parts = split_indices(distinct, check_fractions(fractions, parts=3), seed)
    return [MappedExamples(values, part.numpy(), convert) for part in parts], kind


def _arrange(values: np.ndarray, channels_last: bool) -> np.ndarray:
    """Arranges axes as (N, C, *)."""
    if channels_last:
        if values.ndim < 3:
            raise InputError(
                "channels_last=True requires an array (N, ..., C) of three or more axes, got "
                f"{values.shape}; remove it."
            )
        return np.ascontiguousarray(np.moveaxis(values, -1, 1))
    if values.ndim == 1 or (values.ndim == 3 and values.dtype.kind in "bui"):
        return np.expand_dims(values, 1)
    return values


def _continuous(path: Path, name: str, values: np.ndarray, count: int) -> Tensor:
    """Returns an array as a continuous condition of ``count`` examples, float32."""
    if values.dtype.kind not in "biuf" or values.shape[:1] != (count,):
        raise InputError(
            f"{name} must be real numbers with one row for each of the {count} examples of "
            f"{path}, got {values.dtype} of shape {values.shape}."
        )
    one = values.ndim == 1
    return torch.from_numpy((values[:, None] if one else values).astype(np.float32))


def _split(
    raws: dict[str, Tensor], fractions: Sequence[float] | None, seed: int
) -> list[tuple[str, Tensor]]:
    """Returns the array and rows of the training, validation and test examples."""
    whole = {name: torch.arange(len(raw)) for name, raw in raws.items()}
    if len(raws) == 3:
        return [(name, whole[name]) for name in SPLITS]
    if len(raws) == 1 and fractions is None:
        return [*whole.items()] * 3
    shares = check_fractions(FRACTIONS if fractions is None else fractions, parts=3)
    if len(raws) == 1:
        ((name, raw),) = raws.items()
        if raw.is_floating_point():
            check_finite(raw)
        return [(name, rows) for rows in split_indices(raw, shares, seed)]
    kept, held_out, _ = shares
    share = held_out / (kept + held_out)
    train, validation = split_indices(raws["train"], (1 - share, share), seed)
    return [("train", train), ("train", validation), ("test", whole["test"])]
