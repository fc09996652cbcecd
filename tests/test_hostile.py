"""500 damaged or hostile files: each is refused in a sentence, or is what it was."""

import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import VPSDE, InputError, ScoreModel
from scoresde.codec import Affine
from scoresde.data import array
from scoresde.data import folder as image_folder
from scoresde.data._formats import cifar, idx, members
from scoresde.interop import diffusers, score_sde
from scoresde.nn import MLP
from scoresde.tasks.latents import read_latents
from scoresde.tasks.parts import Parts
from scoresde.train import Checkpoint, read_metrics
from tests import score_sde_files

SECONDS, MIB = 5, 400
RECIPE = {
    "model": {
        "_target_": "scoresde.ScoreModel",
        "network": {"_target_": "scoresde.nn.MLP", "shape": [2], "width": 8, "depth": 1},
        "sde": {"_target_": "scoresde.VPSDE"},
    }
}


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- Good files, and how they are read -----------------------------------------------------------


def checkpoint(folder):
    torch.manual_seed(0)
    weights = ScoreModel(MLP(2, width=8, depth=1), VPSDE()).state_dict()
    Checkpoint(RECIPE, weights, weights, 3, 0).save(folder / "a.pt")
    return folder / "a.pt"


def published(folder):
    torch.save(score_sde_files.content(score_sde_files.config()), folder / "a.pth")
    return folder / "a.pth"


def npy(folder):
    np.save(folder / "a.npy", np.random.default_rng(0).integers(0, 2, (40, 4)).astype(bool))
    return folder / "a.npy"


def npz(folder):
    values = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.savez_compressed(folder / "a.npz", values)
    return folder / "a.npz"


def latents(folder):
    np.savez(folder / "a.npz", x=np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32))
    return folder / "a.npz"


def part(folder):
    Parts(folder).save(range(4), {"x": torch.arange(4.0)})
    return folder / "00000000-00000004.npz"


def png(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels + np.uint8(i)).save(folder / f"{i}.png")
    return folder / "1.png"


def idx_file(folder):
    values = np.random.default_rng(0).integers(0, 256, 3 * 28 * 28, dtype=np.uint8)
    header = struct.pack(">4I", 0x803, 3, 28, 28)
    (folder / "a.gz").write_bytes(gzip.compress(header + values.tobytes(), mtime=0))
    return folder / "a.gz"


def cifar_file(folder):
    (folder / "a.bin").write_bytes(np.random.default_rng(0).bytes(3073 * 2))
    return folder / "a.bin"


def tar(folder):
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        for name in ("one", "two"):
            content = np.random.default_rng(0).bytes(500)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "a.tar.gz"


