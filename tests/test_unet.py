"""The options of the U-Net: resampling, transitions, pyramids, conditions, scaling by sigma."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy.signal import convolve2d
from torch import nn

from scoresde.errors import InputError
from scoresde.nn import (
    MLP,
    Architecture,
    AttentionLayout,
    BigGANTransition,
    BoxResampling,
    Concatenation,
    DDPMTransition,
    FIRResampling,
    FourierEmbedding,
    GeometricSigmas,
    Groups,
    InputResidual,
    InputSkip,
    OutputResidual,
    OutputSkip,
    ScaledBySigma,
    UNet,
)
from scoresde.recipe import build, describe

KERNELS = [(1, 3, 3, 1), (1, 2, 1), (1, 2, 3, 5), (1, 4, 6, 4, 2), (1, 1), (3,)]
SQUARE = [[1, 2, 0], [3, 4, 1], [0, 1, 5]]
RESAMPLINGS = [BoxResampling(), FIRResampling(), FIRResampling([1, 2, 1])]
EVERYTHING = {
    "shape": (3, 8, 12),
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": AttentionLayout((0, 1), heads=2, after_each=True),
    "architecture": Architecture(
        resampling=FIRResampling(),
        input_pyramid=InputSkip(Concatenation()),
        output_pyramid=OutputResidual(),
        activation=nn.ELU(),
    ),
    "conditions": {"labels": 4, "augment": 2},
    "centre": True,
}


def unet(**kwargs):
    return UNet(**{"shape": (3, 8, 12), "width": 8, "blocks": 1, **kwargs})


def of(**architecture):
    return unet(architecture=Architecture(**architecture))


def awake(network):
    """Fills the layers that start at zero, so that every path counts."""
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def inputs(shape=(3, 8, 12), batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, *shape, generator=generator, dtype=dtype)
    return x, torch.linspace(0.5, 2, batch, dtype=dtype)


@pytest.fixture(scope="module")
def everything():
    """A network with everything on, and its inputs."""
    torch.manual_seed(0)
    x, c = inputs()
    return awake(UNet(**EVERYTHING)).eval(), x, c, {"labels": torch.eye(4)[:2]}


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# --- Resampling ----------------------------------------------------------------------------------


def filtered(image, kernel, up, down, pad):
    """The definition of ``upfirdn2d`` with scipy, for one channel."""
    kernel = np.asarray(kernel, dtype=float)
    kernel = np.outer(kernel, kernel) if kernel.ndim == 1 else kernel
    zeros = np.zeros([n * up for n in image.shape])
    zeros[::up, ::up] = image
    padded = np.pad(zeros, [[max(0, n) for n in pad]] * 2)
    padded = padded[: padded.shape[0] + min(0, pad[1]), : padded.shape[1] + min(0, pad[1])]
    return convolve2d(padded, kernel / kernel.sum(), mode="valid")[::down, ::down]


@pytest.mark.parametrize("kernel", [*KERNELS, SQUARE])
def test_fir_resampling_is_that_of_stylegan2(kernel):
    x, _ = inputs((2, 6, 10), batch=1, dtype=torch.float64)
    p = len(kernel) - 2
    layers = FIRResampling(kernel)
    down, up = layers.down().double()(x), layers.up().double()(x)
    assert down.shape == (1, 2, 3, 5)
    assert up.shape == (1, 2, 12, 20)
    for i, image in enumerate(x[0].numpy()):
        expected = filtered(image, kernel, 1, 2, ((p + 1) // 2, p // 2))
        np.testing.assert_allclose(down[0, i].numpy(), expected, atol=1e-14)
        expected = 4 * filtered(image, kernel, 2, 1, ((p + 1) // 2 + 1, p // 2))
        np.testing.assert_allclose(up[0, i].numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("layers", RESAMPLINGS)
def test_flat_images_stay_flat(layers):
    x = torch.full((1, 2, 8, 8), 3.0)
    for y in (layers.down()(x)[..., 1:-1, 1:-1], layers.up()(x)[..., 2:-2, 2:-2]):
        torch.testing.assert_close(y, torch.full_like(y, 3.0))


@pytest.mark.parametrize("kernel", [*KERNELS, SQUARE])
def test_convolution_and_filter_may_change_places(kernel):
    """Within the image; and a convolution that does nothing leaves the resampling alone."""
    x, _ = inputs((2, 8, 8), batch=1, dtype=torch.float64)
    layers = FIRResampling(kernel)
    up, down = layers.up_conv(2, 3).double(), layers.down_conv(2, 3).double()
    for layer in (up, down):
        nn.init.normal_(layer.conv.bias)
    inner = (..., slice(5, -5), slice(5, -5))
    expected = nn.functional.conv2d(
        layers.up().double()(x), up.conv.weight, up.conv.bias, padding=1
    )
    torch.testing.assert_close(up(x)[inner], expected[inner])
    assert down(x).shape == (1, 3, 4, 4)
    with torch.no_grad():
        for layer, alone in ((up, layers.up()), (down, None)):
            layer.conv.weight.zero_()
            layer.conv.bias.zero_()
            layer.conv.weight[:2, :, 1, 1] = torch.eye(2)
            if alone is not None:
                torch.testing.assert_close(layer(x)[:, :2], alone.double()(x))
            assert not layer(x)[:, 2].any()


def test_box_convolution_pads_the_end():
    """As in DDPM: the first pixel of the result sees the first three."""
    layer = BoxResampling().down_conv(1, 1)
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = 1
    torch.testing.assert_close(layer(x)[0, 0, 0, 0], layer.conv.weight[0, 0, 0, 0])
    assert not layer(x)[0, 0].flatten()[1:].any()


@pytest.mark.parametrize(
    "kernel", [(), "1331", 3, (1, -1), (1, "a"), [[1, 2]], [[1], 2], (np.nan,)]
)
def test_kernels_refused(kernel):
    refused(lambda: FIRResampling(kernel), "kernel", "[1, 3, 3, 1]")


def test_constants_follow_the_network():
    """Not saved, never left empty, and float32 or better."""
    with torch.device("meta"):
        empty = ScaledBySigma(of(resampling=FIRResampling()), GeometricSigmas(scales=7))
    expected = ScaledBySigma(of(resampling=FIRResampling()), GeometricSigmas(scales=7))
    assert not any("kernel" in name or "sigmas" in name for name in expected.state_dict())
    x, c = inputs()
    assert empty(x.to("meta"), c.to("meta")).is_meta
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(expected.state_dict())
    empty.load_state_dict(expected.state_dict(), assign=True)
    for network in (filled, empty):
        assert torch.equal(awake(network)(x, c), awake(copy.deepcopy(expected))(x, c))
    narrow = copy.deepcopy(expected).bfloat16()
    assert torch.equal(narrow.sigmas, expected.sigmas)
    assert narrow(x.bfloat16(), c).dtype == torch.bfloat16
    wide = narrow.double()
    sigmas = torch.tensor(list(GeometricSigmas(scales=7)), dtype=torch.float64)
    assert torch.equal(wide.sigmas, sigmas)


# --- The network ---------------------------------------------------------------------------------

TRANSITIONS = [BigGANTransition(), DDPMTransition(), DDPMTransition(convolution=False)]
ENTRIES = [None, InputSkip(), InputSkip(Concatenation()), InputResidual()]
OUTPUTS = [None, OutputSkip(), OutputResidual()]


@pytest.mark.parametrize("resampling", RESAMPLINGS[:2])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_every_combination_starts_at_zero_and_learns_in_every_weight(transition, resampling):
    x, c = inputs()
    for entry, output in itertools.product(ENTRIES, OUTPUTS):
        network = unet(
            width=4,
            architecture=Architecture(
                transition=transition,
                resampling=resampling,
                input_pyramid=entry,
                output_pyramid=output,
            ),
        )
        assert network(x, c).shape == x.shape
        assert not network(x, c).any()
        awake(network)(x, c).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_residual_blocks_start_as_their_shortcut():
    x, c = inputs((8, 8, 12))
    network = unet(shape=(8, 8, 12), architecture=Architecture(rescale=False))
    block = network.down[0].blocks[0]
    assert torch.equal(block(x, network.conditioning(c, x, {})), x)
    assert torch.equal(network.middle.attention(x.repeat(1, 2, 1, 1)), x.repeat(1, 2, 1, 1))


def test_initial_scale():
    x, c = inputs()
    assert of(init_scale=1.0)(x, c).abs().mean() > 1e-2
    assert of(init_scale=1.0).middle.attention.out.weight.any()


@pytest.mark.parametrize("activation", [nn.ELU(), nn.ReLU(), nn.LeakyReLU(0.2)])
def test_the_activation_is_everywhere(activation):
    """A network without SiLU has none left."""
    network = of(activation=activation, output_pyramid=OutputSkip())
    assert not any(isinstance(module, nn.SiLU) for module in network.modules())
    assert list(network.state_dict()) == list(of(output_pyramid=OutputSkip()).state_dict())


def test_groups_of_ddpm():
    ddpm = Architecture(norm=Groups(32, 1, eps=1e-5), output_pyramid=OutputSkip())
    network = unet(width=32, architecture=ddpm)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32}
    assert {norm.eps for norm in norms} == {1e-5}


def test_without_a_label():
    x, c = inputs()
    network = awake(of(conditional=False))
    assert torch.equal(network(x, c), network(x, c + 1))
    assert not any("conditioning" in name or "shift" in name for name in network.state_dict())


def test_images_of_0_to_1_are_centred():
    x, c = inputs()
    torch.manual_seed(0)
    plain = awake(of(input_pyramid=InputSkip()))
    centred = unet(architecture=Architecture(input_pyramid=InputSkip()), centre=True)
    centred.load_state_dict(plain.state_dict())
    torch.testing.assert_close(centred(x, c), plain(2 * x - 1, c))


def test_attention_after_each_block():
    names = dict(unet(blocks=2, attention={"after_each": True}).named_modules())
    assert "up.0.early_attentions.1.qkv" in names
    assert "up.0.attention.qkv" in names
    few = dict(unet(blocks=2).named_modules())
    assert "up.0.early_attentions.1.qkv" not in few
    assert "up.0.attention.qkv" in few


def test_heads_of_a_width():
    network = unet(attention=AttentionLayout((0, 1), head_width=4))
    assert network.down[0].attentions[0].heads == 2
    assert network.down[1].attentions[0].heads == 4
    assert unet(attention=AttentionLayout(head_width=64)).middle.attention.heads == 1


def test_everything_in_channels_last(everything):
    network, x, c, labels = everything
    expected = network(x, c, **labels)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x, c, **labels), expected, rtol=1e-4, atol=1e-5)


def test_everything_compiles_without_graph_breaks(everything):
    network, x, c, labels = everything
    scaled = ScaledBySigma(network, GeometricSigmas(scales=5))
    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c, **labels), scaled(x, c, **labels))


def test_everything_in_bfloat16(everything):
    network, x, c, labels = everything
    expected = network(x, c, **labels)
    with torch.autocast("cpu", torch.bfloat16):
        actual = network(x, c, **labels).float()
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()
    narrow = copy.deepcopy(network).bfloat16()
    actual = narrow(x.bfloat16(), c, **labels)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_rows_do_not_know_each_other(everything):
    network, x, c, labels = everything
    wide = copy.deepcopy(network).double()
    both = wide(x.double(), c.double(), **labels)
    for i in range(2):
        alone = wide(x[i : i + 1].double(), c[i : i + 1], labels=labels["labels"][i : i + 1])
        torch.testing.assert_close(alone[0], both[i], rtol=0, atol=1e-10)


# --- Conditions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build_network", [unet, lambda **kwargs: MLP((3, 8, 12), 16, 1, **kwargs)]
)
def test_conditions(build_network):
    x, c = inputs()
    labels = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    torch.manual_seed(0)
    plain = awake(build_network())
    network = build_network(conditions={"labels": 4, "augment": 2})
    network.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(x, c)
    assert torch.equal(network(x, c), expected)
    assert torch.equal(network(x, c, labels=labels), expected)  # they start at zero
    told = awake(network)(x, c, labels=labels)
    assert not torch.allclose(told[0], expected[0])
    torch.testing.assert_close(told[1], expected[1])
    torch.testing.assert_close(
        network(x, c, labels=labels, augment=0 * c[:, None].repeat(1, 2)), told
    )


def test_conditions_refused():
    x, c = inputs()
    network = unet(conditions={"labels": 4})
    refused(lambda: network(x, c, classes=x), "'classes'", "(labels)", "conditions=")
    refused(lambda: unet()(x, c, labels=x), "'labels'", "(none)", "remove it, or")
    refused(lambda: unet()(x, c, label=x), "'label'", "; remove it, or", "with classes=C.")
    refused(lambda: network(x, c, labels=torch.ones(2, 3)), "(2, 3)", "(2, 4)")
    refused(lambda: network(x, c, labels=torch.ones(4)), "(4,)", "(2, 4)")
    refused(lambda: of(conditional=False)(x, c, labels=x), "labels", "conditional=False")
    untold = Architecture(conditional=False)
    refused(lambda: unet(architecture=untold, conditions={"a": 1}), "conditional=False", "'a'")
    refused(lambda: unet(conditions={"labels": 0}), "conditions.labels", "got 0")
    for name in ("x", "c", "class", "a b", "keys", 3):
        refused(lambda name=name: unet(conditions={name: 1}), repr(name), "identifiers")


# --- Scaling by sigma ----------------------------------------------------------------------------


def test_scaled_by_the_label_or_by_a_table():
    x, _ = inputs()
    c = torch.tensor([1.0, 2.5])
    network = awake(unet())
    expected = network(x, c)
    torch.testing.assert_close(ScaledBySigma(network)(x, c)[1], expected[1] / 2.5)
    scaled = ScaledBySigma(network, [8.0, 4.0, 2.0])
    torch.testing.assert_close(
        scaled(x, c), expected / torch.tensor([4.0, 2.0])[:, None, None, None]
    )
    refused(lambda: ScaledBySigma(network, [1.0, 0.0]), "sigmas", "[1.0, 0.0]")
    refused(lambda: ScaledBySigma(network, []), "sigmas", "[]")


def test_geometric_sigmas():
    sigmas = GeometricSigmas(0.01, 50.0, 232)
    expected = np.exp(np.linspace(np.log(50), np.log(0.01), 232))
    np.testing.assert_allclose(list(sigmas), expected, rtol=1e-13)
    assert len(sigmas) == 232
    assert sigmas[-1] == 0.01
    assert sigmas[1:3] == [sigmas[1], sigmas[2]]
    refused(lambda: GeometricSigmas(1.0, 0.5), "sigma_min", "1.0 and 0.5")
    refused(lambda: GeometricSigmas(scales=1), "scales", "got 1")


def test_fourier_embedding_of_the_logarithm():
    c = torch.tensor([0.01, 3.0, 50.0])
    torch.testing.assert_close(
        FourierEmbedding(8, 16.0, log=True)(c), FourierEmbedding(8, 16.0)(c.log())
    )


# --- Recipes and refusals ------------------------------------------------------------------------


def test_recipes_build_every_option():
    recipe = {
        "_target_": "scoresde.nn.ScaledBySigma",
        "network": {
            "_target_": "scoresde.nn.UNet",
            "shape": [1, 8, 8],
            "width": 8,
            "blocks": 1,
            "architecture": {
                "_target_": "scoresde.nn.Architecture",
                "transition": {"_target_": "scoresde.nn.DDPMTransition", "convolution": False},
                "resampling": {"_target_": "scoresde.nn.FIRResampling", "kernel": [1, 2, 1]},
                "input_pyramid": {
                    "_target_": "scoresde.nn.InputSkip",
                    "combine": {"_target_": "scoresde.nn.Concatenation"},
                },
                "output_pyramid": {"_target_": "scoresde.nn.OutputSkip"},
                "activation": {"_target_": "torch.nn.ELU"},
                "norm": {"_target_": "scoresde.nn.Groups", "most": 4},
            },
            "embedding": {"_target_": "scoresde.nn.FourierEmbedding", "width": 8, "log": True},
            "conditions": {"labels": 10},
        },
        "sigmas": {"_target_": "scoresde.nn.GeometricSigmas", "scales": 10},
    }
    for network in (build(recipe), instantiate(recipe, _convert_="all")):
        x, c = inputs((1, 8, 8))
        assert network(x, c, labels=torch.ones(2, 10)).shape == x.shape
        assert network.network.down[0].pyramid.conv.out_channels == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": {"head_width": 0}}, ["attention.head_width", "positive", "got 0"]),
        ({"attention": {"head_width": 3}}, ["heads", "16 channels", "got 5"]),
        ({"architecture": None}, ["architecture", "got None"]),
        ({"centre": "yes"}, ["centre", "'yes'"]),
    ],
)
def test_refusals(arguments, words):
    refused(lambda: unet(**arguments), *words)


def test_groups_refused():
    refused(lambda: Groups(most=0), "norm.most", "got 0")
    refused(lambda: Groups(least=0), "norm.least", "got 0")
    refused(lambda: Groups(eps=-1), "norm.eps", "got -1")
    refused(lambda: Groups(exceptions=[3]), "norm.exceptions", "[3]")
    refused(lambda: Groups(exceptions={"norm_out": 0}), "norm.exceptions['norm_out']", "got 0")


@pytest.mark.parametrize(
    "field",
    ["transition", "resampling", "norm", "activation", "input_pyramid", "output_pyramid"],
)
def test_architectures_refused(field):
    refused(lambda: Architecture(**{field: 3}), f"architecture.{field}", "got 3")


@pytest.mark.parametrize("value", [-1.0, np.nan, "small"])
def test_initial_scales_refused(value):
    refused(lambda: Architecture(init_scale=value), "architecture.init_scale", repr(value))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"levels": 1}, ["attention", "list", "got 1"]),
        ({"heads": 0}, ["attention.heads", "got 0"]),
        ({"head_width": 1.5}, ["attention.head_width", "got 1.5"]),
        ({"after_each": 1}, ["attention.after_each", "got 1"]),
    ],
)
def test_attention_layouts_refused(fields, words):
    refused(lambda: AttentionLayout(**fields), *words)


# --- The constructor -----------------------------------------------------------------------------


def test_the_constructor_is_short():
    names = [*inspect.signature(UNet).parameters]
    assert len(names) <= 11
    assert names[:5] == ["shape", "width", "multipliers", "blocks", "attention"]
    assert {"dropout", "embedding", "conditions", "classes"} <= {*names}


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        (None, AttentionLayout((1,), 1, None, False)),
        ((0, 1), AttentionLayout((0, 1))),
        ([], AttentionLayout(())),
        ({"heads": 2}, AttentionLayout((1,), 2)),
        ({"levels": [0], "heads": 2, "after_each": True}, AttentionLayout((0,), 2, None, True)),
    ],
)
def test_what_stands_for_a_layout_of_attention(given, layout):
    assert AttentionLayout.of(given) == layout
    assert str(unet(attention=given)) == str(unet(attention=layout))


def test_options_are_values():
    assert AttentionLayout([0, 1]) == AttentionLayout((0, 1))
    assert Architecture() == Architecture(BigGANTransition(), BoxResampling(), Groups(32, 4))
    assert len({Architecture(), Architecture(norm=Groups(4)), Architecture(rescale=False)}) == 3
    several = Architecture(norm=Groups(exceptions={"norm_out": 1}), input_pyramid=InputSkip())
    assert build(describe(several)) == several
    assert describe(Architecture()) == {"_target_": "scoresde.nn.Architecture"}
