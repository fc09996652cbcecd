import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from scoresde.data import Dataset, digits, gaussian_ring, two_moons
from scoresde.errors import InputError
from scoresde.metrics import (
    CovarianceFamily,
    Estimate,
    Moments,
    baselines,
    bits_per_dim,
    gaussian_baseline,
    mixture_baseline,
    nats,
    sliced_wasserstein,
)
from scoresde.streams import Streams


def splits(dataset):
    for name in ("train", "validation", "test"):
        yield dataset.batch(name, Streams.of(seed=0, batch=len(dataset.split(name)))).x


# Bits per dimension


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_density_spends_log2_of_the_levels(levels):
    log_prob = torch.full((4,), -64 * math.log(2), dtype=torch.float64)  # uniform on [-1, 1]^64
    bits = bits_per_dim(log_prob, (1, 8, 8), scale=2 / levels)
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(levels)), rtol=1e-14, atol=0)


def test_bits_do_not_depend_on_the_scaling():
    y = torch.randint(0, 17, (100, 6), generator=torch.Generator().manual_seed(0)) + 0.3
    bits = []
    for shift, width in ((0.0, 1.0), (8.5, 8.5), (-3.0, 255.0)):
        x, scale = (y.double() - shift) / width, 1 / width
        mean, std = torch.tensor([(7.0 - shift) * scale, 4.0 * scale], dtype=torch.float64)
        normal = torch.distributions.Normal(mean, std)
        bits.append(bits_per_dim(normal.log_prob(x).sum(1), (6,), scale))
    torch.testing.assert_close(bits[0], bits[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(bits[0], bits[2], rtol=1e-12, atol=0)


def test_bits_agree_with_the_sum_over_the_levels():
    # A density that is constant on each step is a distribution on levels: the bound is tight.
    p = torch.tensor([0.5, 0.25, 0.125, 0.125]).double()
    levels = torch.tensor([0, 1, 2, 3])
    dataset = Dataset.of("four", [levels[:, None].byte()] * 3, levels=4)
    density = p[levels] * 1 / dataset.scale  # in model units, on steps of width 2/4
    bits = bits_per_dim(density.log(), dataset.shape, dataset.scale)
    torch.testing.assert_close(bits, -torch.log2(p))


def test_nats_are_those_of_the_raw_density():
    dataset = two_moons(count=200)
    x = dataset.encode(dataset.test).double()
    raw = dataset.log_prob(dataset.decode(x))
    model = raw - 2 * math.log(dataset.scale)
    torch.testing.assert_close(nats(model, dataset.shape, dataset.scale), -raw)
    bits = bits_per_dim(model, dataset.shape, dataset.scale)
    torch.testing.assert_close(nats(model, dataset.shape, dataset.scale), bits * 2 * math.log(2))


@pytest.mark.parametrize("unit", [bits_per_dim, nats])
def test_units_keep_the_data_type_and_shape_and_refuse_nonsense(unit):
    for dtype in (torch.float32, torch.float64):
        assert unit(torch.zeros(2, 3, dtype=dtype), (5,), 0.5).dtype == dtype
    assert unit(torch.zeros(2, 3), (), 0.5).shape == (2, 3)
    assert isinstance(unit(0.0, torch.Size([3, 32, 32]), 2 / 256), float)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"scale.*got {scale}"):
            unit(0.0, (1,), scale)
    with pytest.raises(InputError, match=r"shape.*\(3, 0\)"):
        unit(0.0, (3, 0), 1.0)


def test_estimates_have_the_error_of_a_mean():
    estimate = Estimate.of(torch.tensor([2.0, 4.0, 4.0, 6.0]))
    assert estimate == Estimate(4.0, pytest.approx(math.sqrt(8 / 3) / 2), 4)
    assert math.isnan(Estimate.of(torch.ones(1)).standard_error)
    for values in (torch.ones(0), torch.ones(2, 2), torch.ones(())):
        with pytest.raises(InputError, match=rf"values.*{re.escape(str(tuple(values.shape)))}"):
            Estimate.of(values)


# Baselines


def test_the_gaussian_is_the_maximum_of_the_likelihood():
    x = torch.randn(500, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = x.flatten(1) @ torch.linspace(-1, 1, 36).double().reshape(6, 6).add(torch.eye(6))
    covariance = torch.cov(rows.T, correction=0)
    exact = torch.distributions.MultivariateNormal(rows.mean(0), covariance)
    fitted = gaussian_baseline(rows.reshape(x.shape), rows.reshape(x.shape), regularisation=0.0)
    torch.testing.assert_close(fitted.log_prob, exact.log_prob(rows), rtol=1e-8, atol=1e-8)
    assert fitted.shape == (2, 3)


def test_baselines_of_the_digits():
    dataset = digits()
    train, validation, test = splits(dataset)
    gaussian = gaussian_baseline(train, test).bits_per_dim(dataset.scale)
    assert abs(gaussian.mean - 2.95) < 0.03
    assert gaussian.count == 180
    assert 0.01 < gaussian.standard_error < 0.05
    full = mixture_baseline(train, validation, test, families=[CovarianceFamily("full", 3e-3)])
    assert abs(full.bits_per_dim(dataset.scale).mean - 2.65) < 0.05
    best = mixture_baseline(train, validation, test)
    assert abs(best.bits_per_dim(dataset.scale).mean - 2.55) < 0.04
    assert best.log_prob.mean() > full.log_prob.mean()


def test_the_mixture_finds_the_modes_of_a_ring():
    dataset = gaussian_ring(modes=4, count=4000)
    train, validation, test = splits(dataset)
    found = mixture_baseline(train, validation, test, families=[CovarianceFamily("full", 1e-6)])
    difference = found.nats(dataset.scale).mean + float(dataset.log_prob(dataset.test).mean())
    assert abs(difference) < 0.02
    assert gaussian_baseline(train, test).nats(dataset.scale).mean > 2


def test_no_baseline_beats_the_exact_density_of_the_moons():
    dataset = two_moons(count=6000)
    train, validation, test = splits(dataset)
    found = mixture_baseline(
        train, validation, test, families=[CovarianceFamily("full", 1e-6)], largest=32
    )
    excess = -found.log_prob - 2 * math.log(dataset.scale) + dataset.log_prob(dataset.test)
    excess = Estimate.of(excess)
    assert -3 * excess.standard_error < excess.mean < 0.1


def test_baselines_refuse_what_they_cannot_fit():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for call, message in [
        (lambda: gaussian_baseline(x, x[:, :2]), r"\(20, 3\), \(20, 2\)"),
        (lambda: gaussian_baseline(x[:0], x), r"\(0, 3\), \(20, 3\)"),
        (lambda: gaussian_baseline(x * math.nan, x), "finite.* 60 "),
        (lambda: gaussian_baseline(torch.ones(20, 3), x), "at least 3 .*got 20 .1 different"),
        (lambda: gaussian_baseline(torch.ones(40, 3), x, 0.9), "at least 3 .*got 40 .1 different"),
        (lambda: gaussian_baseline(x[:1], x), "at least 3 .*got 1 .1 different"),
        (lambda: gaussian_baseline(x, x, regularisation=2), r"regularisation .*\[0, 1\], got 2"),
        (lambda: mixture_baseline(x, x, x, largest=0), "largest.*0"),
        (lambda: mixture_baseline(x, x, x, families=[]), "families.*CovarianceFamily"),
        (lambda: CovarianceFamily("round", 0.1), "covariance.*'round'"),
        (lambda: CovarianceFamily("full", -1.0), "regularisation.*-1.0"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("shape", [(0, 2), (0, 3, 4, 4), ()])
def test_moments_need_an_example(shape):
    with pytest.raises(InputError, match=rf"raw .*{re.escape(str(shape))}"):
        Moments.of(torch.zeros(shape))


# Sliced Wasserstein distance


def test_a_shift_moves_all_mass_by_its_projections():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, 2, generator=generator)
    shift = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    distance = sliced_wasserstein(x, x + shift, projections=4000)
    assert distance == pytest.approx(5 / math.sqrt(4), rel=0.03)  # E (theta . v)^2 = |v|^2 / D
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x[torch.randperm(300, generator=generator)]) < 1e-6


def test_gaussians_on_a_line_are_at_their_known_distance():
    q = (torch.arange(20_000).double() + 0.5) / 20_000
    z = torch.special.ndtri(q)[:, None]
    exact = math.hypot(1 - 3, 2 - 0.5)
    assert sliced_wasserstein(1 + 2 * z, 3 + 0.5 * z, 1) == pytest.approx(exact, rel=1e-3)


def test_sets_of_unequal_size_are_compared_exactly():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    many = sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1))
    assert sliced_wasserstein(x, y) == pytest.approx(many, abs=1e-12)
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(y, x), abs=1e-12)
    assert sliced_wasserstein(x, x.repeat(5, 1)) < 1e-7


