"""Zero SNR at t = 1: the rectified flow and the rescaled chain, against closed forms."""

import math

import numpy as np
import pytest
import torch

from scoresde import (
    VPSDE,
    DataParametrisation,
    DenoisingScoreMatching,
    DiscreteVP,
    EDMWeighting,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    LikelihoodWeighting,
    NoiseLevel,
    NoiseParametrisation,
    Preconditioned,
    RectifiedFlow,
    ScoreModel,
    ScoreParametrisation,
    VariationalBound,
    VParametrisation,
)
from scoresde.guidance import Clipped
from scoresde.likelihood import NoiseClock, prior_kl
from scoresde.nn import MLP
from scoresde.sample import (
    AnnealedLangevinDynamics,
    EulerMaruyama,
    GottaGoFast,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    ReferencePredictorCorrector,
    Restart,
    TorchSDE,
    UniPC,
)
from scoresde.sde import SDE, ZeroSNRChain
from scoresde.times import FoldedTimes, ImportanceTimes, KarrasGrid, LogNormalTimes, LogSNRGrid

ZERO = [RectifiedFlow(), ZeroSNRChain()]
each_zero = pytest.mark.parametrize("sde", ZERO, ids=lambda sde: type(sde).__name__)
FINITE = [DataParametrisation(), VParametrisation(), Preconditioned(0.7)]
MEAN, STD = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 1.2]).double()


def at(*t):
    return torch.tensor(t if len(t) > 1 else t[0], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def gaussian(sde):
    return GaussianModel(MEAN, STD, sde)


def mixture(sde):
    return GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, 2, seed=5), [0.3, 0.5], sde)


# --- Coefficients --------------------------------------------------------------------------------


@each_zero
def test_the_closed_forms_are_those_of_the_base_class(sde):
    """f, g, the log-SNR and the rates follow from alpha and sigma by autograd."""
    t = at(0.0123, 0.3, 0.77, 0.99)
    for name in ("f", "g", "log_snr", "alpha_dot", "sigma_dot"):
        ours, derived = getattr(sde, name)(t), getattr(SDE, name)(sde, t)
        torch.testing.assert_close(ours, derived, rtol=1e-8, atol=1e-10)


@each_zero
def test_no_signal_is_left_at_the_end(sde):
    one = at(1.0)
    assert (float(sde.alpha(one)), float(sde.sigma(one)), float(sde.bounded(one))) == (0, 1, 0)
    assert float(prior_kl(sde, 3 * torch.ones(1, 4).double())) == 0


@each_zero
def test_the_bounded_variable_is_inverted_up_to_the_end(sde):
    t = at(1e-3, 0.1, 0.5, 0.999, 1.0)
    torch.testing.assert_close(sde.time_of_bounded(sde.bounded(t)), t, rtol=1e-9, atol=1e-9)


def test_the_bounded_variable_is_the_log_snr_up_to_a_constant_near_the_data():
    sde, t = RectifiedFlow(), at(1e-5)
    assert float(sde.bounded(t) - sde.log_snr(t)) == pytest.approx(2 * math.log(2), abs=1e-8)


@each_zero
def test_the_noise_label_is_an_eighth_of_it(sde):
    t = at(0.2, 1.0)
    torch.testing.assert_close(NoiseLevel()(sde, t), -sde.bounded(t) / 8)


def test_the_rescaled_chain_is_the_published_one():
    """Lin et al. 2024, algorithm 1, written down once more."""
    betas = np.linspace(0.1, 20, 1000) / 1000
    signal = np.sqrt(np.cumprod(1 - betas))
    first, last = signal[0], signal[-1]
    signal = (signal - last) * first / (first - last)
    sde = ZeroSNRChain()
    levels = sde.alpha(sde.time_of_index(torch.arange(1000)))
    np.testing.assert_allclose(levels.numpy(), signal, rtol=1e-9, atol=1e-12)
    assert float(levels[0]) == pytest.approx(float(DiscreteVP().alpha(at(1e-3))), abs=1e-12)


