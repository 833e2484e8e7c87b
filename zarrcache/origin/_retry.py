"""The one retry policy: which failures are tried again, how often, for how long. The only import of
tenacity.

Every layer below has its own retries switched off, for they multiply: a server that answers 503 for
ever costs s3fs with its defaults 25 requests and over 30 s for one object, and the same through
this policy ``attempts`` requests.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import tenacity

from zarrcache.config import RetryConfig
from zarrcache.errors import OriginUnavailableError
from zarrcache.origin._backoff import Backoff

__all__ = ["RetryPolicy", "TransientError", "is_transient"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 20.0
_random = random.SystemRandom()


class TransientError(Exception):
    """An attempt at ``url`` failed in a way the next one may not. Internal: users see
    ``OriginUnavailableError`` once the bounds are used up.

    Attributes
    ----------
    attempt : int
        How many attempts at ``url`` there have been, where one turn of the policy does not attempt
        everything; 0: as many as turns.
    """

    def __init__(self, url: str, cause: str, *, attempt: int = 0) -> None:
        super().__init__(cause)
        self.url = url
        self.attempt = attempt


def is_transient(exc: BaseException) -> bool:
    """Whether another attempt may succeed."""
    return isinstance(exc, TransientError)


class RetryPolicy:
    """Attempts at one thing, bounded by their number and by time.

    Before attempt ``n + 1`` it waits a random time between 0 and ``min(0.5 s * 2**(n - 1), 20 s)``
    (exponential backoff with full jitter: processes that failed together do not return together),
    and as long as the node pauses.  It gives up when ``attempts`` are used, or when the next
    attempt would start more than ``timeout`` seconds after the last progress.

    One policy object is used once, in one thread::

        policy = RetryPolicy(config)
        for attempt in policy:
            failure = one_pass()
            if failure is None:
                break
            with attempt:
                raise failure        # a TransientError waits and goes on, anything else is raised
                by the next turn of the loop

    Parameters
    ----------
    config : RetryConfig
    backoff : Backoff, optional
        Pauses of the whole node.

    Raises
    ------
    OriginUnavailableError
        The bounds are used up; ``from`` the last cause.
    """

    def __init__(self, config: RetryConfig, backoff: Backoff | None = None) -> None:
        self._config = config
        self._backoff = backoff
        self._start_s = self._progress_s = time.monotonic()

    def progress(self) -> None:
        """Something arrived: the time bound starts anew. A slow line that works is not given up, a
        dead one is.
        """
        self._progress_s = time.monotonic()

    @property
    def remaining_s(self) -> float:
        """Seconds until the time bound, 0.0 at the least."""
        return max(0.0, self._progress_s + self._config.timeout - time.monotonic())

    def wait_for_turn(self, url: str) -> None:
        """Wait until the node may send requests again. Call before one that is no second attempt
        too: somebody else may have been told.

        Raises
        ------
        TransientError
            That is not before the time bound.
        """
        while (pause_s := self._pause_s()) > 0.0:
            if pause_s >= self.remaining_s:
                raise TransientError(
                    url, "SlowDown: the server has asked this node for fewer requests"
                )
            time.sleep(pause_s)

    def __iter__(self) -> Iterator[AbstractContextManager[object]]:
        retrying = tenacity.Retrying(
            sleep=lambda seconds: time.sleep(seconds),
            stop=self._is_used_up,
            wait=self._wait_s,
            retry=tenacity.retry_if_exception(is_transient),
            before_sleep=self._log,
        )
        try:
            yield from retrying
        except tenacity.RetryError as exc:
            failure = exc.last_attempt.exception()
            assert isinstance(failure, TransientError)
            attempts = failure.attempt or exc.last_attempt.attempt_number
            raise OriginUnavailableError(
                f"{failure.url} could not be read: {failure} "
                f"({attempts} {'attempt' if attempts == 1 else 'attempts'} in "
                f"{time.monotonic() - self._start_s:.1f} s). "
                "Check that the server runs and is reachable from this node; for a slow or busy "
                "server raise cache.retry.attempts "
                "or cache.retry.timeout."
            ) from (failure.__cause__ or failure)

    def call(self, function: Callable[[], T], *, on_retry: Callable[[], None] = lambda: None) -> T:
        """``function()``, tried again while it raises ``TransientError``; ``on_retry`` is called
        before each attempt but the first.
        """
        result: list[T] = []
        for number, attempt in enumerate(self):
            if number:
                on_retry()
            with attempt:
                result.append(function())
            if result:
                break
        return result[0]

    def _is_used_up(self, state: tenacity.RetryCallState) -> bool:
        # The coming wait counts: sleeping only to give up afterwards helps nobody.
        return _attempt(state) >= self._config.attempts or state.upcoming_sleep >= self.remaining_s

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        # Not from the shared generator: a blip of the network must not change a seeded training
        # run.
        return max(
            self._pause_s(),
            _random.uniform(0.0, min(FIRST_WAIT_S * 2.0 ** (_attempt(state) - 1), LONGEST_WAIT_S)),
        )

    def _pause_s(self) -> float:
        """What is left of a pause of the node, and a little more, other for each: those who waited
        together do not return together.
        """
        pause_s = 0.0 if self._backoff is None else self._backoff.remaining_s()
        return pause_s + _random.uniform(0.0, FIRST_WAIT_S) if pause_s else 0.0

    def _log(self, state: tenacity.RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome is not None else None
        url = getattr(failure, "url", "")
        logger.warning(
            "origin.retry attempt=%d wait_s=%.2f url=%s cause=%s",
            _attempt(state) + 1,
            state.upcoming_sleep,
            url,
            failure,
        )


def _attempt(state: tenacity.RetryCallState) -> int:
    """How many attempts there have been at what has just failed."""
    failure = state.outcome.exception() if state.outcome is not None else None
    return getattr(failure, "attempt", 0) or state.attempt_number
