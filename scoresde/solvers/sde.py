r"""Stochastic differential equations with additive noise by torchsde's fixed-step methods.

For noise whose size does not depend on the state the calculi of Ito and Stratonovich agree, so
that all of torchsde's methods apply. Their random numbers come from the counter-based streams: a
fixed-step method asks for each interval once and in order, and the intervals are disjoint, so the
increments are independent draws,

.. math:: W \sim N(0, h), \qquad
          U = \int_t^{t+h} (W_s - W_t) ds = \tfrac{h}{2} W + h H, \qquad H \sim N(0, h / 12) .

References:
    Li et al., *Scalable gradients for stochastic differential equations*, 2020 (torchsde).
    Foster, Lyons and Oberhauser, *An optimal polynomial approximation of Brownian motion*, 2020.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchsde
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.streams import Purpose, Streams

_ITO = ("euler", "milstein", "srk")
_STRATONOVICH = ("euler_heun", "heun", "midpoint")


class BrownianIncrements(torchsde.BaseBrownian):
    """A Brownian motion for solvers that walk through time once, in order.

    Arguments:
        streams: One random stream per example.
        dimension: The number of components of an example.
        dtype: The data type of the increments.
    """

    levy_area_approximation = "space-time"

    def __init__(self, streams: Streams, dimension: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.streams = streams
        self.dimension = dimension
        self._dtype = dtype
        self.draws = 0

    def __call__(
        self,
        ta: Tensor,
        tb: Tensor | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the increment over an interval, and its time integral if asked for."""
        assert tb is not None  # a fixed-step method names both ends
        h = float(tb) - float(ta)
        increment = h**0.5 * self._normal()
        if not return_U:
            return increment
        bridge = (h / 12) ** 0.5 * self._normal()
        return increment, h * (0.5 * increment + bridge)

    def _normal(self) -> Tensor:
        self.draws += 1
        return self.streams.normal(
            (self.dimension,), Purpose.DIFFUSION, self.draws - 1, self._dtype
        )

    def __repr__(self) -> str:
        return f"BrownianIncrements(seed={self.streams.seed}, shape={tuple(self.shape)})"

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the increments."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the increments."""
        return self.streams.indices.device

    @property
    def shape(self) -> torch.Size:
        """The shape of an increment."""
        return torch.Size((len(self.streams), self.dimension))


@dataclass(frozen=True)
class FixedStepSDE:
    """Solves dy = v(t, y) dt + g(t) dw with increasing time by torchsde.

    Arguments:
        steps: The number of steps, positive.
        method: One of ``euler``, ``milstein``, ``srk``, ``euler_heun``, ``heun``, ``midpoint``.
    """

    steps: int = 1000
    method: str = "euler"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if self.method not in _ITO + _STRATONOVICH:
            raise InputError(
                f"method={self.method!r} is not one of {', '.join(_ITO + _STRATONOVICH)}."
            )

    def __call__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: Callable[[Tensor], Tensor],
        x: Tensor,
        end: float,
        streams: Streams,
    ) -> Tensor:
        """Integrates states ``(B, *)`` from time 0 to ``end`` and returns the last one."""
        calculus = "ito" if self.method in _ITO else "stratonovich"
        system = _System(drift, diffusion, x.shape, calculus)
        # A hair more than the step, so that rounding never leaves a rest for one step more.
        solution = torchsde.sdeint(
            system,
            x.flatten(1),
            torch.tensor([0.0, end], dtype=torch.float64, device=x.device),
            bm=BrownianIncrements(streams, x.shape[1:].numel(), x.dtype),
            method=self.method,
            dt=end / self.steps * (1 + 1e-12),
        )
        return solution[-1].reshape(x.shape)


class _System:
    """The equation as torchsde calls it: flat states."""

    noise_type = "diagonal"

    def __init__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: Callable[[Tensor], Tensor],
        shape: torch.Size,
        sde_type: str,
    ) -> None:
        self.drift, self.diffusion = drift, diffusion
        self.shape = shape
        self.sde_type = sde_type

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(t, y.reshape(self.shape)).flatten(1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.diffusion(t).to(y).expand_as(y)
