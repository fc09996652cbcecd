"""Result files that may be larger than memory."""

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
    """Computes all batches, and joins them into one file, in the memory of one batch.

    Arguments:
        path: The file, ``.npz``, which is written atomically; of several processes, the first
            writes it.
        parts: Store of finished batches, from which available batches are read.
        count: The number of examples.
        size: The number of examples in a batch.
        compute: Callable that evaluates a batch and returns columns: ``x`` of any shape,
            ``seconds``, and others. The file holds all columns except ``seconds``.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).
        **more: Further contents of the file.

    Returns:
        All columns except ``x``.
    """
    small: dict[int, Columns] = {}
    with Progress(count, path.stem, "example", shown=progress) as bar:
        for piece, columns, fresh in gather(parts, count, size, compute):
            small[piece.start] = {name: c for name, c in columns.items() if name != "x"}
            kind, shape = columns["x"].numpy().dtype, columns["x"].shape[1:]
            bar.update(len(piece), fresh)
    # A batch of an earlier release may lack a column.
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
                    # It cannot have been removed: batches are only ever written.
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
    """Reads only the first rows of the array x of a file."""
    with zipfile.ZipFile(path) as archive, archive.open("x.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, kind = np.lib.format.read_array_header_1_0(member)
        rows = min(count, shape[0])
        raw = member.read(rows * math.prod(shape[1:]) * kind.itemsize)
    return torch.from_numpy(np.frombuffer(raw, kind).reshape(rows, *shape[1:]).copy())
