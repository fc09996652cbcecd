"""Posteriors: their laws on exact models, their solver, and what they ask of a model."""

import math

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    RectifiedFlow,
    ScoreModel,
)
from scoresde.codec import Affine
from scoresde.guidance import Clipped
from scoresde.inverse import (
    DPS,
    MMPS,
    TMPD,
    Linear,
    Masking,
    NonLinear,
    Observation,
    PiGDM,
    solve,
)
from scoresde.metrics.distance import sliced_wasserstein
from scoresde.model import FullMixtureModel
from scoresde.nn import MLP
from scoresde.passes import counting
from scoresde.sample import DDIM, DPMSolverPPSDE, ProbabilityFlow, UniPC
from scoresde.times import LogSNRGrid
from tests.test_devices import check, mixture, perceptron, points
from tests.test_docs import blocks
from tests.test_run import ROOT

DRAWS = 20_000
ODE = UniPC(steps=50, grid=LogSNRGrid())
SDE = DPMSolverPPSDE(steps=100, grid=LogSNRGrid())
both = pytest.mark.parametrize("sampler", [ODE, SDE], ids=["ODE", "SDE"])
methods = pytest.mark.parametrize("method", [MMPS, PiGDM, TMPD, DPS])


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(covariance, sde=None):
    covariance = double(covariance)
    return GaussianModel(covariance[0] * 0, covariance=covariance, sde=sde or VPSDE())


def linear(rows):
    return Linear(lambda x: x @ double(rows).to(x).T)


TWO = gaussian([[1.0, 0.8], [0.8, 1.0]])
SEEN_TWO = Observation(linear([[1.0, 0.0]]), double([1.0]), 0.5)
THREE = gaussian([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.25]])
SEEN_THREE = Observation(linear([[1.0, 1, 1], [0, 1, -1]]), double([1.0, -1.0]), 0.3)
PROBLEMS = {"2-D": (TWO, SEEN_TWO), "3-D": (THREE, SEEN_THREE)}
problems = pytest.mark.parametrize(("prior", "seen"), list(PROBLEMS.values()), ids=list(PROBLEMS))


def draw(sampler, model, count=DRAWS):
    return sampler(model, shape=(count, *model.shape), seed=0).x


def check_moments(x, mean, covariance):
    """Means and covariances within four standard errors; NaN: not stated."""
    mean, covariance, n = double(mean), double(covariance), len(x)
    found = torch.atleast_2d(x.T.cov())
    variances = found.diag()
    errors = torch.sqrt((variances.outer(variances) + found**2) / n)
    if covariance.ndim == 1:
        found, errors = variances, errors.diag()
    assert ((x.mean(0) - mean).abs() < 4 * torch.sqrt(variances / n)).all(), x.mean(0)
    off = (found - covariance).abs().nan_to_num(0)
    assert (off < 4 * errors).all(), found


# --- Gaussian priors: laws in closed form, or from the equations of their moments ----------------


@both
@problems
def test_mmps_and_the_exact_guide_have_the_law_of_the_posterior(prior, seen, sampler):
    c, a = prior.basis @ prior.variances.diag() @ prior.basis.T, seen.matrix(prior.shape)[0]
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + seen.std**2 * torch.eye(len(a)))
    mean, covariance = (gain @ seen.y).tolist(), (c - gain @ a @ c).tolist()
    guide = prior.exact_guide(seen)
    torch.testing.assert_close(guide.mean, double(mean))
    torch.testing.assert_close(guide.covariance, double(covariance))
    for model in (guide, MMPS(prior, seen)):
        check_moments(draw(sampler, model), mean, covariance)


NAN = math.nan
LAWS = {
    "PiGDM ODE": (
        PiGDM,
        "2-D",
        ODE,
        [0.771180, 0.612218],
        [[0.224777, 0.184851], [NAN, 0.513015]],
    ),
    "PiGDM SDE": (
        PiGDM,
        "2-D",
        SDE,
        [0.774599, 0.609511],
        [[0.214540, 0.177132], [NAN, 0.508550]],
    ),
    "DPS ODE": (DPS, "2-D", ODE, [1.249520, 1.247527], [[0.030608, -0.034673], [NAN, 0.254702]]),
    "DPS SDE": (DPS, "2-D", SDE, [0.981684, 0.921444], [[0.124958, 0.070426], [NAN, 0.373131]]),
    "TMPD 3-D": (TMPD, "3-D", SDE, [0.9818, -0.4597, 0.3988], [0.9121, 0.2578, 0.1876]),
    "PiGDM 3-D": (PiGDM, "3-D", SDE, [0.9388, -0.4284, 0.4085], [0.9367, 0.2669, 0.1892]),
}


