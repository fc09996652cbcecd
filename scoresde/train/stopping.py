"""Leaving a training when it is asked for: after the step at hand, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType

from scoresde.train.engine import ProcessGroup


class TrainingStopped(Exception):  # noqa: N818 - it is no error
    """A training that was asked to stop, and has saved what it did.

    Arguments:
        step: The updates done.
        signal: The number of the signal.
    """

    def __init__(self, step: int, signal: int) -> None:
        super().__init__(f"Training stopped at step {step}, whose checkpoint is saved")
        self.step = step
        self.signal = signal


class StopSignals:
    """While entered, takes note of SIGINT and SIGTERM, once; a second one acts as usual.

    A signal that the process ignores stays ignored, as SIGINT is in the background of a shell
    without job control.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.number = int(signal.SIGTERM)
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other can take signals
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: a handler that is not Python's, which could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def any(self, group: ProcessGroup) -> bool:
        """Whether one of the processes has received a signal, which is then ``number``."""
        numbers = [number for number in group.all(self.received) if number is not None]
        self.number = next(iter(numbers), self.number)
        return bool(numbers)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
