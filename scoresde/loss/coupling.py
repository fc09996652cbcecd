r"""Couplings: which end of a path belongs to which example of a batch.

A velocity can be learned from any joint law of examples :math:`x_0` and other ends :math:`x_1`
whose marginals are right. The law decides how the paths run, not where they end: the flow of
:math:`E[\dot x_t \mid x_t]` carries the law of the ends to that of the examples.

**The score.** Where noise and examples are independent, :math:`-\hat z / \sigma` is the score, and
stochastic samplers and the variational bound are right. With other couplings the velocity alone is
right, and what follows from it: deterministic samplers, and the exact likelihood.

References:
    Tong et al., *Improving and generalizing flow-based generative models with minibatch optimal
    transport*, 2024, https://arxiv.org/abs/2302.00482 (section 3.2).
    Pooladian et al., *Multisample flow matching*, 2023, https://arxiv.org/abs/2304.14772.
    Cheng and Schwing, *The curse of conditions*, 2025, https://arxiv.org/abs/2503.10636.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from scoresde.errors import InputError
from scoresde.shapes import check_data
from scoresde.streams import Purpose, Streams


class Coupling(ABC):
    """Base class for couplings: subclasses implement :meth:`__call__`."""

    # Whether the ends that it gives have the law of the noise that it is given.
    keeps_noise: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor], streams: Streams
    ) -> Tensor:
        """Returns the other end of the path of each example.

        Arguments:
            x: Examples in model units, with shape ``(B, *)``.
            noise: Standard normal noise, with that shape.
            cond: The conditions that the model is given, each with shape ``(B, *)``.
            streams: The random stream of each example.
        """


@dataclass(frozen=True)
class Independent(Coupling):
    """The noise of each example is its own: the other end says nothing of the example."""

    def __call__(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor], streams: Streams
    ) -> Tensor:
        return noise


@dataclass(frozen=True)
class SourceSamples(Coupling):
    """The other ends are samples of a source that need not be normal.

    The process must then be one without a prior density (:class:`~scoresde.sde.Interpolant`).

    Arguments:
        samples: Samples in model units, with shape ``(N, *)``, of which rows are drawn with
            replacement; or a callable that takes :class:`~scoresde.streams.Streams` and returns a
            sample for each of them, with shape ``(B, *)``.
    """

    keeps_noise = False

    samples: Tensor | Callable[[Streams], Tensor]

    def __post_init__(self) -> None:
        if isinstance(self.samples, Tensor):
            check_data(self.samples)
        elif not callable(self.samples):
            raise InputError(
                "samples must be a tensor or a callable of Streams, got "
                f"{type(self.samples).__name__}."
            )

    def __call__(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor], streams: Streams
    ) -> Tensor:
        drawn = self._drawn(streams)
        if drawn.shape != x.shape:
            raise InputError(
                f"samples must have the shape of the examples, {tuple(x.shape[1:])}, got "
                f"{tuple(drawn.shape[1:])}."
            )
        return drawn.to(x)

    def _drawn(self, streams: Streams) -> Tensor:
        if not isinstance(self.samples, Tensor):
            return self.samples(streams)
        u = streams.uniform((), Purpose.SOURCE, dtype=torch.float64)
        return self.samples[(u * len(self.samples)).long().to(self.samples.device)]


@dataclass(frozen=True)
class OptimalTransport(Coupling):
    r"""The assignment of ends to the examples of a batch with the least total squared distance.

    .. math:: \min_\pi \sum_i \lVert x_0^{(i)} - x_1^{(\pi(i))} \rVert^2

    The paths are straighter, and a target varies less. It couples the examples of a batch by
    intent. The batch is what one call of the loss evaluates: with several processes, or with
    accumulated gradients, each part is assigned on its own, so the result depends on their
    number. It is a function of the batch and the seed.

    **Conditions.** Assigned across classes, the noise of a class is no longer normal in training,
    while a sampler starts every class from all of the noise. Therefore ends are assigned within
    each class (-1, without a class, is one of them), which leaves them normal in each. No two
    examples share a continuous condition, so with one the coupling is refused.

    References:
        Tong et al. 2024, https://arxiv.org/abs/2302.00482 (algorithm 3).

    Arguments:
        ends: Where the ends come from, before they are assigned.
    """

    ends: Coupling = field(default_factory=Independent)

    def __post_init__(self) -> None:
        if not isinstance(self.ends, Coupling):
            raise InputError(f"ends must be a Coupling, got {self.ends}; use Independent().")

    @property
    def keeps_noise(self) -> bool:  # type: ignore[override]
        """Whether the ends are normal, as those that are assigned are."""
        return self.ends.keeps_noise

    def __call__(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor], streams: Streams
    ) -> Tensor:
        for name in cond.keys() - {"label"}:
            raise InputError(
                f"coupling must be Independent() for a model with the condition {name}, got "
                "OptimalTransport, which would make the noise depend on it."
            )
        ends = self.ends(x, noise, cond, streams)
        label = cond.get("label", torch.zeros(len(x), dtype=torch.int64, device=x.device))
        assigned = torch.empty_like(ends)
        for one in label.unique():
            rows = (label == one).nonzero()[:, 0]
            assigned[rows] = ends[rows[_assignment(x[rows], ends[rows])]]
        return assigned


@torch.no_grad()
def _assignment(x: Tensor, ends: Tensor) -> Tensor:
    """Returns the index of the end of each example, int64 ``(B,)``."""
    a, b = x.flatten(1).double(), ends.flatten(1).double()
    # The squares of both are the same in every assignment.
    gain = (a @ b.T).cpu().numpy()
    return torch.as_tensor(linear_sum_assignment(gain, maximize=True)[1], device=x.device)
