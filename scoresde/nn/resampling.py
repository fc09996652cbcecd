r"""Resampling of an image to half or twice its size, with or without a convolution.

Halving by dropping pixels, or doubling by repeating them, introduces false frequencies (aliasing).
Finite impulse response (FIR) filters remove them: the image is convolved with :math:`h \otimes h`
before every second pixel is dropped, and after zeros are inserted between pixels,

.. math:: (\downarrow x)_i = \sum_k h_k \, x_{2 i + o - k}, \qquad
          (\uparrow x)_i = 2 \sum_j h_{i + o - 2 j} \, x_j

along each axis, with zeros beyond the border and the offset :math:`o` that keeps the image in
position. :math:`h` sums to one.

References:
    Zhang, *Making convolutional networks shift-invariant again*, 2019,
    https://arxiv.org/abs/1904.11486.
    Karras et al., *Analyzing and improving the image quality of StyleGAN*, 2020,
    https://arxiv.org/abs/1912.04958 (their ``upfirdn2d``).
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    interpolate,
    pad,
)

from scoresde.errors import InputError
from scoresde.nn.basics import CONVOLUTIONS, Constants, initialise


@dataclass(frozen=True)
class Resampling(ABC):
    """Base class for builders of the layers that change the size of an image."""

    @abstractmethod
    def down(self) -> nn.Module:
        """Returns a layer that halves the size."""

    @abstractmethod
    def up(self) -> nn.Module:
        """Returns a layer that doubles the size."""

    @abstractmethod
    def down_conv(self, source: int, channels: int, dims: int = 2) -> nn.Module:
        """Returns a convolution from ``source`` to ``channels`` that halves the size.

        Its kernel size is 3 along each of ``dims`` axes: 1, 2 or 3.
        """

    @abstractmethod
    def up_conv(self, source: int, channels: int, dims: int = 2) -> nn.Module:
        """Returns a convolution that doubles the size; arguments as for :meth:`down_conv`."""


@dataclass(frozen=True)
class BoxResampling(Resampling):
    """Halves the size by averaging 2 x 2 pixels; doubles it by repeating pixels (DDPM, DDPM++).

    A convolution halves the size with a stride of two.

    Arguments:
        both_sides: Whether such a convolution pads zeros at all borders. If False, it pads only
            after the last row and column, as in DDPM.
    """

    both_sides: bool = False

    def down(self) -> nn.Module:
        return Downsample()

    def up(self) -> nn.Module:
        return Upsample()

    def down_conv(self, source: int, channels: int, dims: int = 2) -> nn.Module:
        if self.both_sides:
            return ResamplingConv(nn.Identity(), source, channels, 2, padding=1, dims=dims)
        pads: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
        zeros = pads[dims]((0, 1) * dims)
        return ResamplingConv(zeros, source, channels, stride=2, dims=dims)

    def up_conv(self, source: int, channels: int, dims: int = 2) -> nn.Module:
        return ResamplingConv(Upsample(), source, channels, padding=1, dims=dims)


@dataclass(frozen=True)
class FIRResampling(Resampling):
    """Filters before every second pixel is dropped, and after zeros are inserted (NCSN++).

    Arguments:
        kernel: The filter :math:`h` along each axis, or a square one for both axes together; it
            is divided by its sum.

    Example:
        >>> FIRResampling().down()(torch.ones(1, 1, 4, 4))
        tensor([[[[0.7656, 0.7656],
                  [0.7656, 0.7656]]]])
    """

    kernel: Sequence[float] | Sequence[Sequence[float]] = (1, 3, 3, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", _check_kernel(self.kernel))

    def down(self) -> nn.Module:
        return FilteredDown(self.kernel)

    def up(self) -> nn.Module:
        return FilteredUp(self.kernel)

    def down_conv(self, source: int, channels: int, dims: int = 2) -> nn.Module:
        before = FilteredDown(self.kernel, 1, margin=1)
        return ResamplingConv(before, source, channels, stride=2, dims=dims)

    def up_conv(self, source: int, channels: int, dims: int = 2) -> nn.Module:
        return ResamplingConv(FilteredUp(self.kernel, margin=1), source, channels, dims=dims)


class Downsample(nn.Module):
    """Halves the size by averaging pairs of neighbours along each axis."""

    def forward(self, x: Tensor) -> Tensor:
        return _POOLS[x.ndim - 2](x, 2)


class Upsample(nn.Module):
    """Doubles the size by repeating each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return interpolate(x, scale_factor=2.0, mode="nearest")


_POOLS = {1: avg_pool1d, 2: avg_pool2d, 3: avg_pool3d}
_CONVOLVE = {1: conv1d, 2: conv2d, 3: conv3d}
_TRANSPOSE = {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}


