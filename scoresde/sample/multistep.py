r"""Multistep methods, which reuse past outputs of the model.

The polynomial under the integrals of :mod:`scoresde.sample.exponential` goes through the newest
outputs at times of the grid, so every step costs one network evaluation, regardless of the order.

**The order.** A polynomial through p values has an error of :math:`O(h^p)`, its integral over a
step :math:`O(h^{p+1})`, and all steps together :math:`O(h^p)`, for any grid whose neighbouring
steps have a bounded ratio. This requires p known values. The first steps have fewer:

- with ``single_steps=False``, as published, the first step keeps its single value constant and has
  an error of :math:`O(h^2)`. It is one step of N, so it contributes an error of order 2 to the
  solution. There the state is almost pure noise and the outputs hardly change, so the constant is
  small. With few network evaluations this is the better choice.
- with ``single_steps=True`` a step with too few known values is a single step of order :math:`p -
  1`, with :math:`p - 1` evaluations. Its error is :math:`O(h^p)`, and the order is p.

**The last steps** of a coarse grid are the longest in the log-SNR, and a polynomial of high degree
over them increases the error. With fewer steps than ``lower_order_below`` the order falls to 1
towards the end. This affects only the constants and not the order of convergence, since it does
not happen with many steps.

References:
    Lu et al., *DPM-Solver++*, 2022, https://arxiv.org/abs/2211.01095 (algorithm 2).
    Zhang and Chen 2023, https://arxiv.org/abs/2204.13902.
    Liu et al., *Pseudo numerical methods for diffusion models*, 2022,
    https://arxiv.org/abs/2202.09778.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import Conditioned
from scoresde.sample.exponential import (
    DataIntegral,
    Integral,
    NoiseIntegral,
    Planner,
    RelativeNoise,
    Time,
    Variable,
    rising,
)
from scoresde.sample.plan import Node, PlannedSampler, Stage
from scoresde.sde import SDE
from scoresde.times import Grid, KarrasGrid, LogSNRGrid


@dataclass(frozen=True)
class Multistep(PlannedSampler):
    """Base class for multistep methods of the probability flow.

    Arguments:
        order: Number of values that the polynomial goes through.
        single_steps: If True, the first steps, which have too few values, are single steps of one
            order less. If False, their order rises from 1, with one evaluation each.
        lower_order_below: Number of steps below which the order falls in the last steps.
    """

    ORDERS: ClassVar[range] = range(1, 5)

    order: int = 3
    single_steps: bool = False
    lower_order_below: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in self.ORDERS:
            raise InputError(
                f"order must be one of {', '.join(map(str, self.ORDERS))}, got {self.order}."
            )
        if not isinstance(self.lower_order_below, int) or self.lower_order_below < 0:
            raise InputError(
                f"lower_order_below must be an integer >= 0, got {self.lower_order_below}; 0 "
                "lowers no order."
            )

    @property
    @abstractmethod
    def integral(self) -> Integral:
        """The integral that the steps solve."""

    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        return self.integral.on(field.sde).evaluate(field, x, t)

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        planner = Planner(sde, self.integral)
        for i in range(len(nodes) - 1):
            points = self.points(nodes, i)
            if self.single_steps and i + 2 < self.order:
                planner.single_step(nodes[i], nodes[i + 1], self.order - 1)
            else:
                self.advance(planner, nodes[i], nodes[i + 1], points)
        return planner.stages

    def points(self, nodes: Sequence[Node], i: int) -> list[Node]:
        """Returns the nodes whose outputs step number ``i`` uses, the newest first."""
        steps = len(nodes) - 1
        falls = steps < self.lower_order_below
        return rising(nodes, i, min(self.order, steps - i) if falls else self.order)

    def advance(self, planner: Planner, a: Node, b: Node, points: Sequence[Node]) -> None:
        """Adds the step from ``a`` to ``b`` by the outputs at ``points``, the newest first."""
        planner.step(a, b, points)

    @property
    def convergence(self) -> int:
        """The order on any grid: ``order``, at most 2 if the first steps have lower order."""
        return self.order if self.single_steps else min(self.order, 2)


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    r"""DPM-Solver++ (multistep): a polynomial of the denoised estimate in the log-SNR.

    Order 2 (2M) has the weights of the paper (see :func:`halved`). On networks and on mixtures,
    their error is about half the error of the exact integral of the line. Order 3 (3M) integrates
    Newton's parabola. Common implementations of order 3 (``as_coded=True``) omit a factor 2 in the
    second difference (see :func:`coded`), which reduces the order to 2.

    References:
        Lu et al. 2022, https://arxiv.org/abs/2211.01095 (section 4, algorithm 2).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in t by default.
        order: Number of values in the polynomial: 1 (DDIM), 2 (2M) or 3 (3M).
        single_steps: Whether to start with single steps (see :mod:`scoresde.sample.multistep`).
        lower_order_below: Number of steps below which the order falls in the last steps.
        as_coded: Whether order 3 uses the weights of common implementations, which reduce the
            order to 2. No effect for other orders.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    ORDERS = range(1, 4)

    lower_order_below: int = 15
    as_coded: bool = False

    @property
    def integral(self) -> DataIntegral:
        return DataIntegral()

    def advance(self, planner: Planner, a: Node, b: Node, points: Sequence[Node]) -> None:
        planner.evaluate(a)
        weights = data_weights(self.integral, planner.sde, b, points, self.as_coded)
        planner.stages.append(Stage(a, b, planner.weighted(a, b, points, weights)))

    @property
    def convergence(self) -> int:
        """The order on any grid: ``order``, at most 2 if ``as_coded`` or without single steps."""
        return min(self.order, 2) if self.as_coded else super().convergence


