"""Formulas of docs/theory/guidance_and_posteriors.md that no other test checks alone."""

import math

import pytest
import torch
from scipy.integrate import quad, solve_ivp

from scoresde import VESDE, GaussianMixtureModel, GaussianModel
from scoresde.guidance import ClassifierFreeGuidance, ClassifierGuidance
from scoresde.inverse import (
    DPS,
    MMPS,
    TMPD,
    CovarianceKernel,
    IsotropicKernel,
    Linear,
    Observation,
    PiGDM,
)
from tests.models import ByLabel
from tests.theory import SDES, at, each, each_sde, normal

A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -0.5]], dtype=torch.float64)
STD = torch.tensor(0.4, dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def mixture(sde, d=3):
    means, weights = normal(3, d, seed=5), [0.2, 0.5, 0.3]
    return GaussianMixtureModel(weights, means, [0.3, 0.5, 0.8], sde, labels=[0, 1, 2]).double()


def jacobians(function, x):
    """The Jacobian of each row, (B, D, D)."""
    rows = [torch.autograd.functional.jacobian(lambda r: function(r[None])[0], row) for row in x]
    return torch.stack(rows)


@each_sde
def test_the_gradient_of_the_class_is_a_difference_of_scores(sde):
    """And w times it is added to each of the three views."""
    model, t, w = mixture(sde), at(0.4), 2.5
    x, label, none = normal(3, 3), torch.tensor([0, 1, 2]), torch.full((3,), -1)
    leaf = x.clone().requires_grad_()
    chosen = model.class_log_prob(leaf, t).gather(1, label[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, leaf)
    difference = model.score(x, t, label=label) - model.score(x, t, label=none)
    torch.testing.assert_close(gradient, difference, rtol=1e-8, atol=1e-8)
    guided, alpha, sigma = ClassifierGuidance(model, model.class_log_prob, w), *scales(sde, t)
    for view, factor in (("score", w), ("noise", -w * sigma), ("denoise", w * sigma**2 / alpha)):
        ours = getattr(guided, view)(x, t, label=label)
        truth = getattr(model, view)(x, t, label=none) + factor * gradient
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-8)


def scales(sde, t):
    return sde.alpha(t), sde.sigma(t)


@pytest.mark.parametrize("w", [0.75, 1.5, 3.0])
@pytest.mark.parametrize(("mean", "narrow", "wide"), [(1.0, 0.5, 1.0), (-0.7, 0.9, 1.3)])
def test_guided_gaussians_have_the_stated_laws(w, mean, narrow, wide):
    """From the guided estimate itself: its two moments along the flow and the reverse SDE.

    For VE, with u the log of the squared noise level, both have linear equations in u.
    """
    sde = VESDE(1e-4, 1e4)
    guided, label = ClassifierFreeGuidance(ByLabel(sde, mean, narrow, wide), w), torch.tensor([0])

    def estimate(u):  # D = shift + gain x
        t = sde.time(at(-u))
        ends = [float(guided.denoise(at([[value]]), t, label=label)) for value in (0.0, 1.0)]
        return ends[0], ends[1] - ends[0]

    def slope(u, state):
        shift, gain = estimate(u)
        std, m, variance = state
        return [
            0.5 * (1 - gain) * std,
            (1 - gain) * m - shift,
            2 * (1 - gain) * variance - math.exp(u),
        ]

    first, last = 2 * math.log(1e4), 2 * math.log(1e-4)
    start = [1e4, 0.0, 1e8]
    found = solve_ivp(slope, (first, last), start, method="LSODA", rtol=1e-9, atol=1e-12)
    std, m, variance = found.y[:, -1]
    r = narrow / wide
    assert std**2 == pytest.approx(wide ** (2 * (1 - w)) * narrow ** (2 * w), rel=1e-5)
    assert m == pytest.approx(mean * (1 - r ** (2 * w)) / (1 - r**2), rel=1e-5)
    truth = wide**2 * (r**2 - r ** (4 * w)) / ((2 * w - 1) * (1 - r**2))
    assert variance == pytest.approx(truth, rel=1e-5)
    tilted = 1 / ((1 - w) / wide**2 + w / narrow**2)  # which neither of them samples
    assert min(abs(variance / tilted - 1), abs(std**2 / tilted - 1)) > 0.01


@each_sde
@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_the_covariance_of_the_data_is_that_of_tweedie(t, sde):
    """Of a mixture, whose posterior given x_t is a mixture of Gaussians."""
    model, x, t = mixture(sde), normal(4, 3), at(t)
    alpha, sigma = scales(sde, t)
    spread = alpha**2 * model.stds**2 + sigma**2
    away = x[:, None] - alpha * model.means
    log_share = model.log_weights - 1.5 * torch.log(spread) - away.square().sum(2) / (2 * spread)
    share = torch.softmax(log_share, 1)
    centres = model.means + (alpha * model.stds**2 / spread)[:, None] * away
    mean = (share[..., None] * centres).sum(1)
    off = centres - mean[:, None]
    within = (share * model.stds**2 * sigma**2 / spread).sum(1)
    truth = torch.einsum("bk,bki,bkj->bij", share, off, off)
    truth = truth + within[:, None, None] * EYE
    torch.testing.assert_close(model.denoise(x, t), mean, rtol=1e-9, atol=1e-9)
    ours = sigma**2 / alpha * jacobians(lambda row: model.denoise(row, t), x)
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.6])
@each(SDES[:3])
def test_the_rules_are_their_weights_of_the_measurements(sde, t):
    """Each with dense matrices, on a mixture, whose covariance depends on the state."""
    model, x, t = mixture(sde), normal(4, 3), at(t)
    seen = Observation(Linear(lambda x: x @ A.T), normal(2, seed=2), STD)
    alpha, sigma = scales(sde, t)
    data, noise = model.denoise(x, t), model.noise(x, t)
    jacobian = jacobians(lambda row: model.denoise(row, t), x)
    cov, eye = sigma**2 / alpha * jacobian.mT, EYE[:2, :2]
    residual = seen.y - data @ A.T
    size = model.data_std
    r2 = size**2 * sigma**2 / (alpha**2 * size**2 + sigma**2)
    rows = (A @ cov @ A.T).sum(2).clamp(min=0)
    exact = torch.linalg.solve(A @ cov @ A.T + STD**2 * eye, residual)
    rules = {
        MMPS: exact,
        PiGDM: torch.linalg.solve(r2 * A @ A.T + STD**2 * eye, residual.T).T,
        TMPD: residual / (rows + STD**2),
        DPS: residual / STD**2,
    }
    for rule, u in rules.items():
        options = {"tolerance": 1e-13} if rule in (MMPS, PiGDM) else {}
        guided, pulled = rule(model, seen, **options), u @ A
        shifted = data + torch.einsum("bij,bj->bi", cov, pulled)
        torch.testing.assert_close(guided.denoise(x, t), shifted, rtol=1e-8, atol=1e-8)
        moved = noise - sigma * torch.einsum("bji,bj->bi", jacobian, pulled)
        torch.testing.assert_close(guided.noise(x, t), moved, rtol=1e-8, atol=1e-8)


