"""Autoencoders of diffusers: the same numbers as the library's own, where it is installed."""

import json

import pytest
import torch

from scoresde import VPSDE, GaussianModel, InputError, VariationalBound, load
from scoresde.codec import LatentCodec
from scoresde.data import Dataset
from scoresde.interop.diffusers import load_autoencoder, load_checkpoint
from scoresde.likelihood import LatentBound
from scoresde.model import LatentModel
from scoresde.streams import Streams
from tests.test_run import program

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 12),
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=8,
    )
    for parameter in theirs.parameters():  # norms begin as ones, and biases as zeros
        torch.nn.init.normal_(parameter, std=0.3)
    place = tmp_path_factory.mktemp("kl")
    theirs.save_pretrained(place)
    return place, theirs.eval()


@torch.no_grad()
def test_the_numbers_are_the_librarys(folder):
    place, theirs = folder
    ours, x = load_autoencoder(place), torch.randn(2, 3, 8, 8)
    law, wanted = ours.encoder.law(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(law.mean, wanted.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.log_std.exp(), wanted.std, rtol=1e-4, atol=1e-6)
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)
    assert ours.raw_shape == (3, 8, 8)
    assert ours.shape == (3, 4, 4)


def test_it_is_a_codec_with_a_measured_scale_and_no_density(folder):
    codec = load_autoencoder(folder[0])
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    data = Dataset.of("noise", [images] * 3, levels=256).with_codec(codec)
    x = data.batch("train", Streams.of(0, batch=40)).x
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3))
    assert data.decode(x).shape == images.shape
    prior = GaussianModel(mean=torch.zeros(3, 4, 4), std=1.0, sde=VPSDE())
    with pytest.raises(InputError, match="LatentCodec"):
        LatentBound(VariationalBound())(LatentModel(data.codec, prior), images)


def test_an_imported_one_is_a_run_like_any_other(folder, tmp_path):
    program("task=import", f"checkpoint={folder[0]}", "hydra.run.dir=run", cwd=tmp_path)
    run = load(tmp_path / "run")
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    codec = LatentCodec(run.codec, run.model)
    wanted = load_autoencoder(folder[0]).encode(run.codec.encode(x))
    torch.testing.assert_close(codec.encode(x), wanted.detach())


@pytest.mark.parametrize(
    ("key", "value"),
    [("act_fn", "relu"), ("mid_block_add_attention", False), ("out_channels", 1),
     ("down_block_types", ["DownBlock2D", "DownEncoderBlock2D"]), ("latent_channels", 0)],
)  # fmt: skip
def test_other_architectures_are_refused(folder, tmp_path, key, value):
    config = json.loads((folder[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).write_bytes((folder[0] / weights).read_bytes())
    with pytest.raises(InputError, match=key):
        load_autoencoder(tmp_path)


def test_a_model_is_not_a_codec(folder):
    with pytest.raises(InputError, match="load_autoencoder"):
        load_checkpoint(folder[0])
