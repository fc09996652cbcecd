"""What the tests of docs/theory/ share: processes, times and draws in float64."""

import pytest
import torch

from scoresde import VESDE, VPSDE, RectifiedFlow, SubVPSDE

SDES = [VPSDE(), SubVPSDE(), VESDE(0.01, 10.0), RectifiedFlow()]


def each(sdes):
    return pytest.mark.parametrize("sde", sdes, ids=lambda sde: type(sde).__name__)


each_sde = each(SDES)


def at(*t):
    return torch.tensor(t if len(t) > 1 else t[0], dtype=torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
