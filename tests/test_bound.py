"""The variational bound: against exact densities, and each part against its closed form."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from scoresde import (
    VESDE,
    VPSDE,
    DiscreteVP,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    ScoreFunction,
    ScoreModel,
    SubVPSDE,
)
from scoresde.likelihood import VariationalBound, prior_kl, prior_mismatch, spectrum
from scoresde.times import (
    ChainTimes,
    FoldedTimes,
    ImportanceTimes,
    LevelTimes,
    LogNormalTimes,
    LowDiscrepancy,
    UniformTimes,
)

SDES = [VPSDE(), SubVPSDE(), VESDE()]

each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(sde, *shape):
    return GaussianMixtureModel([0.3, 0.7], 0.8 * normal(2, *shape, seed=5), [0.3, 0.5], sde)


def gaussian(sde):
    """Two dimensions, one of them fine: at VE's first noise level it is blurred by a tenth."""
    std = torch.tensor([0.8, 0.03], dtype=torch.float64)
    return GaussianModel(torch.tensor([0.5, -0.2], dtype=torch.float64), std, sde)


def clean(model, n, seed=0):
    """Data, and their own log-density: VE's marginal at t = 0 is noised, VP's is not."""
    sde, model.sde = model.sde, VPSDE()
    x = model.sample(n, seed=seed)
    truth = model.log_prob(x)
    model.sde = sde
    return x, truth


def z_score(values, truth):
    """How many standard errors the mean of independent values is from the truth."""
    return float((values.mean() - truth) / (values.std() / len(values) ** 0.5))


class Changed(ScoreFunction):
    """A model with another noise, which counts its passes."""

    def __init__(self, model, change=lambda noise: noise):
        super().__init__()
        self.model, self.sde, self.change, self.calls = model, model.sde, change, 0

    def noise(self, x, t):
        self.calls += 1
        return self.change(self.model.noise(x, t))

    score = denoise = None


# --- The bound of an exact model -----------------------------------------------------------------


@each_sde
@pytest.mark.parametrize(
    ("shape", "n"), [((2,), 40_000), ((64,), 1200), ((3, 8, 8), 600)], ids=["2", "64", "3x8x8"]
)
def test_the_bound_of_an_exact_model_is_its_log_density(shape, n, sde):
    """The difference has no scatter of the data in it: a loss wrong by 1 % would be seen."""
    model = mixture(sde, *shape)
    x, truth = clean(model, n)
    ours = VariationalBound(draws=16)(model, x, seed=0)
    error = ours.log_prob - truth
    assert abs(z_score(error, 0.0)) < 3.5
    assert float(error.std()) / n**0.5 * 3.5 < 0.01 * float(ours.diffusion.mean())


def parts(model, x, eps):
    """The prior's divergence, the reconstruction and the diffusion term, in closed form.

    With w = c e^lambda the error of the noise has the mean (w / (1 + w))^2 + d^2 e^lambda /
    (1 + w)^2 in each dimension, d = x - m, whose integral over lambda is elementary.
    """
    sde, c, d2 = model.sde, model.variances, (x - model.mean) ** 2
    ends = torch.tensor([eps, 1.0], dtype=torch.float64)
    snr = torch.exp(sde.log_snr(ends))
    w, w_last = c * snr[0], c * snr[1]
    integral = (torch.log1p(w) + 1 / (1 + w)) - (torch.log1p(w_last) + 1 / (1 + w_last))
    diffusion = 0.5 * (integral + d2 / c * (1 / (1 + w_last) - 1 / (1 + w))).sum(1)
    error = (w / (1 + w)) ** 2 + d2 * snr[0] / (1 + w) ** 2
    reconstruction = 0.5 * (torch.log(snr[0] / (2 * torch.pi)) - error).sum(1)
    q = Normal(sde.alpha(ends)[1] * x, sde.sigma(ends)[1])
    prior = kl_divergence(q, Normal(torch.zeros_like(x), sde.prior_std)).sum(1)
    return prior, reconstruction, diffusion


