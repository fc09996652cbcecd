"""Traces of a Jacobian against automatic differentiation of the whole of it."""

import pytest
import torch

from scoresde import VPSDE, GaussianMixtureModel, InputError, ScoreModel
from scoresde.divergence import (
    ColourProbing,
    ExactTrace,
    Gaussian,
    Hutchinson,
    Orthogonal,
    Rademacher,
    Sphere,
)
from scoresde.model import Conditioned
from scoresde.nn import Architecture, UNet
from scoresde.streams import Purpose, Streams

SHAPES = [(5,), (1,), (2, 3, 3), (2, 4), (1, 2, 2, 3)]
EXACT = [
    *(ExactTrace(), ExactTrace(chunk=1), ExactTrace(chunk=4), ExactTrace(chunk=100)),
    *(ExactTrace(forward=True), ExactTrace(chunk=1, forward=True)),
]
RANDOM = [
    *(Hutchinson(), Hutchinson(3, Gaussian()), Hutchinson(3, Sphere())),
    *(Hutchinson(3, Orthogonal()), ColourProbing(2), ColourProbing(2, repeats=3)),
]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_exact = pytest.mark.parametrize("trace", EXACT, ids=repr)
each_random = pytest.mark.parametrize("trace", RANDOM, ids=repr)
each_trace = pytest.mark.parametrize("trace", [*EXACT, *RANDOM], ids=repr)


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
@each_exact
def test_the_exact_trace_is_that_of_the_jacobian(trace, shape):
    field, x = Field(shape), normal(3, *shape)
    _, divergence = estimate(trace, field, x)
    torch.testing.assert_close(divergence, field.divergence(x)[:, None])


@each_shape
@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(1), Hutchinson(5)], ids=repr)
def test_the_field_is_returned_as_it_is(trace, shape):
    field, x = Field(shape), normal(3, *shape)
    v, divergence = estimate(trace, field, x)
    torch.testing.assert_close(v, field(x), rtol=0, atol=0)
    assert divergence.shape == (3, trace.estimates)


@pytest.mark.parametrize("trace", [t for t in EXACT if not t.forward] + RANDOM, ids=repr)
def test_the_field_is_evaluated_once(trace):
    field = Field((4,))
    estimate(trace, field, normal(3, 4))
    assert field.calls == 1


@pytest.mark.parametrize(("chunk", "calls"), [(4, 1), (2, 2), (1, 4)])
def test_the_forward_mode_evaluates_the_field_once_for_each_chunk(chunk, calls):
    field = Field((4,))
    estimate(ExactTrace(chunk, forward=True), field, normal(3, 4))
    assert field.calls == calls


@each_trace
def test_the_products_are_as_many_as_declared(trace):
    x, count = normal(3, 2, 2, 2), 0
    probes = trace.probes(Streams.of(0, batch=3), x)

    def product(e):
        nonlocal count
        count += 1
        return e.expand(x.shape)

    product.x = product.v = x
    product.batch = lambda probes: torch.stack([product(e) for e in probes])
    estimates = trace.estimate(product, probes)
    assert (count, estimates.shape) == (trace.products(probes), (3, trace.estimates))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 3)], ids=str)
@each_random
def test_random_probes_are_unbiased(trace, shape):
    n, field = 4000, Field(shape)
    x = normal(1, *shape)
    _, estimates = estimate(trace, field, x.expand(n, *shape))
    means = estimates.mean(1)
    z = (means.mean() - field.divergence(x)[0]) / (means.std() / n**0.5)
    assert abs(float(z)) < 3.5


@pytest.mark.parametrize(
    "trace",
    [
        *(Hutchinson(3, kind) for kind in (Rademacher(), Gaussian(), Sphere(), Orthogonal())),
        ColourProbing(2, repeats=3),
    ],
    ids=repr,
)
def test_several_estimates_are_uncorrelated(trace):
    n, field = 4000, Field((5,))
    _, estimates = estimate(trace, field, normal(1, 5).expand(n, 5))
    errors = estimates - field.divergence(normal(1, 5))
    off_diagonal = (errors.T @ errors) / errors.square().mean() / n - torch.eye(3)
    off_diagonal.fill_diagonal_(0)
    assert float(off_diagonal.abs().max()) * n**0.5 < 4


