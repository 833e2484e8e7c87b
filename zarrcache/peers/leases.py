"""Leases: make one node fetch an entry that several nodes miss, and record which node has it.

Each node keeps this table in memory for the entries that it is the home of. Of the nodes that miss
an entry at the same time, the first gets a *lease*: it fetches the entry from the origin while the
others wait. A lease ends when its holder reports the outcome, when its holder dies or fails, or
when the holder has not reported for :data:`LEASE_S` that it proceeds: it may be stopped, or cut off
from the origin. A lost table costs bandwidth, never a wrong value.

Everything here runs in one event loop, without network access or threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["LEASE_S", "Answer", "Lease", "Leases"]

#: Seconds without a report of the holder after which another node may fetch the entry. Less than
#: what a node may lose to another one (`_patience`).
LEASE_S = 3.5
#: Longest time, in seconds, for which a holder may announce that it will be silent.
_MAX_SILENT_S = 60.0
#: Entries whose holders are remembered, in about 150 MB.
_MAX_HOLDERS = 500_000
#: Holders that are remembered of one entry, for when the first of them dies.
_MAX_HOLDERS_EACH = 3
#: Seconds between two looks, by a node that lets others go first, whether one has come.
_LOOK_S = 0.01

#: ``lease``: fetch the entry and report the outcome. ``at``: that node has it. ``busy``: a node is
#: still fetching it, ask again. ``alone``: the node that fetched it could not store it, so each
#: node fetches for itself.
Kind = Literal["lease", "at", "busy", "alone"]


@dataclass(eq=False)
class Lease:
    """The right of one node to fetch one entry.

    On the table's clock: ``silent_from_s`` is when its holder's next report was due, and
    ``until_s`` when the lease lapses.
    """

    digest: str
    node: str
    silent_from_s: float
    until_s: float
    over: asyncio.Event = field(default_factory=asyncio.Event)
    is_given_up: bool = False

    def wake(self) -> None:
        """Wake all that wait for this lease."""
        self.over.set()
        self.over = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Answer:
    """The home's answer to a node that misses an entry."""

    kind: Kind
    node: str = ""
    lease: Lease | None = None
    silent_s: float = 0.0


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
        self._holders: dict[str, tuple[str, ...]] = {}

    def holder(self, digest: str) -> str | None:
        """The node that has the entry, if this home knows one."""
        return next(iter(self._holders.get(digest, ())), None)

    async def ask(
        self,
        digest: str,
        node: str,
        *,
        wait_s: float,
        without: Collection[str] = (),
        lets_others_first: bool = False,
    ) -> Answer:
        """Answer ``node``, which misses an entry.

        Parameters
        ----------
        digest, node : str
        wait_s : float
            Seconds to wait for the node that is fetching the entry.
        without : collection of str
            Nodes that the asking one has found not to have the entry, or not to answer. They are
            not named, and it does not wait for a lease that one of them holds.
        lets_others_first : bool
            Grant no lease to it before ``wait_s`` if another node asks.
        """
        deadline_s = self._clock() + wait_s
        while True:
            # A node that asks for an entry that it had stored has lost it.
            holders = tuple(
                h for h in self._holders.get(digest, ()) if h != node and h not in without
            )
            if holders:
                self._remember(digest, (*holders, node))  # which is about to take it from there
                return Answer("at", holders[0])
            self._holders.pop(digest, None)
            running, now_s = self._running.get(digest), self._clock()
            if running is None or running.until_s <= now_s or running.node in without:
                if lets_others_first and now_s < deadline_s:
                    await asyncio.sleep(min(_LOOK_S, deadline_s - now_s))
                    continue
                if running is not None:
                    running.wake()  # its waiters wait for the new one
                lease = Lease(digest, node, now_s, now_s + LEASE_S)
                self._running[digest] = lease
                return Answer("lease", lease=lease)
            over = running.over
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline_s, running.until_s) - now_s):
                    await over.wait()
            if running.is_given_up:
                return Answer("alone")
            now_s = self._clock()
            if not over.is_set() and now_s >= deadline_s:
                silent_s = max(0.0, now_s - running.silent_from_s)
                return Answer("busy", running.node, silent_s=silent_s)

    def renew(self, lease: Lease, silent_s: float) -> None:
        """Note that the holder proceeds, and may now be silent for ``silent_s``."""
        lease.silent_from_s = self._clock() + min(max(silent_s, 0.0), _MAX_SILENT_S)
        lease.until_s = lease.silent_from_s + LEASE_S

    def end(self, lease: Lease, outcome: Literal["stored", "given-up", "lost"]) -> None:
        """End a lease. Only ``stored`` has an effect if another lease has replaced it.

        Parameters
        ----------
        lease : Lease
        outcome : str
            ``stored``: the waiting nodes are sent to the holder. ``given-up``: the entry was
            fetched and could not be stored, so each of them fetches it alone. ``lost``: the holder
            died, or its fetch failed; one waiting node gets the next lease, and the others keep
            waiting.
        """
        running = self._running.get(lease.digest)
        if outcome == "stored":
            self._remember(lease.digest, (*self._holders.get(lease.digest, ()), lease.node))
            if running is not None:
                running.wake()
        if running is lease:
            del self._running[lease.digest]
            lease.is_given_up = outcome == "given-up"
        lease.wake()

    def _remember(self, digest: str, holders: Iterable[str]) -> None:
        self._holders[digest] = tuple(dict.fromkeys(holders))[:_MAX_HOLDERS_EACH]
        while len(self._holders) > self._max_holders:
            del self._holders[next(iter(self._holders))]
