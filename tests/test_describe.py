"""The recipe of an object, and the object of its recipe."""

import functools
import inspect
import json
import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

import scoresde
from scoresde import (
    VESDE,
    VPSDE,
    Cutoffs,
    DenoisingScoreMatching,
    DiscreteVP,
    EDMWeighting,
    InputError,
    Likelihood,
    LikelihoodWeighting,
    NoiseWeighting,
    RectifiedFlow,
    SubVPSDE,
    VariationalBound,
    divergence,
    inverse,
    likelihood,
    loss,
    nn,
    sample,
    sde,
    solvers,
    times,
)
from scoresde.recipe import build, complete, defaults, describable, describe

COMMON = {"eps": 0.01, "final_denoise": True, "temperature": 0.5}
ALONG = {**COMMON, "along_path": True}
STEPS = {"steps": 7, "grid": times.KarrasGrid(5.0), **ALONG}
SEVERAL = {"order": 2, "single_steps": True, "lower_order_below": 5, **STEPS}
CORRECTOR = sample.Langevin(0.2, 3, sample.ShrunkNorm(8.0))
OBJECTS = [
    sample.DDIM(eta=0.3, **STEPS),
    sample.Euler(**STEPS),
    sample.EulerMaruyama(**STEPS),
    sample.DPMSolverPP(as_coded=True, **SEVERAL),
    sample.DEIS(variable=sample.RelativeNoise(), **SEVERAL),
    sample.DEIS(variable=sample.HalfLogSNR()),
    sample.DEIS(variable=sample.Time()),
    sample.IPNDM(**SEVERAL),
    sample.UniPC(bh=1, **SEVERAL),
    sample.DPMSolverPPSDE(tau=0.5, as_coded=True, **{**SEVERAL, "single_steps": False}),
    sample.DPMSolver(order=3, **STEPS),
    sample.Heun(churn=1.0, churn_low=0.1, churn_high=5.0, churn_noise=1.1, **STEPS),
    sample.SEEDS(tau=0.3, **STEPS),
    sample.AnnealedLangevinDynamics(langevin=sample.AnnealedLangevin(0.2, 5), **STEPS),
    sample.PredictorCorrector(
        predictor=sample.AncestralPredictor(0.5), corrector=CORRECTOR, **STEPS
    ),
    sample.PredictorCorrector(predictor=sample.EulerMaruyamaPredictor(), corrector=None),
    sample.GottaGoFast(0.1, 0.1, 0.02, 0.8, 0.7, 99, **COMMON),
    sample.ProbabilityFlow(
        0.1,
        0.2,
        "bosh3",
        divergence.Hutchinson(3, divergence.Gaussian()),
        likelihood.TimeClock(),
        **{**COMMON, "final_denoise": False},
    ),
    sample.ReferencePredictorCorrector(
        9, sample.ReverseDiffusionPredictor(), sample.Langevin(0.2, rule=sample.BatchMeanNorm())
    ),
    sample.Restart(
        sample.Heun(5),
        (sample.RestartInterval(0.3, 1.0, 2, 4), sample.RestartInterval()),
        eps=0.1,
    ),
    sample.TorchSDE(5, "srk", solvers.Path(12), rtol=0.1, atol=0.2, **COMMON),
    sample.TorchSDE(motion=solvers.BrownianInterval(tree=True)),
    sample.TorchSDE(motion=solvers.Increments()),
    *(inverse.DDNM(eta=0.3, **STEPS), inverse.DPSStep(zeta=0.5, **STEPS)),
    *(inverse.Replacement(resamplings=3, jump=2, **STEPS), inverse.SDEdit(0.3, sample.DDIM(5))),
    sample.LangevinDynamics(7, 0.01, **COMMON),
    *(times.UniformGrid(), times.LogSNRGrid(), times.KarrasGrid(3.0), times.PowerGrid(3.0)),
    *(times.CosineGrid(0.5), times.ExplicitGrid((1.0, 0.4, 0.1))),
    *(times.UniformTimes(), times.ImportanceTimes(), times.LogNormalTimes(0.3, 2.0)),
    *(times.ChainTimes(), times.LevelTimes(10), times.LowDiscrepancy(times.LevelTimes(10))),
    *(times.FoldedTimes(times.ImportanceTimes()), times.FirstTime()),
    *(VPSDE(0.2, 10.0), SubVPSDE(0.2, 10.0), VESDE(0.02, 9.0), RectifiedFlow()),
    DiscreteVP(sde.LinearBetas(0.2, 10.0, 50)),
    DiscreteVP(sde.ListedBetas((0.1, 0.2, 0.3))),
    sde.ZeroSNRChain(sde.CosineBetas(50, 0.01, 0.99)),
    Cutoffs(training=0.1),
    *(NoiseWeighting(), LikelihoodWeighting(), EDMWeighting(0.3)),
    *(divergence.ExactTrace(3, True), divergence.ColourProbing(3, 2)),
    *(divergence.Hutchinson(4, d()) for d in (divergence.Sphere, divergence.Orthogonal)),
    divergence.Hutchinson(2, divergence.Rademacher()),
    *(likelihood.PlainCutoff(), likelihood.RescaledCutoff(), likelihood.VariationalCutoff(0.5)),
    *(likelihood.TimeClock(), likelihood.NoiseClock(0.7)),
    Likelihood(
        probes=divergence.ExactTrace(),
        cutoff=likelihood.VariationalCutoff(),
        clock=likelihood.NoiseClock(1.0),
        target_error=0.1,
    ),
    VariationalBound(4, times.UniformTimes(), 0.1, 2),
    DenoisingScoreMatching(weighting=EDMWeighting(), times=times.LogNormalTimes()),
    sample.PredictorCorrector(predictor=sample.ChainPredictor(likelihood.ForwardVariance())),
    loss.HybridLoss(0.01, likelihood.Levels(17), times=times.LowDiscrepancy(times.ChainTimes())),
    loss.BoundLoss(None, likelihood.LearnedRange()),
    *(loss.MinSNRWeighting(4.0), loss.SoftMinSNRWeighting(5.0), loss.BoundWeighting(10)),
    loss.ExplicitScoreMatching(NoiseWeighting(), eps=0.1, trace=divergence.Hutchinson(2)),
    loss.SlicedScoreMatching(probes=3, reduced=False, distribution=divergence.Gaussian()),
    loss.OneLevel(0.2),
    loss.VariationalLoss(likelihood.Levels(17), schedule=loss.LeastVariance(2.0)),
    loss.VariationalLoss(steps=50, schedule=loss.WholeBound(), times=times.UniformTimes()),
]
BASES = (
    *(sample.Sampler, sample.Predictor, sample.Corrector, sample.StepRule, sample.Variable),
    *(times.Grid, times.Times, sde.SDE, sde.Betas, loss.Weighting, solvers.Motion),
    *(divergence.Trace, divergence.Distribution, likelihood.Cutoff, likelihood.Clock),
    loss.ScheduleGradient,
)


