"""Pauses of the whole node: their length, which processes obey them, and what is ignored."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from tests.support.attempts import call
from zarrcache.config import RetryConfig
from zarrcache.errors import OriginUnavailableError
from zarrcache.origin import _requests as retry
from zarrcache.origin._requests import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Backoff,
    RetryPolicy,
)
from zarrcache.origin._s3_errors import TransientError

ENDPOINT = "https://s3.example"


class Clock:
    """Both clocks of the process; they advance only in ``sleep`` and by assignment."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A process without pauses so far, on a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.now_s)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s - 900_000.0)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(retry, "_pauses", {})
    return clock


def other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the pauses of this process, as another one would not know them."""
    monkeypatch.setattr(retry, "_pauses", {})


def test_without_a_directory_all_origins_of_the_endpoint_in_this_process_pause() -> None:
    Backoff(ENDPOINT).slow_down()
    assert Backoff(ENDPOINT).remaining_s() == pytest.approx(FIRST_PAUSE_S)
    assert Backoff("https://elsewhere").remaining_s() == 0.0


def test_a_pause_ends(clock: Clock) -> None:
    Backoff(ENDPOINT).slow_down()
    clock.now_s += FIRST_PAUSE_S
    assert Backoff(ENDPOINT).remaining_s() == 0.0


def test_answers_to_requests_in_flight_do_not_prolong_a_pause(clock: Clock) -> None:
    for _ in range(64):
        Backoff(ENDPOINT).slow_down()
        clock.now_s += 0.001
    assert Backoff(ENDPOINT).remaining_s() < FIRST_PAUSE_S


def test_pauses_double_up_to_a_limit_while_the_server_stays_overloaded(clock: Clock) -> None:
    """They are short again after ten answers, or after a minute without a pause."""
    one = Backoff(ENDPOINT)

    def next_pause() -> float:
        one.slow_down()
        pause_s = one.remaining_s()
        clock.now_s += pause_s
        return round(pause_s, 6)

    assert [next_pause() for _ in range(7)] == [1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    for _ in range(10):
        one.served()
    assert [next_pause(), next_pause()] == [1, 2]
    clock.now_s += 61
    assert next_pause() == 1


def test_other_processes_of_the_node_pause_as_long(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find it in the directory, and the next pause that one of them begins is longer."""
    one, two = Backoff(ENDPOINT, tmp_path), Backoff(ENDPOINT, tmp_path)
    one.slow_down()
    other_process(monkeypatch)
    assert two.remaining_s() == pytest.approx(FIRST_PAUSE_S, abs=0.01)
    clock.now_s += FIRST_PAUSE_S
    assert two.remaining_s() == 0.0
    two.slow_down()
    other_process(monkeypatch)
    assert Backoff(ENDPOINT, tmp_path).remaining_s() == pytest.approx(2 * FIRST_PAUSE_S, abs=0.01)
    assert Backoff("https://elsewhere", tmp_path).remaining_s() == 0.0


def test_the_directory_is_read_at_most_ten_times_per_second(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[object] = []
    lstat = os.lstat
    monkeypatch.setattr(
        os, "lstat", lambda path, **more: (looked.append(path), lstat(path, **more))[1]
    )
    one = Backoff(ENDPOINT, tmp_path)
    for _ in range(1000):
        one.remaining_s()
        clock.now_s += 0.001
    assert len(looked) <= 11


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, LONGEST_PAUSE_S + 1, 86400.0])
def test_an_implausible_end_of_a_pause_is_ignored(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """The clock was set, or the file was copied or tampered with."""
    Backoff(ENDPOINT, tmp_path).slow_down()
    [file] = tmp_path.iterdir()
    os.utime(file, (clock.now_s, clock.now_s + ahead_s))
    other_process(monkeypatch)
    assert Backoff(ENDPOINT, tmp_path).remaining_s() == 0.0


def test_a_symbolic_link_instead_of_the_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without the directory, this process pauses
    Backoff(ENDPOINT, tmp_path / "x").slow_down()
    assert Backoff(ENDPOINT, tmp_path / "x").remaining_s() == pytest.approx(FIRST_PAUSE_S)
    other_process(monkeypatch)
    Backoff(ENDPOINT, tmp_path).slow_down()
    [file] = tmp_path.iterdir()
    file.unlink()
    victim = tmp_path / "victim"
    victim.touch()
    before = victim.stat()
    file.symlink_to(victim)
    other_process(monkeypatch)
    Backoff(ENDPOINT, tmp_path).slow_down()
    assert (victim.stat().st_mtime_ns, victim.stat().st_size) == (before.st_mtime_ns, 0)


def test_a_backoff_pickles_and_leaves_one_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pickle.loads(pickle.dumps(Backoff(ENDPOINT, tmp_path)))
    for _ in range(3):
        one.slow_down()
        other_process(monkeypatch)
    [file] = tmp_path.iterdir()
    assert file.stat().st_size == 0


class TestRetries:
    def test_a_retry_waits_for_the_end_of_the_pause(self, clock: Clock) -> None:
        one = Backoff(ENDPOINT)
        calls: list[float] = []

        def refused_once(_: float) -> None:
            calls.append(clock.now_s)
            if len(calls) == 1:
                one.slow_down()
                raise TransientError("s3://b/k", "SlowDown")

        call(RetryPolicy(RetryConfig(), one), refused_once, "s3://b/k")
        assert calls[1] - calls[0] >= FIRST_PAUSE_S

    def test_a_first_attempt_waits_for_the_end_of_the_pause(self, clock: Clock) -> None:
        one = Backoff(ENDPOINT)
        one.slow_down()
        policy, before_s = RetryPolicy(RetryConfig(attempts=1), one), clock.now_s
        assert call(policy, lambda _: clock.now_s, "s3://b/k") - before_s >= FIRST_PAUSE_S

    def test_the_time_bound_holds_for_pauses_too(self, clock: Clock) -> None:
        one = Backoff(ENDPOINT)
        one.slow_down()
        policy, before_s = RetryPolicy(RetryConfig(timeout=0.5), one), clock.now_s
        calls: list[float] = []
        with pytest.raises(
            OriginUnavailableError,
            match="SlowDown: the server has asked this node for fewer requests",
        ):
            call(policy, calls.append, "s3://b/k")
        assert (clock.now_s, calls) == (before_s, [])

    def test_attempts_at_one_object_count_if_the_failure_has_their_number(self) -> None:
        """A pass that was cut short has not attempted every object."""
        turns = 0
        with pytest.raises(OriginUnavailableError, match=r"\(2 attempts in "):  # noqa: PT012 - the loop raises
            for attempt in RetryPolicy(RetryConfig(attempts=2, timeout=1000)):
                turns += 1
                with attempt:
                    error = TransientError("s3://b/k", "SlowDown")
                    error.attempt = 1 + turns // 4
                    raise error
        assert turns == 4
