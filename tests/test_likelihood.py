"""Likelihoods against densities known exactly.

The prior stands for the marginal at t = 1; with the exact model's own density of the latent in its
place, all that is left is the error of the solver.
"""

import math
import warnings

import pytest
import torch
from torch import nn

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    RectifiedFlow,
    ScoreFunction,
    ScoreModel,
    SolverError,
    SubVPSDE,
)
from scoresde.divergence import ExactTrace, Hutchinson
from scoresde.likelihood import NoiseClock, TimeClock
from scoresde.likelihood.cutoff import RescaledCutoff, VariationalCutoff
from scoresde.model import Conditioned
from scoresde.nn import MLP
from scoresde.sample import ProbabilityFlow
from scoresde.solvers import DormandPrince, TorchDiffEq
from scoresde.streams import Streams

SDES = [VPSDE(), SubVPSDE(), VESDE(), RectifiedFlow()]

each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(sde, d):
    return GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, d, seed=5), [0.3, 0.5], sde)


def covariance(d):
    a = normal(d, d, seed=1)
    return a @ a.T / d + 0.1 * torch.eye(d).double()


def bits(nats, d):
    return nats / (d * math.log(2))


class Counted(ScoreFunction):
    """Counts the evaluations of a model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde, self.calls = model, model.sde, 0

    def noise(self, x, t):
        self.calls += 1
        return self.model.noise(x, t)

    score = denoise = None


# --- The density ---------------------------------------------------------------------------------


@each_sde
def test_the_mean_likelihood_of_64_dimensions_is_exact_to_a_thousandth_of_a_bit(sde):
    d, eps = 64, sde.cutoffs.likelihood
    exact = mixture(sde, d).float()
    x = exact.sample(100, eps, seed=0)
    ours = Likelihood("exact", rtol=1e-4, atol=1e-4)(exact, x)
    assert abs(float(bits(ours.log_prob - exact.log_prob(x, eps), d).mean())) < 1e-3


@pytest.mark.slow
@each_sde
def test_the_mean_likelihood_of_a_thousand_points_at_the_default_tolerance(sde):
    d, eps = 64, sde.cutoffs.likelihood
    exact = mixture(sde, d)
    x = exact.sample(1000, eps, seed=0)
    ours = Likelihood("exact")(exact, x)
    assert abs(float(bits(ours.log_prob - exact.log_prob(x, eps), d).mean())) < 1e-3


@each_sde
def test_with_the_exact_density_of_the_latent_every_point_is_exact(sde):
    d, eps = 64, sde.cutoffs.likelihood
    exact = mixture(sde, d)
    x = exact.sample(8, eps, seed=0)
    ours = Likelihood("exact", rtol=1e-7, atol=1e-7)(exact, x)
    error = exact.log_prob(ours.latent, 1.0) + ours.log_det - exact.log_prob(x, eps)
    assert float(bits(error, d).abs().max()) < 1e-4


@each_sde
@pytest.mark.parametrize(("shape", "count"), [((2,), 50), ((3, 8, 8), 2)], ids=str)
def test_a_mixture_of_points_and_of_images(shape, count, sde):
    eps = sde.cutoffs.likelihood
    means = 0.8 * normal(3, *shape, seed=5)
    exact = GaussianMixtureModel([0.2, 0.3, 0.5], means, [0.3, 0.5, 0.4], sde)
    x = exact.sample(count, eps, seed=0)
    ours = Likelihood("exact", rtol=1e-5, atol=1e-5)(exact, x)
    error = exact.log_prob(ours.latent, 1.0) + ours.log_det - exact.log_prob(x, eps)
    assert float(bits(error, math.prod(shape)).abs().max()) < 1e-3


@each_sde
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 4), (1,)], ids=str)
def test_data_of_any_shape(shape, sde):
    d, eps = math.prod(shape), sde.cutoffs.likelihood
    exact = GaussianModel(normal(*shape), sde=sde, covariance=covariance(d))
    x = exact.sample(3, eps, seed=0)
    ours = Likelihood("exact", rtol=1e-6, atol=1e-6)(exact, x)
    truth = exact.log_prob(x, eps)
    torch.testing.assert_close(
        exact.log_prob(ours.latent, 1.0) + ours.log_det, truth, rtol=0, atol=1e-4
    )
    assert (ours.latent.shape, ours.log_prob.shape) == ((3, *shape), (3,))


@each_sde
def test_the_density_is_that_at_the_eps_given(sde):
    exact = mixture(sde, 3)
    x = exact.sample(4, 0.2, seed=0)
    ours = Likelihood("exact", eps=0.2, rtol=1e-6, atol=1e-6)(exact, x)
    error = exact.log_prob(ours.latent, 1.0) + ours.log_det - exact.log_prob(x, 0.2)
    assert float(error.abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_type_of_the_model(dtype):
    exact = mixture(VPSDE(), 3).to(dtype)
    ours = Likelihood("exact")(exact, exact.sample(2, seed=0))
    assert {ours.log_prob.dtype, ours.latent.dtype, ours.log_det.dtype} == {dtype}


def test_the_dropout_is_off_and_the_training_mode_restored():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model = ScoreModel(lambda x, c: net(x), VPSDE())
    model.network_module = net
    model.train()
    a, b = (Likelihood("exact")(model, torch.ones(2, 2)).log_prob for _ in range(2))
    assert torch.equal(a, b)
    assert all(module.training for module in model.modules())


def test_parameters_are_frozen_for_the_while_and_free_again():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    seen = []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, c):
            seen.append(net.weight.requires_grad)
            return self.net(x)

    Likelihood(1)(ScoreModel(Looks(), VPSDE()), torch.ones(2, 2), seed=0)
    assert not any(seen)
    assert (net.weight.requires_grad, net.bias.requires_grad) == (True, False)


def test_no_gradient_is_left_behind():
    net = nn.Linear(2, 2)
    out = Likelihood(2)(ScoreModel(lambda x, c: net(x), VPSDE()), torch.ones(2, 2), seed=0)
    assert (net.weight.grad, out.log_prob.requires_grad) == (None, False)


def test_a_gradient_that_will_be_missing_is_told():
    exact = GaussianModel(torch.zeros(2), 0.5, VPSDE())
    x = torch.zeros(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match=r"^x .*gradient.*differentiable=True"):
        silent = Likelihood(rtol=0.1)(exact, x, seed=0)
    with torch.no_grad():
        assert torch.equal(Likelihood(rtol=0.1)(exact, x, seed=0).log_prob, silent.log_prob)
    assert len(silent.log_prob.numpy()) == 3  # which a graph would forbid
    Likelihood(rtol=0.1, differentiable=True)(exact, x, seed=0).log_prob.sum().backward()
    assert x.grad.isfinite().all()


def test_weights_in_training_mode_are_told_too():
    """Torch alone would say that a result does not require grad, and name no remedy."""
    model, x = ScoreModel(MLP((2,), width=8), VPSDE()), torch.zeros(3, 2)
    with pytest.warns(UserWarning, match=r"^model .*gradient.*differentiable=True"):
        silent = Likelihood(rtol=0.1)(model, x, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            assert torch.equal(Likelihood(rtol=0.1)(model, x, seed=0).log_prob, silent.log_prob)
        Likelihood(rtol=0.1)(model.eval(), x, seed=0)
        model.train()
        Likelihood(rtol=0.1, differentiable=True)(model, x, seed=0).log_prob.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_conditions_reach_the_network():
    seen = []
    model = ScoreModel(lambda x, c, y: seen.append(y) or 0 * x, VPSDE())
    y = torch.tensor([3, 1])
    Likelihood(1)(model, torch.ones(2, 2), seed=0, y=y)
    assert torch.equal(seen[0], y)
    assert {value for condition in seen for value in condition.tolist()} == {3, 1}


# --- The parts of the result ---------------------------------------------------------------------


@pytest.mark.parametrize("probes", [1, 3, "exact"])
def test_the_log_density_is_the_sum_of_its_parts(probes):
    exact = mixture(VPSDE(), 3)
    ours = Likelihood(probes)(exact, exact.sample(4, seed=0), seed=0)
    assert torch.equal(ours.log_prob, ours.prior_log_prob + ours.log_det)
    assert torch.equal(ours.prior_log_prob, VPSDE().prior_log_prob(ours.latent))


@each_sde
def test_the_latent_is_that_of_the_probability_flow(sde):
    exact, eps = mixture(sde, 3), sde.cutoffs.likelihood
    x = exact.sample(4, eps, seed=0)
    ours = Likelihood("exact", rtol=1e-7, atol=1e-7)(exact, x).latent
    theirs = ProbabilityFlow(1e-7, 1e-7, eps=eps).encode(exact, x).x
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("probes", [1, 3, "exact"])
def test_the_network_passes_are_counted_truly(probes):
    counted = Counted(mixture(VPSDE(), 3))
    ours = Likelihood(probes)(counted, normal(4, 3), seed=0)
    assert (ours.nfe.dtype, int(ours.nfe.max())) == (torch.int64, counted.calls)


# --- Random probes -------------------------------------------------------------------------------


def repeated(probes, n=200, d=6):
    """The estimates of n streams for one point, and what they estimate."""
    exact = mixture(VPSDE(), d)
    x = exact.sample(1, seed=0)
    truth = Likelihood("exact", rtol=1e-4, atol=1e-4)(exact, x)
    ours = Likelihood(probes, rtol=1e-4, atol=1e-4)(exact, x.expand(n, d), seed=0, seeds=range(n))
    return ours, truth


@pytest.mark.parametrize("probes", [1, 4])
def test_random_probes_are_unbiased(probes):
    ours, truth = repeated(probes)
    error = ours.log_prob.std() / len(ours.log_prob) ** 0.5
    assert abs(float((ours.log_prob.mean() - truth.log_prob) / error)) < 4


def test_the_standard_error_is_truthful():
    """Of 200 streams with 8 probes each: the variance claimed is the variance there is.

    For normal numbers the ratio has a variance of 2/200 and another seventh of it.
    """
    ours, _ = repeated(8)
    ratio = float(ours.standard_error.square().mean() / ours.log_prob.var())
    assert ratio == pytest.approx(1, abs=4 * math.sqrt(2 / 200 * 8 / 7))


def test_one_probe_knows_no_standard_error_and_the_exact_trace_has_none():
    exact = mixture(VPSDE(), 3)
    x = exact.sample(4, seed=0)
    assert bool(Likelihood(1)(exact, x, seed=0).standard_error.isnan().all())
    assert torch.equal(Likelihood("exact")(exact, x).standard_error, torch.zeros(4).double())


def test_a_trace_may_be_given_itself():
    exact = mixture(VPSDE(), 3)
    x = exact.sample(4, seed=0)
    for probes, trace in (("exact", ExactTrace()), (2, Hutchinson(2))):
        a, b = (Likelihood(p)(exact, x, seed=0).log_prob for p in (probes, trace))
        assert torch.equal(a, b)


def test_probes_do_not_change_the_path():
    exact = mixture(VPSDE(), 3)
    x = exact.sample(4, seed=0)
    a, b = (Likelihood(1, 1e-7, 1e-7)(exact, x, seed=s).latent for s in (0, 1))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_recorded_seed_gives_the_estimate_again():
    exact = mixture(VPSDE(), 16)
    x = exact.sample(4, seed=0)
    first = Likelihood(1)(exact, x)
    again = Likelihood(1)(exact, x, seed=first.seed)
    assert torch.equal(first.log_prob, again.log_prob)
    other = Likelihood(1)(exact, x, seed=first.seed ^ 1)
    assert not bool((first.log_prob == other.log_prob).any())


@pytest.mark.parametrize("probes", [2, "exact"])
def test_an_example_is_the_same_alone_and_in_a_batch_in_any_order(probes):
    """At a loose tolerance, to the rounding: no example has a say in another's steps."""
    exact, likelihood = mixture(VPSDE(), 3), Likelihood(probes, 1e-3, 1e-3)
    x = exact.sample(16, seed=0)
    batch = likelihood(exact, x, seed=0)
    reverse = likelihood(exact, x.flip(0), seed=0, seeds=reversed(range(16)))
    alone = likelihood(exact, x[5:6], seed=0, seeds=[5])
    torch.testing.assert_close(reverse.log_prob.flip(0), batch.log_prob, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone.log_prob, batch.log_prob[5:6], rtol=0, atol=1e-12)
    assert torch.equal(alone.nfe, batch.nfe[5:6])


