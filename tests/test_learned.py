"""A learned schedule goes through everything: losses, training, checkpoints, samplers, bounds."""

import copy
import functools

import pytest
import torch

from scoresde import (
    SDE,
    VPSDE,
    DataParametrisation,
    DenoisingScoreMatching,
    EDMWeighting,
    GaussianModel,
    LearnedSchedule,
    Likelihood,
    LikelihoodWeighting,
    NoiseParametrisation,
    Preconditioned,
    ScoreModel,
    ScoreParametrisation,
    VariationalBound,
    VParametrisation,
)
from scoresde.data import two_moons
from scoresde.likelihood import RescaledCutoff, TimeClock, VariationalCutoff
from scoresde.nn import MLP
from scoresde.sample import ProbabilityFlow, UniPC
from scoresde.times import (
    FoldedTimes,
    ImportanceTimes,
    LevelTimes,
    LogNormalTimes,
    LowDiscrepancy,
    UniformTimes,
)
from scoresde.train import EMA, Checkpoint, Training, Update, read_metrics, train
from tests.models import LearnedParametrisation
from tests.test_samplers import SAMPLERS

PARAMETRISATIONS = [
    *(NoiseParametrisation(), DataParametrisation(), VParametrisation()),
    *(ScoreParametrisation(), Preconditioned(0.7)),
]
TIMES = [
    *(UniformTimes(), ImportanceTimes(), LogNormalTimes(), LevelTimes(20)),
    *(LowDiscrepancy(), FoldedTimes(ImportanceTimes())),
]
SCHEDULE = {f"sde.{name}" for name, _ in LearnedSchedule().named_parameters()}
RECIPE = {
    "model": {
        "_target_": "scoresde.ScoreModel",
        "network": {"_target_": "scoresde.nn.MLP", "shape": [2], "width": 16, "depth": 1},
        "sde": {"_target_": "scoresde.LearnedSchedule"},
    }
}


def model_of(parametrisation=None):
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=1)
    torch.nn.init.normal_(network.linear_out.weight, std=0.1)  # it starts as zero
    return ScoreModel(network, LearnedSchedule(), parametrisation)


def frozen(model):
    """The same model, whose schedule computes in float64."""
    one = copy.deepcopy(model)
    one.sde.double().requires_grad_(False)
    return one


def data(count=8):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(3))


# --- Losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS, ids=lambda p: type(p).__name__)
def test_the_loss_and_its_gradients_are_those_of_float64(parametrisation, times):
    loss = DenoisingScoreMatching(times=times, eps=1e-2 if times == TIMES[3] else None)
    found = []
    for model in (model_of(parametrisation), model_of(parametrisation).double()):
        value = loss(model, data().to(model.dtype), seed=0)
        value.sum().backward()
        gradients = [p.grad.double() for p in model.parameters()]
        assert all(bool((g != 0).any()) for g in gradients)
        found.append([value.double(), *gradients])
    for single, double in zip(*found, strict=True):
        scale = float(double.detach().abs().max())
        torch.testing.assert_close(single, double, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("weighting", [LikelihoodWeighting(), EDMWeighting()], ids=repr)
def test_weights_that_the_schedule_learns(weighting):
    loss = DenoisingScoreMatching(weighting, ImportanceTimes())
    found = []
    for model in (model_of(), model_of().double()):
        loss(model, data().to(model.dtype), seed=0).sum().backward()
        found.append(model.sde.slope.grad.double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


def test_autocast_leaves_the_schedule_its_digits():
    """In bfloat16 its log-SNR would be off by up to 0.02, and its gradients by a few per cent."""
    sde, t = LearnedSchedule(), torch.linspace(0, 1, 9)

    def coefficients():
        own = [act(t) for act in (sde.alpha, sde.sigma, sde.log_snr, sde.f, sde.g)]
        return torch.stack([*own, SDE.f(sde, t), SDE.g(sde, t)])  # and by autograd

    plain = coefficients()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(t[None], t[None]).dtype == torch.bfloat16
        assert torch.equal(coefficients(), plain)


# --- Samplers, likelihoods, bounds ---------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samples_are_those_of_the_schedule_in_float64(sampler):
    model = model_of()
    one, two = (sampler(m, shape=(8, 2), seed=0) for m in (model, frozen(model)))
    torch.testing.assert_close(one.x, two.x, rtol=0, atol=1e-4)
    assert one.x.dtype == torch.float32
    assert not one.x.requires_grad
    assert all(p.requires_grad for p in model.parameters())


def test_latents_are_those_of_the_schedule_in_float64():
    model = model_of()
    one, two = (ProbabilityFlow().encode(m, data()).x for m in (model, frozen(model)))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "tool",
    [
        Likelihood(probes="exact"),
        Likelihood(),
        Likelihood(probes="exact", clock=TimeClock()),
        Likelihood(probes="exact", cutoff=RescaledCutoff()),
        Likelihood(probes="exact", cutoff=VariationalCutoff()),
        VariationalBound(),
        VariationalBound(times=UniformTimes()),
    ],
    ids=repr,
)
def test_log_densities_are_those_of_the_schedule_in_float64(tool):
    model = model_of()
    one, two = (tool(m, data(), seed=0).log_prob for m in (model, frozen(model)))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-3)


