"""Samplers against exact models: orders of convergence, moments, and what they promise of batches.

Where a number is random, its tolerance is four of its own standard errors, plus the share named
``DISCRETISATION`` where a finite number of steps adds an error of its own.
"""

import math
from contextlib import redirect_stderr
from itertools import pairwise

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
    Likelihood,
    RectifiedFlow,
    ScoreFunction,
    ScoreModel,
    SubVPSDE,
    solvers,
)
from scoresde.likelihood.flow import NoiseClock  # noqa: F401 - of a representation
from scoresde.model import Conditioned
from scoresde.nn import MLP
from scoresde.sample import (
    DDIM,
    DEIS,
    IPNDM,
    SEEDS,
    AncestralPredictor,
    AnnealedLangevin,
    AnnealedLangevinDynamics,
    BatchMeanNorm,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPPSDE,
    Euler,
    EulerMaruyama,
    EulerMaruyamaPredictor,
    GottaGoFast,
    Heun,
    Interval,
    Langevin,
    PredictorCorrector,
    ProbabilityFlow,
    Restart,
    RestartInterval,
    ReverseDiffusionPredictor,
    ShrunkNorm,
    Time,  # noqa: F401 - of a representation
    TorchSDE,
    UniPC,
)
from scoresde.sample.base import Noise, ProgressReporter
from scoresde.streams import Purpose, Streams
from scoresde.times import KarrasGrid, LogSNRGrid, PowerGrid, UniformGrid
from tests.test_progress import Terminal

SDES = [VPSDE(), SubVPSDE(), VESDE(0.01, 10.0), RectifiedFlow()]
PREDICTORS = [EulerMaruyamaPredictor(), ReverseDiffusionPredictor(), AncestralPredictor()]
CORRECTORS = [Langevin(), AnnealedLangevin()]
SAMPLERS = [
    EulerMaruyama(steps=8),
    PredictorCorrector(steps=8),
    PredictorCorrector(steps=8, corrector=None),
    PredictorCorrector(4, LogSNRGrid(), AncestralPredictor(), AnnealedLangevin(steps=2)),
    ProbabilityFlow(rtol=1e-3, atol=1e-3),
    TorchSDE(steps=8),
    TorchSDE(steps=4, method="srk"),
    DDIM(8, PowerGrid()),
    DDIM(8, eta=0.5),
    Euler(40),
    Heun(4, churn=2.0),
    DPMSolver(4, order=3),
    DPMSolverPP(8, order=3, single_steps=True),
    DPMSolverPPSDE(8),
    UniPC(8),
    DEIS(8),
    IPNDM(8),
    SEEDS(4),
    Restart(Heun(4, LogSNRGrid()), (RestartInterval(0.2, 2.0, 2, 2),)),
    AnnealedLangevinDynamics(4, langevin=AnnealedLangevin(steps=2)),
    GottaGoFast(0.5, 0.2),
]
DISCRETISATION = 0.06


def name(value):
    return type(value).__name__


each_sde = pytest.mark.parametrize("sde", SDES, ids=name)
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
each_predictor = pytest.mark.parametrize("predictor", PREDICTORS, ids=name)
each_corrector = pytest.mark.parametrize("corrector", CORRECTORS, ids=name)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at(t):
    return torch.tensor(t, dtype=torch.float64)


def mixture(sde, d=2, dtype=torch.float64):
    means = 0.8 * normal(2, d, seed=5)
    return GaussianMixtureModel([0.3, 0.7], means, [0.3, 0.5], sde).to(dtype)


def network(sde, dtype=torch.float32):
    torch.manual_seed(0)
    net = MLP(2, width=16, depth=1)
    nn.init.normal_(net.linear_out.weight, std=0.1)  # it starts as zero
    return ScoreModel(net.to(dtype), sde)


