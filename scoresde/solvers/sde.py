r"""Solver for stochastic differential equations with additive noise, by torchsde's methods.

If the noise does not depend on the state, the Ito and Stratonovich calculi agree. So all of
torchsde's methods apply, with fixed steps or with adaptive steps by step doubling. The Brownian
motion is a :class:`Motion`:

- :class:`Increments` draws disjoint increments; the cheapest, for fixed steps only,

  .. math:: W \sim N(0, h), \qquad
            U = \int_t^{t+h} (W_s - W_t) ds = \tfrac{h}{2} W + h H, \qquad H \sim N(0, h / 12) ;

- :class:`Path` is one path for each example (:mod:`scoresde.solvers.brownian`);
- :class:`BrownianInterval` is torchsde's own, with one generator for the whole batch.

References:
    Li et al., *Scalable gradients for stochastic differential equations*, 2020 (torchsde).
    Foster, Lyons and Oberhauser, *An optimal polynomial approximation of Brownian motion*, 2020.
    Kidger et al., *Neural SDEs as infinite-dimensional GANs*, 2021 (the Brownian interval).
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torchsde
from torch import Tensor

from scoresde.errors import InputError, SolverError, check_count
from scoresde.solvers.brownian import BrownianPath
from scoresde.streams import Purpose, Streams

_ITO = ("euler", "milstein", "srk")
_STRATONOVICH = ("euler_heun", "heun", "midpoint", "log_ode", "reversible_heun")
_HAIR = 1e-12
_REMEMBERED = 4  # drifts of an adaptive step and of its two halves

# Output of a motion: an increment, its time integral if requested, and the area between
# components, which no method with additive noise needs.
Answer = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class Motion(ABC):
    """Base class for sources of the increments of a Brownian motion on [0, 1]."""

    @abstractmethod
    def start(self, streams: Streams, size: int, dtype: torch.dtype) -> torchsde.BaseBrownian:
        """Returns the motion of a batch of examples with ``size`` components."""


@dataclass(frozen=True)
class Increments(Motion):
    """Independent increments, for methods that integrate through time once."""

    def start(self, streams: Streams, size: int, dtype: torch.dtype) -> torchsde.BaseBrownian:
        return _Increments(streams, size, dtype)


@dataclass(frozen=True)
class Path(Motion):
    """One path per example, the same for any number of steps.

    Arguments:
        depth: Depth of the tree of the path (see :class:`~scoresde.solvers.BrownianPath`).
    """

    depth: int = 20

    def start(self, streams: Streams, size: int, dtype: torch.dtype) -> torchsde.BaseBrownian:
        return _AlongPath(streams, size, dtype, self.depth)


@dataclass(frozen=True)
class BrownianInterval(Motion):
    """torchsde's own Brownian motion, with one generator for the whole batch.

    It depends on the seed, but an example also depends on the other examples in the batch, and
    ``seeds`` have no effect.

    Arguments:
        tree: Whether to use torchsde's Brownian tree, which is slower but gives the same path for
            any number of steps (to times of six digits). If False, the path depends on the
            requested times.
    """

    tree: bool = False

    def start(self, streams: Streams, size: int, dtype: torch.dtype) -> torchsde.BaseBrownian:
        return _Theirs(streams, size, dtype, self.tree)


class _Motion(torchsde.BaseBrownian):
    """Base class for our motions, with the interface that torchsde requires."""

    # The most general type in torchsde, which every method accepts.
    levy_area_approximation = "foster"

    def __init__(self, streams: Streams, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.streams = streams
        self.size = size
        self._dtype = dtype

    @abstractmethod
    def moved(self, s: float, t: float, integral: bool) -> tuple[Tensor, Tensor]:
        """Returns the increment over an interval, and its time integral (or nothing useful)."""

    def __call__(
        self,
        ta: Tensor,
        tb: Tensor | None = None,
        return_U: bool = False,
        return_A: bool = False,
    ) -> Answer:
        """Returns the increment over an interval, and its time integral if requested."""
        assert tb is not None  # a method passes both ends
        w, u = self.moved(float(ta), float(tb), return_U)
        none = torch.zeros((), dtype=w.dtype, device=w.device)
        match return_U, return_A:
            case False, False:
                return w
            case True, False:
                return w, u
            case False, True:
                return w, none
        return w, u, none

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.streams.seed}, shape={tuple(self.shape)})"

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
        return torch.Size((len(self.streams), self.size))


class _Increments(_Motion):
    def __init__(self, streams: Streams, size: int, dtype: torch.dtype) -> None:
        super().__init__(streams, size, dtype)
        self.draws = 0

    def moved(self, s: float, t: float, integral: bool) -> tuple[Tensor, Tensor]:
        h = t - s
        w = math.sqrt(h) * self._normal()
        return (w, h * (0.5 * w + math.sqrt(h / 12) * self._normal())) if integral else (w, w)

    def _normal(self) -> Tensor:
        self.draws += 1
        return self.streams.normal((self.size,), Purpose.DIFFUSION, self.draws - 1, self._dtype)


class _AlongPath(_Motion):
    def __init__(self, streams: Streams, size: int, dtype: torch.dtype, depth: int) -> None:
        super().__init__(streams, size, dtype)
        self.path = BrownianPath(streams, size, dtype, depth)

    def moved(self, s: float, t: float, integral: bool) -> tuple[Tensor, Tensor]:
        return self.path.with_integral(s, t)


class _Theirs(_Motion):
    def __init__(self, streams: Streams, size: int, dtype: torch.dtype, tree: bool) -> None:
        super().__init__(streams, size, dtype)
        self.interval = torchsde.BrownianInterval(
            t0=0.0,
            t1=1.0,
            size=self.shape,
            dtype=dtype,
            device=self.device,
            entropy=streams.seed,
            tol=1e-6 if tree else 0.0,
            halfway_tree=tree,
            # For every method, so all of them follow the same path. The area between components,
            # one number per pair of components, is never computed.
            levy_area_approximation="space-time",
        )

    def moved(self, s: float, t: float, integral: bool) -> tuple[Tensor, Tensor]:
        return self.interval(s, t, return_U=True)


@dataclass(frozen=True)
class SDESolver:
    """Solves dy = v(t, y) dt + g(t) dw for increasing time by torchsde.

    Arguments:
        steps: The number of steps, positive. An adaptive solution uses it to set the size of the
            first step.
        method: One of ``euler``, ``milstein``, ``euler_heun``, ``heun``, ``midpoint``,
            ``log_ode``, ``reversible_heun`` (strong order 1 for additive noise), or ``srk`` (1.5).
        motion: The Brownian motion.
        adaptive: Whether the step size is adapted by comparing each step with two half steps. It
            is shared by the whole batch.
        rtol: The relative tolerance of an adaptive step, positive.
        atol: The absolute tolerance of an adaptive step, positive.
        dt_min: The shortest adaptive step, positive.

    Raises:
        InputError: If an argument is out of range, or ``adaptive`` is combined with
            :class:`Increments`, which are drawn only once.
    """

    steps: int = 1000
    method: str = "euler"
    motion: Motion = field(default_factory=Increments)
    adaptive: bool = False
    rtol: float = 1e-2
    atol: float = 1e-2
    dt_min: float = 1e-6

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        if self.method not in _ITO + _STRATONOVICH:
            raise InputError(
                f"method must be one of {', '.join(_ITO + _STRATONOVICH)}, got {self.method!r}."
            )
        if not isinstance(self.motion, Motion):
            raise InputError(f"motion must be a Motion such as Path(), got {self.motion}.")
        if self.adaptive and isinstance(self.motion, Increments):
            raise InputError(
                "adaptive=True and motion=Increments() cannot be combined: adaptive steps request "
                "the same times repeatedly; use motion=Path()."
            )
        if not (0 < self.rtol < math.inf and 0 < self.atol < math.inf):
            raise InputError(
                f"rtol and atol must be positive and finite, got {self.rtol} and {self.atol}."
            )
        if not 0 < self.dt_min < math.inf:
            raise InputError(
                f"dt_min must be positive and finite, got {self.dt_min}; the default is 1e-6."
            )

    def __call__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: Callable[[Tensor], Tensor],
        x: Tensor,
        end: float,
        streams: Streams,
    ) -> Tensor:
        """Integrates states ``(B, *)`` from time 0 to ``end``, at most 1, and returns the last.

        Arguments:
            drift: Function of a time, float64 ``()``, and states that returns v; called once per
                point.
            diffusion: Function of a time that returns g, ``()``.
            x: The states at time 0.
            end: The time to reach, in (0, 1].
            streams: One random stream per example.

        Raises:
            SolverError: If an adaptive step is not finite, or falls below ``dt_min``.
        """
        kind = _Diagonal if self.method == "reversible_heun" else _Additive
        calculus = "ito" if self.method in _ITO else "stratonovich"
        system = kind(drift, diffusion, x.shape, calculus)
        motion = self.motion.start(streams, x.shape[1:].numel(), x.dtype)
        with _untouched(x.device), warnings.catch_warnings():
            warnings.filterwarnings("error", "Hitting minimum allowed step size")
            try:
                return self._solve(system, x.flatten(1), end, motion).reshape(x.shape)
            except (UserWarning, AssertionError) as error:
                cause = "is not finite" if "nans" in str(error) else f"fell below {self.dt_min}"
                raise SolverError(
                    f"An adaptive step of {self.method} {cause} near {system.time:.6g}; check the "
                    f"model, or use a larger eps or tolerance (rtol={self.rtol}, "
                    f"atol={self.atol})."
                ) from error

    def _solve(
        self, system: "_System", x: Tensor, end: float, motion: torchsde.BaseBrownian
    ) -> Tensor:
        return torchsde.sdeint(
            system,
            x,
            # On the CPU, where they are read.
            torch.tensor([0.0, end], dtype=torch.float64, device="cpu"),
            bm=motion,
            method=self.method,
            # Slightly larger, so rounding never leaves a remainder that needs another step.
            dt=end / self.steps * (1 + _HAIR),
            adaptive=self.adaptive,
            rtol=self.rtol,
            atol=self.atol,
            dt_min=self.dt_min,
        )[-1]


def _untouched(device: torch.device) -> AbstractContextManager[None]:
    """Restores torch's generators, from which torchsde draws numbers to check shapes."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


class _System:
    """The equation in torchsde's interface, with flat states."""

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
        self.time = 0.0  # of the last call
        self.known: list[tuple[float, Tensor, Tensor]] = []

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Returns the drift; cached, since torchsde requests it repeatedly at the same point."""
        self.time = float(t)
        for known in self.known:
            if known[0] == self.time and known[1] is y:
                break
        else:
            known = (self.time, y, self.drift(t, y.reshape(self.shape)).flatten(1))
        others = [other for other in self.known if other is not known]
        self.known = [*others[-_REMEMBERED:], known]
        return known[2]


class _Additive(_System):
    noise_type = "additive"

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.diffusion(t).to(v) * v


class _Diagonal(_System):
    """Additive noise declared as diagonal, for methods that would otherwise require a matrix."""

    noise_type = "diagonal"

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.diffusion(t).to(y).expand_as(y)
