"""The discrete bound: each term against its closed form, and the gaps that follow from it."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    DiscreteVP,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    RectifiedFlow,
    ScoreFunction,
    SubVPSDE,
)
from scoresde.codec import DiscretisedGaussian, First, GaussianDecoder, Levels
from scoresde.likelihood import (
    DiscreteBound,
    ForwardVariance,
    GenerativeClassifier,
    PosteriorVariance,
    ReferenceVariance,
    Variance,
    VariationalBound,
    prior_kl,
    prior_mismatch,
)
from scoresde.likelihood.discrete import consistency_term, reconstruction_term
from scoresde.likelihood.variance import per_example
from scoresde.passes import count_pass
from scoresde.sde import LinearBetas, ZeroSNRChain, as_time
from scoresde.shapes import expand

FORWARD, POSTERIOR = ForwardVariance(), PosteriorVariance()
C = 0.25  # the variance of the data


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearLogSNR(SDE):
    """A variance-preserving process whose log-SNR falls linearly, from 10 to -5 by default."""

    def __init__(self, first=10.0, last=-5.0):
        self.first, self.last = first, last

    def log_snr(self, t):
        return self.first + (self.last - self.first) * as_time(t)

    def alpha(self, t):
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t):
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    @property
    def prior_std(self):
        return 1.0


@dataclass(frozen=True)
class TrueVariance(Variance):
    """That of p(x_s | x_t) for the data N(0, c)."""

    c: float = C

    def moments(self, model, t):
        a = model.sde.alpha(as_time(t)) ** 2
        return a, a * self.c + model.sde.sigma(as_time(t)) ** 2

    def __call__(self, model, x, t, s, **cond):
        (a, v), (b, w) = self.moments(model, t), self.moments(model, s)
        return per_example(w - a / b * w**2 / v, x)

    def first(self, model, x, t, **cond):
        a, v = self.moments(model, t)
        return per_example(self.c - a * self.c**2 / v, x)


def gaussian(sde, dim=1, c=C):
    return GaussianModel(torch.zeros(dim).double(), math.sqrt(c), sde)


def closed(sde, steps, variance, c=C):
    """The expected reconstruction, each step's term, and the prior term of N(0, c), by hand."""
    start = 0 if float(sde.sigma(as_time(0.0))) > 1e-6 else 1
    t = torch.arange(start, steps + 1).double() / steps
    signal, noise = sde.alpha(t) ** 2, sde.sigma(t) ** 2
    total = signal * c + noise
    keep = signal[1:] / signal[:-1]
    beta = noise[1:] - keep * noise[:-1]
    exact = beta * noise[:-1] / noise[1:]
    v = {
        ForwardVariance: beta,
        PosteriorVariance: exact,
        ReferenceVariance: exact,
        TrueVariance: total[:-1] - keep * total[:-1] ** 2 / total[1:],
    }[type(variance)]
    error = c - signal * c**2 / total
    gain = signal[:-1].sqrt() * beta / noise[1:]
    terms = 0.5 * (exact / v - 1 - torch.log(exact / v) + gain**2 * error[1:] / v)
    last = {ReferenceVariance: exact[0], TrueVariance: error[0]}.get(type(variance), noise[0])
    reconstruction = 0.5 * (torch.log(2 * math.pi * last) + error[0] / last)
    scale = sde.prior_std**2
    prior = 0.5 * (total[-1] / scale - 1 - torch.log(noise[-1] / scale))
    return reconstruction, terms, prior


def entropy(c=C):
    return 0.5 * math.log(2 * math.pi * math.e * c)


def gap(parts):
    reconstruction, terms, prior = parts
    return float(reconstruction + terms.sum() + prior) - entropy()


