"""SIGTERM ends a command as Ctrl-C does: in order, within seconds, with an exit code that says which of the two it was.

Batch systems send SIGTERM before they preempt a job or when its time is up, and SIGKILL some 30 s later. Python's own answer to it is to
die at once, which would leave a half-written store and worker processes behind. Handlers are for commands only: nothing is installed by
importing this, and a training script's signals are its own. Where one of them would lose a process that is just being started, it comes a
little later (:func:`held_back`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["ENDING", "Terminated", "ending_in_order", "exit_code", "held_back"]

#: What ends a job: a terminal or a batch system may send them to one process of it, or to all at once.
ENDING: frozenset[int] = frozenset({signal.SIGINT, signal.SIGTERM})


class Terminated(KeyboardInterrupt):
    """SIGTERM. What lets Ctrl-C through lets it through too."""


def exit_code(exc: KeyboardInterrupt) -> int:
    """As shells count: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """In here SIGTERM raises :class:`Terminated` in the main thread. Elsewhere, and where somebody handles it already, nothing is changed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
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
def held_back() -> Iterator[None]:
    """In here neither signal interrupts this thread: it comes at the end. A process that is started in here is deaf to both.

    To be short: whoever presses Ctrl-C waits for it.
    """
    # The mask is what a process inherits. It is not enough: the system gives the signal to another thread then, and Python runs the handler, which
    # raises KeyboardInterrupt, in the main thread all the same. Only that one may change handlers.
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: handler for number in ENDING if is_main and callable(handler := signal.getsignal(number))}
    mine, held, is_over = os.getpid(), set[int](), False

    def hold(number: int, frame: FrameType | None) -> None:
        if is_over or os.getpid() != mine:  # or: in a child that another thread has forked meanwhile
            handlers[number](number, frame)
        else:
            held.add(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for number in handlers:
            signal.signal(number, hold)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        yield
    finally:
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for number in held:
                signal.raise_signal(number)  # which waits for the next line: both of them come
        finally:
            is_over = True
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
