"""What a user might bring: a network, a data set and an SDE, each in a few lines."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import SDE
from scoresde.data import Dataset, make_splits


class MyNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.layers(torch.cat((x, c[:, None]), dim=1))


def my_data(count: int = 1000) -> Dataset:
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    return Dataset.of("my square", make_splits(x))


@dataclass(frozen=True)
class CosineSDE(SDE):
    """alpha = cos, sigma = sin: f, g, the log-SNR and its inverse follow from these two."""

    end: float = 1.5

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.end * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self.end * t)


@dataclass(frozen=True)
class PulsatingSDE(SDE):
    """Its noise falls again on the way, so that no sampler can walk back along it."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return 1.1 + torch.sin(12 * t)


class Wrapped(MyNet):
    """A network whose output is in an object, as those of diffusers are."""

    def forward(self, x: Tensor, c: Tensor) -> Any:
        return SimpleNamespace(sample=super().forward(x, c))
