"""Networks and the loader against the reference: shapes, recorded scores, and every option.

The recorded scores and losses lie outside of the repository; name their folder in the environment
variable SCORESDE_REFERENCE to test with them.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde.interop.score_sde import describe, load_checkpoint, names, read_config
from scoresde.interop.score_sde.tensors import convert, places
from scoresde.recipe import build
from tests.score_sde_by_the_book import score
from tests.score_sde_files import config, tensors

SHAPES = json.loads((Path(__file__).parent / "fixtures/state_dict_shapes.json").read_text())
RECORDED = (
    "subvp_ddpmpp_continuous",
    "ve_ncsnpp_continuous",
    "ve_ncsnpp_skip_continuous",
    "vp_ddpm",
    "vp_ddpmpp_continuous",
)
TIMES = torch.tensor([0.01, 0.2, 0.6, 1.0], dtype=torch.float64)

FIR = {"fir": True}
DDPM = {"name": "ddpm", "nf": 32, "attn_resolutions": [8]}
VE = {"sde": "vesde", "centered": False}
FOURIER = {"embedding_type": "fourier"}
DISCRETE = {"continuous": False}
PLAIN = {"resblock_type": "ddpm"}
SCALED = {"scale_by_sigma": True}
OPTIONS = {
    "ddpm++": {},
    "ddpm++, sub-VP": {"sde": "subvpsde"},
    "ddpm++, sub-VP, discrete": {"sde": "subvpsde", **DISCRETE},
    "ddpm++, VP, discrete": {**DISCRETE, "num_scales": 100},
    "ncsn++": {**FIR, "progressive_input": "residual"},
    "ncsn++, VE": {**FIR, **VE, **FOURIER, **SCALED, "progressive_input": "residual"},
    "ncsn++, VE, discrete": {**FIR, **VE, **DISCRETE, **SCALED, "progressive_input": "residual"},
    "skips": {**FIR, "progressive": "output_skip", "progressive_input": "input_skip"},
    "skips, box": {"progressive": "output_skip", "progressive_input": "input_skip"},
    "cat": {**FIR, "progressive_input": "input_skip", "progressive_combine": "cat"},
    "cat, three levels": {
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
        "progressive": "output_skip",
        "ch_mult": [1, 2, 1],
        "num_res_blocks": 2,
    },
    "residual out": {"progressive": "residual", "progressive_input": "residual"},
    "residual out, not rescaled": {"progressive": "residual", "skip_rescale": False},
    "residual out, FIR": {**FIR, "progressive": "residual", "ch_mult": [1, 1, 2]},
    "ddpm blocks": PLAIN,
    "ddpm blocks, FIR": {**PLAIN, **FIR, "progressive_input": "residual"},
    "ddpm blocks, bare": {**PLAIN, "resamp_with_conv": False},
    "ddpm blocks, bare FIR": {**PLAIN, **FIR, "resamp_with_conv": False},
    "ddpm blocks, FIR, cat, all of it": {
        **PLAIN,
        **FIR,
        **VE,
        **FOURIER,
        **SCALED,
        "fir_kernel": [1, 2, 1],
        "progressive": "residual",
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
        "ch_mult": [2, 1, 1],
        "nonlinearity": "elu",
    },
    "turned kernel": {**FIR, "fir_kernel": [1, 2, 3, 5], "progressive_input": "residual"},
    "long kernel": {**FIR, "fir_kernel": [1, 4, 6, 4, 2], "progressive": "output_skip"},
    "short kernel": {**FIR, "fir_kernel": [1, 2], "progressive": "residual"},
    "square kernel": {**FIR, "fir_kernel": [[1, 2, 0], [3, 4, 1], [0, 1, 5]]},
    "one tap": {**FIR, "fir_kernel": [3], "progressive_input": "residual"},
    "Fourier, VP": FOURIER,
    "Fourier, sub-VP, scaled": {**FOURIER, **SCALED, "sde": "subvpsde"},
    "positional, VP, scaled": SCALED,
    "positional, VE": {**VE, "centered": True},
    "positional, VE, scaled": {**VE, **SCALED},
    "positional, VE, discrete, few scales": {**VE, **DISCRETE, **SCALED, "num_scales": 60},
    "positional, VP, few scales": {"num_scales": 10},
    "unconditional": {"conditional": False},
    "unconditional, Fourier, VE": {"conditional": False, **FOURIER, **VE, **SCALED},
    "unconditional, ddpm blocks": {"conditional": False, **PLAIN},
    "centered VE": {**VE, **FOURIER, "centered": True},
    "VP of [0, 1]": {"centered": False, "beta_min": 0.2, "beta_max": 10.0},
    "elu": {"nonlinearity": "elu"},
    "relu": {"nonlinearity": "ReLU"},
    "leaky": {"nonlinearity": "lrelu", "init_scale": 1.0},
    "no attention but in the middle": {"attn_resolutions": [16]},
    "attention everywhere": {"attn_resolutions": [8, 4], "num_res_blocks": 2},
    "one channel": {"num_channels": 1, **FIR, "progressive": "output_skip"},
    "one level": {"ch_mult": [1], "attn_resolutions": [8], **PLAIN},
    "one level, skips": {
        "ch_mult": [2],
        "progressive": "output_skip",
        "progressive_input": "input_skip",
    },
    "ddpm": DDPM,
    "ddpm, discrete": {**DDPM, **DISCRETE},
    "ddpm, bare": {**DDPM, "resamp_with_conv": False},
    "ddpm, VE": {**DDPM, **VE},
    "ddpm, VE, discrete": {**DDPM, **VE, **DISCRETE, **SCALED, "num_scales": 200},
    "ddpm, unconditional": {**DDPM, "conditional": False},
}


# --- Shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_of_the_published_networks_has_its_place(name):
    """Of the right shape, in the right order; and ours has as many parameters."""
    found = places(describe(name)["network"])
    expected = {k: tuple(v) for k, v in SHAPES[name]["shapes"].items() if k != "sigmas"}
    assert [(place.theirs, place.shape) for place in found] == list(expected.items())
    assert sum(place.trained for place in found) == SHAPES[name]["trainable"]
    with torch.device("meta"):
        network = build(describe(name)["network"])
    arrays = network.state_dict().values()  # their Fourier frequencies count as parameters
    assert sum(array.numel() for array in arrays) == SHAPES[name]["parameters"]


@pytest.mark.parametrize("name", [name for name in names() if name not in SHAPES])
def test_every_other_published_configuration_describes_a_model(name):
    with torch.device("meta"):
        model = build(describe(name))
    theirs = read_config(name)["data"]
    shape = (theirs["num_channels"], *[theirs["image_size"]] * 2)
    assert getattr(model.network, "network", model.network).shape == shape


# --- Every option --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_score_by_the_book(name):
    """In float64, for tensors of random numbers."""
    options = config(**OPTIONS[name])
    recipe = describe(options)
    values = tensors(options)
    model = build(recipe).eval()
    model.load_state_dict(convert(values, places(recipe["network"]), "test"))
    generator = torch.Generator().manual_seed(3)
    shape = (4, options["data"]["num_channels"], 8, 8)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        actual = model.double().score(x, TIMES)
        expected = score(options, {k: v.double() for k, v in values.items()}, x, TIMES)
    assert actual.dtype == torch.float64
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


# --- Recorded numbers ----------------------------------------------------------------------------


@pytest.fixture(params=RECORDED)
def recorded(request):
    """A network of the reference: the loaded model, its configuration, and what it computed."""
    folder = os.environ.get("SCORESDE_REFERENCE")
    if not folder:
        pytest.skip("the recorded numbers are not here; name their folder: SCORESDE_REFERENCE=...")
    path = Path(folder) / "tiny" / request.param
    model = load_checkpoint(path.with_suffix(".pth"), path.with_suffix(".json"))
    with np.load(path.with_suffix(".npz")) as file:
        numbers = {key: file[key] for key in file if "/" not in key}
    return model, read_config(path.with_suffix(".json")), numbers


@torch.no_grad()
def test_recorded_scores(recorded):
    model, _, numbers = recorded
    actual = model.score(torch.tensor(numbers["x_t"]), torch.tensor(numbers["t"]))
    for ours, theirs in zip(actual.numpy(), numbers["score"], strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["loss", "loss_likelihood"])
def test_recorded_losses(recorded, kind):
    r"""The mean or half the sum of (z - z_hat)^2, or g^2 / sigma^2 times it."""
    model, theirs, numbers = recorded
    if kind not in numbers:
        pytest.skip("a discrete model has no continuous loss")
    x, z = torch.tensor(numbers["x"]), torch.tensor(numbers[f"{kind}_z"])
    t = 1e-5 + torch.tensor(numbers[f"{kind}_u"]) * (1 - 1e-5)
    errors = (model.noise(model.sde.perturb(x, t, z), t) - z).square().flatten(1)
    losses = errors.mean(1) if theirs["training"]["reduce_mean"] else errors.sum(1) / 2
    if kind == "loss_likelihood":
        losses = losses * (model.sde.g(t) / model.sde.sigma(t)) ** 2
    np.testing.assert_allclose(losses.mean().numpy(), numbers[kind], rtol=1e-5)
