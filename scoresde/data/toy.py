r"""Toy data in the plane with exact log-densities.

A known density allows a check of likelihoods. No model can be better on average: the mean of
:math:`-\log p` is the entropy.

A noisy curve :math:`c(s) + \sigma z`, with :math:`s \sim U(0, 1)`, has the density

.. math:: p(x) = \int_0^1 N(x; c(s), \sigma^2 I) \, ds
               \approx \sum_k w_k \, N(x; c(s_k), \sigma^2 I),

an infinite mixture of Gaussians that a quadrature rule approximates by a finite one. The
Gauss-Legendre rule with 16 nodes on panels of width :math:`\sigma / 2` is exact up to rounding.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Whole
from scoresde.data.base import SPLITS, Dataset
from scoresde.data.checks import check_integer, check_positive
from scoresde.data.splits import FRACTIONS, check_fractions, split_indices
from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams

_NODES = 16
_LEAST_NOISE = 1e-3  # below it the quadrature takes too many nodes
_CHUNK = 2**18


class Density(ABC):
    """Base class for distributions of vectors with exact log-density and samples."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density in nats: ``(N, D)`` to ``(N,)``, computed in float64."""

    @abstractmethod
    def sample(self, streams: Streams) -> Tensor:
        """Draws one sample per stream, with shape ``(B, D)``, float64."""

    def label(self, streams: Streams) -> Tensor | None:
        """Returns the component of each sample, int64 ``(B,)``, or None without components."""
        return None

    def dataset(
        self,
        name: str,
        count: int,
        seed: int = 0,
        standardise: bool = True,
        fractions: Sequence[float] = FRACTIONS,
    ) -> Dataset:
        """Draws a data set of ``count`` examples and splits it."""
        streams = Streams.of(seed, batch=check_integer("count", count))
        raw, label = self.sample(streams).float(), self.label(streams)
        rows = split_indices(raw, check_fractions(fractions, parts=3), seed)
        return Dataset.of(
            name,
            [raw[part] for part in rows],
            # A single scale keeps the ratios of distances.
            standardise=Whole() if standardise else False,
            log_prob=self.log_prob,
            labels=None if label is None else [label[part] for part in rows],
        )