def test_conditions_stay_with_their_examples_as_the_batch_shrinks():
    model = ScoreModel(lambda x, c, rate: torch.tanh(rate[:, None] * x), VPSDE())
    x, rate = normal(6, 3).float(), torch.tensor([0.1, 9.0, 0.2, 5.0, 0.3, 0.4])
    batch = Likelihood("exact")(model, x, rate=rate)
    assert len(set(batch.nfe.tolist())) > 1
    for i in range(6):
        alone = Likelihood("exact")(model, x[i : i + 1], rate=rate[i : i + 1])
        torch.testing.assert_close(alone.log_prob, batch.log_prob[i : i + 1])


# --- More probes until the error is small enough -------------------------------------------------


@pytest.mark.parametrize("probes", [1, 4])
def test_a_target_error_is_met(probes):
    exact = mixture(VPSDE(), 6)
    x = exact.sample(8, seed=0)
    truth = Likelihood("exact", 1e-4, 1e-4)(exact, x).log_prob
    ours = Likelihood(probes, 1e-3, 1e-3, target_error=0.4, max_sets=200)(exact, x, seed=0)
    assert float(ours.standard_error.max()) <= 0.4
    assert float((ours.log_prob - truth).abs().max()) < 2
    assert len(set(ours.nfe.tolist())) > 1  # those that need more take more


