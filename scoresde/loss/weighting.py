r"""Weights of the error of the noise, and the equivalent weights of the error of the data.

The errors of the predicted noise and the denoised estimate differ by a factor,
:math:`\hat z - z = -(\alpha / \sigma) (D - x_0)`, so

.. math:: w \, \lVert \hat z - z \rVert^2 = w \, \mathrm{SNR} \, \lVert D - x_0 \rVert^2,
          \qquad \mathrm{SNR} = \alpha^2 / \sigma^2 .

A weight :math:`w` of the noise's error equals a weight :math:`w \, \mathrm{SNR}` of the data's.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.sde import SDE, Chain, as_time

_LEAST_SIGNAL = 1e-4


class Weighting(ABC):
    """Base class for weights of the noise's error."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """Returns the weights, with the shape of ``t``."""

    def of_data(self, sde: SDE, t: Tensor) -> Tensor:
        r"""Returns the same weights as weights of the data's error, :math:`w \, \mathrm{SNR}`."""
        t = as_time(t)
        return self(sde, t) * sde.log_snr(t).exp()


@dataclass(frozen=True)
class NoiseWeighting(Weighting):
    """Equal weights for all noise levels."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    r"""The weight :math:`g^2 / \sigma^2` of the bound on the likelihood.

    It grows without limit as :math:`\sigma \to 0`; use it with
    :class:`~scoresde.times.ImportanceTimes`, under which the loss has a constant weight.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.g(t) / sde.sigma(t)) ** 2


@dataclass(frozen=True)
class VelocityWeighting(Weighting):
    r"""The weight :math:`(g^2 / 2 \sigma)^2`, which turns the noise's error into the velocity's.

    It equals :math:`(\sigma' - \alpha' \sigma / \alpha)^2`, on rectified flow
    :math:`1 / (1 - t)^2`.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        signal = sde.alpha(t).clamp(min=_LEAST_SIGNAL)
        return (sde.sigma_dot(t) - sde.alpha_dot(t) * sde.sigma(t) / signal) ** 2


@dataclass(frozen=True)
class EDMWeighting(Weighting):
    r"""The weight of Karras et al. 2022.

    Their :math:`\lambda = (\tilde\sigma^2 + \sigma_d^2) / (\tilde\sigma \sigma_d)^2` weights the
    squared error of the data, which is :math:`\tilde\sigma^2 = \sigma^2 / \alpha^2` times that of
    the noise.

    Arguments:
        sigma_data: The data's standard deviation, positive.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise InputError(
                f"sigma_data must be positive and finite, got {self.sigma_data}; use the standard "
                "deviation of the data in model units (about 0.5 for images in [-1, 1])."
            )

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        # If no signal is left, the error of the noise is 0, and the weight must be finite.
        signal = sde.alpha(t).clamp(min=_LEAST_SIGNAL)
        return 1 + (sde.sigma(t) / (signal * self.sigma_data)) ** 2


@dataclass(frozen=True)
class MinSNRWeighting(Weighting):
    r"""The weight :math:`\min(1, \gamma / \mathrm{SNR})` of the noise's error.

    On the data's error it is :math:`\min(\mathrm{SNR}, \gamma)`: the noise weighting, but capped
    for small noise at its value for the SNR :math:`\gamma`.

    Arguments:
        gamma: The largest weight :math:`\gamma` of the data's error, positive.

    References:
        Hang et al., *Efficient diffusion training via min-SNR weighting strategy*, 2023,
        https://arxiv.org/abs/2303.09556 (section 3.4).

    Example:
        >>> from scoresde import VPSDE
        >>> t = VPSDE().time(torch.tensor([2.0, 0.0, -2.0]))
        >>> MinSNRWeighting().of_data(VPSDE(), t)
        tensor([5.0000, 1.0000, 0.1353])
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (self.gamma * torch.exp(-sde.log_snr(t))).clamp(max=1.0)


@dataclass(frozen=True)
class SoftMinSNRWeighting(Weighting):
    r"""The weight :math:`\gamma / (\mathrm{SNR} + \gamma)` of the noise's error.

    On the data's error it is :math:`(\mathrm{SNR}^{-1} + \gamma^{-1})^{-1}`, a smooth form of
    :class:`MinSNRWeighting`; with :math:`\gamma = 1 / \sigma_d^2` it is the weight
    :math:`1 / (\tilde\sigma^2 + \sigma_d^2)`.

    Arguments:
        gamma: The limit :math:`\gamma` of the weight of the data's error where the noise
            vanishes, positive; 4 in the paper.

    References:
        Crowson et al., *Scalable high-resolution pixel-space image synthesis with hourglass
        diffusion transformers*, 2024, https://arxiv.org/abs/2401.11605 ("soft-min-snr").
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.sigmoid(math.log(self.gamma) - sde.log_snr(t))


