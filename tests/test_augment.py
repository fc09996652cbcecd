"""Augmentations: what they do to images, and that the labels say it."""

import math

import pytest
import torch

from scoresde import InputError
from scoresde.data import GeometricAugmentation
from scoresde.data.augment import _turned, _warped
from scoresde.streams import Streams

NAMES = ("x flip", "y flip", "scale", "cos", "sin", "stretch c", "stretch s", "shift x", "shift y")


def images(n=4, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, height, width, generator=generator)


def warped(x, matrix, shift=(0.0, 0.0)):
    n = len(x)
    return _warped(x, torch.as_tensor(matrix).expand(n, 2, 2), torch.tensor([shift] * n))


def test_without_changes_only_the_mirror_is_left_and_pixels_are_exact():
    x = images(64)
    moved, labels = GeometricAugmentation(0.0)(x, Streams.of(0, batch=64))
    mirrored = labels[:, 0] == 1
    assert torch.equal(moved[mirrored], x[mirrored].flip(-1))
    assert torch.equal(moved[~mirrored], x[~mirrored])
    assert 16 < int(mirrored.sum()) < 48
    assert not labels[:, 1:].any()


@pytest.mark.parametrize("size", [(8, 8), (6, 8)], ids=str)
def test_a_half_turn_is_both_mirrors(size):
    x = images(2, *size)
    turned = warped(x, _turned(torch.tensor([math.pi])))
    torch.testing.assert_close(turned, x.flip((-1, -2)), rtol=0, atol=1e-5)


def test_a_quarter_turn_is_exact_on_a_square():
    x = images()
    turned = warped(x, _turned(torch.tensor([math.pi / 2])))
    truth = torch.rot90(x, -1, (-2, -1))
    torch.testing.assert_close(turned, truth, rtol=0, atol=1e-5)


def test_a_turn_is_rigid_in_an_oblong_image():
    """A round spot in the middle stays as it is, away from the reflected borders."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(32.0), indexing="ij")
    spot = torch.exp(-((x - 15.5) ** 2 + (y - 7.5) ** 2) / 8).reshape(1, 1, 16, 32)
    turned = warped(spot, _turned(torch.tensor([0.7])))
    assert float((turned - spot)[..., 10:22].abs().max()) < 0.05


def test_a_shift_moves_by_its_fraction_of_the_size():
    x = images()
    moved = warped(x, torch.eye(2), (0.25, 0.0))  # two of eight pixels
    torch.testing.assert_close(moved[..., 2:], x[..., :-2], rtol=0, atol=1e-5)


def test_a_scale_enlarges():
    x = torch.zeros(1, 1, 16, 16)
    x[..., 6:10, 6:10] = 1
    larger = warped(x, 2 * torch.eye(2))
    assert float(larger.sum() / x.sum()) == pytest.approx(4, rel=0.1)


def test_every_change_has_the_probability_asked_for():
    n, p = 4000, 0.3
    _, labels = GeometricAugmentation(p)(images(1).expand(n, -1, -1, -1), Streams.of(0, batch=n))
    for i, expected in zip((0, 1, 2, 4, 5, 7), (0.5, p, p, p, p, p), strict=True):
        share = float((labels[:, i] != 0).double().mean())
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n)), NAMES[i]


def test_the_labels_have_the_published_scales():
    n = 4000
    _, labels = GeometricAugmentation(1.0)(images(1).expand(n, -1, -1, -1), Streams.of(0, batch=n))
    assert labels[:, 2].std().item() == pytest.approx(1, abs=0.05)
    assert (labels[:, 3] + 1).square().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (labels[:, 5] ** 2 + labels[:, 6] ** 2).mean().item() == pytest.approx(1, abs=0.1)
    assert labels[:, 5].mean().item() == pytest.approx(0, abs=0.05)
    assert labels[:, 7:].std().item() == pytest.approx(1, abs=0.05)


def test_an_image_is_augmented_alike_in_any_batch_and_afresh_in_another_epoch():
    x, augment = images(8), GeometricAugmentation(0.5)
    together, labels = augment(x, Streams.of(0, range(8)), draw=3)
    alone, label = augment(x[5:6], Streams.of(0, [5]), draw=3)
    torch.testing.assert_close(together[5:6], alone)
    assert torch.equal(labels[5:6], label)
    assert not torch.equal(labels, augment(x, Streams.of(0, range(8)), draw=4)[1])


def test_the_type_of_the_data_is_kept():
    moved, _ = GeometricAugmentation(1.0)(images().double(), Streams.of(0, batch=4))
    assert moved.dtype == torch.float64


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_no_probability_is_refused(probability):
    with pytest.raises(InputError, match=rf"probability .*{probability}"):
        GeometricAugmentation(probability)


def test_vectors_are_refused():
    with pytest.raises(InputError, match=r"images .*\(2,\)"):
        GeometricAugmentation()(torch.zeros(4, 2), Streams.of(0, batch=4))
