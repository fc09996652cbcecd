r"""Couplings, which pair the examples of a batch with the other ends of their paths.

A velocity can be learned from any joint law of examples :math:`x_0` and other ends :math:`x_1`
with the right marginals. The joint law determines the shape of the paths, not their end points:
the flow of :math:`E[\dot x_t \mid x_t]` always maps the law of the ends to that of the examples.

**The score.** If noise and examples are independent, :math:`-\hat z / \sigma` is the score, and
stochastic samplers and the variational bound are valid. With other couplings only the velocity is
valid, and therefore deterministic samplers and the exact likelihood.

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
    """Base class for couplings; subclasses implement :meth:`__call__`."""

    # Whether the returned ends have the law of the input noise.
    keeps_noise: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor], streams: Streams
    ) -> Tensor:
        """Returns the other end of the path of each example.

        Arguments:
            x: Examples in model units, with shape ``(B, *)``.
            noise: Standard normal noise, with that shape.
            cond: The conditions of the model, each with shape ``(B, *)``.
            streams: The random stream of each example.
        """


@dataclass(frozen=True)
class Independent(Coupling):
    """The independent coupling: the other end is noise, independent of the example."""

    def __call__(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Tensor], streams: Streams
    ) -> Tensor:
        return noise


@dataclass(frozen=True)
class SourceSamples(Coupling):
    """A coupling whose other ends are samples of a source, which need not be normal.

    The process must be one without a prior density (:class:`~scoresde.sde.Interpolant`).

    Arguments:
        samples: Samples in model units, with shape ``(N, *)``, from which rows are drawn with
            replacement; or a callable that takes :class:`~scoresde.streams.Streams` and returns
            one sample per stream, with shape ``(B, *)``.
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

    The paths become straighter, and the targets vary less. The examples of a batch are coupled
    intentionally. The batch is the input of one call of the loss. With several processes or
    accumulated gradients, each part is assigned separately, so the result depends on their number.
    It is a function of the batch and the seed.

    **Conditions.** If ends were assigned across classes, the noise of a class would not be normal
    in training, but a sampler starts every class from normal noise. Therefore ends are assigned
    within each class (the label -1, no class, counts as one), so they are normal in each.
    Continuous conditions are not supported, because no two examples share a value.

    References:
        Tong et al. 2024, https://arxiv.org/abs/2302.00482 (algorithm 3).

    Arguments:
        ends: The coupling that supplies the ends to be assigned.
    """

    ends: Coupling = field(default_factory=Independent)

    def __post_init__(self) -> None:
        if not isinstance(self.ends, Coupling):
            raise InputError(f"ends must be a Coupling such as Independent(), got {self.ends}.")

    @property
    def keeps_noise(self) -> bool:  # type: ignore[override]
        """True if the ends are normal, which depends on ``ends``."""
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
    # The sums of squares are the same in every assignment.
    gain = (a @ b.T).cpu().numpy()
    return torch.as_tensor(linear_sum_assignment(gain, maximize=True)[1], device=x.device)
