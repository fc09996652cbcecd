"""The pictures: valid files, exact pixels, and no crash on what is not a number."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from scoresde.errors import InputError
from scoresde.report import figures as plots


def size(path):
    """Reads width and height from the header of a PNG file."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:24])


def pixels(path):
    return (imread(path)[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_grid_shows_every_pixel_exactly(tmp_path, channels):
    images = torch.rand(5, channels, 8, 6)
    path = plots.image_grid(images, tmp_path / "new" / "grid.png", columns=3, zoom=4)
    assert path == tmp_path / "new" / "grid.png"
    assert size(path) == (2 + 3 * (6 * 4 + 2), 2 + 2 * (8 * 4 + 2))
    shown = pixels(path)
    for i, image in enumerate(images):
        y, x = 2 + i // 3 * 34, 2 + i % 3 * 26
        expected = (image if channels == 3 else image[:1].expand(3, -1, -1)) * 255
        expected = expected.round().int().repeat_interleave(4, 1).repeat_interleave(4, 2)
        tile = shown[y : y + 32, x : x + 24]
        assert np.array_equal(tile, expected.permute(1, 2, 0).numpy())
    assert (shown[:2] == plots.SEPARATOR).all()


@pytest.mark.parametrize(("side", "zoom"), [(8, 6), (28, 2), (32, 2), (64, 1)])
def test_grid_zooms_small_images_only(tmp_path, side, zoom):
    path = plots.image_grid(torch.zeros(1, 1, side, side), tmp_path / "a.png")
    assert size(path) == (side * zoom + 4, side * zoom + 4)


def test_grid_clips_and_marks_what_is_no_number(tmp_path):
    images = torch.tensor([[[[-1.0, 2.0], [math.nan, math.inf]]]])
    shown = pixels(plots.image_grid(images, tmp_path / "a.png", zoom=1))[2:4, 2:4]
    assert shown.tolist() == [[[0] * 3, [255] * 3], [list(plots.RED), [255] * 3]]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(4, 8, 8), {}, r"images.*\(4, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), {}, r"images.*\(0, 1, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), {}, "images.*uint8"),
        (torch.zeros(4, 1, 8, 8), {"columns": 0}, r"columns.*\b0\b"),
        (torch.zeros(4, 1, 8, 8), {"zoom": 0}, r"zoom.*\b0\b"),
    ],
)
def test_grid_refuses_what_it_cannot_draw(tmp_path, images, options, message):
    with pytest.raises(InputError, match=message):
        plots.image_grid(images, tmp_path / "a.png", **options)


def test_comparison_holds_the_grids_unscaled(tmp_path):
    a, b = torch.rand(8, 1, 8, 8), torch.rand(4, 1, 8, 8)
    path = plots.comparison({"real test data": a, "a long name " * 5: b}, tmp_path / "c.png", 4)
    shown, left = pixels(path), plots.MARGIN
    for grid in (plots._tiles(a, 4), plots._tiles(b, 4)):
        height, width, _ = grid.shape
        panel = shown[:, left : left + width]
        tops = [y for y in range(len(panel) - height + 1) if (panel[y : y + height] == grid).all()]
        assert len(tops) == 1
        left += width + plots.MARGIN
    assert shown.shape[1] == left


def test_pictures_need_something_to_draw(tmp_path):
    for draw in (plots.comparison, plots.scatter_comparison):
        with pytest.raises(InputError, match=r"tensor.*none"):
            draw({}, tmp_path / "a.png")
    with pytest.raises(InputError, match=r"tensor.*none"):
        plots.histogram({}, tmp_path / "a.png", "nats")


def records(n=200, scale=1.0):
    training = [{"step": i, "loss": scale * (1 + math.exp(-i / 9))} for i in range(n)]
    return training + [{"step": i, "validation_loss": 1.1} for i in range(0, n, 20)]


def test_loss_curve_changes_with_the_records(tmp_path):
    curves = [plots.loss_curve(records(scale=s), tmp_path / f"{s}.png") for s in (1.0, 0.5)]
    assert min(size(curves[0])) > 400
    assert curves[0].read_bytes() != curves[1].read_bytes()


def test_loss_curve_of_nothing_and_of_no_numbers(tmp_path):
    empty = plots.loss_curve([], tmp_path / "empty.png")
    nulls = [{"step": 0, "loss": None}, {"step": 1, "loss": math.nan}, {"step": 2}]
    assert min(size(empty)) > 400
    assert min(size(plots.loss_curve(nulls, tmp_path / "nulls.png"))) > 400
    assert min(size(plots.loss_curve([{"step": 3, "loss": -1.0}], tmp_path / "one.png"))) > 400