@each_sde
@pytest.mark.parametrize("eps", [None, 0.1])
def test_each_part_of_a_gaussian_is_its_closed_form(eps, sde):
    model, n = gaussian(sde), 4000
    x, _ = clean(model, 1, seed=3)
    prior, reconstruction, diffusion = parts(model, x, eps or sde.cutoffs.likelihood)
    ours = VariationalBound(16, eps=eps)(model, x.expand(n, 2), seed=0)
    torch.testing.assert_close(ours.prior_kl, prior.expand(n), rtol=1e-6, atol=1e-12)
    assert abs(z_score(ours.reconstruction, reconstruction)) < 4
    assert abs(z_score(ours.diffusion, diffusion)) < 4


@each_sde
def test_the_closed_form_is_the_log_density_of_every_example(sde):
    """But for what is lost at the two ends: in 0.03 at VE's 0.01, and little elsewhere."""
    model = gaussian(sde)
    x, truth = clean(model, 100)
    prior, reconstruction, diffusion = parts(model, x, 0 if isinstance(sde, VESDE) else 1e-6)
    error = reconstruction - diffusion - prior - truth
    assert float(error.abs().max()) < (0.05 if isinstance(sde, VESDE) else 1e-3)


@each_sde
def test_a_late_cutoff_costs_a_gaussian_what_the_module_says(sde):
    """On average over the data: a Gaussian step that is wider than the posterior."""
    model, eps = gaussian(sde), 0.2
    x, truth = clean(model, 40_000)
    prior, reconstruction, diffusion = parts(model, x, eps)
    r = torch.exp(-sde.log_snr(torch.tensor(eps).double())) / model.variances
    lost = 0.5 * (torch.log1p(r) - r / (1 + r)).sum()
    lost = lost + prior_mismatch(sde, model.mean, model.variances)
    assert abs(z_score(truth - (reconstruction - diffusion - prior), lost)) < 4
    assert float(lost) > 0.3


# --- The bound of a disturbed model --------------------------------------------------------------


@each_sde
def test_a_constant_offset_costs_half_its_square_per_unit_of_log_snr(sde):
    """And once more for the reconstruction."""
    model, offset = mixture(sde, 2), torch.tensor([0.3, -0.4], dtype=torch.float64)
    x, _ = clean(model, 4000)
    bound = VariationalBound(8)
    ends = torch.tensor([sde.cutoffs.likelihood, 1.0], dtype=torch.float64)
    first, last = sde.log_snr(ends)
    exact = bound(model, x, seed=0)
    ours = bound(Changed(model, lambda noise: noise + offset), x, seed=0)
    square = float(offset.square().sum())
    assert abs(z_score(ours.diffusion - exact.diffusion, 0.5 * (first - last) * square)) < 4
    assert abs(z_score(exact.reconstruction - ours.reconstruction, 0.5 * square)) < 4
    assert abs(z_score(exact.log_prob - ours.log_prob, 0.5 * (first - last + 1) * square)) < 4


@each_sde
def test_a_noise_too_large_by_a_tenth_costs_a_hundredth_of_its_square(sde):
    """Since the error of the exact noise is orthogonal to it."""
    model = gaussian(sde)
    x, _ = clean(model, 4000)
    ends = torch.tensor([sde.cutoffs.likelihood, 1.0], dtype=torch.float64)
    snr = sde.log_snr(ends)[:, None]
    w = model.variances * torch.exp(snr)
    squares = ((snr - torch.log1p(w))[0] - (snr - torch.log1p(w))[1]).sum() + (
        1 / (1 + w[0])
    ).sum()
    exact, ours = (
        VariationalBound(8)(Changed(model, lambda noise, by=by: by * noise), x, seed=0).log_prob
        for by in (1.0, 1.1)
    )
    assert abs(z_score(exact - ours, 0.5 * 0.01 * squares)) < 4


