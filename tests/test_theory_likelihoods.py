"""Formulas of docs/theory/likelihoods.md that no other test checks alone."""

import pytest
import torch

from scoresde import VPSDE, GaussianMixtureModel, Likelihood
from scoresde.likelihood import NoiseClock
from tests.theory import SDES, each, normal


@pytest.mark.parametrize("scale", [0.1, 2.0])
@each(SDES[:3])
def test_the_clock_is_the_arsinh_of_the_noise_level(sde, scale):
    """Its reading at given times, and dt / d tau with d log rho / d tau by autograd."""
    clock, times = NoiseClock(scale), torch.linspace(0.01, 0.9, 7, dtype=torch.float64)
    rho = sde.sigma(times) / sde.alpha(times)
    tau = torch.asinh(rho / scale)
    ours = torch.tensor([clock.of(sde, float(t)) for t in times], dtype=torch.float64)
    torch.testing.assert_close(ours, tau, rtol=1e-9, atol=1e-12)
    tau.requires_grad_()
    (growth,) = torch.autograd.grad(torch.log(scale * torch.sinh(tau)).sum(), tau)
    truth = 2 * (sde.sigma(times) / sde.g(times)) ** 2 * growth
    t, rate = clock.time(sde, tau.detach())
    torch.testing.assert_close(t, times, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rate, truth, rtol=1e-6, atol=0)


def test_the_error_is_the_spread_of_the_estimates():
    exact = GaussianMixtureModel([0.3, 0.7], normal(2, 6), [0.3, 0.5], VPSDE()).double()
    result = Likelihood(5, 1e-3, 1e-3)(exact, exact.sample(3, seed=0), seed=0)
    spread = (result.estimates - result.log_prob[:, None]).square().sum(1)
    torch.testing.assert_close(result.standard_error, (spread / (5 * 4)).sqrt())
    torch.testing.assert_close(result.estimates.mean(1), result.log_prob)
