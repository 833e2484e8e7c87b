"""The retry policy, without a network: number of attempts, waits, errors, log lines."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable

import pytest

from tests.support.attempts import call
from zarrcache.config import RetryConfig
from zarrcache.errors import OriginAccessError, OriginUnavailableError
from zarrcache.origin import _requests as retry
from zarrcache.origin._requests import RetryPolicy
from zarrcache.origin._s3_errors import TransientError

URL = "s3://b/x"


class Clock:
    """Time that passes only in ``sleep`` and by assignment."""

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
    """A clock of the test's own instead of ``time``; waits are the longest possible."""
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(retry._random, "uniform", lambda low, high: high)
    return clock


def failing(times: int, cause: str = "SlowDown (503)") -> Callable[[float], str]:
    """A function that fails ``times`` times, then returns how often it was called."""
    calls = []

    def function(_remaining_s: float) -> str:
        calls.append(1)
        if len(calls) <= times:
            raise TransientError("s3://b/x", f"{cause} #{len(calls)}")
        return f"call {len(calls)}"

    return function


def test_a_success_is_called_once_and_does_not_wait(clock: Clock) -> None:
    assert call(RetryPolicy(RetryConfig()), failing(0), URL) == "call 1"
    assert clock.waits_s == []


def test_transient_failures_are_tried_again(clock: Clock) -> None:
    assert call(RetryPolicy(RetryConfig(attempts=5)), failing(3), URL) == "call 4"


def test_a_result_of_none_is_a_result(clock: Clock) -> None:
    assert call(RetryPolicy(RetryConfig()), lambda _: None, URL) is None


def test_waits_double_up_to_a_limit(clock: Clock) -> None:
    call(RetryPolicy(RetryConfig(attempts=9, timeout=1000)), failing(8), URL)
    assert clock.waits_s == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0]


def test_waits_are_drawn_from_zero_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter: processes that failed together do not return together."""
    clock, drawn = Clock(), []
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(
        retry._random, "uniform", lambda low, high: drawn.append((low, high)) or 0.25
    )
    call(RetryPolicy(RetryConfig(attempts=3)), failing(2), URL)
    assert drawn == [(0.0, 0.5), (0.0, 1.0)]
    assert clock.waits_s == [0.25, 0.25]


@pytest.mark.parametrize(
    ("attempts", "words"), [(1, "(1 attempt in 0.0 s)"), (3, "(3 attempts in 1.5 s)")]
)
def test_used_up_attempts_name_url_number_and_last_cause(
    clock: Clock, attempts: int, words: str
) -> None:
    with pytest.raises(OriginUnavailableError) as caught:
        call(RetryPolicy(RetryConfig(attempts=attempts)), failing(99), URL)
    assert str(caught.value).startswith(
        f"s3://b/x could not be read: SlowDown (503) #{attempts} {words}. Check that the server "
        "runs"
    )
    assert "cache.retry.attempts or cache.retry.timeout" in str(caught.value)


def test_the_error_comes_from_the_cause_of_the_last_failure(clock: Clock) -> None:
    library = OSError("socket")

    def function(_: float) -> None:
        raise TransientError("s3://b/x", "Connection") from library

    with pytest.raises(OriginUnavailableError) as caught:
        call(RetryPolicy(RetryConfig(attempts=2)), function, URL)
    assert caught.value.__cause__ is library


@pytest.mark.parametrize("kind", [OriginAccessError, OriginUnavailableError, ConnectionError])
def test_an_error_that_is_not_transient_is_raised_at_once(
    clock: Clock, kind: type[Exception]
) -> None:
    calls = []

    def function(_: float) -> None:
        calls.append(1)
        raise kind("no")

    with pytest.raises(kind, match="no"):
        call(RetryPolicy(RetryConfig()), function, URL)
    assert (len(calls), clock.waits_s) == (1, [])


def test_the_time_bound_includes_the_next_wait(clock: Clock) -> None:
    """Attempts at 0, 0.5 and 1.5 s; the next would start at 3.5 s, after the bound."""
    with pytest.raises(OriginUnavailableError, match=re.escape("(3 attempts in 1.5 s)")):
        call(RetryPolicy(RetryConfig(attempts=100, timeout=3.0)), failing(99), URL)
    assert clock.now_s == 1001.5


def test_the_time_bound_includes_the_attempts_themselves(clock: Clock) -> None:

    def hang(_: float) -> None:
        clock.now_s += 15
        raise TransientError("s3://b/x", "Timeout")

    with pytest.raises(OriginUnavailableError, match=re.escape("(4 attempts in 63.5 s)")):
        call(RetryPolicy(RetryConfig(attempts=100, timeout=60)), hang, URL)


def test_progress_restarts_the_time_bound_but_not_the_attempts(clock: Clock) -> None:
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


def test_remaining_time_is_never_negative(clock: Clock) -> None:
    """It is used as a timeout of requests."""
    policy = RetryPolicy(RetryConfig(timeout=10))
    assert policy.remaining_s == 10
    clock.now_s += 4
    assert policy.remaining_s == 6
    clock.now_s += 40
    assert policy.remaining_s == 0.0


def test_each_wait_is_one_log_line_with_fields(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "zarrcache.origin._requests"):
        call(RetryPolicy(RetryConfig(attempts=3)), failing(2), URL)
    assert [record.getMessage() for record in caplog.records] == [
        "origin.retry attempt=2 wait_s=0.50 url=s3://b/x cause=SlowDown (503) #1",
        "origin.retry attempt=3 wait_s=1.00 url=s3://b/x cause=SlowDown (503) #2",
    ]


def test_time_in_which_the_process_was_suspended_does_not_count(clock: Clock) -> None:
    """A wait of a quarter of a second that lasted ten minutes. A slow machine is no suspension."""
    config = RetryConfig(attempts=10, timeout=60)
    left_s = []

    def request(remaining_s: float) -> str:
        left_s.append(remaining_s)
        for seconds in (0.25, 600.0, 0.25, 1.0):
            begin_s = clock.now_s
            clock.now_s += seconds
            retry.note_wait(begin_s, retry.WAIT_STEP_S)
        if len(left_s) < 4:
            raise TransientError(URL, "reset")
        return "done"

    assert call(RetryPolicy(config), request, URL) == "done"
    # Each attempt has taken 0.25 + 0.25 + 0.25 + 1.0 s, and there were waits of 0.5, 1 and 2 s.
    assert left_s == pytest.approx([60.0, 57.75, 55.0, 51.25])


def test_suspension_during_a_pause_of_the_retries_does_not_count(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        clock.now_s += seconds + 3600.0

    monkeypatch.setattr(clock, "sleep", sleep)
    assert call(RetryPolicy(RetryConfig(attempts=5, timeout=10)), failing(4), URL) == "call 5"


def test_suspension_of_another_thread_s_wait_changes_nothing(clock: Clock) -> None:
    policy = RetryPolicy(RetryConfig(timeout=60))
    thread = threading.Thread(target=lambda: retry.note_wait(clock.now_s - 1000.0, 0.25))
    thread.start()
    thread.join()
    clock.now_s += 10.0
    assert policy.remaining_s == 50.0


def test_signs_of_life_are_reported_with_the_silence_to_come(clock: Clock) -> None:
    """Each answer, and each pause before it is made."""
    seen: list[float] = []
    with retry.reporting_progress(seen.append):
        call(RetryPolicy(RetryConfig()), failing(2), URL)
    assert seen == [0.5, 1.0, 0.0]
    call(RetryPolicy(RetryConfig()), failing(0), URL)
    assert len(seen) == 3