@pytest.mark.parametrize("law", list(LAWS.values()), ids=list(LAWS))
def test_the_laws_of_the_others_are_those_of_their_moment_equations(law):
    method, problem, sampler, mean, covariance = law
    prior, seen = PROBLEMS[problem]
    # The tables start from no signal at all; VP at t = 1 has alpha = 0.0066, which moves the means
    # of the ODE by up to that share of 1.25. So they start at less signal.
    check_moments(draw(sampler, method(around(prior, VPSDE(0.1, 30.0)), seen)), mean, covariance)


def around(prior, sde):
    return gaussian((prior.basis @ prior.variances.diag() @ prior.basis.T).tolist(), sde)


def dawson(x, steps=20_000):
    y = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * x
    return float(torch.exp(y**2 - x**2).mean() * x)


@pytest.mark.parametrize("std", [2.0, 1.0, 0.5])
def test_the_docstring_of_dps_states_its_law(std):
    prior, y, a = gaussian([[1.5]], VPSDE(0.1, 30.0)), 0.7, 1.5 / std**2
    model = DPS(prior, Observation(linear([[1.0]]), double([y]), std))
    mean = y * math.sqrt(2 * a) * dawson(math.sqrt(a / 2))
    check_moments(draw(UniPC(steps=100, grid=LogSNRGrid()), model), [mean], [1.5 * math.exp(-a)])
    variance = 0.5 * std**2 * (1 - math.exp(-2 * a))
    check_moments(draw(SDE, model), [y * (1 - math.exp(-a))], [variance])


@pytest.mark.parametrize("t", [0.01, 0.3, 0.9, 1.0])
def test_pigdm_is_mmps_for_data_of_one_standard_deviation(t):
    prior = GaussianModel(double([0.3, -1.0, 0.2]), 1.7, VPSDE())
    x = prior.sample(5, t, seed=0)
    one, two = MMPS(prior, SEEN_THREE, 1e-13), PiGDM(prior, SEEN_THREE, tolerance=1e-13)
    assert two.data_std == pytest.approx(1.7, abs=1e-12)
    for view in ("denoise", "noise", "score", "velocity"):
        a, b = (getattr(model, view)(x, double(t)) for model in (one, two))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


VIEWS = ("denoise", "noise", "score", "velocity")
SDES = {"VP": VPSDE(), "VE": VESDE(), "flow": RectifiedFlow()}
ends = pytest.mark.parametrize("t", [1e-3, 0.4, 1.0])


@ends
@pytest.mark.parametrize("sde", list(SDES.values()), ids=list(SDES))
def test_every_view_is_that_of_the_posterior_to_the_ends(sde, t):
    prior = around(THREE, sde)
    guide, model = prior.exact_guide(SEEN_THREE), MMPS(prior, SEEN_THREE, 1e-13)
    x, t = guide.sample(6, t, seed=1), double(t)
    near = 2e-3 if sde.zero_snr and float(t) == 1 else 1e-8  # there Cov is taken a little earlier
    for view in VIEWS:
        found, expected = getattr(model, view)(x, t), getattr(guide, view)(x, t)
        torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_a_rectified_flow_is_sampled_from_no_signal_on():
    guide = (prior := around(TWO, RectifiedFlow())).exact_guide(SEEN_TWO)
    x = draw(ODE, MMPS(prior, SEEN_TWO))
    check_moments(x / (1 - 1e-3), guide.mean.tolist(), guide.covariance.tolist())


# --- Mixtures ------------------------------------------------------------------------------------

