"""Published image sets, from files verified by their published checksums.

They are read from the user's own copy (``root``), which is never written to. Otherwise they are
read from a folder in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``) and downloaded to it
once (except EMNIST, whose archive is large).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data import _cache, _checksum, _download, _formats
from scoresde.data.base import Dataset
from scoresde.data.checks import check_integer
from scoresde.data.files import load_array
from scoresde.data.splits import split_indices
from scoresde.errors import InputError

_IN_SAMPLE = 1000  # training examples in the validation split if none are held out


@dataclass(frozen=True)
class _Source:
    """Location of a data set.

    Each edition maps file names to checksums; the first edition is downloaded. A checksum is empty
    if the publisher provides none. Without ``automatic`` the user must download the files from
    ``url``.
    """

    title: str
    name: str
    places: tuple[str, ...]
    url: str
    editions: tuple[Mapping[str, str], ...]
    class_names: tuple[str, ...] = ()
    classes: int = 10
    automatic: bool = True

    @property
    def cache(self) -> Path:
        return _cache.folder(self.name)

    def find(self, root: str | Path | None) -> dict[Path, str]:
        """Returns the files of one edition and their checksums.

        Raises:
            InputError: If the files are missing and cannot be downloaded.
        """
        if root is None:
            found, missing = self._search(self.cache)
            return self._download() if missing else found
        base = Path(root).expanduser()
        if not base.is_dir():
            raise InputError(
                f"data.root must be an existing folder with your copy of {self.title}, got "
                f"{root}; correct it, or {self._remedy}."
            )
        found, missing = self._search(base)
        if missing:
            raise InputError(
                f"data.root must contain {missing[0].name} of {self.title}, got {root} "
                f"(searched: {', '.join(str(base / place) for place in self.places)}); correct "
                f"it, or {self._remedy}."
            )
        return found

    @property
    def _remedy(self) -> str:
        """Advice on how to obtain the files."""
        if self.automatic:
            return f"remove data.root to download it to {self.cache}"
        return f"remove data.root and {self._by_hand}"

    @property
    def _by_hand(self) -> str:
        """Advice on how to download the files manually."""
        return f"download {self.url}{next(iter(self.editions[0]))} into {self.cache}"

    def _download(self) -> dict[Path, str]:
        if not self.automatic:
            raise InputError(
                f"{self.title} must be downloaded by hand, got no copy in {self.cache}; set "
                f"data.root=FOLDER, or {self._by_hand}."
            )
        found = {self.cache / name: checksum for name, checksum in self.editions[0].items()}
        _cache.make(self.cache)
        for path, checksum in found.items():
            _download.fetch(self.url + path.name, path, checksum)
        return found

    def _search(self, base: Path) -> tuple[dict[Path, str], list[Path]]:
        """Returns the most complete edition and its missing files."""
        options = [
            {base / place / name: checksum for name, checksum in edition.items()}
            for edition in self.editions
            for place in self.places
        ]
        absent = [[path for path in option if not path.is_file()] for option in options]
        best = min(range(len(options)), key=lambda i: len(absent[i]) / len(options[i]))
        return options[best], absent[best]


_MNIST = _Source(
    title="MNIST",
    name="mnist",
    places=("", "mnist", "MNIST", "MNIST/raw"),
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    editions=(
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        {  # the same files, unpacked
            "train-images-idx3-ubyte": (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            "train-labels-idx1-ubyte": (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
            ),
            "t10k-images-idx3-ubyte": (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
            ),
            "t10k-labels-idx1-ubyte": (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
            ),
        },
    ),
)
_FASHION_MNIST = _Source(
    title="Fashion-MNIST",
    name="fashion_mnist",
    class_names=(
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    places=("", "fashion_mnist", "FashionMNIST", "FashionMNIST/raw"),
    # The publisher's address has no https; the checksums verify the download.
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    editions=(
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        {
            "train-images-idx3-ubyte": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
    ),
)
_CIFAR10 = _Source(
    title="CIFAR-10",
    name="cifar10",
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    places=("", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
    url="https://www.cs.toronto.edu/~kriz/",
    editions=(
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        {  # the publisher provides no checksums of these; these are from MXNet
            "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
            "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
            "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
            "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
            "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
            "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
        },
    ),
)
_EMNIST = _Source(
    title="EMNIST letters",
    name="emnist",
    class_names=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    classes=26,
    automatic=False,  # 560 MB; EMNIST Letters is a fifth of it
    places=("", "gzip", "emnist", "EMNIST", "emnist/gzip", "EMNIST/gzip", "EMNIST/raw"),
    url="https://biometrics.nist.gov/cs_links/EMNIST/",
    editions=(
        {"gzip.zip": "58c8d27c78d21e728a6bc7b3cc06412e"},
        *(  # its content has no published checksums; packed or not
            {
                f"emnist-letters-{part}-{kind}-ubyte{end}": ""
                for part in ("train", "test")
                for kind in ("images-idx3", "labels-idx1")
            }
            for end in (".gz", "")
        ),
    ),
)


def mnist(
    root: str | Path | None = None,
    validation: int = 1000,
    keep_test: int | str | Path | None = None,
    flip: bool = False,
    centred: bool = True,
    dequantise: bool = True,
    verify: bool = True,
    seed: int = 0,
) -> Dataset:
    """60,000 and 10,000 handwritten digits in 28 x 28 grey pixels of 256 levels, with labels.

    References:
        LeCun, Cortes and Burges, *The MNIST database of handwritten digits*, 1998.

    Arguments:
        root: A folder with the publisher's four files, packed (``.gz``) or not, or with ``mnist``
            or ``MNIST/raw`` in it; it is only read. If None, they are read from the user's cache
            and downloaded if missing (11 MB).
        validation: Approximate number of training images held out for validation (equal images
            stay together), below their total number. With 0, as in papers, all are used for
            training. The validation split is then the first 1000 of them, so the validation loss
            is measured on training examples.
        keep_test: Number of test images to keep, from the first, or a ``.npy`` file of booleans,
            one for each image. If None, all are kept. The name of the data set contains the
            choice.
        flip: Whether training images are mirrored at random.
        centred: Whether pixels fill [-1, 1] in model units, or else [0, 1].
        dequantise: Whether training images are dequantised by uniform noise; if not, they lie at
            the centres of their levels, as in most papers. Evaluation always dequantises.
        verify: Whether to raise an error if a checksum differs from the published one. If False,
            the name of the data set contains "not verified".
        seed: Seed of the choice of validation images.

    Raises:
        InputError: If a file is missing and cannot be downloaded, is damaged or has another
            checksum; or if an argument is invalid.
    """
    how = _How(validation, keep_test, flip, centred, dequantise, verify, seed)
    return how.dataset(_MNIST, root, _read_idx)


def fashion_mnist(
    root: str | Path | None = None,
    validation: int = 1000,
    keep_test: int | str | Path | None = None,
    flip: bool = False,
    centred: bool = True,
    dequantise: bool = True,
    verify: bool = True,
    seed: int = 0,
) -> Dataset:
    """60,000 and 10,000 articles of clothing in 28 x 28 grey pixels of 256 levels, with labels.

    References:
        Xiao, Rasul and Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking machine
        learning algorithms*, 2017.

    Arguments:
        root: A folder with the publisher's four files, packed (``.gz``) or not, or with
            ``fashion_mnist`` or ``FashionMNIST/raw`` in it; it is only read. If None, they are
            read from the user's cache and downloaded if missing (30 MB).
        validation: As in :func:`mnist`; likewise the other arguments.

    Raises:
        InputError: As in :func:`mnist`.
    """
    how = _How(validation, keep_test, flip, centred, dequantise, verify, seed)
    return how.dataset(_FASHION_MNIST, root, _read_idx)


def cifar10(
    root: str | Path | None = None,
    validation: int = 1000,
    keep_test: int | str | Path | None = None,
    flip: bool = True,
    centred: bool = True,
    dequantise: bool = True,
    verify: bool = True,
    seed: int = 0,
) -> Dataset:
    """50,000 and 10,000 photographs of ten kinds in 32 x 32 RGB pixels of 256 levels, with labels.

    References:
        Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.

    Arguments:
        root: A folder with the files of the binary version (``data_batch_1.bin`` to ``5``,
            ``test_batch.bin``), with ``cifar-10-batches-bin`` in it, or with the archive
            ``cifar-10-binary.tar.gz``; it is only read. If None, the archive is read from the
            user's cache and downloaded if missing (170 MB).
        validation: As in :func:`mnist`; likewise the other arguments.

    Raises:
        InputError: As in :func:`mnist`.
    """
    how = _How(validation, keep_test, flip, centred, dequantise, verify, seed)
    return how.dataset(_CIFAR10, root, _read_cifar)


def emnist(
    root: str | Path | None = None,
    validation: int = 1000,
    keep_test: int | str | Path | None = None,
    flip: bool = False,
    centred: bool = True,
    dequantise: bool = True,
    verify: bool = True,
    seed: int = 0,
) -> Dataset:
    """124,800 and 20,800 handwritten letters in 28 x 28 grey pixels of 256 levels, with labels.

    The classes 0 to 25 are A to Z, each in both cases. The published images are transposed; here
    they are upright.

    References:
        Cohen et al., *EMNIST: an extension of MNIST to handwritten letters*, 2017,
        https://arxiv.org/abs/1702.05373.

    Arguments:
        root: A folder with the publisher's archive ``gzip.zip``, or with its four files of letters
            (``emnist-letters-train-images-idx3-ubyte.gz`` and so on), packed or not; it is only
            read. If None, the user's cache. The archive (560 MB) is never downloaded
            automatically. Without the archive there are no published checksums, and the name
            contains "not verified".
        validation: As in :func:`mnist`; likewise the other arguments.

    Raises:
        InputError: If a file is missing, is damaged or has another checksum; or if an argument is
            invalid.
    """
    how = _How(validation, keep_test, flip, centred, dequantise, verify, seed)
    return how.dataset(_EMNIST, root, _read_emnist)


# Training images, training labels, test images, test labels; and their readers.
_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_Read = Callable[[Mapping[Path, str | None]], _Arrays]


@dataclass(frozen=True)
class _How:
    """Options of a published data set; see :func:`mnist`."""

    validation: int
    keep_test: int | str | Path | None
    flip: bool
    centred: bool
    dequantise: bool
    verify: bool
    seed: int

    def dataset(self, source: _Source, root: str | Path | None, read: _Read) -> Dataset:
        files = source.find(root)
        verified = self.verify and all(files.values())
        arrays = read(
            {path: (checksum if self.verify else "") or None for path, checksum in files.items()}
        )
        _check_pairs(source, arrays)
        train, train_labels, test, test_labels = map(torch.from_numpy, arrays)
        kept = self._kept(len(test))
        fit, held_out = self._split(train)
        notes = [] if verified else ["not verified"]
        if len(kept) < len(test):
            notes.append(f"{len(kept)} of {len(test)} test images")
        return Dataset.of(
            f"{source.title} ({', '.join(notes)})" if notes else source.title,
            (train[fit], train[held_out], test[kept]),
            levels=256,
            flip=self.flip,
            centred=self.centred,
            dequantise=self.dequantise,
            class_names=source.class_names,
            labels=[
                y.long() for y in (train_labels[fit], train_labels[held_out], test_labels[kept])
            ],
        )

    def _split(self, train: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the indices of the training and of the validation images."""
        n = len(train)
        held_out = check_integer("data.validation", self.validation, most=n - 1, least=0)
        if held_out == 0:
            return torch.arange(n), torch.arange(min(n, _IN_SAMPLE))
        fit, validation = split_indices(train, (1 - held_out / n, held_out / n), self.seed)
        return fit, validation

    def _kept(self, n: int) -> Tensor:
        """Returns the indices of the test images to keep."""
        if self.keep_test is None:
            return torch.arange(n)
        if not isinstance(self.keep_test, str | Path):
            return torch.arange(check_integer("data.keep_test", self.keep_test, most=n))
        mask = load_array(self.keep_test)
        if mask.dtype != np.bool_ or mask.shape != (n,) or not mask.any():
            raise InputError(
                f"data.keep_test must be a file of booleans of shape {(n,)}, true for each test "
                f"image to keep and for at least one, got {mask.dtype} of shape {mask.shape} in "
                f"{self.keep_test}."
            )
        return torch.from_numpy(mask).nonzero()[:, 0]


