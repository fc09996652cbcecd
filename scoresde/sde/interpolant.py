r"""Base class for processes, which transform an example along :math:`t \in [0, 1]`.

.. math:: x_t = \alpha(t) \, x_0 + \sigma(t) \, x_1 + \gamma(t) \, z, \qquad z \sim N(0, I)

with :math:`x_0` an example of the data. If :math:`x_1` is Gaussian noise and :math:`\gamma = 0`,
the process is an :class:`~scoresde.sde.SDE`. If :math:`x_1` is another example, the process is a
*bridge*.

References:
    Albergo, Boffi and Vanden-Eijnden, *Stochastic interpolants*, 2023,
    https://arxiv.org/abs/2303.08797 (definition 2.1).
"""

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.shapes import expand

Coefficient = Callable[[Any, Tensor], Tensor]
# The functions of time that a subclass may define.
_COEFFICIENTS = (
    *("alpha", "sigma", "gamma", "alpha_dot", "sigma_dot", "gamma_rate"),
    *("f", "g", "log_snr", "time"),
)


@dataclass(frozen=True)
class Cutoffs:
    r"""Cut-off times before :math:`t = 0`, one for each use.

    The three uses need different values: the cut-off :math:`10^{-3}` for sampling with VP, chosen
    for image quality, would cost 0.42 bits/dim in a likelihood.

    Arguments:
        training: The smallest time that a loss draws, in [0, 1).
        sampling: The time at which a sampler stops, in [0, 1).
        likelihood: The time at which the likelihood starts, in [0, 1).
    """

    training: float = 1e-5
    sampling: float = 1e-3
    likelihood: float = 1e-5


def as_time(t: Tensor | float) -> Tensor:
    """Converts a number to a float64 tensor; floating-point tensors are returned unchanged."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return t
    return torch.as_tensor(t, dtype=torch.float64)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Differentiates a function of time at every element of ``t``."""
    with torch.autocast(t.device.type, enabled=False):  # also in its backward pass
        return torch.func.grad(lambda s: function(s).sum())(t)


class Interpolant(ABC):
    r"""Base class for processes; subclasses define :math:`\alpha` and :math:`\sigma`.

    The functions of time take a tensor of any shape and return one of the same shape, data type
    and device (a plain number counts as float64), and have no branch that depends on data.

    **Schedules with weights.** The class of a learned schedule also derives from
    ``torch.nn.Module``. Its functions are written only for the data type and device of its
    weights. Times of any data type and device are converted to those of the weights, and the
    coefficients are converted back, even where a network runs in 16 bits (autocast).
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if issubclass(cls, nn.Module):
            compare_by_identity(cls)
            for name in _COEFFICIENTS:
                if name in cls.__dict__:
                    setattr(cls, name, _in_type_of_weights(cls.__dict__[name]))

    @property
    def cutoffs(self) -> Cutoffs:
        """The cut-off times before t = 0, one for each use."""
        return Cutoffs()

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        r"""Returns the scale :math:`\alpha(t)` of the example."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        r"""Returns the scale :math:`\sigma(t)` of the other end :math:`x_1`, non-negative."""

    def gamma(self, t: Tensor) -> Tensor:
        r"""Returns the standard deviation :math:`\gamma(t)` of the added noise; 0 by default."""
        return torch.zeros_like(as_time(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        r"""Returns the derivative :math:`\alpha'(t)`."""
        return derivative(self.alpha, as_time(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        r"""Returns the derivative :math:`\sigma'(t)`."""
        return derivative(self.sigma, as_time(t))

    def gamma_rate(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\gamma \gamma' = \tfrac12 d \gamma^2 / dt`.

        It can be finite where :math:`\gamma'` is infinite; a subclass then overrides it with a
        closed form.
        """
        return derivative(lambda s: 0.5 * self.gamma(s) ** 2, as_time(t))

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor, z: Tensor | None = None) -> Tensor:
        r"""Returns :math:`\alpha x_0 + \sigma x_1 + \gamma z`.

        Arguments:
            x0: Examples, with shape ``(B, *)``.
            x1: The other ends, with the shape of ``x0``.
            t: Times in [0, 1], with shape ``()`` or ``(B,)``.
            z: Standard normal noise, with the shape of ``x0``; None if gamma is 0.
        """
        t = as_time(t)
        between = expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * x1
        return between if z is None else between + expand(self.gamma(t), x0) * z

    @abstractmethod
    def start(self, noise: Tensor, temperature: float = 1.0, **cond: Tensor) -> Tensor:
        """Returns states at t = 1, the starting points of samplers.

        Arguments:
            noise: Standard normal noise, with shape ``(B, *)``.
            temperature: Factor that multiplies all noise, positive.
            **cond: Conditions, each with shape ``(B, *)``.
        """

    def check_eps(self, eps: float) -> float:
        """Returns a cut-off after checking it.

        Raises:
            InputError: If ``eps`` is outside [0, 1).
        """
        if not isinstance(eps, int | float) or not 0 <= eps < 1:
            raise InputError(
                f"eps must be in [0, 1), got {eps}; the defaults here are {self.cutoffs}."
            )
        return float(eps)


def compare_by_identity(kind: type) -> None:
    """Makes objects of a class with weights compare equal only to themselves.

    Torch collects the modules of a model in a set. Frozen dataclasses with the same settings
    compare equal, so two such modules would count as one, and the weights of the second would
    never be trained.
    """
    kind.__eq__ = object.__eq__  # type: ignore[method-assign, assignment]
    kind.__hash__ = object.__hash__  # type: ignore[method-assign, assignment]


def _in_type_of_weights(coefficient: Coefficient) -> Coefficient:
    """Makes a module's function of time compute in the data type and device of its weights."""

    @functools.wraps(coefficient)
    def converted(self: nn.Module, t: Tensor) -> Tensor:
        t = as_time(t)
        weights = itertools.chain(self.parameters(), self.buffers())
        weight = next((w for w in weights if w.is_floating_point()), None)
        if weight is None:
            return coefficient(self, t)
        # Networks train in 16 bits, where the rounding error of a coefficient is 0.4 %.
        with torch.autocast(weight.device.type, enabled=False):
            return coefficient(self, t.to(weight.device, weight.dtype)).to(t.device, t.dtype)

    return converted
