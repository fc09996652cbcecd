"""The probability-flow ODE: a deterministic map between noise and data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoresde.divergence import Trace
from scoresde.errors import InputError
from scoresde.likelihood import Clock, NoiseClock
from scoresde.likelihood.flow import Flow, FlowSolution, as_trace
from scoresde.model import Evaluations, ScoreFunction, evaluating
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler, Samples, Step
from scoresde.shapes import check_data
from scoresde.solvers import AdaptiveODE, Method


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    r"""The probability-flow ODE by an adaptive solver.

    .. math:: \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

    from :math:`t = 1` to ``eps``; :meth:`encode` goes the other way. The network is never
    evaluated below ``eps`` or above 1. Each sample has its own step sizes (see
    :mod:`scoresde.solvers.runge_kutta`), so that it does not depend on its batch mates.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 13).

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        method: The ODE method, an object or its short name (see
            :class:`~scoresde.solvers.AdaptiveODE`).
        probes: Measures the log-density of the samples in the same solution, and how (see
            :class:`~scoresde.Likelihood`); ``None``: not at all.
        clock: The variable in which the flow is solved (see :mod:`scoresde.likelihood.flow`).
        eps: The time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the expected data there.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
        >>> flow = ProbabilityFlow()
        >>> data = exact.sample(4, seed=0)
        >>> latent = flow.encode(exact, data).x
        >>> torch.allclose(flow(exact, latent=latent).x, data, atol=1e-3)
        True
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: Method | str = "dopri5"
    probes: int | str | Trace | None = None
    clock: Clock = field(default_factory=NoiseClock)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._solver()
        self._trace()
        if self.probes is not None and self.final_denoise:
            raise InputError(
                "final_denoise=True leaves the state whose density probes measures; give one of "
                "the two."
            )

    def _solver(self) -> AdaptiveODE:
        return AdaptiveODE(self.rtol, self.atol, self.method)

    def _trace(self) -> Trace | None:
        return None if self.probes is None else as_trace(self.probes)

    def _run(
        self, field: Evaluations, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        trace = self._trace()
        flow = Flow(field.model, field.cond, trace, clock=self.clock)
        if trace is None:
            return FinalState(self._integrate(flow, field, x, 1.0, eps, report).x)
        flow = replace(flow, probes=trace.probes(noise.streams, x))
        end = self._integrate(flow, field, x, 1.0, eps, report)
        log_prob = field.sde.prior_log_prob(x) - end.log_dets.mean(1)
        return FinalState(end.x, log_prob, trace.standard_error(end.log_dets))

    def _integrate(
        self,
        flow: Flow,
        field: Evaluations,
        x: Tensor,
        start: float,
        end: float,
        report: ProgressReporter,
    ) -> FlowSolution:
        solution = flow.integrate(x, start, end, self._solver(), lambda t, y: report(t, y[0]))
        field.count = field.count + solution.evaluations
        return solution

    @torch.no_grad()
    def encode(
        self,
        model: ScoreFunction,
        x: Tensor,
        *,
        callback: Callable[[Step], object] | None = None,
        progress: bool = False,
        **cond: Tensor,
    ) -> Samples:
        """Maps data at time ``eps`` to its latent at time 1; arguments as for sampling.

        Returns:
            The latents in the field ``x``, with shape ``(B, *)``, and the network passes.
        """
        eps = self.check(model)
        check_data(x)
        report, field = ProgressReporter(callback, progress), Evaluations(model, cond)
        try:
            with evaluating(model):
                flow = Flow(model, cond, clock=self.clock)
                latent = self._integrate(flow, field, model.state(x), eps, 1.0, report).x.to(
                    x.dtype
                )
        finally:
            report.close()
        return Samples(latent, field.nfe(latent), seed=0)
