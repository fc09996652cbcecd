"""The Runge-Kutta methods with one step size for each example, against exact solutions."""

import itertools
import math

import pytest
import torch

from scoresde import InputError, SolverError
from scoresde.shapes import expand
from scoresde.solvers import (
    AdaptiveODE,
    BogackiShampine,
    DormandPrince,
    TorchDiffEq,
    Tsitouras,
)

PAIRS = [DormandPrince(), Tsitouras(), BogackiShampine()]

each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: type(pair).__name__)


def weights(pair):
    """The nodes, the matrix, and the weights of the two solutions, of all stages."""
    n = len(pair.error)
    a = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(pair.matrix):
        a[i + 1, : len(row)] = torch.tensor(row, dtype=torch.float64)
    c = torch.tensor([0.0, *pair.nodes], dtype=torch.float64)
    b = a[-1]
    return c, a, b, b - torch.tensor(pair.error, dtype=torch.float64)


def conditions(c, a, b):
    """The left-hand sides minus the right-hand sides of the order conditions, by order."""
    ac, ac2 = a @ c, a @ c**2
    return {
        1: [b.sum() - 1],
        2: [b @ c - 1 / 2],
        3: [b @ c**2 - 1 / 3, b @ ac - 1 / 6],
        4: [b @ c**3 - 1 / 4, b @ (c * ac) - 1 / 8, b @ ac2 - 1 / 12, b @ (a @ ac) - 1 / 24],
        5: [
            b @ c**4 - 1 / 5,
            b @ (c**2 * ac) - 1 / 10,
            b @ ac**2 - 1 / 20,
            b @ (c * ac2) - 1 / 15,
            b @ (a @ c**3) - 1 / 20,
            b @ (c * (a @ ac)) - 1 / 30,
            b @ (a @ (c * ac)) - 1 / 40,
            b @ (a @ ac2) - 1 / 60,
            b @ (a @ (a @ ac)) - 1 / 120,
        ],
    }


def turning(t, state):
    """y' = cos(t) (-y_2, y_1): a rotation by sin(t), which depends on time."""
    (y,) = state
    return (expand(torch.cos(t).to(y), y) * torch.stack((-y[:, 1], y[:, 0]), 1),)


def turned(y, t):
    angle = math.sin(t)
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack((c * y[:, 0] - s * y[:, 1], s * y[:, 0] + c * y[:, 1]), 1)


