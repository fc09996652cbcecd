r"""Random dropout of conditions in training, so the network also learns "none".

A model trained with it is a conditional and an unconditional model in one network, as required by
classifier-free guidance.

**Rates.** At a rate :math:`p` every condition has its own switch, and all share another one. Each
switch is off with the probability :math:`q = 1 - \sqrt{1 - p}`, independently. Therefore each
condition is dropped with the probability :math:`1 - (1 - q)^2 = p`, and K conditions are all
dropped with the probability :math:`q + (1 - q) q^K`: at p = 0.1 it is 0.1, 0.054 and 0.051 for
K = 1, 2 and 3.

References:
    Ho and Salimans, *Classifier-free diffusion guidance*, 2022,
    https://arxiv.org/abs/2207.12598 (algorithm 1).
"""

import math

import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.errors import InputError
from scoresde.model import Trainable
from scoresde.sde import Bridge
from scoresde.shapes import none_like
from scoresde.streams import Purpose, Streams

_KEPT = "augment"  # zeros mean that an example was not augmented, so "none" is not needed


def drop_conditions(cond: dict[str, Tensor], rate: float, streams: Streams) -> dict[str, Tensor]:
    """Replaces conditions by "none": -1 for a class, NaN for a continuous condition.

    Arguments:
        cond: The conditions by name, each with shape ``(B, *)``; ``augment`` is kept.
        rate: The probability p of dropping each condition, in [0, 1).
        streams: The random streams of the examples.

    Example:
        >>> label = torch.arange(5)
        >>> drop_conditions({"label": label}, 0.5, Streams.of(0, batch=5))["label"]
        tensor([-1,  1, -1,  3,  4])
    """
    names = sorted(cond.keys() - {_KEPT})
    if rate == 0 or not names:
        return cond
    switch = rate / (1 + math.sqrt(1 - rate))
    off = streams.uniform((1 + len(names),), Purpose.DROP, dtype=torch.float64) < switch
    dropped = {
        name: _without(cond[name], off[:, 0] | off[:, 1 + i]) for i, name in enumerate(names)
    }
    return {**cond, **dropped}


def _without(values: Tensor, gone: Tensor) -> Tensor:
    each = gone.reshape(-1, *(1,) * (values.ndim - 1))
    return torch.where(each, none_like(values), values)


def check_dropout(model: Trainable, data: Dataset, rate: float) -> None:
    """Checks that there are conditions to drop, and that each supports "none".

    Arguments:
        model: The model.
        data: The training data.
        rate: The probability of dropping each condition.

    Raises:
        InputError: If there are none, or one does not support "none".
    """
    if rate == 0:
        return
    if isinstance(model.process, Bridge):
        raise InputError(
            "condition_dropout must be 0 for a model of a bridge, whose paths start from their "
            f"source, got {rate}."
        )
    known = data.conditions_of("train", slice(1))
    taken = {name: known[name] for name in known if model.takes(name) and name != _KEPT}
    if not taken:
        raise InputError(
            "condition_dropout must be 0 for a model that accepts no condition of "
            f"{data.name}, got {rate}; to use classes, build the network with classes=C."
        )
    for name, values in taken.items():
        if (
            not (values.is_floating_point() or values.dtype.is_signed)
            or values.dtype == torch.bool
        ):
            raise InputError(
                f"{name} must have a floating-point or signed integer type for "
                f"condition_dropout={rate}, got {values.dtype}; convert it, or use "
                "condition_dropout=0."
            )