def _check_pairs(source: _Source, arrays: _Arrays) -> None:
    """Checks that images and labels match."""
    train, train_labels, test, test_labels = arrays
    pairs = (len(train), len(train_labels)), (len(test), len(test_labels))
    if train.shape[1:] != test.shape[1:] or any(a != b for a, b in pairs):
        raise InputError(
            f"The files of {source.title} must have one image shape and one label for each "
            f"image, got images {train.shape} and {test.shape}, and labels {train_labels.shape} "
            f"and {test_labels.shape}; download them again."
        )
    if max(train_labels.max(), test_labels.max()) >= source.classes:
        raise InputError(
            f"The labels of {source.title} must be at most {source.classes - 1}, got "
            f"{max(train_labels.max(), test_labels.max())}; download the files again."
        )


def _read_idx(files: Mapping[Path, str | None]) -> _Arrays:
    return _read_parts(
        {str(path): _checksum.read(path, checksum) for path, checksum in files.items()}
    )


def _read_parts(parts: Mapping[str, bytes]) -> _Arrays:
    """Reads four IDX files by name: training images and labels, test images and labels."""
    images, labels, test_images, test_labels = (
        _formats.idx(data, name, axes)
        for (name, data), axes in zip(parts.items(), (3, 1, 3, 1), strict=True)
    )
    return images[:, None], labels, test_images[:, None], test_labels


