"""One update of a model's weights from a batch, in one process or several."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.loss import Loss
from scoresde.model import Trainable
from scoresde.streams import Streams
from scoresde.train.dropout import drop_conditions
from scoresde.train.engine import (
    Engine,
    ModelLoss,
    ProcessGroup,
    Replicated,
    in_parts,
    networks,
    own,
    whole,
)
from scoresde.train.precision import LossScale
from scoresde.train.training import Training


class Update:
    """An update of a model's weights from a batch, shared by the processes of a group.

    Arguments:
        model: The model, on its device; it is changed.
        loss: The loss; if it has weights, they are moved to the model's device and trained too.
        training: Training settings.
        optimizer: Callable that builds an optimiser from parameters, or from parameter groups if
            there are weights outside the model's networks.
        engine: Parallelism strategy for several processes.
        seed: Seed of the times and the noise.
    """

    def __init__(
        self,
        model: Trainable,
        loss: Loss,
        training: Training,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        engine: Engine | None = None,
        seed: int = 0,
    ) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(
                f"model must have trainable weights, got a {type(model).__name__} without any; "
                "use a network that is a torch.nn.Module."
            )
        self.model, self.training, self.seed = model, training, seed
        self.averages = training.averages(model)
        training.prepare(model)
        copies = [average.model for average in self.averages]
        if isinstance(loss, nn.Module):
            loss.to(model.device)
        self.loss, self.terms = loss, ModelLoss(model, loss)
        self.shared = (engine or Replicated()).share(self.terms, copies)
        self.optimiser = _optimiser(optimizer, self.terms)
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.scale = LossScale(training.precision_on(model.device), model.device)
        self.parts: dict[str, Tensor] = {}  # parts of the last loss, averaged over the batch

    def __call__(self, x: Tensor, cond: dict[str, Tensor], step: int, size: int) -> Tensor:
        """Performs update number ``step``, counted from 0.

        Arguments:
            x: This process's part of the batch.
            cond: The conditions of these examples.
            step: The number of the update.
            size: The number of examples in all processes together.

        Returns:
            The loss, the gradient norm, and whether an overflow of the norm is excused.
        """
        factor = self.training.rate(step, self.training.steps)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.terms.loss = self.loss.at(step)
        value = self._backward(x, cond, step, size)
        gradients = [p.grad for p in self.terms.parameters() if p.grad is not None]
        scale = self.scale.state[0]
        norm = _norm(gradients) / scale
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
        """Computes the gradient of the batch's mean loss, and its parts; returns the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        group, passes = ProcessGroup.here(), self.training.accumulate
        mine, seeds = group.part(size), range(step * size, (step + 1) * size)
        bounds = [len(x) * i // passes for i in range(passes + 1)]
        rate = self.training.condition_dropout
        if rate:
            streams = Streams.of(self.seed, seeds, device=x.device)[mine]
            # Values only for the loss, such as the other end of a path, are not dropped.
            taken = {name: c for name, c in cond.items() if self.model.takes(name)}
            cond = {**cond, **drop_conditions(taken, rate, streams)}
        means = torch.zeros(1, device=x.device)  # of the loss, then of its parts
        records = []
        for first, end in itertools.pairwise(bounds):
            part = slice(mine.start + first, mine.start + end)
            labels = {name: label[first:end] for name, label in cond.items()}
            with self.shared.computing(last=end == len(x)):
                with self.training.autocast(x.device):
                    losses, parts, record = self.shared.terms(
                        x[first:end], seed=self.seed, seeds=seeds, part=part, **labels
                    )
                # Gradients of several processes are averaged, not added.
                self.scale.scaled(losses.sum() * (group.size / size)).backward()
            sums = [value.detach().sum().to(losses) for value in (losses, *parts.values())]
            means = means + torch.stack(sums) / size
            records += [] if record is None else [record]
        value, *rest = group.total(means)
        self.parts = dict(zip(parts, rest, strict=True))
        self._keep(records, mine, size)
        return value

    def _keep(self, records: list[Tensor], mine: slice, size: int) -> None:
        """Passes the records of the examples of all processes to the loss."""
        if not records:
            return
        own = torch.cat(records)
        every = own.new_zeros(size, *own.shape[1:])
        every[mine] = own
        self.terms.loss.keep(ProcessGroup.here().total(every))


def _optimiser(
    make: Callable[[Iterable[Any]], torch.optim.Optimizer], terms: ModelLoss
) -> torch.optim.Optimizer:
    """Builds the optimiser of all weights: those of the model's networks, then the others.

    They form separate parameter groups, since an optimiser cannot update sharded and whole weights
    together.
    """
    inside = {p: None for network in networks(terms.model) for p in network.parameters()}
    outside = [p for p in terms.parameters() if p not in inside]
    both: Any = [{"params": [*inside]}, {"params": outside}]
    try:
        return make(both if inside and outside else terms.parameters())
    except (ValueError, TypeError) as error:
        raise InputError(f"Cannot build the optimiser {make}: {error}.") from error


def _norm(gradients: list[Tensor]) -> Tensor:
    """Returns the norm of all gradients; norms of sharded gradients are computed first."""
    kinds = ([g for g in gradients if in_parts(g) is parts] for parts in (True, False))
    return functools.reduce(
        torch.hypot, [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    )


def _take(
    optimiser: torch.optim.Optimizer, gradients: list[Tensor], divisor: Tensor, good: Tensor
) -> None:
    """Takes an optimiser step with gradients divided by a number.

    The step is skipped unless the gradients are finite; otherwise the weights would be lost. A
    fused optimiser does both in its own pass over the weights, without waiting for the device.
    """
    # Torch has no public interface for passing the two numbers to a fused optimiser (this is
    # GradScaler's), nor for scaling a list of tensors at once.
    if getattr(optimiser, "_step_supports_amp_scaling", False) and not in_parts(gradients):
        optimiser.grad_scale = divisor  # type: ignore[attr-defined]
        optimiser.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimiser.step()
    elif bool(good):
        torch._foreach_mul_([own(gradient) for gradient in gradients], 1 / divisor)
        optimiser.step()
