"""Classification of held-out data by the likelihoods of a conditional model."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.errors import InputError
from scoresde.likelihood import GenerativeClassifier
from scoresde.metrics import Estimate, Reliability, accuracy, reliability
from scoresde.model import ScoreFunction
from scoresde.progress import Progress
from scoresde.streams import Streams
from scoresde.tasks.evaluation import (
    check_levels,
    codec_log_det,
    examples_of,
    has_density,
    in_units,
    rows_of,
    volume_of,
)
from scoresde.tasks.parts import Columns, Parts, gather, write_whole

_KEPT = ("log_prob", "standard_error", "posterior", "label", "margin", "margin_error")


@dataclass(frozen=True)
class Classified:
    """The classification of a split; N examples, C classes.

    Arguments:
        split: The name of the split; ``all`` for data that are not divided.
        rows: The indices of the examples in the split, int64 ``(N,)``.
        columns: The classifier's results for each example (see
            :class:`~scoresde.likelihood.Classification`), with ``seconds``.
        truth: The true classes, int64 ``(N,)``, -1 where unknown; None if the data have none.
        given_class: The cost of each example under its true class, ``(N,)``: bits/dim, or nats in
            raw units; NaN where the class is unknown. None if it is unknown for all.
        unlabelled: The cost of each example under the mixture of all classes, ``(N,)``; None if
            the codec has no density.
        unit: The unit of both costs.
        seed: The seed of dequantisation and probes.
    """

    split: str
    rows: Tensor
    columns: Columns
    truth: Tensor | None
    given_class: Tensor | None
    unlabelled: Tensor | None
    unit: str
    seed: int

    @property
    def label(self) -> Tensor:
        """The predicted class of each example, int64 ``(N,)``; -1 if it failed."""
        return self.columns["label"]

    @property
    def known(self) -> Tensor:
        """True for each example whose true class is known, bool ``(N,)``."""
        if self.truth is None:
            return torch.zeros(len(self.label), dtype=torch.bool)
        return self.truth >= 0

    @property
    def right(self) -> Tensor:
        """True for each example whose predicted class is its true class, bool ``(N,)``."""
        return self.known if self.truth is None else (self.label == self.truth) & self.known

    @property
    def failed(self) -> Tensor:
        """True for each example whose solver failed under some class, bool ``(N,)``."""
        return self.label < 0

    @property
    def confidence(self) -> Tensor:
        """The probability of the predicted class, ``(N,)``; NaN where it failed."""
        return self.columns["posterior"].amax(1).exp()

    def reliability(self) -> Reliability | None:
        """Returns accuracy against confidence, or None if no true class is known."""
        rows = self.known & ~self.failed
        return reliability(self.confidence[rows], self.right[rows]) if rows.any() else None

    def summary(self) -> dict[str, Any]:
        """Returns the summary numbers."""
        return {
            "split": self.split,
            "count": len(self.rows),
            "classes": self.columns["posterior"].shape[1],
            "failed": int(self.failed.sum()),
            "with_class": int(self.known.sum()),
            **self._quality(),
            **self._costs(),
            "median_margin": _median(self.columns["margin"]),
            "median_margin_error": _median(self.columns["margin_error"]),
            "nfe": float(self.columns["nfe"].double().mean()),
            "seconds": float(self.columns["seconds"].sum()),
            "seed": self.seed,
        }

    def _quality(self) -> dict[str, float]:
        """Returns the quality given the true classes; failed examples count as wrong."""
        bins = self.reliability()
        if self.truth is None or bins is None:
            return {}
        rows = self.known & ~self.failed
        posterior = self.columns["posterior"][rows]
        cost = -posterior.gather(1, self.truth[rows, None])[:, 0]
        return {
            **_named("accuracy", accuracy(self.label[self.known], self.truth[self.known])),
            **_named("negative_log_posterior", Estimate.of(cost)),
            "expected_calibration_error": bins.expected_error,
            "calibration_floor": bins.floor,
            "calibration_bins": len(bins.count),
        }

    def _costs(self) -> dict[str, Any]:
        """Returns the costs of the data with and without the true class, and the information."""
        results: dict[str, Any] = {}
        if self.unlabelled is not None:
            results = {"unit": self.unit, **_named("unlabelled", _finite(self.unlabelled))}
        if self.truth is None or not bool((self.known & ~self.failed).any()):
            return results
        given = self.columns["log_prob"].gather(1, self.truth.clamp(min=0)[:, None])[:, 0]
        information = (given - self.columns["total_log_prob"])[self.known & ~self.failed]
        if self.given_class is not None:
            results |= _named("given_class", _finite(self.given_class))
        return {**results, **_named("information", Estimate.of(information))}

    def save(self, folder: Path) -> None:
        """Saves the table of all examples, ``classes.npz``."""
        arrays: dict[str, Any] = {
            name: self.columns[name].numpy() for name in (*_KEPT, "total_log_prob", "nfe")
        }
        if self.truth is not None:
            arrays["truth"] = self.truth.numpy()
        arrays["index"] = self.rows.numpy()
        write_whole(folder / "classes.npz", lambda file: np.savez(file, **arrays))


def classify_examples(
    model: ScoreFunction,
    classifier: GenerativeClassifier,
    data: Dataset,
    split: str = "test",
    *,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    parts: Parts | None = None,
    progress: bool = True,
) -> Classified:
    """Classifies all or some examples of a split once.

    Arguments:
        model: The model.
        classifier: The classifier.
        data: The data set, on the model's device; its labels are compared if it has any.
        split: ``train``, ``validation`` or ``test``.
        examples: The number of examples, chosen at random, positive. If None, all are used.
        batch_size: The number of examples evaluated together, positive.
        seed: The seed of dequantisation and probes.
        parts: Store of finished batches, from which available batches are read.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Raises:
        InputError: If there is no such split, the model does not support the classifier, or an
            example has a class that the model lacks.
    """
    rows = rows_of(len(data.split(split)), examples, parts)
    classifier.check(model)
    check_levels(data, classifier.likelihood)
    truth = _truth(data, split, rows, classifier.classes)

    def compute(piece: range) -> Columns:
        streams = Streams(seed, rows[piece.start : piece.stop].to(model.device))
        return classify_batch(model, classifier, data, split, streams)

    found: dict[int, Columns] = {}
    with Progress(len(rows), "classes", "example", shown=progress) as bar:
        for piece, columns, fresh in gather(parts, len(rows), batch_size, compute):
            found[piece.start] = columns
            bar.update(len(piece), fresh)
    table = [found[start] for start in sorted(found)]
    columns = {name: torch.cat([part[name] for part in table]) for name in table[0]}
    if bool((columns["label"] < 0).all()):
        raise InputError(
            f"All {len(rows)} examples failed to be classified; check the model, or use a larger "
            "eps."
        )
    given, unlabelled, unit = _in_units(columns, truth, data)
    return Classified(
        split="all" if data.undivided else split,
        rows=rows,
        columns=columns,
        truth=truth,
        given_class=given,
        unlabelled=unlabelled,
        unit=unit,
        seed=seed,
    )


def classify_batch(
    model: ScoreFunction,
    classifier: GenerativeClassifier,
    data: Dataset,
    split: str,
    streams: Streams,
) -> Columns:
    """Classifies the examples given by the streams; one row for each, on the CPU."""
    clock = time.perf_counter()
    likelihood = classifier.likelihood
    batch = examples_of(likelihood, data, split, streams).to(model.device)
    cond = {name: values for name, values in batch.cond.items() if name != "label"}
    result = classifier(
        model, batch.x, seed=streams.seed, seeds=streams.indices, **model.select(cond)
    )
    there = has_density(data)
    log_det = codec_log_det(data, split, streams, batch.x) if there else {}
    columns = {name: getattr(result, name).cpu() for name in (*_KEPT, "total_log_prob", "nfe")}
    for name in ("log_prob", "total_log_prob"):
        columns[name] = columns[name] - volume_of(likelihood, data)
    seconds = (time.perf_counter() - clock) / len(streams)
    each = torch.full((len(streams),), seconds, dtype=torch.float64)
    return {**log_det, **columns, "seconds": each}


def _truth(data: Dataset, split: str, rows: Tensor, classes: int) -> Tensor | None:
    """Returns the true classes, int64 ``(N,)``, or None if the data have none."""
    label = data.conditions_of(split, rows).get("label")
    if label is None:
        return None
    if int(label.max()) >= classes:
        raise InputError(
            f"label must be below the model's classes={classes}, got {int(label.max())}; remove "
            "these examples, or set their label to -1 (unknown)."
        )
    return label.cpu()


def _in_units(
    columns: Columns, truth: Tensor | None, data: Dataset
) -> tuple[Tensor | None, Tensor | None, str]:
    """Returns the costs under the true class and under all classes, and their unit."""
    if not has_density(data):
        return None, None, ""
    log_det = columns.get("log_det")
    unlabelled, unit, _ = in_units(columns["total_log_prob"], data, log_det)
    if truth is None:
        return None, unlabelled, unit
    given = columns["log_prob"].gather(1, truth.clamp(min=0)[:, None])[:, 0]
    cost, _, _ = in_units(given, data, log_det)
    return cost.masked_fill(truth < 0, math.nan), unlabelled, unit


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_standard_error": estimate.standard_error}


def _finite(values: Tensor) -> Estimate:
    return Estimate.of(values[~values.isnan()])


def _median(values: Tensor) -> float | None:
    """Returns the median, or None if no value is known, since JSON has no NaN."""
    median = float(values.nanmedian())
    return None if math.isnan(median) else median


def save_summary(results: dict[str, Any], folder: Path) -> None:
    """Saves ``classify.json``."""
    text = json.dumps(results, indent=2) + "\n"
    write_whole(folder / "classify.json", lambda file: file.write(text.encode()))
