r"""Learned schedule: a variance-preserving SDE whose log-SNR is a monotone network.

.. math:: \alpha^2 = \operatorname{sigmoid}(\lambda), \qquad
          \sigma^2 = \operatorname{sigmoid}(-\lambda), \qquad
          \lambda(t) = \lambda_0 + (\lambda_1 - \lambda_0) \, m(t)

with two end points and an interior :math:`m` that grows from 0 to 1. By the chain rule all
coefficients follow from :math:`\lambda` and :math:`m'`, without cancellation:

.. math:: f = \tfrac12 \sigma^2 \lambda', \qquad g = \sigma \sqrt{-\lambda'}, \qquad
          \alpha' = f \alpha, \qquad \sigma' = -\tfrac12 \sigma \alpha^2 \lambda' .

**The interior** is the sum of a line and H sigmoids of that line, with positive weights
(softplus),

.. math:: n(t) = s t + \sum_k h_k \operatorname{sigmoid}(a_k (s t - c_k)), \qquad
          m(t) = \frac{n(t) - n(0)}{n(1) - n(0)} .

Biases of the line and of the sum would have no effect: the first is absorbed by the :math:`c_k`,
and the second cancels. With the bias written as :math:`-a_k c_k`, a sigmoid keeps its position
when it becomes steeper. The division fixes the end points at their set values; the published code
omits it, so its end points move with the weights. The difference from :math:`n(0)` is computed
term by term,

.. math:: \operatorname{sigmoid}(y + d) - \operatorname{sigmoid}(y)
          = \operatorname{sigmoid}(y + d) \operatorname{sigmoid}(-y) \, (1 - e^{-d}) .

**Training objective.** In continuous time the bound depends on the end points alone. The interior
determines the variance of its estimate over random times, and
:class:`~scoresde.loss.VariationalLoss` trains the interior to minimise this variance.

References:
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (section 3.2 and the appendix on the monotone network).
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scoresde.errors import InputError, check_count
from scoresde.recipe import describable
from scoresde.sde.base import SDE
from scoresde.sde.interpolant import Cutoffs, Interpolant, as_time

_MARGIN = 0.1  # initial distance of the outermost sigmoids beyond [0, 1]
_LINE = 0.5  # the initial share of the line


@describable
class LearnedSchedule(nn.Module, SDE):
    r"""A variance-preserving SDE with a learned log-SNR.

    Initially it is nearly linear in t. Its noise at t = 0 is positive, so no cut-off is needed.

    Arguments:
        log_snr_max: The initial log-SNR :math:`\lambda_0` at t = 0.
        log_snr_min: The initial log-SNR :math:`\lambda_1` at t = 1, below ``log_snr_max``.
        width: The number H of sigmoids, positive.
        fixed_ends: Whether the end points are fixed at these values instead of learned.

    Raises:
        InputError: If the end points are not finite or in the wrong order.

    Example:
        >>> sde = LearnedSchedule()
        >>> sde.log_snr(torch.tensor([0.0, 0.5, 1.0])).detach()
        tensor([13.3000,  4.1500, -5.0000])
    """

    log_snr_max: Tensor
    log_snr_min: Tensor

    def __init__(
        self,
        log_snr_max: float = 13.3,
        log_snr_min: float = -5.0,
        width: int = 32,
        fixed_ends: bool = False,
    ) -> None:
        super().__init__()
        numbers = all(isinstance(end, int | float) for end in (log_snr_max, log_snr_min))
        if not numbers or not -math.inf < log_snr_min < log_snr_max < math.inf:
            raise InputError(
                "log_snr_max and log_snr_min must be finite with log_snr_min < log_snr_max, got "
                f"{log_snr_max} and {log_snr_min}; typical values for images are 13.3 and -5."
            )
        count = check_count("width", width)
        for name, value in (("log_snr_max", log_snr_max), ("log_snr_min", log_snr_min)):
            end = torch.tensor(float(value))
            self.register_buffer(name, end) if fixed_ends else self.register_parameter(
                name, nn.Parameter(end)
            )
        # Equal, evenly spaced sigmoids, about as wide as their spacing: nearly a line in total.
        ones = torch.ones(count)
        self.slope = nn.Parameter(_softplus_inverse(torch.tensor(1.0)))
        self.steepness = nn.Parameter(_softplus_inverse(ones))  # in units of the width
        self.centre = nn.Parameter(torch.linspace(-_MARGIN, 1 + _MARGIN, count))
        self.height = nn.Parameter(_softplus_inverse((1 / _LINE - 1) * ones / count))
        self._factor: Callable[[], Tensor] | None = None

    @property
    def cutoffs(self) -> Cutoffs:
        """0 for each use, since some noise is left at t = 0."""
        return Cutoffs(training=0.0, sampling=0.0, likelihood=0.0)

    @property
    def prior_std(self) -> float:
        """The limit of a log-SNR of minus infinity: 1."""
        return 1.0

    def check_eps(self, eps: float) -> float:
        """Returns a cut-off in [0, 1); 0 is allowed, since some noise is left at t = 0."""
        return Interpolant.check_eps(self, eps)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.f(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        snr, rate = self._log_snr(t)
        return 0.5 * rate * torch.sigmoid(snr) * torch.sigmoid(-snr).sqrt()

    def f(self, t: Tensor) -> Tensor:
        snr, rate = self._log_snr(t)
        return -0.5 * rate * torch.sigmoid(-snr)

    def g(self, t: Tensor) -> Tensor:
        snr, rate = self._log_snr(t)
        return torch.sqrt(rate * torch.sigmoid(-snr))

    def log_snr(self, t: Tensor) -> Tensor:
        return self._log_snr(as_time(t))[0]

    @contextlib.contextmanager
    def scaled_interior(self, factor: Callable[[], Tensor]) -> Iterator[None]:
        r"""Scales the gradients of the interior by a factor per example, in a ``with`` block.

        Coefficients at the times :math:`t_i` of a batch depend on the interior only through
        :math:`m(t_i)` and :math:`m'(t_i)`. Their gradients are multiplied by the factor before
        they reach the weights; those of the end points are not.

        Arguments:
            factor: Function that returns the factors ``(B,)``; called in the backward pass.
        """
        before, self._factor = self._factor, factor
        try:
            yield
        finally:
            self._factor = before

    def _log_snr(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\lambda` and :math:`-\lambda'`."""
        fall = self.log_snr_max - self.log_snr_min
        share, rate = self._interior(t)
        return self.log_snr_max - fall * share, fall * rate

    def _interior(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns m(t) and its derivative."""
        end, _ = self._rise(torch.ones_like(t))
        share, rate = (part / end for part in self._rise(t))
        factor = self._factor
        if factor is not None and t.ndim == 1 and share.requires_grad:
            for part in (share, rate):
                part.register_hook(lambda gradient: gradient * factor().to(gradient))
        return share, rate

    def _rise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns n(t) - n(0) and its derivative."""
        slope, height = softplus(self.slope), softplus(self.height)
        steepness = softplus(self.steepness) * len(height)
        far, start = t.unsqueeze(-1) * slope * steepness, steepness * self.centre
        on = torch.sigmoid(far - start)
        rise = -on * torch.sigmoid(start) * torch.expm1(-far)
        rate = on * torch.sigmoid(start - far) * steepness * slope
        return slope * t + rise @ height, slope + rate @ height

    def extra_repr(self) -> str:
        ends = (float(end.detach()) for end in (self.log_snr_max, self.log_snr_min))
        return "log_snr_max={:.4g}, log_snr_min={:.4g}".format(*ends)


def _softplus_inverse(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