def below(kind):
    return {kind}.union(*map(below, kind.__subclasses__()))


def parts(thing):
    """An object and all that it holds."""
    yield thing
    values = thing if isinstance(thing, tuple) else getattr(thing, "__dict__", {}).values()
    for value in values:
        yield from parts(value)


def test_there_is_an_example_of_every_class():
    seen = {type(part) for thing in OBJECTS for part in parts(thing)}
    known = {k for base in BASES for k in below(base) if k.__module__.startswith("scoresde.")}
    with_weights = {kind for kind in known if issubclass(kind, torch.nn.Module)}
    assert {kind for kind in known - with_weights if not inspect.isabstract(kind)} <= seen


def test_a_learned_schedule_is_built_of_its_recipe():
    one = sde.LearnedSchedule(10.0, width=8, fixed_ends=True)
    assert describe(one) == {
        "_target_": "scoresde.LearnedSchedule",
        **{"log_snr_max": 10.0, "width": 8, "fixed_ends": True},
    }
    two = build(describe(one))
    assert one != two
    assert {*one.state_dict()} == {*two.state_dict()}
    assert all(torch.equal(value, two.state_dict()[k]) for k, value in one.state_dict().items())


def named(value):
    return type(value).__name__


@pytest.mark.parametrize("thing", OBJECTS, ids=named)
def test_an_equal_object_is_built_of_the_recipe(thing):
    recipe = describe(thing)
    assert build(recipe) == thing
    assert build(json.loads(json.dumps(recipe))) == thing
    # The same with all that is left out.
    assert build(complete(recipe)) == thing
    assert complete(complete(recipe)) == complete(recipe)


