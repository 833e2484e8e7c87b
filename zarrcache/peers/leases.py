"""Leases: make one node fetch an entry that several nodes miss, and record which node has it.

Each node keeps this table in memory for the entries that it is the home of. Of the nodes that miss
an entry at the same time, the first gets a *lease*: it fetches the entry from the origin while the
others wait. A lease ends when its holder reports the outcome, when its holder dies or fails, or
after :data:`LEASE_S`. A lost table costs bandwidth, never a wrong value.

Everything here runs in one event loop, without network access or threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["LEASE_S", "Answer", "Lease", "Leases"]

#: Seconds after which another node may fetch the entry: twice what the retries of one fetch may
#: take by default (``cache.retry.timeout``).
LEASE_S = 120.0
#: Entries whose holders are remembered, in about 100 MB.
_MAX_HOLDERS = 500_000

#: ``lease``: fetch the entry and report the outcome. ``at``: that node has it. ``busy``: a node is
#: still fetching it, ask again. ``alone``: the node that fetched it could not store it, so each
#: node fetches for itself.
Kind = Literal["lease", "at", "busy", "alone"]


@dataclass(eq=False)
class Lease:
    """The right of one node to fetch one entry, until ``until_s`` on the table's clock."""

    digest: str
    node: str
    until_s: float
    over: asyncio.Event = field(default_factory=asyncio.Event)
    is_given_up: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The home's answer to a node that misses an entry."""

    kind: Kind
    node: str = ""
    lease: Lease | None = None


class Leases:
    """The leases of one home.

    Parameters
    ----------
    clock : callable
        Monotonic time in seconds.
    max_holders : int
        Entries whose holders are remembered; the oldest are forgotten first.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, max_holders: int = _MAX_HOLDERS
    ) -> None:
        self._clock = clock
        self._max_holders = max_holders
        self._running: dict[str, Lease] = {}
        self._holders: dict[str, str] = {}

    def holder(self, digest: str) -> str | None:
        """The node that has the entry, as far as this home knows."""
        return self._holders.get(digest)

    async def ask(self, digest: str, node: str, *, wait_s: float, gone: str = "") -> Answer:
        """Answer ``node``, which misses an entry.

        Parameters
        ----------
        digest, node : str
        wait_s : float
            Seconds to wait for the node that is fetching the entry.
        gone : str
            A node that was reported as the holder but does not have the entry.
        """
        deadline_s = self._clock() + wait_s
        while True:
            holder = self._holders.get(digest)
            # A node that asks for an entry that it had stored has lost it.
            if holder is not None and holder not in (node, gone):
                return Answer("at", holder)
            self._holders.pop(digest, None)
            running = self._running.get(digest)
            if running is None or running.until_s <= self._clock():
                lease = self._running[digest] = Lease(digest, node, self._clock() + LEASE_S)
                return Answer("lease", lease=lease)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline_s, running.until_s) - self._clock()):
                    await running.over.wait()
            if running.is_given_up:
                return Answer("alone")
            if not running.over.is_set() and self._clock() >= deadline_s:
                return Answer("busy")

    def end(self, lease: Lease, outcome: Literal["stored", "given-up", "lost"]) -> None:
        """End a lease. Nothing happens if another lease has replaced it.

        Parameters
        ----------
        lease : Lease
        outcome : str
            ``stored``: the waiting nodes are sent to the holder. ``given-up``: the entry was
            fetched and could not be stored, so each of them fetches it alone. ``lost``: the holder
            died, or its fetch failed; one waiting node gets the next lease, and the others keep
            waiting.
        """
        if self._running.get(lease.digest) is lease:
            del self._running[lease.digest]
            if outcome == "stored":
                self._holders[lease.digest] = lease.node
                while len(self._holders) > self._max_holders:
                    del self._holders[next(iter(self._holders))]
            lease.is_given_up = outcome == "given-up"
        lease.over.set()
