"""What a peer may cost a node: a budget of seconds, however it fails, shared by processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zarrcache.peers import _patience
from zarrcache.peers._patience import BUDGET_S, Patience

PEER = "http://node1:7070"


class Clock:
    """A clock that a test sets."""

    now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_patience.time, "time", clock)
    return clock


def lose(patience: Patience, clock: Clock, takes_s: float, *, failed: bool) -> float:
    """One request to a peer that takes as long, or is given up; the seconds that it took."""
    if not patience.left_s(PEER):
        return 0.0
    spent_s = min(takes_s, patience.limit_s(PEER, 2.5))
    clock.now_s += spent_s
    patience.charge(PEER, spent_s, failed=failed or spent_s < takes_s)
    return spent_s


@pytest.mark.parametrize("takes_s", [0.3, 0.9, 2.0, 1e9])
@pytest.mark.parametrize("failed", [True, False])
@pytest.mark.parametrize("pause_s", [0.0, 1.0, 61.0])
def test_a_peer_costs_at_most_five_seconds_in_an_hour(
    clock: Clock, tmp_path: Path, takes_s: float, failed: bool, pause_s: float
) -> None:
    """Slow, hanging or failing, with a request after the other or one a minute. What each request
    may take anyway, 0.1 s, does not count.
    """
    patience, lost_s, requests = Patience(tmp_path), 0.0, 0
    end_s = clock.now_s + 3600
    while clock.now_s < end_s:
        spent_s = lose(patience, clock, takes_s, failed=failed)
        requests += bool(spent_s)
        lost_s += max(0.0, spent_s - 0.1)
        clock.now_s += max(pause_s, 0.25)
    assert requests >= 2
    assert lost_s <= 5.0
    clock.now_s += 5 * 3600.0
    assert patience.left_s(PEER) == BUDGET_S


def test_a_flapping_peer_costs_no_more(clock: Clock, tmp_path: Path) -> None:
    """Good answers between the failures do not pay for them."""
    patience, lost_s = Patience(tmp_path), 0.0
    for _ in range(500):
        for takes_s in (0.01, 1e9):
            lost_s += max(0.0, lose(patience, clock, takes_s, failed=False) - 0.1)
            clock.now_s += 1.0
    assert lost_s <= 5.0


def test_an_entry_may_take_as_long_as_it_is_worth(clock: Clock) -> None:
    """A healthy peer is never left out, also on a network with 5 MiB/s."""
    patience = Patience()
    for _ in range(1000):
        clock.now_s += 1.1
        assert patience.charge(PEER, 1.1, entry_bytes=5 * 2**20) == 0.0
    assert patience.left_s(PEER) == BUDGET_S
    for _ in range(10):
        clock.now_s += 5.0
        patience.charge(PEER, 5.0, entry_bytes=5 * 2**20)
    assert patience.left_s(PEER) == 0.0


def test_a_refused_connection_costs_a_second_of_use_and_no_budget(clock: Clock) -> None:
    """A server that is started again is used again at once."""
    patience = Patience()
    for _ in range(50):
        clock.now_s += 0.0005
        assert patience.charge(PEER, 0.0005, failed=True) == 1.0
        assert patience.left_s(PEER) == 0.0
        clock.now_s += 1.01
        assert patience.left_s(PEER) == BUDGET_S


def test_processes_of_a_node_lose_the_time_once(clock: Clock, tmp_path: Path) -> None:
    """What one has charged while another waited for the same peer is not charged again."""
    first, second = Patience(tmp_path), Patience(tmp_path)
    clock.now_s = tmp_path.stat().st_ctime + 1000.0
    first.charge(PEER, 2.0, failed=True)
    assert first.left_s(PEER) == second.left_s(PEER) == 0.0
    (file,) = tmp_path.iterdir()
    assert (file.stat().st_size, file.stat().st_mode & 0o777) == (0, 0o600)
    whole_s = file.stat().st_mtime
    clock.now_s = file.stat().st_ctime + 0.01
    second.charge(PEER, 2.0, failed=True)
    assert file.stat().st_mtime <= whole_s


@pytest.mark.parametrize("ahead_s", [9 * 3600.0, 1e9])
def test_a_time_that_was_not_written_by_it_is_ignored(
    clock: Clock, tmp_path: Path, ahead_s: float
) -> None:
    """A clock that was set, or a file that another user of a shared directory has touched."""
    patience = Patience(tmp_path)
    patience.charge(PEER, 2.0, failed=True)
    (file,) = tmp_path.iterdir()
    os.utime(file, (clock.now_s + ahead_s, clock.now_s + ahead_s))
    assert patience.left_s(PEER) == BUDGET_S


def test_without_a_directory_that_can_be_written_a_process_keeps_its_own(
    clock: Clock, tmp_path: Path
) -> None:
    patience = Patience(tmp_path / "gone")
    patience.charge(PEER, 2.0, failed=True)
    assert patience.left_s(PEER) == 0.0
    link = Patience(tmp_path)
    path = link._path(PEER)
    assert path is not None
    path.symlink_to(tmp_path / "target")
    (tmp_path / "target").touch()
    os.utime(tmp_path / "target", (1.0, 1.0))
    link.charge(PEER, 2.0, failed=True)
    assert (tmp_path / "target").stat().st_mtime == 1.0  # not followed