@each_sde
def test_the_exact_step_of_a_gaussian_has_the_covariance_of_the_kernel(sde):
    """v I + c^2 Cov, against the conditional law of x_s given x_t."""
    root = normal(3, 3, seed=1)
    c, t, s = root @ root.T + 0.2 * EYE, at(0.6), at(0.35)
    model = GaussianModel(torch.zeros(3).double(), covariance=c, sde=sde)
    one, x = torch.zeros(1, 3).double(), normal(1, 3)
    _, std = sde.posterior(one, one, t, s)
    gain = (sde.posterior(one, one + 1, t, s)[0] - sde.posterior(one, one, t, s)[0])[0, 0]
    a = sde.alpha(t) / sde.alpha(s)
    v_s, v_t = (sde.alpha(time) ** 2 * c + sde.sigma(time) ** 2 * EYE for time in (s, t))
    truth = v_s - a**2 * v_s @ torch.linalg.inv(v_t) @ v_s
    jacobian = jacobians(lambda row: model.denoise(row, t), x)[0]
    cov = sde.sigma(t) ** 2 / sde.alpha(t) * jacobian
    torch.testing.assert_close(std**2 * EYE + gain**2 * cov, truth, rtol=1e-8, atol=1e-9)
    spread = CovarianceKernel().spread(cov[None], gain, std)
    ours = spread.basis[0] @ spread.stds[0].square().diag() @ spread.basis[0].T
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("w", [0.5, 1.5, 3.0])
def test_the_normaliser_of_a_tilted_step_is_its_integral(w):
    weak, strong, std = 0.3, 1.1, 0.6

    def density(x, mean):
        return math.exp(-((x - mean) ** 2) / (2 * std**2)) / math.sqrt(2 * math.pi) / std

    total, _ = quad(lambda x: density(x, weak) ** (1 - w) * density(x, strong) ** w, -12, 14)
    change, zero = at([[strong - weak]]), at([[0.0]])
    mean, log_z = IsotropicKernel().tilt(
        at([[weak]]), change, at([w]), (None, None), at(1.0), at(std), zero
    )
    assert float(log_z) == pytest.approx(math.log(total), abs=1e-9)
    assert float(log_z) == pytest.approx(w * (w - 1) * (0.8 / std) ** 2 / 2, rel=1e-12)
    first, _ = quad(lambda x: x * density(x, weak) ** (1 - w) * density(x, strong) ** w, -12, 14)
    assert float(mean) == pytest.approx(first / total, abs=1e-8)
