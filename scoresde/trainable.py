"""Base class for trainable objects: modules with weights that take examples."""

import itertools
from abc import ABC
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.sde import Interpolant


class Trainable(nn.Module, ABC):
    """Base class for trainable objects: models, classifiers of noised examples, autoencoders.

    A class that runs a network reports each pass with :func:`scoresde.passes.count_pass`; a class
    composed of other trainable objects leaves that to them.
    """

    @property
    def process(self) -> Interpolant:
        """The process whose states are the input.

        Raises:
            InputError: If the input is examples without noise.
        """
        raise InputError(
            f"model must be a model of noised examples, got {type(self).__name__}; use its own "
            "loss, such as ELBO(), or train a diffusion model of its latents (codec=RUN)."
        )

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one example, or None if it is unknown."""
        return None

    def takes(self, name: str) -> bool:
        """Returns whether it accepts a condition; a composite model accepts those of its parts."""
        return any(isinstance(child, Trainable) and child.takes(name) for child in self.children())

    def select(self, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the accepted conditions, on its device and in its data type."""
        taken = {name: c.to(self.device) for name, c in cond.items() if self.takes(name)}
        return {k: c.to(self.dtype) if c.is_floating_point() else c for k, c in taken.items()}

    def _float(self) -> Tensor | None:
        """Returns the first floating-point array that it holds, if any."""
        arrays = itertools.chain(self.parameters(), self.buffers())
        return next((a for a in arrays if a.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of its computations (torch's default if it holds no numbers)."""
        array = self._float()
        return torch.get_default_dtype() if array is None else array.dtype

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        array = self._float()
        return torch.get_default_device() if array is None else array.device

    def state(self, x: Tensor) -> Tensor:
        """Returns data as a state: no narrower than float32 and its own data type."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.dtype), x.dtype)
        return x.to(self.device, dtype)
