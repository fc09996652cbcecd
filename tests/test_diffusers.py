"""Checkpoints of diffusers: the outputs of its own class, and what is refused."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from torch import nn

from scoresde import VESDE, DiscreteVP, ScoreModel
from scoresde.errors import InputError
from scoresde.interop.diffusers import load_checkpoint, load_recipe
from scoresde.interop.diffusers.configuration import describe
from scoresde.interop.diffusers.files import Values
from scoresde.interop.diffusers.tensors import places
from scoresde.nn import Architecture, Groups, UNet
from scoresde.nn.embedding import learned_none
from scoresde.recipe import build
from tests.test_run import program, refused

WEIGHTS = "diffusion_pytorch_model"


def levels(kind, attention):
    """The names of the blocks for levels with (True) and without attention."""
    down = [f"{'Attn' * a}{kind}DownBlock2D" for a in attention]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return {"down_block_types": down, "up_block_types": up}


DDPM = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    **levels("", [False, True, False, False]),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NCSNPP = {  # google/ncsnpp-celebahq-256 and others
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 256, 256, 256],
    **levels("Skip", [False] * 4 + [True] + [False] * 2),
    "attention_head_dim": None,
    "center_input_sample": True,
    "mid_block_scale_factor": 1.41421356237,
    "norm_eps": 1e-6,
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
}
PUBLISHED = {
    "ddpm-cifar10-32": DDPM,
    "ncsnpp-celebahq-256": NCSNPP,
    "ncsnpp-ffhq-1024": {
        **NCSNPP,
        "sample_size": 1024,
        "block_out_channels": [16, 32, 64, 128, 256, 512, 512, 512],
        **levels("Skip", [False] * 6 + [True, False]),
    },
}
SMALL = {
    "ddpm": {
        **DDPM,
        "sample_size": 8,
        "block_out_channels": [32, 64, 64],
        **levels("", [False, True, False]),
    },
    "ddpm, the class's defaults": {
        "sample_size": [8, 12],
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [32, 96],
        **levels("", [True, True]),
        "layers_per_block": 1,
        "center_input_sample": True,
        "norm_num_groups": 16,
        "attn_norm_num_groups": 4,
    },
    "ddpm, one level": {
        "sample_size": 4,
        "block_out_channels": [32],
        **levels("", [True]),
        "dropout": 0.5,
        "act_fn": "swish",
    },
    "ncsnpp": {
        **NCSNPP,
        "sample_size": 16,
        "block_out_channels": [32, 128, 64],
        **levels("Skip", [False, True, False]),
        "layers_per_block": 1,
    },
    "ncsnpp, few channels": {  # where the numbers of groups are no longer the usual ones
        **NCSNPP,
        "sample_size": 16,
        "block_out_channels": [32, 64, 64],
        **levels("Skip", [True, True, False]),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 2,
    },
    "ncsnpp, positional": {
        **NCSNPP,
        "sample_size": 8,
        "block_out_channels": [32, 32],
        **levels("Skip", [False, False]),
        "layers_per_block": 1,
        "time_embedding_type": "positional",
    },
}


@pytest.fixture(scope="module")
def library():
    """The package diffusers, which takes seconds to import."""
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def networks(library):
    """The library's networks by name, each made once, with no weight left at zero or one."""
    made = {}

    def network(name):
        if name not in made:
            torch.manual_seed(len(made))
            made[name] = library.UNet2DModel(**SMALL[name]).eval()
            for parameter in made[name].parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape)
        return made[name]

    return network


@pytest.fixture
def saved(networks, tmp_path):
    """The small network of DDPM as a folder that a test may spoil."""
    networks("ddpm").save_pretrained(tmp_path, safe_serialization=False)
    return tmp_path


def labels(network):
    """Labels of all sizes."""
    fourier = network.config.time_embedding_type == "fourier"
    return torch.tensor([0.01, 0.5, 1348.0] if fourier else [0.0, 10.0, 999.0])


def images(network, batch=3):
    config, generator = network.config, torch.Generator().manual_seed(7)
    size = config.sample_size
    size = [size, size] if isinstance(size, int) else size
    return torch.randn(batch, config.in_channels, *size, generator=generator)


def difference(ours, theirs):
    """The largest difference of each example, relative to its largest value."""
    return ((ours - theirs).flatten(1).abs().amax(1) / theirs.flatten(1).abs().amax(1)).max()


@torch.no_grad()
def error(model, network):
    x, c = images(network), labels(network)
    return difference(model.network(x, c), network(x, c).sample)


