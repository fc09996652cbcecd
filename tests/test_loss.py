"""Denoising score matching: its optimum is the exact score, and its numbers are the formula's."""

import math

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    DenoisingScoreMatching,
    EDMWeighting,
    GaussianMixtureModel,
    InputError,
    LikelihoodWeighting,
    NoiseParametrisation,
    NoiseWeighting,
    Preconditioned,
    RectifiedFlow,
    ScoreFunction,
    ScoreModel,
    ScoreParametrisation,
    SubVPSDE,
    VParametrisation,
)
from scoresde.streams import Purpose, Streams
from scoresde.times import ImportanceTimes, LogNormalTimes, LowDiscrepancy, UniformTimes

SDES = [VPSDE(), SubVPSDE(), VESDE(0.01, 10.0)]
WEIGHTINGS = [NoiseWeighting(), LikelihoodWeighting(), EDMWeighting(0.5)]

each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(sde):
    means = torch.tensor([[1.0, -0.5], [-0.8, 0.6]], dtype=torch.float64)
    return GaussianMixtureModel([0.3, 0.7], means, [0.3, 0.5], sde)


class Perturbed(ScoreFunction):
    """The exact model with a h(x, t) added to its noise."""

    def __init__(self, exact, h, a):
        super().__init__()
        self.exact, self.sde, self.h, self.a = exact, exact.sde, h, a

    def noise(self, x, t):
        return self.exact.noise(x, t) + self.a * self.h(x, t)

    score = denoise = None


PERTURBATIONS = {
    "the state": lambda x, t: x / x.std(),
    "the exact noise": lambda x, t: mixture(VPSDE()).noise(x, t.clamp(0.01, 1)),
    "a wave": lambda x, t: torch.sin(3 * x + t[:, None]),
    "a constant": lambda x, t: torch.ones_like(x),
}
each_perturbation = pytest.mark.parametrize("h", PERTURBATIONS.values(), ids=PERTURBATIONS)

for_all_losses = pytest.mark.parametrize(
    "loss",
    [
        DenoisingScoreMatching(),
        DenoisingScoreMatching(LikelihoodWeighting(), ImportanceTimes()),
        DenoisingScoreMatching(EDMWeighting(0.5), LogNormalTimes()),
        DenoisingScoreMatching(NoiseWeighting(), LowDiscrepancy(ImportanceTimes())),
    ],
    ids=["noise", "likelihood", "EDM", "low discrepancy"],
)


# --- The optimum ---------------------------------------------------------------------------------


@for_all_losses
@each_sde
@each_perturbation
def test_the_loss_is_stationary_at_the_exact_score(h, sde, loss):
    """d/da E[loss] = 0 at a = 0 for noise + a h(x, t), within four standard errors."""
    n, exact = 20_000, mixture(sde)
    a = torch.zeros(n, 1, dtype=torch.float64, requires_grad=True)
    x = exact.sample(n, seed=1)
    (slopes,) = torch.autograd.grad(loss(Perturbed(exact, h, a), x, seed=2).sum(), a)
    assert abs(float(slopes.mean())) < 4 * float(slopes.std()) / n**0.5


@for_all_losses
@each_sde
@each_perturbation
def test_the_exact_score_has_the_least_loss(h, sde, loss):
    n, exact = 5000, mixture(sde)
    x = exact.sample(n, seed=1)
    best = loss(exact, x, seed=2).mean()
    for a in (-0.5, 0.5):
        assert float(loss(Perturbed(exact, h, a), x, seed=2).mean()) > float(best)


def test_the_loss_of_the_exact_score_is_the_posterior_variance_of_the_noise():
    """For N(0, s^2 I): E|z - E[z | x]|^2 = alpha^2 s^2 / (alpha^2 s^2 + sigma^2)."""
    n, s, t, sde = 40_000, 0.7, 0.2, VPSDE()
    exact = GaussianMixtureModel([1.0], torch.zeros(1, 2).double(), [s], sde)
    losses = DenoisingScoreMatching(NoiseWeighting())(exact, exact.sample(n, seed=0), t, seed=1)
    signal = float(sde.alpha(t)) ** 2 * s**2
    truth = signal / (signal + float(sde.sigma(t)) ** 2)
    assert float(losses.mean()) == pytest.approx(truth, abs=4 * float(losses.std()) / n**0.5)


