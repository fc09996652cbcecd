"""Score functions: exact models against automatic differentiation, networks against targets."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    DataParametrisation,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    NoiseLevel,
    NoiseParametrisation,
    Preconditioned,
    ScaledTime,
    ScoreModel,
    ScoreParametrisation,
    SubVPSDE,
    VParametrisation,
)
from scoresde.model import Conditioned, evaluating
from scoresde.nn import ScaledBySigma
from scoresde.nn.speed import HalfPrecision
from scoresde.passes import counting

SDES = [VPSDE(), SubVPSDE(), VESDE(0.01, 5.0)]
VIEWS = ("score", "noise", "denoise")
TIMES = [0.01, 0.3, 1.0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed=1):
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d).double()


EXACT = {
    "scalar std": lambda sde: GaussianModel(normal(3), 0.7, sde),
    "std per feature": lambda sde: GaussianModel(normal(3), normal(3, seed=1).abs() + 0.1, sde),
    "full covariance": lambda sde: GaussianModel(normal(3), sde=sde, covariance=covariance(3)),
    "mixture": lambda sde: GaussianMixtureModel([0.2, 0.8], normal(2, 3), [0.3, 0.6], sde),
    "image": lambda sde: GaussianModel(normal(2, 3, 4), normal(2, 3, 4).abs() + 0.1, sde),
    "correlated image": lambda sde: GaussianModel(
        normal(2, 2, 3), sde=sde, covariance=covariance(12)
    ),
    "mixture of images": lambda sde: GaussianMixtureModel(
        [1, 2, 3], normal(3, 2, 2, 3), [0.3, 0.6, 1.0], sde
    ),
}

each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
each_exact = pytest.mark.parametrize("name", EXACT)
each_time = pytest.mark.parametrize("t", TIMES)


# --- Exact models --------------------------------------------------------------------------------


@each_sde
@each_exact
@each_time
def test_the_exact_score_is_the_slope_of_the_log_density(t, name, sde):
    exact = EXACT[name](sde)
    x = exact.sample(5, t, seed=0).requires_grad_()
    (truth,) = torch.autograd.grad(exact.log_prob(x, t).sum(), x)
    torch.testing.assert_close(exact.score(x, t), truth, rtol=1e-9, atol=1e-9)


@each_sde
@each_exact
@each_time
def test_the_exact_noise_is_the_score_scaled(t, name, sde):
    exact = EXACT[name](sde)
    x = exact.sample(5, t, seed=0)
    truth = -float(sde.sigma(t)) * exact.score(x, t)
    torch.testing.assert_close(exact.noise(x, t), truth, rtol=1e-12, atol=1e-12)


@each_sde
@each_exact
@each_time
def test_the_exact_data_follow_from_the_noise(t, name, sde):
    exact = EXACT[name](sde)
    x = exact.sample(5, t, seed=0)
    truth = (x - float(sde.sigma(t)) * exact.noise(x, t)) / float(sde.alpha(t))
    torch.testing.assert_close(exact.denoise(x, t), truth, rtol=1e-9, atol=1e-9)


@each_exact
@pytest.mark.parametrize("view", [*VIEWS, "log_prob"])
def test_one_time_per_example(view, name):
    exact = EXACT[name](VPSDE())
    x, t = exact.sample(3, seed=0), torch.tensor(TIMES, dtype=torch.float64)
    method = getattr(exact, view)
    alone = torch.cat([method(x[i : i + 1], t[i]) for i in range(3)])
    torch.testing.assert_close(method(x, t), alone, rtol=1e-12, atol=1e-12)


@each_exact
@pytest.mark.parametrize("view", VIEWS)
def test_exact_models_keep_the_type_of_the_state(view, name):
    exact = EXACT[name](VPSDE())
    x = exact.sample(3, 0.5, seed=0)
    narrow = getattr(exact, view)(x.float(), torch.tensor(0.5, dtype=torch.float64))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), getattr(exact, view)(x, 0.5), rtol=1e-4, atol=1e-4)


def moments(name):
    """The mean and the covariance of the data, computed apart from the models."""
    exact = EXACT[name](VPSDE())
    if name.startswith("mixture"):
        means, stds = exact.means.flatten(1), exact.stds
        weights = {"mixture": [0.2, 0.8], "mixture of images": [1 / 6, 2 / 6, 3 / 6]}[name]
        w = torch.tensor(weights, dtype=torch.float64)
        mean = w @ means
        spread = torch.einsum("k,kd,ke->de", w, means - mean, means - mean)
        return mean, spread + (w @ stds**2) * torch.eye(means.shape[1])
    return exact.mean.flatten(), {
        "scalar std": 0.49 * torch.eye(3).double(),
        "std per feature": torch.diag((normal(3, seed=1).abs() + 0.1) ** 2),
        "full covariance": covariance(3),
        "image": torch.diag((normal(2, 3, 4).abs().flatten() + 0.1) ** 2),
        "correlated image": covariance(12),
    }[name]


@each_exact
@pytest.mark.parametrize("t", [0.0, 0.3])
def test_samples_have_the_moments_of_the_marginal(t, name):
    n, sde = 20_000, VPSDE()
    mean, cov = moments(name)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    mean, cov = alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(len(mean))
    x = EXACT[name](sde).sample(n, t, seed=0).flatten(1)
    std = cov.diagonal().sqrt()
    assert float(((x.mean(0) - mean) / std).abs().max()) < 4 / n**0.5
    # A product of two normal numbers has at most twice the variance of independent ones.
    error = (torch.cov(x.T) - cov) / torch.outer(std, std)
    assert float(error.abs().max()) < 4 * (2 / n) ** 0.5


@each_sde
@pytest.mark.parametrize("t", [0.1, 0.6])
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_the_density_integrates_to_one(kind, t, sde):
    mean = torch.tensor([[0.5, -0.2], [-1.0, 0.8]], dtype=torch.float64)
    exact = {
        "gaussian": GaussianModel(mean[0], sde=sde, covariance=covariance(2)),
        "mixture": GaussianMixtureModel([0.3, 0.7], mean, [0.2, 0.4], sde),
    }[kind]
    reach, n = 8.0, 401  # the trapezoid rule is exact to rounding on a density this smooth
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    density = exact.log_prob(torch.cartesian_prod(axis, axis), t).exp()
    assert float(density.sum()) * (2 * reach / (n - 1)) ** 2 == pytest.approx(1, abs=1e-6)


def test_the_mixtures_density_is_that_of_torch():
    exact = EXACT["mixture"](VPSDE())
    components = torch.distributions.Independent(
        torch.distributions.Normal(exact.means, exact.stds[:, None]), 1
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.2, 0.8]).double()), components
    )
    x = exact.sample(50, seed=0)
    torch.testing.assert_close(exact.log_prob(x), mixture.log_prob(x), rtol=1e-7, atol=1e-7)


def test_the_gaussians_density_is_that_of_torch():
    exact = EXACT["full covariance"](VPSDE())
    truth = torch.distributions.MultivariateNormal(exact.mean, covariance(3))
    x = exact.sample(50, seed=0)
    torch.testing.assert_close(exact.log_prob(x), truth.log_prob(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("view", VIEWS)
def test_a_mixture_of_one_is_the_gaussian(view):
    mean, x = normal(1, 3), normal(5, 3, seed=2)
    mixture = GaussianMixtureModel([1.0], mean, [0.7], VPSDE())
    gaussian = GaussianModel(mean[0], 0.7, VPSDE())
    torch.testing.assert_close(getattr(mixture, view)(x, 0.4), getattr(gaussian, view)(x, 0.4))


def test_a_far_point_has_a_finite_score():
    exact = EXACT["mixture"](VPSDE())
    assert bool(exact.score(torch.full((1, 3), 1e6).double(), 1e-5).isfinite().all())


def test_samples_of_a_seed_start_alike():
    exact = EXACT["mixture"](VPSDE())
    assert torch.equal(exact.sample(5, seed=3), exact.sample(9, seed=3)[:5])


# --- The exact flow ------------------------------------------------------------------------------

FLOWS = [name for name in EXACT if not name.startswith("mixture")]


@each_sde
@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_solves_the_probability_flow_ode(name, sde):
    exact = EXACT[name](sde)
    x, t = exact.sample(4, 0.4, seed=0), torch.tensor(0.4, dtype=torch.float64)
    h = 1e-4
    slope = (exact.flow(x, t, t + h) - exact.flow(x, t, t - h)) / (2 * h)
    velocity = sde.f(t) * x - 0.5 * sde.g(t) ** 2 * exact.score(x, t)
    torch.testing.assert_close(slope, velocity, rtol=1e-6, atol=1e-6)


@each_sde
@pytest.mark.parametrize("name", FLOWS)
def test_flows_compose_and_invert(name, sde):
    exact = EXACT[name](sde)
    x = exact.sample(4, 0.2, seed=0)
    torch.testing.assert_close(
        exact.flow(exact.flow(x, 0.2, 0.5), 0.5, 0.9), exact.flow(x, 0.2, 0.9)
    )
    torch.testing.assert_close(exact.flow(exact.flow(x, 0.2, 1.0), 1.0, 0.2), x)


@pytest.mark.parametrize("name", FLOWS)
def test_the_flow_takes_one_time_per_example(name):
    exact, t = EXACT[name](VPSDE()), torch.tensor([0.1, 0.5, 0.9]).double()
    x = exact.sample(3, seed=0)
    alone = torch.cat([exact.flow(x[i : i + 1], t[i], 0.3) for i in range(3)])
    torch.testing.assert_close(exact.flow(x, t, 0.3), alone)


# --- Networks ------------------------------------------------------------------------------------

STD = 0.6
TARGETS = {  # what the network should output, from alpha, sigma, the data and the noise
    NoiseParametrisation(STD): lambda a, s, x0, z: z,
    DataParametrisation(STD): lambda a, s, x0, z: x0,
    VParametrisation(STD): lambda a, s, x0, z: a * z - s * x0,
    ScoreParametrisation(STD): lambda a, s, x0, z: -z / s,
    Preconditioned(STD): lambda a, s, x0, z: (
        (s * x0 - a * STD**2 * z) / (STD * (a**2 * STD**2 + s**2) ** 0.5)
    ),
}
each_parametrisation = pytest.mark.parametrize(
    "parametrisation", TARGETS, ids=lambda p: type(p).__name__
)


@each_sde
@each_parametrisation
@each_time
def test_a_perfect_network_gives_the_noise_and_the_data(t, parametrisation, sde):
    x0, z = normal(4, 3), normal(4, 3, seed=1)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    target = TARGETS[parametrisation](alpha, sigma, x0, z)
    model = ScoreModel(lambda x, c: target, sde, parametrisation)
    x = sde.perturb(x0, t, z)
    tolerance = {"rtol": 1e-9, "atol": 1e-9 / alpha}
    torch.testing.assert_close(model.noise(x, t), z, **tolerance)
    torch.testing.assert_close(model.denoise(x, t), x0, **tolerance)
    torch.testing.assert_close(model.score(x, t), -z / sigma, **tolerance)


@each_sde
@each_parametrisation
@each_time
def test_the_three_views_agree_for_any_network(t, parametrisation, sde):
    model = ScoreModel(lambda x, c: torch.sin(3 * x) + c[:, None], sde, parametrisation)
    x = normal(4, 3)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    noise = model.noise(x, t)
    torch.testing.assert_close(alpha * model.denoise(x, t) + sigma * noise, x)
    torch.testing.assert_close(model.score(x, t), -noise / sigma)


@each_sde
@pytest.mark.parametrize("view", VIEWS)
@each_time
def test_preconditioning_starts_from_the_exact_gaussian(t, view, sde):
    model = ScoreModel(lambda x, c: torch.zeros_like(x), sde, Preconditioned(STD))
    exact = GaussianModel(torch.zeros(3).double(), STD, sde)
    x = normal(4, 3)
    torch.testing.assert_close(getattr(model, view)(x, t), getattr(exact, view)(x, t))


@each_sde
@each_parametrisation
@each_time
def test_the_networks_input_has_unit_variance(t, parametrisation, sde):
    seen = {}
    model = ScoreModel(lambda x, c: seen.setdefault("x", x), sde, parametrisation)
    model.noise(torch.full((1, 3), math.hypot(sde.alpha(t) * STD, sde.sigma(t))).double(), t)
    torch.testing.assert_close(seen["x"], torch.ones(1, 3).double())


def test_without_the_datas_std_the_input_is_left_alone():
    seen = {}
    model = ScoreModel(
        lambda x, c: seen.setdefault("x", x), VESDE(), NoiseParametrisation(sigma_data=None)
    )
    x = normal(4, 3)
    model.noise(x, 0.7)
    assert torch.equal(seen["x"], x)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_the_preconditioned_target_has_unit_variance(sde):
    n, t = 20_000, 0.35
    x0, z = STD * normal(n), normal(n, seed=1)
    target = TARGETS[Preconditioned(STD)](float(sde.alpha(t)), float(sde.sigma(t)), x0, z)
    assert float(target.std()) == pytest.approx(1, abs=4 / (2 * n) ** 0.5)


# --- Labels --------------------------------------------------------------------------------------


@each_sde
def test_the_label_is_the_relative_noise_level(sde):
    t = torch.tensor(TIMES, dtype=torch.float64)
    truth = torch.log(sde.sigma(t) / sde.alpha(t)) / 4
    torch.testing.assert_close(NoiseLevel()(sde, t), truth)


def test_the_label_may_be_the_scaled_time():
    t = torch.tensor(TIMES, dtype=torch.float64)
    assert torch.equal(ScaledTime()(VPSDE(), t), 999 * t)
    assert torch.equal(ScaledTime(10)(VPSDE(), t), 10 * t)


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.full((4,), 0.5)], ids=str)
def test_the_network_is_told_one_label_per_example(t):
    seen = {}

    def network(x, c):
        seen["c"] = c
        return x

    ScoreModel(network, VPSDE(), noise_label=ScaledTime(2)).noise(normal(4, 3), t)
    assert torch.equal(seen["c"], torch.ones(4).double())


def test_conditions_reach_the_network():
    model = ScoreModel(lambda x, c, y: y * x, VPSDE(), NoiseParametrisation(None))
    x, y = normal(4, 3), torch.arange(4.0).double()[:, None]
    assert torch.equal(model.noise(x, 0.5, y=y), y * x)


# --- Types ---------------------------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3, dtype=dtype)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, c):
        assert x.dtype == self.linear.weight.dtype
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("network", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_the_state_keeps_its_type_around_the_network(view, state, network):
    model = ScoreModel(Affine(network), VPSDE())
    out = getattr(model, view)(normal(4, 3).to(state), torch.tensor(0.5, dtype=torch.float64))
    assert out.dtype == state


@pytest.mark.parametrize(
    ("network", "label"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_label_is_no_narrower_than_float32(network, label):
    """In bfloat16 neighbouring times would be one."""
    seen, net = {}, Affine(network)
    model = ScoreModel(lambda x, c: seen.setdefault("c", c) * 0 + x, VPSDE())
    model.network_module = net
    model.noise(normal(3, 3), 0.5)
    assert seen["c"].dtype == label


@pytest.mark.parametrize(
    ("network", "data", "state"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_state_is_no_narrower_than_float32_and_the_model(network, data, state):
    assert ScoreModel(Affine(network), VPSDE()).state(torch.zeros(1, 3, dtype=data)).dtype == state


class Wrapping(nn.Module):
    """A network whose output is in something."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(2, 2), wrap

    def forward(self, x, c):
        return self.wrap(self.linear(x))


