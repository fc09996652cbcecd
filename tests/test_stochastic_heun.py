"""Stochastic equations in steps of each example's own."""

import math

import pytest
import torch

from scoresde.errors import SolverError
from scoresde.solvers import StochasticHeun
from scoresde.streams import Streams


def pulled(t, x):
    return -x


def one(t):
    return torch.ones_like(t)


def starts(n=4, d=2):
    return torch.linspace(-2, 2, n * d, dtype=torch.float64).reshape(n, d)


def test_the_law_at_the_end_is_that_of_the_equation():
    """Ornstein and Uhlenbeck's, with many rejections, whose noise must not be lost."""
    n = 4000
    times = []
    out = StochasticHeun(0, 0.02, first_step=1.0)(
        pulled,
        one,
        torch.ones(n, 1).double(),
        1.0,
        Streams.of(0, batch=n),
        callback=lambda t, state: times.append(t),
    )
    x = out.state[0][:, 0]
    variance = 0.5 * (1 - math.exp(-2))
    tried = out.evaluations.double().mean() / 2
    kept = torch.stack(times).diff(dim=0).ne(0).sum(0).double().mean()
    assert float(kept / tried) < 0.95
    assert float(x.mean()) == pytest.approx(math.exp(-1), abs=4 * (variance / n) ** 0.5)
    assert float(x.var()) == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


def test_without_noise_it_is_heuns_method():
    out = StochasticHeun(0, 1e-4)(pulled, torch.zeros_like, starts(), 1.0, Streams.of(0, batch=4))
    torch.testing.assert_close(out.state[0], starts() * math.exp(-1), rtol=1e-3, atol=0)


def test_what_has_ended_is_not_evaluated_any_more():
    sizes = []

    def take(rows):
        speed = torch.tensor([1.0, 1.0, 1.0, 40.0]).double()[rows]

        def drift(t, x):
            sizes.append(len(x))
            return -speed[:, None] * x

        return drift

    streams = Streams.of(0, batch=4)
    solver = StochasticHeun(0, 1e-2)
    packed = solver(take(torch.arange(4)), one, starts(), 0.5, streams, take=take)
    assert (sizes[0], sizes[-1]) == (4, 1)
    whole = solver(take(torch.arange(4)), one, starts(), 0.5, streams)
    torch.testing.assert_close(packed.state[0], whole.state[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(packed.evaluations, whole.evaluations)


def test_a_drift_that_is_not_finite_names_the_example_and_the_time():
    def drift(t, x):
        return torch.where((t > 0.5) & (torch.arange(len(t)) == 2), torch.nan, 0.0)[:, None] * x

    with pytest.raises(SolverError, match=r"not finite in example 2 near t = 0\.[45]"):
        StochasticHeun()(drift, one, starts(), 1.0, Streams.of(0, batch=4))


def test_a_drift_that_jumps_all_the_way_is_given_up():
    def drift(t, x):
        return 1e9 * torch.sign(torch.sin(1e9 * x))

    with pytest.raises(SolverError, match=r"step size of zero|more than"):
        StochasticHeun(0, 1e-9)(drift, one, starts(), 1.0, Streams.of(0, batch=4))


def test_the_number_of_steps_is_limited():
    with pytest.raises(SolverError, match="more than 5 steps in example 0"):
        StochasticHeun(0, 1e-4, max_steps=5)(pulled, one, starts(), 1.0, Streams.of(0, batch=4))
