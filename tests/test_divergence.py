"""Traces of a Jacobian against automatic differentiation of the whole of it."""

import pytest
import torch

from scoresde import InputError
from scoresde.divergence import ExactTrace, Hutchinson
from scoresde.streams import Streams

SHAPES = [(5,), (1,), (2, 3, 3)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Field:
    """A nonlinear field with a full Jacobian, each example on its own; it counts its calls."""

    def __init__(self, shape):
        d = torch.Size(shape).numel()
        self.weights = normal(d, d, seed=7)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        y = x.flatten(1)
        return (torch.sin(y @ self.weights) * y + y**3).reshape(x.shape)

    def divergence(self, x):
        jacobians = [torch.func.jacrev(self)(x[i : i + 1]) for i in range(len(x))]
        d = x[0].numel()
        return torch.stack([jacobian.reshape(d, d).trace() for jacobian in jacobians])


def estimate(trace, field, x, seed=0, seeds=None):
    return trace(field, x, trace.probes(Streams.of(seed, seeds, len(x)), x))


@each_shape
def test_the_exact_trace_is_that_of_the_jacobian(shape):
    field, x = Field(shape), normal(3, *shape)
    _, divergence = estimate(ExactTrace(), field, x)
    torch.testing.assert_close(divergence, field.divergence(x)[:, None])


@each_shape
@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(1), Hutchinson(5)], ids=repr)
def test_the_field_is_returned_as_it_is(trace, shape):
    field, x = Field(shape), normal(3, *shape)
    v, divergence = estimate(trace, field, x)
    torch.testing.assert_close(v, field(x), rtol=0, atol=0)
    assert divergence.shape == (3, trace.estimates)


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(1), Hutchinson(5)], ids=repr)
def test_the_field_is_evaluated_once(trace):
    field = Field((4,))
    estimate(trace, field, normal(3, 4))
    assert field.calls == 1


@pytest.mark.parametrize("shape", [(5,), (2, 3, 3)], ids=str)
def test_random_probes_are_unbiased(shape):
    n, field = 4000, Field(shape)
    x = normal(1, *shape)
    _, estimates = estimate(Hutchinson(), field, x.expand(n, *shape))
    z = (estimates.mean() - field.divergence(x)[0]) / (estimates.std() / n**0.5)
    assert abs(float(z)) < 3.5


def test_several_probes_are_independent():
    n, field = 4000, Field((5,))
    _, estimates = estimate(Hutchinson(3), field, normal(1, 5).expand(n, 5))
    off_diagonal = torch.corrcoef(estimates.T) - torch.eye(3)
    assert float(off_diagonal.abs().max()) * n**0.5 < 4


def test_random_probes_are_exact_for_a_diagonal_jacobian():
    x = normal(64, 6)
    _, estimates = estimate(Hutchinson(2), torch.sin, x)
    truth = torch.cos(x).sum(1)[:, None].expand(64, 2)
    torch.testing.assert_close(estimates, truth, rtol=1e-13, atol=1e-13)


def test_the_variance_is_that_of_the_off_diagonal_part():
    """For Rademacher probes it is 2 ||(J + J^T) / 2 - diag J||^2."""
    n, a = 20_000, normal(6, 6)
    _, estimates = estimate(Hutchinson(), lambda x: x @ a.T, torch.zeros(n, 6).double())
    symmetric = (a + a.T) / 2
    truth = 2 * (symmetric - symmetric.diag().diag()).square().sum()
    assert float(estimates.var() / truth) == pytest.approx(1, abs=0.05)


def test_the_standard_error_is_that_of_the_mean():
    n, trace = 4000, Hutchinson(8)
    _, estimates = estimate(trace, Field((5,)), normal(1, 5).expand(n, 5))
    claimed = trace.standard_error(estimates).square().mean()
    assert float(claimed / estimates.mean(1).var()) == pytest.approx(1, abs=0.1)


def test_one_probe_knows_no_error_and_the_exact_trace_has_none():
    one = torch.zeros(3, 1)
    assert bool(Hutchinson(1).standard_error(one).isnan().all())
    assert torch.equal(ExactTrace().standard_error(one), torch.zeros(3))


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(2)], ids=repr)
@pytest.mark.parametrize("field", [torch.ones_like, torch.zeros_like, lambda x: x.detach()])
def test_a_constant_field_has_no_divergence(field, trace):
    _, divergence = estimate(trace, field, normal(3, 4))
    assert torch.equal(divergence, torch.zeros(3, trace.estimates).double())


def test_gradients_may_be_off_outside_and_no_graph_comes_back():
    field, x = Field((4,)), normal(3, 4)
    with torch.no_grad():
        v, divergence = estimate(ExactTrace(), field, x)
    torch.testing.assert_close(divergence, field.divergence(x)[:, None])
    assert (v.requires_grad, divergence.requires_grad) == (False, False)


def test_parameters_get_no_gradient():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    estimate(Hutchinson(2), lambda x: weight * x, normal(3, 4))
    assert weight.grad is None


def test_an_examples_estimate_is_its_own():
    field, x = Field((5,)), normal(8, 5)
    _, together = estimate(Hutchinson(3), field, x)
    _, alone = estimate(Hutchinson(3), field, x[6:7], seeds=[6])
    torch.testing.assert_close(together[6:7], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_are_signs_of_the_states_type(dtype):
    x = torch.zeros(3, 2, 2, dtype=dtype)
    probes = Hutchinson(4).probes(Streams.of(0, batch=3), x)
    assert (probes.shape, probes.dtype) == ((4, 3, 2, 2), dtype)
    assert torch.equal(probes.abs(), torch.ones_like(probes))


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_an_unusable_number_of_probes_is_refused(count):
    with pytest.raises(InputError, match="probes="):
        Hutchinson(count)
