"""Guided models: the rule they combine by, what they cost, and each example on its own."""

import math

import pytest
import torch
from torch import nn

from scoresde import (
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    RectifiedFlow,
    ScoreModel,
    SubVPSDE,
)
from scoresde.divergence import ExactTrace
from scoresde.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clipped,
    Projected,
    Rescaled,
)
from scoresde.nn import MLP
from scoresde.passes import counting
from scoresde.sample import DDIM, EulerMaruyama, GottaGoFast, ProbabilityFlow, UniPC
from tests.test_samplers import SAMPLERS

VIEWS = ("score", "noise", "denoise", "velocity")
SDES = [VPSDE(), SubVPSDE(), VESDE(0.01, 10.0), RectifiedFlow()]
LABELS = torch.tensor([0, 1, 2, -1])
each_view = pytest.mark.parametrize("view", VIEWS)
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at(*t):
    return torch.tensor(t if len(t) > 1 else t[0], dtype=torch.float64)


def mixture(sde=None, d=4):
    means, labels = 0.8 * normal(5, d, seed=3), torch.tensor([0, 1, 2, 0, 1])
    stds = torch.linspace(0.3, 0.7, 5).double()
    return GaussianMixtureModel([1.0] * 5, means, stds, sde or VPSDE(), labels=labels)


