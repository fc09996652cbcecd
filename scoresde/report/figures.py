"""Pictures of a run: its loss, its samples, its densities.

Each function draws one figure, writes it as a PNG file (creating the folder if necessary) and
returns the path. The drawing uses no global state, so it works on a machine without a display, in
threads, and together with a notebook's own figures. The colours are those of Okabe and Ito (2008)
and the map *viridis*, which colour-blind readers can distinguish. NaN is shown in red or counted
in a note; it never stops a run.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Extent = tuple[float, float, float, float]  # lowest and highest x1, and likewise of x2

DPI = 150
SMALLEST = 48  # pixels of a grid's picture
GAP = 2  # pixels between a grid's pictures

INK, GREY, FAINT = "#222222", "#767676", "#dddddd"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
RED = (204, 64, 64)
SEPARATOR = (150, 150, 150)
MARGIN = 24  # pixels around the panels of a comparison
LABEL = 26  # pixels for a line of text below an image
_DEPTH = 8.0  # nats of a log-density that are drawn
TITLE = 150  # pixels for a text next to a row of images


def loss_curve(records: Sequence[Mapping[str, float | None]], path: Path) -> Path:
    """Draws the training loss, raw and smoothed, and the validation loss.

    The axis is logarithmic if the curves are positive and span a factor of 20. If records share a
    step, as after a resume, the last is used.

    Arguments:
        records: The records of ``metrics.jsonl``: some with ``step`` and ``loss``, some with
            ``step`` and ``validation_loss``. An empty sequence gives an empty picture with a note.
        path: Output file.
    """
    steps, losses = _series(records, "loss")
    marks, held_out = _series(records, "validation_loss")
    figure, (axes,) = _figure(1, width=6.4, height=3.6)
    smooth = _smooth(losses)
    if len(losses):
        axes.plot(steps, losses, color=SKY, alpha=0.45, lw=0.8, label="training, as recorded")
        axes.plot(steps, smooth, color=BLUE, lw=1.8, label="training, running mean")
    if len(held_out):
        dots = "o" if len(held_out) <= 40 else ""
        axes.plot(marks, held_out, color=ORANGE, lw=1.6, marker=dots, ms=4, label="validation")
    _scale(axes, losses, np.concatenate([smooth, held_out]))
    axes.set(xlabel="optimisation step", ylabel="loss (mean per example)")
    if axes.lines:
        _legend(axes)
        _note(axes, _uncounted(records), x=0.01, y=0.02, ha="left", va="bottom")
    else:
        _blank(axes, "no records")
    return _save(figure, path)


def level_curve(curves: Mapping[int, Mapping[float, float]], path: Path) -> Path:
    """Plots the error of the predicted noise against the log-SNR, at some training steps.

    Arguments:
        curves: For each step the errors by log-SNR. If there are many steps, a few are drawn, the
            last in full colour. An empty mapping gives an empty picture with a note.
        path: Output file.
    """
    figure, (axes,) = _figure(1, width=6.4, height=3.6)
    steps = sorted(curves)
    if len(steps) > 5:
        steps = [steps[round(i * (len(steps) - 1) / 4)] for i in range(5)]
    for i, step in enumerate(steps, 1):
        levels = sorted(curves[step])
        values = [curves[step][level] for level in levels]
        width = 2 if step == steps[-1] else 1
        style: dict[str, Any] = {
            "color": BLUE,
            "alpha": i / len(steps),
            "lw": width,
            "marker": "o",
            "ms": 3,
        }
        axes.plot(levels, values, label=f"{step:,} updates", **style)
    axes.set(xlabel="log-SNR (noise to the left, data to the right)", ylabel="error of the noise")
    if steps:
        axes.set_yscale("log")
        axes.axhline(1, color=GREY, lw=0.8, ls="--")
        _legend(axes)
    else:
        _blank(axes, "no records")
    return _save(figure, path)


def schedule(t: Tensor, log_snr: Tensor, errors: Mapping[float, float], path: Path) -> Path:
    r"""Plots a log-SNR over time next to a straight line, and the bound's term at each time.

    The term is :math:`-\tfrac12 \lambda'(t) h(\lambda(t))` nats per dimension, where h is the size
    of the squared error of the noise.

    Arguments:
        t: Times, ascending from 0 to 1, with shape ``(T,)``.
        log_snr: The log-SNR there.
        errors: h at some log-SNRs, interpolated between them. If empty, the term is not plotted.
        path: Output file.
    """
    times, own = t.double().numpy(), log_snr.double().numpy()
    line = own[0] + (own[-1] - own[0]) * times
    figure, axes = _figure(2 if errors else 1, width=7.4 if errors else 4.0, height=3.2)
    curves = {"as learned": (own, BLUE), "a straight line": (line, ORANGE)}
    levels = sorted(errors)
    heights = [errors[level] for level in levels]
    for label, (curve, colour) in curves.items():
        axes[0].plot(times, curve, color=colour, lw=1.6, label=label)
        if errors:
            share = -0.5 * np.gradient(curve, times) * np.interp(curve, levels, heights)
            axes[1].plot(times, share, color=colour, lw=1.6)
    axes[0].set(xlabel="time", ylabel="log-SNR")
    _legend(axes[0])
    if errors:
        axes[1].set(xlabel="time", ylabel="diffusion term (nats/dim)")
        axes[1].set_ylim(bottom=0)
    return _save(figure, path)


def average_lengths(
    values: Mapping[float, float],
    errors: Mapping[float, float],
    path: Path,
    label: str,
    plain: float | None = None,
) -> Path:
    """Plots a quality against the length of the weight averages.

    Arguments:
        values: The quality of each length; lower is better.
        errors: Their standard errors.
        path: Output file.
        label: The name of the quality, with its unit.
        plain: The quality of the training's own average.
    """
    figure, (axes,) = _figure(1, width=6.4, height=3.6)
    lengths = sorted(values)
    heights = [values[length] for length in lengths]
    bars = [errors[length] for length in lengths]
    axes.errorbar(lengths, heights, bars, color=BLUE, marker="o", ms=4, lw=1.4, capsize=2)
    if plain is not None:
        axes.axhline(plain, color=ORANGE, lw=1.2, ls="--", label="the training's own average")
        _legend(axes)
    axes.set(xlabel="length of the average (share of the training)", ylabel=label, xscale="log")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.minorticks_off()
    return _save(figure, path)


def bound_steps(terms: Tensor, path: Path, label: str) -> Path:
    """Plots the terms of a chain of T equal steps against time, with the error of each mean.

    Both axes are logarithmic: most of a bound is in a few early steps. The many late steps are
    averaged to about one point per 1/16 octave.

    Arguments:
        terms: The terms of N examples, with shape ``(N, T)``.
        path: Output file.
        label: The name of a term, with its unit.
    """
    times, mean, error = _by_octave(_array(terms))
    figure, (axes,) = _figure(1, width=6.4, height=3.6)
    there = mean > 0  # a random subset may have skipped some
    if there.any():
        times, mean, error = times[there], mean[there], np.nan_to_num(error[there])
        # A band that reaches 0 ends at the lowest mean, so it does not determine the axis.
        low = np.maximum(mean - error, 0.5 * mean.min())
        axes.fill_between(times, low, mean + error, color=SKY, alpha=0.5, lw=0)
        axes.plot(times, mean, color=BLUE, lw=1.2, marker="o", ms=2.5)
        axes.set(xscale="log", yscale="log")
    else:
        _blank(axes, "no terms")
    axes.set(xlabel="time t (data to the left, noise to the right)", ylabel=label)
    return _save(figure, path)


def _by_octave(terms: np.ndarray, parts: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns times, means and their errors of groups of neighbouring steps, each ``(G,)``."""
    count = terms.shape[1]
    steps = np.arange(1, count + 1)
    _, first = np.unique(np.floor(parts * np.log2(steps)), return_index=True)
    sizes = np.diff([*first, count])
    # Each example's own mean over a group first: its steps are not independent.
    own = np.add.reduceat(terms, first, axis=1) / sizes
    times = np.add.reduceat(steps, first) / sizes / count
    spread = own.std(0, ddof=1) if len(own) > 1 else np.full(len(first), np.nan)
    return times, own.mean(0), spread / len(own) ** 0.5


