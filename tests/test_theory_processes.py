"""Formulas of docs/theory/processes.md, against closed forms and automatic differentiation."""

import itertools

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    DiscreteVP,
    GaussianMixtureModel,
    GaussianModel,
    RectifiedFlow,
    SubVPSDE,
)
from scoresde.model import Conditioned
from scoresde.sde import CosineBetas, LearnedSchedule, LinearBetas, ZeroSNRChain
from tests.theory import at, each_sde, normal


def mixture(sde):
    """Two components in one dimension, whose density is known at every time."""
    return GaussianMixtureModel([0.3, 0.7], at(1.0, -0.8)[:, None], [0.3, 0.5], sde)


def slope(function, x):
    """The derivative of a function of numbers, element by element, with its graph."""
    return torch.func.grad(lambda y: function(y).sum())(x)


@each_sde
def test_a_transition_is_the_step_between_two_kernels(sde):
    r"""alpha_t = a alpha_s, sigma_t^2 = a^2 sigma_s^2 + tau^2, and tau^2 by the log-SNR."""
    s, t = at(0.05, 0.2, 0.5, 0.9), at(0.1, 0.6, 0.51, 0.99)
    a, tau = sde.transition(s, t)
    torch.testing.assert_close(a * sde.alpha(s), sde.alpha(t), rtol=1e-12, atol=0)
    added = sde.sigma(t) ** 2 - a**2 * sde.sigma(s) ** 2
    torch.testing.assert_close(tau**2, added, rtol=1e-10, atol=0)
    fall = 1 - torch.exp(sde.log_snr(t) - sde.log_snr(s))
    torch.testing.assert_close(tau**2, fall * sde.sigma(t) ** 2, rtol=1e-10, atol=0)


@each_sde
def test_transitions_compose(sde):
    r, s, t = at(0.1), at(0.3), at(0.8)
    (a, first), (b, second), (c, whole) = (
        sde.transition(*pair) for pair in ((r, s), (s, t), (r, t))
    )
    torch.testing.assert_close(a * b, c, rtol=1e-12, atol=0)
    torch.testing.assert_close((b * first) ** 2 + second**2, whole**2, rtol=1e-10, atol=0)


def test_the_std_of_sub_vp_is_the_variance_of_vp():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    vp, sub = VPSDE(0.3, 8.0), SubVPSDE(0.3, 8.0)
    torch.testing.assert_close(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t))
    assert bool((sub.sigma(t) <= vp.sigma(t)).all())


def test_a_chain_of_many_steps_is_the_continuous_sde():
    """log bar alpha_i tends to -B(t_i), with an error that halves with the step."""
    t = at(0.25, 0.5, 0.75, 1.0)
    truth = VPSDE().integrated_beta(t)
    errors = [
        (DiscreteVP(LinearBetas(steps=n)).integrated_beta(t) - truth).abs().max()
        for n in (1000, 2000, 4000)
    ]
    assert float(errors[0]) < 0.15
    for coarse, fine in itertools.pairwise(errors):
        assert float(coarse / fine) == pytest.approx(2, rel=0.02)


@each_sde
@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, 2.0])
def test_the_density_solves_all_reverse_equations(h, sde):
    r"""dp/dt = -(b p)' - h^2 g^2 p'' / 2 with b = f x - (1 + h^2) g^2 score / 2.

    That is the Fokker-Planck equation from t = 1 to 0 with the noise h g: h = 0 is the probability
    flow, h = 1 the reverse SDE.
    """
    exact, t = mixture(sde), at(0.4)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64) * float(sde.alpha(t) + sde.sigma(t))
    f, g = sde.f(t), sde.g(t)

    def density(y, time):
        return exact.log_prob(y[:, None], time).exp()

    def flux(y):
        drift = f * y - 0.5 * (1 + h**2) * g**2 * exact.score(y[:, None], t)[:, 0]
        return drift * density(y, t)

    second = slope(lambda y: slope(lambda v: density(v, t), y), x)
    change = torch.func.jacfwd(lambda time: density(x, time))(t)
    right = -slope(flux, x) - 0.5 * (h * g) ** 2 * second
    scale = float(change.abs().max())
    torch.testing.assert_close(change, right, rtol=0, atol=1e-9 * scale)


@each_sde
def test_the_forward_sde_has_the_density(sde):
    """The Fokker-Planck equation forwards: dp/dt = -(f x p)' + g^2 p'' / 2."""
    exact, t = mixture(sde), at(0.4)
    x = torch.linspace(-2, 2, 21, dtype=torch.float64) * float(sde.alpha(t) + sde.sigma(t))

    def density(y, time):
        return exact.log_prob(y[:, None], time).exp()

    second = slope(lambda y: slope(lambda v: density(v, t), y), x)
    first = slope(lambda y: sde.f(t) * y * density(y, t), x)
    change = torch.func.jacfwd(lambda time: density(x, time))(t)
    right = -first + 0.5 * sde.g(t) ** 2 * second
    torch.testing.assert_close(change, right, rtol=0, atol=1e-9 * float(change.abs().max()))


