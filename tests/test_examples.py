"""Data sets larger than memory: arrays that stay on the disk, and data sets of torch."""

import math
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data

from scoresde import VPSDE, DenoisingScoreMatching, InputError, ScoreModel, fit
from scoresde.codec import PerChannel, PerFeature, Whole
from scoresde.data import (
    SPLITS,
    Dataset,
    DatasetExamples,
    MappedExamples,
    _arrays,
    array,
    check_scales,
)
from scoresde.likelihood import VariationalBound
from scoresde.nn import MLP
from scoresde.streams import Streams
from scoresde.tasks.evaluation import evaluate_likelihood
from scoresde.train import Checkpoint, Training, train
from scoresde.train.loop import batches
from tests.test_run import TINY, program

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "bytes": (RANDOM.integers(0, 256, (40, 3, 4, 4), np.uint8), {}),
    "grey, no channel axis": (RANDOM.integers(0, 256, (40, 4, 5), np.uint8), {}),
    "levels": (RANDOM.integers(0, 900, (40, 1, 4, 4), np.int16), {"levels": 900}),
    "booleans": (RANDOM.random((40, 6)) < 0.5, {}),
    "table": (RANDOM.normal(1e4, [1.0, 1e3, 5.0], (40, 3)).astype(np.float32), {}),
    "float64": (RANDOM.normal(1e5, [1.0, 1e3], (40, 2)), {}),
    "float16": (RANDOM.normal(size=(40, 2)).astype(np.float16), {}),
    "one scale": (RANDOM.normal(size=(40, 2, 3)), {"standardise": Whole()}),
    "as it is": (RANDOM.normal(size=(40, 2, 3)), {"standardise": False}),
    "channels last": (RANDOM.normal(size=(40, 5, 2)), {"channels_last": True}),
    "other byte order": (RANDOM.normal(size=(40, 2)).astype(">f4"), {}),
    "numbers": (RANDOM.normal(size=40), {}),
    "with equal rows": (np.repeat(RANDOM.normal(size=(10, 2)), 4, 0), {}),
}


@pytest.fixture
def small(monkeypatch):
    """Has arrays of any size stay on the disk, and be read a few rows at a time."""
    monkeypatch.setattr(_arrays, "_LARGE", 1)
    monkeypatch.setattr("scoresde.data.files._TOGETHER", 64)
    monkeypatch.setattr("scoresde.data.examples._CHUNK", 64)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_mapped_array_is_the_data_set_of_the_array_in_memory(name, tmp_path, monkeypatch):
    values, options = ARRAYS[name]
    np.save(tmp_path / "x.npy", values)
    there = array(tmp_path / "x.npy", **options)
    monkeypatch.setattr(_arrays, "_LARGE", 1)
    monkeypatch.setattr("scoresde.data.files._TOGETHER", 64)
    monkeypatch.setattr("scoresde.data.examples._CHUNK", 64)
    mapped = array(tmp_path / "x.npy", **options)
    assert isinstance(mapped.train, MappedExamples)
    for split in SPLITS:
        assert torch.equal(mapped.split(split)[:], there.split(split))
        streams = Streams.of(3, batch=2)
        ours, true = (one.batch(split, streams, 5).x for one in (mapped, there))
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6)
    assert (mapped.shape, mapped.levels) == (there.shape, there.levels)
    for end in ("shift", "width", "low", "high"):
        ours, true = (torch.tensor(getattr(d.codec, end)).double() for d in (mapped, there))
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=0)
    assert mapped.sigma_data == pytest.approx(there.sigma_data, rel=1e-5)
    assert check_scales(mapped, VPSDE()) == check_scales(there, VPSDE())


