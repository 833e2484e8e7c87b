"""Counters: sums over threads and over forked and spawned children, ended ones included."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from zarrcache.stats import Counters, LogOnce, Stats


def test_snapshots_add_and_subtract() -> None:
    """Those of several processes add up; an epoch is the difference of two."""
    a, b = Stats(hits=1, served_bytes=10), Stats(hits=2, requests=5)
    assert a + b == Stats(hits=3, requests=5, served_bytes=10)
    assert (a + b) - b == a


def test_hit_ratio_is_hits_over_reads() -> None:
    """0.0 before the first read."""
    assert Stats().hit_ratio == 0.0
    assert Stats(hits=3, misses=1).hit_ratio == 0.75


def test_unknown_counter_is_an_error() -> None:
    """A misspelt name must not be ignored."""
    with pytest.raises(KeyError):
        Counters().add(hitz=1)


@pytest.mark.parametrize("shared", [False, True])
def test_threads_lose_no_count(shared: bool) -> None:
    """8 threads, 500 each."""
    counters = Counters(shared=shared)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: counters.add(hits=1, served_bytes=3), range(4000)))
    assert counters.snapshot() == counters.total() == Stats(hits=4000, served_bytes=12000)


def _count(counters: Counters, times: int) -> None:
    for _ in range(times):
        counters.add(misses=1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_that_have_ended_stay_in_the_total(method: str) -> None:
    """DataLoader workers end before the total is read; each counts from zero."""
    context = get_context(method)
    counters = Counters(shared=True)
    counters.add(misses=1000)
    children = [context.Process(target=_count, args=(counters, times)) for times in (1, 20, 300)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert counters.total() == Stats(misses=1321)
    assert counters.snapshot() == Stats(misses=1000)


def test_grandchild_counts_too() -> None:
    counters = Counters(shared=True)
    child = get_context("fork").Process(target=_fork_and_count, args=(counters,))
    child.start()
    child.join()
    assert counters.total().misses == 12


def _fork_and_count(counters: Counters) -> None:
    _count(counters, 5)
    child = get_context("fork").Process(target=_count, args=(counters, 7))
    child.start()
    child.join()


def test_counters_without_a_board_are_each_process_own() -> None:
    """A child's counts end with it."""
    counters = Counters()
    child = get_context("fork").Process(target=_count, args=(counters, 5))
    child.start()
    child.join()
    assert counters.total() == Stats()
    assert pickle.loads(pickle.dumps(counters)).snapshot() == Stats()


def test_fork_while_a_thread_counts_does_not_hang_the_child() -> None:
    """The child has its own lock: the thread that held its parent's does not exist there."""
    counters, stop = Counters(shared=True), threading.Event()

    def count() -> None:
        while not stop.is_set():
            counters.add(hits=1)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        children = [
            get_context("fork").Process(target=_count, args=(counters, 1)) for _ in range(20)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0] * 20
    finally:
        stop.set()
        thread.join()
    assert counters.total().misses == 20


def test_two_handles_in_one_process_do_not_share_a_slot() -> None:
    """A pickled copy in the same process, with threads on both: no count is lost."""
    for _ in range(20):
        handles = [Counters(shared=True)]
        handles += [pickle.loads(pickle.dumps(handles[0])) for _ in range(3)]
        start = threading.Barrier(4)

        def count(handle: Counters, start: threading.Barrier = start) -> None:
            start.wait()
            handle.add(hits=1)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count, handles))
        assert handles[0].total().hits == 4


def test_board_needs_no_file_and_leaks_no_descriptor() -> None:
    """After 1,000 readers were made and dropped."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(1000):
        Counters(shared=True).add(hits=1)
    assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_kind_of_trouble_is_logged_once_per_owner(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a room")
    first, second = LogOnce(), LogOnce()
    for n in range(3):
        first.warning("OSError", logger, "write %d failed", n)
    first.warning(("OSError", "peer"), logger, "another kind")
    second.warning("OSError", logger, "another owner")
    assert [record.getMessage() for record in caplog.records] == [
        "write 0 failed",
        "another kind",
        "another owner",
    ]
    assert {(record.name, record.filename) for record in caplog.records} == {
        ("a room", "test_stats.py")
    }


def test_a_copy_in_another_process_has_logged_nothing() -> None:
    log_once = LogOnce()
    log_once.warning("OSError", logging.getLogger("a room"), "failed")
    assert log_once
    assert not pickle.loads(pickle.dumps(log_once))