# --- The formula ---------------------------------------------------------------------------------


@each_sde
@each_weighting
def test_given_times_and_noise_the_loss_is_the_formula(weighting, sde):
    exact, x, z = mixture(sde), normal(5, 2), normal(5, 2, seed=1)
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    alpha, sigma, g = sde.alpha(t)[:, None], sde.sigma(t)[:, None], sde.g(t)[:, None]
    error = (exact.noise(alpha * x + sigma * z, t) - z) ** 2
    weight = {
        NoiseWeighting: 1,
        LikelihoodWeighting: g**2 / sigma**2,
        EDMWeighting: 1 + sigma**2 / (alpha * 0.5) ** 2,
    }[type(weighting)]
    ours = DenoisingScoreMatching(weighting)(exact, x, t, z)
    torch.testing.assert_close(ours, (weight * error).mean(1))


@each_sde
def test_the_weight_of_edm_is_that_published(sde):
    """It is (s^2 + sd^2) / (s sd)^2 of the error of the data, where s = sigma / alpha."""
    t, sd = torch.tensor([0.1, 0.5, 0.9]).double(), 0.5
    s = sde.sigma(t) / sde.alpha(t)
    published = (s**2 + sd**2) / (s * sd) ** 2
    torch.testing.assert_close(EDMWeighting(sd)(sde, t), published * s**2)


@each_sde
@each_weighting
def test_weights_have_the_shape_and_type_of_the_times(weighting, sde):
    weights = weighting(sde, torch.full((2, 3), 0.5))
    assert (weights.shape, weights.dtype) == ((2, 3), torch.float32)


@pytest.mark.parametrize("t", [0.4, torch.tensor(0.4), torch.full((3,), 0.4)], ids=str)
def test_one_time_or_one_per_example(t):
    exact, x, z = mixture(VPSDE()), normal(3, 2), normal(3, 2, seed=1)
    truth = (exact.noise(VPSDE().perturb(x, t, z), t) - z).square().mean(1)
    torch.testing.assert_close(DenoisingScoreMatching(NoiseWeighting())(exact, x, t, z), truth)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5, 4), (3, 1, 6)], ids=str)