def quadrature(sde, steps, variance, c=C):
    """The same expectations of the code's terms: they are quadratic in the data and the noise, so
    that two nodes for each are exact."""
    model, states = gaussian(sde, c=c), DiscreteBound(None, steps, variance).check(gaussian(sde))
    one = torch.tensor([1.0, -1.0]).double()
    x, z = (part.reshape(-1, 1) for part in torch.meshgrid(math.sqrt(c) * one, one, indexing="ij"))
    each, n = len(states) - 1, len(x)
    t, s = (part.repeat_interleave(n) for part in (states[1:], states[:-1]))
    x_all, z_all = x.repeat(each, 1), z.repeat(each, 1)
    found = consistency_term(model, x_all, sde.perturb(x_all, t, z_all), t, s, variance)
    first = sde.perturb(x, states[0], z)
    last = reconstruction_term(model, x, first, states[0], GaussianDecoder(), variance)
    return last.mean(), found.reshape(each, n).mean(1), prior_kl(sde, x).mean()


def assert_same(ours, truth, atol):
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def z_score(values, truth):
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


# --- Gaussian data -------------------------------------------------------------------------------

GAPS = [(10, 0.0995, 4.82), (100, 0.0115, 0.299), (1000, 0.00117, 0.0287)]


@pytest.mark.parametrize(("steps", "forward", "posterior"), GAPS)
def test_the_gap_of_a_gaussian_is_the_one_derived(steps, forward, posterior):
    for variance, truth in ((FORWARD, forward), (POSTERIOR, posterior)):
        ours = quadrature(LinearLogSNR(), steps, variance)
        assert_same(ours, closed(LinearLogSNR(), steps, variance), 1e-10)
        assert gap(ours) == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("variance", [FORWARD, POSTERIOR], ids=["forward", "posterior"])
def test_the_random_terms_have_that_mean(variance):
    n, steps, dim = 4000, 100, 2
    x = math.sqrt(C) * normal(n, dim)
    ours = DiscreteBound(None, steps, variance)(gaussian(LinearLogSNR(), dim), x, seed=0)
    reconstruction, terms, prior = closed(LinearLogSNR(), steps, variance)
    assert abs(z_score(ours.reconstruction, dim * float(reconstruction))) < 4
    assert abs(z_score(ours.prior, dim * float(prior))) < 4
    assert abs(z_score(ours.consistency, dim * float(terms.sum()))) < 4
    each = [abs(z_score(ours.terms[:, i], dim * float(terms[i]))) for i in range(steps)]
    assert max(each) < 4.5
    truth = dim * gap((reconstruction, terms, prior))
    assert abs(z_score(exact_log_prob(x) - ours.log_prob, truth)) < 4


def exact_log_prob(x, c=C):
    return torch.distributions.Normal(0.0, math.sqrt(c)).log_prob(x).sum(1)


@pytest.mark.parametrize("draws", [None, 7])
def test_the_parts_add_up(draws):
    x = normal(5, 3)
    ours = DiscreteBound(None, 40, draws=draws)(gaussian(VPSDE(), 3), x, seed=0)
    total = ours.reconstruction + ours.terms.sum(1) + ours.prior
    assert float((ours.log_prob + total).abs().max()) < 1e-12 * float(total.abs().max())
    torch.testing.assert_close(ours.terms.sum(1), ours.consistency, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(ours.parts.values()), -ours.log_prob, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.bits_per_dim, -ours.log_prob / (3 * math.log(2)))
    assert ours.terms.shape == (5, 40)
    assert bool((ours.terms[:, 0] == 0).all())  # the decoder's


def test_the_chain_of_ho_et_al_and_its_quirk():
    chain = DiscreteVP()
    for variance, truth in ((FORWARD, 0.00109), (ReferenceVariance(), 0.57)):
        ours = quadrature(chain, None, variance)
        assert_same(ours, closed(chain, 1000, variance), 1e-9)
        assert gap(ours) == pytest.approx(truth, rel=0.01)


def test_the_quirk_stays_with_many_steps():
    chain = DiscreteVP(LinearBetas(steps=4000))
    assert gap(quadrature(chain, None, ReferenceVariance())) == pytest.approx(0.487, rel=0.01)
    assert gap(quadrature(chain, None, FORWARD)) < 0.001