# --- Times ---------------------------------------------------------------------------------------


def repeated(times, sde=None, shape=(2,), n=2000, draws=8, eps=None):
    """The bounds of one example by n streams."""
    model = mixture(sde or VPSDE(), *shape)
    x, _ = clean(model, 1)
    bound = VariationalBound(draws, times, eps)
    return bound(model, x.expand(n, *shape), seed=0)


@pytest.mark.parametrize(
    "times",
    [
        UniformTimes(),
        ImportanceTimes(),
        LowDiscrepancy(UniformTimes()),
        FoldedTimes(UniformTimes()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("sde", [*SDES, DiscreteVP()], ids=lambda sde: type(sde).__name__)
def test_the_bound_does_not_depend_on_how_times_are_drawn(times, sde):
    ours = repeated(times, sde, eps=0.05).diffusion
    theirs = repeated(FoldedTimes(ImportanceTimes()), sde, eps=0.05, n=4000).diffusion
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert abs(float((ours.mean() - theirs.mean()) / error)) < 4


def test_importance_sampling_and_even_times_lower_the_error():
    """In 192 dimensions, by one example's own bounds."""
    even = [UniformTimes(), ImportanceTimes()]
    even += [LowDiscrepancy(ImportanceTimes()), FoldedTimes(ImportanceTimes())]
    errors = [float(repeated(times, shape=(3, 8, 8), n=200).log_prob.std()) for times in even]
    assert errors[0] > 4 * errors[1]
    assert errors[1] > 2 * errors[2]
    assert errors[2] > 1.25 * errors[3]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_folded_times_cover_there_and_back(n):
    shifts = torch.rand(2000, generator=torch.Generator().manual_seed(0)).double()
    u = torch.stack([FoldedTimes().spread(shift.expand(n)) for shift in shifts])
    assert (float(u.min()) >= 0, float(u.max()) <= 1) == (True, True)
    for power in (1, 2):
        assert abs(z_score((u**power)[:, -1], 1 / (power + 1))) < 4
    # Even on both ways: the largest distance to a neighbour is twice that of a grid, at most.
    edges = torch.cat((torch.zeros(2000, 1), u.sort(1).values, torch.ones(2000, 1)), 1)
    assert float(edges.diff(dim=1).max()) <= 2 / n + 1e-12


@pytest.mark.parametrize(
    "times", [LogNormalTimes(), LevelTimes(), LowDiscrepancy(LogNormalTimes())], ids=repr
)
def test_times_whose_average_is_another_integral_are_refused(times):
    model = Changed(mixture(VPSDE(), 2))
    with pytest.raises(InputError, match="no density of times"):
        VariationalBound(times=times)(model, normal(4, 2))
    with pytest.raises(InputError, match="no density of times"):
        VariationalBound(times=ChainTimes())(Changed(mixture(DiscreteVP(), 2)), normal(4, 2))
    assert model.calls == 0


# --- The standard error --------------------------------------------------------------------------


@each_sde
@pytest.mark.parametrize("replicates", [2, 4])
def test_the_standard_error_is_truthful(replicates, sde):
    """Over 4000 streams the variance claimed is the variance there is.

    The ratio scatters by that of two variances, for values with tails by 3 % here.
    """
    model, n = mixture(sde, 2), 4000
    x, _ = clean(model, 1)
    ours = VariationalBound(4, replicates=replicates)(model, x.expand(n, 2), seed=0)
    ratio = float(ours.standard_error.square().mean() / ours.log_prob.var())
    assert ratio == pytest.approx(1, abs=0.15)


def test_one_replicate_knows_no_standard_error():
    assert bool(
        VariationalBound(replicates=1)(mixture(VPSDE(), 2), normal(3, 2))
        .standard_error.isnan()
        .all()
    )


# --- Streams, shapes and counting ----------------------------------------------------------------


def test_an_example_is_the_same_alone_and_in_a_batch_in_any_order():
    model, bound = mixture(VPSDE(), 3), VariationalBound(4)
    x = model.sample(16, seed=0)
    batch = bound(model, x, seed=0).log_prob
    reverse = bound(model, x.flip(0), seed=0, seeds=reversed(range(16))).log_prob.flip(0)
    alone = bound(model, x[5:6], seed=0, seeds=[5]).log_prob
    torch.testing.assert_close(reverse, batch, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone, batch[5:6], rtol=0, atol=1e-10)


def test_a_recorded_seed_gives_the_bound_again():
    model, x = mixture(VPSDE(), 3), normal(4, 3)
    first = VariationalBound(2)(model, x)
    again = VariationalBound(2)(model, x, seed=first.seed)
    other = VariationalBound(2)(model, x, seed=first.seed ^ 1)
    assert torch.equal(first.log_prob, again.log_prob)
    assert not bool((first.log_prob == other.log_prob).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_type_of_the_model_and_one_value_per_example(dtype):
    model = mixture(VPSDE(), 2, 3, 2).to(dtype)
    ours = VariationalBound(3, replicates=2)(model, normal(5, 2, 3, 2).to(dtype), seed=0)
    values = (ours.log_prob, ours.prior_kl, ours.reconstruction, ours.diffusion)
    assert {(value.dtype, value.shape) for value in values} == {(dtype, (5,))}
    assert ours.standard_error.shape == ours.nfe.shape == (5,)
    torch.testing.assert_close(ours.log_prob, ours.reconstruction - ours.diffusion - ours.prior_kl)


@each_sde
def test_float32_does_not_bias_the_bound(sde):
    model = mixture(sde, 64)
    x, _ = clean(model, 64)
    wide = VariationalBound(8)(model, x, seed=0).log_prob
    narrow = VariationalBound(8)(model.float(), x.float(), seed=0).log_prob
    assert float((narrow - wide).abs().max()) < 0.02


def test_the_network_passes_are_counted_truly():
    model = Changed(mixture(VPSDE(), 3))
    ours = VariationalBound(5, replicates=3)(model, normal(4, 3), seed=0)
    assert (ours.nfe.dtype, ours.nfe.tolist()) == (torch.int64, [model.calls] * 4)
    assert model.calls == 18


def test_conditions_reach_the_network_and_no_gradient_is_left_behind():
    seen, net = [], nn.Linear(2, 2)
    model = ScoreModel(lambda x, c, y: seen.append(y) or net(x), VPSDE())
    y = torch.tensor([3, 1])
    out = VariationalBound(2)(model, torch.ones(2, 2), seed=0, y=y)
    assert all(torch.equal(condition, y) for condition in seen)
    assert (len(seen), net.weight.grad, out.log_prob.requires_grad) == (6, None, False)


# --- Values and errors ---------------------------------------------------------------------------


def test_bounds_are_values():
    assert VariationalBound(4) == VariationalBound(4)
    assert hash(VariationalBound()) == hash(VariationalBound())
    with pytest.raises(AttributeError):
        VariationalBound().draws = 2


@pytest.mark.parametrize(
    "arguments", [{"draws": 0}, {"draws": 1.5}, {"replicates": -1}, {"times": "uniform"}], ids=str
)
def test_unusable_arguments_are_refused(arguments):
    with pytest.raises(InputError, match=rf"{next(iter(arguments))}\b"):
        VariationalBound(**arguments)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 3, dtype=torch.int64),
        torch.zeros(4),
        torch.full((4, 3), math.nan),
    ],
    ids=["integers", "vector", "NaN"],
)
def test_unusable_data_are_refused_before_the_first_pass(x):
    model = Changed(mixture(VPSDE(), 3))
    with pytest.raises(InputError):
        VariationalBound()(model, x)
    assert model.calls == 0


@pytest.mark.parametrize("eps", [-0.1, 0.0, 1.0, math.nan])
@pytest.mark.parametrize("sde", SDES[:2], ids=repr)
def test_an_unusable_eps_is_refused(sde, eps):
    with pytest.raises(InputError, match="eps="):
        VariationalBound(eps=eps)(mixture(sde, 3), normal(2, 3))


def test_a_bare_network_and_seeds_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="ScoreModel"):
        VariationalBound()(nn.Linear(2, 2), torch.zeros(2, 2))
    with pytest.raises(InputError, match="seeds"):
        VariationalBound()(mixture(VPSDE(), 3), normal(2, 3), seeds=[0])


