"""Networks: shapes, the start at zero, gradients, independence of the batch, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.errors import InputError
from scoresde.nn import (
    MLP,
    AttentionLayout,
    FourierEmbedding,
    Groups,
    PositionalEmbedding,
    UNet,
)

SHAPES = [(1, 8, 8), (3, 8, 12), (5, 8, 12), (1, 28, 28), (3, 28, 28)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Arrays are tiny here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(shape, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator, dtype=dtype)
    return x, torch.linspace(-2, 1.5, batch, dtype=dtype)


def awake(network):
    """Fills the layers that start at zero, so that every path counts."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def unet(shape=(1, 8, 8), **kwargs):
    return UNet(shape, **{"width": 8, "blocks": 1, **kwargs})


NETWORKS = {
    "mlp": (MLP, {"shape": 2, "width": 16, "depth": 2}),
    "mlp of an image": (MLP, {"shape": [2, 3, 4], "width": 16, "depth": 1}),
    "unet": (UNet, {"shape": (1, 8, 8), "width": 8, "blocks": 1}),
    "deep unet": (
        UNet,
        {
            "shape": [3, 8, 12],
            "width": 5,
            "multipliers": [2, 1, 3],
            "blocks": 2,
            "attention": {"levels": [0, 2], "heads": 5},
            "embedding": PositionalEmbedding(8, scale=100.0),
        },
    ),
}


@pytest.fixture(params=list(NETWORKS))
def network(request):
    torch.manual_seed(0)
    build, arguments = NETWORKS[request.param]
    return build(**arguments)


# --- Embeddings ----------------------------------------------------------------------------------


def test_positional_embedding_by_hand():
    c = torch.tensor([0.3, -1.7], dtype=torch.float64)
    features = PositionalEmbedding(6, scale=2.0, max_period=100.0)(c)
    frequencies = [2.0, 0.2, 0.02]
    for i, label in enumerate(c.tolist()):
        sines = [math.sin(w * label) for w in frequencies]
        cosines = [math.cos(w * label) for w in frequencies]
        expected = torch.tensor(sines + cosines, dtype=torch.float64)
        torch.testing.assert_close(features[i], expected)


def test_fourier_embedding_by_hand():
    embedding = FourierEmbedding(6, scale=2.0).double()
    c = torch.tensor([0.3, -1.7], dtype=torch.float64)
    sines, cosines = embedding(c).chunk(2, dim=1)
    angle = 2 * math.pi * c[1] * embedding.W[2]
    torch.testing.assert_close(sines[1, 2], angle.sin())
    torch.testing.assert_close(cosines[1, 2], angle.cos())


def test_fourier_frequencies_are_fixed_and_leave_the_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = FourierEmbedding(4096, scale=3.0)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.W, FourierEmbedding(4096, scale=3.0).W)
    assert abs(first.W.std() - 3) < 0.15
    assert abs(first.W.mean()) < 0.2
    assert not list(first.parameters())
    assert list(first.state_dict()) == ["W"]


def test_label_keeps_its_precision_until_embedded():
    network = awake(unet(embedding=PositionalEmbedding(8))).bfloat16()
    x = torch.ones(2, 1, 8, 8, dtype=torch.bfloat16)
    close = torch.tensor([900.0, 901.0])  # one number in bfloat16
    out = network(x, close)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FourierEmbedding(0), ["width", "2", "got 0"]),
        (lambda: FourierEmbedding(7), ["width", "even", "got 7"]),
        (lambda: FourierEmbedding(8, scale=0.0), ["scale", "positive", "got 0.0"]),
        (lambda: PositionalEmbedding(2), ["width", "4", "got 2"]),
        (lambda: PositionalEmbedding(8, scale=math.nan), ["scale", "got nan"]),
        (lambda: PositionalEmbedding(8, max_period=1), ["max_period", "got 1;"]),
    ],
)
def test_embeddings_refuse(build, words):
    refused(build, words)


# --- What holds for every network ----------------------------------------------------------------


