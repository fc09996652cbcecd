"""Flow matching: the velocity, its loss, densities of times, couplings, and reflow."""

import functools
import itertools
import math

import pytest
import torch

from scoresde import (
    VESDE,
    VPSDE,
    DataParametrisation,
    DenoisingScoreMatching,
    FlowMatching,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    Preconditioned,
    RectifiedFlow,
    ScoreModel,
    SubVPSDE,
    VariationalBound,
    VelocityParametrisation,
    VParametrisation,
    fit,
    sample,
)
from scoresde.data import two_moons
from scoresde.loss import (
    Independent,
    OptimalTransport,
    SourceSamples,
    VelocityWeighting,
)
from scoresde.model import Model, ScaledTime
from scoresde.nn import MLP
from scoresde.passes import count_pass
from scoresde.recipe import describe
from scoresde.sample import ProbabilityFlow
from scoresde.sde import SDE, as_time
from scoresde.shapes import expand
from scoresde.streams import Purpose, Streams
from scoresde.tasks.reflow import reflow
from scoresde.times import (
    Corrected,
    CosMapTimes,
    LogitNormalTimes,
    LogNormalTimes,
    LogSNRGrid,
    ModeTimes,
    UShapedTimes,
)
from scoresde.train import (
    Checkpoint,
    Reflow,
    Training,
    Update,
    is_deterministic,
    one_step_error,
)
from tests.bridges import Bridge
from tests.test_run import program


class Trigonometric(SDE):
    """A path by alpha and sigma alone: its rates come from autograd."""

    zero_snr = True

    def alpha(self, t):
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)


PATHS = [RectifiedFlow(), VPSDE(), SubVPSDE(), VESDE(), Trigonometric()]
each_path = pytest.mark.parametrize("sde", PATHS, ids=lambda sde: type(sde).__name__)
INSIDE = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
MEAN, STD = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 1.2]).double()
HEADS = [
    VelocityParametrisation(0.7),
    Preconditioned(0.7),
    VParametrisation(),
    DataParametrisation(),
]


