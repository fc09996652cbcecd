"""Integrators against solutions known exactly."""

import math
from itertools import pairwise

import pytest
import torch

from scoresde import VESDE, VPSDE, GaussianModel, InputError, SolverError, SubVPSDE
from scoresde.model import Conditioned
from scoresde.shapes import expand
from scoresde.solvers import AdaptiveODE, Increments, SDESolver
from scoresde.solvers.ode import METHODS
from scoresde.streams import Streams

SDES = [VPSDE(), SubVPSDE(), VESDE()]
STOCHASTIC = [
    *("euler", "milstein", "srk", "euler_heun", "heun", "midpoint"),
    *("log_ode", "reversible_heun"),
]


def decay(t, state):
    """dy/dt = -2 t y, so that y = y_0 exp(-t^2): it depends on time."""
    return tuple(-2 * expand(t.to(y), y) * y for y in state)


def solve(solver, *arguments):
    return solver(*arguments).state


def start(dtype=torch.float64):
    return torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype)


class Recorder:
    """A field that remembers the times at which it was called."""

    def __init__(self, field):
        self.field = field
        self.times = []

    def __call__(self, t, state):
        self.times += t.reshape(-1).tolist()
        return self.field(t, state)


# --- Ordinary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.5), (1.5, 0.0)])
def test_the_solution_is_within_the_tolerance(begin, end, method):
    (y,) = solve(AdaptiveODE(1e-5, 1e-5, method), decay, (start(),), begin, end)
    truth = start() * math.exp(begin**2 - end**2)
    scale = max(float(start().abs().max()), float(truth.abs().max()))
    assert float((y - truth).abs().max()) < 3e-4 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_keeps_its_type(dtype):
    (y,) = solve(AdaptiveODE(), decay, (start(dtype),), 0.0, 1.0)
    assert y.dtype == dtype


def test_the_error_falls_with_the_tolerance():
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        (y,) = solve(AdaptiveODE(tolerance, tolerance), decay, (start(),), 0.0, 1.5)
        errors.append(float((y - start() * math.exp(-(1.5**2))).abs().max()))
    assert all(error < 10 * 10**-k for error, k in zip(errors, (3, 5, 7, 9), strict=True))
    assert errors == sorted(errors, reverse=True)


def test_all_parts_of_the_state_are_solved():
    a, b = solve(AdaptiveODE(1e-7, 1e-7), decay, (start(), start()[:, :1]), 0.0, 1.0)
    torch.testing.assert_close(a, start() / math.e, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b, start()[:, :1] / math.e, rtol=1e-6, atol=1e-6)


def test_every_example_keeps_the_tolerance():
    """A fast example among a thousand slow ones is not averaged away."""
    rates = torch.full((1000, 1), 0.01, dtype=torch.float64)
    rates[17] = 30.0
    (y,) = solve(
        AdaptiveODE(1e-6, 1e-6), lambda t, s: (-rates * s[0],), (torch.ones_like(rates),), 0, 1
    )
    assert float((y - torch.exp(-rates)).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("begin", "end"),
    [(1.0, 1e-3), (1e-3, 1.0), (0.3, 0.3 + 1e-6), (1.0, 1 - 1e-6), (1e-5, 2e-5)],
)
def test_the_field_is_never_called_outside_of_the_times(begin, end, method, dtype):
    field = Recorder(decay)
    AdaptiveODE(method=method)(field, (start(dtype),), begin, end)
    assert min(begin, end) <= min(field.times)
    assert max(field.times) <= max(begin, end)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("forwards", [True, False])
