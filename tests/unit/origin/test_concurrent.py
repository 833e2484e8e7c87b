"""Requests in flight on a loop's thread or in threads, answers in the calling thread. The requests
are functions of the tests' own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from zarrcache._keys import ObjectInfo
from zarrcache.origin._concurrent import Received, pump, pump_threads, run
from zarrcache.origin._s3_errors import S3Fault


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def some_objects(n: int) -> list[ObjectInfo]:
    """Numbered objects."""
    return [ObjectInfo(str(i), i, "e") for i in range(n)]


def test_every_object_comes_once(loop: asyncio.AbstractEventLoop) -> None:
    """With its own answer, whatever the concurrency."""

    async def get(obj: ObjectInfo) -> Received:
        await asyncio.sleep(0)
        return Received(obj.key.encode(), "e")

    for concurrency in (1, 3, 100):
        answers = {
            obj.key: answer.body
            for obj, answer in pump(loop, get, some_objects(20), concurrency)
            if isinstance(answer, Received)
        }
        assert answers == {str(i): str(i).encode() for i in range(20)}


def test_nothing_asked_ends_at_once(loop: asyncio.AbstractEventLoop) -> None:
    """No worker is started for no object."""

    async def get(obj: ObjectInfo) -> Received:
        raise AssertionError

    assert list(pump(loop, get, [], 4)) == []


def test_answers_come_in_the_order_of_arrival(loop: asyncio.AbstractEventLoop) -> None:
    """The first object does not hold up the others."""
    gate = asyncio.Event()

    async def get(obj: ObjectInfo) -> Received:
        if obj.key == "0":
            await gate.wait()
        if obj.key == "3":
            gate.set()
        return Received(b"", "e")

    keys = [obj.key for obj, _ in pump(loop, get, some_objects(4), 2)]
    assert keys[-1] == "0"


def test_no_more_are_in_flight_than_asked_for(loop: asyncio.AbstractEventLoop) -> None:
    """And no fewer, while there is work."""
    now = peak = 0

    async def get(obj: ObjectInfo) -> Received:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await asyncio.sleep(0.001)
        now -= 1
        return Received(b"", "e")

    assert len(list(pump(loop, get, some_objects(50), 7))) == 50
    assert peak == 7


def test_a_fault_is_an_answer(loop: asyncio.AbstractEventLoop) -> None:
    """The others come all the same."""

    async def get(obj: ObjectInfo) -> Received:
        if obj.key == "1":
            raise S3Fault(403, "AccessDenied", "")
        return Received(b"", "e")

    answers = {obj.key: answer for obj, answer in pump(loop, get, some_objects(4), 2)}
    assert isinstance(answers["1"], S3Fault)
    assert sum(isinstance(answer, Received) for answer in answers.values()) == 3


@pytest.mark.parametrize(("status", "asked"), [(503, 4), (403, 20)])
def test_a_server_that_is_down_is_not_asked_for_the_rest(
    loop: asyncio.AbstractEventLoop, status: int, asked: int
) -> None:
    """As many transient faults in a row as are in flight end the pass; the rest comes back unasked.
    A final fault says nothing of the others.
    """
    requests = []

    async def get(obj: ObjectInfo) -> Received:
        requests.append(obj.key)
        raise S3Fault(status, "", "")

    answers = [answer for _, answer in pump(loop, get, some_objects(20), 4)]
    assert len(requests) == asked
    assert len(answers) == 20
    assert answers.count(None) == 20 - asked


def test_a_success_in_between_keeps_the_pass_going(loop: asyncio.AbstractEventLoop) -> None:
    """Every second request fails: the server is busy, not down."""

    async def get(obj: ObjectInfo) -> Received:
        if int(obj.key) % 2:
            raise S3Fault(503, "SlowDown", "")
        return Received(b"", "e")

    assert [answer for _, answer in pump(loop, get, some_objects(30), 2)].count(None) == 0


def test_closing_cancels_what_is_in_flight(loop: asyncio.AbstractEventLoop) -> None:
    """And waits for nothing."""
    cancelled = threading.Semaphore(0)

    async def get(obj: ObjectInfo) -> Received:
        if obj.key == "0":
            return Received(b"", "e")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.release()
            raise
        raise AssertionError

    answers = pump(loop, get, some_objects(10), 4)
    assert next(answers)[0].key == "0"
    answers.close()
    assert all(cancelled.acquire(timeout=20) for _ in range(4))


def test_an_error_of_ours_reaches_the_caller(loop: asyncio.AbstractEventLoop) -> None:
    """It is not taken for a fault of the server, and nothing hangs."""

    async def get(obj: ObjectInfo) -> Received:
        if obj.key == "2":
            raise ZeroDivisionError("ours")
        await asyncio.sleep(0)
        return Received(b"", "e")

    with pytest.raises(ZeroDivisionError, match="ours"):
        list(pump(loop, get, some_objects(5), 3))


def test_run_returns_the_result_or_raises(loop: asyncio.AbstractEventLoop) -> None:
    """In the calling thread."""

    async def fail() -> None:
        raise ZeroDivisionError("ours")

    assert run(loop, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError, match="ours"):
        run(loop, fail())


@pytest.fixture
def pool() -> Iterator[Executor]:
    """Threads for requests that block."""
    with ThreadPoolExecutor(100) as pool:
        yield pool


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_threads_bring_every_object_once(pool: Executor, concurrency: int) -> None:
    """With its own answer, whatever the concurrency; faults are answers."""

    def get(obj: ObjectInfo) -> Received:
        if obj.key == "7":
            raise S3Fault(403, "AccessDenied", "")
        return Received(obj.key.encode(), "e")

    answers = list(pump_threads(pool, get, some_objects(20), concurrency))
    assert sorted(obj.size_bytes for obj, _ in answers) == list(range(20))
    assert all(
        isinstance(answer, S3Fault) if obj.key == "7" else answer == Received(obj.key.encode(), "e")
        for obj, answer in answers
    )
    assert list(pump_threads(pool, get, [], concurrency)) == []


def test_no_more_threads_are_in_a_request_than_asked_for(pool: Executor) -> None:
    """And no fewer: all of them meet at the barrier."""
    together = threading.Barrier(5)

    def get(obj: ObjectInfo) -> Received:
        together.wait(20)
        return Received(b"", "e")

    assert len(list(pump_threads(pool, get, some_objects(20), 5))) == 20
    assert together.n_waiting == 0


@pytest.mark.parametrize(("status", "asked"), [(503, 4), (403, 20)])
def test_threads_do_not_ask_a_server_that_is_down_for_the_rest(
    pool: Executor, status: int, asked: int
) -> None:
    """As ``pump``; what was in flight when the last of the failures came may be asked for besides."""
    requests = []

    def get(obj: ObjectInfo) -> Received:
        requests.append(obj.key)
        raise S3Fault(status, "", "")

    answers = [answer for _, answer in pump_threads(pool, get, some_objects(20), 4)]
    assert asked <= len(requests) <= asked + 3
    assert answers.count(None) == 20 - len(requests)


def test_a_success_in_between_keeps_the_threads_going(pool: Executor) -> None:
    """Every second request fails: the server is busy, not down."""

    def get(obj: ObjectInfo) -> Received:
        if int(obj.key) % 2:
            raise S3Fault(503, "SlowDown", "")
        return Received(b"", "e")

    assert [answer for _, answer in pump_threads(pool, get, some_objects(30), 2)].count(None) == 0


def test_closing_leaves_what_is_in_flight_and_asks_for_no_more(pool: Executor) -> None:
    """Nobody waits for the requests that hang."""
    gate, hanging, requests = threading.Event(), threading.Semaphore(0), []

    def get(obj: ObjectInfo) -> Received:
        requests.append(obj.key)
        if obj.key != "0":
            hanging.release()
            gate.wait(20)
        return Received(b"", "e")

    answers = pump_threads(pool, get, some_objects(50), 4)
    assert next(answers)[0].key == "0"
    assert all(hanging.acquire(timeout=20) for _ in range(4))
    answers.close()
    gate.set()
    pool.shutdown()
    assert len(requests) == 5


def test_an_error_of_ours_in_a_thread_reaches_the_caller(pool: Executor) -> None:
    """It is not taken for a fault of the server, and nothing hangs."""

    def get(obj: ObjectInfo) -> Received:
        if obj.key == "2":
            raise ZeroDivisionError("ours")
        return Received(b"", "e")

    for concurrency in (1, 3, 10):
        with pytest.raises(ZeroDivisionError, match="ours"):
            list(pump_threads(pool, get, some_objects(5), concurrency))


def test_without_threads_the_caller_does_it(pool: Executor) -> None:
    """At the end of the interpreter, and where a limit of processes is reached, a pool refuses."""
    pool.shutdown()
    threads = set()

    def get(obj: ObjectInfo) -> Received:
        threads.add(threading.current_thread())
        return Received(b"", "e")

    assert len(list(pump_threads(pool, get, some_objects(5), 3))) == 5
    assert threads == {threading.current_thread()}
