r"""Score matching without a target, explicit and sliced.

The error of a score :math:`s` can be computed up to a constant without the density. If
:math:`p \, s` vanishes at infinity, integration by parts gives

.. math:: J(s) = E_p \left[ \operatorname{tr} \nabla s + \tfrac12 \lVert s \rVert^2 \right]
          = \tfrac12 E_p \lVert s - \nabla \log p \rVert^2
          - \tfrac12 E_p \lVert \nabla \log p \rVert^2 ,

which is minimal for :math:`s = \nabla \log p`. :class:`ExplicitScoreMatching` computes the exact
trace with :math:`D` products with the Jacobian; :class:`SlicedScoreMatching` uses random
directions. :class:`~scoresde.loss.OneLevel` needs no derivative of the score: its target is the
added noise.

**Times.** The expectation is over :math:`x_t`, the data with the noise of a time, and the learned
score is that of :math:`p_t`. The default is one time, the smallest (``eps``), with the noise of
the process at its cut-off: 1e-3 for VP, ``sigma_min`` for VE. This library has no score of the
data themselves, only of data with an arbitrarily small noise. Data on a surface or on a grid of
levels have no density, and :math:`J` would have no lower bound.

**Several levels.** The constant and the size of :math:`J` depend on the level. With noise
:math:`\sigma z`, the expectation of the noise's error is

.. math:: \tfrac12 E \lVert \hat z - z \rVert^2 = \sigma^2 J(s_t) + \text{a constant of the level},
          \qquad \hat z = -\sigma s ,

so a weighting :math:`w(t)` of the noise's error (:class:`~scoresde.loss.Weighting`) gives
:math:`J` the weight :math:`w \sigma^2`. With :class:`~scoresde.loss.NoiseWeighting` all levels
have equal weight, as in NCSN, and the expected gradient is that of denoising score matching (half
the sum over dimensions). Without a weighting, :math:`J` has the weight 1 at every level, and the
smallest noise dominates.

References:
    Hyvärinen, *Estimation of non-normalized statistical models by score matching*, 2005
    (theorem 1).
    Song et al., *Sliced score matching*, 2019, https://arxiv.org/abs/1905.07088 (equations 7, 8).
    Song and Ermon 2019, https://arxiv.org/abs/1907.05600 (section 4.2: the weight
    :math:`\sigma^2`).
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.divergence import Distribution, ExactTrace, Hutchinson, Rademacher, Trace
from scoresde.errors import InputError
from scoresde.loss.base import Draw, Given, Loss, LossTerms
from scoresde.loss.weighting import Weighting
from scoresde.model import ScoreFunction, Trainable, check_model
from scoresde.sde import SDE, Interpolant
from scoresde.shapes import sum_features
from scoresde.times import FirstTime, Times


@dataclass(frozen=True)
class ScoreMatching(Loss):
    """Base class for score matching without a target; subclasses choose the directions.

    It differentiates the score, so each direction costs about three times as much training time as
    a denoising loss. A compiled network runs uncompiled, because compiled code cannot be
    differentiated twice.

    Arguments:
        weighting: Weight of each noise level. If None, the weight of the objective is 1 (see the
            module).
        times: The density of the training times; only ``eps`` by default.
        eps: The smallest time, in [0, 1). If None, the default of the SDE is used.

    Raises:
        InputError: If an argument has the wrong type.
    """

    weighting: Weighting | None = None
    times: Times = field(default_factory=FirstTime)
    eps: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weighting, Weighting | None):
            raise InputError(f"weighting must be a Weighting or None, got {self.weighting}.")
        if not isinstance(self.times, Times):
            raise InputError(f"times must be a Times such as FirstTime(), got {self.times}.")

    @property
    @abstractmethod
    def directions(self) -> Trace:
        """The estimator of the trace, which determines the directions."""

    def half_square(self, score: Tensor, probes: Tensor) -> Tensor:
        r"""Returns :math:`\tfrac12 \lVert s \rVert^2`, or an estimate of it, ``(B,)``.

        Arguments:
            score: The score, with shape ``(B, *)``.
            probes: The directions, with shape ``(k, B or 1, *)``.
        """
        return 0.5 * sum_features(score.square())

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the objective of each example at noised data; arguments as for the base.

        It is a sum over dimensions, in units of the squared score times the weight, and may be
        negative. The parts are the unweighted ``divergence`` and ``half_square``.

        Raises:
            InputError: If ``eps`` is not valid for the SDE, or shapes disagree.
        """
        check_model(model)
        assert isinstance(model, ScoreFunction)
        sde, eps = model.sde, self.first_time(model.sde)
        drawn = given.draw(sde, x, self.times, eps)
        probes = self.directions.probes(given.own, x)
        # If no graph is built outside, as in validation, none is kept inside.
        with torch.compiler.set_stance("force_eager"):
            score, traces = self.directions(
                lambda state: model.score(state, drawn.t, **cond),
                sde.perturb(x, drawn.t, drawn.noise),
                probes,
                create_graph=torch.is_grad_enabled(),
            )
        divergence, square = traces.mean(1), self.half_square(score, probes)
        parts = {"divergence": divergence.detach(), "half_square": square.detach()}
        return LossTerms(self._weight(sde, drawn, x) * (divergence + square), parts)

    def _weight(self, sde: SDE, drawn: Draw, x: Tensor) -> Tensor:
        if self.weighting is None:
            return torch.as_tensor(drawn.weight).to(x)
        return (drawn.weight * self.weighting(sde, drawn.t) * sde.sigma(drawn.t) ** 2).to(x)

    def first_time(self, process: Interpolant) -> float:
        return process.check_eps(process.cutoffs.training if self.eps is None else self.eps)

    def check(self, model: Trainable) -> None:
        check_model(model)
        self.first_time(model.process)


