r"""Base classes for guided models, which combine the outputs of other models.

Score, noise, denoised estimate and velocity are affine functions of each other at a given state
and time. A combination of two models whose weights add up to 1 is therefore the same combination
in each of the four views, and it is computed in the requested view. Nothing is divided by alpha or
sigma, which may be 0.
"""

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.model import ScoreFunction, check_model
from scoresde.sde import SDE, as_time

View = Literal["score", "noise", "denoise", "velocity"]


def ask(model: nn.Module, view: View, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Returns a view of a model at states ``(B, *)`` and times ``()`` or ``(B,)``."""
    output: Tensor = getattr(model, view)(x, t, **cond)
    return output


class Around(ScoreFunction):
    """Base class for wrappers of a model, with its process, shape and data type.

    Arguments:
        model: The score function.

    Raises:
        InputError: If ``model`` is not a score function.
    """

    def __init__(self, model: ScoreFunction) -> None:
        super().__init__()
        check_model(model)
        self.model = model

    @property
    def sde(self) -> SDE:  # type: ignore[override]
        """The forward process."""
        return self.model.sde

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one example, or None if it is unknown."""
        return self.model.shape

    def _float(self) -> Tensor | None:
        return self.model._float()


class Guided(Around):
    """Base class for guidance; subclasses implement :meth:`combine`.

    Arguments:
        model: The score function to guide.
        scale: Strength of the guidance, finite: one number, or ``(B,)`` with one for each example.

    Raises:
        InputError: If the model is not a score function, or the scale is not finite.
    """

    scale: Tensor

    def __init__(self, model: ScoreFunction, scale: float | Tensor) -> None:
        super().__init__(model)
        self.register_buffer("scale", check_scale(scale), persistent=False)

    @abstractmethod
    def combine(self, view: View, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Returns a view of the guided model.

        Arguments:
            view: Requested view: ``score``, ``noise``, ``denoise`` or ``velocity``.
            x: States, with shape ``(B, *)``.
            t: Times, with shape ``()`` or ``(B,)``.
            cond: The conditions, each with shape ``(B, *)``.
        """

    @abstractmethod
    def taken(self, rows: Tensor, scale: Tensor) -> "Guided":
        """Returns the guided model for some examples, int64 ``(n,)``, with their scale."""

    def take(self, rows: Tensor) -> ScoreFunction:
        parts = [part for part in self.children() if isinstance(part, ScoreFunction)]
        if self.scale.ndim == 0 and all(part.take(rows) is part for part in parts):
            return self
        scale = self.scale[rows.to(self.scale.device)] if self.scale.ndim else self.scale
        return self.taken(rows, scale)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.combine("score", x, as_time(t), cond)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.combine("noise", x, as_time(t), cond)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.combine("denoise", x, as_time(t), cond)

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.combine("velocity", x, as_time(t), cond)

    def scale_of(self, x: Tensor) -> Tensor:
        """Returns the scale, ``()`` or ``(B,)``, for states ``(B, *)``.

        Raises:
            InputError: If the number of scales is neither 1 nor the number of examples.
        """
        if self.scale.ndim and len(self.scale) != len(x):
            raise InputError(
                f"scale must be a number or a tensor with one number for each of {len(x)} "
                f"examples, got {len(self.scale)} numbers."
            )
        return self.scale


def check_scale(scale: Any) -> Tensor:
    """Returns a guidance scale as a tensor, ``()`` or ``(B,)``.

    Raises:
        InputError: If the scale is not a finite number or a tensor of finite numbers.
    """
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    array = isinstance(scale, Tensor) and scale.ndim <= 1 and scale.dtype != torch.bool
    if not (number or array):
        raise InputError(
            f"scale must be a number or a tensor of shape (B,), got {scale!r}; a typical value is "
            "1."
        )
    values = torch.as_tensor(scale)
    values = values if values.is_floating_point() else values.double()
    values = values.double() if number else values
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"scale must be finite, got {scale}; typical values are 1 to 5.")
    return values


def check_interval(interval: Any) -> tuple[float, float] | None:
    """Returns the ends of an interval of the relative noise level, or None.

    Raises:
        InputError: If the interval is not a pair of increasing non-negative numbers.
    """
    if interval is None:
        return None
    ends = tuple(interval) if isinstance(interval, list | tuple) else ()
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not numbers or not 0 <= ends[0] < ends[1] or math.isnan(ends[1]):
        raise InputError(
            f"interval must be (low, high) with 0 <= low < high, in units of sigma / alpha, got "
            f"{interval}; use (0.2, 5.0), or None for all noise levels."
        )
    return float(ends[0]), float(ends[1])


def surely_nowhere(mask: Tensor) -> bool:
    """Returns whether a mask is known to be false everywhere, without waiting for a device."""
    return mask.device.type == "cpu" and not bool(mask.any())
