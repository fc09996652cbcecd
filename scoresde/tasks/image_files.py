"""Samples as image files, with exact levels if the format supports them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.errors import InputError
from scoresde.tasks.parts import write_whole

_COLOURS = (3, 4)  # channels of RGB and RGBA


@dataclass(frozen=True)
class ImageFiles:
    """PNG files of samples: ``00000017.png``.

    Images of 256 levels, and grey images of more, keep their exact levels. Images with fewer
    levels or real values are scaled to their range.

    Arguments:
        codec: The codec of the data.

    Raises:
        InputError: If a PNG file cannot hold such examples.
    """

    codec: Codec

    def __post_init__(self) -> None:
        shape, levels = tuple(self.codec.raw_shape), self.codec.levels
        if len(shape) != 3 or shape[0] not in (1, *_COLOURS):
            raise InputError(
                f"images=true requires examples (C, H, W) of 1, 3 or 4 channels, got {shape}; "
                "remove it: samples.npz holds all samples."
            )
        if levels is not None and levels > 256 and shape[0] in _COLOURS:
            raise InputError(
                f"images=true requires at most 256 levels for {shape[0]} channels, got {levels}, "
                "because Pillow writes colours of 8 bits; remove it: samples.npz holds all "
                "samples."
            )

    @property
    def note(self) -> str:
        """A sentence on how the files represent the samples; empty if they are exact."""
        levels = self.codec.levels
        if levels is None:
            return (
                "The image files are scaled to the range of the training data and have 8 bits; "
                "the exact values are in samples.npz."
            )
        if levels > 256:
            return (
                f"The image files are 16-bit PNG and hold the levels 0 to {levels - 1} as they "
                "are, which viewers may show dark; samples.png is scaled."
            )
        return ""

    def save(self, raw: Tensor, folder: Path, piece: range) -> None:
        """Writes raw samples ``(B, C, H, W)``, named by the numbers of a batch."""
        from PIL import Image

        folder.mkdir(exist_ok=True)
        for i, image in zip(piece, self._pixels(raw), strict=True):
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            write_whole(folder / f"{i:08d}.png", partial(picture.save, format="PNG"))

    def _pixels(self, raw: Tensor) -> np.ndarray:
        levels = self.codec.levels
        if levels is not None and levels >= 256:
            return raw.numpy().astype(np.uint8 if levels == 256 else np.uint16)
        low, high = (torch.as_tensor(end).double() for end in (self.codec.low, self.codec.high))
        unit = ((raw.double() - low) / (high - low)).clamp(0, 1)
        return (unit.float() * 255).round().to(torch.uint8).numpy()
