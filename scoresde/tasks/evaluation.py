"""Measuring a model's likelihood on held-out data."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scoresde.data import Dataset
from scoresde.errors import check_count
from scoresde.likelihood import Likelihood
from scoresde.metrics import Estimate, bits_per_dim, nats
from scoresde.model import ScoreFunction
from scoresde.streams import Streams


@dataclass(frozen=True)
class Evaluation:
    """The likelihood of a split.

    Arguments:
        split: Which examples.
        unit: ``bits/dim`` (quantised data, dequantised uniformly) or ``nats`` (the negative
            log-density in raw units).
        mean: The mean over examples, in that unit; lower is better.
        standard_error: That of the mean, over examples and probes.
        values: The value of each example, ``(N,)``.
        probe_errors: The standard error of each value over the probes, ``(N,)``; NaN for a single
            probe, 0 for the exact trace.
        nfe: The network passes of each example, ``(N,)``.
        seconds: The wall-clock time.
        seed: The seed of dequantisation and probes.
    """

    split: str
    unit: str
    mean: float
    standard_error: float
    values: Tensor
    probe_errors: Tensor
    nfe: Tensor
    seconds: float
    seed: int

    def summary(self) -> dict[str, float | int | str]:
        """Returns the numbers that describe the whole."""
        arrays = ("values", "probe_errors", "nfe")
        numbers = {k: v for k, v in asdict(self).items() if k not in arrays}
        return {**numbers, "count": len(self.values), "nfe": float(self.nfe.double().mean())}

    def save(self, folder: Path) -> None:
        """Saves ``likelihood.json`` and, for each example, ``likelihood.npz``."""
        (folder / "likelihood.json").write_text(json.dumps(self.summary(), indent=2) + "\n")
        np.savez(
            folder / "likelihood.npz",
            values=self.values.numpy(),
            probe_errors=self.probe_errors.numpy(),
            nfe=self.nfe.numpy(),
        )


def evaluate_likelihood(
    model: ScoreFunction,
    likelihood: Likelihood,
    data: Dataset,
    split: str = "test",
    *,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluates every example of a split once, or the first of them.

    Arguments:
        model: The model.
        likelihood: How to evaluate.
        data: The data set, on the model's device.
        split: ``train``, ``validation`` or ``test``.
        examples: How many of its first examples, positive; ``None``: all.
        batch_size: The number of examples evaluated together, positive.
        seed: The seed of dequantisation and probes.
        progress: Whether to show a progress bar.

    Raises:
        InputError: If there is no such split, or the likelihood does not fit the model.
    """
    count, batch_size = len(data.split(split)), check_count("batch_size", batch_size)
    if examples is not None:
        count = min(count, check_count("examples", examples))
    clock = time.perf_counter()
    results = []
    bar = tqdm(total=count, desc="likelihood", unit="example", disable=not progress, leave=False)
    for start in range(0, count, batch_size):
        streams = Streams.of(seed, range(start, min(start + batch_size, count)))
        x = data.batch(split, Streams(seed, streams.indices)).to(model.device)
        results.append(likelihood(model, x, seed=seed, seeds=streams.indices))
        bar.update(len(x))
    bar.close()
    log_prob = torch.cat([r.log_prob for r in results]).double().cpu()
    errors = torch.cat([r.standard_error for r in results]).double().cpu()
    values, unit, width = in_units(log_prob, data)
    estimate = Estimate.of(values)
    return Evaluation(
        split=split,
        unit=unit,
        mean=estimate.mean,
        standard_error=estimate.standard_error,
        values=values,
        probe_errors=errors * width,
        nfe=torch.cat([r.nfe for r in results]).cpu(),
        seconds=time.perf_counter() - clock,
        seed=seed,
    )


def in_units(log_prob: Tensor, data: Dataset) -> tuple[Tensor, str, float]:
    """Turns log-densities in model units into bits/dim, or nats of raw units.

    Arguments:
        log_prob: Log-densities in nats of model units, ``(N,)``.
        data: The data set, for its units.

    Returns:
        The values, where lower is better, their unit, and what one nat is worth in it.
    """
    if data.levels is not None:
        values = bits_per_dim(log_prob, data.shape, data.scale)
        return values, "bits/dim", 1 / (math.prod(data.shape) * math.log(2))
    return nats(log_prob, data.shape, data.scale), "nats", 1.0
