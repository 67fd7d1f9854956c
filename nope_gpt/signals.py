"""Ending a run from outside without losing its work."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

ENDING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")  # The last is Windows' own.
    if hasattr(signal, name)
]


class StopRequest:
    """Remembers the first signal that asks to stop; the second one is obeyed at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.receive) for number in ENDING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number


def exit_code_of(number: int) -> int:
    """130 for an interrupt from the keyboard, 143 for any other request to end."""
    return 130 if number == signal.SIGINT else 143