def test_further_sets_are_independent_of_the_batch():
    exact, likelihood = mixture(VPSDE(), 6), Likelihood(4, 1e-3, 1e-3, target_error=0.3)
    x = exact.sample(8, seed=0)
    batch = likelihood(exact, x, seed=0)
    alone = likelihood(exact, x[3:4], seed=0, seeds=[3])
    torch.testing.assert_close(alone.log_prob, batch.log_prob[3:4], rtol=0, atol=1e-12)


def test_a_target_out_of_reach_is_told():
    exact = mixture(VPSDE(), 6)
    with pytest.warns(UserWarning, match=r"\b2 sets .*target_error=1e-09"):
        Likelihood(2, 1e-2, 1e-2, target_error=1e-9, max_sets=2)(exact, exact.sample(2, seed=0))


def test_the_error_over_several_sets_is_truthful():
    """Of 300 streams with two sets of four: the variance claimed is the variance there is."""
    exact = mixture(VPSDE(), 6)
    x = exact.sample(1, seed=0).expand(300, 6)
    likelihood = Likelihood(4, 1e-2, 1e-2, target_error=1e-9, max_sets=2)
    with pytest.warns(UserWarning, match=r"\b2 sets .*target_error"):
        ours = likelihood(exact, x, seed=0)
    ratio = float(ours.standard_error.square().mean() / ours.log_prob.var())
    assert ratio == pytest.approx(1, abs=4 * math.sqrt(2 / 300 * 8 / 6))


