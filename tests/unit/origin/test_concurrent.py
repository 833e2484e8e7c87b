"""Concurrent requests, on an event loop and in threads. The requests are functions of the tests."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from zarrcache._keys import ObjectInfo
from zarrcache.origin import _requests as retry
from zarrcache.origin._in_flight import InFlight
from zarrcache.origin._requests import Answers, Backoff, Received, concurrent_requests
from zarrcache.origin._s3_errors import S3Error

Where = asyncio.AbstractEventLoop | Executor
DEADLINE_S = 20.0


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


@pytest.fixture
def pool() -> Iterator[Executor]:
    """Threads for requests that block."""
    with ThreadPoolExecutor(100) as pool:
        yield pool


@pytest.fixture(params=["loop", "pool"])
def where(request: pytest.FixtureRequest) -> Where:
    """An event loop and a pool of threads in turn."""
    where: Where = request.getfixturevalue(request.param)
    return where


def some_objects(n: int) -> list[ObjectInfo]:
    """Numbered objects."""
    return [ObjectInfo(str(i), i, "e") for i in range(n)]


def make(
    where: Where, get: Callable[[ObjectInfo], Received], n_objects: int, concurrency: int
) -> Answers:
    """Requests that call ``get``. On a loop they let the others run first."""

    async def request(obj: ObjectInfo) -> Received:
        if not isinstance(where, Executor):
            await asyncio.sleep(0)
        return get(obj)

    return concurrent_requests(where, request, some_objects(n_objects), InFlight(concurrency))


def answered(_: ObjectInfo) -> Received:
    """A server that works."""
    return Received(b"", "e")


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_every_object_comes_once_with_its_own_answer(where: Where, concurrency: int) -> None:
    answers = list(make(where, lambda obj: Received(obj.key.encode(), "e"), 20, concurrency))
    assert sorted(obj.size_bytes for obj, _ in answers) == list(range(20))
    assert all(answer == Received(obj.key.encode(), "e") for obj, answer in answers)


def test_without_objects_it_ends_at_once(where: Where) -> None:
    assert list(make(where, answered, 0, 4)) == []


def test_answers_come_in_the_order_of_arrival(loop: asyncio.AbstractEventLoop) -> None:
    """The first object does not delay the others."""
    gate = asyncio.Event()

    async def request(obj: ObjectInfo) -> Received:
        if obj.key == "0":
            await gate.wait()
        if obj.key == "3":
            gate.set()
        return Received(b"", "e")

    keys = [obj.key for obj, _ in concurrent_requests(loop, request, some_objects(4), InFlight(2))]
    assert keys[-1] == "0"


def test_on_a_loop_as_many_requests_are_in_flight_as_allowed(
    loop: asyncio.AbstractEventLoop,
) -> None:
    now = peak = 0

    async def request(obj: ObjectInfo) -> Received:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await asyncio.sleep(0.001)
        now -= 1
        return Received(b"", "e")

    assert len(list(concurrent_requests(loop, request, some_objects(50), InFlight(7)))) == 50
    assert peak == 7


def test_in_threads_as_many_requests_are_in_flight_as_allowed(pool: Executor) -> None:
    """All of them meet at the barrier."""
    together = threading.Barrier(5)

    def get(obj: ObjectInfo) -> Received:
        together.wait(DEADLINE_S)
        return Received(b"", "e")

    assert len(list(make(pool, get, 20, 5))) == 20
    assert together.n_waiting == 0


def test_an_s3_error_is_the_answer_to_its_own_object(where: Where) -> None:
    def get(obj: ObjectInfo) -> Received:
        if obj.key == "1":
            raise S3Error(403, "AccessDenied", "")
        return Received(b"", "e")

    answers = {obj.key: answer for obj, answer in make(where, get, 4, 2)}
    assert isinstance(answers["1"], S3Error)
    assert sum(isinstance(answer, Received) for answer in answers.values()) == 3


@pytest.mark.parametrize(("status", "expected"), [(503, 4), (403, 20)])
def test_a_server_that_is_down_gets_no_more_requests(
    where: Where, status: int, expected: int
) -> None:
    """As many transient errors in a row as may be in flight end the pass; the other objects come
    back unrequested. A final error says nothing about the other objects.
    """
    requests = []

    def get(obj: ObjectInfo) -> Received:
        requests.append(obj.key)
        raise S3Error(status, "", "")

    answers = [answer for _, answer in make(where, get, 20, 4)]
    # those in flight when the last of the failures arrives
    assert expected <= len(requests) <= expected + 3
    assert len(answers) == 20
    assert answers.count(None) == 20 - len(requests)


def test_a_success_in_between_keeps_the_pass_going(where: Where) -> None:
    """Every second request fails: the server is busy, not down."""

    def get(obj: ObjectInfo) -> Received:
        if int(obj.key) % 2:
            raise S3Error(503, "SlowDown", "")
        return Received(b"", "e")

    assert [answer for _, answer in make(where, get, 30, 2)].count(None) == 0


def test_closing_cancels_requests_in_flight_on_a_loop(loop: asyncio.AbstractEventLoop) -> None:
    cancelled = threading.Semaphore(0)

    async def request(obj: ObjectInfo) -> Received:
        if obj.key == "0":
            return Received(b"", "e")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.release()
            raise
        raise AssertionError

    answers = concurrent_requests(loop, request, some_objects(10), InFlight(4))
    assert next(answers)[0].key == "0"
    answers.close()
    assert all(cancelled.acquire(timeout=DEADLINE_S) for _ in range(4))


def test_closing_leaves_requests_in_flight_in_threads_and_starts_no_more(pool: Executor) -> None:
    gate, hanging, requests = threading.Event(), threading.Semaphore(0), []

    def get(obj: ObjectInfo) -> Received:
        requests.append(obj.key)
        if obj.key != "0":
            hanging.release()
            gate.wait(DEADLINE_S)
        return Received(b"", "e")

    answers = make(pool, get, 50, 4)
    assert next(answers)[0].key == "0"
    assert all(hanging.acquire(timeout=DEADLINE_S) for _ in range(4))
    answers.close()
    gate.set()
    pool.shutdown()
    assert len(requests) == 5


@pytest.mark.parametrize("concurrency", [1, 3, 10])
def test_an_error_of_our_own_reaches_the_consumer(where: Where, concurrency: int) -> None:
    """It is not taken for an error of the server, and nothing hangs."""

    def get(obj: ObjectInfo) -> Received:
        if obj.key == "2":
            raise ZeroDivisionError("ours")
        return Received(b"", "e")

    with pytest.raises(ZeroDivisionError, match="ours"):
        list(make(where, get, 5, concurrency))


def test_without_threads_the_calling_thread_makes_the_requests(pool: Executor) -> None:
    """A pool refuses at the end of the interpreter, and at the limit of processes."""
    pool.shutdown()
    threads = set()

    def get(obj: ObjectInfo) -> Received:
        threads.add(threading.current_thread())
        return Received(b"", "e")

    assert len(list(make(pool, get, 5, 3))) == 5
    assert threads == {threading.current_thread()}


def test_a_request_in_a_thread_that_awaits_is_an_error_and_does_not_hang(pool: Executor) -> None:
    async def request(obj: ObjectInfo) -> Received:
        await asyncio.sleep(0)
        return Received(b"", "e")

    with pytest.raises(RuntimeError, match="has to block instead of awaiting"):
        list(concurrent_requests(pool, request, some_objects(3), InFlight(2)))


def test_during_a_pause_of_the_node_nothing_is_requested(where: Where) -> None:
    """The consumer gets every object back at once: waiting is for the caller of the loop."""
    backoff = Backoff(uuid.uuid4().hex)
    backoff.slow_down()

    async def request(obj: ObjectInfo) -> Received:
        raise AssertionError

    answers = list(concurrent_requests(where, request, some_objects(5), InFlight(2), backoff))
    assert [answer for _, answer in answers] == [None] * 5


def test_an_answer_that_asks_for_fewer_requests_begins_a_pause_of_the_node(where: Where) -> None:
    backoff = Backoff(uuid.uuid4().hex)

    async def request(obj: ObjectInfo) -> Received:
        if obj.key == "1":
            raise S3Error(503, "SlowDown", "")
        return Received(b"", "e")

    answers = list(concurrent_requests(where, request, some_objects(4), InFlight(1), backoff))
    assert [type(answer) for _, answer in answers] == [Received, S3Error, type(None), type(None)]
    assert backoff.remaining_s() > 0.0


def test_answers_count_as_recovery_of_the_server(
    where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the next pause would be twice as long."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    backoff = Backoff(uuid.uuid4().hex)
    backoff.slow_down()
    while backoff.remaining_s():
        time.sleep(0.01)

    async def request(obj: ObjectInfo) -> Received:
        return Received(b"", "e")

    assert (
        len(list(concurrent_requests(where, request, some_objects(10), InFlight(4), backoff))) == 10
    )
    backoff.slow_down()
    assert backoff.remaining_s() <= 0.01
