"""Comparison of samples with data: moments by feature, distances to training examples."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.metrics import Moments, nearest
from scoresde.report import Table

_MOST = 8  # features in a table of the report
_TOGETHER = 2**22  # numbers of training examples compared at once
_HEAD = ("mean", "std", "5 %", "median", "95 %")


def compare(sets: Mapping[str, Tensor], feature: str, path: Path) -> Table:
    """Compares raw samples with data, feature by feature; all of them are written as CSV.

    Arguments:
        sets: Raw examples ``(N, *)`` by title, the data first.
        feature: The word for a feature: column or channel.
        path: The CSV file.

    Returns:
        A table of the features that differ most.
    """
    moments = {name: Moments.of(raw) for name, raw in sets.items()}
    real, *drawn = moments.values()
    count = len(real.mean)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([feature, "examples", *_HEAD])
        for i in range(count):
            writer.writerows([i, name, *_numbers(m, i)] for name, m in moments.items())
    chosen = list(range(count))
    if count > _MOST and drawn:
        off = torch.stack([real.discrepancy(one) for one in drawn]).amax(0)
        chosen = sorted(off.argsort(descending=True, stable=True)[:_MOST].tolist())
    rows = [
        [f"{feature} {i}" if first else "", name, *(f"{v:.4g}" for v in _numbers(m, i))]
        for i in chosen
        for first, (name, m) in zip([True] + [False] * len(drawn), moments.items(), strict=True)
    ]
    about = f"Numbers of each {feature}, in the units of the data; {path.name} holds all of them."
    if count > _MOST:
        about += f" Of {count} the {_MOST} are shown that differ most."
    about += "".join(
        f" {_correlations(name, real, one, feature)}"
        for name, one in list(moments.items())[1:]
        if count > 1
    )
    return Table("Samples against data", about, (feature, "examples", *_HEAD), rows)


def _numbers(moments: Moments, i: int) -> list[float]:
    return [float(moments.mean[i]), float(moments.std[i]), *moments.quantiles[i].tolist()]


def _correlations(name: str, real: Moments, drawn: Moments, feature: str) -> str:
    off, i, j = real.correlations_off(drawn)
    return f"The correlations of {name} differ by at most {off:.2f} ({feature}s {i} and {j})."


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Samples and their nearest training examples.

    Arguments:
        distances: The distance of each sample in model units, ``(M,)``.
        held_out: The distances of held-out examples, ``(K,)``.
        rows: The index of the nearest training example of each sample, ``(M,)``.
    """

    distances: Tensor
    held_out: Tensor
    rows: Tensor

    @staticmethod
    def of(codec: Codec, train: Tensor, samples: Tensor, held_out: Tensor) -> "Neighbours":
        """Finds the nearest training examples; all are raw, with integers at level centres."""
        both = nearest(codec.encode(torch.cat([samples, held_out])), _encoded(codec, train))
        (distances, other), (rows, _) = (x.split([len(samples), len(held_out)]) for x in both)
        return Neighbours(distances, other, rows)

    @property
    def sentence(self) -> str:
        """The distances in one sentence."""
        mine, other = (float(d.median()) for d in (self.distances, self.held_out))
        copies = int((self.distances == 0).sum())
        told = f"; {copies} of {len(self.distances)} are exact copies" if copies else ""
        return (
            f"The median distance to the nearest training example is {mine:.3g} for samples and "
            f"{other:.3g} for held-out examples (Euclidean, model units){told}. Samples much "
            "nearer than held-out examples repeat the training set."
        )


def _encoded(codec: Codec, train: Tensor) -> Iterator[Tensor]:
    """Yields training examples in model units, some at a time."""
    size = max(1, _TOGETHER // max(1, train[:1].numel()))
    return map(codec.encode, train.split(size))
