"""What a model is worth on examples that it was not trained on, while it is trained."""

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
    """Returns the mean loss of validation examples (at most 1024), always with the same noise.

    The processes of a group share the examples, in the same number of batches each.
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
    """Returns the examples that :func:`validation_loss` is the mean of, and the loss of each.

    This process evaluates all of them.

    Arguments:
        model: The model.
        data: The data.
        loss: The loss.
        seed: Names the times and the noise.
        batch_size: The number of examples evaluated together.

    Returns:
        Their rows, int64 ``(N,)``, and losses, float64 ``(N,)``, on the CPU.
    """
    rows = random_rows(len(data.validation), EXAMPLES)
    parts = torch.arange(len(rows)).split(batch_size)
    values = [_losses(model, data, loss, seed, rows, part).double().cpu() for part in parts]
    return rows, torch.cat(values)


def _losses(
    model: Trainable, data: Dataset, loss: Loss, seed: int, rows: Tensor, part: Tensor
) -> Tensor:
    """Returns the losses of a part of the validation examples: ``rows[part]``."""
    x, cond = _batch(model, data, Streams(seed, rows[part]))
    # All of them share their times, in however many batches they are evaluated.
    here = slice(int(part[0]), int(part[-1]) + 1)
    return loss.fixed()(model, x, seed=seed, seeds=range(len(rows)), part=here, **cond)


@torch.no_grad()
def error_by_level(
    model: ScoreFunction, data: Dataset, eps: float, seed: int, batch_size: int = EXAMPLES
) -> dict[str, float]:
    r"""Returns the error of the expected noise at levels that cover the log-SNR.

    .. math:: \frac{1}{D} E \lVert \hat z(x_t, t) - z \rVert^2

    It lies between 0, where the noise can be told from the data, and 1, where it drowns in them.

    Arguments:
        model: The model.
        data: The data; each of at most 1024 validation examples is taken at one level.
        eps: The smallest time.
        seed: Names the noise, which is the same at every call.
        batch_size: The number of examples evaluated together.

    Returns:
        The errors, by names that :func:`level_curves` can read.
    """
    group = ProcessGroup.here()
    levels = log_snr_levels(model.sde, eps)
    rows = random_rows(len(data.validation), EXAMPLES)
    examples = torch.arange(len(rows))
    sums = torch.zeros(2, len(levels), dtype=torch.float64, device=model.device)
    for part in _shared(examples, batch_size)[0]:
        x, cond = _batch(model, data, Streams(seed, rows[part]))
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


def _batch(model: Trainable, data: Dataset, streams: Streams) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns validation examples as the model takes them, and their conditions."""
    batch = data.batch("validation", streams)
    return model.state(batch.x.to(model.device)), model.select(batch.cond)


def log_snr_levels(sde: SDE, eps: float) -> Tensor:
    """Returns the middles of equal intervals of the log-SNR between ``eps`` and 1.

    Where the log-SNR is infinite at t = 1, the intervals are equal in the bounded variable b.
    """
    ends = torch.tensor([eps, 1.0], dtype=torch.float64)
    first, last = (sde.bounded(ends) if sde.zero_snr else sde.log_snr(ends)).tolist()
    places = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    levels = first + places * (last - first)
    return sde.log_snr(sde.time_of_bounded(levels)) if sde.zero_snr else levels


def level_curves(records: Sequence[Mapping[str, Any]]) -> dict[int, dict[float, float]]:
    """Returns, of the records of a training, the errors by log-SNR for each step."""
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
    """Returns this process's examples in batches, and how many there are in all processes.

    A sharded model is gathered by all of them together, so that each has as many batches; where
    there are fewer examples than processes, all of them take all.
    """
    group = ProcessGroup.here()
    if len(indices) < group.size:
        return list(indices.split(batch_size)), len(indices) * group.size
    largest = -(-len(indices) // group.size)
    own = indices[group.part(len(indices))]
    batches = min(-(-largest // batch_size), len(indices) // group.size)
    return list(own.tensor_split(batches)), len(indices)
