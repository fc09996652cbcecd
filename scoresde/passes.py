"""Network evaluations, counted for the example that each row of a batch belongs to.

A network, or an exact model, reports every pass of its rows (:func:`count_pass`) where it runs: a
model made of two models costs two passes. Every product with a transposed Jacobian is
reported apart (:func:`count_products`). Whoever selects or repeats rows says whose they are
(:func:`owned_by`); a row of nobody, as one that has reached its end, counts for no example.

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
    """The evaluations of each of B examples so far.

    Arguments:
        batch: The number B of examples.
        device: Where they are counted.
    """

    def __init__(self, batch: int, device: torch.device | str | None = None) -> None:
        self._counts = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._owners: Tensor | None = None  # of the rows at present; None: row i is example i
        # Evaluations of the present rows that are not yet among the counts: plain numbers, since
        # a model may run inside of a transform that forbids writing into tensors.
        self._pending = [0, 0]
        self._earlier: list[tuple[Tensor | None, list[int]]] = []  # of the rows before

    @property
    def network(self) -> Tensor:
        """The passes of a network or an exact model, int64 ``(B,)``."""
        self._settle()
        return self._counts[0].clone()

    @property
    def products(self) -> Tensor:
        """The products with a transposed Jacobian, int64 ``(B,)``."""
        self._settle()
        return self._counts[1].clone()

    def add(self, kind: int, rows: int, times: int) -> None:
        """Adds to the counts of the examples that the rows belong to.

        Raises:
            InputError: If there are other rows than anybody has said.
        """
        size = self._counts.shape[1] if self._owners is None else len(self._owners)
        if rows % size:
            raise InputError(
                f"A model ran on {rows} rows of a batch of {size}; say whose rows they are with "
                "scoresde.passes.owned_by."
            )
        self._pending[kind] += times * (rows // size)  # rows repeated as a whole have one owner

    def exchange(self, owners: Tensor | None) -> Tensor | None:
        """Sets the owners of the rows that follow; returns those of the rows before."""
        self._earlier.append((self._owners, self._pending))
        before, self._owners, self._pending = self._owners, owners, [0, 0]
        if before is None or owners is None:  # between two rows of a solver, not inside of one
            self._settle()
        return before

    def among(self, wanted: Tensor) -> Tensor:
        """Returns the indices of present rows that are wanted, bool ``(n,)``; -1 for the others.

        The rows of a batch that is repeated as a whole have its indices.
        """
        size = self._counts.shape[1] if self._owners is None else len(self._owners)
        rows = torch.arange(len(wanted), device=wanted.device) % size
        return torch.where(wanted, rows, -1)

    def within(self, rows: Tensor) -> Tensor:
        """Returns the owners of some of the present rows."""
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
    """Counts the evaluations of a batch of examples for as long as it is entered."""
    passes = Passes(batch, device)
    token = _passes.set(passes)
    try:
        yield passes
    finally:
        _passes.reset(token)


@contextmanager
def owned_by(rows: Tensor) -> Iterator[None]:
    """Says which rows of the present batch are evaluated.

    Arguments:
        rows: Their indices, int64 ``(n,)``; -1 for a row that belongs to nobody.
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
    """Says which rows of the present batch, or of repetitions of it, count for their owners.

    Arguments:
        wanted: Whether each counts, bool ``(n,)``; the others belong to nobody.
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
