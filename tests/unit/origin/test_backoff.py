"""Pauses of the whole node: how long, who hears of them, and what cannot make one."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from zarrcache.config import RetryConfig
from zarrcache.errors import OriginUnavailableError
from zarrcache.origin import _backoff as backoff
from zarrcache.origin._backoff import FIRST_S, LONGEST_S, Backoff
from zarrcache.origin._retry import RetryPolicy, TransientError

ENDPOINT = "https://s3.example"


class Clock:
    """Both clocks of the process, which move when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nothing was told to this process so far."""
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.now_s)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s - 900_000.0)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(backoff, "_told", {})
    return clock


def other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this one was told."""
    monkeypatch.setattr(backoff, "_told", {})


def test_without_a_directory_the_whole_process_pauses() -> None:
    """Each origin of the endpoint, and no other endpoint."""
    Backoff(ENDPOINT).told()
    assert Backoff(ENDPOINT).remaining_s() == pytest.approx(FIRST_S)
    assert Backoff("https://elsewhere").remaining_s() == 0.0


def test_a_pause_ends(clock: Clock) -> None:
    """By itself."""
    Backoff(ENDPOINT).told()
    clock.now_s += FIRST_S
    assert Backoff(ENDPOINT).remaining_s() == 0.0


def test_what_was_in_flight_when_a_pause_began_does_not_prolong_it(clock: Clock) -> None:
    """64 requests are told at once."""
    for _ in range(64):
        Backoff(ENDPOINT).told()
        clock.now_s += 0.001
    assert Backoff(ENDPOINT).remaining_s() < FIRST_S


def test_pauses_that_are_of_no_use_grow_to_a_bound(clock: Clock) -> None:
    """And are short again when the server has delivered, or has been left alone for a while."""
    one = Backoff(ENDPOINT)

    def next_pause() -> float:
        one.told()
        pause_s = one.remaining_s()
        clock.now_s += pause_s
        return round(pause_s, 6)

    assert [next_pause() for _ in range(7)] == [1, 2, 4, 8, 16, LONGEST_S, LONGEST_S]
    for _ in range(10):
        one.served()
    assert [next_pause(), next_pause()] == [1, 2]
    clock.now_s += 61
    assert next_pause() == 1


def test_other_processes_of_the_node_pause_as_long(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They see it in the directory; and what they are told next is longer for all."""
    one, two = Backoff(ENDPOINT, tmp_path), Backoff(ENDPOINT, tmp_path)
    one.told()
    other_process(monkeypatch)
    assert two.remaining_s() == pytest.approx(FIRST_S, abs=0.01)
    clock.now_s += FIRST_S
    assert two.remaining_s() == 0.0
    two.told()
    other_process(monkeypatch)
    assert Backoff(ENDPOINT, tmp_path).remaining_s() == pytest.approx(2 * FIRST_S, abs=0.01)
    assert Backoff("https://elsewhere", tmp_path).remaining_s() == 0.0


def test_the_directory_is_looked_at_now_and_then(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for each of a thousand requests a second."""
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


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, LONGEST_S + 1, 86400.0])
def test_a_time_that_cannot_be_is_no_pause(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """A clock that was set, a file that was copied or tampered with."""
    Backoff(ENDPOINT, tmp_path).told()
    [file] = tmp_path.iterdir()
    os.utime(file, (clock.now_s, clock.now_s + ahead_s))
    other_process(monkeypatch)
    assert Backoff(ENDPOINT, tmp_path).remaining_s() == 0.0


def test_a_link_in_the_place_of_the_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to read nor to write."""
    # the directory is not there: this process pauses all the same
    Backoff(ENDPOINT, tmp_path / "x").told()
    assert Backoff(ENDPOINT, tmp_path / "x").remaining_s() == pytest.approx(FIRST_S)
    other_process(monkeypatch)
    Backoff(ENDPOINT, tmp_path).told()
    [file] = tmp_path.iterdir()
    file.unlink()
    victim = tmp_path / "victim"
    victim.touch()
    before = victim.stat()
    file.symlink_to(victim)
    other_process(monkeypatch)
    Backoff(ENDPOINT, tmp_path).told()
    assert (victim.stat().st_mtime_ns, victim.stat().st_size) == (before.st_mtime_ns, 0)


def test_a_backoff_pickles_and_leaves_one_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it was told."""
    one = pickle.loads(pickle.dumps(Backoff(ENDPOINT, tmp_path)))
    for _ in range(3):
        one.told()
        other_process(monkeypatch)
    [file] = tmp_path.iterdir()
    assert file.stat().st_size == 0


class TestRetries:
    """The one layer that waits."""

    def test_a_retry_waits_for_the_end_of_the_pause(self, clock: Clock) -> None:
        """Whatever its own wait would be."""
        one = Backoff(ENDPOINT)
        calls: list[float] = []

        def refused_once() -> None:
            calls.append(clock.now_s)
            if len(calls) == 1:
                one.told()
                raise TransientError("s3://b/k", "SlowDown")

        RetryPolicy(RetryConfig(), one).call(refused_once)
        assert calls[1] - calls[0] >= FIRST_S

    def test_who_was_not_told_waits_before_the_first_attempt(self, clock: Clock) -> None:
        """That is no attempt."""
        one = Backoff(ENDPOINT)
        one.told()
        policy, before_s = RetryPolicy(RetryConfig(attempts=1), one), clock.now_s
        policy.wait_for_turn("s3://b/k")
        assert clock.now_s - before_s >= FIRST_S

    def test_the_time_bound_holds_for_pauses_too(self, clock: Clock) -> None:
        """Nobody sleeps only to give up."""
        one = Backoff(ENDPOINT)
        one.told()
        policy, before_s = RetryPolicy(RetryConfig(timeout=0.5), one), clock.now_s
        with pytest.raises(
            OriginUnavailableError,
            match="SlowDown: the server has asked this node for fewer requests",
        ):
            policy.call(lambda: policy.wait_for_turn("s3://b/k"))
        assert clock.now_s == before_s

    def test_attempts_are_those_at_one_object_where_the_failure_says_so(self) -> None:
        """A pass that was cut short has not attempted everything."""
        turns = 0
        with pytest.raises(OriginUnavailableError, match=r"\(2 attempts in "):  # noqa: PT012 - the loop is what raises
            for attempt in RetryPolicy(RetryConfig(attempts=2, timeout=1000)):
                turns += 1
                with attempt:
                    raise TransientError("s3://b/k", "SlowDown", attempt=1 + turns // 4)
        assert turns == 4