def metrics(folder):
    lines = [json.dumps({"step": i, "loss": 1 / (i + 1)}) for i in range(20)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "metrics.jsonl"


def config(folder):
    (folder / "a.json").write_text(json.dumps(score_sde_files.config()))
    return folder / "a.json"


def model_of(path):
    return Checkpoint.load(path).build_model().state_dict()


def arrays_of(path):
    data = array(path)
    return {name: data.split(name) for name in ("train", "validation", "test")}


def images_of(path):
    data = image_folder(path.parent, size=8, fractions=[0.4, 0.3, 0.3])
    return {name: data.split(name) for name in ("train", "validation", "test")}


CODEC = Affine((3,), 0.0, 1.0, None, -1.0, 1.0)
# kind: (writer, reader, whether the format can tell that a number has changed)
KINDS = {
    "checkpoint": (checkpoint, model_of, True),
    "published": (
        published,
        lambda p: score_sde.load_checkpoint(p, score_sde_files.config()).state_dict(),
        True,
    ),
    "npy": (npy, arrays_of, False),
    "npz": (npz, arrays_of, True),
    "latents": (latents, lambda p: {"x": read_latents(p, CODEC).x}, True),
    "part": (part, lambda p: Parts(p.parent).load(range(4)), True),
    "images": (png, images_of, True),
    "idx": (idx_file, lambda p: idx(p.read_bytes(), p.name, 3), True),
    "cifar": (cifar_file, lambda p: cifar(p.read_bytes(), p.name), False),
    "tar": (tar, lambda p: members(p.read_bytes(), p.name, ["one", "two"]), True),
    "metrics": (metrics, lambda p: read_metrics(p.parent), False),
    "config": (config, score_sde.read_config, False),
}
EACH = 40  # damages of a kind; with the hostile files below more than 500 in all


def damaged(raw, numbers):
    """Cuts, flips, empties, repeats or overwrites."""
    place = numbers.randrange(len(raw))
    match numbers.randrange(6):
        case 0:
            return raw[:place]
        case 1 | 2:
            return raw[:place] + bytes([raw[place] ^ 1 << numbers.randrange(8)]) + raw[place + 1 :]
        case 3:
            return raw[:place] + numbers.randbytes(min(16, len(raw) - place)) + raw[place + 16 :]
        case 4:
            return raw[:place] + raw[place + numbers.randrange(1, 50) :]
    return raw + raw[:place]


def same(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and np.array_equal(one, other)
    return one == other


class Watch:
    """Measures the seconds, and the memory that a reader adds."""

    def __enter__(self):
        self.clock, self.peak = (
            time.monotonic(),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        return self

    def __exit__(self, *_):
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak
        assert time.monotonic() - self.clock < SECONDS
        assert grown / 1024 < MIB


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind, tmp_path):
    write, read, telling = KINDS[kind]
    folder = tmp_path / "good"
    folder.mkdir()
    path = write(folder)
    good, raw = read(path), path.read_bytes()
    numbers, refused, sentences = random.Random(kind), 0, []
    for _ in range(EACH):
        bad = damaged(raw, numbers)
        path.write_bytes(bad)
        with Watch():
            try:
                found = read(path)
            except InputError as error:
                refused += 1
                sentences.append(str(error))
                continue
        if found is None:  # a part that is computed again
            refused += 1
        elif telling:
            assert same(found, good)
    assert refused > 5 or not telling
    assert all("Traceback" not in text and len(text) < 600 for text in sentences)


# --- Files that are made to harm -----------------------------------------------------------------


def zipped(path, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/"), content)


def header(shape, kind="<f4", order=False):
    text = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


def object_array(path, canary):
    np.save(path, np.array([Payload(canary)], dtype=object), allow_pickle=True)


def gigantic_tensor(path, numel):
    """A torch file whose tensor is declared larger than what is stored."""
    torch.save({"x": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    small, large = b"K\x04", b"\x8a\x08" + struct.pack("<q", numel)
    entries[name] = entries[name].replace(small, large)
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


HOSTILE_ARRAYS = {
    "object": object_array,
    "declared 10^12": lambda p, c: p.write_bytes(header((10**12, 4)) + bytes(64)),
    "declared 10^30": lambda p, c: p.write_bytes(header((10**30,)) + bytes(64)),
    "negative": lambda p, c: p.write_bytes(header((-5, 4)) + bytes(64)),
    "type that calls": lambda p, c: p.write_bytes(header((1,), "O") + bytes(64)),
    "header of code": lambda p, c: p.write_bytes(
        b"\x93NUMPY\x01\x00\x76\x00" + f"__import__('os').mkdir({str(c)!r})".ljust(118).encode()
    ),
    "deep header": lambda p, c: p.write_bytes(header("(" * 90 + ")" * 90)),
    "NaN": lambda p, c: np.save(p, np.full((40, 2), np.nan, np.float32)),
    "text": lambda p, c: np.save(p, np.array(["a", "b"] * 20)),
    "complex": lambda p, c: np.save(p, np.zeros((40, 2), complex)),
    "dates": lambda p, c: np.save(p, np.zeros(40, "M8[s]")),
    "records": lambda p, c: np.save(p, np.zeros(40, [("a", "f4"), ("b", "f4")])),
    "scalar": lambda p, c: np.save(p, np.float32(1)),
    "none": lambda p, c: np.save(p, np.zeros((0, 3), np.float32)),
    "empty": lambda p, c: p.write_bytes(b""),
    "folder": lambda p, c: p.mkdir(),
    "pickle": lambda p, c: p.write_bytes(pickle.dumps(Payload(c))),
    "link to nowhere": lambda p, c: p.symlink_to("nowhere"),
}
HOSTILE_ARCHIVES = {
    "object member": lambda p, c: np.savez(p, a=np.array([Payload(c)], dtype=object)),
    "bomb": lambda p, c: zipped(p, **{"a.npy": header((2**31,), "|u1") + bytes(2**20) * 64}),
    "way out": lambda p, c: zipped(p, **{"..__..__a.npy": header((4,)) + bytes(16)}),
    "declared": lambda p, c: zipped(p, **{"a.npy": header((10**12,)) + bytes(16)}),
    "no array": lambda p, c: zipped(p, **{"a.txt": b"text"}),
    "nothing": lambda p, c: zipped(p),
    "pickle member": lambda p, c: zipped(p, **{"a.npy": pickle.dumps(Payload(c))}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_hostile_arrays(name, tmp_path):
    path = tmp_path / "a.npy"
    HOSTILE_ARRAYS[name](path, tmp_path / "executed")
    with Watch(), pytest.raises(InputError, match=r"a\.npy|values|data|array"):
        array(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE_ARCHIVES)
@pytest.mark.parametrize("reader", ["data", "latents", "part"])
def test_hostile_archives(name, reader, tmp_path):
    path = tmp_path / "00000000-00000004.npz"
    HOSTILE_ARCHIVES[name](path, tmp_path / "executed")
    read = {
        "data": array,
        "latents": lambda p: read_latents(p, CODEC),
        "part": lambda p: Parts(p.parent).load(range(4)),
    }[reader]
    with Watch():
        if reader == "part":
            assert read(path) is None
        else:
            with pytest.raises(InputError, match=r"npz|data|examples"):
                read(path)
    assert not (tmp_path / "executed").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == [path.name]


def doubled(times):
    """A list that is small in a file, and 2^times long when it is walked."""
    tree = [1, 2]
    for _ in range(times):
        tree = [tree, tree]
    return tree


def nested(depth):
    tree = 1
    for _ in range(depth):
        tree = [tree]
    return tree


def target(name, **arguments):
    return {"model": {"_target_": name, **arguments}}


MLP_OF = "scoresde.nn.MLP"
SIZES = {
    "wide": {"_target_": MLP_OF, "shape": [2], "width": 10**7, "depth": 1},
    "deep": {"_target_": MLP_OF, "shape": [2], "width": 8, "depth": 10**9},
    "wide and deep": {"_target_": MLP_OF, "shape": [2], "width": 4096, "depth": 10**6},
    "shape": {"_target_": MLP_OF, "shape": [10**9, 10**9], "width": 8, "depth": 1},
    "negative": {"_target_": MLP_OF, "shape": [-2], "width": 8, "depth": 1},
    "text": {"_target_": MLP_OF, "shape": "two", "width": 8, "depth": 1},
}
RECIPES = {
    "system": target("os.system", command="mkdir {canary}"),
    "eval": target("builtins.eval", _args_=["__import__('os').mkdir('{canary}')"]),
    "load": target("torch.load", _args_=["{canary}"]),
    "builder": target(
        "scoresde.recipe.build", recipe={"_target_": "os.mkdir", "path": "{canary}"}
    ),
    "hydra": target("hydra.utils.instantiate", config={"_target_": "os.mkdir"}),
    "partial": {"model": {"_target_": "os.mkdir", "_partial_": True, "path": "{canary}"}},
    "subprocess": target("scoresde.train.checkpoint.os.mkdir", path="{canary}"),
    "dunder": target("scoresde.nn.MLP.__init__.__globals__", a=1),
    "interpolation": target("scoresde.ScoreModel", network="${oc.env:HOME}", sde=1),
    "not text": {"model": {"_target_": ["os.mkdir"]}},
    "no section": {},
    "nested": {"model": nested(400)},
    "number": {"model": {**RECIPE["model"], "_target_": 3}},
    "old name of code": target("scoresde.bound.importlib.os.mkdir", path="{canary}"),
    "old name of a module": target("scoresde.flow._", path="{canary}"),
    "long name": target("scoresde" + ".a" * 10**6),
    **{
        name: {"model": {**RECIPE["model"], "network": network}} for name, network in SIZES.items()
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(name, tmp_path):
    canary = tmp_path / "executed"
    text = json.dumps(RECIPES[name]).replace("{canary}", str(canary))
    path = checkpoint(tmp_path)
    good = Checkpoint.load(path)
    Checkpoint(json.loads(text), good.model, good.ema, 1, 0).save(path)
    with Watch(), pytest.raises(InputError):
        Checkpoint.load(path).build_model()
    assert not canary.exists()


@pytest.mark.parametrize("key", [3, None, 2.5, ("a", "b"), ()], ids=repr)
@pytest.mark.parametrize("place", ["top", "section", "arguments"])
def test_keys_that_are_no_text(key, place, tmp_path):
    path = checkpoint(tmp_path)
    good = Checkpoint.load(path)
    recipe = {
        "top": {key: 1},
        "section": {"model": {key: RECIPE["model"]}},
        "arguments": {"model": {**RECIPE["model"], key: {key: 1}}},
    }[place]
    Checkpoint(recipe, good.model, good.ema, 1, 0).save(path)
    with Watch(), pytest.raises(InputError):
        Checkpoint.load(path).build_model()


HOSTILE_TORCH = {
    "payload": lambda p, c: torch.save({"x": Payload(c)}, p),
    "plain pickle": lambda p, c: p.write_bytes(pickle.dumps(Payload(c))),
    "old format": lambda p, c: torch.save(
        {"x": Payload(c)}, p, _use_new_zipfile_serialization=False
    ),
    "declared 10^12": lambda p, c: gigantic_tensor(p, 10**12),
    "declared 10^6": lambda p, c: gigantic_tensor(p, 10**6),
    "declared negative": lambda p, c: gigantic_tensor(p, -4),
    "no dictionary": lambda p, c: torch.save([1, 2], p),
    "deep": lambda p, c: torch.save({"format": nested(300)}, p),
    "bomb": lambda p, c: zipped(p, **{"a__data.pkl": bytes(2**20) * 64, "a__version": b"3"}),
    "repeated": lambda p, c: torch.save({"x": doubled(30)}, p),
    "one number for many": lambda p, c: torch.save({"x": torch.zeros(1).expand(2**33)}, p),
    "empty": lambda p, c: p.write_bytes(b""),
    "text": lambda p, c: p.write_text("hello"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE_TORCH)
@pytest.mark.parametrize("reader", ["ours", "score_sde", "diffusers"])
def test_hostile_checkpoints(name, reader, tmp_path):
    path, canary = tmp_path / "diffusion_pytorch_model.bin", tmp_path / "executed"
    HOSTILE_TORCH[name](path, canary)
    read = {
        "ours": lambda: model_of(path),
        "score_sde": lambda: score_sde.load_checkpoint(path, score_sde_files.config()),
        "diffusers": lambda: diffusers.files._read_weights(path),
    }[reader]
    with Watch(), pytest.raises(InputError):
        read()
    assert not canary.exists()
