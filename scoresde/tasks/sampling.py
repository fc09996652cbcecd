"""Drawing samples of a model, and saving them."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde import plots
from scoresde.data import Units
from scoresde.errors import InputError, check_count
from scoresde.model import ScoreFunction
from scoresde.sample import Sampler
from scoresde.streams import fresh_seed


@dataclass(frozen=True)
class Drawn:
    """Samples, and what they cost.

    Arguments:
        x: The samples in model units, with shape ``(count, *)``.
        nfe: The network passes of each, int64 ``(count,)``.
        seconds: The wall-clock time in all.
        seed: The seed that was used.
    """

    x: Tensor
    nfe: Tensor
    seconds: float
    seed: int


def draw_samples(
    model: ScoreFunction,
    sampler: Sampler,
    units: Units,
    count: int,
    *,
    batch_size: int = 256,
    seed: int | None = None,
    progress: bool = True,
) -> Drawn:
    """Draws samples in batches; sample ``i`` does not depend on the size of the batches.

    Arguments:
        model: The model.
        sampler: The sampler.
        units: What an example of the data is.
        count: The number of samples, positive.
        batch_size: The number of samples drawn together, positive.
        seed: Names the random streams.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If a number is not positive, or the sampler does not fit the model.
    """
    count, batch_size = check_count("count", count), check_count("batch_size", batch_size)
    seed = fresh_seed() if seed is None else seed
    clock = time.perf_counter()
    parts = []
    for start in range(0, count, batch_size):
        seeds = range(start, min(start + batch_size, count))
        shape = (len(seeds), *units.shape)
        parts.append(sampler(model, shape, seed=seed, seeds=seeds, progress=progress))
    x = torch.cat([part.x for part in parts]).cpu()
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise InputError(
            f"{bad} of {count} samples are not finite: the model or the sampler has diverged; "
            "check the training, or use more steps or a larger eps."
        )
    nfe = torch.cat([part.nfe for part in parts]).cpu()
    return Drawn(x, nfe, time.perf_counter() - clock, seed)


def save_samples(drawn: Drawn, units: Units, folder: Path, name: str = "samples") -> None:
    """Saves ``name.npz`` (raw units, NFE, seed) and a picture ``name.png``.

    Images make a grid, two-dimensional data a scatter plot; other data have no picture.
    """
    raw = units.decode(drawn.x)
    path, seed = folder / f"{name}.npz", np.uint64(drawn.seed)
    np.savez(path, x=raw.numpy(), nfe=drawn.nfe.numpy(), seed=seed)
    if is_image(units):
        plots.image_grid(units.to_unit(drawn.x[:256]), folder / f"{name}.png")
    elif tuple(units.shape) == (2,):
        extent = (units.low, units.high, units.low, units.high)
        plots.scatter_comparison({"": raw}, folder / f"{name}.png", extent)


def is_image(units: Units) -> bool:
    """Whether examples are images of one or three channels."""
    return len(units.shape) == 3 and units.shape[0] in (1, 3)
