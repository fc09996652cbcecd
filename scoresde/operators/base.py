r"""Base classes of operators.

A linear operator :math:`A` has a transpose,
:math:`\langle A v, u \rangle = \langle v, A^T u \rangle`, computed as a vector-Jacobian product
unless a subclass has a faster method. Its pseudo-inverse :math:`A^+` returns the example of least
norm with a given measurement, :math:`A A^+ A = A`. Operators act on each example of a batch
separately.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams


class Operator(ABC):
    """Base class for operators; subclasses implement :meth:`forward`."""

    # Whether measurements are means of an example's values, and thus in the range of the data.
    averages: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Measures examples: ``(B, *)`` to ``(B, ...)``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Measures examples: ``(B, *)`` to ``(B, ...)``."""
        return self.forward(x)

    def take(self, rows: Tensor) -> "Operator":
        """Returns the operator of some examples, int64 ``(n,)``; itself if all share it."""
        return self

    def batch(self, shape: Sequence[int]) -> int:
        """Returns the number of examples for which it has masks; 1 if all share one."""
        return 1

    def measured(self, y: Tensor) -> Tensor:
        """Returns the mask of the measured entries of ``y``, bool ``(B, ...)``."""
        return torch.ones_like(y, dtype=torch.bool)

    def check(self, shape: Sequence[int], like: Tensor) -> None:
        """Checks the operator on examples of a shape, with the type and device of a tensor.

        Raises:
            InputError: If it does not return a floating-point batch.
        """
        _measure(
            self, torch.zeros(self.batch(shape), *shape, dtype=like.dtype, device=like.device)
        )


class LinearOperator(Operator):
    """Base class for linear operators."""

    def transpose(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """Applies the transpose, ``(B, ...)`` to ``(B, *)``, for examples of a shape.

        The default is the vector-Jacobian product of :meth:`forward`.
        """
        graph = torch.is_grad_enabled() and u.requires_grad
        with torch.enable_grad():
            x = torch.zeros(len(u), *shape, dtype=u.dtype, device=u.device, requires_grad=True)
            y = self(x)
            if not y.requires_grad:
                raise InputError(
                    f"{type(self).__name__} must have a transpose, since its output has no "
                    "gradient; pass adjoint= to Linear, or override transpose."
                )
            return torch.autograd.grad(y, x, u.to(y), create_graph=graph)[0]

    def pseudo_inverse(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """Applies the pseudo-inverse, ``(B, ...)`` to ``(B, *)``, for examples of a shape.

        Raises:
            InputError: If it is unknown, as in this class.
        """
        raise InputError(
            f"operator must have a pseudo-inverse, got {type(self).__name__} without one; pass "
            "inverse= to Linear, or use MMPS, which requires none."
        )

    def check(self, shape: Sequence[int], like: Tensor) -> None:
        r"""Checks that it is linear and :math:`\langle A v, u\rangle = \langle v, A^T u\rangle`.

        Raises:
            InputError: If it does not return a floating-point batch, is not linear, or has a wrong
                transpose.
        """
        v, w = (_example(self, shape, like, draw) for draw in (0, 1))
        a, b = _measure(self, v), _measure(self, w)
        tolerance = 1e-10 if a.dtype == torch.float64 else 1e-3
        both, size = self(v + 2 * w), a.norm() + 2 * b.norm()
        if not bool((both - (a + 2 * b)).norm() <= tolerance * size):
            raise InputError(
                f"operator must be linear, got {self} with A(v + 2 w) - A(v) - 2 A(w) of norm "
                f"{(both - (a + 2 * b)).norm():.3g}; use NonLinear."
            )
        back = self.transpose(b, shape)
        if back.shape != v.shape:
            raise InputError(f"transpose must return {tuple(v.shape)}, got {tuple(back.shape)}.")
        left, right = (a * b).sum(), (v * back).sum()
        if not bool((left - right).abs() <= tolerance * (a.norm() * b.norm() + right.abs())):
            raise InputError(
                f"transpose must satisfy <A v, u> = <v, A^T u>, got {left:.6g} and {right:.6g}; "
                "remove it to use autograd."
            )


def _example(operator: Operator, shape: Sequence[int], like: Tensor, draw: int) -> Tensor:
    streams = Streams.of(0, batch=operator.batch(shape), device=like.device)
    return streams.normal(tuple(shape), Purpose.MEASUREMENT, draw, like.dtype)


def _measure(operator: Operator, x: Tensor) -> Tensor:
    y = operator(x)
    if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1] or not y.is_floating_point():
        got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(
            f"operator must return floats ({len(x)}, ...) for data {tuple(x.shape)}, got {got}."
        )
    return y


def select(values: Tensor, rows: Tensor | None, ndim: int) -> Tensor:
    """Selects the rows of some examples from values ``(B, ...)``.

    Arguments:
        values: Values with ``ndim`` axes, the first for the examples; or values shared by all
            examples, with fewer axes or one row.
        rows: The indices of the examples, int64 ``(n,)``; all if None.
        ndim: The number of axes of a batch.
    """
    if rows is None or values.ndim < ndim or len(values) == 1:
        return values
    return values[rows.to(values.device)]


def chosen(rows: Tensor | None, more: Tensor) -> Tensor:
    """Returns the indices of a selection from previously selected rows."""
    return more if rows is None else rows[more.to(rows.device)]


def check_mask(mask: object) -> None:
    """Checks that a mask is a bool tensor.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"mask must be a bool tensor, got {got}; pass torch.as_tensor(mask).bool()."
        )


def fitted(mask: Tensor, rows: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Returns a mask that broadcasts to a batch of a shape ``(B, *)``.

    Raises:
        InputError: If the mask does not broadcast to the shape.
    """
    own = select(mask, rows, len(shape))
    pairs = zip(reversed(own.shape), reversed(shape), strict=False)
    if own.ndim > len(shape) or any(m not in (1, n) for m, n in pairs):
        raise InputError(f"mask must broadcast to a batch {tuple(shape)}, got {tuple(own.shape)}.")
    return own