@pytest.mark.parametrize("place", ["model", "half precision", "scaled"])
@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda y: (y, None), "got tuple; return its first item"),
        (lambda y: [y], "got list; return its first item"),
        (lambda y: SimpleNamespace(sample=y), "got SimpleNamespace; return its .sample"),
        (lambda y: {"sample": y}, "got dict"),
        (lambda y: y.detach().numpy(), "got ndarray"),
        (lambda y: None, "got NoneType"),
    ],
    ids=["tuple", "list", "object", "dict", "array", "nothing"],
)
def test_a_network_must_return_a_tensor(wrap, says, place):
    network = Wrapping(wrap)
    if place == "half precision":
        network = HalfPrecision(Wrapping(lambda y: wrap(y.float())), torch.bfloat16)
    elif place == "scaled":
        network = ScaledBySigma(network)
    with pytest.raises(InputError, match="network must return a tensor .*" + re.escape(says)):
        ScoreModel(network, VPSDE()).noise(torch.zeros(3, 2), torch.full((3,), 0.5))


def test_a_model_moves_with_its_numbers():
    exact = GaussianMixtureModel([1, 1], normal(2, 3), [0.5, 0.5], VPSDE())
    assert (exact.dtype, exact.float().dtype) == (torch.float64, torch.float32)