@dataclass(frozen=True)
class BoundWeighting(Weighting):
    r"""The weight of the bound of a chain of T steps, for the step from t to :math:`s = t - 1/T`.

    With :math:`D_{KL}` of the posterior :math:`q(x_s \mid x_t, x_0)` from the model's step with
    the posterior's variance, in nats,

    .. math::
        D_{KL} = \tfrac12 (\mathrm{SNR}_s - \mathrm{SNR}_t) \lVert x_0 - D \rVert^2
               = \tfrac12 (e^{\lambda_s - \lambda_t} - 1) \lVert z - \hat z \rVert^2 .

    Half the difference of the SNRs is the weight of the *data's* error; the second factor is this
    weight, of the *noise's* error. For many steps, T times this weight tends to half the
    :class:`LikelihoodWeighting`.

    **Two errors of the founding notes.** They give the weight of the data's error as
    :math:`\beta_t^2 \bar\alpha_{t-1} / (2 \tilde\beta_t (1 - \bar\alpha_t)^2)`, which equals half
    the difference, and sum it

    * from t = 1. There :math:`\mathrm{SNR}_0 = \infty` and the weight is infinite. The sum begins
      at step 2; the term of step 1 is the decoder's, and its weight here is 0.
    * with the variance :math:`\tilde\beta_t = \beta_t (1 - \sqrt{\bar\alpha_{t-1}}) / (1 -
      \bar\alpha_t)`. The posterior has :math:`1 - \bar\alpha_{t-1}` without the root, which is
      twice as large at small t.

    Arguments:
        steps: The number T of steps, at least 2. If None, that of the chain is used.

    References:
        Ho et al. 2020, https://arxiv.org/abs/2006.11239 (equations 5, 7 and 8).
        Kingma et al. 2021, https://arxiv.org/abs/2107.00630 (equations 13 and 14).
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_count("steps", self.steps)
            if self.steps < 2:
                raise InputError(f"steps must be at least 2, got {self.steps}.")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        first, s = self._earlier(sde, as_time(t))
        weight = 0.5 * torch.expm1(sde.log_snr(s) - sde.log_snr(as_time(t)))
        return torch.where(first, 0.0, weight)

    def of_data(self, sde: SDE, t: Tensor) -> Tensor:
        first, s = self._earlier(sde, as_time(t))
        weight = 0.5 * (sde.log_snr(s).exp() - sde.log_snr(as_time(t)).exp())
        return torch.where(first, 0.0, weight)

    def _earlier(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mask of the first step, and the earlier times, where the SNR is finite."""
        length = 1 / self._steps_of(sde)
        first = t < 1.5 * length
        return first, torch.where(first, 0.5 * t, t - length)

    def _steps_of(self, sde: SDE) -> int:
        if self.steps is not None:
            return self.steps
        if not isinstance(sde, Chain):
            raise InputError(
                f"steps must be a positive integer for {sde}, which is not a chain, got None; use "
                "BoundWeighting(steps=1000)."
            )
        return sde.steps


def _check_gamma(gamma: float) -> None:
    if not isinstance(gamma, int | float) or not 0 < gamma < math.inf:
        raise InputError(f"gamma must be positive and finite, got {gamma}; use 5.")
