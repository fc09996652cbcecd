"""Network evaluations, counted for the example that each row of a batch belongs to.

A network, or an exact model, reports every pass of its rows (:func:`count_pass`) where it runs, so
that a model made of two models costs two passes. Every product with a transposed Jacobian is
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
from contextlib import contextmanager
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
        self.network = torch.zeros(batch, dtype=torch.int64, device=device)
        self.products = torch.zeros_like(self.network)
        self.owners: Tensor | None = None  # of the rows at present; None: row i is example i

    def add(self, counts: Tensor, rows: int, times: int) -> None:
        """Adds to the counts of the examples that the rows belong to.

        Raises:
            InputError: If there are other rows than anybody has said.
        """
        size = len(counts) if self.owners is None else len(self.owners)
        if rows % size:
            raise InputError(
                f"A model ran on {rows} rows of a batch of {size}; say whose rows they are with "
                "scoresde.passes.owned_by."
            )
        if self.owners is None:
            counts += times * (rows // size)  # a repeated batch belongs to the same examples
            return
        owners = self.owners.repeat(rows // size)
        counts.index_add_(0, owners.clamp(min=0), times * (owners >= 0))


_passes: ContextVar[Passes | None] = ContextVar("passes", default=None)


@contextmanager
def counting(batch: int, device: torch.device | str | None = None) -> Iterator[Passes]:
    """Counts the evaluations of a batch of examples for as long as it is entered."""
    token = _passes.set(Passes(batch, device))
    try:
        passes = _passes.get()
        assert passes is not None
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
    before = passes.owners
    if before is not None:
        rows = torch.where(rows >= 0, before[rows.clamp(min=0)], rows)
    passes.owners = rows
    try:
        yield
    finally:
        passes.owners = before


def count_pass(rows: int) -> None:
    """Counts one evaluation of a network or an exact model on a number of rows."""
    passes = _passes.get()
    if passes is not None:
        passes.add(passes.network, rows, 1)


def count_products(rows: int, times: int = 1) -> None:
    """Counts products of each row with a transposed Jacobian."""
    passes = _passes.get()
    if passes is not None:
        passes.add(passes.products, rows, times)
