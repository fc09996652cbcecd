"""Reads observed examples from files: images or NumPy arrays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.data import image_files, load_array
from scoresde.errors import InputError
from scoresde.model import Model

_ARRAYS = (".npy", ".npz")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_source(path: str | Path, shape: Sequence[int], codec: Codec) -> Tensor:
    """Reads examples of a shape in raw units, ``(N, *shape)``.

    Integers stay integers. Images have the levels of the codec: of 256 levels, and of more in
    16 bits, a pixel is its level; of fewer, and of real values, black to white is the range.

    Arguments:
        path: A ``.npy`` or ``.npz`` file, an image, or a folder of images.
        shape: The shape of one example.
        codec: The codec of the data.

    Raises:
        InputError: If there is no such file, or its contents do not match.
    """
    path = Path(path).expanduser()
    if path.suffix in _ARRAYS:
        return _array(path, tuple(shape))
    files = image_files(path, "source") if path.is_dir() else [path]
    return torch.stack([_image(file, tuple(shape), codec) for file in files])


def read_mask(path: str | Path, shape: Sequence[int]) -> Tensor:
    """Reads a mask, bool with the shape ``(H, W)`` or that of an example; white is seen.

    Raises:
        InputError: If there is no such file, or it has another size.
    """
    path = Path(path).expanduser()
    if path.suffix in _ARRAYS:
        values = torch.from_numpy(np.array(load_array(path)))
    else:
        values = torch.from_numpy(_pixels(path, "L").copy())
    sizes = {tuple(shape), tuple(shape[1:]), (1, *shape[1:])}
    if tuple(values.shape) not in sizes:
        raise InputError(
            f"mask must have the shape {tuple(shape[1:]) or tuple(shape)} of the examples, got "
            f"{tuple(values.shape)} in {path}."
        )
    return values if values.dtype == torch.bool else values > values.max() / 2


def read_conditions(path: str | Path, model: Model) -> dict[str, Tensor]:
    """Reads conditions of a model from a ``.npz`` file with an array for each, by name.

    Arguments:
        path: The file; the first axis of each array counts examples.
        model: The model.

    Raises:
        InputError: If there is no such file, or its contents do not match.
    """
    path = Path(path).expanduser()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:  # a damaged file can fail in any parser
        raise InputError(
            f"conditions must be a .npz file with an array for each condition, got {path} "
            f"({str(error) or type(error).__name__}); write one with numpy.savez(FILE, NAME=...)."
        ) from error
    for name, values in arrays.items():
        if not model.takes(name):
            raise InputError(
                f"conditions must be among those of the model, got {name} in {path}; remove this "
                "array."
            )
        if values.dtype.kind not in "biuf" or not values.ndim or not len(values):
            raise InputError(
                f"{name} must contain numbers for at least one example, got {values.dtype} of "
                f"shape {values.shape} in {path}."
            )
    return {
        name: torch.from_numpy(v.astype(np.float64 if v.dtype.kind == "f" else np.int64))
        for name, v in arrays.items()
    }


def _array(path: Path, shape: tuple[int, ...]) -> Tensor:
    values = torch.from_numpy(np.array(load_array(path)))
    if tuple(values.shape) == shape:
        values = values[None]
    if shape[:1] == (1,) and tuple(values.shape[1:]) == shape[1:]:
        values = values[:, None]  # grey images without an axis for channels
    if tuple(values.shape[1:]) != shape or not len(values):
        raise InputError(
            f"source must hold examples (N, {', '.join(map(str, shape))}), got "
            f"{tuple(values.shape)} in {path}."
        )
    return values


def _image(path: Path, shape: tuple[int, ...], codec: Codec) -> Tensor:
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InputError(
            f"source must be a .npy or .npz file for observations {shape}, got {path}."
        )
    if codec.levels is not None and codec.levels > 256:
        pixels = _pixels(path, None).astype(np.int64)
    else:
        pixels = _pixels(path, _MODES[shape[0]])
    values = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
    if tuple(values.shape) != shape:
        raise InputError(
            f"source must be an image (C, H, W) of shape {shape}, as the operator measures "
            f"examples of the model, got {tuple(values.shape)} in {path}; resize or crop it."
        )
    return _in_levels(values, codec)


def _in_levels(values: Tensor, codec: Codec) -> Tensor:
    if codec.levels is not None and codec.levels >= 256:
        return values
    low, high = (torch.as_tensor(end).double() for end in (codec.low, codec.high))
    scaled = low + values / 255 * (high - low)
    return scaled if codec.levels is None else scaled.round().long()


def _pixels(path: Path, mode: str | None) -> np.ndarray:
    """Reads an image as an array, ``(H, W)`` or ``(H, W, C)``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright if mode is None else upright.convert(mode))
    except Exception as error:  # a damaged file can fail in any parser
        raise InputError(
            f"{path} must be an image, got the error {str(error) or type(error).__name__}; use a "
            "PNG or JPEG file, a folder of them, or a .npy file."
        ) from error