def search(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path, least: bool = True
) -> Path:
    """Plots a search: the value by trial with the best so far, and against each parameter.

    Arguments:
        rows: For each trial its ``trial``, ``value``, and parameters.
        names: The parameters.
        path: Output file.
        least: Whether the lowest value is the best.
    """
    figure, axes = _figure(1 + len(names), width=3.4 * (1 + len(names)), height=3.2)
    values = np.array([row["value"] for row in rows])
    best = (np.minimum if least else np.maximum).accumulate(values)
    trials = [row["trial"] for row in rows]
    axes[0].plot(trials, values, "o", color=SKY, ms=4)
    axes[0].step(trials, best, where="post", color=BLUE, label="best so far")
    axes[0].set(xlabel="trial", ylabel="value")
    _legend(axes[0])
    for one, name in zip(axes[1:], names, strict=True):
        there = [row[name] for row in rows]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in there)
        places = there if numbers else [str(v) for v in there]
        one.plot(places, values, "o", color=BLUE, ms=4, alpha=0.7)
        if numbers and min(there) > 0 and max(there) > 20 * min(there):
            one.set_xscale("log")
        one.set(xlabel=name)
    return _save(figure, path)


def image_grid(images: Tensor, path: Path, columns: int = 8, zoom: int | None = None) -> Path:
    """Draws images in a grid, each pixel as a sharp square.

    Arguments:
        images: Floats in [0, 1] with shape ``(N, C, H, W)``; values beyond are clipped, NaN is
            red. One channel is grey and three are colours; of another number the first is shown.
        path: Output file.
        columns: Images in a row, positive.
        zoom: Screen pixels per image pixel; by default each side has at least 48 screen pixels.

    Raises:
        InputError: If the images have another shape or type, or there are no images.
    """
    from matplotlib.image import imsave

    tiles = _tiles(images, columns, zoom)
    imsave(_folder(path), tiles, dpi=DPI)
    return Path(path)