def data_weights(
    integral: DataIntegral, sde: SDE, end: Node, points: Sequence[Node], as_coded: bool
) -> list[float]:
    """Returns the weights of denoised estimates at ``points``, from the newest to ``end``."""
    if sde.zero_snr or len(points) == 1 or (len(points) == 3 and not as_coded):
        return integral.weights(sde, points[0], end, points)
    kappa = 1 + integral.tau**2
    ell = [kappa * point.ell for point in points]
    weights = halved(ell, kappa * end.ell) if len(points) == 2 else coded(ell, kappa * end.ell)
    return [end.alpha * weight for weight in weights]


def halved(ell: Sequence[float], end: float) -> list[float]:
    r"""Returns the weights of two values in DPM-Solver++ 2M.

    .. math:: (1 - e^{-h}) \left( D_0 + \frac{1}{2 r} (D_0 - D_1) \right), \qquad
              r = \frac{\ell_0 - \ell_1}{h},

    The exact integral of the line is its weighted mean, which is the value of the line at the
    fraction :math:`1 / (1 - e^{-h}) - 1 / h` of the step. These weights use the middle of the step
    instead. For short steps the exact fraction is :math:`\tfrac12 + \tfrac{h}{12}`, so the order
    is 2. For long steps it approaches 1, the end of the step, where extrapolation is least
    accurate.

    Arguments:
        ell: Half the log-SNR at the known values, :math:`\ell_0` at the start of the step.
        end: End of the step, at :math:`\ell_0 + h`.
    """
    h = end - ell[0]
    base, slope = -math.expm1(-h), -math.expm1(-h) * h / (2 * (ell[0] - ell[1]))
    return [base + slope, -slope]


def coded(ell: Sequence[float], end: float) -> list[float]:
    r"""Returns the weights of three values in common implementations of DPM-Solver++ 3M.

    With Newton's differences :math:`\delta_1` (at the start) and :math:`\delta_2` of the values,
    in units of :math:`h`, the step is

    .. math:: (1 - e^{-h}) D_0 + \left( 1 - \tfrac{1 - e^{-h}}{h} \right) \delta_1
              - \left( \tfrac{h - 1 + e^{-h}}{h^2} - \tfrac12 \right) \delta_2 ,

    while the integral of the parabola contains :math:`2 \delta_2` in place of :math:`\delta_2`.
    Arguments as for :func:`halved`.
    """
    h = end - ell[0]
    base, r0, r1 = -math.expm1(-h), (ell[0] - ell[1]) / h, (ell[1] - ell[2]) / h
    newer, older = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
    second = (newer - older) / (r0 + r1)
    first = newer + r0 * second
    one, two = 1 - base / h, 0.5 - (h - base) / h**2
    return (base * np.array([1, 0, 0]) + one * first + two * second).tolist()


