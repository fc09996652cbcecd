"""Convolutional networks in one, two and three dimensions, of sizes that halve or do not."""

import functools

import pytest
import torch

from scoresde import VPSDE, DenoisingScoreMatching, InputError, Likelihood, ScoreModel
from scoresde.configuration import place
from scoresde.divergence import ColourProbing, ExactTrace
from scoresde.nn import (
    MLP,
    Architecture,
    DDPMTransition,
    FIRResampling,
    InputResidual,
    InputSkip,
    OutputResidual,
    OutputSkip,
    UNet,
)
from scoresde.nn.resampling import FilteredDown, FilteredUp
from scoresde.sample import ProbabilityFlow, UniPC
from scoresde.streams import Streams
from scoresde.train import Training, Update

HALVING = [(2, 32), (1, 8, 8, 8), (3, 8, 12)]
ODD = [(1, 5), (2, 33), (1, 16, 11), (3, 25, 14), (2, 7, 6, 5)]
KINDS = {
    "default": {},
    "DDPM": {"transition": DDPMTransition()},
    "FIR": {"resampling": FIRResampling()},
    "NCSN++": {"resampling": FIRResampling(), "input_pyramid": InputResidual()},
    "skips": {"input_pyramid": InputSkip(), "output_pyramid": OutputSkip()},
    "residual": {"resampling": FIRResampling(), "output_pyramid": OutputResidual()},
}
ALIVE = Architecture(init_scale=1.0)
each_kind = pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))


def inputs(shape, n=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g), torch.zeros(n)


def unet(shape, **more):
    torch.manual_seed(0)
    architecture = Architecture(init_scale=1.0, **more)
    return UNet(shape, width=8, blocks=1, architecture=architecture)


@pytest.mark.parametrize("shape", HALVING + ODD, ids=str)
@each_kind
def test_shapes_are_kept_and_every_weight_has_a_part(kind, shape):
    network, (x, c) = unet(shape, **kind), inputs(shape)
    y = network(x, c)
    assert y.shape == x.shape
    y.square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax does not see what is added to all keys, nor a normalisation what moves a whole group.
    assert not [name for name in silent if "qkv.bias" not in name]


@pytest.mark.parametrize("shape", ODD, ids=str)
@each_kind
def test_an_odd_size_is_the_padded_one_cut_off(kind, shape):
    network, (x, c) = unet(shape, **kind), inputs(shape)
    whole = torch.zeros(2, shape[0], *(n + n % 2 for n in shape[1:]))
    place = tuple(slice(n) for n in x.shape)
    whole[place] = x
    torch.testing.assert_close(network(x, c), network(whole, c)[place])


@pytest.mark.parametrize("shape", [(1, 5), (1, 3, 2), (1, 2, 3, 2)], ids=str)
def test_the_divergence_is_that_of_the_network_as_it_is(shape):
    """Through the padding, against the whole Jacobian."""
    network, (x, c) = unet(shape).double(), inputs(shape)
    x = x.double()
    field = functools.partial(network, c=c.double())
    jacobian = torch.autograd.functional.jacobian(field, x)
    size = x[0].numel()
    rows = jacobian.reshape(2, size, 2, size)
    truth = torch.stack([rows[i, :, i].trace() for i in range(2)])
    for trace in (ExactTrace(), ColourProbing(spacing=5)):
        probes = trace.probes(Streams.of(0, batch=2), x)
        torch.testing.assert_close(trace(field, x, probes)[1].mean(1), truth)


@pytest.mark.parametrize("kind", [FilteredDown, FilteredUp])
def test_filters_of_other_dimensions_are_the_product_along_each_axis(kind):
    """A signal repeated along another axis, and an image along a third, come out alike inside."""
    layer, (x, _) = kind((1, 3, 3, 1)), inputs((2, 12))
    torch.testing.assert_close(layer._along(2), layer.kernel)
    line = layer(x)
    plane = layer(x[..., None, :].expand(2, 2, 12, 12).contiguous())
    cube = layer(x[..., None, None, :].expand(2, 2, 12, 12, 12).contiguous())
    middle = plane.shape[2] // 2
    torch.testing.assert_close(plane[:, :, middle], line)
    torch.testing.assert_close(cube[:, :, middle, middle], line)


