r"""Base class for codecs, which convert between a user's data and a model's units.

A codec converts raw examples :math:`y` (integers, or real numbers in any unit) to the model's
input :math:`x`, of about unit size, and back. With its encoder :math:`q(x \mid y)` and its decoder
:math:`p(y \mid x)`,

.. math:: \log p(y) \ge \mathbb{E}_{q(x \mid y)}
          \left[ \log p(x) + \log p(y \mid x) - \log q(x \mid y) \right] ,

and the codec enters a likelihood only through the last two terms, the *log-determinant*:

- for an invertible map it is :math:`\log |dx/dy|`, and the bound is an equality;
- for integers made continuous by uniform noise in their steps it is :math:`D \log s`, where
  :math:`s` counts model units per step;
- for an autoencoder it is the log-density of its decoder minus that of its encoder.

A deterministic autoencoder has none, because it assigns no density to raw examples.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.streams import Streams


class Codec(ABC):
    """Base class for maps between raw and model units.

    Subclasses implement :meth:`encode`, :meth:`decode` and :meth:`log_det`.

    A codec is a frozen dataclass of plain values that is saved in checkpoints, so samples can be
    drawn and decoded without the data. A codec with other contents overrides :meth:`describe`.

    Attributes:
        shape: The shape of one example in model units.
        levels: The number of levels L of quantised data, or None for real-valued data.
        low: The raw value drawn as black.
        high: The raw value drawn as white, above ``low``.
    """

    shape: Sequence[int]
    levels: int | None = None
    low: Any = 0.0
    high: Any = 1.0

    @abstractmethod
    def encode(self, raw: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        """Converts raw examples to model units.

        Arguments:
            raw: Raw examples, with shape ``(B, *)``.
            streams: The random streams of the examples, for random encodings; integers are then
                dequantised. If None, integers lie at the centres of their levels.
            draw: Index of one of the independent encodings, in :math:`[0, 2^{32})`.

        Returns:
            Examples in model units, float32, with shape ``(B, *)``.
        """

    @abstractmethod
    def decode(self, x: Tensor, rounded: bool = True) -> Tensor:
        """Converts model units back to raw ones.

        Arguments:
            x: Examples in model units, with shape ``(B, *)``.
            rounded: Whether quantised data are rounded to integers. If False, they remain real
                numbers.

        Returns:
            Raw examples in the type of the raw data, with shape ``(B, *)``.
        """

    @abstractmethod
    def log_det(self, raw: Tensor, x: Tensor) -> Tensor | None:
        r"""Returns :math:`\log p(y \mid x) - \log q(x \mid y)` of each example.

        Arguments:
            raw: Raw examples, with shape ``(B, *)``.
            x: Their encodings, with shape ``(B, *)``.

        Returns:
            Nats, with shape ``(B,)``; None if the codec has no density.
        """

    @property
    def raw_shape(self) -> Sequence[int]:
        """The shape of one raw example."""
        return self.shape

    @property
    def scale(self) -> float | None:
        """Model units per raw unit (per step for quantised data), or None if not one number."""
        return None

    @property
    def range(self) -> tuple[float, float]:
        """The range of the data in model units.

        Raises:
            InputError: If the range is unknown, as in this class.
        """
        raise InputError(
            f"{type(self).__name__} must implement range, the range of the data in model units."
        )

    def to_unit(self, x: Tensor) -> Tensor:
        """Converts model units to the range [0, 1] for drawing, float32, with the raw shape.

        Black and white are the lowest and the highest level, or the smallest and the largest
        training value.
        """
        return ((self.decode(x).double() - self.low) / (self.high - self.low)).clamp(0, 1).float()

    @property
    def stochastic(self) -> bool:
        """True if an encoder draws the examples in model units; log-densities are then bounds."""
        return False

    def placed(self, device: torch.device | str) -> "Codec":
        """Returns the codec with its tensors on a device; a codec of plain values has none."""
        return self

    def describe(self) -> dict[str, Any]:
        """Returns the recipe of the codec: plain values from which a checkpoint rebuilds it."""
        kind = type(self)
        home = kind.__module__.split(".")
        name = ".".join((*(home[:2] if home[0] == "scoresde" else home), kind.__qualname__))
        values = {f.name: getattr(self, f.name) for f in fields(cast(Any, self))}
        return {"_target_": name, **{key: _plain(value) for key, value in values.items()}}


def _plain(value: Any) -> Any:
    """Converts tuples to lists."""
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
