r"""The divergence of a vector field, exactly or by random probes.

For a field :math:`v: \mathbb{R}^D \to \mathbb{R}^D` with Jacobian :math:`J`, the divergence is
:math:`\operatorname{tr} J`. Exactly it costs :math:`D` backward passes. For probes :math:`e` with
:math:`E[e e^T] = I`,

.. math:: E[e^T J e] = \operatorname{tr} J,

an unbiased estimate for one backward pass each (Skilling, Hutchinson). The variance of
Rademacher probes counts only the off-diagonal part of the Jacobian, and is the smallest that
independent entries can have. The field itself is evaluated once, whatever the number of probes.

References:
    Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    Skilling, *The eigenvalues of mega-dimensional matrices*, 1989.
    Grathwohl et al., *FFJORD*, 2019, https://arxiv.org/abs/1810.01367.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import check_count
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams

Field = Callable[[Tensor], Tensor]


class Trace(ABC):
    """Abstract estimator of a divergence."""

    @abstractmethod
    def probes(self, streams: Streams, x: Tensor) -> Tensor:
        """Returns the probes for states like ``x`` ``(B, *)``, with shape ``(k, B or 1, *)``."""

    @abstractmethod
    def combine(self, products: Tensor) -> Tensor:
        """Turns the products :math:`e^T J e` ``(k, B)`` into independent estimates ``(B, n)``."""

    @property
    @abstractmethod
    def estimates(self) -> int:
        """The number n of independent estimates."""

    @abstractmethod
    def standard_error(self, estimates: Tensor) -> Tensor:
        """Returns that of the mean of ``(B, n)`` estimates, ``(B,)``: NaN where unknown."""

    def __call__(self, field: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates a field and its divergence, with one evaluation of the field.

        Arguments:
            field: Maps ``(B, *)`` to ``(B, *)``, each example on its own.
            x: States, with shape ``(B, *)``.
            probes: What :meth:`probes` returned.

        Returns:
            The field, with shape ``(B, *)``, and independent estimates of its divergence at every
            state, with shape ``(B, n)``, both without a graph.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = field(x)
            products = [
                sum_features(_vector_jacobian(v, x, e, last=i == len(probes) - 1) * e)
                for i, e in enumerate(probes)
            ]
        return v.detach(), self.combine(torch.stack(products))


def _vector_jacobian(v: Tensor, x: Tensor, e: Tensor, last: bool) -> Tensor:
    if not v.requires_grad:  # a constant field
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(
        v, x, e.expand_as(v), retain_graph=not last, materialize_grads=True
    )
    return product


@dataclass(frozen=True)
class ExactTrace(Trace):
    """The divergence itself, by one backward pass for each dimension: for small data."""

    def probes(self, streams: Streams, x: Tensor) -> Tensor:
        dimension = x.shape[1:].numel()
        unit = torch.eye(dimension, device=x.device, dtype=x.dtype)
        return unit.reshape(dimension, 1, *x.shape[1:])

    def combine(self, products: Tensor) -> Tensor:
        return products.sum(0)[:, None]

    @property
    def estimates(self) -> int:
        return 1

    def standard_error(self, estimates: Tensor) -> Tensor:
        return torch.zeros_like(estimates[:, 0])


@dataclass(frozen=True)
class Hutchinson(Trace):
    """Independent Rademacher probes, one backward pass each.

    Arguments:
        count: The number of probes k, positive.
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_count("probes", self.count, "give a positive integer, or 'exact'")

    def probes(self, streams: Streams, x: Tensor) -> Tensor:
        shape: Sequence[int] = x.shape[1:]
        draws = [streams.sign(shape, Purpose.PROBE, k, x.dtype) for k in range(int(self.count))]
        return torch.stack(draws).to(x.device)

    def combine(self, products: Tensor) -> Tensor:
        return products.T

    @property
    def estimates(self) -> int:
        return int(self.count)

    def standard_error(self, estimates: Tensor) -> Tensor:
        if self.count == 1:
            return torch.full_like(estimates[:, 0], torch.nan)
        return estimates.std(1) / self.count**0.5
