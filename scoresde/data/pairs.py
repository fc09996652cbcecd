"""Pairs of an example and its source, computed by an operator or read from two folders."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.codec import Affine, Codec
from scoresde.data.base import SPLITS, Dataset
from scoresde.data.degradation import JPEG, SOURCE, Degradation
from scoresde.data.examples import Examples
from scoresde.data.images import stored_pairs
from scoresde.data.splits import FRACTIONS
from scoresde.errors import InputError
from scoresde.operators import Operator


def pairs(clean: Dataset, operator: Operator, std: float = 0.0) -> Dataset:
    r"""Pairs each example with a source :math:`y = A(x) + n`, the condition ``source``.

    Sources are computed as examples are read, with new noise in every epoch. They have the shape
    of the examples: the operator's pseudo-inverse converts measurements of another shape. A flip
    mirrors both.

    Arguments:
        clean: The data set of the examples.
        operator: The operator A on raw units, such as ``Blur(std=1.0)`` or ``JPEG(20)``.
        std: Standard deviation of the noise n in raw units, at least 0.

    Raises:
        InputError: If the operator does not support the examples, such as JPEG with other levels.

    Example:
        >>> from scoresde.data import digits
        >>> from scoresde.operators import Downsampling
        >>> small = pairs(digits(), Downsampling(2), std=0.5)
        >>> small.conditions_of("test", slice(3))["source"].shape
        torch.Size([3, 1, 8, 8])
    """
    if not isinstance(clean, Dataset):
        raise InputError(
            f"clean must be a Dataset such as digits(), got {type(clean).__name__}; build one "
            "with Dataset.of."
        )
    if isinstance(operator, JPEG) and clean.levels not in (None, operator.levels):
        raise InputError(
            f"levels of JPEG must be {clean.levels}, the levels of the data, got "
            f"{operator.levels}; pass JPEG(levels={clean.levels}), or set "
            f"data.operator.levels={clean.levels}."
        )
    paired = replace(clean, degradation=Degradation(operator, std))
    for split in SPLITS:
        paired.conditions_of(split, slice(1))
    return replace(paired, name=f"{clean.name} by {type(operator).__name__}")


@dataclass(frozen=True, eq=False)
class PairExamples(Examples):
    """Images and their sources, joined along the channels.

    Arguments:
        joined: Images of 256 levels above their sources, uint8 ``(N, 2 C, H, W)``.
        codec: The codec of the data, for the sources.
        device: Device that examples are moved to after reading.
    """

    joined: Tensor
    codec: Codec
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def _channels(self) -> int:
        return self.joined.shape[1] // 2

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.joined), self._channels, *self.joined.shape[2:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.joined.dtype

    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = self.joined[rows].split(self._channels, 1)
        return x, {SOURCE: self.codec.encode(y)}

    def to(self, device: torch.device | str) -> "PairExamples":
        return PairExamples(self.joined, self.codec, torch.device(device))


def folder_pairs(
    path: str | Path,
    source: str | Path,
    size: int | Sequence[int],
    mode: str = "RGB",
    crop: int | None = None,
    flip: bool = False,
    centred: bool = True,
    dequantise: bool = True,
    fractions: Sequence[float] | None = FRACTIONS,
    seed: int = 0,
    skip_damaged: bool = False,
) -> Dataset:
    """Loads images below one folder, and their sources of the same names below another.

    Arguments:
        path: The folder of the images, such as sharp ones.
        source: Folder of their sources, such as blurred images; a source has the name of its
            image, except the suffix.
        size: As for :func:`~scoresde.data.folder`, as are all further arguments. Both images of a
            pair are cropped and resized in the same way.
        mode: As there.
        crop: As there.
        flip: As there; both are mirrored together.
        centred: As there.
        dequantise: As there.
        fractions: As there.
        seed: As there.
        skip_damaged: As there.

    Raises:
        InputError: If an image has no source, or as for :func:`~scoresde.data.folder`.
    """
    options: Any = (size, mode, crop, fractions, seed, skip_damaged)
    name, splits, undivided = stored_pairs(Path(path), Path(source), *options)
    channels, *sides = splits[0].shape[1:]
    codec = Affine.of_levels((channels // 2, *sides), 256, centred)
    train, validation, test = (PairExamples(part, codec) for part in splits)
    return Dataset(
        *(name, train, validation, test, codec, flip),
        dequantise=dequantise,
        undivided=undivided,
    )
