r"""The affine codec: a shift and a width, common to all features or per channel or feature.

.. math:: x = (y - m) / w, \qquad \log \left| \frac{dx}{dy} \right| = \sum_i \log s_i,
          \qquad s = 1 / w .

Integers are made continuous first. The density of a model on integers is unbounded. Noise
:math:`u \sim U(0, 1)` gives a proper likelihood, a lower bound by Jensen's inequality:

.. math:: \mathbb{E}_u \log p(y + u) \le \log \int_0^1 p(y + u) \, du = \log P(y) .

The :math:`L` levels fill :math:`[0, L]`, which is mapped onto [-1, 1]:

.. math:: x = 2 (y + u) / L - 1, \qquad s = 2 / L, \qquad y = \lfloor (x + 1) L / 2 \rfloor ,

or, if not centred, onto [0, 1]: :math:`x = (y + u) / L`, :math:`s = 1 / L`.

Shifts and widths are stored in float64, and values such as 5e4 + 1e-3 are centred in float64
before conversion to float32. With a single shift and width, float32 data are computed in float32.

References:
    Theis et al., *A note on the evaluation of generative models*, ICLR 2016 (section 3.1).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from scoresde.codec.base import Codec
from scoresde.codec.levels import integer_type
from scoresde.codec.scaling import Scaling
from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams

Numbers = float | Sequence[Any] | Tensor  # must broadcast to one example, nested lists too
_REALS = {"float32": torch.float32, "float64": torch.float64}


@final
@dataclass(frozen=True)
class Affine(Codec):
    """The affine map from raw to model units, and back.

    Its fields are plain numbers. The shift and the width are one number for all features, or a
    tensor or nested list that broadcasts to one example: ``(D,)`` for the columns of a table,
    ``(C, 1, 1)`` for the channels of images.

    Arguments:
        shape: The shape of one example.
        shift: The raw value that becomes 0.
        width: The raw length that becomes 1, positive. Among several features, a width of 0 marks
            a constant feature: it is encoded with a width of 1, and decoding returns its shift.
        levels: The number of levels L of quantised data, or None for real-valued data.
        low: The raw value drawn as black.
        high: The raw value drawn as white, above ``low``.
        dtype: The type of real-valued raw data, ``float32`` or ``float64``.

    Raises:
        InputError: If a shift or width does not broadcast to the shape or is not finite, or no
            width is positive.

    Example:
        >>> codec = Affine((2,), shift=[0.0, 5e4], width=[1.0, 2e4])
        >>> x = codec.encode(torch.tensor([[1.0, 7e4]]))
        >>> x, codec.decode(x)
        (tensor([[1., 1.]]), tensor([[1.0000e+00, 7.0000e+04]]))
    """

    shape: Sequence[int]
    shift: Numbers = 0.0
    width: Numbers = 1.0
    levels: int | None = None
    low: Numbers = 0.0
    high: Numbers = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        for name in ("shift", "width", "low", "high"):
            object.__setattr__(self, name, fitted(name, getattr(self, name), self.shape))
        width = torch.as_tensor(self.width, dtype=torch.float64)
        if bool((width < 0).any()) or not bool((width > 0).any()):
            raise InputError(
                "width must be non-negative, and positive for at least one feature, got "
                f"{self.width}; 0 marks a constant feature."
            )
        if self.dtype not in _REALS:
            raise InputError(f"dtype must be float32 or float64, got {self.dtype}.")

    @staticmethod
    def of_levels(shape: Sequence[int], levels: int, centred: bool = True) -> "Affine":
        """Returns the codec that maps [0, L] onto [-1, 1], or onto [0, 1] if not ``centred``.

        Example:
            >>> Affine.of_levels((4,), levels=4).encode(torch.arange(4)[None])
            tensor([[-0.7500, -0.2500,  0.2500,  0.7500]])
        """
        shift, width = (levels / 2, levels / 2) if centred else (0.0, float(levels))
        return Affine(shape, shift, width, levels, 0.0, levels - 1.0)

    @property
    def scale(self) -> float | None:
        return 1 / self.width if isinstance(self.width, float) else None

    @property
    def range(self) -> tuple[float, float]:
        low, high = (self.low, self.high) if self.levels is None else (0.0, self.levels)
        m, w, _ = self._on(torch.device("cpu"))
        first, last = (
            torch.as_tensor((_number(end) - m) / w, dtype=torch.float64) for end in (low, high)
        )
        return float(first.min()), float(last.max())

    @property
    def scaling(self) -> Scaling:
        """The map without the other fields, as the older class :class:`Scaling`."""
        warnings.warn(
            "Affine.scaling will be removed; use encode, decode and log_det.",
            FutureWarning,
            stacklevel=2,
        )
        return self.one_map()

    def one_map(self) -> Scaling:
        """Returns the map without the other fields, if it has a single shift and width.

        Raises:
            InputError: If features differ.
        """
        if not isinstance(self.shift, float) or not isinstance(self.width, float):
            raise InputError(
                "Scaling requires a single shift and width, got several for features of shape "
                f"{tuple(self.shape)}; use encode, decode and log_det of the codec."
            )
        return Scaling(self.shift, self.width)

    @cached_property
    def log_volume(self) -> float:
        r"""The sum of the log-scales, :math:`D \log s` if all features have the same scale."""
        dimension = math.prod(self.shape)
        if isinstance(self.width, float):
            return dimension * math.log(1 / self.width)
        _, w, _ = self._on(torch.device("cpu"))
        return -float(torch.as_tensor(w).log().expand(self.shape).sum())

    def encode(self, raw: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        if streams is not None and not isinstance(streams, Streams):
            text = "encode(raw, offsets) will be removed; use encode_at(raw, offsets)."
            warnings.warn(text, FutureWarning, stacklevel=2)
            return self.encode_at(raw, streams)
        if self.levels is None:
            return self._map(raw)
        if streams is None:
            return self.encode_at(raw, 0.5)
        return self.encode_at(raw, streams.uniform(raw.shape[1:], Purpose.DEQUANTISE, draw))

    def encode_at(self, raw: Tensor, offsets: Tensor | float) -> Tensor:
        """Converts raw examples to model units, with each integer at a given point of its step.

        Arguments:
            raw: Raw examples, with shape ``(B, *)``.
            offsets: Position of each integer in its step, in (0, 1), with shape ``(B, *)`` or
                ``()``. Not used for real-valued data.

        Returns:
            Examples in model units, float32, with shape ``(B, *)``.
        """
        if self.levels is None:
            return self._map(raw)
        return self._map(raw.float() + _inside(offsets, self.levels))

    def decode(self, x: Tensor, rounded: bool = True) -> Tensor:
        """Converts model units back to raw ones.

        Raises:
            InputError: If quantised data are to be rounded and contain NaN, which no integer
                represents.
        """
        if self.levels is None:
            real = _REALS[self.dtype]
            return self._back(x).to(real if rounded else torch.promote_types(x.dtype, real))
        if not rounded:
            return self._back(x)
        if x.isnan().any():
            raise InputError(
                f"x must not contain NaN, got {int(x.isnan().sum())} of {x.numel()} values; the "
                "model or the sampler has diverged."
            )
        levels = self._back(x.double()).floor()
        return levels.clamp(0, self.levels - 1).to(integer_type(self.levels))

    def log_det(self, raw: Tensor, x: Tensor) -> Tensor:
        """Returns the sum of the log-scales for each example, float64."""
        return torch.full((len(x),), self.log_volume, dtype=torch.float64, device=x.device)

    def to_unit(self, x: Tensor) -> Tensor:
        low, high = (_number(end, x.device) for end in (self.low, self.high))
        return ((self.decode(x).double() - low) / (high - low)).clamp(0, 1).float()

    def _map(self, y: Tensor) -> Tensor:
        if isinstance(self.shift, float) and self.scale is not None and y.dtype != torch.float64:
            return (y.float() - self.shift) * self.scale
        m, w, _ = self._on(y.device)
        return ((y.double() - m) / w).float()

    def _back(self, x: Tensor) -> Tensor:
        """Returns x w + m in the type of ``x``, or in float64 if the precision requires it."""
        if isinstance(self.shift, float) and isinstance(self.width, float):
            wide = self.levels is None and self.dtype == "float64"
            return (x.double() if wide else x) * self.width + self.shift
        m, w, constant = self._on(x.device)
        y = torch.where(constant, m, x.double() * w + m)
        return y if self.levels is None else y.to(x.dtype)

    def _on(self, device: torch.device) -> tuple[Any, Any, Tensor]:
        """Returns shift and width on a device, float64, and the mask of constant features.

        Constant features have the width 1 here.
        """
        if device not in self._placed:
            width = torch.as_tensor(self.width, dtype=torch.float64, device=device)
            w = self.width if isinstance(self.width, float) else width.where(width > 0, 1.0)
            self._placed[device] = _number(self.shift, device), w, width == 0
        return self._placed[device]

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Any, Any, Tensor]]:
        return {}


def _number(value: Any, device: torch.device | None = None) -> Any:
    """Returns one number unchanged, and several as a float64 tensor."""
    if isinstance(value, int | float):
        return value
    return torch.tensor(value, dtype=torch.float64, device=device)


def fitted(name: str, value: Numbers, shape: Sequence[int]) -> float | tuple[Any, ...]:
    """Returns numbers as one float or nested tuples, after a check that they fit the shape."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64)
        fits = torch.broadcast_shapes(tensor.shape, tuple(shape)) == tuple(shape)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits or not bool(tensor.isfinite().all()):
        raise InputError(
            f"{name} must be a finite number, or finite numbers that broadcast to "
            f"{tuple(shape)}, got {value}."
        )
    return float(tensor) if tensor.ndim == 0 else _tuples(tensor.tolist())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _inside(offsets: Tensor | float, levels: int) -> Tensor:
    """Clamps numbers in (0, 1) away from its ends, so float32 never rounds y + u to y + 1."""
    edge = levels * 2.0**-22
    return torch.as_tensor(offsets, dtype=torch.float32).clamp(edge, 1 - edge)
