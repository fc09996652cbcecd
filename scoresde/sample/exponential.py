r"""Exponential integrators, which solve the linear part of each equation exactly.

With :math:`\ell = \log (\alpha / \sigma)`, half the log-SNR, increasing from noise to data, and
:math:`\tilde\sigma = \sigma / \alpha = e^{-\ell}`, the probability flow of *any* linear SDE reads

.. math::
    \frac{d}{d\tilde\sigma} \frac{x}{\alpha} = \hat z, \qquad
    \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}
        - \int_{\ell_t}^{\ell_s} e^{-\ell} \, \hat z \, d\ell,

and, with the denoised estimate :math:`D = (x - \sigma \hat z) / \alpha` in place of the noise,

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

**Zero SNR at t = 1.** The first form has no limit there. The second has one: with :math:`r =
\alpha / \sigma` it reads :math:`x_s / \sigma_s = x_t / \sigma_t + \int_{r_t}^{r_s} D \, dr`, from
r = 0. So every method integrates the denoised estimate there, in the bounded variable b of
:class:`~scoresde.sde.SDE` instead of the log-SNR; held over a step, that is

.. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t
          + \Big( \alpha_s - \alpha_t \frac{\sigma_s}{\sigma_t} \Big) D .

The values of :math:`\hat z` or :math:`D` along the path remain unknown. Every method replaces them
by the polynomial through some known values, in :math:`\ell`, in :math:`t` or in
:math:`\tilde\sigma`. Gauss-Legendre quadrature in :math:`\ell` computes the integral of the
polynomial up to rounding. Unlike the closed forms, it has no cancellation where :math:`h` is
small.

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
    """Base class for the variables of the polynomials."""

    @abstractmethod
    def __call__(self, sde: SDE, ell: Array) -> Array:
        """Returns the variable's value where half the log-SNR is ``ell``."""


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
    """Base class for the integrals above, with a polynomial in place of the unknown output."""

    @abstractmethod
    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        """Returns the model output that is integrated."""

    @abstractmethod
    def scale(self, a: Node, b: Node) -> float:
        """Returns the coefficient of the state in the step from ``a`` to ``b``."""

    @abstractmethod
    def kernel(self, ell: Array, b: Node) -> Array:
        """Returns the factor of the output in the integral."""

    @property
    @abstractmethod
    def variable(self) -> Variable:
        """The variable of the polynomial."""

    def on(self, sde: SDE) -> "Integral":
        """Returns the form of the integral that is finite for a process."""
        return self

    def weights(self, sde: SDE, a: Node, b: Node, points: Sequence[Node]) -> list[float]:
        """Returns the weights of the outputs at ``points`` in the integral from ``a`` to ``b``."""
        ell, measure = _quadrature(sde, a, b)
        known = self.variable(sde, np.array([point.ell for point in points]))
        basis = lagrange(self.variable(sde, ell), known)
        return (basis @ (measure * self.kernel(ell, b))).tolist()


def _quadrature(sde: SDE, a: Node, b: Node) -> tuple[Array, Array]:
    r"""Returns nodes and weights of a quadrature over half the log-SNR from ``a`` to ``b``.

    Where the SNR is zero at t = 1 the integral is over b, by :math:`d\ell = \tfrac12 \coth(b/2) \,
    db`. If it starts at b = 0, it is over :math:`b^{1/4}`, since kernels begin like a power of b
    there.
    """
    if not sde.zero_snr:
        half = 0.5 * (b.ell - a.ell)
        return a.ell + half * (1 + _POINTS), half * _WEIGHTS
    power = 4 if a.place < 1e-6 else 1  # zero up to rounding
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
    """The integral over the predicted noise.

    Arguments:
        by: Variable of the polynomial.
    """

    by: Variable

    def on(self, sde: SDE) -> Integral:
        """Returns the integral over the denoised estimate if this form has no limit."""
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
    r"""The integral over the denoised estimate, with a polynomial in half the log-SNR.

    Arguments:
        tau: Noise scale :math:`\tau`, non-negative.
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
        """Returns the standard deviation of the noise of the step from ``a`` to ``b``."""
        if self.tau == 0:
            return 0.0
        return b.sigma * math.sqrt(-math.expm1(-2 * self.tau**2 * (b.ell - a.ell)))


class Planner:
    """Builder of a plan of stages, which tracks the evaluations of the model.

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
        """Returns the update from ``a`` to ``b`` by the polynomial through ``points``."""
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
        """Returns the update from ``a`` to ``b`` with the weights of the outputs at ``points``."""
        # If two outputs are at one node, the newer is used.
        places = [self.evaluated.index(point) for point in points]
        spread = [0.0] * (max(places) + 1)
        for place, weight in zip(places, weights, strict=True):
            spread[place] = weight
        return LinearUpdate(self.integral.scale(a, b), tuple(spread), (noise,) if noise else ())

    def evaluate(self, at: Node) -> None:
        """Records an evaluation, before the updates that use it."""
        self.evaluated.insert(0, at)
        del self.evaluated[_REMEMBERED:]

    def step(self, a: Node, b: Node, points: Sequence[Node], noise: float = 0.0) -> None:
        """Adds a step from ``a`` to ``b`` by values at ``points``, with an evaluation at ``a``."""
        self.evaluate(a)
        self.stages.append(Stage(a, b, self.row(a, b, points, noise)))

    def single_step(self, a: Node, b: Node, order: int) -> None:
        r"""Adds a step from ``a`` to ``b`` of order 1, 2 or 3, with one evaluation per order.

        Order 2 goes through the middle :math:`m` in :math:`\ell`, and integrates the line through
        the values at :math:`a` and :math:`m`. The value at :math:`m` has an error of
        :math:`O(h^2)`, the line :math:`O(h^2)`, the step :math:`O(h^3)`.

        Order 3 goes through :math:`p` at a third and :math:`q` at two thirds, where the value at
        :math:`q`, of order 2, has an error of :math:`O(h^3)`, and integrates the line through
        :math:`a` and :math:`q`: since :math:`\int_0^h u (u - \tfrac23 h) \, du = 0`, the integral
        of the line has an error of :math:`O(h^4)` (Radau's rule).
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
    """Returns the newest nodes up to number ``i``, at most ``order`` of them, newest first."""
    return [nodes[j] for j in range(i, max(i - order, -1), -1)]
