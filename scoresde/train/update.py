"""One update of a model's weights by a batch, in one process or in several."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.loss import DenoisingScoreMatching
from scoresde.model import ScoreFunction
from scoresde.train.engine import Engine, ProcessGroup, Replicated, in_parts, own, whole
from scoresde.train.precision import LossScale
from scoresde.train.training import Training


class Update:
    """An update of a model's weights by a batch, which the processes of a group take together.

    Arguments:
        model: The model, on its device; it is changed.
        loss: The loss.
        training: How to train.
        optimizer: Makes an optimiser of parameters.
        engine: How several processes share the model.
        seed: Names the times and the noise.
    """

    def __init__(
        self,
        model: ScoreFunction,
        loss: DenoisingScoreMatching,
        training: Training,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        engine: Engine | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.loss, self.training, self.seed = model, loss, training, seed
        self.engine = engine or Replicated()
        self.averages = training.averages(model)
        training.prepare(model)
        copies = [average.model for average in self.averages]
        self.shared = self.engine.share(model, copies)
        self.optimiser = _optimiser(optimizer, model)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.scale = LossScale(training.precision_on(model.device), model.device)

    def __call__(self, x: Tensor, cond: dict[str, Tensor], step: int, size: int) -> Tensor:
        """Makes the update number ``step``, counted from 0.

        Arguments:
            x: This process's part of the batch.
            cond: Its conditions.
            step: The number of the update.
            size: The number of examples in all processes.

        Returns:
            The loss, the gradient's norm, and whether an overflow of it is no failure.
        """
        factor = self.training.rate(step, self.training.steps)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        value = ProcessGroup.here().total(self._backward(x, cond, step, size))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        scale = self.scale.state[0]
        norm = whole(nn.utils.get_total_norm(gradients)) / scale
        good = torch.isfinite(value) & torch.isfinite(norm)
        excused = self.scale.excuses(value)
        limit = self.training.clip
        divisor = scale if limit is None else scale * (norm / limit).clamp(min=1.0)
        _take(self.optimiser, gradients, divisor, good)
        self.scale.update(good)
        for average in self.averages:
            average.update()
        return torch.stack((value, norm, excused.to(value)))

    def _backward(self, x: Tensor, cond: dict[str, Tensor], step: int, size: int) -> Tensor:
        """Computes the gradient of the batch's mean loss; returns this process's share of it."""
        self.optimiser.zero_grad(set_to_none=True)
        group, passes = ProcessGroup.here(), self.training.accumulate
        mine, seeds = group.part(size), range(step * size, (step + 1) * size)
        bounds = [len(x) * i // passes for i in range(passes + 1)]
        value = torch.zeros((), device=x.device)
        for first, end in itertools.pairwise(bounds):
            self.engine.gather(self.shared, end == len(x))
            part = slice(mine.start + first, mine.start + end)
            labels = {name: label[first:end] for name, label in cond.items()}
            with self.training.autocast(x.device):
                losses = self.loss(
                    self.shared, x[first:end], seed=self.seed, seeds=seeds, part=part, **labels
                )
            # Gradients of several processes are averaged, not added.
            self.scale.scaled(losses.sum() * (group.size / size)).backward()
            value = value + losses.detach().sum() / size
        return value


def _optimiser(
    make: Callable[[Iterable[Any]], torch.optim.Optimizer], model: ScoreFunction
) -> torch.optim.Optimizer:
    try:
        return make(model.parameters())
    except (ValueError, TypeError) as error:
        raise InputError(f"The optimiser refuses its settings, {make}: {error}.") from error


def _take(
    optimiser: torch.optim.Optimizer, gradients: list[Tensor], divisor: Tensor, good: Tensor
) -> None:
    """Takes a step along gradients that are first divided by a number.

    None is taken unless they are finite: that would spoil the weights for good. A fused optimiser
    does both in its own pass over the weights, and is not waited for.
    """
    if getattr(optimiser, "_step_supports_amp_scaling", False) and not in_parts(gradients):
        optimiser.grad_scale = divisor  # type: ignore[attr-defined]
        optimiser.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimiser.step()
    elif bool(good):
        torch._foreach_mul_([own(gradient) for gradient in gradients], 1 / divisor)
        optimiser.step()
