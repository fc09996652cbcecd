"""Pictures of every kind of data: what is in view, which features are drawn, every pixel."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from scoresde import InputError
from scoresde.codec import Affine
from scoresde.report import figures as plots
from scoresde.report import panels as drawings
from scoresde.tasks.image_files import ImageFiles
from scoresde.tasks.views import Images, Points, Series, Table, Volumes, view_of


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(path):
    return (imread(path)[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2,), Points),
        ((1,), Table),
        ((13,), Table),
        ((2, 2, 2, 2, 2), Table),
        ((6, 40), Series),
        ((1, 8, 8), Images),
        ((2, 8, 8), Images),
        ((4, 8, 8), Images),
        ((1, 4, 6, 8), Volumes),
    ],
)
def test_every_kind_of_data_has_a_picture(shape, kind, tmp_path):
    view = view_of(Affine(shape, low=-3, high=3))
    assert type(view) is kind
    real, drawn = noise(9, *shape), noise(5, *shape, seed=1)
    alone = view.picture(drawn, tmp_path / "one.png")
    both = view.compare({"data": real, "samples": drawn}, tmp_path / "two.png")
    assert pixels(alone).std() > 1
    assert pixels(both).size > pixels(alone).size or kind is Table  # tables overlay


def test_far_values_do_not_set_what_is_in_view():
    x = noise(1000, 2)
    x[:4] = 1e6
    low, high = drawings.span(x[:, 0].numpy())
    assert -4 < low < -2 < 2 < high < 4
    a, b, c, d = view_of(Affine((2,)), reference=x).extent()
    assert b - a == pytest.approx(d - c)  # one scale: a square
    assert b - a < 10
    a, b, c, d = view_of(Affine((2,), width=[1.0, 9.0]), x * torch.tensor([1.0, 9.0])).extent()
    assert (d - c) / (b - a) == pytest.approx(9, rel=0.3)
    assert drawings.span(np.full(3, 7.0)) == (3.5, 10.5)
    assert drawings.span(np.array([np.nan])) == (-1, 1)


def test_tables_are_drawn_by_the_columns_that_are_furthest_off(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        drawings, "pairs", lambda panels, path, columns, *_: chosen.append(columns)
    )
    real, drawn = noise(500, 20), noise(500, 20, seed=1)
    off = [1, 4, 7, 11, 13, 19]
    drawn[:, off] += 2
    view = view_of(Affine((20,)))
    view.compare({"data": real, "samples": drawn}, tmp_path / "a.png")
    view.compare({"samples": drawn}, tmp_path / "a.png")
    view_of(Affine((20,)), reference=real).picture(drawn, tmp_path / "a.png")
    assert chosen == [off, list(range(6)), off]


def test_transparent_images_show_the_ground_and_opaque_ones_their_colours(tmp_path):
    raw = torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8)
    raw[0, 3], raw[1, 3] = 255, 0
    view = view_of(Affine.of_levels((4, 8, 8), 256))
    shown = pixels(view.picture(raw, tmp_path / "a.png"))
    zoom, step = 6, 8 * 6 + 2
    tiles = [shown[2:50:zoom, x : x + 48 : zoom] for x in (2, 2 + step)]
    np.testing.assert_array_equal(tiles[0], raw[0, :3].permute(1, 2, 0))
    assert set(tiles[1].flatten().tolist()) == {204, 255}


def test_other_channels_lie_side_by_side(tmp_path):
    raw = torch.randint(0, 256, (1, 2, 8, 8), dtype=torch.uint8)
    view = view_of(Affine.of_levels((2, 8, 8), 256))
    shown = pixels(view.picture(raw, tmp_path / "a.png"))[2:50:6, 2:98:6, 0]
    np.testing.assert_array_equal(shown, torch.cat([raw[0, 0], raw[0, 1]], dim=1))


def test_many_levels_are_stretched_to_what_real_data_fill(tmp_path):
    raw = torch.randint(100, 1000, (4, 1, 16, 16), dtype=torch.int16)
    codec = Affine.of_levels((1, 16, 16), 30000)
    shown = pixels(view_of(codec).picture(raw, tmp_path / "a.png"))
    assert np.ptp(shown[2:66, 2:66]) == 255
    few = Affine.of_levels((1, 16, 16), 256)
    dark = pixels(view_of(few).picture((raw // 100).to(torch.uint8), tmp_path / "b.png"))
    assert dark[3:50, 3:50].max() <= 10


def test_volumes_show_their_middle_slices(tmp_path):
    raw = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    raw[0, 0, 2, 0, 1] = 255
    view = view_of(Affine.of_levels((1, 4, 4, 4), 256))
    tile = view._tiles(raw, 0.0, 1.0)[0, 0]
    assert tile.shape == (4, 12)
    assert tile.nonzero().tolist() == [[0, 1]]  # in the first slice alone


def test_panels_refuse_other_shapes(tmp_path):
    for draw in (drawings.curves, drawings.pairs):
        with pytest.raises(InputError, match=r"must have shape .*got \(5, 3, 2, 2\)"):
            draw({"x": noise(5, 3, 2, 2)}, tmp_path / "a.png", [0], ["a"], [(0, 1)])
        with pytest.raises(InputError, match=r"tensor.*none"):
            draw({}, tmp_path / "a.png", [0], ["a"], [(0, 1)])


# --- Image files ---------------------------------------------------------------------------------


def test_grey_images_of_many_levels_keep_them_all(tmp_path):
    raw = torch.arange(1077, dtype=torch.int16).repeat(2)[:2048].reshape(2, 1, 32, 32)
    files = ImageFiles(Affine.of_levels((1, 32, 32), 1077))
    files.save(raw, tmp_path / "images", range(3, 5))
    for i in range(2):
        with Image.open(tmp_path / f"images/0000000{3 + i}.png") as image:
            assert image.mode == "I;16"
            np.testing.assert_array_equal(np.array(image), raw[i, 0].numpy())
    assert "0 to 1076" in files.note


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_bytes_are_kept_as_they_are(channels, mode, tmp_path):
    raw = torch.randint(0, 256, (1, channels, 5, 6), dtype=torch.uint8)
    files = ImageFiles(Affine.of_levels((channels, 5, 6), 256))
    files.save(raw, tmp_path, range(1))
    with Image.open(tmp_path / "00000000.png") as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.array(image).reshape(5, 6, -1), raw[0].permute(1, 2, 0))
    assert files.note == ""


def test_real_valued_images_are_scaled_and_say_so(tmp_path):
    files = ImageFiles(Affine((1, 1, 3), low=236.0, high=1076.0))
    files.save(torch.tensor([[[[236.0, 656.0, 2000.0]]]]), tmp_path, range(1))
    with Image.open(tmp_path / "00000000.png") as image:
        assert np.array(image).tolist() == [[0, 128, 255]]
    assert "exact values are in samples.npz" in files.note


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (Affine.of_levels((3, 4, 4), 1077), "at most 256 levels for 3 channels, got 1077"),
        (Affine.of_levels((2, 4, 4), 256), r"1, 3 or 4 channels, got \(2, 4, 4\)"),
        (Affine((13,)), r"1, 3 or 4 channels, got \(13,\)"),
    ],
)
def test_what_png_cannot_hold_is_refused(codec, words):
    with pytest.raises(InputError, match=words):
        ImageFiles(codec)


def test_neighbours_are_drawn_below_their_samples(tmp_path):
    view = view_of(Affine.of_levels((1, 8, 8), 256))
    raw = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    path = view.neighbours(raw, raw, torch.zeros(3), tmp_path / "a.png")
    one = plots.labelled_grid(view._tiles(raw, 0.0, 1.0), ["a"] * 3, tmp_path / "b.png", 3)
    assert pixels(path).shape[0] == 2 * pixels(one).shape[0]
    assert view_of(Affine((5,))).neighbours(noise(2, 5), noise(2, 5), noise(2), path) is None
