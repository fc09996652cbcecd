"""The folder of a run: whose it is, what it says, and what stood in it before."""

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

_LOCK, _SIGN = ".lock", ".alive."  # a sign carries the name of its machine
_BEAT, _SILENCE = 30.0, 180.0  # seconds between signs, and after which there is no life

# What the runs of folders were started with: Hydra writes over it before we can refuse.
_settings: dict[Path, bytes] = {}


class Hold:
    """A folder in which this process works, until it is closed.

    Other processes see it by a lock on the folder; those of other machines, to which a file system
    may not show it, by a file that is touched now and then.

    Arguments:
        folder: The folder.
        shared: Whether other processes may share it.

    Raises:
        OtherRunError: If another process has it.
    """

    def __init__(self, folder: Path, shared: bool = False) -> None:
        self._lock = _locked(folder, shared)
        self._sign = folder / f"{_SIGN}{socket.gethostname()}"
        self._closed = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def close(self) -> None:
        """Gives the folder back."""
        self._closed.set()
        self._beats.join()
        with suppress(OSError):
            self._sign.unlink()
        self._lock.close()

    def _beat(self) -> None:
        while True:
            with suppress(OSError):  # a disk that is full, or away for a moment
                self._sign.touch()
            if self._closed.wait(_BEAT):
                return


def _locked(folder: Path, shared: bool) -> IO[bytes]:
    file = (folder / _LOCK).open("a+b")  # over NFS a shared lock needs a file that can be read
    try:
        import fcntl  # not everywhere

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OtherRunError(
            f"Another process is at work in {folder}; wait for it, or choose another folder by "
            "hydra.run.dir=FOLDER."
        ) from None
    except (ImportError, OSError):  # a system, or a file system, without locks
        pass
    return file


def held(folder: Path) -> bool:
    """Returns whether a process of this machine or another works in a folder."""
    own = f"{_SIGN}{socket.gethostname()}"
    signs = [path for path in folder.glob(f"{_SIGN}*") if _age(path) < _SILENCE]
    locked = _is_locked(folder / _LOCK)
    # This machine's lock tells more than its sign, which a killed process leaves behind.
    return bool(signs) if locked is None else locked or any(p.name != own for p in signs)


def _is_locked(path: Path) -> bool | None:
    """Returns whether a process holds a lock, or None if that is unknown."""
    try:
        import fcntl  # not everywhere

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
    except OSError:  # it went this moment
        return math.inf


def read_result(folder: Path) -> dict[str, Any]:
    """Returns what a run in the folder has left; nothing where there is none, or none to read."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def keep_settings(folder: Path) -> None:
    """Remembers what Hydra's files in a folder say, until another folder's are kept."""
    _settings.clear()
    _settings.update({path: path.read_bytes() for path in folder.glob("*.yaml")})


def put_back_settings() -> None:
    """Writes the files that have been kept again, as they were."""
    for path, text in _settings.items():
        write_whole(path, lambda file, text=text: file.write(text))  # type: ignore[misc]