def test_one_distribution_is_nearer_than_another():
    a, b = two_moons(count=4000, seed=0), two_moons(count=4000, seed=1)
    same = sliced_wasserstein(a.train, b.train)
    assert same < 0.05
    assert sliced_wasserstein(a.train, b.train * torch.tensor([1.0, -1.0])) > 5 * same


def test_samples_that_cannot_be_compared_are_refused():
    x = torch.zeros(3, 2)
    for other, projections in ((torch.zeros(3, 1), 8), (x[:0], 8), (x, 0)):
        with pytest.raises(InputError):
            sliced_wasserstein(x, other, projections)
    with pytest.raises(InputError, match=r"\(3,\) and \(3,\)"):
        sliced_wasserstein(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("count", [20, 60, 200])
def test_a_gaussian_of_few_examples_is_shrunk_and_loses_little(count):
    dimension = 50
    stream = torch.Generator().manual_seed(0)
    std = torch.linspace(0.5, 1.5, dimension)
    train, test = (std * torch.randn(n, dimension, generator=stream) for n in (count, 2000))
    exact = torch.distributions.Normal(torch.zeros(dimension), std).log_prob(test).sum(1)
    found = gaussian_baseline(train, test)
    loss = float(exact.mean() - found.log_prob.mean())
    assert 0 < loss < 0.25 * dimension
    assert re.fullmatch(f"covariance shrunk by .*: {count} examples of 50 features", found.note)
    mixture = mixture_baseline(train, train[:10], test, largest=2)
    assert mixture.log_prob.isfinite().all()


def test_a_shrunk_gaussian_is_that_of_the_shrunk_covariance():
    rows, test = (np.random.default_rng(i).normal(size=(n, 6)) for i, n in ((0, 40), (1, 9)))
    for some in (rows, rows[:4]):  # fewer examples than features, too
        covariance = np.cov(some.T, ddof=0)
        level = np.trace(covariance) / 6
        shrunk = 0.7 * covariance + (0.3 + 1e-3) * level * np.eye(6)
        exact = multivariate_normal(some.mean(0), shrunk).logpdf(test)
        np.testing.assert_allclose(baselines._Spectrum(some, 1e-3).log_prob(test, 0.3), exact)


def test_strong_correlations_are_not_shrunk_away():
    stream = torch.Generator().manual_seed(0)
    mixing = torch.eye(40) + 30 * torch.ones(40, 40) / 40
    train, test = (torch.randn(n, 40, generator=stream) @ mixing for n in (200, 2000))
    covariance = mixing.T @ mixing
    exact = torch.distributions.MultivariateNormal(torch.zeros(40), covariance).log_prob(test)
    found = gaussian_baseline(train, test)
    assert 0 < float(exact.mean() - found.log_prob.mean()) < 8  # of 40 ln 2 for a factor of 2


def test_a_mixture_stops_growing_when_its_time_is_up():
    dataset = gaussian_ring(modes=8, count=4000)
    found = mixture_baseline(*splits(dataset), seconds=0.0)
    assert found.name == "mixture of 1 Gaussians (full)"
    assert found.note == "growth stopped after 0 s"
    whole = mixture_baseline(*splits(dataset), largest=4)
    assert whole.note == ""
    assert whole.log_prob.mean() > found.log_prob.mean()


def test_mixtures_of_few_examples_begin_with_the_variances_alone():
    train, test = noise_rows(20, 200, 0), noise_rows(100, 200, 1)
    found = mixture_baseline(train, train[:5], test, seconds=0.0)
    assert found.name == "mixture of 1 Gaussians (diag)"
    assert found.log_prob.mean() > -1.5 * 200 * 1.42


def noise_rows(count, dimension, seed):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def test_a_covariance_of_too_many_features_is_refused():
    x = torch.zeros(3, 4097)
    with pytest.raises(InputError, match=r"at most 4096 features .* got 4097"):
        gaussian_baseline(x, x)
