r"""Single-step methods: Heun, DPM-Solver and SEEDS.

They evaluate the model within a step and use no past values, so they work on any grid and every
step is independent. Each step takes several network evaluations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import Conditioned
from scoresde.sample.exponential import (
    DataIntegral,
    HalfLogSNR,
    NoiseIntegral,
    Planner,
    RelativeNoise,
)
from scoresde.sample.plan import LinearUpdate, Node, PlannedSampler, Stage
from scoresde.sde import SDE


@dataclass(frozen=True)
class DPMSolver(PlannedSampler):
    r"""DPM-Solver (single-step): a polynomial of the predicted noise in the log-SNR.

    Orders 2 and 3 also evaluate the noise inside the step, at equal distances in :math:`\ell`
    (derived in :meth:`scoresde.sample.exponential.Planner.single_step`); the order holds on any
    grid.

    References:
        Lu et al. 2022, https://arxiv.org/abs/2206.00927 (algorithms 1 and 2).

    Arguments:
        steps: Number of steps, positive; ``order`` network evaluations each.
        grid: Spacing of the times; uniform in t by default.
        order: 1 (DDIM), 2 or 3.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise InputError(f"order must be one of 1, 2, 3, got {self.order}.")

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        planner = Planner(sde, NoiseIntegral(HalfLogSNR()))
        for a, b in pairwise(nodes):
            planner.single_step(a, b, self.order)
        return planner.stages

    @property
    def convergence(self) -> int:
        """The order, on any grid."""
        return self.order


