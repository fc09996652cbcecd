"""NumPy files; declared sizes are compared with the file before memory is allocated."""

import math
import zipfile
from typing import IO, Any

import numpy as np

_LARGE = 2**28  # bytes
_RATIO = 100  # maximum compression ratio of data that large


def load(file: IO[bytes]) -> Any:
    """Loads a file as ``numpy.load`` does, without pickles; an array above 256 MiB is mapped.

    Raises:
        Exception: Of any kind, if the file is damaged; ``ValueError`` if it declares more data
            than it contains.
    """
    size = file.seek(0, 2)
    file.seek(0)
    zipped = file.read(2) == b"PK"
    file.seek(0)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                limit = max(_LARGE, _RATIO * size)
                if member.file_size > limit:
                    raise ValueError(
                        f"{member.filename} unpacks to {member.file_size:,} bytes, above the "
                        f"limit of {limit:,}"
                    )
                if member.filename.endswith(".npy"):
                    with archive.open(member) as stream:
                        _check(stream, member.file_size)
    else:
        _check(file, size)
    file.seek(0)
    if not zipped and size > _LARGE:
        return np.load(file.name, mmap_mode="r", allow_pickle=False)
    return np.load(file, allow_pickle=False)


def _check(stream: IO[bytes], size: int) -> None:
    """Compares the header of an array with the size of the data."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _, kind = read(stream)
    declared = math.prod(shape) * kind.itemsize
    if not kind.hasobject and (min(shape, default=0) < 0 or declared > size):
        raise ValueError(f"the header declares {declared:,} bytes, but the file has {size:,}")
