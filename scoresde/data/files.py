"""A user's own data: an array in a file of NumPy."""

from collections.abc import Sequence
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
from scoresde.data.checks import as_raw
from scoresde.data.examples import MappedExamples
from scoresde.data.splits import FRACTIONS, check_fractions, make_splits, split_indices
from scoresde.errors import InputError
from scoresde.recipe import brief

_SUFFIXES = (".npy", ".npz")
_TOGETHER = 2**23  # bytes of a mapped array that are looked at together


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
) -> Dataset:
    """Loads examples from a ``.npy`` or ``.npz`` file.

    A ``.npy`` file above 256 MiB stays on the disk, and examples are read as they are needed. The
    first axis counts examples. Floats are real-valued data; integers are quantised data of
    ``levels`` levels, and booleans of two. Numbers ``(N,)`` become ``(N, 1)``, and integers
    ``(N, H, W)`` grey images ``(N, 1, H, W)``; floats ``(N, C, L)`` stay as they are.

    A ``.npz`` file may bring its own splits, as arrays ``train``, ``test`` and perhaps
    ``validation`` (without it, some of ``train`` validates). They are used as given: that no
    test example is also a training example is then the user's care. Arrays beside them (labels,
    say) are left alone.

    Arguments:
        path: The file.
        key: Which array of a ``.npz`` file, if it has several; it is then split here.
        levels: The number of levels of integers: 256 for uint8, else it must be given.
        channels_last: Whether examples are ``(H, W, C)`` rather than ``(C, H, W)``.
        flip: Whether training images are mirrored at random.
        standardise: Whether each column, or each channel, of real-valued data gets mean 0 and
            standard deviation 1; or how, such as ``Whole()`` for all of it together.
        fractions: The shares of training, validation and test examples; None leaves the examples
            of a file together in its order, in each of the splits, to be evaluated.
        seed: Names the splits.
        labels: The array of a ``.npz`` file with the class of each example: whole numbers from 0,
            -1 where it is unknown, with shape ``(N,)``. It goes with one array, ``key``, that is
            split here. None: no classes.

    Raises:
        InputError: If the file is missing, damaged, pickled or no file of NumPy, or its array
            cannot be used as data.
    """
    path = Path(path).expanduser()
    classes = None if labels is None else _labels(path, key, labels)
    arrays = _load(path, key, () if labels is None else (labels,))
    mapped = arrays.get("")
    if isinstance(mapped, np.memmap):
        parts, kind = _mapped(mapped, _Convert(levels, channels_last), fractions, seed)
        data = Dataset.of(path.stem, parts, kind, flip, standardise)
        return replace(data, undivided=fractions is None)
    if classes is not None and len(arrays) > 1:
        raise InputError(
            f"labels must go with one array of examples, got {', '.join(arrays)} of {path}; "
            "choose one with key=NAME."
        )
    raws = {
        name: as_raw(_arrange(values, channels_last), levels) for name, values in arrays.items()
    }
    kinds = {kind for _, kind in raws.values()}
    if len(kinds) > 1:
        raise InputError(
            f"The arrays {', '.join(raws)} of {path} have different types; convert them to one."
        )
    known = None
    if classes is not None:
        raw = next(iter(raws.values()))[0]
        known = _as_dealt(_check_labels(classes, len(raw), path), raw, fractions, seed)
    splits = _split({name: raw for name, (raw, _) in raws.items()}, fractions, seed)
    data = Dataset.of(path.stem, splits, kinds.pop(), flip, standardise, labels=known)
    return replace(data, undivided=fractions is None and len(raws) == 1)


def load_array(path: str | Path) -> np.ndarray:
    """Reads the array of a ``.npy`` file, or of a ``.npz`` file that has but one.

    Raises:
        InputError: As in :func:`array`.
    """
    return next(iter(_load(Path(path).expanduser(), None).values()))


def _load(path: Path, key: str | None, aside: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads the arrays that are asked for; that of a ``.npy`` file is called ''.

    Arguments:
        path: The file.
        key: The name of the one array; None for all that hold examples.
        aside: Arrays that hold none.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} is no {' or '.join(_SUFFIXES)} file; save it with numpy.save.")
    if not path.is_file():
        raise InputError(f"{path} is no file; give the path of a .npy or .npz file.")
    try:
        with path.open("rb") as file:
            loaded: Any = _arrays.load(file)  # a large array is mapped
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else loaded
            names = [name for name in arrays if name not in aside]
            return {name: np.asanyarray(arrays[name]) for name in _choose(names, key, path)}
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any parser below
        if "pickle" in str(error).lower():
            raise InputError(
                f"{path} holds no plain array, but pickled objects (which can run any code when "
                "loaded) or no data of NumPy at all; save an array of numbers with numpy.save."
            ) from error
        raise InputError(
            f"{path} cannot be read ({brief(error) or type(error).__name__}): it is damaged or "
            "cut short; save it again with numpy.save or numpy.savez."
        ) from error


