r"""Models of a bridge: the denoised estimate, given the state and perhaps the source.

A network D is trained on :math:`\lVert D - x_0 \rVert^2`, so it learns a conditional mean, which
depends on the network's input:

- with the state alone, :math:`E[x_0 \mid x_t]`: the sampler ends near the law of the data, but its
  draws are not draws of :math:`p(x_0 \mid y)`;
- with the state and the source, :math:`E[x_0 \mid x_t, y]`: if the bridge adds noise, the limit of
  many steps is :math:`p(x_0 \mid y)`.

At t = 1 both are :math:`E[x_0 \mid y]`, the estimate with the least squared error.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.model.base import Model
from scoresde.nn.embedding import takes
from scoresde.passes import count_pass
from scoresde.recipe import describable
from scoresde.sde import Bridge, as_time, check_source
from scoresde.shapes import check_output, expand

_TURNS = 4.0  # the range of the label, as wide as that of a noise level


class Output(ABC):
    r"""Base class for the output F of a bridge's network, with :math:`D = a x + b F`."""

    @abstractmethod
    def to_data(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a and b on the bridge's clock ``w``, with its shape."""


@dataclass(frozen=True)
class DataOutput(Output):
    r"""The network returns the data: :math:`D = F`."""

    def to_data(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(w), torch.ones_like(w)


@dataclass(frozen=True)
class ResidualOutput(Output):
    r"""The network returns a scaled residual: :math:`D = x_t + w F`, exact at t = 0."""

    def to_data(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(w), w


@describable
class BridgeModel(Model):
    r"""A network plus a bridge.

    The network sees the source y if it takes the condition ``source``: an image for a ``UNet``
    (``conditions={"source": shape}``), a vector for an ``MLP``. Its time label is 4 t.

    Arguments:
        network: A callable ``network(x, c, **cond)`` from states ``(B, *)`` and labels ``(B,)`` to
            an output of the shape of the data.
        process: The bridge.
        output: Meaning of the network's output; :class:`ResidualOutput` by default.

    Raises:
        InputError: If the process is not a bridge.

    Example:
        >>> from scoresde.sde import InDI
        >>> model = BridgeModel(lambda x, c: 0 * x, InDI())
        >>> model.denoise(torch.ones(4, 2), 0.1, source=torch.ones(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        process: Bridge,
        output: Output | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(process, Bridge):
            raise InputError(
                f"process must be a Bridge such as InDI() or I2SB(), got {type(process).__name__}."
            )
        self.network = network
        self._process = process
        self.output = output or ResidualOutput()

    @property
    def process(self) -> Bridge:
        """The bridge."""
        return self._process

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one example, if the network has an attribute ``shape``; else None."""
        shape = getattr(self.network, "shape", None)
        return None if shape is None else tuple(shape)

    @property
    def sees_source(self) -> bool:
        """True if the network takes the condition ``source``."""
        return takes(self.network, "source")

    def takes(self, name: str) -> bool:
        """Returns whether it takes a condition. It always takes the source, where paths start."""
        return name == "source" or takes(self.network, name)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`E[x_0 \mid x_t]`, given the source too if the network takes it."""
        t = as_time(t)
        if self.sees_source:
            check_source(cond, x)
        else:
            cond = {name: value for name, value in cond.items() if name != "source"}
        dtype = x.dtype if self._float() is None else self.dtype
        label = (_TURNS * t).to(x.device, torch.promote_types(torch.float32, dtype))
        count_pass(len(x))
        output = check_output(self.network(x.to(dtype), label.expand(len(x)), **cond))
        if output.shape != x.shape:
            raise InputError(
                f"network must return the shape of its input, {tuple(x.shape)}, got "
                f"{tuple(output.shape)}."
            )
        a, b = self.output.to_data(self._process.clock(t))
        return expand(a, x) * x + expand(b, x) * output.to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the velocity, from one network evaluation; see :func:`bridge_velocity`."""
        source = cond["source"] if self.sees_source and "source" in cond else None
        return bridge_velocity(self._process, x, t, self.denoise(x, t, **cond), source)


def bridge_velocity(
    process: Bridge, x: Tensor, t: Tensor, data: Tensor, source: Tensor | None
) -> Tensor:
    r"""Returns :math:`E[d x_t / dt]` from a denoised estimate D.

    .. math:: u = w' \frac{x - D}{w} \quad (\nu / w \text{ constant}), \qquad
              u = w' (y - D) + \frac{\nu \nu'}{\nu^2} \bigl(x - (1 - w) D - w y\bigr)

    where a prime is a derivative in time, and the second form requires a D that is conditioned
    on the source y.

    Arguments:
        process: The bridge.
        x: States, with shape ``(B, *)``.
        t: Times in (0, 1], with shape ``()`` or ``(B,)``.
        data: The denoised estimate, with the shape of ``x``.
        source: The source if D is conditioned on it, else None.

    Raises:
        InputError: If the bridge's noise requires a D conditioned on the source, and ``source`` is
            None.
    """
    t = as_time(t)
    rate, w = process.sigma_dot(t), process.clock(t)
    if adds_nothing(process):
        return expand(rate / w, x) * (x - data)
    if source is None:
        raise InputError(
            f"The velocity of {process} requires a network conditioned on the source, because its "
            "std(t) / t is not constant; build the network with conditions={'source': shape}, "
            "or use Constant(...) noise."
        )
    variance = process.gamma(t) ** 2
    share = torch.where(variance > 0, process.gamma_rate(t) / variance.clamp(min=1e-300), 0.0)
    left = x - expand(process.alpha(t), x) * data - expand(w, x) * source
    return expand(rate, x) * (source - data) + expand(share, x) * left


def adds_nothing(process: Bridge) -> bool:
    """Returns whether a bridge adds no noise; its steps are then Euler steps of a flow."""
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    return not bool((process.step(times[1:], times[:-1]).noise > 0).any())
