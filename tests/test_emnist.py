"""EMNIST letters, in the publisher's files: an archive of packed IDX files, transposed, from 1."""

import hashlib
import inspect
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from scoresde.data import emnist, published
from scoresde.errors import InputError
from tests.small_sets import LETTERS, emnist_files, idx, letters, write

TRAIN, TEST = LETTERS, LETTERS // 2
CONF = Path(__file__).parent.parent / "conf" / "data" / "emnist.yaml"


def archive(parts, folder="gzip/"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr(f"{folder}emnist-digits-train-images-idx3-ubyte.gz", b"of another part")
        for name, data in parts.items():
            made.writestr(folder + name, data)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/scoresde/emnist"


def publish(monkeypatch, data):
    """Makes our archive the published one."""
    checksum = hashlib.md5(data, usedforsecurity=False).hexdigest()
    editions = ({"gzip.zip": checksum}, *published._EMNIST.editions[1:])
    monkeypatch.setattr(published, "_EMNIST", replace(published._EMNIST, editions=editions))


def check(dataset):
    assert (dataset.shape, dataset.levels) == ((1, 28, 28), 256)
    assert "".join(dataset.class_names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    images, classes = letters(TEST, seed=TEST)
    assert np.array_equal(dataset.test[:, 0], images)
    assert dataset.labels[2].tolist() == classes.tolist()
    rows = torch.cat([dataset.train, dataset.validation])[:, 0, 0].argmax(1)
    assert torch.equal(rows, torch.cat(list(dataset.labels[:2])))
    assert (len(dataset.train), len(dataset.validation)) == (TRAIN - 5, 5)


@pytest.mark.parametrize("place", ["mine", "mine/EMNIST", "cache/scoresde/emnist"])
def test_the_archive_is_read_upright_with_classes_from_0(tmp_path, monkeypatch, place):
    whole = archive(emnist_files())
    publish(monkeypatch, whole)
    write(tmp_path / place, {"gzip.zip": whole})
    dataset = emnist(tmp_path / "mine" if "mine" in place else None, validation=5)
    check(dataset)
    assert dataset.name == "EMNIST letters"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["", "gzip", "EMNIST/raw"])
def test_its_files_are_read_and_said_to_be_unverified(tmp_path, packed, place):
    write(tmp_path / "mine" / place, emnist_files(packed))
    dataset = emnist(tmp_path / "mine", validation=5)
    check(dataset)
    assert dataset.name == "EMNIST letters (not verified)"


def test_it_is_not_downloaded(cache):
    with pytest.raises(
        InputError, match=f"EMNIST .*{cache}.*data.root=FOLDER.*gzip.zip into {cache}"
    ):
        emnist()
    with pytest.raises(InputError, match=r"data.root .*nowhere.*gzip.zip"):
        emnist("nowhere")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (archive(emnist_files())[:-30], "damaged"),
        (archive({}), "emnist-letters-train-images"),
        (archive(emnist_files(packed=False)), "emnist-letters-train-images"),
    ],
)
def test_other_archives_are_refused(tmp_path, data, message):
    write(tmp_path / "mine", {"gzip.zip": data})
    with pytest.raises(InputError, match=message):
        emnist(tmp_path / "mine", verify=False)
    with pytest.raises(InputError, match="md5"):
        emnist(tmp_path / "mine")


@pytest.mark.parametrize(("label", "message"), [(0, r"labels .*\b0\b"), (27, "labels .*25.*26")])
def test_other_labels_are_refused(tmp_path, label, message):
    labels = np.full(TRAIN, label, dtype=np.uint8)
    name = "emnist-letters-train-labels-idx1-ubyte"
    write(tmp_path / "mine", {**emnist_files(packed=False), name: idx(labels)})
    with pytest.raises(InputError, match=message):
        emnist(tmp_path / "mine")


def test_the_configuration_offers_the_arguments_with_their_defaults():
    config = OmegaConf.load(CONF)
    arguments = inspect.signature(emnist).parameters
    assert {*config} - {"_target_"} == {*arguments} - {"seed"}
    assert all(config[name] == arguments[name].default for name in config if name != "_target_")