@each_zero
def test_variances_add_up_between_levels(sde):
    """The transition from s to t takes the marginal at s to that at t."""
    s, t = at(0.2, 0.5, 0.99), at(0.6, 0.99, 1.0)
    a, tau = sde.transition(s, t)
    torch.testing.assert_close(a * sde.alpha(s), sde.alpha(t))
    torch.testing.assert_close((a * sde.sigma(s)) ** 2 + tau**2, sde.sigma(t) ** 2)


# --- Models --------------------------------------------------------------------------------------


@each_zero
@pytest.mark.parametrize("make", [gaussian, mixture])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_exact_velocity_is_the_mean_rate(make, sde, t):
    r"""alpha' D + sigma' z, with z from the data where there is noise, and from x at the end."""
    exact, x, time = make(sde), normal(5, 2), at(t)
    data = exact.denoise(x, time)
    noise = exact.noise(x, time)
    rates = sde.alpha_dot(time), sde.sigma_dot(time)
    torch.testing.assert_close(exact.velocity(x, time), rates[0] * data + rates[1] * noise)


def test_the_velocity_at_the_end_is_noise_less_the_mean_of_the_data():
    x = normal(5, 2)
    torch.testing.assert_close(gaussian(RectifiedFlow()).velocity(x, at(1.0)), x - MEAN)


@each_zero
@pytest.mark.parametrize("parametrisation", FINITE, ids=lambda p: type(p).__name__)
def test_a_networks_velocity_is_that_of_its_views(parametrisation, sde):
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=1).double()
    torch.nn.init.normal_(network.linear_out.weight)
    model, x = ScoreModel(network, sde, parametrisation), normal(4, 2)
    for t in (at(0.2), at(1.0)):
        by_views = sde.alpha_dot(t) * model.denoise(x, t) + sde.sigma_dot(t) * model.noise(x, t)
        torch.testing.assert_close(model.velocity(x, t), by_views)


@each_zero
@pytest.mark.parametrize("parametrisation", FINITE[1:], ids=lambda p: type(p).__name__)
def test_a_networks_velocity_is_finite_at_both_ends(parametrisation, sde):
    model = ScoreModel(MLP(2, width=8, depth=1).double(), sde, parametrisation)
    for t in (at(0.0), at(1.0)):
        assert bool(model.velocity(normal(4, 2), t).isfinite().all())


@each_zero
@pytest.mark.parametrize("kind", [NoiseParametrisation, ScoreParametrisation])
def test_a_network_that_predicts_the_noise_is_refused(kind, sde):
    with pytest.raises(InputError, match=f"parametrisation.*{kind.__name__}"):
        ScoreModel(MLP(2), sde, kind())
    ScoreModel(MLP(2), VPSDE(), kind())


@each_zero
def test_a_clipped_model_starts_where_no_signal_is(sde):
    clipped, one, x = Clipped(mixture(sde), -0.1, 0.1), at(1.0), normal(3, 2)
    torch.testing.assert_close(clipped.noise(x, one), x)
    assert float(clipped.denoise(x, one).abs().max()) <= 0.1
    assert float(UniPC(10, LogSNRGrid())(clipped, (64, 2), seed=0).x.abs().max()) < 0.5


# --- Where in time -------------------------------------------------------------------------------


@each_zero
def test_importance_times_have_the_density_that_their_weight_says(sde):
    u = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    times, eps, h = ImportanceTimes(), 1e-3, 1e-5
    slope = (times.quantile(u + h, sde, eps) - times.quantile(u - h, sde, eps)) / (2 * h)
    weight = (1 - eps) * times.weight(times.quantile(u, sde, eps), sde, eps)
    torch.testing.assert_close(slope, weight, rtol=1e-5, atol=0)


@each_zero
def test_times_reach_from_the_cut_off_to_the_end(sde):
    u, eps = at(1e-9, 1 - 1e-9), 0.01
    for times in (ImportanceTimes(), LogNormalTimes(std=4.0), FoldedTimes(ImportanceTimes())):
        t = times.quantile(u, sde, eps).sort().values
        assert (float(t[0]), float(t[1])) == pytest.approx((eps, 1.0), abs=1e-2)


