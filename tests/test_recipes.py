"""The recipes of published models against the published configurations, value by value."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from scoresde import VESDE, VPSDE, ChainIndex, DiscreteVP, NoiseParametrisation, SubVPSDE
from scoresde.interop.score_sde import describe, read_config
from scoresde.model import ReversedIndex, ScaledTime, Sigma
from scoresde.recipe import build
from scoresde.sample import AncestralPredictor, Langevin, ReverseDiffusionPredictor
from scoresde.times import ChainTimes, LevelTimes, UniformTimes

ROOT = Path(__file__).parents[1]
SHAPES = json.loads((Path(__file__).parent / "fixtures/state_dict_shapes.json").read_text())
PORTED = {
    "cifar_vp": "vp/cifar10_ddpmpp_continuous",
    "cifar_vp_deep": "vp/cifar10_ddpmpp_deep_continuous",
    "cifar_subvp": "subvp/cifar10_ddpmpp_continuous",
    "cifar_subvp_deep": "subvp/cifar10_ddpmpp_deep_continuous",
    "cifar_vp_ncsnpp": "vp/cifar10_ncsnpp_continuous",
    "cifar_vp_ncsnpp_deep": "vp/cifar10_ncsnpp_deep_continuous",
    "cifar_subvp_ncsnpp": "subvp/cifar10_ncsnpp_continuous",
    "cifar_subvp_ncsnpp_deep": "subvp/cifar10_ncsnpp_deep_continuous",
    "cifar_ve": "ve/cifar10_ncsnpp_continuous",
    "cifar_ve_deep": "ve/cifar10_ncsnpp_deep_continuous",
    "cifar_ddpm": "vp/ddpm/cifar10",
    "celeba_ve": "ve/celeba_ncsnpp",
    "lsun_bedroom_ve": "ve/bedroom_ncsnpp_continuous",
    "lsun_church_ve": "ve/church_ncsnpp_continuous",
    "ffhq_256_ve": "ve/ffhq_256_ncsnpp_continuous",
    "ffhq_1024_ve": "ve/ffhq_ncsnpp_continuous",
    "celebahq_256_ve": "ve/celebahq_256_ncsnpp_continuous",
}
SDES = {"vpsde": VPSDE, "subvpsde": SubVPSDE, "vesde": VESDE}

each_port = pytest.mark.parametrize(("recipe", "key"), PORTED.items(), ids=PORTED)


@cache
def composed(recipe):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [f"+experiment={recipe}"])
        if OmegaConf.is_missing(config.data, "path"):
            config.data.path = "x"
    return OmegaConf.to_container(config, resolve=True)


def built(section):
    return instantiate(section, _convert_="all")


@cache
def networks(recipe, key):
    """The recipe's network, and the one that loads the published weights; without data."""
    theirs = read_config(key)
    size, channels = theirs["data"]["image_size"], theirs["data"]["num_channels"]
    section = {**composed(recipe)["network"], "shape": [channels, size, size]}
    with torch.device("meta"):
        ours, loaded = built(section), build(describe(theirs)).network
    return ours, getattr(loaded, "network", loaded)  # without the division by sigma


@each_port
def test_the_data_are_prepared_as_published(recipe, key):
    data, theirs = composed(recipe)["data"], read_config(key)["data"]
    assert data["centred"] == theirs["centered"]
    assert data["flip"] == theirs["random_flip"]
    assert data["dequantise"] == theirs["uniform_dequantization"]
    assert data.get("size", 32) == theirs["image_size"]
    assert data.get("validation", 0) == 0


@each_port
def test_the_sde_is_the_published_one(recipe, key):
    sde, theirs = built(composed(recipe)["sde"]), read_config(key)
    model = theirs["model"]
    if theirs["training"]["sde"] == "vesde":
        assert sde == VESDE(model["sigma_min"], model["sigma_max"])
    elif theirs["training"]["continuous"]:
        kind = SDES[theirs["training"]["sde"]]
        assert sde == kind(model["beta_min"], model["beta_max"])
    else:
        assert isinstance(sde, DiscreteVP)
        assert sde.steps == model["num_scales"]
        assert (sde.betas.beta_min, sde.betas.beta_max) == (model["beta_min"], model["beta_max"])


