r"""Covariances of the steps of a reverse chain.

A step from t to s has the mean of :math:`q(x_s \mid x_t, x_0)` at :math:`x_0 = D`. Given
:math:`x_t` only, :math:`x_0` varies about D with :math:`\mathrm{Cov} = (\sigma^2 / \alpha) J`. To
second order the exact step has the covariance

.. math:: v I + c^2 \, \mathrm{Cov}[x_0 \mid x_t],

with the variance :math:`v` of q and the factor :math:`c` of :math:`x_0` in its mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.shapes import expand, sum_features

Covariance = Callable[[Tensor], Tensor]


class Spread(ABC):
    """Base class for the noise of one step, for each example."""

    @abstractmethod
    def color(self, z: Tensor) -> Tensor:
        """Converts standard normal noise ``(B, *)`` to noise of the step."""

    @abstractmethod
    def whiten(self, v: Tensor) -> Tensor:
        """Converts differences ``(B, *)`` to units of standard normal noise."""


@dataclass(frozen=True)
class Isotropic(Spread):
    """Noise of one standard deviation, which broadcasts to ``(B, *)``."""

    std: Tensor

    def color(self, z: Tensor) -> Tensor:
        return self.std * z

    def whiten(self, v: Tensor) -> Tensor:
        return v / self.std


@dataclass(frozen=True)
class Correlated(Spread):
    """Noise with eigenvectors ``(B, D, D)`` and standard deviations ``(B, D)`` along them."""

    basis: Tensor
    stds: Tensor

    def color(self, z: Tensor) -> Tensor:
        return _times(self.basis, self.stds * z.flatten(1)).reshape(z.shape)

    def whiten(self, v: Tensor) -> Tensor:
        return (_times(self.basis.mT, v.flatten(1)) / self.stds).reshape(v.shape)


class Kernel(ABC):
    """Base class for the steps of a chain."""

    # Whether the steps need the covariance, and so a gradient of the model.
    differentiates: ClassVar[bool] = False

    @abstractmethod
    def moments(self, name: str, data: Tensor, covariance: Covariance) -> dict[str, Tensor]:
        """Returns what a step needs of Cov[x_0 | x_t], stored under ``name``, or an empty dict.

        Arguments:
            name: The name.
            data: Denoised estimate, with shape ``(B, *)``.
            covariance: Function for products with the covariance.
        """

    @abstractmethod
    def spread(self, covariance: Tensor | None, gain: Tensor, std: Tensor) -> Spread:
        """Returns the noise of a step.

        Arguments:
            covariance: Result of :meth:`moments`.
            gain: Factor c of the denoised estimate.
            std: Standard deviation of q(x_s | x_t, x_0).
        """

    @abstractmethod
    def tilt(
        self,
        weak: Tensor,
        change: Tensor,
        w: Tensor,
        covariances: tuple[Tensor | None, Tensor | None],
        gain: Tensor,
        std: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor]:
        r"""Draws from :math:`p_u^{1 - w} p_c^w / Z` of two steps.

        Arguments:
            weak: Mean of the step :math:`p_u`, with shape ``(B, *)``.
            change: Mean of the step :math:`p_c` minus that of :math:`p_u`.
            w: Scale of each example, ``(B,)``.
            covariances: Results of :meth:`moments` for :math:`p_u` and :math:`p_c`.
            gain: Factor c of the denoised estimates.
            std: Standard deviation of q(x_s | x_t, x_0).
            z: Standard normal noise.

        Returns:
            The draws, and :math:`\log Z`, ``(B,)``.
        """


@dataclass(frozen=True)
class IsotropicKernel(Kernel):
    """The chain of DDPM, q(x_s | x_t, x_0 = D), with a bias of O(1 / steps)."""

    def moments(self, name: str, data: Tensor, covariance: Covariance) -> dict[str, Tensor]:
        return {}

    def spread(self, covariance: Tensor | None, gain: Tensor, std: Tensor) -> Spread:
        return Isotropic(std)

    def tilt(
        self,
        weak: Tensor,
        change: Tensor,
        w: Tensor,
        covariances: tuple[Tensor | None, Tensor | None],
        gain: Tensor,
        std: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = weak + expand(w, change) * change + std * z
        return x, 0.5 * w * (w - 1) * sum_features((change / std) ** 2)


@dataclass(frozen=True)
class CovarianceKernel(Kernel):
    """The chain with the covariance of x_0, at the cost of a Jacobian product per dimension.

    It is exact for Gaussian data at any number of steps.
    """

    differentiates = True

    def moments(self, name: str, data: Tensor, covariance: Covariance) -> dict[str, Tensor]:
        flat = data.flatten(1)
        units = torch.eye(flat.shape[1], dtype=data.dtype, device=data.device)
        columns = [covariance(u.expand_as(flat).reshape(data.shape)).flatten(1) for u in units]
        dense = torch.stack(columns, 2)
        return {name: 0.5 * (dense + dense.mT)}

    def spread(self, covariance: Tensor | None, gain: Tensor, std: Tensor) -> Spread:
        assert covariance is not None
        values, basis = torch.linalg.eigh(covariance)
        return Correlated(basis, torch.sqrt(gain**2 * values.clamp(min=0) + std**2))

    def tilt(
        self,
        weak: Tensor,
        change: Tensor,
        w: Tensor,
        covariances: tuple[Tensor | None, Tensor | None],
        gain: Tensor,
        std: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor]:
        steps = [self.spread(covariance, gain, std) for covariance in covariances]
        (inverse_u, log_u), (inverse_c, log_c) = (_precision(step) for step in steps)
        d, w1 = change.flatten(1), w[:, None]
        precision = (1 - w1[:, :, None]) * inverse_u + w1[:, :, None] * inverse_c
        values, basis = torch.linalg.eigh(precision)
        if values.device.type == "cpu" and not bool((values > 0).all()):
            raise InputError(
                f"scale must leave the law of a step normalisable, got {float(w.max()):.4g}, with "
                "a conditional law wider than the unconditional one; use a smaller scale or "
                "kernel=IsotropicKernel()."
            )
        pushed = w1 * _times(inverse_c, d)  # the information about x - weak
        along = _times(basis.mT, pushed) / values.sqrt()
        mean = _times(basis, along / values.sqrt())
        noise = _times(basis, z.flatten(1) / values.sqrt())
        log_z = 0.5 * ((along**2).sum(1) - w * (d * _times(inverse_c, d)).sum(1))
        log_z = log_z - 0.5 * (values.log().sum(1) + (1 - w) * log_u + w * log_c)
        return weak + (mean + noise).reshape(weak.shape), log_z


def _precision(spread: Spread) -> tuple[Tensor, Tensor]:
    """Returns the inverse of a covariance, ``(B, D, D)``, and its log-determinant, ``(B,)``."""
    assert isinstance(spread, Correlated)
    scaled = spread.basis / spread.stds[:, None, :]
    return scaled @ scaled.mT, 2 * spread.stds.log().sum(1)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    """Multiplies ``(B, D, D)`` and ``(B, D)``."""
    return (matrix @ v.unsqueeze(2)).squeeze(2)
