"""Periodic evaluation of a model during training: a few samples and a likelihood bound."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scoresde.data import Dataset, random_rows
from scoresde.likelihood import LogProb, VariationalBound
from scoresde.model import ScoreFunction
from scoresde.sample import Sampler
from scoresde.tasks.evaluation import evaluate_likelihood, has_density
from scoresde.tasks.sampling import draw_samples
from scoresde.tasks.views import view_of
from scoresde.train import ProcessGroup

FOLDER = "progress"


@dataclass(frozen=True)
class Inspection:
    """Draws samples from a model and bounds its likelihood, always with the same seed.

    Arguments:
        data: The data set.
        sampler: The sampler.
        folder: The run's folder, for ``progress/00001000.png``.
        count: The number of samples, positive.
        examples: The number of validation examples for the bound, positive.
        seed: Seed of the random streams.
        bound: The bound; bounds other than the default are for levels.
    """

    data: Dataset
    sampler: Sampler
    folder: Path
    count: int = 16
    examples: int = 64
    seed: int = 0
    bound: LogProb = field(default_factory=VariationalBound)

    @torch.no_grad()
    def __call__(self, done: int, model: ScoreFunction) -> dict[str, float | Path]:
        """Returns the bound after ``done`` updates; all processes must call it."""
        options: dict[str, Any] = {"batch_size": max(self.count, self.examples), "seed": self.seed}
        rows = random_rows(len(self.data.validation), self.count)
        drawn = draw_samples(
            model,
            self.sampler,
            self.data.codec,
            self.count,
            cond=self.data.conditions_of("validation", rows),
            progress=False,
            **options,
        )
        path = self.folder / FOLDER / f"{done:08d}.png"
        if ProcessGroup.here().first:
            real = self.data.validation[rows.to(self.data.validation.device)].cpu()
            panels = {"validation data": real, f"{done} updates": self.data.decode(drawn.x)}
            view_of(self.data.codec).compare(panels, path)
        if not has_density(self.data):
            return {"samples": path}
        evaluation = evaluate_likelihood(
            model,
            self.bound,
            self.data,
            "validation",
            examples=self.examples,
            progress=False,
            **options,
        )
        return {"samples": path, f"bound_{evaluation.unit.replace('/', '_per_')}": evaluation.mean}