def test_the_lower_variance_is_short_where_early_steps_never_become_fine():
    """Without noise at t = 0 it doubles from step 1 to step 2, however many there are."""
    gaps = [gap(quadrature(VPSDE(), steps, POSTERIOR)) for steps in (1000, 8000)]
    assert gaps == pytest.approx([0.443, 0.31], rel=0.1)
    assert gap(quadrature(VPSDE(), 1000, FORWARD)) == pytest.approx(0.001, rel=0.2)


def test_the_reference_variance_of_a_cut_needs_its_number_of_steps():
    ours = quadrature(VPSDE(), 50, ReferenceVariance(50))
    assert_same(ours, closed(VPSDE(), 50, ReferenceVariance(50)), 1e-10)
    with pytest.raises(InputError, match=r"steps.*VPSDE"):
        quadrature(VPSDE(), 50, ReferenceVariance())
    with pytest.raises(InputError, match="1"):
        ReferenceVariance(1)


@pytest.mark.parametrize("steps", [10, 1000])
def test_the_true_variance_leaves_the_mismatch_of_the_prior_alone(steps):
    sde = LinearLogSNR()
    ours = quadrature(sde, steps, TrueVariance())
    left = prior_mismatch(sde, torch.zeros(1), torch.tensor([C]).double())
    assert gap(ours) == pytest.approx(float(left), abs=1e-9)
    assert float(left) == pytest.approx(6.32e-6, rel=0.01)


@pytest.mark.parametrize("steps", [10, 100])
def test_the_forward_variance_is_exact_for_the_standard_normal(steps):
    reconstruction, terms, prior = quadrature(LinearLogSNR(), steps, FORWARD, c=1.0)
    assert abs(float(reconstruction + terms.sum() + prior) - entropy(1.0)) < 1e-9


PROCESSES = [RectifiedFlow(), ZeroSNRChain(), VESDE(), SubVPSDE(), VPSDE(), DiscreteVP()]


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("variance", [FORWARD, POSTERIOR], ids=["forward", "posterior"])
def test_every_process_has_its_closed_form(sde, variance):
    own = isinstance(sde, DiscreteVP | ZeroSNRChain)
    steps = sde.steps if own else 60
    ours, truth = quadrature(sde, steps, variance), closed(sde, steps, variance)
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    x = math.sqrt(C) * normal(3000, 2)
    bound = DiscreteBound(None, None if own else steps, variance, draws=30 if own else None)
    found = bound(gaussian(sde, 2), x, seed=0)
    assert abs(z_score(found.reconstruction, 2 * float(truth[0]))) < 4
    assert abs(z_score(found.consistency, 2 * float(truth[1].sum()))) < 4
    assert found.terms.shape[1] == steps


# --- A random subset, and the standard error -----------------------------------------------------


def expected_terms(model, x, states, variance):
    """The expectation over the noise of the terms of an example of one dimension, by 3 nodes."""
    nodes = math.sqrt(3) * torch.tensor([-1.0, 0.0, 1.0]).double()
    weights = torch.tensor([1.0, 4.0, 1.0]).double() / 6
    each = len(states) - 1
    t, s = (part.repeat_interleave(3) for part in (states[1:], states[:-1]))
    z, x = nodes.repeat(each)[:, None], x.expand(3 * each, 1)
    found = consistency_term(model, x, model.sde.perturb(x, t, z), t, s, variance)
    return found.reshape(each, 3) @ weights


