"""The SDEs against their own definition, against simulated paths and against published code.

``fixtures/reference_sde.npz`` holds numbers of the reference implementation (score_sde_pytorch
cb1f359 on CPU in float32; keys ``vp/...``, ``subvp/...``, ``ve/...``). It computes the std by
``1 - exp`` in float32, whose own error grows as t falls: at its smallest time here, t = 0.01, it
is 2.7e-6 of the std for VP and 5.4e-6 for sub-VP, all that separates it from our values at 1e-5.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scoresde import SDE, VESDE, VPSDE, DiscreteVP, GaussianModel, InputError, SubVPSDE
from scoresde.sample import EulerMaruyama

NAMED = [VPSDE(), SubVPSDE(), VESDE()]
OTHERS = [VPSDE(0.3, 8.0), SubVPSDE(1.0, 1.0), VESDE(0.002, 80.0), DiscreteVP()]
METHODS = ("alpha", "sigma", "f", "g", "log_snr", "time")
DTYPES = [torch.float32, torch.float64]

each_sde = pytest.mark.parametrize("sde", NAMED, ids=repr)
every_sde = pytest.mark.parametrize("sde", NAMED + OTHERS, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Cosine(SDE):
    """A user's own SDE: alpha and sigma and no more."""

    angle = 0.49 * math.pi

    def alpha(self, t):
        return torch.cos(self.angle * t)

    def sigma(self, t):
        return torch.sin(self.angle * t)


class Learned(SDE, nn.Module):
    """A schedule that is learned."""

    def __init__(self):
        nn.Module.__init__(self)
        self.slope = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def alpha(self, t):
        return torch.sqrt(torch.sigmoid(-self.slope * (2 * t - 1)))

    def sigma(self, t):
        return torch.sqrt(torch.sigmoid(self.slope * (2 * t - 1)))


def times(low=1e-5, n=200, dtype=torch.float64):
    return torch.logspace(math.log10(low), 0, n, dtype=torch.float64).clamp(low, 1).to(dtype)


def slope(function, t):
    t = t.clone().requires_grad_()
    value = function(t)
    if not value.requires_grad:  # alpha = 1
        return torch.zeros_like(t)
    return torch.autograd.grad(value.sum(), t)[0]


# --- f and g follow from alpha and sigma ---------------------------------------------------------


@every_sde
def test_f_is_the_slope_of_log_alpha(sde):
    t = times()
    truth = slope(lambda s: torch.log(sde.alpha(s)), t)
    torch.testing.assert_close(sde.f(t), truth, rtol=1e-12, atol=1e-14)


@every_sde
def test_g_squared_is_the_growth_of_the_variance_less_the_drift(sde):
    t = times()
    truth = slope(lambda s: sde.sigma(s) ** 2, t) - 2 * sde.f(t) * sde.sigma(t) ** 2
    torch.testing.assert_close(sde.g(t) ** 2, truth, rtol=1e-11, atol=0)


@every_sde
def test_g_squared_is_the_fall_of_the_log_snr(sde):
    t = times()
    truth = -(sde.sigma(t) ** 2) * slope(sde.log_snr, t)
    torch.testing.assert_close(sde.g(t) ** 2, truth, rtol=1e-11, atol=0)


@every_sde
@pytest.mark.parametrize("name", ["f", "g", "log_snr"])
def test_the_defaults_equal_the_closed_forms(name, sde):
    t = times()
    default = getattr(SDE, name)(sde, t)
    torch.testing.assert_close(default, getattr(sde, name)(t), rtol=1e-11, atol=1e-11)


@each_sde
def test_the_defaults_need_no_gradient_mode(sde):
    t = times()
    with torch.no_grad():
        torch.testing.assert_close(SDE.g(sde, t), sde.g(t), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("sde", "alpha", "sigma"),
    [  # B(0.5) = 0.05 + 19.9 / 8 = 2.5375
        (VPSDE(), math.exp(-1.26875), math.sqrt(1 - math.exp(-2.5375))),
        (SubVPSDE(), math.exp(-1.26875), 1 - math.exp(-2.5375)),
        (VESDE(), 1.0, math.sqrt(0.01 * 50)),
    ],
    ids=repr,
)
def test_alpha_and_sigma_are_those_published(sde, alpha, sigma):
    assert float(sde.alpha(0.5)) == pytest.approx(alpha, rel=1e-12)
    assert float(sde.sigma(0.5)) == pytest.approx(sigma, rel=1e-12)


# --- The log-SNR and its inverse -----------------------------------------------------------------


@every_sde
@each_dtype
def test_time_inverts_the_log_snr(dtype, sde):
    """To a few roundings: one of t, and one of the log-SNR divided by its slope."""
    t = times(dtype=dtype)
    snr = sde.log_snr(t)
    roundings = t.double() + (2 + snr.double().abs()) / slope(sde.log_snr, t.double()).abs()
    error = (sde.time(snr).double() - t.double()).abs()
    assert float((error / roundings).max()) < 4 * torch.finfo(dtype).eps


