r"""Conditions that are left out of training at random, so that "none" of them is learned too.

A model that is trained this way is a conditional and an unconditional one in one network, as
classifier-free guidance needs.

**Rates.** At a rate :math:`p` every condition has a switch of its own, and all have one together.
Each is off with the probability :math:`q = 1 - \sqrt{1 - p}`, independently. Therefore each
condition is left out with the probability :math:`1 - (1 - q)^2 = p`, and K of them are all left
out with the probability :math:`q + (1 - q) q^K`: at p = 0.1 that is 0.1, 0.054 and 0.051 for
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

_KEPT = "augment"  # zeros say that nothing was done to an example: there is no "none"


def drop_conditions(cond: dict[str, Tensor], rate: float, streams: Streams) -> dict[str, Tensor]:
    """Replaces conditions by "none": -1 of a class, NaN of what is continuous.

    Arguments:
        cond: The conditions by name, each with shape ``(B, *)``; ``augment`` is kept.
        rate: The probability p with which each is left out, in [0, 1).
        streams: The stream of each example.

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
    """Checks that there are conditions to leave out, and that each can say "none".

    Arguments:
        model: The model.
        data: The data that it is trained on.
        rate: The probability with which each condition is left out.

    Raises:
        InputError: If not.
    """
    if rate == 0:
        return
    if isinstance(model.process, Bridge):
        raise InputError(
            f"condition_dropout must be 0 for a model of a bridge, got {rate}: a path starts from "
            "its source; leave it out."
        )
    known = data.conditions_of("train", slice(1))
    taken = {name: known[name] for name in known if model.takes(name) and name != _KEPT}
    if not taken:
        raise InputError(
            f"condition_dropout must be 0 for a model that takes no condition of {data.name}, got "
            f"{rate}; build the network with classes=..., or leave it out."
        )
    for name, values in taken.items():
        if (
            not (values.is_floating_point() or values.dtype.is_signed)
            or values.dtype == torch.bool
        ):
            raise InputError(
                f"{name} must be of floats, or of signed integers, to be left out, got "
                f"{values.dtype}; convert it, or give condition_dropout=0."
            )
