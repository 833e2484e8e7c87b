"""Many processes over one cache directory, and processes that are killed: the promises hold at
every instant.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of, payload_files, settings
from zarrcache._keys import cached_property
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk._publish import publish
from zarrcache.disk.directory import CacheDir
from zarrcache.disk.index import Index, Intent
from zarrcache.disk.single_flight import SingleFlight
from zarrcache.stats import Counters

#: Only a hang takes this long; it says nothing about speed.
HANG_S = 120
SPAWN, FORK = get_context("spawn"), get_context("fork")


def cache_at(tmp_path: Path, **block: Any) -> ArrayCache:
    """A cache of this process."""
    return ArrayCache(settings(tmp_path, **block), Counters())


def run(children: list[BaseProcess]) -> None:
    """Start all, wait for all; none fails."""
    for child in children:
        child.start()
    for child in children:
        child.join(HANG_S)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung
    assert [child.exitcode for child in children] == [0] * len(children)


# -- one fetcher


def _fetch_once(tmp_path: Path, start: Event, keys: int) -> None:
    cache = cache_at(tmp_path)
    cache.index.open()
    flight = SingleFlight(cache.index.dir.locks, timeout_s=HANG_S)
    start.wait(HANG_S)
    for number in range(keys):
        key = key_of(number)
        if cache.get(key) is None:
            with flight.hold(key.digest) as held:
                assert held
                # First detector: creating the marker fails if another process is inside.
                marker = tmp_path / f"inside-{number}"
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                if cache.get(key) is None:
                    # Second detector: one byte appended per fetch; it also shows a fetch
                    # after the first one had ended.
                    with (tmp_path / f"fetched-{number}").open("ab") as file:
                        file.write(b"x")
                    assert cache.put(key, array_of(number), source="s")
                os.unlink(marker)
        entry = cache.get(key)
        assert entry is not None
        assert np.array_equal(entry.array, array_of(number))


def test_eight_processes_on_one_key_fetch_once(tmp_path: Path) -> None:
    """Eight keys in the same order, so that all processes meet at each; two independent
    detectors.
    """
    start = FORK.Event()
    children = [FORK.Process(target=_fetch_once, args=(tmp_path, start, 8)) for _ in range(8)]
    threading.Timer(0.5, start.set).start()
    run(children)
    assert {path.read_bytes() for path in tmp_path.glob("fetched-*")} == {b"x"}
    assert len(list(tmp_path.glob("fetched-*"))) == 8
    assert list(tmp_path.glob("inside-*")) == []


def _hold_for_ever(directory: Path, held: Event) -> None:
    with SingleFlight(directory, timeout_s=1).hold("ab" * 16):
        held.set()
        time.sleep(HANG_S)


def test_killed_holder_lets_the_next_one_go_on(tmp_path: Path) -> None:
    """The kernel releases the lock, without a timeout."""
    held = SPAWN.Event()
    holder = SPAWN.Process(target=_hold_for_ever, args=(tmp_path, held))
    holder.start()
    assert held.wait(HANG_S)
    with SingleFlight(tmp_path, timeout_s=0.05).hold("ab" * 16) as mine:
        assert not mine
    os.kill(holder.pid or 0, signal.SIGKILL)
    with SingleFlight(tmp_path, timeout_s=HANG_S).hold("ab" * 16) as mine:
        assert mine
    holder.join(HANG_S)


# -- evicted


def test_evict_during_read_is_a_miss_not_an_error(tmp_path: Path) -> None:
    """The file goes between the row's lookup and its opening; arrays mapped before stay valid."""
    reader, evictor = cache_at(tmp_path), cache_at(tmp_path)
    reader.put(key_of(1), array_of(1), source="s")
    mapped = reader.get(key_of(1))
    find = reader.index.find

    def find_then_evict(digest: str) -> Any:
        found = find(digest)
        evictor.drop(key_of(1))
        return found

    reader.index.find = find_then_evict  # type: ignore[method-assign]
    assert reader.get(key_of(1)) is None
    assert mapped is not None
    assert np.array_equal(mapped.array, array_of(1))
    assert reader._counters.snapshot().cache_errors == 0


# -- killed


