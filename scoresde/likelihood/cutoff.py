r"""Cut-offs: the step from the data to the time at which a likelihood starts.

The ODE starts at a time :math:`\epsilon > 0`, at :math:`x_\epsilon = \alpha x + \sigma z`, and
yields :math:`\log p_\epsilon`, but the quantity of interest is :math:`\log p_0(x)`. With the
relative noise level :math:`s = \sigma / \alpha` at :math:`\epsilon` there are three cut-offs:

=============  ==========================  =====================================================
cut-off        the ODE starts at           added to :math:`\log p_\epsilon` of it
=============  ==========================  =====================================================
plain          :math:`x`                   nothing
rescaled       :math:`\alpha x`            :math:`D \log \alpha`
variational    :math:`\alpha x+\sigma z`   :math:`\log p(x \mid x_\epsilon)
                                           - \log q(x_\epsilon \mid x)`
=============  ==========================  =====================================================

**Plain and rescaled** evaluate a blurred density on data without noise. Both are densities, so the
mean over the data never exceeds that of :math:`\log p_0`, although a single example may have a
larger value. The rescaled one is the density of :math:`x + s z`. Where an eigenvalue of Gaussian
data is :math:`c`, it loses on average

.. math:: \tfrac12 \left( \log(1 + r) - \frac{r}{1 + r} \right) \approx \tfrac14 r^2,
          \qquad r = \frac{s^2}{c},

nats. A direction much finer than the noise, :math:`r \gg 1`, loses :math:`\tfrac12 \log r`.

**Variational.** For any density :math:`p(x \mid x_\epsilon)`, by Jensen's inequality,

.. math::
    \log p(x) = \log \int p_\epsilon(x_\epsilon) \, p(x \mid x_\epsilon) \, dx_\epsilon \ge
    E_{q(x_\epsilon \mid x)} [ \log p_\epsilon(x_\epsilon) + \log p(x \mid x_\epsilon)
    - \log q(x_\epsilon \mid x) ] .

The model of this bound draws :math:`x_\epsilon` with the ODE and then
:math:`x \sim N(D(x_\epsilon), s^2 I)` around the denoised data :math:`D`. Since
:math:`D = (x_\epsilon - \sigma \hat z) / \alpha`, the error of the data is
:math:`x - D = -s (z - \hat z)`, the two normalisers differ by :math:`\alpha^D`, and

.. math:: \log p(x \mid x_\epsilon) - \log q(x_\epsilon \mid x)
          = D \log \alpha + \tfrac12 \lVert z \rVert^2 - \tfrac12 \lVert z - \hat z \rVert^2 .

For an exact model, by Bayes' rule, :math:`\log p_0(x)` is the same expectation with the true
:math:`q(x \mid x_\epsilon)`. The loss is the divergence of this distribution from the Gaussian,
which is too wide: the variance in an eigenvector's direction is :math:`s^2 / (1 + r)`, and the
divergence is, with :math:`\rho = r / (1 + r)`,

.. math:: \tfrac12 \left( -\rho - \log(1 - \rho) \right)
          = \tfrac12 \left( \log(1 + r) - \frac{r}{1 + r} \right) .

This equals the loss of the rescaled cut-off. For Gaussian data the two are equal on average; for
other data they differ, and both are of the order :math:`s^4` where the density is smooth. So the
variational cut-off with the variance :math:`s^2` gains no bits (with a smaller variance,
:math:`\kappa s^2`, it does). Its advantages are that it is a bound for each example, and that it
evaluates a trained network on noised states such as it was trained on, which the data are not.

**Dequantisation.** Quantised data :math:`y` to which normal noise of the standard deviation
:math:`s`, truncated to the bin, is added are almost states of the diffusion already, :math:`\alpha
(y + u) \approx x_\epsilon`. On them the rescaled density loses nothing to the blur. Zheng et al.
use it this way.

References:
    Song et al., *Maximum likelihood training of score-based diffusion models*, 2021,
    https://arxiv.org/abs/2101.09258 (the variational first step).
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630 (the
    reconstruction term).
    Zheng et al., *Improved techniques for maximum likelihood estimation for diffusion ODEs*,
    2023, https://arxiv.org/abs/2305.03935 (truncated-normal dequantisation).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import Conditioned
from scoresde.sde import SDE, as_time
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams


class Cutoff(ABC):
    """Base class for cut-offs, the step from the data to the time where a likelihood starts."""

    @abstractmethod
    def start(
        self, model: Conditioned, x: Tensor, eps: float, streams: Streams, draw: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Returns the state at the cut-off, and the correction to its log-density.

        Arguments:
            model: A score function with its conditions bound; its network passes are counted.
            x: Data in model units, with shape ``(B, *)``.
            eps: The cut-off, in [0, 1); at this time some noise must be left.
            streams: The random streams of the batch.
            draw: Index of the draw from the streams.

        Returns:
            The state ``(B, *)`` and the correction in nats ``(B,)``, both with the data type of
            ``x``.
        """


