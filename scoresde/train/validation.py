"""Held-out losses and errors of a model during training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.data import Dataset, random_rows
from scoresde.loss import Loss
from scoresde.model import ScoreFunction, Trainable
from scoresde.sde import SDE
from scoresde.streams import Purpose, Streams
from scoresde.train.engine import ProcessGroup

EXAMPLES = 1024
LEVELS = 12
_PREFIX = "noise_error/"


@torch.no_grad()
def validation_loss(
    model: Trainable,
    data: Dataset,
    loss: Loss,
    seed: int,
    batch_size: int = EXAMPLES,
) -> float:
    """Returns the mean loss of at most 1024 validation examples, always with the same noise.

    The processes of a group share the examples, each with the same number of batches.
    """
    rows = random_rows(len(data.validation), EXAMPLES)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    parts, count = _shared(torch.arange(len(rows)), batch_size)
    for part in parts:
        total += _losses(model, data, loss, seed, rows, part).double().sum()
    return float(ProcessGroup.here().total(total)) / count


@torch.no_grad()
def validation_losses(
    model: Trainable,
    data: Dataset,
    loss: Loss,
    seed: int,
    batch_size: int = EXAMPLES,
) -> tuple[Tensor, Tensor]:
    """Returns the examples of :func:`validation_loss` and the loss of each.

    This process evaluates all of them.

    Arguments:
        model: The model.
        data: The data.
        loss: The loss.
        seed: Seed of the times and the noise.
        batch_size: The number of examples evaluated together.

    Returns:
        The rows of the examples, int64 ``(N,)``, and losses, float64 ``(N,)``, on the CPU.
    """
    rows = random_rows(len(data.validation), EXAMPLES)
    parts = torch.arange(len(rows)).split(batch_size)
    values = [_losses(model, data, loss, seed, rows, part).double().cpu() for part in parts]
    return rows, torch.cat(values)


def _losses(
    model: Trainable, data: Dataset, loss: Loss, seed: int, rows: Tensor, part: Tensor
) -> Tensor:
    """Returns the losses of a part of the validation examples: ``rows[part]``."""
    batch = data.batch("validation", Streams(seed, rows[part]), centre=loss.on_levels)
    x, cond = model.state(batch.x.to(model.device)), loss.select(model, batch.cond)
    # All examples share their times, regardless of the number of batches.
    here = slice(int(part[0]), int(part[-1]) + 1)
    return loss.fixed()(model, x, seed=seed, seeds=range(len(rows)), part=here, **cond)


@torch.no_grad()
def error_by_level(
    model: ScoreFunction,
    data: Dataset,
    eps: float,
    seed: int,
    batch_size: int = EXAMPLES,
    *,
    centre: bool = False,
) -> dict[str, float]:
    r"""Returns the error of the predicted noise at levels that cover the log-SNR.

    .. math:: \frac{1}{D} E \lVert \hat z(x_t, t) - z \rVert^2

    It lies between 0, where the noise can be separated from the data, and 1, where the data hide
    it.

    Arguments:
        model: The model.
        data: The data; each of at most 1024 validation examples is evaluated at one level.
        eps: The smallest time.
        seed: Seed of the noise, which is the same at every call.
        batch_size: The number of examples evaluated together.
        centre: Whether integers are placed at the centres of their levels.

    Returns:
        The errors by name, as read by :func:`level_curves`.
    """
    group = ProcessGroup.here()
    levels = log_snr_levels(model.sde, eps)
    rows = random_rows(len(data.validation), EXAMPLES)
    examples = torch.arange(len(rows))
    sums = torch.zeros(2, len(levels), dtype=torch.float64, device=model.device)
    for part in _shared(examples, batch_size)[0]:
        x, cond = _batch(model, data, Streams(seed, rows[part]), centre)
        own = part.to(x.device) % len(levels)
        t = model.sde.time(levels.to(x.device))[own]
        noise = Streams(seed, part.to(x.device)).normal(x.shape[1:], Purpose.NOISE, dtype=x.dtype)
        found = model.noise(model.sde.perturb(x, t, noise), t, **cond)
        errors = (found - noise).square().flatten(1).mean(1)
        sums[0].index_add_(0, own, errors.double())
        sums[1].index_add_(0, own, torch.ones_like(errors, dtype=torch.float64))
    errors, counts = group.total(sums)
    means = (errors / counts).tolist()
    named = zip(levels.tolist(), means, strict=True)
    return {f"{_PREFIX}{level:+.2f}": value for level, value in named if math.isfinite(value)}


def _batch(
    model: Trainable, data: Dataset, streams: Streams, centre: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns validation examples in the model's form, and their conditions."""
    batch = data.batch("validation", streams, centre=centre)
    return model.state(batch.x.to(model.device)), model.select(batch.cond)


def log_snr_levels(sde: SDE, eps: float) -> Tensor:
    """Returns the midpoints of equal intervals of the log-SNR between ``eps`` and 1.

    Where the log-SNR is infinite at t = 1, the intervals are equal in the bounded variable b.
    """
    ends = torch.tensor([eps, 1.0], dtype=torch.float64)
    first, last = (sde.bounded(ends) if sde.zero_snr else sde.log_snr(ends)).tolist()
    places = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = first + places * (last - first)
    return sde.log_snr(sde.time_of_bounded(levels)) if sde.zero_snr else levels


def level_curves(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[float, float]]:
    """Returns the errors by log-SNR for each step, from the records of a training run."""
    curves = {}
    for record in records:
        curve = {
            float(name.removeprefix(_PREFIX)): value
            for name, value in record.items()
            if name.startswith(_PREFIX) and value is not None
        }
        if curve:
            curves[int(record["step"])] = curve
    return curves


def _shared(indices: Tensor, batch_size: int) -> tuple[list[Tensor], int]:
    """Returns this process's examples in batches, and the number of examples in all processes.

    All processes gather a sharded model together, so each has the same number of batches. If there
    are fewer examples than processes, every process evaluates all examples.
    """
    group = ProcessGroup.here()
    if len(indices) < group.size:
        return list(indices.split(batch_size)), len(indices) * group.size
    largest = -(-len(indices) // group.size)
    own = indices[group.part(len(indices))]
    batches = min(-(-largest // batch_size), len(indices) // group.size)
    return list(own.tensor_split(batches)), len(indices)
