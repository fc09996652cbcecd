r"""The bound of a discrete chain as a loss, and the hybrid loss that learns its variances.

The bound of a chain of T steps is a sum, :math:`L_{vlb} = \sum_t L_t`, of the decoder's term at
t = 1 and a divergence of two Gaussians at every other step (:mod:`scoresde.likelihood.discrete`;
the prior's term depends on no weights). One step drawn at random gives an estimate, :math:`T L_t`,
here in **bits per dimension**, as in the published code:

.. math:: L_{hybrid} = L_{simple} + \lambda \, T L_t, \qquad
          L_{simple} = \tfrac1D \lVert \hat z - z \rVert^2 .

Inside :math:`L_t` the mean of the step is detached. The second term therefore trains only the
variance, and its gradient for the first head is exactly zero.

References:
    Nichol and Dhariwal, *Improved denoising diffusion probabilistic models*, 2021,
    https://arxiv.org/abs/2102.09672 (equations 4, 15 and 16).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde.codec import Decoder, First, GaussianDecoder
from scoresde.errors import InputError
from scoresde.likelihood import LearnedRange, PosteriorVariance, Variance
from scoresde.likelihood.discrete import step_divergence
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.model import ScoreFunction, ScoreModel, Trainable, check_model
from scoresde.sde import Chain, Interpolant
from scoresde.times import ChainTimes, Times

_OFF_LEVEL = 1e-3  # largest distance of a time from a level due to float32, in steps


@dataclass(frozen=True)
class HybridLoss(Loss):
    r"""The simple loss of the mean plus a little of the bound for the variance.

    Its parts are ``simple``, the mean squared error of the noise, and ``vb``, the estimate
    :math:`T L_t` of the bound in bits per dimension, both unweighted.

    Arguments:
        scale: The factor :math:`\lambda` of the bound, non-negative.
        decoder: The last step, to the data, for the term of step 1: a decoder over levels (data
            are first moved to the centres of their levels, dequantised or not). If None, it is a
            Gaussian around the denoised data, for real data.
        variance: Meaning of the second head of the network.
        times: Distribution of the steps; all equally likely by default.

    References:
        Nichol and Dhariwal 2021 (equation 16).

    Example:
        >>> from scoresde import DiscreteVP
        >>> from scoresde.nn import MLP
        >>> model = ScoreModel(MLP(2, width=8, output_heads=2), DiscreteVP())
        >>> sorted(HybridLoss().terms(model, torch.zeros(4, 2), seed=0).parts)
        ['simple', 'vb']
    """

    scale: float = 0.001
    decoder: Decoder | None = None
    variance: LearnedRange = field(default_factory=LearnedRange)
    times: Times = field(default_factory=ChainTimes)

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int | float) or not 0 <= self.scale < math.inf:
            raise InputError(
                f"scale must be non-negative and finite, got {self.scale}; the default is 0.001."
            )
        _check_parts(self.decoder, self.variance, LearnedRange)

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the hybrid loss of each example; arguments as for the base.

        Raises:
            InputError: If a given time is not that of a level, the network has no second head, or
                shapes disagree.
        """
        self.check(model)
        assert isinstance(model, ScoreModel)
        x = x if self.decoder is None else self.decoder.centre(x)
        step = ChainStep.of(model, x, given, self.times)
        found = model.predict(step.state, step.t, **cond)
        variance = self.variance.of_head(model, found.head, step.t, step.s)
        simple = (found.noise - step.noise).square().flatten(1).mean(1)
        vb = step.bound(model, found.data.detach(), variance, self.variance, self.decoder)
        value = step.weight * (simple + self.scale * vb)
        return LossTerms(value, {"simple": simple.detach(), "vb": vb.detach()})

    def check(self, model: Trainable) -> None:
        check_model(model, ScoreModel)
        _check_chain(model.process, self.times)

    def first_time(self, process: Interpolant) -> float:
        return _check_chain(process, self.times).cutoffs.training


