"""Make many requests at once, on an event loop or in threads; yield the answers as they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zarrcache._keys import ObjectInfo
from zarrcache.origin._retry import SUSPENDED_S, WAIT_STEP_S, Backoff, note_wait
from zarrcache.origin._s3_errors import S3Error

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "PAGE_OBJECTS",
    "SLOWEST_BYTES_PER_S",
    "Answers",
    "Page",
    "Received",
    "concurrent_requests",
    "run",
]

#: Slower transfers of an object are given up, in bytes per second. The read timeout alone would
#: never end one from a server that sends a byte now and then.
SLOWEST_BYTES_PER_S = 16 * 1024
PAGE_OBJECTS = 1000  # S3's own limit for one LIST

T = TypeVar("T")


@dataclass(slots=True)
class Received:
    """Answer to a request for one object: body (empty except for GET), ETag and last change.

    The ETag is bare, see ``_content``, and empty if the server sends none; ``modified_s`` is in
    seconds since 1970, 0.0 if the server does not say.
    """

    body: Buffer
    etag: str
    modified_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Page:
    """Answer to a LIST: objects and common prefixes, with full keys.

    Attributes
    ----------
    objects : list of ObjectInfo
    prefixes : list of str
    next_token : str or None
        Token of the next page; None on the last one.
    is_full : bool
        It has as many names as the server puts on one page.
    """

    objects: list[ObjectInfo]
    prefixes: list[str]
    next_token: str | None
    is_full: bool


#: Objects with their answer, their error, or None for an object that was not requested because the
#: server is down or the node pauses.
Answers = Generator[tuple[ObjectInfo, Received | S3Error | None]]


def run(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` on ``loop``, which runs in another thread, and return its result.

    An exception in the calling thread (Ctrl-C) cancels it.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        while not future.done():
            with _step_of_a_wait(TimeoutError):
                future.exception(WAIT_STEP_S)
        return future.result()
    except BaseException:
        future.cancel()
        raise


@contextlib.contextmanager
def _step_of_a_wait(*timeouts: type[Exception]) -> Iterator[None]:
    """Around a wait of WAIT_STEP_S, so that a suspension of the process is noticed."""
    begin_s = time.monotonic()
    try:
        with contextlib.suppress(*timeouts):
            yield
    finally:
        if time.monotonic() - begin_s > WAIT_STEP_S + SUSPENDED_S:
            note_wait(begin_s, WAIT_STEP_S)


def concurrent_requests(
    where: asyncio.AbstractEventLoop | Executor,
    request: Callable[[ObjectInfo], Awaitable[Received]],
    objects: Sequence[ObjectInfo],
    concurrency: int,
    backoff: Backoff | None = None,
) -> Answers:
    """Make one request per object, up to ``concurrency`` at once; yield answers as they arrive.

    After ``concurrency`` consecutive transient errors the server is taken to be down: the remaining
    objects are not requested in this pass and are yielded with None. A store of 2,000 objects then
    costs 64 requests per pass on a dead server instead of 2,000, and a single ``read_timeout`` on a
    hanging one. The same happens when the node begins a pause: the caller waits for its end, where
    Ctrl-C can interrupt it.

    A consumer that stops early (``close()``) drops the requests that wait. Those in flight are
    cancelled on an event loop. In threads they cannot be cancelled, so ``request`` has to be short.

    Parameters
    ----------
    where : event loop or executor
        Runs the requests. The loop runs in another thread. With an executor, each of
        ``concurrency`` threads makes one request after the other, and ``request`` blocks instead of
        awaiting; if no thread can be started, the calling thread makes them all.
    request : coroutine function
        Raises ``S3Error``. Any other exception is raised to the consumer.
    backoff : Backoff, optional
        Pauses of the node. They are obeyed, and an answer that asks for fewer requests begins one.
    """
    waiting = deque(objects)
    arrived: queue.SimpleQueue[tuple[ObjectInfo, Received | S3Error | None] | BaseException] = (
        queue.SimpleQueue()
    )
    failed_in_a_row = 0
    counting = threading.Lock()

    async def requests() -> None:
        """Make one request after the other, until none is left."""
        nonlocal failed_in_a_row
        while waiting:
            try:
                obj = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            if failed_in_a_row >= concurrency or (backoff is not None and backoff.remaining_s()):
                arrived.put((obj, None))
                continue
            answer: Received | S3Error
            try:
                answer = await request(obj)
            except S3Error as error:
                answer = error
            except BaseException as exc:
                arrived.put(exc)
                raise
            with counting:
                is_failure = isinstance(answer, S3Error) and answer.is_transient
                failed_in_a_row = failed_in_a_row + 1 if is_failure else 0
            if backoff is not None:
                backoff.note(answer if isinstance(answer, S3Error) else None)
            arrived.put((obj, answer))

    started: list[Future[Any]] = []
    try:
        started += _start(where, requests, min(concurrency, len(objects)))
        for _ in objects:
            item = None
            while item is None:
                with _step_of_a_wait(queue.Empty):
                    item = arrived.get(timeout=WAIT_STEP_S)
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        waiting.clear()
        for future in started:
            future.cancel()


def _start(
    where: asyncio.AbstractEventLoop | Executor,
    requests: Callable[[], Coroutine[Any, Any, None]],
    n: int,
) -> list[Future[Any]]:
    """Run ``requests`` ``n`` times at once."""
    if not n:
        return []
    if not isinstance(where, Executor):

        async def together() -> None:
            await asyncio.gather(*(requests() for _ in range(n)), return_exceptions=True)

        return [asyncio.run_coroutine_threadsafe(together(), where)]
    started: list[Future[Any]] = []
    # RuntimeError: the interpreter is shutting down, or the user's limit of threads is reached.
    with contextlib.suppress(RuntimeError):
        while len(started) < n:
            started.append(where.submit(_run_without_waiting, requests))
    if not started:
        _run_without_waiting(requests)
    return started


def _run_without_waiting(requests: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine whose requests block. It finishes in one step because nothing is awaited."""
    coroutine = requests()
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        coroutine.throw(RuntimeError("a request in a thread has to block instead of awaiting"))
