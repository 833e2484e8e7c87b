"""Turn Ctrl-C and SIGTERM into one exception each, and start child processes that ignore both.

Batch systems send SIGTERM before they preempt a job or when its time is up, and SIGKILL about 30 s
later. By default SIGTERM ends Python immediately, which would leave half-written stores. Commands
install handlers that end them in order; importing this module installs none, so a training script
keeps its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = [
    "ENDING",
    "Terminated",
    "end_signalled",
    "exit_code",
    "raise_on_signals",
    "signals_blocked",
]

#: Signals that end a job. A terminal or a batch system sends them to one process or to all.
ENDING: frozenset[int] = frozenset({signal.SIGINT, signal.SIGTERM})

#: Seconds within which further signals are taken for the same request: a terminal, a batch system
#: and `srun` may each send one. A second exception would interrupt the clean-up after the first.
_SAME_REQUEST_S = 0.5


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. A ``KeyboardInterrupt``, so that the same code lets both through."""


def exit_code(exc: KeyboardInterrupt) -> int:
    """The exit code that shells use: 128 plus the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGINT and :class:`Terminated` on SIGTERM, in the main thread.

    Signals within 0.5 s of the first are one request, and one exception. Changes nothing in
    another thread, and no handler that differs from Python's default.
    """
    default: dict[int, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    replaced = [number for number in default if signal.getsignal(number) is default[number]]
    if threading.current_thread() is not threading.main_thread():
        replaced = []
    owner, same_until_s = os.getpid(), -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal same_until_s
        if os.getpid() != owner:
            # A forked child inherits this handler; the process that ends it expects the default.
            signal.signal(number, default[number])
            os.kill(os.getpid(), number)
        elif time.monotonic() >= same_until_s:
            same_until_s = time.monotonic() + _SAME_REQUEST_S
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    try:
        for number in replaced:
            signal.signal(number, end)
        yield
    finally:
        for number in replaced:
            signal.signal(number, default[number])


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread, so that children started inside ignore both.

    Processes and threads inherit the mask and keep it. A signal that arrives inside takes effect
    when the block ends, or at once if the process has another thread that does not block it.
    """
    # The mask is read before `try`: pthread_sigmask may block the signals and then raise the
    # exception of one that was pending.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def end_signalled() -> Iterator[Callable[[], object]]:
    """In this block SIGINT and SIGTERM only end the wait of the yielded function. Main thread only.

    No exception interrupts the code inside. The wait is for a byte that CPython's handler writes,
    whichever thread the kernel has chosen for the signal. ``signal.sigwait`` with both signals
    blocked occasionally loses one: after SIGCONT the main thread is not waiting for an instant, and
    a signal of that instant goes to a thread that does not block it (of numpy's OpenBLAS).
    """
    handlers = {number: signal.getsignal(number) for number in ENDING}
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.setblocking(False)
        wakeup_fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        try:
            for number in ENDING:
                signal.signal(number, lambda *_: None)

            def wait() -> None:
                # Other signals with a handler write their number as well.
                while not ENDING.intersection(reading.recv(64)):
                    pass

            yield wait
        finally:
            signal.set_wakeup_fd(wakeup_fd)
            for number, handler in handlers.items():
                signal.signal(number, handler)
