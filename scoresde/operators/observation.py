r"""Observations :math:`y = A(x_0) + n` with :math:`n \sim N(0, \mathrm{std}^2)`.

**Units.** With a codec, :math:`y` and its noise are in raw units, and the operator acts on
:math:`\mathrm{decode}(x)` before rounding. Without a codec, it acts on :math:`x` itself. Every
result with the shape of an example is in model units. With an affine codec
:math:`x \mapsto W x + m`, a linear operator becomes affine, with the linear part :math:`A W`.

**Integers.** Before rounding, an integer k represents the values from k to k + 1. So integers in
:math:`y` are interpreted as k + 1/2, and measurements of data before dequantisation are
:math:`y = A(\mathrm{raw} + 1/2) + n`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.codec import Affine, Codec
from scoresde.errors import InputError
from scoresde.operators.base import LinearOperator, Operator, chosen, select
from scoresde.shapes import sum_features

_FAR = 6  # standard deviations of the noise; values further out are taken to be in other units


@dataclass(frozen=True)
class Linearised:
    r"""Linearisation of an observation at some examples: :math:`A(x + v) \approx A(x) + H v`.

    Arguments:
        residual: :math:`y - A(x)`, with shape ``(B, ...)``; zero where nothing is measured.
        variance: The variance of the noise; broadcasts to the residual.
        push: :math:`v \mapsto H v`, from ``(B, *)`` in model units to ``(B, ...)``.
        pull: :math:`u \mapsto H^T u`, from ``(B, ...)`` to ``(B, *)`` in model units.
    """

    residual: Tensor
    variance: Tensor
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Observation:
    r"""An operator and measurements made with it.

    Arguments:
        operator: The operator.
        y: The measurements, floats ``(B, ...)``, or ``(...)`` for all examples. With a codec they
            are in raw units, and may be integers; otherwise in model units.
        std: The standard deviation of the noise, non-negative, in the units of :math:`y`: a
            number, or a tensor that broadcasts to :math:`y`.
        codec: The codec of the data, or None.
        rows: The indices of the observed examples of the batch, int64; all if None.

    Raises:
        InputError: If the arguments are not consistent.

    Example:
        >>> from scoresde.operators import Masking
        >>> mask = torch.tensor([True, False])
        >>> Observation(Masking(mask), torch.tensor([1.0, 0.0]), 0.1).residual(torch.zeros(1, 2))
        tensor([[1., 0.]])
    """

    operator: Operator
    y: Tensor
    std: float | Tensor
    codec: Codec | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise InputError(
                f"operator must be an Operator, got {type(self.operator).__name__}; wrap a "
                "function with Linear(function) or NonLinear(function)."
            )
        if self.rows is not None:  # part of an observation that was checked
            return
        object.__setattr__(self, "y", self._floats())
        self._check_values()
        if self.codec is not None:
            self.check(self.codec.shape)

    @property
    def linear(self) -> bool:
        """True if the map from model units to measurements is affine."""
        affine = self.codec is None or isinstance(self.codec, Affine)
        return affine and isinstance(self.operator, LinearOperator)

    @property
    def noiseless(self) -> bool:
        """True if any measurement has no noise."""
        return bool((torch.as_tensor(self.std) == 0).any())

    def take(self, rows: Tensor) -> "Observation":
        """Returns the observation of some examples, int64 ``(n,)``, in any order and number."""
        return replace(self, operator=self.operator.take(rows), rows=chosen(self.rows, rows))

    def to(self, device: torch.device) -> "Observation":
        """Returns the observation on a device."""
        std = self.std.to(device) if isinstance(self.std, Tensor) else self.std
        return replace(self, y=self.y.to(device), std=std)

    def decode(self, x: Tensor) -> Tensor:
        """Converts examples in model units ``(B, *)`` to the input of the operator."""
        return x if self.codec is None else self.codec.decode(x, rounded=False)

    def forward(self, x: Tensor) -> Tensor:
        """Measures examples in model units, without noise: ``(B, *)`` to ``(B, ...)``."""
        return self.operator(self.decode(x))

    def residual(self, x: Tensor) -> Tensor:
        """Returns y - A(x), ``(B, ...)``, zero where nothing is measured.

        Raises:
            InputError: If y is neither for all examples ``(B, *)`` nor for each.
        """
        return self._compare(self.forward(x))

    def variance(self, like: Tensor) -> Tensor:
        """Returns the variance of the noise, which broadcasts to measurements ``(B, ...)``."""
        # A number is rounded once, to the type of the measurements.
        std = torch.as_tensor(self.std, dtype=like.dtype, device=like.device)
        return select(std, self.rows, like.ndim) ** 2

    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log p(y | x) of examples in model units, in nats: ``(B, *)`` to ``(B,)``.

        Raises:
            InputError: If the noise has no density (std = 0).
        """
        if self.noiseless:
            raise InputError(f"std must be positive everywhere for a density, got {self.std}.")
        r = self.residual(x)
        v = self.variance(r).expand(r.shape)
        log_normal = -0.5 * (r**2 / v + torch.log(2 * math.pi * v))
        return sum_features(torch.where(self.operator.measured(r), log_normal, 0))

    def dim(self, x: Tensor) -> Tensor:
        """Returns the number of measured entries of examples ``(B, *)``, int64 ``(B,)``."""
        return sum_features(self.operator.measured(self.residual(x))).to(torch.int64)

    def push(self, v: Tensor) -> Tensor:
        """Applies the linear part to changes of examples in model units, ``(B, *)``.

        Raises:
            InputError: If it is not linear.
        """
        self._require_linear()
        return self.operator(v * self._widths(v).to(v))

    def pull(self, u: Tensor, shape: Sequence[int]) -> Tensor:
        """Applies the transpose of the linear part, ``(B, ...)`` to ``(B, *)`` in model units.

        Arguments:
            u: Weights of measurements, with shape ``(B, ...)``.
            shape: The shape of one example in model units.

        Raises:
            InputError: If it is not linear.
        """
        operator = self._require_linear()
        return operator.transpose(u, self._raw(shape)) * self._widths(u).to(u)

    def lift(self, r: Tensor, shape: Sequence[int]) -> Tensor:
        r"""Applies :math:`W^{-1} A^+`: a change in model units whose measurement is :math:`r`.

        Arguments:
            r: Changes of measurements, with shape ``(B, ...)``.
            shape: The shape of one example in model units.

        Raises:
            InputError: If it is not linear, or the operator has no pseudo-inverse.
        """
        widths = self._widths(r).to(r)
        change = self._require_linear().pseudo_inverse(r, self._raw(shape))
        return torch.where(widths == 0, 0, change / torch.where(widths == 0, 1, widths))

    def project(self, x: Tensor) -> Tensor:
        r"""Returns the examples :math:`x + W^{-1} A^+ (y - A x)`, which agree with y: ``(B, *)``.

        For noiseless measurements, this is the last step of a sampler, which ends at a small noise
        level.

        Raises:
            InputError: If it is not linear, or the operator has no pseudo-inverse.
        """
        return x + self.lift(self.residual(x), x.shape[1:]).to(x)

    def linearise(self, x: Tensor) -> Linearised:
        """Returns the linearisation at examples in model units ``(B, *)``, in their data type.

        It is exact if the observation is linear.
        """
        if self.linear:
            r = self.residual(x).to(x)
            return Linearised(r, self.variance(r), self.push, lambda u: self.pull(u, x.shape[1:]))
        with sdpa_kernel(SDPBackend.MATH):
            z, pull = torch.func.vjp(self.forward, x)  # type: ignore[misc]
        r = self._compare(z).to(x)
        return Linearised(r, self.variance(r), partial(self._along, x), lambda u: pull(u.to(z))[0])

    def _along(self, x: Tensor, v: Tensor) -> Tensor:
        """Returns the derivative at examples in a direction, both ``(B, *)``."""
        # A decoder may have attention, whose fused kernels have no forward derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(self.forward, (x,), (v,))[1].to(x)

    def matrix(self, shape: Sequence[int]) -> Tensor:
        """Returns the linear part as a matrix ``(B or 1, n, D)``, for small examples.

        Arguments:
            shape: The shape of one example in model units.

        Raises:
            InputError: If it is not linear.
        """
        eye = torch.eye(math.prod(shape), dtype=self.y.dtype, device=self.y.device)
        count = self.operator.batch(self._raw(shape))
        units = (e.reshape(1, *shape).expand(count, *shape) for e in eye)
        return torch.stack([self.push(e).flatten(1) for e in units], 2)

    def check(self, shape: Sequence[int]) -> None:
        """Checks the operator, y and the std on examples of a shape in model units.

        Raises:
            InputError: If the operator cannot measure them, is declared linear but is not, has a
                wrong transpose, or y or the std does not have the shape of its measurements.
        """
        if self.codec is not None and tuple(self.codec.shape) != tuple(shape):
            raise InputError(
                f"codec must have shape {tuple(shape)}, that of the examples, got "
                f"{tuple(self.codec.shape)}."
            )
        self.operator.check(self._raw(shape), self.y)
        with torch.no_grad():
            z = self._at_zero(shape)
            self._compare(z.expand(self.count(shape), *z.shape[1:]) if len(z) == 1 else z)

    def count(self, shape: Sequence[int]) -> int:
        """Returns the number of observed examples; 1 if all examples share the observation.

        Arguments:
            shape: The shape of one example in model units.
        """
        z = self._at_zero(shape)
        parts = self.y, torch.as_tensor(self.std)
        own = (select(part, self.rows, z.ndim) for part in parts if part.ndim == z.ndim)
        return max([len(z), *map(len, own)])

    def _at_zero(self, shape: Sequence[int]) -> Tensor:
        """Returns the measurements of zeros in raw units, one example for each mask."""
        raw = self._raw(shape)
        return self.operator(self.y.new_zeros(self.operator.batch(raw), *raw))

    def _own(self, z: Tensor) -> Tensor:
        """Returns y of the selected examples, for measurements ``(B, ...)``."""
        return select(self.y, self.rows, z.ndim)

    def _floats(self) -> Tensor:
        """Returns y as floats, with integers at the middle of their levels."""
        y: Any = self.y
        if not isinstance(y, Tensor):
            raise InputError(f"y must be a tensor, got {type(y).__name__}.")
        if y.is_floating_point():
            return y
        if self.codec is None or y.is_complex() or y.dtype == torch.bool:
            raise InputError(
                f"y must be floats in model units, got {y.dtype}; pass codec= for raw integers."
            )
        return y.to(torch.get_default_dtype()) + (0.0 if self.codec.levels is None else 0.5)

    def _check_values(self) -> None:
        std = torch.as_tensor(self.std)
        if not bool(((std >= 0) & std.isfinite()).all()):
            raise InputError(f"std must be non-negative and finite, got {self.std}.")
        if not bool(self.y.isfinite().all()):
            count = int((~self.y.isfinite()).sum())
            raise InputError(
                f"y must be finite, got {count} of {self.y.numel()} values that are not; set "
                "values that are not measured to 0."
            )
        levels = None if self.codec is None else self.codec.levels
        if levels is None or not self.operator.averages:
            return
        slack = _FAR * float(std.max()) + 1
        if not bool(((self.y >= -slack) & (self.y <= levels + slack)).all()):
            raise InputError(
                f"y must be in [{-slack:.4g}, {levels + slack:.4g}], the raw range of the codec "
                f"with a margin of {_FAR} std + 1, got {float(self.y.min()):.4g} to "
                f"{float(self.y.max()):.4g}; pass y in raw units."
            )

    def _compare(self, z: Tensor) -> Tensor:
        """Returns y - z where something is measured, and 0 elsewhere."""
        y = self._own(z)
        each = y.shape == z.shape or (y.ndim == z.ndim and y.shape == (1, *z.shape[1:]))
        if not each and y.shape != z.shape[1:]:
            raise InputError(
                f"y must have shape {tuple(z.shape[1:])}, the output of {self._name} for one "
                f"example, or {tuple(z.shape)} for the batch, got {tuple(y.shape)}."
            )
        try:
            self.variance(z).expand(z.shape)
        except RuntimeError:
            raise InputError(
                f"std must be a number or broadcast to the measurements {tuple(z.shape)}, got "
                f"shape {tuple(torch.as_tensor(self.std).shape)}."
            ) from None
        return torch.where(self.operator.measured(z), y.to(z) - z, 0)

    @property
    def _name(self) -> str:
        return type(self.operator).__name__

    def _require_linear(self) -> LinearOperator:
        if not self.linear or not isinstance(self.operator, LinearOperator):
            codec = "" if self.codec is None else f" behind {type(self.codec).__name__}"
            raise InputError(
                f"operator must be linear, got {self._name}{codec}; use DPS, MMPS or PiGDM."
            )
        return self.operator

    def _raw(self, shape: Sequence[int]) -> Sequence[int]:
        return shape if self.codec is None else self.codec.raw_shape

    def _widths(self, like: Tensor) -> Tensor:
        """Returns raw units per model unit of each feature of an affine codec, float64."""
        if self.codec is None:
            return torch.ones((), dtype=torch.float64, device=like.device)
        one = torch.ones(1, *self.codec.shape, dtype=torch.float64, device=like.device)
        return self.decode(one) - self.decode(torch.zeros_like(one))