def at(t):
    return torch.tensor(t, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def network(seed=0, **options):
    torch.manual_seed(seed)
    made = MLP(2, width=16, depth=1, **options).double()
    torch.nn.init.normal_(made.linear_out.weight)
    return made


def exact(sde=PATHS[0]):
    return GaussianModel(MEAN, STD, sde)


def exact_head(sde=PATHS[0]):
    """A model whose network is the exact velocity: all else is up to the parametrisation."""
    truth = exact(sde)
    return ScoreModel(truth.velocity, sde, VelocityParametrisation(None), ScaledTime(1.0))


# --- The velocity parametrisation ----------------------------------------------------------------


@each_path
def test_all_views_follow_from_the_velocity(sde):
    """The data and the noise of a pair are found again from its velocity, to 1e-12."""
    x0, z = normal(49, 2), normal(49, 2, seed=1)
    x = sde.perturb(x0, INSIDE, z)
    u = expand(sde.alpha_dot(INSIDE), x) * x0 + expand(sde.sigma_dot(INSIDE), x) * z
    model = ScoreModel(lambda x, c: u, sde, VelocityParametrisation())
    # A quotient of alpha and sigma loses as many digits as they differ.
    ratio = expand(torch.maximum(sde.sigma(INSIDE) / sde.alpha(INSIDE), at(1.0)), x)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(model.velocity(x, INSIDE), u, rtol=0, atol=0)
    torch.testing.assert_close(model.noise(x, INSIDE), z, **close)
    torch.testing.assert_close(model.denoise(x, INSIDE) / ratio, x0 / ratio, **close)
    scaled = model.score(x, INSIDE) * expand(sde.sigma(INSIDE), x)
    torch.testing.assert_close(scaled, -z, **close)


def test_the_formulas_of_rectified_flow():
    r"""D = x - t u, z = x + (1 - t) u, and u from v = alpha z - sigma x_0."""
    sde, t, x = RectifiedFlow(), INSIDE[:, None], normal(49, 2)
    model = ScoreModel(network(), sde, VelocityParametrisation())
    u, close = model.velocity(x, INSIDE), {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(model.denoise(x, INSIDE), x - t * u, **close)
    torch.testing.assert_close(model.noise(x, INSIDE), x + (1 - t) * u, **close)
    v = (1 - t) * model.noise(x, INSIDE) - t * model.denoise(x, INSIDE)
    torch.testing.assert_close(((2 * t - 1) * x + v) / (t**2 + (1 - t) ** 2), u, **close)


@pytest.mark.parametrize(
    ("sde", "t"),
    [(sde, t) for sde in PATHS for t in (0.0, 1.0) if not (isinstance(sde, VPSDE) and t == 0)],
    ids=lambda value: str(value) if isinstance(value, float) else type(value).__name__,
)
def test_the_velocity_is_the_output_at_the_ends(sde, t):
    """Finite wherever the rates are: all but t = 0 of VP, whose sigma rises infinitely fast."""
    output, x = normal(3, 2), normal(3, 2, seed=1)
    model = ScoreModel(lambda x, c: output, sde, VelocityParametrisation())
    assert bool(torch.stack((sde.alpha_dot(at(t)), sde.sigma_dot(at(t)))).isfinite().all())
    assert torch.equal(model.velocity(x, at(t)), output)


def test_a_network_has_data_and_noise_at_both_ends_of_rectified_flow():
    model, x = ScoreModel(network(), RectifiedFlow(), VelocityParametrisation()), normal(3, 2)
    u = {t: model.velocity(x, at(t)) for t in (0.0, 1.0)}
    for t in (0.0, 1.0):
        torch.testing.assert_close(model.denoise(x, at(t)), x - t * u[t])
        torch.testing.assert_close(model.noise(x, at(t)), x + (1 - t) * u[t])


def test_the_coefficients_need_the_rates_of_a_process():
    one = torch.ones(())
    for name in ("to_noise", "to_data"):
        with pytest.raises(InputError, match=r"VelocityParametrisation.*at"):
            getattr(VelocityParametrisation(), name)(one, one)


# --- The loss ------------------------------------------------------------------------------------


@each_path
@pytest.mark.parametrize("head", HEADS, ids=lambda p: type(p).__name__)
def test_it_is_a_weighted_error_of_noise_and_of_data(head, sde):
    """Weights (g^2 / 2 sigma)^2 of the noise and W^2 / sigma^2 of the data, to 1e-12."""
    model, x, z = ScoreModel(network(), sde, head), normal(49, 2), normal(49, 2, seed=1)
    loss = FlowMatching()(model, x, INSIDE, z)
    by_noise = DenoisingScoreMatching(VelocityWeighting())(model, x, INSIDE, z)
    torch.testing.assert_close(by_noise / loss, torch.ones(49).double(), rtol=0, atol=1e-12)
    weight = (sde.g(INSIDE) ** 2 / (2 * sde.sigma(INSIDE))) ** 2
    torch.testing.assert_close(VelocityWeighting()(sde, INSIDE) / weight, torch.ones_like(weight))
    turn = sde.alpha(INSIDE) * sde.sigma_dot(INSIDE) - sde.sigma(INSIDE) * sde.alpha_dot(INSIDE)
    error = model.denoise(sde.perturb(x, INSIDE, z), INSIDE) - x
    by_data = (turn / sde.sigma(INSIDE)) ** 2 * error.square().mean(1)
    torch.testing.assert_close(by_data / loss, torch.ones(49).double(), rtol=0, atol=1e-10)


def test_the_weight_on_rectified_flow_is_the_square_of_one_by_the_signal():
    weight = VelocityWeighting()(RectifiedFlow(), INSIDE)
    torch.testing.assert_close(weight, 1 / (1 - INSIDE) ** 2, rtol=1e-13, atol=0)
    assert bool(VelocityWeighting()(RectifiedFlow(), at(1.0)).isfinite())


@pytest.mark.parametrize("make", [exact, exact_head])
def test_the_ends_have_closed_forms(make):
    """At t = 0 the noise is unknown, u = -x_0; at t = 1 the example is, u = z - mean."""
    model, x, z = make(), normal(5, 2), normal(5, 2, seed=1)
    first, last = (FlowMatching()(model, x, at(t), z) for t in (0.0, 1.0))
    torch.testing.assert_close(first, z.square().mean(1))
    torch.testing.assert_close(last, (x - MEAN).square().mean(1))


@each_path
def test_its_least_value_is_what_the_state_leaves_open(sde):
    """W^2 c / (alpha^2 c + sigma^2) of a Gaussian; within 4 standard errors of 20 000 examples."""
    model, count, t = exact(sde), 20_000, at(0.4)
    x = model.sample(count, seed=0)
    loss = FlowMatching()(model, x, t, seed=0)
    alpha, sigma, c = sde.alpha(t), sde.sigma(t), STD**2
    turn = alpha * sde.sigma_dot(t) - sigma * sde.alpha_dot(t)
    least = (turn**2 * c / (alpha**2 * c + sigma**2)).mean()
    assert abs(float(loss.mean() - least)) < 4 * float(loss.std()) / count**0.5


def test_drawn_times_and_noise_are_those_of_the_other_losses():
    model, x = ScoreModel(network(), RectifiedFlow(), VelocityParametrisation()), normal(9, 2)
    ours = FlowMatching(LogitNormalTimes())(model, x, seed=3)
    theirs = DenoisingScoreMatching(VelocityWeighting(), LogitNormalTimes())(model, x, seed=3)
    torch.testing.assert_close(ours, theirs)
    whole = FlowMatching()(model, x, seed=3)
    part = FlowMatching()(model, x[4:7], seed=3, seeds=range(9), part=slice(4, 7))
    torch.testing.assert_close(part, whole[4:7])


def test_what_it_cannot_train_is_refused():
    flow = ScoreModel(network(), RectifiedFlow(), VelocityParametrisation())
    with pytest.raises(InputError, match=r"gamma = 0.*0.3"):
        FlowMatching().check(Between(network(), Bridge(0.3)))
    with pytest.raises(InputError, match=r"source.*Bridge"):
        FlowMatching()(Between(network(), Bridge()), normal(3, 2))
    with pytest.raises(InputError, match=r"coupling.*SourceSamples"):
        FlowMatching(coupling=SourceSamples(normal(9, 2))).check(flow)
    with pytest.raises(InputError, match=r"source.*\(3, 2\)"):
        FlowMatching()(flow, normal(3, 2), source=normal(3, 1))
    with pytest.raises(InputError, match=r"times and coupling.*None"):
        FlowMatching(coupling=None)


# --- Densities of times --------------------------------------------------------------------------

LOGIT = LogitNormalTimes(-0.4, 0.8)
CURVES = [LOGIT, ModeTimes(), ModeTimes(-0.7), CosMapTimes(), UShapedTimes()]
DENSITIES = {
    LOGIT: lambda t: (
        torch.exp(-0.5 * ((torch.logit(t) + 0.4) / 0.8) ** 2)
        / (0.8 * math.sqrt(2 * math.pi) * t * (1 - t))
    ),
    CosMapTimes(): lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2),
    UShapedTimes(): lambda t: (torch.exp(4 * t) + torch.exp(4 - 4 * t)) / (math.expm1(4) / 2),
}
each_curve = pytest.mark.parametrize("times", CURVES, ids=repr)


@each_curve
def test_a_curve_rises_from_the_cut_off_to_the_end(times):
    u = torch.linspace(1e-12, 1 - 1e-12, 1001, dtype=torch.float64)
    t = times.quantile(u, RectifiedFlow(), 0.1)
    assert bool((t.diff() > 0).all())
    assert (float(t[0]), float(t[-1])) == pytest.approx((0.1, 1.0), abs=0.01)


@pytest.mark.parametrize("times", DENSITIES, ids=repr)
def test_a_density_is_the_published_one(times):
    torch.testing.assert_close(times.density(INSIDE), DENSITIES[times](INSIDE), rtol=1e-8, atol=0)


def test_the_mode_is_the_published_curve():
    u, s = INSIDE, 1.29
    published = 1 - u - s * (torch.cos(0.5 * math.pi * u) ** 2 - 1 + u)
    torch.testing.assert_close(ModeTimes(s).curve(1 - u), published)
    assert float(ModeTimes(s).density(at(0.5))) > float(ModeTimes(s).density(at(0.01))) > 0.1


def test_logit_normal_is_log_normal_on_rectified_flow():
    ours, theirs = LogitNormalTimes(-0.4, 0.8), LogNormalTimes(-0.4, 0.8)
    both = [one.quantile(INSIDE, RectifiedFlow(), 1e-9) for one in (ours, theirs)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-7)


@each_curve
def test_emphasis_weighs_nothing_and_a_correction_keeps_the_mean(times):
    """The mean of a function over uniform times, by 20 000 equally spaced u."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    sde, eps = RectifiedFlow(), 0.1
    right = Corrected(times)
    t = right.quantile(u, sde, eps)
    assert torch.equal(times.weight(t, sde, eps), torch.ones_like(t))
    # A logit-normal density is 0 at the ends, where this function is 0 as well.
    values = (t - eps) ** 4 * (1 - t) ** 4
    mean = 0.9**8 / 630
    assert float((right.weight(t, sde, eps) * values).mean()) == pytest.approx(mean, rel=1e-4)
    assert float(values.mean()) != pytest.approx(mean, rel=1e-2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LogitNormalTimes(std=0.0), r"std.*0.0"),
        (lambda: LogitNormalTimes(mean=math.nan), "mean must be finite, got nan"),
        (lambda: LogNormalTimes(mean=math.nan), "mean must be finite, got nan"),
        (lambda: ModeTimes(1.8), "scale.*1.8"),
        (lambda: ModeTimes(1.752), rf"scale must be in \[-1, {ModeTimes(1.7519).scale}\].*1\.752"),
        (lambda: ModeTimes(-1.1), "scale.*-1.1"),
        (lambda: UShapedTimes(0.0), "rate.*0.0"),
        (lambda: Corrected(LogNormalTimes()), "times.*LogNormalTimes"),
    ],
)
def test_densities_refuse_what_is_no_density(make, match):
    with pytest.raises(InputError, match=match):
        make()


# --- Couplings -----------------------------------------------------------------------------------


def streams(count):
    return Streams.of(0, batch=count)


def test_the_assignment_is_the_cheapest_of_all():
    x, z = normal(6, 2), normal(6, 2, seed=1)
    ends = OptimalTransport()(x, z, {}, streams(6))
    costs = [(x - z[list(order)]).square().sum() for order in itertools.permutations(range(6))]
    torch.testing.assert_close((x - ends).square().sum(), min(costs))
    assert {*map(tuple, ends.tolist())} == {*map(tuple, z.tolist())}


def test_a_coupled_loss_is_a_function_of_the_seed():
    model = ScoreModel(network(), RectifiedFlow(), VelocityParametrisation())
    loss, x = FlowMatching(coupling=OptimalTransport()), normal(32, 2)
    assert torch.equal(loss(model, x, seed=1), loss(model, x, seed=1))
    noise = Streams.of(1, batch=32).normal((2,), Purpose.NOISE, dtype=torch.float64)
    ends = OptimalTransport()(x, noise, {}, streams(32))
    torch.testing.assert_close(
        loss(model, x, at(0.3), seed=1), FlowMatching()(model, x, at(0.3), ends)
    )
    assert torch.equal(Independent()(x, noise, {}, streams(32)), noise)


def labelled_batches(coupling, cond):
    """The ends of two classes at -2 and 2, over 100 batches of 40."""
    label = torch.tensor([0] * 20 + [1] * 20)
    ends = []
    for i in range(100):
        x = normal(40, 1, seed=2 * i) * 0.3 + (4.0 * label - 2)[:, None]
        known = {"label": label} if cond else {}
        ends.append(coupling(x, normal(40, 1, seed=2 * i + 1), known, streams(40))[:20, 0])
    return torch.cat(ends)


def test_the_noise_of_each_class_stays_normal():
    """Mean and variance within 4 standard errors of 2000; across classes both are lost."""
    error = 1 / 2000**0.5
    within = labelled_batches(OptimalTransport(), cond=True)
    assert abs(float(within.mean())) < 4 * error
    assert abs(float(within.var()) - 1) < 4 * 2**0.5 * error
    across = labelled_batches(OptimalTransport(), cond=False)
    assert float(across.mean()) < -0.7  # -sqrt(2 / pi) = -0.80 in the limit
    assert float(across.var()) < 0.5  # 1 - 2 / pi = 0.36


def test_examples_without_a_class_are_a_class():
    x, z = normal(8, 2), normal(8, 2, seed=1)
    label = torch.tensor([-1, 0, -1, 0, -1, 0, 1, -1])
    ends = OptimalTransport()(x, z, {"label": label}, streams(8))
    for one in label.unique():
        own = label == one
        alone = OptimalTransport()(x[own], z[own], {}, streams(int(own.sum())))
        assert torch.equal(ends[own], alone)


def test_a_continuous_condition_is_refused():
    x = normal(4, 2)
    model = ScoreModel(network(conditions={"context": 1}), RectifiedFlow(), HEADS[0])
    with pytest.raises(InputError, match=r"context.*OptimalTransport"):
        FlowMatching(coupling=OptimalTransport())(model, x, context=x[:, :1])


class Between(Model):
    """A network that predicts the velocity of any process."""

    def __init__(self, network, process):
        super().__init__()
        self.network, self._process = network, process

    @property
    def process(self):
        return self._process

    def velocity(self, x, t, **cond):
        count_pass(len(x))
        return self.network(x, as_time(t).to(x).expand(len(x)))

    def denoise(self, x, t, **cond):
        return x - expand(as_time(t), x) * self.velocity(x, t)


@pytest.mark.parametrize(
    "coupling", [lambda s: s, OptimalTransport], ids=["independent", "optimal"]
)
def test_a_source_that_is_not_normal_is_carried_to_the_data(coupling):
    """Four corners to a Gaussian: mean within 4 standard errors of 1000 and 0.05, std 0.1."""
    corners = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]])
    source = corners.repeat(500, 1) + 0.3 * normal(2000, 2).float()
    data = torch.tensor([1.0, 0.0]) + 0.5 * normal(2000, 2, seed=1).float()
    torch.manual_seed(0)
    model = Between(MLP(2, width=32, depth=2), Bridge())
    loss = FlowMatching(coupling=coupling(SourceSamples(source)))
    model = fit(model, data, 300, batch_size=64, ema=0.98, loss=loss, progress=False)
    start = source[torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:1000]]
    x = ProbabilityFlow(1e-3, 1e-3)(model, shape=(1000, 2), source=start, seed=0).x
    error = 4 * 0.5 / 1000**0.5
    assert float((x.mean(0) - data.mean(0)).abs().max()) < error + 0.05
    assert float((x.std(0) - data.std(0)).abs().max()) < error / 2**0.5 + 0.1


def test_a_source_may_be_a_function_of_streams():
    coupling = SourceSamples(lambda s: s.uniform((2,), Purpose.SOURCE, dtype=torch.float64))
    x = normal(5, 2)
    ends = coupling(x, x, {}, streams(5))
    assert torch.equal(ends[2:3], coupling(x[:1], x[:1], {}, Streams.of(0, seeds=[2])))
    assert bool(((ends > 0) & (ends < 1)).all())
    with pytest.raises(InputError, match=r"samples.*\(2,\).*\(1,\)"):
        SourceSamples(torch.zeros(3, 1))(x, x, {}, streams(5))
    with pytest.raises(InputError, match=r"samples.*int"):
        SourceSamples(3)


# --- Samplers and likelihoods --------------------------------------------------------------------

N = 4000
GRID = LogSNRGrid()
SAMPLERS = [  # with steps for an error of the variance below 1.5 %, by their orders
    sample.Euler(250),
    sample.DDIM(250),
    sample.DDIM(250, eta=1.0),
    sample.DPMSolver(30, GRID),
    sample.DPMSolverPP(80, GRID),
    sample.DPMSolverPPSDE(100, GRID),
    sample.DEIS(80, GRID),
    sample.IPNDM(80, GRID),
    sample.UniPC(40, GRID),
    sample.SEEDS(60, GRID),
    sample.Heun(60, GRID),
    sample.EulerMaruyama(250),
    sample.PredictorCorrector(250, predictor=sample.AncestralPredictor(), corrector=None),
    sample.PredictorCorrector(150),
    sample.AnnealedLangevinDynamics(20),
    sample.TorchSDE(200),
    sample.GottaGoFast(0.02, 0.01),
    ProbabilityFlow(1e-4, 1e-4),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_every_sampler_has_the_law_with_the_exact_velocity(sampler):
    """Mean and variance within 4 standard errors of 4000 samples, and 1.5 % of discretisation."""
    model, sde = exact_head(), RectifiedFlow()
    eps = at(sampler.check(model))
    x = sampler(model, latent=normal(N, 2, seed=4), seed=0).x
    mean = sde.alpha(eps) * MEAN
    variance = (sde.alpha(eps) * STD) ** 2 + sde.sigma(eps) ** 2
    assert float(((x.mean(0) - mean) / STD).abs().max()) < 4 / N**0.5 + 0.015
    assert float((x.var(0) / variance - 1).abs().max()) < 4 * (2 / N) ** 0.5 + 0.015


def test_euler_is_of_order_one_on_the_velocity():
    """Halving the step halves the error: the ends of a Gaussian's flow are known."""
    model, z, truth = exact_head(), normal(50, 2), exact()
    right = truth.flow(z, 1.0, 1e-3)
    errors = [float((sample.Euler(n)(model, latent=z).x - right).abs().max()) for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_the_likelihood_of_a_velocity_is_the_density():
    model, truth = exact_head(), exact()
    x, exactly = truth.sample(16, seed=3), Likelihood(probes="exact", rtol=1e-8, atol=1e-8)
    eps = exactly.check(model)
    ours = exactly(model, x).log_prob
    torch.testing.assert_close(ours, truth.log_prob(x, eps), rtol=0, atol=1e-5)


def test_the_likelihood_on_another_path_is_that_of_the_score():
    """VP keeps some signal at t = 1, so both differ from the density by the same amount."""
    model, truth = exact_head(VPSDE()), exact(VPSDE())
    x, exactly = truth.sample(8, seed=3), Likelihood(probes="exact", rtol=1e-7, atol=1e-7)
    both = [exactly(one, x).log_prob for one in (model, truth)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)


def test_the_bound_of_a_velocity_is_tight_in_the_mean():
    """Within 4 standard errors over 2000 examples."""
    model, truth = exact_head(), exact()
    x = truth.sample(2000, seed=1)
    gap = VariationalBound(draws=16)(model, x, seed=0).log_prob - truth.log_prob(x)
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(x) ** 0.5 + 1e-3


@pytest.mark.parametrize(
    "cond", [{}, {"source": normal(40, 2).float()}], ids=["coupling", "source"]
)
def test_a_coupled_model_is_trained_with_a_warning(cond):
    """Its score is not that of the marginals: stochastic samplers would be biased."""
    coupling = Independent() if cond else OptimalTransport()
    data = (normal(40, 2, seed=1).float(), cond)
    with pytest.warns(UserWarning, match=r"coupled.*VariationalBound are biased"):
        fit(tiny(), data, 1, batch_size=8, loss=FlowMatching(coupling=coupling), progress=False)


def test_a_coupled_flow_is_exact_where_a_stochastic_sampler_is_not():
    r"""The optimal map of a Gaussian, x_0 = m + s z: D, z and u in closed form at every time.

    The likelihood is the density of x_t to 1e-5; the reverse SDE, which takes -z / sigma for the
    score, ends with a variance that is off by more than 8 standard errors of 4000 samples.
    """

    def velocity(x, c):
        noise = (x - (1 - c[..., None]) * MEAN) / ((1 - c[..., None]) * STD + c[..., None])
        return noise - MEAN - STD * noise

    model = ScoreModel(velocity, RectifiedFlow(), VelocityParametrisation(None), ScaledTime(1.0))
    eps = 1e-2
    truth = torch.distributions.Normal((1 - eps) * MEAN, (1 - eps) * STD + eps)
    x = truth.sample((16,))
    found = Likelihood(probes="exact", rtol=1e-8, atol=1e-8, eps=eps)(model, x).log_prob
    torch.testing.assert_close(found, truth.log_prob(x).sum(1), rtol=0, atol=1e-5)
    flow, stochastic = (
        (sampler(model, latent=normal(N, 2), seed=0).x.var(0) / truth.variance - 1).abs()
        for sampler in (sample.Euler(100, eps=eps), sample.EulerMaruyama(250, eps=eps))
    )
    assert float(flow.max()) < 4 * (2 / N) ** 0.5
    assert float(stochastic.max()) > 8 * (2 / N) ** 0.5


# --- Reflow --------------------------------------------------------------------------------------


def mixture():
    return GaussianMixtureModel([0.5, 0.5], [[-1.5, 0.0], [1.5, 0.0]], [0.3, 0.3], PATHS[0])


def test_pairs_are_the_ends_of_the_flow():
    """Noise and examples of a Gaussian by its closed form; each a function of its number."""
    truth = exact().float()
    pairs = Reflow(truth, ProbabilityFlow(1e-7, 1e-7)).pairs(50, seed=2)
    known = pairs.conditions_of("train")["source"]
    expected = truth.flow(known, 1.0, RectifiedFlow().cutoffs.sampling)
    torch.testing.assert_close(pairs.train, expected, rtol=0, atol=1e-5)
    assert [len(pairs.split(name)) for name in ("train", "validation", "test")] == [40, 5, 5]
    again = Reflow(truth, ProbabilityFlow(1e-7, 1e-7)).pairs(20, seed=2, batch_size=7)
    torch.testing.assert_close(again.train, pairs.train[:16])


def test_what_makes_no_pairs_is_refused():
    with pytest.raises(InputError, match=r"sampler.*EulerMaruyama"):
        Reflow(exact(), sample.EulerMaruyama(5)).pairs(20)
    with pytest.raises(InputError, match=r"count.*9"):
        Reflow(exact(), ProbabilityFlow()).pairs(9)
    model = ScoreModel(lambda x, c: x, RectifiedFlow(), HEADS[0])
    with pytest.raises(InputError, match="shape"):
        Reflow(model, ProbabilityFlow()).pairs(20)


def reflowed(pairs, steps, width=32):
    torch.manual_seed(1)
    model = ScoreModel(MLP(2, width=width, depth=2), RectifiedFlow(), VelocityParametrisation())
    loss = FlowMatching()
    return fit(model, pairs, steps, batch_size=64, ema=0.98, loss=loss, progress=False)


@pytest.mark.filterwarnings("ignore:The noise is coupled")
def test_reflow_halves_the_error_of_one_step():
    """Of an exact mixture, whose one step ends at the mean of the data."""
    flow = mixture().float()
    pairs = Reflow(flow, ProbabilityFlow(1e-3, 1e-3)).pairs(2000, seed=0)
    before = one_step_error(flow, pairs)
    after = one_step_error(reflowed(pairs, 300), pairs)
    assert before > 0.9  # the standard deviation of the data, mean over dimensions: 1.08
    assert after < 0.5 * before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The noise is coupled")
def test_reflow_of_a_trained_model_halves_the_error_on_moons():
    torch.manual_seed(0)
    model = ScoreModel(MLP(2), RectifiedFlow(), VelocityParametrisation())
    flow = fit(model, two_moons(), 1500, loss=FlowMatching(), progress=False)
    pairs = Reflow(flow, ProbabilityFlow(1e-4, 1e-4)).pairs(10_000, seed=0)
    after = fit(
        ScoreModel(MLP(2), RectifiedFlow(), VelocityParametrisation()),
        pairs,
        1500,
        loss=FlowMatching(),
        progress=False,
    )
    assert one_step_error(after, pairs) < 0.5 * one_step_error(flow, pairs)


def test_dropped_conditions_leave_the_other_end_alone():
    """Else a path would end in NaN, which says that a condition is absent."""
    model = ScoreModel(MLP(2, width=8, depth=1, classes=2), RectifiedFlow(), HEADS[0])
    training = Training(steps=1, batch_size=64, condition_dropout=0.9)
    update = Update(model, FlowMatching(), training, lambda p: torch.optim.SGD(p, 0.0))
    x = normal(64, 2).float()
    cond = {"source": normal(64, 2, seed=1).float(), "label": torch.ones(64).long()}
    assert bool(update(x, cond, 0, 64).isfinite().all())


def tiny():
    return ScoreModel(MLP(2, width=8, depth=1), RectifiedFlow(), VelocityParametrisation())


def run_task(model, folder, sampler=None, cond=None):
    options = {"count": 40, "batch_size": 32, "cond": cond or {}, "seed": 0, "progress": False}
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    training = Training(steps=30, batch_size=16, validate_every=30, ema=0.9)
    sampler = sampler or ProbabilityFlow(1e-2, 1e-2)
    recipe = {"name": "tiny", "model": describe(model)}
    return reflow(recipe, model, sampler, training, adam, folder, **options)


def test_the_task_leaves_a_checkpoint_of_a_straighter_flow(tmp_path):
    model = tiny()
    torch.nn.init.normal_(model.network.linear_out.weight, std=3.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    results = run_task(model, tmp_path)
    assert results["one_step_error"] < results["one_step_error_before"]
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    checkpoint = Checkpoint.load(tmp_path)
    assert isinstance(checkpoint.build_model(), ScoreModel)
    assert checkpoint.recipe["loss"]["_target_"].endswith("FlowMatching")
    assert "not the score" in checkpoint.recipe["cautions"][0].replace("but ", "")


def test_the_task_takes_classes_in_turn(tmp_path):
    network = MLP(2, width=8, depth=1, classes=3)
    model = ScoreModel(network, RectifiedFlow(), VelocityParametrisation())
    run_task(model, tmp_path, cond={"label": torch.tensor([0, 2])})
    pairs = Reflow(model, ProbabilityFlow()).pairs(10, label=torch.tensor([0, 2] * 5))
    assert pairs.conditions_of("train")["label"].tolist() == [0, 2] * 4


def test_the_task_refuses_paths_that_are_not_straight(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint.*VPSDE"):
        run_task(ScoreModel(MLP(2), VPSDE()), tmp_path)
    with pytest.raises(InputError, match=r"sampler.*EulerMaruyama"):
        run_task(tiny(), tmp_path, sample.EulerMaruyama(4))


@pytest.mark.filterwarnings("ignore:The noise is coupled")
def test_a_kept_fit_says_that_its_noise_was_coupled(tmp_path):
    x, options = normal(40, 2).float(), {"steps": 2, "progress": False}
    fit(tiny(), x, loss=FlowMatching(), folder=tmp_path / "plain", **options)
    coupled = FlowMatching(coupling=OptimalTransport())
    fit(tiny(), x, loss=coupled, folder=tmp_path / "coupled", **options)
    assert "cautions" not in Checkpoint.load(tmp_path / "plain").recipe
    assert "the score" in Checkpoint.load(tmp_path / "coupled").recipe["cautions"][0]


@pytest.mark.parametrize(
    ("sampler", "fixed"),
    [(sample.Euler(3), True), (sample.Heun(3), True), (sample.EulerMaruyama(3), False)],
)
def test_a_sampler_is_deterministic_if_streams_agree(sampler, fixed):
    model = GaussianModel(torch.zeros(2), 0.5, RectifiedFlow())
    assert is_deterministic(sampler, model, (2,), {}) is fixed


@pytest.mark.filterwarnings("ignore:The noise is coupled")
def test_a_stochastic_task_on_coupled_noise_says_so(tmp_path):
    x, loss = normal(40, 2).float(), FlowMatching(coupling=OptimalTransport())
    fit(tiny(), x, loss=loss, folder=tmp_path / "run", steps=2, progress=False)
    words = ["task=sample", "checkpoint=run", "count=4", "progress=false"]
    for sampler, said in (("euler", False), ("euler_maruyama", True)):
        more = [f"sampler={sampler}", "sampler.steps=2", f"hydra.run.dir={sampler}"]
        program(*words, *more, cwd=tmp_path)
        log = (tmp_path / sampler / "run.log").read_text()
        assert ("noise is coupled" in log) is said
