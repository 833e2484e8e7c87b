"""Leases: one node fetches an entry at a time, and every lease ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from zarrcache.peers.leases import LEASE_S, Answer, Leases


class Clock:
    """A clock that a test sets."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def ask(leases: Leases, node: str, *, wait_s: float = 0.0, **options: Any) -> Answer:
    """Ask for the entry ``d``."""
    return await leases.ask("d", node, wait_s=wait_s, **options)


async def test_first_node_gets_the_lease_and_the_others_are_told_to_ask_again() -> None:
    leases = Leases()
    assert (await ask(leases, "a")).kind == "lease"
    assert [(await ask(leases, node)).kind for node in ("b", "a", "c")] == ["busy"] * 3
    assert (await leases.ask("other", "b", wait_s=0)).kind == "lease"


async def test_node_that_stored_an_entry_is_named_until_it_has_lost_it() -> None:
    """Either another node reports that it is gone there, or the node itself asks for it."""
    leases = Leases()
    lease = (await ask(leases, "a")).lease
    assert lease is not None
    leases.end(lease, "stored")
    assert await ask(leases, "b") == Answer("at", "a")
    assert leases.holder("d") == "a"
    assert (await ask(leases, "b", without={"a"})).kind == "lease"
    assert leases.holder("d") is None
    other = Leases()
    lease = (await ask(other, "a")).lease
    assert lease is not None
    other.end(lease, "stored")
    assert (await ask(other, "a")).kind == "lease"


@pytest.mark.parametrize(
    ("outcome", "kinds"),
    [("stored", ["at"] * 7), ("given-up", ["alone"] * 7), ("lost", ["busy"] * 6 + ["lease"])],
)
async def test_end_of_a_lease_is_told_to_all_waiting_nodes(outcome: str, kinds: list[str]) -> None:
    """Stored: where. Given up: each fetches for itself. Lost: one of them is next, and the others
    wait on.
    """
    leases = Leases()
    lease = (await ask(leases, "a")).lease
    assert lease is not None
    waiting = [
        asyncio.create_task(
            ask(leases, f"n{i}", wait_s=0.5 if outcome == "lost" else 60.0),
        )
        for i in range(7)
    ]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    leases.end(lease, outcome)  # type: ignore[arg-type]
    assert sorted(answer.kind for answer in await asyncio.gather(*waiting)) == kinds


async def test_lease_whose_holder_is_silent_is_given_to_another_node() -> None:
    """How long it has been silent is said meanwhile, without the time that it has announced."""
    clock = Clock()
    leases = Leases(clock=clock)
    first = (await ask(leases, "a")).lease
    assert first is not None
    clock.now_s = LEASE_S - 1
    assert await ask(leases, "b") == Answer("busy", "a", silent_s=LEASE_S - 1)
    leases.renew(first, 0.0)
    clock.now_s += LEASE_S - 1
    assert await ask(leases, "b") == Answer("busy", "a", silent_s=LEASE_S - 1)
    leases.renew(first, 20.0)
    clock.now_s += 20.5
    assert await ask(leases, "b") == Answer("busy", "a", silent_s=0.5)
    clock.now_s += LEASE_S
    second = (await ask(leases, "b")).lease
    assert second is not None
    leases.end(first, "lost")
    assert (await ask(leases, "c")).kind == "busy"
    leases.end(second, "stored")
    assert await ask(leases, "c") == Answer("at", "b")


async def test_silence_of_hours_cannot_be_announced() -> None:
    clock = Clock()
    leases = Leases(clock=clock)
    lease = (await ask(leases, "a")).lease
    assert lease is not None
    leases.renew(lease, 1e9)
    clock.now_s = 90.0
    assert (await ask(leases, "b")).kind == "lease"


