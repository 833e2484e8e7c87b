"""Signals that end a job: an exception in the parent, ignored by its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from zarrcache.parallel.signals import (
    ENDING,
    Terminated,
    exit_code,
    raise_on_signals,
    signals_blocked,
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Handlers and the mask are as before, after each test."""

    def state() -> tuple[Any, ...]:
        handlers = [signal.getsignal(number) for number in ENDING]
        return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ())

    before = state()
    yield
    assert state() == before


def _in_a_fork(function: Callable[[], None]) -> int:
    """Exit code of a forked child that runs ``function``; 0 if it returns."""
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Terminated, 143)],
)
def test_a_signal_is_an_exception_with_an_exit_code_of_its_own(
    number: signal.Signals, kind: type[KeyboardInterrupt], code: int
) -> None:
    with raise_on_signals(), pytest.raises(KeyboardInterrupt) as caught:
        signal.raise_signal(number)
    assert type(caught.value) is kind
    assert exit_code(caught.value) == code


def test_signals_that_arrive_together_are_one_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would interrupt the clean-up after the first; Ctrl-C half a second later may."""
    with raise_on_signals():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for number in ENDING:
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(
            "zarrcache.parallel.signals.time", SimpleNamespace(monotonic=_in_a_minute)
        )
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def _in_a_minute() -> float:
    return time.monotonic() + 60.0


def test_a_handler_of_the_caller_stays() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with raise_on_signals():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_another_thread_than_the_main_one_changes_no_handler() -> None:
    def handler() -> Any:
        with raise_on_signals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(handler).result() is signal.SIG_DFL


def test_a_forked_child_dies_of_sigterm() -> None:
    """As torch's workers must; an exception would run the parent's clean-up in them."""
    with raise_on_signals():
        code = _in_a_fork(lambda: signal.raise_signal(signal.SIGTERM))
    assert code == -signal.SIGTERM


def test_sigterm_is_handled_where_ctrl_c_is_ignored() -> None:
    """In a shell's background job; SIGINT stays ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raise_on_signals():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_that_arrives_in_the_block_takes_effect_after_it(
    number: signal.Signals, kind: type[KeyboardInterrupt]
) -> None:
    reached = []

    def start() -> None:
        with signals_blocked():
            signal.raise_signal(number)  # to this thread
            reached.append(number)

    with raise_on_signals(), pytest.raises(kind):
        start()
    assert reached == [number]


def test_a_signal_that_is_pending_at_the_start_leaves_nothing_blocked() -> None:
    """``restored`` checks the mask: Ctrl-C would never work again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.raise_signal(signal.SIGINT)
    with signals_blocked():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupted_by_another_thread() -> None:
    until_interrupted = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()  # the thread exists, with a mask of its own
        try:
            with signals_blocked():
                executor.submit(os.kill, os.getpid(), signal.SIGINT).result()
                until_interrupted.wait(10)
        finally:
            until_interrupted.set()


def test_an_exception_in_the_block_restores_the_mask() -> None:
    """The system gives the signal to a thread that does not block it, and Python runs the handler
    in the main thread.
    """
    with pytest.raises(KeyboardInterrupt):
        _interrupted_by_another_thread()


def _mask_of_a_process() -> str:
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    with signals_blocked():
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    return done.stdout


def test_a_process_started_in_the_block_ignores_both() -> None:
    """Also from another thread than the main one."""
    expected = f"{sorted(ENDING)}\n"
    assert _mask_of_a_process() == expected
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(_mask_of_a_process).result() == expected


def test_a_child_that_another_thread_forks_meanwhile_hears_them() -> None:
    """A worker of torch, say."""

    def die() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()  # the thread exists, with a mask of its own
        with signals_blocked():
            code = executor.submit(_in_a_fork, die).result()
    assert code == -signal.SIGTERM