class Spy(ScoreFunction):
    """Passes everything on, and remembers the times it was asked at."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.sde = model.sde
        self.times = []
        self.calls = 0

    def _ask(self, view, x, t):
        self.times += t.reshape(-1).tolist()
        self.calls += 1
        return getattr(self.model, view)(x, t)

    def score(self, x, t):
        return self._ask("score", x, t)

    def noise(self, x, t):
        return self._ask("noise", x, t)

    def denoise(self, x, t):
        return self._ask("denoise", x, t)


class Flat(SDE):
    """A process whose signal-to-noise ratio never changes."""

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return torch.ones_like(t)


# --- Values --------------------------------------------------------------------------------------


@each_sampler
def test_samplers_are_values(sampler):
    twin = eval(repr(sampler), {**vars(solvers), **globals(), "inf": math.inf})
    assert sampler == twin
    assert hash(sampler) == hash(twin)
    with pytest.raises(AttributeError):
        sampler.eps = 0.1


# --- What every sampler promises -----------------------------------------------------------------


@each_sampler
@pytest.mark.parametrize("final", [False, True])
def test_the_evaluations_are_counted_truly(final, sampler):
    sampler = type(sampler)(**(vars(sampler) | {"final_denoise": final}))
    spy = Spy(mixture(VPSDE()))
    out = sampler(spy, shape=(3, 2), seed=0)
    assert (out.nfe.dtype, int(out.nfe.max())) == (torch.int64, spy.calls)
    if not isinstance(sampler, (ProbabilityFlow, GottaGoFast)):  # of steps of each sample's own
        assert out.nfe.tolist() == [spy.calls] * 3


@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (EulerMaruyama(steps=8), 8),
        (EulerMaruyama(steps=8, final_denoise=True), 9),
        (PredictorCorrector(steps=8), 16),
        (PredictorCorrector(steps=8, corrector=None), 8),
        (PredictorCorrector(steps=8, corrector=Langevin(steps=3)), 32),
        (DDIM(8), 8),
        (Heun(8), 16),
        (Heun(8, final_denoise=True), 17),
        (DPMSolver(8, order=3), 24),
        (DPMSolverPP(8, order=3), 8),
        (DPMSolverPP(8, order=3, single_steps=True), 9),
        (DEIS(8, order=4, single_steps=True), 8 + 2 * 2),
        (UniPC(8, order=3), 8),
        (UniPC(8, order=3, single_steps=True), 10),
        (IPNDM(8), 8),
        (SEEDS(8), 16),
        (Restart(DDIM(8, LogSNRGrid()), (RestartInterval(0.2, 2.0, 3, 4),)), 8 + 3 * 4),
        (AnnealedLangevinDynamics(4, langevin=AnnealedLangevin(steps=5)), 25),
    ],
    ids=repr,
)
def test_the_evaluations_are_those_of_the_algorithm(sampler, nfe):
    assert sampler(mixture(VPSDE()), shape=(1, 2), seed=0).nfe.tolist() == [nfe]


@each_sampler
@each_sde
def test_the_model_is_never_asked_below_eps_or_above_one(sde, sampler):
    spy = Spy(mixture(sde))
    sampler(spy, shape=(3, 2), seed=0)
    assert sde.cutoffs.sampling <= min(spy.times)
    assert max(spy.times) <= 1


@each_sampler
def test_a_given_eps_is_where_it_stops(sampler):
    sampler = type(sampler)(**(vars(sampler) | {"eps": 0.2}))
    seen, spy = [], Spy(mixture(VPSDE()))
    sampler(spy, shape=(3, 2), seed=0, callback=seen.append)
    assert min(spy.times) >= 0.2
    assert float(seen[-1].t.min()) >= 0.2


@each_sampler
def test_a_recorded_seed_gives_the_samples_again(sampler):
    first = sampler(mixture(VPSDE()), shape=(2, 2))
    again = sampler(mixture(VPSDE()), shape=(2, 2), seed=first.seed)
    assert torch.equal(first.x, again.x)


@each_sampler
def test_another_seed_gives_other_samples(sampler):
    a, b = (sampler(mixture(VPSDE()), shape=(2, 2), seed=s).x for s in (0, 1))
    assert not bool((a == b).any())


@each_sampler
def test_no_random_number_is_used_twice(sampler, monkeypatch):
    used, draw_normal = [], Streams.normal

    def normal(self, shape, purpose, draw=0, dtype=torch.float32):
        used.append((purpose, draw))
        return draw_normal(self, shape, purpose, draw, dtype)

    monkeypatch.setattr(Streams, "normal", normal)
    if isinstance(sampler, GottaGoFast):
        pytest.skip("its noise is a function of time, which it asks again")
    sampler(mixture(VPSDE()), shape=(2, 2), seed=0)
    assert len(set(used)) == len(used)


@each_sampler
@each_sde
def test_the_start_is_the_streams_latent(sde, sampler):
    latent = sde.prior_std * Streams.of(3, batch=2).normal((2,), Purpose.LATENT, 0, torch.float64)
    drawn = sampler(mixture(sde), shape=(2, 2), seed=3).x
    given = sampler(mixture(sde), latent=latent, seed=3).x
    torch.testing.assert_close(given, drawn, rtol=1e-12, atol=1e-12)


@each_sampler
def test_the_final_denoising_is_the_expected_data(sampler):
    model = mixture(VPSDE())
    state = sampler(model, shape=(3, 2), seed=0).x
    sampler = type(sampler)(**(vars(sampler) | {"final_denoise": True}))
    denoised = sampler(model, shape=(3, 2), seed=0).x
    torch.testing.assert_close(denoised, model.denoise(state, 1e-3))


@each_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_type_of_the_model(dtype, sampler):
    assert sampler(mixture(VPSDE(), dtype=dtype), shape=(2, 2), seed=0).x.dtype == dtype


@each_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_samples_have_the_type_of_the_latent(dtype, sampler):
    model = mixture(VPSDE(), dtype=torch.float32)
    assert sampler(model, latent=torch.ones(2, 2, dtype=dtype), seed=0).x.dtype == dtype


@each_sampler
def test_the_state_around_a_bfloat16_network_is_float32(sampler):
    seen = []
    out = sampler(
        network(VPSDE(), torch.bfloat16),
        shape=(2, 2),
        seed=0,
        callback=lambda step: seen.append(step.x.dtype),
    )
    assert {out.x.dtype, *seen} == {torch.float32}


@each_sampler
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 7)], ids=str)
def test_data_of_any_shape(shape, sampler):
    exact = GaussianModel(torch.zeros(shape[1:]), 0.5, VPSDE())
    assert sampler(exact, shape=shape, seed=0).x.shape == shape


@each_sampler
def test_training_mode_is_off_while_sampling_and_restored(sampler):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model = ScoreModel(lambda x, c: net(x), VPSDE())
    model.network_module = net
    model.train()
    a, b = (sampler(model, shape=(2, 2), seed=0).x for _ in range(2))
    assert torch.equal(a, b)
    assert all(module.training for module in model.modules())


@each_sampler
def test_samples_carry_no_graph(sampler):
    assert not sampler(network(VPSDE()), shape=(2, 2), seed=0).x.requires_grad


@each_sampler
def test_conditions_reach_the_network(sampler):
    seen = []
    model = ScoreModel(lambda x, c, y: seen.append(y) or 0 * x, VPSDE())
    y = torch.tensor([3, 1])
    sampler(model, shape=(2, 2), seed=0, y=y)
    assert torch.equal(seen[0], y)
    assert {value for condition in seen for value in condition.tolist()} == {3, 1}


@pytest.mark.parametrize("grid", [UniformGrid(), LogSNRGrid()], ids=repr)
def test_a_callback_is_told_every_step_of_a_grid(grid):
    seen = []
    out = EulerMaruyama(5, grid)(
        mixture(VPSDE()), shape=(2, 2), seed=0, callback=lambda step: seen.append(step)
    )
    assert [(step.i, step.n) for step in seen] == [(i, 5) for i in range(1, 6)]
    assert [float(step.t) for step in seen] == grid(5, VPSDE(), 1e-3)[1:].tolist()
    assert torch.equal(seen[-1].x, out.x)


def test_a_callback_is_told_the_way_of_an_adaptive_solver():
    seen = []
    out = ProbabilityFlow()(mixture(VPSDE()), shape=(2, 2), seed=0, callback=seen.append)
    times = torch.stack([step.t for step in seen])
    assert [step.i for step in seen] == list(range(1, len(seen) + 1))
    assert bool((times.diff(dim=0) <= 0).all())
    assert (times[0].tolist(), times[-1].tolist()) == ([1.0] * 2, [1e-3] * 2)
    assert torch.equal(seen[-1].x, out.x)


def test_ve_may_run_to_time_zero():
    out = EulerMaruyama(200, eps=0.0)(mixture(VESDE(0.01, 10.0)), shape=(4, 2), seed=0)
    assert bool(out.x.isfinite().all())


# --- Errors --------------------------------------------------------------------------------------


@each_sampler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "shape"),
        ({"shape": (2, 2), "latent": torch.zeros(2, 2)}, "latent.*both"),
        ({"shape": (2,)}, r"shape.*\(2,\)"),
        ({"shape": (0, 2)}, r"shape.*\(0, 2\)"),
        ({"latent": torch.zeros(2)}, r"latent.*\(2,\)"),
        ({"latent": torch.zeros(2, 2, dtype=torch.int64)}, "float"),
        ({"shape": (2, 2), "seed": -1}, r"seed.*-1\b"),
        ({"shape": (2, 2), "seeds": [0, 1, 2]}, "seeds"),
        ({"shape": (2, 2), "seeds": [0, -1]}, "seeds"),
    ],
    ids=str,
)
def test_unusable_arguments_are_refused_before_the_first_pass(arguments, message, sampler):
    spy = Spy(mixture(VPSDE()))
    with pytest.raises(InputError, match=message):
        sampler(spy, **arguments)
    assert spy.times == []


@each_sampler
@pytest.mark.parametrize("eps", [-0.1, 0, 1.0, math.nan])
def test_an_unusable_eps_is_refused(eps, sampler):
    sampler = type(sampler)(**(vars(sampler) | {"eps": eps}))
    with pytest.raises(InputError, match=f"eps.*got {eps}"):
        sampler(mixture(VPSDE()), shape=(2, 2))


@each_sampler
def test_a_bare_network_is_refused(sampler):
    with pytest.raises(InputError, match="ScoreModel"):
        sampler(nn.Linear(2, 2), shape=(2, 2))


@pytest.mark.parametrize("make", [EulerMaruyama, PredictorCorrector, TorchSDE])
@pytest.mark.parametrize("steps", [0, -5, 2.5, math.nan])
def test_unusable_steps_are_refused(steps, make):
    with pytest.raises(InputError, match=f"steps.*{steps}"):
        make(steps=steps)


@pytest.mark.parametrize("make", [Langevin, AnnealedLangevin])
@pytest.mark.parametrize("arguments", [{"snr": 0.0}, {"snr": -1.0}, {"steps": 0}])
def test_unusable_correctors_are_refused(arguments, make):
    ((name, value),) = arguments.items()
    with pytest.raises(InputError, match=f"{name}.*{value}"):
        make(**arguments)


def test_unusable_pseudo_dimensions_are_refused():
    with pytest.raises(InputError, match=r"pseudo_dimensions.* 0;"):
        ShrunkNorm(0)


@pytest.mark.parametrize("arguments", [{"rtol": 0.0}, {"method": "rk4"}])
def test_an_unusable_solver_is_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(InputError, match=f"{name}.*{value}"):
        ProbabilityFlow(**arguments)


@pytest.mark.parametrize("make", [EulerMaruyama, PredictorCorrector])
def test_a_process_that_adds_no_noise_is_refused(make):
    with pytest.raises(InputError, match=f"{make.__name__}.*signal-to-noise.*steps=5"):
        make(5)(mixture(Flat()), shape=(2, 2))


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)], ids=["vector", "integers"]
)
def test_unusable_data_are_not_encoded(x):
    with pytest.raises(InputError, match=r"batch|float"):
        ProbabilityFlow().encode(mixture(VPSDE()), x)


# --- A sample does not depend on its batch -------------------------------------------------------

SEEDED = [
    EulerMaruyama(steps=40),
    *(
        PredictorCorrector(steps=20, predictor=predictor, corrector=corrector)
        for predictor in PREDICTORS
        for corrector in CORRECTORS
    ),
    TorchSDE(steps=20),
    ProbabilityFlow(rtol=1e-7, atol=1e-7),
    DPMSolverPPSDE(steps=20, order=3),
    UniPC(steps=20),
    SEEDS(steps=20),
    Heun(steps=20, churn=10.0),
    Restart(Heun(10, LogSNRGrid()), (RestartInterval(0.2, 2.0, 2, 2),)),
    AnnealedLangevinDynamics(4, langevin=AnnealedLangevin(steps=5)),
    GottaGoFast(0.2, 0.05),
]


@pytest.mark.parametrize("sampler", SEEDED, ids=repr)
@pytest.mark.parametrize("make", [mixture, network])
def test_a_sample_is_the_same_alone_and_in_a_batch_in_any_order(make, sampler):
    model = make(VPSDE())
    batch = sampler(model, shape=(64, 2), seed=9).x
    reverse = sampler(model, shape=(64, 2), seed=9, seeds=reversed(range(64))).x.flip(0)
    alone = sampler(model, shape=(1, 2), seed=9, seeds=[37]).x
    scale = float(batch.abs().max())
    torch.testing.assert_close(reverse / scale, batch / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone / scale, batch[37:38] / scale, rtol=0, atol=1e-5)


# --- Order of convergence ------------------------------------------------------------------------


class Impulses:
    """Instead of random numbers: one for state i at the i-th number, and zero for the others."""

    def __init__(self):
        self.drawn = 0

    def normal(self, shape, purpose, draw, dtype):
        self.drawn += 1
        z = torch.zeros(BATCH, *shape, dtype=dtype)
        z[self.drawn - 1] = 1.0
        return z


BATCH = 1200


def moments(sampler, exact, eps):
    """The mean and the variance at eps of a sampler on a Gaussian with independent features.

    There a sample is linear in the start and in all of the noises, and a batch reads every
    coefficient off it, without any random number. They start from the exact marginal at t = 1.
    """
    field, sde, one = Conditioned(exact), exact.sde, at(1.0)
    x = torch.zeros(BATCH, len(exact.mean)).double()
    x[-1] = 1.0
    numbers = Impulses()
    y = sampler._run(field, x, eps, Noise(numbers), ProgressReporter(None, False)).x
    assert numbers.drawn < BATCH - 1
    rest = y[-2]
    a, noises = y[-1] - rest, y[: numbers.drawn] - rest
    mean = a * sde.alpha(one) * exact.mean + rest
    variance = sde.alpha(one) ** 2 * exact.variances + sde.sigma(one) ** 2
    return mean, a**2 * variance + noises.square().sum(0)


@each_sde
@pytest.mark.parametrize(
    "make",
    [
        EulerMaruyama,
        lambda n: PredictorCorrector(n, corrector=None),
        lambda n: PredictorCorrector(n, predictor=AncestralPredictor(), corrector=None),
    ],
    ids=["Euler-Maruyama", "reverse diffusion", "ancestral"],
)
def test_the_weak_order_is_one(make, sde):
    """Data as wide as the noise: for VE, the first-order error nearly vanishes for narrow data."""
    std, eps = sde.prior_std * torch.tensor([1.0, 1.5]).double(), at(sde.cutoffs.sampling)
    exact = GaussianModel(torch.full((2,), 0.5).double(), std, sde)
    mean = sde.alpha(eps) * exact.mean
    variance = sde.alpha(eps) ** 2 * exact.variances + sde.sigma(eps) ** 2
    ours = [moments(make(n), exact, float(eps)) for n in (125, 250, 500)]
    errors = torch.stack([v / variance - 1 for _, v in ours])
    assert float(torch.log2(errors[:-1] / errors[1:]).min()) > 0.9
    assert float(errors[-1].abs().max()) < 0.03
    torch.testing.assert_close(ours[-1][0], mean, rtol=0.03, atol=0)


def test_euler_maruyama_is_the_predictor_alone():
    alone = PredictorCorrector(8, predictor=EulerMaruyamaPredictor(), corrector=None)
    model = mixture(VPSDE())
    a, b = (sampler(model, shape=(3, 2), seed=0).x for sampler in (EulerMaruyama(8), alone))
    assert torch.equal(a, b)


@each_sde
def test_euler_maruyama_has_strong_order_one(sde):
    """One Brownian motion on nested grids: the distance to a very fine path falls as the step."""
    n, finest, counts = 16, 1024, (16, 32, 64, 128)
    field = Conditioned(mixture(sde))
    start = mixture(sde).sample(n, 0.7, seed=0)
    z = normal(finest, n, 2)

    def path(steps):
        x, grid = start, torch.linspace(0.7, 0.2, steps + 1, dtype=torch.float64)
        share = finest // steps
        increments = z.reshape(steps, share, n, 2).sum(1) / share**0.5
        for i, (t, s) in enumerate(pairwise(grid)):
            x = EulerMaruyamaPredictor()(field, x, Interval.of(field.sde, t, s), increments[i])
        return x

    truth = path(finest)
    errors = torch.stack([(path(k) - truth).square().mean().sqrt() for k in counts]).log2()
    order = float(errors[0] - errors[-1]) / (len(counts) - 1)
    assert 0.85 < order < 1.2


# --- Relations between methods, and what their options do ----------------------------------------


@each_sde
def test_ddim_that_draws_all_noise_anew_is_the_ancestral_sampler(sde):
    ancestral = PredictorCorrector(8, LogSNRGrid(), AncestralPredictor(), None)
    a, b = (s(mixture(sde), (3, 2), seed=0).x for s in (DDIM(8, LogSNRGrid(), 1.0), ancestral))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_sde
@pytest.mark.parametrize(
    "sampler",
    [DPMSolver(8, order=1), DPMSolverPP(8, order=1), DEIS(8, order=1), IPNDM(8, order=1)],
    ids=name,
)
def test_every_family_begins_with_ddim(sampler, sde):
    a, b = (s(mixture(sde), (3, 2), seed=0).x for s in (sampler, DDIM(8)))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_heun_is_the_published_algorithm():
    """Karras et al., algorithm 2, in sigma for alpha = 1, written down once more."""
    sde, steps = VESDE(0.01, 10.0), 6
    exact, noises = mixture(sde), Streams.of(0, batch=3)
    sampler = Heun(steps, KarrasGrid(), churn=2.0, churn_noise=1.1, eps=0.1, final_denoise=True)
    ours = sampler(exact, (3, 2), seed=0).x
    times = sampler.times(sde, 0.1)
    x = sde.prior_std * noises.normal((2,), Purpose.LATENT, 0, torch.float64)
    sigma = sde.sigma(times)
    for i in range(steps):
        raised, t = sigma[i], times[i]
        if i > 0:  # our noise is not raised above that of t = 1
            raised = sigma[i] * (1 + min(2.0 / steps, 2**0.5 - 1))
            t = sde.time(-2 * raised.log())
            z = noises.normal((2,), Purpose.DIFFUSION, 2 * i - 1, torch.float64)
            x = x + (raised**2 - sigma[i] ** 2).sqrt() * 1.1 * z
        slope = (x - exact.denoise(x, t)) / raised
        ahead = x + (sigma[i + 1] - raised) * slope
        slope_ahead = (ahead - exact.denoise(ahead, times[i + 1])) / sigma[i + 1]
        x = x + (sigma[i + 1] - raised) * 0.5 * (slope + slope_ahead)
    torch.testing.assert_close(ours, exact.denoise(x, times[-1]), rtol=1e-9, atol=1e-9)


@each_sde
def test_langevin_dynamics_end_with_the_variance_of_their_step(sde):
    """V / (1 - delta / 2V), exactly, where the steps suffice to forget what was before."""
    exact = GaussianModel(torch.zeros(2).double(), torch.tensor([0.5, 1.0]).double(), sde)
    sampler = AnnealedLangevinDynamics(4, langevin=AnnealedLangevin(0.316, 200), eps=0.2)
    _, variance = moments(sampler, exact, 0.2)
    eps = at(0.2)
    truth = sde.alpha(eps) ** 2 * exact.variances + sde.sigma(eps) ** 2
    delta = 2 * (0.316 * sde.sigma(eps)) ** 2
    # It takes this part of the way to the truth in 200 steps; the rest is of the level before.
    rest = (1 - delta / truth) ** 400
    torch.testing.assert_close(
        variance, truth / (1 - delta / (2 * truth)), rtol=max(1e-6, 3 * float(rest.max())), atol=0
    )


@each_sampler
def test_the_temperature_scales_all_noise(sampler):
    """Of data N(0, s^2), where every sampler is linear, it scales the samples."""
    exact = GaussianModel(torch.zeros(2).double(), 0.5, VPSDE())
    if isinstance(sampler, PredictorCorrector) and isinstance(sampler.corrector, Langevin):
        pytest.skip("the step of this corrector depends on the state")
    if isinstance(sampler, GottaGoFast):
        pytest.skip("its steps depend on the state")
    if isinstance(sampler, ProbabilityFlow):  # its error is to be small beside the tolerance here
        sampler = ProbabilityFlow(1e-6, 1e-6)
    cool = type(sampler)(**(vars(sampler) | {"temperature": 0.5}))
    a, b = (s(exact, (3, 2), seed=0).x for s in (sampler, cool))
    torch.testing.assert_close(b, 0.5 * a, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
def test_an_unusable_temperature_is_refused(temperature):
    with pytest.raises(InputError, match=f"temperature.*{temperature}"):
        DDIM(8, temperature=temperature)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(8, eta=2), "eta.*2"),
        (lambda: DPMSolver(8, order=4), "order.*4"),
        (lambda: DPMSolverPP(8, order=0), "order.*0"),
        (lambda: UniPC(8, bh=3), "bh.*3"),
        (lambda: UniPC(8, lower_order_below=-1), "lower_order_below.*-1"),
        (lambda: DEIS(8, variable="t"), "variable.* t"),
        (lambda: DPMSolverPPSDE(8, tau=-1), "tau.*-1"),
        (lambda: DPMSolverPPSDE(8, single_steps=True), "single_steps.*True"),
        (lambda: SEEDS(8, tau=math.inf), "tau.*inf"),
        (lambda: Heun(8, churn=-1), "churn.*-1"),
        (lambda: Heun(8, churn_low=2, churn_high=1), "churn_low.*2 and 1"),
        (lambda: Heun(8, churn_noise=0), "churn_noise.* 0;"),
        (lambda: RestartInterval(0.5, 0.2), r"low.*0\.5 and 0\.2"),
        (lambda: RestartInterval(steps=0), "interval.steps.*0"),
        (lambda: Restart(EulerMaruyama), "sampler.*EulerMaruyama"),
        (
            lambda: Restart(intervals=(RestartInterval(0.1, 1), RestartInterval(0.2, 1))),
            r"intervals.*0\.1, 0\.2",
        ),
        (lambda: DDIM(8, "uniform"), "grid.*uniform"),
        (lambda: AnnealedLangevinDynamics(langevin=3), "langevin.*3"),
        (lambda: GottaGoFast(rtol=-1), "rtol.*-1"),
        (lambda: GottaGoFast(first_step=0), "first_step.* 0[.]"),
        (lambda: GottaGoFast(power=2), "power.*2"),
        (lambda: GottaGoFast(max_steps=0), "max_steps.*0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_loop_that_no_time_of_the_grid_is_in_is_refused():
    for low, high in [(100.0, 120.0), (1e-4, 2e-4)]:
        with pytest.raises(InputError, match=rf"grid, \[\S+, \S+\], .*low={low}.*a smaller eps"):
            Restart(DDIM(2), (RestartInterval(low, high),))(mixture(VPSDE()), (2, 2))


# --- The probability flow ------------------------------------------------------------------------


@each_sde
def test_the_flow_is_that_of_the_gaussian_to_its_tolerance(sde):
    """The tolerance is one of a step; over all steps the error here is up to 27 times that."""
    exact = GaussianModel(normal(4), normal(4, seed=1).abs() + 0.2, sde)
    latent = sde.prior_std * normal(16, 4, seed=2)
    truth = exact.flow(latent, 1.0, sde.cutoffs.sampling)
    tolerances = (1e-5, 1e-6, 1e-7)
    errors = [
        float((ProbabilityFlow(rtol, rtol)(exact, latent=latent).x - truth).abs().max())
        for rtol in tolerances
    ]
    assert errors == sorted(errors, reverse=True)
    assert all(error < 40 * rtol for error, rtol in zip(errors, tolerances, strict=True))


@each_sde
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_evaluation_leaves_the_interval_in_either_direction(dtype, sde):
    spy, flow = Spy(mixture(sde, dtype=dtype)), ProbabilityFlow(eps=1e-5)
    latent = flow.encode(spy, spy.model.sample(4, 1e-5, seed=0)).x
    flow(spy, latent=latent)
    assert min(spy.times) >= 1e-5
    assert max(spy.times) <= 1


@each_sde
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encoding_and_decoding_returns_the_data(dtype, sde):
    model, flow = mixture(sde, dtype=dtype), ProbabilityFlow(1e-6, 1e-6)
    x = model.sample(8, sde.cutoffs.sampling, seed=0)
    latent = flow.encode(model, x)
    back = flow(model, latent=latent.x)
    assert latent.x.dtype == dtype
    torch.testing.assert_close(back.x, x, rtol=1e-3, atol=1e-3)


@each_sde
def test_latents_of_data_have_the_marginal_at_one(sde):
    n, exact = 2000, GaussianModel(torch.zeros(2).double(), 0.5, sde)
    latent = ProbabilityFlow().encode(exact, exact.sample(n, sde.cutoffs.sampling, seed=0)).x
    std = math.hypot(0.5 * float(sde.alpha(1.0)), float(sde.sigma(1.0)))
    assert float(latent.std()) == pytest.approx(std, rel=4 / (4 * n) ** 0.5)


def test_the_passes_of_an_encoding_are_counted():
    spy = Spy(mixture(VPSDE()))
    out = ProbabilityFlow().encode(spy, normal(3, 2))
    assert int(out.nfe.max()) == spy.calls


# --- Densities of samples ------------------------------------------------------------------------


@each_sde
def test_the_density_of_a_sample_is_that_of_the_exact_model(sde):
    exact, eps = mixture(sde, dtype=torch.float64), sde.cutoffs.sampling
    latent = sde.prior_std * normal(6, 2)
    out = ProbabilityFlow(1e-7, 1e-7, probes="exact")(exact, latent=latent)
    log_prob = out.log_prob - sde.prior_log_prob(latent) + exact.log_prob(latent, 1.0)
    torch.testing.assert_close(log_prob, exact.log_prob(out.x, eps), rtol=0, atol=1e-4)
    assert torch.equal(out.standard_error, torch.zeros(6).double())


def test_the_density_of_a_sample_is_that_of_the_likelihood():
    exact = mixture(VPSDE(), dtype=torch.float64)
    out = ProbabilityFlow(1e-8, 1e-8, probes=4, eps=1e-4)(exact, (3, 2), seed=0)
    again = Likelihood(4, 1e-8, 1e-8, eps=1e-4)(exact, out.x, seed=0)
    torch.testing.assert_close(out.log_prob, again.log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.standard_error, again.standard_error, rtol=0, atol=1e-4)


def test_samplers_that_measure_no_density_say_so():
    exact = mixture(VPSDE())
    assert ProbabilityFlow()(exact, (2, 2), seed=0).log_prob is None
    assert EulerMaruyama(2)(exact, (2, 2), seed=0).log_prob is None


def test_a_denoised_sample_has_no_density():
    with pytest.raises(InputError, match=r"probes.*final_denoise=True"):
        ProbabilityFlow(probes=1, final_denoise=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_sample_is_the_same_in_any_batch(dtype):
    exact, latent = mixture(VPSDE(), dtype=dtype), normal(5, 2).to(dtype)
    flow = ProbabilityFlow(1e-3, 1e-3)
    assert torch.equal(flow(exact, latent=latent).x[2:3], flow(exact, latent=latent[2:3]).x)


# --- Predictors ----------------------------------------------------------------------------------


@each_sde
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.5), (0.5, 0.499), (0.02, 0.01), (0.3, 0.001)])
def test_the_ancestral_step_is_the_posterior_of_bayes(t, s, sde):
    """With the data known, (x_s, x_t) is a Gaussian, and x_s given x_t follows by conditioning."""
    x0, x = normal(1, 3), normal(1, 3, seed=1)
    model = ScoreModel(lambda x, c: x0, sde, DataParametrisation())
    t, s = at(t), at(s)
    mean, std = (
        AncestralPredictor()(Conditioned(model), x, Interval.of(model.sde, t, s), z)
        for z in (torch.zeros_like(x), torch.ones_like(x))
    )
    std = std - mean
    a = sde.alpha(t) / sde.alpha(s)
    joint = torch.stack(
        (
            torch.stack((sde.sigma(s) ** 2, a * sde.sigma(s) ** 2)),
            torch.stack((a * sde.sigma(s) ** 2, sde.sigma(t) ** 2)),
        )
    )
    gain = joint[0, 1] / joint[1, 1]
    truth = sde.alpha(s) * x0 + gain * (x - sde.alpha(t) * x0)
    variance = torch.linalg.det(joint) / joint[1, 1]
    torch.testing.assert_close(mean, truth, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(std, variance.sqrt().expand_as(std), rtol=1e-5, atol=0)


@each_sde
def test_the_reverse_diffusion_step_undoes_the_forward_transition(sde):
    x, z, t, s = normal(4, 2), normal(4, 2, seed=1), at(0.6), at(0.58)
    exact = mixture(sde)
    a = sde.alpha(t) / sde.alpha(s)
    tau = torch.sqrt(sde.sigma(t) ** 2 - a**2 * sde.sigma(s) ** 2)
    truth = x - (a - 1) * x + tau**2 * exact.score(x, t) + tau * z
    ours = ReverseDiffusionPredictor()(Conditioned(exact), x, Interval.of(exact.sde, t, s), z)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@each_sde
def test_the_euler_maruyama_step_is_that_of_the_reverse_sde(sde):
    x, z, t, s = normal(4, 2), normal(4, 2, seed=1), at(0.6), at(0.58)
    exact = mixture(sde)
    drift = sde.f(t) * x - sde.g(t) ** 2 * exact.score(x, t)
    truth = x + drift * (s - t) + sde.g(t) * torch.sqrt(t - s) * z
    ours = EulerMaruyamaPredictor()(Conditioned(exact), x, Interval.of(exact.sde, t, s), z)
    torch.testing.assert_close(ours, truth)


# --- Correctors ----------------------------------------------------------------------------------


def step_size(rule, noise, sigma=2.0, snr=0.16, z=None):
    z = torch.zeros_like(noise) if z is None else z
    return rule(2 * (snr * sigma) ** 2, sigma, noise, z)


@pytest.mark.parametrize(
    "corrector",
    [Langevin(), Langevin(snr=5.0), Langevin(rule=ShrunkNorm(1e-3))],
    ids=repr,
)
def test_a_langevin_step_is_bounded_where_the_score_vanishes(corrector):
    sde = VESDE(0.01, 10.0)
    exact, t = GaussianModel(torch.ones(2).double(), 0.5, sde), at(0.5)
    centre, z = torch.ones(1, 2).double(), normal(1, 2)
    moved = corrector(Conditioned(exact), centre, Interval.of(sde, t, t), z) - centre
    delta = (moved / z).square() / 2  # there the step is sqrt(2 delta) z
    assert float(delta.max()) <= float(sde.sigma(t)) ** 2 * (1 + 1e-12)


@pytest.mark.parametrize("snr", [0.01, 0.16, 5.0])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("d", [1, 2, 3072])
def test_the_step_size_is_positive_and_at_most_the_variance(d, scale, snr):
    delta = step_size(ShrunkNorm(), scale * torch.ones(4, d), snr=snr)
    assert delta.shape == (4,)
    assert float(delta.min()) > 0
    assert float(delta.max()) <= 4


def test_the_step_size_is_nearly_the_published_one_in_high_dimensions():
    """That is 2 (r |z| / |score|)^2, taken per sample; the noise's norm here is 0.95 of z's."""
    z, noise = normal(16, 3072), 0.95 * normal(16, 3072, seed=1)
    published = 2 * (0.16 * z.norm(dim=1) / (noise / 2.0).norm(dim=1)) ** 2
    ratio = step_size(ShrunkNorm(), noise, z=z) / published
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)


def test_the_step_size_is_nearly_the_annealed_one_in_two_dimensions():
    delta = step_size(ShrunkNorm(), normal(1000, 2))
    assert float((delta / (2 * (0.16 * 2.0) ** 2)).sub(1).abs().max()) < 0.06


def test_the_published_rule_takes_norms_over_the_batch():
    z, noise = normal(8, 5), normal(8, 5, seed=1)
    ratio = z.norm(dim=1).mean() / (noise / 2.0).norm(dim=1).mean()
    delta = step_size(BatchMeanNorm(), noise, z=z)
    torch.testing.assert_close(delta, 2 * (0.16 * ratio) ** 2)


@each_sde
def test_the_size_accounts_for_the_predictors_scale(sde):
    """The published alpha of a VP step, a = alpha_t / alpha_s, scales the step's square root."""
    exact, t, s = mixture(sde), at(0.6), at(0.55)
    x, z = normal(4, 2), normal(4, 2, seed=1)
    moved = AnnealedLangevin()(Conditioned(exact), x, Interval.of(exact.sde, t, s), z)
    delta = 2 * (sde.alpha(t) / sde.alpha(s) * 0.16 * sde.sigma(t)) ** 2
    truth = x + delta * exact.score(x, t) + torch.sqrt(2 * delta) * z
    torch.testing.assert_close(moved, truth)