def test_the_likelihood_of_a_gaussian_is_the_closed_form():
    exact = GaussianModel(mean=torch.tensor([0.5, -0.2]), std=0.8, sde=LearnedSchedule())
    found = Likelihood(probes="exact")(exact, data())
    # The prior is not quite the law at t = 1: with that in its place nothing but the solver errs.
    latent = found.latent
    value = found.log_prob - exact.sde.prior_log_prob(latent) + exact.log_prob(latent, 1.0)
    start = Likelihood(probes="exact").check(exact)
    torch.testing.assert_close(value, exact.log_prob(data(), start), rtol=0, atol=2e-3)


# --- Training ------------------------------------------------------------------------------------


class CrashError(Exception):
    pass


class Breaking(DenoisingScoreMatching):
    """Breaks off at an update, counted from 0."""

    def __init__(self, step):
        super().__init__()
        object.__setattr__(self, "step", step)

    def terms(self, model, x, **options):
        if model.training and options["seeds"].start == self.step * len(x):
            raise CrashError
        return super().terms(model, x, **options)


def fit(folder, loss=None, **options):
    folder.mkdir(exist_ok=True)
    return train(
        model_of(),
        two_moons(count=100),
        loss or DenoisingScoreMatching(times=LowDiscrepancy()),
        Training(steps=12, batch_size=16, save_every=3, log_every=4, validate_every=6, **options),
        functools.partial(torch.optim.Adam, lr=1e-2),
        folder,
        recipe=RECIPE,
        progress=False,
    )


def test_the_schedule_is_trained_averaged_and_saved(tmp_path):
    average = fit(tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.model.keys() > SCHEDULE
    before = model_of().state_dict()
    for name in SCHEDULE:
        moved = (checkpoint.model[name] - before[name]).abs().max()
        assert float(moved) > 1e-3
        assert not torch.equal(checkpoint.model[name], checkpoint.ema[name])
        assert torch.equal(average.state_dict()[name], checkpoint.ema[name])
    built = checkpoint.build_model()
    one, two = (UniPC(steps=5)(m, shape=(3, 2), seed=0).x for m in (average, built))
    assert torch.equal(one, two)
    assert {name.partition("/")[0] for r in read_metrics(tmp_path) for name in r} >= {
        *("noise_error", "part", "validation_loss")
    }


class ScaledVP(torch.nn.Module, VPSDE):
    """VP with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("part", [ScaledVP, LearnedParametrisation])
def test_two_parts_of_equal_settings_have_weights_of_their_own(part):
    model = torch.nn.ModuleList([part(), part()])
    assert len(list(model.parameters())) == 2


def test_the_average_follows_the_schedule():
    model = model_of()
    ema = EMA(model, 0.5)
    before = model.sde.slope.detach().clone()
    with torch.no_grad():
        model.sde.slope += 1
    ema.update()
    torch.testing.assert_close(ema.model.sde.slope, before + 1 - 2 / 11)


@pytest.mark.parametrize("step", [2, 3, 8])
def test_an_interruption_leaves_no_trace(step, tmp_path):
    loss = DenoisingScoreMatching()
    fit(tmp_path / "whole", loss)
    with pytest.raises(CrashError):
        fit(tmp_path / "killed", Breaking(step))
    fit(tmp_path / "killed", loss)
    one, two = (Checkpoint.load(tmp_path / name) for name in ("whole", "killed"))
    for part in ("model", "ema"):
        a, b = getattr(one, part), getattr(two, part)
        assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_weights_of_the_schedule_are_a_group_of_their_own():
    model = model_of()
    make = functools.partial(torch.optim.Adam, lr=1e-3)
    update = Update(model, DenoisingScoreMatching(), Training(), make)
    inside, outside = (group["params"] for group in update.optimiser.param_groups)
    assert {id(p) for p in inside} == {id(p) for p in model.network.parameters()}
    assert {id(p) for p in outside} == {id(p) for p in model.sde.parameters()}


def test_a_frozen_schedule_is_left_as_it_is():
    model = frozen(model_of())
    before = copy.deepcopy(model.sde.state_dict())
    make = functools.partial(torch.optim.Adam, lr=1e-2)
    update = Update(model, DenoisingScoreMatching(), Training(), make)
    assert bool(update(data(), {}, 0, 8).isfinite().all())
    assert all(torch.equal(before[k], v) for k, v in model.sde.state_dict().items())
