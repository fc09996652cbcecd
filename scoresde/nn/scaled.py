r"""Network whose output is divided by the noise level, to predict a score.

Scores have the size :math:`1 / \sigma`, which spans four orders of magnitude for VE. A network
should instead predict a quantity of order one, :math:`F = \sigma \nabla_x \log p`.

References:
    Song and Ermon, *Improved techniques for training score-based generative models*, 2020,
    https://arxiv.org/abs/2006.09011 (section 3.2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.basics import Constants, check_whole
from scoresde.recipe import describable
from scoresde.shapes import check_output, expand


@dataclass(frozen=True)
class GeometricSigmas(Sequence[float]):
    r"""Noise levels from the largest to the smallest, with a constant ratio.

    .. math:: \sigma_i = \sigma_{max} \left( \sigma_{min} / \sigma_{max} \right)^{i / (N - 1)}

    Arguments:
        sigma_min: The smallest level, positive.
        sigma_max: The largest level.
        scales: The number N of levels, at least 2.

    Example:
        >>> list(GeometricSigmas(1.0, 100.0, 3))
        [100.0, 10.0, 1.0]
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    scales: int = 1000

    def __post_init__(self) -> None:
        check_whole("scales", self.scales, 2)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                "sigma_min and sigma_max must be finite, with 0 < sigma_min < sigma_max, got "
                f"{self.sigma_min} and {self.sigma_max}; the published values are 0.01 and 50."
            )

    def __len__(self) -> int:
        return self.scales

    def __getitem__(self, i: Any) -> Any:
        places = range(self.scales)[i]
        return [*map(self._level, places)] if isinstance(i, slice) else self._level(places)

    def _level(self, i: int) -> float:
        share = i / (self.scales - 1)
        return float(self.sigma_max ** (1 - share) * self.sigma_min**share)


@describable
class ScaledBySigma(Constants):
    """A network whose output is divided by the noise level of its label.

    Arguments:
        network: The network.
        sigmas: The noise level of each label 0, 1, ..., N - 1; other labels are rounded down. If
            None, the label is the noise level.

    Example:
        >>> from scoresde.nn import Architecture, UNet
        >>> alive = Architecture(init_scale=1.0)
        >>> network = ScaledBySigma(UNet((1, 8, 8), width=8, architecture=alive))
        >>> network(torch.ones(2, 1, 8, 8), torch.tensor([0.1, 10.0])).shape
        torch.Size([2, 1, 8, 8])
    """

    sigmas: Tensor

    def __init__(self, network: nn.Module, sigmas: Sequence[float] | None = None) -> None:
        super().__init__()
        self.network = network
        self.indexed = sigmas is not None
        if sigmas is not None:
            table = torch.tensor(list(sigmas), dtype=torch.float64, device="cpu")
            if table.ndim != 1 or not len(table) or not bool((table > 0).all()):
                raise InputError(
                    "sigmas must be a non-empty list of positive numbers such as "
                    f"GeometricSigmas(), got {list(sigmas)}."
                )
            self.constant("sigmas", table)

    def forward(self, x: Tensor, c: Tensor, **conditions: Tensor) -> Tensor:
        """Returns an output with the shape ``(B, *)`` of the data, for labels ``(B,)``."""
        sigma = self.sigmas[c.long()] if self.indexed else c
        return check_output(self.network(x, c, **conditions)) / expand(sigma, x)