def test_series_takes_the_last_record_of_a_step_and_skips_nulls():
    steps, values = plots._series(
        [
            {"step": 2, "loss": 1.0},
            {"step": 1, "loss": 9.0},
            {"step": 2, "loss": 3.0},
            {"step": 3, "loss": None},
            {"step": 4, "validation_loss": 0.0},
        ],
        "loss",
    )
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [9, 3]


def test_running_mean_keeps_a_constant_and_the_mean_of_a_line():
    assert np.allclose(plots._smooth(np.full(500, 3.0)), 3)
    line = np.arange(500.0)
    assert np.allclose(plots._smooth(line)[20:480], line[20:480])
    assert len(plots._smooth(np.empty(0))) == 0


def test_scatter_counts_what_it_leaves_out(tmp_path):
    square = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    strange = torch.tensor([[0.5, 0.5], [9.0, 0.0], [math.nan, 0.0]])
    view = plots.square(square)
    assert view == pytest.approx((-0.1, 1.1, -0.1, 1.1))
    assert plots._outside(strange.numpy(), view) == "2 of 3 outside"
    path = plots.scatter_comparison({"real": square, "model": strange}, tmp_path / "a.png")
    other = plots.scatter_comparison({"": strange}, tmp_path / "b.png", extent=view)
    assert size(other)[0] < size(path)[0]
    width, height = size(path)
    assert width > 1.5 * height
    with pytest.raises(InputError, match=r"\(5, 3\)"):
        plots.scatter_comparison({"x": torch.zeros(5, 3)}, tmp_path / "a.png")


def test_scatter_of_no_numbers(tmp_path):
    assert size(plots.scatter_comparison({"x": torch.full((3, 2), math.nan)}, tmp_path / "a.png"))


def test_density_takes_a_panel_for_each(tmp_path):
    log_density = torch.linspace(-9, 0, 30 * 30).reshape(30, 30)
    log_density[:2], log_density[2] = -math.inf, math.nan
    extent = (-2.0, 2.0, -2.0, 2.0)
    one = plots.density(log_density, extent, tmp_path / "1.png")
    three = plots.density(
        log_density, extent, tmp_path / "3.png", samples=torch.randn(50, 2), exact=log_density + 1
    )
    assert size(three)[0] > 2 * size(one)[0]
    assert (pixels(one) == plots.RED).all(-1).sum() > 500
    with pytest.raises(InputError, match=r"\(29, 30\) and \(30, 30\)"):
        plots.density(log_density, extent, tmp_path / "a.png", exact=log_density[1:])


def test_trajectories(tmp_path):
    times = torch.linspace(1, 1e-3, 900)
    paths = times[:, None, None] * torch.randn(7, 2)
    assert min(size(plots.trajectories(times, paths, tmp_path / "a.png"))) > 400
    with pytest.raises(InputError, match=r"times and paths.*\(899,\)"):
        plots.trajectories(times[1:], paths, tmp_path / "a.png")


def test_histogram(tmp_path):
    values = {"model": torch.randn(100), "broken": torch.full((3,), math.nan)}
    assert min(size(plots.histogram(values, tmp_path / "a.png", "bits/dim"))) > 400
    assert plots.histogram({"same": torch.ones(4)}, tmp_path / "b.png", "nats").exists()
    assert plots.histogram({"x": torch.tensor([math.inf])}, tmp_path / "c.png", "nats").exists()


def test_pictures_leave_pyplot_alone():
    assert "pyplot" not in Path(plots.__file__).read_text(encoding="utf-8")


def test_labelled_grid_needs_a_text_for_each_image(tmp_path):
    images = torch.rand(5, 3, 6, 9)
    path = plots.labelled_grid(images, ["-3071", *"abcd"], tmp_path / "labels.png", columns=2)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"labels.*\b5\b.*\b1\b"):
        plots.labelled_grid(images, ["a"], path)
    with pytest.raises(InputError, match=r"columns.*\b0\b"):
        plots.labelled_grid(images, ["a"] * 5, path, columns=0)
    with pytest.raises(InputError, match=r"images.*\(0, 3"):
        plots.labelled_grid(images[:0], [], path)
