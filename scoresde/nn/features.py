r"""Fourier features of the input, for structure too fine for a network to learn.

Data on L levels have a density with structure at the scale of one quantisation step: if the noise
is about a step wide or less, the denoised data are close to the nearest centre. A network is
smooth at this scale. Waves with lengths of one and two steps give it the position of a value
within its step.

References:
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (section 3.4 and the appendix on Fourier features).
    Tancik et al., *Fourier features let networks learn high frequency functions in low
    dimensional domains*, 2020, https://arxiv.org/abs/2006.10739.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.nn.basics import check_whole

_WAVES = (1, 2)  # half turns per step


@dataclass(frozen=True)
class FourierFeatures:
    r"""Appends to each channel its sines and cosines at wavelengths of one and two steps.

    .. math:: \sin(\omega x), \ \cos(\omega x), \qquad
              \omega \in \{ \pi / \Delta, \ 2 \pi / \Delta \}, \quad
              \Delta = (\text{high} - \text{low}) / L

    In [-1, 1] the frequencies are :math:`\pi L / 2` and :math:`\pi L`; for L = 256 they are those
    of Kingma et al., :math:`2 \pi \cdot 2^6` and :math:`2 \pi \cdot 2^7`.

    The features are of the state itself, but a parametrisation with ``sigma_data`` first divides
    the state by its standard deviation. Use a parametrisation without it (``sigma_data: null``),
    or pass the same ``sigma_data`` here. At low noise, the only place where the features are
    informative, the division is by ``sigma_data``.

    Arguments:
        levels: The number L of levels, at least 2.
        low: The lower end of the lowest level's step, in model units.
        high: The upper end of the highest level's step.
        sigma_data: Divisor of the input, positive. If None, the input was not divided.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> FourierFeatures(17)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 5, 8, 8])
    """

    levels: int
    low: float = -1.0
    high: float = 1.0
    sigma_data: float | None = None

    def __post_init__(self) -> None:
        check_whole("levels", self.levels, least=2)
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(
                f"low and high must be finite, with low < high, got {self.low} and {self.high}; "
                "typical values for images are -1 and 1."
            )
        if self.sigma_data is not None and not 0 < self.sigma_data < math.inf:
            raise InputError(
                f"sigma_data must be positive and finite, or None, got {self.sigma_data}; use the "
                "sigma_data of the parametrisation."
            )

    @property
    def frequencies(self) -> list[float]:
        """The frequencies in radians per unit of the input."""
        scale = 1.0 if self.sigma_data is None else self.sigma_data
        step = (self.high - self.low) / self.levels
        return [math.pi * n / step * scale for n in _WAVES]

    def channels(self, count: int) -> int:
        """Returns the number of output channels for ``count`` input channels."""
        return (1 + 2 * len(_WAVES)) * count

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the input and its features, ``(B, C, *)`` to ``(B, 5 C, *)``."""
        angles = torch.cat([w * x for w in self.frequencies], dim=1)
        return torch.cat((x, torch.sin(angles), torch.cos(angles)), dim=1)


def check_features(features: object) -> FourierFeatures | None:
    """Returns features, or None, after checking the type.

    Raises:
        InputError: If ``features`` is anything else.
    """
    if not isinstance(features, FourierFeatures | None):
        raise InputError(
            f"features must be a FourierFeatures such as FourierFeatures(256), or None, got "
            f"{features!r}."
        )
    return features
