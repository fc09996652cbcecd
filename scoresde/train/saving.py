"""Checkpoints as a run leaves them: the newest, those before it, and room for the next."""

import logging
import os
import shutil
import uuid
from pathlib import Path

from scoresde.errors import InputError
from scoresde.train.checkpoint import NAME, Checkpoint

log = logging.getLogger("scoresde")

FOLDER = "checkpoints"
_MARGIN = 1.1  # of the size of a checkpoint, that has to be free for the next


class Keeper:
    """Writes the checkpoints of a run: ``checkpoints/00001000.pt``, the newest ``checkpoint.pt``.

    Each is written under another name, flushed, and renamed, so that a run that is killed at any
    moment has its last one whole. ``checkpoint.pt`` is a second name of the newest.

    Arguments:
        folder: The run's folder.
        keep: How many are kept, positive.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, and removes the oldest beyond those that are kept.

        Raises:
            InputError: If there is no room for another one, which is told after this is safe.
        """
        (self.folder / FOLDER).mkdir(exist_ok=True)
        path = self.folder / FOLDER / f"{checkpoint.step:08d}.pt"
        checkpoint.save(path)
        _second_name(path, self.folder / NAME)
        for old in self._kept()[self.keep :]:
            old.unlink()
        self.check_room(path.stat().st_size, f"the checkpoint of step {checkpoint.step} is safe")
        return path

    def check_room(self, size: int, outcome: str = "nothing has been done yet") -> None:
        """Checks that a file of so many bytes can be written.

        Raises:
            InputError: If there is no room for it.
        """
        free = shutil.disk_usage(self.folder).free
        if free < _MARGIN * size:
            raise InputError(
                f"{self.folder} has {free / 2**20:.0f} MiB left and a checkpoint needs "
                f"{_MARGIN * size / 2**20:.0f}; {outcome}. Free space and start again, or choose "
                "another folder by hydra.run.dir=FOLDER."
            )

    def newest(self) -> Checkpoint | None:
        """Reads the newest checkpoint that is whole; ``None`` where there is none at all.

        Raises:
            InputError: If there are some, and all of them are damaged.
        """
        paths = [path for path in (self.folder / NAME, *self._kept()) if path.exists()]
        for path in paths:
            try:
                return Checkpoint.load(path)
            except InputError as error:
                log.warning("%s The one before it is tried.", error)
        if paths:
            raise InputError(
                f"No checkpoint in {self.folder} can be read; choose another folder by "
                "hydra.run.dir=FOLDER to begin anew."
            )
        return None

    def _kept(self) -> list[Path]:
        """Returns the checkpoints, the newest first."""
        paths = (self.folder / FOLDER).glob("[0-9]*.pt")
        return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def _second_name(path: Path, name: Path) -> None:
    """Gives a file a second name, in the place of whatever had it."""
    temporary = name.with_name(f".{name.name}.{uuid.uuid4().hex}")
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    temporary.replace(name)