@each_port
def test_the_network_is_the_published_one(recipe, key):
    """Its tensors by name and shape, their count, and the options that no tensor shows."""
    ours, loaded = networks(recipe, key)
    shapes, expected = (
        {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for network in (ours, loaded)
    )
    assert shapes == expected
    if key in SHAPES:
        assert sum(math.prod(shape) for shape in shapes.values()) == SHAPES[key]["parameters"]
    assert repr(ours) == repr(loaded)
    theirs = read_config(key)
    assert ours.centre == loaded.centre != theirs["data"]["centered"]
    dropouts = {m.p for m in ours.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {theirs["model"]["dropout"]}


@each_port
def test_the_network_is_told_and_read_as_published(recipe, key):
    config, theirs = composed(recipe), read_config(key)
    label, training = built(config["noise_label"]), theirs["training"]
    assert built(config["parametrisation"]) == NoiseParametrisation(sigma_data=None)
    if training["sde"] == "vesde":
        scales = theirs["model"]["num_scales"]
        assert label == (Sigma() if training["continuous"] else ReversedIndex(scales))
    else:
        assert label == (ScaledTime(999.0) if training["continuous"] else ChainIndex())


@each_port
def test_the_loss_is_the_published_one(recipe, key):
    loss, theirs = built(composed(recipe)["loss"]), read_config(key)["training"]
    assert loss.reduce_mean == theirs["reduce_mean"]
    assert theirs["likelihood_weighting"] is False
    assert type(loss.weighting).__name__ == "NoiseWeighting"
    if theirs["continuous"]:
        assert (loss.times, loss.eps) == (UniformTimes(), 1e-5)
    elif theirs["sde"] == "vesde":
        assert loss.times == LevelTimes(read_config(key)["model"]["num_scales"])
    else:
        assert loss.times == ChainTimes()


@each_port
def test_the_training_is_the_published_one(recipe, key):
    config, theirs = composed(recipe), read_config(key)
    training = config["train"]
    assert training["steps"] == theirs["training"]["n_iters"]
    assert training["batch_size"] == theirs["training"]["batch_size"]
    assert training["ema"] == theirs["model"]["ema_rate"]
    assert training["clip"] == theirs["optim"]["grad_clip"]
    assert training["rate"]["warmup"] == theirs["optim"]["warmup"]
    assert training["rate"]["_target_"].endswith("ConstantRate")
    optimizer = config["optimizer"]
    assert optimizer["_target_"].endswith(theirs["optim"]["optimizer"])
    assert optimizer["lr"] == theirs["optim"]["lr"]
    assert optimizer["betas"] == [theirs["optim"]["beta1"], 0.999]
    assert optimizer["eps"] == theirs["optim"]["eps"]
    assert optimizer["weight_decay"] == theirs["optim"]["weight_decay"]


@each_port
def test_the_samplers_are_the_published_ones(recipe, key):
    config, theirs = composed(recipe), read_config(key)
    samplers = {name: built(value) for name, value in config["samplers"].items()}
    eps = 1e-5 if theirs["training"]["sde"] == "vesde" else 1e-3
    steps, name = theirs["model"]["num_scales"], theirs["sampling"]["predictor"]
    if name == "euler_maruyama":
        assert samplers[name].steps == steps
        assert samplers[name].eps == eps
    elif name == "ancestral_sampling":
        assert samplers["ancestral"].steps == steps - 1
        assert samplers["ancestral"].predictor == AncestralPredictor(variance=1.0)
        assert samplers["ancestral"].final_denoise
    else:
        pc = samplers["predictor_corrector"]
        assert (pc.steps, pc.eps) == (steps, eps)
        assert isinstance(pc.predictor, ReverseDiffusionPredictor)
        assert isinstance(pc.corrector, Langevin)
        assert pc.corrector.snr == theirs["sampling"]["snr"]
    flow = samplers["probability_flow"]
    assert (flow.rtol, flow.atol, flow.eps) == (1e-5, 1e-5, eps)


@each_port
def test_the_likelihood_is_the_published_one(recipe, key):
    exact = built(composed(recipe)["likelihood"])
    assert (exact.rtol, exact.atol, exact.probes) == (1e-5, 1e-5, 1)
    assert exact.eps == (1e-5 if read_config(key)["training"]["continuous"] else exact.eps)
