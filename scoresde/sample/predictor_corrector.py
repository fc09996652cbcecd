"""Predictor-corrector sampling: Langevin corrections between steps of the reverse process."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import Conditioned
from scoresde.sample.base import GridSampler, Noise, ProgressReporter
from scoresde.sample.correctors import Corrector, Langevin
from scoresde.sample.predictors import Interval, Predictor, ReverseDiffusionPredictor
from scoresde.streams import Purpose


@dataclass(frozen=True)
class PredictorCorrector(GridSampler):
    """Predictor-corrector sampler: corrects the state at each time, then predicts the next.

    Each step takes ``1 + corrector.steps`` network evaluations.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (algorithm 1).

    Arguments:
        steps: Number of steps, positive.
        grid: Spacing of the times; uniform in t by default.
        predictor: Step of the reverse process.
        corrector: Corrections at each time, or None.
        eps: Time to stop at (see :class:`Sampler`).
        final_denoise: Whether to return the denoised estimate at ``eps``.

    Example:
        >>> from scoresde import GaussianModel, VESDE
        >>> exact = GaussianModel(mean=[0.0, 1.0], std=0.5, sde=VESDE())
        >>> int(PredictorCorrector(steps=100)(exact, shape=(4, 2), seed=0).nfe[0])
        200
    """

    predictor: Predictor = field(default_factory=ReverseDiffusionPredictor)
    corrector: Corrector | None = field(default_factory=Langevin)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.predictor, Predictor):
            raise InputError(
                "predictor must be a Predictor such as ReverseDiffusionPredictor(), got "
                f"{self.predictor}."
            )
        if not isinstance(self.corrector, Corrector | None):
            raise InputError(
                f"corrector must be a Corrector such as Langevin(), or None, got {self.corrector}."
            )

    @property
    def convergence(self) -> int | None:
        """1, weakly, on any grid; None with a corrector, which adds a bias of its own."""
        return 1 if self.corrector is None else None

    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        for i, (t, s) in enumerate(pairwise(times.cpu())):
            x = self.correct_and_predict(field, x, Interval.of(field.sde, t, s), i, noise)
            x = report(s, x, len(times) - 1)
        return x

    def correct_and_predict(
        self,
        field: Conditioned,
        x: Tensor,
        step: Interval,
        i: int,
        noise: Noise,
        quiet: bool = False,
    ) -> Tensor:
        """Corrects states and takes step ``i``, without its noise if ``quiet``."""
        corrections = int(self.corrector.steps) if self.corrector else 0
        for j in range(corrections):
            assert self.corrector is not None
            z = noise(x, Purpose.LANGEVIN, i * corrections + j)
            x = self.corrector(field, x, step, z)
        z = noise.diffusion(x, i, step.t, step.t - step.h)
        return self.predictor(field, x, step, torch.zeros_like(z) if quiet else z)
