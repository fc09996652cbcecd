"""Network evaluations, counted per example.

A network or an exact model reports each pass over its rows with :func:`count_pass`, so a model
made of two models costs two passes. Products with a transposed Jacobian are reported separately,
with :func:`count_products`. Code that selects or repeats rows declares the example that owns each
row with :func:`owned_by`. A row without an owner, such as one that has reached its end, counts for
no example.

Example:
    >>> with counting(2) as passes:
    ...     count_pass(2)
    ...     with owned_by(torch.tensor([1, -1])):
    ...         count_pass(2)
    >>> passes.network.tolist()
    [1, 2]
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

from scoresde.errors import InputError


class Passes:
    """Number of evaluations so far for each of B examples.

    Arguments:
        batch: The number B of examples.
        device: Device of the counts.
    """

    def __init__(self, batch: int, device: torch.device | str | None = None) -> None:
        self._counts = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._owners: Tensor | None = None  # of the current rows; None: row i is example i
        # Evaluations of the current rows that are not yet in the counts. They are plain numbers
        # because a model may run inside a transform that forbids in-place writes to tensors.
        self._pending = [0, 0]
        self._earlier: list[tuple[Tensor | None, list[int]]] = []  # of earlier rows

    @property
    def network(self) -> Tensor:
        """Number of passes of a network or an exact model, int64 ``(B,)``."""
        self._settle()
        return self._counts[0].clone()

    @property
    def products(self) -> Tensor:
        """Number of products with a transposed Jacobian, int64 ``(B,)``."""
        self._settle()
        return self._counts[1].clone()

    def add(self, kind: int, rows: int, times: int) -> None:
        """Adds to the counts of the examples that own the rows.

        Raises:
            InputError: If the number of rows is not a multiple of the declared rows.
        """
        size = self._counts.shape[1] if self._owners is None else len(self._owners)
        if rows % size:
            raise InputError(
                f"The rows of a model call must be a multiple of the batch size {size}, got "
                f"{rows}; declare their owners with scoresde.passes.owned_by."
            )
        self._pending[kind] += times * (rows // size)  # rows repeated as a whole have one owner

    def exchange(self, owners: Tensor | None) -> Tensor | None:
        """Sets the owners of the following rows; returns the previous owners."""
        self._earlier.append((self._owners, self._pending))
        before, self._owners, self._pending = self._owners, owners, [0, 0]
        if before is None or owners is None:  # between two rows of a solver, not inside one
            self._settle()
        return before

    def among(self, wanted: Tensor) -> Tensor:
        """Returns the indices of the current rows where ``wanted``, bool ``(n,)``, else -1.

        If the whole batch is repeated, its indices are repeated too.
        """
        size = self._counts.shape[1] if self._owners is None else len(self._owners)
        rows = torch.arange(len(wanted), device=wanted.device) % size
        return torch.where(wanted, rows, -1)

    def within(self, rows: Tensor) -> Tensor:
        """Returns the owners of some of the current rows."""
        if self._owners is None:
            return rows
        return torch.where(rows >= 0, self._owners[rows.clamp(min=0)], rows)

    def _settle(self) -> None:
        for owners, numbers in (*self._earlier, (self._owners, self._pending)):
            for counts, pending in zip(self._counts, numbers, strict=True):
                if pending and owners is None:
                    counts += pending
                elif pending and owners is not None:
                    counts.index_add_(0, owners.clamp(min=0), pending * (owners >= 0))
        self._earlier, self._pending = [], [0, 0]


_NETWORK, _PRODUCTS = range(2)
_passes: ContextVar[Passes | None] = ContextVar("passes", default=None)


@contextmanager
def counting(batch: int, device: torch.device | str | None = None) -> Iterator[Passes]:
    """Counts the evaluations of a batch of examples within a ``with`` block."""
    passes = Passes(batch, device)
    token = _passes.set(passes)
    try:
        yield passes
    finally:
        _passes.reset(token)


@contextmanager
def owned_by(rows: Tensor) -> Iterator[None]:
    """Declares which rows of the current batch are evaluated.

    Arguments:
        rows: Indices of the rows, int64 ``(n,)``; -1 for a row without an owner.
    """
    passes = _passes.get()
    if passes is None:
        yield
        return
    before = passes.exchange(passes.within(rows))
    try:
        yield
    finally:
        passes.exchange(before)


@contextmanager
def counted(wanted: Tensor) -> Iterator[None]:
    """Declares which rows of the current batch, or of its repetitions, count for their owners.

    Arguments:
        wanted: Whether each row counts, bool ``(n,)``; the others have no owner.
    """
    passes = _passes.get()
    with nullcontext() if passes is None else owned_by(passes.among(wanted)):
        yield


def count_pass(rows: int) -> None:
    """Counts one evaluation of a network or an exact model on a number of rows."""
    passes = _passes.get()
    if passes is not None:
        passes.add(_NETWORK, rows, 1)


def count_products(rows: int, times: int = 1) -> None:
    """Counts products of each row with a transposed Jacobian."""
    passes = _passes.get()
    if passes is not None:
        passes.add(_PRODUCTS, rows, times)
