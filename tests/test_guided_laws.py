"""What guidance samples: Gaussians, for which the law of a guided sampler is known.

Without a class the data are N(0, 1), of the class N(1, 1/4). The guided flow and the guided SDE
are then linear, and their laws follow from ordinary differential equations for two moments. The
numbers of the tables are the solutions from the sampler's prior to its cut-off.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

from scoresde import VESDE, VPSDE, Likelihood, RectifiedFlow, SubVPSDE
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.sample import DDIM, EulerMaruyama, Heun, ProbabilityFlow
from scoresde.times import LogSNRGrid
from tests.models import ByLabel

SCALES = (0.5, 1.5, 2.0, 3.0)
# By the SDE and the sampler: means and variances for the four scales.
LAWS = {
    "VPSDE": {
        "ODE": (
            (0.610587, 1.234941, 1.376901, 1.497617),
            (0.500091, 0.125068, 0.062545, 0.015642),
        ),
        "SDE": (
            (0.666583, 1.166640, 1.250008, 1.312550),
            (0.462191, 0.156312, 0.109421, 0.066631),
        ),
    },
    "SubVPSDE": {
        "ODE": (
            (0.610613, 1.234898, 1.376811, 1.497453),
            (0.499975, 0.124998, 0.062500, 0.015625),
        ),
        "SDE": (
            (0.666619, 1.166594, 1.249926, 1.312426),
            (0.462047, 0.156233, 0.109363, 0.066594),
        ),
    },
    "VESDE": {
        "ODE": (
            (0.605875, 1.227882, 1.370253, 1.492646),
            (0.500000, 0.125075, 0.062556, 0.015648),
        ),
        "SDE": (
            (0.666533, 1.166633, 1.250025, 1.312594),
            (0.462229, 0.156322, 0.109428, 0.066635),
        ),
    },
    # That of data without noise, from an infinite noise level on.
    "Rectified": {
        "ODE": ((0.6129703, 1.2384508, 1.3801730, 1.5), (0.5, 0.125, 0.0625, 0.015625)),
        "SDE": ((2 / 3, 7 / 6, 1.25, 1.3125), (0.4620981, 0.15625, 0.109375, 0.0666016)),
    },
}
INTERVAL = (0.2, 5.0)
WITHIN = {"ODE": (1.3298138, 0.0717822), "SDE": (1.2376238, 0.1319456)}  # scale 2, rectified
SDES = [VPSDE(), SubVPSDE(), VESDE(), RectifiedFlow()]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def law_of(sde, kind):
    """Means and variances for the scales, float64 (4,) each."""
    if not isinstance(sde, RectifiedFlow):
        return (torch.tensor(values).double() for values in LAWS[type(sde).__name__][kind])
    means, variances = (torch.tensor(values).double() for values in LAWS["Rectified"][kind])
    left = 1 - sde.cutoffs.sampling
    return left * means, left**2 * variances


def guided(sde, scale, interval=None):
    return ClassifierFreeGuidance(ByLabel(sde), scale, interval)


def of_class(n):
    return torch.zeros(n, dtype=torch.int64)


def flow_map(sampler, model, count):
    """The law of a linear flow, by its map of two latents: mean and std, (count,) each."""
    start = model.sde.prior_std * torch.tensor([0.0, 1.0]).double().repeat(count)[:, None]
    x = sampler(model, latent=start, label=of_class(2 * count)).x.reshape(count, 2)
    return x[:, 0], x[:, 1] - x[:, 0]


def moments(sde, scale, ends, interval=(0.0, math.inf)):
    """Mean and std of the guided flow, by an equation in the log of N = (sigma / alpha)^2.

    With y = x / alpha it is dy / d log N = (y - D) / 2 for every SDE.
    """
    end, start = (-float(sde.log_snr(torch.tensor(t, dtype=torch.float64))) for t in ends)
    alpha = [float(sde.alpha(torch.tensor(t, dtype=torch.float64))) for t in ends]
    inside = [2 * math.log(level) for level in interval if 0 < level < math.inf]
    state = [0.0, sde.prior_std / alpha[1]]
    for high, low in pairwise([start, *reversed(inside), end]):
        level = math.exp(0.25 * (high + low))
        w = scale if interval[0] < level < interval[1] else 1.0

        def slope(u, state, w=w):
            noise, (mean, std) = math.exp(u), state
            gain = (1 - w) / (1 + noise) + w * 0.25 / (0.25 + noise)
            shift = w * noise / (0.25 + noise)
            return [0.5 * (mean - gain * mean - shift), 0.5 * (std - gain * std)]

        found = solve_ivp(slope, (high, low), state, rtol=1e-11, atol=1e-13)
        state = found.y[:, -1]
    return alpha[0] * state[0], alpha[0] * state[1]


@each_sde
def test_the_guided_flow_has_its_gaussian_law(sde):
    """The four scales in one batch; the tables hold to their last digit."""
    scales = torch.tensor(SCALES).double().repeat_interleave(2)
    mean, std = flow_map(ProbabilityFlow(1e-8, 1e-8), guided(sde, scales), 4)
    means, variances = law_of(sde, "ODE")
    torch.testing.assert_close(mean, means, rtol=0, atol=5e-6)
    torch.testing.assert_close(std**2, variances, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=lambda sde: type(sde).__name__)
def test_the_tables_are_those_of_the_equation(sde):
    ends = (sde.cutoffs.sampling, 1.0)
    found = torch.tensor([moments(sde, w, ends) for w in SCALES])
    means, variances = law_of(sde, "ODE")
    torch.testing.assert_close(found[:, 0], means, rtol=0, atol=2e-6)
    torch.testing.assert_close(found[:, 1] ** 2, variances, rtol=0, atol=2e-6)


def check_draws(sde, n, sampler):
    """The guided SDE's means within 4 standard errors, variances within 4 % or as many errors."""
    model = guided(sde, torch.tensor(SCALES).double().repeat(n))
    x = sampler(model, (4 * n, 1), seed=0, label=of_class(4 * n)).x.double().reshape(n, 4)
    means, variances = law_of(sde, "SDE")
    assert float(((x.mean(0) - means) / (variances / n).sqrt()).abs().max()) < 4
    bound = max(0.04, 4 * (2 / n) ** 0.5)
    assert float((x.var(0) / variances - 1).abs().max()) < bound