def test_starts_as_the_zero_function_of_the_shape_of_its_input(network):
    x, c = inputs(network.shape)
    out = network(x, c)
    assert out.shape == x.shape
    assert not out.any()


def test_every_parameter_has_a_finite_gradient(network):
    x, c = inputs(network.shape)
    awake(network)(x, c).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_label_changes_the_output(network):
    x, c = inputs(network.shape)
    x = x[:1].expand_as(x)
    out = awake(network)(x, c)
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_rows_do_not_know_each_other(network):
    x, c = inputs(network.shape, dtype=torch.float64)
    out = awake(network).double().eval()(x, c)
    for i, expected in enumerate(out):
        alone = network(x[i : i + 1], c[i : i + 1])[0]
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)


def test_double_precision(network):
    x, c = inputs(network.shape)
    narrow = awake(network)(x, c)
    wide = network.double()(x.double(), c.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


def test_label_may_be_wider_than_the_data(network):
    x, c = inputs(network.shape)
    assert network(x, c.double()).dtype == torch.float32


def test_labels_that_do_not_fit_are_refused(network):
    x, c = inputs(network.shape)
    refused(lambda: network(x, c[:2]), ["c ", "(3,)", "got (2,)"])
    refused(lambda: network(x, c[0]), ["c ", "(3,)", "got ()"])


def test_construction_is_governed_by_the_seed():
    torch.manual_seed(3)
    first = unet()
    torch.manual_seed(3)
    second = unet()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# --- MLP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [1, (), (7,), (2, 3), (1, 4, 4), (2, 2, 2, 2)])
def test_mlp_takes_any_shape(shape):
    network = awake(MLP(shape, width=8, depth=1))
    x, c = inputs(network.shape)
    assert network(x, c).shape == x.shape


def test_mlp_dropout_only_in_training():
    network = awake(MLP(2, width=32, depth=1, dropout=0.5))
    x, c = inputs((2,))
    assert not torch.equal(network(x, c), network(x, c))
    network.eval()
    assert torch.equal(network(x, c), network(x, c))


def test_mlp_learns_a_curve_at_every_label():
    r"""Regression of sin(3 x + c) on x and c, whose variance is about 1/2."""
    torch.manual_seed(0)
    network = MLP(1, width=32, depth=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(200):
        x, c = 4 * torch.rand(64, 1) - 2, 3 * torch.rand(64) - 2
        loss = (network(x, c) - torch.sin(3 * x + c[:, None])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shape": 0}, ["shape[0]", "positive", "got 0"]),
        ({"shape": (2, -1)}, ["shape[1]", "got -1"]),
        ({"shape": "2"}, ["shape", "list", "'2'"]),
        ({"width": 0}, ["width", "positive", "got 0"]),
        ({"width": 2.5}, ["width", "integer", "2.5"]),
        ({"depth": 0}, ["depth", "positive", "got 0"]),
        ({"dropout": 1.0}, ["dropout", "[0, 1)", "1.0"]),
        ({"dropout": -0.1}, ["dropout", "-0.1"]),
    ],
)
def test_mlp_refuses(arguments, words):
    refused(lambda: MLP(**{"shape": 2, **arguments}), words)


def test_mlp_refuses_other_shapes():
    refused(lambda: MLP(2)(torch.ones(5, 3), torch.ones(5)), ["(3,)", "(2,)"])


# --- U-Net ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_unet_keeps_the_shape(shape):
    x, c = inputs(shape, batch=2)
    out = awake(unet(shape))(x, c)
    assert out.shape == x.shape
    assert out.isfinite().all()


@pytest.mark.parametrize(("blocks", "parameters"), [(4, 61_804_419), (8, 106_632_579)])
def test_unet_is_ddpmpp(blocks, parameters):
    """The published networks for CIFAR-10, DDPM++ and DDPM++ deep, have these numbers."""
    with torch.device("meta"):
        network = UNet((3, 32, 32), 128, (1, 2, 2, 2), blocks=blocks, attention=(1,))
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_unet_takes_other_sizes_later():
    network = awake(unet((3, 8, 8)))
    x, c = inputs((3, 6, 10))
    assert network(x, c).shape == x.shape


def test_unet_in_channels_last():
    x, c = inputs((3, 8, 12))
    network = awake(unet((3, 8, 12)))
    expected = network(x, c)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last, c), expected, rtol=1e-4, atol=1e-5)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last, c), expected, rtol=1e-4, atol=1e-5)