@dataclass(frozen=True)
class DEIS(Multistep):
    """Diffusion exponential integrator sampler (DEIS): a polynomial of the predicted noise.

    The published tAB-r, a polynomial of degree r in time, is ``order=r + 1`` here. rhoAB-r is the
    polynomial in the noise level, also known as the linear multistep method (LMS).

    References:
        Zhang and Chen 2023, https://arxiv.org/abs/2204.13902 (equation 15).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in t by default.
        order: Number of values in the polynomial, 1 to 4.
        single_steps: Whether to start with single steps (see :mod:`scoresde.sample.multistep`).
        lower_order_below: Number of steps below which the order falls in the last steps.
        variable: Variable of the polynomial: ``Time()``, ``RelativeNoise()`` or ``HalfLogSNR()``.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    variable: Variable = field(default_factory=Time)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.variable, Variable):
            raise InputError(f"variable must be a Variable such as Time(), got {self.variable}.")

    @property
    def integral(self) -> Integral:
        return NoiseIntegral(self.variable)


@dataclass(frozen=True)
class IPNDM(Multistep):
    r"""Improved pseudo numerical method (IPNDM): the Adams-Bashforth rule for equal steps.

    .. math::
        \frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}
            + (\tilde\sigma_s - \tilde\sigma_t) \sum_j c_j \hat z_{t_j}

    The :math:`c_j` are the coefficients for equal steps in :math:`\tilde\sigma`, regardless of the
    actual steps. This lowers the order but helps with few steps. On ``KarrasGrid(rho=1)``, where
    the steps are equal, the order is that of any multistep method. On any other smooth grid it is
    at most 2. For two values, the exact weights are :math:`1 + r/2` and :math:`-r/2`, where
    :math:`r = 1 + O(h)` is the ratio of neighbouring steps, and the weights used are :math:`3/2`
    and :math:`-1/2`. The weights differ by :math:`O(h)`, the two values differ by :math:`O(h)`,
    and the step has the length :math:`O(h)`, so its error is :math:`O(h^3)` and no smaller.

    References:
        Zhang and Chen 2023, https://arxiv.org/abs/2204.13902 (appendix B.3).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in t by default.
        order: Number of values, 1 to 4.
        single_steps: Whether to start with single steps (see :mod:`scoresde.sample.multistep`).
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    order: int = 4

    @property
    def integral(self) -> Integral:
        return NoiseIntegral(RelativeNoise())

    def advance(self, planner: Planner, a: Node, b: Node, points: Sequence[Node]) -> None:
        planner.evaluate(a)
        if planner.sde.zero_snr:  # polynomial of the denoised estimate in alpha / sigma
            length = b.sigma * (math.exp(b.ell) - math.exp(a.ell))
        else:
            length = b.alpha * (b.ratio - a.ratio)
        weights = [length * c for c in adams_bashforth(len(points))]
        planner.stages.append(Stage(a, b, planner.weighted(a, b, points, weights)))

    @property
    def convergence(self) -> int:
        """The order on the sampler's grid."""
        return super().convergence if self.grid == KarrasGrid(1) else min(self.order, 2)


def adams_bashforth(order: int) -> list[float]:
    r"""Returns the Adams-Bashforth coefficients, the newest first.

    They solve :math:`\sum_j c_j (-j)^m = \int_0^1 u^m \, du = 1 / (m + 1)`.
    """
    j, m = np.arange(order), np.arange(order)[:, None]
    return np.linalg.solve((-j.astype(float)) ** m, 1 / (m[:, 0] + 1)).tolist()