@each_sde
def test_the_round_trip_is_tight_in_float64(sde):
    t = times()
    torch.testing.assert_close(sde.time(sde.log_snr(t)), t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE()], ids=repr)
def test_the_round_trip_is_tight_in_float32(sde):
    t = times(dtype=torch.float32)
    torch.testing.assert_close(sde.time(sde.log_snr(t)), t, rtol=2e-6, atol=0)


@every_sde
def test_the_bisection_inverts_the_log_snr(sde):
    t = times()
    torch.testing.assert_close(SDE.time(sde, sde.log_snr(t)), t, rtol=1e-10, atol=0)


@each_sde
def test_the_bisection_stays_in_the_unit_interval(sde):
    beyond = torch.tensor([1e3, -1e3], dtype=torch.float64)
    torch.testing.assert_close(SDE.time(sde, beyond), torch.tensor([0.0, 1.0]).double())


# --- Precision -----------------------------------------------------------------------------------


@each_sde
def test_the_std_is_exact_in_float32_at_small_times(sde):
    t = torch.linspace(1e-5, 1e-4, 1000)
    std, truth = sde.sigma(t).double(), sde.sigma(t.double())
    assert float((std / truth - 1).abs().max()) < 1e-6


@each_sde
@pytest.mark.parametrize("name", ["alpha", "f", "g"])
def test_coefficients_are_exact_in_float32(name, sde):
    t = times(dtype=torch.float32)
    method = getattr(sde, name)
    torch.testing.assert_close(method(t).double(), method(t.double()), rtol=2e-6, atol=0)


# --- Shapes and types ----------------------------------------------------------------------------


@each_sde
@each_dtype
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_any_shape_and_type_of_time_is_kept(name, shape, dtype, sde):
    out = getattr(sde, name)(torch.full(shape, 0.3, dtype=dtype))
    assert (out.shape, out.dtype) == (shape, dtype)


@pytest.mark.parametrize("name", METHODS)
@each_dtype
def test_a_users_sde_keeps_shape_and_type(dtype, name):
    out = getattr(Cosine(), name)(torch.full((2, 3), 0.3, dtype=dtype))
    assert (out.shape, out.dtype) == ((2, 3), dtype)


@each_sde
@pytest.mark.parametrize("name", METHODS)
def test_a_number_counts_as_float64(name, sde):
    method = getattr(sde, name)
    assert torch.equal(method(0.3), method(torch.tensor(0.3, dtype=torch.float64)))


@pytest.mark.parametrize("sde", [*NAMED, Cosine()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("name", METHODS)
def test_no_branch_depends_on_the_data(name, sde):
    method, t = getattr(sde, name), times(0.01, 5)
    torch.testing.assert_close(torch.func.vmap(method)(t), method(t), rtol=1e-13, atol=0)


@each_sde
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 8, 5), (4, 1, 2, 3, 4)], ids=str)
def test_a_marginal_fits_data_of_any_shape(shape, sde):
    x0, t = torch.ones(shape), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    mean, std = sde.marginal(x0, t)
    assert (mean.shape, mean.dtype, std.dtype) == (shape, torch.float32, torch.float32)
    torch.testing.assert_close((mean + 0 * std).flatten(1)[:, 0], sde.alpha(t).float())
    torch.testing.assert_close((0 * mean + std).flatten(1)[:, -1], sde.sigma(t).float())


@each_sde
def test_perturbed_data_are_the_mean_plus_noise(sde):
    x0, noise = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    truth = sde.alpha(0.3) * x0 + sde.sigma(0.3) * noise
    torch.testing.assert_close(sde.perturb(x0, 0.3, noise), truth)


# --- The marginals are those of the process ------------------------------------------------------


@each_sde
@pytest.mark.parametrize("end", [0.1, 0.5, 1.0])
def test_simulated_forward_paths_have_the_marginal(end, sde):
    """Euler-Maruyama of dx = f x dt + g dw, coefficients in the middle of each step."""
    n, steps, x0 = 4000, 500, 1.5
    generator = torch.Generator().manual_seed(0)
    h = end / steps
    x = x0 + float(sde.sigma(0.0)) * torch.randn(n, generator=generator, dtype=torch.float64)
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) * h
    for f, g in zip(sde.f(middles).tolist(), sde.g(middles).tolist(), strict=True):
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        x = x + f * x * h + g * math.sqrt(h) * z
    std = float(sde.sigma(end))
    discretisation = 0.01 * x0
    assert abs(float(x.mean()) - float(sde.alpha(end)) * x0) < 4 * std / n**0.5 + discretisation
    assert float(x.std()) == pytest.approx(std, rel=4 / (2 * n) ** 0.5 + 0.01)


