r"""Exact log-likelihoods by the instantaneous change of variables.

Along the probability-flow ODE :math:`dx/dt = v(x, t)` the density at a moving point changes by the
divergence of the field. If the ODE takes :math:`x` to the latent :math:`x_1`,

.. math:: \log p_\epsilon(x) = \log p_1(x_1) + \int_\epsilon^1 \nabla \cdot v(x_t, t) \, dt .

The prior is used for :math:`p_1`. The two differ by the rest of the data at :math:`t = 1`, for VE
by its variance next to that of the noise. The result has the two terms and the latent separately,
so :math:`p_1` can be inserted if it is known.

(:mod:`scoresde.likelihood.flow` integrates the ODE.) The result is the density at
:math:`\epsilon`, evaluated on the data without noise. The defaults keep the difference to the
density of the data small. On natural-image-like data, 1e-5 for VP costs 0.0008 bits/dim (1e-3, the
sampling cut-off, would cost 0.42), and 1e-3 for sub-VP less than 1e-5. VE starts at its
:math:`\sigma_{min}` and costs 0.39 at 0.01, which only a smaller :math:`\sigma_{min}` reduces
(``experiments/likelihood_cutoff.py``). Other cut-offs are in :mod:`scoresde.likelihood.cutoff`.

References:
    Chen et al., *Neural ordinary differential equations*, 2018 (theorem 1).
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (section D.2).
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoresde.divergence import ExactTrace, Trace
from scoresde.errors import InputError, check_count
from scoresde.likelihood.base import LogProb, LogProbResult
from scoresde.likelihood.clock import Clock, NoiseClock
from scoresde.likelihood.cutoff import Cutoff, PlainCutoff
from scoresde.likelihood.flow import Flow, FlowSolution, as_trace
from scoresde.model import Conditioned, Model, ScoreFunction, check_model, evaluating
from scoresde.passes import Passes, counting, owned_by
from scoresde.shapes import check_data
from scoresde.solvers import AdaptiveODE, Method
from scoresde.streams import Streams


@dataclass(frozen=True)
class LogLikelihood(LogProbResult):
    """Result of a likelihood evaluation for B examples.

    Arguments:
        log_prob: The log-density in nats of model units, ``(B,)``: the sum of the next two, and of
            the cut-off's correction.
        prior_log_prob: The prior's log-density of the latent, ``(B,)``.
        log_det: The integral of the divergence, ``(B,)``.
        standard_error: The standard error of ``log_prob`` over the probes, ``(B,)``: 0 if the
            trace is exact, NaN for a single probe.
        latent: The state at time 1, ``(B, *)``.
        nfe: The network passes that each example took part in, int64 ``(B,)``.
        seed: The seed that was used.
        failed: Mask of the examples that could not be solved, bool ``(B,)``; their values are NaN.
        vjps: The number of products with a transposed Jacobian for each example, int64 ``(B,)``.
        estimates: Uncorrelated estimates of ``log_prob``, from one set of probes, ``(B, n)``;
            ``log_prob`` is their mean, unless ``target_error`` has added further sets.
    """

    log_prob: Tensor
    prior_log_prob: Tensor
    log_det: Tensor
    standard_error: Tensor
    latent: Tensor
    nfe: Tensor
    seed: int
    failed: Tensor
    vjps: Tensor | None = None
    estimates: Tensor | None = None


@dataclass(frozen=True)
class Likelihood(LogProb):
    r"""Evaluates :math:`\log p(x)` under a score function.

    Every probe is fixed along the path and integrates its own divergence. All probes share the
    network passes of the field. Each example has its own step sizes (see
    :mod:`scoresde.solvers.runge_kutta`), so its value does not depend on the other examples in the
    batch.

    Arguments:
        probes: The number of Rademacher probes, positive, or ``"exact"`` for the trace itself, for
            small data (one backward pass per dimension), or a :class:`~scoresde.divergence.Trace`.
        rtol: Relative tolerance of the solver, positive.
        atol: Absolute tolerance of the solver, positive.
        eps: The time to start at, in [0, 1). If None, the default of the model's SDE is used
            (``sde.cutoffs.likelihood``: 1e-5 for VP, 1e-3 for sub-VP, 0 for VE).
        method: The ODE method, an object or its short name (see
            :class:`~scoresde.solvers.AdaptiveODE`).
        cutoff: The step from the data to their state at ``eps``.
        clock: The variable in which the flow is solved (see :mod:`scoresde.likelihood.flow`).
        target_error: The standard error to reach for each example, in nats, positive: further sets
            of probes are drawn until it is reached. If None, one set is drawn. The ``probes`` of a
            set share network passes; each further set needs new passes.
        max_sets: The largest number of sets of probes, positive. If ``target_error`` is not
            reached, a warning is issued.
        strict: Whether an example that cannot be solved is an error. If False, it becomes NaN and
            is flagged, and the others continue.
        differentiable: Whether the result keeps its graph to the data, the conditions and the
            model's parameters (see :mod:`scoresde.likelihood.flow`). If False, ``log_prob`` has no
            gradient, and a warning is issued if data, a condition or a model in training mode
            requires one.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> x = torch.zeros(1, 2)
        >>> Likelihood(probes="exact")(exact, x).log_prob
        tensor([-1.8379])
    """

    probes: int | str | Trace = 1
    rtol: float = 1e-5
    atol: float = 1e-5
    eps: float | None = None
    method: Method | str = "dopri5"
    cutoff: Cutoff = field(default_factory=PlainCutoff)
    clock: Clock = field(default_factory=NoiseClock)
    target_error: float | None = None
    max_sets: int = 100
    strict: bool = True
    differentiable: bool = False

    def __post_init__(self) -> None:
        solver, trace = self._solver(), self._trace()
        if self.differentiable:
            _ = solver.replays  # raises if the method cannot be differentiated
        check_count("max_sets", self.max_sets)
        target = self.target_error
        if target is not None and not 0 < target < math.inf:
            raise InputError(
                f"target_error must be positive and finite, got {target}; use a number of nats, "
                "such as 1.0."
            )
        if target is not None and self.differentiable and not isinstance(trace, ExactTrace):
            raise InputError(
                "target_error must be None for differentiable=True, unless probes='exact', got "
                f"{target}."
            )

    def _solver(self) -> AdaptiveODE:
        return AdaptiveODE(self.rtol, self.atol, self.method, strict=self.strict)

    def _trace(self) -> Trace:
        return as_trace(self.probes)

    def __call__(
        self,
        model: ScoreFunction,
        x: Tensor,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        **cond: Tensor,
    ) -> LogLikelihood:
        """Evaluates a batch.

        Arguments:
            model: A score function.
            x: Data in model units, with shape ``(B, *)``.
            seed: Seed of the random streams of the probes. If None, a new one is drawn.
            seeds: The index of each example's stream; ``range(B)`` by default.
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments do not match the model, or the data are not finite.
            SolverError: If an example cannot be solved and ``strict`` is True.
        """
        eps = self.check(model)
        check_data(x)
        streams = Streams.of(seed, seeds, len(x), model.device)
        frozen = not self.differentiable
        if frozen:
            _warn_of_gradients(model, {"x": x, **cond})
        with (
            torch.set_grad_enabled(self.differentiable),
            evaluating(model, frozen),
            counting(len(x), model.device) as passes,
        ):
            return self._evaluate(Conditioned(model, cond), x, eps, streams, passes)

    def error_of(self, estimates: Tensor) -> Tensor:
        """Returns the standard error of the mean of estimates, ``(B, n)`` to ``(B,)``.

        Arguments:
            estimates: The ``estimates`` of a result, or their differences between two results with
                the same seed.
        """
        return self._trace().standard_error(estimates)

    def _evaluate(
        self, field: Conditioned, x: Tensor, eps: float, streams: Streams, passes: Passes
    ) -> LogLikelihood:
        start, extra = self.cutoff.start(field, field.model.state(x), eps, streams)
        flow = Flow(
            field.model, field.cond, self._trace(), graph=self.differentiable, clock=self.clock
        )
        solution = self._integrate(flow, start, eps, streams, 0)
        prior = field.sde.prior_log_prob(solution.x)
        log_det, error = self._until(flow, start, eps, streams, solution)
        return LogLikelihood(
            log_prob=prior + log_det + extra,
            prior_log_prob=prior,
            log_det=log_det,
            standard_error=error,
            latent=solution.x.to(x.dtype),
            nfe=passes.network,
            seed=streams.seed,
            failed=solution.failed,
            vjps=passes.products,
            estimates=(prior + extra)[:, None] + solution.log_dets,
        )

    def _integrate(
        self, flow: Flow, x: Tensor, eps: float, streams: Streams, draw: int
    ) -> FlowSolution:
        """Integrates points to time 1 with one set of probes."""
        assert flow.trace is not None
        flow = replace(flow, probes=flow.trace.probes(streams, x, draw))
        return flow.integrate(x, eps, 1.0, self._solver())

    def _until(
        self, flow: Flow, x: Tensor, eps: float, streams: Streams, first: FlowSolution
    ) -> tuple[Tensor, Tensor]:
        """Draws sets of probes until the error is small enough.

        Returns:
            The log-determinants and their standard errors, each ``(B,)``.
        """
        assert flow.trace is not None
        sets = _Sets(flow.trace, first.log_dets)
        if self.target_error is None:
            return sets.mean, sets.standard_error
        for draw in range(1, self.max_sets):
            open_ = ~(sets.standard_error <= self.target_error) & ~first.failed
            rows = open_.nonzero()[:, 0]
            if len(rows) == 0:
                return sets.mean, sets.standard_error
            with owned_by(rows):
                part = self._integrate(flow.take(rows), x[rows], eps, streams[rows], draw)
            sets.add(rows, part.log_dets)
        worst = float(sets.standard_error.nan_to_num(torch.inf).amax())
        if worst > self.target_error:
            warnings.warn(
                f"After {self.max_sets} sets of probes, the largest standard error is "
                f"{worst:.3g} nats, above target_error={self.target_error}; use more probes, or a "
                "larger max_sets.",
                stacklevel=4,
            )
        return sets.mean, sets.standard_error

    def check(self, model: ScoreFunction) -> float:
        """Returns the cut-off for a model.

        Raises:
            InputError: If its likelihood cannot be evaluated.
        """
        check_model(model)
        return model.sde.check_eps(model.sde.cutoffs.likelihood if self.eps is None else self.eps)


def _warn_of_gradients(model: Model, given: Mapping[str, object]) -> None:
    """Warns that a gradient which the caller requested will be missing.

    Gradients of weights count as requested if the model is in training mode, not in evaluation
    mode.
    """
    if not torch.is_grad_enabled():
        return
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    asked = [name for name, value in tensors.items() if value.requires_grad]
    if model.training and any(p.requires_grad for p in model.parameters()):
        asked.append("model")
    if asked:
        warnings.warn(
            f"{asked[0]} requires a gradient, but log_prob has none; use "
            "Likelihood(differentiable=True), or, if no gradient is needed, torch.no_grad() or "
            "model.eval().",
            stacklevel=3,
        )


class _Sets:
    """Independent sets of probes; their number may differ between examples.

    The error of the mean over r sets is the root of the sum of their squared errors, divided by r.
    Sets with a single estimate have no error of their own; the error then comes from the spread of
    the sets.
    """

    def __init__(self, trace: Trace, log_dets: Tensor) -> None:
        self.trace = trace
        self.count = log_dets.new_ones(len(log_dets))
        self.total = log_dets.mean(1)
        self.squares = torch.zeros_like(self.total)
        self.variance = trace.standard_error(log_dets).square()

    def add(self, rows: Tensor, log_dets: Tensor) -> None:
        """Adds a set for some examples."""
        value, n = log_dets.mean(1), self.count[rows]
        old = self.total[rows] / n
        self.squares[rows] += (value - old) ** 2 * n / (n + 1)
        self.total[rows] += value
        self.count[rows] += 1
        self.variance[rows] += self.trace.standard_error(log_dets).square()

    @property
    def mean(self) -> Tensor:
        """The mean over all sets, ``(B,)``."""
        return self.total / self.count

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the mean, ``(B,)``; NaN for a single estimate."""
        spread = self.squares / (self.count - 1) / self.count
        return torch.where(self.variance.isnan(), spread, self.variance / self.count**2).sqrt()
