"""Dequantisation and the bounds by it, against probabilities that are known in closed form."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from scoresde import VESDE, VPSDE, GaussianMixtureModel, GaussianModel, InputError, Likelihood
from scoresde.codec import Affine
from scoresde.data.base import Dataset
from scoresde.data.dequantisation import TruncatedNormalDequantisation, UniformDequantisation
from scoresde.data.probability import (
    average,
    importance_weighted,
    log_probability,
    probe_seed,
)
from scoresde.metrics import bits_per_dim
from scoresde.streams import Purpose, Streams

LEVELS = 8
SCALE = 2 / LEVELS
STDS = [0.02, 0.1, 0.3, 1.0, 10.0, 1e4, 1e150]
UNIFORM, NORMAL = UniformDequantisation(), TruncatedNormalDequantisation(0.4)
WEIGHTS, MEANS, WIDTHS = [0.3, 0.7], [0.1, -0.2], [0.15, 0.3]

each_std = pytest.mark.parametrize("std", STDS)
each_dequantisation = pytest.mark.parametrize("q", [UNIFORM, NORMAL], ids=["uniform", "normal"])


def codec(*shape, levels=LEVELS):
    return Affine.of_levels(shape, levels)


def mixture(d):
    means = torch.tensor(MEANS, dtype=torch.float64)[:, None].expand(2, d)
    return GaussianMixtureModel(WEIGHTS, means, WIDTHS, VPSDE())


def probability(y):
    """P(y) of the mixture: differences of normal distribution functions."""
    low = y.numpy()[:, None, :] * SCALE - 1
    mean, std = np.array(MEANS)[:, None], np.array(WIDTHS)[:, None]
    steps = stats.norm.cdf(low + SCALE, mean, std) - stats.norm.cdf(low, mean, std)
    return torch.from_numpy(steps.prod(-1) @ np.array(WEIGHTS))


def exact(model, x, *, seed=None, seeds=None):
    """A likelihood without a solver."""
    log_prob = model.log_prob(x.double(), 0.0)
    zeros = torch.zeros_like(log_prob)
    return SimpleNamespace(log_prob=log_prob, standard_error=zeros, nfe=zeros.long() + 3)


def noisy(std, stated=None):
    """The same with normal noise, as from probes."""

    def likelihood(model, x, *, seed=None, seeds=None):
        result = exact(model, x)
        noise = Streams.of(seed, seeds).normal((), Purpose.PROBE, dtype=torch.float64)
        result.log_prob += std * noise
        result.standard_error += std if stated is None else stated
        return result

    return likelihood


def repeated(y, n):
    return torch.tensor(y)[None].expand(n, -1)


def bound(y, q=UNIFORM, likelihood=exact, **options):
    """All bounds of the mixture: those of many seeds of the same integers are independent."""
    d = y.shape[1]
    return log_probability(
        likelihood, mixture(d), codec(d), y, dequantisation=q, **{"seed": 0, **options}
    )


class Fixed(Streams):
    """Streams with chosen uniform numbers."""

    def __init__(self, numbers):
        super().__init__(0, torch.arange(1))
        object.__setattr__(self, "numbers", numbers)

    def uniform(self, shape, purpose, draw=0, dtype=torch.float32):
        return self.numbers[None].to(dtype)


EXTREMES = torch.tensor([2.0**-24, 1e-5, 0.2, 0.5, 0.9, 1 - 1e-5, 1 - 2.0**-24]).double()


# --- The densities -------------------------------------------------------------------------------


@each_std
def test_the_truncated_normal_is_normalised(std):
    q = TruncatedNormalDequantisation(std)

    def density(u):
        return float(q.log_prob(torch.tensor([[u]], dtype=torch.float64)).exp())

    peak = 0.5 + std * np.array([-5, -1, 0, 1, 5])
    total, _ = integrate.quad(density, 0, 1, points=peak[(peak > 0) & (peak < 1)])
    assert total == pytest.approx(1, abs=1e-9)


@each_std
def test_the_log_density_is_that_of_scipy_and_sums_over_elements(std):
    u = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = stats.truncnorm(-0.5 / std, 0.5 / std, 0.5, std)
    ours = TruncatedNormalDequantisation(std).log_prob(u)
    # SciPy takes the difference of two distribution functions, and loses digits of wide normals.
    theirs = reference.logpdf(u).sum((1, 2)) if std < 1e6 else np.zeros(5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q", [UNIFORM, NORMAL])
def test_there_is_no_density_outside_of_the_step(q):
    u = torch.tensor([[0.5, -0.1], [1.0, 0.5], [0.3, 0.7]])
    assert q.log_prob(u).isfinite().tolist() == [False, False, True]


def test_a_wide_normal_is_uniform():
    streams = Streams.of(seed=4, batch=100)
    uniform = UNIFORM.sample(streams, (7,), 2)
    for std in (1e5, 1e150, 1e300):
        q = TruncatedNormalDequantisation(std)
        torch.testing.assert_close(q.sample(streams, (7,), 2), uniform, rtol=1e-6, atol=1e-9)
        assert q.log_prob(uniform).abs().max() < 1e-9


@each_std
def test_samples_are_distributed_as_the_density(std):
    u = TruncatedNormalDequantisation(std).sample(Streams.of(seed=1, batch=5000), (4,))
    wide = min(std, 1e4)
    reference = stats.truncnorm(-0.5 / wide, 0.5 / wide, 0.5, wide)
    assert stats.kstest(u.flatten().double().numpy(), reference.cdf).pvalue > 0.01


@pytest.mark.parametrize("std", [0.02, 0.1, 0.3, 1.0, 10.0])
def test_samples_are_quantiles_out_to_the_tails(std):
    ours = TruncatedNormalDequantisation(std).sample(Fixed(EXTREMES), (7,))
    theirs = stats.truncnorm(-0.5 / std, 0.5 / std, 0.5, std).ppf(EXTREMES)
    np.testing.assert_allclose(ours[0], theirs, rtol=2e-7, atol=1e-9)


@each_std
@pytest.mark.parametrize("levels", [2, 256, 2**12])
def test_offsets_stay_in_their_step(std, levels):
    u = TruncatedNormalDequantisation(std).sample(Fixed(EXTREMES), (7,))
    assert u.dtype == torch.float32
    assert 0 < u.min() < u.max() < 1
    unit = codec(7, levels=levels)
    for y in (0, levels // 2 - 1, levels // 2, levels - 1):
        raw = torch.full((1, 7), y)
        assert torch.equal(unit.decode(unit.encode_at(raw, u)).long(), raw)


def test_the_cutoff_of_the_sde_gives_the_standard_deviation():
    sde, eps = VPSDE(), 1e-4
    t = torch.tensor(eps).double()
    q = TruncatedNormalDequantisation.of(sde, scale=2 / 256, eps=eps)
    assert q.std == pytest.approx(float(sde.sigma(t) / sde.alpha(t)) * 128)
    assert TruncatedNormalDequantisation.of(VESDE(0.01, 50.0), scale=1 / 256).std == pytest.approx(
        2.56
    )


# --- The plain bound -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "y"), [(UNIFORM, 3), (NORMAL, 3), (TruncatedNormalDequantisation(0.15), 5)]
)
def test_the_average_is_the_integral_of_the_plain_bound(q, y):
    model = mixture(1)

    def integrand(u):
        u = torch.tensor([[u]], dtype=torch.float64)
        log_q = float(q.log_prob(u))
        log_p = float(model.log_prob((y + u) * SCALE - 1, 0.0)) + math.log(SCALE)
        return math.exp(log_q) * (log_p - log_q)

    wanted, _ = integrate.quad(integrand, 0, 1, points=[0.3, 0.5, 0.7])
    ours = bound(repeated([y], 4000), q, draws=4)
    error = float(ours.log_prob.std()) / 4000**0.5
    assert abs(float(ours.log_prob.mean()) - wanted) < 4 * error + 1e-6
    assert wanted < float(probability(torch.tensor([[y]])).log())


@each_dequantisation
@pytest.mark.parametrize("y", [[3], [5], [3, 4], [5, 2]])
def test_weights_have_the_mean_of_the_probability(q, y):
    weights = bound(repeated(y, 2000), q, draws=5).log_weights.exp()
    error = float(weights.std()) / weights.numel() ** 0.5
    assert abs(float(weights.mean() - probability(torch.tensor([y])))) < 4 * error


def test_one_uniform_draw_is_what_the_data_set_and_the_likelihood_give():
    raw = torch.randint(0, LEVELS, (5, 3), generator=torch.Generator().manual_seed(0)).byte()
    data = Dataset.of("some", [raw] * 3, levels=LEVELS)
    model, streams = mixture(3).float(), Streams.of(7, range(1, 4))
    x = data.batch("test", streams).x
    likelihood = Likelihood(probes=2, rtol=1e-3, atol=1e-3)
    theirs = likelihood(model, x, seed=7, seeds=range(1, 4))
    ours = log_probability(likelihood, model, data.codec, raw[1:4], seed=7, seeds=range(1, 4))
    wanted = -bits_per_dim(theirs.log_prob.double(), data.shape, data.scale) * 3 * math.log(2)
    torch.testing.assert_close(ours.log_prob, wanted)
    torch.testing.assert_close(ours.bound.probe_error, theirs.standard_error.double())
    assert torch.equal(ours.nfe, theirs.nfe)


def test_a_matched_density_leaves_no_gap():
    # A normal cloud around the centre of the step, as a model of centres sees its images.
    std, y = 0.15, torch.tensor([[2, 5]])
    model = GaussianModel((y[0].double() + 0.5) * SCALE - 1, std * SCALE, VPSDE())
    q = TruncatedNormalDequantisation(std)
    ours = log_probability(
        exact, model, codec(2), y.expand(50, 2), dequantisation=q, draws=3, seed=0
    )
    wanted = 2 * math.log(math.erf(0.5 / std / math.sqrt(2)))
    torch.testing.assert_close(
        ours.log_weights, torch.full((3, 50), wanted).double(), atol=1e-5, rtol=0
    )
    uniform = log_probability(exact, model, codec(2), y.expand(50, 2), draws=3, seed=0)
    assert uniform.log_prob.mean() < wanted - 1


def test_truncated_normals_on_the_cutoff_of_the_model_beat_uniform_offsets():
    # Images at the centres of their levels, blurred by what is left of the noise at the cut-off.
    sde, y = VPSDE(), torch.tensor([[2, 5]])
    q = TruncatedNormalDequantisation.of(sde, scale=SCALE, eps=5e-3)
    centres = (y[0].double() + 0.5) * SCALE - 1
    model = GaussianModel(centres, q.std * SCALE, sde)
    both = [
        log_probability(exact, model, codec(2), y.expand(99, 2), dequantisation=d, seed=0)
        for d in (UNIFORM, q)
    ]
    assert both[0].log_prob.mean() + 1 < both[1].log_prob.mean() < 1e-6


# --- The importance-weighted bound ---------------------------------------------------------------


@each_dequantisation
@pytest.mark.parametrize("y", [[5], [5, 2]])
def test_the_weighted_bound_rises_with_the_draws_and_its_gap_falls_as_their_inverse(q, y):
    draws = bound(repeated(y, 4000), q, draws=32)
    log_p = float(probability(torch.tensor([y])).log())
    gaps, errors = [], []
    for k in (1, 2, 8, 32):
        # Every draw is used at every k, so that the means differ by their gaps alone.
        groups = torch.stack(draws.log_weights.split(k), 1).flatten(1)
        values = importance_weighted(groups).log_prob
        gaps.append(log_p - float(values.mean()))
        errors.append(float(values.std()) / len(values) ** 0.5)
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[3] > -4 * errors[3]
    weights = draws.log_weights.exp()
    relative = float(weights.var() / weights.mean() ** 2)
    for k, gap, error in zip((8, 32), gaps[2:], errors[2:], strict=True):
        assert abs(gap - relative / (2 * k)) < 4 * error + 0.3 * relative / (2 * k)


@pytest.mark.parametrize("combine", [average, importance_weighted])
@each_dequantisation
def test_the_standard_error_is_the_spread_over_seeds(combine, q):
    ours = bound(repeated([5, 2], 3000), q, draws=24, combine=combine)
    stated = float(ours.standard_error.square().mean().sqrt())
    assert stated == pytest.approx(float(ours.log_prob.std()), rel=0.1)


@pytest.mark.parametrize("combine", [average, importance_weighted])
def test_the_standard_error_holds_the_noise_of_the_probes(combine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = bound(repeated([3], 3000), likelihood=noisy(0.5), draws=24, combine=combine)
    stated = float(ours.standard_error.square().mean().sqrt())
    assert stated == pytest.approx(float(ours.log_prob.std()), rel=0.15)
    assert float(ours.bound.probe_error.mean()) == pytest.approx(0.5 / 24**0.5, rel=0.15)


def test_the_error_is_that_of_the_mean_weight():
    log_weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    shift = torch.tensor([-8000.0, -3.0, 0.0, 900.0]).double()  # where exp alone would fail
    weights, ours = log_weights.exp(), importance_weighted(log_weights + shift)
    wanted = weights.std(0) / 6**0.5 / weights.mean(0)
    torch.testing.assert_close(ours.log_prob - shift, weights.mean(0).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.standard_error, wanted, rtol=1e-9, atol=0)
    n = ours.effective_draws
    torch.testing.assert_close(wanted, ((6 / n - 1) / 5).sqrt(), rtol=1e-9, atol=0)


def test_equal_weights_are_exact_and_one_of_many_has_error_one():
    equal, single = torch.zeros(5), torch.tensor([0.0] + [-1e4] * 4)
    ours = importance_weighted(torch.stack((equal, single), 1))
    np.testing.assert_allclose(ours.standard_error, [0, 1], atol=1e-12)
    np.testing.assert_allclose(ours.effective_draws, [5, 1], atol=1e-12)


@pytest.mark.parametrize("k", [2, 8, 64])
@pytest.mark.parametrize("std", [0.1, 0.5, 2.0, 8.0])
def test_noise_of_the_probes_lifts_the_weighted_mean_by_at_most_the_stated_bias(k, std):
    noise = std * torch.randn(k, 4000, generator=torch.Generator().manual_seed(0)).double()
    ours = importance_weighted(noise, torch.full_like(noise, std))
    lift, error = float(ours.log_prob.mean()), float(ours.log_prob.std()) / 4000**0.5
    stated = float(ours.bias[0])
    assert lift < stated + 4 * error
    assert lift > 0.4 * stated - 4 * error
    assert not average(noise, torch.full_like(noise, std)).bias.any()


def test_noise_is_warned_of_where_weights_are_made_of_it():
    y = repeated([3], 4)
    with pytest.warns(UserWarning, match=r"probes .*\b0\.375 nats"):
        bound(y, likelihood=noisy(1.0), draws=4, combine=importance_weighted)
    with pytest.warns(UserWarning, match="probes .*unknown amount"):
        bound(y, likelihood=noisy(0.1, math.nan), draws=4, combine=importance_weighted)
    bound(y, likelihood=noisy(0.1), draws=4, combine=importance_weighted)
    bound(y, likelihood=noisy(1.0), draws=4)


# --- Random numbers ------------------------------------------------------------------------------


def test_an_example_is_the_same_alone_as_in_a_batch():
    y = torch.randint(0, LEVELS, (6, 2), generator=torch.Generator().manual_seed(1))
    options = {"likelihood": noisy(0.2), "q": NORMAL, "draws": 3}
    batch = bound(y, **options)
    for i in range(6):
        alone = bound(y[i : i + 1], seeds=[i], **options)
        torch.testing.assert_close(alone.log_prob[0], batch.log_prob[i], rtol=1e-12, atol=0)
    assert (batch.nfe == 9).all()


def test_draws_have_independent_offsets_and_probes():
    def noise_alone(model, x, *, seed=None, seeds=None):
        result = noisy(1.0)(model, x, seed=seed, seeds=seeds)
        result.log_prob -= exact(model, x).log_prob
        return result

    y = repeated([3], 4000)
    for likelihood in (exact, noise_alone):
        values = bound(y, likelihood=likelihood, draws=4).log_weights
        assert (values.corrcoef() - torch.eye(4)).abs().max() < 0.07
    fewer = bound(y, likelihood=noisy(1.0), draws=2).log_weights
    assert torch.equal(fewer, bound(y, likelihood=noisy(1.0), draws=4).log_weights[:2])


def test_seeds_of_probes_are_distinct_and_begin_with_the_seed_itself():
    for seed in (0, 1, 2**63, 2**64 - 1):
        derived = [probe_seed(seed, k) for k in range(100)]
        assert derived[0] == seed
        assert len({*derived, *(probe_seed(seed ^ 1, k) for k in range(100))}) == 200
        assert all(0 <= s < 2**64 for s in derived)


def test_a_single_draw_knows_no_error_over_draws():
    for combine in (average, importance_weighted):
        ours = bound(torch.tensor([[3, 4]]), likelihood=noisy(0.1, math.nan), combine=combine)
        assert ours.standard_error.isnan().all()
        assert float(ours.bound.bias) == 0


def test_an_unsolved_example_is_nan_and_the_others_are_not():
    def unsolved(model, x, *, seed=None, seeds=None):
        result = exact(model, x)
        result.log_prob[0] = math.nan
        return result

    ours = bound(repeated([3], 3), likelihood=unsolved, draws=3, combine=importance_weighted)
    assert ours.log_prob.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("combine", [average, importance_weighted])
def test_a_likelihood_by_the_ode_gives_the_bound_of_the_exact_density(combine):
    y = torch.tensor([[3, 4], [5, 2]])
    options = {"draws": 3, "combine": combine, "q": NORMAL}
    ode = bound(y, likelihood=Likelihood("exact"), **options)
    # The ODE starts at its cut-off, and ends at a prior in place of the model's own density.
    torch.testing.assert_close(ode.log_prob, bound(y, **options).log_prob, rtol=0, atol=5e-3)
    assert not ode.bound.probe_error.any()


# --- Misuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_standard_deviation(std):
    with pytest.raises(InputError, match=rf"std .*{std}"):
        TruncatedNormalDequantisation(std)


@pytest.mark.parametrize(("scale", "eps"), [(0.0, 1e-3), (-1.0, 1e-3), (0.1, 1.0), (0.1, 0.0)])
def test_a_bad_cutoff_or_scale(scale, eps):
    with pytest.raises(InputError):
        TruncatedNormalDequantisation.of(VPSDE(), scale, eps)


def test_offsets_too_fine_for_float32():
    q = TruncatedNormalDequantisation(1e-4)
    q.check(2)
    with pytest.raises(InputError, match=r"std .*256 levels.*0.0001"):
        log_probability(
            exact, mixture(1), codec(1, levels=256), torch.zeros(1, 1).long(), dequantisation=q
        )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.zeros(2, 2), r"raw .*float32.*\(2, 2\)"),
        (torch.zeros(2, 3).long(), r"raw .*\(2, 3\)"),
        (torch.zeros(0, 2).long(), r"raw .*\(0, 2\)"),
        (torch.tensor([[0, -1]]), r"raw .*\[0, 7\].*-1 to 0"),
        (torch.tensor([[8, 0]]), r"raw .*\[0, 7\].*0 to 8"),
    ],
)
def test_data_of_another_codec(raw, message):
    with pytest.raises(InputError, match=message):
        bound_of_pairs(raw)


def bound_of_pairs(raw):
    return log_probability(exact, mixture(2), codec(2), raw, seed=0)


def test_real_numbers_have_no_probability():
    with pytest.raises(InputError, match=r"codec .*None"):
        log_probability(exact, mixture(2), Affine((2,)), torch.zeros(1, 2))


@pytest.mark.parametrize("draws", [0, -1, 1.5])
def test_a_bad_number_of_draws(draws):
    with pytest.raises(InputError, match=rf"draws .*{draws}"):
        bound(torch.zeros(1, 1).long(), draws=draws)


@pytest.mark.parametrize("combine", [average, importance_weighted])
def test_bad_log_weights(combine):
    with pytest.raises(InputError, match=r"log_weights .*\(3,\)"):
        combine(torch.zeros(3))
    with pytest.raises(InputError, match=r"log_weights .*\(0, 3\)"):
        combine(torch.zeros(0, 3))
    with pytest.raises(InputError, match=r"errors .*\(2, 3\).*\(3,\)"):
        combine(torch.zeros(2, 3), torch.zeros(3))
