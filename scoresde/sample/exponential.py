r"""Exponential integrators: the linear part of every equation solved exactly.

With :math:`\ell = \log (\alpha / \sigma)`, half the log-SNR, rising as noise becomes data, and
:math:`\tilde\sigma = \sigma / \alpha = e^{-\ell}`, the probability flow of *any* linear SDE reads

.. math::
    \frac{d}{d\tilde\sigma} \frac{x}{\alpha} = \hat z, \qquad
    \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}
        - \int_{\ell_t}^{\ell_s} e^{-\ell} \, \hat z \, d\ell,

and, with the expected data :math:`D = (x - \sigma \hat z) / \alpha` in place of the noise,

.. math::
    x_s = \frac{\sigma_s}{\sigma_t} x_t
        + \alpha_s \int_{\ell_t}^{\ell_s} e^{-(\ell_s - \ell)} D \, d\ell .

The same holds for the reverse SDEs of any noise scale :math:`\tau`, which share the marginals
(:math:`\tau = 0` is the flow, :math:`\tau = 1` the reverse SDE of Anderson),

.. math::
    x_s = \frac{\sigma_s}{\sigma_t} e^{-\tau^2 h} x_t
        + \alpha_s \kappa \int_{\ell_t}^{\ell_s} e^{-\kappa (\ell_s - \ell)} D \, d\ell
        + \sigma_s \sqrt{1 - e^{-2 \tau^2 h}} \, z,
    \qquad \kappa = 1 + \tau^2, \quad h = \ell_s - \ell_t .

*Check:* for :math:`D` constant the integral is :math:`\alpha_s (1 - e^{-\kappa h}) D`, and for
:math:`\tau = 1` this is the posterior :math:`q(x_s \mid x_t, x_0 = D)`.

**Zero SNR at t = 1.** The first form has no start there. The second one has: with :math:`r =
\alpha / \sigma` it reads :math:`x_s / \sigma_s = x_t / \sigma_t + \int_{r_t}^{r_s} D \, dr`, from
r = 0 on. So every method integrates the denoised estimate there, in the bounded variable b of
:class:`~scoresde.sde.SDE` instead of the log-SNR; held over a step, that is

.. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t
          + \Big( \alpha_s - \alpha_t \frac{\sigma_s}{\sigma_t} \Big) D .

What is left is :math:`\hat z` or :math:`D` along the way, and every method replaces it by the
polynomial through some values of it, in :math:`\ell`, in :math:`t` or in :math:`\tilde\sigma`. The
integral of the polynomial is done to rounding by Gauss-Legendre quadrature in :math:`\ell`, which
has no small differences to cancel where :math:`h` is small, as the closed forms have.

References:
    Lu et al., *DPM-Solver*, 2022, https://arxiv.org/abs/2206.00927 (proposition 3.1).
    Zhang and Chen, *Fast sampling of diffusion models with exponential integrator*, 2023,
    https://arxiv.org/abs/2204.13902.
    Xue et al., *SA-Solver*, 2023, https://arxiv.org/abs/2309.05019 (proposition 4.2).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoresde.model import Conditioned
from scoresde.sample.plan import LinearUpdate, Node, Stage
from scoresde.sde import SDE

Array = np.ndarray
_REMEMBERED = 16
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


class Variable(ABC):
    """Abstract: what a polynomial is a polynomial of."""

    @abstractmethod
    def __call__(self, sde: SDE, ell: Array) -> Array:
        """Returns its value where half the log-SNR is ``ell``."""


@dataclass(frozen=True)
class HalfLogSNR(Variable):
    r"""Half the log-SNR, :math:`\ell`; the bounded variable b where the SNR is zero at t = 1."""

    def __call__(self, sde: SDE, ell: Array) -> Array:
        return 2 * np.arcsinh(np.exp(ell)) if sde.zero_snr else ell


@dataclass(frozen=True)
class RelativeNoise(Variable):
    r"""The relative noise level, :math:`\tilde\sigma = e^{-\ell}`."""

    def __call__(self, sde: SDE, ell: Array) -> Array:
        return np.exp(-ell)


@dataclass(frozen=True)
class Time(Variable):
    """The time."""

    def __call__(self, sde: SDE, ell: Array) -> Array:
        return sde.time(2 * torch.from_numpy(ell)).numpy()


@dataclass(frozen=True)
class Integral(ABC):
    """Abstract: one of the integrals above, with a polynomial for what is not known."""

    @abstractmethod
    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        """Returns the model's output that the integral is over."""

    @abstractmethod
    def scale(self, a: Node, b: Node) -> float:
        """Returns the coefficient of the state on the way from ``a`` to ``b``."""

    @abstractmethod
    def kernel(self, ell: Array, b: Node) -> Array:
        """Returns what multiplies the output in the integral."""

    @property
    @abstractmethod
    def variable(self) -> Variable:
        """The variable of the polynomial."""

    def on(self, sde: SDE) -> "Integral":
        """Returns the integral that is finite for a process."""
        return self

    def weights(self, sde: SDE, a: Node, b: Node, points: Sequence[Node]) -> list[float]:
        """Returns the weights of the outputs at ``points`` in the integral from ``a`` to ``b``."""
        ell, measure = _quadrature(sde, a, b)
        known = self.variable(sde, np.array([point.ell for point in points]))
        basis = lagrange(self.variable(sde, ell), known)
        return (basis @ (measure * self.kernel(ell, b))).tolist()


