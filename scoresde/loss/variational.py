r"""The variational bound as a loss, for the network and optionally a learned schedule.

.. math:: -\log p(x) \le \underbrace{-E \log p(x \mid x_\epsilon)}_{\text{reconstruction}}
          + \underbrace{\tfrac12 \int_\epsilon^1 \gamma'(t) \, E \lVert z - \hat z(x_t, t)
          \rVert^2 \, dt}_{\text{diffusion}}
          + \underbrace{KL(q(x_1 \mid x) \,\|\, p(x_1))}_{\text{prior}},
          \qquad \gamma = -\lambda ,

with one draw of the time and one of the noise for each example: the diffusion term becomes

.. math:: \ell(t, z) = \tfrac12 \gamma'(t) \, \lVert z - \hat z(x_t, t) \rVert^2 , \qquad
          \ell_T(t, z) = \tfrac{T}{2} \, (e^{\gamma_t - \gamma_s} - 1) \, \lVert z - \hat z(x_t, t)
          \rVert^2 ,

in continuous time, and for a chain of T steps from t to s = t - 1/T.

**Gradients.** The network, the decoder and the end points of a learned schedule are trained with
the gradient of the bound. For the interior of the schedule this gradient is useless: with
:math:`d\gamma = \gamma' dt` the integral is one over :math:`\gamma` and depends only on its ends,
so :math:`E[\partial \ell] = 0` in the interior for any network. But the interior determines the
variance of :math:`\ell`, and since the mean of :math:`\ell` is constant,

.. math:: \partial \operatorname{Var} \ell = \partial E[\ell^2] = E[2 \ell \, \partial \ell] .

Therefore each example's gradient for the interior is multiplied by its own :math:`2 \ell`, and one
backward pass suffices for both (:meth:`~scoresde.sde.LearnedSchedule.scaled_interior`). This
requires that the state, the noise label and all coefficients carry their gradients in
:math:`\gamma`: if the state were detached from it, :math:`E[\partial \ell]` would not be 0.

**Variance** means that of one example at one uniform time. If times are spread over a batch, each
is still uniform, so the schedule is trained for the same variance; the smaller variance of the
batch mean is not taken into account. The variance is minimal if the density of :math:`\lambda` is
proportional to :math:`\sqrt{E[\ell_\lambda^2]}`. For isotropic Gaussian data in D dimensions the
standard deviation is then :math:`\sqrt{2 / D}` times the mean.

For a chain of few steps, the schedule changes the bound itself, so it is trained with the gradient
of the bound.

References:
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (equations 13 and 17, sections 5.1 and 5.2, and the appendix on the variance of the loss).
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from scoresde.codec import Decoder, GaussianDecoder
from scoresde.errors import InputError, check_count
from scoresde.likelihood import PosteriorVariance, prior_kl
from scoresde.likelihood.discrete import reconstruction_term
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.loss.weighting import LikelihoodWeighting
from scoresde.model import ScoreFunction, Trainable, check_model
from scoresde.sde import SDE, Interpolant, LearnedSchedule, as_time
from scoresde.shapes import sum_features
from scoresde.streams import Purpose
from scoresde.times import LowDiscrepancy, Times, UniformTimes


class ScheduleGradient(ABC):
    """Base class for objectives of the interior of a schedule."""

    @abstractmethod
    def applied(
        self, sde: SDE, value: Callable[[], Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager in which the schedule computes the inputs of the loss.

        Arguments:
            sde: The process.
            value: Function that returns the diffusion term of each example, ``(B,)``, in the
                backward pass.
        """

    @abstractmethod
    def check(self, sde: Interpolant, steps: int | None) -> None:
        """Checks that a process can be trained with this objective.

        Arguments:
            sde: The process.
            steps: The number of steps of the chain; None in continuous time.

        Raises:
            InputError: If it cannot.
        """


