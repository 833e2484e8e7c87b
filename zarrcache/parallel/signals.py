"""SIGTERM ends a command as Ctrl-C does: in order, within seconds, with an exit code that says
which of the two it was.

Batch systems send SIGTERM before they preempt a job or when its time is up, and SIGKILL some 30 s
later. Python's own answer to it is to die at once, which would leave a half-written store and
worker processes behind. Handlers are for commands only: nothing is installed by importing this, and
a training script's signals are its own. Where one of them would lose a process that is just being
started, it comes a little later (:func:`deferred_signals`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["ENDING", "Terminated", "deferred_signals", "ending_in_order", "exit_code"]

#: What ends a job: a terminal or a batch system may send them to one process of it, or to all at
#: once.
ENDING: frozenset[int] = frozenset({signal.SIGINT, signal.SIGTERM})

#: How long a signal may be held back before a second one of its kind comes through.
_PATIENCE_S = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM. What lets Ctrl-C through lets it through too."""


def exit_code(exc: KeyboardInterrupt) -> int:
    """As shells count: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """In here SIGTERM raises :class:`Terminated` in the main thread. Elsewhere, and where somebody
    handles it already, nothing is changed.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    mine = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == mine:
            raise Terminated
        # A forked child has this handler too, and whoever ends it expects it to be gone.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """In here neither signal raises an exception: that comes at the end. A process that is started
    in here is deaf to both.

    One that comes again, a second later or more, is not held back: whoever presses Ctrl-C twice
    does not want to wait. What ends the process without a handler of Python's goes on to do so.
    """
    # The mask is what a process inherits. It is not enough: the system gives the signal to another
    # thread then, and Python runs the handler, which raises KeyboardInterrupt, in the main thread
    # all the same. Only that one may change handlers.
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {
        number: handler
        for number in ENDING
        if is_main and callable(handler := signal.getsignal(number))
    }
    held: dict[int, tuple[float, FrameType | None]] = {}
    mine, is_over = os.getpid(), False

    def hold(number: int, frame: FrameType | None) -> None:
        # not in a child that another thread has forked meanwhile
        if not is_over and os.getpid() == mine:
            until_s, _ = held.setdefault(number, (time.monotonic() + _PATIENCE_S, frame))
            if time.monotonic() < until_s:
                return
        handlers[number](number, frame)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for number in handlers:
            signal.signal(number, hold)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        yield
    finally:
        # One exception at the most, and when all is as it was: a second one would interrupt the
        # clean-up that the first one has begun.
        exception, is_restored = None, False
        while not is_restored:
            try:
                # those that the system has kept are held by us before this returns
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                is_over = True
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                is_restored = True
            except BaseException as exc:  # noqa: BLE001 - of a signal that has just come
                exception = exc
        for number, (_, frame) in held.items():
            try:
                handlers[number](number, frame)
            except BaseException as exc:  # noqa: BLE001
                exception = exc
        if exception is not None:
            raise exception