def test_unet_compiles_without_graph_breaks():
    x, c = inputs((1, 8, 8))
    network = awake(unet())
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c), network(x, c))


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # torch's own, in jvp
def test_unet_has_second_derivatives_with_the_plain_attention():
    """As the docstring of the attention says."""
    x, c = inputs((1, 8, 8), dtype=torch.float64)
    v = torch.ones_like(x)
    network = awake(unet().double())
    with sdpa_kernel(SDPBackend.MATH):
        _, forward = torch.func.jvp(lambda x: network(x, c), (x,), (v,))
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((network(x, c) * v).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close((forward * v).sum(), (gradient * v).sum())
    assert second.isfinite().all()


def test_unet_attention_lets_distant_pixels_meet():
    """With it, every pixel of the output depends on every one of the input; heads differ."""
    x, c = inputs((1, 4, 4), batch=1)
    x.requires_grad_()
    outputs = []
    for heads in (1, 2):
        torch.manual_seed(0)
        outputs.append(awake(unet((1, 4, 4), attention=AttentionLayout((0,), heads)))(x, c))
    assert not torch.allclose(*outputs)
    (gradient,) = torch.autograd.grad(outputs[0][0, 0, 0, 0], x)
    assert gradient.ne(0).all()


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (5, 1), (8, 2), (20, 5), (37, 1), (128, 32), (384, 32)]
)
def test_groups_divide_the_channels(channels, groups):
    assert Groups()(channels).num_groups == groups


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"shape": (8,)}, ["shape", "(8,)", "(C, H, W)", "MLP"]),
        ({"shape": (1, 8, 8, 8, 8)}, ["shape", "(1, 8, 8, 8, 8)", "(C, L)", "MLP"]),
        ({"shape": 8}, ["shape", "list", "got 8"]),
        ({"shape": (0, 8, 8)}, ["shape[0]", "got 0"]),
        ({"width": 0}, ["width", "4", "got 0"]),
        ({"width": 2}, ["width", "4", "got 2"]),
        ({"multipliers": ()}, ["multipliers", "(1, 2)"]),
        ({"multipliers": (1, 0)}, ["multipliers[1]", "got 0"]),
        ({"blocks": 0}, ["blocks", "positive", "got 0"]),
        ({"attention": (2,)}, ["(2,)", "2 multipliers", "0 (full resolution) to 1"]),
        ({"attention": (-1,)}, ["attention[0]", "got -1"]),
        ({"attention": (16,)}, ["attention", "(16,)"]),
        ({"attention": {"heads": 0}}, ["attention.heads", "got 0"]),
        ({"attention": {"heads": 3}}, ["heads", "16 channels", "got 3"]),
        ({"dropout": 1.0}, ["dropout", "[0, 1)", "1.0"]),
    ],
)
def test_unet_refuses(arguments, words):
    refused(lambda: unet(**arguments), words)


def test_unet_refuses_other_inputs():
    network = unet((3, 8, 8))
    c = torch.ones(2)
    refused(lambda: network(torch.ones(2, 1, 8, 8), c), ["(2, 1, 8, 8)", "(B, 3, H, W)"])
    refused(lambda: network(torch.ones(2, 3, 8), c), ["(2, 3, 8)", "(B, 3, H, W)"])
    signals = unet((3, 8))
    refused(lambda: signals(torch.ones(2, 3, 8, 8), c), ["(2, 3, 8, 8)", "(B, 3, L)"])


def refused(call, words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
