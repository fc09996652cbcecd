r"""Losses on pairs of an example and its source.

For a bridge, the loss is the error of the denoised estimate,

.. math:: L = w(t) \, \frac{1}{D} \lVert D(x_t, t) - x_0 \rVert^2, \qquad
          x_t = (1 - w) x_0 + w y + \nu n,

which the conditional mean minimises for any positive weight. The squared error of a velocity
:math:`(x_t - D) / t` is :math:`1 / t^2` times as large.

For a stochastic interpolant, it is the sum of the errors of two networks, whose targets are finite
at both ends,

.. math:: L = \frac{1}{D} \lVert v - (x_1 - x_0) \rVert^2
              + \frac{1}{D} \lVert \gamma s + z \rVert^2 .

References:
    Delbracio and Milanfar 2023, https://arxiv.org/abs/2303.11435.
    Albergo et al. 2023, https://arxiv.org/abs/2303.08797 (theorem 7, and the objectives of its
    section 2).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.model import InterpolantModel, Model, Trainable, check_model
from scoresde.sde import Bridge, Interpolant, check_source
from scoresde.shapes import expand
from scoresde.streams import Purpose
from scoresde.times import ClosedTimes, Times, UniformTimes


class PairWeighting(ABC):
    """Base class for weights of the error of the denoised estimate."""

    @abstractmethod
    def __call__(self, bridge: Bridge, t: Tensor) -> Tensor:
        """Returns the weights, with the shape of ``t``."""


@dataclass(frozen=True)
class DataWeighting(PairWeighting):
    """Equal weights for all times: weight 1."""

    def __call__(self, bridge: Bridge, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class BridgeVelocityWeighting(PairWeighting):
    r"""The error of the velocity :math:`w' (x - D) / w`: weight :math:`(w' / w)^2`.

    It is :math:`1 / t^2` for :class:`~scoresde.sde.InDI`, and infinite at t = 0.
    """

    def __call__(self, bridge: Bridge, t: Tensor) -> Tensor:
        return (bridge.sigma_dot(t) / bridge.clock(t)) ** 2


@dataclass(frozen=True)
class Paired(Loss):
    """The squared error of the denoised estimate on pairs; the source is a condition.

    Arguments:
        weighting: Weight of each time; equal weights by default.
        times: Density of the training times; uniform with a tenth at t = 1 by default.
        eps: The smallest time, in [0, 1). If None, the default of the bridge is used (1e-3).

    Example:
        >>> from scoresde.model import GaussianBridge
        >>> from scoresde.sde import InDI
        >>> pairs = GaussianBridge(torch.zeros(2, 1), [[1.0, 0.8], [0.8, 0.89]], InDI())
        >>> x, y = pairs.sample(4, seed=0)
        >>> Paired()(pairs, x, source=y, seed=0).shape
        torch.Size([4])
    """

    weighting: PairWeighting = field(default_factory=DataWeighting)
    times: Times = field(default_factory=ClosedTimes)
    eps: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weighting, PairWeighting) or not isinstance(self.times, Times):
            raise InputError(
                "weighting and times must be a PairWeighting such as DataWeighting() and a Times "
                f"such as ClosedTimes(), got {self.weighting} and {self.times}."
            )

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the weighted error of each example; arguments as for the base.

        The part ``data_error`` is the unweighted mean squared error of the data.

        Raises:
            InputError: If ``source`` is missing, or the model is not a model of a bridge.
        """
        self.check(model)
        assert isinstance(model, Model)
        assert isinstance(model.process, Bridge)
        bridge, eps = model.process, self.first_time(model.process)
        times, source = self.times, check_source(cond, x)
        drawn = given.draw(bridge, x, times, eps)
        state = bridge.interpolate(x, source, drawn.t, drawn.noise)
        error = (model.denoise(state, drawn.t, **cond) - x).square().flatten(1).mean(1)
        weight = (drawn.weight * self.weighting(bridge, drawn.t)).to(x)
        return LossTerms(weight * error, {"data_error": error.detach()})

    def check(self, model: Trainable) -> None:
        check_model(model, Model)
        if not isinstance(model.process, Bridge):
            raise InputError(
                f"model must be of a Bridge for Paired(), got {type(model.process).__name__}; use "
                "BridgeModel(network, InDI())."
            )
        eps = self.first_time(model.process)
        at = torch.tensor([eps, 1.0], dtype=torch.float64)
        if not bool(self.weighting(model.process, at).isfinite().all()):
            raise InputError(
                f"eps must be positive for {type(self.weighting).__name__}, whose weight is "
                f"infinite at the end, got {eps}; use 1e-3."
            )

    def first_time(self, process: Interpolant) -> float:
        return process.check_eps(process.cutoffs.training if self.eps is None else self.eps)


@dataclass(frozen=True)
class InterpolantMatching(Loss):
    """The loss of an interpolant's networks, for the difference of the ends and the noise.

    Arguments:
        times: Density of the training times; uniform by default.

    Example:
        >>> from scoresde.sde import StochasticInterpolant
        >>> model = InterpolantModel(lambda x, c: x, lambda x, c: -x, StochasticInterpolant())
        >>> x = torch.ones(4, 2)
        >>> InterpolantMatching()(model, x, source=2 * x, seed=0).shape
        torch.Size([4])
    """

    times: Times = field(default_factory=UniformTimes)

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the sum of both errors of each example; arguments as for the base.

        The parts are the mean squared errors ``velocity_error`` and ``noise_error``.

        Raises:
            InputError: If ``source`` is required and missing, or the model is of another type.
        """
        self.check(model)
        assert isinstance(model, InterpolantModel)
        process, eps = model.process, self.first_time(model.process)
        drawn = given.draw(process, x, self.times, eps)
        end = process.end(given.own.normal(x.shape[1:], Purpose.SOURCE, dtype=x.dtype), cond)
        state = process.interpolate(x, end, drawn.t, drawn.noise)
        velocity = model.difference(state, drawn.t, **cond) - (end - x)
        gamma = expand(process.gamma(drawn.t), x)
        score = gamma * model.score(state, drawn.t, **cond) + drawn.noise
        first, second = (error.square().flatten(1).mean(1) for error in (velocity, score))
        weight = torch.as_tensor(drawn.weight).to(x)
        parts = {"velocity_error": first.detach(), "noise_error": second.detach()}
        return LossTerms(weight * (first + second), parts)

    def check(self, model: Trainable) -> None:
        check_model(model, InterpolantModel)