def labelled_grid(images: Tensor, labels: Sequence[str], path: Path, columns: int = 8) -> Path:
    """Draws images in a grid, each with a short text below it.

    Arguments:
        images: As in :func:`image_grid`.
        labels: A text for each image; up to eight characters fit below a small image.
        path: Output file.
        columns: Images in a row, positive.

    Raises:
        InputError: As in :func:`image_grid`, or if there is not one text for each image.
    """
    from matplotlib.figure import Figure

    if len(labels) != len(images):
        raise InputError(
            f"labels must have one text for each of the {len(images)} images, got {len(labels)}."
        )
    tiles = [_tiles(one, 1) for one in images.split(1)]
    if columns < 1:
        raise InputError(f"columns must be a positive integer, got {columns}.")
    rows = math.ceil(len(tiles) / columns)
    cell_y, cell_x = tiles[0].shape[0] + LABEL, tiles[0].shape[1] + LABEL // 2
    height, width = rows * cell_y, min(columns, len(tiles)) * cell_x
    figure = Figure(figsize=((width + 0.5) / DPI, (height + 0.5) / DPI), dpi=DPI)
    for i, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, top = i % columns * cell_x + LABEL // 4, height - i // columns * cell_y
        figure.figimage(tile, x, top - tile.shape[0], origin="upper")
        middle, below = (x + tile.shape[1] / 2) / width, (top - tile.shape[0] - 3) / height
        figure.text(middle, below, label, fontsize=6.5, color=INK, ha="center", va="top")
    figure.savefig(_folder(path), dpi=DPI)
    return Path(path)


