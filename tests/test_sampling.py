"""Samples as they are saved: in pieces, as images, with their way, from and between latents."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import VPSDE, GaussianModel, InputError
from scoresde.codec import Affine
from scoresde.data import Dataset
from scoresde.sample import DDIM, EulerMaruyama, ProbabilityFlow
from scoresde.tasks import Drawing, draw_samples, stream_samples
from scoresde.tasks.latents import encode_data, interpolate_latents, read_latents
from scoresde.tasks.parts import Parts, Rank
from scoresde.tasks.sampling import save_trajectory

BYTES = Affine((3, 4, 4), shift=128, width=128, levels=256, low=0, high=255)
POINTS = Affine((2,), low=-3, high=3)


def drawing(codec=BYTES, sampler=None, latents=None, std=0.5):
    model = GaussianModel(torch.zeros(*codec.shape), std, VPSDE())
    return Drawing(model, sampler or EulerMaruyama(4), codec, 7, latents)


def stream(folder, count=10, what=None, rank=None, **options):
    options = {"batch_size": 4, "progress": False, **options}
    parts = Parts(folder / "parts", rank or Rank()).claim({"what": "a test"})
    return stream_samples(what or drawing(), count, folder, parts, **options)


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


# --- Pieces --------------------------------------------------------------------------------------


def test_the_pieces_together_are_what_is_drawn_at_once(tmp_path):
    result = stream(tmp_path)
    one = drawing()
    whole = draw_samples(one.model, one.sampler, BYTES, 10, seed=7, progress=False)
    there = arrays(tmp_path / "samples.npz")
    assert there["x"].dtype == np.uint8
    np.testing.assert_array_equal(there["x"], BYTES.decode(whole.x).numpy())
    assert there["nfe"].tolist() == [4] * 10
    assert (int(there["seed"]), result["nfe"]) == (7, 4.0)
    assert (tmp_path / "samples.png").exists()


def test_what_is_finished_outlives_an_interruption_and_is_not_drawn_again(tmp_path):
    stream(tmp_path / "whole")
    batches = itertools.count()

    class Interrupted(Drawing):
        def batch(self, piece, progress=False):
            if next(batches) == 2:
                raise KeyboardInterrupt
            return super().batch(piece, progress)

    one = Interrupted(**vars(drawing()))
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "killed", what=one, images=True)
    assert len(list((tmp_path / "killed/parts").glob("0*.npz"))) == 2
    assert len(list((tmp_path / "killed/images").glob("*.png"))) == 8
    stream(tmp_path / "killed", what=one, images=True)
    assert next(batches) == 4  # one more batch alone
    whole, resumed = (arrays(tmp_path / name / "samples.npz") for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole["x"], resumed["x"])
    assert len(list((tmp_path / "killed/images").glob("*.png"))) == 10


def test_a_larger_count_goes_on_with_what_is_there(tmp_path):
    stream(tmp_path, count=8)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("0*.npz")}
    stream(tmp_path, count=12)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())
    assert len(arrays(tmp_path / "samples.npz")["x"]) == 12


def test_several_processes_share_the_work(tmp_path):
    stream(tmp_path, rank=Rank(1, 2))
    assert not (tmp_path / "samples.npz").exists()  # the first writes it
    stream(tmp_path, rank=Rank(0, 2))
    stream(tmp_path / "alone")
    np.testing.assert_array_equal(
        arrays(tmp_path / "samples.npz")["x"], arrays(tmp_path / "alone/samples.npz")["x"]
    )


def test_only_one_batch_is_in_memory_at_a_time(tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    most = []

    def watched(columns):
        gc.collect()
        most.append(len(alive))
        alive.add(columns["x"])
        return columns

    class Watched(Drawing):
        def batch(self, piece, progress=False):
            return watched(super().batch(piece, progress))

    load = Parts.load
    monkeypatch.setattr(Parts, "load", lambda *a: (c := load(*a)) and watched(c))
    stream(tmp_path, 40, Watched(**vars(drawing())))
    assert len(most) == 20  # ten drawn, and ten read
    assert max(most) <= 1


def test_samples_that_are_not_finite_are_told_and_not_kept(tmp_path):
    class Diverging(GaussianModel):
        def noise(self, x, t, **cond):
            return torch.where(torch.arange(len(x)) == 1, torch.nan, 0.0)[:, None] * x

    model = Diverging(torch.zeros(2), 0.5, VPSDE())
    with pytest.raises(InputError, match="1 of 4 samples are not finite"):
        stream(tmp_path, what=Drawing(model, EulerMaruyama(2), POINTS, 0))
    assert not list((tmp_path / "parts").glob("0*.npz"))


# --- Images --------------------------------------------------------------------------------------


def test_each_sample_is_an_image_of_its_levels(tmp_path):
    stream(tmp_path, images=True)
    levels = arrays(tmp_path / "samples.npz")["x"]
    for i in range(10):
        picture = np.asarray(Image.open(tmp_path / f"images/{i:08d}.png"))
        np.testing.assert_array_equal(picture, levels[i].transpose(1, 2, 0))


def test_few_levels_become_shades(tmp_path):
    codec = Affine((1, 4, 4), shift=8.5, width=8.5, levels=17, low=0, high=16)
    stream(tmp_path, what=drawing(codec), images=True)
    picture = np.asarray(Image.open(tmp_path / "images/00000000.png"))
    levels = arrays(tmp_path / "samples.npz")["x"][0, 0]
    np.testing.assert_allclose(picture, levels * (255 / 16), atol=0.5)


def test_points_are_no_images(tmp_path):
    with pytest.raises(InputError, match=r"images=true requires .*got \(2,\)"):
        stream(tmp_path, what=drawing(POINTS), images=True)


# --- Ways ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [BYTES, POINTS, Affine((5,))], ids=["images", "plane", "others"])
def test_the_way_of_samples_is_saved_and_drawn(codec, tmp_path):
    what = drawing(codec, DDIM(20))
    save_trajectory(what, 5, 10, tmp_path)
    way = arrays(tmp_path / "trajectory.npz")
    assert way["x"].shape == way["denoised"].shape == (5, 8, *codec.shape)
    assert way["t"].shape == (5, 8)
    ends = draw_samples(what.model, what.sampler, codec, 8, seed=7, progress=False)
    np.testing.assert_allclose(way["x"][-1], ends.x.numpy(), atol=1e-6)
    assert (tmp_path / "trajectory.png").exists() == (codec.shape != (5,))


# --- Latents -------------------------------------------------------------------------------------


def data():
    levels = torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    return Dataset.of("noise", [levels.to(torch.uint8)] * 3, levels=256)


def test_data_are_encoded_and_decoded_level_by_level(tmp_path):
    one, flow = data(), ProbabilityFlow(1e-6, 1e-6)
    parts = Parts(tmp_path / "parts").claim({"what": "latents"})
    model = drawing().model
    encode_data(model, flow, one, "test", tmp_path, parts, batch_size=4, progress=False)
    latents = read_latents(tmp_path / "latents.npz", one.codec).x
    assert latents.dtype == torch.float32
    what = Drawing(model, flow, one.codec, 0, latents)
    stream(tmp_path / "back", 6, what)
    np.testing.assert_array_equal(arrays(tmp_path / "back/samples.npz")["x"], one.test.numpy())


def test_a_sampler_without_a_way_back_cannot_encode(tmp_path):
    parts = Parts(tmp_path / "parts").claim({})
    with pytest.raises(InputError, match=r"sampler.*EulerMaruyama"):
        encode_data(drawing().model, EulerMaruyama(), data(), "test", tmp_path, parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"latents.*\bx\b"),
        ({"y": np.zeros((2, 3, 4, 4))}, r"latents.*\bx\b"),
        ({"x": np.zeros((2, 3, 4, 5))}, r"latents.*\(2, 3, 4, 5\)"),
        ({"x": np.zeros((0, 3, 4, 4))}, r"latents.*\(0, 3, 4, 4\)"),
        ({"x": np.full((2, 3, 4, 4), np.nan)}, "latents.*float64"),
        ({"x": np.zeros((2, 3, 4, 4), dtype=np.uint8)}, "latents.*uint8"),
    ],
    ids=str,
)
def test_unusable_latents_are_refused(content, message, tmp_path):
    path = tmp_path / "latents.npz"
    if content is not None:
        np.savez(path, **content)
    with pytest.raises(InputError, match=message):
        read_latents(path, BYTES)


def test_the_ends_between_are_the_samples_themselves(tmp_path):
    what = drawing(sampler=DDIM(10))
    interpolate_latents(what, 3, 5, tmp_path, batch_size=4, progress=False)
    there = arrays(tmp_path / "interpolation.npz")
    ends = draw_samples(what.model, what.sampler, BYTES, 6, seed=7, progress=False)
    raw = BYTES.decode(ends.x).numpy()
    assert there["x"].shape == (3, 5, 3, 4, 4)
    assert there["share"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(there["x"][:, 0].astype(int), raw[::2].astype(int), atol=1)
    np.testing.assert_allclose(there["x"][:, -1].astype(int), raw[1::2].astype(int), atol=1)
    assert (tmp_path / "interpolation.png").exists()


def test_a_range_without_a_between_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"points.*\b1\b"):
        interpolate_latents(drawing(), 3, 1, tmp_path, batch_size=4, progress=False)
