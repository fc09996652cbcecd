"""Storage of finished batches of a long evaluation, for resuming it.

Each batch is a file, written atomically: under a temporary name, flushed and then renamed. It
contains a fingerprint of the result that it belongs to, and files with another fingerprint are not
read. Several processes may share a folder: each begins with its own batches and then computes
missing ones, without waiting for others. If two processes compute the same batch, the results are
equal, since every example has its own random streams.
"""

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data import _arrays
from scoresde.errors import InputError, OtherRunError, check_count
from scoresde.tasks.identity import agrees, text_of

Columns = dict[str, Tensor]
SUBSET = "examples"  # in the identity of work on a random subset
_MARK = "_mark"


@dataclass(frozen=True)
class Rank:
    """Index of this process among several.

    Arguments:
        index: The number of this process, from 0.
        size: The number of processes, positive.
    """

    index: int = 0
    size: int = 1


@dataclass(frozen=True)
class Parts:
    """A folder of finished batches, and the identity of their result.

    Arguments:
        folder: The folder; it is created if missing.
        rank: The index of this process among those that share the folder.
        mark: The fingerprint stored in every batch; batches with another one are not read.
        first: Whether the batches cover the first examples, as in earlier releases, rather than
            a random subset.
    """

    folder: Path
    rank: Rank = Rank()
    mark: str = ""
    first: bool = False

    def claim(self, identity: Mapping[str, Any]) -> "Parts":
        """Sets the identity of the batches; returns the folder with its fingerprint.

        Arguments:
            identity: Texts, and objects that are stored as their texts.

        Raises:
            OtherRunError: If the folder has batches of another result.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "identity.json"
        if not path.exists():
            texts = {k: v if isinstance(v, str) else text_of(v) for k, v in identity.items()}
            write_whole(path, lambda file: file.write(_json(texts).encode()))
        # Checked after writing, too: another process may have written in between.
        there = _identity(path)
        # Work begun by an earlier release continues by its rules.
        first = SUBSET in identity and SUBSET not in there
        kept = {k: v for k, v in identity.items() if k != SUBSET or not first}
        _compare(there, kept, self.folder)
        # Batches have the fingerprint of the stored text, which may be from an older release.
        mark = hashlib.sha256(_json(there).encode()).hexdigest()
        return replace(self, mark=mark, first=first)

    def pieces(self, count: int, size: int) -> list[range]:
        """Divides ``count`` examples into batches of at most ``size``, this process's first."""
        all_ = [range(i, min(i + size, count)) for i in range(0, count, size)]
        own = all_[self.rank.index :: self.rank.size]
        # Batches of other processes follow in reverse, as they compute the last ones last.
        mine = set(own)
        return own + [piece for piece in reversed(all_) if piece not in mine]

    def load(self, piece: range) -> Columns | None:
        """Reads a batch; returns None if it is missing or unusable."""
        path = self._path(piece)
        if not zipfile.is_zipfile(path):
            return None
        try:
            with path.open("rb") as stream, _arrays.load(stream) as file:
                arrays = {name: file[name] for name in file.files}
            if str(arrays.pop(_MARK, None)) != self.mark:
                return None
            columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
        except Exception:  # a damaged file can fail in any parser
            return None
        if any(column.ndim == 0 for column in columns.values()):
            return None
        whole = all(len(column) == len(piece) for column in columns.values())
        return columns if columns and whole else None

    def save(self, piece: range, columns: Columns) -> None:
        """Writes a batch atomically."""
        arrays: dict[str, Any] = {name: column.numpy() for name, column in columns.items()}
        arrays[_MARK] = np.array(self.mark)
        write_whole(self._path(piece), lambda file: np.savez(file, **arrays))

    def _path(self, piece: range) -> Path:
        return self.folder / f"{piece.start:08d}-{piece.stop:08d}.npz"


def gather(
    parts: Parts | None, count: int, size: int, compute: Callable[[range], Columns]
) -> Iterator[tuple[range, Columns, bool]]:
    """Yields all batches, and whether each was computed now or read from the store.

    Arguments:
        parts: The store of finished batches. If None, batches are not stored.
        count: The number of examples.
        size: The number of examples in a batch, positive.
        compute: Callable that evaluates a batch.
    """
    parts_ = Parts(Path()) if parts is None else parts
    for piece in parts_.pieces(count, check_count("batch_size", size)):
        there = None if parts is None else parts.load(piece)
        columns = compute(piece) if there is None else there
        if parts is not None and there is None:
            parts.save(piece, columns)
        yield piece, columns, there is None


def _json(identity: Mapping[str, str]) -> str:
    return json.dumps(dict(identity), indent=2) + "\n"


def _identity(path: Path) -> dict[str, str]:
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict) or not all(isinstance(v, str) for v in identity.values()):
        raise InputError(
            f"{path} is damaged; remove the folder {path.parent} to start again, or choose "
            "another run folder with hydra.run.dir=FOLDER."
        )
    return identity


def _compare(there: Mapping[str, str], here: Mapping[str, Any], folder: Path) -> None:
    for key in {**there, **here}:
        if key in there and key in here and agrees(there[key], here[key]):
            continue
        own = here.get(key)
        raise OtherRunError(
            f"The folder {folder} holds an evaluation with {key} = {there.get(key)}, got "
            f"{own if isinstance(own, str) else text_of(own)}; choose another folder with "
            "hydra.run.dir=FOLDER."
        )


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file atomically, with a function of the open file."""
    # Process ids are not enough: two machines that share the folder may have equal ids.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
