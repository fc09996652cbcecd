"""A model trained for half a minute knows the density of two moons."""

import functools
from pathlib import Path

import pytest
import torch

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    DenoisingScoreMatching,
    EDMWeighting,
    Likelihood,
    Preconditioned,
    ScoreFunction,
    ScoreModel,
    SubVPSDE,
)
from scoresde.data import Dataset, two_moons
from scoresde.metrics import nats
from scoresde.nn import MLP
from scoresde.streams import Streams
from scoresde.times import LogNormalTimes
from scoresde.train import CosineRate, Training, train


def trained_moons(sde: SDE, data: Dataset, folder: Path, steps: int, width: int) -> ScoreFunction:
    torch.manual_seed(0)
    return train(
        ScoreModel(MLP(2, width=width, depth=3), sde, Preconditioned(1.0)),
        data,
        DenoisingScoreMatching(EDMWeighting(1.0), LogNormalTimes()),
        Training(steps, batch_size=256, rate=CosineRate(100), ema=0.99),
        functools.partial(torch.optim.Adam, lr=3e-3),
        folder,
        progress=False,
    )


@pytest.mark.parametrize(
    "sde",
    [
        VPSDE(),
        pytest.param(SubVPSDE(), marks=pytest.mark.slow),
        pytest.param(VESDE(), marks=pytest.mark.slow),
    ],
    ids=lambda sde: type(sde).__name__,
)
def test_trained_moons_come_within_005_nats_of_the_entropy(sde: SDE, tmp_path: Path) -> None:
    data = two_moons()
    trained = trained_moons(sde, data, tmp_path, steps=1500, width=128)
    x = data.batch("test", Streams.of(0, batch=len(data.test))).x
    result = Likelihood(probes="exact", rtol=1e-4, atol=1e-4)(trained, x)
    # The mean of log p - log q over the data: the divergence from the truth, which is the excess
    # of the cross-entropy over the entropy, without the sampling noise that the two share.
    excess = nats(result.log_prob, data.shape, data.scale) + data.log_prob(data.test)
    assert -0.01 < float(excess.mean()) < 0.05


def test_the_density_of_a_trained_network_integrates_to_one(tmp_path: Path) -> None:
    """By the trapezium rule on a grid that the density's edges do not reach."""
    trained = trained_moons(VPSDE(), two_moons(), tmp_path, steps=300, width=64)
    points = torch.linspace(-4, 4, 97)
    grid = torch.cartesian_prod(points, points)
    result = Likelihood("exact", rtol=1e-3, atol=1e-3)(trained, grid)
    total = float(result.log_prob.double().exp().sum() * (points[1] - points[0]) ** 2)
    assert total == pytest.approx(1, abs=1e-2)