def corrected(corrector, part):
    x, z, t = normal(8, 2), normal(8, 2, seed=1), at(0.5)
    model = mixture(VPSDE())
    return corrector(Conditioned(model), x[part], Interval.of(model.sde, t, t), z[part])


@each_corrector
def test_a_correction_does_not_depend_on_batch_mates(corrector):
    part = slice(3, 4)
    together, alone = corrected(corrector, slice(None))[part], corrected(corrector, part)
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


def test_the_published_rule_depends_on_batch_mates():
    corrector, part = Langevin(rule=BatchMeanNorm()), slice(3, 4)
    together, alone = corrected(corrector, slice(None))[part], corrected(corrector, part)
    assert float((together - alone).abs().max()) > 1e-3


@pytest.mark.parametrize(("d", "n"), [(2, 10_000), (64, 500)])
@pytest.mark.parametrize("corrector", [Langevin(), Langevin(rule=ShrunkNorm(16.0))], ids=repr)
def test_corrections_keep_the_variance_of_a_gaussian(corrector, d, n):
    """In the long run, at one time: V / (1 - delta / 2V) for a constant step delta.

    The step depends on the state, which adds at most 2 / (d_0 + d) of the variance.
    """
    sde, t = VESDE(0.01, 10.0), at(0.6)
    exact = GaussianModel(torch.zeros(d).double(), 0.1, sde)
    sigma2 = float(sde.sigma(t)) ** 2
    variance = sigma2 + 0.01
    field, x = Conditioned(exact), normal(n, d) * variance**0.5
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):  # the memory of the start falls by 5 % a step
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = corrector(field, x, Interval.of(sde, t, t), z)
    delta = 2 * corrector.snr**2 * sigma2
    excess = float(x.var()) / variance * (1 - delta / (2 * variance)) - 1
    error = 4 * (2 / x.numel()) ** 0.5
    assert -error < excess < 2 / (corrector.rule.pseudo_dimensions + d) + error


