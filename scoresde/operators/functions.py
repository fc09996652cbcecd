"""Operators for any examples: random projections, and user-defined functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.operators.base import LinearOperator, Operator
from scoresde.streams import Purpose, Streams


@final
@dataclass(frozen=True)
class RandomProjection(LinearOperator):
    r"""Projection of the D values of an example on random directions, with shape ``(B, rows)``.

    The entries of :math:`A` are independent :math:`N(0, 1/D)` and depend only on the seed. The
    pseudo-inverse is :math:`A^T (A A^T)^{-1}`.

    Arguments:
        rows: The number of directions, positive; at most D for the pseudo-inverse.
        seed: Seed of the directions.

    Example:
        >>> RandomProjection(rows=3)(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 3])
    """

    rows: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("rows", self.rows)

    def matrix(self, dimension: int, like: Tensor) -> Tensor:
        """Returns the matrix ``(rows, D)`` in the data type and on the device of a tensor."""
        key = dimension, like.dtype, like.device
        if key not in self._kept:
            streams = Streams.of(self.seed, batch=self.rows, device=like.device)
            normal = streams.normal((dimension,), Purpose.MEASUREMENT, dtype=torch.float64)
            self._kept[key] = (normal / math.sqrt(dimension)).to(like.dtype)
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[int, torch.dtype, torch.device], Tensor]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix(x.shape[1:].numel(), x).T

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return (u @ self.matrix(math.prod(shape), u)).reshape(len(u), *shape)

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        if self.rows > math.prod(shape):
            raise InputError(
                f"rows must be at most {math.prod(shape)}, the number of values of an example, "
                f"for the pseudo-inverse, got {self.rows}."
            )
        a = self.matrix(math.prod(shape), y)
        return self.transpose(torch.linalg.solve(a @ a.T, y.T).T, shape)


@final
@dataclass(frozen=True)
class Linear(LinearOperator):
    """A linear function as an operator.

    Arguments:
        function: Linear function from examples ``(B, *)`` to ``(B, ...)``, acting on each example
            separately.
        adjoint: Its transpose, from ``(B, ...)`` to ``(B, *)``. If None, it is computed by
            autograd.
        inverse: Its pseudo-inverse, from ``(B, ...)`` to ``(B, *)``, or None.

    Example:
        >>> Linear(lambda x: x.sum(1)).transpose(torch.ones(1), (3,))
        tensor([[1., 1., 1.]])
    """

    function: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor] | None = None
    inverse: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        return super().transpose(u, shape) if self.adjoint is None else self.adjoint(u)

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        return super().pseudo_inverse(y, shape) if self.inverse is None else self.inverse(y)


@final
@dataclass(frozen=True)
class NonLinear(Operator):
    """A differentiable function as an operator.

    Arguments:
        function: Function from examples ``(B, *)`` to ``(B, ...)``, acting on each example
            separately.
    """

    function: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