def test_the_probability_flow_is_that_of_the_gaussian(forwards, sde):
    exact = GaussianModel(torch.tensor([1.0, -1.0]).double(), torch.tensor([0.1, 2.0]), sde)
    begin, end = (1e-3, 1.0) if forwards else (1.0, 1e-3)
    x, field = exact.sample(8, begin, seed=0), Conditioned(exact)
    (y,) = solve(
        AdaptiveODE(1e-7, 1e-7), lambda t, s: (field.velocity(s[0], t),), (x,), begin, end
    )
    torch.testing.assert_close(y, exact.flow(x, begin, end), rtol=5e-6, atol=5e-6)


def test_a_short_interval_is_solved():
    (y,) = solve(AdaptiveODE(), lambda t, s: (s[0],), (start(),), 0.5, 0.5 + 1e-9)
    torch.testing.assert_close(y - start(), 1e-9 * start(), rtol=1e-5, atol=0)


def test_the_watch_sees_every_step_on_the_way():
    seen = []
    y = start()[:1]
    AdaptiveODE()(decay, (y,), 1.0, 0.2, lambda t, state: seen.append((float(t), state)))
    times = [t for t, _ in seen]
    assert times[-1] == 0.2
    assert times[0] == 1.0
    assert times == sorted(times, reverse=True)
    for t, (state,) in seen:
        torch.testing.assert_close(state, y * math.exp(1 - t**2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_turns_bad_is_reported_with_the_time(method, bad):
    def field(t, state):
        return (torch.where(expand(t, state[0]) > 0.5, bad, -state[0]),)

    with pytest.raises(SolverError, match=r"near t = (0\.[5-9]|1\.)"):
        AdaptiveODE(method=method)(field, (start(),), 0.0, 1.0)


@pytest.mark.parametrize(("begin", "end"), [(0.25, 1.0), (0.25, 0.0)])
def test_a_field_that_is_bad_from_the_start_is_reported_with_the_time(begin, end):
    with pytest.raises(SolverError, match=r"near t = 0\.25"):
        AdaptiveODE()(lambda t, state: (math.nan * state[0],), (start(),), begin, end)


def test_a_bad_example_is_reported():
    def field(t, state):
        return (
            torch.where(torch.tensor([[False], [True]]) & (t[:, None] > 0.5), math.nan, -state[0]),
        )

    with pytest.raises(SolverError, match="not finite"):
        AdaptiveODE()(field, (start(),), 0.0, 1.0)


def test_no_time_that_is_not_finite_reaches_the_field():
    field = Recorder(lambda t, state: (math.nan * state[0],))
    with pytest.raises(SolverError):
        AdaptiveODE()(field, (start(),), 0.0, 1.0)
    assert all(math.isfinite(t) for t in field.times)


def test_a_solution_that_blows_up_is_reported_where_it_does():
    with pytest.raises(SolverError, match=r"near t = (1|0\.99)"):
        AdaptiveODE()(lambda t, s: (s[0] ** 2,), (torch.ones(1, 1).double(),), 0.0, 2.0)


def test_too_many_steps_are_reported():
    with pytest.raises(SolverError, match=r"more than 5 steps in example 0 .*near t = 0"):
        AdaptiveODE(max_steps=5)(lambda t, s: (-50 * s[0],), (start(),), 0.0, 1.0)


@pytest.mark.parametrize("arguments", [{"rtol": 0.0}, {"atol": -1e-5}, {"rtol": math.nan}])
def test_unusable_tolerances_are_refused(arguments):
    with pytest.raises(InputError, match="rtol="):
        AdaptiveODE(**arguments)


def test_an_unknown_method_is_refused_and_the_known_ones_named():
    with pytest.raises(InputError, match="'rk4' is not one of dopri5"):
        AdaptiveODE(method="rk4")


# --- Brownian increments -------------------------------------------------------------------------

N = 10_000


def increments(draws=1, dtype=torch.float64):
    brownian = Increments().start(Streams.of(0, batch=N), 2, dtype)
    ends = torch.linspace(0.5, 0.5 + 0.3 * draws, draws + 1, dtype=torch.float64)
    return [brownian(a, b, return_U=True) for a, b in pairwise(ends)]


def test_increments_and_their_integrals_have_the_right_covariance():
    h = 0.3
    ((w, u),) = increments()
    truth = torch.tensor([[h, h**2 / 2], [h**2 / 2, h**3 / 3]], dtype=torch.float64)
    scale = truth.diagonal().sqrt()
    error = torch.cov(torch.stack((w.flatten(), u.flatten()))) - truth
    assert float((error / torch.outer(scale, scale)).abs().max()) < 4 * (2 / w.numel()) ** 0.5


def test_increments_of_disjoint_intervals_are_independent():
    (w, u), (later_w, later_u) = increments(2)
    rows = torch.stack([part.flatten() for part in (w, u, later_w, later_u)])
    assert float(torch.corrcoef(rows)[:2, 2:].abs().max()) * w.numel() ** 0.5 < 4


def test_increments_are_centred():
    ((w, u),) = increments()
    for part in (w, u):
        assert abs(float(part.mean() / part.std())) * part.numel() ** 0.5 < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_increments_have_the_shape_and_type_asked_for(dtype):
    brownian = Increments().start(Streams.of(0, batch=3), 2, dtype)
    w = brownian(torch.tensor(0.0), torch.tensor(0.5))
    assert (w.shape, w.dtype, brownian.shape, brownian.dtype) == ((3, 2), dtype, (3, 2), dtype)


# --- Stochastic ----------------------------------------------------------------------------------


def ornstein_uhlenbeck(method, steps=50, n=1, sigma=1.0, counter=None):
    """dy = -y dt + sigma dw from y = 2 over one unit of time."""

    def drift(t, y):
        if counter is not None:
            counter.append(1)
        return -y

    return SDESolver(steps, method)(
        drift,
        lambda t: torch.full((), sigma, dtype=torch.float64),
        torch.full((n, 1), 2.0, dtype=torch.float64),
        1.0,
        Streams.of(0, batch=n),
    )


@pytest.mark.parametrize("method", STOCHASTIC)
def test_every_stochastic_method_has_the_right_moments(method):
    n = 4000
    y = ornstein_uhlenbeck(method, 20, n)
    mean, std = 2 / math.e, math.sqrt((1 - math.exp(-2)) / 2)
    discretisation = 0.5 / 20  # first order: (1 - h)^(1/h) is short of 1/e by h / 2 of it
    assert float(y.mean()) == pytest.approx(mean, abs=4 * std / n**0.5 + mean * discretisation)
    assert float(y.std()) == pytest.approx(std, rel=4 / (2 * n) ** 0.5 + discretisation)


@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("milstein", 1), ("euler_heun", 1), ("heun", 2), ("midpoint", 2), ("srk", 1)],
)
def test_without_noise_every_method_has_its_order(method, order):
    errors = [
        abs(float(ornstein_uhlenbeck(method, steps, sigma=1e-30)) - 2 / math.e)
        for steps in (16, 64)
    ]
    assert math.log(errors[0] / errors[1], 4) > order - 0.1


@pytest.mark.parametrize("steps", [1, 7, 30, 100])
def test_the_number_of_steps_is_exact(steps):
    calls = []
    ornstein_uhlenbeck("euler", steps, counter=calls)
    assert len(calls) == steps


def test_images_are_solved_as_vectors():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    y = SDESolver(10)(lambda t, x: -x, lambda t: torch.zeros(()), x, 1.0, Streams.of(0, batch=2))
    torch.testing.assert_close(y, x * 0.9**10)


@pytest.mark.parametrize("steps", [0, -3, 2.5, math.nan])
def test_unusable_steps_are_refused(steps):
    with pytest.raises(InputError, match=rf"steps.*{steps}"):
        SDESolver(steps)


def test_an_unknown_stochastic_method_is_refused():
    with pytest.raises(InputError, match="'rk4' is not one of euler"):
        SDESolver(10, "rk4")
