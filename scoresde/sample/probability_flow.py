"""The probability-flow ODE: a deterministic map between noise and data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.model import Evaluations, ScoreFunction, check_data, evaluating
from scoresde.sample.base import Sampler, Samples, Step, Watch
from scoresde.solvers import AdaptiveODE
from scoresde.streams import Streams


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    r"""The probability-flow ODE by an adaptive solver.

    .. math:: \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

    from :math:`t = 1` to ``eps``; :meth:`encode` goes the other way. The network is never
    evaluated below ``eps`` or above 1. The step size is shared by the batch (see
    :mod:`scoresde.solvers.ode`): a sample changes with its batch mates by about the tolerance,
    less than 1e-5 at ``rtol=1e-7``.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 13).

    Arguments:
        rtol: Relative tolerance of a step, positive.
        atol: Absolute tolerance of a step, positive.
        method: ``dopri5``, ``dopri8``, ``bosh3``, ``fehlberg2`` or ``adaptive_heun``.
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
    method: str = "dopri5"

    def __post_init__(self) -> None:
        self._solver()

    def _solver(self) -> AdaptiveODE:
        return AdaptiveODE(self.rtol, self.atol, self.method)

    def _run(
        self, field: Evaluations, x: Tensor, eps: float, streams: Streams, watch: Watch
    ) -> Tensor:
        return self._integrate(field, x, 1.0, eps, watch)

    def _integrate(
        self, field: Evaluations, x: Tensor, start: float, end: float, watch: Watch
    ) -> Tensor:
        (x,) = self._solver()(
            lambda t, state: (field.velocity(state[0], t),),
            (x,),
            start,
            end,
            lambda t, state: watch(t, state[0]),
        )
        watch(torch.tensor(end, dtype=torch.float64), x)
        return x

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
        watch, field = Watch(callback, progress), Evaluations(model, cond)
        try:
            with evaluating(model):
                latent = self._integrate(field, model.state(x), eps, 1.0, watch).to(x.dtype)
        finally:
            watch.close()
        return Samples(latent, field.nfe(latent), seed=0)