# --- Counting and dropout ------------------------------------------------------------------------


@pytest.mark.parametrize("view", [*VIEWS, "velocity", "reverse_drift"])
def test_every_view_counts_one_pass(view):
    calls = []
    model = ScoreModel(lambda x, c: calls.append(1) or x, VPSDE())
    with counting(4) as passes:
        getattr(Conditioned(model), view)(normal(4, 3), torch.tensor(0.5).double())
    assert (len(calls), passes.network.tolist()) == (1, [1] * 4)


@each_sde
@pytest.mark.parametrize(("name", "share"), [("velocity", 0.5), ("reverse_drift", 1.0)])
def test_drifts_are_those_of_the_equations(name, share, sde):
    exact = EXACT["mixture"](sde)
    x, t = normal(4, 3), torch.tensor(0.4).double()
    truth = sde.f(t) * x - share * sde.g(t) ** 2 * exact.score(x, t)
    torch.testing.assert_close(getattr(Conditioned(exact), name)(x, t), truth)


def test_training_mode_is_restored_part_by_part():
    model = ScoreModel(Affine(), VPSDE())
    model.train()
    model.network.linear.eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_training_mode_is_restored_after_an_error():
    model = ScoreModel(Affine(), VPSDE()).train()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.network.dropout.training


# --- Errors --------------------------------------------------------------------------------------


