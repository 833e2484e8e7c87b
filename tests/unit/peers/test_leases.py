"""Who fetches what: one at a time, with an end to everything."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from zarrcache.peers.leases import LEASE_S, Leases, Word


class Clock:
    """Time as a test sets it."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ask(leases: Leases, node: str, *, wait_s: float = 0.0, gone: str = "") -> Word:
    """For one entry."""
    return leases.ask("d", node, wait_s=wait_s, gone=gone)


def test_first_has_the_lease_and_others_are_told_to_ask_again() -> None:
    """Of another entry nothing is known."""
    leases = Leases()
    assert ask(leases, "a").kind == "lease"
    assert [ask(leases, node).kind for node in ("b", "a", "c")] == ["busy"] * 3
    assert leases.ask("other", "b", wait_s=0).kind == "lease"


def test_who_stored_it_is_named_until_it_is_gone_there() -> None:
    """To everybody but itself: a node that asks for what it had has lost it."""
    leases = Leases()
    lease = ask(leases, "a").lease
    assert lease is not None
    leases.end(lease, "stored")
    assert ask(leases, "b") == Word("at", "a")
    assert leases.holder("d") == "a"
    assert ask(leases, "b", gone="a").kind == "lease"
    assert leases.holder("d") is None
    other = Leases()
    lease = ask(other, "a").lease
    assert lease is not None
    other.end(lease, "stored")
    assert ask(other, "a").kind == "lease"


@pytest.mark.parametrize(
    ("outcome", "kinds"),
    [("stored", ["at"] * 7), ("given up", ["alone"] * 7), ("lost", ["busy"] * 6 + ["lease"])],
)
def test_end_of_a_lease_is_told_to_all_who_wait(outcome: str, kinds: list[str]) -> None:
    """Stored: where. Given up: each for itself. Lost, or failed: one of them is next, and the
    others wait on.
    """
    leases = Leases()
    lease = ask(leases, "a").lease
    assert lease is not None
    with ThreadPoolExecutor(7) as pool:
        words = [
            pool.submit(ask, leases, f"n{i}", wait_s=0.5 if outcome == "lost" else 60.0)
            for i in range(7)
        ]
        leases.end(lease, outcome)  # type: ignore[arg-type]
        assert sorted(word.result().kind for word in words) == kinds


def test_lease_ends_by_itself_and_its_late_end_changes_nothing() -> None:
    """The next one has it then; what the first says later is not about this lease."""
    clock = Clock()
    leases = Leases(clock=clock)
    first = ask(leases, "a").lease
    clock.now_s = LEASE_S - 1
    assert ask(leases, "b").kind == "busy"
    clock.now_s = LEASE_S
    second = ask(leases, "b").lease
    assert first is not None
    assert second is not None
    leases.end(first, "lost")
    assert ask(leases, "c").kind == "busy"
    leases.end(first, "stored")
    assert leases.holder("d") is None
    leases.end(second, "stored")
    assert ask(leases, "c") == Word("at", "b")


def test_only_so_many_holders_are_remembered() -> None:
    """The oldest are forgotten: they cost a question more."""
    leases = Leases(most=2)
    for digest in "def":
        lease = leases.ask(digest, "a", wait_s=0).lease
        assert lease is not None
        leases.end(lease, "stored")
    assert [leases.holder(digest) for digest in "def"] == [None, "a", "a"]


def test_of_many_threads_one_has_the_lease() -> None:
    """Two detectors: the number of leases, and that nobody is inside with another."""
    leases, start, inside = Leases(), threading.Barrier(8), threading.Lock()
    fetched = []

    def miss(node: str) -> str:
        start.wait(60)
        while True:
            word = ask(leases, node, wait_s=60.0)
            if word.lease is None:
                return word.kind
            assert inside.acquire(blocking=False)
            fetched.append(node)
            inside.release()
            leases.end(word.lease, "stored")
            return "lease"

    with ThreadPoolExecutor(8) as pool:
        kinds = list(pool.map(miss, "abcdefgh"))
    assert sorted(kinds) == ["at"] * 7 + ["lease"]
    assert len(fetched) == 1