@dataclass(frozen=True)
class Heun(PlannedSampler):
    r"""Heun's method in the relative noise level, with churn; the sampler of EDM.

    .. math:: \frac{d}{d\tilde\sigma} \frac{x}{\alpha} = \hat z

    by the trapezoidal rule, of order 2 on any grid. Before a step the noise may be raised, from
    :math:`\tilde\sigma` to :math:`(1 + \gamma) \tilde\sigma` with :math:`\gamma = \min(churn / N,
    \sqrt 2 - 1)`: the state is perturbed as the forward process would, which changes no marginal
    and reduces the errors of earlier steps. So with churn the weak order is also 2. A level is
    never raised above that of t = 1.

    The published sampler of N steps ends at zero noise with a denoising: this is ``steps=N - 1``
    with ``KarrasGrid()`` and ``final_denoise=True``, in 2 N - 1 evaluations.

    References:
        Karras et al. 2022, https://arxiv.org/abs/2206.00364 (algorithm 2, table 5).

    Arguments:
        steps: Number of steps, positive; two network evaluations each.
        grid: Spacing of the times; uniform in t by default.
        churn: Total amount of added noise (:math:`S_{churn}`), non-negative.
        churn_low: Lowest relative noise level that is raised (:math:`S_{tmin}`).
        churn_high: Highest relative noise level that is raised (:math:`S_{tmax}`).
        churn_noise: Factor of the added noise (:math:`S_{noise}`), positive; slightly above 1
            compensates for a network that removes too much.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    churn: float = 0.0
    churn_low: float = 0.0
    churn_high: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.churn < math.inf:
            raise InputError(
                f"churn must be non-negative and finite, got {self.churn}; 0 adds no noise."
            )
        if not 0 <= self.churn_low <= self.churn_high:
            raise InputError(
                "churn_low and churn_high must be non-negative, with churn_low <= churn_high, got "
                f"{self.churn_low} and {self.churn_high}."
            )
        if not 0 < self.churn_noise < math.inf:
            raise InputError(
                f"churn_noise must be positive and finite, got {self.churn_noise}; 1 is exact."
            )

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        planner = Planner(sde, NoiseIntegral(RelativeNoise()))
        a = nodes[0]
        for b in nodes[1:]:
            raised = b if b is nodes[-1] else self._raised(sde, b, nodes)
            planner.evaluate(a)
            planner.stages.append(Stage(a, b, planner.row(a, b, (a,)), ends=False))
            planner.evaluate(b)
            row = renoise(planner.row(a, b, (b, a)), b, raised, self.churn_noise)
            planner.stages.append(Stage(b, raised, row, begins=False))
            a = raised
        return planner.stages

    def _raised(self, sde: SDE, node: Node, nodes: Sequence[Node]) -> Node:
        if not (self.churn and self.churn_low <= node.ratio <= self.churn_high):
            return node
        gamma = min(self.churn / (len(nodes) - 1), math.sqrt(2) - 1)
        return Node.at_ell(sde, [max(node.ell - math.log1p(gamma), nodes[0].ell)])[0]

    @property
    def convergence(self) -> int:
        """2, on any grid (weakly, with churn)."""
        return 2


def renoise(row: LinearUpdate, a: Node, b: Node, factor: float = 1.0) -> LinearUpdate:
    r"""Returns an update that ends at ``a``, followed by the forward process to the noisier ``b``.

    .. math:: x_b = \frac{\alpha_b}{\alpha_a} x_a
              + \alpha_b \sqrt{\tilde\sigma_b^2 - \tilde\sigma_a^2} \, z
    """
    if a is b:
        return row
    added = math.sqrt(max(b.ratio**2 - a.ratio**2, 0.0))
    return row.then(b.alpha / a.alpha, factor * b.alpha * added)


@dataclass(frozen=True)
class SEEDS(PlannedSampler):
    r"""Stochastic exponential integrator of weak order 2, through the middle of the step.

    With the middle :math:`m` in :math:`\ell`, and the noises of the two halves,

    .. math::
        x_m &= a_{tm} x_t + w_{tm} D_t + n_{tm} z_1, \\
        x_s &= a_{ts} x_t + w_t D_t + w_m D_m + a_{ms} n_{tm} z_1 + n_{ms} z_2 ,

    where the weights integrate the line through :math:`D_t` and :math:`D_m`, so the noise of the
    step is that of the exact solution along *one* Brownian motion.

    **The weak order.** With additive noise write :math:`b` for the drift and :math:`W` for the
    noise since the start of the step. Weak order 2 requires an error per step whose mean and whose
    covariance with the noise are :math:`O(h^3)`. Two terms of lower order must agree. The first is
    :math:`b' \int_0^h W_u du`, which the middle approximates by :math:`b' h W_{h/2}`. Without
    :math:`b'`, both have the covariance :math:`h^2 / 2` with :math:`W_h`, and their variances
    differ by :math:`O(h^3)`. The second is :math:`\tfrac12 b'' \int W_u^2 du`, where the integral
    and :math:`h W_{h/2}^2` both have the mean :math:`h^2 / 2`. The order is the same as for
    :class:`DPMSolverPPSDE` with two values. Here no response is late, so the constant is about a
    sixth, for two evaluations instead of one.

    References:
        Gonzalez et al., *SEEDS: exponential SDE solvers for fast high-quality sampling from
        diffusion models*, 2023, https://arxiv.org/abs/2305.14267 (SEEDS-2).

    Arguments:
        steps: Number of steps, positive; two network evaluations each.
        grid: Spacing of the times; uniform in t by default.
        tau: Noise scale (see :mod:`scoresde.sample.exponential`), non-negative; 1 is the reverse
            SDE, 0 the flow.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < math.inf:
            raise InputError(
                f"tau must be non-negative and finite, got {self.tau}; 1 is the reverse SDE, 0 "
                "the flow."
            )

    @property
    def integral(self) -> DataIntegral:
        """The integral that the steps solve."""
        return DataIntegral(self.tau)

    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        return self.integral.evaluate(field, x, t)

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        planner, integral = Planner(sde, self.integral), self.integral
        for a, b in pairwise(nodes):
            (m,) = Node.at(sde, [0.5 * (a.place + b.place)])
            first, second = integral.noise(a, m), integral.noise(m, b)
            planner.evaluate(a)
            planner.stages.append(Stage(a, m, planner.row(a, m, (a,), first), ends=False))
            planner.evaluate(m)
            row = planner.row(a, b, (m, a))
            if self.tau:
                noises = (second, integral.scale(m, b) * first)
                row = LinearUpdate(row.scale, row.outputs, noises)
            planner.stages.append(Stage(m, b, row, begins=False))
        return planner.stages

    @property
    def convergence(self) -> int:
        """2, on any grid (weakly, with noise)."""
        return 2