def image_rows(rows: Mapping[str, Tensor], path: Path, columns: int = 8) -> Path:
    """Draws sets of images below each other, each next to its title.

    Arguments:
        rows: Images under their titles, each as in :func:`image_grid`.
        path: Output file.
        columns: Images in a row, positive; a set may have several rows.

    Raises:
        InputError: As in :func:`image_grid`, or if there is no set.
    """
    from matplotlib.figure import Figure

    grids = [_tiles(x, columns) for x in _some(rows).values()]
    titles = [_wrap(title, TITLE) for title in rows]
    height = MARGIN + sum(grid.shape[0] + GAP for grid in grids)
    width = TITLE + MARGIN + max(grid.shape[1] for grid in grids)
    figure = Figure(figsize=((width + 0.5) / DPI, (height + 0.5) / DPI), dpi=DPI)
    top = height - MARGIN // 2
    for title, grid in zip(titles, grids, strict=True):
        figure.figimage(grid, TITLE, top - grid.shape[0], origin="upper")
        middle, left = (top - grid.shape[0] / 2) / height, (TITLE - MARGIN // 3) / width
        figure.text(left, middle, title, fontsize=8, color=INK, ha="right", va="center")
        top -= grid.shape[0] + GAP
    figure.savefig(_folder(path), dpi=DPI)
    return Path(path)


def comparison(panels: Mapping[str, Tensor], path: Path, columns: int = 8) -> Path:
    """Draws several grids of images side by side.

    Arguments:
        panels: Images under their titles, each as in :func:`image_grid`.
        path: Output file.
        columns: Images in a row of each grid, positive.

    Raises:
        InputError: As in :func:`image_grid`, or if there is no panel.
    """
    from matplotlib.figure import Figure

    grids = [_tiles(x, columns) for x in _some(panels).values()]
    titles = [_wrap(title, grid.shape[1]) for title, grid in zip(panels, grids, strict=True)]
    head = MARGIN + 26 * max(title.count("\n") + 1 for title in titles)
    height = head + max(grid.shape[0] for grid in grids) + MARGIN
    width = MARGIN + sum(grid.shape[1] + MARGIN for grid in grids)
    # Half a pixel more, so rounding does not remove one.
    figure = Figure(figsize=((width + 0.5) / DPI, (height + 0.5) / DPI), dpi=DPI)
    left = MARGIN
    for title, grid in zip(titles, grids, strict=True):
        figure.figimage(grid, left, height - head - grid.shape[0], origin="upper")
        figure.text(left / width, 1 - (head - 10) / height, title, fontsize=10, color=INK)
        left += grid.shape[1] + MARGIN
    figure.savefig(_folder(path), dpi=DPI)
    return Path(path)


def scatter_comparison(
    panels: Mapping[str, Tensor], path: Path, extent: Extent | None = None
) -> Path:
    """Draws several sets of points in the plane side by side, on the same axes.

    Arguments:
        panels: Points under their titles, each with shape ``(N, 2)``.
        path: Output file.
        extent: The plotted range; a note counts the points outside. By default it is the square
            around the first set, usually real data.

    Raises:
        InputError: If a set has another shape, or no set is given.
    """
    points = {title: _plane(x, title) for title, x in _some(panels).items()}
    view = extent or square(next(iter(panels.values())))
    figure, axes = _figure(len(points), width=3.0 * len(points), height=3.2)
    for i, (one, (title, x)) in enumerate(zip(axes, points.items(), strict=True)):
        one.scatter(x[:, 0], x[:, 1], s=_dot(x), alpha=0.5, lw=0, color=BLUE if i else INK)
        _plane_axes(one, view, title, first=i == 0)
        _note(one, _outside(x, view), x=0.98, y=0.02, ha="right", va="bottom")
    return _save(figure, path)


def square(points: Tensor) -> Extent:
    """Returns a square around points, with a margin of a tenth on each side.

    Arguments:
        points: Points with shape ``(N, 2)``; non-finite points are ignored.

    Returns:
        The lowest and highest first coordinate, and likewise of the second.

    Raises:
        InputError: If the points have another shape.

    Example:
        >>> square(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
        (-1.0, 11.0, -1.0, 11.0)
    """
    x = _plane(points, "points")
    x = x[np.isfinite(x).all(1)]
    if not len(x):
        return (-1.0, 1.0, -1.0, 1.0)
    low, high = x.min(0), x.max(0)
    half = 0.6 * float((high - low).max()) or 1.0
    a, b = ((low + high) / 2).tolist()
    return (a - half, a + half, b - half, b + half)


def density(
    log_density: Tensor,
    extent: Extent,
    path: Path,
    samples: Tensor | None = None,
    exact: Tensor | None = None,
) -> Path:
    """Plots a density on the plane, next to samples and the exact density if given.

    Arguments:
        log_density: The model's log-density in nats on a grid, with shape ``(n, n)``: row ``i``
            is the ``i``-th value of the second coordinate, from the lowest; a column, of the
            first. NaN is red.
        extent: The lowest and highest first coordinate, and likewise of the second.
        path: Output file.
        samples: Points drawn from the model, with shape ``(N, 2)``.
        exact: The exact log-density on that grid, shown with the same colours.

    Raises:
        InputError: If the shapes do not match.
    """
    fields = {"exact": exact, "model": log_density}
    values = {name: _exp(x, log_density.shape) for name, x in fields.items() if x is not None}
    points = {} if samples is None else {"samples": _plane(samples, "samples")}
    count = len(points) + len(values)
    figure, axes = _figure(count, width=3.0 * count + 0.7, height=3.2)
    for one, x in zip(axes, points.values(), strict=False):
        one.scatter(x[:, 0], x[:, 1], s=_dot(x), alpha=0.5, lw=0, color=BLUE)
        _plane_axes(one, extent, "samples of the model", first=True)
        _note(one, _outside(x, extent), x=0.98, y=0.02, ha="right", va="bottom")
    finite = [x[np.isfinite(x)] for x in values.values()]
    top = max((float(x.max()) for x in finite if x.size), default=0.0) or 1.0
    for i, (name, x) in enumerate(values.items(), start=len(points)):
        image = axes[i].imshow(
            x,
            cmap=_viridis(),
            vmin=0,
            vmax=top,
            origin="lower",
            extent=extent,
            aspect=_aspect(extent),
        )
        _plane_axes(axes[i], extent, f"{name} density", first=i == 0)
    bar = figure.colorbar(image, ax=axes, label="density (1 / data unit²)", shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    return _save(figure, path)


def score_field(
    score: Tensor,
    extent: Extent,
    path: Path,
    log_density: Tensor | None = None,
    samples: Tensor | None = None,
) -> Path:
    """Draws a score in the plane as arrows, over a log-density or a histogram of points.

    Arrows start on the grid; they point uphill and grow with the norm of the score, up to the
    spacing of the grid, four fifths of which is the length at the median norm.

    Arguments:
        score: The score on a grid, in 1 / data unit, with shape ``(n, n, 2)``: row ``i`` is the
            ``i``-th value of the second coordinate, from the lowest; a column, of the first. What
            is not finite has no arrow.
        extent: The lowest and highest first coordinate, and likewise of the second.
        path: Output file.
        log_density: A log-density in nats on a finer grid of the same order, ``(m, m)``, drawn
            down to 8 nats below its largest value.
        samples: Or points ``(N, 2)``, drawn as a histogram.

    Raises:
        InputError: If the shapes do not match, or neither a density nor points are given.
    """
    if score.ndim != 3 or score.shape[0] != score.shape[1] or score.shape[2] != 2:
        raise InputError(f"score must have shape (n, n, 2), got {tuple(score.shape)}.")
    if (log_density is None) == (samples is None):
        given = "none" if samples is None else "both"
        raise InputError(f"score_field requires either log_density or samples, got {given}.")
    figure, (axes,) = _figure(1, width=5.2, height=4.4)
    if log_density is not None:
        image, label = _relief(axes, log_density, extent)
    else:
        assert samples is not None
        image, label = _counts(axes, _plane(samples, "samples"), extent)
    n = len(score)
    x, y = (_places(*ends, n) for ends in (extent[:2], extent[2:]))
    arrows = _shrunk(_array(score), (extent[1] - extent[0]) / n, (extent[3] - extent[2]) / n)
    axes.quiver(
        *np.meshgrid(x, y),
        arrows[..., 0],
        arrows[..., 1],
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.0045,
        color=ORANGE,
    )
    _plane_axes(axes, extent, "", first=True)
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    bar.outline.set_visible(False)
    return _save(figure, path)


def _places(low: float, high: float, n: int) -> np.ndarray:
    """Returns the midpoints of n equal intervals."""
    return low + (np.arange(n) + 0.5) * (high - low) / n


def _relief(axes: "Axes", log_density: Tensor, extent: Extent) -> "tuple[AxesImage, str]":
    """Draws a log-density down to a few nats below its top."""
    values = _array(log_density)
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size else 0.0
    shown = np.nan_to_num(values, nan=-np.inf, posinf=top).clip(top - _DEPTH, top)
    image = axes.imshow(shown, cmap="Blues", origin="lower", extent=extent, aspect=_aspect(extent))
    return image, f"log-density of the data (nats, down to {_DEPTH:g} below the top)"


def _counts(axes: "Axes", x: np.ndarray, extent: Extent) -> "tuple[AxesImage, str]":
    """Draws the number of points in each cell."""
    ranges = [list(extent[:2]), list(extent[2:])]
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=40, range=ranges)
    image = axes.imshow(
        counts.T, cmap="Blues", origin="lower", extent=extent, aspect=_aspect(extent)
    )
    return image, "examples in a cell"


def _shrunk(score: np.ndarray, across: float, up: float) -> np.ndarray:
    """Returns arrows in data units, of at most one cell of the grid; the axes may differ."""
    cell = np.array([across, up])
    vectors = np.where(np.isfinite(score).all(-1, keepdims=True), score, 0.0) * cell
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    middle = 0.25 * float(np.median(norms[norms > 0])) if (norms > 0).any() else 1.0
    return vectors / (norms + middle) * cell


def trajectories(times: Tensor, paths: Tensor, path: Path) -> Path:
    """Plots trajectories of points from noise to data, coloured by time.

    Arguments:
        times: The times passed, from 1 (noise) down to about 0 (data), with shape ``(T,)``, or
            ``(T, B)`` where each point has its own.
        paths: The points at these times, with shape ``(T, B, 2)``.
        path: Output file.

    Raises:
        InputError: If the shapes do not match, or there are fewer than two times.
    """
    from matplotlib.collections import LineCollection

    t, x = _array(times), _array(paths)
    if x.ndim != 3 or x.shape[2] != 2 or t.shape not in (x.shape[:1], x.shape[:2]) or len(t) < 2:
        raise InputError(
            "times and paths must have shapes (T,) or (T, B), and (T, B, 2), T >= 2, got "
            f"{t.shape} and {x.shape}."
        )
    t = np.broadcast_to(t.reshape(len(t), -1), x.shape[:2])
    figure, (axes,) = _figure(1, width=5.2, height=4.4)
    keep = np.unique(np.linspace(0, len(t) - 1, 400).round().astype(int))
    t, x = t[keep], x[keep]
    segments = np.stack([x[:-1], x[1:]], axis=2).reshape(-1, 2, 2)
    lines = LineCollection(list(segments), cmap=_clock(), lw=0.9, alpha=0.7)
    lines.set_array(((t[:-1] + t[1:]) / 2).reshape(-1))
    lines.set_clim(0, max(1.0, float(t.max())))
    axes.add_collection(lines)
    axes.scatter(
        x[0, :, 0],
        x[0, :, 1],
        s=16,
        facecolor="white",
        edgecolor=ORANGE,
        label="start (noise)",
        zorder=3,
    )
    axes.scatter(x[-1, :, 0], x[-1, :, 1], s=16, color=INK, lw=0, label="end (data)", zorder=4)
    axes.autoscale_view()
    _labels(axes)
    axes.set_aspect("equal", adjustable="datalim")
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    bar = figure.colorbar(lines, ax=axes, label="time t (1 is noise, 0 is data)", shrink=0.85)
    bar.outline.set_visible(False)
    bar.solids.set_alpha(1)  # type: ignore[union-attr]
    return _save(figure, path)


def histogram(values: Mapping[str, Tensor], path: Path, label: str) -> Path:
    """Plots histograms of values, and their means as dashed lines.

    Arguments:
        values: Tensors of any shape by name; non-finite values are counted, not drawn.
        path: Output file.
        label: The name of the values, with the unit: ``bits/dim``.

    Raises:
        InputError: If there are no values.
    """
    numbers = {name: _array(x).ravel() for name, x in _some(values).items()}
    finite = {name: x[np.isfinite(x)] for name, x in numbers.items()}
    figure, (axes,) = _figure(1, width=6.4, height=3.6)
    axes.set(xlabel=label, ylabel="share of examples (%)")
    if not any(len(x) for x in finite.values()):
        _blank(axes, "no finite values")
        return _save(figure, path)
    together = np.concatenate(list(finite.values()))
    count = int(np.clip(math.sqrt(len(together)), 8, 60))
    bins = np.histogram_bin_edges(together, bins=count).tolist()
    for i, (name, x) in enumerate(finite.items()):
        if not len(x):
            continue
        colour, share = COLOURS[i % len(COLOURS)], np.full(len(x), 100 / len(x))
        lost = len(numbers[name]) - len(x)
        note = f"{name}: mean {x.mean():.3g}" + (f", {lost} not finite" if lost else "")
        axes.hist(x, bins, weights=share, color=colour, alpha=0.3, lw=0)
        axes.hist(x, bins, weights=share, color=colour, histtype="step", lw=1.3)
        axes.axvline(float(x.mean()), color=colour, ls="--", lw=1.3, label=note)
    _legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _save(figure, path)


def ranks(values: Tensor, draws: int, path: Path) -> Path:
    """Plots the frequency of each rank of a true value among draws, next to the uniform share.

    Arguments:
        values: Ranks from 0 to ``draws``, whole numbers of any shape.
        draws: The number of draws, positive.
        path: Output file.

    Raises:
        InputError: If there are no values.
    """
    if not values.numel():
        raise InputError(f"values must not be empty, got shape {tuple(values.shape)}.")
    counts = np.bincount(_array(values).ravel().astype(int), minlength=draws + 1)
    figure, (axes,) = _figure(1, width=6.4, height=3.0)
    axes.set(xlabel="rank of the truth among the draws", ylabel="share (%)")
    share = 100 * counts / counts.sum()
    axes.bar(range(draws + 1), share, color=COLOURS[0], alpha=0.5, width=0.9)
    axes.axhline(100 / (draws + 1), color=INK, ls="--", lw=1.0, label="uniform")
    axes.locator_params(axis="x", integer=True)
    _legend(axes, loc="lower left", bbox_to_anchor=(0, 1))
    return _save(figure, path)


def quality(
    points: Sequence[tuple[float, float]], labels: Sequence[str], expected: float, path: Path
) -> Path:
    """Plots the density of several sets of samples against their coverage, joined in order.

    Arguments:
        points: The coverage and the density of each.
        labels: The name of each point.
        expected: The coverage of samples from the data's own distribution, whose density is 1.
        path: Output file.
    """
    figure, (axes,) = _figure(1, width=6.4, height=4.2)
    axes.set(xlabel="coverage (variety)", ylabel="density (quality)")
    across, up = zip(*points, strict=True)
    axes.plot(across, up, color=COLOURS[0], marker="o", lw=1.3)
    axes.plot([expected], [1.0], color=INK, marker="*", ms=10, ls="", label="the data's own law")
    for (x, y), label in zip(points, labels, strict=True):
        axes.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.margins(0.15)
    _legend(axes, loc="lower left", bbox_to_anchor=(0, 1))
    return _save(figure, path)


def tradeoff(
    points: Sequence[tuple[float, float]], labels: Sequence[str], measure: str, path: Path
) -> Path:
    """Plots the distance to the data's distribution against the distortion, joined in order.

    Arguments:
        points: The distortion and the distance of each; the first is that of the source.
        labels: The name of each point.
        measure: The name of the distortion.
        path: Output file.
    """
    figure, (axes,) = _figure(1, width=6.4, height=4.2)
    axes.set(xlabel=measure, ylabel="sliced Wasserstein distance")
    across, up = zip(*points, strict=True)
    axes.plot(across[:1], up[:1], color=GREY, marker="s", ls="")
    axes.plot(across[1:], up[1:], color=COLOURS[0], marker="o", lw=1.3, label="by steps")
    for (x, y), label in zip(points, labels, strict=True):
        axes.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.15)
    axes.set_ylim(bottom=0)
    _legend(axes, loc="lower left", bbox_to_anchor=(0, 1))
    return _save(figure, path)


