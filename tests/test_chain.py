"""The discrete chain of DDPM against its definition, its posterior, its loss and its sampler."""

import math
import re

import numpy as np
import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    ChainIndex,
    DenoisingScoreMatching,
    DiscreteVP,
    GaussianModel,
    InputError,
    NoiseParametrisation,
    ScoreModel,
    SubVPSDE,
)
from scoresde.sample import AncestralPredictor, PredictorCorrector
from scoresde.sde import CosineBetas, LinearBetas, ListedBetas
from scoresde.times import ChainTimes

CHAINS = [LinearBetas(), LinearBetas(steps=50), CosineBetas(), ListedBetas([0.1, 0.5, 0.02, 0.9])]
SDES = [VPSDE(), SubVPSDE(), VESDE(), DiscreteVP()]
each_chain = pytest.mark.parametrize(
    "betas", CHAINS, ids=["DDPM", "50 steps", "cosine", "irregular"]
)
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def at(t):
    return torch.tensor(t, dtype=torch.float64)


# --- The table -----------------------------------------------------------------------------------


def test_the_published_variances():
    betas = LinearBetas()()
    assert len(betas) == 1000
    assert betas[0] == pytest.approx(1e-4, rel=1e-15)
    assert betas[-1] == pytest.approx(0.02, rel=1e-15)
    assert np.diff(betas, 2) == pytest.approx(0, abs=1e-15)


def test_the_cosine_chain_follows_its_squared_cosine():
    steps, s = 1000, 0.008
    signal = np.cumprod(1 - CosineBetas()())
    t = (np.arange(steps) + 1) / steps
    truth = (np.cos((t + s) / (1 + s) * np.pi / 2) / np.cos(s / (1 + s) * np.pi / 2)) ** 2
    assert signal[:990] == pytest.approx(truth[:990], rel=1e-9)
    assert CosineBetas()().max() == 0.999


@each_chain
def test_the_sde_passes_through_every_level(betas):
    sde, table = DiscreteVP(betas), np.cumprod(1 - betas())
    t = sde.time_of_index(torch.arange(sde.steps))
    assert sde.alpha(t).numpy() == pytest.approx(np.sqrt(table), rel=1e-12)
    assert sde.sigma(t).numpy() == pytest.approx(np.sqrt(1 - table), rel=1e-12)
    assert sde.index(t).numpy() == pytest.approx(np.arange(sde.steps), abs=1e-9)


@each_chain
def test_a_transition_is_the_step_of_the_chain(betas):
    sde = DiscreteVP(betas)
    t = sde.time_of_index(torch.arange(sde.steps))
    a, tau = sde.transition(t[:-1], t[1:])
    assert (a**2).numpy() == pytest.approx(1 - betas()[1:], rel=1e-9)
    assert (tau**2).numpy() == pytest.approx(betas()[1:], rel=1e-9)


@each_chain
def test_the_rate_is_continuous_and_positive(betas):
    sde = DiscreteVP(betas)
    edges = sde.time_of_index(torch.arange(sde.steps - 1))
    rates = [sde.beta(edges + shift) for shift in (-1e-9, 1e-9)]
    torch.testing.assert_close(*rates, rtol=1e-4, atol=1e-4)
    assert bool((sde.beta(torch.linspace(1e-6, 1 - 1e-6, 9999).double()) > 0).all())


def test_it_is_not_the_continuous_sde_of_the_same_rates():
    """The figure that the documentation gives: 2.5 % of the std at t = 0.01."""
    ratio = VPSDE().sigma(at(0.01)) / DiscreteVP().sigma(at(0.01))
    assert float(ratio) == pytest.approx(1.025, abs=0.001)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: DiscreteVP(ListedBetas([0.1])),
        lambda: DiscreteVP(ListedBetas([0.1, 1.0])),
        lambda: DiscreteVP(ListedBetas([0.1, -0.1])),
        lambda: DiscreteVP([0.1, 0.2]),
        lambda: LinearBetas(0.1, 20.0, 20),
        lambda: LinearBetas(steps=0),
        lambda: CosineBetas(limit=1.0),
        lambda: AncestralPredictor(variance=1.5),
    ],
)
def test_what_is_no_chain_is_refused(bad):
    with pytest.raises(InputError):
        bad()


# --- The posterior -------------------------------------------------------------------------------