async def test_holder_that_is_late_may_still_have_stored_the_entry() -> None:
    """It was suspended, and its lease is another node's. Waiting nodes get the entry from it."""
    clock = Clock()
    leases = Leases(clock=clock)
    first = (await ask(leases, "a")).lease
    assert first is not None
    clock.now_s = LEASE_S
    second = (await ask(leases, "b")).lease
    assert second is not None
    waiting = asyncio.create_task(ask(leases, "c", wait_s=60.0))
    await asyncio.sleep(0.01)
    leases.end(first, "stored")
    assert await asyncio.wait_for(waiting, 10) == Answer("at", "a")
    # The holder of the second lease still fetches; one who cannot reach the first waits for it.
    assert (await ask(leases, "d", without={"a", "c"})).kind == "busy"
    leases.end(second, "stored")
    assert await ask(leases, "d", without={"a", "c"}) == Answer("at", "b")


async def test_node_that_does_not_wait_for_a_holder_gets_its_lease() -> None:
    """It has lost too much time to that one. The others wait for the new holder."""
    leases = Leases()
    first = (await ask(leases, "a")).lease
    waiting = asyncio.create_task(ask(leases, "c", wait_s=60.0))
    await asyncio.sleep(0.01)
    second = (await ask(leases, "b", without={"a"})).lease
    assert first is not None
    assert second is not None
    leases.end(first, "lost")
    await asyncio.sleep(0.01)
    assert not waiting.done()
    leases.end(second, "stored")
    assert await asyncio.wait_for(waiting, 10) == Answer("at", "b")


async def test_another_holder_is_named_when_the_first_is_dead() -> None:
    """A node that was sent to the first has the entry as well."""
    leases = Leases()
    lease = (await ask(leases, "a")).lease
    assert lease is not None
    leases.end(lease, "stored")
    assert await ask(leases, "b") == Answer("at", "a")
    assert await ask(leases, "c", without={"a"}) == Answer("at", "b")
    assert (await ask(leases, "d", without={"b", "c"})).kind == "lease"


async def test_node_that_lets_others_go_first_gets_the_lease_if_none_comes() -> None:
    """Or takes the entry from the one that came."""
    leases = Leases()
    alone = await ask(leases, "a", wait_s=0.1, lets_others_first=True)
    assert alone.lease is not None
    leases.end(alone.lease, "lost")
    waiting = asyncio.create_task(ask(leases, "a", wait_s=60.0, lets_others_first=True))
    await asyncio.sleep(0.05)
    other = (await ask(leases, "b")).lease
    assert other is not None
    await asyncio.sleep(0.05)
    leases.end(other, "stored")
    assert await asyncio.wait_for(waiting, 10) == Answer("at", "b")


async def test_node_that_hangs_up_while_it_waits_gets_no_lease() -> None:
    """The next waiting node does."""
    leases = Leases()
    lease = (await ask(leases, "a")).lease
    assert lease is not None
    gone, waiting = (
        asyncio.create_task(ask(leases, node, wait_s=60.0)) for node in ("gone", "waiting")
    )
    await asyncio.sleep(0.01)
    leases.end(lease, "lost")
    gone.cancel()  # both have been woken, and neither has run
    assert (await waiting).kind == "lease"
    assert gone.cancelled()


async def test_only_so_many_holders_are_remembered() -> None:
    """The oldest are forgotten, which costs one more question."""
    leases = Leases(max_holders=2)
    for digest in "def":
        lease = (await leases.ask(digest, "a", wait_s=0)).lease
        assert lease is not None
        leases.end(lease, "stored")
    assert [leases.holder(digest) for digest in "def"] == [None, "a", "a"]


async def test_one_of_many_nodes_that_ask_at_once_gets_the_lease() -> None:
    """Two detectors: the number of leases, and that no two nodes fetch at a time."""
    leases = Leases()
    fetched = []
    fetching = 0

    async def miss(node: str) -> str:
        nonlocal fetching
        while True:
            answer = await ask(leases, node, wait_s=60.0)
            if answer.lease is None:
                return answer.kind
            fetching += 1
            await asyncio.sleep(0.01)
            assert fetching == 1
            fetched.append(node)
            fetching -= 1
            leases.end(answer.lease, "stored")
            return "lease"

    kinds = await asyncio.gather(*map(miss, "abcdefgh"))
    assert sorted(kinds) == ["at"] * 7 + ["lease"]
    assert len(fetched) == 1
