"""The user's folder for data that can be made again: downloads, and decoded images.

A checkpoint's recipe may call the public functions of this package. What writes is therefore in
modules with private names, which a recipe cannot name, and it writes in this folder alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scoresde.errors import InputError

try:
    import fcntl
except ImportError:  # Windows; two programs that fill the cache at once are then on their own
    fcntl = None  # type: ignore[assignment]


def folder(name: str) -> Path:
    """Returns ``scoresde/NAME`` below ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the specification of XDG has it
        base = Path("~/.cache").expanduser()
    return base / "scoresde" / name


def make(path: Path) -> Path:
    """Returns a folder, made if need be.

    Raises:
        InputError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The cache folder {path} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a "
            "folder that can be written."
        ) from error
    return path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lets one program at a time make a file, such as one rank of a distributed training."""
    with path.with_name(path.name + ".lock").open("ab") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
        yield
