"""The folder of a run: whose it is, what it says, and what stood in it before."""

import json
from pathlib import Path
from typing import IO, Any

from scoresde.errors import OtherRunError
from scoresde.tasks.parts import write_whole

# What the runs of folders were started with: Hydra writes over it before we can refuse.
_settings: dict[Path, bytes] = {}


def lock(folder: Path) -> IO[bytes]:
    """Takes a folder for this process, for as long as the file is open.

    Raises:
        OtherRunError: If another process has it.
    """
    file = (folder / ".lock").open("ab")
    try:
        import fcntl  # not everywhere

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OtherRunError(
            f"Another process is at work in {folder}; wait for it, or choose another folder by "
            "hydra.run.dir=FOLDER."
        ) from None
    except (ImportError, OSError):  # a system, or a file system, without locks
        pass
    return file


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
