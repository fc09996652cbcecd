"""Noise labels: the number by which a network is conditioned on the time."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.sde import SDE, Chain


class NoiseLabel(ABC):
    """Base class for noise labels, the numbers by which a network is conditioned on the time."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """Returns one label for each time, with the shape of ``t``."""


@dataclass(frozen=True)
class NoiseLevel(NoiseLabel):
    r"""The relative noise level :math:`\tfrac14 \log (\sigma / \alpha) = -\lambda / 8`.

    It is the :math:`c_{noise}` of Karras et al. 2022 and does not depend on the SDE, so a trained
    network stays valid when the schedule changes. Where the SNR is zero at t = 1, the bounded
    variable b takes the place of the log-SNR (see :class:`~scoresde.sde.SDE`).
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        if sde.zero_snr:
            # Finite at t = 0 too; no data type resolves noise of 1e-17 times the signal.
            return -0.125 * sde.bounded(t).clamp(max=80.0)
        return -0.125 * sde.log_snr(t)


@dataclass(frozen=True)
class ScaledTime(NoiseLabel):
    """The time itself, scaled: 999 t in Song et al. 2021.

    Arguments:
        scale: The factor.
    """

    scale: float = 999.0

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return self.scale * t


@dataclass(frozen=True)
class ChainIndex(NoiseLabel):
    """The index t N - 1 of a level of a discrete chain, 0 to N - 1 (Ho et al. 2020)."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        if not isinstance(sde, Chain):
            raise InputError(
                f"sde must be a discrete chain such as DiscreteVP() for ChainIndex, got {sde}."
            )
        return sde.index(t)


@dataclass(frozen=True)
class Sigma(NoiseLabel):
    """The noise level itself, sigma (NCSN++): embed it with ``FourierEmbedding(log=True)``."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t)


@dataclass(frozen=True)
class ReversedIndex(NoiseLabel):
    """The index (1 - t)(N - 1), rounded, of a noise level of SMLD: 0 is the largest.

    Arguments:
        scales: The number N of noise levels.
    """

    scales: int = 1000

    def __post_init__(self) -> None:
        check_count("scales", self.scales, "use the published 1000")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.round((1 - t) * (self.scales - 1))
