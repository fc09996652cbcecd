r"""Predictors: one step of the reverse process, from time t to the earlier time s.

All of them need only :math:`\alpha` and :math:`\sigma` (and :math:`f, g`, which follow). The
forward process passes from :math:`s` to :math:`t` as

.. math:: x_t = a x_s + \tau z, \qquad a = \frac{\alpha_t}{\alpha_s}, \qquad
          \tau^2 = \sigma_t^2 - a^2 \sigma_s^2 = c \, \sigma_t^2, \qquad
          c = 1 - e^{\lambda_t - \lambda_s},

where the last form, by ``expm1`` of a difference of log-SNRs, loses no digits on small steps.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (sections 3.3, E and F).
    Ho et al., *Denoising diffusion probabilistic models*, 2020, equation 7.
    Kingma et al. 2021, https://arxiv.org/abs/2107.00630 (appendix A.4).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.model import Evaluations
from scoresde.sde import SDE
from scoresde.shapes import expand


class Predictor(ABC):
    """Abstract step of the reverse process, with one network pass."""

    @abstractmethod
    def __call__(self, field: Evaluations, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """Moves states ``(B, *)`` from ``t`` to ``s`` with the standard normal noise ``z``."""


@dataclass(frozen=True)
class EulerMaruyamaPredictor(Predictor):
    r"""Euler-Maruyama on the reverse SDE.

    .. math:: x_s = x - (t - s) \left( f x + \frac{g^2}{\sigma} \hat z \right) + g \sqrt{t - s} z
    """

    def __call__(self, field: Evaluations, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        h = t - s
        x = x - expand(h, x) * field.reverse_drift(x, t)
        return x + expand(field.sde.g(t) * torch.sqrt(h), x) * z


@dataclass(frozen=True)
class ReverseDiffusionPredictor(Predictor):
    r"""The forward transition, reversed as it is: the reverse diffusion sampler.

    With :math:`x_t - x_s = (a - 1) x_s + \tau z` discretising the forward SDE,

    .. math:: x_s = x - (a - 1) x + \tau^2 \nabla_x \log p_t(x) + \tau z .

    References:
        Song et al. 2021, equation 46, with the exact transition for the discretisation.
    """

    def __call__(self, field: Evaluations, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        a, c, sigma = _transition(field.sde, t, s)
        noise = field.noise(x, t)
        mean = expand(2 - a, x) * x - expand(c * sigma, x) * noise
        return mean + expand(torch.sqrt(c) * sigma, x) * z


@dataclass(frozen=True)
class AncestralPredictor(Predictor):
    r"""The posterior :math:`q(x_s \mid x_t, x_0)` with the expected data for :math:`x_0`.

    .. math::
        x_s = \frac{a \sigma_s^2}{\sigma_t^2} x + \frac{\alpha_s \tau^2}{\sigma_t^2} D(x, t)
            + \frac{\sigma_s \tau}{\sigma_t} z
            = \frac{x - c \, \sigma_t \hat z}{a} + \sigma_s \sqrt{c} \, z

    It is Bayes' rule on two Gaussians, so every linear SDE has it, sub-VP too. For VP it is
    DDPM's ancestral sampling, for VE that of SMLD.

    References:
        Song et al. 2021, appendix F; Kingma et al. 2021, equation 34.
    """

    def __call__(self, field: Evaluations, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        a, c, sigma = _transition(field.sde, t, s)
        mean = expand(1 / a, x) * (x - expand(c * sigma, x) * field.noise(x, t))
        return mean + expand(field.sde.sigma(s) * torch.sqrt(c), x) * z


def _transition(sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns :math:`a`, :math:`c` and :math:`\sigma_t`."""
    c = -torch.expm1(sde.log_snr(t) - sde.log_snr(s))
    return sde.alpha(t) / sde.alpha(s), c, sde.sigma(t)
