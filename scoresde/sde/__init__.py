r"""Processes: how an example is turned into something else.

A linear stochastic differential equation (SDE) turns data into noise.

A forward process diffuses data :math:`x_0` into noise along :math:`t \in [0, 1]`,

.. math:: dx = f(t) \, x \, dt + g(t) \, dw .

It is linear in :math:`x`, so that its transition from :math:`x_0` is a Gaussian known exactly,

.. math:: x_t = \alpha(t) \, x_0 + \sigma(t) \, z, \qquad z \sim N(0, I),

and the pair :math:`(\alpha, \sigma)` says the same thing as the pair :math:`(f, g)`:

.. math:: f = \frac{d \log \alpha}{dt}, \qquad
          g^2 = \frac{d \sigma^2}{dt} - 2 f \sigma^2 = -\sigma^2 \frac{d \lambda}{dt},

where :math:`\lambda = 2 \log (\alpha / \sigma)` is the logarithm of the signal-to-noise ratio.
Run backwards, it turns noise into data: with the score :math:`\nabla_x \log p_t(x)`, the reverse
SDE and the probability-flow ODE

.. math:: dx = (f x - g^2 \nabla_x \log p_t(x)) \, dt + g \, d\bar w, \qquad
          \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

have the same marginals :math:`p_t` as the forward process.

Four processes are defined here, discrete chains (:class:`DiscreteVP`) and a schedule that is
learned (:class:`LearnedSchedule`). With :math:`B(t) =
\beta_0 t + \tfrac12 (\beta_1 - \beta_0) t^2`:

======  ====================  =======================  ==========================
name    alpha                 sigma                    prior at t = 1
======  ====================  =======================  ==========================
VP      exp(-B/2)             sqrt(1 - exp(-B))        N(0, I)
subVP   exp(-B/2)             1 - exp(-B)              N(0, I)
VE      1                     smin (smax/smin)^t       N(0, smax^2 I)
RF      1 - t                 t                        N(0, I)
======  ====================  =======================  ==========================

An SDE is an :class:`Interpolant` between an example and noise; a bridge is one between two
examples.

References:
    Song et al., *Score-based generative modeling through stochastic differential equations*,
    ICLR 2021, https://arxiv.org/abs/2011.13456 (equations 6, 13, and 28 to 33).
    Anderson, *Reverse-time diffusion equation models*, 1982.
"""

from scoresde.sde.base import SDE
from scoresde.sde.continuous import VESDE, VPSDE, SubVPSDE
from scoresde.sde.discrete import (
    Betas,
    Chain,
    CosineBetas,
    DiscreteVP,
    LinearBetas,
    ListedBetas,
    ZeroSNRChain,
)
from scoresde.sde.interpolant import Cutoffs, Interpolant, as_time, derivative
from scoresde.sde.learned import LearnedSchedule
from scoresde.sde.rectified import RectifiedFlow

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "Betas",
    "Chain",
    "CosineBetas",
    "Cutoffs",
    "DiscreteVP",
    "Interpolant",
    "LearnedSchedule",
    "LinearBetas",
    "ListedBetas",
    "RectifiedFlow",
    "SubVPSDE",
    "ZeroSNRChain",
    "as_time",
    "derivative",
]
