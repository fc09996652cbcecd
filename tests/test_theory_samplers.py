"""Formulas of docs/theory/samplers.md that no other test checks alone."""

import itertools
import math

import numpy as np
import pytest
import torch

from scoresde import VPSDE, GaussianMixtureModel, GaussianModel
from scoresde.model import Conditioned
from scoresde.sample import (
    DDIM,
    AnnealedLangevin,
    DPMSolverPPSDE,
    Interval,
    Langevin,
    Node,
    ShrunkNorm,
)
from scoresde.sample.exponential import DataIntegral
from scoresde.sample.multistep import halved
from scoresde.solvers import AdaptiveODE, BogackiShampine, DormandPrince
from scoresde.solvers.base import Control, Problem
from scoresde.streams import Purpose, Streams
from scoresde.times import LogSNRGrid
from tests.theory import SDES, at, each, each_sde, normal


def mixture(sde, d=2):
    return GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, d, seed=5), [0.3, 0.5], sde).double()


def along(exact, x, t, s, count=48):
    """Half the log-SNR, weights of a quadrature over it, and both estimates on the exact flow."""
    sde, (points, weights) = exact.sde, np.polynomial.legendre.leggauss(count)
    first, last = (float(sde.log_snr(time)) / 2 for time in (t, s))
    ell = first + (last - first) * at((1 + points) / 2)
    times = sde.time(2 * ell)
    states = [exact.flow(x, t, time) for time in times]
    noise = torch.stack([exact.noise(x, time) for x, time in zip(states, times, strict=True)])
    data = torch.stack([exact.denoise(x, time) for x, time in zip(states, times, strict=True)])
    return ell, (last - first) / 2 * at(weights), noise, data


@each(SDES[:3])
def test_the_flow_is_an_integral_of_either_estimate(sde):
    """Both forms, on the closed flow of a Gaussian."""
    exact, t, s = GaussianModel(normal(3), normal(3, seed=1).abs() + 0.3, sde), at(0.8), at(0.3)
    x = exact.sample(4, 0.8, seed=0)
    truth = exact.flow(x, t, s)
    ell, weights, noise, data = along(exact, x, t, s)
    alpha, sigma = sde.alpha(s), sde.sigma(s)
    by_noise = torch.einsum("n,nbd->bd", weights * torch.exp(-ell), noise)
    ours = alpha * (x / sde.alpha(t) - by_noise)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    last = sde.log_snr(s) / 2
    by_data = torch.einsum("n,nbd->bd", weights * torch.exp(ell - last), data)
    ours = sigma / sde.sigma(t) * x + alpha * by_data
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@each(SDES[:3])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7])
def test_every_noise_scale_has_the_same_marginals(tau, sde):
    """From x_t = alpha D + sigma z a step with D constant ends at alpha D + sigma z."""
    a, b = Node.of(sde, at([0.8, 0.3]))
    integral = DataIntegral(tau)
    (weight,) = integral.weights(sde, a, b, [a])
    h, scale, noise = b.ell - a.ell, integral.scale(a, b), integral.noise(a, b)
    assert scale == pytest.approx(b.sigma / a.sigma * math.exp(-(tau**2) * h), rel=1e-12)
    assert weight == pytest.approx(b.alpha * -math.expm1(-(1 + tau**2) * h), rel=1e-9)
    assert noise == pytest.approx(b.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h)), rel=1e-12)
    assert scale * a.alpha + weight == pytest.approx(b.alpha, rel=1e-9)
    assert (scale * a.sigma) ** 2 + noise**2 == pytest.approx(b.sigma**2, rel=1e-12)
    if tau == 1:
        x, data = normal(4, 2), normal(4, 2, seed=1)
        mean, std = sde.posterior(x, data, a.t, b.t)
        torch.testing.assert_close(scale * x + weight * data, mean, rtol=1e-8, atol=1e-8)
        assert noise == pytest.approx(float(std), rel=1e-8)


