"""A process of another job is stopped (a suspended batch job, a debugger) while it holds a lock of
the cache. The others pay seconds once, read on, and store again when it goes on.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.support.cachedirs import array_of, key_of, settings
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import _database
from zarrcache.disk.index import Index, Intent
from zarrcache.disk.single_flight import SingleFlight
from zarrcache.stats import Counters

FORK = get_context("fork")
#: Less than what one lock cost before it was given up (60 s), and far more than it costs now.
SECONDS = 30.0

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@contextmanager
def stopped(function: Callable[..., Any], *args: Any) -> Iterator[int]:
    """A child that stops itself within ``function``; its pid."""
    child = FORK.Process(target=function, args=args)
    child.start()
    assert child.pid is not None
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield child.pid
    finally:
        child.kill()
        os.waitpid(child.pid, 0)


def stop_in_a_transaction(directory: Path, block: dict[str, Any]) -> None:
    with Index(settings(directory, **block))._file.transaction():
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_with_a_lock(directory: Path, digest: str) -> None:
    with SingleFlight(directory, timeout_s=1).hold(digest):
        os.kill(os.getpid(), signal.SIGSTOP)


def put(cache: ArrayCache, number: int) -> bool:
    return cache.put(key_of(number), array_of(number), source="s") is not None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArrayCache:
    """With one entry."""
    monkeypatch.setattr(_database, "_BUSY_S", 0.5)
    cache = ArrayCache(settings(tmp_path), Counters())
    assert put(cache, 0)
    return cache


def test_a_process_stopped_in_a_transaction_costs_one_wait_and_no_hit(
    tmp_path: Path, cache: ArrayCache, caplog: pytest.LogCaptureFixture
) -> None:
    with stopped(stop_in_a_transaction, tmp_path, {}) as pid:
        start_s = time.monotonic()
        assert [put(cache, number) for number in range(1, 9)] == [False] * 8
        assert time.monotonic() - start_s < SECONDS
        assert cache.get(key_of(0)) is not None
        assert caplog.text.count("Look for a stopped process (state T in `ps`)") == 1
        os.kill(pid, signal.SIGCONT)
        os.waitpid(pid, os.WNOHANG)
        deadline_s = time.monotonic() + SECONDS
        while not put(cache, 1):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert cache.get(key_of(1)) is not None


def test_a_process_that_starts_meanwhile_reads_and_stores_later(
    tmp_path: Path, cache: ArrayCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Opening the index takes a transaction too."""
    late = ArrayCache(settings(tmp_path), Counters())
    with stopped(stop_in_a_transaction, tmp_path, {}):
        start_s = time.monotonic()
        entry = late.get(key_of(0))
        assert entry is not None
        assert (entry.array == array_of(0)).all()
        assert not put(late, 1)
        assert late.get(key_of(2)) is None
        assert time.monotonic() - start_s < SECONDS
        assert "nothing will be stored" in caplog.text
    assert put(late, 1)
    assert late.get(key_of(1)) is not None


def test_room_that_could_not_be_given_back_is_given_back_with_the_next_entry(
    tmp_path: Path, cache: ArrayCache
) -> None:
    """No sweep frees it: its owner lives."""
    index = cache.index
    before = index.volume_bytes()
    intent = index.begin("entries/ab/abcd-01", 40960)
    assert isinstance(intent, Intent)
    with stopped(stop_in_a_transaction, tmp_path, {}), pytest.raises(_database.CACHE_FAULTS):
        index.abort(intent)
    assert index.volume_bytes() == before + 40960
    assert put(cache, 1)
    assert index.volume_bytes() == before + 8192


def test_a_lock_of_a_stopped_process_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the timeout is; the message names the process."""
    digest = "0123456789abcdef" * 2
    with (
        stopped(stop_with_a_lock, tmp_path, digest) as pid,
        caplog.at_level(logging.WARNING),
    ):
        start_s = time.monotonic()
        with SingleFlight(tmp_path, timeout_s=600).hold(digest) as is_held:
            assert not is_held
        assert time.monotonic() - start_s < SECONDS
        assert f"is held by process {pid}, which is stopped" in caplog.text
    with SingleFlight(tmp_path, timeout_s=600).hold(digest) as is_held:
        assert is_held


def test_writers_that_make_progress_are_waited_for(tmp_path: Path, cache: ArrayCache) -> None:
    """The lock goes to any of those who wait, so a wait may be long without a stopped process."""
    end = FORK.Event()
    children = [FORK.Process(target=_write_until, args=(tmp_path, end, n)) for n in range(4)]
    for child in children:
        child.start()
    try:
        assert all(put(cache, number) for number in range(1, 25))
    finally:
        end.set()
        for child in children:
            child.join(60)
    assert [child.exitcode for child in children] == [0] * 4


def _write_until(directory: Path, end: Any, seed: int) -> None:
    cache = ArrayCache(settings(directory), Counters())
    number = 1000 * seed + 1000
    while not end.is_set():
        number += 1
        assert put(cache, number)
