"""Operators that act on the Fourier transform of an example: blurs and partial spectra."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.operators.base import LinearOperator, check_mask, chosen, fitted, select


@final
@dataclass(frozen=True, eq=False)
class Blur(LinearOperator):
    r"""Circular convolution of each channel with a kernel, on the axes after the channels.

    .. math:: \mathcal F y = \hat h \, \mathcal F x

    The pseudo-inverse divides by :math:`\hat h`. It omits frequencies where :math:`|\hat h|` is
    less than ``cutoff`` times its maximum.

    Arguments:
        kernel: The kernel, with one axis for each axis after the channels; its centre is the
            entry ``size // 2``.
        std: Alternative to ``kernel``: the standard deviation of a Gaussian kernel in pixels,
            positive.
        cutoff: The smallest relative gain that the pseudo-inverse inverts, positive.

    Raises:
        InputError: If not exactly one of ``kernel`` and ``std`` is given, or the kernel does not
            match the examples.

    Example:
        >>> Blur(torch.tensor([0.5, 0.5]))(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))
        tensor([[[0.5000, 0.0000, 0.0000, 0.5000]]])
    """

    kernel: Tensor | None = None
    std: float | None = None
    cutoff: float = 1e-3

    def __post_init__(self) -> None:
        if (self.kernel is None) == (self.std is None):
            raise InputError(
                "Blur requires exactly one of kernel and std, got "
                f"{'neither' if self.kernel is None else 'both'}."
            )
        if self.std is not None and not 0 < self.std < math.inf:
            raise InputError(f"std must be positive and finite, got {self.std}.")

    def forward(self, x: Tensor) -> Tensor:
        return self._filter(x, lambda h: h)

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return self._filter(u, torch.conj)

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        def inverse(h: Tensor) -> Tensor:
            kept = h.abs() >= self.cutoff * h.abs().max()
            return torch.where(kept, 1 / torch.where(kept, h, 1), 0)

        return self._filter(y, inverse)

    def _filter(self, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        axes, sizes = tuple(range(2, x.ndim)), x.shape[2:]
        gain = of(torch.fft.fftn(self._centred(sizes, x)))
        return torch.fft.ifftn(gain * torch.fft.fftn(x, dim=axes), dim=axes).real

    def _centred(self, sizes: Sequence[int], x: Tensor) -> Tensor:
        """Returns the kernel on the grid of the examples, with its centre at index 0."""
        if self.kernel is None:
            assert self.std is not None
            return _gaussian(sizes, self.std, x)
        small = self.kernel.shape
        fits = len(small) == len(sizes) > 0
        if not fits or any(k > n for k, n in zip(small, sizes, strict=True)):
            raise InputError(
                "kernel must have one axis for each axis after the channels of examples "
                f"{tuple(x.shape[1:])}, and not be longer, got {tuple(small)}."
            )
        grid = torch.zeros(*sizes, dtype=x.dtype, device=x.device)
        grid[tuple(slice(k) for k in small)] = self.kernel.to(x)
        return grid.roll([-(k // 2) for k in small], tuple(range(len(small))))


def _gaussian(sizes: Sequence[int], std: float, x: Tensor) -> Tensor:
    grid = torch.ones((), dtype=x.dtype, device=x.device)
    for size in sizes:
        place = torch.arange(size, dtype=x.dtype, device=x.device)
        line = torch.exp(-0.5 * (torch.minimum(place, size - place) / std) ** 2)
        grid = grid[..., None] * (line / line.sum())
    return grid


@final
@dataclass(frozen=True, eq=False)
class Fourier(LinearOperator):
    r"""Measurement of some unitary Fourier coefficients, on the axes after the channels.

    Measurements have the shape ``(B, *, 2)``: real and imaginary parts, with zeros where nothing
    is measured. For real data the coefficients at :math:`k` and :math:`-k` are conjugate, so a
    mask with both measures the same coefficient twice, with independent noise.

    Arguments:
        mask: True where a coefficient is measured, bool. Its shape is ``(*)`` of one example, or
            broadcasts to it; or, for one mask per example, ``(B, ...)`` with all axes.
        rows: The indices of the examples of the batch to which the masks belong, int64; all if
            None.

    Raises:
        InputError: If the mask is not bool, or does not broadcast to the examples.

    Example:
        >>> Fourier(torch.tensor([True, False]))(torch.tensor([[[1.0, 1.0]]]))[0, 0, 0]
        tensor([1.4142, 0.0000])
    """

    mask: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        check_mask(self.mask)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3:
            raise InputError(f"Fourier requires examples (C, ...), got {tuple(x.shape[1:])}.")
        mask = fitted(self.mask, self.rows, x.shape).to(x.device)
        spectrum = torch.fft.fftn(x, dim=tuple(range(2, x.ndim)), norm="ortho")
        return torch.view_as_real(spectrum * mask)

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        mask = fitted(self.mask, self.rows, u.shape[:-1]).to(u.device)
        return self._back(u, mask)

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        # A coefficient measured without its conjugate has half the weight in A^T A.
        mask = fitted(self.mask, self.rows, y.shape[:-1]).to(y.device)
        axes = tuple(range(2, y.ndim - 1))
        whole = mask.expand(y.shape[:-1])
        partner = whole.flip(axes).roll((1,) * len(axes), axes)
        return self._back(y, whole * torch.where(partner, 1, 2))

    def _back(self, u: Tensor, weights: Tensor) -> Tensor:
        spectrum = torch.view_as_complex(u.contiguous()) * weights
        return torch.fft.ifftn(spectrum, dim=tuple(range(2, u.ndim - 1)), norm="ortho").real

    def take(self, rows: Tensor) -> "Fourier":
        return Fourier(self.mask, chosen(self.rows, rows))

    def batch(self, shape: Sequence[int]) -> int:
        ndim = len(shape) + 1
        return len(select(self.mask, self.rows, ndim)) if self.mask.ndim == ndim else 1

    def measured(self, y: Tensor) -> Tensor:
        mask = fitted(self.mask, self.rows, y.shape[:-1]).to(y.device)
        return mask[..., None].expand(y.shape)
