"""Operators: transposes, pseudo-inverses, and observations in raw and in model units."""

import math

import pytest
import torch

from scoresde import InputError
from scoresde.codec import Affine
from scoresde.operators import (
    Blur,
    Downsampling,
    Fourier,
    Grey,
    Linear,
    LinearOperator,
    Masking,
    NonLinear,
    Observation,
    RandomProjection,
)
from scoresde.streams import Purpose, Streams

IMAGE, LINE, VOLUME = (3, 4, 6), (3, 8), (3, 2, 4, 2)


def draw(shape, batch=2, number=0, dtype=torch.float64):
    return Streams.of(1, batch=batch).normal(tuple(shape), Purpose.DATA, number, dtype)


def some(*shape):
    return draw(shape, 1)[0] > 0


KERNEL = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.1, 0.05], [0.05, 0.1, 0.1]])
CASES = {
    "mask": (Masking(some(*IMAGE)), IMAGE),
    "mask of pixels": (Masking(some(4, 6)), IMAGE),
    "masks": (Masking(some(2, *IMAGE)), IMAGE),
    "mask of a table": (Masking(some(5)), (5,)),
    "down": (Downsampling(2), IMAGE),
    "down, a line": (Downsampling(4), LINE),
    "down, a volume": (Downsampling(2), VOLUME),
    "blur": (Blur(KERNEL), IMAGE),
    "blur, Gaussian": (Blur(std=0.5), IMAGE),
    "blur, a line": (Blur(torch.tensor([0.2, 0.5, 0.3, 0.1])), LINE),
    "blur, a volume": (Blur(std=0.4), VOLUME),
    "grey": (Grey(), IMAGE),
    "grey, a line": (Grey(), LINE),
    "Fourier": (Fourier(some(4, 6)), IMAGE),
    "Fourier, each": (Fourier(some(2, *LINE)), LINE),
    "Fourier, a volume": (Fourier(some(2, 4, 2)), VOLUME),
    "random": (RandomProjection(5, seed=3), IMAGE),
    "linear": (Linear(lambda x: x.cumsum(-1)), LINE),
    "linear, with its adjoint": (
        Linear(lambda x: x[..., 1:], lambda u: torch.nn.functional.pad(u, (1, 0))),
        LINE,
    ),
}
each = pytest.mark.parametrize(("operator", "shape"), list(CASES.values()), ids=list(CASES))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@each
def test_the_transpose_is_the_adjoint(operator, shape, dtype, near):
    v = draw(shape, dtype=dtype)
    a = operator(v)
    u = draw(a.shape[1:], number=1, dtype=dtype)
    back = operator.transpose(u, shape)
    assert (back.dtype, back.shape) == (dtype, v.shape)
    size = float(a.norm() * u.norm()) + 1e-30
    assert abs(float((a * u).sum()) - float((v * back).sum())) < near * size
    torch.testing.assert_close(back, LinearOperator.transpose(operator, u, shape))
    operator.check(shape, v)


@each
def test_the_pseudo_inverse_is_that_of_the_matrix(operator, shape):
    if isinstance(operator, Linear):
        with pytest.raises(InputError, match="inverse"):
            operator.pseudo_inverse(operator(draw(shape)), shape)
        return
    seen = Observation(operator, operator(draw(shape)), 0.1)
    matrix = seen.matrix(shape)
    y = draw(seen.y.shape[1:], number=1)
    inverse = torch.linalg.pinv(matrix, rtol=1e-4)
    expected = (inverse @ y.flatten(1).unsqueeze(2)).reshape(2, *shape)
    torch.testing.assert_close(operator.pseudo_inverse(y, shape), expected, rtol=0, atol=1e-9)


@each
def test_an_example_is_measured_alone_as_in_a_batch(operator, shape):
    x = draw(shape)
    rows = torch.tensor([1])
    torch.testing.assert_close(operator.take(rows)(x[1:]), operator(x)[1:])