@pytest.mark.parametrize(
    "instant", ["announced", "half written", "renamed", "committed", "row dropped"]
)
def test_killed_between_any_two_steps_nothing_is_left(tmp_path: Path, instant: str) -> None:
    """At each step of a write and of a drop."""
    child = FORK.Process(target=_die_at, args=(tmp_path, instant))
    child.start()
    child.join(HANG_S)
    assert child.exitcode == -signal.SIGKILL
    index = Index(settings(tmp_path))
    index.open()
    kept = instant == "committed"
    assert (index.lookup("abcd") is not None) is kept
    assert [path.name for path in payload_files(tmp_path)] == ["abcd"] * kept
    assert index.volume_bytes() == 4096 * kept


def _die_at(tmp_path: Path, instant: str) -> None:
    def here(name: str) -> None:
        if instant == name:
            os.kill(os.getpid(), signal.SIGKILL)

    index = Index(settings(tmp_path))
    intent = index.begin("entries/ab/abcd", 4096)
    assert isinstance(intent, Intent)
    here("announced")
    index.dir.make(index.dir.entries / "ab")
    publish(
        index.dir.entries / "ab" / "abcd",
        lambda file: (file.write(bytes(100)), here("half written"), file.write(bytes(3996))),
    )
    here("renamed")
    index.commit(intent, "abcd", "array", "note")
    here("committed")
    with index._file.transaction() as table:
        index._doom(table, "abcd")
    here("row dropped")


def test_killed_while_it_rebuilds_the_index_it_is_rebuilt_again(tmp_path: Path) -> None:
    """An empty index would otherwise ignore the entries on disk."""
    cache = cache_at(tmp_path)
    cache.put(key_of(1), array_of(1), source="s")
    child = FORK.Process(target=_die_while_rebuilding, args=(tmp_path,))
    child.start()
    child.join(HANG_S)
    assert child.exitcode == -signal.SIGKILL
    assert cache_at(tmp_path).get(key_of(1)) is not None


def _die_while_rebuilding(tmp_path: Path) -> None:
    import zarrcache.disk._database as module

    for path in CacheDir(tmp_path / "cache").root.glob("cache.db*"):
        path.unlink()
    module.read_header = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    Index(settings(tmp_path)).open()


# -- fork


def _get_and_put(cache: ArrayCache, number: int) -> None:
    for other in (0, 1):
        entry = cache.get(key_of(other))
        assert entry is not None
        assert np.array_equal(entry.array, array_of(other))
    assert cache.put(key_of(number), array_of(number), source="s")
    assert cache.get(key_of(number)) is not None
    assert cache._counters.snapshot().cache_errors == 0


def test_forked_children_use_an_index_that_is_open_in_their_parent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As DataLoader workers do in every epoch; parent and children write at once, and the database
    stays valid.
    """
    caplog.set_level(logging.WARNING)
    cache = cache_at(tmp_path)
    for number in (0, 1):
        cache.put(key_of(number), array_of(number), source="s")
    for epoch in range(3):
        children = [
            FORK.Process(target=_get_and_put, args=(cache, 10 + 10 * epoch + n)) for n in range(4)
        ]
        for child in children:
            child.start()
        _get_and_put(cache, 100 + epoch)
        for child in children:
            child.join(HANG_S)
        assert [child.exitcode for child in children] == [0] * 4
    assert len(list(cache.entries())) == 2 + 3 * 5
    connection = sqlite3.connect(cache.index.dir.index)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    assert caplog.records == []


def test_a_property_that_a_thread_computes_does_not_block_a_forked_child() -> None:
    """That of functools has one lock for all objects in Python 3.11."""

    class Slow:
        def __init__(self, release: threading.Event) -> None:
            self.release = release

        @cached_property
        def value(self) -> int:
            started.set()
            self.release.wait(HANG_S)
            return 1

    started, release, released = threading.Event(), threading.Event(), threading.Event()
    released.set()
    thread = threading.Thread(target=getattr, args=(Slow(release), "value"))
    thread.start()
    try:
        assert started.wait(HANG_S)
        run([FORK.Process(target=getattr, args=(Slow(released), "value"))])
    finally:
        release.set()
        thread.join()


def test_fork_while_threads_read_and_write_gives_a_child_that_works(tmp_path: Path) -> None:
    """SQLite's mutexes belong to the process: a child forked while a thread held one would wait
    forever.
    """
    cache = cache_at(tmp_path)
    for number in (0, 1):
        cache.put(key_of(number), array_of(number), source="s")
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            assert cache.get(key_of(0)) is not None

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        run([FORK.Process(target=_get_and_put, args=(cache, 10 + n)) for n in range(16)])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(list(cache.entries())) == 18
