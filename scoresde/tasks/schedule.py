"""Figure of a learned schedule after training."""

from pathlib import Path

import torch
from torch import Tensor

from scoresde.data import Dataset, random_rows
from scoresde.loss import Loss, VariationalLoss
from scoresde.model import ScoreFunction
from scoresde.report import Figure
from scoresde.report import figures as plots
from scoresde.sde import SDE
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams

_EXAMPLES, _TIMES, _POINTS = 256, 48, 401


@torch.no_grad()
def schedule_figure(
    model: ScoreFunction, data: Dataset, loss: Loss | None, seed: int, folder: Path
) -> list[Figure]:
    """Plots the log-SNR and the bound's spread over time, for a schedule with weights.

    Arguments:
        model: The model, on its device.
        data: The data; at most 256 validation examples are used.
        loss: The training loss; a loss with levels moves values to their centres.
        seed: Seed of the noise.
        folder: Output folder.
    """
    sde = model.sde
    if not isinstance(sde, torch.nn.Module):
        return []
    t = (torch.arange(_TIMES, dtype=torch.float64) + 0.5) / _TIMES
    errors = _squared_errors(model, *_examples(model, data, loss, seed), t, seed)
    own, line = spreads(sde, t, errors)
    grid = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    sizes = dict(
        zip(sde.log_snr(t).tolist(), errors.square().mean(1).sqrt().tolist(), strict=True)
    )
    picture = plots.schedule(grid, sde.log_snr(grid), sizes, folder / "schedule.png")
    caption = (
        "The log-SNR as learned, and the size of the diffusion term of the bound at each time "
        f"(root mean square of single draws). Over all times its standard deviation is {own:.3g} "
        f"nats/dim, along a straight line it would be {line:.3g}: the flatter, the less."
    )
    return [Figure(caption, picture)]


@torch.no_grad()
def spreads(sde: SDE, t: Tensor, errors: Tensor) -> tuple[float, float]:
    """Returns the standard deviation of the diffusion term, as it is and along a straight line.

    Arguments:
        sde: The process.
        t: Times that cover [0, 1] evenly, with shape ``(T,)``.
        errors: The mean squared error of the noise of each example there, ``(T, N)``.
    """
    rate = (sde.g(t) / sde.sigma(t)) ** 2
    fall = rate.mean()
    # A straight line spends a different share of the time at each log-SNR.
    found = [_spread(0.5 * r[:, None] * errors, rate / r) for r in (rate, fall.expand_as(rate))]
    return found[0], found[1]


def _spread(values: Tensor, weight: Tensor) -> float:
    weight = weight[:, None] / values.numel()
    mean, square = (weight * values).sum(), (weight * values.square()).sum()
    return float((square - mean.square()).clamp(min=0).sqrt())


def _examples(
    model: ScoreFunction, data: Dataset, loss: Loss | None, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    rows = random_rows(len(data.validation), _EXAMPLES)
    batch = data.batch("validation", Streams(seed, rows))
    x = model.state(batch.x)
    if isinstance(loss, VariationalLoss) and loss.decoder is not None:
        x = loss.decoder.centre(x)
    return x, model.select(batch.cond)


def _squared_errors(
    model: ScoreFunction, x: Tensor, cond: dict[str, Tensor], t: Tensor, seed: int
) -> Tensor:
    """Returns the mean squared error of the noise of each example at each time, on the host."""
    streams, found = Streams.of(seed, batch=len(x), device=x.device), []
    for i, time in enumerate(t):
        z = streams.normal(x.shape[1:], Purpose.NOISE, i, x.dtype)
        error = model.noise(model.sde.perturb(x, time, z), time, **cond) - z
        found.append(sum_features(error.square()) / x[0].numel())
    return torch.stack(found).double().cpu()
