"""Forks while threads are inside SQLite."""

from __future__ import annotations

import os
import threading
import time

import pytest

from zarrcache.disk import _database
from zarrcache.disk._database import no_fork


def fork_and_wait() -> float:
    """Fork a child that ends at once. Returns the seconds that the fork took."""
    start_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    took_s = time.monotonic() - start_s
    assert os.waitpid(pid, 0)[1] == 0
    return took_s


def test_a_fork_does_not_wait_for_the_thread_that_forks() -> None:
    """Ctrl-C may have left its lock taken."""
    gate = no_fork()
    gate.__enter__()
    try:
        assert fork_and_wait() < 30
    finally:
        gate.__exit__(None, None, None)


def test_a_fork_does_not_wait_for_a_thread_that_has_ended() -> None:
    thread = threading.Thread(target=lambda: no_fork().__enter__())
    thread.start()
    thread.join()
    assert fork_and_wait() < 30


def test_a_fork_waits_for_a_thread_that_is_inside_and_keeps_others_out() -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with no_fork():
            inside.set()
            leave.wait(60)
            with no_fork():  # nested: must not wait for the fork that waits for it
                order.append("left")

    def second() -> None:
        with no_fork():
            order.append("entered")

    def fork() -> None:
        fork_and_wait()
        order.append("forked")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(60)
    for target in (fork, second):
        threads.append(threading.Thread(target=target))
        threads[-1].start()
        time.sleep(0.2)  # it waits now
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(60)
    assert order[0] == "left"
    assert sorted(order) == ["entered", "forked", "left"]


def test_a_stuck_thread_delays_a_fork_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_database, "_FORK_WAIT_S", 0.2)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with no_fork():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert inside.wait(60)
        assert 0.2 <= fork_and_wait() < 30
    finally:
        leave.set()
        thread.join()
    assert "the child may hang" in caplog.text
    with no_fork():  # everything works afterwards
        pass