def _quadrature(sde: SDE, a: Node, b: Node) -> tuple[Array, Array]:
    r"""Returns places and weights of an integral over half the log-SNR from ``a`` to ``b``.

    Where the SNR is zero at t = 1 it is taken in b, by :math:`d\ell = \tfrac12 \coth(b/2) \, db`,
    and from b = 0 on in :math:`b^{1/4}`, since kernels begin like a power of b there.
    """
    if not sde.zero_snr:
        half = 0.5 * (b.ell - a.ell)
        return a.ell + half * (1 + _POINTS), half * _WEIGHTS
    power = 4 if a.place < 1e-6 else 1  # zero but for rounding
    first, last = a.place ** (1 / power), b.place ** (1 / power)
    half = 0.5 * (last - first)
    root = first + half * (1 + _POINTS)
    place, measure = root**power, half * _WEIGHTS * power * root ** (power - 1)
    return np.log(np.sinh(0.5 * place)), measure * 0.5 / np.tanh(0.5 * place)


def lagrange(x: Array, points: Array) -> Array:
    """Returns the Lagrange polynomials of ``points`` ``(n,)`` at ``x`` ``(m,)``: ``(n, m)``."""
    rows = []
    for j, point in enumerate(points):
        others = np.delete(points, j)
        rows.append(np.prod((x[None] - others[:, None]) / (point - others[:, None]), axis=0))
    return np.stack(rows)


@dataclass(frozen=True)
class NoiseIntegral(Integral):
    """The integral over the expected noise.

    Arguments:
        by: The variable of the polynomial.
    """

    by: Variable

    def on(self, sde: SDE) -> Integral:
        """The integral over the denoised estimate where the noise has no limit in these terms."""
        return DataIntegral() if sde.zero_snr else self

    @property
    def variable(self) -> Variable:
        return self.by

    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        return field.noise(x, t)

    def scale(self, a: Node, b: Node) -> float:
        return b.alpha / a.alpha

    def kernel(self, ell: Array, b: Node) -> Array:
        return -b.alpha * np.exp(-ell)


