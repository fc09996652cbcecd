"""The affine map with one shift and one width, the former codec, kept for one release."""

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from scoresde.errors import InputError


@final
@dataclass(frozen=True)
class Scaling:
    r"""The map :math:`x = (y - m) / w`, superseded by :class:`~scoresde.codec.Affine`.

    Arguments:
        shift: The raw value :math:`m` that becomes 0.
        width: The raw length :math:`w` that becomes 1, positive.
    """

    shift: float = 0.0
    width: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and 0 < self.width < math.inf):
            raise InputError(
                f"shift must be finite, and width positive and finite, got {self.shift} and "
                f"{self.width}."
            )

    @staticmethod
    def of_levels(levels: int, centred: bool = True) -> "Scaling":
        """Returns the map of [0, L] onto [-1, 1], or onto [0, 1] if not ``centred``."""
        return Scaling(levels / 2, levels / 2) if centred else Scaling(0.0, float(levels))

    @staticmethod
    def of_data(train: Tensor) -> "Scaling":
        """Returns the map that gives all values together mean 0 and standard deviation 1."""
        values = train.double()
        return Scaling(float(values.mean()), float(values.std(correction=0)))

    @property
    def scale(self) -> float:
        """Model units per raw unit."""
        return 1 / self.width

    def encode(self, y: Tensor) -> Tensor:
        """Converts raw to model units."""
        return (y - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Converts model to raw units."""
        return x * self.width + self.shift
