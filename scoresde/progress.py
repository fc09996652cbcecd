"""Progress of long computations: a bar on a terminal, otherwise a few log lines.

A bar is redrawn several times a second, which would fill a log file with copies. The lines go to
the logger ``scoresde`` at level INFO. The command line prints them; a script prints them after
``logging.basicConfig(level="INFO")``.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger("scoresde")

_LINES = 5  # log lines of a computation of known length
_FIRST = 10  # units before the first line if the length is unknown; doubles for each line
_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silent(on: bool = True) -> Iterator[None]:
    """Hides all progress within a ``with`` block."""
    token = _silent.set(on or _silent.get())
    try:
        yield
    finally:
        _silent.reset(token)


def on_terminal() -> bool:
    """Returns whether a bar can be drawn, that is, in a terminal or a notebook."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal or "ipykernel" in sys.modules


class Progress:
    """Progress of a computation.

    Arguments:
        total: The number of units, or None if it is unknown.
        label: The name of the computation.
        unit: The name of a unit.
        shown: Whether to show the progress.
        start: The number of units already done.
        lines: Whether to log lines automatically where there is no bar. A caller that logs its own
            numbers checks ``logs``.
        leave: Whether the bar remains visible at the end.
        scale: Whether counts are written with a prefix such as M.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str,
        *,
        shown: bool = True,
        start: int = 0,
        lines: bool = True,
        leave: bool = False,
        scale: bool = False,
    ) -> None:
        shown = shown and not _silent.get()
        self.total, self.label, self.done = total, label, start
        self._written = tqdm.format_sizeof if scale else str
        self._unit = unit if scale else f" {unit}s"
        self.logs = shown and not on_terminal()
        self._lines = self.logs and lines
        self._next = self._milestone()
        self.bar = tqdm(
            total=total,
            desc=label,
            unit=unit,
            initial=start,
            leave=leave,
            unit_scale=scale,
            disable=not shown or self.logs,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, units: int = 1, fresh: bool = True) -> None:
        """Counts units; those that are not ``fresh`` are excluded from the time estimate."""
        self.done += units
        if not fresh and not self.bar.disable:
            self.bar.initial += units
        self.bar.update(units)
        if self._lines and self.done >= self._next:
            self._next = self._milestone()
            of = "" if self.total is None else f" of {self._written(self.total)}"
            self.say(f"{self._written(self.done)}{of}{self._unit}")

    def note(self, text: str) -> None:
        """Shows numbers at the end of the bar."""
        self.bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """Logs a line if lines are logged."""
        if self.logs:
            log.info("%s: %s", self.label, text)

    def close(self) -> None:
        """Closes the bar."""
        self.bar.close()

    def _milestone(self) -> float:
        """Returns the count at which the next line is due."""
        if self.total is None:
            return max(_FIRST, 2 * self.done)
        passed = _LINES * self.done // max(1, self.total)
        return (passed + 1) * self.total / _LINES
