"""Times: densities against their weights and against quadrature, and the ends of every grid."""

import math

import pytest
import torch
from scipy import stats

from scoresde import SDE, VESDE, VPSDE, InputError, SubVPSDE
from scoresde.times import (
    CosineGrid,
    ExplicitGrid,
    ImportanceTimes,
    KarrasGrid,
    LevelTimes,
    LogNormalTimes,
    LogSNRGrid,
    LowDiscrepancy,
    PowerGrid,
    UniformGrid,
    UniformTimes,
)

SDES = [VPSDE(), SubVPSDE(), VESDE()]
EPS = 1e-3
TIMES = [UniformTimes(), ImportanceTimes(), LogNormalTimes(), LowDiscrepancy(ImportanceTimes())]
GRIDS = [UniformGrid(), LogSNRGrid(), KarrasGrid(), PowerGrid(), CosineGrid(0.5)]

each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
each_times = pytest.mark.parametrize("times", TIMES, ids=repr)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=repr)


class Cosine(SDE):
    def alpha(self, t):
        return torch.cos(0.49 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.49 * math.pi * t)


def middles(n=20_000):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


# --- Distributions -------------------------------------------------------------------------------


@each_sde
@pytest.mark.parametrize("times", [UniformTimes(), ImportanceTimes()], ids=repr)
@pytest.mark.parametrize(
    "h", [torch.ones_like, torch.square, lambda t: torch.sin(7 * t)], ids=["1", "t^2", "sin 7t"]
)
def test_the_weight_makes_up_for_the_density(h, times, sde):
    """E[weight h(t)] over the draws is the average of h over uniform times."""
    t = times.quantile(middles(), sde, EPS)
    uniform = EPS + (1 - EPS) * middles()
    average = float((times.weight(t, sde, EPS) * h(t)).mean())
    assert average == pytest.approx(float(h(uniform).mean()), abs=2e-5)


@each_sde
def test_importance_times_have_the_density_of_the_likelihood_weight(sde):
    """Their cumulative distribution is the integral of g^2 / sigma^2, done numerically here."""
    edges = torch.logspace(math.log10(EPS), 0, 20_001, dtype=torch.float64)
    density = (sde.g(edges) / sde.sigma(edges)) ** 2
    integral = torch.cumulative_trapezoid(density, edges)
    u = integral / integral[-1]
    t = ImportanceTimes().quantile(u, sde, EPS)
    torch.testing.assert_close(t, edges[1:], rtol=1e-5, atol=0)


@each_sde
def test_the_weight_of_importance_times_cancels_the_likelihood_weight(sde):
    t = ImportanceTimes().quantile(middles(100), sde, EPS)
    weight = ImportanceTimes().weight(t, sde, EPS) * (sde.g(t) / sde.sigma(t)) ** 2
    z = float(sde.log_snr(EPS) - sde.log_snr(1.0)) / (1 - EPS)
    torch.testing.assert_close(weight, torch.full_like(t, z))


def test_importance_times_serve_a_users_sde():
    u = middles(100)
    t = ImportanceTimes().quantile(u, Cosine(), EPS)
    first, last = (float(Cosine().log_snr(s)) for s in (EPS, 1.0))
    torch.testing.assert_close(Cosine().log_snr(t), first + u * (last - first))


@each_sde
@pytest.mark.parametrize("times", [LogNormalTimes(), LogNormalTimes(0.3, 0.7)], ids=repr)
def test_log_normal_times_have_truncated_normal_noise_levels(times, sde):
    u = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    low, high = ((-float(sde.log_snr(s)) / 2 - times.mean) / times.std for s in (EPS, 1.0))
    truth = torch.from_numpy(stats.truncnorm.ppf(u, low, high, times.mean, times.std))
    levels = -sde.log_snr(times.quantile(u, sde, EPS)) / 2
    torch.testing.assert_close(levels, truth, rtol=0, atol=1e-9)


def test_log_normal_times_keep_weight_one():
    t = middles(5)
    assert torch.equal(LogNormalTimes().weight(t, VPSDE(), EPS), torch.ones_like(t))


@each_sde
@each_times
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_rise_within_the_interval(dtype, times, sde):
    u = middles(1000).to(dtype)
    t = times.quantile(u, sde, EPS)
    assert t.dtype == dtype
    assert float(t.min()) >= torch.tensor(EPS, dtype=dtype)
    assert float(t.max()) <= 1
    assert bool((t.diff() >= 0).all())


@each_sde
@each_times
def test_quantiles_reach_the_ends(times, sde):
    ends = times.quantile(torch.tensor([0.0, 1.0]).double(), sde, EPS)
    torch.testing.assert_close(ends, torch.tensor([EPS, 1.0]).double(), rtol=1e-5, atol=0)


@each_times
def test_any_shape_of_uniform_numbers(times):
    t = times.quantile(middles(6).reshape(2, 3), VPSDE(), EPS)
    assert t.shape == times.weight(t, VPSDE(), EPS).shape == (2, 3)


def test_ve_may_start_at_time_zero():
    t = ImportanceTimes().quantile(middles(5), VESDE(), 0.0)
    torch.testing.assert_close(t, middles(5))  # its log-SNR is linear in time


# --- Low discrepancy -----------------------------------------------------------------------------