# --- The prior -----------------------------------------------------------------------------------


@each_sde
def test_the_divergence_of_an_example_is_that_of_torch(sde):
    x, one = normal(5, 2, 3), torch.ones((), dtype=torch.float64)
    q = Normal(sde.alpha(one) * x, sde.sigma(one))
    truth = kl_divergence(q, Normal(torch.zeros_like(x), sde.prior_std)).sum((1, 2))
    torch.testing.assert_close(prior_kl(sde, x), truth, rtol=1e-6, atol=1e-12)


@each_sde
def test_the_mismatch_of_data_is_that_of_torch(sde):
    data = (normal(50, 4) @ normal(4, 4, seed=1) + normal(4, seed=2)).reshape(50, 2, 2)
    ours = prior_mismatch(sde, *spectrum(data))
    one, rows = torch.ones((), dtype=torch.float64), data.flatten(1)
    eye = torch.eye(4, dtype=torch.float64)
    covariance = sde.alpha(one) ** 2 * rows.T.cov(correction=0) + sde.sigma(one) ** 2 * eye
    truth = kl_divergence(
        MultivariateNormal(sde.alpha(one) * rows.mean(0), covariance),
        MultivariateNormal(torch.zeros_like(rows[0]), sde.prior_std**2 * eye),
    )
    assert ours.shape == ()
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-12)


