"""The one retry policy, without a network: how often, how long, what is raised, what is logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from zarrcache.config import RetryConfig
from zarrcache.errors import OriginAccessError, OriginUnavailableError
from zarrcache.origin import _retry as retry
from zarrcache.origin._retry import RetryPolicy, TransientError, is_transient


class Clock:
    """Time that passes only when somebody waits or works."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.waits_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock of the test's own in place of ``time``, and the longest wait of each draw in place of
    chance.
    """
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(retry._random, "uniform", lambda low, high: high)
    return clock


def failing(times: int, cause: str = "SlowDown (503)") -> Callable[[], str]:
    """A function that fails ``times`` times, then says how often it was called."""
    calls = []

    def function() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise TransientError("s3://b/x", f"{cause} #{len(calls)}")
        return f"call {len(calls)}"

    return function


def test_what_succeeds_is_called_once_and_waits_for_nothing(clock: Clock) -> None:
    """No cost on the good path."""
    assert RetryPolicy(RetryConfig()).call(failing(0)) == "call 1"
    assert clock.waits_s == []


def test_transient_failures_are_tried_again_and_counted(clock: Clock) -> None:
    """``on_retry`` is called before each attempt but the first."""
    retries: list[int] = []
    assert (
        RetryPolicy(RetryConfig(attempts=5)).call(failing(3), on_retry=lambda: retries.append(1))
        == "call 4"
    )
    assert len(retries) == 3


def test_a_result_of_none_is_a_result(clock: Clock) -> None:
    """It is not taken for a failure."""
    assert RetryPolicy(RetryConfig()).call(lambda: None) is None


def test_waits_double_up_to_a_limit(clock: Clock) -> None:
    """Longest wait before each attempt: 0.5 s, doubled each time, 20 s at the most."""
    RetryPolicy(RetryConfig(attempts=9, timeout=1000)).call(failing(8))
    assert clock.waits_s == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]


def test_waits_are_drawn_from_zero_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter: processes that failed together do not come back together."""
    clock, drawn = Clock(), []
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(
        retry._random, "uniform", lambda low, high: drawn.append((low, high)) or 0.25
    )
    RetryPolicy(RetryConfig(attempts=3)).call(failing(2))
    assert drawn == [(0.0, 0.5), (0.0, 1.0)]
    assert clock.waits_s == [0.25, 0.25]


@pytest.mark.parametrize(
    ("attempts", "words"), [(1, "(1 attempt in 0.0 s)"), (3, "(3 attempts in 1.5 s)")]
)
def test_used_up_attempts_name_url_number_and_last_cause(
    clock: Clock, attempts: int, words: str
) -> None:
    """And what to do."""
    with pytest.raises(OriginUnavailableError) as caught:
        RetryPolicy(RetryConfig(attempts=attempts)).call(failing(99))
    assert str(caught.value).startswith(
        f"s3://b/x could not be read: SlowDown (503) #{attempts} {words}. Check that the server "
        "runs"
    )
    assert "cache.retry.attempts or cache.retry.timeout" in str(caught.value)


def test_the_error_comes_from_the_cause_of_the_last_failure(clock: Clock) -> None:
    """The library's own exception is in the traceback."""
    library = OSError("socket")

    def function() -> None:
        raise TransientError("s3://b/x", "Connection") from library

    with pytest.raises(OriginUnavailableError) as caught:
        RetryPolicy(RetryConfig(attempts=2)).call(function)
    assert caught.value.__cause__ is library


def test_other_errors_pass_at_once(clock: Clock) -> None:
    """A refusal is final."""
    calls = []

    def function() -> None:
        calls.append(1)
        raise OriginAccessError("no")

    with pytest.raises(OriginAccessError, match="no"):
        RetryPolicy(RetryConfig()).call(function)
    assert (len(calls), clock.waits_s) == (1, [])


def test_the_time_bound_counts_the_wait_that_would_come(clock: Clock) -> None:
    """Attempts at 0, 0.5 and 1.5 s; the next would start at 3.5 s, after the bound: nobody sleeps
    only to give up.
    """
    with pytest.raises(OriginUnavailableError, match=re.escape("(3 attempts in 1.5 s)")):
        RetryPolicy(RetryConfig(attempts=100, timeout=3.0)).call(failing(99))
    assert clock.now_s == 1001.5


def test_the_time_of_the_attempts_counts(clock: Clock) -> None:
    """A server that hangs uses the bound up, too."""

    def hang() -> None:
        clock.now_s += 15
        raise TransientError("s3://b/x", "Timeout")

    with pytest.raises(OriginUnavailableError, match=re.escape("(4 attempts in 63.5 s)")):
        RetryPolicy(RetryConfig(attempts=100, timeout=60)).call(hang)


def test_progress_starts_the_time_bound_anew(clock: Clock) -> None:
    """A slow line that works is not given up; the number of attempts is not forgiven."""
    policy = RetryPolicy(RetryConfig(attempts=4, timeout=10))
    passes = []

    def one_object_a_pass() -> None:
        for attempt in policy:
            passes.append(1)
            clock.now_s += 9
            policy.progress()
            with attempt:
                raise TransientError("s3://b/x", "ShortBody")

    with pytest.raises(OriginUnavailableError, match="4 attempts"):
        one_object_a_pass()
    assert len(passes) == 4


def test_remaining_time_ends_at_zero(clock: Clock) -> None:
    """It is a time-out of requests, which must not be negative."""
    policy = RetryPolicy(RetryConfig(timeout=10))
    assert policy.remaining_s == 10
    clock.now_s += 4
    assert policy.remaining_s == 6
    clock.now_s += 40
    assert policy.remaining_s == 0.0


def test_each_wait_is_one_log_line_with_fields(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Attempt to come, wait, URL, cause."""
    with caplog.at_level(logging.WARNING, "zarrcache.origin._retry"):
        RetryPolicy(RetryConfig(attempts=3)).call(failing(2))
    assert [record.getMessage() for record in caplog.records] == [
        "origin.retry attempt=2 wait_s=0.50 url=s3://b/x cause=SlowDown (503) #1",
        "origin.retry attempt=3 wait_s=1.00 url=s3://b/x cause=SlowDown (503) #2",
    ]


def test_only_transient_errors_are_transient() -> None:
    """Not every OSError is one."""
    assert is_transient(TransientError("u", "c"))
    assert not is_transient(ConnectionError())
    assert not is_transient(OriginUnavailableError("used up"))
