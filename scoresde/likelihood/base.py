"""Base classes for evaluations of log p and their results."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

from scoresde.codec import Decoder
from scoresde.model import ScoreFunction


class LogProbResult:
    """Base class for results of an evaluation of B examples, in nats.

    Attributes:
        log_prob: The log-probability of levels, or the log-density in model units, ``(B,)``.
        standard_error: The standard error of ``log_prob`` over its random numbers, ``(B,)``.
        nfe: The network passes that each example took part in, int64 ``(B,)``.
        seed: The seed that was used.
    """

    log_prob: Tensor
    standard_error: Tensor
    nfe: Tensor
    seed: int

    @property
    def parts(self) -> dict[str, Tensor]:
        """The terms that add up to ``-log_prob``, by name, each ``(B,)``; empty if unknown."""
        return {}

    @property
    def steps(self) -> Tensor | None:
        """The terms of T equal steps in t from 0 to 1, ``(B, T)``; None if there are no steps."""
        return None


class LogProb(ABC):
    """Base class for evaluations of log p(x) under a model, exact or bounded.

    Attributes:
        decoder: The last step to the data; None for a density of real data.
    """

    decoder: Decoder | None = None

    @property
    def levels(self) -> int | None:
        """The number of levels whose probability is evaluated; None for a density."""
        return None if self.decoder is None else self.decoder.levels

    @abstractmethod
    def __call__(
        self,
        model: ScoreFunction,
        x: Tensor,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        **cond: Tensor,
    ) -> LogProbResult:
        """Evaluates a batch.

        Arguments:
            model: A score function.
            x: Data in model units, with shape ``(B, *)``; levels lie at their centres.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: The index of each example's stream; ``range(B)`` by default.
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments do not match the model, or the data are not finite.
        """

    @abstractmethod
    def check(self, model: ScoreFunction) -> object:
        """Checks that a model can be evaluated.

        Raises:
            InputError: If it cannot.
        """
