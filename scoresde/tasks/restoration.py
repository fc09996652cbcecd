"""Restoration of examples from observations: draws, their mean and spread, a report."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.data.degradation import measure
from scoresde.errors import InputError
from scoresde.inverse import Observation, Posterior, StepRule
from scoresde.metrics import psnr, ranks, spread_ratio, ssim
from scoresde.model import ScoreFunction
from scoresde.operators import LinearOperator
from scoresde.report import Figure, Report, Table, write_report
from scoresde.report import figures as plots
from scoresde.sample import Sampler, Samples
from scoresde.streams import Purpose, Streams
from scoresde.tasks.parts import Columns, Parts, write_whole
from scoresde.tasks.tables import collect
from scoresde.tasks.views import Images, view_of

Method = StepRule | Callable[[ScoreFunction, Observation], Posterior]

_SHOWN = 8  # examples in the picture
_SHOWN_DRAWS = 4
_LEAST = 10  # minimum number of examples for the rank test


class Job(ABC):
    """Base class for restoration jobs.

    Attributes:
        codec: The codec of the data.
        count: The number N of examples.
        draws: The number of draws per example, positive.
        seed: Seed of the random streams.
    """

    codec: Codec
    count: int
    draws: int
    seed: int

    @property
    @abstractmethod
    def y(self) -> Tensor:
        """The observations, in raw units."""

    @abstractmethod
    def check(self) -> None:
        """Checks the settings of the job before the first batch.

        Raises:
            InputError: If the job cannot be run.
        """

    @abstractmethod
    def batch(self, piece: range) -> Columns:
        """Draws a range of rows, ordered by example; on the CPU and in raw units."""

    @abstractmethod
    def seen(self, count: int) -> Tensor | None:
        """Returns the first observations in the shape of examples, if possible."""


@dataclass(frozen=True)
class Restoration(Job):
    """Restoration of observations with a model of the data.

    Arguments:
        model: The model of the data.
        method: A step rule, or a callable that builds a posterior model from a model and an
            observation.
        sampler: The sampler for a posterior model; a step rule is itself a sampler.
        observed: The observations of N examples, in raw units.
        codec: The codec of the data.
        count: The number N of examples.
        draws: The number of draws per example, positive.
        seed: Seed of the random streams.
        cond: Conditions, used in turn for the examples, each with shape ``(M, *)``.
    """

    model: ScoreFunction
    method: Method
    sampler: Sampler
    observed: Observation
    codec: Codec
    count: int
    draws: int
    seed: int
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def y(self) -> Tensor:
        return self.observed.y

    def check(self) -> None:
        if isinstance(self.method, StepRule):
            self.method.check_observation(self.observed, tuple(self.codec.shape))
        else:
            self.sampler.check(self.method(self.model, self.observed))

    def batch(self, piece: range) -> Columns:
        clock = time.perf_counter()
        rows = torch.arange(piece.start, piece.stop) // self.draws
        observed = self.observed.take(rows)
        out = self._draw(observed, rows, piece)
        x = out.x
        if self._exact(observed):
            x = observed.project(x)
        if not bool(x.isfinite().all()):
            raise InputError(
                "A restored example is not finite, because the method diverged; use a larger "
                "std, more steps, or another method."
            )
        seconds = (time.perf_counter() - clock) / len(piece)
        vjps = torch.zeros_like(out.nfe) if out.vjps is None else out.vjps
        return {
            "x": self.codec.decode(x).cpu(),
            "nfe": out.nfe.cpu(),
            "vjps": vjps.cpu(),
            "seconds": torch.full((len(piece),), seconds, dtype=torch.float64),
        }

    def seen(self, count: int) -> Tensor | None:
        """Returns the pseudo-inverse of the first observations, if there is one."""
        observed = self.observed.take(torch.arange(count))
        shape = tuple(self.codec.raw_shape)
        operator = observed.operator
        if not isinstance(operator, LinearOperator):
            return None
        y = self.observed.y
        z = operator(torch.zeros(count, *shape, dtype=y.dtype, device=y.device))
        own = (y[:count] if y.ndim == z.ndim else y.expand(count, *y.shape)).to(y.device)
        if tuple(own.shape[1:]) == (1, *shape[1:]):  # grey: the inverse would add colour
            return own.expand(count, *shape).double().cpu()
        try:
            return operator.pseudo_inverse(own, shape).double().cpu()
        except InputError:
            return None

    def _draw(self, observed: Observation, rows: Tensor, piece: range) -> Samples:
        cond = self.model.select({k: v[rows % len(v)] for k, v in self.cond.items()})
        shape = (len(piece), *self.codec.shape)
        given: dict[str, Any] = {"seed": self.seed, "seeds": piece, **cond}
        if isinstance(self.method, StepRule):
            return self.method(self.model, shape, observed=observed, **given)
        return self.sampler(self.method(self.model, observed), shape, **given)

    def _exact(self, observed: Observation) -> bool:
        """Returns whether noiseless measurements are enforced exactly at the end."""
        if not (observed.linear and observed.noiseless):
            return False
        zero = torch.zeros(len(observed.rows), *self.codec.shape).to(observed.y)  # type: ignore[arg-type]
        try:
            observed.project(zero)
        except InputError:
            return False
        return True


def simulate(observed_by: Any, raw: Tensor, codec: Codec, std: float, seed: int) -> Tensor:
    """Returns measurements of raw examples ``(N, *)`` by an operator, with noise of ``std``."""
    streams = Streams.of(seed, batch=len(raw), device=raw.device)
    return measure(observed_by, raw, codec, std, streams, draw=2)


def restore(
    restoration: Job,
    folder: Path,
    parts: Parts,
    *,
    truth: Tensor | None = None,
    batch_size: int = 256,
    images: bool = False,
    progress: bool = True,
    title: str = "examples",
    facts: Sequence[tuple[str, str]] = (),
    configuration: str = "",
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
) -> dict[str, Any]:
    """Draws restored examples, and writes ``restored.npz``, ``restored.png`` and a report.

    Arguments:
        restoration: The restoration job.
        folder: Output folder.
        parts: Store of finished batches, from which available batches are read.
        truth: The true raw examples ``(N, *)``, if known.
        batch_size: The number of draws computed together, positive.
        images: Whether each draw, mean and spread is also written to ``images/``.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).
        title: The title of the report.
        facts: Further facts for the report, as pairs of label and value.
        configuration: The whole configuration as YAML.
        tables: Further tables of the report.
        figures: Further figures of the report.

    Returns:
        The numerical results; of several processes, only the first has all of them.
    """
    restoration.check()
    n, k = restoration.count, restoration.draws
    path, y = folder / "restored.npz", restoration.y.cpu()
    more: dict[str, Any] = {"y": y.numpy(), "seed": np.uint64(restoration.seed), "draws": k}
    table = collect(path, parts, n * k, batch_size, restoration.batch, progress, **more)
    results: dict[str, Any] = {
        "examples": n,
        "draws": k,
        "nfe": float(table["nfe"].double().mean()),
        "vjps": float(table["vjps"].double().mean()),
        "seconds": float(table["seconds"].sum()),
    }
    if parts.rank.index > 0:
        return results
    with np.load(path) as file:
        x = torch.from_numpy(file["x"]).unflatten(0, (n, k))
    results |= {} if truth is None else scores_of(x, truth, restoration.codec)
    figures = [*_figures(restoration, x, truth, folder), *figures]
    if images:
        _save_images(x, restoration, folder / "images")
    write_report(
        Report(
            title=f"Restored {title}",
            subtitle=f"{n} examples, {k} draws of each",
            facts=[
                *facts,
                (
                    "network passes",
                    f"{results['nfe']:.0f} and {results['vjps']:.0f} products "
                    "with the transposed Jacobian for each draw",
                ),
                ("time", f"{results['seconds']:.1f} s in all"),
            ],
            tables=[*tables, *([] if truth is None else [_table(results)])],
            figures=figures,
            configuration=configuration,
        ),
        folder / "report.html",
    )
    return results


def scores_of(x: Tensor, truth: Tensor, codec: Codec) -> dict[str, Any]:
    """Returns the accuracy and calibration of draws ``(N, K, *)`` of the truth ``(N, *)``.

    Errors and spreads are compared in model units, in which columns of different scales have equal
    weight, and over values that vary (over all values if none varies). The range for PSNR is that
    of the levels, or of the training data; PSNR is for images and volumes.
    """
    found: dict[str, Any] = {}
    mean = x.double().mean(1)
    if len(codec.raw_shape) > 2:
        span = span_of(codec)
        found["psnr_mean"] = float(psnr(mean, truth, span).mean())
        found["psnr_draw"] = float(psnr(x[:, 0], truth, span).mean())
    if len(codec.raw_shape) == 3:
        for name, one in (("ssim_mean", mean), ("ssim_draw", x[:, 0])):
            value = ssim(one, truth, span_of(codec))
            if value is not None:
                found[name] = float(value.mean())
    own, draws = codec.encode(truth).double(), codec.encode(x.flatten(0, 1)).double()
    draws = draws.unflatten(0, x.shape[:2])
    varies = (draws.std(1) if x.shape[1] > 1 else draws[:, 0] - own) != 0
    spread = bool(varies.any())
    error = draws.mean(1) - own
    found["rmse_mean"] = float((error[varies] if spread else error).square().mean().sqrt())
    if x.shape[1] > 1 and spread:
        found["spread_ratio"] = spread_ratio(draws, own)
        if len(x) >= _LEAST:
            found["ranks_p_value"] = ranks_p_value(x, truth)
    return found


def span_of(codec: Codec) -> float:
    """Returns the range of raw values for PSNR and SSIM."""
    low, high = (torch.as_tensor(end).double() for end in (codec.low, codec.high))
    return float((high - low).max())


def ranks_p_value(x: Tensor, truth: Tensor, seed: int = 0) -> float:
    """Returns the p-value of a chi-squared test that the ranks of the truth are uniform.

    Values of one example are dependent, so one varying value is chosen at random per example.

    Arguments:
        x: The draws, with shape ``(N, K, *)``, K at least 2 and N at least 10.
        truth: The true values, with shape ``(N, *)``.
        seed: Seed of the random streams that choose the values.
    """
    from scipy.stats import chisquare

    rank, varies = ranks(x, truth).flatten(1), x.double().std(1).flatten(1) > 0
    u = Streams.of(seed, batch=len(x)).uniform((rank.shape[1],), Purpose.MEASUREMENT, 3)
    chosen = torch.where(varies, u, -1.0).argmax(1)
    own = rank.gather(1, chosen[:, None])[varies.any(1), 0]
    k = x.shape[1]
    bins = max(2, min(k + 1, len(own) // 5))
    edges = torch.linspace(0, k + 1, bins + 1).round()
    counts = torch.histogram(own.float(), edges - 0.5).hist
    expected = edges.diff() / (k + 1) * len(own)
    return float(chisquare(counts.numpy(), expected.numpy()).pvalue)


def _table(results: Mapping[str, Any]) -> Table:
    names = {
        "psnr_mean": ("PSNR", "mean of the draws", "dB"),
        "psnr_draw": ("PSNR", "one draw", "dB"),
        "ssim_mean": ("SSIM", "mean of the draws", ""),
        "ssim_draw": ("SSIM", "one draw", ""),
        "rmse_mean": ("error", "mean of the draws, root mean square", "in model units"),
        "spread_ratio": ("error / spread", "1 for an honest spread", ""),
        "ranks_p_value": ("uniform ranks", "p-value of a chi-squared test", ""),
    }
    rows = [
        [what, of, f"{results[key]:.4g} {unit}".strip()]
        for key, (what, of, unit) in names.items()
        if key in results
    ]
    return Table(
        "Against the truth",
        "The mean of the draws has the least error; a single draw looks like the data. If the "
        "draws are those of the posterior, the truth has a uniform rank among them, and the error "
        "of their mean is what their spread lets expect.",
        ["measure", "of", "value"],
        rows,
    )


def _figures(restoration: Job, x: Tensor, truth: Tensor | None, folder: Path) -> list[Figure]:
    """Draws the examples next to the observations, and the ranks of the truth."""
    found = []
    if len(restoration.codec.raw_shape) == 3:
        found.append(_picture(restoration, x, truth, folder / "restored.png"))
    else:
        shown = x[:, 0] if truth is None else x[:, 0].to(truth.dtype)
        panels = {"restored": shown} if truth is None else {"truth": truth, "restored": shown}
        path = view_of(restoration.codec, truth).compare(panels, folder / "restored.png")
        found.append(Figure("One draw of each example.", path))
    if truth is not None and x.shape[1] > 1:
        rank, varies = ranks(x, truth), x.double().std(1) > 0
        if bool(varies.any()):
            path = plots.ranks(rank[varies], x.shape[1], folder / "ranks.png")
            found.append(
                Figure(
                    "The rank of the true value among the draws, over all values that vary; flat "
                    "if the spread is honest, a bowl if it is too small, a hill if too large.",
                    path,
                )
            )
    return found


def _picture(restoration: Job, x: Tensor, truth: Tensor | None, path: Path) -> Figure:
    codec = restoration.codec
    view, some = cast(Images, view_of(codec, truth)), x[:_SHOWN]
    mean, spread = some.double().mean(1), some.double().std(1, correction=0)
    columns = {} if truth is None else {"truth": truth[:_SHOWN].double()}
    seen = restoration.seen(len(some))
    columns |= {} if seen is None else {"observed": seen}
    columns |= {"mean": mean, "spread": spread * 2 + _low(codec)}
    columns |= {f"draw {i + 1}": some[:, i].double() for i in range(min(x.shape[1], _SHOWN_DRAWS))}
    labels = [name for _ in range(len(some)) for name in columns]
    tiles = view.tiles(torch.stack(list(columns.values()), 1).flatten(0, 1))
    plots.labelled_grid(tiles, labels, path, columns=len(columns))
    words = "the truth, " if truth is not None else ""
    return Figure(
        f"Each row: {words}what was observed, the mean of the draws, twice their standard "
        "deviation, and single draws.",
        path,
    )


def _low(codec: Codec) -> float:
    return float(torch.as_tensor(codec.low).double().min())


def _save_images(x: Tensor, restoration: Job, folder: Path) -> None:
    """Writes ``00000003_draw0.png``, ``_mean``, ``_spread`` and, if it is one, ``_observed``."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    codec, seen = restoration.codec, restoration.seen(len(x))
    view = cast(Images, view_of(codec))
    low = _low(codec)
    for i, draws in enumerate(x):
        named = {f"draw{j}": draw.double() for j, draw in enumerate(draws)}
        named |= {} if seen is None else {"observed": seen[i]}
        named |= {
            "mean": draws.double().mean(0),
            "spread": draws.double().std(0, correction=0) + low,
        }
        tiles = view.tiles(torch.stack(list(named.values())))
        for name, tile in zip(named, tiles, strict=True):
            pixels = (tile * 255).round().to(torch.uint8).numpy()
            image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            save = partial(image.save, format="PNG")
            write_whole(folder / f"{i:08d}_{name}.png", save)
