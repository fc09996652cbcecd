"""Comparison of moving averages of different lengths of a model's weights."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scoresde.data import Dataset
from scoresde.errors import InputError
from scoresde.likelihood import LogProb
from scoresde.metrics import Estimate
from scoresde.model import ScoreFunction
from scoresde.progress import Progress
from scoresde.report import figures as plots
from scoresde.tasks.evaluation import evaluate_likelihood
from scoresde.tasks.summary import format_table
from scoresde.train import Snapshots

log = logging.getLogger("scoresde")

LENGTHS = (0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2)
TABLE, FIGURE = "averages.csv", "averages.png"


def compare_averages(
    model: ScoreFunction,
    stored: Snapshots,
    likelihood: LogProb,
    data: Dataset,
    split: str,
    folder: Path,
    lengths: Sequence[float] | None = None,
    *,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates averages of several lengths on the same examples; writes a table and a figure.

    Each value is compared with the training's own average, example by example and with the same
    random numbers, so its standard error is that of the difference.

    Arguments:
        model: The model, with the training's own average; its weights are changed.
        stored: The averages stored by the training run.
        likelihood: The likelihood.
        data: The data set, on the model's device.
        split: The split to evaluate.
        folder: Folder for ``averages.csv`` and ``averages.png``.
        lengths: The lengths, as shares of the training. If None, eight usual lengths.
        examples: The number of examples, positive. If None, all are used.
        batch_size: The number of examples evaluated together, positive.
        seed: The seed of dequantisation and probes.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Returns:
        The best length and its value.

    Raises:
        InputError: If a length is out of range, or there are no lengths.
    """
    lengths = sorted(LENGTHS if lengths is None else lengths)
    if not lengths:
        raise InputError("lengths must not be empty; for example [0.05,0.1].")
    checkpoints = {length: stored.average(length) for length in lengths}

    def evaluate() -> Any:
        return evaluate_likelihood(
            model,
            likelihood,
            data,
            split,
            examples=examples,
            batch_size=batch_size,
            seed=seed,
            progress=False,
        )

    own = evaluate()
    rows = []
    bar = Progress(len(lengths), "averages", "length", shown=progress)
    for length in lengths:
        model.load_state_dict({k: v.to(model.device) for k, v in checkpoints[length].ema.items()})
        values = evaluate().values
        both = torch.isfinite(values) & torch.isfinite(own.values)
        gain = Estimate.of((values - own.values)[both])
        rows.append(
            {
                "length": length,
                own.unit: own.mean + gain.mean,
                "difference": gain.mean,
                "standard_error": gain.standard_error,
            }
        )
        bar.update()
    bar.close()
    _write(rows, folder / TABLE)
    plots.average_lengths(
        {row["length"]: row[own.unit] for row in rows},
        {row["length"]: row["standard_error"] for row in rows},
        folder / FIGURE,
        f"{own.unit} ({split})",
        own.mean,
    )
    log.info("%s", format_table(rows))
    best = min(rows, key=lambda row: row[own.unit])
    log.info("The training run's own average: %.4f %s", own.mean, own.unit)
    log.info("Figure: %s", folder / FIGURE)
    return {"best_length": best["length"], own.unit.replace("/", "_per_"): best[own.unit]}


def _write(rows: Sequence[dict[str, float]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
