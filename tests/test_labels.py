"""Classes and conditions from files: folders of folders, arrays beside the examples, and names."""

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import VPSDE, DenoisingScoreMatching, InputError, ScoreModel
from scoresde.data import SPLITS, Dataset, GeometricAugmentation, array, folder
from scoresde.nn import UNet
from scoresde.streams import Streams
from scoresde.train import Training, train

NAMES = ["ape", "bear", "cow"]


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """Images whose brightness says which sub-folder they lie in, some of them one deeper."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(36):
        place = tmp_path / "animals" / NAMES[i % 3] / ("deep" if i % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 80 * (i % 3) + i).save(place / f"{i}.png")
    return tmp_path / "animals"


def check(data, class_of):
    """Every example lies with its class in every split."""
    assert sum(len(data.split(name)) for name in SPLITS) > len(data.train)
    for name, labels in zip(SPLITS, data.labels, strict=True):
        assert labels.tolist() == class_of(data.split(name)).tolist()


def test_sub_folders_are_classes(animals):
    data = folder(animals, 4, "L")
    assert list(data.class_names) == NAMES
    for name, labels in zip(SPLITS, data.labels, strict=True):
        values = data.split(name)[:, 0, 0, 0].long()
        # The value is 80 c + i with i = c mod 3, below 36.
        assert bool(((values - 80 * labels) % 3 == labels).all())
        assert bool(((values - 80 * labels >= 0) & (values - 80 * labels < 36)).all())
    again = folder(animals, 4, "L")  # from the cache
    assert all(torch.equal(a, b) for a, b in zip(data.labels, again.labels, strict=True))
    whole = folder(animals, 4, "L", fractions=None)
    assert torch.bincount(whole.labels[0]).tolist() == [12, 12, 12]


def test_what_is_left_out_takes_its_class_with_it(animals):
    (animals / "ape" / "0.png").write_bytes(b"damaged")
    data = folder(animals, 4, "L", fractions=None, skip_damaged=True)
    assert torch.bincount(data.labels[0]).tolist() == [11, 12, 12]


def test_images_beside_sub_folders_have_no_class(animals):
    Image.new("L", (4, 4), 3).save(animals / "alone.png")
    assert folder(animals, 4, "L").labels is None
    with pytest.raises(InputError, match=r"data.labels=true .*alone.png"):
        folder(animals, 4, "L", labels=True)
    assert folder(animals / "bear", 4, "L").labels is None
    assert folder(animals, 4, "L", labels=False).labels is None


def test_other_data_are_numbered_by_their_names(animals, tmp_path):
    (animals / "ape").rename(tmp_path / "ape")
    data = folder(animals, 4, "L")
    assert [data.labels[0].unique().tolist(), list(data.class_names)] == [[0, 1], NAMES[1:]]
    renamed = data.renamed(NAMES)
    assert torch.equal(renamed.labels[2], data.labels[2] + 1)
    with pytest.raises(InputError, match=r"ape, bear, got cow"):
        data.renamed(NAMES[:2])
    assert data.renamed([]) is data


# --- Arrays --------------------------------------------------------------------------------------

X = np.arange(60, dtype=np.float64)[:, None] + [0.0, 0.25]
Y = np.arange(60) % 3


def of_row(raw):
    return raw[:, 0].long() % 3


@pytest.mark.parametrize("name", ["labels", "label", "y"])
@pytest.mark.parametrize("form", [np.int64, np.uint8, np.int32])
def test_classes_beside_an_array(name, form, tmp_path):
    np.savez(tmp_path / "d.npz", x=X, **{name: Y.astype(form)})
    check(array(tmp_path / "d.npz", standardise=False), of_row)
    check(array(tmp_path / "d.npz", key="x", standardise=False), of_row)


def test_classes_of_other_shapes_and_names(tmp_path):
    np.savez(tmp_path / "column.npz", x=X, kind=Y[:, None])
    check(array(tmp_path / "column.npz", labels="kind", standardise=False), of_row)
    np.savez(tmp_path / "words.npz", x=X, labels=np.array(NAMES)[Y])
    data = array(tmp_path / "words.npz", standardise=False)
    check(data, of_row)
    assert list(data.class_names) == NAMES
    whole = array(tmp_path / "words.npz", fractions=None)
    assert torch.equal(whole.labels[2], torch.from_numpy(Y))


@pytest.mark.parametrize(
    "names",
    [
        ("train", "train_labels", "test", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("train", "labels_train", "test", "labels_test"),
    ],
)
def test_classes_of_a_file_with_its_own_splits(names, tmp_path):
    values = dict(zip(names, (X[:50], Y[:50], X[50:], Y[50:]), strict=True))
    np.savez(tmp_path / "d.npz", **values)
    data = array(tmp_path / "d.npz", standardise=False)
    assert (len(data.train) + len(data.validation), len(data.test)) == (50, 10)
    check(data, of_row)
    if names[0] == "train_images":
        np.savez(tmp_path / "three.npz", **values, val_images=X[:5] + 3, val_labels=Y[:5])
        data = array(tmp_path / "three.npz", standardise=False)
        assert [len(data.split(name)) for name in SPLITS] == [50, 5, 10]
        check(data, of_row)


def test_continuous_conditions_come_from_arrays_too(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, height=X[:, :1] ** 2)
    data = array(tmp_path / "d.npz", conditions=["height"], standardise=False)
    for name, part in zip(SPLITS, data.conditions["height"], strict=True):
        torch.testing.assert_close(part[:, 0], data.split(name)[:, 0].float() ** 2)
    np.savez(
        tmp_path / "two.npz",
        train=X[:50],
        test=X[50:],
        train_height=X[:50, :1],
        test_height=X[50:, :1],
    )
    data = array(tmp_path / "two.npz", conditions=["height"], standardise=False)
    for name, part in zip(SPLITS, data.conditions["height"], strict=True):
        assert torch.equal(part, data.split(name)[:, :1].float())


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"x": X, "labels": Y}, {"labels": "kind", "key": "x"}, "kind, got x, labels"),
        ({"x": X, "kind": Y[:9]}, {"labels": "kind"}, r"kind .*\(9,\)"),
        ({"x": X, "kind": Y + 0.5}, {"labels": "kind"}, "kind .*float64"),
        ({"train": X, "test": X, "train_labels": Y}, {}, "test_labels"),
        ({"x": X}, {"conditions": ["height"]}, "height"),
        ({"x": X, "height": X[:9]}, {"conditions": ["height"]}, "height"),
    ],
)
def test_arrays_that_are_no_classes_of_the_examples_are_refused(
    arrays, options, message, tmp_path
):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match=message):
        array(tmp_path / "d.npz", **options)


def test_labels_of_another_length_or_type_are_left_alone(tmp_path):
    for other in (Y[:9], Y + 0.5, np.stack((Y, Y), 1)):
        np.savez(tmp_path / "d.npz", x=X, labels=other)
        assert array(tmp_path / "d.npz").labels is None


def test_an_augmentation_that_leaves_the_image_behind_is_refused(tmp_path):
    x, seen = torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.zeros(20, 2, 4, 4)
    data = Dataset.of("d", [x] * 3, levels=256, conditions={"seen": [seen] * 3})
    network = UNet((1, 4, 4), 8, conditions={"seen": (2, 4, 4), "augment": 9})
    plan = Training(steps=1, batch_size=4, augment=GeometricAugmentation())
    given = (ScoreModel(network, VPSDE()), data, DenoisingScoreMatching(), plan)
    with pytest.raises(InputError, match=r"train.augment .*seen.*data.flip=true"):
        train(*given, torch.optim.Adam, tmp_path, progress=False)


def test_images_that_are_conditions_are_mirrored_with_their_examples():
    x = torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1) * 8 + torch.arange(4).to(
        torch.uint8
    )
    x = x.expand(20, 1, 2, 4).contiguous()
    seen = torch.cat((x.float(), -x.float()), 1)
    data = Dataset.of(
        "d", [x] * 3, levels=256, flip=True, dequantise=False, conditions={"seen": [seen] * 3}
    )
    for split in ("train", "test"):
        batch = data.batch(split, Streams.of(0, batch=20))
        raw = data.decode(batch.x).float()
        assert torch.equal(batch.cond["seen"], torch.cat((raw, -raw), 1))
        flipped = (raw[:, 0, 0, 0] > raw[:, 0, 0, 3]).sum()
        assert (0 < flipped < 20) == (split == "train")
