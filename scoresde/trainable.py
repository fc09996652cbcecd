"""What can be trained, whatever its room: a module of weights that takes examples."""

import itertools
from abc import ABC
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.sde import Interpolant


class Trainable(nn.Module, ABC):
    """Base class for what is trained: models, classifiers of noised examples, autoencoders.

    One that runs a network reports it (:func:`scoresde.passes.count_pass`); one that is made of
    others leaves that to them.
    """

    @property
    def process(self) -> Interpolant:
        """The process whose states it is a function of.

        Raises:
            InputError: If it is a function of examples without noise.
        """
        raise InputError(
            f"model must be one of noised examples, got {type(self).__name__}; use its own loss, "
            "such as ELBO(), or train a diffusion of its latents (codec=RUN)."
        )

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one example, or None if it is unknown."""
        return None

    def takes(self, name: str) -> bool:
        """Returns whether it takes a condition; a model of models takes theirs."""
        return any(isinstance(child, Trainable) and child.takes(name) for child in self.children())

    def select(self, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns those of the conditions that it takes, on its device and in its type."""
        taken = {name: c.to(self.device) for name, c in cond.items() if self.takes(name)}
        return {k: c.to(self.dtype) if c.is_floating_point() else c for k, c in taken.items()}

    def _float(self) -> Tensor | None:
        """Returns the first array of floats that it holds, if any."""
        arrays = itertools.chain(self.parameters(), self.buffers())
        return next((a for a in arrays if a.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The data type that it computes in (torch's default if it holds no numbers)."""
        array = self._float()
        return torch.get_default_dtype() if array is None else array.dtype

    @property
    def device(self) -> torch.device:
        """The device that it is on."""
        array = self._float()
        return torch.get_default_device() if array is None else array.device

    def state(self, x: Tensor) -> Tensor:
        """Returns data as a state around it: no narrower than float32 nor its own type."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.dtype), x.dtype)
        return x.to(self.device, dtype)
