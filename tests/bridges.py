"""A bridge as a user would write it: a process, its models, exact and learned, and a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde import InputError, Interpolant
from scoresde.loss import Given, Loss, LossTerms
from scoresde.model import Model
from scoresde.passes import count_pass
from scoresde.sde import as_time
from scoresde.shapes import expand
from scoresde.times import UniformTimes


@dataclass(frozen=True)
class Bridge(Interpolant):
    r"""From an example to another, the ``source``: :math:`(1 - t) x_0 + t x_1 + \gamma z`.

    Arguments:
        scale: The scale :math:`s` of the noise between, :math:`\gamma = s \sqrt{t (1 - t)}`.
    """

    scale: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor) -> Tensor:
        return as_time(t).clone()

    def gamma(self, t: Tensor) -> Tensor:
        t = as_time(t)
        return self.scale * torch.sqrt(t * (1 - t))

    def gamma_rate(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\gamma' \gamma`: finite at both ends, where :math:`\gamma'` is not."""
        return self.scale**2 * (0.5 - as_time(t))

    def start(self, noise: Tensor, temperature: float = 1.0, **cond: Tensor) -> Tensor:
        if "source" not in cond:
            raise InputError("A bridge starts from source; give source=.")
        return cond["source"].to(noise)


class GaussianPairs(Model):
    r"""The exact model of jointly Gaussian pairs, which does not look at where a path began.

    With :math:`c_{it} = \mathrm{cov}(x_i, x_t)` and :math:`C_t = \mathrm{cov}(x_t)`,

    .. math:: E[x_i \mid x_t] = m_i + c_{it} C_t^{-1} (x_t - m_t), \qquad
              E[\gamma' z \mid x_t] = \gamma' \gamma \, C_t^{-1} (x_t - m_t) .

    Arguments:
        process: The bridge.
        means: The means of both ends, ``(2, d)``.
        covariances: The covariances of both ends with both, ``(2, 2, d, d)``.
    """

    def __init__(self, process: Bridge, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self._process = process
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)

    @property
    def process(self) -> Bridge:
        return self._process

    def weights(self, t: Tensor) -> Tensor:
        return torch.stack((1 - t, t), -1)

    def law(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the covariance at times of any shape."""
        w = self.weights(t)
        covariance = torch.einsum("...i,...j,ijab->...ab", w, w, self.covariances)
        noise = self.process.gamma(t)[..., None, None] ** 2 * torch.eye(self.means.shape[1])
        return w @ self.means, covariance + noise

    def _centred(self, x: Tensor, t: Tensor) -> Tensor:
        mean, covariance = self.law(t)
        return torch.linalg.solve(covariance, (x - mean)[..., None])[..., 0]

    def _end(self, i: int, x: Tensor, t: Tensor) -> Tensor:
        shared = torch.einsum("...j,jab->...ab", self.weights(t), self.covariances[i])
        return self.means[i] + (shared @ self._centred(x, t)[..., None])[..., 0]

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        count_pass(len(x))
        return self._end(0, x, as_time(t).to(x))

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        count_pass(len(x))
        t = as_time(t).to(x)
        noise = expand(self.process.gamma_rate(t), x) * self._centred(x, t)
        return self._end(1, x, t) - self._end(0, x, t) + noise


class Restorer(GaussianPairs):
    r"""The exact model given the source too, without noise: :math:`u = x_1 - E[x_0 | x_t, x_1]`.

    Before t = 1 the example can be told; at t = 1 nothing but the source is known.
    """

    def denoise(self, x: Tensor, t: Tensor, *, source: Tensor) -> Tensor:
        count_pass(len(x))
        t = expand(as_time(t).to(x), x)
        at_end = super()._end(0, source, torch.ones((), dtype=x.dtype))
        told = (x - t * source) / torch.where(t < 1, 1 - t, 1.0)
        return torch.where(t < 1, told, at_end)

    def velocity(self, x: Tensor, t: Tensor, *, source: Tensor) -> Tensor:
        return source - self.denoise(x, t, source=source)


class BridgeNetwork(Model):
    r"""A network :math:`D(x, t, x_1)` on a bridge.

    .. math:: u = x_1 - D + \gamma' \hat z, \qquad
              \hat z = (x - (1 - t) D - t x_1) / \gamma

    where the second part is stated for times in between.

    Arguments:
        network: Called with states, times, and the condition ``source``.
        process: The bridge.
    """

    def __init__(self, network: nn.Module, process: Bridge) -> None:
        super().__init__()
        self.network, self._process = network, process

    @property
    def process(self) -> Bridge:
        return self._process

    def denoise(self, x: Tensor, t: Tensor, *, source: Tensor) -> Tensor:
        count_pass(len(x))
        return self.network(x, as_time(t).to(x).expand(len(x)), source=source)

    def velocity(self, x: Tensor, t: Tensor, *, source: Tensor) -> Tensor:
        data = self.denoise(x, t, source=source)
        if self.process.scale == 0:
            return source - data
        t = expand(as_time(t).clamp(1e-3, 1 - 1e-3), x)
        rate = (0.5 - t) / (t * (1 - t))  # gamma' / gamma
        return source - data + rate * (x - (1 - t) * data - t * source)


@dataclass(frozen=True)
class Regression(Loss):
    r"""The squared error of the example, :math:`|D(x_t, t, x_1) - x_0|^2 / d`."""

    def evaluate(self, model: Model, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        process = model.process
        drawn = given.draw(process, x, UniformTimes(), self.first_time(process))
        state = process.interpolate(x, cond["source"], drawn.t, drawn.noise)
        error = (model.denoise(state, drawn.t, **cond) - x).square().flatten(1).mean(1)
        return LossTerms(error, {"early": error.detach() * (drawn.t < 0.5)})


class Degraded(Regression):
    """Where the source is the example made worse, the data alone are enough."""

    def evaluate(self, model: Model, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        return super().evaluate(model, x, given, **cond, source=0.5 * x + 1)