@each_sde
def test_the_velocity_and_the_reverse_drift_have_four_forms(sde):
    """By the score, by the noise, by the rates, and by the reverse drift less half its noise."""
    exact, x, t = mixture(sde), normal(7, 1), at(0.4)
    f, g, sigma = sde.f(t), sde.g(t), sde.sigma(t)
    score, noise, data = exact.score(x, t), exact.noise(x, t), exact.denoise(x, t)
    velocity = exact.velocity(x, t)
    torch.testing.assert_close(velocity, f * x - 0.5 * g**2 * score)
    torch.testing.assert_close(velocity, f * x + 0.5 * g**2 / sigma * noise)
    torch.testing.assert_close(velocity, sde.alpha_dot(t) * data + sde.sigma_dot(t) * noise)
    drift = Conditioned(exact).reverse_drift(x, t)
    torch.testing.assert_close(drift, f * x - g**2 * score)
    torch.testing.assert_close(drift + 0.5 * g**2 * score, velocity)


@each_sde
def test_the_slope_of_the_flow_is_the_noise(sde):
    r"""d(x / alpha) / d(sigma / alpha) is the noise, along the exact flow of a Gaussian."""
    exact = GaussianModel(at(0.5, -1.0), at(0.3, 1.2), sde)
    x, t = exact.sample(5, 0.4, seed=0), at(0.4)

    def state(time):
        return exact.flow(x, t, time) / sde.alpha(time)

    slopes = torch.func.jacfwd(state)(t) / torch.func.jacfwd(
        lambda time: sde.sigma(time) / sde.alpha(time)
    )(t)
    torch.testing.assert_close(slopes, exact.noise(x, t), rtol=1e-9, atol=1e-9)


@each_sde
def test_the_estimate_does_not_depend_on_the_schedule(sde):
    """At equal log-SNRs, and states of equal x / alpha, two schedules have one estimate."""
    x, t, ours = normal(9, 1), at(0.45), mixture(sde)
    for other in (VPSDE(), VESDE(0.001, 50.0), RectifiedFlow(), DiscreteVP(CosineBetas())):
        s = other.time(sde.log_snr(t))
        moved = other.alpha(s) / sde.alpha(t) * x
        theirs = mixture(other)
        torch.testing.assert_close(
            theirs.denoise(moved, s), ours.denoise(x, t), rtol=1e-7, atol=1e-7
        )
        torch.testing.assert_close(theirs.noise(moved, s), ours.noise(x, t), rtol=1e-7, atol=1e-7)
        factor = sde.alpha(t) / other.alpha(s)
        torch.testing.assert_close(
            theirs.score(moved, s), factor * ours.score(x, t), rtol=1e-7, atol=1e-7
        )


@each_sde
def test_the_flow_is_one_map_for_all_schedules(sde):
    ours = GaussianModel(at(0.5, -1.0), at(0.3, 1.2), sde)
    x, t, s = ours.sample(5, 0.6, seed=0), at(0.6), at(0.2)
    other = VESDE(0.001, 50.0)
    theirs = GaussianModel(at(0.5, -1.0), at(0.3, 1.2), other)
    first, last = (other.time(sde.log_snr(time)) for time in (t, s))
    moved = theirs.flow(x / sde.alpha(t), first, last)
    torch.testing.assert_close(sde.alpha(s) * moved, ours.flow(x, t, s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", [RectifiedFlow(), ZeroSNRChain()], ids=lambda s: type(s).__name__)
def test_the_bounded_variable_turns_into_the_log_snr(sde):
    r"""d lambda = coth(b / 2) db, and e^{lambda / 2} = sinh(b / 2)."""
    t = at(0.01, 0.3, 0.7, 0.95)
    ratio = slope(sde.log_snr, t) / slope(sde.bounded, t)
    b = sde.bounded(t)
    torch.testing.assert_close(ratio, 1 / torch.tanh(0.5 * b), rtol=1e-8, atol=0)
    torch.testing.assert_close(torch.sinh(0.5 * b), sde.alpha(t) / sde.sigma(t))


def test_a_learned_schedule_is_a_function_of_its_log_snr():
    sde = LearnedSchedule(8.0, -4.0).double()
    t = torch.linspace(0.05, 0.95, 13, dtype=torch.float64)
    snr, rate = sde.log_snr(t), slope(sde.log_snr, t)
    torch.testing.assert_close(sde.alpha(t) ** 2, torch.sigmoid(snr))
    torch.testing.assert_close(sde.sigma(t) ** 2, torch.sigmoid(-snr))
    torch.testing.assert_close(sde.f(t), 0.5 * sde.sigma(t) ** 2 * rate)
    torch.testing.assert_close(sde.g(t), sde.sigma(t) * torch.sqrt(-rate))