def test_measurements_are_what_they_are_said_to_be():
    x = draw(IMAGE)
    down = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(Downsampling(2)(x), down)
    wrapped = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular").transpose(0, 1)
    blurred = torch.nn.functional.conv2d(
        wrapped.reshape(-1, 1, 6, 8), KERNEL.double().flip(0, 1)[None, None]
    )
    torch.testing.assert_close(
        Blur(KERNEL)(x), blurred.reshape(3, 2, 4, 6).transpose(0, 1), rtol=0, atol=1e-12
    )
    whole = Fourier(torch.ones(1, dtype=torch.bool))(x)
    torch.testing.assert_close(sum_of_squares(whole), sum_of_squares(x))
    rows = RandomProjection(2000, seed=1)(x[:1])[0]
    # Entries are N(0, |x|^2 / D): the mean square within four standard errors.
    expected = float(x[0].square().mean())
    assert float(rows.square().mean()) == pytest.approx(expected, rel=4 * math.sqrt(2 / 2000))


def sum_of_squares(values):
    return values.square().flatten(1).sum(1)


# --- Observations --------------------------------------------------------------------------------

TABLE = Affine((3,), shift=[1.0, 5e4, 0.0], width=[2.0, 1e3, 0.5], dtype="float64")
ROWS = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]], dtype=torch.float64)
SUM = Linear(lambda x: x @ ROWS.to(x).T)


