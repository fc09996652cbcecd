"""Denoising score matching at one noise level, and the check for losses at one time."""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.loss.score_matching import ScoreMatching
from scoresde.loss.weighting import NoiseWeighting
from scoresde.model import ScoreFunction, Trainable, check_model
from scoresde.sde import SDE, Interpolant
from scoresde.times import FirstTime


@dataclass(frozen=True)
class OneLevel(Loss):
    r"""Denoising score matching at one noise level :math:`\sigma / \alpha`.

    .. math:: \tfrac1D \lVert \hat z(\alpha x + \sigma z) - z \rVert^2

    It learns the score of :math:`p * N(0, \sigma^2 I)`, not that of the data: on :math:`N(0, c)`
    the learned variance is :math:`c + \sigma^2`. A smaller :math:`\sigma` has less bias, but needs
    more examples, since the error of the score has a variance of the order of
    :math:`D / \sigma^2`.

    References:
        Vincent, *A connection between score matching and denoising autoencoders*, 2011
        (equation 9).

    Arguments:
        sigma: The noise relative to the data in model units, :math:`\sigma / \alpha`, positive; it
            must be a level of the process.

    Example:
        >>> from scoresde import GaussianModel, VESDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VESDE(0.01, 10.0))
        >>> OneLevel(0.1)(exact, torch.zeros(1, 2), noise=torch.ones(1, 2))
        tensor([0.9803])
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        number = isinstance(self.sigma, int | float) and not isinstance(self.sigma, bool)
        if not number or not 0 < self.sigma < math.inf:
            raise InputError(f"sigma must be positive and finite, got {self.sigma}.")

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the error of the predicted noise of each example; arguments as for the base.

        Given times are used unchanged, and may belong to another level.

        Raises:
            InputError: If the process has no such level, or shapes disagree.
        """
        self.check(model)
        one = DenoisingScoreMatching(
            NoiseWeighting(), FirstTime(), eps=self.first_time(model.process)
        )
        return one.evaluate(model, x, given, **cond)

    def first_time(self, process: Interpolant) -> float:
        """Returns the time of the level.

        Raises:
            InputError: If the process has no such level.
        """
        if not isinstance(process, SDE):
            raise InputError(f"process must be an SDE, got {process}.")
        low, high = _levels(process)
        if not low <= self.sigma <= high:
            raise InputError(
                f"sigma must be in {_interval(low, high)}, the levels sigma / alpha of {process}, "
                f"got {self.sigma}; use a level in this range."
            )
        time = process.time(torch.tensor(-2 * math.log(self.sigma), dtype=torch.float64))
        return float(time.detach().clamp(0, 1))

    def check(self, model: Trainable) -> None:
        check_model(model, ScoreFunction)
        self.first_time(model.process)


@torch.no_grad()
def _levels(sde: SDE) -> tuple[float, float]:
    """Returns the smallest and the largest noise relative to the data."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = (sde.sigma(ends) / sde.alpha(ends)).tolist()
    # Rounding must not exclude a level equal to an end of the process.
    return low * (1 - 1e-9), high * (1 + 1e-9)


def _interval(low: float, high: float) -> str:
    """Returns the valid levels, with ends of three digits rounded inwards.

    Example:
        >>> _interval(0.0, 152.17), _interval(0.0123456, math.inf)
        ('(0, 152]', '[0.0124, inf)')
    """
    least = float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(low))
    most = float(Context(prec=3, rounding=ROUND_FLOOR).create_decimal(high))
    left, right = "[" if low > 0 else "(", "]" if high < math.inf else ")"
    return f"{left}{least:g}, {most:g}{right}"


def only_time(loss: Loss | None, process: Interpolant) -> float | None:
    """Returns the one time at which a loss trains a model, or None if it trains at several.

    A model of one time has neither a likelihood nor a reverse process. To sample from it, use
    Langevin dynamics at that time.

    Example:
        >>> from scoresde import VESDE
        >>> sde = VESDE(0.01, 50.0)
        >>> only_time(OneLevel(0.01), sde), only_time(DenoisingScoreMatching(), sde)
        (0.0, None)
    """
    match loss:
        case OneLevel() | ScoreMatching(times=FirstTime()):
            return loss.first_time(process)
        case DenoisingScoreMatching(times=FirstTime()):
            return loss.first_time(process)
    return None
