"""Stochastic interpolants: the laws of jointly Gaussian ends, and what two networks learn."""

import functools
import itertools
import math

import pytest
import torch

from scoresde import VPSDE, InputError
from scoresde.loss import InterpolantMatching
from scoresde.model import GaussianBridge, InterpolantModel
from scoresde.nn import MLP
from scoresde.sample import InterpolantSDE, ProbabilityFlow
from scoresde.sde import InDI, StandardNormal, StochasticInterpolant, derivative
from scoresde.train import Replicated, Training, Update

JOINT = torch.tensor([[1.0, 0.8], [0.8, 0.89]], dtype=torch.float64)
ZERO = torch.zeros(2, 1).double()


def pairs(scale=1.0, joint=JOINT):
    return GaussianBridge(ZERO, joint, StochasticInterpolant(scale))


def variance(model, steps, epsilon):
    """The variance at t = 0 by the sampler's own recursion, which is linear in one dimension."""
    times, v = torch.linspace(1, 0, steps + 1, dtype=torch.float64), float(model.covariance[1, 1])
    for t, s in itertools.pairwise(times):
        h = float(t - s)
        slope = float(model.reverse_drift(torch.ones(1, 1).double(), t, epsilon))
        v = (1 - h * slope) ** 2 * v + 2 * epsilon * h
    return v


def test_stated_rates_are_derivatives():
    process, t = StochasticInterpolant(0.7), torch.linspace(0.02, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(
        process.gamma_rate(t), derivative(process.gamma, t) * process.gamma(t)
    )
    torch.testing.assert_close(process.sigma_dot(t), derivative(process.sigma, t))
    torch.testing.assert_close(process.alpha_dot(t), derivative(process.alpha, t))


@pytest.mark.parametrize(("epsilon", "most"), [(0.0, 8e-4), (1.0, 1e-3)])
def test_the_variance_of_a_thousand_steps(epsilon, most):
    """Without any cut-off an error of 7e-4 for the ODE, and of order 1 in the steps for both."""
    errors = [abs(variance(pairs(), n, epsilon) - 1) for n in (500, 1000)]
    assert errors[1] < most
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("end", [False, True], ids=["pairs", "noise"])
def test_draws_have_the_law_of_the_data(epsilon, end):
    """Four standard errors of 20000 draws, and the bias that the recursion states."""
    n, steps = 20_000, 60
    joint = torch.tensor([[0.5, 0.0], [0.0, 1.0]], dtype=torch.float64) if end else JOINT
    process = StochasticInterpolant(0.8, StandardNormal()) if end else StochasticInterpolant(0.8)
    model = GaussianBridge(ZERO, joint, process)
    cond = {} if end else {"source": model.sample(n, seed=0)[1]}
    x = InterpolantSDE(steps, epsilon, eps=0.0)(model, (n, 1), seed=1, **cond).x
    right = variance(model, steps, epsilon)
    assert float(x.var()) == pytest.approx(right, rel=4 * math.sqrt(2 / n) + 1e-3)
    assert float(x.mean()) == pytest.approx(0, abs=4 * math.sqrt(right / n))
    assert right == pytest.approx(float(joint[0, 0]), rel=0.05)


def test_velocity_and_denoised_estimate_follow_from_difference_and_score():
    exact, t = pairs(0.6), torch.tensor([0.0, 0.3, 1.0]).double()

    def difference(x, c):
        t = c / 4
        return exact.velocity(x, t) + (0.36 * (0.5 - t))[:, None] * exact.score(x, t)

    model = InterpolantModel(difference, lambda x, c: exact.score(x, c / 4), exact.process)
    x = torch.tensor([[0.4], [-1.0], [0.7]]).double()
    for one, other in ((model.velocity, exact.velocity), (model.denoise, exact.denoise)):
        torch.testing.assert_close(one(x, t), other(x, t))
    found, right = (m.reverse_drift(x, t, 0.3) for m in (model, exact))
    torch.testing.assert_close(found, right)
    assert bool(found.isfinite().all())


def test_two_networks_learn_both_together():
    """300 updates on correlated pairs: the law of the data within a tenth, for all samplers."""
    torch.manual_seed(0)
    networks = [MLP(1, width=32, depth=1) for _ in range(2)]
    model = InterpolantModel(*networks, StochasticInterpolant(0.7))
    x, y = (part.float() for part in pairs().sample(4096, seed=0))
    make = functools.partial(torch.optim.Adam, lr=5e-3)
    update = Update(
        model, InterpolantMatching(), Training(steps=300, ema=0.98), make, Replicated()
    )
    for step in range(300):
        rows = (torch.arange(128) + 128 * step) % 4096
        update(x[rows], {"source": y[rows]}, step, 128)
    assert set(update.parts) == {"velocity_error", "noise_error"}
    trained = update.averages[0].model
    source = y[:2000]
    drawn = [
        InterpolantSDE(60, 1.0)(trained, (2000, 1), seed=2, source=source),
        InterpolantSDE(60, 0.0, final_denoise=True)(trained, (2000, 1), seed=2, source=source),
        ProbabilityFlow(rtol=1e-3, atol=1e-3)(trained, (2000, 1), seed=0, source=source),
    ]
    assert drawn[0].nfe.tolist() == [120] * 2000
    for found in drawn:
        assert float(found.x.std()) == pytest.approx(1, abs=0.1)
        assert abs(float(found.x.mean())) < 0.12


def test_the_loss_at_the_ends_has_a_bounded_variance():
    """Its targets are finite there, where c' z is not: all times, without a cut-off."""
    model = InterpolantModel(lambda x, c: 0 * x, lambda x, c: 0 * x, StochasticInterpolant())
    x, y = pairs().sample(1000, seed=0)
    for t in (0.0, 1e-12, 1.0):
        terms = InterpolantMatching()(model, x, torch.tensor(t).double(), seed=0, source=y)
        expected = 1 + (1 + 0.89 - 1.6)
        assert float(terms.mean()) == pytest.approx(expected, abs=5 * float(terms.std()) / 31)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: StochasticInterpolant(0.0), "scale.*0.0"),
        (lambda: StochasticInterpolant(1.0, "noise"), "end.*noise"),
        (lambda: InterpolantSDE(diffusion=-1.0), "diffusion.*-1.0"),
        (lambda: InterpolantSDE(0), "steps.*0"),
        (lambda: InterpolantModel(None, None, VPSDE()), "process.*VPSDE"),
        (lambda: InterpolantSDE()(GaussianBridge(ZERO, JOINT, InDI()), (2, 1)), "InDI"),
        (lambda: InterpolantSDE()(pairs(), (2, 1), seed=0), "source.*None"),
        (lambda: InterpolantMatching()(pairs(), torch.zeros(2, 1), seed=0), "InterpolantModel"),
    ],
)
def test_misuse_is_a_sentence(act, words):
    with pytest.raises(InputError, match=words):
        act()
