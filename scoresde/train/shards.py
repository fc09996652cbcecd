"""Writes and reads tensors that are sharded between several processes.

The files have the format of ``torch.distributed.checkpoint``, which stores the location of each
part in a pickle. The reader here accepts only plain descriptions of tensors, so nothing in the
pickle is executed.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as descriptions
from torch.distributed.tensor import DTensor

from scoresde.errors import InputError

_MARK = "_part"  # the name of a tensor, in its place in the tree
_KNOWN = {
    **{
        (descriptions.__name__, name): getattr(descriptions, name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex"),
            *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): dcp.filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePath,
    ("pathlib", "WindowsPath"): PurePath,
}


def write_shards(tree: Any, folder: Path) -> Any:
    """Writes the sharded tensors of a tree; each process writes its own parts.

    Returns:
        The tree with each sharded tensor replaced by a description.
    """
    tensors: dict[str, Tensor] = {}
    rest = _taken(tree, "", tensors)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    return rest


def read_shards(tree: Any, folder: Path, pattern: Any = None) -> Any:
    """Reads the tensors described in a tree.

    Arguments:
        tree: The result of :func:`write_shards`.
        folder: The folder of the tensors.
        pattern: A tree with sharded tensors in the same places, which define the sharding; all
            processes must call it. If None, this process reads whole tensors.

    Raises:
        InputError: If the files are damaged.
    """
    tensors: dict[str, Tensor] = {}
    tree = _prepared(tree, pattern, tensors)
    reader, alone = _Reader(folder), not dist.is_initialized()
    try:
        reader.read_metadata()  # raises a simpler error if the metadata are damaged
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
    except (*_DAMAGES, dcp.api.CheckpointException) as error:
        raise InputError(
            f"{folder} is damaged: its shards cannot be read (nothing was executed)."
        ) from error
    return tree


_DAMAGES = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError),
    *(AttributeError, IndexError, OSError, AssertionError),
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in tensor metadata.")
        return _KNOWN[module, name]


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> descriptions.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, descriptions.Metadata):
            raise pickle.UnpicklingError(f"Metadata expected, got {type(found).__name__}.")
        if found.storage_meta is None:
            found.storage_meta = descriptions.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def _taken(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    match tree:
        case DTensor():
            tensors[path] = tree
            kind = str(tree.dtype).removeprefix("torch.")
            return {_MARK: path, "shape": list(tree.shape), "dtype": kind}
        case Mapping():
            return {key: _taken(value, f"{path}/{key}", tensors) for key, value in tree.items()}
        case list() | tuple():
            return [_taken(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def _prepared(tree: Any, pattern: Any, tensors: dict[str, Tensor]) -> Any:
    """Replaces each description by an empty tensor."""
    match tree:
        case {"_part": str(name), "shape": shape, "dtype": kind}:
            if isinstance(pattern, DTensor):
                tensors[name] = torch.empty_like(pattern)
            else:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, kind))
            return tensors[name]
        case Mapping():
            below = pattern if isinstance(pattern, Mapping) else {}
            return {k: _prepared(v, below.get(k), tensors) for k, v in tree.items()}
        case list():
            patterns = pattern if isinstance(pattern, list) else [None] * len(tree)
            return [_prepared(v, p, tensors) for v, p in zip(tree, patterns, strict=True)]
    return tree