@each_zero
def test_the_grid_in_the_log_snr_is_the_one_in_the_bounded_variable(sde):
    times = LogSNRGrid()(10, sde, 0.01)
    steps = sde.bounded(times).diff()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-6, atol=1e-9)


@each_zero
def test_karras_grid_is_refused_and_names_the_other(sde):
    for sampler in (Heun(4, KarrasGrid()), Restart()):
        with pytest.raises(InputError, match=r"KarrasGrid.*LogSNRGrid\(\)"):
            sampler.check(gaussian(sde))


@each_zero
def test_the_clock_is_an_angle_and_its_rate_is_its_derivative(sde):
    clock = NoiseClock(0.5)
    readings = torch.linspace(clock.of(sde, 1e-3), clock.of(sde, 1.0), 9).double()
    assert float(readings[-1]) == pytest.approx(math.pi / 2, abs=1e-7)
    middle, h = readings[1:-1], 1e-6
    slope = (clock.time(sde, middle + h)[0] - clock.time(sde, middle - h)[0]) / (2 * h)
    torch.testing.assert_close(clock.time(sde, middle)[1], slope, rtol=1e-4, atol=1e-7)
    t, rate = clock.time(sde, at(math.pi / 2))
    assert float(t) == pytest.approx(1.0, abs=1e-12)
    assert 0 < float(rate) < math.inf


# --- Samplers, likelihoods, losses ---------------------------------------------------------------

N = 20_000
STOCHASTIC = [
    EulerMaruyama(250),
    PredictorCorrector(250, corrector=None),
    TorchSDE(250),
    TorchSDE(60, "srk"),
    GottaGoFast(0.01, 0.002),
    AnnealedLangevinDynamics(20),
    UniPC(20, LogSNRGrid()),
    ProbabilityFlow(1e-4, 1e-4),
]


@each_zero
@pytest.mark.parametrize("sampler", STOCHASTIC, ids=lambda s: f"{type(s).__name__}")
def test_samples_have_the_law_of_the_data(sampler, sde):
    """Mean and variance within 4 standard errors of 20 000 samples and 3 % of discretisation."""
    exact = gaussian(sde)
    eps = at(sampler.check(exact))
    x = sampler(exact, (N, 2), seed=0).x
    mean = sde.alpha(eps) * MEAN
    variance = (sde.alpha(eps) * STD) ** 2 + sde.sigma(eps) ** 2
    assert float(((x.mean(0) - mean) / STD).abs().max()) < 4 / N**0.5 + 0.015
    assert float((x.var(0) / variance - 1).abs().max()) < 4 * (2 / N) ** 0.5 + 0.03


@each_zero
def test_encoding_and_sampling_invert_each_other(sde):
    exact, flow = mixture(sde), ProbabilityFlow(1e-8, 1e-8)
    data = exact.sample(8, seed=0)
    latent = flow.encode(exact, data).x
    torch.testing.assert_close(flow(exact, latent=latent).x, data, rtol=0, atol=1e-5)


@each_zero
def test_a_gaussians_flow_is_the_closed_form(sde):
    exact, z = gaussian(sde), normal(6, 2)
    ours = ProbabilityFlow(1e-9, 1e-9, eps=0.01)(exact, latent=z).x
    torch.testing.assert_close(ours, exact.flow(z, 1.0, 0.01), rtol=1e-6, atol=1e-6)


@each_zero
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_the_likelihood_is_the_exact_density(make, sde):
    """At the cut-off, whose blur the plain one leaves: exact to the solver's tolerance."""
    exact = make(sde)
    x, exactly = exact.sample(16, seed=3), Likelihood(probes="exact", rtol=1e-7, atol=1e-7)
    eps = exactly.check(exact)
    torch.testing.assert_close(
        exactly(exact, x).log_prob, exact.log_prob(x, eps), rtol=0, atol=1e-4
    )


@each_zero
def test_the_bound_of_an_exact_model_is_tight_in_the_mean(sde):
    """Within 4 standard errors over 4000 examples, and below what the reconstruction loses."""
    exact = gaussian(sde)
    x = exact.sample(4000, seed=1)
    gap = VariationalBound(draws=16)(exact, x, seed=0).log_prob - exact.log_prob(x)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(x) ** 0.5 + 1e-3


