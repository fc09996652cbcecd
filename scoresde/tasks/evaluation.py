"""Evaluation of a model's likelihood on held-out data."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Affine
from scoresde.data import Batch, Dataset, Dequantisation, UniformDequantisation, random_rows
from scoresde.data.probability import (
    LogProbability,
    average,
    importance_weighted,
    log_probability,
)
from scoresde.errors import InputError, check_count
from scoresde.likelihood import (
    LatentBound,
    LatentBoundResult,
    LogProb,
    LogProbResult,
    prior_mismatch,
    spectrum,
)
from scoresde.metrics import Estimate, bits_per_dim, nats
from scoresde.model import LatentModel, ScoreFunction
from scoresde.progress import Progress
from scoresde.streams import Streams
from scoresde.tasks.classes import by_class, labels_of, summary_of
from scoresde.tasks.parts import Columns, Parts, gather

_PART = "part_"  # prefix of the names of columns
_NUMBERS = 2**21  # maximum count for computing moments


@dataclass(frozen=True)
class Draws:
    """Dequantisation of integers for a density.

    Arguments:
        count: Dequantisations of each example, positive.
        dequantisation: The distribution of the dequantisation noise.
        weighted: Whether the draws are importance-weighted, for a tighter bound, or averaged.
    """

    count: int = 1
    dequantisation: Dequantisation = field(default_factory=UniformDequantisation)
    weighted: bool = False

    def __post_init__(self) -> None:
        check_count("draws", self.count)


@dataclass(frozen=True)
class Evaluation:
    """The likelihood of a split.

    Arguments:
        split: The name of the split; ``all`` for data that are not divided.
        unit: ``bits/dim`` (quantised data, dequantised or at their levels) or ``nats`` (the
            negative log-density in raw units).
        mean: The mean over examples, in ``unit``; lower is better.
        standard_error: The standard error of the mean, over examples and probes.
        rows: The indices of the examples in the split, int64 ``(N,)``.
        values: The value of each example, ``(N,)``.
        errors: The standard error of each value over probes and draws, ``(N,)``; NaN for a single
            one, 0 for the exact trace.
        log_prob: The log-density of each example in nats of model units, ``(N,)``.
        nfe: The network evaluations of each example, ``(N,)``.
        each: The wall-clock time of each example, as a share of its batch's time, ``(N,)``.
        seconds: The total wall-clock time, including earlier sessions.
        seed: The seed of dequantisation and probes.
        mismatch: The divergence in nats of the noised data from the prior, by the data's moments.
        labels: The classes of the examples, int64 ``(N,)``, if the model is conditioned on them.
        class_names: The names of the classes, if any.
        parts: Terms by name that add up to the values, each ``(N,)`` and in ``unit``. The first
            includes the codec's contribution to a density. Empty if the likelihood has no parts.
        steps: The terms of T equal steps of t from 0 to 1, ``(N, T)``, in ``unit``; None if there
            are none.
    """

    split: str
    unit: str
    mean: float
    standard_error: float
    rows: Tensor
    values: Tensor
    errors: Tensor
    log_prob: Tensor
    nfe: Tensor
    each: Tensor
    seconds: float
    seed: int
    mismatch: float
    labels: Tensor | None = None
    class_names: Sequence[str] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None

    @property
    def part_means(self) -> dict[str, Estimate]:
        """The mean and standard error of each part over the examples that did not fail."""
        good = ~self.values.isnan()
        return {name: Estimate.of(part[good]) for name, part in self.parts.items()}

    @property
    def step_means(self) -> tuple[Tensor, Tensor]:
        """The means and standard errors of the steps' terms over these examples, ``(T,)``.

        Only for a likelihood with steps.
        """
        assert self.steps is not None
        good = self.steps[~self.values.isnan()].double()
        return good.mean(0), good.std(0) / len(good) ** 0.5

    @property
    def classes(self) -> dict[int, Estimate]:
        """The mean and standard error of each class; empty without classes."""
        return {} if self.labels is None else by_class(self.values, self.labels)

    def summary(self) -> dict[str, float | int | str]:
        """Returns the summary numbers; examples that failed are excluded."""
        density = Estimate.of(self.log_prob[~self.log_prob.isnan()])
        return {
            "split": self.split,
            "unit": self.unit,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "mean_log_prob": density.mean,
            "standard_error_log_prob": density.standard_error,
            "count": len(self.values),
            "failed": int(self.values.isnan().sum()),
            "nfe": float(self.nfe.double().mean()),
            "seconds": self.seconds,
            "seed": self.seed,
            "prior_mismatch_nats": self.mismatch,
            **{name: found.mean for name, found in self.part_means.items()},
            **{
                f"{name}_standard_error": found.standard_error
                for name, found in self.part_means.items()
            },
        }

    def save(self, folder: Path, name: str = "likelihood") -> None:
        """Saves ``NAME.json`` and the table of all examples, ``NAME.npz``."""
        told: dict[str, Any] = {name: part.numpy() for name, part in self.parts.items()}
        told |= self._steps()
        summary: dict[str, Any] = dict(self.summary())
        if self.labels is not None:
            told["label"] = self.labels.numpy()
            summary["classes"] = summary_of(self.values, self.labels, self.class_names)
        (folder / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
        np.savez(
            folder / f"{name}.npz",
            index=self.rows.numpy(),
            value=self.values.numpy(),
            standard_error=self.errors.numpy(),
            log_prob=self.log_prob.numpy(),
            nfe=self.nfe.numpy(),
            seconds=self.each.numpy(),
            **told,
        )

    def _steps(self) -> dict[str, Any]:
        """Returns the arrays of the steps' terms, each ``(T,)``."""
        if self.steps is None:
            return {}
        mean, error = self.step_means
        times = np.arange(1, len(mean) + 1) / len(mean)
        return {
            "step_time": times,
            "step_mean": mean.numpy(),
            "step_standard_error": error.numpy(),
        }