@final
@dataclass(frozen=True, eq=False)
class Mixture(Density):
    r"""Mixture of isotropic Gaussians.

    .. math:: p(x) = \sum_k w_k \, N(x; \mu_k, \sigma_k^2 I)

    Arguments:
        weights: Weights :math:`w_k`, positive, with shape ``(K,)``; they sum to one.
        means: Means :math:`\mu_k`, with shape ``(K, D)``.
        stds: Standard deviations :math:`\sigma_k`, positive, with shape ``(K,)``.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.weights.shape), tuple(self.means.shape), tuple(self.stds.shape)
        k = len(self.means) if self.means.ndim == 2 else 0
        if self.means.numel() == 0 or shapes[0] != (k,) or shapes[2] != (k,):
            raise InputError(
                f"weights, means and stds must have shapes (K,), (K, D) and (K,), got {shapes}."
            )
        if not (self.weights.min() > 0 and abs(float(self.weights.sum()) - 1) < 1e-6):
            raise InputError(
                f"weights must be positive and sum to 1, got {self.weights.tolist()} with sum "
                f"{float(self.weights.sum())}."
            )
        if not (self.stds.min() > 0 and self.stds.isfinite().all()):
            raise InputError(f"stds must be positive and finite, got {self.stds.tolist()}.")
        if not self.means.isfinite().all():
            raise InputError(f"means must be finite, got {self.means.tolist()}.")

    @cached_property
    def _natural(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the components as a linear map of (y, |y|^2), y = x - centre.

        A matrix product is many times faster than differences of all pairs. Its rounding error is
        proportional to |mean - centre|^2 / std^2, and the centre keeps this small.
        """
        centre = self.means.mean(0)
        means, precision = self.means - centre, self.stds**-2
        height = self.weights.log() - means.shape[1] * (
            self.stds.log() + 0.5 * math.log(2 * math.pi)
        )
        bias = height - 0.5 * precision * means.square().sum(1)
        return centre, torch.cat((means.T * precision, -0.5 * precision[None])), bias

    def log_prob(self, x: Tensor) -> Tensor:
        centre, weight, bias = (part.to(x.device) for part in self._natural)
        y = x.double() - centre
        rows = torch.cat((y, y.square().sum(1, keepdim=True)), 1)
        chunks = rows.split(max(1, _CHUNK // len(bias)))
        logits = (torch.addmm(bias, chunk, weight) for chunk in chunks)
        return torch.cat([torch.logsumexp(one, 1) for one in logits]).to(x.dtype)

    def marginal(self, axis: int) -> "Mixture":
        """Returns the distribution of one coordinate, counted from 0."""
        return Mixture(self.weights, self.means[:, axis : axis + 1], self.stds)

    def label(self, streams: Streams) -> Tensor:
        u = streams.uniform((), Purpose.DATA, 0, torch.float64)
        return torch.searchsorted(self.weights.cumsum(0), u).clamp(max=len(self.weights) - 1)

    def sample(self, streams: Streams) -> Tensor:
        z = streams.normal(self.means.shape[1:], Purpose.DATA, 1, torch.float64)
        k = self.label(streams)
        return self.means[k] + self.stds[k][:, None] * z


@dataclass(frozen=True)
class _Curves(Density):
    """Base class for noisy curves: equally likely arms, and the quadrature along them."""

    noise: float = 0.1

    def __post_init__(self) -> None:
        check_positive("noise", self.noise, _LEAST_NOISE)

    @property
    @abstractmethod
    def arms(self) -> int:
        """Number of arms."""

    @property
    @abstractmethod
    def speed(self) -> float:
        """Bound on the speed, and so on the length, of every arm."""

    @abstractmethod
    def curve(self, s: Tensor, arm: Tensor) -> Tensor:
        """Returns the points at ``s`` in [0, 1]: two tensors of one shape to ``(*, 2)``."""

    @cached_property
    def _mixture(self) -> Mixture:
        panels = math.ceil(self.speed / (0.5 * self.noise))
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        starts = torch.arange(panels).double()[:, None]
        s = ((starts + 0.5 * (torch.from_numpy(nodes) + 1)) / panels).flatten().repeat(self.arms)
        w = torch.from_numpy(weights).repeat(self.arms * panels) / (2 * panels * self.arms)
        arm = torch.arange(self.arms).double().repeat_interleave(panels * _NODES)
        return Mixture(w, self.curve(s, arm), torch.full_like(w, self.noise))

    def log_prob(self, x: Tensor) -> Tensor:
        return self._mixture.log_prob(x)

    def marginal(self, axis: int) -> Mixture:
        """Returns the distribution of one coordinate, 0 or 1."""
        return self._mixture.marginal(axis)

    def label(self, streams: Streams) -> Tensor:
        return self._places(streams)[1].long()

    def sample(self, streams: Streams) -> Tensor:
        z = streams.normal((2,), Purpose.DATA, 1, torch.float64)
        return self.curve(*self._places(streams)) + self.noise * z

    def _places(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Returns the place on an arm, in [0, 1], and the arm of each sample."""
        s, arm = streams.uniform((2,), Purpose.DATA, 0, torch.float64).unbind(1)
        return s, torch.floor(self.arms * arm)


@final
@dataclass(frozen=True)
class Moons(_Curves):
    r"""Two interlocking noisy half circles, as in scikit-learn.

    .. math:: c_0 = (\cos \pi s, \sin \pi s), \qquad
              c_1 = (1 - \cos \pi s, \tfrac12 - \sin \pi s)

    Arguments:
        noise: Standard deviation across the curve, at least 0.001.
    """

    @property
    def arms(self) -> int:
        return 2

    @property
    def speed(self) -> float:
        return math.pi

    def curve(self, s: Tensor, arm: Tensor) -> Tensor:
        sign = 1 - 2 * arm
        x = arm + sign * torch.cos(math.pi * s)
        y = 0.5 * arm + sign * torch.sin(math.pi * s)
        return torch.stack((x, y), -1)


@final
@dataclass(frozen=True)
class Spirals(_Curves):
    r"""Noisy Archimedean spirals from the origin, with uniform angle.

    .. math:: c_k = K T s \, (\cos \phi, \sin \phi), \qquad \phi = 2 \pi (T s + k / K)

    Neighbouring arms are one unit apart.

    Arguments:
        noise: Standard deviation across the curve, at least 0.001.
        arms: Number of arms :math:`K`, positive.
        turns: Number of turns :math:`T` of each arm, positive.
    """

    arms: int = 2
    turns: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("turns", self.turns)
        check_integer("arms", self.arms)

    @property
    def speed(self) -> float:
        return self.arms * self.turns * math.hypot(1, 2 * math.pi * self.turns)

    def curve(self, s: Tensor, arm: Tensor) -> Tensor:
        radius = self.arms * self.turns * s
        angle = 2 * math.pi * (self.turns * s + arm / self.arms)
        return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)


@final
@dataclass(frozen=True)
class Checkerboard(Density):
    r"""Uniform density on the dark unit squares of a checkerboard.

    Square :math:`(i, j)` is dark if :math:`i + j` is even; the board is centred at the origin.

    Arguments:
        cells: Squares along each side, in [1, 64].
    """

    cells: int = 4

    def __post_init__(self) -> None:
        check_integer("cells", self.cells, most=64)

    @property
    def _dark(self) -> int:
        return (self.cells**2 + 1) // 2

    def log_prob(self, x: Tensor) -> Tensor:
        cell = torch.floor(x.double() + self.cells / 2)
        on_board = ((cell >= 0) & (cell < self.cells)).all(1)
        dark = on_board & (cell.sum(1) % 2 == 0)
        return torch.where(dark, -math.log(self._dark), -math.inf).to(x.dtype)

    def sample(self, streams: Streams) -> Tensor:
        u = streams.uniform((3,), Purpose.DATA, 0, torch.float64)
        side = torch.arange(self.cells, device=u.device).double()
        squares = torch.cartesian_prod(side, side).reshape(-1, 2)
        corners = squares[squares.sum(1) % 2 == 0]
        corner = corners[torch.floor(u[:, 0] * self._dark).long()]
        # Away from the edges, since rounding to float32 could put a point on a light square.
        return corner + u[:, 1:].clamp(2.0**-18, 1 - 2.0**-18) - self.cells / 2


def two_moons(
    noise: float = 0.1, count: int = 20_000, seed: int = 0, standardise: bool = True
) -> Dataset:
    """Two interlocking noisy half circles, with labels: see :class:`Moons`.

    Arguments:
        noise: Standard deviation across the curve, at least 0.001.
        count: Number of examples: 80 % for training, 10 % for validation, 10 % for testing.
        seed: Seed of the examples and the splits.
        standardise: Whether model units have mean 0 and standard deviation 1; if not, they are raw
            units.

    Example:
        >>> dataset = two_moons(count=1000)
        >>> dataset.shape, len(dataset.train), len(dataset.test)
        ((2,), 800, 100)
    """
    return Moons(noise).dataset("two moons", count, seed, standardise)


@final
@dataclass(frozen=True)
class MoonHeights(Density):
    r"""Height of a point of two moons, with its density given the horizontal coordinate.

    .. math:: p(x_2 \mid x_1) = \frac{p(x_1, x_2)}{p(x_1)}

    Both densities are mixtures of Gaussians. Where the moons overlap, the height has two modes.

    Arguments:
        noise: Standard deviation across the curve, at least 0.001.

    Example:
        >>> heights = MoonHeights()
        >>> x = torch.linspace(-2, 2, 4001)[:, None]
        >>> p = heights.log_prob_given(x, torch.full_like(x, 0.5)).exp()
        >>> round(float(p.sum()) * 0.001, 4)
        1.0
    """

    noise: float = 0.1

    @cached_property
    def _moons(self) -> Moons:
        return Moons(self.noise)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._moons.marginal(1).log_prob(x)

    def log_prob_given(self, x: Tensor, context: Tensor) -> Tensor:
        """Returns log-densities of heights given ``context``, both ``(N, 1)``, in nats,
        ``(N,)``."""
        both = torch.cat((context.to(x), x), 1)
        return self._moons.log_prob(both) - self._moons.marginal(0).log_prob(both[:, :1])

    def sample(self, streams: Streams) -> Tensor:
        return self._moons.sample(streams)[:, 1:]


def moon_heights(noise: float = 0.1, count: int = 20_000, seed: int = 0) -> Dataset:
    """Heights of points of two moons, with their horizontal coordinate as ``context``, ``(N, 1)``.

    A data set for conditional density estimation with a known density: see :class:`MoonHeights`.

    Arguments:
        noise: Standard deviation across the curve, at least 0.001.
        count: Number of examples: 80 % for training, 10 % for validation, 10 % for testing.
        seed: Seed of the examples and the splits.

    Example:
        >>> dataset = moon_heights(count=1000)
        >>> dataset.shape, dataset.conditions["context"][0].shape
        ((1,), torch.Size([800, 1]))
    """
    exact, moons = MoonHeights(noise), two_moons(noise, count, seed)
    splits = [moons.split(name)[:] for name in SPLITS]
    data = Dataset.of(
        "heights of two moons",
        [raw[:, 1:] for raw in splits],
        log_prob=exact.log_prob,
        conditions={"context": [raw[:, :1] for raw in splits]},
    )
    return replace(data, conditional_log_prob=exact.log_prob_given)


def spirals(
    noise: float = 0.1,
    arms: int = 2,
    turns: float = 1.5,
    count: int = 20_000,
    seed: int = 0,
    standardise: bool = True,
) -> Dataset:
    """Noisy spirals: see :class:`Spirals`; the other arguments as in :func:`two_moons`."""
    return Spirals(noise, arms, turns).dataset("spirals", count, seed, standardise)


def checkerboard(
    cells: int = 4, count: int = 20_000, seed: int = 0, standardise: bool = True
) -> Dataset:
    """Dark squares: see :class:`Checkerboard`; the other arguments as in :func:`two_moons`."""
    return Checkerboard(cells).dataset("checkerboard", count, seed, standardise)


def gaussian_mixture(
    weights: Sequence[float],
    means: Sequence[Sequence[float]],
    stds: Sequence[float],
    count: int = 20_000,
    seed: int = 0,
    standardise: bool = True,
) -> Dataset:
    """Isotropic Gaussians: see :class:`Mixture`; the other arguments as in :func:`two_moons`.

    Example:
        >>> dataset = gaussian_mixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1], count=100)
        >>> dataset.log_prob(torch.tensor([[1.0]]))
        tensor([0.6905])
    """
    mixture = Mixture(_floats("weights", weights), _floats("means", means), _floats("stds", stds))
    return mixture.dataset("Gaussian mixture", count, seed, standardise)


def gaussian_ring(
    modes: int = 8,
    radius: float = 2.0,
    std: float = 0.1,
    count: int = 20_000,
    seed: int = 0,
    standardise: bool = True,
) -> Dataset:
    """Equal Gaussians, evenly spaced on a circle; other arguments as in :func:`two_moons`.

    Arguments:
        modes: Number of Gaussians, positive.
        radius: Radius of the circle, positive.
        std: Standard deviation of each, positive.
    """
    check_positive("radius", radius)
    angle = 2 * math.pi * torch.arange(check_integer("modes", modes)).double() / modes
    means = radius * torch.stack((torch.cos(angle), torch.sin(angle)), 1)
    weights, stds = torch.full_like(angle, 1 / modes), torch.full_like(angle, std)
    return Mixture(weights, means, stds).dataset("Gaussian ring", count, seed, standardise)


def _floats(name: str, values: Sequence) -> Tensor:
    """Converts nested sequences of numbers, of any class, to a float64 tensor."""
    try:
        return torch.from_numpy(np.array(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be a regular array of numbers, got {values} ({error})."
        ) from error
