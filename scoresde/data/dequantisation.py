r"""Dequantisation: offsets of integers within their quantisation steps.

A density :math:`p` on real numbers gives an integer :math:`y` the probability of its step, and any
density :math:`q` of an offset :math:`u` in the step gives a lower bound of it,

.. math:: \log P(y) = \log \int_{[0, 1]^D} p(y + u) \, du
                    \ge \mathbb{E}_{u \sim q} \left[ \log p(y + u) - \log q(u) \right] ,

tight where :math:`q(u)` is proportional to :math:`p(y + u)`. Uniform offsets are the usual choice.
A model that was trained with noise on images at the centres of their levels has a sharper density.
Around each image it is close to a normal distribution with the standard deviation
:math:`\sigma_\epsilon / \alpha_\epsilon` at the cut-off :math:`\epsilon`. Offsets from the same
distribution, truncated to the step, match this density more closely.

References:
    Theis et al., *A note on the evaluation of generative models*, ICLR 2016 (section 3.1).
    Ho et al., *Flow++*, 2019, https://arxiv.org/abs/1902.00275 (section 3.1; other q).
    Zheng et al., *Improved techniques for maximum likelihood estimation for diffusion ODEs*,
    2023, https://arxiv.org/abs/2305.03935 (the truncated normal q).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.data.checks import check_positive
from scoresde.errors import InputError
from scoresde.sde import SDE
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams

_EDGE = 2.0**-24  # the outermost uniform number, exact in float32 at both ends


class Dequantisation(ABC):
    """Base class for densities of the offset u in a step, the same for every element."""

    @abstractmethod
    def sample(self, streams: Streams, shape: Sequence[int], draw: int = 0) -> Tensor:
        """Draws offsets.

        Arguments:
            streams: Random streams, one for each of B examples.
            shape: Shape of one example.
            draw: Index of the independent draw, in :math:`[0, 2^{32})`.

        Returns:
            Offsets in the open interval (0, 1), float32, with shape ``(B, *shape)``.
        """

    @abstractmethod
    def log_prob(self, u: Tensor) -> Tensor:
        """Returns the log-density of offsets.

        Arguments:
            u: Offsets in units of one quantisation step, with shape ``(B, *)``.

        Returns:
            The log-densities in nats, float64, with shape ``(B,)``; -inf outside of (0, 1).
        """

    @abstractmethod
    def check(self, levels: int) -> None:
        """Checks that float32 resolves the offsets for a number of levels.

        Raises:
            InputError: If float32 does not resolve them.
        """


@final
@dataclass(frozen=True)
class UniformDequantisation(Dequantisation):
    """Offsets uniform in the step, as :meth:`Dataset.batch` draws them.

    Example:
        >>> UniformDequantisation().log_prob(torch.tensor([[0.1, 0.9], [0.5, 1.5]]))
        tensor([0., -inf], dtype=torch.float64)
    """

    def sample(self, streams: Streams, shape: Sequence[int], draw: int = 0) -> Tensor:
        return streams.uniform(shape, Purpose.DEQUANTISE, draw)

    def log_prob(self, u: Tensor) -> Tensor:
        return _sum_inside(torch.zeros_like(u, dtype=torch.float64), u)

    def check(self, levels: int) -> None:
        """Accepts any number of levels."""


@final
@dataclass(frozen=True)
class TruncatedNormalDequantisation(Dequantisation):
    r"""Normal offsets around the centre of the step, truncated to it.

    .. math:: q(u) = \frac{1}{Z \sqrt{2 \pi} \, s} e^{-(u - 1/2)^2 / 2 s^2}, \quad 0 < u < 1,
              \qquad Z = \operatorname{erf} \frac{1}{2 \sqrt{2} \, s} ,

    which tends to the uniform density as :math:`s \to \infty`. A uniform number :math:`v` becomes

    .. math:: u = \tfrac12 + \sqrt{2} \, s \, \operatorname{erf}^{-1} \left( (2 v - 1) Z \right)

    in float64: the uniform offset of the same seed, moved towards the centre. The uniform numbers
    lie on a grid of :math:`2^{-23}`, so offsets are within 5.3 standard deviations of the centre.

    Arguments:
        std: Standard deviation :math:`s` before truncation, in quantisation steps, positive.

    Raises:
        InputError: If the standard deviation is not positive and finite.

    References:
        Zheng et al. 2023, https://arxiv.org/abs/2305.03935.

    Example:
        >>> q = TruncatedNormalDequantisation(std=0.25)
        >>> q.log_prob(torch.tensor([[0.5], [0.75]]))
        tensor([0.5139, 0.0139], dtype=torch.float64)
    """

    std: float

    def __post_init__(self) -> None:
        check_positive("std", self.std)

    @staticmethod
    def of(sde: SDE, scale: float, eps: float | None = None) -> "TruncatedNormalDequantisation":
        r"""Returns the offsets that match the noise at the cut-off of a likelihood.

        .. math:: s = \sigma(\epsilon) / (\alpha(\epsilon) \cdot \text{scale})

        The corresponding likelihood starts at this cut-off, on the data multiplied by
        :math:`\alpha(\epsilon)` (:class:`~scoresde.likelihood.cutoff.RescaledCutoff`).

        Arguments:
            sde: The SDE.
            scale: Model units per quantisation step, positive (:attr:`Dataset.scale`).
            eps: Cut-off, in [0, 1). If None, ``sde.cutoffs.likelihood``.

        Raises:
            InputError: If an argument is out of range, or there is no noise at the cut-off.

        Example:
            >>> from scoresde import VPSDE
            >>> round(TruncatedNormalDequantisation.of(VPSDE(), scale=2 / 256).std, 4)
            0.1281
        """
        eps = sde.check_eps(sde.cutoffs.likelihood if eps is None else eps)
        t = torch.tensor(eps, dtype=torch.float64)
        std = float(sde.sigma(t) / sde.alpha(t))
        return TruncatedNormalDequantisation(std / check_positive("scale", scale))

    @property
    def _inside(self) -> float:
        """Probability Z of the step before truncation."""
        return math.erf(math.sqrt(0.125) / self.std)

    def sample(self, streams: Streams, shape: Sequence[int], draw: int = 0) -> Tensor:
        v = streams.uniform(shape, Purpose.DEQUANTISE, draw, torch.float64)
        # Odd functions of 2 v - 1 keep all digits for a wide normal; 1/2 + tiny would not.
        u = 0.5 + math.sqrt(2) * self.std * torch.erfinv((2 * v - 1) * self._inside)
        return u.clamp(_EDGE, 1 - _EDGE).float()

    def log_prob(self, u: Tensor) -> Tensor:
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi) + math.log(self._inside)
        return _sum_inside(-0.5 * ((u.double() - 0.5) / self.std) ** 2 - constant, u)

    def check(self, levels: int) -> None:
        """Checks that the standard deviation is at least 64 float32 spacings at the top level.

        Rounding :math:`y + u` then costs below 3e-5 bits/dim; finer offsets become a lattice.
        """
        least = levels * 2.0**-18
        if self.std < least:
            raise InputError(
                f"std must be at least {least:.2g} steps for {levels} levels in float32, got "
                f"{self.std}; use a larger cut-off, or UniformDequantisation()."
            )


def _sum_inside(log_densities: Tensor, u: Tensor) -> Tensor:
    """Sums log-densities over elements, -inf outside of (0, 1): ``(B, *)`` to ``(B,)``."""
    inside = (u > 0) & (u < 1)
    return sum_features(torch.where(inside, log_densities, -torch.inf))