@each_sde
def test_the_posterior_is_bayes_rule(sde):
    """By completing the square in x_s: precision a^2/tau^2 + 1/sigma_s^2."""
    x, x0, s, t = normal(3, 2), normal(3, 2, seed=1), at(0.4), at(0.5)
    a, sigma_s = sde.alpha(t) / sde.alpha(s), sde.sigma(s)
    tau2 = sde.sigma(t) ** 2 - a**2 * sigma_s**2
    precision = a**2 / tau2 + 1 / sigma_s**2
    truth = (a * x / tau2 + sde.alpha(s) * x0 / sigma_s**2) / precision
    mean, std = sde.posterior(x, x0, t, s)
    torch.testing.assert_close(mean, truth, rtol=1e-9, atol=1e-9)
    assert float(std) == pytest.approx(float(precision**-0.5), rel=1e-9)


def test_the_posterior_is_that_of_the_published_equations():
    """Ho et al. 2020, equation 7, at i = 499."""
    sde, i = DiscreteVP(), 499
    beta, bars = LinearBetas()(), np.cumprod(1 - LinearBetas()())
    x, x0 = normal(3, 2), normal(3, 2, seed=1)
    times = sde.time_of_index(torch.tensor([i, i - 1]))
    mean, std = sde.posterior(x, x0, *times)
    tilde = (1 - bars[i - 1]) / (1 - bars[i]) * beta[i]
    of_x0 = math.sqrt(bars[i - 1]) * beta[i] / (1 - bars[i])
    of_x = math.sqrt(1 - beta[i]) * (1 - bars[i - 1]) / (1 - bars[i])
    torch.testing.assert_close(mean, of_x0 * x0 + of_x * x, rtol=1e-9, atol=1e-9)
    assert float(std) ** 2 == pytest.approx(tilde, rel=1e-9)


# --- Ancestral sampling --------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.0, 0.5, 1.0])
def test_ancestral_sampling_has_the_law_of_the_published_chain(variance):
    """For Gaussian data every step is affine, so that the variance of the samples is known.

    It is followed through the published update, x' = (x - beta/sigma noise)/sqrt(1-beta) + s z.
    """
    betas, std, n = LinearBetas(steps=100), 0.5, 20_000
    exact = GaussianModel(torch.zeros(1).double(), std, DiscreteVP(betas))
    sampler = PredictorCorrector(
        99, predictor=AncestralPredictor(variance), corrector=None, final_denoise=True
    )
    out = sampler(exact, shape=(n, 1), seed=0)
    beta, bars = betas(), np.cumprod(1 - betas())
    expected = 1.0
    for i in reversed(range(100)):
        gain = (1 - beta[i] / (bars[i] * std**2 + 1 - bars[i])) / math.sqrt(1 - beta[i])
        tilde = (1 - bars[i - 1]) / (1 - bars[i]) * beta[i]
        noise = tilde ** (1 - variance) * beta[i] ** variance if i else 0.0
        expected = gain**2 * expected + noise
    assert int(out.nfe[0]) == 100
    assert float(out.x.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / n))


# --- The loss ------------------------------------------------------------------------------------


def test_the_discrete_loss_is_the_published_one():
    """Equation 14 of Ho et al. 2020, with a network that shows what it is told."""
    seen = []

    def network(x, i):
        seen.append(i)
        return 0.1 * x + i.reshape(-1, 1) / 1000

    sde, x0, z = DiscreteVP(), normal(5, 3), normal(5, 3, seed=1)
    model = ScoreModel(network, sde, NoiseParametrisation(None), ChainIndex())
    index = torch.tensor([0, 9, 250, 500, 999])
    loss = DenoisingScoreMatching(times=ChainTimes())(model, x0, sde.time_of_index(index), z)
    bars = torch.from_numpy(np.cumprod(1 - LinearBetas()()))[index].unsqueeze(1)
    x = bars.sqrt() * x0 + (1 - bars).sqrt() * z
    truth = (0.1 * x + index.unsqueeze(1) / 1000 - z).square().mean(1)
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(seen[0], index.double(), rtol=0, atol=1e-3)


def test_chain_times_are_the_levels_and_all_equally_likely():
    sde = DiscreteVP(LinearBetas(steps=50))
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = ChainTimes().quantile(u, sde, eps=1 / 50)
    index, counts = sde.index(t).round().long().unique(return_counts=True)
    assert index.tolist() == list(range(50))
    assert set(counts.tolist()) == {100}


@pytest.mark.parametrize("part", [ChainIndex(), lambda sde, t: ChainTimes().quantile(t, sde, 0.0)])
def test_parts_of_a_chain_refuse_a_continuous_sde(part):
    with pytest.raises(InputError, match=re.escape("DiscreteVP()")):
        part(VPSDE(), at(0.5))