def test_tiny_mismatches_keep_their_digits():
    """r - log(1 + r) is r^2 / 2 here, below the rounding of 1 + r."""
    c = torch.tensor([1e-6], dtype=torch.float64)
    ours = prior_mismatch(VESDE(sigma_max=100.0), torch.zeros(1), c)
    assert float(ours) == pytest.approx(0.25 * (1e-6 / 1e4) ** 2, rel=1e-4)


@each_sde
def test_the_mismatch_is_what_the_mean_log_prior_lacks(sde):
    """E log p_1 - E log prior over samples of p_1, for a Gaussian."""
    model = GaussianModel(3 * torch.ones(4).double(), 2.0, sde)
    x = model.sample(20_000, 1.0, seed=0)
    lacks = model.log_prob(x, 1.0) - sde.prior_log_prob(x)
    mean, variances = model.mean, model.variances
    assert abs(z_score(lacks, prior_mismatch(sde, mean, variances))) < 4


@pytest.mark.parametrize("n", [3, 6, 7, 40])
def test_the_spectrum_is_that_of_the_covariance_from_either_matrix(n):
    data = normal(n, 3, 2)
    mean, values = spectrum(data.float())
    truth = torch.linalg.eigvalsh(data.flatten(1).T.cov(correction=0)).clamp(min=0)
    torch.testing.assert_close(mean, data.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(values, truth, rtol=0, atol=1e-5)


def test_data_without_a_spectrum_are_refused():
    with pytest.raises(InputError, match="at least two"):
        spectrum(normal(1, 3))
    with pytest.raises(InputError, match="4096"):
        spectrum(torch.zeros(4097, 4097))
    with pytest.raises(InputError, match="do not fit"):
        prior_mismatch(VPSDE(), torch.zeros(3), torch.zeros(2))
    with pytest.raises(InputError, match="negative"):
        prior_mismatch(VPSDE(), torch.zeros(2), torch.tensor([1.0, -1.0]))
