"""Degradations, which compute a source from an example: an operator with noise, or JPEG."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.errors import InputError
from scoresde.operators import LinearOperator, Operator
from scoresde.streams import Purpose, Streams

SOURCE = "source"
_FIRST = 4  # draws below it are for measurements outside training


def measure(
    operator: Operator, raw: Tensor, codec: Codec, std: float, streams: Streams, draw: int
) -> Tensor:
    """Measures raw examples ``(B, *)`` by an operator, with noise of a standard deviation.

    An integer k of quantised data represents the values from k to k + 1, so it is measured as k +
    1/2.

    Arguments:
        operator: The operator.
        raw: Raw examples.
        codec: The codec of the data.
        std: Standard deviation of the noise in raw units, at least 0.
        streams: The random stream of each example.
        draw: Index of the independent noise.
    """
    values = raw.to(torch.promote_types(torch.float32, raw.dtype)) + _middle(codec)
    y = operator(values)
    if std == 0:
        return y
    return y + std * streams.normal(y.shape[1:], Purpose.MEASUREMENT, draw, y.dtype)


def _middle(codec: Codec) -> float:
    return 0.0 if codec.levels is None else 0.5


@dataclass(frozen=True)
class Degradation:
    r"""Degradation :math:`y = A(x) + n` of an example, in model units and with its shape.

    The operator's pseudo-inverse maps a measurement of another shape to the shape of the example.
    Every training epoch draws new noise.

    Arguments:
        operator: Operator A, in raw units.
        std: Standard deviation of the noise n in raw units, at least 0.

    Raises:
        InputError: If the operator is not an Operator, or ``std`` is negative.
    """

    operator: Operator
    std: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise InputError(
                f"operator must be an Operator, got {self.operator!r}; use one of "
                "scoresde.operators, such as Blur(std=1.0)."
            )
        number = isinstance(self.std, int | float) and not isinstance(self.std, bool)
        if not number or not 0 <= self.std < math.inf:
            raise InputError(f"std must be a finite number >= 0, in raw units, got {self.std}.")

    def __call__(self, raw: Tensor, codec: Codec, streams: Streams, draw: int = 0) -> Tensor:
        """Returns sources in model units, with the shape of ``raw``.

        Arguments:
            raw: Raw examples, with shape ``(B, *)``.
            codec: The codec of the data.
            streams: The random stream of each example.
            draw: Index of the independent noise, such as the number of the epoch.

        Raises:
            InputError: If a measurement of another shape has no pseudo-inverse.
        """
        y = measure(self.operator, raw, codec, self.std, streams, _FIRST + draw)
        return codec.encode(as_example(self.operator, y, tuple(raw.shape[1:])) - _middle(codec))


def as_example(operator: Operator, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns measurements ``(B, ...)`` as examples ``(B, *shape)``.

    Raises:
        InputError: If the shapes differ and the operator has no pseudo-inverse.
    """
    if tuple(y.shape[1:]) == shape:
        return y
    if not isinstance(operator, LinearOperator):
        raise InputError(
            f"operator must return examples of shape {shape}, got {tuple(y.shape[1:])} from "
            f"{type(operator).__name__}; resize its output, or use a linear operator with a "
            "pseudo-inverse."
        )
    return operator.pseudo_inverse(y, shape)


@dataclass(frozen=True)
class JPEG(Operator):
    """Compresses and decodes images with Pillow.

    Arguments:
        quality: JPEG quality, an integer from 1 to 95.
        levels: Number of levels of the pixels: 256, or fewer, spread over 0 to 255.

    Raises:
        InputError: If the quality is outside its range, or later examples are not images of one
            or three channels.

    Example:
        >>> flat = JPEG(20)(torch.full((1, 1, 8, 8), 101.5))
        >>> float(flat.min()), float(flat.max())  # steps of 5 grey levels at this quality
        (103.5, 103.5)
    """

    quality: int = 20
    levels: int = 256

    def __post_init__(self) -> None:
        whole = isinstance(self.quality, int) and not isinstance(self.quality, bool)
        if not whole or not 1 <= self.quality <= 95:
            raise InputError(f"quality must be an integer in [1, 95], got {self.quality}.")
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise InputError(f"levels must be an integer >= 2, got {self.levels}.")

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InputError(
                f"JPEG requires images (C, H, W) with 1 or 3 channels, got {tuple(x.shape[1:])}."
            )
        gain = 255 / (self.levels - 1)
        pixels = _numbers(((x - 0.5) * gain).round().clamp(0, 255))
        decoded = np.stack([self._through(image) for image in pixels])
        return torch.from_numpy(decoded).to(x) / gain + 0.5

    def _through(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        file = io.BytesIO()
        channels = image.transpose(1, 2, 0)
        Image.fromarray(channels[..., 0] if len(image) == 1 else channels).save(
            file, "JPEG", quality=self.quality
        )
        with Image.open(file) as decoded:
            return np.asarray(decoded).reshape(channels.shape).transpose(2, 0, 1).copy()


def _numbers(pixels: Tensor) -> np.ndarray:
    """Returns pixels as a NumPy array; raises if their derivative is required."""
    try:
        return pixels.cpu().numpy().astype(np.uint8)
    except RuntimeError as error:  # torch has no values to return inside its derivatives
        raise InputError(
            "operator must be differentiable for a posterior, got JPEG; train a bridge with "
            "data=pairs instead."
        ) from error
