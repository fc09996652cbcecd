"""Base classes of models, and helpers for code that uses a model."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE, Interpolant, as_time
from scoresde.shapes import expand
from scoresde.trainable import Trainable


class Model(Trainable):
    """Base class for models of a process.

    In every method ``x`` has the shape ``(B, *)``, ``t`` the shape ``()`` or ``(B,)`` with values
    in [0, 1], and the result has the shape and the data type of ``x``. Further keywords are
    conditions, each with shape ``(B, *)``.
    """

    @property
    @abstractmethod
    def process(self) -> Interpolant:
        """The process whose states the model takes."""

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the denoised estimate :math:`E[x_0 \mid x_t = x]`."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the velocity :math:`E[d x_t / dt \mid x_t = x]`."""

    @property
    def data_std(self) -> float | None:
        """The standard deviation of the data, averaged over their values, or None if unknown."""
        parts = (child.data_std for child in self.children() if isinstance(child, Model))
        return next(parts, None)

    @property
    def jumps(self) -> tuple[float, ...]:
        """The times in (0, 1) at which the model jumps; adaptive solvers restart there."""
        parts = (child for child in self.children() if isinstance(child, Model))
        return tuple(sorted({t for part in parts for t in part.jumps}))

    def take(self, rows: Tensor) -> "Model":
        """Returns the model of some examples of its batch.

        This is the model itself, unless it stores values for each example. A model made of other
        models passes the rows on to them.

        Arguments:
            rows: The indices of the examples, int64 ``(n,)``.
        """
        return self


class ScoreFunction(Model):
    r"""Base class for models of an SDE, which predict the score, the noise and the data.

    **Velocity.** With the signal's rate :math:`\alpha'` and the noise's :math:`\sigma'`,

    .. math:: u = \alpha' D + \sigma' \hat z = f x + \frac{g^2}{2 \sigma} \hat z .

    The second form is used where the SNR is positive up to t = 1. The first is finite at both ends
    wherever :math:`\alpha'`, :math:`\sigma'` and :math:`\hat z` are.
    """

    sde: SDE

    @property
    def process(self) -> SDE:
        """The forward process."""
        return self.sde

    @abstractmethod
    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the score :math:`\nabla_x \log p_t(x)`."""

    @abstractmethod
    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the predicted noise :math:`E[z \mid x_t = x]`."""

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the velocity of the probability flow, from one network evaluation.

        .. math:: u = f x - \tfrac12 g^2 \nabla_x \log p_t(x)

        References:
            Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 13).
        """
        t = as_time(t)
        if self.sde.zero_snr:
            return self._velocity_by_rates(x, t, cond)
        gain = 0.5 * self.sde.g(t) ** 2 / self.sde.sigma(t)
        return expand(self.sde.f(t), x) * x + expand(gain, x) * self.noise(x, t, **cond)

    def _velocity_by_rates(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        r"""Returns :math:`\alpha' D + \sigma' (x - \alpha D) / \sigma`; 0/0 only at t = 0."""
        sde, data = self.sde, self.denoise(x, t, **cond)
        share = sde.sigma_dot(t) / sde.sigma(t)
        gain = sde.alpha_dot(t) - share * sde.alpha(t)
        return expand(share, x) * x + expand(gain, x) * data


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A model with its conditions bound: the field that samplers and likelihoods evaluate.

    Arguments:
        model: A model.
        cond: The conditions, each with shape ``(B, *)``.
    """

    model: ScoreFunction
    cond: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sde(self) -> SDE:
        """The forward process."""
        return self.model.sde

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the score."""
        return self.model.score(x, t, **self.cond)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted noise."""
        return self.model.noise(x, t, **self.cond)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the denoised estimate."""
        return self.model.denoise(x, t, **self.cond)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity."""
        return self.model.velocity(x, t, **self.cond)

    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Returns the drift of the reverse SDE, :math:`f x + g^2 \hat z / \sigma`."""
        gain = self.sde.g(t) ** 2 / self.sde.sigma(t)
        return expand(self.sde.f(t), x) * x + expand(gain, x) * self.noise(x, t)

    def take(self, rows: Tensor) -> "Conditioned":
        """Returns the field of some examples, int64 ``(n,)``."""
        cond = {name: value[rows] for name, value in self.cond.items()}
        return Conditioned(cast(ScoreFunction, self.model.take(rows)), cond)


def check_model(model: Trainable, kind: type = ScoreFunction) -> None:
    """Checks a model.

    Arguments:
        model: The object to check.
        kind: The class that it must be an instance of.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(model, kind):
        wraps = issubclass(ScoreFunction, kind)
        wrap = "; wrap a network in ScoreModel(network, sde)" if wraps else ""
        raise InputError(f"model must be a {kind.__name__}, got {type(model).__name__}{wrap}.")


@contextmanager
def evaluating(model: Trainable, frozen: bool = False) -> Iterator[None]:
    """Context manager that switches dropout off: a solver needs the same field at every call.

    Arguments:
        model: A model.
        frozen: Whether the parameters require no gradients inside the context. If True, layers
            store nothing for them, and a compiled network does not compute them.
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
