"""The requests of a node are divided among its fetches, whatever becomes of their processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from zarrcache._keys import ObjectInfo
from zarrcache.origin import _in_flight
from zarrcache.origin._in_flight import DEFAULT_REQUESTS, FETCH_REQUESTS, NODE_REQUESTS, InFlight
from zarrcache.origin._requests import Received, concurrent_requests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux's locks")
_HANG_S = 60.0


def fetching(directory: Path, pipe: Connection) -> None:
    """A process with one fetch that runs until it is told to end."""
    with InFlight("auto", directory).of_a_fetch() as most:
        pipe.send(most())
        pipe.recv()


@contextlib.contextmanager
def fetching_processes(directory: Path, n: int) -> Iterator[list[SpawnProcess]]:
    """``n`` processes with one fetch each."""
    spawn = multiprocessing.get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(n)]
    processes = [spawn.Process(target=fetching, args=(directory, theirs)) for _, theirs in pairs]
    for process in processes:
        process.start()
    try:
        for mine, _ in pairs:
            assert mine.poll(_HANG_S)
            mine.recv()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def alone(directory: Path) -> int:
    with InFlight("auto", directory).of_a_fetch() as most:
        return most()


def test_a_fetch_alone_has_the_most(tmp_path: Path) -> None:
    assert alone(tmp_path) == FETCH_REQUESTS
    assert alone(tmp_path) == FETCH_REQUESTS, "the first one ended"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [2, 3, 8, 64, 600])
def test_fetches_together_stay_under_the_limit_of_the_node(
    tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counts all others: its share is never more than the node's divided by them."""
    monkeypatch.setattr(_in_flight, "COUNT_S", 0.0)
    with contextlib.ExitStack() as stack:
        limits = [stack.enter_context(InFlight("auto", tmp_path).of_a_fetch()) for _ in range(n)]
        assert {most() for most in limits[:: 1 + n // 4]} == {
            min(FETCH_REQUESTS, max(1, NODE_REQUESTS // n))
        }


def test_fetches_of_other_processes_count_until_they_are_killed(tmp_path: Path) -> None:
    with fetching_processes(tmp_path, 3) as processes:
        assert alone(tmp_path) == NODE_REQUESTS // 4
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert alone(tmp_path) == FETCH_REQUESTS


def test_a_forked_child_does_not_count_its_parents_fetch(tmp_path: Path) -> None:
    """Its copy of the descriptor would hold the lock for as long as it lives."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe()
    with InFlight("auto", tmp_path).of_a_fetch():
        child = fork.Process(target=theirs.recv)
        child.start()
    try:
        deadline_s = time.monotonic() + _HANG_S
        while alone(tmp_path) != FETCH_REQUESTS:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    finally:
        mine.send(None)
        child.join()


def test_a_thread_that_opens_and_closes_the_directory_releases_nothing(tmp_path: Path) -> None:
    """As it would with POSIX locks; every lock file of the cache is opened this way."""
    with contextlib.ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(InFlight("auto", tmp_path).of_a_fetch())
        os.close(os.open(tmp_path, os.O_RDONLY))
        assert alone(tmp_path) == NODE_REQUESTS // 8


@pytest.mark.parametrize("name", ["gone", "file"])
def test_where_fetches_cannot_be_counted_each_has_a_fixed_number(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    assert alone(tmp_path / name) == DEFAULT_REQUESTS
    with InFlight("auto").of_a_fetch() as most:
        assert most() == DEFAULT_REQUESTS


@pytest.mark.parametrize(("files", "most"), [(4096, FETCH_REQUESTS), (400, 80), (4, 1)])
def test_connections_leave_open_files_for_others(
    tmp_path: Path, files: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each directory of stores keeps its connections open. The limit itself cannot be lowered here:
    pytest has files open.
    """
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert alone(tmp_path) == most
    assert alone(tmp_path / "gone") == min(DEFAULT_REQUESTS, most)
    with InFlight(300, tmp_path).of_a_fetch() as number:
        assert number() == 300


def test_a_number_is_that_number(tmp_path: Path) -> None:
    with fetching_processes(tmp_path, 1), InFlight(300, tmp_path).of_a_fetch() as most:
        assert most() == 300
    assert alone(tmp_path) == FETCH_REQUESTS


def test_it_can_be_pickled_and_leaves_no_open_file(tmp_path: Path) -> None:
    again: InFlight = pickle.loads(pickle.dumps(InFlight("auto", tmp_path)))
    before = set(os.listdir("/proc/self/fd"))
    with contextlib.suppress(KeyError), again.of_a_fetch() as most:
        assert most() == FETCH_REQUESTS
        raise KeyError
    # A part of it: what earlier tests left is closed at any time.
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not _in_flight._open_files


def test_a_running_fetch_gives_way_to_those_that_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With seven others, 64 of its 192 threads go on, and all requests are answered."""
    monkeypatch.setattr(_in_flight, "COUNT_S", 0.0)
    begun: list[int] = []
    first_wave, may_end = threading.Event(), threading.Event()

    async def request(obj: ObjectInfo) -> Received:
        if obj.key != "0":
            begun.append(threading.get_ident())
            if len(begun) >= FETCH_REQUESTS:
                first_wave.set()
            assert may_end.wait(_HANG_S)
            time.sleep(0.001)
        return Received(b"", "")

    objects = [ObjectInfo(str(i), 1, "e") for i in range(1000)]
    with ThreadPoolExecutor(FETCH_REQUESTS) as pool, contextlib.ExitStack() as others:
        answers = concurrent_requests(pool, request, objects, InFlight("auto", tmp_path))
        assert next(answers)[0].key == "0"
        assert first_wave.wait(_HANG_S)
        for _ in range(7):
            others.enter_context(InFlight("auto", tmp_path).of_a_fetch())
        may_end.set()
        assert len(list(answers)) == len(objects) - 1
    assert len(set(begun[:FETCH_REQUESTS])) == FETCH_REQUESTS
    assert len(set(begun[FETCH_REQUESTS:])) <= NODE_REQUESTS // 8


def test_a_child_forked_during_a_fetch_closes_no_other_file(tmp_path: Path) -> None:
    """It closes the lock of its parent at once; the number may soon be that of its own file."""
    reading, writing = os.pipe()
    with InFlight("auto", tmp_path).of_a_fetch():
        child = os.fork()
        if not child:
            # Every number up to the one that the lock had, and some more.
            own = [os.open(tmp_path, os.O_RDONLY) for _ in range(256)]
    if not child:
        closed = 0
        for fd in own:
            try:
                os.fstat(fd)
            except OSError:
                closed += 1
        os.write(writing, bytes([closed]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"\0"
    os.close(reading)
    os.close(writing)