@each_random
def test_sets_of_different_draws_are_independent(trace):
    n, field = 4000, Field((5,))
    x, streams = normal(1, 5).expand(n, 5), Streams.of(0, batch=n)
    sets = [trace(field, x, trace.probes(streams, x, draw))[1].mean(1) for draw in (0, 1)]
    assert abs(float(torch.corrcoef(torch.stack(sets))[0, 1])) * n**0.5 < 4


@each_random
def test_sets_of_several_draws_may_be_joined(trace):
    field, x, streams = Field((5,)), normal(4, 5), Streams.of(0, batch=4)
    sets = [trace.probes(streams, x, draw) for draw in (0, 1)]
    _, joined = trace(field, x, torch.cat(sets))
    apart = torch.cat([trace(field, x, probes)[1] for probes in sets], 1)
    torch.testing.assert_close(joined, apart, rtol=1e-12, atol=1e-12)


def test_the_first_draw_of_signs_has_the_addresses_it_always_had():
    streams, x = Streams.of(3, batch=2), torch.zeros(2, 4)
    expected = [streams.sign((4,), Purpose.PROBE, k) for k in (2, 3)]
    assert torch.equal(Hutchinson(2).probes(streams, x, draw=1), torch.stack(expected))


def test_random_probes_are_exact_for_a_diagonal_jacobian():
    x = normal(64, 6)
    _, estimates = estimate(Hutchinson(2), torch.sin, x)
    truth = torch.cos(x).sum(1)[:, None].expand(64, 2)
    torch.testing.assert_close(estimates, truth, rtol=1e-13, atol=1e-13)


D = 6
SYMMETRIC = (normal(D, D) + normal(D, D).T) / 2
NORM, TRACE = SYMMETRIC.square().sum(), SYMMETRIC.trace()
SPHERE = 2 * (D * NORM - TRACE**2) / (D + 2)


