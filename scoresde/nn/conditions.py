r"""Conditions of a network: known properties of an example, each of which may be "none".

========================  ==========================  =============================================
condition                 enters by                   "none"
========================  ==========================  =============================================
a class, ``label``        a row of a table            the last row, for -1
a vector ``(B, n)``       a matrix without a bias     a vector of its own, for a row of NaN
an image ``(B, C', *)``   a convolution of the input  a channel that is 1 there, for NaN throughout
========================  ==========================  =============================================

All of these weights start at zero, so a network starts as one without conditions. A condition of
zeros counts as data. "None" has separate weights, which have no effect until they are trained
(``train.condition_dropout``).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.basics import check_whole, check_wholes
from scoresde.nn.blocks import conv3x3


class Conditions(nn.Module, ABC):
    """Base class for parts of a network that take conditions."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the accepted conditions."""

    @abstractmethod
    def weights_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Returns the weights of "none" and the others; None if "none" has no weights.

        Arguments:
            name: One of the names.
        """


def absent(values: Tensor) -> Tensor:
    """Returns whether each row of a continuous condition is "none", bool ``(B,)``."""
    return values.isnan().flatten(1).all(1)


class VectorCondition(nn.Linear):
    """Features of a vector condition ``(B, n)``; a row of NaN means "none".

    Arguments:
        width: The number n of entries.
        features: The number of features.
    """

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features, bias=False)
        self.none = nn.Parameter(torch.zeros(features))
        self.register_load_state_dict_pre_hook(_without_none)

    def forward(self, values: Tensor) -> Tensor:
        """Returns features ``(B, features)``."""
        none = absent(values)[:, None]
        # Otherwise the gradient of the weights would be NaN, even for masked rows.
        mapped = super().forward(values.masked_fill(none, 0.0))
        return torch.where(none, self.none.to(mapped.dtype), mapped)


def _without_none(layer: nn.Module, weights: dict[str, Any], prefix: str, *options: Any) -> None:
    """Completes weights of a release in which a missing condition counted as zeros."""
    if f"{prefix}weight" in weights:
        weights.setdefault(f"{prefix}none", torch.zeros_like(weights[f"{prefix}weight"][:, 0]))


class ImageConditions(Conditions):
    """Image conditions of the size of the input, concatenated to it before the first convolution.

    Each image has an additional channel, which is 1 if the image is "none", and 0 otherwise.

    Arguments:
        shapes: The name and the shape ``(C', *)`` of each condition.
        channels: The number of channels of the first convolution's output.
        dims: The number of axes besides batch and channels.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], channels: int, dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: conv3x3(shape[0] + 1, channels, 0.0, dims) for name, shape in shapes.items()}
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.layers)

    def weights_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        weight = self.layers[name].weight
        assert isinstance(weight, Tensor)
        return weight[:, -1], weight[:, :-1]

    def joined(self, name: str, values: Tensor | None, x: Tensor) -> Tensor:
        """Returns an image and its channel for "none", ``(B, C' + 1, *)``.

        Arguments:
            name: The name of the condition.
            values: The images, with shape ``(B, C', *)``; None if they are not given.
            x: The input, ``(B, C, *)``.

        Raises:
            InputError: If the images have another shape.
        """
        weight = self.layers[name].weight
        assert isinstance(weight, Tensor)
        shape = (len(x), weight.shape[1] - 1, *x.shape[2:])
        if values is None:
            values = x.new_full((), torch.nan).expand(shape)
        if values.shape != shape:
            raise InputError(
                f"{name} must have shape {shape}, one image of the size of each example, got "
                f"{tuple(values.shape)}."
            )
        none = absent(values).reshape(-1, *(1,) * (x.ndim - 1))
        flag = none.to(x.dtype).expand(-1, 1, *x.shape[2:])
        return torch.cat((values.masked_fill(none, 0.0).to(x.dtype), flag), dim=1)


def check_shapes(conditions: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of conditions; a number is the length of a vector.

    Raises:
        InputError: If a name is not a valid keyword argument, or a size is not a positive integer.
    """
    for name in conditions or {}:
        taken = name in ("x", "c", "t", "self", "model") or name in dir(nn.ModuleDict)
        if not isinstance(name, str) or not name.isidentifier() or iskeyword(name) or taken:
            raise InputError(
                "Names of conditions must be Python identifiers other than keywords, x, c, t, "
                f"self, model and attributes of torch.nn.ModuleDict, got {name!r} in "
                f"{dict(conditions or {})!r}; use labels, for example."
            )
    return {name: _shape(f"conditions.{name}", n) for name, n in (conditions or {}).items()}


def _shape(title: str, sizes: Any) -> tuple[int, ...]:
    one = isinstance(sizes, int) or not isinstance(sizes, Sequence)
    return (check_whole(title, sizes),) if one else check_wholes(title, sizes)


def check_vectors(conditions: Mapping[str, Any] | None) -> dict[str, int]:
    """Returns the names and lengths of conditions, which must be vectors.

    Raises:
        InputError: If a condition is not a vector, or as for :func:`check_shapes`.
    """
    shapes = check_shapes(conditions)
    for name, shape in shapes.items():
        if len(shape) > 1:
            raise InputError(
                f"conditions.{name} must be a number of entries for this network, got {shape}; "
                f"flatten it and set {math.prod(shape)}, or use a UNet, which accepts images of "
                "the size of its input."
            )
    return {name: shape[0] for name, shape in shapes.items()}


def check_images(
    conditions: Mapping[str, Any] | None, shape: Sequence[int]
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Splits conditions into vectors and images; images must have the size of an example.

    Arguments:
        conditions: The name of each condition, with its number of entries or its shape.
        shape: The shape ``(C, *)`` of one example.

    Raises:
        InputError: If the size of an image differs from the example, or as for
            :func:`check_shapes`.
    """
    shapes = check_shapes(conditions)
    images = {name: own for name, own in shapes.items() if len(own) > 1}
    for name, own in images.items():
        if name in ("label", "augment"):
            raise InputError(
                f"conditions.{name} must be a number of entries, got {own}; use another name for "
                "an image."
            )
        if own[1:] != tuple(shape[1:]):
            sizes = ", ".join(map(str, shape[1:]))
            raise InputError(
                f"conditions.{name} must be a number of entries, or the shape (C', {sizes}) of an "
                f"image of the size of the data, got {own}; resize the images."
            )
    return {name: own[0] for name, own in shapes.items() if len(own) == 1}, images
