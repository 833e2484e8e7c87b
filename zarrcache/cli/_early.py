"""Ctrl-C before a command runs: end at once, with one word instead of a traceback.

The command line imports for 0.1 to 0.5 s before it can do anything. An exception inside an import
prints a traceback, and some packages swallow it.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

__all__ = ["end_on_ctrl_c", "leave_ctrl_c_to_python"]


def end_on_ctrl_c() -> None:
    """End the process on SIGINT, with exit code 130, if Python's own handler is installed."""
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


def leave_ctrl_c_to_python() -> None:
    """Raise ``KeyboardInterrupt`` again: now there may be work to end in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(128 + number)  # nothing is open yet; atexit functions may not be complete