@each(SDES[:3])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_of_ddim_keeps_a_part_of_the_noise(eta, sde):
    exact, x, eps = mixture(sde), sde.prior_std * normal(3, 2), 0.4
    ours = DDIM(1, eta=eta, eps=eps)(exact, latent=x, seed=0).x
    t, s = at(1.0), at(eps)
    z = Streams.of(0, batch=3).normal((2,), Purpose.DIFFUSION, 0, torch.float64)
    h = (sde.log_snr(s) - sde.log_snr(t)) / 2
    n = eta * sde.sigma(s) * torch.sqrt(-torch.expm1(-2 * h))
    kept = torch.sqrt(sde.sigma(s) ** 2 - n**2) * exact.noise(x, t)
    truth = sde.alpha(s) * exact.denoise(x, t) + kept + n * z
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_the_weights_integrate_polynomials_exactly():
    """D = 1, l, l^2 through three values, against integration by parts."""
    sde = VPSDE()
    *points, a, b = Node.of(sde, at([0.9, 0.8, 0.7, 0.55]))
    points = [a, *reversed(points)]
    weights = DataIntegral().weights(sde, a, b, points)

    def primitive(power, ell):  # of e^(l - l_b) l^power
        return math.exp(ell - b.ell) * (1.0, ell - 1, ell**2 - 2 * ell + 2)[power]

    for power in range(3):
        found = sum(w * p.ell**power for w, p in zip(weights, points, strict=True))
        truth = b.alpha * (primitive(power, b.ell) - primitive(power, a.ell))
        assert found == pytest.approx(truth, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("h", [1e-2, 0.5, 3.0])
def test_two_values_are_read_in_the_middle_of_the_step(h):
    """The line's mean under the kernel lies at 1 / (1 - e^-h) - 1 / h of the step."""
    first, second = 0.7, -0.4
    values, gap = [0.7, 0.7 - 1.3 * h], 1.3
    ours = np.dot(halved(values, values[0] + h), [first, second])
    truth = -math.expm1(-h) * (first + (first - second) / (2 * gap))
    assert ours == pytest.approx(truth, rel=1e-12)
    u, weight = np.polynomial.legendre.leggauss(40)
    u, weight = h * (1 + u) / 2, h * weight / 2 * np.exp(-h + h * (1 + u) / 2)
    place = weight @ u / weight.sum() / h
    assert place == pytest.approx(1 / -math.expm1(-h) - 1 / h, rel=1e-9)


@each(SDES[:3])
def test_a_plan_is_the_sampler(sde):
    """Its linear updates, applied here one by one, with the noise of the streams."""
    sampler, exact = DPMSolverPPSDE(5, LogSNRGrid(), eps=0.05), mixture(sde)
    x = sde.prior_std * normal(3, 2)
    ours = sampler(exact, latent=x, seed=4).x
    streams, outputs = Streams.of(4, batch=3), []
    for i, stage in enumerate(sampler.plan(sde, Node.of(sde, sampler.times(sde, 0.05)))):
        outputs.insert(0, exact.denoise(x, stage.at.t))
        z = streams.normal((2,), Purpose.DIFFUSION, i, torch.float64)
        row = stage.row
        x = row.scale * x + sum(w * h for w, h in zip(row.outputs, outputs, strict=False))
        x = x + sum(n * z for n in row.noises)
    torch.testing.assert_close(x, ours, rtol=1e-12, atol=1e-12)


@each_sde
@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_the_curvature_of_a_noised_density_is_bounded(t, sde):
    """The Hessian of -log p_t is at most I / sigma^2, by autograd on a mixture."""
    exact, x, t = mixture(sde), normal(8, 2, seed=2), at(t)
    hessians = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda row: -exact.score(row[None], t)[0], row)
            for row in x
        ]
    )
    values = torch.linalg.eigvalsh(hessians)
    assert float(values.max() * sde.sigma(t) ** 2) <= 1 + 1e-9
    spread = torch.stack(
        [
            torch.autograd.functional.jacobian(lambda row: exact.denoise(row[None], t)[0], row)
            for row in x
        ]
    )  # Cov[alpha x_0 | x] / sigma^4 is alpha J / sigma^2
    truth = (torch.eye(2).double() - sde.alpha(t) * spread) / sde.sigma(t) ** 2
    torch.testing.assert_close(hessians, truth, rtol=1e-8, atol=1e-8)


