"""Folder of a run: its lock, its result, and its previous settings."""

import json
import math
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from scoresde.errors import OtherRunError
from scoresde.tasks.parts import write_whole

_LOCK, _SIGN = ".lock", ".alive."  # the name of a sign includes its machine
_BEAT, _SILENCE = 30.0, 180.0  # seconds between signs, and until a process counts as dead

# Earlier settings of run folders, which Hydra overwrites before the folder can be checked.
_settings: dict[Path, bytes] = {}


class Hold:
    """A lock on a folder in which this process works, until it is closed.

    Other processes detect it by a file lock. On other machines, where the file system may not show
    the lock, they detect it by a file that is touched at intervals.

    Arguments:
        folder: The folder.
        shared: Whether other processes may share it.

    Raises:
        OtherRunError: If another process holds the folder.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        self._lock = _locked(folder, shared)
        self._sign = folder / f"{_SIGN}{socket.gethostname()}"
        self._closed = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def close(self) -> None:
        """Releases the folder."""
        self._closed.set()
        self._beats.join()
        with suppress(OSError):
            self._sign.unlink()
        self._lock.close()

    def _beat(self) -> None:
        while True:
            with suppress(OSError):  # disk full or temporarily unavailable
                self._sign.touch()
            if self._closed.wait(_BEAT):
                return


def _locked(folder: Path, shared: bool) -> IO[bytes]:
    file = (folder / _LOCK).open("a+b")  # over NFS a shared lock requires a readable file
    try:
        import fcntl  # not available on all platforms

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OtherRunError(
            f"Another process is using {folder}; wait until it ends, or choose another folder "
            "with hydra.run.dir=FOLDER."
        ) from None
    except (ImportError, OSError):  # a system, or a file system, without locks
        pass
    return file


def held(folder: Path) -> bool:
    """Returns whether a process of this machine or another works in a folder."""
    own = f"{_SIGN}{socket.gethostname()}"
    signs = [path for path in folder.glob(f"{_SIGN}*") if _age(path) < _SILENCE]
    locked = _is_locked(folder / _LOCK)
    # On this machine the lock is more reliable than the sign, which a killed process leaves.
    return bool(signs) if locked is None else locked or any(p.name != own for p in signs)


def _is_locked(path: Path) -> bool | None:
    """Returns whether a process holds a lock, or None if that is unknown."""
    try:
        import fcntl  # not available on all platforms

        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return None
    return False


def _age(path: Path) -> float:
    """Returns the seconds since a file was touched."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # removed in the meantime
        return math.inf


def read_result(folder: Path) -> dict[str, Any]:
    """Returns the result of a run in the folder; empty if missing or damaged."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def keep_settings(folder: Path) -> None:
    """Stores the contents of Hydra's files in a folder, until called for another folder."""
    _settings.clear()
    _settings.update({path: path.read_bytes() for path in folder.glob("*.yaml")})


def put_back_settings() -> None:
    """Restores the stored files."""
    for path, text in _settings.items():
        write_whole(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