@each_zero
@pytest.mark.parametrize("parametrisation", FINITE, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("weighting", [EDMWeighting(0.5), LikelihoodWeighting()], ids=repr)
def test_importance_times_keep_the_mean_of_a_weighted_loss(weighting, parametrisation, sde):
    """The same expectation as under uniform times, from a common cut-off."""
    exact = gaussian(sde)
    model = ScoreModel(lambda x, c: torch.zeros_like(x), sde, parametrisation)
    x, eps = exact.sample(20_000, seed=0), 0.2
    uniform, important = (
        DenoisingScoreMatching(weighting, eps=eps, **more)(model, x, seed=0)
        for more in ({}, {"times": ImportanceTimes()})
    )
    # Near t = 1 the weight of a noise that is wrong grows without limit; the views differ there.
    assert bool(important.isfinite().all())
    if isinstance(parametrisation, Preconditioned):
        error = (uniform.var() + important.var()).sqrt() / len(x) ** 0.5
        assert abs(float(uniform.mean() - important.mean())) < 5 * float(error)


def test_the_reference_sampler_has_no_steps_for_it():
    with pytest.raises(InputError, match="RectifiedFlow"):
        ReferencePredictorCorrector().check(gaussian(RectifiedFlow()))


@pytest.mark.parametrize("steps", [1, 2])
def test_one_step_is_the_posterior(steps):
    """A single stochastic step from no signal draws alpha D + sigma z around the data's mean."""
    sde = RectifiedFlow()
    for sampler in (EulerMaruyama(1), PredictorCorrector(1, corrector=None), TorchSDE(1)):
        x = sampler(gaussian(sde), (4000, 2), seed=0).x
        eps = sde.cutoffs.sampling
        torch.testing.assert_close(x.mean(0), (1 - eps) * MEAN, rtol=0, atol=1e-4)
        assert float(x.std(0).max()) == pytest.approx(eps, rel=0.05)


# --- Processes of one's own ----------------------------------------------------------------------


class Trigonometric(SDE):
    """The variance-preserving path of a quarter turn, whose alpha(1) is zero but for rounding."""

    zero_snr = True

    def alpha(self, t):
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)


class Unsaid(Trigonometric):
    zero_snr = False


class Wrong(SDE):
    zero_snr = True

    def alpha(self, t):
        return 1 - 0.9 * t

    def sigma(self, t):
        return 0.1 + t


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=lambda s: f"{type(s).__name__}")
def test_a_path_by_alpha_and_sigma_alone_has_the_law_too(sampler):
    """Bounds as above; f, g, rates and the inverse of the log-SNR come from the base class."""
    exact = gaussian(Trigonometric())
    eps = at(sampler.check(exact))
    x = sampler(exact, (N, 2), seed=0).x
    mean = exact.sde.alpha(eps) * MEAN
    variance = (exact.sde.alpha(eps) * STD) ** 2 + exact.sde.sigma(eps) ** 2
    assert float(((x.mean(0) - mean) / STD).abs().max()) < 4 / N**0.5 + 0.015
    assert float((x.var(0) / variance - 1).abs().max()) < 4 * (2 / N) ** 0.5 + 0.03


@pytest.mark.parametrize(("kind", "value"), [(Unsaid, "True"), (Wrong, "False")])
def test_a_class_that_does_not_say_its_snr_is_refused_before_the_first_pass(kind, value):
    """Where it once gave values that are not numbers, without a word."""
    exact, x = gaussian(kind()), normal(3, 2)
    for act in (
        lambda: UniPC(4)(exact, (2, 2), seed=0),
        lambda: EulerMaruyama(4)(exact, (2, 2), seed=0),
        lambda: ProbabilityFlow()(exact, (2, 2), seed=0),
        lambda: Likelihood("exact")(exact, x),
        lambda: DenoisingScoreMatching()(exact, x, seed=0),
    ):
        with pytest.raises(InputError, match=f"zero_snr must be {value}"):
            act()
