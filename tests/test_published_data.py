import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import os
import struct
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import scoresde.data
from scoresde.data import SPLITS, _cache, _download, cifar10, fashion_mnist, mnist, published
from scoresde.errors import InputError
from scoresde.recipe import build
from scoresde.streams import Streams
from tests.small_sets import (
    TEST,
    TRAIN,
    cifar_files,
    idx,
    idx_files,
    label_of,
    records,
    some_images,
    write,
)

CONF = Path(__file__).parent.parent / "conf" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of our own, and no proxy between us and our server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "scoresde"


def archive(files, folder="cifar-10-batches-bin/"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def publish(monkeypatch, source, *editions, url="http://unused/"):
    """Makes our files the published ones."""
    checksums = tuple({name: md5(data) for name, data in files.items()} for files in editions)
    changed = replace(getattr(published, source), editions=checksums, url=url)
    monkeypatch.setattr(published, source, changed)


@pytest.fixture
def digits_folder(tmp_path, monkeypatch):
    """Our MNIST, packed, in a folder."""
    packed = {f"{name}.gz": gzip.compress(data) for name, data in idx_files().items()}
    publish(monkeypatch, "_MNIST", packed, idx_files())
    write(tmp_path / "mine", packed)
    return tmp_path / "mine"


@pytest.fixture
def photos_folder(tmp_path, monkeypatch):
    """Our CIFAR-10 in a folder."""
    publish(monkeypatch, "_CIFAR10", {"cifar-10-binary.tar.gz": b""}, cifar_files())
    write(tmp_path / "mine", cifar_files())
    return tmp_path / "mine"


# Reading


@pytest.mark.parametrize("place", ["", "mnist", "MNIST", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_found_where_they_usually_lie(tmp_path, monkeypatch, place, packed):
    plain = idx_files()
    zipped = {f"{name}.gz": gzip.compress(data) for name, data in plain.items()}
    publish(monkeypatch, "_MNIST", zipped, plain)
    write(tmp_path / "mine" / place, zipped if packed else plain)
    dataset = mnist(tmp_path / "mine", validation=5)
    assert (dataset.name, dataset.shape, dataset.levels) == ("MNIST", (1, 28, 28), 256)
    assert [len(dataset.split(name)) for name in SPLITS] == [TRAIN - 5, 5, TEST]
    assert np.array_equal(dataset.test[:, 0], some_images(TEST, (28, 28), seed=TEST))


@pytest.mark.parametrize("place", ["", "cifar10", "cifar-10-batches-bin"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_read_from_its_batches_or_its_archive(tmp_path, monkeypatch, place, packed):
    whole = {"cifar-10-binary.tar.gz": archive(cifar_files())}
    publish(monkeypatch, "_CIFAR10", whole, cifar_files())
    write(tmp_path / "mine" / place, whole if packed else cifar_files())
    dataset = cifar10(tmp_path / "mine", validation=0)
    assert (dataset.name, dataset.shape, dataset.levels) == ("CIFAR-10", (3, 32, 32), 256)
    expected = np.concatenate([some_images(8, (3, 32, 32), seed) for seed in range(5)])
    assert np.array_equal(dataset.train, expected)
    assert np.array_equal(dataset.test, some_images(8, (3, 32, 32), seed=5))


@pytest.mark.parametrize("validation", [0, 7])
def test_labels_stay_with_their_images(digits_folder, validation):
    dataset = mnist(digits_folder, validation=validation, keep_test=5)
    for name, labels in zip(SPLITS, dataset.labels, strict=True):
        assert labels.tolist() == label_of(dataset.split(name).numpy()).tolist()


def test_without_held_out_images_all_train(digits_folder, monkeypatch):
    monkeypatch.setattr(published, "_IN_SAMPLE", 10)
    dataset = mnist(digits_folder, validation=0)
    assert np.array_equal(dataset.train[:, 0], some_images(TRAIN, (28, 28), seed=TRAIN))
    assert torch.equal(dataset.validation, dataset.train[:10])


def test_held_out_images_depend_on_the_seed_alone(digits_folder):
    first, again, other = (mnist(digits_folder, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.validation, again.validation)
    assert not torch.equal(first.validation, other.validation)


def test_a_number_keeps_the_first_test_images_and_a_file_those_that_it_says(
    digits_folder, tmp_path
):
    mask = np.arange(TEST) % 3 == 0
    np.save(tmp_path / "mask.npy", mask)
    every = mnist(digits_folder, 5).test
    first = mnist(digits_folder, 5, keep_test=2)
    chosen = mnist(digits_folder, 5, keep_test=tmp_path / "mask.npy")
    assert torch.equal(first.test, every[:2])
    assert torch.equal(chosen.test, every[mask])
    assert first.name == f"MNIST (2 of {TEST} test images)"
    assert chosen.name == f"MNIST (4 of {TEST} test images)"


def test_units_and_dequantisation_are_as_asked(digits_folder):
    dataset = mnist(digits_folder, 5, centred=False, dequantise=False)
    assert dataset.scale == 1 / 256
    x = dataset.batch("train", Streams.of(0, batch=9)).x
    torch.testing.assert_close(x, (dataset.train[:9].float() + 0.5) / 256, atol=1e-7, rtol=0)
    y = dataset.batch("test", Streams.of(0, batch=9)).x
    assert (y * 256 - dataset.test[:9] != 0.5).float().mean() > 0.99
    assert torch.equal(dataset.decode(y), dataset.test[:9])


@pytest.mark.parametrize("make", [mnist, fashion_mnist, cifar10, scoresde.data.folder])
def test_the_configuration_offers_the_arguments_with_their_defaults(make):
    config = OmegaConf.load(CONF / f"{make.__name__}.yaml")
    arguments = inspect.signature(make).parameters
    missing = inspect.Parameter.empty
    for name in config:
        if name != "_target_":
            value = missing if OmegaConf.is_missing(config, name) else config[name]
            assert value == arguments[name].default, name
    assert set(arguments) - set(config) <= {"seed", "fractions"}


# Files that are not the published ones


def test_another_file_is_refused_by_its_checksum(digits_folder):
    path = digits_folder / "train-labels-idx1-ubyte.gz"
    right = md5(path.read_bytes())
    path.write_bytes(gzip.compress(idx(np.zeros(TRAIN, np.uint8))))
    wrong = md5(path.read_bytes())
    sentence = f"labels-idx1-ubyte.gz .*md5.*{right}.*{wrong}.*data.verify=false"
    with pytest.raises(InputError, match=sentence):
        mnist(digits_folder, 5)


def test_another_file_can_be_accepted_and_the_name_says_so(digits_folder):
    packed = gzip.compress(idx(np.ones(TRAIN, np.uint8)))
    (digits_folder / "train-labels-idx1-ubyte.gz").write_bytes(packed)
    dataset = mnist(digits_folder, 5, verify=False, keep_test=3)
    assert dataset.name == f"MNIST (not verified, 3 of {TEST} test images)"
    assert dataset.labels[0].tolist() == [1] * (TRAIN - 5)


IMAGES = idx(some_images(TRAIN, (28, 28), seed=0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (IMAGES[:10], "damaged"),
        (IMAGES[:-1], "40 x 28 x 28 .*fewer"),
        (IMAGES + b"x", "40 x 28 x 28 .*more"),
        (b"\0\0\x0d\x03" + IMAGES[4:], "IDX .*00 00 0d 03"),
        (idx(np.zeros((0, 28, 28), np.uint8)), "IDX .*00 00 08 03 00 00 00 00"),
        (struct.pack(">4I", 0x803, 2**31, 2**31, 2**31), "IDX .*00 00 08 03 80 00 00 00"),
        (gzip.compress(IMAGES)[:-2000], "damaged"),
        (gzip.compress(IMAGES)[:100] + b"\xff" * 100 + gzip.compress(IMAGES)[200:], "damaged"),
        (gzip.compress(IMAGES + bytes(2**24)), "40 x 28 x 28 .*more"),
        (idx(some_images(TRAIN - 1, (28, 28), 0)), r"MNIST .*\(39, 1, 28, 28\)"),
        (idx(some_images(TRAIN, (28, 27), 0)), r"MNIST .*\(40, 1, 28, 27\)"),
        (idx(np.zeros(TRAIN, np.uint8)), "IDX .*00 00 08 01"),
    ],
    ids=lambda value: None,
)
def test_damaged_idx_files_are_refused(digits_folder, data, message):
    (digits_folder / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(InputError, match=message):
        mnist(digits_folder, 5, verify=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"batch_2.*3073 .*\b0\b"),
        (records(8, 0)[:-1], "batch_2.*3073 .*24583"),
        (b"\x0a" + records(8, 0)[1:], "labels .*CIFAR-10 .* 9,.* 10"),
    ],
)
def test_damaged_cifar_files_are_refused(photos_folder, data, message):
    (photos_folder / "data_batch_2.bin").write_bytes(data)
    with pytest.raises(InputError, match=message):
        cifar10(photos_folder, 5, verify=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": -1}, r"data.validation .*\[0, 39\].*-1"),
        ({"validation": TRAIN}, "data.validation .*40"),
        ({"validation": 0.1}, r"data.validation .*0\.1"),
        ({"keep_test": 0}, r"data.keep_test .* 0\b"),
        ({"keep_test": TEST + 1}, "data.keep_test .*12.*13"),
        ({"keep_test": "absent.npy"}, "absent.npy"),
        ({"keep_test": "short.npy"}, r"data.keep_test .*\(12,\).*bool .*\(3,\).*short.npy"),
        ({"keep_test": "none.npy"}, "data.keep_test .*none.npy"),
        ({"keep_test": "numbers.npy"}, "data.keep_test .*float64 .*numbers.npy"),
        ({"root": "nowhere"}, "data.root .*nowhere.*remove data.root"),
        ({"root": "."}, "data.root .*-ubyte.* of MNIST.*MNIST/raw"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    digits_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", np.ones(3, bool))
    np.save("none.npy", np.zeros(TEST, bool))
    np.save("numbers.npy", np.ones(TEST))
    with pytest.raises(InputError, match=message):
        mnist(**{"root": digits_folder, "validation": 5, **options})


def test_a_copy_that_lacks_a_file_is_refused_by_its_name(digits_folder):
    (digits_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"data.root .*t10k-labels-idx1-ubyte"):
        mnist(digits_folder)


# Archives


def test_an_archive_writes_nothing_and_gives_only_what_is_asked_for(tmp_path, monkeypatch):
    files = {**cifar_files(), "../../outside.txt": b"x", "/outside.txt": b"x", "more.bin": b"x"}
    whole = {"cifar-10-binary.tar.gz": archive(files)}
    publish(monkeypatch, "_CIFAR10", whole, cifar_files())
    write(tmp_path / "mine", whole)
    cifar10(tmp_path / "mine", 5)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [
        tmp_path / "mine" / "cifar-10-binary.tar.gz"
    ]


def linked():
    """An archive in which a link stands for a batch."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (linked(), "contain .*cifar-10-batches-bin/data_batch_1.bin"),
        (archive(cifar_files(), folder=""), "contain .*cifar-10-batches-bin/"),
        (archive(cifar_files())[:-5000], "damaged"),
        (b"no archive", "damaged"),
        (b"", "damaged"),
    ],
)
def test_other_archives_are_refused(tmp_path, data, message):
    write(tmp_path / "mine", {"cifar-10-binary.tar.gz": data})
    with pytest.raises(InputError, match=message):
        cifar10(tmp_path / "mine", 5, verify=False)


# Downloads


class Site:
    """What our server offers, how it misbehaves, and what it was asked for."""

    def __init__(self, files, ranges=True, cut=0):
        self.files, self.ranges, self.cut = files, ranges, cut
        self.requests = []  # pairs of path and range


def handler(site):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, wanted = self.path.removeprefix("/"), self.headers.get("Range")
            site.requests.append((name, wanted))
            data = site.files.get(name)
            if data is None:
                return self.send_error(404)
            start = int(wanted[6:-1]) if wanted and site.ranges else 0
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206 if wanted and site.ranges else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            site.cut, cut = site.cut - 1, site.cut > 0
            return self.wfile.write(data[start : (start + len(data)) // 2 if cut else None])

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def serve(monkeypatch):
    """Starts a server of our MNIST, which becomes the published one."""
    servers = []

    def start(files=None, **behaviour):
        packed = {f"{name}.gz": gzip.compress(data) for name, data in idx_files().items()}
        site = Site(packed if files is None else files, **behaviour)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        publish(monkeypatch, "_MNIST", packed, url=f"http://127.0.0.1:{server.server_port}/")
        return site

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_missing_files_are_downloaded_once(serve, cache):
    site = serve()
    first, again = mnist(validation=5), mnist(validation=5)
    assert torch.equal(first.test, again.test)
    assert Counter(site.requests) == Counter({(name, None): 1 for name in site.files})
    assert {path.name for path in (cache / "mnist").glob("*.gz")} == site.files.keys()
    assert not list((cache / "mnist").glob("*.part"))


NAME = "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke_off(serve, cache, ranges):
    site = serve(ranges=ranges)
    write(cache / "mnist", {f"{NAME}.part": site.files[NAME][:1234]})
    assert len(mnist(validation=5).test) == TEST
    assert (NAME, "bytes=1234-") in site.requests
    assert (cache / "mnist" / NAME).read_bytes() == site.files[NAME]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_taken_up_again(serve, ranges):
    site = serve(ranges=ranges, cut=2)
    assert len(mnist(validation=5).test) == TEST
    asked = [wanted for name, wanted in site.requests if name == NAME]
    assert asked[0] is None
    assert all(wanted.startswith("bytes=") for wanted in asked[1:])
    assert len(asked) == 3


def test_a_line_that_always_breaks_is_given_up_in_a_sentence(serve, cache):
    serve(ranges=False, cut=100)
    with pytest.raises(InputError, match=rf"{NAME} .*after [\d,]+ of [\d,]+ bytes.*data\.root"):
        mnist()
    assert (cache / "mnist" / f"{NAME}.part").stat().st_size > 0


def test_a_part_that_is_too_long_is_begun_anew(serve, cache):
    site = serve()
    write(cache / "mnist", {f"{NAME}.part": site.files[NAME] + b"more"})
    assert len(mnist(validation=5).test) == TEST


def test_a_file_with_another_checksum_is_deleted(serve, cache):
    site = serve()
    wrong = {**site.files, NAME: b"x" + site.files[NAME][1:]}
    site.files = wrong
    with pytest.raises(InputError, match=rf"{NAME} .*md5 .*deleted"):
        mnist()
    assert not list((cache / "mnist").glob(f"{NAME}*[tz]"))


def test_a_file_without_end_is_not_received(serve, monkeypatch):
    serve()
    monkeypatch.setattr(_download, "_MOST", 1000)
    with pytest.raises(InputError, match="more than 1,000 bytes"):
        mnist()


def test_an_absent_file_and_an_absent_network_are_sentences(serve, monkeypatch):
    serve(files={})
    with pytest.raises(InputError, match=rf"{NAME} .*http://127.* \(404 Not Found\)"):
        mnist()
    monkeypatch.setattr(published, "_MNIST", replace(published._MNIST, url="http://127.0.0.1:1/"))
    with pytest.raises(InputError, match=r"Connection refused\).*data.root"):
        mnist()


def test_programs_that_start_at_once_download_once(serve):
    site = serve()
    with ThreadPoolExecutor(3) as pool:
        sizes = list(pool.map(lambda _: len(mnist(validation=5).test), range(3)))
    assert sizes == [TEST] * 3
    assert len(site.requests) == 4


def test_the_cache_is_where_the_specification_has_it(monkeypatch, tmp_path):
    assert _cache.folder("x") == tmp_path / "cache" / "scoresde" / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert _cache.folder("x") == tmp_path / ".cache" / "scoresde" / "x"


def test_a_cache_that_cannot_be_made_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cache folder .*file.*XDG_CACHE_HOME"):
        mnist()


# What a checkpoint's recipe may do


def test_a_recipe_reads_from_a_folder_and_never_writes_there(tmp_path, serve):
    site = serve()
    (tmp_path / "home").mkdir()
    with pytest.raises(InputError, match=r"data.root .*home"):
        build({"_target_": "scoresde.data.mnist", "root": str(tmp_path / "home")})
    assert site.requests == []
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("room", ["_download", "published._download", "published._cache"])
def test_a_recipe_cannot_download_by_itself(tmp_path, room):
    attack = {"url": "http://127.0.0.1:1/", "path": str(tmp_path / "x"), "checksum": "0" * 32}
    name = "make" if room.endswith("_cache") else "fetch"
    with pytest.raises(InputError, match="The checkpoint names"):
        build({"_target_": f"scoresde.data.{room}.{name}", **attack})


def test_nothing_that_writes_has_a_name_that_a_recipe_may_call():
    """Modules with private names are out of reach, unless a public module imports from them."""
    stems = [path.stem for path in Path(scoresde.data.__file__).parent.glob("[!_]*.py")]
    modules = [importlib.import_module(f"scoresde.data.{stem}") for stem in stems]
    for module in (scoresde.data, *modules):
        for name, thing in vars(module).items():
            home = getattr(thing, "__module__", None) or ""
            assert name.startswith("_") or not home.startswith("scoresde.data._")


# The real sets


@pytest.fixture
def root():
    if "SCORESDE_DATA" not in os.environ:
        pytest.skip("needs the published files; name their folder in SCORESDE_DATA")
    return Path(os.environ["SCORESDE_DATA"])


DIGITS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


@pytest.mark.parametrize(
    ("make", "means", "counts"),
    [
        (mnist, [0.1307], DIGITS),
        (fashion_mnist, [0.2860], [6000] * 10),
        (partial(cifar10, verify=False), [0.4914, 0.4822, 0.4465], [5000] * 10),
    ],
    ids=["mnist", "fashion_mnist", "cifar10"],
)
def test_the_published_sets_have_their_well_known_means(root, make, means, counts):
    dataset = make(root, validation=0)
    assert len(dataset.test) == 10_000
    assert torch.bincount(dataset.labels[0]).tolist() == counts
    found = [channel.float().mean().item() / 255 for channel in dataset.train.unbind(1)]
    assert found == pytest.approx(means, abs=6e-5)
