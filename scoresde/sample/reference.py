r"""Predictor-corrector sampling of the reference implementation, to reproduce its samples.

The published figures of Song et al. 2021 were made with steps that differ from the equations in
four points. Only :class:`ReferencePredictorCorrector` copies them.

1. *The step rule.* N steps are taken at the N times :math:`t_0 = 1, \ldots, t_{N-1} = \epsilon`,
   equally spaced by :math:`(1 - \epsilon) / (N - 1)`, but each is :math:`1/N` long. The total
   length is 1 and not :math:`1 - \epsilon`, and the last step starts at :math:`\epsilon`.
2. *The transition.* Ancestral and reverse-diffusion steps take :math:`a` and :math:`\tau` from a
   chain of N levels at :math:`i = \lfloor (N - 1) t \rfloor`:

   ======  =============================  ================================================
   SDE     a                              tau squared
   ======  =============================  ================================================
   VP      :math:`\sqrt{1 - \beta_i}`     :math:`\beta_i`, linear from beta_min/N
   VE      1                              :math:`\sigma_i^2 - \sigma_{i-1}^2`, geometric
   subVP   :math:`1 + f / N`              :math:`g^2 / N`
   ======  =============================  ================================================

   with :math:`\sigma_{-1} = 0`, while the score stays that of the continuous time.
3. *The Langevin step* uses norms averaged over the batch
   (:class:`~scoresde.sample.BatchMeanNorm`).
4. *The end.* The last step adds no noise; there is no other denoising.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (appendices F and G), and its code.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Conditioned
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler
from scoresde.sample.correctors import BatchMeanNorm, Corrector, Langevin
from scoresde.sample.predictor_corrector import PredictorCorrector
from scoresde.sample.predictors import Interval, Predictor, ReverseDiffusionPredictor
from scoresde.sde import SDE, VESDE, VPSDE, Betas, DiscreteVP, LinearBetas, SubVPSDE


@dataclass(frozen=True)
class ReferencePredictorCorrector(Sampler):
    """The published predictor-corrector sampler, with the quirks that its samples depend on.

    For any other purpose use :class:`~scoresde.sample.PredictorCorrector`.

    Arguments:
        steps: Number N of steps, at least 2.
        predictor: Step of the reverse process; the published ancestral sampling is
            ``AncestralPredictor(variance=1)`` for VP and ``AncestralPredictor()`` for VE.
        corrector: Corrections at each time, or None; published are
            ``Langevin(rule=BatchMeanNorm())`` and ``AnnealedLangevin()``.
        eps: Last time at which the score is evaluated (see :class:`Sampler`).
        final_denoise: Whether to apply Tweedie's formula at the end, which the reference does not.
    """

    steps: int = 1000
    predictor: Predictor = field(default_factory=ReverseDiffusionPredictor)
    corrector: Corrector | None = field(default_factory=lambda: Langevin(rule=BatchMeanNorm()))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        if self.steps < 2:
            raise InputError(f"steps must be at least 2, got {self.steps}.")
        self._sampler()

    def _sampler(self) -> PredictorCorrector:
        return PredictorCorrector(self.steps, predictor=self.predictor, corrector=self.corrector)

    def _check_process(self, process: SDE, eps: float) -> float:
        step_of(process, torch.ones((), dtype=torch.float64), self.steps)
        return eps

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        sampler, last = self._sampler(), self.steps - 1
        for i, t in enumerate(torch.linspace(1, eps, self.steps, dtype=torch.float64)):
            step = step_of(field.sde, t, self.steps)
            x = sampler.correct_and_predict(field, x, step, i, noise, quiet=i == last)
            x = report(t, x, self.steps)
        return FinalState(x)


def step_of(sde: SDE, t: Tensor, steps: int) -> Interval:
    """Returns the reference's step of a process from a time, float64 ``()``.

    Raises:
        InputError: If the reference defines no step for the SDE.
    """
    h = 1 / steps
    # Its index is computed in float32, which decides where t lies just above or below a level.
    i = int(t.float() * (steps - 1))
    sigma = float(sde.sigma(t).detach())
    match sde:
        case VPSDE():
            return _vp_step(LinearBetas(sde.beta_min, sde.beta_max, steps), t, h, i, sigma)
        case DiscreteVP() if sde.steps == steps:
            return _vp_step(sde.betas, t, h, i, sigma)
        case SubVPSDE():
            tau = float(sde.g(t)) * math.sqrt(h)
            return Interval(t, h, 1 + float(sde.f(t)) * h, tau, sigma, sigma)
        case VESDE():
            levels = np.geomspace(sde.sigma_min, sde.sigma_max, steps)
            now, before = levels[i], levels[i - 1] if i > 0 else 0.0
            tau = math.sqrt(now**2 - before**2)
            # SMLD's noise is tau sigma_s / sigma_i of the chain; sigma_t belongs to the score.
            return Interval(t, h, 1.0, tau, sigma, before / now * sigma)
    if isinstance(sde, DiscreteVP):
        raise InputError(
            f"steps must be {sde.steps}, the number of steps of {sde}, got {steps}; or use "
            "PredictorCorrector."
        )
    raise InputError(
        "ReferencePredictorCorrector requires a VPSDE, VESDE, SubVPSDE or DiscreteVP, got "
        f"{sde}; use PredictorCorrector."
    )


def _vp_step(betas: Betas, t: Tensor, h: float, i: int, sigma: float) -> Interval:
    variances = betas()
    levels = np.sqrt(-np.expm1(np.cumsum(np.log1p(-variances))))
    before = levels[i - 1] if i > 0 else 0.0
    a, tau = math.sqrt(1 - variances[i]), math.sqrt(variances[i])
    return Interval(t, h, a, tau, sigma, float(before / levels[i]) * sigma)
