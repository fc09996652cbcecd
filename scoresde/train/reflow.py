"""Reflow: pairs of noise and examples that a model's own flow makes.

The velocity that is learned from these pairs carries the same noise to the same law of examples,
on straighter paths, so that fewer steps do. Each round keeps the errors of the one before.

References:
    Liu, Gong and Liu, *Flow straight and fast*, 2023, https://arxiv.org/abs/2209.03003
    (section 2.2 and algorithm 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.errors import InputError, check_count
from scoresde.model import Model, check_model
from scoresde.progress import Progress
from scoresde.sample import Sampler

_HELD_OUT = 0.1  # the share of pairs for validation, and again for test


@dataclass(frozen=True)
class Reflow:
    """Makes pairs by the flow of a model.

    Arguments:
        flow: The model.
        sampler: A deterministic sampler, such as ``ProbabilityFlow()``.

    Example:
        >>> from scoresde import GaussianModel, RectifiedFlow
        >>> from scoresde.sample import ProbabilityFlow
        >>> exact = GaussianModel(torch.zeros(2), 0.5, RectifiedFlow())
        >>> pairs = Reflow(exact, ProbabilityFlow()).pairs(20, shape=(2,), seed=0)
        >>> pairs.train.shape, pairs.conditions_of("train")["source"].shape
        (torch.Size([16, 2]), torch.Size([16, 2]))
    """

    flow: Model
    sampler: Sampler

    def __post_init__(self) -> None:
        check_model(self.flow, Model)
        self.sampler.check(self.flow)

    def pairs(
        self,
        count: int,
        seed: int = 0,
        *,
        shape: Sequence[int] | None = None,
        batch_size: int = 1024,
        progress: bool = False,
        **cond: Tensor,
    ) -> Dataset:
        """Returns examples in model units, with the noise of each as the condition ``source``.

        Pair ``i`` depends on the seed and ``i`` alone. A tenth of the pairs is for validation,
        another for test.

        Arguments:
            count: The number of pairs, at least 10.
            seed: Seed of the noise.
            shape: The shape of one example; None takes the model's.
            batch_size: The number of pairs made together, positive.
            progress: Whether to show the progress.
            **cond: Conditions for the model, each with shape ``(count, *)``; they are kept with
                the examples.

        Raises:
            InputError: If the sampler draws noise besides the first, or an argument is out of
                range.
        """
        held = self._held_out(count)
        check_count("batch_size", batch_size)
        shape = self._shape(shape)
        self._check_deterministic(shape, cond)
        bar = Progress(count, "reflow", "pair", shown=progress)
        made = []
        for rows in torch.arange(count).split(batch_size):
            told = self.flow.select({name: c[rows.to(c.device)] for name, c in cond.items()})
            made.append(self._pairs((len(rows), *shape), seed, rows, told))
            bar.update(len(rows))
        bar.close()
        latents, examples = (torch.cat(part).cpu() for part in zip(*made, strict=True))
        sizes = [count - 2 * held, held, held]
        known = {"source": latents, **{name: c.cpu() for name, c in cond.items()}}
        parts = {name: values.split(sizes) for name, values in known.items()}
        return Dataset.of("pairs", examples.split(sizes), standardise=False, conditions=parts)

    def _pairs(
        self, shape: tuple[int, ...], seed: int, rows: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Returns the noise and the examples of some pairs."""
        latent = self.sampler.latent(self.flow, shape, seed=seed, seeds=rows, **cond)
        return latent, self.sampler(self.flow, latent=latent, seed=seed, seeds=rows, **cond).x

    def _held_out(self, count: int) -> int:
        check_count("count", count)
        if count * _HELD_OUT < 1:
            raise InputError(f"count must be at least 10, for all splits, got {count}.")
        return int(count * _HELD_OUT)

    def _shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        found = self.flow.shape if shape is None else shape
        if found is None:
            raise InputError("shape must be given for a model that does not know it; use (2,).")
        return tuple(found)

    def _check_deterministic(self, shape: tuple[int, ...], cond: dict[str, Tensor]) -> None:
        if not is_deterministic(self.sampler, self.flow, shape, cond):
            raise InputError(
                f"sampler must be deterministic, got {self.sampler}, which leads from one latent "
                "to different examples; use ProbabilityFlow()."
            )


def is_deterministic(
    sampler: Sampler, model: Model, shape: Sequence[int], cond: Mapping[str, Tensor]
) -> bool:
    """Returns whether two random streams of a sampler lead from one latent to one example.

    Arguments:
        sampler: The sampler, which is tried.
        model: A model that it suits.
        shape: The shape of one example.
        cond: Conditions, of which the first row is used.
    """
    told: dict[str, Any] = model.select({name: c[[0, 0]] for name, c in cond.items()})
    latent = sampler.latent(model, (1, *shape), seed=0)[[0, 0]]
    ends = sampler(model, latent=latent, seed=0, **told).x
    return torch.equal(ends[0], ends[1])


def one_step_error(flow: Model, pairs: Dataset, split: str = "test") -> float:
    r"""Returns how far one Euler step ends from the examples of pairs.

    .. math:: \sqrt{\tfrac1D E \lVert x_1 - \hat u(x_1, 1) - x_0 \rVert^2}

    Arguments:
        flow: A model of a straight path, :math:`\alpha = 1 - t` and :math:`\sigma = t`.
        pairs: What :meth:`Reflow.pairs` returned, of this model or another.
        split: Which of their splits.
    """
    told = pairs.conditions_of(split)
    x = flow.state(pairs.encode(pairs.split(split)[:]))
    source = flow.state(told["source"])
    with torch.no_grad():
        step = source - flow.velocity(source, torch.ones(()).double(), **flow.select(told))
    return float((step - x).square().mean().sqrt())