def _choose(names: list[str], key: str | None, path: Path) -> list[str]:
    """Returns the name of the one array to split, or of the splits that the file brings."""
    listed = ", ".join(name or "one without a name" for name in names) or "none"
    if key is not None:
        if key not in names:
            raise InputError(f"key={key!r} is no array of {path}, which has: {listed}.")
        return [key]
    if {"train", "test"} <= set(names):
        return [name for name in SPLITS if name in names]
    if len(names) != 1:
        raise InputError(
            f"{path} has {len(names)} arrays ({listed}); choose one with key=NAME, or name them "
            "train, validation and test."
        )
    return names


def _labels(path: Path, key: str | None, name: str) -> np.ndarray:
    """Reads the array of the classes of the examples."""
    if path.suffix == ".npy":
        raise InputError(
            f"labels must be an array of a .npz file, got labels={name} of {path}; save both by "
            "numpy.savez(FILE, x=x, y=y), or use labels=null for examples without classes."
        )
    try:
        return next(iter(_load(path, name).values()))
    except InputError as error:
        raise InputError(
            f"labels={name}: {error} For examples without classes use labels=null."
        ) from error


def _check_labels(values: np.ndarray, count: int, path: Path) -> Tensor:
    """Returns classes as int64 ``(N,)``."""
    whole = values.dtype.kind in "iu" and values.shape == (count,)
    if not whole or int(values.min()) < -1:
        least = f", least {values.min()}" if values.dtype.kind in "iu" and values.size else ""
        raise InputError(
            f"labels must be {count} whole numbers from 0, or -1 for unknown, one for each "
            f"example of {path}, got shape {values.shape} of {values.dtype}{least}; "
            "number the classes."
        )
    return torch.from_numpy(values.astype(np.int64))


def _as_dealt(
    labels: Tensor, raw: Tensor, fractions: Sequence[float] | None, seed: int
) -> list[Tensor]:
    """Returns the classes of the training, validation and test examples."""
    if fractions is None:
        return [labels] * 3
    return [labels[part] for part in split_indices(raw, fractions, seed)]


@dataclass(frozen=True)
class _Convert:
    """Turns rows of an array into raw examples; arguments as for :func:`array`."""

    levels: int | None
    channels_last: bool

    def __call__(self, values: np.ndarray) -> Tensor:
        return self.checked(values, 0)[0]

    def checked(self, values: np.ndarray, first: int) -> tuple[Tensor, int | None]:
        """Returns raw examples and their levels, once they are known to be raw data."""
        return as_raw(_arrange(values, self.channels_last), self.levels, first)


def _mapped(
    values: np.memmap, convert: _Convert, fractions: Sequence[float] | None, seed: int
) -> tuple[list[MappedExamples], int | None]:
    """Returns the splits of a mapped array, in the memory of a few rows, and its levels."""
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
    """Brings axes to (N, C, *)."""
    if channels_last:
        if values.ndim < 3:
            raise InputError(
                f"channels_last=True needs an array (N, ..., C), not shape {values.shape}; "
                "leave it out."
            )
        return np.ascontiguousarray(np.moveaxis(values, -1, 1))
    if values.ndim == 1 or (values.ndim == 3 and values.dtype.kind in "bui"):
        return np.expand_dims(values, 1)
    return values


def _split(
    raws: dict[str, Tensor], fractions: Sequence[float] | None, seed: int
) -> Sequence[Tensor]:
    """Returns training, validation and test examples."""
    if len(raws) == 3:
        return [raws[name] for name in SPLITS]
    if len(raws) == 1 and fractions is None:
        return [next(iter(raws.values()))] * 3
    fractions = FRACTIONS if fractions is None else fractions
    if len(raws) == 1:
        return make_splits(next(iter(raws.values())), fractions, seed)
    kept, held_out, _ = check_fractions(fractions, parts=3)
    share = held_out / (kept + held_out)
    train, validation = split_indices(raws["train"], (1 - share, share), seed)
    return raws["train"][train], raws["train"][validation], raws["test"]