@pytest.mark.parametrize("draws", [1, 3, 40])
@pytest.mark.parametrize("sde", [VPSDE(), LinearLogSNR()], ids=["VP", "linear"])
def test_a_random_subset_is_unbiased_in_each_term(draws, sde):
    model, bound = gaussian(sde), DiscreteBound(None, 60, FORWARD, draws)
    x, n = torch.tensor([[0.7]]).double(), 8000
    truth = expected_terms(model, x, bound.check(model), FORWARD)
    ours = bound(model, x.expand(n, 1), seed=0)
    assert abs(z_score(ours.consistency, float(truth.sum()))) < 4
    terms = ours.terms[:, -len(truth) :]
    seen = (terms != 0).sum(0) > 30  # fewer have no normal law
    each = [abs(z_score(terms[:, i], float(truth[i]))) for i in torch.nonzero(seen).flatten()]
    assert len(each) > 20
    assert max(each) < 5


def test_a_random_subset_agrees_with_the_full_sum():
    x, model = math.sqrt(C) * normal(200, 8), gaussian(VPSDE(), 8)
    full = DiscreteBound(None, 100)(model, x, seed=0)
    some = DiscreteBound(None, 100, draws=20)(model, x, seed=1)
    error = (full.standard_error**2 + some.standard_error**2).sqrt()
    away = (some.log_prob - full.log_prob) / error
    assert float(away.abs().max()) < 5
    assert abs(float(away.mean())) * 200**0.5 < 4


@pytest.mark.parametrize("draws", [None, 16, 64])
@pytest.mark.parametrize("variance", [FORWARD, POSTERIOR], ids=["forward", "posterior"])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), LinearLogSNR()], ids=["VP", "VE", "linear"])
def test_the_standard_error_is_the_scatter_over_seeds(draws, variance, sde):
    """In 64 dimensions, where early terms differ from each other by much more than by noise."""
    n, dim = 300, 64
    x = math.sqrt(C) * normal(1, dim).expand(n, dim)
    ours = DiscreteBound(None, 60, variance, draws)(gaussian(sde, dim), x, seed=0)
    claimed = ours.standard_error.square().mean().sqrt()
    assert 0.8 < float(claimed / ours.log_prob.std()) < 1.3


def test_the_standard_error_of_one_term_is_unknown():
    x = normal(2, 3)
    for bound in (DiscreteBound(None, 2), DiscreteBound(None, 9, draws=1)):
        assert bool(bound(gaussian(VPSDE(), 3), x, seed=0).standard_error.isnan().all())


def test_an_example_has_the_same_value_alone_and_in_a_batch():
    x, model = normal(5, 3), gaussian(VPSDE(), 3)
    for draws in (None, 6):
        bound = DiscreteBound(None, 12, draws=draws)
        batch = bound(model, x, seed=3)
        alone = bound(model, x[3:4], seed=3, seeds=[3])
        torch.testing.assert_close(alone.terms[0], batch.terms[3], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone.log_prob[0], batch.log_prob[3], rtol=1e-12, atol=0)
        again = bound(model, x, seed=4)
        assert bool((again.log_prob != batch.log_prob).all())


def test_passes_are_those_of_the_steps_and_of_the_decoder():
    x = torch.zeros(2, 3).double()
    at_levels = Levels(3).low + x + 1.0  # the middle of three
    model = gaussian(VPSDE(), 3)
    cases = [
        (DiscreteBound(None, 10), x, 9 + 4),
        (DiscreteBound(DiscretisedGaussian(3), 10), at_levels, 9 + 4),
        (DiscreteBound(Levels(3), 10), at_levels, 9),
        (DiscreteBound(Levels(3), 10, draws=5), at_levels, 5),
    ]
    for bound, data, passes in cases:
        assert bound(model, data, seed=0).nfe.tolist() == [passes, passes]
    ve = DiscreteBound(Levels(3), 10)(gaussian(VESDE(), 3), at_levels, seed=0)
    assert ve.nfe.tolist() == [10, 10]


