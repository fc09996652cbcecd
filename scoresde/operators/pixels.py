"""Operators on the values of an example: masks, averages of neighbours, grey values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.operators.base import LinearOperator, check_mask, chosen, fitted, select
from scoresde.streams import Purpose, Streams


@final
@dataclass(frozen=True, eq=False)
class Masking(LinearOperator):
    r"""Measurement of some of the values: :math:`y = m \odot x`.

    Measurements have the shape of the example, with zeros where nothing is measured; the values of
    :math:`y` there are ignored. The pseudo-inverse and the transpose are the mask itself.

    Arguments:
        mask: True where a value is measured, bool. Its shape is ``(*)`` of one example, or
            broadcasts to it; or, for one mask per example, ``(B, ...)`` with all axes.
        rows: The indices of the examples of the batch to which the masks belong, int64; all if
            None.

    Raises:
        InputError: If the mask is not bool, or does not broadcast to the examples.

    Example:
        >>> Masking(torch.tensor([True, False]))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """

    averages = True

    mask: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        check_mask(self.mask)

    def forward(self, x: Tensor) -> Tensor:
        mask = fitted(self.mask, self.rows, x.shape).to(x.device)
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return self(u)

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return self(y)

    def take(self, rows: Tensor) -> "Masking":
        return Masking(self.mask, chosen(self.rows, rows))

    def batch(self, shape: Sequence[int]) -> int:
        ndim = len(shape) + 1
        return len(select(self.mask, self.rows, ndim)) if self.mask.ndim == ndim else 1

    def measured(self, y: Tensor) -> Tensor:
        return fitted(self.mask, self.rows, y.shape).to(y.device).expand(y.shape)


def hole(
    shape: Sequence[int], size: int | Sequence[int], at: Sequence[int] | None = None
) -> Masking:
    """Returns the mask of a rectangular hole in the last axes of examples.

    Arguments:
        shape: The shape of one example, with an axis for channels.
        size: The side of the hole, positive, or its sides along the axes after the channels.
        at: The position of its first corner. If None, the hole is in the middle.

    Raises:
        InputError: If the hole does not lie within the example, or covers all of it.

    Example:
        >>> hole((1, 4, 4), 2).mask[0, 1]
        tensor([ True, False, False,  True])
    """
    axes = _given(shape)[1:]
    sides = [size] * len(axes) if isinstance(size, int) else list(size)
    first = [(n - k) // 2 for n, k in zip(axes, sides, strict=False)] if at is None else list(at)
    fits = axes and len(sides) == len(first) == len(axes)
    inside = fits and all(
        f >= 0 and k > 0 and f + k <= n for f, k, n in zip(first, sides, axes, strict=True)
    )
    if not inside or list(sides) == list(axes):
        raise InputError(
            f"size must be a hole inside the axes {axes} of an example that does not cover all "
            f"of it, got {size} at {first}."
        )
    mask = torch.ones(tuple(shape), dtype=torch.bool)
    mask[(slice(None), *(slice(f, f + k) for f, k in zip(first, sides, strict=True)))] = False
    return Masking(mask)


def random_mask(shape: Sequence[int], share: float, seed: int = 0) -> Masking:
    """Returns a mask of single positions at random, the same in all channels.

    Arguments:
        shape: The shape of one example. If it has several axes, the first is for channels.
        share: The share of measured positions, in (0, 1).
        seed: Seed of the positions.

    Raises:
        InputError: If the share is outside (0, 1).

    Example:
        >>> float(random_mask((1, 100, 100), 0.25).mask.float().mean())
        0.25
    """
    if not 0 < share < 1:
        raise InputError(f"share must be in (0, 1), got {share}; 0.5 is half of the positions.")
    axes = _given(shape)[1:] or tuple(shape)
    u = Streams.of(seed, batch=1).uniform(axes, Purpose.MEASUREMENT)[0].flatten()
    seen = torch.zeros(len(u), dtype=torch.bool)
    seen[u.argsort(stable=True)[: round(share * len(u))]] = True
    return Masking(seen.reshape(axes).expand(tuple(shape)).clone())


def _given(shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:  # a configuration takes it from the data of a checkpoint
        raise InputError(
            "shape must be the shape of one example, got None; set it, for example "
            "data.operator.shape=[1,8,8] for pairs of digits."
        )
    return tuple(shape)


@final
@dataclass(frozen=True)
class Downsampling(LinearOperator):
    r"""Average over blocks of :math:`f^d` neighbours on the d axes after the channels.

    The pseudo-inverse repeats each value over its block (nearest neighbour), because
    :math:`A A^T = f^{-d} I`.

    Arguments:
        factor: The side f of a block, positive; it must divide every axis.

    Raises:
        InputError: If it does not divide an axis, or examples have no axis after the channels.

    Example:
        >>> Downsampling(2)(torch.tensor([[[1.0, 3.0, 5.0, 5.0]]]))
        tensor([[[2., 5.]]])
    """

    averages = True

    factor: int

    def __post_init__(self) -> None:
        check_count("factor", self.factor)

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        if not sizes or any(size % self.factor for size in sizes):
            raise InputError(
                "factor must divide the axes after the channels of examples (C, ...), "
                f"{tuple(x.shape[1:])}, got {self.factor}."
            )
        for axis in range(2, x.ndim):
            x = x.unflatten(axis, (-1, self.factor)).mean(axis + 1)
        return x

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return self.pseudo_inverse(u, shape) / self.factor ** (u.ndim - 2)

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        for axis in range(2, y.ndim):
            y = y.repeat_interleave(self.factor, axis)
        return y


@final
@dataclass(frozen=True)
class Grey(LinearOperator):
    r"""Weighted sum of the channels, :math:`y = \sum_c w_c x_c`, with shape ``(B, 1, ...)``.

    The pseudo-inverse is :math:`w y / |w|^2`.

    Arguments:
        weights: The weight of each channel; the luma weights of ITU-R BT.601 by default.

    Raises:
        InputError: If the number of channels differs from the number of weights.

    Example:
        >>> Grey((0.5, 0.5))(torch.tensor([[[1.0], [3.0]]]))
        tensor([[[2.]]])
    """

    weights: tuple[float, ...] = (0.299, 0.587, 0.114)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.weights):
            raise InputError(
                f"weights must have one number for each channel of examples {tuple(x.shape[1:])}, "
                f"got {self.weights}."
            )
        return (self._column(x) * x).sum(1, keepdim=True)

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return self._column(u) * u

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return self._column(y) * y / sum(w * w for w in self.weights)

    def _column(self, x: Tensor) -> Tensor:
        weights = torch.tensor(self.weights, dtype=x.dtype, device=x.device)
        return weights.reshape(-1, *(1,) * (x.ndim - 2))