@pytest.mark.parametrize("how", [PerChannel(), PerFeature(), Whole()], ids=repr)
def test_moments_in_chunks_are_those_of_all(how):
    """To 1e-10, with a mean a million times the standard deviation."""
    x = 1e6 + torch.randn(37, 2, 5, dtype=torch.float64)

    class Halves:
        shape, dtype = x.shape, x.dtype

        def chunks(self):
            return iter(x.split((1, 20, 16)))

    whole, parts = how(x), how(Halves())
    for name in ("shift", "width", "low", "high"):
        one, other = (torch.tensor(getattr(c, name)).double() for c in (parts, whole))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(np.arange(60.0).reshape(30, 2) == 41, np.nan, 1.0), r"\(20, 1\)"),
        (np.where(np.arange(60).reshape(30, 2) == 43, 9, 1).astype(np.int16), r"\(21, 1\).*9"),
    ],
)
def test_what_is_wrong_in_a_mapped_array_is_named_by_its_place(values, message, tmp_path, small):
    np.save(tmp_path / "x.npy", values)
    levels = 4 if values.dtype == np.int16 else None
    with pytest.raises(InputError, match=message):
        array(tmp_path / "x.npy", levels=levels)


def test_the_program_trains_on_a_mapped_array_as_on_one_in_memory(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", RANDOM.integers(0, 256, (60, 1, 8, 8), np.uint8))
    words = (*TINY, "data=array", "data.path=x.npy", "network.width=8")
    program(*words, "hydra.run.dir=memory", cwd=tmp_path)
    monkeypatch.setattr(_arrays, "_LARGE", 1)
    program(*words, "hydra.run.dir=disk", cwd=tmp_path)
    program("task=likelihood", "checkpoint=disk", "examples=4", "hydra.run.dir=l", cwd=tmp_path)
    one, other = (Checkpoint.load(tmp_path / name).ema for name in ("memory", "disk"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = [(tmp_path / name / "likelihood.json").read_text() for name in ("memory", "disk")]
    assert results[0].split('"seconds"')[0] == results[1].split('"seconds"')[0]


# --- Data sets of torch --------------------------------------------------------------------------


class Items(torch.utils.data.Dataset):
    """Rows of a table with the class that their first column tells, in one of several forms."""

    def __init__(self, form, count=50):
        generator = torch.Generator().manual_seed(count)
        self.x = torch.randn(count, 2, generator=generator)
        self.form = form

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x, label = self.x[i], int(self.x[i, 0] > 0)
        match self.form:
            case "pair":
                return x, label
            case "mapping":
                return {"x": x.numpy(), "label": label, "context": x[:1]}
        return x


def splits(form, workers=0):
    return [DatasetExamples(Items(form, n), workers) for n in (50, 20, 20)]


@pytest.mark.parametrize("form", ["plain", "pair", "mapping"])
def test_a_data_set_of_torch_is_the_data_set_of_its_items(form):
    data = Dataset.of("items", [Items(form, n) for n in (50, 20, 20)])
    tensors = Dataset.of("tensors", [Items(form, n).x for n in (50, 20, 20)])
    streams = Streams(0, torch.tensor([7, 3, 3]))
    batch = data.batch("train", streams)
    torch.testing.assert_close(batch.x, tensors.batch("train", streams).x)
    names = {"plain": [], "pair": ["label"], "mapping": ["label", "context"]}[form]
    assert sorted(batch.cond) == sorted(names)
    if names:
        assert batch.cond["label"].tolist() == (data.train[streams.indices][:, 0] > 0).tolist()
    if form == "mapping":
        assert torch.equal(batch.cond["context"], data.train[streams.indices][:, :1])
    assert data.conditions_of("test", slice(4)).keys() == batch.cond.keys()


def test_workers_read_the_batches_of_one_process_in_their_order():
    """From any start, and for any part of a batch."""
    for start, part in ((0, slice(None)), (7, slice(4, 9))):
        alone, helped = (
            islice(batches(Dataset.of("i", splits("pair", n)), 9, 0, start=start, part=part), 8)
            for n in (0, 2)
        )
        for one, other in zip(alone, helped, strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.cond["label"], other.cond["label"])


def trained(data, folder, steps):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = ScoreModel(MLP(2, width=8, classes=2), VPSDE())
    training = Training(steps=steps, batch_size=16, save_every=5, validate_every=5)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1e-3)

    return train(
        model, data, DenoisingScoreMatching(), training, adam, folder, progress=False
    ).state_dict()


def test_training_on_items_ends_with_the_weights_of_tensors(tmp_path):
    sets = [Items("pair", n) for n in (50, 20, 20)]
    labels = [(one.x[:, 0] > 0).long() for one in sets]
    lazy = Dataset.of("a", splits("pair", 2))
    there = Dataset("b", *(one.x for one in sets), lazy.codec, conditions={"label": labels})
    one, other = trained(lazy, tmp_path / "a", 12), trained(there, tmp_path / "b", 12)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_items_are_evaluated_and_fitted():
    data = Dataset.of("items", splits("pair"))
    torch.manual_seed(0)
    model = fit(ScoreModel(MLP(2, width=8, classes=2), VPSDE()), data, 5, progress=False)
    found = evaluate_likelihood(model, VariationalBound(), data, examples=7, progress=False)
    assert len(found.values) == 7


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "dataset .*Odd.* 0"),
        (["text"], "tensors or arrays.*str"),
        ([{"y": torch.zeros(2)}], "must contain the key x .*got y;"),
        ([object()], "object"),
        ([(torch.zeros(1), 0, 1.0)], "tuples of 3"),
        ([0.5], "axis.*numbers"),
        ([torch.full((2,), math.nan)], "finite.*1 of 1"),
        ([{"x": torch.zeros(2), "seed": 1}], "'seed'"),
        ([{"x": torch.zeros(2), "t": 0.5}], "'t'"),
        ([(torch.zeros(2), 0.5)], "label .*float"),
        ([(torch.zeros(2), torch.zeros(1).long())], r"label .*\(1,\)"),
        ([(torch.zeros(2), -2)], "label .*-2"),
    ],
)
def test_items_that_are_no_examples_are_refused(items, message):
    class Odd(torch.utils.data.Dataset):
        def __len__(self):
            return len(items)

        def __getitem__(self, i):
            return items[i]

    with pytest.raises(InputError, match=message):
        Dataset.of("odd", [Odd()] * 3, standardise=False)


