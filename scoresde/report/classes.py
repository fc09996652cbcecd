"""Pictures of a classification: calibration, confusion, margins."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from scoresde.errors import InputError
from scoresde.metrics import Reliability
from scoresde.report import figures as base

_TEXTS = 20  # classes up to which every cell of a confusion matrix has its number
_BINS = 40  # of a histogram of margins


def reliability_diagram(result: Reliability, path: Path) -> Path:
    """Plots accuracy against confidence, and a histogram of confidence.

    The bars are two standard deviations of a calibrated classifier with the same number of
    examples, around its stated confidence.

    Arguments:
        result: The result of :func:`scoresde.metrics.reliability`.
        path: Output file.
    """
    figure, (axes, below) = base._figure(2, width=8.2, height=3.6)
    count, confidence, accuracy, error = (
        base._array(x) for x in (result.count, result.confidence, result.accuracy, result.error)
    )
    there = count > 0
    axes.plot([0, 1], [0, 1], color=base.GREY, lw=0.9, ls="--", label="calibrated")
    low = np.clip(confidence - 2 * error, 0, 1)[there]
    high = np.clip(confidence + 2 * error, 0, 1)[there]
    axes.vlines(confidence[there], low, high, color=base.SKY, lw=5, alpha=0.5, label="± 2 std")
    axes.plot(confidence[there], accuracy[there], "o", color=base.BLUE, ms=5, label="this model")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
    base._legend(axes, loc="upper left")
    edges = np.linspace(0, 1, len(count) + 1)
    below.bar(edges[:-1], count, np.diff(edges), align="edge", color=base.BLUE, alpha=0.6, lw=0)
    below.set(xlabel="confidence", ylabel="examples", xlim=(0, 1.03), yscale="symlog")
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter("{x:.0f}")
    return base._save(figure, path)


def confusion_matrix(counts: Tensor, path: Path) -> Path:
    """Draws a confusion matrix; the shade is the share of each true class.

    Arguments:
        counts: Examples by true class (row) and predicted class (column), ``(C, C)``.
        path: Output file.

    Raises:
        InputError: If it is not a square matrix.
    """
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise InputError(f"counts must have shape (C, C), got {tuple(counts.shape)}.")
    values = base._array(counts)
    classes = len(values)
    share = values / np.maximum(values.sum(1, keepdims=True), 1)
    side = float(np.clip(0.42 * classes + 1.2, 3.2, 8.0))
    figure, (axes,) = base._figure(1, width=side + 0.9, height=side)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if classes <= _TEXTS:
        axes.set(xticks=range(classes), yticks=range(classes))
        for (i, j), n in np.ndenumerate(values):
            if n:
                colour = "white" if share[i, j] > 0.6 else base.INK
                axes.text(j, i, f"{n:.0f}", ha="center", va="center", size=8, color=colour)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    bar.outline.set_visible(False)
    return base._save(figure, path)


def margins(values: Mapping[str, Tensor], path: Path, typical_error: float | None = None) -> Path:
    """Plots the distribution of margins, on an axis that is logarithmic above 1 nat.

    Arguments:
        values: Margins in nats under their names, such as those of right and wrong answers; those
            not finite are not drawn.
        path: Output file.
        typical_error: The standard error of a margin, in nats; None if it is unknown.
    """
    figure, (axes,) = base._figure(1, width=6.4, height=3.6)
    finite = {name: base._array(x)[np.isfinite(base._array(x))] for name, x in values.items()}
    top = max((float(x.max()) for x in finite.values() if len(x)), default=1.0)
    edges = np.sinh(np.linspace(0, np.arcsinh(max(top, 1.0)), _BINS + 1)).tolist()
    for (name, x), colour in zip(finite.items(), base.COLOURS, strict=False):
        axes.hist(x, edges, color=colour, alpha=0.5, lw=0, label=f"{name}: {len(x)}")
    if typical_error:
        label = f"median standard error: {typical_error:.2g}"
        axes.axvline(typical_error, color=base.INK, lw=1.0, ls="--", label=label)
    axes.set_xscale("asinh")
    ticks = [t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000) if t <= 1.2 * top]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="margin (nats)", ylabel="examples", xlim=(0, None))
    base._legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return base._save(figure, path)