def _read_emnist(files: Mapping[Path, str | None]) -> _Arrays:
    parts = {str(path): _checksum.read(path, checksum) for path, checksum in files.items()}
    if len(parts) == 1:
        ((name, archive),) = parts.items()
        parts = _formats.zipped(archive, name, list(_EMNIST.editions[1]))
    images, labels, test_images, test_labels = _read_parts(parts)
    if min(labels.min(), test_labels.min()) < 1:
        raise InputError(
            "The labels of EMNIST letters must be in [1, 26], got 0; download the files again."
        )
    # Published transposed, and with classes counted from 1.
    return *_upright(images, labels), *_upright(test_images, test_labels)


def _upright(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(images.swapaxes(2, 3)), labels - 1


def _read_cifar(files: Mapping[Path, str | None]) -> _Arrays:
    parts = {str(path): _checksum.read(path, checksum) for path, checksum in files.items()}
    if len(parts) == 1:
        ((name, archive),) = parts.items()
        inside = [f"cifar-10-batches-bin/{member}" for member in _CIFAR10.editions[1]]
        parts = _formats.members(archive, name, inside)
    batches = [_formats.cifar(data, name) for name, data in parts.items()]
    images, labels = zip(*batches[:-1], strict=True)
    test_images, test_labels = (part.copy() for part in batches[-1])
    return np.concatenate(images), np.concatenate(labels), test_images, test_labels
