"""Ending a run early without losing it."""

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks after each step.

    With several processes the answer is agreed on, so that all of them stop at the same step even if only one was
    asked to. A second Ctrl-C interrupts at once.

    Use as a context: outside of it the signals do what they did before.

    Args:
        accelerator: of the run.
        every: with several processes, steps between agreements (each is a small collective operation).
    """

    def __init__(self, accelerator: Any, every: int = 10) -> None:
        self.accelerator, self.every, self.requested = accelerator, every, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after this step."""
        if self.accelerator.num_processes == 1:
            return self.requested
        if step % self.every:
            return False
        if self.requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