def test_integers_beyond_their_levels_are_refused_when_they_are_read():
    values = torch.full((9, 1, 2, 2), 3, dtype=torch.uint8)
    values[5] = 200
    data = Dataset.of("q", [torch.utils.data.TensorDataset(values)] * 3, levels=17)
    data.batch("train", Streams(0, torch.tensor([0, 1])))
    with pytest.raises(InputError, match=r"\[0, 16\].*200"):
        data.batch("train", Streams(0, torch.tensor([0, 5])))


def test_conditions_are_not_looked_for_where_there_are_none(tmp_path, small):
    """A mapped array is not read for them."""
    np.save(tmp_path / "x.npy", RANDOM.normal(size=(40, 2)))
    data = array(tmp_path / "x.npy")
    object.__setattr__(data.train, "read", None)
    assert data.conditions_of("train") == {}


def test_an_iterable_data_set_is_refused():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.zeros(2)])

    with pytest.raises(InputError, match=r"map-style.*Endless"):
        Dataset.of("endless", [Endless()] * 3)


# --- Memory --------------------------------------------------------------------------------------

WATCHED = """
    import sys, threading, time

    def anonymous():
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    most = [0.0]

    def watch():
        while True:
            most[0] = max(most[0], anonymous())
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    import torch
    torch.set_num_threads(1)
    from scoresde import VPSDE
    from scoresde.data import array, check_scales
    from scoresde.train.loop import batches
    data = array(sys.argv[1])
    data.sigma_data, check_scales(data, VPSDE())
    source = batches(data, 16, 0)
    for _ in range(5):
        assert next(source).x.shape == (16, 3, 256, 256)
    print(most[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells its memory")
def test_two_gib_on_the_disk_take_less_than_600_mib(tmp_path):
    """Anonymous memory, from the start of the program to batches; the file is mostly holes."""
    path, shape = tmp_path / "large.npy", (10923, 3, 256, 256)
    values = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    assert values.nbytes > 2**31
    values[:, 0, 0, :2] = np.arange(shape[0]).astype("<u2")[:, None].view(np.uint8)
    values.flush()
    del values
    code = textwrap.dedent(WATCHED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 600
