"""Models and processes as a user would write them."""

import torch
from torch import Tensor, nn

from scoresde import SDE, ScoreFunction
from scoresde.model import Parametrisation
from scoresde.passes import count_pass
from scoresde.shapes import expand


class LearnedParametrisation(nn.Module, Parametrisation):
    r"""The network predicts the noise beyond a learned share of the state, :math:`w \sigma x + F`.

    It is asked by the names of its methods, and is no network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * sigma, torch.ones_like(sigma)

    def to_data(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.to_noise(alpha, sigma)
        return (1 - sigma * a) / alpha, -sigma * b / alpha


class Mean(ScoreFunction):
    """A model of two models: its noise is the mean of theirs."""

    def __init__(self, one: ScoreFunction, two: ScoreFunction) -> None:
        super().__init__()
        self.one, self.two, self.sde = one, two, one.sde

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return 0.5 * (self.one.noise(x, t, **cond) + self.two.noise(x, t, **cond))

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return 0.5 * (self.one.denoise(x, t, **cond) + self.two.denoise(x, t, **cond))

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return 0.5 * (self.one.score(x, t, **cond) + self.two.score(x, t, **cond))


class ByLabel(ScoreFunction):
    """Two exact Gaussians, N(0, wide^2) without a class and N(mean, narrow^2) for class 0."""

    def __init__(
        self, sde: SDE, mean: float = 1.0, narrow: float = 0.5, wide: float = 1.0
    ) -> None:
        super().__init__()
        self.sde, self.mean, self.variances = sde, mean, (wide**2, narrow**2)

    def takes(self, name: str) -> bool:
        return name == "label"

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        mean, own, alpha, variance, away = self._law(x, t, cond["label"])
        return mean + alpha * own / variance * away

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        _, _, _, variance, away = self._law(x, t, cond["label"])
        return expand(self.sde.sigma(t), x) * away / variance

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        _, _, _, variance, away = self._law(x, t, cond["label"])
        return -away / variance

    def _law(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        count_pass(len(x))
        mean = expand(torch.where(label < 0, 0.0, self.mean).to(x), x)
        own = expand(torch.where(label < 0, *self.variances).to(x), x)
        alpha, sigma = expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x)
        return mean, own, alpha, alpha**2 * own + sigma**2, x - alpha * mean