def test_conditions_reach_every_pass():
    means = torch.tensor([[-2.0], [2.0]]).double()
    sde, x = VPSDE(), torch.full((4, 1), 1.9).double()
    both = GaussianMixtureModel([0.5, 0.5], means, [0.5, 0.5], sde, labels=[0, 1])
    one = GaussianMixtureModel([1.0], means[1:], [0.5], sde)
    bound = DiscreteBound(None, 30)
    label = torch.ones(4, dtype=torch.int64)
    ours, truth = bound(both, x, seed=0, label=label), bound(one, x, seed=0)
    torch.testing.assert_close(ours.terms, truth.terms, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.reconstruction, truth.reconstruction)
    other = bound(both, x, seed=0, label=0 * label)
    assert bool((other.log_prob < ours.log_prob - 5).all())


# --- Decoders ------------------------------------------------------------------------------------


def first(x, sigma=0.05, alpha=0.9, denoised=None):
    sigma, alpha = torch.tensor([sigma, alpha], dtype=torch.float64).unbind()
    return First(x, alpha, sigma, lambda: x if denoised is None else denoised, sigma**2)


def centres(levels, dtype=torch.float64):
    return ((2 * torch.arange(levels, dtype=torch.float64) + 1 - levels) / levels).to(dtype)


@pytest.mark.parametrize("kind", [Levels, DiscretisedGaussian])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["64", "32"]
)
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 3.0])
def test_the_levels_sum_to_one(kind, dtype, tolerance, levels, sigma):
    state = 3 * normal(200).to(dtype)
    table = state[:, None].expand(200, levels)[..., None].reshape(-1, 1)
    x = centres(levels, dtype).repeat(200)[:, None]
    found = kind(levels).log_prob(x, first(table, sigma)).double().reshape(200, levels)
    assert float((found.exp().sum(1) - 1).abs().max()) < tolerance


def test_a_level_has_the_probability_of_its_open_bin():
    mean, std = torch.tensor([0.3, 0.2], dtype=torch.float64)
    at = torch.distributions.Normal(mean, std)
    x, denoised = centres(5)[:, None], mean.expand(5, 1)
    ours = DiscretisedGaussian(5).log_prob(x, first(x, 0.2, denoised=denoised)).exp()
    ends = [-math.inf, -0.6, -0.2, 0.2, 0.6, math.inf]
    edges = at.cdf(torch.tensor(ends, dtype=torch.float64))
    torch.testing.assert_close(ours, edges.diff(), rtol=1e-10, atol=1e-15)