# --- Cut-offs, clocks, methods -------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [RescaledCutoff(), VariationalCutoff()], ids=repr)
def test_a_cutoff_says_where_the_ode_starts_and_what_is_added(cutoff):
    exact, eps = mixture(VPSDE(), 3), 0.01
    x = exact.sample(4, seed=0)
    start, extra = cutoff.start(Conditioned(exact), x, eps, Streams.of(7, batch=4))
    plain = Likelihood("exact", eps=eps)(exact, start)
    ours = Likelihood("exact", eps=eps, cutoff=cutoff)(exact, x, seed=7)
    torch.testing.assert_close(ours.log_prob, plain.log_prob + extra)


@each_sde
@pytest.mark.parametrize("clock", [TimeClock(), NoiseClock(0.1), NoiseClock(2.0)], ids=repr)
def test_the_clock_does_not_change_the_density(clock, sde):
    exact, eps = mixture(sde, 3), sde.cutoffs.likelihood
    x = exact.sample(4, eps, seed=0)
    ours = Likelihood("exact", 1e-7, 1e-7, clock=clock)(exact, x)
    error = exact.log_prob(ours.latent, 1.0) + ours.log_det - exact.log_prob(x, eps)
    assert float(error.abs().max()) < 1e-5


@pytest.mark.parametrize("clock", [TimeClock(), NoiseClock()], ids=repr)
@each_sde
def test_a_clock_runs_with_the_time(clock, sde):
    eps = sde.cutoffs.likelihood
    ends = [clock.of(sde, t) for t in (eps, 0.1, 1.0)]
    assert ends == sorted(ends)
    readings = torch.linspace(ends[0], ends[-1], 9, dtype=torch.float64)
    t, rate = clock.time(sde, readings)
    step = 1e-6
    slope = (clock.time(sde, readings + step)[0] - clock.time(sde, readings - step)[0])[1:-1]
    torch.testing.assert_close(rate[1:-1], slope / (2 * step), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(t[[0, -1]], torch.tensor([eps, 1.0]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "dopri8", TorchDiffEq("dopri5")], ids=str)
def test_every_method_finds_the_same_density(method):
    exact = mixture(VPSDE(), 3)
    x = exact.sample(4, 1e-5, seed=0)
    ours = Likelihood("exact", 1e-6, 1e-6, method=method)(exact, x)
    error = exact.log_prob(ours.latent, 1.0) + ours.log_det - exact.log_prob(x, 1e-5)
    assert float(error.abs().max()) < 1e-3


class Fails(ScoreFunction):
    """A model that is not finite for examples whose first number is above 2."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sde = model, model.sde

    def noise(self, x, t):
        return torch.where(x[:, :1] > 2, math.nan, self.model.noise(x, t))

    score = denoise = None


def test_a_failing_example_is_named_or_flagged():
    exact = GaussianModel(torch.zeros(2).double(), 1.0, VPSDE())
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 1.0]]).double()
    with pytest.raises(SolverError, match="not finite in example 1 near t = 1e-05"):
        Likelihood("exact")(Fails(exact), x)
    ours = Likelihood("exact", strict=False)(Fails(exact), x)
    good = Likelihood("exact")(exact, x[[0, 2]])
    assert ours.failed.tolist() == [False, True, False]
    assert bool(ours.log_prob[1].isnan())
    torch.testing.assert_close(ours.log_prob[[0, 2]], good.log_prob)


# --- Symmetries ----------------------------------------------------------------------------------


@each_sde
def test_rotated_data_have_the_same_density(sde):
    d = 5
    rotation = torch.linalg.qr(normal(d, d, seed=3))[0]
    c, x = covariance(d), normal(4, d)
    plain = GaussianModel(torch.zeros(d).double(), sde=sde, covariance=c)
    turned = GaussianModel(torch.zeros(d).double(), sde=sde, covariance=rotation @ c @ rotation.T)
    a = Likelihood("exact", 1e-7, 1e-7)(plain, x).log_prob
    b = Likelihood("exact", 1e-7, 1e-7)(turned, x @ rotation.T).log_prob
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rescaled_data_lose_the_logarithm_of_the_scale():
    """With the noise levels of VE scaled alike, everything is the same in other units."""
    d, scale, x = 5, 3.0, normal(4, 5)
    c = covariance(d)
    plain = GaussianModel(torch.zeros(d).double(), sde=VESDE(0.01, 50), covariance=c)
    large = GaussianModel(
        torch.zeros(d).double(), sde=VESDE(0.01 * scale, 50 * scale), covariance=scale**2 * c
    )
    a = Likelihood("exact", 1e-7, 1e-7)(plain, x).log_prob
    b = Likelihood("exact", 1e-7, 1e-7)(large, scale * x).log_prob
    torch.testing.assert_close(a - d * math.log(scale), b, rtol=0, atol=1e-5)


# --- Gradients -----------------------------------------------------------------------------------


@each_sde
@pytest.mark.parametrize("clock", [TimeClock(), NoiseClock()], ids=repr)
def test_the_gradient_is_the_score_and_that_of_the_parameters(clock, sde):
    exact, eps = mixture(sde, 3), sde.cutoffs.likelihood
    x = exact.sample(5, eps, seed=0).requires_grad_()
    exact.means.requires_grad_()
    ours = Likelihood("exact", 1e-6, 1e-6, clock=clock, differentiable=True)(exact, x)
    value = (exact.log_prob(ours.latent, 1.0) + ours.log_det).sum()
    in_x, in_means = torch.autograd.grad(value, (x, exact.means))
    (truth,) = torch.autograd.grad(exact.log_prob(x, eps).sum(), exact.means)
    torch.testing.assert_close(in_x, exact.score(x, torch.tensor(eps)), rtol=0, atol=1e-3)
    torch.testing.assert_close(in_means, truth, rtol=0, atol=1e-3)


def test_the_gradient_of_a_network_is_that_of_finite_differences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model = ScoreModel(Ignoring(net), VPSDE())
    x = normal(3, 2)
    likelihood = Likelihood(2, 1e-9, 1e-9, differentiable=True)

    def value():
        return likelihood(model, x, seed=0).log_prob.sum()

    value().backward()
    weight, step = net[0].weight, 1e-5
    for i, j in ((0, 0), (3, 1)):
        with torch.no_grad():
            weight[i, j] += step
            above = value()
            weight[i, j] -= 2 * step
            below = value()
            weight[i, j] += step
        slope = float(above - below) / (2 * step)
        assert float(weight.grad[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


class Ignoring(nn.Module):
    """A network that does not look at the label."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, c):
        return self.net(x)


def test_what_cannot_be_differentiated_is_refused():
    with pytest.raises(InputError, match=r"method.*dopri8"):
        Likelihood(method="dopri8", differentiable=True)
    with pytest.raises(InputError, match=r"target_error .*differentiable.*0\.1"):
        Likelihood(2, target_error=0.1, differentiable=True)


# --- Compiled networks ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler's own look at its input
def test_a_compiled_field_is_compiled_once_as_the_batch_shrinks():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    plain = ScoreModel(Ignoring(net), VPSDE())
    model = ScoreModel(torch.compile(Ignoring(net), backend=backend), VPSDE())
    x = normal(8, 2).float() * torch.linspace(0.1, 10, 8)[:, None]
    ours = Likelihood(1, method=DormandPrince(pack=False))(model, x, seed=0)
    assert len(compilations) == 1
    torch.testing.assert_close(ours.log_prob, Likelihood(1)(plain, x, seed=0).log_prob)


# --- Values and errors ---------------------------------------------------------------------------


def test_likelihoods_are_values():
    assert Likelihood("exact", 1e-4) == Likelihood("exact", 1e-4)
    assert hash(Likelihood(2)) == hash(Likelihood(2))
    with pytest.raises(AttributeError):
        Likelihood().probes = 2


@pytest.mark.parametrize("probes", [0, -1, 1.5, "all"])
def test_unusable_probes_are_refused(probes):
    with pytest.raises(InputError, match=f"probes.*{probes}"):
        Likelihood(probes)


@pytest.mark.parametrize("arguments", [{"rtol": 0.0}, {"atol": -1.0}, {"method": "rk4"}])
def test_an_unusable_solver_is_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(InputError, match=f"{name}.*{value}"):
        Likelihood(**arguments)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 3, dtype=torch.int64),
        torch.zeros(4),
        torch.full((4, 3), math.nan),
        torch.tensor([[0.0, math.inf, 0.0]]),
    ],
    ids=["integers", "vector", "NaN", "infinite"],
)
def test_unusable_data_are_refused_before_the_first_pass(x):
    counted = Counted(mixture(VPSDE(), 3))
    with pytest.raises(InputError):
        Likelihood()(counted, x)
    assert counted.calls == 0