@dataclass(frozen=True)
class ExplicitScoreMatching(ScoreMatching):
    r"""Explicit score matching: :math:`\operatorname{tr} \nabla s + \tfrac12 \lVert s \rVert^2`.

    References:
        Hyvärinen 2005, theorem 1.

    Arguments:
        trace: Estimator of the trace: exact, with D products with the Jacobian, or any estimator
            of :mod:`scoresde.divergence`.

    Example:
        >>> from scoresde import GaussianModel, VESDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VESDE(0.1, 10.0))
        >>> x = torch.zeros(1, 2)
        >>> ExplicitScoreMatching()(exact, x, torch.zeros(1), x).detach()
        tensor([-1.9802])
    """

    trace: Trace = field(default_factory=ExactTrace)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trace, Trace):
            raise InputError(f"trace must be a Trace such as ExactTrace(), got {self.trace}.")

    @property
    def directions(self) -> Trace:
        return self.trace


@dataclass(frozen=True)
class SlicedScoreMatching(ScoreMatching):
    r"""Sliced score matching: the objective along random directions v.

    .. math:: \tfrac1k \sum_v v^T \nabla s \, v + \tfrac12 \lVert s \rVert^2
              \quad \text{or, not reduced,} \quad
              \tfrac1k \sum_v \left[ v^T \nabla s \, v + \tfrac12 (v^T s)^2 \right]

    Both are unbiased for directions with :math:`E[v v^T] = I`, as all of
    :mod:`scoresde.divergence` are. (Directions of norm 1 would make the first term too small by a
    factor of D.) At the exact score of :math:`N(0, I)` in D dimensions, the variance of one
    example's value with one direction is

    ====================  =======================  =====================
    directions            reduced                  not reduced
    ====================  =======================  =====================
    signs                 D/2, as the exact trace  :math:`D^2/2`
    normal                5 D/2                    :math:`D (D + 3) / 2`
    ====================  =======================  =====================

    References:
        Song et al. 2019, equations 7 (not reduced) and 8 (reduced).

    Arguments:
        probes: The number k of directions for each example, positive.
        reduced: Whether the squared norm is computed exactly, which lowers the variance.
        distribution: The distribution of the directions.

    Example:
        >>> from scoresde import GaussianModel, VESDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VESDE(0.1, 10.0))
        >>> x = torch.zeros(1, 2)
        >>> SlicedScoreMatching()(exact, x, torch.zeros(1), x).detach()
        tensor([-1.9802])
    """

    probes: int = 1
    reduced: bool = True
    distribution: Distribution = field(default_factory=Rademacher)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reduced, bool):
            raise InputError(f"reduced must be true or false, got {self.reduced}.")
        Hutchinson(self.probes, self.distribution)  # checks both

    @property
    def directions(self) -> Trace:
        return Hutchinson(self.probes, self.distribution)

    def half_square(self, score: Tensor, probes: Tensor) -> Tensor:
        if self.reduced:
            return super().half_square(score, probes)
        along = [sum_features(v * score).square() for v in probes]
        return 0.5 * torch.stack(along).mean(0)