@pytest.mark.parametrize("thing", OBJECTS, ids=named)
def test_what_is_at_its_default_is_left_out(thing):
    recipe, usual = describe(thing), defaults(type(thing))
    assert all(
        getattr(thing, key) != usual.get(key, recipe) for key in recipe.keys() - {"_target_"}
    )
    missing = {field.name for field in fields(thing)} - recipe.keys()
    assert all(getattr(thing, key) == usual[key] for key in missing)


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (VPSDE(), "scoresde.VPSDE"),
        (DiscreteVP(), "scoresde.DiscreteVP"),
        (sample.UniPC(), "scoresde.sample.UniPC"),
        (times.LogSNRGrid(), "scoresde.times.LogSNRGrid"),
        (sde.ZeroSNRChain(), "scoresde.sde.ZeroSNRChain"),
        (divergence.Hutchinson(), "scoresde.divergence.Hutchinson"),
        (sample.RelativeNoise(), "scoresde.sample.RelativeNoise"),
        (scoresde.NoiseLevel(), "scoresde.NoiseLevel"),
    ],
    ids=named,
)
def test_the_name_is_the_shortest_public_one(thing, name):
    assert describe(thing) == {"_target_": name}


def test_plain_values_and_what_holds_them():
    tree = {"a": [1, 2.5, "x", None, True], "b": {"c": ()}}
    assert describe(tree) == {"a": [1, 2.5, "x", None, True], "b": {"c": []}}
    inner = {"_target_": "scoresde.VESDE", "sigma_max": 9.0}
    assert describe({"sde": (VESDE(sigma_max=9.0),)}) == {"sde": [inner]}


@dataclass(frozen=True)
class Mine:
    """Of another package."""


@pytest.mark.parametrize(
    "thing",
    [
        *(Mine(), torch.zeros(2), torch.nn.LeakyReLU(0.5), math.sin, VPSDE, {1, 2}, 1j),
        {"_target_": "os.system"},
        functools.partial(VPSDE, 1.0),
        sample.DDIM(constraint=lambda x, t, noise: x),
        sample.base.ProgressReporter(),
        [VPSDE(), [object()]],
    ],
    ids=named,
)
def test_what_cannot_be_described_is_a_sentence(thing):
    with pytest.raises(InputError, match="write its recipe by hand"):
        describe(thing)


MODULES = [
    nn.MLP(3, width=8, classes=2, conditions={"context": 4}),
    nn.MLP(3, width=8, output_heads=2),
    nn.MLP((2, 3), embedding=nn.PositionalEmbedding(8, scale=100.0)),
    nn.UNet((1, 8, 8), 8, attention=[0], dropout=0.1, centre=True),
    nn.UNet((1, 7, 8), 8, architecture=nn.Architecture(output_heads=2)),
    nn.UNet((1, 8, 8), np.int64(8), architecture=nn.Architecture(activation=torch.nn.ReLU())),
    nn.UNet(
        (1, 8, 8),
        8,
        attention=nn.AttentionLayout((1,), heads=2),
        architecture=nn.Architecture(
            transition=nn.DDPMTransition(),
            resampling=nn.FIRResampling(),
            norm=nn.Groups(8, 1, exceptions={"middle.attention.norm": 2}),
            input_pyramid=nn.InputSkip(),
            output_pyramid=nn.OutputSkip(),
            rescale=False,
        ),
        embedding=nn.FourierEmbedding(16, 16.0, log=True),
    ),
    nn.ScaledBySigma(nn.UNet((1, 8, 8), 8), nn.GeometricSigmas(0.01, 50.0, 10)),
    scoresde.ScoreModel(nn.MLP(2, width=8), VESDE(0.02, 30.0), scoresde.DataParametrisation()),
]


@pytest.mark.parametrize("made", MODULES, ids=lambda m: type(m).__name__)
def test_a_network_is_built_again_of_the_recipe_of_its_arguments(made):
    """The same weights fit, and give the same output; JSON can hold the recipe."""
    recipe = json.loads(json.dumps(describe(made)))
    again = build(recipe)
    again.load_state_dict(made.state_dict())
    assert repr(again) == repr(made)
    assert describe(again) == describe(made)
    if not isinstance(made, scoresde.ScoreModel):
        x = torch.randn(2, *getattr(made, "shape", (1, 8, 8)))
        assert torch.equal(again.eval()(x, torch.ones(2)), made.eval()(x, torch.ones(2)))


@describable
class Describable(torch.nn.Module):
    def __init__(self, width=3, scale=1.0):
        super().__init__()
        self.width = width


def test_a_users_class_is_described_by_its_module_and_built_where_that_is_allowed():
    recipe = describe(Describable(scale=2.0))
    assert recipe == {"_target_": "tests.test_describe.Describable", "scale": 2.0}
    assert isinstance(build(recipe, allow=["tests"]), Describable)
    with pytest.raises(InputError, match=r"tests\.test_describe"):
        build(recipe)


class Subclass(Describable):
    pass


def test_a_subclass_is_not_taken_for_its_base():
    with pytest.raises(InputError, match="Subclass"):
        describe(Subclass())
