r"""Models of a stochastic interpolant, by the difference of its ends and the score.

.. math:: v = E[x_1 - x_0 \mid x_t], \qquad s = \nabla \log p_t(x_t) = -E[z \mid x_t] / \gamma

Both are finite at both ends (see :mod:`scoresde.sde.stochastic`), and determine the rest:

.. math:: u = v - \gamma \gamma' \, s, \qquad E[z \mid x_t] = -\gamma \, s, \qquad
          E[x_0 \mid x_t] = x_t - t \, v + \gamma^2 \, s .
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.model.base import Model
from scoresde.nn.embedding import takes
from scoresde.passes import count_pass
from scoresde.recipe import describable
from scoresde.sde import StochasticInterpolant, as_time
from scoresde.shapes import check_output, expand

_TURNS = 4.0


@describable
class InterpolantModel(Model):
    """Two networks plus a stochastic interpolant.

    Each state counts as two network evaluations. The networks' time label is 4 t.

    Arguments:
        velocity: The network for the difference of the ends, ``network(x, c, **cond)``.
        score: The network for the score, with the same signature.
        process: The interpolant.

    Raises:
        InputError: If the process is not a stochastic interpolant.

    Example:
        >>> from scoresde.sde import StochasticInterpolant
        >>> model = InterpolantModel(lambda x, c: x, lambda x, c: -x, StochasticInterpolant())
        >>> model.velocity(torch.ones(1, 2), 0.25)
        tensor([[1.2500, 1.2500]])
    """

    def __init__(
        self,
        velocity: nn.Module | Callable[..., Tensor],
        score: nn.Module | Callable[..., Tensor],
        process: StochasticInterpolant,
    ) -> None:
        super().__init__()
        if not isinstance(process, StochasticInterpolant):
            raise InputError(
                f"process must be a StochasticInterpolant, got {type(process).__name__}; use "
                "BridgeModel for a bridge."
            )
        self.velocity_network, self.score_network = velocity, score
        self._process = process

    @property
    def process(self) -> StochasticInterpolant:
        """The interpolant."""
        return self._process

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one example, if the network has an attribute ``shape``; else None."""
        shape = getattr(self.velocity_network, "shape", None)
        return None if shape is None else tuple(shape)

    def takes(self, name: str) -> bool:
        """Returns whether it takes a condition. It always takes the source, where paths start."""
        networks = (self.velocity_network, self.score_network)
        return name == "source" or any(takes(network, name) for network in networks)

    def difference(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`E[x_1 - x_0 \mid x_t]`."""
        return self._ask(self.velocity_network, x, as_time(t), cond)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`\nabla_x \log p_t(x)`."""
        return self._ask(self.score_network, x, as_time(t), cond)

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`E[x_1 - x_0 \mid x_t] - \gamma \gamma' \nabla \log p_t`."""
        t = as_time(t)
        return self._drift(x, t, self._process.gamma_rate(t), cond)

    def reverse_drift(self, x: Tensor, t: Tensor, diffusion: float, **cond: Tensor) -> Tensor:
        r"""Returns the drift :math:`u - \epsilon \nabla \log p_t` of the SDE from t = 1 to 0.

        Arguments:
            x: States, with shape ``(B, *)``.
            t: Times in [0, 1], with shape ``()`` or ``(B,)``.
            diffusion: The diffusion :math:`\epsilon`, at least 0.
            **cond: Conditions, each with shape ``(B, *)``.
        """
        t = as_time(t)
        return self._drift(x, t, self._process.gamma_rate(t) + diffusion, cond)

    def _drift(self, x: Tensor, t: Tensor, gain: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.difference(x, t, **cond) - expand(gain, x) * self.score(x, t, **cond)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`E[x_0 \mid x_t] = x_t - t v + \gamma^2 s`."""
        t = as_time(t)
        way = expand(self._process.sigma(t), x) * self.difference(x, t, **cond)
        gain = expand(self._process.gamma(t) ** 2, x)
        return x - way + gain * self.score(x, t, **cond)

    def _ask(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        given = {k: v for k, v in cond.items() if k != "source" or takes(network, k)}
        dtype = x.dtype if self._float() is None else self.dtype
        label = (_TURNS * t).to(x.device, torch.promote_types(torch.float32, dtype))
        count_pass(len(x))
        return check_output(network(x.to(dtype), label.expand(len(x)), **given)).to(x.dtype)
