r"""Bridges: processes between an example and its observation, the *source*.

.. math:: x_t = (1 - w) \, x_0 + w \, y + \nu(w) \, n, \qquad n \sim N(0, I), \quad w = w(t)

with the data at t = 0 and the observation at t = 1. The *clock* :math:`w` rises from 0 to 1, and a
:class:`NoiseLaw` defines the standard deviation :math:`\nu` of the noise between them.

**The step.** From t to an earlier s, with :math:`r = w_s / w_t` and a denoised estimate D,

.. math:: \hat x_s = r \, \hat x_t + (1 - r) \, D + \tau \, n, \qquad
          \tau^2 = \nu_s^2 - r^2 \nu_t^2 .

If D is :math:`x_0` itself, the right side has mean :math:`(1 - w_s) x_0 + w_s y` and variance
:math:`r^2 \nu_t^2 + \tau^2`. So only this :math:`\tau` preserves the marginals. It exists if and
only if :math:`\nu(w) / w` does not increase; other laws raise an error.

======================  ==============================  =======================================
law                     :math:`\nu(w)`                  :math:`\tau` from w to v
======================  ==============================  =======================================
:class:`Constant`       :math:`\sigma w`                0
:class:`Brownian`       :math:`\sigma \sqrt w`          :math:`\sigma \sqrt{v (w - v) / w}`
:class:`BrownianPin`    :math:`\sigma \sqrt{w (1-w)}`   :math:`\sigma \sqrt{v (w - v) / w}`
======================  ==============================  =======================================

The increment :math:`s \sqrt{\sigma_s^2 - \sigma_t^2}` belongs to :math:`\nu = t \sigma_t`. Paired
with the marginal :math:`\nu = \sqrt t \, \sigma_t`, it loses noise at every step.

:class:`InDI` has the clock w = t. :class:`I2SB` takes the same step on the clock :math:`w =
\sigma_t^2 / \sigma_1^2` of its diffusion, with the noise pinned at both ends: there :math:`\tau^2
= \sigma_s^2 (\sigma_t^2 - \sigma_s^2) / \sigma_t^2`, the variance of the posterior :math:`q(x_s
\mid x_t, x_0)`. It has the same increments as :class:`Brownian`; only the starting points differ.

References:
    Delbracio and Milanfar, *Inversion by direct iteration: an alternative to denoising diffusion
    for image restoration*, 2023, https://arxiv.org/abs/2303.11435.
    Liu et al., *I2SB: image-to-image Schrödinger bridge*, 2023, https://arxiv.org/abs/2302.05872
    (equations 4 and 11).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde.interpolant import Cutoffs, Interpolant, as_time, derivative

_PLACES = 400  # points at which a noise law is checked
_ROUNDING = 1e-9


class NoiseLaw(ABC):
    r"""Base class for noise laws of bridges; subclasses define :math:`\nu`."""

    @abstractmethod
    def std(self, w: Tensor) -> Tensor:
        r"""Returns :math:`\nu(w)`, at least 0 and 0 at w = 0, for w in [0, 1] of any shape."""

    def rate(self, w: Tensor) -> Tensor:
        r"""Returns :math:`\nu \nu' = \tfrac12 d \nu^2 / dw`, the rate of half the variance."""
        return derivative(lambda v: 0.5 * self.std(v) ** 2, as_time(w))

    def added(self, w: Tensor, v: Tensor) -> Tensor:
        r"""Returns :math:`\tau = \sqrt{\nu_v^2 - (v/w)^2 \nu_w^2}` for a step from w to v < w."""
        kept = v / w * self.std(w)
        return torch.sqrt((self.std(v) ** 2 - kept**2).clamp(min=0.0))


def check_scale(name: str, value: object) -> None:
    """Checks the scale of the noise.

    Raises:
        InputError: If ``value`` is not a finite number of at least 0.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:  # type: ignore[operator]
        raise InputError(
            f"{name} must be non-negative and finite, got {value}; a typical value is 0.1."
        )


