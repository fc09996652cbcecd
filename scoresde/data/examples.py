"""Examples that are read on demand, for data sets larger than memory.

An object of these classes replaces a tensor ``(N, *)`` of raw examples: it has a length, a shape
and a data type, and indexing with rows returns a tensor.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from scoresde.data.checks import check_integer
from scoresde.data.conditions import check_none
from scoresde.errors import InputError

_CHUNK = 2**23  # bytes per read when all examples are read


class Examples(ABC):
    """Base class for raw examples that are read on demand.

    Subclasses implement :meth:`read` and define ``shape`` and ``dtype``.

    Attributes:
        shape: Shape of all examples, ``(N, *)``.
        dtype: Data type of raw examples.
        device: Device that examples are moved to after reading.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads some examples, with any conditions stored with them.

        Arguments:
            rows: Indices of the examples, int64 ``(B,)``, on the CPU.

        Returns:
            Raw examples ``(B, *)`` and conditions by name, on the CPU.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Returns the same examples, moved to a device as they are read."""

    def stream(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yields the result of :meth:`read` for each of many orders of rows."""
        return map(self.read, orders)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self.moved(self.read(self._indices(rows))[0])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the conditions that are stored with the examples."""
        return tuple(self.read(torch.zeros(1, dtype=torch.int64))[1])

    def conditions(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """Reads the conditions that are stored with some examples, by name."""
        if not self.names:
            return {}
        told = self.read(self._indices(rows))[1]
        return {name: self.moved(values) for name, values in told.items()}

    def moved(self, values: Tensor) -> Tensor:
        """Moves values to the device; does not block for pinned memory."""
        return values.to(self.device, non_blocking=values.is_pinned())

    def chunks(self) -> Iterator[Tensor]:
        """Yields all examples in order, in chunks."""
        size = max(1, _CHUNK // max(1, self.numel() // len(self) * self.dtype.itemsize))
        for rows in torch.arange(len(self)).split(size):
            yield self.read(rows)[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Returns the number of elements of all examples."""
        return torch.Size(self.shape).numel()

    def cpu(self) -> Self:
        """Returns the same examples, kept on the CPU as they are read."""
        return self.to("cpu")

    def _indices(self, rows: Tensor | slice) -> Tensor:
        return rows.cpu() if isinstance(rows, Tensor) else torch.arange(len(self))[rows]


@dataclass(frozen=True, eq=False)
class MappedExamples(Examples):
    """Rows of a memory-mapped array; only the rows that are read take memory.

    Arguments:
        array: Array ``(M, ...)``, such as ``numpy.load(path, mmap_mode="r")``.
        rows: Indices of the rows that are the examples, int64 ``(N,)``.
        convert: Function from rows of the array to raw examples.
        device: Device that examples are moved to after reading.
    """

    array: np.ndarray
    rows: np.ndarray
    convert: Callable[[np.ndarray], Tensor]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __repr__(self) -> str:
        return f"MappedExamples of shape {self.shape}"

    @cached_property
    def _first(self) -> Tensor:
        return self.convert(np.asarray(self.array[:1]))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.rows), *self._first.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._first.dtype

    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.convert(np.asarray(self.array[self.rows[rows.numpy()]])), {}

    def to(self, device: torch.device | str) -> "MappedExamples":
        return MappedExamples(self.array, self.rows, self.convert, torch.device(device))


