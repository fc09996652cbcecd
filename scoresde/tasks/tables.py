"""Files of more rows than memory holds."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from scoresde.progress import Progress
from scoresde.tasks.parts import Columns, Parts, gather, write_whole


def collect(
    path: Path,
    parts: Parts,
    count: int,
    size: int,
    compute: Callable[[range], Columns],
    progress: bool,
    **more: np.generic | np.ndarray,
) -> Columns:
    """Computes all pieces, and makes one file of them, in the memory of one piece.

    Arguments:
        path: The file, ``.npz``; it is there whole or not at all. Of several processes the first
            writes it.
        parts: Where finished pieces are kept and, if they are there, read.
        count: The number of examples.
        size: The examples in a piece.
        compute: Evaluates a piece: the column ``x`` of any shape, ``seconds``, and others; the
            file holds all but the seconds.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).
        **more: What else the file is to hold.

    Returns:
        All columns but ``x``.
    """
    small: dict[int, Columns] = {}
    with Progress(count, path.stem, "example", shown=progress) as bar:
        for piece, columns, fresh in gather(parts, count, size, compute):
            small[piece.start] = {name: c for name, c in columns.items() if name != "x"}
            kind, shape = columns["x"].numpy().dtype, columns["x"].shape[1:]
            bar.update(len(piece), fresh)
    # A piece of an earlier release may lack a column.
    names = [name for name in small[0] if all(name in columns for columns in small.values())]
    table = {name: torch.cat([small[start][name] for start in sorted(small)]) for name in names}
    if parts.rank.index > 0:
        return table
    header = {
        "descr": np.lib.format.dtype_to_descr(kind),
        "fortran_order": False,
        "shape": (count, *shape),
    }

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("x.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in sorted(parts.pieces(count, size), key=lambda p: p.start):
                    columns = parts.load(piece)
                    # Another process cannot have taken it: pieces are only ever written.
                    assert columns is not None
                    member.write(columns["x"].numpy().tobytes())
            arrays: dict[str, Any] = {k: values.numpy() for k, values in table.items()}
            arrays = {**{k: v for k, v in arrays.items() if k != "seconds"}, **more}
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)

    write_whole(path, write)
    return table


def first_rows(path: Path, count: int) -> Tensor:
    """Reads the first rows of the array x of a file, and no more of it."""
    with zipfile.ZipFile(path) as archive, archive.open("x.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, kind = np.lib.format.read_array_header_1_0(member)
        rows = min(count, shape[0])
        raw = member.read(rows * math.prod(shape[1:]) * kind.itemsize)
    return torch.from_numpy(np.frombuffer(raw, kind).reshape(rows, *shape[1:]).copy())
