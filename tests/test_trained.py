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
    ScoreModel,
    SubVPSDE,
)
from scoresde.data import two_moons
from scoresde.metrics import nats
from scoresde.nn import MLP
from scoresde.streams import Streams
from scoresde.times import LogNormalTimes
from scoresde.train import CosineRate, Training, train


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=lambda sde: type(sde).__name__)
def test_trained_moons_come_within_005_nats_of_the_entropy(sde: SDE, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = two_moons()
    trained = train(
        ScoreModel(MLP(2, width=128, depth=3), sde, Preconditioned(1.0)),
        data,
        DenoisingScoreMatching(EDMWeighting(1.0), LogNormalTimes()),
        Training(steps=1500, batch_size=256, rate=CosineRate(100), ema=0.99, tensorboard=False),
        functools.partial(torch.optim.Adam, lr=3e-3),
        tmp_path,
        progress=False,
    )
    x = data.batch("test", Streams.of(0, batch=len(data.test)))
    result = Likelihood(probes="exact", rtol=1e-4, atol=1e-4)(trained, x)
    # The mean of log p - log q over the data: the divergence from the truth, which is the excess
    # of the cross-entropy over the entropy, without the sampling noise that the two share.
    excess = nats(result.log_prob, data.shape, data.scale) + data.log_prob(data.test)
    assert -0.01 < float(excess.mean()) < 0.05
