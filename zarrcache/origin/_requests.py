"""Send requests: many at once, again after a transient error, and none while the node pauses.

The only importer of tenacity. Retries are switched off in every library below, because they
multiply: against a server that always answers 503, s3fs with its defaults sends 25 requests in more
than 30 s for one object; with this policy it sends ``attempts``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import tenacity

from zarrcache._keys import ObjectInfo
from zarrcache._marks import set_mark
from zarrcache.config import RetryConfig
from zarrcache.errors import OriginUnavailableError
from zarrcache.origin._in_flight import InFlight
from zarrcache.origin._s3_errors import S3Error, TransientError
from zarrcache.stats import Counters

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "PAGE_OBJECTS",
    "SLOWEST_BYTES_PER_S",
    "SUSPENDED_S",
    "WAIT_STEP_S",
    "Answers",
    "Backoff",
    "Page",
    "Received",
    "RetryPolicy",
    "concurrent_requests",
    "note_wait",
    "report_progress",
    "reporting_progress",
    "unsent",
    "with_second_requests",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A")

#: Longest wait before the second attempt, in seconds. It doubles with each attempt.
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 20.0
#: Length of a node's first pause, in seconds. It doubles while the server stays overloaded.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 20.0
#: After this many answers the server has recovered, and the next pause is short again.
_RECOVERED = 10
#: If the last pause ended longer ago than this, in seconds, the next one is short.
_FORGET_S = 60.0
#: Interval, in seconds, at which a process checks for a pause set by another one: one lstat, 2 us.
_LOOK_S = 0.1

#: Seconds of one step of a wait for an answer. See :func:`note_wait`.
WAIT_STEP_S = 0.25
#: A step that lasts this much longer, in seconds, shows that the process was suspended.
SUSPENDED_S = 1.0

_PAUSED = "SlowDown: the server has asked this node for fewer requests"

# Not the shared generator: a network failure must not change the numbers of a seeded training run.
_random = random.SystemRandom()


class _Suspension(threading.local):
    """Seconds for which waits of this thread were suspended. Differences count, not the value."""

    total_s = 0.0


_suspension = _Suspension()
#: Called with seconds for which no further sign of life is to be expected.
_reported_to: ContextVar[Callable[[float], None] | None] = ContextVar("progress", default=None)


def note_wait(begin_s: float, limit_s: float) -> None:
    """Note that a wait of at most ``limit_s``, which began at ``begin_s``, has ended.

    If it lasted much longer, the process was suspended (SIGSTOP by a batch system, a frozen
    container, a virtual machine that was moved). ``time.monotonic`` counts that time; the time
    bound of this thread's retries must not, or a sample would fail because its process slept.
    """
    over_s = time.monotonic() - begin_s - limit_s
    if over_s > SUSPENDED_S:
        _suspension.total_s += over_s


def _now_s() -> float:
    """Monotonic seconds of this thread without those of a suspension."""
    return time.monotonic() - _suspension.total_s


def _sleep(seconds: float) -> None:
    begin_s = time.monotonic()
    time.sleep(seconds)
    note_wait(begin_s, seconds)


@contextlib.contextmanager
def reporting_progress(report: Callable[[float], None]) -> Iterator[None]:
    """In this block, reads of this thread call ``report`` at each sign that they proceed.

    A sign is an answer of the origin, also one that asks for a retry. The argument is the number of
    seconds for which none is to be expected, because the thread pauses or a large object arrives.
    """
    token = _reported_to.set(report)
    try:
        yield
    finally:
        _reported_to.reset(token)


def report_progress(silent_s: float = 0.0) -> None:
    """Report that a read of this thread proceeds; see :func:`reporting_progress`."""
    report = _reported_to.get()
    if report is not None:
        report(silent_s)


@dataclass(slots=True)
class _Pause:
    """The last pause of this process.

    It is replaced, and never changed except for ``served``, so that it needs no lock: a fork could
    leave one locked.
    """

    until_s: float  # time.monotonic()
    length_s: float
    served: int = 0  # answers since


#: The last pause per endpoint: all readers of a process share it.
_pauses: dict[str, _Pause] = {}


class Backoff:
    """Pauses of all requests to one endpoint, on the whole node.

    S3 counts the requests of all processes together. If only the process that got SlowDown paused,
    the others would keep the server overloaded until the attempts of all are used up. With
    ``directory``, all processes of the node that use it pause; without it, the threads of this one.

    Cheap to create and picklable. Safe from any thread or process, and on both sides of a fork.

    Parameters
    ----------
    endpoint : str
        ``Origin.identity``.
    directory : Path, optional
        An existing directory that the node's processes share. A pause is an empty file in it, with
        the end of the pause as modification time and its beginning as access time. Setting or
        reading it is one system call, and there is no content that could be torn or forged. An end
        more than ``LONGEST_PAUSE_S`` ahead is ignored.
    """

    def __init__(self, endpoint: str, directory: Path | None = None) -> None:
        self._endpoint = endpoint
        self._path = (
            None
            if directory is None
            else directory / f"slowdown-{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}"
        )
        self._look_s = 0.0

    def remaining_s(self) -> float:
        """Seconds until the next request may be sent; 0.0 without a pause."""
        now_s = time.monotonic()
        pause = _pauses.get(self._endpoint)
        if pause is not None and now_s < pause.until_s:
            return pause.until_s - now_s
        if self._path is None or now_s < self._look_s:
            return 0.0
        self._look_s = now_s + _LOOK_S
        stored = self._stored()
        if stored is None:
            return 0.0
        remaining_s, length_s = stored
        _pauses[self._endpoint] = _Pause(now_s + remaining_s, length_s)
        return remaining_s

    def slow_down(self) -> None:
        """Begin a pause, because the server has answered that it gets too many requests.

        During a pause this has no effect: the requests that were in flight when it began get the
        same answer.
        """
        if self.remaining_s():
            return
        now_s = time.monotonic()
        last = _pauses.get(self._endpoint)
        length_s = FIRST_PAUSE_S
        if last is not None and last.served < _RECOVERED and now_s - last.until_s <= _FORGET_S:
            length_s = min(2 * last.length_s, LONGEST_PAUSE_S)
        _pauses[self._endpoint] = _Pause(now_s + length_s, length_s)
        logger.warning("origin.slow_down wait_s=%.1f endpoint=%s", length_s, self._endpoint)
        if self._path is not None:
            try:
                self._store(length_s)
            except OSError as exc:  # full disk, or the directory is gone: only this process pauses
                logger.info("cannot pause the other processes of this node: %s", exc)

    def served(self) -> None:
        """Count an answer of the server towards its recovery."""
        pause = _pauses.get(self._endpoint)
        if pause is not None:
            pause.served += 1

    def note(self, error: S3Error | None) -> None:
        """Record the end of a request: an error of the server, or None for an answer."""
        if error is None:
            self.served()
        elif error.is_slow_down:
            self.slow_down()

    def _stored(self) -> tuple[float, float] | None:
        """Remaining and total length of the node's pause in seconds; None without a pause."""
        assert self._path is not None
        try:
            status = os.lstat(self._path)
        except OSError:
            return None
        remaining_s = status.st_mtime - time.time()
        if not 0.0 < remaining_s <= LONGEST_PAUSE_S:
            return None
        length_s = status.st_mtime - status.st_atime
        return remaining_s, min(max(length_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)

    def _store(self, length_s: float) -> None:
        assert self._path is not None
        now_s = time.time()
        set_mark(self._path, accessed_s=now_s, modified_s=now_s + length_s)


class RetryPolicy:
    """Attempts at one operation, bounded by their number and by time.

    Before attempt ``n + 1`` it waits a random time between 0 and ``min(0.5 s * 2**(n - 1), 20 s)``
    (exponential backoff with full jitter, so that processes do not retry in step), and at least
    until the node's pause is over. It gives up when ``attempts`` are used up, or when the next
    attempt would start more than ``timeout`` seconds after the last progress.

    A policy object is used for one operation, in one thread: `call_all` for requests, or as an
    iterator of attempts, which knows of no pauses.

    Parameters
    ----------
    config : RetryConfig
    backoff : Backoff, optional
        Pauses of the whole node.
    verb, advice : str
        Parts of the error message: what could not be done, and what to do about it.

    Raises
    ------
    OriginUnavailableError
        The attempts or the time are used up; ``from`` the last cause.
    """

    def __init__(
        self,
        config: RetryConfig,
        backoff: Backoff | None = None,
        *,
        verb: str = "read",
        advice: str = "Check that the server runs and is reachable from this node; for a slow or "
        "busy server raise cache.retry.attempts or cache.retry.timeout.",
    ) -> None:
        self._config = config
        self._backoff = backoff
        self._verb = verb
        self._advice = advice
        self._start_s = self._progress_s = _now_s()

    def call_all(
        self,
        objects: Iterable[ObjectInfo],
        send: Callable[[list[ObjectInfo], float], Generator[tuple[ObjectInfo, A | None]]],
        accept: Callable[[ObjectInfo, A], T | Exception | None],
        *,
        url_of: Callable[[ObjectInfo], str],
        counters: Counters | None = None,
    ) -> Iterator[T]:
        """Request every object, and request again what failed with ``TransientError``.

        One pass requests all objects that are missing. Attempts are counted per object. A pass that
        a pause of the node cuts short without a failure does not count.

        Parameters
        ----------
        objects : iterable of ObjectInfo
            With distinct keys.
        send : callable
            Called with the missing objects and the seconds that are left; sends one request per
            object and yields the answers. An object may be answered twice; None means that it was
            not requested in this pass.
        accept : callable
            Called with an object and its answer; returns the result to yield, or an error:
            ``TransientError`` to request the object again, any other exception to raise. None: the
            object is requested again, by other means, within the same attempt.
        url_of : callable
            URL of an object.
        counters : Counters, optional
            Counts requests, retries, and fetched bytes (sizes of the objects).
        """
        missing = {obj.key: obj for obj in objects}
        attempts: Counter[str] = Counter()

        def one_pass() -> Generator[T, None, TransientError | None]:
            failure: TransientError | None = None
            answered: list[str] = []
            nbytes = 0
            if not self._wait_for_pause():
                return TransientError(url_of(next(iter(missing.values()))), _PAUSED)
            try:
                with contextlib.closing(send(list(missing.values()), self.remaining_s)) as answers:
                    for obj, answer in answers:
                        if answer is None:
                            continue
                        result = accept(obj, answer)
                        if result is None:
                            continue
                        answered.append(obj.key)
                        if isinstance(result, TransientError):
                            result.attempt = attempts[obj.key] + 1
                            if failure is None or result.attempt > failure.attempt:
                                failure = result
                        elif isinstance(result, Exception):
                            raise result
                        else:
                            del missing[obj.key]
                            nbytes += obj.size_bytes
                            yield result
                            self.progress()
            finally:
                # Once per pass: the counters of a node are in shared memory.
                if counters is not None:
                    repeated = len(answered) - len(set(answered) - attempts.keys())
                    counters.add(requests=len(answered), retries=repeated, fetched_bytes=nbytes)
                # An object that was late and requested twice in this pass counts as one attempt.
                attempts.update(set(answered))
            return failure

        for attempt in self:
            failure = None
            while missing and failure is None:
                failure = yield from one_pass()
            # A failure may remain from an object that an engine has requested twice in one pass.
            if not missing:
                return
            with attempt:
                assert failure is not None
                raise failure

    def progress(self) -> None:
        """Restart the time bound, so that a slow but working connection is not given up."""
        self._progress_s = _now_s()
        report_progress()

    @property
    def remaining_s(self) -> float:
        """Seconds until the time bound, at least 0.0."""
        return max(0.0, self._progress_s + self._config.timeout - _now_s())

    def __iter__(self) -> Iterator[AbstractContextManager[object]]:
        """Attempts: context managers that catch a ``TransientError`` if another one follows."""
        retrying = tenacity.Retrying(
            sleep=_sleep,
            stop=self._is_used_up,
            wait=self._wait_s,
            retry=tenacity.retry_if_exception_type(TransientError),
            before_sleep=_log,
        )
        try:
            yield from retrying
        except tenacity.RetryError as exc:
            failure = exc.last_attempt.exception()
            assert isinstance(failure, TransientError)
            attempts = failure.attempt or exc.last_attempt.attempt_number
            raise OriginUnavailableError(
                f"{failure.url} could not be {self._verb}: {failure} "
                f"({attempts} {'attempt' if attempts == 1 else 'attempts'} in "
                f"{_now_s() - self._start_s:.1f} s). {self._advice}"
            ) from (failure.__cause__ or failure)

    def _wait_for_pause(self) -> bool:
        """Wait until the node may send requests again; False if that exceeds the time bound.

        Also called before the first attempt, because another process may have begun the pause.
        """
        while (pause_s := self._pause_s()) > 0.0:
            if pause_s >= self.remaining_s:
                return False
            report_progress(pause_s)
            _sleep(pause_s)
        return True

    def _pause_s(self) -> float:
        """Seconds left of the node's pause, plus jitter so that processes do not resume in step."""
        pause_s = 0.0 if self._backoff is None else self._backoff.remaining_s()
        return pause_s + _random.uniform(0.0, FIRST_WAIT_S) if pause_s else 0.0

    def _is_used_up(self, state: tenacity.RetryCallState) -> bool:
        # The coming wait counts: do not sleep only to give up afterwards.
        return _attempt(state) >= self._config.attempts or state.upcoming_sleep >= self.remaining_s

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        longest_s = min(FIRST_WAIT_S * 2 ** (_attempt(state) - 1), LONGEST_WAIT_S)
        return max(self._pause_s(), _random.uniform(0.0, longest_s))


def _log(state: tenacity.RetryCallState) -> None:
    failure = state.outcome.exception() if state.outcome is not None else None
    report_progress(state.upcoming_sleep)
    logger.warning(
        "origin.retry attempt=%d wait_s=%.2f url=%s cause=%s",
        _attempt(state) + 1,
        state.upcoming_sleep,
        getattr(failure, "url", ""),
        failure,
    )


def _attempt(state: tenacity.RetryCallState) -> int:
    """Number of attempts made at the request that has just failed."""
    failure = state.outcome.exception() if state.outcome is not None else None
    return getattr(failure, "attempt", 0) or state.attempt_number


# -- many at once

#: Slower transfers of an object are given up, in bytes per second. The read timeout alone never
#: ends one from a server that sends single bytes.
SLOWEST_BYTES_PER_S = 16 * 1024
PAGE_OBJECTS = 1000  # S3's own limit for one LIST
#: After this many consecutive transient errors no further object is requested in a pass.
_DOWN = 64


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
Answers: TypeAlias = "Generator[tuple[ObjectInfo, Received | S3Error | None]]"


def concurrent_requests(
    where: asyncio.AbstractEventLoop | Executor,
    request: Callable[[ObjectInfo], Awaitable[Received]],
    objects: Sequence[ObjectInfo],
    in_flight: InFlight,
    backoff: Backoff | None = None,
) -> Answers:
    """Make one request per object, up to ``in_flight`` at once; yield answers as they arrive.

    After as many consecutive transient errors, at most 64, the server is taken to be down: the
    remaining objects are not requested in this pass and are yielded with None. A store of 2,000
    objects then costs 192 requests per pass on a dead server instead of 2,000, and a single
    ``read_timeout`` on a hanging one. The same happens when the node begins a pause: the caller
    waits for its end, where Ctrl-C can interrupt it.

    A consumer that stops early (``close()``) drops the requests that wait. Those in flight are
    cancelled on an event loop. In threads they cannot be cancelled, so ``request`` has to be short.

    Parameters
    ----------
    where : event loop or executor
        Runs the requests. The loop runs in another thread. With an executor, each of ``in_flight``
        threads makes one request after the other, and ``request`` blocks instead of awaiting; if no
        thread can be started, the calling thread makes them all.
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

    async def requests(number: int) -> None:
        """Make one request after the other, until none is left or fewer may be in flight."""
        nonlocal failed_in_a_row
        while waiting and number < most():
            try:
                obj = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            if failed_in_a_row >= most_failures or (backoff is not None and backoff.remaining_s()):
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
    with in_flight.of_a_fetch() as most:
        most_failures = min(most(), _DOWN)
        try:
            started += _start(where, requests, min(most(), len(objects)))
            for _ in objects:
                item = None
                while item is None:
                    begin_s = time.monotonic()
                    with contextlib.suppress(queue.Empty):
                        item = arrived.get(timeout=WAIT_STEP_S)
                    note_wait(begin_s, WAIT_STEP_S)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            waiting.clear()
            for future in started:
                future.cancel()


def unsent(obj: ObjectInfo, error: S3Error) -> Answers:
    """The answers of requests that cannot be sent."""
    yield obj, error


def with_second_requests(
    answers: Answers, again: Callable[[Sequence[ObjectInfo]], Answers]
) -> Answers:
    """Yield ``answers``, then those to second requests for objects whose answer was a timeout.

    Such an object is yielded twice. What was not requested after the first timeout, because the
    server seemed to be down, is requested as well.

    Parameters
    ----------
    again : callable
        Called with the objects, if there are any; sends the second requests.
    """
    late: list[ObjectInfo] = []
    with contextlib.closing(answers):
        for obj, answer in answers:
            if (isinstance(answer, S3Error) and answer.is_timeout) or (late and answer is None):
                late.append(obj)
            if answer is not None or not late:
                yield obj, answer
    if late:
        yield from again(late)


def _start(
    where: asyncio.AbstractEventLoop | Executor,
    requests: Callable[[int], Coroutine[Any, Any, None]],
    n: int,
) -> list[Future[Any]]:
    """Run ``requests(0)`` to ``requests(n - 1)`` at once."""
    if not n:
        return []
    if not isinstance(where, Executor):

        async def together() -> None:
            await asyncio.gather(*map(requests, range(n)), return_exceptions=True)

        return [asyncio.run_coroutine_threadsafe(together(), where)]
    started: list[Future[Any]] = []
    # RuntimeError: the interpreter is shutting down, or the user's limit of threads is reached.
    with contextlib.suppress(RuntimeError):
        while len(started) < n:
            started.append(where.submit(_run_without_waiting, requests, len(started)))
    if not started:
        _run_without_waiting(requests, 0)
    return started


def _run_without_waiting(requests: Callable[[int], Coroutine[Any, Any, None]], number: int) -> None:
    """Run a coroutine whose requests block. It finishes in one step because nothing is awaited."""
    coroutine = requests(number)
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
        coroutine.throw(RuntimeError("a request in a thread has to block instead of awaiting"))
