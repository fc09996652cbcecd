"""Data sets: raw examples in disjoint splits, their codecs, and toy data with exact densities."""

from scoresde.codec.scaling import Scaling
from scoresde.data.augment import Augmentation, GeometricAugmentation
from scoresde.data.base import SPLITS, Batch, Dataset
from scoresde.data.bundled import digits
from scoresde.data.degradation import JPEG, Degradation
from scoresde.data.dequantisation import (
    Dequantisation,
    TruncatedNormalDequantisation,
    UniformDequantisation,
)
from scoresde.data.examples import DatasetExamples, Examples, MappedExamples
from scoresde.data.files import array, load_array
from scoresde.data.images import folder, image_files
from scoresde.data.model_conditions import (
    check_classes,
    check_conditions,
    class_count,
    required_conditions,
)
from scoresde.data.pairs import PairExamples, folder_pairs, pairs
from scoresde.data.published import cifar10, emnist, fashion_mnist, mnist
from scoresde.data.scales import check_scales
from scoresde.data.splits import make_splits, split_indices
from scoresde.data.toy import (
    Checkerboard,
    Density,
    Mixture,
    MoonHeights,
    Moons,
    Spirals,
    checkerboard,
    gaussian_mixture,
    gaussian_ring,
    moon_heights,
    spirals,
    two_moons,
)
from scoresde.recipe import renamed
from scoresde.streams import random_rows

__all__ = [
    "JPEG",
    "SPLITS",
    "Augmentation",
    "Batch",
    "Checkerboard",
    "Dataset",
    "DatasetExamples",
    "Degradation",
    "Density",
    "Dequantisation",
    "Examples",
    "GeometricAugmentation",
    "MappedExamples",
    "Mixture",
    "MoonHeights",
    "Moons",
    "PairExamples",
    "Scaling",
    "Spirals",
    "TruncatedNormalDequantisation",
    "UniformDequantisation",
    "array",
    "check_classes",
    "check_conditions",
    "check_scales",
    "checkerboard",
    "cifar10",
    "class_count",
    "digits",
    "emnist",
    "fashion_mnist",
    "folder",
    "folder_pairs",
    "gaussian_mixture",
    "gaussian_ring",
    "image_files",
    "load_array",
    "make_splits",
    "mnist",
    "moon_heights",
    "pairs",
    "random_rows",
    "required_conditions",
    "spirals",
    "split_indices",
    "two_moons",
]

__getattr__ = renamed(__name__)