def test_a_network_that_changes_the_shape_is_refused():
    with pytest.raises(InputError, match=r"\(4, 3\).*\(4, 2\)"):
        ScoreModel(lambda x, c: x[:, :2], VPSDE()).noise(normal(4, 3), 0.5)


@pytest.mark.parametrize("view", VIEWS)
def test_times_that_do_not_fit_are_refused_by_a_network(view):
    with pytest.raises(InputError, match=r"\bt\b.*\(4,\).*\(3,\)"):
        getattr(ScoreModel(lambda x, c: x, VPSDE()), view)(normal(4, 3), torch.rand(3))


@pytest.mark.parametrize("view", [*VIEWS, "log_prob"])
@pytest.mark.parametrize("name", ["full covariance", "mixture"])
@pytest.mark.parametrize("batch", [1, 4])
def test_times_that_do_not_fit_are_refused_by_an_exact_model(batch, name, view):
    with pytest.raises(InputError, match=r"\bt\b.*\(3,\)"):
        getattr(EXACT[name](VPSDE()), view)(normal(batch, 3), torch.rand(3))


@pytest.mark.parametrize("std", [0.0, -0.5])
@pytest.mark.parametrize("make", [NoiseParametrisation, Preconditioned])
def test_an_unusable_std_of_the_data_is_refused(make, std):
    with pytest.raises(InputError, match=f"sigma_data.*{std}"):
        make(std)