def test_a_softmax_is_the_posterior_under_equal_shares():
    z, alpha, sigma = torch.tensor([[0.2]], dtype=torch.float64), 0.9, 0.3
    likelihoods = torch.exp(-0.5 * ((z[0, 0] - alpha * centres(5)) / sigma) ** 2)
    x = centres(5)[:, None]
    ours = Levels(5).log_prob(x, first(z.expand(5, 1), sigma, alpha)).exp()
    torch.testing.assert_close(ours, likelihoods / likelihoods.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_finite_with_finite_gradients(dtype):
    x = centres(256, dtype)[:, None]
    for kind in (Levels, DiscretisedGaussian):
        for far in (-50.0, 0.001, 50.0):
            away = torch.full_like(x, far, requires_grad=True)
            found = kind(256).log_prob(x, first(away, 1e-3)).sum()
            (slope,) = torch.autograd.grad(found, away)
            assert bool(torch.isfinite(found))
            assert bool(torch.isfinite(slope).all())


def test_the_published_decoder_has_levels_at_the_ends():
    """Its half step is 1 / (L - 1) where the data are 2 y / (L - 1) - 1."""
    decoder, y = DiscretisedGaussian.reference(256), torch.arange(256).double()
    x, denoised = (2 * y / 255 - 1)[:, None], torch.full((256, 1), 0.1).double()
    decoder.check(x)
    ours = decoder.log_prob(x, first(x, 0.02, denoised=denoised)).exp()
    at, half = torch.distributions.Normal(0.1, 0.02), 1 / 255
    inside = at.cdf(x[1:-1, 0] + half) - at.cdf(x[1:-1, 0] - half)
    torch.testing.assert_close(ours[1:-1], inside, rtol=1e-6, atol=1e-14)
    assert float(ours.sum()) == pytest.approx(1, abs=1e-12)
    with pytest.raises(InputError, match="256"):
        DiscretisedGaussian(256).check(x)


WRONG = {
    "dequantised": centres(17)[:, None] + 0.02,
    "in [0, 1]": (centres(17)[:, None] + 1) / 2,
    "raw": torch.arange(17).double()[:, None],
    "not finite": torch.full((2, 1), math.nan).double(),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("decoder", [Levels(17), DiscretisedGaussian(17)])
def test_data_off_their_levels_are_refused(decoder, data):
    for bound in (DiscreteBound(decoder, 10), VariationalBound(decoder=decoder)):
        with pytest.raises(InputError, match=r"17|finite"):
            bound(gaussian(VPSDE()), data)


def test_levels_in_another_range():
    x = ((torch.arange(17) + 0.5) / 17)[:, None]
    result = DiscreteBound(Levels(17, 0.0, 1.0), 10)(gaussian(VPSDE()), x, seed=0)
    assert bool(result.log_prob.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 1}, "steps"),
        ({"steps": 0}, "steps"),
        ({"draws": 0}, "draws"),
        ({"decoder": 17}, "decoder"),
        ({"variance": "posterior"}, "variance"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        DiscreteBound(**arguments)


def test_a_continuous_process_must_be_cut():
    with pytest.raises(InputError, match="steps"):
        DiscreteBound()(gaussian(VPSDE()), torch.zeros(2, 1))


def test_the_classifier_names_what_it_takes():
    with pytest.raises(InputError, match="DiscreteBound"):
        GenerativeClassifier(DiscreteBound(), 2)


# --- A known probability of each of 17 levels ----------------------------------------------------

SHARES = torch.rand(17, generator=torch.Generator().manual_seed(0)).double()
SHARES = SHARES / SHARES.sum()
BITS = -float(SHARES @ SHARES.log2())


class Softmax(ScoreFunction):
    """The exact model of independent values on the centres of levels, with given shares."""

    def __init__(self, sde, shares=SHARES):
        super().__init__()
        self.sde, self.calls = sde, 0
        self.register_buffer("shares", shares)
        self.register_buffer("centres", centres(len(shares), shares.dtype))

    def denoise(self, x, t):
        self.calls += 1
        count_pass(len(x))
        alpha, sigma = (
            expand(c(as_time(t)), x)[..., None] for c in (self.sde.alpha, self.sde.sigma)
        )
        away = (x[..., None] - alpha * self.centres) / sigma
        return (self.shares.log() - 0.5 * away**2).softmax(-1) @ self.centres

    def noise(self, x, t):
        alpha, sigma = (expand(c(as_time(t)), x) for c in (self.sde.alpha, self.sde.sigma))
        return (x - alpha * self.denoise(x, t)) / sigma

    def score(self, x, t):
        return -self.noise(x, t) / expand(self.sde.sigma(as_time(t)), x)


class Expected:
    """Expectations over levels and noise: trapezoids of the noise, which converge beyond order."""

    def __init__(self, model, nodes):
        z = torch.linspace(-8, 8, nodes).double()
        weight = torch.exp(-0.5 * z**2)
        self.model, self.weight = model, (SHARES[:, None] * (weight / weight.sum())).flatten()
        self.z = z.repeat(17)[:, None]
        self.x = centres(17).repeat_interleave(nodes)[:, None]

    def of(self, term, *times):
        return float(self.weight @ term(self.x, self.model.sde.perturb(self.x, times[0], self.z)))

    def reconstruction(self, t, decoder):
        return self.of(
            lambda x, z: reconstruction_term(self.model, x, z, t, decoder, POSTERIOR), t
        )

    def consistency(self, t, s):
        return self.of(lambda x, z: consistency_term(self.model, x, z, t, s, POSTERIOR), t)

    def squares(self, t):
        return self.of(lambda x, z: (self.z - self.model.noise(z, t)).square().flatten(), t)

    def prior(self):
        return float(self.weight @ prior_kl(self.model.sde, self.x))


def continuous_bound(sde, nodes=129):
    """The bound of a log-SNR linear in t, in bits: Simpson's rule in t."""
    model = Softmax(sde)
    here, count = Expected(model, nodes), 201
    t = torch.linspace(0, 1, count).double()
    weights = torch.ones(count).double()
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    values = torch.tensor([here.squares(one) for one in t]).double()
    diffusion = 0.5 * (sde.first - sde.last) * float(weights @ values) / (3 * (count - 1))
    total = here.reconstruction(t[0], Levels(17)) + diffusion + here.prior()
    return total / math.log(2)


def test_the_continuous_bound_tends_to_the_entropy():
    """What is lost is the prior's mismatch, and at a coarse end a decoder that knows no shares."""
    assert continuous_bound(LinearLogSNR(13.3, -8.0)) == pytest.approx(BITS, abs=1e-4)
    early = LinearLogSNR(13.3, -2.0)
    mean = SHARES @ centres(17)
    variance = SHARES @ centres(17) ** 2 - mean**2
    lost = float(prior_mismatch(early, mean[None], variance[None])) / math.log(2)
    assert lost > 0.001
    assert continuous_bound(early) - BITS == pytest.approx(lost, rel=0.05)
    assert 0.01 < continuous_bound(LinearLogSNR(6.0, -8.0)) - BITS < 0.1


def test_the_random_continuous_bound_has_that_mean():
    sde = LinearLogSNR(13.3, -5.0)
    model, n, dim = Softmax(sde), 300, 64
    levels = torch.multinomial(SHARES, n * dim, True, generator=torch.Generator().manual_seed(1))
    x = model.centres[levels].reshape(n, dim)
    ours = VariationalBound(8, decoder=Levels(17))(model, x, seed=0)
    known = SHARES.log()[levels].reshape(n, dim).sum(1)  # without the scatter of the data
    excess = (known - ours.log_prob) / (dim * math.log(2))
    assert abs(z_score(excess, continuous_bound(sde) - BITS)) < 4
    assert float(excess.std()) / n**0.5 < 0.035


def chain_bound(sde, steps, nodes=97):
    here, t = Expected(Softmax(sde), nodes), torch.arange(steps + 1).double() / steps
    total = sum(here.consistency(b, a) for a, b in itertools.pairwise(t))
    total += here.reconstruction(t[0], Levels(17)) + here.prior()
    return total / math.log(2)


def test_the_gap_of_a_chain_falls_as_one_over_its_steps():
    """It is a share of the entropy: 0.332 and 0.0318 are known for 3.41104 bits, of which the
    prior has 0.0004."""
    sde = LinearLogSNR(13.3, -5.0)
    limit = continuous_bound(sde)
    gaps = {steps: chain_bound(sde, steps) - limit for steps in (100, 300, 1000)}
    assert gaps[100] / BITS == pytest.approx((0.332 - 0.0004) / 3.41104, rel=0.005)
    assert gaps[1000] / BITS == pytest.approx((0.0318 - 0.0004) / 3.41104, rel=0.005)
    assert math.log10(gaps[1000] / gaps[100]) == pytest.approx(-1, abs=0.05)
    assert math.log(gaps[300] / gaps[100]) / math.log(3) == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize("draws", [None, 32])
def test_the_random_chain_bound_has_that_mean(draws):
    sde, n, dim = LinearLogSNR(13.3, -5.0), 100, 64
    model = Softmax(sde)
    levels = torch.multinomial(SHARES, n * dim, True, generator=torch.Generator().manual_seed(2))
    x = model.centres[levels].reshape(n, dim)
    ours = DiscreteBound(Levels(17), 100, draws=draws)(model, x, seed=0)
    known = -SHARES.log2()[levels].reshape(n, dim).mean(1)
    assert abs(z_score(ours.bits_per_dim - known, chain_bound(sde, 100) - BITS)) < 4
