"""The probability-flow ODE: a deterministic map between noise and data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.divergence import Trace
from scoresde.errors import InputError
from scoresde.likelihood import Clock, NoiseClock
from scoresde.likelihood.flow import Flow, FlowSolution, as_trace
from scoresde.model import Conditioned, Model, evaluating
from scoresde.passes import counting
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler, Samples, Step
from scoresde.sde import SDE
from scoresde.shapes import check_data
from scoresde.solvers import AdaptiveODE, Method
from scoresde.solvers.base import State


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    r"""The probability-flow ODE, integrated by an adaptive solver.

    .. math:: \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

    from :math:`t = 1` to ``eps``; :meth:`encode` integrates in the opposite direction. The network
    is never evaluated below ``eps`` or above 1. Each sample has its own step sizes (see
    :mod:`scoresde.solvers.runge_kutta`), so it does not depend on the rest of the batch.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 13).

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        method: ODE method, an object or its short name (see
            :class:`~scoresde.solvers.AdaptiveODE`).
        probes: Probes for the log-density of the samples, computed in the same solution (see
            :class:`~scoresde.Likelihood`). If None, it is not computed.
        clock: Variable of integration of the flow (see :mod:`scoresde.likelihood.flow`).
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
        >>> flow = ProbabilityFlow()
        >>> data = exact.sample(4, seed=0)
        >>> latent = flow.encode(exact, data).x
        >>> torch.allclose(flow(exact, latent=latent).x, data, atol=1e-3)
        True
    """

    kind = Model

    rtol: float = 1e-5
    atol: float = 1e-5
    method: Method | str = "dopri5"
    probes: int | str | Trace | None = None
    clock: Clock = field(default_factory=NoiseClock)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._solver()
        self._trace()
        if self.probes is not None and self.constraint is not None:
            raise InputError(
                "probes and constraint cannot be combined: log_prob is the density of the flow, "
                "which a constrained state leaves."
            )
        if self.probes is not None and self.final_denoise:
            raise InputError(
                "probes and final_denoise=True cannot be combined: log_prob belongs to the state "
                "before denoising."
            )

    def _check_process(self, process: Any, eps: float) -> float:
        if self.probes is not None and not isinstance(process, SDE):
            raise InputError(
                f"probes must be None for a process without a prior density, got {self.probes} "
                f"for {process}."
            )
        return eps

    def _solver(self) -> AdaptiveODE:
        return AdaptiveODE(self.rtol, self.atol, self.method)

    def _trace(self) -> Trace | None:
        return None if self.probes is None else as_trace(self.probes)

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        trace = self._trace()
        flow = Flow(field.model, field.cond, trace, clock=self.clock)
        if trace is None:
            return FinalState(self._integrate(flow, x, 1.0, eps, report).x)
        flow = replace(flow, probes=trace.probes(noise.streams, x))
        end = self._integrate(flow, x, 1.0, eps, report)
        log_prob = field.sde.prior_log_prob(x) - end.log_dets.mean(1)
        return FinalState(end.x, log_prob, trace.standard_error(end.log_dets))

    def _integrate(
        self, flow: Flow, x: Tensor, start: float, end: float, report: ProgressReporter
    ) -> FlowSolution:
        def constrain(t: Tensor, state: State, i: int) -> State:
            return report.constrain(t, state[0], i), *state[1:]

        return flow.integrate(
            x,
            start,
            end,
            self._solver(),
            (lambda t, state: report.tell(t, state[0])) if report.watched else None,
            None if report.constraint is None else constrain,
        )

    @torch.no_grad()
    def encode(
        self,
        model: Model,
        x: Tensor,
        *,
        callback: Callable[[Step], object] | None = None,
        progress: bool = False,
        **cond: Tensor,
    ) -> Samples:
        """Maps data at time ``eps`` to its latent at time 1; arguments as for sampling.

        The constraint is not applied.

        Returns:
            The latents in the field ``x``, with shape ``(B, *)``, and the network evaluations.
        """
        eps = self.check(model)
        check_data(x)
        report = ProgressReporter(callback, progress)
        with counting(len(x), model.device) as passes, evaluating(model):
            try:
                flow = Flow(model, cond, clock=self.clock)
                latent = self._integrate(flow, model.state(x), eps, 1.0, report).x.to(x.dtype)
            finally:
                report.close()
        return Samples(latent, passes.network, seed=0, vjps=passes.products)
