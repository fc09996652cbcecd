r"""Importance sampling of the steps of a chain, from the history of their losses.

A sum over the T steps of a chain is estimated by one step, drawn with the probability
:math:`p_t` and the weight :math:`1 / (T p_t)`. Its variance is least for

.. math:: p_t \propto \sqrt{E[L_t^2]},

where the expectation is estimated by the last losses of each step.

References:
    Nichol and Dhariwal, *Improved denoising diffusion probabilistic models*, 2021,
    https://arxiv.org/abs/2102.09672 (equation 18).
"""

import torch
from torch import Tensor, nn

from scoresde.errors import InputError, check_count
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.model import Trainable
from scoresde.recipe import describable
from scoresde.sde import Chain, Interpolant
from scoresde.streams import Purpose


@describable
class ImportanceSampled(Loss, nn.Module):
    """A loss on a chain whose steps are drawn according to the history of their values.

    Until every step has a full history, all steps are equally likely. The history records the
    updates of a training run and is the same in all processes. The expectation is that of the loss
    with equally likely steps, which is used to evaluate held-out examples (:meth:`fixed`).

    Arguments:
        loss: The loss at given times of the chain, such as ``BoundLoss()``.
        steps: The number T of steps of the chain.
        history: The number of stored values per step, positive.
        floor: The share of steps drawn with equal probability, in (0, 1], so every step is drawn
            sometimes.
    """

    values: Tensor
    counts: Tensor

    def __init__(
        self, loss: Loss, steps: int = 1000, history: int = 10, floor: float = 0.001
    ) -> None:
        super().__init__()
        if not isinstance(loss, Loss) or isinstance(loss, nn.Module):
            raise InputError(
                f"loss must be a Loss without weights, such as BoundLoss(), got {loss}."
            )
        if not isinstance(floor, int | float) or not 0 < floor <= 1:
            raise InputError(f"floor must be in (0, 1], got {floor}; the default is 0.001.")
        self.loss, self.floor, self.decoder = loss, floor, loss.decoder
        shape = check_count("steps", steps), check_count("history", history)
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(shape[0], dtype=torch.int64))

    def shares(self) -> Tensor:
        """Returns the probability of each step, float64 ``(T,)``."""
        steps, history = self.values.shape
        size = self.values.square().mean(1).sqrt()
        ready = (self.counts >= history).all() & (size.sum() > 0)
        found = (1 - self.floor) * size / size.sum() + self.floor / steps
        return torch.where(ready, found, 1 / steps)

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the weighted loss of each example; arguments as for the base.

        Given times are used unchanged.

        Raises:
            InputError: As for the wrapped loss.
        """
        if given.t is not None:
            return self.loss.evaluate(model, x, given, **cond)
        sde = self._chain(model.process)
        u = given.own.uniform((), Purpose.TIME, dtype=torch.float64)
        shares = self.shares().to(u.device)
        row = torch.searchsorted(shares.cumsum(0), u, right=True).clamp(max=sde.steps - 1)
        at_steps = given.at(sde.time_of_index(row), given.noise)
        found = self.loss.evaluate(model, x, at_steps, **cond)
        record = torch.stack((row.double(), found.value.detach().double()), 1)
        weight = (1 / (sde.steps * shares[row])).to(found.value)
        return LossTerms(weight * found.value, found.parts, record)

    @torch.no_grad()
    def keep(self, record: Tensor) -> None:
        """Adds the values of an update, in the order of its examples, to the history.

        Arguments:
            record: The row of each step and its value, float64 ``(B, 2)``; values that are not
                finite are skipped.
        """
        steps, history = self.values.shape
        row = torch.where(record[:, 1].isfinite(), record[:, 0].long(), steps)
        order = row.argsort(stable=True)
        row, value = row[order], record[order, 1]
        count = torch.bincount(row, minlength=steps + 1)
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        # If a step has more values than fit, the last ones are kept; the others go to a separate
        # row.
        kept = torch.where(count[row] - place <= history, row, steps)
        slot = (nn.functional.pad(self.counts, (0, 1))[row] + place) % history
        table = nn.functional.pad(self.values, (0, 0, 0, 1))
        table[kept, slot] = value
        self.values.copy_(table[:steps])
        self.counts.add_(count[:steps])

    def fixed(self) -> Loss:
        return self.loss

    def check(self, model: Trainable) -> None:
        self.loss.check(model)
        self._chain(model.process)

    def first_time(self, process: Interpolant) -> float:
        return self.loss.first_time(process)

    def _chain(self, process: Interpolant) -> Chain:
        steps = len(self.counts)
        if not isinstance(process, Chain):
            raise InputError(f"sde must be a discrete chain, such as DiscreteVP(), got {process}.")
        if process.steps != steps:
            raise InputError(
                f"steps must be {process.steps}, the number of steps of the chain, got {steps}."
            )
        return process
