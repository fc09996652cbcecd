"""Small image sets in the publishers' own file formats."""

import gzip
import struct

import numpy as np
from PIL import Image

TRAIN, TEST = 40, 12
LETTERS = 52  # in training, and half as many in the test set


def label_of(images):
    """Our labels follow from the pixels, so that a mix-up shows."""
    return images.reshape(len(images), -1).sum(1, dtype=np.int64) % 10


def some_images(count, shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(values):
    return (
        struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()
    )


def idx_files(train=TRAIN, test=TEST):
    files = {}
    for name, count in (("train", train), ("t10k", test)):
        images = some_images(count, (28, 28), seed=count)
        files[f"{name}-images-idx3-ubyte"] = idx(images)
        files[f"{name}-labels-idx1-ubyte"] = idx(label_of(images).astype(np.uint8))
    return files


def records(count, seed):
    images = some_images(count, (3, 32, 32), seed)
    labels = label_of(images).astype(np.uint8)[:, None]
    return np.concatenate([labels, images.reshape(count, -1)], 1).tobytes()


def cifar_files():
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {name: records(8, seed) for seed, name in enumerate(names)}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(some_images(12, (40, 36, 3), seed=0)):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def letters(count, seed):
    """Upright images whose first row tells their class, and classes from 0, each in turn."""
    images = np.random.default_rng(seed).integers(0, 200, (count, 28, 28), dtype=np.uint8)
    classes = np.arange(count) % 26
    images[:, 0, :] = 0
    images[np.arange(count), 0, classes] = 255
    return images, classes


def emnist_files(packed=True):
    """The four files as they are published."""
    found = {}
    for part, count in (("train", LETTERS), ("test", LETTERS // 2)):
        images, classes = letters(count, seed=count)
        kinds = {
            "images-idx3": idx(np.ascontiguousarray(images.swapaxes(1, 2))),
            "labels-idx1": idx((classes + 1).astype(np.uint8)),
        }
        for kind, data in kinds.items():
            name = f"emnist-letters-{part}-{kind}-ubyte"
            found[f"{name}.gz" if packed else name] = gzip.compress(data) if packed else data
    return found
