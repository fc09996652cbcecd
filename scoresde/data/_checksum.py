"""Checksums of files: md5, sha1 or sha256, as published."""

import hashlib
from pathlib import Path

from scoresde.errors import InputError

_KINDS = {32: "md5", 40: "sha1", 64: "sha256"}


def kind(checksum: str) -> str:
    """Returns the name of a checksum's algorithm, determined by its length."""
    return _KINDS[len(checksum)]


def of(data: bytes, algorithm: str) -> str:
    """Returns the checksum of a file's content."""
    return hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()


def read(path: Path, checksum: str | None) -> bytes:
    """Reads a whole file, and checks it unless ``checksum`` is None.

    Raises:
        InputError: If the file cannot be read, or its checksum differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path} ({error.strerror}).") from error
    if checksum is not None:
        found = of(data, kind(checksum))
        if found != checksum:
            raise InputError(
                f"{path} must have the published {kind(checksum)} checksum {checksum}, got "
                f"{found}; download it again, or set data.verify=false, which every report then "
                "states."
            )
    return data