def network(dtype=torch.float64, **options):
    torch.manual_seed(0)
    net = MLP(4, width=16, depth=1, classes=3, **options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return ScoreModel(net.to(dtype), VPSDE())


def none(label):
    return torch.full_like(label, -1)


# --- Classifier-free guidance --------------------------------------------------------------------


@each_sde
@each_view
@pytest.mark.parametrize("t", [at(0.3), at(0.1, 0.4, 0.7, 1.0)], ids=["one", "each"])
def test_the_guided_view_combines_the_same_view_of_the_two(t, view, sde):
    """At t = 1 of the rectified flow too, where alpha is 0."""
    model, x = mixture(sde), normal(4, 4)
    given, free = (getattr(model, view)(x, t, label=c) for c in (LABELS, none(LABELS)))
    for scale in (-0.5, 2.5):
        ours = getattr(ClassifierFreeGuidance(model, scale), view)(x, t, label=LABELS)
        torch.testing.assert_close(ours, free + scale * (given - free), rtol=1e-12, atol=1e-12)
    for scale, expected in ((0, free), (1.0, given)):
        guided = ClassifierFreeGuidance(model, scale)
        with counting(4) as passes:
            assert torch.equal(getattr(guided, view)(x, t, label=LABELS), expected)
        assert passes.network.tolist() == [1] * 4


@each_view
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_is_called_once_on_a_doubled_batch(dtype, view):
    model, x, t = network(dtype), normal(4, 4, dtype=dtype), at(0.3)
    sizes = []
    model.network.register_forward_hook(lambda net, args, out: sizes.append(len(args[0])))
    guided = ClassifierFreeGuidance(model, torch.tensor(2.5, dtype=torch.float64))
    ours = getattr(guided, view)(x, t, label=LABELS)
    assert sizes == [8]
    given, free = (getattr(model, view)(x, t, label=c) for c in (LABELS, none(LABELS)))
    error = 1e-12 if dtype == torch.float64 else 2e-6
    expected = free + 2.5 * (given - free)
    torch.testing.assert_close(ours, expected, rtol=error, atol=error)
    assert (ours.dtype, guided.dtype) == (dtype, dtype)


def test_the_views_are_one_function():
    guided, x, t = ClassifierFreeGuidance(mixture(), 3.0), normal(4, 4), at(0.2, 0.4, 0.6, 0.8)
    alpha, sigma = (part(t)[:, None] for part in (VPSDE().alpha, VPSDE().sigma))
    noise, data = (getattr(guided, view)(x, t, label=LABELS) for view in ("noise", "denoise"))
    torch.testing.assert_close(alpha * data + sigma * noise, x)
    torch.testing.assert_close(guided.score(x, t, label=LABELS), -noise / sigma)
    f, g = VPSDE().f(t)[:, None], VPSDE().g(t)[:, None]
    velocity = f * x + 0.5 * g**2 / sigma * noise
    torch.testing.assert_close(guided.velocity(x, t, label=LABELS), velocity)


def test_passes_are_counted_for_those_that_need_them():
    """Two where both models count, one at scales 0 and 1 and without a class."""
    scale = torch.tensor([2.0, 0.0, 1.0, 3.0]).double()
    for guided, expected in (
        (ClassifierFreeGuidance(mixture(), 2.0), [20, 20, 20, 10]),
        (ClassifierFreeGuidance(mixture(), scale), [20, 10, 10, 10]),
        (ClassifierFreeGuidance(mixture(), 1.0), [10] * 4),
    ):
        assert DDIM(10)(guided, (4, 4), seed=0, label=LABELS).nfe.tolist() == expected


@pytest.mark.parametrize("t", [at(0.3), at(0.05, 0.3, 0.5, 0.9)], ids=["one", "each"])
def test_outside_of_the_interval_is_the_conditional_model(t):
    model, x, label = mixture(), normal(4, 4), torch.tensor([0, 1, 2, 0])
    level = (VPSDE().sigma(t) / VPSDE().alpha(t)).expand(4)
    low, high = 0.9 * float(level.sort().values[1]), 1.1 * float(level.sort().values[2])
    inside = (level >= low) & (level <= high)
    with counting(4) as passes:
        ours = ClassifierFreeGuidance(model, 2.0, (low, high)).noise(x, t, label=label)
    assert passes.network.tolist() == (1 + inside.long()).tolist()
    everywhere = ClassifierFreeGuidance(model, 2.0).noise(x, t, label=label)
    expected = torch.where(inside[:, None], everywhere, model.noise(x, t, label=label))
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_a_sampler_pays_for_the_interval_alone():
    sampler, interval = DDIM(50), (0.2, 5.0)
    times = sampler.times(VPSDE(), 1e-3)[:-1]
    level = VPSDE().sigma(times) / VPSDE().alpha(times)
    inside = int(((level >= 0.2) & (level <= 5.0)).sum())
    guided = ClassifierFreeGuidance(mixture(), 2.0, interval)
    out = sampler(guided, (3, 4), seed=0, label=LABELS[:3])
    assert out.nfe.tolist() == [50 + inside] * 3
    assert 0 < inside < 50


MIXED = torch.tensor([2.0, 0.5, 1.0, 3.0, 0.0, 2.0]).double()
MANY = torch.tensor([0, 1, 2, 1, 0, -1])


@pytest.mark.parametrize(
    "sampler",
    [DDIM(8), UniPC(6), EulerMaruyama(8), ProbabilityFlow(1e-5, 1e-5), GottaGoFast(0.5, 0.2)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("interval", [None, (0.3, 4.0)], ids=["always", "interval"])
def test_an_example_does_not_depend_on_its_batch(interval, sampler):
    model = mixture()
    batch = ClassifierFreeGuidance(model, MIXED, interval)
    together = sampler(batch, (6, 4), seed=0, label=MANY)
    for i in range(6):
        one = ClassifierFreeGuidance(model, float(MIXED[i]), interval)
        alone = sampler(one, (1, 4), seed=0, seeds=[i], label=MANY[i : i + 1])
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=0, atol=1e-7)
        assert int(together.nfe[i]) == int(alone.nfe)


def test_a_scale_for_each_is_taken_along():
    rows, x, t = torch.tensor([3, 0]), normal(6, 4), at(0.4)
    for make in (
        lambda: ClassifierFreeGuidance(mixture(), MIXED),
        lambda: Clipped(ClassifierFreeGuidance(mixture(), MIXED), -9.0, 9.0),
        lambda: Projected(ClassifierFreeGuidance(mixture(), MIXED), 0.3),
        lambda: ClassifierGuidance(mixture(), mixture().class_log_prob, MIXED),
        lambda: Autoguidance(mixture(), mixture(), MIXED),
    ):
        whole, some = make().noise(x, t, label=MANY), make().take(rows)
        torch.testing.assert_close(some.noise(x[rows], t, label=MANY[rows]), whole[rows])
    plain = ClassifierFreeGuidance(mixture(), 2.0)
    assert plain.take(rows) is plain


def test_a_constraint_holds_under_guidance():
    known = at(0.25, -0.5)

    def constraint(x, t, noise):
        alpha, sigma = (part(t).reshape(-1, 1) for part in (VPSDE().alpha, VPSDE().sigma))
        return torch.cat((alpha * known + sigma * noise(x)[:, :2], x[:, 2:]), 1)

    for sampler in (EulerMaruyama(20), ProbabilityFlow(1e-3, 1e-3)):
        sampler = type(sampler)(**{**sampler.__dict__, "constraint": constraint})
        guided = ClassifierFreeGuidance(mixture(), 2.0, (0.2, 5.0))
        x = sampler(guided, (4, 4), seed=0, label=LABELS).x
        end = VPSDE().sigma(at(1e-3))
        assert float((x[:, :2] - known).abs().max()) < 5 * float(end)


def test_a_callback_is_told_the_times_across_an_interval():
    times, guided = [], ClassifierFreeGuidance(mixture(), 2.0, (0.2, 5.0))
    out = ProbabilityFlow(1e-4, 1e-4)(
        guided, (1, 4), seed=0, label=LABELS[:1], callback=lambda step: times.append(float(step.t))
    )
    assert times == sorted(times, reverse=True)  # a rejected step repeats its time
    assert (times[0], times[-1]) == (1.0, 1e-3)
    assert len(guided.jumps) == 2
    assert set(guided.jumps) <= set(times)
    assert int(out.nfe) > 0


def test_several_conditions_are_dropped_together_or_alone():
    model = network(conditions={"context": 2})
    x, t, context = normal(4, 4), at(0.3), normal(4, 2, seed=1)
    both = {"label": LABELS, "context": context}
    alone = ClassifierFreeGuidance(model, 2.0, drop=("label",)).noise(x, t, **both)
    free = model.noise(x, t, label=none(LABELS), context=context)
    torch.testing.assert_close(alone, free + 2 * (model.noise(x, t, **both) - free))


def test_a_compiled_network_meets_two_sizes_of_batch():
    """Of an adaptive solve too, if its batch keeps its size."""
    model, sizes = network(), set()

    def backend(module, inputs):
        sizes.add(next(i.shape[0] for i in inputs if i.ndim == 2 and i.shape[1] == 4))
        return module.forward

    plain = DDIM(5)(ClassifierFreeGuidance(model, 2.0, (0.2, 5.0)), (4, 4), seed=0, label=MANY[:4])
    model.network = torch.compile(model.network, backend=backend, dynamic=False)
    ours = DDIM(5)(ClassifierFreeGuidance(model, 2.0, (0.2, 5.0)), (4, 4), seed=0, label=MANY[:4])
    torch.testing.assert_close(ours.x, plain.x)
    assert sizes == {4, 8}


# --- A classifier --------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", SDES[:3], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_the_exact_classifier_is_classifier_free_guidance(sampler, sde):
    model, label = mixture(sde), torch.tensor([0, 1, 2, -1])
    free = sampler(ClassifierFreeGuidance(model, 2.0), (4, 4), seed=0, label=label).x
    ours = sampler(
        ClassifierGuidance(model, model.class_log_prob, 2.0), (4, 4), seed=0, label=label
    ).x
    torch.testing.assert_close(ours, free, rtol=1e-10, atol=1e-10)


@each_view
def test_a_classifier_of_the_rectified_flow(view):
    """Equal where alpha / sigma is above 1e-3; where it is 0 within the stated error."""
    model, x = mixture(RectifiedFlow()), normal(4, 4)
    free = ClassifierFreeGuidance(model, 2.0)
    ours = ClassifierGuidance(model, model.class_log_prob, 2.0)
    for t, error in ((at(0.5), 1e-12), (at(1.0), 5e-3)):
        expected = getattr(free, view)(x, t, label=LABELS)
        torch.testing.assert_close(
            getattr(ours, view)(x, t, label=LABELS), expected, rtol=error, atol=error
        )


def test_a_classifier_costs_a_backward_pass():
    guided = ClassifierGuidance(mixture(), mixture().class_log_prob, 2.0)
    out = DDIM(10)(guided, (4, 4), seed=0, label=LABELS)
    assert (out.nfe.tolist(), out.vjps.tolist()) == ([10] * 4, [10, 10, 10, 0])
    unguided = ClassifierGuidance(mixture(), mixture().class_log_prob, 0.0)
    out = DDIM(10)(unguided, (4, 4), seed=0, label=LABELS)
    assert out.vjps.tolist() == [0] * 4
    assert torch.equal(out.x, DDIM(10)(mixture(), (4, 4), seed=0).x)


@pytest.mark.parametrize("trace", [ExactTrace(), ExactTrace(chunk=1), ExactTrace(forward=True)])
def test_a_likelihood_differentiates_both_kinds_of_guidance(trace):
    model, x = mixture(), normal(4, 4)
    values = [
        Likelihood(trace, rtol=1e-4, atol=1e-4)(guided, x, label=LABELS).log_prob
        for guided in (
            ClassifierFreeGuidance(model, 2.0, (0.0, math.inf)),
            ClassifierGuidance(model, model.class_log_prob, 2.0),
        )
    ]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=3e-4)


def test_a_differentiable_likelihood_crosses_an_interval():
    """Its gradient, on steps of three solutions in a row, is that of finite differences."""
    guided, x = ClassifierFreeGuidance(mixture(), 2.0, (0.2, 5.0)), 0.5 * normal(2, 4)
    label, step = torch.tensor([0, 1]), 1e-3 * normal(2, 4, seed=1)
    tight = {"rtol": 1e-7, "atol": 1e-7}
    likelihood = Likelihood("exact", differentiable=True, **tight)
    start = x.clone().requires_grad_()
    found = likelihood(guided, start, label=label).log_prob
    (gradient,) = torch.autograd.grad(found.sum(), start)
    plain = Likelihood("exact", **tight)
    values = [plain(guided, x + sign * step, label=label).log_prob for sign in (1, -1)]
    torch.testing.assert_close(found.detach(), plain(guided, x, label=label).log_prob)
    slope = 0.5 * (values[0] - values[1])
    torch.testing.assert_close(slope, (gradient * step).sum(1), rtol=1e-3, atol=1e-8)


# --- A weaker model ------------------------------------------------------------------------------


@each_view
def test_autoguidance_goes_from_the_weak_model_beyond_the_strong(view):
    strong, weak = GaussianModel(torch.zeros(4), 0.5, VPSDE()), mixture()
    x, t = normal(4, 4), at(0.1, 0.3, 0.5, 0.9)
    best, worse = (getattr(model, view)(x, t) for model in (strong, weak))
    ours = getattr(Autoguidance(strong, weak, 2.5), view)(x, t)
    torch.testing.assert_close(ours, worse + 2.5 * (best - worse), rtol=1e-12, atol=1e-12)
    assert torch.equal(getattr(Autoguidance(strong, weak, 1.0), view)(x, t), best)
    assert torch.equal(getattr(Autoguidance(strong, weak, 0.0), view)(x, t), worse)


def test_autoguidance_counts_what_it_needs():
    scale = torch.tensor([2.0, 0.0, 1.0]).double()
    for guided, expected in (
        (Autoguidance(mixture(), mixture(), 2.0), [14] * 3),
        (Autoguidance(mixture(), mixture(), 1.0), [7] * 3),
        (Autoguidance(mixture(), mixture(), scale), [14, 7, 7]),
    ):
        assert DDIM(7)(guided, (3, 4), seed=0).nfe.tolist() == expected
    both = Autoguidance(mixture(), mixture(), 3.0)
    torch.testing.assert_close(
        DDIM(7)(both, (3, 4), seed=0).x, DDIM(7)(mixture(), (3, 4), seed=0).x
    )


# --- Less of it ----------------------------------------------------------------------------------


@each_sde
@each_view
def test_without_effect_they_are_the_guidance(view, sde):
    guide, x = ClassifierFreeGuidance(mixture(sde, d=16), 3.0), normal(4, 16)
    t = at(0.1, 0.3, 0.5, 0.9)
    expected = getattr(guide, view)(x, t, label=LABELS)
    for same in (Rescaled(guide, 0.0), Projected(guide, eta=1.0)):
        ours = getattr(same, view)(x, t, label=LABELS)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("sde", [VPSDE(), RectifiedFlow()], ids=lambda sde: type(sde).__name__)
def test_the_changed_views_stay_one_function(sde):
    guide, x, t = ClassifierFreeGuidance(mixture(sde, d=16), 3.0), normal(4, 16), at(0.3)
    for changed in (Rescaled(guide, 0.7), Projected(guide, 0.2, norm=0.5)):
        data, noise = (getattr(changed, v)(x, t, label=LABELS) for v in ("denoise", "noise"))
        torch.testing.assert_close(sde.alpha(t) * data + sde.sigma(t) * noise, x)


def test_rescaling_brings_back_the_spread():
    guide, x, t = ClassifierFreeGuidance(mixture(d=16), 5.0), normal(4, 16), at(0.3)
    given, guided = (model.denoise(x, t, label=LABELS) for model in (guide.model, guide))
    ours = Rescaled(guide, 1.0).denoise(x, t, label=LABELS)
    torch.testing.assert_close(ours.std(1), given.std(1))
    torch.testing.assert_close(
        Rescaled(guide, 0.25).denoise(x, t, label=LABELS), 0.25 * ours + 0.75 * guided
    )


def test_projection_leaves_out_what_is_along_the_estimate():
    guide, x, t = ClassifierFreeGuidance(mixture(d=16), 5.0), normal(4, 16), at(0.3)
    given, free = (guide.model.denoise(x, t, label=c) for c in (LABELS, none(LABELS)))
    across = Projected(guide).denoise(x, t, label=LABELS) - given
    assert float((across * given).sum(1).abs().max()) < 1e-12
    gap = given - free
    kept = gap - (gap * given).sum(1, keepdim=True) / (given**2).sum(1, keepdim=True) * given
    torch.testing.assert_close(across, 4 * kept)
    short = Projected(guide, eta=1.0, norm=0.1).denoise(x, t, label=LABELS) - given
    expected = 4 * gap.norm(dim=1).clamp(max=0.1)
    torch.testing.assert_close(short.norm(dim=1), expected)


# --- What is refused -----------------------------------------------------------------------------


def never_without():
    """A network with a trained table whose last row no example has used."""
    model = network()
    table = model.network.conditioning.classes
    with torch.no_grad():
        table.weight[-1] = 0
    return model


X = normal(4, 4)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: ClassifierFreeGuidance(mixture(), math.nan), "scale.*nan"),
        (lambda: ClassifierFreeGuidance(mixture(), "2"), "scale.*'2'"),
        (lambda: ClassifierFreeGuidance(mixture(), at(1.0, math.inf)), "scale.*inf"),
        (lambda: ClassifierFreeGuidance(mixture(), 2.0, (5, 0.2)), "interval.*5, 0.2"),
        (lambda: ClassifierFreeGuidance(mixture(), 2.0, 0.2), "interval.*0.2"),
        (lambda: ClassifierFreeGuidance(mixture(), 2.0, drop=()), "drop"),
        (lambda: ClassifierFreeGuidance(network(), 2.0, drop=("labels",)), "drop.*labels"),
        (lambda: ClassifierFreeGuidance(nn.Linear(2, 2), 2.0), "Linear"),
        (lambda: ClassifierFreeGuidance(mixture(), 2.0).noise(X, at(0.3)), "label.*no condition"),
        (
            lambda: ClassifierFreeGuidance(mixture(), at(1.0, 2.0)).noise(
                X, at(0.3), label=LABELS
            ),
            "scale.*4.*2",
        ),
        (lambda: ClassifierFreeGuidance(never_without(), 2.0), "scale.*2.0"),
        (lambda: ClassifierGuidance(mixture(), None, 2.0), "classifier.*NoneType"),
        (
            lambda: ClassifierGuidance(mixture(), network(), 2.0),
            "Classifier .*got ScoreModel; train",
        ),
        (
            lambda: ClassifierGuidance(mixture(), mixture().class_log_prob, 2.0).noise(X, at(0.3)),
            "label.*None",
        ),
        (
            lambda: ClassifierGuidance(mixture(), mixture().class_log_prob, 2.0).noise(
                X, at(0.3), label=torch.tensor([0, 1, 2, 3])
            ),
            "label.*0 to 2.*3",
        ),
        (
            lambda: ClassifierGuidance(mixture(), lambda x, t: x.sum(1), 2.0).noise(
                X, at(0.3), label=LABELS
            ),
            r"classifier.*\(4,\)",
        ),
        (lambda: Autoguidance(mixture(), mixture(VESDE()), 2.0), "weak.*VESDE"),
        (lambda: Rescaled(mixture(), 0.7), "guide.*GaussianMixtureModel"),
        (lambda: Rescaled(ClassifierFreeGuidance(mixture(), 2.0), 1.2), "factor.*1.2"),
        (
            lambda: Rescaled(ClassifierFreeGuidance(mixture(), 2.0), 0.7).noise(
                X, at(0.3), label=LABELS
            ),
            "16.*4",
        ),
        (lambda: Projected(ClassifierFreeGuidance(mixture(), 2.0), norm=0.0), "norm.*0.0"),
        (lambda: Projected(ClassifierFreeGuidance(mixture(), 2.0), math.nan), "eta.*nan"),
    ],
)
def test_what_has_no_meaning_is_refused(use, message):
    with pytest.raises(InputError, match=message):
        use()


def test_zero_and_one_need_nothing_else_learned():
    for scale in (0.0, 1.0, at(0.0, 1.0)):
        ClassifierFreeGuidance(never_without(), scale)
    ClassifierFreeGuidance(ScoreModel(MLP(4, width=8, classes=3), VPSDE()), 2.0)  # untrained
