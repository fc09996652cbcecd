"""The base class of models, and what every user of a model needs."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.sde import SDE
from scoresde.shapes import expand


class ScoreFunction(nn.Module, ABC):
    """Abstract: what samplers and likelihoods ask for.

    In every method ``x`` has the shape ``(B, *)``, ``t`` the shape ``()`` or ``(B,)`` with values
    in [0, 1], and the result has the shape and the data type of ``x``. Further keywords are
    conditions for the network.
    """

    sde: SDE

    @abstractmethod
    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the score :math:`\nabla_x \log p_t(x)`."""

    @abstractmethod
    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the expected noise :math:`E[z \mid x_t = x]`."""

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the expected data :math:`E[x_0 \mid x_t = x]`."""

    def _float(self) -> Tensor | None:
        """Returns the first array of floats that the model holds, if any."""
        arrays = itertools.chain(self.parameters(), self.buffers())
        return next((a for a in arrays if a.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the model computes in (torch's default if it holds no numbers)."""
        array = self._float()
        return torch.get_default_dtype() if array is None else array.dtype

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        array = self._float()
        return torch.get_default_device() if array is None else array.device

    def state(self, x: Tensor) -> Tensor:
        """Returns data as a state around the model: no narrower than float32 nor the model."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.dtype), x.dtype)
        return x.to(self.device, dtype)


class Evaluations:
    """A score function with its conditions bound, which counts the network's passes.

    Arguments:
        model: A score function.
        cond: The conditions, each with shape ``(B, *)``.
    """

    def __init__(self, model: ScoreFunction, cond: dict[str, Tensor] | None = None) -> None:
        self.model = model
        self.sde = model.sde
        self.cond = cond or {}
        self.count: int | Tensor = 0

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the score, and counts one pass."""
        self.count += 1
        return self.model.score(x, t, **self.cond)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the expected noise, and counts one pass."""
        self.count += 1
        return self.model.noise(x, t, **self.cond)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the expected data, and counts one pass."""
        self.count += 1
        return self.model.denoise(x, t, **self.cond)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Returns the probability-flow field, :math:`f x + g^2 \hat z / (2 \sigma)`."""
        return self._drift(x, t, 0.5)

    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Returns the drift of the reverse SDE, :math:`f x + g^2 \hat z / \sigma`."""
        return self._drift(x, t, 1.0)

    def _drift(self, x: Tensor, t: Tensor, share: float) -> Tensor:
        gain = share * self.sde.g(t) ** 2 / self.sde.sigma(t)
        return expand(self.sde.f(t), x) * x + expand(gain, x) * self.noise(x, t)

    def nfe(self, x: Tensor) -> Tensor:
        """Returns the number of passes so far for each example of ``x``, int64 ``(B,)``."""
        return torch.zeros(len(x), dtype=torch.int64, device=x.device) + self.count


def check_model(model: ScoreFunction) -> None:
    """Checks a model.

    Raises:
        InputError: If it is no score function.
    """
    if not isinstance(model, ScoreFunction):
        raise InputError(
            f"A score function is needed and {type(model).__name__} is none; wrap the network: "
            "ScoreModel(network, sde)."
        )


@contextmanager
def evaluating(model: ScoreFunction, frozen: bool = False) -> Iterator[None]:
    """Switches dropout off for a while: a solver needs the same field at every call.

    Arguments:
        model: A score function.
        frozen: Whether its parameters need no gradients for the while. Then what a layer keeps
            for them is not kept, and a compiled network does not compute them.
    """
    training = [module for module in model.modules() if module.training]
    learned = [p for p in model.parameters() if frozen and p.requires_grad]
    model.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learned:
            parameter.requires_grad_(True)