def test_independent_times_are_left_as_they_are():
    u = torch.rand(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(UniformTimes().spread(u), u)


def test_low_discrepancy_covers_every_part_of_the_interval_once():
    u = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = LowDiscrepancy().spread(u)
    assert torch.equal((spread * 16).floor().sort()[0], torch.arange(16).double())


def test_low_discrepancy_keeps_every_time_uniform():
    generator = torch.Generator().manual_seed(0)
    batches = torch.rand(2000, 4, generator=generator, dtype=torch.float64)
    spread = torch.stack([LowDiscrepancy().spread(u) for u in batches])
    assert min(stats.kstest(column.numpy(), "uniform").pvalue for column in spread.T) > 1e-3


def test_low_discrepancy_covers_any_distribution():
    inner, u = ImportanceTimes(), middles(9)
    times = LowDiscrepancy(inner)
    assert torch.equal(times.quantile(u, VPSDE(), EPS), inner.quantile(u, VPSDE(), EPS))
    assert torch.equal(times.weight(u, VPSDE(), EPS), inner.weight(u, VPSDE(), EPS))


def test_an_unusable_log_normal_is_refused():
    with pytest.raises(InputError, match="std=0"):
        LogNormalTimes(std=0)


# --- Grids ---------------------------------------------------------------------------------------


@each_sde
@each_grid
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_grids_fall_from_one_to_eps_exactly(steps, grid, sde):
    times = grid(steps, sde, 1e-5)
    assert (times.dtype, len(times)) == (torch.float64, steps + 1)
    assert (float(times[0]), float(times[-1])) == (1.0, 1e-5)
    assert bool((times.diff() < 0).all())


@each_sde
def test_the_uniform_grid_is_uniform_in_time(sde):
    steps = UniformGrid()(10, sde, EPS).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -(1 - EPS) / 10))


@each_sde
def test_the_log_snr_grid_is_uniform_in_the_log_snr(sde):
    steps = sde.log_snr(LogSNRGrid()(10, sde, EPS)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-9, atol=0)


def ratio(sde, times):
    return torch.exp(-0.5 * sde.log_snr(times))


@each_sde
def test_the_karras_grid_is_uniform_in_a_root_of_the_noise(sde):
    """Equation 5 of Karras et al., in sigma / alpha."""
    steps = (ratio(sde, KarrasGrid(7)(10, sde, EPS)) ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-9, atol=0)


@each_sde
def test_the_cosine_grid_is_uniform_in_the_angle(sde):
    steps = torch.atan(ratio(sde, CosineGrid(0.5)(10, sde, EPS)) / 0.5).diff()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-9, atol=0)


@each_sde
def test_the_quadratic_grid_is_uniform_in_the_root_of_time(sde):
    steps = PowerGrid(2)(10, sde, EPS).sqrt().diff()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-9, atol=0)


def test_an_explicit_grid_is_what_it_is():
    grid = ExplicitGrid([1, 0.5, 0.1])
    assert grid(2, VPSDE(), 0.1).tolist() == [1.0, 0.5, 0.1]
    with pytest.raises(InputError, match=r"give steps=2 and eps=0\.1"):
        grid(3, VPSDE(), 0.1)
    with pytest.raises(InputError, match=r"give steps=2 and eps=0\.1"):
        grid(2, VPSDE(), 0.2)


@pytest.mark.parametrize("times", [(1,), (1, 0.1, 0.5), (0.9, 0.1), (1, -0.1), (1, 1)])
def test_times_that_do_not_fall_are_refused(times):
    with pytest.raises(InputError, match="do not fall"):
        ExplicitGrid(times)


@pytest.mark.parametrize(
    "make", [lambda: KarrasGrid(0.5), lambda: PowerGrid(0), lambda: CosineGrid(-1)]
)
def test_grids_refuse_what_makes_no_grid(make):
    with pytest.raises(InputError, match=r"rho=0\.5|power=0|sigma_data=-1"):
        make()


@each_grid
@pytest.mark.parametrize("steps", [0, -1, 2.5, math.nan])
def test_unusable_steps_are_refused(steps, grid):
    with pytest.raises(InputError, match=rf"steps.*{steps}"):
        grid(steps, VPSDE(), EPS)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE()], ids=repr)
def test_the_log_snr_grid_needs_noise_at_its_end(sde):
    with pytest.raises(InputError, match="eps=0"):
        LogSNRGrid()(10, sde, 0.0)


# --- Levels --------------------------------------------------------------------------------------


def test_level_times_of_a_ve_sde_are_the_geometric_levels():
    """Song and Ermon: sigma_i / sigma_{i-1} is constant, from sigma_min to sigma_max."""
    t = LevelTimes(10).quantile(middles(1000), VESDE(), 0.0)
    levels, counts = VESDE().sigma(t).unique(return_counts=True)
    ratio = (50 / 0.01) ** (1 / 9)
    truth = 0.01 * ratio ** torch.arange(10, dtype=torch.float64)
    torch.testing.assert_close(levels, truth, rtol=1e-12, atol=0)
    assert set(counts.tolist()) == {100}


def test_one_level_is_refused():
    with pytest.raises(InputError, match="levels=1"):
        LevelTimes(1)
