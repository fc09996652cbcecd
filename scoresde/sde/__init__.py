r"""Processes that transform an example along t in [0, 1].

A linear stochastic differential equation (SDE) turns data into noise.

A forward process diffuses data :math:`x_0` into noise along :math:`t \in [0, 1]`,

.. math:: dx = f(t) \, x \, dt + g(t) \, dw .

It is linear in :math:`x`, so its transition from :math:`x_0` is a Gaussian known exactly,

.. math:: x_t = \alpha(t) \, x_0 + \sigma(t) \, z, \qquad z \sim N(0, I),

and the pair :math:`(\alpha, \sigma)` is equivalent to the pair :math:`(f, g)`:

.. math:: f = \frac{d \log \alpha}{dt}, \qquad
          g^2 = \frac{d \sigma^2}{dt} - 2 f \sigma^2 = -\sigma^2 \frac{d \lambda}{dt},

where :math:`\lambda = 2 \log (\alpha / \sigma)` is the logarithm of the signal-to-noise ratio.
In reverse time it turns noise into data: with the score :math:`\nabla_x \log p_t(x)`, the
reverse SDE and the probability-flow ODE

.. math:: dx = (f x - g^2 \nabla_x \log p_t(x)) \, dt + g \, d\bar w, \qquad
          \frac{dx}{dt} = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

have the same marginals :math:`p_t` as the forward process.

This package provides the four processes below, discrete chains (:class:`DiscreteVP`) and a learned
schedule (:class:`LearnedSchedule`). With :math:`B(t) = \beta_0 t + \tfrac12 (\beta_1 - \beta_0)
t^2`:

======  ====================  =======================  ==========================
name    alpha                 sigma                    prior at t = 1
======  ====================  =======================  ==========================
VP      exp(-B/2)             sqrt(1 - exp(-B))        N(0, I)
subVP   exp(-B/2)             1 - exp(-B)              N(0, I)
VE      1                     smin (smax/smin)^t       N(0, smax^2 I)
RF      1 - t                 t                        N(0, I)
======  ====================  =======================  ==========================

An SDE is an :class:`Interpolant` between an example and noise. A :class:`Bridge` is an interpolant
between an example and its observation. A :class:`StochasticInterpolant` adds noise between its two
ends.

References:
    Song et al., *Score-based generative modeling through stochastic differential equations*,
    ICLR 2021, https://arxiv.org/abs/2011.13456 (equations 6, 13, and 28 to 33).
    Anderson, *Reverse-time diffusion equation models*, 1982.
"""

from scoresde.sde.base import SDE
from scoresde.sde.bridges import (
    I2SB,
    Bridge,
    BridgeStep,
    Brownian,
    BrownianPin,
    Constant,
    InDI,
    NoiseLaw,
    check_source,
)
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
from scoresde.sde.stochastic import End, Source, StandardNormal, StochasticInterpolant

__all__ = [
    "I2SB",
    "SDE",
    "VESDE",
    "VPSDE",
    "Betas",
    "Bridge",
    "BridgeStep",
    "Brownian",
    "BrownianPin",
    "Chain",
    "Constant",
    "CosineBetas",
    "Cutoffs",
    "DiscreteVP",
    "End",
    "InDI",
    "Interpolant",
    "LearnedSchedule",
    "LinearBetas",
    "ListedBetas",
    "NoiseLaw",
    "RectifiedFlow",
    "Source",
    "StandardNormal",
    "StochasticInterpolant",
    "SubVPSDE",
    "ZeroSNRChain",
    "as_time",
    "check_source",
    "derivative",
]
