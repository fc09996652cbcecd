r"""Parametrisations: networks that predict the noise, the data, or a mixture of them.

References:
    Karras et al., *Elucidating the design space of diffusion-based generative models*, 2022,
    https://arxiv.org/abs/2206.00364 (section 5 and table 1).
    Salimans and Ho, *Progressive distillation*, 2022, https://arxiv.org/abs/2202.00512 (v).
    Lipman et al., *Flow matching for generative modeling*, 2023,
    https://arxiv.org/abs/2210.02747 (the velocity).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.sde.interpolant import Interpolant, compare_by_identity

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Parametrisation(ABC):
    r"""Base class for parametrisations, which convert the network's output to noise and to data.

    All of them are linear. Given :math:`\alpha` and :math:`\sigma`, each method returns the two
    coefficients of :math:`a x + b F`, where :math:`F` is the network's output.

    Arguments:
        sigma_data: The data's standard deviation :math:`\sigma_d`. The network's input is divided
            by the standard deviation of :math:`x_t`,
            :math:`n = \sqrt{\alpha^2 \sigma_d^2 + \sigma^2}`. If None, the input is not scaled, as
            in the first papers.
    """

    # Whether the data can be computed where no signal is left (alpha = 0).
    at_zero_snr: ClassVar[bool] = True
    # Whether the velocity is computed from the process's rates even where f and g are finite.
    by_rates: ClassVar[bool] = False

    sigma_data: float | None = 1.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, nn.Module):
            compare_by_identity(cls)

    def __post_init__(self) -> None:
        if self.sigma_data is not None and not 0 < self.sigma_data < math.inf:
            raise InputError(
                f"sigma_data must be positive and finite, got {self.sigma_data}; pass the "
                "standard deviation of the data in model units (about 0.5 for images in [-1, 1])."
            )

    @abstractmethod
    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        """Returns the coefficients of the predicted noise."""

    @abstractmethod
    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        """Returns the coefficients of the denoised estimate."""

    def at(self, process: Interpolant, t: Tensor) -> "Parametrisation":
        """Returns the parametrisation at times: itself, unless it needs the process's rates."""
        return self

    def to_velocity(self, process: Interpolant, t: Tensor) -> Pair:
        r"""Returns the coefficients of the velocity, :math:`\alpha' D + \sigma' \hat z`."""
        here, alpha, sigma = self.at(process, t), process.alpha(t), process.sigma(t)
        signal, noise = process.alpha_dot(t), process.sigma_dot(t)
        (a, b), (c, d) = here.to_data(alpha, sigma), here.to_noise(alpha, sigma)
        return signal * a + noise * c, signal * b + noise * d

    def scale_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns the factor of the network's input."""
        if self.sigma_data is None:
            return torch.ones_like(alpha)
        return torch.rsqrt((alpha * self.sigma_data) ** 2 + sigma**2)


@dataclass(frozen=True)
class NoiseParametrisation(Parametrisation):
    r"""The network predicts the noise: :math:`\hat z = F` (Ho et al. 2020)."""

    at_zero_snr = False

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return 1 / alpha, -sigma / alpha


@dataclass(frozen=True)
class DataParametrisation(Parametrisation):
    r"""The network predicts the data: :math:`D = F`."""

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return 1 / sigma, -alpha / sigma

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class VParametrisation(Parametrisation):
    r"""The network predicts :math:`v = \alpha z - \sigma x_0` (Salimans and Ho 2022).

    Together with :math:`x = \alpha x_0 + \sigma z` this gives both, also if
    :math:`\alpha^2 + \sigma^2 \neq 1`:

    .. math::
        \hat z = \frac{\sigma x + \alpha F}{\alpha^2 + \sigma^2}, \qquad
        D = \frac{\alpha x - \sigma F}{\alpha^2 + \sigma^2}
    """

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        norm = alpha**2 + sigma**2
        return sigma / norm, alpha / norm

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm


@dataclass(frozen=True)
class VelocityParametrisation(Parametrisation):
    r"""The network predicts the velocity :math:`u = \alpha' x_0 + \sigma' z` (flow matching).

    On rectified flow that is :math:`z - x_0`. Together with :math:`x = \alpha x_0 + \sigma z` it
    gives both, with :math:`W = \alpha \sigma' - \sigma \alpha' = \alpha g^2 / 2 \sigma`:

    .. math:: D = \frac{\sigma' x - \sigma F}{W}, \qquad \hat z = \frac{\alpha F - \alpha' x}{W}

    W is 1 on rectified flow. The velocity is the output itself, so it is finite wherever the
    target is: at both ends of rectified flow, and for any process where :math:`\sigma'` is finite
    (for the VP SDE it grows like :math:`t^{-1/2}`). The coefficients depend on the rates of the
    process; :meth:`at` inserts them.
    """

    by_rates = True

    def at(self, process: Interpolant, t: Tensor) -> Parametrisation:
        rates = {"alpha_dot": process.alpha_dot(t), "sigma_dot": process.sigma_dot(t)}
        return _VelocityAt(self.sigma_data, **rates)

    def to_velocity(self, process: Interpolant, t: Tensor) -> Pair:
        return torch.zeros_like(t), torch.ones_like(t)

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        raise _no_rates()

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        raise _no_rates()


@dataclass(frozen=True, eq=False)
class _VelocityAt(Parametrisation):
    """The velocity parametrisation at times with known rates."""

    alpha_dot: Tensor = field(kw_only=True)
    sigma_dot: Tensor = field(kw_only=True)

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        turn = self._turn(alpha, sigma)
        return -self.alpha_dot / turn, alpha / turn

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        turn = self._turn(alpha, sigma)
        return self.sigma_dot / turn, -sigma / turn

    def _turn(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * self.sigma_dot - sigma * self.alpha_dot


def _no_rates() -> InputError:
    return InputError(
        "VelocityParametrisation requires the rates of a process besides alpha and sigma; use "
        "parametrisation.at(sde, t).to_noise(alpha, sigma)."
    )


@dataclass(frozen=True)
class ScoreParametrisation(Parametrisation):
    r"""The network predicts the score itself: :math:`\hat z = -\sigma F`."""

    at_zero_snr = False

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return torch.zeros_like(alpha), -sigma

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return 1 / alpha, sigma**2 / alpha


@dataclass(frozen=True)
class Preconditioned(Parametrisation):
    r"""The parametrisation of Karras et al. 2022, for any SDE.

    Their :math:`D = c_{skip} \tilde x + c_{out} F(c_{in} \tilde x)`, in the coordinates
    :math:`\tilde x = x / \alpha`, :math:`\tilde\sigma = \sigma / \alpha`, reads

    .. math::
        D = \frac{\alpha \sigma_d^2}{n^2} x + \frac{\sigma \sigma_d}{n} F, \qquad
        \hat z = \frac{\sigma}{n^2} x - \frac{\alpha \sigma_d}{n} F, \qquad
        n^2 = \alpha^2 \sigma_d^2 + \sigma^2 .

    With :math:`F = 0` it is the exact model of :math:`N(0, \sigma_d^2 I)`. The network learns only
    the difference, and its input and target have unit variance at every time.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data is None:
            raise InputError(
                "sigma_data must be a number for Preconditioned, got None; pass the standard "
                "deviation of the data in model units."
            )

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        scale = self.scale_in(alpha, sigma)
        return sigma * scale**2, -alpha * self._std * scale

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        scale = self.scale_in(alpha, sigma)
        return alpha * (self._std * scale) ** 2, sigma * self._std * scale

    @property
    def _std(self) -> float:
        assert self.sigma_data is not None
        return self.sigma_data
