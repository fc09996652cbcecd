"""Weights of the loss against the formulas written out, and against the Kullback-Leibler terms."""

import math

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    DenoisingScoreMatching,
    DiscreteVP,
    GaussianModel,
    InputError,
    LikelihoodWeighting,
    RectifiedFlow,
)
from scoresde.loss import BoundWeighting, MinSNRWeighting, SoftMinSNRWeighting
from scoresde.sde import CosineBetas

CHAIN = DiscreteVP()
PROCESSES = [VPSDE(), VESDE(), RectifiedFlow(), CHAIN, DiscreteVP(CosineBetas())]

each_process = pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)


def times(count=50):
    return torch.linspace(0.02, 0.99, count, dtype=torch.float64)


def snr(sde, t):
    return (sde.alpha(t) / sde.sigma(t)) ** 2


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def chain_of(sde, i):
    """The variances of Ho et al. at the steps i >= 1, counted from 0."""
    bars = torch.from_numpy((1 - sde.betas()).cumprod())
    return torch.from_numpy(sde.betas())[i], bars[i], bars[i - 1]


# --- min-SNR -------------------------------------------------------------------------------------


@each_process
def test_min_snr_weighs_the_data_by_the_smaller_of_the_two(sde):
    t, ratio = times(), snr(sde, times())
    equal(MinSNRWeighting(5.0).of_data(sde, t), ratio.clamp(max=5.0))
    equal(MinSNRWeighting(5.0)(sde, t), ratio.clamp(max=5.0) / ratio)
    equal(SoftMinSNRWeighting(4.0).of_data(sde, t), 4 * ratio / (ratio + 4))
    equal(SoftMinSNRWeighting(4.0)(sde, t), 4 / (ratio + 4))


def test_the_soft_weight_is_that_of_the_standard_deviation_of_the_data():
    t = times()
    relative = VESDE().sigma(t)
    equal(SoftMinSNRWeighting(1 / 0.5**2).of_data(VESDE(), t), 1 / (relative**2 + 0.5**2))


def test_weights_are_finite_where_no_signal_is_left():
    for weighting in (MinSNRWeighting(), SoftMinSNRWeighting()):
        assert float(weighting(RectifiedFlow(), torch.tensor(1.0))) == 1


def test_the_loss_weighs_the_error_of_the_data():
    """One model off by 0.1, whose error in both units is known."""
    sde, x = VPSDE(), torch.zeros(4, 3, dtype=torch.float64)
    exact = GaussianModel(mean=torch.zeros(3, dtype=torch.float64), std=0.5, sde=sde)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    noise = torch.ones_like(x)
    state = sde.perturb(x, t, noise)
    data = (exact.denoise(state, t) - x).square().mean(1)
    loss = DenoisingScoreMatching(MinSNRWeighting())
    expected = snr(sde, t).clamp(max=5.0) * data
    torch.testing.assert_close(loss(exact, x, t, noise), expected, rtol=1e-10, atol=0)


# --- The bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [CHAIN, DiscreteVP(CosineBetas())], ids=["linear", "cosine"])
def test_the_weights_of_the_bound_are_those_of_ho(sde):
    """Equation 8 with the posterior's variance, in their letters."""
    i = torch.arange(1, sde.steps - 1)  # the last cosine step is clipped: a ratio of 1e-3
    beta, bar, before = chain_of(sde, i)
    posterior = beta * (1 - before) / (1 - bar)
    of_data = beta**2 * before / (2 * posterior * (1 - bar) ** 2)
    t = sde.time_of_index(i)
    halves = 0.5 * (before / (1 - before) - bar / (1 - bar))
    torch.testing.assert_close(of_data, halves, rtol=1e-9, atol=0)
    torch.testing.assert_close(BoundWeighting().of_data(sde, t), halves, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        BoundWeighting()(sde, t), halves * (1 - bar) / bar, rtol=1e-9, atol=0
    )


@each_process
def test_one_step_is_half_the_difference_of_the_ratios(sde):
    t = torch.arange(2, 40, dtype=torch.float64) / 40
    s = t - 1 / 40
    weighting, change = BoundWeighting(40), sde.log_snr(s) - sde.log_snr(t)
    equal(weighting(sde, t[:-1]), 0.5 * torch.expm1(change)[:-1])
    equal(weighting.of_data(sde, t), 0.5 * (snr(sde, s) - snr(sde, t)))


def test_a_step_of_the_bound_is_the_divergence_of_two_gaussians():
    """The weight times the error is KL(q(x_s | x_t, x_0) || p(x_s | x_t)), in nats."""
    x, noise = torch.randn(
        2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    exact = GaussianModel(mean=torch.zeros(3, dtype=torch.float64), std=0.5, sde=CHAIN)
    t = CHAIN.time_of_index(torch.tensor([1, 2, 10, 100, 500, 999]))
    state, s = CHAIN.perturb(x, t, noise), t - 1 / CHAIN.steps
    own, std = CHAIN.posterior(state, x, t, s)
    model, _ = CHAIN.posterior(state, exact.denoise(state, t), t, s)
    divergence = 0.5 * ((own - model) / std).square().sum(1)
    error = (exact.noise(state, t) - noise).square().sum(1)
    torch.testing.assert_close(BoundWeighting()(CHAIN, t) * error, divergence, rtol=1e-8, atol=0)
    data = (exact.denoise(state, t) - x).square().sum(1)
    weight = BoundWeighting().of_data(CHAIN, t)
    torch.testing.assert_close(weight * data, divergence, rtol=1e-8, atol=0)


def test_many_steps_are_half_the_likelihood_weighting():
    t = times()
    for steps, bar in ((1000, 0.1), (100_000, 1e-3)):
        found = steps * BoundWeighting(steps)(VPSDE(), t)
        torch.testing.assert_close(
            found, 0.5 * LikelihoodWeighting()(VPSDE(), t), rtol=bar, atol=0
        )


def test_the_first_step_has_no_weight_where_the_founding_sum_has_an_infinite_one():
    first = CHAIN.time_of_index(torch.tensor(0))
    assert math.isinf(float(CHAIN.log_snr(torch.zeros(()))))
    assert float(BoundWeighting()(CHAIN, first)) == 0
    assert float(BoundWeighting().of_data(CHAIN, first)) == 0


def test_the_founding_variance_is_half_the_posterior_at_small_times():
    """Bayes' rule on two Gaussians, and the form with the root, at the second step."""
    beta, bar, before = chain_of(CHAIN, torch.tensor(1))
    right = 1 / ((1 - beta) / beta + 1 / (1 - before))
    founding = beta * (1 - before.sqrt()) / (1 - bar)
    torch.testing.assert_close(beta * (1 - before) / (1 - bar), right, rtol=1e-9, atol=0)
    assert float(founding / right) == pytest.approx(0.5, abs=1e-4)
    t = CHAIN.time_of_index(torch.tensor(1))
    _, std = CHAIN.posterior(torch.zeros(1, 1).double(), torch.zeros(1, 1).double(), t, t - 1e-3)
    assert float(std) ** 2 == pytest.approx(float(right), rel=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MinSNRWeighting(0.0), r"gamma .*0\.0"),
        (lambda: SoftMinSNRWeighting(math.inf), "gamma .*inf"),
        (lambda: BoundWeighting(1), r"steps .*\b1\b"),
        (lambda: BoundWeighting()(VPSDE(), times()), "steps .*VPSDE.*BoundWeighting"),
    ],
)
def test_what_is_no_weight_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
