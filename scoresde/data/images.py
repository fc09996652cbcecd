"""Images from a folder, resized to one size and stored in the cache."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from scoresde.data import _cache
from scoresde.data.base import Dataset
from scoresde.data.checks import as_path, check_integer
from scoresde.data.splits import FRACTIONS, check_fractions, split_indices
from scoresde.errors import InputError
from scoresde.progress import Progress

log = logging.getLogger(__name__)

_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
# The common formats among those that Pillow reads; some others start programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm"),
)
_MOST_PIXELS = 2**27  # of one image in its file
_MOST_SIZE = 4096
_BLOCK = 256  # images decoded before the next are begun, which bounds the memory


def folder(
    path: str | Path,
    size: int | Sequence[int],
    mode: str = "RGB",
    crop: int | None = None,
    flip: bool = False,
    centred: bool = True,
    dequantise: bool = True,
    fractions: Sequence[float] | None = FRACTIONS,
    seed: int = 0,
    skip_damaged: bool = False,
    labels: bool | None = None,
) -> Dataset:
    """Loads every image below a folder, in pixels of 256 levels.

    Images are files named ``.png``, ``.jpg``, ``.jpeg``, ``.webp``, ``.bmp``, ``.gif``, ``.tif``,
    ``.tiff``, ``.ppm``, ``.pgm`` or ``.pbm``; other files, hidden files (``.NAME``) and links to
    folders are skipped, and only the first frame of an animation is used. Each image is rotated by
    its EXIF orientation, converted to ``mode``, cropped, resized by a bicubic filter to just cover
    ``size``, and cropped to it at its centre. Images of 16 bits keep the upper 8.
    32-bit images have an unknown range and raise an error.

    The result is stored in one file of the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``, in
    ``scoresde/folder``). It may be deleted at any time, and is rebuilt when an image or an
    argument changes. Images are read from it on demand, so a set may be larger than memory.

    Arguments:
        path: The folder; it is only read.
        size: Height and width in pixels: one number for both or two, in [1, 4096].
        mode: ``L`` for grey (1 channel, luminance), ``RGB`` (3; transparent areas become white) or
            ``RGBA`` (4, with opacity).
        crop: Side in pixels of the central square to crop first, such as 140 for CelebA. If None,
            the whole image is used.
        flip: Whether training images are mirrored at random.
        centred: Whether pixels fill [-1, 1] in model units rather than [0, 1].
        dequantise: Whether training images are dequantised by uniform noise; if not, they lie at
            the centres of their levels. Evaluation always dequantises.
        fractions: Fractions of training, validation and test images. If None, each split contains
            all images in the order of their names, for evaluation.
        seed: Seed of the splits.
        skip_damaged: Whether to skip unreadable images; the name of the data set contains their
            number.
        labels: Whether the sub-folder of ``path`` that contains an image is its class, numbered in
            the order of their names. If None, they are classes if every image is in a sub-folder
            and there are several.

    Raises:
        InputError: If the folder is missing or has no image, an image is damaged, too large or too
            small, an argument is invalid, or the cache cannot be written.
    """
    base = as_path(path).resolve()
    decode = _Decode(_height_width(size), mode, crop)
    shares = None if fractions is None else check_fractions(fractions, parts=3)
    files = image_files(base)
    names, classes = _classes(base, files, labels)
    marks = ["classes"] if names else []  # caches of earlier releases remain valid
    key = _key(base, files, asdict(decode), shares, seed, skip_damaged, *marks)
    target = _cache.make(_cache.folder("folder")) / f"{key}.npy"
    found = _load(target)
    images, note = found or _build(target, files, decode, shares, seed, skip_damaged, classes)
    parted = images.split(note["splits"]) if shares else [images] * 3
    kept = torch.tensor(note.get("labels", []))
    left_out = f" ({note['left_out']} unusable left out)" if note["left_out"] else ""
    data = Dataset.of(
        base.name + left_out,
        parted,
        levels=256,
        flip=flip,
        centred=centred,
        dequantise=dequantise,
        labels=(kept.split(note["splits"]) if shares else [kept] * 3) if names else None,
        class_names=names,
    )
    return replace(data, undivided=shares is None)


def stored_pairs(
    path: Path,
    source: Path,
    size: int | Sequence[int],
    mode: str,
    crop: int | None,
    fractions: Sequence[float] | None,
    seed: int,
    skip_damaged: bool,
) -> tuple[str, Sequence[Tensor], bool]:
    """Returns a name, the splits of pairs ``(N, 2 C, H, W)``, and whether they are undivided.

    Arguments are those of :func:`~scoresde.data.folder_pairs`; it shares the cache of ``folder``.
    """
    base, other = (folder.expanduser().resolve() for folder in (path, source))
    files = image_files(base)
    partners = _partners(files, base, other)
    decode = _DecodePair(_height_width(size), mode, crop, base, partners)
    shares = None if fractions is None else check_fractions(fractions, parts=3)
    plain = {"size": decode.size, "mode": mode, "crop": crop}
    second = _key(other, list(partners.values()))
    key = _key(base, files, plain, shares, seed, skip_damaged, "pairs", second)
    target = _cache.make(_cache.folder("folder")) / f"{key}.npy"
    found = _load(target)
    images, note = found or _build(target, files, decode, shares, seed, skip_damaged, [])
    left_out = f" ({note['left_out']} unusable left out)" if note["left_out"] else ""
    parted = images.split(note["splits"]) if shares else [images] * 3
    return base.name + left_out, parted, shares is None


def _partners(files: Sequence[Path], base: Path, other: Path) -> dict[Path, Path]:
    """Returns the source of each image: the file of the same name, except the suffix."""
    there = {
        file.relative_to(other).with_suffix(""): file for file in image_files(other, "data.source")
    }
    names = {file: file.relative_to(base).with_suffix("") for file in files}
    missing = [file for file, name in names.items() if name not in there]
    if missing:
        raise InputError(
            "data.source must contain a file of the same name (with any suffix) for each image "
            f"of {base}, got {other} without {missing[0].relative_to(base)} ({len(missing)} of "
            f"{len(files)} missing)."
        )
    return {file: there[name] for file, name in names.items()}


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    several = isinstance(size, Sequence) and not isinstance(size, str)
    both: list[Any] = list(size) if several else [size, size]  # type: ignore[arg-type]
    if len(both) != 2:
        raise InputError(f"data.size must be one integer or [HEIGHT, WIDTH], got {size}.")
    height, width = (check_integer("data.size", side, most=_MOST_SIZE) for side in both)
    return height, width


def image_files(base: Path, name: str = "data.path") -> list[Path]:
    """Returns the images below a folder, ordered by name in the same way on every machine."""
    if not base.is_dir():
        raise InputError(f"{name} must be an existing folder of images, got {base}.")
    names = {
        file.relative_to(base).as_posix(): file
        for file in base.rglob("*")
        if file.suffix.lower() in _SUFFIXES and file.is_file()
    }
    files = [names[name] for name in sorted(names) if "/." not in f"/{name}"]
    if not files:
        raise InputError(
            f"{name} must be a folder with images in it or below (files named "
            f"{', '.join(_SUFFIXES)}), got {base}."
        )
    return files


def _classes(
    base: Path, files: Sequence[Path], wanted: bool | None
) -> tuple[list[str], list[int]]:
    """Returns the names of the classes and the class of each image; empty without classes."""
    if not isinstance(wanted, bool | None):
        raise InputError(f"data.labels must be true, false or null, got {wanted!r}.")
    parts = [file.relative_to(base).parts for file in files]
    names = sorted({part[0] for part in parts if len(part) > 1})
    alone = next((part[0] for part in parts if len(part) == 1), None)
    if wanted and alone is not None:
        raise InputError(
            f"data.labels=true requires every image in a sub-folder of {base}, its class, got "
            f"{alone} outside them; move it, or remove data.labels."
        )
    if not (wanted or (wanted is None and alone is None and len(names) > 1)):
        return [], []
    numbers = {name: i for i, name in enumerate(names)}
    return names, [numbers[part[0]] for part in parts]


def _key(base: Path, files: Sequence[Path], *arguments: object) -> str:
    """Returns a key of everything that a result depends on."""
    states = [(str(file.relative_to(base)), file.stat()) for file in files]
    listing = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    text = json.dumps([str(base), listing, arguments])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- One image -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decode:
    """Decoder of a file to an array ``(C, H, W)``; see :func:`folder`."""

    size: tuple[int, int]
    mode: str
    crop: int | None

    def __post_init__(self) -> None:
        if self.mode not in _CHANNELS:
            raise InputError(f"data.mode must be one of {', '.join(_CHANNELS)}, got {self.mode}.")
        if self.crop is not None:
            check_integer("data.crop", self.crop)

    @property
    def shape(self) -> tuple[int, int, int]:
        return _CHANNELS[self.mode], *self.size

    def __call__(self, file: Path) -> np.ndarray | InputError:
        try:
            with Image.open(file, formats=_FORMATS) as image:
                _check_pixels(image)
                upright = ImageOps.exif_transpose(image)
                return self._array(_in_mode(_eight_bits(upright), self.mode))
        except Exception as error:  # a damaged file can fail in any parser below
            return InputError(
                f"Cannot load {file} ({str(error) or type(error).__name__}); remove it, or set "
                "data.skip_damaged=true."
            )

    def _array(self, image: Image.Image) -> np.ndarray:
        if self.crop is not None:
            image = _centre(image, self.crop)
        height, width = self.size
        fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(fitted).reshape(height, width, -1).transpose(2, 0, 1)


@dataclass(frozen=True)
class _DecodePair(_Decode):
    """Decoder of an image and its source to one array ``(2 C, H, W)``."""

    base: Path
    partners: Mapping[Path, Path]

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = super().shape
        return 2 * channels, height, width

    def __call__(self, file: Path) -> np.ndarray | InputError:
        image, source = super().__call__(file), super().__call__(self.partners[file])
        if isinstance(image, InputError):
            return image
        return source if isinstance(source, InputError) else np.concatenate((image, source))


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(
            f"its {image.width} x {image.height} pixels exceed the limit of {_MOST_PIXELS:,}"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keeps the upper 8 of 16 bits."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("the range of its 32 bits per pixel is unknown; convert it to 8 bits")
    return image


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image.convert(mode)


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if left < 0 or top < 0:
        raise ValueError(
            f"its sides must be at least data.crop={side}, got {image.width} x {image.height}"
        )
    return image.crop((left, top, left + side, top + side))


# --- All images ----------------------------------------------------------------------------------


def _load(target: Path) -> tuple[Tensor, dict[str, Any]] | None:
    """Returns the cached result, or None."""
    try:
        return _mapped(target), json.loads(_note(target).read_text())
    except (OSError, EOFError, ValueError):
        return None


def _note(target: Path) -> Path:
    return target.with_suffix(".json")


def _mapped(target: Path) -> Tensor:
    """Returns the memory-mapped array of a file."""
    try:
        return torch.from_numpy(np.load(target, mmap_mode="c"))
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
    with warnings.catch_warnings():  # the read-only mapping causes a warning
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.load(target, mmap_mode="r"))


def _build(
    target: Path,
    files: Sequence[Path],
    decode: _Decode,
    fractions: Sequence[float] | None,
    seed: int,
    skip: bool,
    classes: Sequence[int],
) -> tuple[Tensor, dict[str, Any]]:
    """Decodes all images into a file, which is renamed only when it is complete."""
    try:
        with _cache.alone(target):
            done = _load(target)
            if done is None:
                _check_space(target.parent, 2 * len(files) * math.prod(decode.shape))
                _write(target, files, decode, fractions, seed, skip, classes)
            return done or (_mapped(target), json.loads(_note(target).read_text()))
    except OSError as error:
        raise InputError(
            f"Cannot write or read the cache {target} ({error.strerror}); free disk space, or "
            "set XDG_CACHE_HOME to another folder."
        ) from error


def _write(
    target: Path,
    files: Sequence[Path],
    decode: _Decode,
    fractions: Sequence[float] | None,
    seed: int,
    skip: bool,
    classes: Sequence[int],
) -> None:
    raw, part = target.with_suffix(".raw"), target.with_suffix(".part")
    try:
        digests, kept = _decode_all(raw, files, decode, skip)
        whole = (torch.arange(len(digests)),)
        splits = split_indices(digests, fractions, seed) if fractions else whole
        order = torch.cat(splits).tolist()
        _arrange(raw, np.array(order), decode.shape, part)
        note = {"splits": [len(s) for s in splits], "left_out": len(files) - len(digests)}
        if classes:
            note["labels"] = [classes[kept[i]] for i in order]
        _note(target).write_text(json.dumps(note))
        part.replace(target)
    finally:
        raw.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


def _check_space(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"Decoding requires {needed / 2**30:.1f} GiB of free disk space, got "
            f"{free / 2**30:.1f} in {place}; lower data.size, or set XDG_CACHE_HOME to another "
            "disk."
        )


def _decode_all(
    raw: Path, files: Sequence[Path], decode: _Decode, skip: bool
) -> tuple[Tensor, list[int]]:
    """Writes the images consecutively, and returns a digest of each: ``(N, 16)``, uint8.

    It also returns the indices of their files.

    Raises:
        InputError: If an unreadable image is not to be skipped, or no image is readable.
    """
    digests: list[bytes] = []
    kept: list[int] = []
    errors: list[InputError] = []
    bar = Progress(len(files), "decoding", "image")
    with raw.open("wb") as file, bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about oddities in readable files
        for i, result in enumerate(_in_order(files, decode)):
            bar.update()
            if isinstance(result, InputError):
                errors.append(result)
                if not skip:
                    raise result
                continue
            data = result.tobytes()
            kept.append(i)
            digests.append(hashlib.blake2b(data, digest_size=16).digest())
            file.write(data)
    if not digests:
        raise InputError(
            f"Cannot load any of {len(files)} image files; the first error: {errors[0]}"
        )
    if errors:
        log.warning(
            "%d of %d images skipped; the first error: %s", len(errors), len(files), errors[0]
        )
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(-1, 16), kept


def _in_order(files: Sequence[Path], decode: _Decode) -> Iterator[np.ndarray | InputError]:
    """Decodes files in order on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), _BLOCK):
            yield from pool.map(decode, files[start : start + _BLOCK])


def _arrange(raw: Path, order: np.ndarray, shape: Sequence[int], part: Path) -> None:
    """Copies the images in the order of the splits, so each split is contiguous in the file."""
    images = np.memmap(raw, np.uint8, "r", shape=(len(order), *shape))
    header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
    with part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(order), _BLOCK):
            file.write(images[order[start : start + _BLOCK]].tobytes())
