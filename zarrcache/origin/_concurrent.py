"""Many requests in flight, on the I/O loop or in threads, answers handed over one by one to the
calling thread as they arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zarrcache._keys import ObjectInfo
from zarrcache.origin._backoff import Backoff
from zarrcache.origin._s3_errors import S3Fault

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "PAGE_OBJECTS",
    "SLOWEST_BYTES_PER_S",
    "Page",
    "Received",
    "note",
    "pump",
    "pump_threads",
    "run",
]

#: Slowest transfer of one object that is not given up. With the read timeout it bounds a server
#: that sends a byte now and then.
SLOWEST_BYTES_PER_S = 16 * 1024
PAGE_OBJECTS = 1000  # S3's own limit for one LIST

T = TypeVar("T")


@dataclass(slots=True)
class Received:
    """The body of one object and the version that the server says it is."""

    body: Buffer
    etag: str


@dataclass(frozen=True, slots=True)
class Page:
    """An answer to a LIST: objects and common prefixes with their full keys, and the token of the
    next page (None on the last).
    """

    objects: list[ObjectInfo]
    prefixes: list[str]
    next_token: str | None


def run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Result of ``coroutine``, run on ``loop`` in its own thread; it is cancelled if the waiting is
    interrupted.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _is_paused(backoff: Backoff | None) -> bool:
    """Whether nothing is to be asked now."""
    return backoff is not None and backoff.remaining_s() > 0.0


def note(answer: object, backoff: Backoff | None) -> None:
    """Tell ``backoff`` what came: an ``S3Fault``, or anything else for an answer that was one."""
    if backoff is None:
        return
    if not isinstance(answer, S3Fault):
        backoff.served()
    elif answer.is_slow_down:
        backoff.told()


def pump(
    loop: asyncio.AbstractEventLoop,
    get: Callable[[ObjectInfo], Awaitable[Received]],
    objects: Sequence[ObjectInfo],
    concurrency: int,
    backoff: Backoff | None = None,
) -> Generator[tuple[ObjectInfo, Received | S3Fault | None]]:
    """One request for each object, ``concurrency`` at a time, answers in the order of arrival.

    When as many requests in a row as there are in flight have failed and may be tried again, the
    server is taken to be down: the rest is not asked for in this pass and comes back as None.  A
    store of 2,000 objects then costs a dead server 64 requests a pass, not 2,000, and a hanging one
    a single ``read_timeout``.  The same when ``backoff`` begins a pause, whoever was told to:
    nobody waits in here, where nothing can interrupt it.

    A consumer that stops early (``close()``) cancels what is in flight.
    """
    arrived: queue.SimpleQueue[
        tuple[ObjectInfo, Received | S3Fault | None] | BaseException | None
    ] = queue.SimpleQueue()
    todo = iter(objects)
    failed_in_a_row = 0

    async def worker() -> None:
        nonlocal failed_in_a_row
        for obj in todo:
            if failed_in_a_row >= concurrency or _is_paused(backoff):
                arrived.put((obj, None))
                continue
            answer: Received | S3Fault
            try:
                answer = await get(obj)
            except S3Fault as fault:
                answer = fault
            failed_in_a_row = (
                failed_in_a_row + 1 if isinstance(answer, S3Fault) and answer.is_transient else 0
            )
            note(answer, backoff)
            arrived.put((obj, answer))

    async def all_workers() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(objects))):
                    group.create_task(worker())
        except BaseExceptionGroup as exc:
            # a fault of ours, not of the server: the caller has to see it
            arrived.put(exc.exceptions[0])
        finally:
            arrived.put(None)

    future = asyncio.run_coroutine_threadsafe(all_workers(), loop)
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        future.cancel()


def pump_threads(
    pool: Executor,
    get: Callable[[ObjectInfo], Received],
    objects: Sequence[ObjectInfo],
    concurrency: int,
    backoff: Backoff | None = None,
) -> Generator[tuple[ObjectInfo, Received | S3Fault | None]]:
    """As ``pump``, for a ``get`` that blocks: ``concurrency`` threads of ``pool`` are in one each.

    What is in flight when a consumer stops early cannot be cancelled: it ends by itself, unheard.
    So ``get`` has to end soon. Where no thread may be started any more, the calling thread does
    what is to be done.
    """
    arrived: queue.SimpleQueue[
        tuple[ObjectInfo, Received | S3Fault | None] | BaseException | None
    ] = queue.SimpleQueue()
    todo = deque(objects)
    failed_in_a_row = 0
    counting = threading.Lock()

    def worker() -> None:
        nonlocal failed_in_a_row
        while todo:
            try:
                obj = todo.popleft()
            except IndexError:  # another thread was quicker
                return
            if failed_in_a_row >= concurrency or _is_paused(backoff):
                arrived.put((obj, None))
                continue
            answer: Received | S3Fault
            try:
                answer = get(obj)
            except S3Fault as fault:
                answer = fault
            with counting:
                failed_in_a_row = (
                    failed_in_a_row + 1
                    if isinstance(answer, S3Fault) and answer.is_transient
                    else 0
                )
            note(answer, backoff)
            arrived.put((obj, answer))

    try:
        workers = 0
        # the interpreter is going, or this user has as many threads as are allowed
        with contextlib.suppress(RuntimeError):
            while workers < min(concurrency, len(objects)):
                # A fault of ours, not of the server, ends a worker: the caller has to see it.
                pool.submit(worker).add_done_callback(lambda ended: arrived.put(ended.exception()))
                workers += 1
        if not workers:
            worker()
        for _ in objects:
            while (item := arrived.get()) is None:
                pass
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        todo.clear()
