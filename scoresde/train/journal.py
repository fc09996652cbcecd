"""Metrics of a training run, recorded and shown while it runs."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.loss import Loss
from scoresde.model import ScoreFunction, Trainable
from scoresde.progress import Progress
from scoresde.train.engine import ProcessGroup
from scoresde.train.state import State
from scoresde.train.tracker import Run, Tracker, Trackers
from scoresde.train.training import Training
from scoresde.train.validation import error_by_level, validation_loss

_PART = "part/"  # prefix of the names of parts of the loss


@dataclass(frozen=True)
class Bad:
    """A failed update, which stops the training.

    Arguments:
        step: The number of the update, counted from 0.
        loss: Its loss.
        norm: The norm of its gradient.
    """

    step: int
    loss: float
    norm: float


class Journal:
    """The metrics of a training run; they stay on the device and are read at intervals.

    Arguments:
        training: Training settings.
        state: The training state, which counts skipped updates.
        start: The number of updates done before.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).
        trackers: Trackers that record the numbers in addition to ``metrics.jsonl``.
    """

    def __init__(
        self,
        training: Training,
        state: State,
        start: int,
        progress: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.training, self.state = training, state
        self.trackers = None
        if ProcessGroup.here().first:
            name = str(state.recipe.get("name", "training"))
            self.trackers = Trackers(
                Run(name, state.folder, start, _plain(state.recipe)), trackers
            )
        self.recent: list[Tensor] = []
        self.parts: list[Mapping[str, Tensor]] = []
        self.clock = time.perf_counter()
        self.bar = Progress(
            training.steps,
            "training",
            "step",
            shown=progress,
            start=start,
            lines=False,
            leave=True,
        )

    def add(self, record: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Stores the record of an update and the parts of its loss, on the device."""
        self.recent.append(record)
        self.parts.append(parts)
        self.bar.update()

    def log(self, done: int, **numbers: float) -> None:
        """Records numbers after ``done`` updates."""
        if self.trackers is not None:
            self.trackers.log(done, numbers)

    def image(self, done: int, name: str, path: Path) -> None:
        """Records a picture of the model after ``done`` updates."""
        if self.trackers is not None and path.exists():
            self.trackers.image(done, name, path)

    def read(self, done: int, size: int, optimiser: torch.optim.Optimizer) -> Bad | None:
        """Reads the records since the last call, and records their means and the speed.

        Arguments:
            done: The number of updates done.
            size: The number of examples per update.
            optimiser: The optimiser, whose learning rate is recorded.

        Returns:
            The update that stops the training, if any.
        """
        values = torch.stack(self.recent).double().cpu()
        speed = len(values) / (time.perf_counter() - self.clock)
        fit = torch.isfinite(values).all(1)
        failed = (~fit & (values[:, 2] == 0)).nonzero()[:, 0].tolist()
        self.state.skipped += len(failed)
        bad = self._fatal(values, failed, done)
        if bad is not None:
            return bad
        loss, norm, _ = values[fit].mean(0).tolist()
        memory = _memory(self.state.model.device)
        numbers = {
            "loss": loss,
            "gradient_norm": norm,
            "rate": optimiser.param_groups[0]["lr"],
            "steps_per_second": speed,
            "examples_per_second": speed * size,
            "memory_gib": memory,
        }
        if self.state.skipped:
            numbers["skipped"] = self.state.skipped
        if self.state.scale.on:
            numbers["loss_scale"] = float(self.state.scale.state[0])
        self.log(done, **numbers, **_means(self.parts, fit.tolist()))
        text = f"loss {loss:.4f}, {speed * size:.0f} examples/s, {memory:.1f} GiB"
        self.bar.note(text)
        self.bar.say(f"step {done} of {self.training.steps}, {text}")
        self.recent, self.parts, self.clock = [], [], time.perf_counter()
        return None

    def _fatal(self, values: Tensor, failed: list[int], done: int) -> Bad | None:
        over = self.state.skipped - self.training.max_skipped
        # A run whose last update failed has diverged, regardless of its length.
        diverged = done == self.training.steps and len(values) - 1 in failed
        if not failed or (over <= 0 and not diverged):
            return None
        i = failed[-over] if over > 0 else failed[-1]
        loss, norm, _ = values[i].tolist()
        return Bad(done - len(values) + i, loss, norm)

    def validate(self, done: int, model: Trainable, data: Dataset, loss: Loss) -> float:
        """Measures and records the validation loss, and the error by noise level if available."""
        errors: dict[str, float] = {}
        seed, size = self.state.seed, self.training.batch_size
        with self.training.autocast(model.device):
            value = validation_loss(model, data, loss, seed, size)
            if isinstance(model, ScoreFunction):
                eps = loss.first_time(model.sde)
                errors = error_by_level(model, data, eps, seed, size, centre=loss.on_levels)
        self.log(done, validation_loss=value)
        if errors:
            self.log(done, **errors)
        # The time of validation does not count towards the training speed.
        if not self.recent:
            self.clock = time.perf_counter()
        return value

    def close(self) -> None:
        """Closes the files."""
        self.bar.close()
        if self.trackers is not None:
            self.trackers.close()


def _means(records: Sequence[Mapping[str, Tensor]], fit: Sequence[bool]) -> dict[str, float]:
    """Returns the mean of each part of the loss over the successful updates."""
    kept = [parts for parts, good in zip(records, fit, strict=True) if good]
    found: dict[str, list[Tensor]] = {}
    for name, value in (item for parts in kept for item in parts.items()):
        found.setdefault(name, []).append(value)
    return {f"{_PART}{k}": float(torch.stack(v).double().mean()) for k, v in found.items()}


def _memory(device: torch.device) -> float:
    """Returns the peak memory in GiB, of the device or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not available on all platforms
    except ImportError:
        return 0.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def _plain(tree: Any) -> Any:
    """Returns a recipe without tensors, such as the weights of a codec."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: value for key, value in tree.items() if not isinstance(value, Tensor)}
    return {key: _plain(value) for key, value in kept.items()}