class Filter(Constants):
    """Base class for filters that act on each channel separately, ``(B, C, *)``.

    The filter of an image is square. For signals and volumes the filter is the product of one
    filter along each axis, so a square filter must be such a product too.

    Arguments:
        kernel: The filter, float64 ``(n, n)``, with n even and at least 4.
        margin: The number of pixels beyond the border to return as well.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, margin: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        self.constant("kernel", kernel)
        self.margin = margin
        self.gain = gain

    def _per_channel(self, x: Tensor) -> Tensor:
        """Returns the filter once for each channel, ``(C, 1, n, ...)``."""
        axes = x.ndim - 2
        kernel = self.kernel if axes == 2 else self._along(axes)
        return kernel.to(x.dtype).expand(x.shape[1], 1, *kernel.shape)

    def _along(self, axes: int) -> Tensor:
        """Returns the filter for a number of axes, as a product of the filter along one axis."""
        rows = self.kernel.sum(1)
        one = self.gain * rows / rows.sum()
        product = torch.outer(one, one) * self.kernel.sum() / one.sum() ** 2
        if not torch.allclose(product, self.kernel, rtol=1e-4, atol=1e-6):
            raise InputError(
                "kernel must be a list, or the outer product of one list with itself, for data of "
                f"{axes} axes, got another square kernel; use a list such as [1, 3, 3, 1]."
            )
        return functools.reduce(lambda a, b: a[..., None] * b, [one] * axes)


class FilteredDown(Filter):
    """Filters, then keeps one pixel in every ``stride`` along each axis.

    Arguments:
        kernel: The filter, square, or along each axis; it is divided by its sum.
        stride: The distance between the pixels that are kept.
        margin: The number of pixels beyond the border to return as well, before the stride.
    """

    def __init__(self, kernel: Sequence, stride: int = 2, margin: int = 0) -> None:
        # A convolution flips its filter; torch's conv2d does not.
        super().__init__(_filter(kernel).flip(0, 1), margin)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        padding = len(self.kernel) // 2 - 1 + self.margin
        convolve = _CONVOLVE[x.ndim - 2]
        return convolve(x, self._per_channel(x), None, self.stride, padding, groups=x.shape[1])


class FilteredUp(Filter):
    """Inserts a zero after each pixel along each axis, then filters with a gain of 2 per axis.

    Arguments:
        kernel: The filter, square, or along each axis; it is divided by its sum.
        margin: The number of pixels beyond the border to return as well, 0 or 1.
    """

    def __init__(self, kernel: Sequence, margin: int = 0) -> None:
        super().__init__(4 * _filter(kernel), margin, gain=2.0)

    def forward(self, x: Tensor) -> Tensor:
        padding, channels = len(self.kernel) // 2 - 1 - self.margin, x.shape[1]
        transpose = _TRANSPOSE[x.ndim - 2]
        return transpose(x, self._per_channel(x), None, 2, padding, groups=channels)


class ResamplingConv(nn.Module):
    """A 3 x 3 convolution after a layer that prepares the change of size.

    Arguments:
        before: The layer before the convolution.
        source: The number of channels of the input.
        channels: The number of channels of the output.
        stride: The stride of the convolution.
        padding: The padding of the convolution.
        dims: The number of axes besides batch and channels: 1, 2 or 3.
    """

    def __init__(
        self,
        before: nn.Module,
        source: int,
        channels: int,
        stride: int = 1,
        padding: int = 0,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.before = before
        self.conv = initialise(CONVOLUTIONS[dims](source, channels, 3, stride, padding))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.before(x))


def _check_kernel(kernel: Sequence) -> tuple:
    """Returns a filter as a tuple of numbers, or of rows of numbers.

    Raises:
        InputError: If ``kernel`` is not a filter, or its sum is zero.
    """
    try:
        values = torch.tensor(kernel, dtype=torch.float64, device="cpu")
        square = values.ndim == 1 or (values.ndim == 2 and len(set(values.shape)) == 1)
    except (TypeError, ValueError, RuntimeError):
        square = False
    if not square or not 0 < abs(float(values.sum())) < math.inf:
        raise InputError(
            "kernel must be a list or a square matrix of numbers with a finite non-zero sum, got "
            f"{kernel!r}; for example [1, 3, 3, 1]."
        )
    rows = values.tolist()
    return tuple(tuple(row) if isinstance(row, list) else row for row in rows)


def _filter(kernel: Sequence) -> Tensor:
    """Returns the filter for both axes with a sum of one, float64 ``(n, n)`` on the CPU.

    It is padded with zeros, which have no effect, to an even length of at least four.
    """
    values = torch.tensor(kernel, dtype=torch.float64, device="cpu")
    if values.ndim == 1:
        values = torch.outer(values, values)
    while len(values) % 2 or len(values) < 4:
        values = pad(values, (1, 0, 1, 0) if len(values) % 2 else (1, 1, 1, 1))
    return values / values.sum()