# --- The prior -----------------------------------------------------------------------------------


@each_sde
def test_the_prior_is_close_to_the_marginal_of_the_noise_at_one(sde):
    assert sde.prior_std == pytest.approx(float(sde.sigma(1.0)), rel=1e-4)


@each_sde
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4, 4)], ids=str)
def test_the_priors_density_is_the_normal_one(shape, sde):
    x = 2 * sde.prior_std * torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    normal = torch.distributions.Normal(torch.zeros(()).double(), sde.prior_std)
    truth = normal.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(sde.prior_log_prob(x), truth, rtol=1e-12, atol=0)


@each_sde
def test_samples_of_the_prior_have_its_std(sde):
    x = sde.prior_sample((4000, 5), torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(sde.prior_std, rel=4 / (2 * x.numel()) ** 0.5)


def test_samples_of_the_prior_follow_the_generator():
    a, b = (VPSDE().prior_sample((2, 3), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


# --- Published numbers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "fixtures" / "reference_sde.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]).double() for key in arrays}


KEYS = ("marginal_mean", "marginal_std", "drift", "diffusion", "prior_logp")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_numbers_equal_those_of_the_reference(name, key, reference):
    sde = {"vp": VPSDE(), "subvp": SubVPSDE(), "ve": VESDE()}[name]
    x, t, x_t = (reference[f"{name}/{k}"] for k in ("x", "t", "x_t"))
    mean, std = sde.marginal(x, t)
    ours = {
        "marginal_mean": mean,
        "marginal_std": std.flatten(),
        "drift": sde.f(t).reshape(-1, 1, 1, 1) * x_t,
        "diffusion": sde.g(t),
        "prior_logp": sde.prior_log_prob(x_t),
    }[key]
    torch.testing.assert_close(ours, reference[f"{name}/{key}"], rtol=1e-5, atol=0)


# --- A user's SDE --------------------------------------------------------------------------------


def test_a_users_drift_and_diffusion_follow():
    t = times(0.01)
    angle = Cosine.angle
    torch.testing.assert_close(Cosine().f(t), -angle * torch.tan(angle * t))
    torch.testing.assert_close(Cosine().g(t) ** 2, 2 * angle * torch.tan(angle * t))


def test_a_users_log_snr_is_inverted():
    t = times(0.01)
    torch.testing.assert_close(Cosine().time(Cosine().log_snr(t)), t, rtol=1e-12, atol=0)


def test_a_users_sde_samples():
    exact = GaussianModel(torch.full((2,), 3.0).double(), 0.5, Cosine())
    x = EulerMaruyama(steps=200)(exact, shape=(1000, 2), seed=0).x
    assert float(x.mean()) == pytest.approx(3.0, abs=0.1)
    assert float(x.std()) == pytest.approx(0.5, rel=0.1)


def test_a_learned_schedule_has_gradients():
    sde = Learned()
    sde.g(times(0.01, 5)).sum().backward()
    assert float(sde.slope.grad.abs()) > 0


# --- Values and errors ---------------------------------------------------------------------------


@each_sde
def test_sdes_are_values(sde):
    assert sde == type(sde)()
    assert hash(sde) == hash(type(sde)())
    with pytest.raises(AttributeError):
        sde.beta_max = 1.0


@pytest.mark.parametrize("make", [VPSDE, SubVPSDE])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 20.0), (-0.1, 20.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 20.0)]
)
def test_unusable_rates_are_refused(low, high, make):
    with pytest.raises(InputError, match="beta_min"):
        make(low, high)


@pytest.mark.parametrize(("low", "high"), [(0.0, 50.0), (-1.0, 50.0), (1.0, 1.0), (1.0, math.nan)])
def test_unusable_noise_levels_are_refused(low, high):
    with pytest.raises(InputError, match="sigma_min"):
        VESDE(low, high)


@each_sde
@pytest.mark.parametrize("eps", [-0.1, 1.0, 2.0, math.nan])
def test_an_eps_outside_the_interval_is_refused(eps, sde):
    with pytest.raises(InputError, match=f"eps.*got {eps}"):
        sde.check_eps(eps)


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), Cosine()])
def test_an_eps_without_noise_is_refused(sde):
    with pytest.raises(InputError, match=r"eps.*got 0"):
        sde.check_eps(0)


def test_ve_has_noise_at_time_zero():
    assert VESDE().check_eps(0) == 0.0


@each_sde
def test_times_that_do_not_fit_the_batch_are_refused(sde):
    with pytest.raises(InputError, match=r"\bt\b.*\(4,\).*\(3,\)"):
        sde.marginal(torch.ones(4, 2), torch.rand(3))
