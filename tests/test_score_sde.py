"""The loader of the reference's files: what it takes from them, and what it refuses."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from scoresde import VESDE, VPSDE, DiscreteVP, InputError, ScoreModel, SubVPSDE
from scoresde.interop.score_sde import describe, load_checkpoint, load_recipe, names, read_config
from scoresde.recipe import build
from tests.score_sde_by_the_book import score
from tests.score_sde_files import config, content, tensors

FIXTURES = Path(__file__).parent / "fixtures"
X = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8)
T = torch.tensor([0.01, 0.2, 0.6, 1.0])


@pytest.fixture
def saved(tmp_path):
    """Saves contents as a file of the reference."""

    def save(what, name="checkpoint.pth"):
        torch.save(what, tmp_path / name)
        return tmp_path / name

    return save


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message


def assert_score(model, options, values):
    values = {name: value.double() for name, value in values.items()}
    expected = score(options, values, X.double(), T.double())
    with torch.no_grad():
        actual = model.score(X, T)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * expected.abs().max())


# --- What is taken -------------------------------------------------------------------------------


def test_a_file_of_the_repository():
    """Written once, with the module names and the numbers of NumPy 1, and never since."""
    with np.load(FIXTURES / "score_sde.npz") as numbers:
        x, t, expected = (torch.tensor(numbers[key]) for key in ("x", "t", "score"))
    model = load_checkpoint(FIXTURES / "score_sde.pth", FIXTURES / "score_sde.json")
    assert isinstance(model, ScoreModel)
    assert not model.training
    with torch.no_grad():
        actual = model.score(x, t)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_averaged_and_raw_weights(saved, prefix):
    options = config(embedding_type="fourier", sde="vesde", scale_by_sigma=True, centered=False)
    path = saved(content(options, prefix=prefix))
    raw, average = tensors(options, 0), tensors(options, 1)
    frozen = "all_modules.0.W"
    assert_score(load_checkpoint(path, options), options, {**average, frozen: raw[frozen]})
    assert_score(load_checkpoint(path, options, ema=False), options, raw)


def test_unconditional_networks_have_tensors_without_effect(saved):
    options = config(conditional=False, embedding_type="fourier")
    values = content(options)
    assert "module.all_modules.0.W" in values["model"]
    assert "module.all_modules.2.Dense_0.weight" in values["model"]
    model = load_checkpoint(saved(values), options, ema=False)
    assert_score(model, options, tensors(options, 0))
    assert not any("shift" in name for name in model.state_dict())


def test_a_recipe_and_its_weights(saved):
    options = config(sde="vesde", scale_by_sigma=True, centered=False)
    path = saved(content(options))
    imported = load_recipe(path, options)
    assert imported.step == 7
    assert json.loads(json.dumps(imported.recipe)) == imported.recipe
    assert imported.config["data"]["centered"] is False
    for weights, ema in ((imported.ema, True), (imported.raw, False)):
        model = build(imported.recipe).eval()
        model.load_state_dict(weights)
        expected = load_checkpoint(path, options, ema=ema)
        with torch.no_grad():
            assert torch.equal(model.score(X, T), expected.score(X, T))
    assert isinstance(instantiate(imported.recipe, _convert_="all"), ScoreModel)


def test_a_file_without_averages(saved):
    options = config()
    values = content(options)
    del values["ema"], values["optimizer"], values["step"]
    path = saved(values)
    refused(lambda: load_checkpoint(path, options), str(path), "ema=False")
    assert_score(load_checkpoint(path, options, ema=False), options, tensors(options, 0))
    imported = load_recipe(path, options)
    assert imported.ema is None
    assert imported.step == 0


def test_the_file_is_not_held_open_or_changed(saved):
    options = config()
    path = saved(content(options))
    before = path.read_bytes()
    model = load_checkpoint(path, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before


def test_old_files_without_a_zip(tmp_path):
    options = config()
    torch.save(content(options), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    model = load_checkpoint(tmp_path / "old.pth", options, ema=False)
    assert_score(model, options, tensors(options, 0))


# --- Configurations ------------------------------------------------------------------------------


def test_configurations_as_dictionary_name_or_file(tmp_path):
    assert len(names()) == 28
    by_name = describe("ve/cifar10_ncsnpp_continuous")
    values = read_config("ve/cifar10_ncsnpp_continuous")
    (tmp_path / "a.json").write_text(json.dumps({"config": values, "remark": "more"}))
    (tmp_path / "a.yaml").write_text(json.dumps(values))
    assert by_name == describe(values)
    assert by_name == describe(tmp_path / "a.json") == describe(str(tmp_path / "a.yaml"))


def test_what_is_left_out_has_the_default_of_the_reference():
    options = config()
    for key in ("beta_min", "beta_max", "sigma_min", "sigma_max", "num_scales", "dropout"):
        del options["model"][key]
    for key in ("init_scale", "fourier_scale", "fir_kernel", "progressive_combine"):
        del options["model"][key]
    assert describe(options) == describe(config())


def test_tuples_are_lists_and_other_sections_are_ignored():
    options = config(ch_mult=(1, 2), attn_resolutions=(4,), fir=True, fir_kernel=(1, 3, 3, 1))
    assert describe({**options, "optim": None}) == describe(config(fir=True))


@pytest.mark.parametrize(
    ("changes", "sde"),
    [
        ({"beta_max": 12}, VPSDE(0.1, 12.0)),
        ({"sde": "subVPSDE", "continuous": False}, SubVPSDE()),
        ({"sde": "vesde", "sigma_max": 90}, VESDE(0.01, 90.0)),
        ({"continuous": False}, DiscreteVP()),
    ],
)
def test_processes(changes, sde):
    assert build(describe(config(**changes))).sde == sde


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nonlinearity": "gelu"}, ["model.nonlinearity", "got 'gelu'", "swish"]),
        ({"name": "ncsnv2_64"}, ["model.name", "got 'ncsnv2_64'", "ncsnpp"]),
        ({"sde": "cosine"}, ["training.sde", "got 'cosine'", "vesde"]),
        ({"resblock_type": None}, ["model.resblock_type", "got None", "biggan"]),
        ({"progressive": "input_skip"}, ["model.progressive", "got 'input_skip'", "output_skip"]),
        ({"progressive_input": 3}, ["model.progressive_input", "got 3"]),
        ({"progressive_input": "input_skip", "progressive_combine": "mul"}, ["'mul'", "cat"]),
        ({"embedding_type": "none"}, ["model.embedding_type", "got 'none'", "fourier"]),
        ({"embedding_type": "fourier", "continuous": False}, ["fourier", "continuous"]),
        ({"fir": "yes"}, ["model.fir", "got 'yes'"]),
        ({"fir": True, "fir_kernel": [1, -1]}, ["kernel", "[1, 3, 3, 1]"]),
        ({"centered": 1}, ["data.centered", "got 1"]),
        ({"nf": 8.0}, ["model.nf", "got 8.0"]),
        ({"nf": 7}, ["model.nf", "got 7"]),
        ({"num_channels": True}, ["data.num_channels", "got True"]),
        ({"ch_mult": "12"}, ["model.ch_mult", "got '12'"]),
        ({"ch_mult": [1, 0]}, ["model.ch_mult", "got [1, 0]"]),
        ({"ch_mult": [1, 1, 1, 1, 1]}, ["data.image_size", "got 8", "16"]),
        ({"num_scales": 1, "continuous": False}, ["model.num_scales", "got 1"]),
        ({"num_scales": 10, "continuous": False}, ["beta_max", "20.0 and 10"]),
        ({"num_scales": 500, "scale_by_sigma": True}, ["model.num_scales", "got 500", "999"]),
        ({"sde": "vesde", "sigma_max": "50"}, ["model.sigma_max", "got '50'"]),
        ({"sde": "vesde", "sigma_min": 0}, ["sigma_min", "0.0"]),
    ],
)
def test_configurations_refused(changes, words):
    refused(lambda: build(describe(config(**changes))), *words)


@pytest.mark.parametrize("key", ["data.image_size", "model.nf", "model.fir", "training.sde"])
def test_configurations_that_lack_a_value(key):
    options = config()
    section, name = key.split(".")
    del options[section][name]
    refused(lambda: describe(options), key)
    del options[section]
    refused(lambda: describe(options), section)


def test_configurations_that_are_none(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    refused(lambda: describe(tmp_path / "bad.json"), "bad.json")
    refused(lambda: describe(tmp_path / "bad.yaml"), "bad.yaml")
    refused(lambda: describe(tmp_path / "list.yaml"), "section model", "[1, 2]")
    refused(lambda: describe(tmp_path / "absent.json"), "absent.json")
    refused(lambda: describe("vp/cifar10_ddpmpp_cont"), "vp/cifar10_ddpmpp_continuous")
    refused(lambda: describe("ve/ncsnv2/cifar10"), "ve/ncsnv2/cifar10")
    refused(lambda: describe({}), "section model", "{}")
    refused(lambda: describe(None), "section model", "None")


# --- What does not fit ---------------------------------------------------------------------------

KEY = "all_modules.4.Conv_0.weight"


def test_missing_extra_and_misshapen_tensors_are_named(saved):
    options = config()
    changes = {
        "lacks": lambda model: model.pop("module." + KEY),
        "(16, 16, 3, 1)": lambda model: model.update({"module." + KEY: torch.ones(16, 16, 3, 1)}),
    }
    for word, change in changes.items():
        values = content(options)
        change(values["model"])
        path = saved(values)
        refused(lambda path=path: load_checkpoint(path, options), KEY, word, ".pth")
    values = content(options)
    values["model"]["module.all_modules.99.weight"] = torch.ones(1)
    refused(lambda: load_checkpoint(saved(values), options), "all_modules.99.weight", "unexpected")


def test_averages_that_do_not_fit(saved):
    options = config()
    values = content(options)
    values["ema"]["shadow_params"][0] = torch.ones(3)
    refused(lambda: load_checkpoint(saved(values), options), "all_modules.0.weight", "(3,)")
    values["ema"]["shadow_params"] = values["ema"]["shadow_params"][1:]
    count = len(values["ema"]["shadow_params"])
    refused(lambda: load_checkpoint(saved(values), options), "shadow_params", f"got {count};")
    values["ema"]["shadow_params"][0] = "text"
    refused(lambda: load_checkpoint(saved(values), options), "ema.shadow_params[0]")
    values["ema"] = {"decay": 1}
    refused(lambda: load_checkpoint(saved(values), options), "ema.shadow_params")


def test_the_configuration_of_another_network(saved):
    path = saved(content(config()))
    for change in ({"num_res_blocks": 2}, {"nf": 16}, {"resblock_type": "ddpm"}, {"fir": True}):
        options = config(**change)
        if change == {"fir": True}:  # has no tensors of its own
            load_checkpoint(path, options)
        else:
            refused(lambda options=options: load_checkpoint(path, options), "all_modules.")


# --- What is no checkpoint -----------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_executed(saved, tmp_path):
    exploded = tmp_path / "exploded"
    options = config()
    values = content(options)
    values["model"]["module.extra"] = Bomb(exploded)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(values))
    for path in (saved(values), tmp_path / "plain.pth"):
        refused(lambda path=path: load_checkpoint(path, options), str(path), "execut")
    assert not exploded.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # it would have
    assert exploded.exists()


def test_files_that_are_no_checkpoints(saved, tmp_path):
    options = config()
    refused(lambda: load_checkpoint(tmp_path, options), str(tmp_path), "is a folder")
    refused(lambda: load_checkpoint(tmp_path / "x.pth", options), "x.pth", "does not exist")
    for i, what in enumerate((b"", b"text", b"PK\x03\x04 no zip")):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(what)
        refused(lambda path=path: load_checkpoint(path, options), path.name, "damaged")
    for what, found in (([1], "list"), ({"weights": 1}, "the keys"), ({"model": 1}, "int")):
        refused(lambda what=what: load_checkpoint(saved(what), options), "model", f"got {found}")
    values = {"model": {"module.all_modules.0.weight": 1.0}}
    refused(lambda: load_checkpoint(saved(values), options), "all_modules.0.weight", "float")


def test_damaged_files(saved, tmp_path):
    options = config()
    whole = saved(content(options)).read_bytes()
    for i, cut in enumerate((10, len(whole) // 2, len(whole) - 10)):
        path = tmp_path / f"cut{i}.pth"
        path.write_bytes(whole[:cut])
        refused(lambda path=path: load_checkpoint(path, options), path.name, "damaged")


def test_a_packed_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    path = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "folder")
    refused(lambda: load_checkpoint(path, config()), "packed.zip", "damaged")
