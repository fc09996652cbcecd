"""The mixture with classes: every conditional quantity against the closed form."""

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianMixtureModel, InputError, Likelihood, RectifiedFlow
from scoresde.guidance import Clipped
from scoresde.sample import DDIM, ProbabilityFlow, UniPC
from scoresde.times import LogSNRGrid

SDES = [VPSDE(), VESDE(0.01, 20.0), RectifiedFlow()]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
LABELS = torch.tensor([0, 1, 0, 2, 1, 2])
WEIGHTS = torch.tensor([0.1, 0.2, 0.15, 0.25, 0.2, 0.1], dtype=torch.float64)
STDS = torch.linspace(0.2, 0.8, 6, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


MEANS = 2 * normal(6, 3, seed=4)


def mixture(sde):
    return GaussianMixtureModel(WEIGHTS, MEANS, STDS, sde, labels=LABELS)


def alone(sde, c):
    """The mixture of one class's components, as a model of its own."""
    own = c == LABELS
    return GaussianMixtureModel(WEIGHTS[own], MEANS[own], STDS[own], sde)


def each(c, n):
    return torch.full((n,), c)


@each_sde
@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("view", ["score", "noise", "denoise", "velocity", "log_prob"])
@pytest.mark.parametrize("c", [0, 1, 2])
def test_a_class_is_the_mixture_of_its_components(view, c, t, sde):
    x, time = 2 * normal(5, 3), torch.tensor(t).double()
    ours = getattr(mixture(sde), view)(x, time, label=each(c, 5))
    torch.testing.assert_close(ours, getattr(alone(sde, c), view)(x, time))


@each_sde
@pytest.mark.parametrize("view", ["score", "noise", "denoise", "velocity", "log_prob"])
def test_no_class_is_the_whole_and_rows_have_their_own(view, sde):
    model, x, t = mixture(sde), 2 * normal(5, 3), torch.tensor(0.3).double()
    whole = getattr(model, view)(x, t)
    torch.testing.assert_close(getattr(model, view)(x, t, label=each(-1, 5)), whole)
    mixed = getattr(model, view)(x, t, label=torch.tensor([2, -1, 0, 1, 2]))
    torch.testing.assert_close(mixed[1], whole[1])
    torch.testing.assert_close(mixed[4:], getattr(model, view)(x[4:], t, label=each(2, 1)))


@each_sde
def test_classes_add_up_and_bayes_rule_holds(sde):
    model, x = mixture(sde), 2 * normal(40, 3)
    prior = torch.stack([WEIGHTS[c == LABELS].sum() for c in range(3)])
    given = torch.stack([model.log_prob(x, 0.2, label=each(c, 40)) for c in range(3)], 1)
    joint = given + prior.log()
    torch.testing.assert_close(
        torch.logsumexp(joint, 1), model.log_prob(x, 0.2), rtol=1e-12, atol=1e-12
    )
    posterior = model.class_log_prob(x, 0.2)
    torch.testing.assert_close(posterior, torch.log_softmax(joint, 1), rtol=1e-12, atol=1e-12)
    assert model.classes == 3


@each_sde
def test_samples_of_a_class_have_its_mean_and_covariance(sde):
    """Within four standard errors of 20 000 samples."""
    n = 20_000
    ours = mixture(sde).sample(n, 0.1, seed=0, label=each(1, n))
    truth = alone(sde, 1).sample(n, 0.1, seed=1)
    error = (ours.var(0) + truth.var(0)).sqrt() / n**0.5
    assert float(((ours.mean(0) - truth.mean(0)) / error).abs().max()) < 4
    scale = ours.std(0)
    gap = (ours.T.cov() - truth.T.cov()) / torch.outer(scale, scale)
    assert float(gap.abs().max()) < 4 * 2 / n**0.5


def test_a_labelled_sample_depends_on_its_own_stream_and_label():
    model = mixture(VPSDE())
    together = model.sample(5, seed=3, label=torch.tensor([0, 1, 2, -1, 0]))
    assert torch.equal(model.sample(5, seed=3, label=each(-1, 5))[3], together[3])
    assert torch.equal(model.sample(5, seed=3), model.sample(5, seed=3, label=each(-1, 5)))
    assert torch.equal(model.sample(5, seed=3, label=each(0, 5))[4], together[4])


@each_sde
def test_samplers_and_likelihoods_take_the_label(sde):
    """Each row, in a batch of several classes, is what the class's own model gives."""
    model, label = mixture(sde), torch.tensor([0, 1, 2, 1])
    for sampler in (DDIM(10), UniPC(10, LogSNRGrid()), ProbabilityFlow(1e-6, 1e-6)):
        x = sampler(model, (4, 3), seed=0, label=label).x
        for i, c in enumerate(label.tolist()):
            own = sampler(alone(sde, c), (1, 3), seed=0, seeds=[i]).x
            torch.testing.assert_close(x[i : i + 1], own, rtol=0, atol=1e-5)
    points, exactly = 2 * normal(4, 3), Likelihood("exact", rtol=1e-7, atol=1e-7)
    values = exactly(model, points, label=label).log_prob
    for i, c in enumerate(label.tolist()):
        own = exactly(alone(sde, c), points[i : i + 1]).log_prob
        torch.testing.assert_close(values[i : i + 1], own, rtol=0, atol=1e-5)


def test_a_changed_model_hands_the_label_on():
    model, x, t = mixture(VPSDE()), normal(4, 3), torch.tensor(0.3)
    wide = Clipped(model, -100.0, 100.0)
    torch.testing.assert_close(
        wide.noise(x, t, label=each(1, 4)), model.noise(x, t, label=each(1, 4))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianMixtureModel([1, 1], normal(2, 3), [1, 1], VPSDE(), labels=[0]),
            "labels",
        ),
        (lambda: GaussianMixtureModel([1, 1], normal(2, 3), [1, 1], VPSDE(), labels=[0, 2]), "2"),
        (
            lambda: GaussianMixtureModel([1, 1], normal(2, 3), [1, 1], VPSDE(), labels=[0, -1]),
            "-1",
        ),
        (lambda: GaussianMixtureModel([1], normal(1, 3), [1], VPSDE(), labels=[0.0]), "labels"),
        (lambda: mixture(VPSDE()).log_prob(normal(2, 3), 0.1, label=each(3, 2)), "3"),
        (lambda: mixture(VPSDE()).log_prob(normal(2, 3), 0.1, label=each(1.0, 2)), "float"),
        (lambda: alone(VPSDE(), 0).log_prob(normal(2, 3), 0.1, label=each(0, 2)), "labels="),
        (lambda: alone(VPSDE(), 0).class_log_prob(normal(2, 3)), "labels="),
    ],
)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