def evaluate_likelihood(
    model: ScoreFunction,
    likelihood: LogProb,
    data: Dataset,
    split: str = "test",
    *,
    examples: int | None = None,
    batch_size: int = 256,
    draws: Draws | None = None,
    seed: int = 0,
    parts: Parts | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates all or some examples of a split once, each under its own conditions.

    Arguments:
        model: The model.
        likelihood: The likelihood.
        data: The data set, on the model's device.
        split: ``train``, ``validation`` or ``test``.
        examples: The number of examples, chosen at random, positive. If None, all are used.
        batch_size: The number of examples evaluated together, positive.
        draws: The dequantisation of integers, or the number of latents drawn for each example. If
            None, one uniform draw is used.
        seed: The seed of dequantisation, latents and probes.
        parts: Store of finished batches, from which available batches are read.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Raises:
        InputError: If there is no such split, the model does not support the likelihood, or the
            codec of the data has no density.
    """
    batch_size = check_count("batch_size", batch_size)
    rows = rows_of(len(data.split(split)), examples, parts)
    count = len(rows)
    likelihood.check(model)
    check_density(data)
    check_levels(data, likelihood, draws)
    check_draws(data, draws)
    if draws is not None and data.codec.stochastic:
        LatentBound(likelihood, draws.count, draws.weighted)  # which may reject weights

    def compute(piece: range) -> Columns:
        streams = Streams(seed, rows[piece.start : piece.stop].to(model.device))
        return evaluate_batch(model, likelihood, data, split, streams, draws)

    found: dict[int, Columns] = {}
    bar = Progress(count, "likelihood", "example", shown=progress)
    for piece, columns, fresh in gather(parts, count, batch_size, compute):
        found[piece.start] = columns
        bar.update(len(piece), fresh)
    bar.close()
    table = [found[start] for start in sorted(found)]
    log_prob, error, nfe, each = (
        torch.cat([columns[name] for columns in table])
        for name in ("log_prob", "standard_error", "nfe", "seconds")
    )
    values, unit, width = in_units(log_prob, data, _joined(table, "log_det"))
    finite = values[~values.isnan()]
    if len(finite) == 0:
        raise InputError(
            f"All {len(values)} examples failed to be evaluated; check the model, or use a larger "
            "eps."
        )
    estimate = Estimate.of(finite)
    return Evaluation(
        split="all" if data.undivided else split,
        unit=unit,
        mean=estimate.mean,
        standard_error=estimate.standard_error,
        rows=rows,
        values=values,
        errors=error * width,
        log_prob=log_prob,
        nfe=nfe,
        each=each,
        seconds=float(each.sum()),
        seed=seed,
        mismatch=_mismatch(model, data),
        labels=labels_of(model, data, split, rows),
        class_names=data.class_names,
        parts=_parts(table, values, width),
        steps=None if (steps := _joined(table, "steps")) is None else steps * width,
    )


def _joined(table: Sequence[Columns], name: str) -> Tensor | None:
    """Returns a column of all batches; None if a batch of an earlier release lacks it."""
    if not all(name in columns for columns in table):
        return None
    return torch.cat([columns[name] for columns in table])


def _parts(table: Sequence[Columns], values: Tensor, width: float) -> dict[str, Tensor]:
    """Returns the terms that add up to the values, in the same unit."""
    names = [name for name in table[0] if name.startswith(_PART)]
    found = {name.removeprefix(_PART): _joined(table, name) for name in names}
    parts = {name: part * width for name, part in found.items() if part is not None}
    if len(parts) < len(names) or not names:
        return {}
    first, *rest = parts
    return {**parts, first: values - sum(parts[name] for name in rest)}


def rows_of(count: int, examples: int | None, parts: Parts | None) -> Tensor:
    """Returns the indices of the examples to evaluate out of ``count``, int64.

    Work begun by an earlier release continues with the first examples.
    """
    if examples is None:
        return torch.arange(count)
    check_count("examples", examples)
    first = parts is not None and parts.first
    return torch.arange(count)[:examples] if first else random_rows(count, examples)


def evaluate_batch(
    model: ScoreFunction,
    likelihood: LogProb,
    data: Dataset,
    split: str,
    streams: Streams,
    draws: Draws | None = None,
) -> Columns:
    """Evaluates the examples given by the streams; one row for each, on the CPU."""
    clock, seeds = time.perf_counter(), streams.indices
    result: LogProbResult | LogProbability | LatentBoundResult
    others: Columns
    if draws is not None and data.codec.stochastic:
        bound = LatentBound(likelihood, draws.count, draws.weighted)
        raw, known = _raw(data, split, streams), data.conditions_of(split, seeds)
        latent = LatentModel(data.codec, model)
        result = bound(latent, raw, seed=streams.seed, seeds=seeds, **model.select(known))
        log_prob, others = result.log_prob - result.log_det, {"log_det": result.log_det.cpu()}
    elif draws is None or data.levels is None:
        batch = examples_of(likelihood, data, split, streams).to(model.device)
        cond = model.select(batch.cond)
        result = likelihood(model, batch.x, seed=streams.seed, seeds=seeds, **cond)
        log_prob = result.log_prob.double() - volume_of(likelihood, data)
        others = codec_log_det(data, split, streams, batch.x) | _columns(result)
    else:
        result = _probability(model, likelihood, data, split, streams, draws)
        # The columns always hold densities in model units.
        log_prob, others = result.log_prob.double() - _affine(data).log_volume, {}
    seconds = (time.perf_counter() - clock) / len(seeds)
    return {
        **others,
        "log_prob": log_prob.cpu(),
        "standard_error": result.standard_error.double().cpu(),
        "nfe": result.nfe.cpu(),
        "seconds": torch.full((len(seeds),), seconds, dtype=torch.float64),
    }


def _columns(result: LogProbResult) -> Columns:
    """Returns the parts of a result, and the terms of its steps, in nats."""
    parts = {f"{_PART}{name}": part.double().cpu() for name, part in result.parts.items()}
    return parts if result.steps is None else {**parts, "steps": result.steps.float().cpu()}


def examples_of(likelihood: LogProb, data: Dataset, split: str, streams: Streams) -> Batch:
    """Returns the examples given by the streams, in the form required by a likelihood.

    Integers are dequantised, or placed at the centres of their levels for a decoder over levels.
    """
    return data.batch(split, streams, centre=likelihood.levels is not None)


def volume_of(likelihood: LogProb, data: Dataset) -> float:
    """Returns the log-volume of a level's step in model units, for a decoder over levels.

    A log-probability of levels minus this volume is a log-density in model units, as in all
    columns.
    """
    return 0.0 if likelihood.levels is None else _affine(data).log_volume


def codec_log_det(data: Dataset, split: str, streams: Streams, x: Tensor) -> Columns:
    """Returns the column ``log_det`` of the codec, unless a single scale determines it."""
    if data.codec.scale is not None:
        return {}
    log_det = data.log_det(_raw(data, split, streams), x)
    assert log_det is not None
    return {"log_det": log_det.double().cpu()}


def _raw(data: Dataset, split: str, streams: Streams) -> Tensor:
    values = data.split(split)
    return values[streams.indices.to(values.device)]


def _affine(data: Dataset) -> Affine:
    """Returns the codec of data that support several dequantisations."""
    if not isinstance(data.codec, Affine):
        raise InputError(
            f"The codec of {data.name} must be Affine for draws or a decoder over levels, got "
            f"{type(data.codec).__name__}; remove draws, weighted and dequantisation, and use "
            "likelihood.decoder=null."
        )
    return data.codec


def _probability(
    model: ScoreFunction,
    likelihood: LogProb,
    data: Dataset,
    split: str,
    streams: Streams,
    draws: Draws,
) -> LogProbability:
    """Evaluates the log-probabilities of integers by several dequantisations."""
    known = data.conditions_of(split, streams.indices)
    return log_probability(
        likelihood,
        model,
        _affine(data),
        _raw(data, split, streams).to(model.device),
        dequantisation=draws.dequantisation,
        draws=draws.count,
        combine=importance_weighted if draws.weighted else average,
        seed=streams.seed,
        seeds=streams.indices,
        **model.select(known),
    )


def check_levels(data: Dataset, likelihood: LogProb, draws: Draws | None = None) -> None:
    """Checks that a decoder over levels matches the data, which are not dequantised for it.

    Raises:
        InputError: If the data have other levels, or are to be dequantised.
    """
    if likelihood.levels is None:
        return
    if likelihood.levels != data.levels:
        kind = "is real-valued" if data.levels is None else f"has {data.levels} levels"
        raise InputError(
            f"likelihood.decoder must have the levels of the data, got {likelihood.levels} "
            f"levels, but {data.name} {kind}; use likelihood.decoder.levels=auto."
        )
    _affine(data)
    if draws is not None:
        raise InputError(
            f"draws={draws.count} has no effect on a decoder over levels, for which nothing is "
            "dequantised; remove draws, weighted and dequantisation, or use "
            "likelihood.decoder=null."
        )


def check_draws(data: Dataset, draws: Draws | None) -> None:
    """Checks that a dequantisation matches the data.

    Raises:
        InputError: If the data are not integers, or have too many levels.
    """
    if draws is None:
        return
    if data.codec.stochastic:
        if draws.dequantisation != UniformDequantisation():
            raise InputError(
                f"dequantisation must be uniform for a {type(data.codec).__name__}, which draws "
                f"latents of integers as they are, got {draws.dequantisation}; remove it."
            )
        return
    if data.levels is None:
        raise InputError(
            f"draws={draws.count} has no effect on {data.name}, which is real-valued: only "
            "integers are dequantised; remove draws, weighted and dequantisation."
        )
    _affine(data)
    draws.dequantisation.check(data.levels)


def has_density(data: Dataset) -> bool:
    """Returns whether the codec has a log-determinant."""
    raw = data.test[:1]
    return data.log_det(raw, data.codec.encode(raw)) is not None


def check_density(data: Dataset) -> None:
    """Checks that log-densities of a model can be converted to raw data.

    Raises:
        InputError: If the codec has no density.
    """
    if not has_density(data):
        raise InputError(
            f"The codec of {data.name} must have a density for a likelihood of the raw data, got "
            f"{type(data.codec).__name__} with log_det None. Use a codec whose decoder has a "
            "density, for which the bound of the module scoresde.codec holds."
        )


@torch.no_grad()  # a schedule may have weights
def _mismatch(model: ScoreFunction, data: Dataset) -> float:
    """Returns the divergence in nats of the noised training data from the prior, by moments."""
    most = min(2048, max(2, _NUMBERS // math.prod(data.raw_shape)))
    train = data.train[random_rows(len(data.train), most).to(data.train.device)].cpu()
    if len(train) < 2:  # no variance to measure
        return math.nan
    x = data.encode(train, centre=not data.codec.stochastic)
    return float(prior_mismatch(model.sde, *spectrum(x.double())))


def in_units(
    log_prob: Tensor, data: Dataset, log_det: Tensor | None = None
) -> tuple[Tensor, str, float]:
    """Converts log-densities in model units to bits/dim, or nats of raw units.

    Arguments:
        log_prob: Log-densities in nats of model units, ``(N,)``.
        data: The data set, for its codec.
        log_det: The log-determinant of the codec for each example, ``(N,)``, unless a single scale
            determines it.

    Returns:
        The values (lower is better), their unit, and the size of one nat in it.
    """
    scale = data.codec.scale
    if scale is not None:
        log_det = None
    elif log_det is None:  # the same for all examples
        log_det = torch.full_like(log_prob, _affine(data).log_volume)
    shape = data.raw_shape
    if data.levels is not None:
        values = bits_per_dim(log_prob, shape, scale, log_det=log_det)
        return values, "bits/dim", 1 / (math.prod(shape) * math.log(2))
    return nats(log_prob, shape, scale, log_det=log_det), "nats", 1.0