@dataclass(frozen=True)
class DataIntegral(Integral):
    r"""The integral over the expected data, with a polynomial in half the log-SNR.

    Arguments:
        tau: The noise scale :math:`\tau`, non-negative.
    """

    tau: float = 0.0

    @property
    def variable(self) -> Variable:
        return HalfLogSNR()

    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        return field.denoise(x, t)

    def scale(self, a: Node, b: Node) -> float:
        kept = math.exp(-(self.tau**2) * (b.ell - a.ell)) if self.tau else 1.0
        return b.sigma / a.sigma * kept

    def kernel(self, ell: Array, b: Node) -> Array:
        kappa = 1 + self.tau**2
        return b.alpha * kappa * np.exp(-kappa * (b.ell - ell))

    def noise(self, a: Node, b: Node) -> float:
        """Returns the standard deviation of the noise on the way from ``a`` to ``b``."""
        if self.tau == 0:
            return 0.0
        return b.sigma * math.sqrt(-math.expm1(-2 * self.tau**2 * (b.ell - a.ell)))


class Planner:
    """Writes a plan of stages down, and remembers where the model has been evaluated.

    Arguments:
        sde: The process.
        integral: The integral to solve.
    """

    def __init__(self, sde: SDE, integral: Integral) -> None:
        self.sde = sde
        self.integral = integral.on(sde)
        self.stages: list[Stage] = []
        self.evaluated: list[Node] = []

    def row(self, a: Node, b: Node, points: Sequence[Node], noise: float = 0.0) -> LinearUpdate:
        """Returns the row from ``a`` to ``b`` by the polynomial through ``points``."""
        weights = self.integral.weights(self.sde, a, b, points)
        return self.weighted(a, b, points, weights, noise)

    def weighted(
        self,
        a: Node,
        b: Node,
        points: Sequence[Node],
        weights: Sequence[float],
        noise: float = 0.0,
    ) -> LinearUpdate:
        """Returns the row from ``a`` to ``b`` with the weights of the outputs at ``points``."""
        # Of two outputs at one node, the newer counts.
        places = [self.evaluated.index(point) for point in points]
        spread = [0.0] * (max(places) + 1)
        for place, weight in zip(places, weights, strict=True):
            spread[place] = weight
        return LinearUpdate(self.integral.scale(a, b), tuple(spread), (noise,) if noise else ())

    def evaluate(self, at: Node) -> None:
        """Notes an evaluation, before the rows that use it."""
        self.evaluated.insert(0, at)
        del self.evaluated[_REMEMBERED:]

    def step(self, a: Node, b: Node, points: Sequence[Node], noise: float = 0.0) -> None:
        """Adds a step from ``a`` to ``b`` with a pass at ``a``, by values at ``points``."""
        self.evaluate(a)
        self.stages.append(Stage(a, b, self.row(a, b, points, noise)))

    def single_step(self, a: Node, b: Node, order: int) -> None:
        r"""Adds a step from ``a`` to ``b`` of order 1, 2 or 3, with as many passes.

        Order 2 goes through the middle :math:`m` in :math:`\ell`, and integrates the line through
        the values at :math:`a` and :math:`m`. The value at :math:`m` errs by :math:`O(h^2)`, the
        line by :math:`O(h^2)`, the step by :math:`O(h^3)`.

        Order 3 goes through :math:`p` at a third and :math:`q` at two thirds, where the value at
        :math:`q` errs by :math:`O(h^3)` as of order 2, and integrates the line through :math:`a`
        and :math:`q`: since :math:`\int_0^h u (u - \tfrac23 h) \, du = 0`, the line errs by
        :math:`O(h^4)` under the integral (Radau's rule).
        """
        inner = [a.place + (b.place - a.place) * i / order for i in range(1, order)]
        nodes = [a, *Node.at(self.sde, inner)] if inner else [a]
        for i, at in enumerate(nodes):
            self.evaluate(at)
            last = i == order - 1
            to = b if last else nodes[i + 1]
            points = (at, a) if i else (a,)
            self.stages.append(Stage(at, to, self.row(a, to, points), begins=i == 0, ends=last))


def rising(nodes: Sequence[Node], i: int, order: int) -> list[Node]:
    """Returns the newest nodes up to number ``i``, at most as many as the order, newest first."""
    return [nodes[j] for j in range(i, max(i - order, -1), -1)]
