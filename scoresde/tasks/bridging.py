"""Restoration with a bridge model: draws, their spread, and distortion against perception."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.data import Dataset, random_rows
from scoresde.errors import InputError
from scoresde.metrics import psnr, sliced_wasserstein, ssim
from scoresde.model import BridgeModel
from scoresde.report import Figure, Table
from scoresde.report import figures as plots
from scoresde.sample import Restore
from scoresde.tasks.parts import Columns, Parts
from scoresde.tasks.report import Trained
from scoresde.tasks.restoration import Job, restore, span_of
from scoresde.train import read_metrics

COUNTS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
)  # of steps; figures stop at the run's own
_SOURCE = "the source itself"


@dataclass(frozen=True)
class BridgeJob(Job):
    """Restoration of sources with a bridge model.

    Arguments:
        model: The model.
        sampler: The sampler.
        source: The sources of N examples in model units, ``(N, *)``.
        codec: The codec of the data.
        draws: The number of draws per example, positive.
        seed: Seed of the random streams.
        cond: Other conditions of the examples, each with shape ``(N, *)``.
    """

    model: BridgeModel
    sampler: Restore
    source: Tensor
    codec: Codec
    draws: int = 1
    seed: int = 0
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:  # type: ignore[override]
        return len(self.source)

    @property
    def y(self) -> Tensor:
        return self.codec.decode(self.source, rounded=False)

    def check(self) -> None:
        self.sampler.check(self.model)
        if tuple(self.source.shape[1:]) != tuple(self.codec.shape):
            raise InputError(
                f"source must have examples of shape {tuple(self.codec.shape)}, got "
                f"{tuple(self.source.shape[1:])}."
            )

    def batch(self, piece: range) -> Columns:
        clock = time.perf_counter()
        rows = torch.arange(piece.start, piece.stop) // self.draws
        known = {name: values[rows] for name, values in self.cond.items()}
        cond = self.model.select({**known, "source": self.source[rows]})
        out = self.sampler(self.model, seed=self.seed, seeds=piece, **cond)
        seconds = (time.perf_counter() - clock) / len(piece)
        return {
            "x": self.codec.decode(out.x).cpu(),
            "nfe": out.nfe.cpu(),
            "vjps": torch.zeros_like(out.nfe).cpu(),
            "seconds": torch.full((len(piece),), seconds, dtype=torch.float64),
        }

    def seen(self, count: int) -> Tensor:
        return self.y[:count].double().cpu()


def tradeoff(
    job: BridgeJob, truth: Tensor, counts: Sequence[int], batch_size: int = 256
) -> list[dict[str, float]]:
    """Measures one draw of each example at several numbers of steps.

    Few steps give draws close to the truth; many steps give draws close to the distribution of the
    data. No estimate is best at both.

    References:
        Blau and Michaeli, *The perception-distortion tradeoff*, 2018,
        https://arxiv.org/abs/1711.06077.

    Arguments:
        job: The restoration job.
        truth: The true raw examples, with shape ``(N, *)``.
        counts: The numbers of steps.
        batch_size: The number of examples restored together.

    Returns:
        A row for the source, with 0 steps, and one for each number of steps. It has ``steps``,
        ``rmse`` in model units, and ``distance``, the sliced Wasserstein distance to the true
        examples in model units. For images it also has ``psnr`` in dB and ``ssim``.
    """
    rows = [_row(0, job.codec.decode(job.source).cpu(), truth, job.codec)]
    for steps in counts:
        one = replace(job, sampler=replace(job.sampler, steps=steps), draws=1)
        pieces = (
            range(i, min(i + batch_size, len(truth))) for i in range(0, len(truth), batch_size)
        )
        x = torch.cat([one.batch(piece)["x"] for piece in pieces])
        rows.append(_row(steps, x, truth, job.codec))
    return rows


def _row(steps: int, x: Tensor, truth: Tensor, codec: Codec) -> dict[str, float]:
    own, right = codec.encode(x).double(), codec.encode(truth).double()
    row = {"steps": steps, "rmse": float((own - right).square().mean().sqrt())}
    if len(codec.raw_shape) > 2:
        row["psnr"] = float(psnr(x, truth, span_of(codec)).mean())
    similar = ssim(x, truth, span_of(codec)) if len(codec.raw_shape) == 3 else None
    if similar is not None:
        row["ssim"] = float(similar.mean())
    return {**row, "distance": sliced_wasserstein(own, right)}


def tradeoff_report(
    rows: Sequence[Mapping[str, float]], folder: Path
) -> tuple[list[Table], list[Figure]]:
    """Writes ``tradeoff.json`` and ``tradeoff.png``; returns their table and figure."""
    (folder / "tradeoff.json").write_text(json.dumps(list(rows), indent=1) + "\n")
    measure = "psnr" if "psnr" in rows[0] else "rmse"
    names = {"psnr": "PSNR in dB", "rmse": "root mean square error", "ssim": "SSIM"}
    labels = [_SOURCE if row["steps"] == 0 else f"{row['steps']:.0f}" for row in rows]
    points = [(row[measure], row["distance"]) for row in rows]
    path = plots.tradeoff(points, labels, names[measure], folder / "tradeoff.png")
    columns = [name for name in ("psnr", "ssim", "rmse", "distance") if name in rows[0]]
    table = Table(
        "Distortion and perception",
        "One draw of each example. Few steps come near to the truth; many come near to the law of "
        "the data, here by the sliced Wasserstein distance between restored and true examples.",
        ["steps", *(names.get(c, "distance") for c in columns)],
        [
            [label, *(f"{row[c]:.4g}" for c in columns)]
            for label, row in zip(labels, rows, strict=True)
        ],
    )
    about = "Distortion against perception, by the number of steps: below is nearer to the data."
    return [table], [Figure(about, path)]


def restore_pairs(
    job: BridgeJob,
    folder: Path,
    parts: Parts,
    *,
    truth: Tensor | None = None,
    figures: Sequence[Figure] = (),
    **options: Any,
) -> dict[str, Any]:
    """Restores sources and, if the truth is known, compares numbers of steps.

    Arguments:
        job: The restoration job.
        folder: Output folder, as for :func:`~scoresde.tasks.restoration.restore`, and for
            ``tradeoff.json``, ``tradeoff.png``.
        parts: Store of finished batches.
        truth: The true raw examples ``(N, *)``, if known.
        figures: Further figures of the report.
        **options: As for :func:`~scoresde.tasks.restoration.restore`.
    """
    job.check()
    tables: list[Table] = []
    if truth is not None and parts.rank.index == 0:
        own = job.sampler.steps
        rows = tradeoff(job, truth, sorted({own, *(n for n in COUNTS if n < own)}))
        tables, drawn = tradeoff_report(rows, folder)
        figures = [*drawn, *figures]
    return restore(job, folder, parts, truth=truth, tables=tables, figures=figures, **options)


def report_bridge(
    trained: Trained,
    sampler: Restore,
    folder: Path,
    *,
    count: int,
    draws: int,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Restores held-out examples with a trained model, and writes its report.

    Arguments:
        trained: The model.
        sampler: The sampler.
        folder: The run's folder, with the training's ``metrics.jsonl``.
        count: The number of held-out examples.
        draws: The number of draws per example.
        batch_size: The number of draws computed together.
        progress: Whether to show the progress.
    """
    data: Dataset = trained.data
    rows = random_rows(len(data.split(trained.split)), count)
    truth = data.split(trained.split)[rows].cpu()
    cond = data.conditions_of(trained.split, rows)
    source = cond.pop("source")
    model: Any = trained.model
    job = BridgeJob(model, sampler, source, data.codec, draws, trained.seed, cond)
    curve = plots.loss_curve(read_metrics(folder), folder / "loss.png")
    loss = Figure("The loss in training (faint: as recorded) and on validation data.", curve)
    parameters = sum(p.numel() for p in model.parameters())
    results = restore_pairs(
        job,
        folder,
        Parts(folder / "parts").claim({"run": trained.name, "sampler": sampler}),
        truth=truth,
        figures=[loss],
        batch_size=batch_size,
        progress=progress,
        title=trained.name,
        facts=[
            ("process", str(model.process)),
            ("network", f"{type(model.network).__name__}, {parameters:,} parameters"),
            *trained.facts,
            ("training time", f"{trained.seconds:.0f} s"),
            ("seed", str(trained.seed)),
        ],
        configuration=trained.configuration,
    )
    return {"data": data.name, **results, "seconds_training": trained.seconds}
