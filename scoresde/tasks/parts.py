"""Finished pieces of a long evaluation, kept so that nothing is computed twice.

A piece is a file, written under another name, flushed and then renamed, so that it is there whole
or not at all. Several processes may share a folder: each begins with its own pieces and then helps
with what is missing, and none waits for another. A piece that two of them compute is the same
twice, since every example has its own random streams.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import InputError, check_count

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Rank:
    """Which of several processes this one is.

    Arguments:
        index: Its number, from 0.
        size: How many there are, positive.
    """

    index: int = 0
    size: int = 1


@dataclass(frozen=True)
class Parts:
    """A folder of pieces, and what they belong to.

    Arguments:
        folder: The folder; made if it is not there.
        rank: Which of the processes that share it this one is.
    """

    folder: Path
    rank: Rank = Rank()

    def claim(self, identity: Mapping[str, str]) -> None:
        """States what the pieces belong to.

        Raises:
            InputError: If there are pieces of something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "identity.json"
        if path.exists():
            _compare(json.loads(path.read_text(encoding="utf-8")), dict(identity), self.folder)
        else:
            text = json.dumps(dict(identity), indent=2) + "\n"
            _write(path, lambda file: file.write(text.encode()))

    def pieces(self, count: int, size: int) -> list[range]:
        """Divides ``count`` examples into pieces of at most ``size``, this process's first."""
        all_ = [range(i, min(i + size, count)) for i in range(0, count, size)]
        own = all_[self.rank.index :: self.rank.size]
        # The others from their ends, which they reach last.
        return own + [piece for piece in reversed(all_) if piece not in own]

    def load(self, piece: range) -> Columns | None:
        """Reads a piece; ``None`` where there is none, or none that can be used."""
        path = self._path(piece)
        if not zipfile.is_zipfile(path):
            return None
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                columns = {name: torch.from_numpy(file[name]) for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        whole = all(len(column) == len(piece) for column in columns.values())
        return columns if columns and whole else None

    def save(self, piece: range, columns: Columns) -> None:
        """Writes a piece whole."""
        arrays: dict[str, Any] = {name: column.numpy() for name, column in columns.items()}
        _write(self._path(piece), lambda file: np.savez(file, **arrays))

    def _path(self, piece: range) -> Path:
        return self.folder / f"{piece.start:08d}-{piece.stop:08d}.npz"


def gather(
    parts: Parts | None, count: int, size: int, compute: Callable[[range], Columns]
) -> Iterator[tuple[range, Columns]]:
    """Yields all pieces, those that are there read and the others computed.

    Arguments:
        parts: Where they are kept; ``None``: nowhere.
        count: The number of examples.
        size: The examples in a piece, positive.
        compute: Evaluates a piece.
    """
    parts_ = Parts(Path()) if parts is None else parts
    for piece in parts_.pieces(count, check_count("batch_size", size)):
        columns = None if parts is None else parts.load(piece)
        if columns is None:
            columns = compute(piece)
            if parts is not None:
                parts.save(piece, columns)
        yield piece, columns


def _compare(there: Mapping[str, str], here: Mapping[str, str], folder: Path) -> None:
    other = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if other:
        key = other[0]
        raise InputError(
            f"The folder {folder} holds an evaluation with {key} = {there.get(key)}, and this one "
            f"has {here.get(key)}; choose another folder by hydra.run.dir=FOLDER."
        )


def _write(path: Path, write: Callable) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