@each(SDES[:3])
@pytest.mark.parametrize("snr", [0.16, 3.0])
def test_a_correction_is_a_langevin_step_of_its_size(snr, sde):
    exact, t, s = mixture(sde), at(0.5), at(0.4)
    x, z = normal(6, 2), normal(6, 2, seed=1)
    step = Interval.of(sde, t, s)
    noise, sigma = exact.noise(x, t), sde.sigma(t)
    a = sde.alpha(t) / sde.alpha(s)
    base = 2 * (a * snr * sigma) ** 2
    size = (noise**2).sum(1, keepdim=True)
    shrunk = torch.minimum(sigma**2, base * (16 + 2) / (16 + size))
    for corrector, delta in (
        (Langevin(snr, rule=ShrunkNorm(16.0)), shrunk),
        (AnnealedLangevin(snr), base),
    ):
        ours = corrector(Conditioned(exact), x, step, z)
        truth = x + delta * exact.score(x, t) + torch.sqrt(2 * delta) * z
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def spinning(t, state):
    """y' = cos(3 t) (-y_2, y_1), where each example has its own speed."""
    (y,) = state
    speed = torch.tensor([1.0, 6.0], dtype=torch.float64)[: len(y)]
    return ((speed * torch.cos(3 * t))[:, None] * torch.stack((-y[:, 1], y[:, 0]), 1),)


@pytest.mark.parametrize("pair", [DormandPrince(pack=False), BogackiShampine(pack=False)])
def test_accepted_steps_pass_the_test_of_their_error_and_set_the_next(pair):
    """The error of every recorded step, computed here from the tableau."""
    tolerance, start = 1e-4, normal(2, 2)
    problem = Problem(spinning, (start,), 0.0, 2.0)
    solution = pair.solve(problem, Control(tolerance, tolerance, 10_000, True, True))
    grid = solution.grid
    states = [y for (y,) in pair.replay(spinning, (start,), grid)]
    weights = torch.tensor(pair.error, dtype=torch.float64)
    ratios = []
    for (t, y), (s, after) in itertools.pairwise(zip(grid.T, states, strict=True)):
        h = (s - t)[:, None]
        slopes = [spinning(t, (y,))[0]]
        for node, row in zip(pair.nodes, pair.matrix, strict=True):
            inner = y + h * sum(w * k for w, k in zip(row, slopes, strict=True))
            slopes.append(spinning(t + node * (s - t), (inner,))[0])
        error = h * torch.einsum("i,ibd->bd", weights, torch.stack(slopes))
        scale = tolerance + tolerance * torch.maximum(y.abs(), after.abs())
        ratios.append((error / scale).square().mean(1).sqrt())
    ratios, steps = torch.stack(ratios), grid.diff(dim=1).T
    assert float(ratios.max()) <= 1
    assert float(ratios.max()) > 0.1
    factor = (0.9 * ratios.clamp(min=1e-10) ** (-1 / pair.order)).clamp(0.2, 10)
    inner = (steps[2:] > 0).sum(0).min() - 1  # the last step is cut at the end
    found, wanted = steps[1:][:inner] / steps[:-1][:inner], factor[:-1][:inner]
    same = ((found / wanted - 1).abs() < 1e-6).double().mean()
    assert float(same) > 0.5  # elsewhere a rejection came between
    assert bool((found < wanted * (1 + 1e-6)).all())


def test_a_tolerance_is_that_of_each_example():
    """A fast example takes more evaluations, and the slow one those that it takes alone."""
    start = normal(2, 2)
    solver = AdaptiveODE(1e-6, 1e-6, DormandPrince(pack=False))
    both = solver(spinning, (start,), 0.0, 2.0)
    alone = solver(spinning, (start[:1],), 0.0, 2.0)
    assert torch.equal(both.state[0][:1], alone.state[0])
    assert int(both.evaluations[0]) == int(alone.evaluations[0]) < int(both.evaluations[1])
    angle = torch.tensor([1.0, 6.0], dtype=torch.float64) * math.sin(6) / 3
    c, s = torch.cos(angle), torch.sin(angle)
    truth = torch.stack((c * start[:, 0] - s * start[:, 1], s * start[:, 0] + c * start[:, 1]), 1)
    assert float((both.state[0] - truth).abs().max()) < 1e-4