def test_preconditioning_needs_the_std_of_the_data():
    with pytest.raises(InputError, match=r"sigma_data.*None"):
        Preconditioned(None)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"std": 1.0, "covariance": torch.eye(3)},
        {"std": 0.0},
        {"std": -1.0},
        {"std": torch.tensor([1.0, -1.0, 1.0])},
        {"covariance": torch.eye(2)},
        {"covariance": torch.diag(torch.tensor([1.0, 1.0, -1.0]))},
    ],
    ids=str,
)
def test_an_unusable_gaussian_is_refused(arguments):
    with pytest.raises(InputError, match=r"std|covariance"):
        GaussianModel(torch.zeros(3), sde=VPSDE(), **arguments)


@pytest.mark.parametrize(
    ("sde", "message"),
    [(None, "sde"), ("vp", "sde must be an SDE .*'vp'"), (VPSDE, "sde must be .*class VPSDE")],
)
def test_a_gaussian_needs_an_sde(sde, message):
    with pytest.raises(InputError, match=message):
        GaussianModel(torch.zeros(3), 1.0, sde)


def test_a_gaussian_needs_a_finite_mean():
    with pytest.raises(InputError, match="mean must be finite, got nan in 1 of 2"):
        GaussianModel([0.0, math.nan], 1.0, VPSDE())


@pytest.mark.parametrize(
    ("weights", "means", "stds"),
    [
        ([0.5, 0.5], torch.zeros(3, 2), [1.0] * 3),
        ([0.5, 0.5], torch.zeros(2, 2), [1.0] * 3),
        ([1.0], torch.zeros(1), [1.0]),
        ([1.0, 0.0], torch.zeros(2, 2), [1.0] * 2),
        ([0.5, 0.5], torch.zeros(2, 2), [1.0, -1.0]),
    ],
)
def test_an_unusable_mixture_is_refused(weights, means, stds):
    with pytest.raises(InputError, match="weight"):
        GaussianMixtureModel(weights, means, stds, VPSDE())


def test_an_sde_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SDE()


def test_exact_models_keep_the_digits_of_pythons_numbers():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert GaussianModel(mean=zeros, std=0.8, sde=VPSDE()).variances.tolist() == [0.8**2] * 3
    assert GaussianModel(mean=zeros[:1], covariance=[[0.3]], sde=VPSDE()).variances.tolist() == [
        0.3
    ]
    mixed = GaussianMixtureModel([0.1, 0.9], zeros.reshape(3, 1)[:2], [0.8, 0.3], VPSDE())
    assert mixed.stds.tolist() == [0.8, 0.3]
    assert mixed.log_weights.exp().tolist() == pytest.approx([0.1, 0.9], abs=1e-16)