@pytest.mark.parametrize("sde", [VPSDE(), RectifiedFlow()], ids=lambda sde: type(sde).__name__)
def test_the_guided_sde_has_its_gaussian_law(sde):
    check_draws(sde, 5000, EulerMaruyama(1000))


@pytest.mark.slow
@each_sde
def test_the_guided_sde_has_its_gaussian_law_in_20_000_draws(sde):
    check_draws(sde, 20_000, EulerMaruyama(1000))


def test_an_interval_has_its_law():
    """With the adaptive solver, which finds the ends of the interval by its error."""
    sde = RectifiedFlow()
    mean, std = flow_map(ProbabilityFlow(1e-8, 1e-8), guided(sde, 2.0, INTERVAL), 1)
    left = 1 - sde.cutoffs.sampling
    expected = left * WITHIN["ODE"][0], left**2 * WITHIN["ODE"][1]
    assert (float(mean), float(std**2)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_an_adaptive_solve_of_an_interval_keeps_to_its_tolerance(tolerance, sde):
    mean, std = flow_map(ProbabilityFlow(tolerance, tolerance), guided(sde, 3.0, INTERVAL), 1)
    expected = moments(sde, 3.0, (sde.cutoffs.sampling, 1.0), INTERVAL)
    assert (float(mean), float(std)) == pytest.approx(expected, abs=5 * tolerance)


def test_an_interval_of_the_sde_has_its_law():
    n, sde = 20_000, RectifiedFlow()
    x = EulerMaruyama(1000)(guided(sde, 2.0, INTERVAL), (n, 1), seed=0, label=of_class(n)).x
    x, left = x.double(), 1 - sde.cutoffs.sampling
    mean, variance = left * WITHIN["SDE"][0], left**2 * WITHIN["SDE"][1]
    assert abs(float(x.mean()) - mean) < 4 * (variance / n) ** 0.5
    assert float(x.var()) == pytest.approx(variance, rel=0.04)


@pytest.mark.parametrize(
    "sampler", [DDIM(400, LogSNRGrid()), Heun(100, LogSNRGrid())], ids=lambda s: type(s).__name__
)
def test_samplers_on_a_grid_converge_to_the_guided_flow(sampler):
    mean, std = flow_map(sampler, guided(VPSDE(), 2.0), 1)
    means, variances = law_of(VPSDE(), "ODE")
    assert float(mean) == pytest.approx(float(means[2]), abs=0.01)
    assert float(std**2) == pytest.approx(float(variances[2]), rel=0.04)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_likelihood_under_guidance_is_that_of_the_guided_flow(scale):
    """On VE, whose likelihood starts at t = 0: the density of the flow's Gaussian there."""
    sde, x = VESDE(), torch.tensor([[-0.5], [0.3], [1.4], [2.0]]).double()
    found = Likelihood("exact", rtol=1e-9, atol=1e-9)(guided(sde, scale), x, label=of_class(4))
    mean, std = moments(sde, scale, (0.0, 1.0))
    expected = torch.distributions.Normal(mean, std).log_prob(x[:, 0])
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-6, atol=1e-6)
