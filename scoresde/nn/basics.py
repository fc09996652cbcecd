"""Helpers for all networks: checks of arguments, normalisation and initialisation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scoresde.errors import InputError

_SQRT_HALF = math.sqrt(0.5)

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Constants(nn.Module):
    """Base class for modules with constant arrays, which are not weights.

    The arrays move with the module to its device, are not saved with it, and are at least float32.
    They always hold their values, even after a module without data is materialised by ``to_empty``
    or by ``load_state_dict(assign=True)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def constant(self, name: str, values: Tensor) -> None:
        """Adds an array, or replaces the array of this name.

        Arguments:
            name: The name of the attribute.
            values: The values, float64 on the CPU.
        """
        self._constants[name] = values
        self.register_buffer(name, values.to(torch.empty(0)), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Constants":
        super()._apply(fn, recurse)
        for name, values in self._constants.items():
            moved = getattr(self, name)
            dtype = torch.promote_types(torch.float32, moved.dtype)
            setattr(self, name, values.to(moved.device, dtype))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for name, values in self._constants.items():
            if getattr(self, name).is_meta and args[2].get("assign_to_params_buffers"):
                setattr(self, name, values.to(torch.get_default_dtype()))


def check_whole(name: str, value: int, least: int = 1) -> int:
    """Returns an integer after checking that it is at least ``least``.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(value, Integral) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise InputError(f"{name} must be {kind}, got {value!r}.")
    return int(value)


def check_wholes(name: str, values: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """Returns a sequence of integers, each at least ``least``, as a tuple.

    Raises:
        InputError: If ``values`` is not such a sequence.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        kind = "positive integers" if least == 1 else f"integers >= {least}"
        raise InputError(f"{name} must be a list of {kind}, got {values!r}.")
    return tuple(check_whole(f"{name}[{i}]", n, least) for i, n in enumerate(values))


def check_flag(name: str, value: bool) -> None:
    """Checks that a value is true or false.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}.")


def check_dropout(dropout: float) -> float:
    """Returns a dropout probability after checking that it is in [0, 1).

    Raises:
        InputError: If it is not.
    """
    if not 0 <= dropout < 1:
        raise InputError(
            f"dropout must be a fraction in [0, 1), got {dropout!r}; a typical value is 0.1, and "
            "0 disables dropout."
        )
    return float(dropout)


@dataclass(frozen=True)
class Groups:
    """Group normalisation with a number of groups that depends on the channels.

    The number of groups is the largest that divides the channels, is at most ``most``, and leaves
    at least ``least`` channels per group. DDPM++ and NCSN++ use (32, 4), DDPM uses (32, 1).

    References:
        Wu and He, *Group normalization*, 2018, https://arxiv.org/abs/1803.08494.

    Arguments:
        most: The largest number of groups.
        least: The smallest number of channels in a group, if there are that many channels.
        eps: Constant added to the variance.
        exceptions: Numbers of groups for individual normalisations of a network, keyed by module
            name, such as ``"middle.attention.norm"``.

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> Groups()(64).num_groups
        16
    """

    most: int = 32
    least: int = 4
    eps: float = 1e-6
    exceptions: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_whole("norm.most", self.most)
        check_whole("norm.least", self.least)
        if not 0 <= self.eps < math.inf:
            raise InputError(
                f"norm.eps must be non-negative and finite, got {self.eps!r}; a typical value is "
                "1e-6."
            )
        if not isinstance(self.exceptions, Mapping):
            raise InputError(
                "norm.exceptions must be a mapping from module names to numbers of groups, got "
                f"{self.exceptions!r}."
            )
        for name, n in self.exceptions.items():
            check_whole(f"norm.exceptions[{name!r}]", n)

    def __call__(self, channels: int) -> nn.GroupNorm:
        """Returns the normalisation for a number of channels."""
        most = max(1, min(channels // self.least, self.most))
        groups = next(n for n in range(most, 0, -1) if channels % n == 0)
        return nn.GroupNorm(groups, channels, eps=self.eps)

    def make_exceptions(self, network: nn.Module) -> None:
        """Sets the numbers of groups of the exceptions in a network.

        Raises:
            InputError: If a normalisation does not exist, or its number of groups does not divide
                its channels.
        """
        modules = dict(network.named_modules())
        for name, n in self.exceptions.items():
            norm = modules.get(name)
            if not isinstance(norm, nn.GroupNorm) or norm.num_channels % n:
                raise InputError(
                    "norm.exceptions must map names of the network's normalisations to divisors "
                    f"of their channels, got {name!r}: {n}; remove it."
                )
            norm.num_groups = n


# By the number of axes besides batch and channels; all have the same interface.
CONVOLUTIONS: dict[int, type[nn.Conv2d]] = {
    1: nn.Conv1d,  # type: ignore[dict-item]
    2: nn.Conv2d,
    3: nn.Conv3d,  # type: ignore[dict-item]
}


def add(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """Returns the sum of two states; ``rescale`` divides it by sqrt(2) to keep the variance."""
    return (x + h) * _SQRT_HALF if rescale else x + h


def initialise(layer: Layer, scale: float = 1.0) -> Layer:
    r"""Draws a layer's weights by variance scaling, and sets its bias to zero.

    .. math:: w \sim U(-a, a), \qquad a^2 = \frac{6 \, \mathrm{scale}}{n_{in} + n_{out}}

    With ``scale=0`` the weights are exactly zero, so a residual branch has no effect initially.

    References:
        Glorot and Bengio, *Understanding the difficulty of training deep feedforward neural
        networks*, 2010 (equation 16).

    Arguments:
        layer: A linear layer or a convolution; it is changed in place and returned.
        scale: The factor of the variance, non-negative.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
