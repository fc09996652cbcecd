"""Base class for linear SDEs, which are defined by two functions of time."""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.sde.interpolant import Interpolant, as_time, derivative
from scoresde.shapes import expand, log_normal

_BISECTIONS = 64
_NO_SIGNAL = 1e-9  # alpha / sigma at t = 1 that is zero up to rounding


class SDE(Interpolant):
    r"""Base class for linear SDEs; subclasses define :math:`\alpha` and :math:`\sigma`.

    It is the :class:`~scoresde.sde.Interpolant` whose other end is noise, :math:`x_1 = z`. The
    functions of time take a tensor of any shape and return one of the same shape and data type (a
    plain number counts as float64), and have no branch that depends on data. The class of a
    learned schedule also derives from ``torch.nn.Module``.

    **Zero SNR.** If no signal is left at t = 1, :math:`\alpha(1) = 0`, as for
    :class:`~scoresde.sde.RectifiedFlow`, the log-SNR, f and g are infinite there. A class that
    declares this with ``zero_snr = True`` is handled with a bounded variable instead,

    .. math:: b = 2 \operatorname{arsinh} \frac{\alpha}{\sigma}, \qquad
              d\lambda = \coth\tfrac{b}{2} \, db,

    which falls to 0 at t = 1 and is the log-SNR up to the constant :math:`2 \log 2` near the data.
    """

    zero_snr: ClassVar[bool] = False

    def f(self, t: Tensor) -> Tensor:
        r"""Returns the drift coefficient :math:`f(t) = d \log \alpha / dt`."""
        return derivative(lambda s: torch.log(self.alpha(s)), as_time(t))

    def g(self, t: Tensor) -> Tensor:
        r"""Returns the diffusion coefficient :math:`g(t)`.

        .. math:: g^2 = d \sigma^2 / dt - 2 f \sigma^2
        """
        t = as_time(t)
        growth = derivative(lambda s: self.sigma(s) ** 2, t)
        return torch.sqrt(growth - 2 * self.f(t) * self.sigma(t) ** 2)

    def log_snr(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\lambda(t) = 2 \log (\alpha / \sigma)`, decreasing in time."""
        t = as_time(t)
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def time(self, log_snr: Tensor) -> Tensor:
        """Returns the time in [0, 1] at which the log-SNR has a given value, by bisection.

        VP, sub-VP, VE and rectified flow override it with a closed form.
        """
        target = as_time(log_snr)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            later = self.log_snr(middle) > target
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return 0.5 * (low + high)

    def bounded(self, t: Tensor) -> Tensor:
        r"""Returns :math:`b = 2 \operatorname{arsinh} (\alpha / \sigma)`, decreasing in time."""
        t = as_time(t)
        return 2 * torch.asinh(self.alpha(t) / self.sigma(t))

    def time_of_bounded(self, b: Tensor) -> Tensor:
        """Returns the time in [0, 1] at which :meth:`bounded` has a given value."""
        return self.time(2 * torch.log(torch.sinh(0.5 * as_time(b))))

    @property
    def prior_std(self) -> float:
        r"""The standard deviation of the prior :math:`N(0, \mathrm{std}^2 I)` at t = 1."""
        return _number(self.sigma, 1.0)

    def start(self, noise: Tensor, temperature: float = 1.0, **cond: Tensor) -> Tensor:
        return temperature * self.prior_std * noise

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the standard deviation of :math:`p(x_t \mid x_0)`.

        Arguments:
            x0: Clean data, with shape ``(B, *)``.
            t: Times in [0, 1], with shape ``()`` or ``(B,)``.

        Returns:
            The mean, with shape ``(B, *)``, and the standard deviation, which broadcasts to it.
        """
        t = as_time(t)
        return expand(self.alpha(t), x0) * x0, expand(self.sigma(t), x0)

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        r"""Returns :math:`\alpha(t) x_0 + \sigma(t) z`; shapes as in :meth:`marginal`."""
        mean, std = self.marginal(x0, t)
        return mean + std * noise

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`a` and :math:`\tau` of the step :math:`x_t = a x_s + \tau z`.

        .. math:: a = \frac{\alpha_t}{\alpha_s}, \qquad \tau^2 = \sigma_t^2 - a^2 \sigma_s^2
                  = (1 - e^{\lambda_t - \lambda_s}) \, \sigma_t^2,

        where the last form is accurate for small steps.

        Arguments:
            s: The earlier times, in [0, 1].
            t: The later times, with the shape of ``s``.
        """
        s, t = as_time(s), as_time(t)
        gain = -torch.expm1(self.log_snr(t) - self.log_snr(s))
        return self.alpha(t) / self.alpha(s), torch.sqrt(gain) * self.sigma(t)

    def posterior(self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the mean and the standard deviation of :math:`q(x_s \mid x_t, x_0)`.

        .. math:: \frac{a \sigma_s^2}{\sigma_t^2} x_t + \frac{\alpha_s \tau^2}{\sigma_t^2} x_0,
                  \qquad \frac{\sigma_s \tau}{\sigma_t}

        This is Bayes' rule for two Gaussians, so it holds for every linear SDE.

        References:
            Ho et al. 2020, equations 6 and 7; Kingma et al. 2021, https://arxiv.org/abs/2107.00630
            (equation 26).

        Arguments:
            x: States at time ``t``, with shape ``(B, *)``.
            x0: Clean data, with the shape of ``x``.
            t: The later times, with shape ``()`` or ``(B,)``.
            s: The earlier times, with shape ``()`` or ``(B,)``, above 0 (0 is allowed if some
                noise is left there).

        Returns:
            The mean, with shape ``(B, *)``, and the standard deviation, which broadcasts to it.
        """
        s, t = as_time(s), as_time(t)
        a, tau = self.transition(s, t)
        sigma_s, sigma_t = self.sigma(s), self.sigma(t)
        of_x = expand(a * (sigma_s / sigma_t) ** 2, x)
        of_x0 = expand(self.alpha(s) * (tau / sigma_t) ** 2, x)
        return of_x * x + of_x0 * x0, expand(sigma_s * tau / sigma_t, x)

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draws samples of the prior, with shape ``shape``."""
        z = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
        return self.prior_std * z

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Returns the log-density of the prior in nats: ``(B, *)`` to ``(B,)``."""
        return log_normal(x, self.prior_scale())

    def prior_scale(self) -> Tensor | float:
        """Returns the prior's standard deviation; a tensor with a graph if it is learned."""
        learned = isinstance(self, nn.Module) and type(self).prior_std is SDE.prior_std
        return self.sigma(as_time(1.0)) if learned else self.prior_std

    def check_eps(self, eps: float) -> float:
        r"""Returns a cut-off after checking it.

        Raises:
            InputError: If ``eps`` is outside [0, 1), if it is 0 and :math:`\sigma(0) = 0` (the
                score is infinite there), or if ``zero_snr`` of the class is wrong.
        """
        eps = super().check_eps(eps)
        if not isinstance(self, nn.Module):  # ends of a module change and may be on a GPU
            _check_end(self)
        if eps == 0 and _number(self.sigma, 0.0) == 0:
            raise InputError(
                f"eps must be positive for {self}, whose score is infinite at t = 0, got {eps}; "
                f"pass {self.cutoffs.training} for example."
            )
        return eps


@functools.lru_cache(maxsize=64)
def _check_end(sde: SDE) -> None:
    """Checks that ``zero_snr`` agrees with the signal left at t = 1."""
    left = _number(sde.alpha, 1.0) / _number(sde.sigma, 1.0)
    if left < _NO_SIGNAL and not sde.zero_snr:
        raise InputError(
            f"zero_snr must be True for {sde}, whose alpha / sigma vanishes at t = 1 "
            f"({left:.3g}), got False; set zero_snr = True in the class."
        )
    if left > 1e-6 and sde.zero_snr:
        raise InputError(
            f"zero_snr must be False for {sde}, whose alpha / sigma is {left:.3g} at t = 1, got "
            "True; set zero_snr = False in the class."
        )


@torch.no_grad()
def _number(coefficient: Callable[[Tensor], Tensor], t: float) -> float:
    return float(coefficient(torch.tensor(t, dtype=torch.float64)))