def test_raw_and_model_units_say_the_same():
    """y = R (W x + m) + n is y - R m = (R W) x + n."""
    x, y = draw((3,)), torch.tensor([[1e5, 5e4], [1.1e5, 4.9e4]], dtype=torch.float64)
    std = torch.tensor([500.0, 200.0], dtype=torch.float64)
    shift = torch.tensor([1.0, 5e4, 0.0], dtype=torch.float64)
    matrix = ROWS * torch.tensor([2.0, 1e3, 0.5], dtype=torch.float64)
    raw = Observation(SUM, y, std, TABLE)
    by_hand = Observation(Linear(lambda x: x @ matrix.T), y - ROWS @ shift, std)
    torch.testing.assert_close(raw.residual(x), by_hand.residual(x), rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(raw.log_prob(x), by_hand.log_prob(x))
    u = draw((2,), number=2)
    torch.testing.assert_close(raw.pull(u, (3,)), u @ matrix)
    torch.testing.assert_close(raw.push(x), x @ matrix.T, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(raw.matrix((3,))[0], matrix, rtol=1e-10, atol=1e-8)
    normal = torch.distributions.Normal(raw.forward(x), std)
    torch.testing.assert_close(raw.log_prob(x), normal.log_prob(y).sum(1))
    near = raw.linearise(x.float())
    assert (near.residual.dtype, near.pull(u.float()).dtype) == (torch.float32, torch.float32)


def test_integers_lie_at_the_middle_of_their_levels():
    codec = Affine.of_levels((2,), levels=16)
    raw = torch.tensor([[3, 12]])
    seen = Observation(Masking(torch.tensor([True, False])), raw, 0.5, codec)
    assert seen.residual(codec.encode(raw)).abs().max() < 1e-6
    assert seen.project(torch.zeros(1, 2)).tolist() == [
        [pytest.approx(codec.encode(raw)[0, 0]), 0]
    ]


def test_what_a_mask_hides_is_ignored_and_not_counted():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    y = torch.full((2, 3), 7.0)
    seen = Observation(Masking(mask), y, 2.0)
    x = torch.zeros(2, 3)
    assert seen.dim(x).tolist() == [2, 1]
    assert torch.equal(seen.residual(x), torch.where(mask, 7.0, 0.0))
    one = float(torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(7.0)))
    assert seen.log_prob(x).tolist() == pytest.approx([2 * one, one])
    assert torch.equal(seen.project(x), torch.where(mask, 7.0, 0.0))


def test_rows_are_those_of_their_examples():
    y, std = draw((3,), 4), draw((1,), 4).abs()
    mask = some(4, 3)
    seen, x = Observation(Masking(mask), y, std), draw((3,), 4, 1)
    whole = seen.log_prob(x)
    rows = torch.tensor([2, 0, 2])
    torch.testing.assert_close(seen.take(rows).log_prob(x[rows]), whole[rows])
    again = seen.take(rows).take(torch.tensor([1]))
    torch.testing.assert_close(again.log_prob(x[:1]), whole[:1])
    shared = Observation(Masking(mask[0]), y[0], std[0]).take(rows)
    torch.testing.assert_close(
        shared.log_prob(x[rows]), Observation(Masking(mask[0]), y[0], std[0]).log_prob(x)[rows]
    )


def test_a_non_linear_operator_is_linearised():
    x = draw((2,))
    seen = Observation(NonLinear(lambda x: x**2), torch.ones(2, dtype=torch.float64), 0.1)
    near, v = seen.linearise(x), draw((2,), number=1)
    torch.testing.assert_close(near.push(v), 2 * x * v)
    torch.testing.assert_close(near.pull(v), 2 * x * v)
    torch.testing.assert_close(near.residual, 1 - x**2)
    with pytest.raises(InputError, match="NonLinear"):
        seen.pull(v, (2,))


LEVELS = Affine.of_levels((2,), levels=16)
MASK = Masking(torch.tensor([True, False]))
WRONG = {
    "a function": (lambda: Observation(torch.sin, torch.zeros(2), 0.1), "NonLinear"),
    "integers": (lambda: Observation(MASK, torch.zeros(2, dtype=torch.int64), 0.1), "int64"),
    "a list": (lambda: Observation(MASK, [0.0, 1.0], 0.1), "list"),
    "nan": (lambda: Observation(MASK, torch.tensor([0.0, torch.nan]), 0.1), "1 of 2"),
    "std": (lambda: Observation(MASK, torch.zeros(2), -0.1), "-0.1"),
    "shape": (lambda: Observation(MASK, torch.zeros(3), 0.1, LEVELS), r"\(3,\)"),
    "std's shape": (
        lambda: Observation(MASK, torch.zeros(2), torch.ones(3), LEVELS),
        r"std.*\(3,\)",
    ),
    "range": (lambda: Observation(MASK, torch.tensor([99.0, 0.0]), 0.1, LEVELS), "99"),
    "batch": (lambda: Observation(MASK, torch.zeros(3, 2), 0.1).residual(torch.zeros(4, 2)), "y"),
    "mask": (lambda: Masking(torch.ones(2)), "float32"),
    "mask's shape": (lambda: MASK(torch.zeros(1, 3)), r"\(2,\)"),
    "density": (lambda: Observation(MASK, torch.zeros(2), 0.0).log_prob(torch.zeros(1, 2)), "0.0"),
    "factor": (lambda: Downsampling(0), r"factor.*\b0\b"),
    "division": (lambda: Downsampling(3)(torch.zeros(1, 1, 4)), "3"),
    "channels": (lambda: Grey()(torch.zeros(1, 1, 4)), "weights"),
    "kernel": (lambda: Blur(), "kernel"),
    "large kernel": (lambda: Blur(torch.ones(5))(torch.zeros(1, 1, 4)), r"\(5,\)"),
    "no grid": (lambda: Fourier(torch.tensor([True]))(torch.zeros(1, 4)), r"\(4,\)"),
    "rows": (lambda: RandomProjection(9).pseudo_inverse(torch.zeros(1, 9), (4,)), "9"),
    "adjoint": (
        lambda: Linear(lambda x: 2 * x, lambda u: 3 * u).check((2,), torch.zeros(2)),
        "transpose",
    ),
    "not linear": (lambda: Linear(torch.sin).check((2,), torch.zeros(2)), "NonLinear"),
    "no gradient": (
        lambda: Linear(lambda x: x.detach()).transpose(torch.zeros(1, 2), (2,)),
        "adjoint",
    ),
    "no floats": (lambda: NonLinear(lambda x: x > 0).check((2,), torch.zeros(2)), "bool"),
}


@pytest.mark.parametrize(("make", "named"), list(WRONG.values()), ids=list(WRONG))
def test_misuse_is_one_sentence(make, named):
    with pytest.raises(InputError, match=named):
        make()
