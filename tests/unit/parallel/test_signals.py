"""Signals that end a job are held back while a process is started, and none is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from zarrcache.parallel.signals import ENDING, Terminated, deferred_signals, ending_in_order


@pytest.fixture
def other_thread() -> Iterator[None]:
    """That takes what the main thread has blocked."""
    until_told = threading.Event()
    thread = threading.Thread(target=until_told.wait)
    thread.start()
    yield
    until_told.set()
    thread.join()


@pytest.fixture(autouse=True)
def nothing_is_changed() -> Iterator[None]:
    """Handlers and mask are as they were."""
    before = (
        [signal.getsignal(number) for number in ENDING],
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    )
    yield
    assert (
        [signal.getsignal(number) for number in ENDING],
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    ) == before


def _interrupted(number: int = signal.SIGINT) -> None:
    """Long enough for a handler to run if it can."""
    os.kill(os.getpid(), number)
    _work()


def _work() -> None:
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass


def _interrupted_at_a_start(reached: list[str], number: int = signal.SIGINT) -> None:
    with deferred_signals():
        with deferred_signals():
            _interrupted(number)
            reached.append("inner")
        reached.append("outer")


@pytest.mark.usefixtures("other_thread")
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_comes_when_the_start_is_over(
    number: signal.Signals, kind: type[KeyboardInterrupt]
) -> None:
    """Whichever thread of the process has received it."""
    reached: list[str] = []
    with ending_in_order():
        with pytest.raises(kind):
            _interrupted_at_a_start(reached, number)
        assert reached == ["inner", "outer"]
        with pytest.raises(kind):
            _interrupted(number)


def test_a_signal_comes_where_no_other_thread_could_take_it() -> None:
    """The system keeps it until then."""
    reached = []

    def start() -> None:
        with deferred_signals():
            signal.raise_signal(signal.SIGINT)  # to this thread, that is
            _work()
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached


def _told_twice(told: list[int]) -> None:
    with deferred_signals():
        for number in ENDING:
            _interrupted(number)
        assert told == []


def test_none_of_two_is_lost() -> None:
    """A terminal's, and a batch system's just after it."""
    told: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: told.append(number))
        for number in ENDING
    }
    try:
        _told_twice(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sorted(told) == sorted(ENDING)


def test_of_two_exceptions_one_is_raised() -> None:
    """The second would interrupt the clean-up after the first."""
    cleaned_up = []

    def start() -> None:
        try:
            with deferred_signals():
                for number in ENDING:
                    _interrupted(number)
        finally:
            _work()
            cleaned_up.append(True)

    with ending_in_order(), pytest.raises(KeyboardInterrupt):
        start()
    assert cleaned_up


def test_a_second_one_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a start that hangs. At once it is the same one: a batch system may send it by two ways."""
    reached = []

    def start() -> None:
        with deferred_signals():
            come: Any = signal.getsignal(signal.SIGINT)
            come(signal.SIGINT, None)
            come(signal.SIGINT, None)
            reached.append("twice at once")
            later = time.monotonic() + 60
            monkeypatch.setattr(
                "zarrcache.parallel.signals.time", SimpleNamespace(monotonic=lambda: later)
            )
            come(signal.SIGINT, None)
            reached.append("after a minute")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached == ["twice at once"]


def test_a_handler_that_is_found_in_here_is_no_other_later() -> None:
    """Whoever has taken it for the one to restore loses no signal."""
    with deferred_signals():
        found = signal.getsignal(signal.SIGINT)
    assert callable(found)
    with pytest.raises(KeyboardInterrupt):
        found(signal.SIGINT, None)


def _fail_and_be_interrupted() -> None:
    with deferred_signals():
        _interrupted()
        raise OSError("no processes left")


def test_a_failed_start_and_a_signal_are_both_told() -> None:
    """The signal is what ends the program; the failure is its context."""
    with pytest.raises(KeyboardInterrupt) as caught:
        _fail_and_be_interrupted()
    assert "no processes left" in str(caught.value.__context__)


def test_a_process_started_in_here_is_deaf_to_both() -> None:
    """A signal to all of a job is for the one that starts the others."""
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    with deferred_signals():
        deaf = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    assert deaf == f"{sorted(ENDING)}\n"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_started_by_a_thread, code).result() == deaf


def _started_by_a_thread(code: str) -> str:
    with deferred_signals():
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout


def test_a_child_that_another_thread_forks_meanwhile_hears_them() -> None:
    """A worker of torch, say; nothing would restore its handlers."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread is there, with a mask of its own
        with deferred_signals():
            status = pool.submit(_fork_and_interrupt).result()
    assert os.waitstatus_to_exitcode(status) == 7


def _fork_and_interrupt() -> int:
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        code = 1
        try:
            _interrupted()
        except KeyboardInterrupt:
            code = 7
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]
