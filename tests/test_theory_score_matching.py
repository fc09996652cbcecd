"""Formulas of docs/theory/score_matching.md, against finite sums, quadrature and autograd."""

import numpy as np
import pytest
import torch

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    EDMWeighting,
    GaussianModel,
    LikelihoodWeighting,
    NoiseWeighting,
    Preconditioned,
    ScoreFunction,
    ScoreModel,
)
from scoresde.times import ImportanceTimes, UniformTimes
from tests.theory import at, each_sde, normal


def pairs(count=32):
    """Data of N(0, 1) and noise on a grid, ``(count^2, 1)`` each, and the weights of a mean."""
    x, w = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(count))
    data, noise = (part.reshape(-1, 1) for part in torch.meshgrid(x, x, indexing="ij"))
    return data, noise, torch.outer(w, w).reshape(-1) / w.sum() ** 2


class Off(ScoreFunction):
    """The exact noise plus a function of the state."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.sde = exact, exact.sde

    def noise(self, x, t):
        return self.exact.noise(x, t) + 0.3 * x**2 - 0.1

    score = denoise = None


# --- Tweedie's formula, on a finite data set -----------------------------------------------------


@each_sde
def test_the_score_is_the_mean_of_the_kernels_scores(sde):
    """Of five points: the gradient of the log-density, and Bayes' weights of each point."""
    data, x, t = normal(5, 3), 0.7 * normal(4, 3, seed=1), at(0.35)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x = x * (alpha + sigma)
    kernel = torch.distributions.Normal(alpha * data, sigma)

    def log_density(y):
        return torch.logsumexp(kernel.log_prob(y).sum(1), 0)

    score = torch.func.vmap(torch.func.grad(log_density))(x)
    weights = torch.softmax(kernel.log_prob(x[:, None]).sum(2), 1)
    noises = (x[:, None] - alpha * data) / sigma
    noise, denoised = torch.einsum("bk,bkd->bd", weights, noises), weights @ data
    torch.testing.assert_close(score, -noise / sigma)
    torch.testing.assert_close(denoised, (x + sigma**2 * score) / alpha)
    torch.testing.assert_close(alpha * denoised + sigma * noise, x)


@each_sde
def test_the_loss_is_its_least_value_plus_the_error_of_the_mean(sde):
    """E|z_hat - z|^2 = E|z_hat - E[z | x_t]|^2 + E var(z | x_t), by quadrature on N(0, s^2)."""
    std, t = 0.7, at(0.3)
    exact = GaussianModel(at(0.0)[None], std, sde)
    x, z, weight = pairs()
    x = std * x
    off, loss = Off(exact), DenoisingScoreMatching(NoiseWeighting())
    whole = weight @ loss(off, x, t, z)
    state = sde.perturb(x, t, z)
    error = weight @ (off.noise(state, t) - exact.noise(state, t)).square()[:, 0]
    signal = (sde.alpha(t) * std) ** 2
    left = signal / (signal + sde.sigma(t) ** 2)
    torch.testing.assert_close(whole, error + left, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight @ loss(exact, x, t, z), left, rtol=1e-9, atol=0)


# --- Weights and preconditioning -----------------------------------------------------------------


@each_sde
def test_errors_of_the_views_are_proportional(sde):
    r"""z_hat - z = -(alpha / sigma) (D - x_0) = -(sigma s + z) = (alpha / W) (u_hat - u)."""
    t, x0, z = at(0.4), normal(6, 2), normal(6, 2, seed=1)
    model = ScoreModel(lambda x, c: torch.sin(3 * x), sde, Preconditioned(0.6))
    x, alpha, sigma = sde.perturb(x0, t, z), sde.alpha(t), sde.sigma(t)
    error = model.noise(x, t) - z
    torch.testing.assert_close(error, -alpha / sigma * (model.denoise(x, t) - x0))
    torch.testing.assert_close(error, -sigma * (model.score(x, t) + z / sigma))
    rates = sde.alpha_dot(t), sde.sigma_dot(t)
    velocity = model.velocity(x, t) - (rates[0] * x0 + rates[1] * z)
    turn = alpha * rates[1] - sigma * rates[0]
    torch.testing.assert_close(error, alpha / turn * velocity)


@each_sde
def test_the_weight_of_edm_is_the_networks_plain_error(sde):
    """The network's own target is (sigma x_0 - alpha sd^2 z) / (sd n)."""
    sd, t, x0, z = 0.6, at(0.1, 0.5, 0.9), normal(3, 2), normal(3, 2, seed=1)
    outputs = normal(3, 2, seed=2)
    model = ScoreModel(lambda x, c: outputs, sde, Preconditioned(sd))
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    target = (sigma * x0 - alpha * sd**2 * z) / (sd * torch.sqrt((alpha * sd) ** 2 + sigma**2))
    loss = DenoisingScoreMatching(EDMWeighting(sd))(model, x0, t, z)
    torch.testing.assert_close(loss, (outputs - target).square().mean(1))


@each_sde
def test_the_likelihood_weight_integrates_over_the_log_snr(sde):
    """The integral of g^2 / sigma^2 E over times is that of E over the log-SNR."""
    exact, eps = GaussianModel(at(0.0)[None], 0.7, sde), 0.05

    def error(t):
        signal = (sde.alpha(t) * 0.7) ** 2
        return signal / (signal + sde.sigma(t) ** 2)

    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(200))
    t, scale = eps + (0.999 - eps) * (nodes + 1) / 2, (0.999 - eps) / 2
    over_time = scale * weights @ (LikelihoodWeighting()(sde, t) * error(t))
    low, high = sde.log_snr(at(0.999)), sde.log_snr(at(eps))
    snr = low + (high - low) * (nodes + 1) / 2
    over_snr = 0.5 * (high - low) * weights @ error(sde.time(snr))
    torch.testing.assert_close(over_time, over_snr, rtol=1e-6, atol=0)
    # In closed form: the error is the slope of log(1 + s^2 SNR) in the log-SNR.
    truth = torch.log1p(0.49 * high.exp()) - torch.log1p(0.49 * low.exp())
    torch.testing.assert_close(over_snr, truth, rtol=1e-6, atol=0)
    x, z, w = pairs(8)
    found = w @ DenoisingScoreMatching(NoiseWeighting())(exact, 0.7 * x, at(0.4), z)
    torch.testing.assert_close(found, error(at(0.4)))


def test_the_density_of_times_changes_the_variance_alone():
    """Quantiles of both densities at 20 000 even u: one mean, and a smaller mean square."""
    sde, eps = VPSDE(), 1e-3
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    values = []
    for times in (UniformTimes(), ImportanceTimes()):
        t = times.quantile(u, sde, eps)
        signal = (0.7 * sde.alpha(t)) ** 2
        error = signal / (signal + sde.sigma(t) ** 2)
        values.append(times.weight(t, sde, eps) * LikelihoodWeighting()(sde, t) * error)
    uniform, importance = values
    assert float(importance.mean()) == pytest.approx(float(uniform.mean()), rel=1e-3)
    assert float(importance.var()) < 0.2 * float(uniform.var())