@dataclass(frozen=True)
class UniPC(Multistep):
    r"""UniPC: a multistep predictor, corrected with the model output at its result.

    A step to :math:`s` is predicted by the polynomial through p outputs. The next step needs the
    output at :math:`s` anyway. This output first joins the polynomial, and the step is repeated
    with p + 1 values, which adds an order without another evaluation. The last step is not
    corrected. Its error of :math:`O(h^{p+1})` is consistent with the order :math:`p + 1`. The
    first steps also gain one order over the predictor alone, so the order is at most 3 if they
    have lower order.

    In terms of differences of outputs, the weights solve a linear system that is exact for
    polynomials, so the function :math:`B(h)` of the paper cancels. The exception is a single
    difference, whose published weight is :math:`B(h) / 2`. Both choices of :math:`B(h)` agree with
    the exact weight to the required order.

    References:
        Zhao et al., *UniPC*, 2023, https://arxiv.org/abs/2302.04867 (equation 3, theorem 3.1).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in the log-SNR by default. With a grid uniform in time
            the last step is long, and samples from 20 steps have two thirds of the spread of the
            data.
        order: Number p of values in the predictor, 1 to 3.
        single_steps: Whether to start with single steps, the first of order p (see
            :mod:`scoresde.sample.multistep`).
        lower_order_below: Number of steps below which the order falls in the last steps.
        bh: Choice of :math:`B(h)`: 1 for :math:`h`, 2 for :math:`e^h - 1` (:math:`1 - e^{-h}` on
            the denoised estimate).
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    ORDERS = range(1, 4)

    # The best one measured in experiments/sampler_quality.
    steps: int = 30
    grid: Grid = field(default_factory=LogSNRGrid)
    order: int = 2
    lower_order_below: int = 15
    bh: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bh not in (1, 2):
            raise InputError(f"bh must be 1 or 2, got {self.bh}; the published default is 2.")

    @property
    def integral(self) -> Integral:
        return DataIntegral()

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        planner = Planner(sde, self.integral)
        single = self.single_steps and self.order > 1
        for i in range(len(nodes) - 1):
            a, b = nodes[i], nodes[i + 1]
            if single and i == 0:
                planner.single_step(a, b, self.order)
                continue
            planner.evaluate(a)
            correction = None
            if i > int(single):
                points = [a, *rising(nodes, i - 1, self.order)]
                weights = self._weights(sde, nodes[i - 1], a, points)
                correction = planner.weighted(nodes[i - 1], a, points, weights)
            points = self.points(nodes, i)
            weights = self._weights(sde, a, b, points)
            row = planner.weighted(a, b, points, weights)
            planner.stages.append(Stage(a, b, row, correction=correction))
        return planner.stages

    def _weights(self, sde: SDE, a: Node, b: Node, points: Sequence[Node]) -> list[float]:
        """Returns the weights of the outputs; two outputs have B(h) / 2, as published."""
        if sde.zero_snr or len(points) != 2:
            return self.integral.weights(sde, a, b, points)
        h = b.ell - a.ell
        exact = -math.expm1(-h)
        other = points[0] if points[1] is a else points[1]
        slope = 0.5 * (h if self.bh == 1 else exact) * h / (other.ell - a.ell)
        return [b.alpha * (exact - slope if point is a else slope) for point in points]

    @property
    def convergence(self) -> int:
        """The order on any grid: ``order + 1``, at most 3 if the first steps have lower order."""
        return self.order + 1 if self.single_steps else min(self.order + 1, 3)


@dataclass(frozen=True)
class DPMSolverPPSDE(Multistep):
    r"""DPM-Solver++ for the reverse SDE: 2M-SDE and 3M-SDE, with any noise scale.

    The integral is over the denoised estimate with the noise scale :math:`\tau`, and the
    polynomial goes through past values. This is also the predictor of SA-Solver. Order 2 has the
    weights of the paper (see :func:`halved`), which more than halve the error of the variance of
    Gaussian data.

    **The weak order** is 2 with two or more values. Write :math:`b` for the drift and :math:`W_n`
    for the noise of step n. The exact step contains the response :math:`\tfrac h2 b' W_n` to its
    own noise. The line through two values contains :math:`\tfrac h2 b' W_{n-1}`, the same amount
    one step late, which is an error of :math:`O(h^2)` in the sum over the steps. The mean of the
    two values' difference has the terms of Ito's formula. A third value reduces the constant but
    does not raise the order, since the response remains late.

    References:
        Lu et al. 2022, https://arxiv.org/abs/2211.01095 (algorithm 4);
        Xue et al. 2023, https://arxiv.org/abs/2309.05019 (equation 14).

    Arguments:
        steps: Number of steps, positive; one network evaluation each.
        grid: Spacing of the times; uniform in t by default.
        order: Number of values in the polynomial: 1, 2 (2M-SDE) or 3 (3M-SDE).
        tau: Noise scale :math:`\tau`, non-negative; 1 is the reverse SDE, 0 the flow.
        as_coded: Whether order 3 uses the weights of common implementations, which omit a factor
            2 (see :class:`DPMSolverPP`). No effect for other orders.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    ORDERS = range(1, 4)

    order: int = 2
    tau: float = 1.0
    as_coded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < math.inf:
            raise InputError(
                f"tau must be non-negative and finite, got {self.tau}; 1 is the reverse SDE, 0 "
                "the flow."
            )
        if self.single_steps:
            raise InputError(
                "single_steps must be False for the reverse SDE, got True: it does not raise the "
                "weak order above 2."
            )

    @property
    def integral(self) -> DataIntegral:
        return DataIntegral(self.tau)

    def advance(self, planner: Planner, a: Node, b: Node, points: Sequence[Node]) -> None:
        planner.evaluate(a)
        weights = data_weights(self.integral, planner.sde, b, points, self.as_coded)
        noise = self.integral.noise(a, b)
        planner.stages.append(Stage(a, b, planner.weighted(a, b, points, weights, noise)))

    @property
    def convergence(self) -> int:
        """The weak order on any grid: ``order``, at most 2."""
        return min(self.order, 2)
