"""Numbers, durations, plurals, and progress without a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from zarrcache._units import counted, format_seconds
from zarrcache.cli.progress import Meter


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (372, "6 min 12 s"),
        (3600, "1 h 00 min"),
        (11100, "3 h 05 min"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words


def test_numbers_are_grouped_and_nouns_agree() -> None:
    found = counted(1, "entry", "entries"), counted(1234567, "id"), counted(0, "id")
    assert found == ("1 entry", "1,234,567 ids", "0 ids")


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bytes, rate, failures and remaining time, on stderr."""
    now = [100.0]
    monkeypatch.setattr("zarrcache.cli.progress.time.monotonic", lambda: now[0])
    with Meter("Warming", "densities", 2408, lambda: 50 * 1024**2) as meter:
        for _ in range(120):
            now[0] += 0.25
            meter.advance(failed=now[0] == 125)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "Warming: 40 of 2,408 densities, 50.0 MiB, 5.0 MiB/s, 9 min 52 s left"
    assert (
        lines[2]
        == "Warming: 120 of 2,408 densities, 50.0 MiB, 1.7 MiB/s, 1 failed, 9 min 32 s left"
    )


def test_progress_in_bytes_accepts_its_total_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("zarrcache.cli.progress.time.monotonic", lambda: now[0])
    with Meter("Verifying", "", 1) as meter:
        now[0] += 16
        meter.reach(16 * 1024**2, 64 * 1024**2)
    assert capsys.readouterr().err == "Verifying: 16.0 MiB of 64.0 MiB, 1.0 MiB/s, 48 s left\n"


def test_quiet_progress_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    now = [100.0]
    monkeypatch.setattr("zarrcache.cli.progress.time.monotonic", lambda: now[0])
    with caplog.at_level("ERROR", "zarrcache"), Meter("Warming", "densities", 4) as meter:
        now[0] += 60
        meter.advance()
    assert capsys.readouterr() == ("", "")