# --- Moments of samples --------------------------------------------------------------------------


def check_moments(x, exact, discretisation):
    """Mean and covariance, each within four standard errors and a share of the spread."""
    means, stds = exact.means.double().flatten(1), exact.stds.double()
    w = exact.log_weights.double().exp()
    mean = w @ means
    spread = torch.einsum("k,kd,ke->de", w, means - mean, means - mean)
    covariance = spread + (w @ stds**2) * torch.eye(x.shape[1])
    n, std = len(x), covariance.diagonal().sqrt()
    y = (x.double() - mean) / std
    products = torch.einsum("nd,ne->nde", y, y)
    error = products.mean(0) - covariance / torch.outer(std, std)
    assert float((y.mean(0).abs() - 4 / n**0.5).max()) < discretisation
    assert float((error.abs() - 4 * products.std(0) / n**0.5).max()) < discretisation


@each_sde
@each_predictor
@each_corrector
def test_predictor_corrector_samples_a_mixture(corrector, predictor, sde):
    exact = mixture(sde, dtype=torch.float32)
    sampler = PredictorCorrector(100, predictor=predictor, corrector=corrector)
    check_moments(sampler(exact, shape=(1000, 2), seed=0).x, exact, DISCRETISATION)


@pytest.mark.parametrize(
    ("sde", "predictor", "corrector"),
    list(zip(SDES[:3], PREDICTORS, [*CORRECTORS, Langevin()], strict=True)),
    ids=name,
)
def test_predictor_corrector_samples_a_mixture_in_64_dimensions(sde, predictor, corrector):
    exact = mixture(sde, 64, torch.float32)
    sampler = PredictorCorrector(100, predictor=predictor, corrector=corrector)
    check_moments(sampler(exact, shape=(400, 64), seed=0).x, exact, DISCRETISATION)


