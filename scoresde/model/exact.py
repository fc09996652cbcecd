"""What the exact models share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError


def check_shape(x: Tensor, shape: torch.Size) -> None:
    """Checks that a batch has examples of a shape.

    Raises:
        InputError: If it has another one, or is not of floats.
    """
    if x.shape[1:] != shape or not x.is_floating_point():
        raise InputError(
            f"Data of shape {tuple(x.shape)} and type {x.dtype} do not fit a model of examples "
            f"{tuple(shape)}; give floats (B, {', '.join(map(str, shape))})."
        )


def floats(values: Tensor | Sequence) -> Tensor:
    """Turns numbers into floats; floats keep their data type."""
    array = torch.as_tensor(values)
    return array if array.is_floating_point() else array.to(torch.get_default_dtype())
