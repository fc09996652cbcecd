"""Stops training on a signal: after the current step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType

from scoresde.train.engine import ProcessGroup


class TrainingStopped(Exception):  # noqa: N818 - not an error
    """Raised when training has stopped on a signal and saved a checkpoint.

    Arguments:
        step: The number of updates done.
        signal: The number of the signal.
    """

    def __init__(self, step: int, signal: int) -> None:
        super().__init__(f"Training stopped at step {step}, whose checkpoint is saved")
        self.step = step
        self.signal = signal


class StopSignals:
    """Context manager that records SIGINT and SIGTERM once; a second signal acts as usual.

    A signal that the process ignores stays ignored, as SIGINT is in the background of a shell
    without job control.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.number = int(signal.SIGTERM)
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # the only one with signals
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: a handler not set from Python, which could not be restored.
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
        """Returns whether a process has received a signal; ``number`` is then its number."""
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