MEANS = [[2.0, 1, 0, -1], [-2, 1, 1, 0], [1, -2, 0, 1], [-1, -1, -1, -1]]
MIXTURE = GaussianMixtureModel(
    *map(double, ([0.3, 0.25, 0.25, 0.2], MEANS, [0.3, 0.4, 0.25, 0.5])), VPSDE(), [0, 1, 0, 1]
)
SEEN = Observation(linear([[1.0, 0, 0.5, 0], [0, 1, 0, 0.5]]), double([0.3, 0.0]), 0.7)
SHARES = [0.363468, 0.165855, 0.390131, 0.080546]
POSTERIOR_MEANS = [
    [1.746058, 0.925311, -0.126971, -1.037344],
    [-1.582609, 0.768116, 1.208696, -0.115942],
    [0.922992, -1.834983, -0.038504, 1.082508],
    [-0.439252, -0.532710, -0.719626, -0.766355],
]


def test_the_posterior_of_a_mixture_is_that_of_bayes():
    guide = MIXTURE.exact_guide(SEEN)
    torch.testing.assert_close(guide.log_weights[0].exp(), double(SHARES), rtol=0, atol=1e-6)
    torch.testing.assert_close(guide.means[0], double(POSTERIOR_MEANS), rtol=0, atol=1e-6)
    assert float(guide.covariance.trace()) == pytest.approx(4.589756, abs=1e-6)
    assert float(MIXTURE.log_evidence(SEEN)) == pytest.approx(-4.128927, abs=1e-6)


@both
def test_the_exact_guide_samples_a_mixture_with_its_shares(sampler):
    guide, n = MIXTURE.exact_guide(SEEN), 4096
    x = draw(sampler, guide, n)
    component = (x[:, None] - double(POSTERIOR_MEANS)).norm(dim=2).argmin(1)
    true = guide.sample(400_000, seed=5)
    nearest = (true[:, None] - double(POSTERIOR_MEANS)).norm(dim=2).argmin(1)
    for k in range(4):
        share = float((nearest == k).double().mean())
        assert abs(float((component == k).double().mean()) - share) < 4 * math.sqrt(
            share * (1 - share) / n
        )
    # 0.095 is the 95 % quantile for two exact sets of this size.
    assert sliced_wasserstein(x, guide.sample(n, seed=1), 512) < 0.095


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ode", "sde"), [(MMPS, 0.403, 0.354), (TMPD, 0.368, 0.247), (PiGDM, 0.688, 0.607)]
)
def test_mixtures_are_sampled_as_well_as_elsewhere(method, ode, sde):
    """Distances that another library has, from one run of 256 steps each.

    0.03 is for the noise: the standard deviation of one run is 0.02, of the mean of eight 0.007.
    """
    guide, model = MIXTURE.exact_guide(SEEN), method(MIXTURE, SEEN)
    for sampler, limit in ((ODE, ode), (DDIM(steps=256, eta=1.0), sde)):
        found = 0.0
        for seed in range(8):
            x, true = sampler(model, (4096, 4), seed=seed).x, guide.sample(4096, seed=77 + seed)
            found += sliced_wasserstein(x, true, 512) / 8
        assert found < limit + 0.03


CODEC = Affine((4,), shift=[1.0, 0.0, -2.0, 0.5], width=[2.0, 1.0, 0.5, 1.0], dtype="float64")
MASKS = torch.tensor([[True, False, True, False], [False, False, True, True], [True] * 4])
EACH = {
    "one y": SEEN,
    "several y": Observation(SEEN.operator, double([[0.3, 0.0], [1.0, 2.0], [-1.0, 0.5]]), 0.7),
    "masks": Observation(Masking(MASKS), MIXTURE.sample(3, seed=4), double([[0.3], [1.0], [0.5]])),
    "raw": Observation(SEEN.operator, double([0.3, 0.0]), double([0.4, 0.9]), CODEC),
}


@pytest.mark.parametrize("seen", list(EACH.values()), ids=list(EACH))
@pytest.mark.parametrize(
    "prior", [MIXTURE, GaussianModel(double([0.1, 0.2, 0.3, 0.4]), 1.3, VPSDE())]
)
def test_exact_guides_obey_bayes_at_every_point(prior, seen):
    """log p(x | y) = log p(x) + log p(y | x) - log p(y)."""
    x, guide = prior.sample(3, seed=3), prior.exact_guide(seen)
    expected = prior.log_prob(x) + seen.log_prob(x) - prior.log_evidence(seen)
    torch.testing.assert_close(guide.log_prob(x), expected, rtol=0, atol=1e-9)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(guide.take(rows).log_prob(x[rows]), guide.log_prob(x)[rows])


