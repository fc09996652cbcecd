"""Formulas of docs/theory/flows_and_bridges.md, against closed forms and autograd."""

import numpy as np
import pytest
import torch

from scoresde import (
    FlowMatching,
    GaussianModel,
    RectifiedFlow,
    ScoreModel,
    VelocityParametrisation,
)
from scoresde.loss import InterpolantMatching, Paired
from scoresde.model import BridgeModel, GaussianBridge, InterpolantModel, ResidualOutput
from scoresde.sde import (
    Brownian,
    BrownianPin,
    Constant,
    InDI,
    NoiseLaw,
    StochasticInterpolant,
)
from tests.theory import at, normal

JOINT = torch.tensor([[1.0, 0.8], [0.8, 0.89]], dtype=torch.float64)
ZERO = torch.zeros(2, 1, dtype=torch.float64)


# --- Flow matching -------------------------------------------------------------------------------


def test_the_loss_is_the_error_of_the_velocity():
    """Any ends: the state and the target on the straight path, by the formula."""
    x0, x1, t = normal(5, 2), 2 + normal(5, 2, seed=1), torch.linspace(0, 1, 5).double()
    model = ScoreModel(lambda x, c: torch.sin(x), RectifiedFlow(), VelocityParametrisation(None))
    state = (1 - t[:, None]) * x0 + t[:, None] * x1
    expected = (torch.sin(state) - (x1 - x0)).square().mean(1)
    torch.testing.assert_close(FlowMatching()(model, x0, t, source=x1), expected)


def test_the_pairs_of_a_flow_cost_less():
    """N(m, s^2) and N(0, 1): m^2 + s^2 + 1 apart, and m^2 + (1 - s)^2 by the flow m + s z."""
    m, s = 0.6, 0.7
    exact = GaussianModel(at(m)[None], s, RectifiedFlow())
    z, w = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(8))
    z, w = z[:, None], w / w.sum()
    x = exact.flow(z, 1.0, 0.0)
    torch.testing.assert_close(x, m + s * z)
    cost = float(w @ (x - z)[:, 0] ** 2)
    independent = m**2 + s**2 + 1
    assert cost == pytest.approx(m**2 + (1 - s) ** 2, rel=1e-9)
    assert cost < independent


def test_pairs_of_a_flow_need_one_step():
    """Of a Gaussian's pairs: E[z - x | x_t] is constant along the straight path of each."""
    m, s, z = 0.6, 0.7, normal(9, 1)
    x = m + s * z
    model = GaussianBridge(at(m, 0.0)[:, None], [[s**2 + 1e-9, s], [s, 1.0]], InDI())
    for t in (0.1, 0.5, 1.0):
        state = (1 - t) * x + t * z
        torch.testing.assert_close(model.velocity(state, at(t)), z - x, rtol=0, atol=1e-5)


# --- Bridges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Constant(0.5), Brownian(0.5), BrownianPin(0.5)], ids=repr)
def test_the_added_noise_keeps_the_marginals(law):
    w, v = at(1.0, 0.7, 0.3), at(0.9, 0.2, 0.01)
    lacking = law.std(v) ** 2 - (v / w * law.std(w)) ** 2
    torch.testing.assert_close(law.added(w, v) ** 2, lacking, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(NoiseLaw.added(law, w, v) ** 2, lacking, rtol=1e-9, atol=1e-12)


def test_the_loss_of_a_bridge():
    x, y, n = normal(4, 2), normal(4, 2, seed=1), normal(4, 2, seed=2)
    t, bridge = at(0.1, 0.4, 0.8, 1.0), InDI(Brownian(0.5))
    model = BridgeModel(lambda x, c: torch.cos(x), bridge, ResidualOutput())
    w = t[:, None]
    state = (1 - w) * x + w * y + 0.5 * w.sqrt() * n
    expected = (state + w * torch.cos(state) - x).square().mean(1)
    torch.testing.assert_close(Paired()(model, x, t, n, source=y), expected)


# --- Stochastic interpolants ---------------------------------------------------------------------


def test_the_loss_of_an_interpolant():
    x, y, z = normal(4, 2), normal(4, 2, seed=1), normal(4, 2, seed=2)
    t, a = at(0.0, 0.2, 0.6, 1.0), 0.7
    model = InterpolantModel(
        lambda x, c: torch.sin(x), lambda x, c: torch.cos(x), StochasticInterpolant(a)
    )
    gamma = a * torch.sqrt(t * (1 - t))[:, None]
    state = (1 - t[:, None]) * x + t[:, None] * y + gamma * z
    first = (torch.sin(state) - (y - x)).square().mean(1)
    second = (gamma * torch.cos(state) + z).square().mean(1)
    torch.testing.assert_close(InterpolantMatching()(model, x, t, z, source=y), first + second)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
def test_every_diffusion_keeps_the_variance(epsilon):
    r"""dV/dt = 2 b V - 2 epsilon for the linear drift b x of the process from t = 1 to 0."""
    model, t = GaussianBridge(ZERO, JOINT, StochasticInterpolant(0.8)), at(0.35)

    def variance(s):
        ends = (1 - s) ** 2 + 1.6 * s * (1 - s) + 0.89 * s**2
        return ends + model.process.gamma(s) ** 2

    one = torch.ones(1, 1, dtype=torch.float64)
    slope = model.reverse_drift(one, t, epsilon)[0, 0]
    right = 2 * slope * variance(t) - 2 * epsilon
    torch.testing.assert_close(torch.func.grad(variance)(t), right)
    torch.testing.assert_close(model.score(one, t)[0, 0], -1 / variance(t))
    rate = model.process.gamma_rate(t)
    difference = (0.8 * (1 - 2 * t) + 0.89 * t - (1 - t)) / variance(t)
    velocity = difference - rate * model.score(one, t)[0, 0]
    torch.testing.assert_close(model.velocity(one, t)[0, 0], velocity)