def test_the_loss_is_a_mean_over_all_dimensions(shape):
    model = ScoreModel(lambda x, c: torch.zeros_like(x), VPSDE())
    x, z = normal(*shape), normal(*shape, seed=1)
    errors = (model.noise(VPSDE().perturb(x, 0.5, z), 0.5) - z).square()
    truth = torch.stack([error.mean() for error in errors])
    torch.testing.assert_close(DenoisingScoreMatching(NoiseWeighting())(model, x, 0.5, z), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_has_the_type_of_the_data(dtype):
    losses = DenoisingScoreMatching()(mixture(VPSDE()), normal(3, 2).to(dtype), seed=0)
    assert (losses.shape, losses.dtype) == ((3,), dtype)


def test_gradients_reach_the_network():
    net = torch.nn.Linear(2, 2)
    model = ScoreModel(lambda x, c: net(x), VPSDE())
    DenoisingScoreMatching()(model, normal(3, 2).float(), seed=0).mean().backward()
    assert float(net.weight.grad.abs().sum()) > 0


def test_conditions_reach_the_network():
    seen = []
    model = ScoreModel(lambda x, c, y: seen.append(y) or x, VPSDE())
    y = torch.arange(3)
    DenoisingScoreMatching()(model, normal(3, 2), seed=0, y=y)
    assert torch.equal(seen[0], y)


# --- Times ---------------------------------------------------------------------------------------


def importance_and_uniform(sde, weighting, n=20_000):
    """The losses under both distributions of times; eps keeps the variance of one in bounds."""
    exact = mixture(sde)
    x = exact.sample(n, seed=1)
    return (
        DenoisingScoreMatching(weighting, times, eps=0.02)(exact, x, seed=seed)
        for seed, times in enumerate((ImportanceTimes(), UniformTimes()))
    )


@each_sde
@each_weighting
def test_importance_and_uniform_times_have_the_same_expectation(weighting, sde):
    a, b = importance_and_uniform(sde, weighting)
    z = (a.mean() - b.mean()) / torch.sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(float(z)) < 4


@pytest.mark.parametrize("sde", SDES[:2], ids=lambda sde: type(sde).__name__)
def test_importance_times_lower_the_variance_of_the_likelihood_loss(sde):
    a, b = importance_and_uniform(sde, LikelihoodWeighting())
    assert float(a.var()) < 0.7 * float(b.var())


def test_for_ve_importance_times_are_uniform():
    a, b = (
        DenoisingScoreMatching(LikelihoodWeighting(), times, eps=0.02)(
            mixture(VESDE()), normal(50, 2), seed=0
        )
        for times in (ImportanceTimes(), UniformTimes())
    )
    torch.testing.assert_close(a, b)


def test_drawn_times_and_noise_come_from_the_streams():
    exact, x, eps = mixture(VPSDE()), normal(4, 2), 1e-5
    streams = Streams.of(7, batch=4)
    u = streams.uniform((), Purpose.TIME, dtype=torch.float64)
    t = ImportanceTimes().quantile(u, VPSDE(), eps)
    z = streams.normal((2,), Purpose.NOISE, dtype=torch.float64)
    weight = ImportanceTimes().weight(t, VPSDE(), eps)
    drawn = DenoisingScoreMatching(times=ImportanceTimes())(exact, x, seed=7)
    torch.testing.assert_close(
        drawn, weight * DenoisingScoreMatching(NoiseWeighting())(exact, x, t, z)
    )


def test_half_the_sum_is_half_the_dimension_times_the_mean():
    exact, x, z = mixture(VPSDE()), normal(4, 2), normal(4, 2, seed=1)
    mean, half = (
        DenoisingScoreMatching(NoiseWeighting(), reduce_mean=reduce_mean)(exact, x, 0.3, z)
        for reduce_mean in (True, False)
    )
    error = exact.noise(VPSDE().perturb(x, torch.tensor(0.3).double(), z), 0.3) - z
    torch.testing.assert_close(half, 0.5 * error.square().sum(1))
    torch.testing.assert_close(half, 2 / 2 * mean)


def test_given_times_are_not_weighted_for_a_density():
    exact, x, z = mixture(VPSDE()), normal(4, 2), normal(4, 2, seed=1)
    a, b = (
        DenoisingScoreMatching(times=times)(exact, x, 0.3, z)
        for times in (UniformTimes(), ImportanceTimes())
    )
    assert torch.equal(a, b)


# --- Seeds ---------------------------------------------------------------------------------------


def test_a_seed_gives_the_loss_again():
    exact, x, loss = mixture(VPSDE()), normal(4, 2), DenoisingScoreMatching()
    assert torch.equal(loss(exact, x, seed=3), loss(exact, x, seed=3))
    assert not bool((loss(exact, x, seed=3) == loss(exact, x, seed=4)).any())


def test_an_examples_loss_is_its_own():
    exact, x, loss = mixture(VPSDE()), normal(4, 2), DenoisingScoreMatching()
    alone = loss(exact, x[2:3], seed=3, seeds=[2])
    torch.testing.assert_close(alone, loss(exact, x, seed=3)[2:3])


def test_without_a_seed_losses_differ_and_follow_torch():
    exact, x, loss = mixture(VPSDE()), normal(4, 2), DenoisingScoreMatching()
    torch.manual_seed(0)
    first = loss(exact, x)
    assert not bool((loss(exact, x) == first).any())
    torch.manual_seed(0)
    assert torch.equal(loss(exact, x), first)


# --- Values and errors ---------------------------------------------------------------------------


def test_losses_are_values():
    a, b = (DenoisingScoreMatching(EDMWeighting(0.5), ImportanceTimes(), 1e-3) for _ in range(2))
    assert (a == b, hash(a) == hash(b)) == (True, True)


@pytest.mark.parametrize("eps", [-1e-3, 1.0, math.nan])
@each_sde
def test_an_eps_outside_the_interval_is_refused(sde, eps):
    with pytest.raises(InputError, match=f"eps.*got {eps}"):
        DenoisingScoreMatching(eps=eps)(mixture(sde), normal(4, 2))


@pytest.mark.parametrize("sde", SDES[:2], ids=repr)
def test_an_eps_without_noise_is_refused(sde):
    with pytest.raises(InputError, match=r"eps.*got 0"):
        DenoisingScoreMatching(eps=0.0)(mixture(sde), normal(4, 2))


def test_ve_may_train_from_time_zero():
    losses = DenoisingScoreMatching(eps=0.0)(mixture(VESDE()), normal(4, 2), seed=0)
    assert bool(losses.isfinite().all())


@pytest.mark.parametrize(
    "arguments",
    [
        {"t": torch.rand(3)},
        {"t": torch.rand(4, 1)},
        {"noise": normal(3, 2)},
        {"noise": normal(1, 2)},
        {"noise": normal(4, 3)},
        {"seeds": [0, 1]},
    ],
    ids=lambda arguments: str({key: getattr(v, "shape", v) for key, v in arguments.items()}),
)
def test_shapes_that_do_not_fit_are_refused(arguments):
    with pytest.raises(InputError):
        DenoisingScoreMatching()(mixture(VPSDE()), normal(4, 2), **arguments)


def test_an_unusable_std_of_the_data_is_refused():
    with pytest.raises(InputError, match=r"sigma_data .*got 0\b"):
        EDMWeighting(0)


# --- The default ---------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", [Preconditioned(), VParametrisation()], ids=repr)
def test_the_default_is_the_pair_that_was_measured(parametrisation):
    model = ScoreModel(lambda x, c: 0 * x, VPSDE(), parametrisation)
    named = DenoisingScoreMatching(EDMWeighting(), LogNormalTimes(tail=0.1))
    x = normal(64, 2)
    assert torch.equal(DenoisingScoreMatching()(model, x, seed=0), named(model, x, seed=0))


@pytest.mark.parametrize("parametrisation", [NoiseParametrisation(), ScoreParametrisation()])
def test_networks_that_return_the_noise_are_graded_by_the_noise(parametrisation):
    model = ScoreModel(lambda x, c: 0 * x, VPSDE(), parametrisation)
    named = DenoisingScoreMatching(NoiseWeighting(), UniformTimes())
    x = normal(64, 2)
    assert torch.equal(DenoisingScoreMatching()(model, x, seed=0), named(model, x, seed=0))


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlow()], ids=repr)
def test_a_tail_is_a_share_uniform_in_the_log_snr(sde):
    """The quantiles of a tenth of the numbers, against their law; the rest are log-normal."""
    eps = sde.cutoffs.training
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = LogNormalTimes(tail=0.1).quantile(u, sde, eps)
    first = sde.log_snr(torch.tensor(eps, dtype=torch.float64))
    expected = first + u[:1000] / 0.1 * (2.4 - first)
    torch.testing.assert_close(sde.log_snr(t[:1000]), expected, rtol=1e-6, atol=1e-6)
    rest = (u[1000:] - 0.1) / 0.9
    torch.testing.assert_close(t[1000:], LogNormalTimes().quantile(rest, sde, eps))


@pytest.mark.parametrize("tail", [-0.1, 1.0, math.nan])
def test_a_tail_out_of_range_is_refused(tail):
    with pytest.raises(InputError, match=f"tail .*{tail}"):
        LogNormalTimes(tail=tail)


def test_the_default_loss_is_finite_where_no_signal_is_left():
    model = ScoreModel(lambda x, c: 0 * x, RectifiedFlow())
    assert bool(DenoisingScoreMatching()(model, normal(4, 2), 1.0, seed=0).isfinite().all())