@final
@dataclass(frozen=True)
class WholeBound(ScheduleGradient):
    """The bound itself, as for all other weights; for chains, useless in continuous time."""

    def applied(
        self, sde: SDE, value: Callable[[], Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def check(self, sde: Interpolant, steps: int | None) -> None:
        """Accepts any process."""


@final
@dataclass(frozen=True)
class LeastVariance(ScheduleGradient):
    r"""The variance of the diffusion term in continuous time, in nats per dimension squared.

    Arguments:
        weight: The factor of its gradient, positive. It matters if the norm of all gradients is
            clipped.

    References:
        Kingma et al. 2021 (section 5.2, and the appendix on the variance of the loss).
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InputError(
                f"weight must be positive and finite, got {self.weight}; the default is 1."
            )

    def applied(
        self, sde: SDE, value: Callable[[], Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        assert isinstance(sde, LearnedSchedule)
        return sde.scaled_interior(lambda: 2 * self.weight * value())

    def check(self, sde: Interpolant, steps: int | None) -> None:
        if not isinstance(sde, LearnedSchedule):
            raise InputError(
                f"sde must be a LearnedSchedule for schedule=LeastVariance(), got {sde}; use "
                "sde=learned, or schedule=WholeBound()."
            )
        if steps is not None:
            raise InputError(
                f"steps must be None for schedule=LeastVariance(), got {steps}, and the bound of "
                "a chain depends on the interior; use schedule=WholeBound()."
            )


@dataclass(frozen=True)
class VariationalLoss(Loss):
    """The negative variational bound, in nats per dimension, from one time per example.

    For levels it bounds their probability, for real data the density in model units. Data on
    levels are first moved to the centres of their levels, so they may be dequantised or not.

    Arguments:
        decoder: The last step: :class:`~scoresde.codec.Levels` for data on levels. If None, it is
            a Gaussian around the denoised data, for real data (this takes one more pass, like
            every decoder that uses the denoised data).
        steps: The number T of steps of a chain, at least 2, uniform in t. They start at t = 0 if
            noise is left there; otherwise the first step ends at 1/T. If None, time is continuous.
        schedule: Objective of the interior of a learned schedule. If None, it is
            ``LeastVariance()`` in continuous time and ``WholeBound()`` for a chain.
        times: Uniform times: ``UniformTimes()``, or times spread over a batch.
        eps: The smallest time, in [0, 1). If None, the default of the SDE is used (0 for a
            :class:`~scoresde.sde.LearnedSchedule`).

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from scoresde import GaussianModel, LearnedSchedule
        >>> exact = GaussianModel(mean=torch.zeros(2), std=0.5, sde=LearnedSchedule())
        >>> terms = VariationalLoss()(exact, exact.sample(8, seed=0), seed=0)
        >>> terms.shape
        torch.Size([8])
    """

    decoder: Decoder | None = None
    steps: int | None = None
    schedule: ScheduleGradient | None = None
    times: Times = field(default_factory=LowDiscrepancy)
    eps: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.decoder, Decoder | None):
            raise InputError(
                f"decoder must be a Decoder, such as Levels(256), or None, got {self.decoder}."
            )
        if self.steps is not None and check_count("steps", self.steps, "use 1000") < 2:
            raise InputError(f"steps must be at least 2, got {self.steps}; use 1000.")
        if not isinstance(self.schedule, ScheduleGradient | None):
            raise InputError(
                f"schedule must be LeastVariance() or WholeBound(), got {self.schedule}."
            )
        inner = self.times.times if isinstance(self.times, LowDiscrepancy) else self.times
        if not isinstance(inner, UniformTimes):
            raise InputError(
                "times must be uniform, since the schedule determines the noise levels, got "
                f"{self.times}; use UniformTimes() or LowDiscrepancy()."
            )

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the bound of each example, with its parts; arguments as for the base.

        It is the sum of the parts ``reconstruction``, ``diffusion`` and ``prior``. For a chain, a
        given time is the time at which a step begins.

        Raises:
            InputError: If the loss does not apply to the model, or shapes disagree.
        """
        self.check(model)
        assert isinstance(model, ScoreFunction)
        sde, size = model.sde, x.shape[1:].numel()
        decoder = self.decoder or GaussianDecoder()
        x = decoder.centre(x)
        begin = self.first_time(sde) if self.steps is None else 0.0
        drawn = given.draw(sde, x, self.times, begin)
        t = (self._on_chain(sde, drawn.t) if given.t is None else drawn.t).expand(len(x))
        found: list[Tensor] = []
        with self._of(sde).applied(sde, lambda: found[0]):
            weight = self._weight(sde, t)
            error = drawn.noise - model.noise(sde.perturb(x, t, drawn.noise), t, **cond)
            diffusion = (weight / size).to(x) * sum_features(error.square())
        found.append(diffusion.detach())
        again = given.own.normal(x.shape[1:], Purpose.NOISE, 1, x.dtype)
        parts = {
            "reconstruction": self._reconstruction(model, x, decoder, again, cond) / size,
            "diffusion": diffusion,
            "prior": prior_kl(sde, x) / size,
        }
        value = torch.stack(list(parts.values())).sum(0)
        return LossTerms(value, {name: one.detach() for name, one in parts.items()})

    def check(self, model: Trainable) -> None:
        check_model(model)
        self._of(model.process).check(model.process, self.steps)
        if self.steps is not None and model.process.zero_snr:  # type: ignore[attr-defined]
            raise InputError(
                f"steps must be None for {model.process}, whose chain has a first step of "
                f"infinite weight, got {self.steps}."
            )
        self.first_time(model.process)

    def first_time(self, process: Interpolant) -> float:
        if self.steps is not None:
            return self._skipped(process) / self.steps
        return process.check_eps(process.cutoffs.training if self.eps is None else self.eps)

    def _of(self, process: Interpolant) -> ScheduleGradient:
        """Returns the objective of the interior of a schedule."""
        learned = isinstance(process, LearnedSchedule) and self.steps is None
        return self.schedule or (LeastVariance() if learned else WholeBound())

    def _skipped(self, process: Interpolant) -> int:
        """Returns the number of steps before the first state: 1 if no noise is left at t = 0."""
        noised = process.cutoffs.training == 0 or float(process.sigma(as_time(0.0))) > 0
        return 0 if noised else 1

    def _on_chain(self, sde: SDE, u: Tensor) -> Tensor:
        """Maps uniform numbers to the starting times of steps; without steps, returns them."""
        if self.steps is None:
            return u
        skipped = self._skipped(sde)
        return (skipped + torch.ceil((self.steps - skipped) * u)) / self.steps

    def _weight(self, sde: SDE, t: Tensor) -> Tensor:
        """Returns the weight of the squared error of the noise."""
        if self.steps is None:
            return 0.5 * (1 - self.first_time(sde)) * LikelihoodWeighting()(sde, t)
        s = torch.round(self.steps * t - 1) / self.steps
        count = self.steps - self._skipped(sde)
        return 0.5 * count * torch.expm1(sde.log_snr(s) - sde.log_snr(t))

    def _reconstruction(
        self,
        model: ScoreFunction,
        x: Tensor,
        decoder: Decoder,
        noise: Tensor,
        cond: dict[str, Tensor],
    ) -> Tensor:
        """Returns the negative log-probability of the last step, ``(B,)``, in nats."""
        t = as_time(self.first_time(model.sde)).to(x.device)
        state = model.sde.perturb(x, t, noise)
        return reconstruction_term(model, x, state, t, decoder, PosteriorVariance(), **cond)