@pytest.mark.parametrize("eps", [-0.1, 0.0, 1.0, math.nan])
@pytest.mark.parametrize("sde", SDES[:2], ids=repr)
def test_an_unusable_eps_is_refused(sde, eps):
    with pytest.raises(InputError, match=f"eps.*got {eps}"):
        Likelihood(eps=eps)(mixture(sde, 3), normal(2, 3))


def test_seeds_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="seeds"):
        Likelihood()(mixture(VPSDE(), 3), normal(2, 3), seeds=[0])


def test_a_bare_network_is_refused():
    with pytest.raises(InputError, match="ScoreModel"):
        Likelihood()(nn.Linear(2, 2), torch.zeros(2, 2))


class Widening(torch.nn.Module, SDE):
    """Noise that grows linearly to a learned width, which is the prior's."""

    def __init__(self, width):
        super().__init__()
        self.width = torch.nn.Parameter(torch.tensor(width, dtype=torch.float64))

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 0.01 + self.width * t


def test_the_gradient_reaches_the_schedule_through_the_prior_too():
    """Against finite differences, with an exact model of data that the width blurs."""
    x = normal(3, 2)

    def value(width):
        sde = Widening(width)
        exact = GaussianModel(torch.zeros(2).double(), 0.7, sde)
        exactly = Likelihood("exact", 1e-9, 1e-9, differentiable=True)
        return exactly(exact, x).log_prob.sum(), sde

    total, sde = value(4.0)
    total.backward()
    h = 1e-4
    slope = (float(value(4 + h)[0].detach()) - float(value(4 - h)[0].detach())) / (2 * h)
    assert float(sde.width.grad) == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 0.01