@each_sde
@pytest.mark.parametrize(
    "sampler", [EulerMaruyama(150), ProbabilityFlow(1e-4, 1e-4), TorchSDE(40, "srk")], ids=repr
)
def test_samplers_sample_a_mixture(sampler, sde):
    exact = mixture(sde, dtype=torch.float32)
    check_moments(sampler(exact, shape=(1000, 2), seed=0).x, exact, DISCRETISATION)


# --- torchsde ------------------------------------------------------------------------------------


# From zero SNR on, the first step is no step of torchsde.
@pytest.mark.parametrize("sde", SDES[:3], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchsdes_euler_is_euler_maruyama(dtype, sde):
    model = mixture(sde, dtype=dtype)
    ours = EulerMaruyama(50)(model, shape=(8, 2), seed=0).x
    theirs = TorchSDE(50)(model, shape=(8, 2), seed=0).x
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_additive_noise_makes_milstein_euler():
    model = mixture(VPSDE())
    a, b = (
        TorchSDE(20, method)(model, shape=(8, 2), seed=0).x for method in ("euler", "milstein")
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "sampler",
    [EulerMaruyama(steps=3), PredictorCorrector(steps=3), ProbabilityFlow(), TorchSDE(steps=3)],
    ids=lambda sampler: type(sampler).__name__,
)
def test_progress_is_shown_on_request_and_changes_nothing(sampler):
    model = GaussianModel(torch.zeros(2), 0.5, VPSDE())
    with redirect_stderr(Terminal()) as terminal:
        quiet = sampler(model, shape=(2, 2), seed=0)
        assert terminal.getvalue() == ""
        shown = sampler(model, shape=(2, 2), seed=0, progress=True)
    assert "step" in terminal.getvalue()
    assert torch.equal(quiet.x, shown.x)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_the_default_of_unipc_is_near_the_exact_flow(sde):
    """The covariance of samples from the same latents, over the stds; 20 steps are off by 0.08."""
    factor = normal(5, 5, seed=4)
    exact = GaussianModel(
        torch.zeros(5), covariance=factor @ factor.T / 4 + 0.2 * torch.eye(5), sde=sde
    )
    latent = UniPC().latent(exact, (4000, 5), seed=0).double()
    ours, flow = (
        sampler(exact, latent=latent, seed=0).x.T.cov()
        for sampler in (UniPC(), ProbabilityFlow(1e-6, 1e-6))
    )
    std = flow.diagonal().sqrt()
    assert float(((ours - flow) / torch.outer(std, std)).abs().max()) < 0.03
