"""Rectified flow, or flow matching: the straight path between data and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.sde.base import SDE
from scoresde.sde.interpolant import Cutoffs, as_time


@dataclass(frozen=True)
class RectifiedFlow(SDE):
    r"""The straight path from data to noise, whose SNR is exactly zero at t = 1.

    .. math::
        \alpha = 1 - t, \qquad \sigma = t, \qquad f = -\frac{1}{1 - t}, \qquad
        g = \sqrt{\frac{2 t}{1 - t}}, \qquad \lambda = 2 \log \frac{1 - t}{t}

    The velocity :math:`E[z - x_0 \mid x_t]` is finite everywhere, while f, g and the log-SNR are
    infinite at t = 1 (see :class:`~scoresde.sde.SDE`). A network must predict a quantity that
    still determines the data where no signal is left: the data, v, or the preconditioned mixture.

    References:
        Liu, Gong and Liu, *Flow straight and fast: learning to generate and transfer data with
        rectified flow*, 2023, https://arxiv.org/abs/2209.03003 (equation 1).
        Lipman et al., *Flow matching for generative modeling*, 2023,
        https://arxiv.org/abs/2210.02747 (equation 20, with the least :math:`\sigma` 0).

    Example:
        >>> RectifiedFlow().sigma(torch.tensor([0.0, 0.3, 1.0]))
        tensor([0.0000, 0.3000, 1.0000])
    """

    zero_snr = True

    @property
    def cutoffs(self) -> Cutoffs:
        """1e-4; 1e-3 for sampling. The noise at the cut-off equals the cut-off."""
        return Cutoffs(training=1e-4, sampling=1e-3, likelihood=1e-4)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor) -> Tensor:
        return as_time(t).clone()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def f(self, t: Tensor) -> Tensor:
        return -1 / (1 - as_time(t))

    def g(self, t: Tensor) -> Tensor:
        t = as_time(t)
        return torch.sqrt(2 * t / (1 - t))

    def log_snr(self, t: Tensor) -> Tensor:
        t = as_time(t)
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time(self, log_snr: Tensor) -> Tensor:
        r"""Inverts the log-SNR: :math:`t = 1 / (1 + e^{\lambda / 2})`."""
        return torch.sigmoid(-0.5 * as_time(log_snr))

    def time_of_bounded(self, b: Tensor) -> Tensor:
        r"""Inverts :math:`b`: :math:`t = 1 / (1 + \sinh(b / 2))`."""
        return 1 / (1 + torch.sinh(0.5 * as_time(b)))

    @property
    def prior_std(self) -> float:
        """The noise at t = 1, which is 1."""
        return 1.0