def edit(path, **values):
    """Changes values in a file of JSON."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**old, **values}))


def change_weights(folder, change):
    path = folder / f"{WEIGHTS}.bin"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


# --- The same outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "safe"), [*((name, True) for name in SMALL), ("ddpm", False), ("ncsnpp", False)]
)
def test_outputs_are_those_of_the_library(name, safe, networks, tmp_path):
    network = networks(name)
    network.save_pretrained(tmp_path, safe_serialization=safe)
    model = load_checkpoint(tmp_path)
    assert isinstance(model, ScoreModel)
    assert not any(module.training for module in model.modules())
    assert error(model, network) < 1e-5


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ddpm", {"freq_shift": 0}),
        ("ddpm", {"flip_sin_to_cos": True}),
        ("ddpm", {"downsample_padding": 1}),
        ("ddpm", {"norm_eps": 1e-2}),
        ("ddpm", {"norm_num_groups": 16}),
        ("ddpm", {"attention_head_dim": 8}),
        ("ddpm", {"center_input_sample": True}),
        ("ddpm, the class's defaults", {"attn_norm_num_groups": None}),
        ("ncsnpp", {"attention_head_dim": 16}),
        ("ncsnpp", {"norm_num_groups": 4}),
        ("ncsnpp", {"center_input_sample": False}),
    ],
    ids=str,
)
def test_what_no_tensor_shows_has_its_effect_all_the_same(
    name, values, library, networks, tmp_path
):
    network = networks(name)
    network.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **values)
    model = load_checkpoint(tmp_path)
    assert error(model, network) > 1e-3
    changed = library.UNet2DModel(**{**SMALL[name], **values})
    changed.load_state_dict(network.state_dict())
    assert error(model, changed.eval()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddpm", "ncsnpp"])
def test_a_network_with_classes_takes_their_labels(name, library, tmp_path):
    torch.manual_seed(0)
    network = library.UNet2DModel(**SMALL[name], num_class_embeds=5).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    network.save_pretrained(tmp_path)
    model, x, c = load_checkpoint(tmp_path), images(network), labels(network)
    assert model.takes("label")
    for label in (torch.tensor([0, 4, 2]), torch.tensor([3, 3, 3])):
        theirs = network(x, c, class_labels=label).sample
        assert difference(model.network(x, c, label=label), theirs) < 1e-5
        assert difference(model.network(x, c, label=(label + 1) % 5), theirs) > 1e-3
    # The library has no row for no class, and ours was never trained.
    assert not learned_none(model.network, "label")
    with pytest.raises(InputError, match="label"):
        model.network(x, c, label=torch.tensor([5, 0, 0]))


def test_labels_of_an_imported_network_must_be_given(library, tmp_path):
    torch.manual_seed(0)
    library.UNet2DModel(**SMALL["ddpm"], num_class_embeds=5).save_pretrained(tmp_path / "theirs")
    program("task=import", "checkpoint=theirs", "hydra.run.dir=ours", cwd=tmp_path)
    words = ("task=sample", "checkpoint=ours", "count=2", "progress=false", "device=cpu")
    quick = ("sampler=unipc", "sampler.steps=2")
    assert "label must be set" in refused(*words, *quick, "hydra.run.dir=a", cwd=tmp_path)
    assert "label" in refused(*words, *quick, "label=-1", "hydra.run.dir=a", cwd=tmp_path)
    program(*words, *quick, "label=[4,0]", "hydra.run.dir=a", cwd=tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_of_the_published_networks(name, library, tmp_path):
    with torch.device("meta"):
        network = library.UNet2DModel(**PUBLISHED[name])
    recipe = describe(Values(tmp_path, PUBLISHED[name]), Values(tmp_path, {}))
    ours = {place.theirs: place.shape for place in places(recipe["network"])}
    assert ours == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    with torch.device("meta"):
        model = build(recipe)
    assert {place.ours for place in places(recipe["network"])} == set(model.state_dict())


def test_old_names_of_attention(networks, tmp_path):
    network = networks("ddpm")
    network.save_pretrained(tmp_path, safe_serialization=False)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for name in list(weights):
            for new, former in old.items():
                if f".{new}." in name:
                    weights[name.replace(f".{new}.", f".{former}.")] = weights.pop(name)

    change_weights(tmp_path, rename)
    assert error(load_checkpoint(tmp_path), network) < 1e-5
    change_weights(
        tmp_path,
        lambda weights: weights.update({"mid_block.attentions.0.to_q.bias": torch.zeros(64)}),
    )
    with pytest.raises(InputError, match=r"mid_block.attentions.0.query.bias"):
        load_checkpoint(tmp_path)


def test_half_precision_is_read_as_single(networks, tmp_path):
    network = networks("ddpm")
    network.save_pretrained(tmp_path, safe_serialization=False)

    def halve(weights):
        weights.update({name: value.half() for name, value in weights.items()})

    change_weights(tmp_path, halve)
    model = load_checkpoint(tmp_path)
    assert model.dtype == torch.float32
    assert error(model, network) < 1e-2


# --- The process and the meaning of the output ---------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_train_timesteps": 20, "beta_start": 1e-3, "beta_end": 0.3},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.4]},
    ],
    ids=str,
)
def test_chains_denoise_as_the_scheduler_does(values, library, networks, tmp_path):
    network = networks("ddpm")
    scheduler = library.DDPMScheduler(**values, clip_sample=False)
    network.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = load_checkpoint(tmp_path)
    assert isinstance(model.sde, DiscreteVP)
    assert model.sde.steps == len(scheduler.betas)
    x = images(network)
    for i in (0, 1, model.sde.steps - 1):
        t, level = model.sde.time_of_index(i), scheduler.alphas_cumprod[i].double()
        output = network(x, torch.tensor(i)).sample
        step = scheduler.step(output, i, x, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.sde.alpha(t) ** 2, level, rtol=2e-5, atol=1e-9)
        data = model.denoise(x, t)
        assert difference(data, step.pred_original_sample) < 1e-4  # float32 betas of theirs
        noise = (x - level.sqrt() * data) / (1 - level).sqrt()
        if "prediction_type" not in values:
            assert difference(model.noise(x, t), output) < 1e-5
            assert difference(model.score(x, t), -output / (1 - level).sqrt()) < 1e-4
        elif i > 0:
            assert difference(model.noise(x, t), noise.to(x)) < 1e-3


@torch.no_grad()
def test_the_output_of_ncsnpp_is_the_score(library, networks, tmp_path):
    network = networks("ncsnpp")
    network.save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).sde == VESDE(0.01, 1348.0)
    library.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=50.0).save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    assert model.sde == VESDE(0.02, 50.0)
    x, t = images(network), torch.tensor([0.0, 0.3, 1.0])
    assert difference(model.score(x, t), network(x, model.sde.sigma(t)).sample) < 1e-5


def test_where_the_scheduler_is_looked_for(library, networks, tmp_path, monkeypatch):
    network, scheduler = networks("ddpm"), library.DDPMScheduler(num_train_timesteps=10)
    network.save_pretrained(tmp_path / "unet")
    shutil.copytree(tmp_path / "unet", tmp_path / "flat")
    scheduler.save_pretrained(tmp_path / "scheduler")
    scheduler.save_pretrained(tmp_path / "flat")
    for folder in (tmp_path, tmp_path / "unet", str(tmp_path / "flat")):
        assert load_checkpoint(folder).sde.steps == 10
    monkeypatch.chdir(tmp_path / "unet")
    assert load_checkpoint(".").sde.steps == 10
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    assert load_checkpoint(tmp_path).sde == DiscreteVP()


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp, few channels"])
def test_recipes_are_plain_and_build_the_model(name, networks, tmp_path):
    network = networks(name)
    network.save_pretrained(tmp_path)
    imported = load_recipe(tmp_path)
    assert imported.ema is None
    assert imported.step == 0
    assert imported.config["norm_eps"] == 1e-6
    model = build(json.loads(json.dumps(imported.recipe)))
    model.load_state_dict(imported.raw)
    assert error(model.eval(), network) < 1e-5


# --- Refusals ------------------------------------------------------------------------------------


def test_a_configuration_too_large_for_memory(saved):
    edit(saved / "config.json", block_out_channels=[32 << 20, 64 << 20, 64 << 20])
    with pytest.raises(InputError, match=r"time_embedding\.linear_1\.weight"):
        load_checkpoint(saved)


def test_tensors_that_are_missing_left_over_or_misshapen(saved):
    name = "down_blocks.1.attentions.0.to_k.weight"
    kept = {}
    change_weights(saved, lambda weights: kept.update({name: weights.pop(name)}))
    with pytest.raises(InputError, match=f"lacks.* {name};"):
        load_checkpoint(saved)
    change_weights(saved, lambda weights: weights.update({name: kept[name][:, :-1]}))
    with pytest.raises(InputError, match=rf"{name}.*\(64, 64\).*\(64, 63\)"):
        load_checkpoint(saved)
    change_weights(
        saved, lambda weights: weights.update(kept | {"class_embedding.weight": 0 * kept[name]})
    )
    with pytest.raises(InputError, match=r"class_embedding\.weight"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "value", [torch.zeros(32, dtype=torch.int64), 1.0, "text"], ids=lambda v: type(v).__name__
)
def test_entries_that_are_no_floats(value, saved):
    change_weights(saved, lambda weights: weights.update({"conv_in.bias": value}))
    with pytest.raises(InputError, match=r"conv_in\.bias"):
        load_checkpoint(saved)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_executed(saved):
    torch.save({"conv_in.weight": Hostile(saved / "trap")}, saved / f"{WEIGHTS}.bin")
    with pytest.raises(InputError, match=rf"{WEIGHTS}\.bin.*execut"):
        load_checkpoint(saved)
    assert not (saved / "trap").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-100],
        lambda data: data + bytes(100),
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data[:8] + data[8:].replace(b'"F32"', b'"I32"', 1),
        lambda data: data[:8] + data[8:].replace(b"[32]", b"[33]", 1),
    ],
    ids=["empty", "cut", "longer", "header size", "header", "type", "shape"],
)
def test_damaged_safetensors(spoil, networks, tmp_path):
    networks("ddpm").save_pretrained(tmp_path)
    path = tmp_path / f"{WEIGHTS}.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors.*damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04rubbish", b"\x80\x02}q\x00."], ids=repr)
def test_damaged_bin(data, saved):
    (saved / f"{WEIGHTS}.bin").write_bytes(data)
    with pytest.raises(InputError):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\xff", "[" * 100000], ids=lambda t: t[:3]
)
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_damaged_json(name, text, saved):
    (saved / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=f"{name}"):
        load_checkpoint(saved)


def test_missing_files(saved):
    (saved / f"{WEIGHTS}.bin").unlink()
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors or"):
        load_checkpoint(saved)
    (saved / "config.json").unlink()
    for folder in (saved, saved / "nowhere"):
        with pytest.raises(InputError, match=rf"{folder}.*config\.json"):
            load_checkpoint(folder)


def test_safetensors_that_is_not_installed(networks, tmp_path, monkeypatch):
    networks("ddpm").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match=r"pip install scoresde\[interop\]"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DConditionModel"),
        ("time_embedding_type", "learned"),
        ("time_embedding_dim", 100),
        ("down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"]),
        ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
        ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
        ("down_block_types", []),
        ("down_block_types", [["DownBlock2D"]] * 3),
        ("up_block_types", ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]),
        ("mid_block_type", None),
        ("add_attention", False),
        ("mid_block_scale_factor", 2),
        ("downsample_padding", 2),
        ("downsample_type", "resnet"),
        ("upsample_type", "resnet"),
        ("resnet_time_scale_shift", "scale_shift"),
        ("act_fn", "mish"),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 0),
        ("out_channels", 6),
        ("in_channels", 0),
        ("sample_size", None),
        ("sample_size", [8, 8, 8]),
        ("sample_size", "8"),
        ("sample_size", 15),
        ("block_out_channels", [32, 48, 64]),
        ("block_out_channels", [32, 64.0, 64]),
        ("block_out_channels", [36, 72, 72]),
        ("layers_per_block", True),
        ("layers_per_block", 1.5),
        ("attention_head_dim", 7),
        ("norm_num_groups", None),
        ("norm_eps", "small"),
        ("norm_eps", float("nan")),
        ("freq_shift", 16),
        ("center_input_sample", 1),
    ],
    ids=str,
)
def test_networks_of_other_families(key, value, saved):
    edit(saved / "config.json", **{key: value})
    with pytest.raises(
        InputError, match=rf"/config\.json: {key} .*{re.escape(json.dumps(value)[:190])}"
    ):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "ScoreSdeVeScheduler"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("beta_schedule", "sigmoid"),
        ("beta_start", "low"),
        ("num_train_timesteps", 0),
        ("prediction_type", "flow"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", 0.1),
        ("trained_betas", [0.1, None]),
    ],
    ids=str,
)
def test_processes_of_other_families(key, value, saved):
    edit(saved / "scheduler_config.json", **{key: value})
    with pytest.raises(
        InputError, match=rf"scheduler_config\.json: {key} .*{re.escape(json.dumps(value))}"
    ):
        load_checkpoint(saved)


def test_a_fourier_network_with_the_scheduler_of_a_chain(networks, tmp_path):
    networks("ncsnpp").save_pretrained(tmp_path)
    edit(tmp_path / "scheduler_config.json", _class_name="DDPMScheduler")
    with pytest.raises(InputError, match="_class_name"):
        load_checkpoint(tmp_path)


def exceptional(groups):
    return Architecture(norm=Groups(exceptions=groups))


@pytest.mark.parametrize("groups", [{"conv_in": 4}, {"norm_out": 3}, {"norm_out": 0}, {"up": 1}])
def test_groups_of_what_is_no_normalisation(groups):
    with pytest.raises(InputError, match=next(iter(groups))):
        UNet((1, 8, 8), width=8, blocks=1, architecture=exceptional(groups))


def test_groups_of_one_normalisation():
    network = UNet(
        (1, 8, 8),
        width=8,
        blocks=1,
        architecture=exceptional({"middle.attention.norm": 8}),
    )
    norms = {n: m.num_groups for n, m in network.named_modules() if isinstance(m, nn.GroupNorm)}
    assert norms.pop("middle.attention.norm") == 8
    assert {norms[f"middle.block_{place}.norm_in"] for place in ("in", "out")} == {4}