@pytest.mark.parametrize(
    ("trace", "variance"),
    [
        (Hutchinson(), 2 * (NORM - SYMMETRIC.diag().square().sum())),
        (Hutchinson(1, Gaussian()), 2 * NORM),
        (Hutchinson(1, Sphere()), SPHERE),
        (Hutchinson(4, Orthogonal()), SPHERE / 4 * (D - 4) / (D - 1)),
        (ColourProbing(4), 4 * (SYMMETRIC[0, 4] ** 2 + SYMMETRIC[1, 5] ** 2)),
    ],
    ids=lambda value: repr(value) if not isinstance(value, torch.Tensor) else "",
)
def test_the_variance_is_as_derived(trace, variance):
    """Of the mean of one set, for a linear field."""
    n, a = 20_000, normal(D, D)
    _, estimates = estimate(trace, lambda x: x @ a.T, torch.zeros(n, D).double())
    assert float(estimates.mean(1).var() / variance) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize(
    "trace",
    [
        Hutchinson(8),
        *(Hutchinson(3, kind) for kind in (Gaussian(), Sphere(), Orthogonal())),
        ColourProbing(2, repeats=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("draws", [1, 3])
def test_the_standard_error_is_that_of_the_mean(trace, draws):
    n = 6000
    x, streams = normal(1, 5).expand(n, 5), Streams.of(0, batch=n)
    probes = torch.cat([trace.probes(streams, x, draw) for draw in range(draws)])
    _, estimates = trace(Field((5,)), x, probes)
    claimed = trace.standard_error(estimates).square()
    squared_error = (estimates.mean(1) - Field((5,)).divergence(x[:1])).square()
    z = (claimed - squared_error).mean() / ((claimed - squared_error).std() / n**0.5)
    assert abs(float(z)) < 3.5


def test_the_wholly_orthogonal_frame_is_exact_and_knows_it():
    field, x, trace = Field((2, 2)), normal(3, 2, 2), Hutchinson(4, Orthogonal())
    _, estimates = estimate(trace, field, x)
    torch.testing.assert_close(estimates, field.divergence(x)[:, None].expand(3, 4))
    assert float(trace.standard_error(estimates).max()) < 1e-12


@pytest.mark.parametrize("count", [2, 5])
def test_orthogonal_probes_are_orthogonal(count):
    probes = Hutchinson(count, Orthogonal()).probes(Streams.of(0, batch=3), normal(3, 5))
    products = torch.einsum("kbd,lbd->bkl", probes, probes)
    torch.testing.assert_close(products, 5 * torch.eye(count).double().expand(3, count, count))


class Convolution(torch.nn.Conv2d):
    """Three by three, so that it reaches one pixel far, with a sine after it."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, 3, padding=1, groups=groups, dtype=torch.float64)
        self.weight.data = normal(*self.weight.shape)

    def forward(self, x):
        return torch.sin(super().forward(x))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spacing", [2, 3])
def test_colours_are_exact_for_a_field_that_reaches_less_far(spacing, groups):
    field, x = Convolution(2, groups), normal(3, 2, 7, 4)
    _, truth = estimate(ExactTrace(), field, x)
    _, colours = estimate(ColourProbing(spacing), field, x)
    torch.testing.assert_close(colours, truth)


@pytest.mark.parametrize(
    ("spacing", "shape", "products"),
    [
        *((4, (3, 32, 32), 48), (4, (3, 2, 32), 24), (4, (7,), 4), (4, (3,), 3)),
        *((2, (3, 5), 6), (2, (1, 4, 4, 4), 8), (1, (3, 4, 4), 3)),
    ],
)
def test_colours_take_as_many_products_as_there_are(spacing, shape, products):
    trace, x = ColourProbing(spacing, repeats=2), torch.zeros(1, *shape)
    assert trace.products(trace.probes(Streams.of(0, batch=1), x)) == 2 * products


def test_colours_farther_apart_than_the_image_are_exact():
    field, x = Field((2, 3, 3)), normal(2, 2, 3, 3)
    _, estimates = estimate(ColourProbing(9), field, x)
    torch.testing.assert_close(estimates, field.divergence(x)[:, None])


def test_one_probe_knows_no_error_and_the_exact_trace_has_none():
    one = torch.zeros(3, 1)
    for trace in (Hutchinson(1), ColourProbing()):
        assert bool(trace.standard_error(one).isnan().all())
    assert torch.equal(ExactTrace().standard_error(one), torch.zeros(3))


@each_trace
@pytest.mark.parametrize("field", [torch.ones_like, torch.zeros_like, lambda x: x.detach()])
def test_a_constant_field_has_no_divergence(field, trace):
    _, divergence = estimate(trace, field, normal(3, 4))
    assert torch.equal(divergence, torch.zeros(3, trace.estimates).double())


@each_exact
def test_gradients_may_be_off_outside_and_no_graph_comes_back(trace):
    field, x = Field((4,)), normal(3, 4)
    with torch.no_grad():
        v, divergence = estimate(trace, field, x)
    torch.testing.assert_close(divergence, field.divergence(x)[:, None])
    assert (v.requires_grad, divergence.requires_grad) == (False, False)


def test_parameters_get_no_gradient():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    estimate(Hutchinson(2), lambda x: weight * x, normal(3, 4))
    assert weight.grad is None


@each_trace
def test_an_examples_estimate_is_its_own(trace):
    field, x = Field((5,)), normal(8, 5)
    _, together = estimate(trace, field, x)
    _, alone = estimate(trace, field, x[6:7], seeds=[6])
    torch.testing.assert_close(together[6:7], alone, rtol=1e-12, atol=1e-12)


@each_trace
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimates_have_the_states_type(trace, dtype):
    _, estimates = estimate(trace, torch.sin, torch.zeros(3, 2, 2, dtype=dtype))
    assert (estimates.dtype, trace.standard_error(estimates).dtype) == (dtype, dtype)


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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExactTrace(0), r"chunk.*\b0\b"),
        (lambda: ExactTrace(2.5), r"chunk.*\b2\.5"),
        (lambda: ColourProbing(0), r"spacing.*\b0\b"),
        (lambda: ColourProbing(4, repeats=-1), r"repeats.*-1"),
        (lambda: Hutchinson(1, "gauss"), r"distribution.*\bstr\b"),
    ],
)
def test_an_unusable_argument_is_refused_by_its_value(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_more_orthogonal_probes_than_dimensions_are_refused():
    trace = Hutchinson(6, Orthogonal())
    with pytest.raises(InputError, match=r"probes.*\b6\b"):
        trace.probes(Streams.of(0, batch=1), torch.zeros(1, 5))


# --- Differentiating the divergence --------------------------------------------------------------


def cubic(weight):
    """A field whose divergence is that of its linear part plus 3 |x|^2 / 2."""
    return lambda x: (x.flatten(1) @ weight.T + x.flatten(1) ** 3 / 2).reshape(x.shape)


@each_exact
def test_the_exact_trace_can_be_differentiated(trace):
    weight, x = normal(4, 4).requires_grad_(), normal(3, 2, 2).requires_grad_()
    probes = trace.probes(Streams.of(0, batch=3), x)
    _, divergence = trace(cubic(weight), x, probes, create_graph=True)
    by_x, by_weight = torch.autograd.grad(divergence.sum(), (x, weight))
    torch.testing.assert_close(by_x, 3 * x.detach())
    torch.testing.assert_close(by_weight, 3 * torch.eye(4).double())


@pytest.mark.parametrize("trace", [ExactTrace(), *RANDOM], ids=repr)
def test_estimates_have_the_gradient_of_finite_differences(trace):
    field, x = Field((4,)), normal(3, 4).requires_grad_()
    probes = trace.probes(Streams.of(0, batch=3), x)

    def both(x):
        return trace(field, x, probes, create_graph=True)

    assert torch.autograd.gradcheck(both, x)


def test_states_that_need_no_gradient_are_left_as_they_are():
    weight, x = normal(4, 4).requires_grad_(), normal(3, 4)
    probes = Hutchinson().probes(Streams.of(0, batch=3), x)
    _, divergence = Hutchinson()(cubic(weight), x, probes, create_graph=True)
    assert (x.requires_grad, divergence.requires_grad) == (False, True)


# --- Networks ------------------------------------------------------------------------------------


def score_field(layout):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), width=8, blocks=1, architecture=Architecture(init_scale=1.0))
    model = ScoreModel(net, VPSDE()).double().eval().to(memory_format=layout)
    return lambda x: Conditioned(model).velocity(x, torch.tensor(0.4).double())


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_every_layout_of_a_network_has_an_exact_trace(layout, create_graph):
    """Before 2.15 torch cannot batch the gradient of a channels-last group normalisation."""
    field, x = score_field(layout), normal(2, 1, 4, 4)
    probes = ExactTrace().probes(Streams.of(0, batch=2), x)
    _, divergence = ExactTrace()(field, x, probes, create_graph=create_graph)
    _, truth = ExactTrace(chunk=1)(field, x, probes)
    torch.testing.assert_close(divergence.detach(), truth)


class Stubborn(torch.autograd.Function):
    """x², whose gradient looks at numbers; it cannot be batched, nor taken forwards."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient if gradient.abs().sum().item() else 0 * x


def test_a_network_that_cannot_be_batched_is_a_sentence():
    with pytest.raises(InputError, match=r"chunk=4 .* ExactTrace\(chunk=1\)"):
        estimate(ExactTrace(chunk=4), Stubborn.apply, normal(2, 1, 4, 4))


def test_the_forward_mode_takes_a_network_with_attention():
    field, x = score_field(torch.contiguous_format), normal(2, 1, 4, 4)
    (_, forward), (_, backward) = (
        estimate(t, field, x) for t in (ExactTrace(forward=True), ExactTrace())
    )
    torch.testing.assert_close(forward, backward)


def test_a_network_that_has_no_forward_mode_is_a_sentence():
    x = normal(2, 1, 4, 4)
    with pytest.raises(InputError, match=r"forward-mode.*ExactTrace\(chunk=1\)"):
        estimate(ExactTrace(forward=True), Stubborn.apply, x)


def test_a_network_with_attention_can_be_differentiated_twice():
    field, x = score_field(torch.channels_last), normal(2, 1, 4, 4).requires_grad_()
    trace = Hutchinson()
    probes = trace.probes(Streams.of(0, batch=2), x)
    _, estimates = trace(field, x, probes, create_graph=True)
    (gradient,) = torch.autograd.grad(estimates.sum(), x)
    step = 1e-5 * normal(2, 1, 4, 4, seed=1)
    ends = [trace(field, x + sign * step, probes)[1].sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-5, atol=0)


def test_a_mixture_can_be_differentiated_forwards():
    model = GaussianMixtureModel([0.3, 0.7], normal(2, 3), [0.3, 0.5], VPSDE())
    x, t = normal(4, 3, seed=1), torch.tensor(0.3).double()
    ends = [estimate(trace, lambda y: model.score(y, t), x)[1] for trace in EXACT]
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0])


def test_the_last_product_frees_the_graph():
    field, x, product = Field((4,)), normal(3, 4).requires_grad_(), None
    trace = Hutchinson(2)

    class Kept(Hutchinson):
        def estimate(self, given, probes):
            nonlocal product
            product = given
            return super().estimate(given, probes)

    probes = trace.probes(Streams.of(0, batch=3), x)
    Kept(2)(field, x, probes)
    with pytest.raises(RuntimeError, match="second time"):
        product(probes[0])
