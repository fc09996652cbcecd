"""The user's cache folder for reproducible data: downloads and decoded images.

A checkpoint's recipe may call the public functions of this package. Functions that write are
therefore in private modules, which a recipe cannot name, and they write only in this folder.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scoresde.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where programs that fill the cache at once are not synchronised
    fcntl = None  # type: ignore[assignment]


def folder(name: str) -> Path:
    """Returns ``scoresde/NAME`` below ``$XDG_CACHE_HOME`` or ``~/.cache``; it may not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG specification requires
        base = Path("~/.cache").expanduser()
    return base / "scoresde" / name


def make(path: Path) -> Path:
    """Returns a folder, and creates it if necessary.

    Raises:
        InputError: If the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot create the cache folder {path} ({error.strerror}); set XDG_CACHE_HOME to a "
            "writable folder."
        ) from error
    return path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Locks a file, so one program at a time creates it, such as one rank of a distributed run."""
    with path.with_name(path.name + ".lock").open("ab") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        yield