@dataclass(frozen=True)
class PlainCutoff(Cutoff):
    r"""The density at the cut-off, on the data as they are: :math:`\log p_\epsilon(x)`."""

    def start(
        self, model: Conditioned, x: Tensor, eps: float, streams: Streams, draw: int = 0
    ) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))


@dataclass(frozen=True)
class RescaledCutoff(Cutoff):
    r"""The density of :math:`x_\epsilon / \alpha = x + s z`, the data with a little noise.

    By the change of variables it is :math:`\log p_\epsilon(\alpha x) + D \log \alpha`. For VE it
    equals the plain cut-off. Use it with truncated-normal dequantisation.
    """

    def start(
        self, model: Conditioned, x: Tensor, eps: float, streams: Streams, draw: int = 0
    ) -> tuple[Tensor, Tensor]:
        alpha = float(model.sde.alpha(as_time(eps)).detach())
        return alpha * x, x.new_full((len(x),), _log_scale(model.sde, eps, x))


@dataclass(frozen=True)
class VariationalCutoff(Cutoff):
    r"""A lower bound of the density of the data, from one network pass at the cut-off.

    .. math:: \log p(x) \ge E_z \left[ \log p_\epsilon(\alpha x + \sigma z) + D \log \alpha
              - \tfrac{D}{2} \log \kappa + \tfrac12 \lVert z \rVert^2
              - \tfrac{1}{2 \kappa} \lVert z - \hat z \rVert^2 \right]

    for the last step :math:`p(x \mid x_\epsilon) = N(D(x_\epsilon), \kappa s^2 I)`. One :math:`z`
    of the stream estimates the expectation. The terms are anticorrelated, so the sum varies
    little.

    Arguments:
        variance: The variance :math:`\kappa` of the last step in units of :math:`s^2`, positive; 1
            as published. The optimum is :math:`E \lVert z - \hat z \rVert^2 / D`, below 1, which
            must be estimated on training data. On image-like data it recovers a third of the loss.

    Raises:
        InputError: If ``variance`` is not positive.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.variance < math.inf:
            raise InputError(
                f"variance must be positive and finite, got {self.variance}; use the mean squared "
                "error of the noise at the cut-off, or 1."
            )

    def start(
        self, model: Conditioned, x: Tensor, eps: float, streams: Streams, draw: int = 0
    ) -> tuple[Tensor, Tensor]:
        t = as_time(eps).to(x.device)
        z = streams.normal(x.shape[1:], Purpose.CUTOFF, draw, x.dtype).to(x.device)
        state = model.sde.perturb(x, t, z)
        noise = model.noise(state, t)
        # |z|^2 - |z - n|^2, without the difference of two large numbers
        gain = sum_features(noise * (z - 0.5 * noise))
        spare = 0.5 * (1 - 1 / self.variance) * sum_features((z - noise).square())
        wider = 0.5 * x.shape[1:].numel() * math.log(self.variance)
        return state, gain + spare - wider + _log_scale(model.sde, eps, x)


def _log_scale(sde: SDE, eps: float, x: Tensor) -> float:
    """Returns D log alpha at the cut-off."""
    return x.shape[1:].numel() * float(torch.log(sde.alpha(as_time(eps))).detach())
