"""Checkpoint files of a run: the newest, earlier ones, and a check of the free disk space."""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scoresde.errors import InputError
from scoresde.train.checkpoint import BEST, NAME, Checkpoint
from scoresde.train.engine import ProcessGroup, in_parts, whole

log = logging.getLogger("scoresde")

FOLDER = "checkpoints"
_MARGIN = 1.1  # free space for the next checkpoint, relative to its size


class CheckpointManager:
    """Writes the checkpoints of a run: ``checkpoints/00001000.pt``, the newest ``checkpoint.pt``.

    Each file is written under a temporary name, flushed, and renamed, so the last checkpoint stays
    complete if the run is killed at any moment. ``checkpoint.pt`` is a second name of the newest.
    If several processes hold parts of a model, its checkpoint is a folder
    ``checkpoints/00001000``.

    Arguments:
        folder: The run's folder.
        keep: Number of newest checkpoints to keep, positive.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint, last: bool = False) -> None:
        """Writes a checkpoint, and removes older ones beyond the newest ``keep``.

        Incomplete files of a killed process are removed too.

        All processes must call it; the first one writes. The ``last`` checkpoint of a sharded
        model is also written whole.

        Raises:
            InputError: If there is no room for the next checkpoint; this one is already safe.
        """
        group, sharded = ProcessGroup.here(), in_parts(checkpoint.model)
        path = self.folder / FOLDER / f"{checkpoint.step:08d}{'' if sharded else '.pt'}"
        if group.first:
            path.parent.mkdir(exist_ok=True)
        if sharded:
            checkpoint.save_shards(path)
        elif group.first:
            checkpoint.save(path)
        usable = _usable(checkpoint) if sharded and last else None
        if not group.first:
            return
        _second_name(path, self.folder / NAME)
        if usable is not None:
            usable.save(self.folder / NAME)
        for old in (*self._kept()[self.keep :], *path.parent.glob("*.part")):
            _remove(old)
        self.check_room(_size(path), f"the checkpoint of step {checkpoint.step} is saved")

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint with the lowest validation loss, for use but not for resuming.

        All processes must call it; the first one writes.
        """
        usable = _usable(checkpoint)
        if ProcessGroup.here().first:
            usable.save(self.folder / BEST)

    def check_room(self, size: int, outcome: str = "nothing has been written") -> None:
        """Checks that a file of ``size`` bytes can be written.

        Raises:
            InputError: If there is no room for it.
        """
        free = shutil.disk_usage(self.folder).free
        if free < _MARGIN * size:
            raise InputError(
                f"{self.folder} must have {_MARGIN * size / 2**20:.0f} MiB free for a checkpoint, "
                f"got {free / 2**20:.0f} MiB; {outcome}. Free space and run the command again, or "
                "set hydra.run.dir to another folder."
            )

    def newest(self, pattern: Mapping[str, Any] | None = None) -> Checkpoint | None:
        """Reads the newest undamaged checkpoint; returns None if there are no checkpoints.

        Arguments:
            pattern: Tensors that define the sharding between the processes, if any.

        Raises:
            InputError: If there are checkpoints and all are damaged.
        """
        paths = [path for path in (*self._kept(), self.folder / NAME) if path.exists()]
        for path in paths:
            try:
                return Checkpoint.load(path, pattern)
            except InputError as error:
                log.warning("%s Trying the previous checkpoint.", error)
        if paths:
            raise InputError(
                f"All checkpoints in {self.folder} are damaged; to start a new run, set "
                "hydra.run.dir to another folder."
            )
        return None

    def _kept(self) -> list[Path]:
        """Returns the paths of the checkpoints, newest first."""
        paths = (self.folder / FOLDER).glob("[0-9]*")
        named = [path for path in paths if re.fullmatch(r"\d+(\.pt)?", path.name)]
        return sorted(named, key=lambda path: int(path.stem), reverse=True)


def _usable(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint for use: whole weights, without the state of the training."""
    model, ema = whole(checkpoint.model), whole(checkpoint.ema)
    return replace(checkpoint, model=model, ema=ema, optimizer={}, state={})


def _second_name(path: Path, name: Path) -> None:
    """Gives a file or a folder a second name, replacing any file of that name."""
    temporary = name.with_name(f".{name.name}.part")
    temporary.unlink(missing_ok=True)  # left by a killed process
    try:
        if path.is_dir():
            temporary.symlink_to(path.relative_to(name.parent))
        else:
            os.link(path, temporary)
    except OSError:  # a file system without links
        if path.is_dir():
            return
        shutil.copyfile(path, temporary)
    temporary.replace(name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
