"""Files of tensors, read without executing code from them."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MOST_VALUES, _REPEATED = 10**6, 16  # values in a file, and tensors that may share a storage


def read_tensors(file: Path, safe: Sequence[Any] = ()) -> Any:
    """Reads a file of ``torch.save`` onto the CPU; only tensors and plain values are allowed.

    The file is memory-mapped, so unused tensors are not read, and a tensor declared larger than
    the file is an error. The checksums are verified. Copy any tensor that must outlive the file.

    Arguments:
        file: The file.
        safe: Other classes that may be instantiated.

    Raises:
        Exception: Of any kind, if the file is damaged, or holds anything else.
    """
    archive = zipfile.is_zipfile(file)
    if archive:
        with zipfile.ZipFile(file) as members:
            _check_archive(members, file.stat().st_size)
    with torch.serialization.safe_globals(list(safe)):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    _check_tree(content, _REPEATED * file.stat().st_size)
    return content


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Rejects an archive that is damaged or compressed (torch does not compress)."""
    if sum(member.file_size for member in archive.infolist()) > size:
        raise ValueError("it declares more bytes than it contains")
    damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} is wrong")


def _check_tree(content: Any, most: int) -> None:
    """Rejects tensors larger than their storage, and trees that grow by repetition."""
    waiting, count, size = [content], 0, 0
    while waiting:
        value = waiting.pop()
        count += 1
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, Tensor):
            needed = value.numel() * value.element_size()
            if value.layout != torch.strided or needed > value.untyped_storage().nbytes():
                raise ValueError("a tensor is larger than its storage")
            size += needed
        if count + len(waiting) > _MOST_VALUES or size > most:
            raise ValueError("it has more values than any file of weights")
