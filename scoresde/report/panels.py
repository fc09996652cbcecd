"""Pictures of samples other than images and points: curves, and pairs of columns.

All sets of a picture share their axes. :func:`span` chooses the plotted range, so a few outliers,
or samples that have diverged, do not hide the rest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from scoresde.errors import InputError
from scoresde.report import figures as base

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, COLOURS = base.INK, base.COLOURS
Span = tuple[float, float]
_CURVES = 5  # series in a panel
_POINTS = 1000  # points of a set in a panel
_MARGIN = 0.15  # of the span between the percentiles


def span(values: np.ndarray) -> Span:
    """Returns the plotted range of values: the 1st to the 99th percentile, with a margin.

    Arguments:
        values: Numbers of any shape; non-finite values are ignored.

    Example:
        >>> span(np.array([0.0] * 50 + [1.0] * 50 + [1e6]))
        (-0.15, 1.15)
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return -1.0, 1.0
    low, high = np.quantile(finite, [0.01, 0.99]).tolist()
    if low == high:
        low, high = float(finite.min()), float(finite.max())
    pad = _MARGIN * (high - low) or 0.5 * abs(low) or 0.5
    return low - pad, high + pad


def curves(
    panels: Mapping[str, Tensor],
    path: Path,
    channels: Sequence[int],
    names: Sequence[str],
    views: Sequence[Span],
) -> Path:
    """Draws series: a column for each set, a row for each channel.

    Arguments:
        panels: Series under their titles, each with shape ``(N, C, L)``; of many, a few are drawn.
        path: Output file.
        channels: The channels to draw.
        names: The names of the plotted features.
        views: The plotted range of each, for example from :func:`span`.

    Raises:
        InputError: If a set has another shape, or no set is given.
    """
    sets = {title: _checked(x, title, 3) for title, x in base._some(panels).items()}
    size = (max(4.0, 2.6 * len(sets)), 0.5 + 1.5 * len(channels))
    figure, axes = _grid(len(channels), len(sets), size)
    for row, (channel, name, view) in enumerate(zip(channels, names, views, strict=True)):
        for column, (title, x) in enumerate(sets.items()):
            one = axes[row][column]
            colour = INK if column == 0 and len(sets) > 1 else base.BLUE
            # Evenly spread, because files are often sorted.
            rows = np.unique(np.linspace(0, len(x) - 1, _CURVES).round().astype(int))
            for i, shade in zip(rows, np.linspace(0.9, 0.35, _CURVES), strict=False):
                one.plot(x[i, channel], lw=0.8, alpha=shade, color=colour)
            one.set(ylim=view, ylabel=name if column == 0 else "")
            one.tick_params(labelleft=column == 0, labelbottom=row == len(channels) - 1)
            if row == 0:
                one.set_title(title, size=10, color=INK, loc="left")
    return base._save(figure, path)


def pairs(
    panels: Mapping[str, Tensor],
    path: Path,
    columns: Sequence[int],
    names: Sequence[str],
    views: Sequence[Span],
) -> Path:
    """Draws columns of tables against each other, all sets in one picture, and their histograms.

    Arguments:
        panels: Tables under their titles, each with shape ``(N, D)``.
        path: Output file.
        columns: The columns to draw, at least one.
        names: The names of the plotted features.
        views: The plotted range of each, for example from :func:`span`.

    Raises:
        InputError: If a set has another shape, or no set is given.
    """
    sets = {title: _checked(x, title, 2) for title, x in base._some(panels).items()}
    side = max(3.6, 1.4 * len(columns))
    figure, axes = _grid(len(columns), len(columns), (side, side + 0.4))
    colours = [INK, *COLOURS] if len(sets) > 1 else [base.BLUE]
    for place, x in reversed(list(enumerate(sets.values()))):  # the first set on top
        colour, picked = colours[place % len(colours)], x[:, list(columns)]
        for i, row in enumerate(axes):
            _outline(row[i], picked[:, i], views[i], colour)
            for j in range(i):
                _dots(row[j], picked[:_POINTS, [j, i]], colour)
                row[j].set(xlim=views[j], ylim=views[i])
    for i, row in enumerate(axes):
        for j, one in enumerate(row):
            _edge(one, i, j, names)
    if len(sets) > 1:
        marks = axes[0][0].patches[::-1]
        figure.legend(marks, list(sets), loc="upper right", frameon=False, fontsize=9)
    return base._save(figure, path)


def _outline(axes: "Axes", x: np.ndarray, view: Span, colour: str) -> None:
    """Draws the outline of a histogram of the values in range, as shares of all values."""
    bins = int(np.clip(np.sqrt(len(x)), 8, 40))
    counts, edges = np.histogram(x[np.isfinite(x)], bins, view)
    axes.set(xlim=view, yticks=[])
    axes.stairs(counts / max(1, len(x)), edges, color=colour, lw=1.3)


def _dots(axes: "Axes", x: np.ndarray, colour: str) -> None:
    axes.scatter(x[:, 0], x[:, 1], s=0.5 * base._dot(x) + 1, alpha=0.55, lw=0, color=colour)


def _edge(axes: "Axes", i: int, j: int, names: Sequence[str]) -> None:
    """Labels only the outer panels, and hides those above the diagonal."""
    if j > i:
        axes.set_visible(False)
        return
    left, below = j == 0 and (i > 0), i == len(names) - 1
    axes.locator_params(axis="x", nbins=3)
    axes.tick_params(labelsize=7, labelleft=left, labelbottom=below)
    axes.set_xlabel(names[j] if below else "", size=8)
    axes.set_ylabel(names[i] if left else "", size=8)


def _grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Makes an empty figure of panels in rows and columns; the size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=base.DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        base._dress(one)
    return figure, axes


def _checked(x: Tensor, title: str, ndim: int) -> np.ndarray:
    if x.ndim != ndim:
        what = "(N, C, L)" if ndim == 3 else "(N, D)"
        raise InputError(f"{title or 'samples'} must have shape {what}, got {tuple(x.shape)}.")
    return base._array(x)