@dataclass(frozen=True, eq=False)
class DatasetExamples(Examples):
    """The items of a map-style ``torch.utils.data.Dataset``, read by its ``DataLoader``.

    An item is an example, a tuple of one example, a pair of an example and its class (the
    condition ``label``), or a mapping with the example as ``x`` and conditions by name. Examples
    are tensors or arrays of finite real numbers, or of integers of the data type for their levels.

    Arguments:
        dataset: The data set.
        workers: Number of processes that read training batches ahead; 0 for none.
        device: Device that examples are moved to after reading.

    Raises:
        InputError: If the data set is empty, or an item has another form.
    """

    dataset: torch.utils.data.Dataset
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        sized = isinstance(self.dataset, Sized)
        count = len(self.dataset) if sized else 0  # type: ignore[arg-type]
        check_integer("workers", self.workers, least=0)
        if count == 0:
            lack = "of length 0" if sized else "without __len__; define __len__ and __getitem__"
            raise InputError(
                "dataset must be map-style and not empty, got "
                f"{type(self.dataset).__name__} {lack}."
            )

    def __repr__(self) -> str:
        return f"DatasetExamples of {type(self.dataset).__name__}, shape {self.shape}"

    @cached_property
    def _first(self) -> Tensor:
        return self.read(torch.zeros(1, dtype=torch.int64))[0]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.dataset), *self._first.shape[1:])  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._first.dtype

    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return _stacked([self.dataset[i] for i in rows.tolist()])

    def stream(self, orders: Iterable[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        if self.workers == 0:
            return super().stream(orders)
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=(rows.tolist() for rows in orders),
            num_workers=self.workers,
            collate_fn=_stacked,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def to(self, device: torch.device | str) -> "DatasetExamples":
        return DatasetExamples(self.dataset, self.workers, torch.device(device))


def _stacked(items: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Stacks items into a batch."""
    pairs = [_parted(item) for item in items]
    names = pairs[0][1].keys()
    try:
        x = torch.stack([torch.as_tensor(x) for x, _ in pairs])
        cond = {n: torch.stack([torch.as_tensor(told[n]) for _, told in pairs]) for n in names}
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            "The items of a dataset must be tensors or arrays of one shape, alone or in pairs "
            f"(x, label), got {type(items[0]).__name__} ({' '.join(str(error).split())}); "
            "convert them in __getitem__."
        ) from error
    if x.ndim == 1:
        raise InputError(
            "The items of a dataset must be tensors or arrays with at least one axis, got "
            "numbers; return x[None]."
        )
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise InputError(
            "The items of a dataset must be finite, got NaN or infinity in "
            f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {len(x)} items read together; "
            "remove or replace them."
        )
    for name, values in cond.items():
        check_none(name, values)
    label = cond.get("label")
    if label is not None:
        cond["label"] = _classes(label)
    return x, cond


def _classes(label: Tensor) -> Tensor:
    """Returns classes as int64."""
    whole = not label.is_floating_point() and label.dtype != torch.bool
    if label.ndim != 1 or not whole or int(label.long().min()) < -1:
        worst = label.min() if label.ndim == 1 else label[0]
        raise InputError(
            "label must be one integer >= -1 for each item, with -1 for none, got "
            f"{worst.tolist()} with shape {tuple(label.shape[1:])} of {label.dtype}."
        )
    return label.long()


def _parted(item: Any) -> tuple[Any, Mapping[str, Any]]:
    """Returns the example and the conditions of an item."""
    if isinstance(item, Mapping):
        if "x" not in item:
            raise InputError(
                "The items of a dataset must contain the key x if they are mappings, got "
                f"{', '.join(map(str, item)) or 'no key'}; return the example as x."
            )
        return item.get("x"), {name: value for name, value in item.items() if name != "x"}
    if isinstance(item, tuple) and len(item) == 2:
        return item[0], {"label": item[1]}
    if isinstance(item, tuple) and len(item) == 1:
        return item[0], {}
    if isinstance(item, tuple):
        raise InputError(
            "The items of a dataset must be examples x, pairs (x, label) or mappings, got "
            f"tuples of {len(item)}; return a mapping such as {{'x': x, 'label': y, 'context': "
            "z}."
        )
    return item, {}


def as_examples(values: Any) -> Any:
    """Converts a torch data set to examples; returns tensors and examples unchanged.

    Raises:
        InputError: If the values are an array of NumPy.
    """
    if isinstance(values, np.ndarray):
        raise InputError(
            f"Examples must be a tensor or a data set of torch, got {type(values).__name__}; use "
            "torch.as_tensor(x)."
        )
    lazy = isinstance(values, torch.utils.data.Dataset) and not isinstance(values, Tensor)
    return DatasetExamples(values) if lazy else values


def paired(
    values: Tensor | Examples, orders: Iterator[tuple[int, Tensor]]
) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Tensor]]]:
    """Yields each epoch and order of rows with its raw examples and conditions."""
    if isinstance(values, Tensor):
        for epoch, rows in orders:
            yield epoch, rows, values[rows.to(values.device)], {}
        return
    ahead, here = itertools.tee(orders)
    for (epoch, rows), (raw, told) in zip(
        here, values.stream(rows for _, rows in ahead), strict=False
    ):
        moved = {name: values.moved(part) for name, part in told.items()}
        yield epoch, rows, values.moved(raw), moved
