import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.data import SPLITS, folder, images, split_indices
from scoresde.errors import InputError
from scoresde.recipe import build
from scoresde.streams import Streams


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scoresde" / "folder"


def pixels(seed, shape=(6, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def many(tmp_path):
    """Twenty small images that are all different."""
    base = tmp_path / "pictures"
    (base / "more").mkdir(parents=True)
    for i in range(20):
        place = base / "more" if i % 2 else base
        Image.fromarray(pixels(i)).save(place / f"{i:02}.png")
    return base


def every(dataset):
    return torch.cat([dataset.split(name) for name in SPLITS])


def decoded(image, size, mode="RGB", crop=None, suffix=".png", tmp_path=None, **options):
    """One image as an array (C, H, W), by way of a file."""
    file = tmp_path / f"image{suffix}"
    image.save(file, **options)
    result = images._Decode(images._height_width(size), mode, crop)(file)
    if isinstance(result, InputError):
        raise result
    return result


@pytest.fixture
def decode(tmp_path):
    def call(image, size, mode="RGB", **options):
        return decoded(image, size, mode, tmp_path=tmp_path, **options)

    return call


# The set


def test_every_image_below_the_folder_is_there_once(many):
    dataset = folder(many, size=(6, 8))
    assert (dataset.name, dataset.shape, dataset.levels) == ("pictures", (3, 6, 8), 256)
    assert [len(dataset.split(name)) for name in SPLITS] == [16, 2, 2]
    found = {row.numpy().tobytes() for row in every(dataset)}
    assert found == {pixels(i).transpose(2, 0, 1).tobytes() for i in range(20)}


def test_the_splits_are_those_of_the_images_in_the_order_of_their_names(many):
    dataset = folder(many, size=(6, 8), fractions=(0.5, 0.3, 0.2), seed=3)
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # "more" comes after the numbers
    raw = torch.from_numpy(np.stack([pixels(i).transpose(2, 0, 1) for i in order]))
    for name, indices in zip(SPLITS, split_indices(raw, (0.5, 0.3, 0.2), 3), strict=True):
        assert torch.equal(dataset.split(name), raw[indices])


def test_equal_images_never_fall_into_different_splits(many):
    for i in range(20):
        Image.fromarray(pixels(i)).save(many / f"copy{i}.bmp")
    parts = [
        {row.numpy().tobytes() for row in folder(many, (6, 8)).split(name)} for name in SPLITS
    ]
    assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert sum(map(len, parts)) == 20


def test_other_files_hidden_ones_and_linked_folders_are_passed_over(many, tmp_path):
    (many / "labels.csv").write_text("1")
    (many / "._00.png").write_bytes(b"of a Macintosh")
    (many / ".thumbnails").mkdir()
    Image.fromarray(pixels(99)).save(many / ".thumbnails" / "small.png")
    (many / "loop").symlink_to(many)
    (many / "folder.png").mkdir()
    assert len(every(folder(many, (6, 8)))) == 20


def test_a_hidden_folder_itself_may_be_given(tmp_path):
    (tmp_path / ".data").mkdir()
    for i in range(10):
        Image.fromarray(pixels(i)).save(tmp_path / ".data" / f"{i}.png")
    assert len(every(folder(tmp_path / ".data", 4))) == 10


def test_units_and_augmentation_are_as_asked(many):
    dataset = folder(many, size=4, mode="L", flip=True, centred=False, dequantise=False)
    assert (dataset.shape, dataset.scale, dataset.flip) == ((1, 4, 4), 1 / 256, True)
    x = dataset.batch("train", Streams.of(0, batch=16)).x * 256 - 0.5
    torch.testing.assert_close(x, x.round(), atol=1e-3, rtol=0)


# One image


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize(("wanted", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_every_mode_becomes_the_one_wanted(decode, mode, wanted, channels):
    suffix = ".tiff" if mode == "CMYK" else ".png"
    image = Image.fromarray(pixels(0)).convert(mode)
    found = decode(image, (6, 8), wanted, suffix=suffix)
    assert (found.shape, found.dtype) == ((channels, 6, 8), np.uint8)


def test_grey_is_the_luminance(decode):
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    expected = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (decode(image, 4, "L") == expected).all()


def test_what_is_transparent_becomes_white(decode):
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode(clear, 4) == 255).all()
    assert (decode(clear, 4, "L") == 255).all()
    half = decode(Image.new("RGBA", (4, 4), (10, 20, 30, 128)), 4)
    assert half[:, 0, 0].tolist() == pytest.approx([132, 137, 142], abs=1)


def test_a_transparent_colour_of_a_palette_becomes_white(decode):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30])
    assert (decode(image, 4, transparency=0) == 255).all()


def test_opacity_is_kept_if_asked_for(decode):
    image = Image.fromarray(pixels(1, (5, 5, 4)), "RGBA")
    assert np.array_equal(decode(image, 5, "RGBA"), pixels(1, (5, 5, 4)).transpose(2, 0, 1))


def test_the_centre_is_kept_when_the_shape_differs(decode):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (decode(Image.fromarray(wide), 10) == 200).all()
    tall = decode(Image.fromarray(wide.transpose(1, 0, 2).copy()), 5)
    assert (abs(tall.astype(int) - 200) < 20).all()
    assert decode(Image.fromarray(wide), (20, 60)).shape == (3, 20, 60)


def test_shrinking_averages_and_does_not_alias(decode):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = decode(Image.fromarray(board.astype(np.uint8)), 8, "L")
    assert (abs(image.astype(int) - 127) < 8).all()


def test_a_square_at_the_centre_can_be_taken_first(decode):
    image = np.zeros((9, 12, 3), np.uint8)
    image[2:7, 3:8] = 77
    assert (decode(Image.fromarray(image), 5, crop=5) == 77).all()
    assert (decode(Image.fromarray(image), 2, crop=5) == 77).all()
    with pytest.raises(InputError, match=r"data.crop=10.*12 x 9"):
        decode(Image.fromarray(image), 5, crop=10)


@pytest.mark.parametrize(
    ("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)], ids=["0", "180", "270", "90"]
)
def test_images_are_turned_upright(decode, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(Image.fromarray(pixels(0, (5, 5, 3))), 5, exif=exif)
    assert np.array_equal(found, np.rot90(pixels(0, (5, 5, 3)), turn).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_of_sixteen_bits_the_upper_eight_are_kept(decode, suffix):
    values = np.array([[0, 255], [256, 65535]], np.uint16)
    found = decode(Image.fromarray(values), 2, "L", suffix=suffix)
    assert found.tolist() == [[[0, 0], [1, 255]]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(decode, dtype):
    with pytest.raises(InputError, match=r"\.tiff .*32 bits"):
        decode(Image.fromarray(np.ones((2, 2), dtype)), 2, suffix=".tiff")


def test_of_a_moving_image_the_first_frame_is_taken(decode):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    found = decode(frames[0], 4, suffix=".gif", save_all=True, append_images=frames[1:])
    assert found[:, 0, 0].tolist() == [250, 0, 0]


# Images that cannot be used


def spoil(base, name="05.png"):
    file = next(base.rglob(name))
    file.write_bytes(file.read_bytes()[:60])
    return file


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n"])
def test_a_file_that_is_no_image_is_refused_by_its_name(many, data):
    (many / "12.png").write_bytes(data)
    with pytest.raises(InputError, match=r"12\.png .*data\.skip_damaged=true"):
        folder(many, 4)


def test_a_cut_image_is_refused_and_leaves_nothing_behind(many, cache):
    file = spoil(many)
    with pytest.raises(InputError, match=f"{file} "):
        folder(many, 4)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_damaged_images_can_be_left_out_and_the_name_says_how_many(many, caplog):
    spoil(many)
    for _ in range(2):  # decoded, and from the cache
        dataset = folder(many, (6, 8), skip_damaged=True)
        assert dataset.name == "pictures (1 unusable left out)"
        found = {row.numpy().tobytes() for row in every(dataset)}
        expected = {pixels(i).transpose(2, 0, 1).tobytes() for i in range(20) if i != 5}
        assert found == expected
    assert "1 of 20 images" in caplog.text
    assert "05.png" in caplog.text


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(many, monkeypatch):
    monkeypatch.setattr(images, "_MOST_PIXELS", 47)
    with pytest.raises(InputError, match=r"8 x 6 pixels .*47"):
        folder(many, 4)


def test_an_image_that_claims_a_billion_pixels_is_refused(many):
    (many / "00.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x80\0\0\0\x80\0\x08\x02\0\0\0"
        + b"\x46\x38\x5d\x4d\0\0\0\0IDAT"
    )
    with pytest.raises(InputError, match=r"00\.png .*skip_damaged"):
        folder(many, 4)


def test_a_folder_of_nothing_but_damage_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"\b1 image.*a\.png"):
        folder(tmp_path, 4, skip_damaged=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "data.path .*nowhere"),
        ({"path": "cache"}, r"data.path .*\.png.*cache"),
        ({"size": 0}, r"data.size .* 0\b"),
        ({"size": 5000}, "data.size .*4096.*5000"),
        ({"size": [4, 4, 3]}, r"data.size .*\[4, 4, 3\]"),
        ({"size": [4, 2.5]}, "data.size .*2.5"),
        ({"size": 4.5}, "data.size .*4.5"),
        ({"size": "big"}, "data.size .*big"),
        ({"mode": "BGR"}, "data.mode .*L, RGB, RGBA.*BGR"),
        ({"crop": 0}, r"data.crop .*\b0\b"),
        ({"fractions": (0.5, 0.5)}, r"fractions .*\(0\.5, 0\.5\)"),
        ({"fractions": (0.98, 0.01, 0.01)}, r"fractions .*0\.98.*\[\d+, 0, 0\]"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(many, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match=message):
        folder(**{"path": many, "size": 4, **options})


# The cache


def refuse(*_):
    raise AssertionError("an image was decoded again")


def test_a_second_call_decodes_nothing(many, monkeypatch):
    first = folder(many, 4, seed=2)
    monkeypatch.setattr(images._Decode, "__call__", refuse)
    again = folder(str(many), [4, 4], flip=True, seed=2)
    for name in SPLITS:
        assert torch.equal(first.split(name), again.split(name))


@pytest.mark.parametrize(
    "options",
    [{"size": 5}, {"mode": "L"}, {"crop": 3}, {"seed": 1}, {"fractions": (0.6, 0.2, 0.2)}],
)
def test_other_arguments_are_another_file(many, cache, options):
    folder(many, 4)
    folder(many, **{"size": 4, **options})
    assert len(list(cache.glob("*.npy"))) == 2


def test_a_changed_image_is_seen(many):
    before = folder(many, (6, 8))
    Image.fromarray(pixels(99)).save(many / "00.png")
    os.utime(many / "00.png", ns=(1, 1))
    rows = {row.numpy().tobytes() for row in every(folder(many, (6, 8)))}
    assert pixels(99).transpose(2, 0, 1).tobytes() in rows
    assert pixels(0).transpose(2, 0, 1).tobytes() not in rows
    assert len(every(before)) == 20


@pytest.mark.parametrize("damage", ["array", "note", "empty"])
def test_a_damaged_cache_is_made_again(many, cache, damage):
    good = every(folder(many, 4)).clone()
    file = next(cache.glob("*.json" if damage == "note" else "*.npy"))
    data = b"" if damage == "empty" else file.read_bytes()[:-1]
    file.unlink()
    file.write_bytes(data)
    assert torch.equal(every(folder(many, 4)), good)


def test_the_splits_are_pieces_of_one_mapped_file(many):
    dataset = folder(many, 4)
    start, n = dataset.train.data_ptr(), dataset.train[0].numel()
    assert dataset.validation.data_ptr() == start + 16 * n
    assert dataset.test.data_ptr() == start + 18 * n


def test_a_set_larger_than_the_memory_is_mapped_to_be_read_alone(many, monkeypatch):
    good = every(folder(many, 4))
    load = np.load

    def refuse_private(file, mmap_mode):
        if mmap_mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(file, mmap_mode=mmap_mode)

    monkeypatch.setattr(np, "load", refuse_private)
    monkeypatch.setattr(images._Decode, "__call__", refuse)
    assert torch.equal(every(folder(many, 4)), good)


def test_writing_into_a_set_leaves_the_cache_as_it_is(many):
    folder(many, 4).train.zero_()
    assert folder(many, 4).train.any()


def test_calls_at_once_decode_once(many, monkeypatch):
    calls = []
    real = images._Decode.__call__
    monkeypatch.setattr(
        images._Decode, "__call__", lambda self, file: calls.append(file) or real(self, file)
    )
    with ThreadPoolExecutor(3) as pool:
        sets = list(pool.map(lambda _: folder(many, 4), range(3)))
    assert len(calls) == 20
    assert all(torch.equal(sets[0].train, one.train) for one in sets)


def test_too_small_a_disk_is_refused_before_decoding(many, monkeypatch):
    usage = shutil.disk_usage(many)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"GiB .*data.size.*XDG_CACHE_HOME"):
        folder(many, 4)


def test_a_cache_that_cannot_be_written_is_a_sentence(many, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "_arrange", full)
    with pytest.raises(InputError, match=r"cache .*No space left"):
        folder(many, 4)
    assert not [path for path in cache.iterdir() if path.suffix in (".raw", ".part", ".npy")]


# What a checkpoint's recipe may do


def test_a_recipe_cannot_choose_where_the_images_are_kept(many, tmp_path):
    recipe = {"_target_": "scoresde.data.folder", "path": str(many), "size": 4}
    before = sorted(many.rglob("*"))
    build(recipe)
    assert sorted(many.rglob("*")) == before
    for name in ("cache", "target", "root"):
        with pytest.raises(InputError, match="unexpected keyword"):
            build({**recipe, name: str(tmp_path / "elsewhere")})


@pytest.mark.parametrize("name", ["_write", "_build", "_arrange", "_Decode"])
def test_a_recipe_cannot_call_what_writes(name):
    with pytest.raises(InputError, match="The checkpoint names"):
        build({"_target_": f"scoresde.data.images.{name}"})