@dataclass(frozen=True)
class BoundLoss(Loss):
    r"""The bound of a discrete chain alone, one step for each example: :math:`T L_t`.

    It is in bits per dimension and trains the mean, and also the variance if it is learned. The
    terms of the steps differ by orders of magnitude; see
    :class:`~scoresde.loss.ImportanceSampled`.

    Arguments:
        decoder: As for :class:`HybridLoss`.
        variance: The variance of the model's steps.
        times: Distribution of the steps; all equally likely by default.

    References:
        Ho et al. 2020, https://arxiv.org/abs/2006.11239 (equation 5).
        Nichol and Dhariwal 2021 (equation 4).
    """

    decoder: Decoder | None = None
    variance: Variance = field(default_factory=PosteriorVariance)
    times: Times = field(default_factory=ChainTimes)

    def __post_init__(self) -> None:
        _check_parts(self.decoder, self.variance, Variance)

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the loss of each example; arguments as for the base.

        Raises:
            InputError: If a given time is not that of a level, or shapes disagree.
        """
        self.check(model)
        assert isinstance(model, ScoreFunction)
        x = x if self.decoder is None else self.decoder.centre(x)
        step = ChainStep.of(model, x, given, self.times)
        data, variance = self.variance.step(model, step.state, step.t, step.s, **cond)
        vb = step.bound(model, data, variance, self.variance, self.decoder)
        return LossTerms(step.weight * vb)

    def check(self, model: Trainable) -> None:
        check_model(model)
        _check_chain(model.process, self.times)

    def first_time(self, process: Interpolant) -> float:
        return _check_chain(process, self.times).cutoffs.training


@dataclass(frozen=True, eq=False)
class ChainStep:
    """A step of a chain for each of B examples.

    Arguments:
        x: Clean data, with shape ``(B, *)``.
        noise: The noise, with that shape.
        state: The noised data at ``t``, with that shape.
        t: The time at which each step begins, ``(B,)``.
        s: The time at which the step ends; for step 1, which ends at the data, some time above 0.
        first: Whether it is step 1, bool ``(B,)``.
        weight: Correction for the density of drawn times, ``(B,)`` or a number.
    """

    x: Tensor
    noise: Tensor
    state: Tensor
    t: Tensor
    s: Tensor
    first: Tensor
    weight: Tensor | float

    @staticmethod
    def of(model: ScoreFunction, x: Tensor, given: Given, times: Times) -> "ChainStep":
        """Draws the times and the noise that are not given.

        Raises:
            InputError: If a given time is not that of a level.
        """
        sde = model.sde
        assert isinstance(sde, Chain)
        drawn = given.draw(sde, x, times, sde.cutoffs.training)
        if given.t is not None:
            _check_levels(sde, drawn.t)
        index = sde.index(drawn.t.double()).round().expand(len(x))
        first, time = index == 0, sde.time_of_index(index)
        s = torch.where(first, 0.5 * time, time - 1 / sde.steps)
        state = sde.perturb(x, time, drawn.noise)
        weight = drawn.weight.to(x) if isinstance(drawn.weight, Tensor) else drawn.weight
        return ChainStep(x, drawn.noise, state, time, s, first, weight)

    def bound(
        self,
        model: ScoreFunction,
        data: Tensor,
        v: Tensor,
        variance: Variance,
        decoder: Decoder | None,
    ) -> Tensor:
        """Returns T times the term of the step in bits per dimension, ``(B,)``.

        Arguments:
            model: The model.
            data: The denoised data, with shape ``(B, *)``.
            v: The variance of the step, which broadcasts to ``data``.
            variance: The variance that supplies the step to the data.
            decoder: The decoder; None for real data.
        """
        assert isinstance(model.sde, Chain)
        divergence = step_divergence(model, self.x, data, v, self.t, self.s)
        steps, last_step = model.sde.steps, GaussianDecoder()
        # The first time in every row: the other rows are not used, but must be finite.
        t = self.t.new_tensor(1 / steps)
        first = First.of(
            model.sde, self.state, t, lambda: data, variance.first(model, self.state, t)
        )
        nats = -(decoder or last_step).log_prob(self.x, first).to(self.x)
        scale = steps / (self.x[0].numel() * math.log(2))
        return scale * torch.where(self.first, nats, divergence)


def _check_parts(decoder: Any, variance: Any, kind: type) -> None:
    if not isinstance(decoder, Decoder | None):
        raise InputError(
            "decoder must be a Decoder, such as DiscretisedGaussian(256), or None for real data, "
            f"got {decoder}."
        )
    if not isinstance(variance, kind):
        raise InputError(
            f"variance must be a {kind.__name__}, such as LearnedRange(), got {variance}."
        )


def _check_chain(process: Interpolant, times: Times) -> Chain:
    """Returns the process as a chain, after a check that the times are those of its levels."""
    if not isinstance(process, Chain):
        raise InputError(
            f"sde must be a discrete chain, such as DiscreteVP(), got {process}; use sde=ddpm or "
            "sde=cosine."
        )
    eps = process.cutoffs.training
    places = torch.linspace(0.001, 0.999, 7, dtype=torch.float64)
    _check_levels(process, times.quantile(places, process, eps))
    return process


def _check_levels(sde: Chain, t: Tensor) -> None:
    index = sde.index(t.double())
    off = (index - index.round().clamp(0, sde.steps - 1)).abs()
    if bool((off > _OFF_LEVEL).any()):
        bad = float(t.flatten()[off.argmax()])
        raise InputError(
            f"t must be the time (i + 1) / {sde.steps} of a level of the chain, got {bad:.6g}; "
            "use sde.time_of_index(i), or times=ChainTimes()."
        )