@pytest.mark.parametrize("shape", HALVING, ids=str)
def test_tasks_lay_out_networks_of_any_number_of_axes(shape):
    network, (x, c) = unet(shape), inputs(shape)
    expected = network(x, c)
    actual = place(network, torch.device("cpu"))(x, c)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_square_filter_is_for_images():
    layer = FilteredDown([[1.0, 2.0], [3.0, 1.0]])
    assert layer(torch.ones(1, 1, 4, 4)).shape == (1, 1, 2, 2)
    with pytest.raises(InputError, match=r"kernel.*1 axes"):
        layer(torch.ones(1, 1, 4))


@pytest.mark.parametrize("shape", [(2, 13), (1, 5, 4, 6)], ids=str)
def test_signals_and_volumes_train_sample_and_have_a_likelihood(shape):
    model = ScoreModel(unet(shape), VPSDE())
    x, _ = inputs(shape, 8)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    update = Update(model, DenoisingScoreMatching(), Training(steps=2, batch_size=8), adam)
    before = [p.clone() for p in model.parameters()]
    for step in range(2):
        assert float(update(x, {}, step, 8).detach()[0]) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert UniPC(3)(model, (2, *shape), seed=0).x.shape == (2, *shape)
    flow = ProbabilityFlow(1e-4, 1e-4)
    latent = flow.encode(model, x[:2]).x
    torch.testing.assert_close(flow(model, latent=latent).x, x[:2], rtol=0, atol=0.05)
    result = Likelihood(32, rtol=1e-4, atol=1e-4)(model, x[:2], seed=0)
    exact = Likelihood("exact", rtol=1e-4, atol=1e-4)(model, x[:2])
    gap = (result.log_prob - exact.log_prob).abs()
    assert bool((gap < 4 * result.standard_error + 0.01).all())


# --- Classes -------------------------------------------------------------------------------------

CLASSED = {
    "MLP": lambda **more: MLP(3, width=8, depth=1, **more),
    "UNet": lambda **more: UNet((3, 8), 8, blocks=1, architecture=ALIVE, **more),
}
each_network = pytest.mark.parametrize("make", list(CLASSED.values()), ids=list(CLASSED))


def classed(make, **more):
    """A network of four classes, and its inputs, with rows that differ."""
    torch.manual_seed(0)
    network = make(classes=4, **more)
    torch.nn.init.normal_(network.conditioning.classes.weight)
    if isinstance(network, MLP):
        torch.nn.init.normal_(network.linear_out.weight)
    x, c = inputs(network.shape, 5)
    return network, x[:1].expand_as(x).contiguous(), c


@each_network
def test_every_class_has_a_row_and_none_has_one_of_its_own(make):
    network, x, c = classed(make)
    assert network.conditioning.classes.weight.shape[0] == 5
    y = network(x, c, label=torch.tensor([0, 1, 2, 3, -1]))
    assert len(y.flatten(1).unique(dim=0)) == 5
    torch.testing.assert_close(y[4:], network(x[:1], c[:1]))


@each_network
def test_a_network_begins_without_a_word_of_its_classes(make):
    """Its table starts at zero, and the other weights are those without classes."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    network = make(classes=4)
    own = dict(network.named_parameters())
    assert not own.pop("conditioning.classes.weight").any()
    assert own.keys() == dict(plain.named_parameters()).keys()
    for name, p in plain.named_parameters():
        assert torch.equal(p, own[name])


@each_network
def test_labels_and_vectors_go_together(make):
    network, x, c = classed(make, conditions={"context": 2})
    torch.nn.init.normal_(network.conditioning.conditions["context"].weight)
    label, context = torch.arange(5) - 1, torch.randn(5, 2)
    both = network(x, c, label=label, context=context)
    assert not torch.allclose(both, network(x, c, label=label))
    assert not torch.allclose(both, network(x, c, context=context))


@each_network
def test_labels_out_of_place_are_refused(make):
    network, x, c = classed(make)
    for label, message in (
        (torch.full((5,), 4), r"label.*0 to 3.*4"),
        (torch.full((5,), -2), r"label.*-2"),
        (torch.zeros(5), r"label.*float32"),
        (torch.zeros(4, dtype=torch.int64), r"label.*\(5,\).*\(4,\)"),
    ):
        with pytest.raises(InputError, match=message):
            network(x, c, label=label)
    with pytest.raises(InputError, match="classes="):
        make()(x, c, label=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InputError, match=r"label.*classes=2"):
        make(classes=2, conditions={"label": 3})
    with pytest.raises(InputError, match=r"classes.*-1"):
        make(classes=-1)
