"""A network plus an SDE."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.model.base import ScoreFunction
from scoresde.model.noise_label import NoiseLabel, NoiseLevel
from scoresde.model.parametrisation import Pair, Parametrisation, Preconditioned
from scoresde.nn.embedding import takes
from scoresde.passes import count_pass
from scoresde.recipe import accepts_moved, describable
from scoresde.sde import SDE, as_time
from scoresde.shapes import check_output, expand


@accepts_moved
@describable
class ScoreModel(ScoreFunction):
    """A network plus an SDE.

    Arguments:
        network: A callable ``network(x, c, **cond)`` from data ``(B, *)`` and labels ``(B,)`` to
            an output of the shape of the data. It receives those conditions of a data set that are
            among its arguments (all of them for ``**cond``) or those of a ``Conditioning`` in it.
            It may have a second head: an output with twice the channels, whose second half is for
            a learned variance (:meth:`predict`).
        sde: The forward process.
        parametrisation: Meaning of the network's output; :class:`Preconditioned` by default.
        noise_label: The number by which the network is conditioned on the time;
            :class:`NoiseLevel` by default.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> model = ScoreModel(lambda x, c: 0 * x, VPSDE())
        >>> model.denoise(torch.ones(4, 2), t=0.1).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        sde: SDE,
        parametrisation: Parametrisation | None = None,
        noise_label: NoiseLabel | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sde, SDE):
            raise InputError(f"sde must be an SDE such as VPSDE(), got {type(sde).__name__}.")
        self.network = network
        self.sde = sde
        self.parametrisation = parametrisation or Preconditioned()
        self.noise_label = noise_label or NoiseLevel()
        if sde.zero_snr and not self.parametrisation.at_zero_snr:
            raise InputError(
                f"parametrisation must be defined where no signal is left, as at t = 1 of {sde}, "
                f"got {type(self.parametrisation).__name__}; use Preconditioned(), "
                "VelocityParametrisation(), VParametrisation() or DataParametrisation()."
            )

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        t = as_time(t)
        return self._read(self.parametrisation.at(self.sde, t).to_noise, x, t, cond)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        t = as_time(t)
        return self._read(self.parametrisation.at(self.sde, t).to_data, x, t, cond)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return -self.noise(x, t, **cond) / expand(self.sde.sigma(t), x)

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if self.parametrisation.by_rates:
            return self._velocity_by_rates(x, as_time(t), cond)
        return super().velocity(x, t, **cond)

    def predict(self, x: Tensor, t: Tensor, **cond: Tensor) -> "Prediction":
        """Returns all outputs of one network evaluation; arguments as for :meth:`noise`."""
        t = as_time(t)
        scales = self.sde.alpha(t), self.sde.sigma(t)
        output, head = self._run(x, t, scales, cond)
        here = self.parametrisation.at(self.sde, t)
        pairs = (reading(*scales) for reading in (here.to_noise, here.to_data))
        noise, data = (expand(a, x) * x + expand(b, x) * output for a, b in pairs)
        return Prediction(noise, data, head)

    def _velocity_by_rates(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        pair = self.parametrisation.to_velocity(self.sde, t)
        return self._read(lambda alpha, sigma: pair, x, t, cond)

    def takes(self, name: str) -> bool:
        return takes(self.network, name)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of one example, if the network has an attribute ``shape``; else None."""
        shape = getattr(self.network, "shape", None)
        return None if shape is None else tuple(shape)

    @property
    def data_std(self) -> float | None:
        """The standard deviation of the data that the parametrisation assumes."""
        return self.parametrisation.sigma_data

    def _read(
        self,
        reading: Callable[[Tensor, Tensor], Pair],
        x: Tensor,
        t: Tensor,
        cond: dict[str, Tensor],
    ) -> Tensor:
        """Calls the network and combines the output of its first head with its input."""
        scales = self.sde.alpha(t), self.sde.sigma(t)
        output, _ = self._run(x, t, scales, cond)
        a, b = reading(*scales)
        return expand(a, x) * x + expand(b, x) * output

    def _run(
        self, x: Tensor, t: Tensor, scales: Pair, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Calls the network; returns the outputs of its first head and of its second, if any."""
        scale = expand(self.parametrisation.scale_in(*scales), x)
        dtype = x.dtype if self._float() is None else self.dtype
        # The label keeps float32: bfloat16 would merge neighbouring times.
        c = self.noise_label(self.sde, t).to(x.device, torch.promote_types(torch.float32, dtype))
        count_pass(len(x))
        output = check_output(self.network((scale * x).to(dtype), c.expand(len(x)), **cond))
        _check_shape(output, x)
        if x.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
            raise InputError(
                "network must be differentiable in its input for a likelihood or a posterior, "
                "got an output without a gradient; remove torch.no_grad, detach or NumPy from it "
                "(add 0 * x to a constant)."
            )
        output = output.to(x.dtype)
        if output.shape == x.shape:
            return output, None
        mean, head = output.chunk(2, dim=1)
        return mean, head


@dataclass(frozen=True, eq=False)
class Prediction:
    """Outputs of one network evaluation at states ``(B, *)``.

    Arguments:
        noise: The predicted noise, with the shape of the states.
        data: The denoised estimate, with that shape.
        head: The output of the second head, with that shape; None for a network without one.
    """

    noise: Tensor
    data: Tensor
    head: Tensor | None


def _check_shape(output: Tensor, x: Tensor) -> None:
    two = x.ndim > 1 and output.shape == (len(x), 2 * x.shape[1], *x.shape[2:])
    if output.shape != x.shape and not two:
        raise InputError(
            f"network must return the shape of its input, {tuple(x.shape)}, or twice its channels "
            f"for a learned variance, got {tuple(output.shape)}."
        )
