"""Samples, losses and likelihoods by class, for class-conditional models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.data import Dataset, class_count
from scoresde.metrics import Estimate
from scoresde.model import Model
from scoresde.report import Figure, Table
from scoresde.tasks.views import View

NONE = "no class"
_MOST = 16  # classes in a picture
_LISTED = 100  # classes in a table
_ROWS = 4096  # labels read at once


def class_title(label: int, names: Sequence[str] = ()) -> str:
    """Returns the name of a class, or a title such as ``class 3``."""
    if label < 0:
        return NONE
    return str(names[label]) if label < len(names) else f"class {label}"


def labels_of(model: Model, data: Dataset, split: str, rows: Tensor) -> Tensor | None:
    """Returns the classes of examples, int64 ``(N,)``, if the model is conditioned on classes.

    Arguments:
        model: The model.
        data: The data set.
        split: The split.
        rows: The indices of the examples, int64 ``(N,)``.
    """
    known = data.conditions_of(split, rows[:1])
    if "label" not in known or not model.takes("label"):
        return None
    parts = [data.conditions_of(split, some)["label"].cpu() for some in rows.split(_ROWS)]
    return torch.cat(parts)


def by_class(values: Tensor, labels: Tensor) -> dict[int, Estimate]:
    """Returns the mean of the values of each class, ignoring NaN.

    Arguments:
        values: One value per example, with shape ``(N,)``.
        labels: The classes of the examples, int64 ``(N,)``.

    Example:
        >>> found = by_class(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
        >>> print(found[0])
        2.000 ± 1.000
    """
    good = ~values.isnan()
    values, labels = values[good], labels[good]
    return {c: Estimate.of(values[labels == c]) for c in labels.unique().tolist()}


def summary_of(values: Tensor, labels: Tensor, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the mean of each class, its standard error and its count, as plain values."""
    return [
        {
            "label": c,
            "name": class_title(c, names),
            "mean": found.mean,
            "standard_error": found.standard_error,
            "count": found.count,
        }
        for c, found in by_class(values, labels).items()
    ]


def class_table(columns: Mapping[str, Mapping[int, Estimate]], names: Sequence[str]) -> Table:
    """Returns a table of estimates by class.

    Arguments:
        columns: The estimates by class, for each quantity.
        names: The names of the classes.
    """
    classes = sorted({c for column in columns.values() for c in column})
    head = ["class", *(part for title in columns for part in (title, "examples"))]
    rows = []
    for c in classes[:_LISTED]:
        cells = [
            (str(column[c]), str(column[c].count)) if c in column else ("–", "0")
            for column in columns.values()
        ]
        rows.append([class_title(c, names), *(part for pair in cells for part in pair)])
    about = "Each with its standard error over the examples of the class."
    if len(classes) > _LISTED:
        about += f" The first {_LISTED} of {len(classes)} classes."
    return Table("Classes", about, head, rows)


def each_class(model: Model, data: Dataset, none: bool, each: int) -> Tensor:
    """Returns the labels of samples of all classes in turn, int64.

    Arguments:
        model: The model.
        data: The training data.
        none: Whether the model supports "no class", which comes last.
        each: The number of samples per class.
    """
    classes = [*range(class_count(model, data))[:_MOST]]
    return torch.tensor([*classes, *([-1] if none else [])]).repeat_interleave(each)


def class_figure(
    view: View, raw: Tensor, labels: Tensor, names: Sequence[str], path: Path
) -> Figure:
    """Draws samples by class, one row per class."""
    return Figure("Samples of each class.", view.by_class(titled(raw, labels, names), path))


def titled(raw: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Returns raw examples by the titles of their classes, in the order of the classes."""
    found = labels.unique().tolist()
    order = sorted(found, key=lambda c: (c < 0, c))
    return {class_title(c, names): raw[labels == c] for c in order}