@pytest.mark.parametrize("sde", list(SDES.values()), ids=list(SDES))
def test_the_views_of_a_full_mixture_are_one_function(sde):
    prior = GaussianMixtureModel(MIXTURE.log_weights.exp(), MIXTURE.means, MIXTURE.stds, sde)
    guide, t = prior.exact_guide(EACH["several y"]), double(0.4)
    x = guide.sample(3, t, seed=0).requires_grad_()
    (slope,) = torch.autograd.grad(guide.log_prob(x, t).sum(), x)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    data = (x + sigma**2 * slope) / alpha
    torch.testing.assert_close(guide.score(x, t), slope)
    torch.testing.assert_close(guide.noise(x, t), -sigma * slope)
    torch.testing.assert_close(guide.denoise(x, t), data)
    rate = sde.alpha_dot(t) * data - sde.sigma_dot(t) * sigma * slope
    torch.testing.assert_close(guide.velocity(x, t), rate)


def test_draws_of_a_full_mixture_have_its_moments():
    guide = MIXTURE.exact_guide(SEEN)
    x = guide.sample(DRAWS, seed=0)
    assert ((x.mean(0) - guide.mean).abs() < 4 * (guide.covariance.diag() / DRAWS).sqrt()).all()
    # The fourth moments of these modes are below that of a Gaussian.
    torch.testing.assert_close(x.T.cov(), guide.covariance, rtol=0, atol=4 * 2.5 / DRAWS**0.5)
    each = MIXTURE.exact_guide(EACH["several y"]).take(torch.arange(3).repeat(DRAWS // 4))
    y = each.sample(3 * (DRAWS // 4), seed=0).reshape(-1, 3, 4).mean(0)
    torch.testing.assert_close(y, each.mean[:3], rtol=0, atol=4 * 1.5 / (DRAWS // 4) ** 0.5)


def test_labels_select_components_of_the_posterior():
    guide, label = MIXTURE.exact_guide(SEEN), torch.tensor([0, 1, -1])
    x, members = MIXTURE.sample(3, seed=3), torch.tensor([0, 2])
    only = GaussianMixtureModel(
        MIXTURE.log_weights[members].exp(), MIXTURE.means[members], MIXTURE.stds[members], VPSDE()
    )
    expected = only.exact_guide(SEEN).denoise(x[:1], double(0.5))
    found = guide.denoise(x, double(0.5), label=label)
    torch.testing.assert_close(found[:1], expected)
    torch.testing.assert_close(found[2:], guide.denoise(x[2:], double(0.5)))
    y = guide.sample(500, seed=0, label=torch.ones(500, dtype=torch.int64))
    assert (guide.class_log_prob(y, 0.0)[:, 1].exp().mean()) > 0.9


# --- Each example by itself ----------------------------------------------------------------------


@methods
def test_an_example_alone_is_that_of_a_batch(method):
    y = double([[0.3, 0.0]]) + torch.arange(64, dtype=torch.float64)[:, None] / 20
    seen, sampler = Observation(SEEN.operator, y, 0.7), UniPC(steps=8)
    whole = sampler(method(MIXTURE, seen), shape=(64, 4), seed=0)
    for i in (0, 41):
        model = method(MIXTURE, seen).take(torch.tensor([i]))
        one = sampler(model, shape=(1, 4), seed=0, seeds=[i])
        torch.testing.assert_close(one.x[0], whole.x[i], rtol=0, atol=1e-6)
        assert (int(one.nfe[0]), int(one.vjps[0])) == (int(whole.nfe[i]), int(whole.vjps[i]))


def test_masks_follow_their_examples_through_an_adaptive_solver():
    seen, solver = EACH["masks"], ProbabilityFlow(1e-6, 1e-6)
    whole = solver(MMPS(MIXTURE, seen), shape=(3, 4), seed=0).x
    one = solver(MMPS(MIXTURE, seen.take(torch.tensor([1]))), shape=(1, 4), seed=0, seeds=[1]).x
    torch.testing.assert_close(one[0], whole[1], rtol=0, atol=1e-4)


def test_passes_and_products_are_counted():
    with counting(2) as passes:
        MMPS(TWO, SEEN_TWO, 1e-13).denoise(torch.zeros(2, 2).double(), double(0.5))
    assert (passes.network.tolist(), passes.products.tolist()) == ([1, 1], [2, 2])
    for method, products in ((PiGDM, 1), (DPS, 1), (TMPD, 2)):
        with counting(2) as passes:
            method(TWO, SEEN_TWO).denoise(torch.zeros(2, 2).double(), double(0.5))
        assert (passes.network.tolist(), passes.products.tolist()) == ([1, 1], [products] * 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-4), (torch.float64, 1e-10)]
)
def test_the_solver_reaches_its_tolerance_without_symmetry(dtype, tolerance):
    draw = torch.Generator().manual_seed(0)
    m = torch.randn(5, 12, 12, generator=draw, dtype=torch.float64) / 4 + 2 * torch.eye(12)
    m[3:] *= 1e-3  # other scales in one batch
    b = torch.randn(5, 3, 4, generator=draw, dtype=torch.float64).to(dtype)

    def matrix(u):
        return (m.to(dtype) @ u.flatten(1)[..., None]).reshape(u.shape)

    u = solve(matrix, b, tolerance)
    left = (b - matrix(u)).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    assert (left <= 1.01 * tolerance).all()
    assert (solve(matrix, 0 * b, tolerance) == 0).all()
    # A mild tolerance saves iterations, and one iteration is one product.
    calls = []
    solve(lambda u: (calls.append(0), matrix(u))[1], b, 0.1)
    assert 1 <= len(calls) < 12


class Held:
    """A tensor that a graph keeps; counts what is kept at once."""

    now = peak = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.numel()
        Held.now += self.size
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.size


def peak_of(steps):
    torch.manual_seed(0)
    model = ScoreModel(MLP(4, width=32, depth=2), VPSDE())
    seen = Observation(Masking(torch.tensor([True, True, False, True])), torch.ones(4), 0.1)
    Held.now = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        x = UniPC(steps=steps)(MMPS(model, seen), shape=(8, 4), seed=0).x
    assert x.isfinite().all()
    assert x.dtype == torch.float32
    assert Held.now == 0
    return Held.peak


def test_the_graph_of_a_step_is_freed_before_the_next():
    assert peak_of(10) == peak_of(100) > 0


# --- Units, noise, operators ---------------------------------------------------------------------


@methods
def test_raw_units_give_what_model_units_give(method):
    width, shift = double(CODEC.width), double(CODEC.shift)
    rows = double([[1.0, 0, 0.5, 0], [0, 1, 0, 0.5]])
    y, std = double([3.0, -1.0]), double([0.7, 0.4])
    raw = Observation(SEEN.operator, y, std, CODEC)
    hand = Observation(Linear(lambda x: x @ (rows * width).T), y - rows @ shift, std)
    a, b = (draw(UniPC(steps=10), method(MIXTURE, seen), 16) for seen in (raw, hand))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [MMPS, PiGDM])
def test_noiseless_measurements_are_met_after_the_projection(method):
    """The 2-D prior with its first value known: the other is N(0.8, 0.36)."""
    seen = Observation(Masking(torch.tensor([True, False])), double([1.0, 0.0]), 0.0)
    x = draw(ODE, method(TWO, seen))
    assert float((x[:, 0] - 1).abs().max()) < 0.1
    done = seen.project(x)
    assert float(seen.residual(done).abs().max()) < 1e-12
    if method is MMPS:
        check_moments(done[:, 1:], [0.8], [0.36])
        guide = TWO.exact_guide(seen)
        torch.testing.assert_close(guide.covariance, double([[0.0, 0.0], [0.0, 0.36]]))
        check_moments(draw(ODE, guide)[:, 1:], [0.8], [0.36])


@pytest.mark.parametrize("method", [MMPS, PiGDM, DPS])
def test_a_non_linear_operator_that_is_linear_changes_nothing(method):
    seen = Observation(NonLinear(SEEN.operator.function), SEEN.y, SEEN.std)
    x, t = MIXTURE.sample(4, 0.3, seed=0), double(0.3)
    found, expected = (method(MIXTURE, one).denoise(x, t) for one in (seen, SEEN))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    square = Observation(NonLinear(torch.square), torch.ones(4).double(), 0.3)
    assert draw(UniPC(steps=10), method(MIXTURE, square), 4).isfinite().all()


def test_a_posterior_has_a_likelihood():
    """With the law at t = 1 of the posterior itself, log p is that of the exact posterior."""
    x, model = TWO.exact_guide(SEEN_TWO).sample(4, seed=2), MMPS(TWO, SEEN_TWO, 1e-13)
    guide = TWO.exact_guide(SEEN_TWO)
    found = Likelihood("exact", rtol=1e-6, atol=1e-6)(model, x)
    log_prob = found.log_det + guide.log_prob(found.latent, 1.0)
    torch.testing.assert_close(log_prob, guide.log_prob(x, 1e-5), rtol=0, atol=1e-3)


def test_the_standard_deviation_of_the_data_is_known_to_its_model():
    assert MIXTURE.data_std**2 == pytest.approx(1.505, abs=5e-4)
    assert THREE.data_std**2 == pytest.approx(1.75)
    network = ScoreModel(MLP(4, width=8, depth=1), VPSDE())
    assert PiGDM(Clipped(network), SEEN).data_std == 1.0
    assert PiGDM(MIXTURE, SEEN, data_std=0.6).take(torch.tensor([0])).data_std == 0.6


# --- Devices, and the page -----------------------------------------------------------------------


@methods
@pytest.mark.parametrize("make", [perceptron, mixture])
def test_posteriors_run_on_a_gpu(method, make):
    mask, y = torch.tensor([[True, False], [True, True], [False, True]]), torch.ones(3, 2)

    def compute(device):
        model, x = make(VPSDE()).to(device), points(device)
        later = method(make(VPSDE()), Observation(Masking(mask), y, torch.full((3, 1), 0.5)))
        seen = Observation(Masking(mask.to(device)), y.to(device), 0.5)
        found = [
            model(x, torch.tensor(0.5).double())
            for model in (method(model, seen).noise, later.to(device).velocity)
        ]
        return [*found, UniPC(steps=3)(method(model, seen), (3, 2), seed=0).x]

    check(compute)


def test_exact_guides_run_on_a_gpu():
    def compute(device):
        guide = (
            mixture(VPSDE())
            .to(device)
            .exact_guide(Observation(Masking(torch.tensor([True, False])), torch.ones(2), 0.5))
        )
        return [guide.score(points(device), torch.tensor(0.5).double()), guide.sample(3, seed=0)]

    check(compute)


def test_the_programs_of_the_page_run():
    space = {}
    for block in blocks((ROOT / "docs/inverse.md").read_text(encoding="utf-8"), "python"):
        exec(block, space)
    check_moments(space["out"].x.double(), [0.8, 0.64], [[0.2, 0.16], [0.16, 0.488]])
    # The difference is N(0, 0.4) beforehand: with 0.5 measured it is N(0.4878, 0.00976).
    difference = space["steep"].double().diff(dim=1)
    check_moments(difference, [0.5 * 0.4 / 0.41], [0.4 * 0.01 / 0.41])
    dps = UniPC(steps=20)(DPS(space["prior"], space["observed"]), shape=(4, 2), seed=0).x
    torch.testing.assert_close(space["same"], dps)


def test_networks_get_few_iterations_and_exact_models_as_many_as_they_need():
    seen = Observation(Masking(torch.ones(8, dtype=torch.bool)), torch.ones(8), 0.1)
    network = ScoreModel(MLP(8, width=8), VPSDE())
    exact = GaussianModel(torch.zeros(8), 1.0, VPSDE())
    assert MMPS(network, seen).iterations == 5
    assert MMPS(exact, seen).iterations is None
    assert MMPS(network, seen, iterations=7).take(torch.tensor([0])).iterations == 7


def test_a_posterior_that_diverges_says_so():
    """DPS is stiff: 200 uniform steps are too few for a noise of 1 % of the data's width."""
    prior = GaussianModel(torch.zeros(2), 1.0, VPSDE())
    seen = Observation(Masking(torch.ones(2, dtype=torch.bool)), torch.ones(2), 0.01)
    with pytest.raises(InputError, match=r"posterior.*NaN.*PiGDM"):
        UniPC(steps=200)(DPS(prior, seen), shape=(3, 2), seed=0)


# --- Misuse --------------------------------------------------------------------------------------


def constant(x, c):
    return 0 * x


ZERO = Observation(SEEN.operator, SEEN.y, 0.0)
WRONG = {
    "no observation": (lambda: MMPS(MIXTURE, SEEN.y), "Tensor"),
    "shape": (
        lambda: DPS(MIXTURE, Observation(SEEN.operator, double([1.0, 2, 3]), 0.7)),
        r"y.*\(3,\)",
    ),
    "std in DPS": (lambda: DPS(MIXTURE, ZERO), "std.*0.0"),
    "std in TMPD": (lambda: TMPD(MIXTURE, ZERO), "std.*0.0"),
    "non-linear TMPD": (
        lambda: TMPD(MIXTURE, Observation(NonLinear(torch.sin), torch.zeros(4).double(), 0.1)),
        "NonLinear",
    ),
    "non-linear guide": (
        lambda: MIXTURE.exact_guide(
            Observation(NonLinear(torch.sin), torch.zeros(4).double(), 0.1)
        ),
        "NonLinear",
    ),
    "not linear": (
        lambda: MMPS(MIXTURE, Observation(Linear(torch.sin), torch.zeros(4).double(), 0.1)),
        "NonLinear",
    ),
    "transpose": (
        lambda: MMPS(
            MIXTURE,
            Observation(Linear(lambda x: 2 * x, lambda u: u), torch.zeros(4).double(), 0.1),
        ),
        "transpose",
    ),
    "tolerance": (lambda: MMPS(MIXTURE, SEEN, tolerance=0.0), "tolerance.*0.0"),
    "no tolerance": (lambda: PiGDM(MIXTURE, SEEN, tolerance=1.0), "tolerance.*1.0"),
    "iterations": (lambda: MMPS(MIXTURE, SEEN, iterations=0), r"iterations.*\b0\b"),
    "data_std": (lambda: PiGDM(MIXTURE, SEEN, data_std=-1.0), "data_std.*-1"),
    "codec": (
        lambda: MMPS(TWO, Observation(SEEN.operator, SEEN.y, 0.7, CODEC)),
        r"codec.*\(2,\).*\(4,\)",
    ),
    "detached": (
        lambda: MMPS(ScoreModel(lambda x, c: x.detach(), VPSDE()), SEEN).denoise(
            torch.ones(2, 4), double(0.5)
        ),
        "gradient",
    ),
    "zero Jacobian": (
        lambda: MMPS(Clipped(MIXTURE, -1e-3, 1e-3), SEEN).denoise(
            torch.ones(2, 4).double(), double(0.5)
        ),
        "Jacobian",
    ),
    "noiseless copies": (
        lambda: TWO.exact_guide(Observation(linear([[1.0, 0], [1, 0]]), double([1.0, 1.0]), 0.0)),
        "std",
    ),
    "batch": (
        lambda: MIXTURE.exact_guide(EACH["several y"]).denoise(
            torch.zeros(2, 4).double(), double(0.5)
        ),
        "3.*2",
    ),
    "mixture's shapes": (
        lambda: FullMixtureModel([1.0], torch.zeros(1, 2), torch.ones(1, 3, 3), VPSDE()),
        r"\(1, 1, 3, 3\)",
    ),
    "mixture's covariance": (
        lambda: FullMixtureModel([1.0], torch.zeros(1, 2), -torch.eye(2)[None], VPSDE()),
        "-1",
    ),
}


@pytest.mark.parametrize(("make", "named"), list(WRONG.values()), ids=list(WRONG))
def test_misuse_is_one_sentence(make, named):
    with pytest.raises(InputError, match=named):
        make()