@dataclass(frozen=True)
class Constant(NoiseLaw):
    r"""Noise :math:`\nu(w) = \sigma w`, drawn once at the source; steps add no noise.

    Arguments:
        sigma: The standard deviation at the source, in model units, at least 0.

    Example:
        >>> Constant(0.5).std(torch.tensor([0.0, 0.2, 1.0]))
        tensor([0.0000, 0.1000, 0.5000])
    """

    sigma: float = 0.0

    def __post_init__(self) -> None:
        check_scale("sigma", self.sigma)

    def std(self, w: Tensor) -> Tensor:
        return self.sigma * w

    def rate(self, w: Tensor) -> Tensor:
        return self.sigma**2 * w

    def added(self, w: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


@dataclass(frozen=True)
class Brownian(NoiseLaw):
    r"""Noise :math:`\nu(w) = \sigma \sqrt w` of a Brownian motion that starts at the data.

    Arguments:
        sigma: The standard deviation at the source, in model units, at least 0.

    Example:
        >>> Brownian(0.5).std(torch.tensor([0.0, 0.25, 1.0]))
        tensor([0.0000, 0.2500, 0.5000])
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        check_scale("sigma", self.sigma)

    def std(self, w: Tensor) -> Tensor:
        return self.sigma * torch.sqrt(w)

    def rate(self, w: Tensor) -> Tensor:
        return torch.full_like(w, 0.5 * self.sigma**2)

    def added(self, w: Tensor, v: Tensor) -> Tensor:
        return self.sigma * torch.sqrt(v * (w - v) / w)


@dataclass(frozen=True)
class BrownianPin(Brownian):
    r"""Noise :math:`\nu(w) = \sigma \sqrt{w (1 - w)}` of a Brownian bridge, pinned at both ends.

    Arguments:
        sigma: Twice the standard deviation at w = 1/2, in model units, at least 0.
    """

    def std(self, w: Tensor) -> Tensor:
        return self.sigma * torch.sqrt(w * (1 - w))

    def rate(self, w: Tensor) -> Tensor:
        return self.sigma**2 * (0.5 - w)


class BridgeStep(NamedTuple):
    """Coefficients of a step of a bridge, each with the shape of the times.

    Arguments:
        state: The factor r of the state.
        data: The factor 1 - r of the denoised estimate.
        noise: The standard deviation of the added noise.
    """

    state: Tensor
    data: Tensor
    noise: Tensor


class Bridge(Interpolant):
    """Base class for bridges; subclasses define the clock and the noise law."""

    # The loss and the samplers that need 1 / t stop there; ``Restore`` ends at t = 0.
    _CUTOFFS: ClassVar[Cutoffs] = Cutoffs(training=1e-3, sampling=1e-3, likelihood=1e-3)

    @property
    def cutoffs(self) -> Cutoffs:
        """1e-3: a sampler of 1000 steps evaluates no earlier time."""
        return self._CUTOFFS

    @property
    @abstractmethod
    def law(self) -> NoiseLaw:
        """The noise law."""

    def clock(self, t: Tensor) -> Tensor:
        """Returns the clock w(t), which rises from 0 to 1; t by default."""
        return as_time(t).clone()

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.clock(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.clock(t)

    def gamma(self, t: Tensor) -> Tensor:
        return self.law.std(self.clock(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self.sigma_dot(t)

    def gamma_rate(self, t: Tensor) -> Tensor:
        return self.law.rate(self.clock(t)) * self.sigma_dot(t)

    def step(self, t: Tensor, s: Tensor) -> BridgeStep:
        r"""Returns :math:`r`, :math:`1 - r` and :math:`\tau` for the step from t to an earlier s.

        Arguments:
            t: The later times, in (0, 1].
            s: The earlier times, in [0, 1], with the shape of ``t``.
        """
        w, v = self.clock(t), self.clock(s)
        kept = v / w
        return BridgeStep(kept, 1 - kept, self.law.added(w, v))

    def start(self, noise: Tensor, temperature: float = 1.0, **cond: Tensor) -> Tensor:
        r"""Returns :math:`y + \nu(1) n`; arguments as for :class:`Interpolant`.

        Raises:
            InputError: If ``source`` is missing, or its shape differs from that of ``noise``.
        """
        source = check_source(cond, noise).to(noise)
        return source + temperature * self.gamma(as_time(1.0)).to(noise) * noise

    def _check_law(self) -> None:
        _check(self.law)


def check_source(cond: dict[str, Tensor], x: Tensor) -> Tensor:
    """Returns the source of each example.

    Arguments:
        cond: The conditions.
        x: States, with shape ``(B, *)``.

    Raises:
        InputError: If the source is missing, or its shape differs from that of ``x``.
    """
    source = cond.get("source")
    if source is None:
        raise InputError(
            f"source must be a tensor of shape {tuple(x.shape)} for a bridge, got None; pass "
            "source=y."
        )
    if source.shape != x.shape:
        raise InputError(
            f"source must have the shape of the examples, {tuple(x.shape)}, got "
            f"{tuple(source.shape)}; convert it, for example with the pseudo_inverse of its "
            "operator."
        )
    return source


def _check(law: NoiseLaw) -> None:
    """Rejects a noise law for which no step preserves the marginals."""
    if not isinstance(law, NoiseLaw):
        raise InputError(
            f"noise must be a NoiseLaw such as Constant(0.1) or Brownian(0.1), got {law!r}."
        )
    w = torch.linspace(-8, 0, _PLACES, dtype=torch.float64).mul(math.log(10)).exp()
    w = torch.cat((w, torch.linspace(0, 1, _PLACES + 1, dtype=torch.float64)[1:])).sort().values
    first, std = float(law.std(torch.zeros((), dtype=torch.float64))), law.std(w)
    if first != 0 or not bool((std.isfinite() & (std >= 0)).all()):
        raise InputError(
            f"noise must have a finite, non-negative std that is 0 at t = 0, got {law} with "
            f"{first:.3g} at 0 and {std.min():.3g} to {std.max():.3g} after it; use Constant(0.1) "
            "or Brownian(0.1)."
        )
    ratio = std / w
    rises = ratio.diff() > _ROUNDING * ratio.max()
    if bool(rises.any()):
        at = int(rises.nonzero()[0])
        raise InputError(
            f"noise must have a non-increasing std(t) / t, got {law} with {ratio[at]:.4g} at t = "
            f"{w[at]:.3g} and {ratio[at + 1]:.4g} at {w[at + 1]:.3g}; use Constant(0.1) or "
            "Brownian(0.1). With an increasing ratio no step preserves the marginals."
        )


@dataclass(frozen=True)
class InDI(Bridge):
    r"""Inversion by direct iteration: :math:`x_t = (1 - t) \, x_0 + t \, y + \nu(t) \, n`.

    Its deterministic step is an Euler step of the flow :math:`dx/dt = (x - D) / t`. If
    :math:`\nu(t) / t` is constant, the field of this flow is :math:`E[y - x_0 \mid x_t]`.

    References:
        Delbracio and Milanfar 2023, https://arxiv.org/abs/2303.11435. Its noise is
        :math:`\nu = t \sigma_t`.

    Arguments:
        noise: The noise law; no noise by default.

    Raises:
        InputError: If :math:`\nu(t) / t` increases somewhere.

    Example:
        >>> step = InDI(Brownian(0.5)).step(torch.tensor(1.0), torch.tensor(0.25))
        >>> [round(float(c), 4) for c in step]
        [0.25, 0.75, 0.2165]
    """

    noise: NoiseLaw = field(default_factory=Constant)

    def __post_init__(self) -> None:
        self._check_law()

    @property
    def law(self) -> NoiseLaw:
        return self.noise

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))


@dataclass(frozen=True)
class I2SB(Bridge):
    r"""The image-to-image Schrödinger bridge, on the clock of a diffusion.

    .. math:: \sigma_t^2 = \int_0^t \beta, \qquad w = \frac{\sigma_t^2}{\sigma_1^2}, \qquad
              \nu^2 = \frac{\sigma_t^2 \bar\sigma_t^2}{\sigma_t^2 + \bar\sigma_t^2}
                    = \sigma_1^2 \, w (1 - w), \qquad \bar\sigma_t^2 = \sigma_1^2 - \sigma_t^2

    where :math:`\sqrt\beta` rises linearly to the middle of [0, 1] and falls again, as in the
    published code.

    References:
        Liu et al. 2023, https://arxiv.org/abs/2302.05872 (equations 4 and 11; the schedule is
        that of their program).

    Arguments:
        beta_min: The rate :math:`\beta` at both ends, positive.
        beta_max: The rate :math:`\beta` to which the rising half would extend at t = 1, positive.
            The rate at t = 1/2 is :math:`(\sqrt{\beta_{min}} + \sqrt{\beta_{max}})^2 / 4`.

    Raises:
        InputError: If an argument is not positive.

    Example:
        >>> I2SB().gamma(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.1878, 0.0000])
    """

    beta_min: float = 0.1
    beta_max: float = 0.3

    def __post_init__(self) -> None:
        for name in ("beta_min", "beta_max"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(
                    f"{name} must be positive and finite, got {getattr(self, name)}; the "
                    "published beta_min and beta_max are 0.1 and 0.3."
                )

    @property
    def law(self) -> NoiseLaw:
        return BrownianPin(math.sqrt(2 * float(self._integral(torch.tensor(0.5).double()))))

    def clock(self, t: Tensor) -> Tensor:
        t = as_time(t)
        half = self._integral(torch.full_like(t, 0.5))
        early = self._integral(torch.minimum(t, 1 - t)) / (2 * half)
        return torch.where(t <= 0.5, early, 1 - early)

    def sigma_dot(self, t: Tensor) -> Tensor:
        t = as_time(t)
        (a, b), half = self._line, self._integral(torch.full_like(t, 0.5))
        return (a + b * torch.minimum(t, 1 - t)) ** 2 / (2 * half)

    @property
    def _line(self) -> tuple[float, float]:
        r"""Value of :math:`\sqrt\beta` at t = 0, and its slope up to the middle."""
        low = math.sqrt(self.beta_min)
        return low, math.sqrt(self.beta_max) - low

    def _integral(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\int_0^t (a + b s)^2 ds` for the rising half."""
        a, b = self._line
        return a**2 * t + a * b * t**2 + b**2 * t**3 / 3
