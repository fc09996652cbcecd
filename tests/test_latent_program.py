"""The program on latents: an autoencoder, a diffusion behind it, and every task on that."""

import json

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from scoresde import load
from scoresde.codec import LatentCodec
from scoresde.nn import ImageDecoder
from tests.test_recipes import composed
from tests.test_run import TINY, program, refused

SMALL = ["network.widths=[8,8]", "network.latents=2", "network.outputs=4", "loss.warmup=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("programs")
    program("+experiment=digits_vae", *TINY, *SMALL, "hydra.run.dir=vae", cwd=place)
    more = ["likelihood=default", "samplers=null", "network.width=8", "network.classes=10"]
    options = [*TINY[:4], "baselines=false", "progress=false", "codec=vae", *more]
    program("+experiment=digits_latent", *options, "hydra.run.dir=run", cwd=place)
    return place


def test_an_autoencoder_has_a_report_of_its_bound(folder):
    result = json.loads((folder / "vae/result.json").read_text())
    bound = json.loads((folder / "vae/bound.json").read_text())
    assert result["bits_per_dim"] == bound["bits_per_dim"]
    nats = bound["kl"] - bound["reconstruction"]
    assert bound["bits_per_dim"] == pytest.approx(nats / (64 * np.log(2)), rel=1e-6)
    assert (folder / "vae/comparison.png").exists()
    assert "divergence from N(0, I)" in (folder / "vae/report.html").read_text()
    assert bound["examples"] == 8
    assert bound["latents"] == 2 * 4 * 4


def test_the_checkpoint_carries_the_codec(folder):
    vae, run = load(folder / "vae"), load(folder / "run")
    assert isinstance(run.codec, LatentCodec)
    x = torch.rand(2, *vae.model.shape)
    m, w = (torch.as_tensor(v) for v in (run.codec.shift, run.codec.width))
    raw = vae.codec.decode(vae.model.decode(x).detach())
    assert torch.equal(run.codec.decode((x - m) / w), raw)
    assert json.loads((folder / "run/result.json").read_text())["status"] == "ok"


def test_samples_are_decoded_and_conditional(folder):
    options = ["checkpoint=run", "count=4", "progress=false", "sampler=unipc", "sampler.steps=2"]
    program("task=sample", *options, "label=[1,2]", "hydra.run.dir=drawn", cwd=folder)
    file = np.load(folder / "drawn/samples.npz")
    assert file["x"].shape == (4, 1, 8, 8)
    assert file["x"].dtype == np.uint8
    assert file["label"].tolist() == [1, 2, 1, 2]
    program(
        "task=interpolate", *options, "label=1", "points=3", "hydra.run.dir=between", cwd=folder
    )
    assert np.load(folder / "between/interpolation.npz")["x"].shape == (4, 3, 1, 8, 8)


def test_data_become_latents_of_the_flow(folder):
    options = ["checkpoint=run", "examples=4", "progress=false", "sampler.rtol=0.1"]
    program("task=encode", *options, "sampler.atol=0.1", "hydra.run.dir=encoded", cwd=folder)
    assert np.load(folder / "encoded/latents.npz")["x"].shape == (4, 2, 4, 4)


def test_the_likelihood_is_the_latent_bound_and_noisy_weights_are_refused(folder):
    options = ["task=likelihood", "checkpoint=run", "examples=6", "progress=false"]
    program(*options, "likelihood=bound", "draws=3", "hydra.run.dir=bound", cwd=folder)
    found = json.loads((folder / "bound/likelihood.json").read_text())
    assert found["unit"] == "bits/dim"
    assert found["nfe"] == 3 * 18
    said = refused(*options, "likelihood=bound", "draws=3", "weighted=true", cwd=folder)
    assert "likelihood must be exact" in said
    said = refused(*options, "draws=2", "dequantisation=truncated_normal", cwd=folder)
    assert "dequantisation" in said


def test_what_is_not_an_autoencoder_is_no_codec(folder):
    options = ["+experiment=digits_latent", *TINY[:4], "progress=false"]
    assert "codec" in refused(*options, cwd=folder)
    assert "ScoreModel" in refused(*options, "codec=run", cwd=folder)
    assert "(1, 8, 8)" in refused(*options, "codec=vae", "data=two_moons", cwd=folder)
    assert "codec" in refused("task=sample", "checkpoint=run", "codec=vae", cwd=folder)
    for task in ("sample", "likelihood", "encode"):
        assert "VAE" in refused(f"task={task}", "checkpoint=vae", cwd=folder)


def test_a_latent_sample_takes_a_third_of_the_operations_at_most():
    """By torch's counter, at ten passes, with the networks of both recipes and the decoder."""
    sizes = composed("digits_vae")["network"]
    decoder = ImageDecoder((1, 8, 8), sizes["latents"], sizes["widths"], sizes["blocks"])
    z, t = torch.zeros(1, *decoder.input_shape), torch.zeros(1)
    networks = [
        instantiate({**composed(name)["network"], "shape": list(x.shape[1:])}, _convert_="all")
        for name, x in (("digits_vp", torch.zeros(1, 1, 8, 8)), ("digits_latent", z))
    ]
    pixels = 10 * operations(lambda: networks[0](torch.zeros(1, 1, 8, 8), t))
    latents = 10 * operations(lambda: networks[1](z, t)) + operations(lambda: decoder(z))
    assert pixels > 3 * latents


def operations(act):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


@pytest.mark.parametrize("option", ["levels", "discrete"])
def test_a_bound_of_levels_is_one_of_latents(folder, option):
    """The decoder of the levels is the autoencoder's."""
    words = ["task=likelihood", "checkpoint=run", "examples=3", "progress=false"]
    program(*words, f"likelihood={option}", f"hydra.run.dir={option}", cwd=folder)
    found = json.loads((folder / option / "likelihood.json").read_text())
    assert np.isfinite(found["mean"])


@pytest.mark.parametrize("method", ["mmps", "dps"])
def test_pixels_are_restored_through_the_decoder(folder, method):
    words = ["task=restore", "checkpoint=run", "operator=hole", "std=1.0", "label=1", "draws=1"]
    steps = ["examples=2", "restore.sampler.steps=2", "progress=false"]
    program(*words, *steps, f"method={method}", f"hydra.run.dir={method}", cwd=folder)
    assert np.load(folder / method / "restored.npz")["x"].shape == (2, 1, 8, 8)


def test_the_remedy_of_noisy_weights_works(folder):
    words = ["task=likelihood", "checkpoint=run", "examples=2", "draws=2", "weighted=true"]
    exact = ["likelihood=default", "likelihood.probes=exact", "progress=false"]
    program(*words, *exact, "hydra.run.dir=weighted", cwd=folder)


def test_a_missing_value_of_the_model_is_named_in_full(tmp_path):
    said = refused("data=digits", "model=vae", "network=convolutional", "loss=elbo", cwd=tmp_path)
    assert "model.likelihood.levels=" in said