# ---- images ------------------------------------------------------------------------------------


def _tiles(images: Tensor, columns: int, zoom: int | None = None) -> np.ndarray:
    """Lays images out in a grid, uint8 ``(height, width, 3)``."""
    if columns < 1 or (zoom is not None and zoom < 1):
        raise InputError(f"columns and zoom must be positive integers, got {columns} and {zoom}.")
    pixels = _pixels(images)
    zoom = zoom or math.ceil(SMALLEST / min(pixels.shape[1:3]))
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    n, height, width, _ = pixels.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    shape = (GAP + rows * (height + GAP), GAP + columns * (width + GAP), 3)
    canvas = np.full(shape, SEPARATOR, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        y, x = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        canvas[y : y + height, x : x + width] = tile
    return canvas


def _pixels(images: Tensor) -> np.ndarray:
    """Turns images into colours, uint8 ``(N, H, W, 3)``."""
    if images.ndim != 4 or images.numel() == 0 or not images.is_floating_point():
        raise InputError(
            "images must be floating-point in [0, 1] with shape (N, C, H, W), not empty, got "
            f"shape {tuple(images.shape)} and type {images.dtype}."
        )
    x = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    x = x.detach().cpu().float().permute(0, 2, 3, 1)
    bad = x.isnan().any(-1)
    pixels = (x.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    pixels[bad.numpy()] = RED
    return pixels


def _wrap(title: str, width: int) -> str:
    """Breaks a title into lines for a grid of ``width`` pixels."""
    import textwrap

    lines = title.splitlines() or [""]
    return "\n".join(textwrap.fill(line, max(8, width // 12)) for line in lines)


# ---- numbers -----------------------------------------------------------------------------------


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _some(panels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not panels:
        raise InputError("A plot requires at least one tensor under its title, got none.")
    return panels


def _plane(x: Tensor, title: str) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] != 2:
        raise InputError(f"{title!r} must be points of shape (N, 2), got {tuple(x.shape)}.")
    return _array(x)


def _exp(x: Tensor, shape: Sequence[int]) -> np.ndarray:
    """Turns a log-density into a density, infinite where it overflows."""
    if x.ndim != 2 or x.shape != shape:
        raise InputError(
            "Log-densities must have the same shape (n, n), got "
            f"{tuple(x.shape)} and {tuple(shape)}."
        )
    return x.detach().cpu().double().exp().numpy()


def _series(
    records: Sequence[Mapping[str, float | None]], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Picks the steps and the finite values of one number, in order of the steps."""
    values = {r["step"]: r[key] for r in records if key in r and r.get("step") is not None}
    kept = sorted((s, v) for s, v in values.items() if _is_number(v))
    table = np.array(kept, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _uncounted(records: Sequence[Mapping[str, float | None]]) -> str:
    """Returns a note with the number of non-finite losses."""
    keys = ("loss", "validation_loss")
    bad = sum(not _is_number(r[key]) for r in records for key in keys if key in r)
    return f"not finite, not drawn: {bad}" if bad else ""


def _smooth(values: np.ndarray) -> np.ndarray:
    """Averages over a window of a twentieth of the values.

    The window is narrower at the start, where a loss falls steeply, and one-sided at the end.
    """
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    reach = np.minimum(np.maximum(i, 10), half)
    low, high = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _dot(x: np.ndarray) -> float:
    """Returns the size of a dot (square points) for this number of points."""
    return float(np.clip(6000 / max(len(x), 1), 1, 14))


def _outside(x: np.ndarray, view: Extent) -> str:
    """Returns a note with the number of points outside the view."""
    a, b, c, d = view
    inside = (x[:, 0] >= a) & (x[:, 0] <= b) & (x[:, 1] >= c) & (x[:, 1] <= d)
    lost = len(x) - int(inside.sum())
    return f"{lost} of {len(x)} outside" if lost else ""


# ---- the common look ---------------------------------------------------------------------------


def _figure(count: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """Makes an empty figure of some panels in a row; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        _dress(one)
    return figure, axes


def _dress(axes: "Axes") -> None:
    """Gives a panel the common look."""
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=9, color=GREY, labelcolor=INK)
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)
    axes.locator_params(nbins=6)


def _scale(axes: "Axes", raw: np.ndarray, curves: np.ndarray) -> None:
    """Chooses the loss axis: logarithmic for a wide span, else without rare spikes."""
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    if not len(curves):
        return
    if min(curves.min(), raw.min(initial=math.inf)) > 0 and curves.max() > 20 * curves.min():
        axes.set_yscale("log")
        return
    shown = np.concatenate([curves, np.quantile(raw, [0.005, 0.995]) if len(raw) else []])
    pad = 0.06 * float(np.ptp(shown)) or 0.5
    axes.set_ylim(float(shown.min()) - pad, float(shown.max()) + pad)


def _labels(axes: "Axes") -> None:
    axes.set(xlabel="$x_1$ (data units)", ylabel="$x_2$ (data units)")


def _plane_axes(axes: "Axes", view: Extent, title: str, first: bool) -> None:
    """Dresses a panel of the plane; only the first one of a row has the second axis."""
    _labels(axes)
    axes.set_title(title, size=10, color=INK, loc="left")
    axes.set(xlim=view[:2], ylim=view[2:], aspect=_aspect(view))
    if not first:
        axes.set_ylabel("")
        axes.tick_params(labelleft=False)


def _aspect(view: Extent) -> Literal["equal", "auto"]:
    """Draws both axes on one scale, unless one would be too thin to see."""
    width, height = view[1] - view[0], view[3] - view[2]
    return "equal" if 0.25 <= width / height <= 4 else "auto"


def _legend(axes: "Axes", **where: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **where)


def _note(
    axes: "Axes", text: str, x: float = 0.5, y: float = 0.5, ha: str = "center", va: str = "center"
) -> None:
    """Writes a remark into a panel."""
    axes.text(x, y, text, transform=axes.transAxes, ha=ha, va=va, size=9, color=GREY)


def _blank(axes: "Axes", text: str) -> None:
    """Writes the reason why a panel is empty."""
    axes.set(xticks=[], yticks=[])
    _note(axes, text)


def _viridis() -> "Colormap":
    import matplotlib

    red = "#" + "".join(f"{c:02x}" for c in RED)
    return matplotlib.colormaps["viridis"].with_extremes(bad=red)


def _clock() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("clock", [BLUE, SKY, "#e69f00", ORANGE])


def _folder(path: Path) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(_folder(path), format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    return Path(path)
