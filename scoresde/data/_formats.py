"""Readers of the two plain formats of the small published image sets.

IDX: two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of axes, their
lengths in four bytes each (big-endian), and the values.

CIFAR-10, binary version: consecutive records of 3073 bytes, each a label and 3 x 32 x 32 pixels.

References:
    LeCun, Cortes and Burges, *The MNIST database of handwritten digits*, 1998.
    Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.
"""

import gzip
import io
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection

import numpy as np

from scoresde.errors import InputError

_RECORD = 1 + 3 * 32 * 32
_MOST = 2**31  # bytes; the largest of the files has 47 million


def idx(data: bytes, name: str, axes: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, compressed by gzip or not.

    Arguments:
        data: Content of the file.
        name: Name of the file in errors.
        axes: Required number of axes.

    Raises:
        InputError: If the file is damaged, or is not such an IDX file.
    """
    try:
        with _opened(data) as file:
            start = file.read(4 + 4 * axes)
            magic, *shape = struct.unpack(f">{1 + axes}I", start)
            size = math.prod(shape)
            if magic != 0x800 + axes or not 0 < size <= _MOST:
                raise InputError(
                    f"{name} must be an IDX file of unsigned bytes, with {axes} axes and 1 to "
                    f"{_MOST:,} values, got the header {start.hex(' ')}; download it again."
                )
            values = file.read(size + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"{name} is damaged ({error}); download it again.") from error
    if len(values) != size:
        raise InputError(
            f"{name} is damaged: its header declares {' x '.join(map(str, shape))} values, but "
            f"it contains {'fewer' if len(values) < size else 'more'}; download it again."
        )
    return np.frombuffer(values, np.uint8).reshape(shape).copy()


def _opened(data: bytes) -> io.BufferedIOBase:
    raw = io.BytesIO(data)
    return gzip.GzipFile(fileobj=raw) if data[:2] == b"\x1f\x8b" else raw


def cifar(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads images ``(N, 3, 32, 32)`` and labels ``(N,)`` of a file of CIFAR-10, both uint8.

    Raises:
        InputError: If the size is not a positive multiple of the record size.
    """
    if not data or len(data) % _RECORD:
        raise InputError(
            f"{name} must have a positive multiple of {_RECORD} bytes, got {len(data)}; download "
            "it again."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def members(archive: bytes, name: str, wanted: Collection[str]) -> dict[str, bytes]:
    """Reads files of a ``.tar.gz`` archive; nothing is written to disk.

    Arguments:
        archive: Content of the archive.
        name: Name of the file in errors.
        wanted: Paths in the archive.

    Raises:
        InputError: If the archive is damaged, or a file is missing in it.
    """
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                if member.name in wanted and member.isreg() and member.size <= _MOST:
                    file = tar.extractfile(member)
                    found[member.name] = file.read() if file else b""
            while tar.fileobj is not None and tar.fileobj.read(2**20):
                pass  # read to the checksum at the end
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name} is damaged ({error}); download it again.") from error
    missing = [path for path in wanted if path not in found]
    if missing:
        raise InputError(f"{name} must contain the file {missing[0]}; download it again.")
    return {path: found[path] for path in wanted}


def zipped(archive: bytes, name: str, wanted: Collection[str]) -> dict[str, bytes]:
    """Reads files from any folder of a ``.zip`` archive; nothing is written to disk.

    Arguments:
        archive: Content of the archive.
        name: Name of the file in errors.
        wanted: Names of the files, in the order of the result.

    Raises:
        InputError: If the archive is damaged, or a file is missing in it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            there = [info for info in opened.infolist() if info.file_size <= _MOST]
            places = {info.filename.rpartition("/")[2]: info for info in there}
            found = {file: opened.read(places[file]) for file in wanted if file in places}
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name} is damaged ({error}); download it again.") from error
    missing = [file for file in wanted if file not in found]
    if missing:
        raise InputError(f"{name} must contain the file {missing[0]}; download it again.")
    return found