def start(n=1, dtype=torch.float64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Springs:
    """y'' = -w^2 y for each example with its own frequency; it counts and can be taken apart."""

    def __init__(self, frequencies, sizes=None):
        self.w = frequencies
        self.sizes = [] if sizes is None else sizes

    def __call__(self, t, state):
        (y,) = state
        self.sizes.append(len(y))
        return (torch.stack((y[:, 1], -(self.w**2) * y[:, 0]), 1),)

    def take(self, rows):
        return Springs(self.w[rows], self.sizes)


# --- The coefficients ----------------------------------------------------------------------------


@each_pair
def test_the_rows_add_up_to_their_nodes(pair):
    c, a, _, _ = weights(pair)
    torch.testing.assert_close(a.sum(1), c, rtol=0, atol=1e-14)


@each_pair
def test_both_solutions_meet_their_order_conditions(pair):
    c, a, b, low = weights(pair)
    for order, values in conditions(c, a, b).items():
        if order <= pair.order:
            assert max(abs(float(v)) for v in values) < 1e-14, order
    for order, values in conditions(c, a, low).items():
        if order < pair.order:
            assert max(abs(float(v)) for v in values) < 1e-14, order


@each_pair
def test_the_lower_solution_is_of_lower_order(pair):
    c, a, _, low = weights(pair)
    assert max(abs(float(v)) for v in conditions(c, a, low)[pair.order]) > 1e-4


@each_pair
def test_the_order_on_an_exact_flow(pair):
    y, errors = start(3), []
    counts = (8, 16, 32, 64)
    for n in counts:
        grid = torch.linspace(0, 2, n + 1, dtype=torch.float64).expand(3, -1)
        (end,) = pair.replay(turning, (y,), grid)[-1]
        errors.append(float((end - turned(y, 2.0)).norm()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] > pair.order - 0.15


# --- Tolerance and independence ------------------------------------------------------------------


@each_pair
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_the_error_follows_the_tolerance(pair, tolerance):
    y = start(4)
    (end,) = AdaptiveODE(tolerance, tolerance, pair)(turning, (y,), 0.0, 3.0).state
    assert float((end - turned(y, 3.0)).abs().max()) < 10 * tolerance


@each_pair
def test_backwards_is_the_inverse(pair):
    y, solver = start(4), AdaptiveODE(1e-9, 1e-9, pair)
    (there,) = solver(turning, (y,), 0.2, 1.0).state
    (back,) = solver(turning, (there,), 1.0, 0.2).state
    torch.testing.assert_close(back, y, rtol=0, atol=1e-7)


@pytest.mark.parametrize("pack", [True, False])
def test_an_example_is_the_same_in_any_batch(pack):
    """To the last digit: nothing of one example enters another."""
    w = torch.linspace(1, 60, 7, dtype=torch.float64)
    solver, y = AdaptiveODE(1e-6, 1e-6, DormandPrince(pack=pack)), start(7)

    def solve(rows):
        field = Springs(w[rows])
        return solver(field, (y[rows],), 0.0, 1.0, take=field.take)

    whole = solve(torch.arange(7))
    for rows in ([3], [6, 0], [5, 4, 3, 2, 1, 0, 6]):
        part = solve(torch.tensor(rows))
        assert torch.equal(part.state[0], whole.state[0][rows])
        assert torch.equal(part.evaluations, whole.evaluations[rows])


def test_a_slow_example_costs_less_than_a_fast_one():
    field = Springs(torch.tensor([1.0, 100.0], dtype=torch.float64))
    count = AdaptiveODE(1e-6, 1e-6)(field, (start(2),), 0.0, 1.0).evaluations
    assert count[0] * 5 < count[1]


def test_the_evaluations_are_counted_truly():
    field = Springs(torch.tensor([1.0, 50.0], dtype=torch.float64))
    count = AdaptiveODE()(field, (start(2),), 0.0, 1.0).evaluations
    assert len(field.sizes) == int(count.max())
    assert count.dtype == torch.int64


def test_examples_at_their_end_stop_costing():
    w = torch.tensor([1.0, 1.0, 1.0, 100.0], dtype=torch.float64)
    field = Springs(w)
    solution = AdaptiveODE(1e-6, 1e-6)(field, (start(4),), 0.0, 1.0, take=field.take)
    assert sum(field.sizes) < 1.3 * int(solution.evaluations.sum())
    assert sorted(set(field.sizes), reverse=True) == [*field.sizes[:1], 1]


@pytest.mark.parametrize("method", [DormandPrince(pack=False), DormandPrince()])
def test_without_packing_or_parts_the_batch_keeps_its_size(method):
    field = Springs(torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64))
    take = None if method.pack else field.take
    AdaptiveODE(method=method)(field, (start(3),), 0.0, 1.0, take=take)
    assert set(field.sizes) == {3}


def test_each_part_of_the_state_keeps_its_own_tolerance():
    """One number beside a thousand still ones is not averaged away."""

    def field(t, state):
        return (torch.zeros_like(state[0]), 30 * torch.cos(30 * t)[:, None])

    state = (torch.ones(1, 1000).double(), torch.zeros(1, 1).double())
    _, y = AdaptiveODE(1e-6, 1e-6)(field, state, 0.0, 1.0).state
    assert float((y - math.sin(30)).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_are_float64_whatever_the_state(dtype):
    seen = set()

    def field(t, state):
        seen.add(t.dtype)
        return state

    (y,) = AdaptiveODE()(field, (start(2, dtype),), 0.0, 1.0).state
    assert (seen, y.dtype) == ({torch.float64}, dtype)


def test_data_of_any_shape():
    shapes = [(2, 3, 4), (2,), (2, 1)]
    state = tuple(torch.ones(shape, dtype=torch.float64) for shape in shapes)
    end = AdaptiveODE(1e-8, 1e-8)(lambda t, s: s, state, 0.0, 1.0).state
    assert [tuple(y.shape) for y in end] == shapes
    for y in end:
        torch.testing.assert_close(y, torch.full_like(y, math.e), rtol=1e-6, atol=0)


# --- Recorded steps ------------------------------------------------------------------------------


@each_pair
def test_a_recorded_walk_ends_where_the_solution_does(pair):
    field, y = Springs(torch.tensor([1.0, 9.0, 60.0], dtype=torch.float64)), start(3)
    solution = AdaptiveODE(1e-6, 1e-6, pair)(field, (y,), 0.9, 0.1, take=field.take, record=True)
    assert bool((solution.grid[:, 0] == 0.9).all() and (solution.grid[:, -1] == 0.1).all())
    assert bool((solution.grid.diff(dim=1) <= 0).all())
    (end,) = pair.replay(field, (y,), solution.grid)[-1]
    torch.testing.assert_close(end, solution.state[0], rtol=1e-12, atol=1e-12)


# --- Failures ------------------------------------------------------------------------------------


def broken(t, state):
    """Examples 1 and 2 meet something that is not a number after t = 0.5."""
    (y,) = state
    bad = torch.tensor([False, True, True, False])[:, None] & (t[:, None] > 0.5)
    return (torch.where(bad, math.nan, -y),)


def test_a_failure_names_the_example_and_the_time():
    with pytest.raises(SolverError, match=r"not finite in example 1 \(1 more failed\) near t = 0"):
        AdaptiveODE()(broken, (start(4),), 0.0, 1.0)


def test_on_request_the_others_survive():
    y = start(4)
    solution = AdaptiveODE(strict=False)(broken, (y,), 0.0, 1.0)
    assert solution.failed.tolist() == [False, True, True, False]
    good = ~solution.failed
    torch.testing.assert_close(solution.state[0][good], y[good] / math.e, rtol=1e-4, atol=1e-4)
    assert bool(solution.state[0][solution.failed].isnan().all())


@pytest.mark.parametrize("begin", [0.0, 0.7])
def test_a_failing_example_does_not_change_the_others(begin):
    y = start(4)
    with_them = AdaptiveODE(strict=False)(broken, (y,), begin, 1.0)
    alone = AdaptiveODE()(lambda t, s: (-s[0],), (y,), begin, 1.0)
    good = ~with_them.failed
    assert torch.equal(with_them.state[0][good], alone.state[0][good])


def test_a_step_size_that_vanishes_is_reported():
    """y' = 1 / (1 - t) meets a pole on the way."""
    with pytest.raises(SolverError, match=r"near t = (1|0\.99)"):
        AdaptiveODE()(lambda t, s: (s[0] ** 2,), (torch.ones(2, 1).double(),), 0.0, 2.0)


def test_too_many_steps_are_flagged_for_the_examples_that_take_them():
    field = Springs(torch.tensor([1.0, 200.0], dtype=torch.float64))
    solver = AdaptiveODE(1e-6, 1e-6, max_steps=20, strict=False)
    assert solver(field, (start(2),), 0.0, 1.0).failed.tolist() == [False, True]


def test_recording_needs_a_method_that_keeps_its_steps():
    with pytest.raises(InputError, match=r"method.*TorchDiffEq"):
        AdaptiveODE(method=TorchDiffEq())(turning, (start(),), 0.0, 1.0, record=True)


def test_methods_are_values():
    assert DormandPrince() == DormandPrince(pack=True) != DormandPrince(pack=False)
    assert AdaptiveODE(method=Tsitouras()) == AdaptiveODE(method=Tsitouras())
