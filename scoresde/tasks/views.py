"""Pictures of each kind of data: real examples next to samples, on the same axes.

The shape of an example determines the view: points in the plane, tables, series, images, volumes.
Views plot raw examples. The reference, usually real data, determines the plotted range; without a
reference, the first set does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.metrics import Moments, features, subset
from scoresde.model import ScoreFunction
from scoresde.report import figures as plots
from scoresde.report import panels as drawings
from scoresde.sample import Trajectory

_MOST = 6  # columns or channels in a picture
_TILES = 256  # images in a picture
_VALUES = 10_000  # examples that determine the plotted range
_SQUARES = 4  # side of the chequered background of transparent images


@dataclass(frozen=True, eq=False)
class View(ABC):
    """Base class for pictures of a kind of data.

    Arguments:
        codec: The codec of the data.
        reference: Raw real examples ``(N, *)`` that determine the plotted range.

    Attributes:
        feature: The word for the features of an example: columns or channels.
        each: The number of examples per class in a picture.
    """

    codec: Codec
    reference: Tensor | None = None
    feature: ClassVar[str] = "channel"
    each: ClassVar[int] = 250

    @staticmethod
    @abstractmethod
    def fits(shape: tuple[int, ...]) -> bool:
        """Returns whether the view supports raw examples of this shape."""

    @abstractmethod
    def compare(self, panels: Mapping[str, Tensor], path: Path) -> Path:
        """Draws raw examples ``(N, *)`` under their titles, real ones first."""

    def picture(self, raw: Tensor, path: Path) -> Path:
        """Draws one set of raw examples."""
        return self.compare({"": raw}, path)

    def by_class(self, sets: Mapping[str, Tensor], path: Path) -> Path:
        """Draws raw examples under the titles of their classes, in their order."""
        known = {} if self.reference is None else {"training data": subset(self.reference, 1000)}
        return self.compare({**known, **dict(list(sets.items())[:_MOST])}, path)

    def trajectory(self, way: Trajectory, model: ScoreFunction, path: Path) -> Path | None:
        """Plots trajectories from noise to data; not supported by default."""
        return None

    def neighbours(self, raw: Tensor, near: Tensor, distances: Tensor, path: Path) -> Path | None:
        """Plots samples next to their nearest training examples; not supported by default."""
        return None

    def _measured(self, panels: Mapping[str, Tensor]) -> Tensor:
        """Returns the examples that determine the plotted range."""
        first = self.reference if self.reference is not None else next(iter(panels.values()))
        return subset(first, _VALUES)

    def _chosen(self, panels: Mapping[str, Tensor]) -> list[int]:
        """Returns the features to plot: all, or those in which the sets differ most."""
        measured = self._measured(panels)
        sets = [x for x in panels.values() if x is not measured]
        reference = Moments.of(measured)
        count = len(reference.mean)
        if count <= _MOST or not sets:
            return list(range(min(_MOST, count)))
        off = torch.stack([reference.discrepancy(Moments.of(x)) for x in sets]).amax(0)
        return sorted(off.argsort(descending=True, stable=True)[:_MOST].tolist())

    def _names(self, chosen: list[int]) -> list[str]:
        return [f"{self.feature} {i}" for i in chosen]

    def _spans(self, panels: Mapping[str, Tensor], chosen: list[int]) -> list[drawings.Span]:
        values = features(self._measured(panels)).numpy()
        return [drawings.span(values[:, i]) for i in chosen]


class Points(View):
    """Points in the plane, as a scatter plot."""

    feature = "column"

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        return shape == (2,)

    def compare(self, panels: Mapping[str, Tensor], path: Path) -> Path:
        return plots.scatter_comparison(panels, path, self.extent(panels))

    def extent(self, panels: Mapping[str, Tensor] | None = None) -> plots.Extent:
        """Returns the plotted range: a square, or a rectangle if columns differ in scale."""
        (a, b), (c, d) = self._spans(panels or {}, [0, 1])
        if self.codec.scale is None:
            return (a, b, c, d)
        half, x, y = max(b - a, d - c) / 2, (a + b) / 2, (c + d) / 2
        return (x - half, x + half, y - half, y + half)

    def trajectory(self, way: Trajectory, model: ScoreFunction, path: Path) -> Path | None:
        return plots.trajectories(way.t, raw_states(self.codec, way.x), path)


class Table(View):
    """Rows of a table, as pairs of columns; the fallback for other data."""

    feature = "column"

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        return True

    def compare(self, panels: Mapping[str, Tensor], path: Path) -> Path:
        chosen = self._chosen(panels)
        flat = {title: x.reshape(len(x), -1) for title, x in panels.items()}
        spans = self._spans(panels, chosen)
        return drawings.pairs(flat, path, chosen, self._names(chosen), spans)


class Series(View):
    """Series of one or several channels, as curves."""

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 2

    def compare(self, panels: Mapping[str, Tensor], path: Path) -> Path:
        chosen = self._chosen(panels)
        spans = self._spans(panels, chosen)
        return drawings.curves(panels, path, chosen, self._names(chosen), spans)


class Images(View):
    """Images: grey, coloured, with transparency, or the channels side by side."""

    each = 8

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 3

    def compare(self, panels: Mapping[str, Tensor], path: Path) -> Path:
        low, high = self._range(panels)
        shown = {title: self._tiles(x[:_TILES], low, high) for title, x in panels.items()}
        if len(shown) == 1:
            return plots.image_grid(next(iter(shown.values())), path)
        return plots.comparison(shown, path)

    def by_class(self, sets: Mapping[str, Tensor], path: Path) -> Path:
        low, high = self._range(sets)
        rows = {title: self._tiles(x[:_TILES], low, high) for title, x in sets.items()}
        return plots.image_rows(rows, path)

    def neighbours(self, raw: Tensor, near: Tensor, distances: Tensor, path: Path) -> Path | None:
        both = {"": torch.cat([raw, near])}
        labels = [*["sample"] * len(raw), *(f"{d:.2g}" for d in distances.tolist())]
        tiles = self._tiles(both[""], *self._range(both))
        return plots.labelled_grid(tiles, labels, path, columns=len(raw))

    def trajectory(self, way: Trajectory, model: ScoreFunction, path: Path) -> Path | None:
        raw = self.codec.decode(_strips(way, model))
        labels = [text for t in way.t.T for text in (*(f"t {v:.2g}" for v in t), *[""] * len(t))]
        tiles = self._tiles(raw, 0.0, 1.0)
        return plots.labelled_grid(tiles, labels, path, columns=len(way.t))

    def tiles(self, raw: Tensor) -> Tensor:
        """Converts raw examples of any type to floats in [0, 1] ``(N, C, H, W)`` for plotting."""
        return self._tiles(raw, *self._range({"": raw}))

    def _range(self, panels: Mapping[str, Tensor]) -> tuple[float, float]:
        """Returns the part of the data's range that is shown from black to white.

        For up to 256 levels it is the whole range; otherwise the range of real data.
        """
        if self.codec.levels is not None and self.codec.levels <= 256:
            return 0.0, 1.0
        values = self._unit(subset(self._measured(panels), _TILES)).numpy()
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, [0.01, 0.99]).tolist() if values.size else (0.0, 1.0)
        return (low, high) if high > low else (0.0, 1.0)

    def _unit(self, raw: Tensor) -> Tensor:
        low, high = (torch.as_tensor(end).double() for end in (self.codec.low, self.codec.high))
        return (raw.cpu().double() - low) / (high - low)

    def _tiles(self, raw: Tensor, low: float, high: float) -> Tensor:
        """Returns floats in [0, 1] of one or three channels, ``(N, C, H, W)``."""
        unit = (((self._unit(raw) - low) / (high - low)).clamp(0, 1)).float()
        return self._flat(unit)

    def _flat(self, unit: Tensor) -> Tensor:
        """Lays channels out, if they are neither grey nor colours."""
        channels = unit.shape[1]
        if channels in (1, 3):
            return unit
        if channels == 4 and self.codec.levels is not None:
            return _over_squares(unit)
        return torch.cat(list(unit[:, :_MOST].split(1, dim=1)), dim=3)


class Volumes(Images):
    """Volumes, as slices through the middle of their first channel."""

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        return len(shape) == 4

    def _flat(self, unit: Tensor) -> Tensor:
        x = unit[:, 0]
        slices = [x.select(axis, x.shape[axis] // 2) for axis in (1, 2, 3)]
        height = max(one.shape[1] for one in slices)
        padded = [
            torch.nn.functional.pad(one, (0, 0, 0, height - one.shape[1]), value=0.5)
            for one in slices
        ]
        return torch.cat(padded, dim=2)[:, None]


_KINDS: tuple[type[View], ...] = (Points, Series, Images, Volumes, Table)


def view_of(codec: Codec, reference: Tensor | None = None) -> View:
    """Returns the view of a codec's raw examples.

    Example:
        >>> from scoresde.codec import Affine
        >>> [type(view_of(Affine(s))).__name__ for s in [(2,), (13,), (6, 100), (1, 8, 8)]]
        ['Points', 'Table', 'Series', 'Images']
    """
    shape = tuple(codec.raw_shape)
    return next(kind for kind in _KINDS if kind.fits(shape))(codec, reference)


def is_image(codec: Codec) -> bool:
    """Returns whether examples are images of one or three channels."""
    return len(codec.raw_shape) == 3 and codec.raw_shape[0] in (1, 3)


def raw_states(codec: Codec, x: Tensor) -> Tensor:
    """Converts states of trajectories, ``(T, B, *)``, to raw units, without rounding."""
    return codec.decode(x.flatten(0, 1), rounded=False).unflatten(0, x.shape[:2])


def _strips(way: Trajectory, model: ScoreFunction) -> Tensor:
    """Returns two rows for each sample: states of equal brightness, and denoised estimates."""
    size = (model.sde.alpha(way.t) ** 2 + model.sde.sigma(way.t) ** 2).rsqrt().to(way.x)
    states = way.x * size.reshape(*size.shape, *[1] * (way.x.ndim - 2))
    rows = torch.stack([states, way.denoised])
    return rows.permute(2, 0, 1, *range(3, rows.ndim)).flatten(0, 2)


def _over_squares(unit: Tensor) -> Tensor:
    """Lays images with transparency, ``(N, 4, H, W)``, over a chequered ground."""
    height, width = unit.shape[2:]
    size = max(1, height // _SQUARES)
    places = torch.arange(height)[:, None] // size + torch.arange(width) // size
    ground = torch.where(places % 2 == 0, 1.0, 0.8)
    colour, alpha = unit[:, :3], unit[:, 3:]
    return colour * alpha + ground * (1 - alpha)
