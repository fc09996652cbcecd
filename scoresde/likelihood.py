r"""Exact log-likelihoods by the instantaneous change of variables.

Along the probability-flow ODE :math:`dx/dt = v(x, t)` the density of a moving point changes by the
divergence of the field, so that with the latent :math:`x_1` to which the ODE carries :math:`x`

.. math:: \log p_\epsilon(x) = \log p_1(x_1) + \int_\epsilon^1 \nabla \cdot v(x_t, t) \, dt .

The prior stands for :math:`p_1`. The two differ by what is left of the data at :math:`t = 1`; for
VE by its variance beside that of the noise. The result keeps the two terms and the latent apart,
so that whoever knows :math:`p_1` can put it in.

What is measured is the density at :math:`\epsilon`, evaluated on the data as they are. The
defaults keep the difference to the data's own density small: 1e-5 for VP costs 0.0009 bits/dim on
natural-image-like data (1e-3, the sampling cut-off, would cost 0.41), 1e-3 for sub-VP less than
1e-5; VE starts at its :math:`\sigma_{min}`, whose cost only the choice of that can reduce.

References:
    Chen et al., *Neural ordinary differential equations*, 2018 (theorem 1).
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (section D.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.errors import InputError
from scoresde.model import Evaluations, ScoreFunction, check_data, check_model, evaluating
from scoresde.solvers import AdaptiveODE
from scoresde.streams import Streams


@dataclass(frozen=True)
class LogLikelihood:
    """What a likelihood evaluation returns; B examples.

    Arguments:
        log_prob: The log-density in nats of model units, ``(B,)``: the sum of the next two.
        prior_log_prob: The prior's log-density of the latent, ``(B,)``.
        log_det: The integral of the divergence, ``(B,)``.
        standard_error: That of ``log_prob`` over the probes, ``(B,)``: 0 if the trace is exact,
            NaN for a single probe.
        latent: The state at time 1, ``(B, *)``.
        nfe: The network passes that each example took part in, int64 ``(B,)``.
        seed: The seed that was used.
    """

    log_prob: Tensor
    prior_log_prob: Tensor
    log_det: Tensor
    standard_error: Tensor
    latent: Tensor
    nfe: Tensor
    seed: int


@dataclass(frozen=True)
class Likelihood:
    r"""Evaluates :math:`\log p(x)` under a score function.

    Every probe is fixed along the path, each integrates its own divergence, and all share the
    network pass of the field. The step size of the solver is shared by the batch (see
    :mod:`scoresde.solvers.ode`).

    Arguments:
        probes: The number of Rademacher probes, positive; or ``"exact"`` for the trace itself, for
            small data (one backward pass per dimension); or a :class:`~scoresde.divergence.Trace`.
        rtol: Relative tolerance of the solver, positive.
        atol: Absolute tolerance of the solver, positive.
        eps: The time to start at, in [0, 1); ``None`` takes the default of the model's SDE
            (``sde.cutoffs.likelihood``: 1e-5 for VP, 1e-3 for sub-VP, 0 for VE).
        method: ``dopri5``, ``dopri8``, ``bosh3``, ``fehlberg2`` or ``adaptive_heun``.

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
    method: str = "dopri5"

    def __post_init__(self) -> None:
        self._solver()
        self._trace()

    def _solver(self) -> AdaptiveODE:
        return AdaptiveODE(self.rtol, self.atol, self.method)

    def _trace(self) -> Trace:
        if isinstance(self.probes, Trace):
            return self.probes
        if self.probes == "exact":
            return ExactTrace()
        if isinstance(self.probes, str):
            raise InputError(f"probes={self.probes!r}: give a positive integer, or 'exact'.")
        return Hutchinson(self.probes)

    @torch.no_grad()
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
            seed: Names the random streams of the probes; ``None`` draws a fresh one.
            seeds: The index of each example's stream; ``range(B)`` by default.
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments do not fit the model, or the data are not finite.
        """
        eps = self.check(model)
        check_data(x)
        streams = Streams.of(seed, seeds, len(x), model.device)
        state, trace, field = model.state(x), self._trace(), Evaluations(model, cond)
        probes = trace.probes(streams, state)

        def system(t: Tensor, pair: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            return trace(lambda y: field.velocity(y, t), pair[0], probes)

        estimates = state.new_zeros(len(x), trace.estimates)
        with evaluating(model):
            latent, log_dets = self._solver()(system, (state, estimates), eps, 1.0)
        prior, log_det = model.sde.prior_log_prob(latent), log_dets.mean(1)
        return LogLikelihood(
            log_prob=prior + log_det,
            prior_log_prob=prior,
            log_det=log_det,
            standard_error=trace.standard_error(log_dets),
            latent=latent.to(x.dtype),
            nfe=field.nfe(x),
            seed=streams.seed,
        )

    def check(self, model: ScoreFunction) -> float:
        """Returns the cut-off for a model.

        Raises:
            InputError: If its likelihood cannot be evaluated.
        """
        check_model(model)
        return model.sde.check_eps(model.sde.cutoffs.likelihood if self.eps is None else self.eps)
