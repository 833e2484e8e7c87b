"""Who fetches what, and who has it: what a node remembers of the entries that it is home of. In
memory only; it may forget.

Of the nodes that miss an entry at one moment the first gets a *lease*: it fetches the entry from
the origin, and the others wait until it has. A lease ends when its holder says so, when its holder
dies or fails, or after :data:`LEASE_S`. What is forgotten or goes wrong costs bandwidth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["LEASE_S", "Lease", "Leases", "Word"]

#: Seconds that a fetch may take until somebody else is sent: twice what the retries of one fetch
#: may take by default (``cache.retry.timeout``).
LEASE_S = 120.0
#: Entries whose holders are remembered: about 100 MB.
_MOST = 500_000

#: ``lease``: fetch it, and say how it ended. ``at``: that node has it. ``busy``: it is still being
#: fetched, ask again. ``alone``: whoever fetched it could not keep it, so there is nobody to wait
#: for.
Kind = Literal["lease", "at", "busy", "alone"]


@dataclass(eq=False)
class Lease:
    """One node's turn at one entry."""

    digest: str
    node: str
    until_s: float
    over: threading.Event = field(default_factory=threading.Event)
    is_given_up: bool = False


@dataclass(frozen=True, slots=True)
class Word:
    """What a node that misses an entry is told."""

    kind: Kind
    node: str = ""
    lease: Lease | None = None


class Leases:
    """The leases of one home. Safe from any thread.

    Parameters
    ----------
    clock : callable
        Seconds, rising.
    most : int
        Entries whose holders are remembered; the oldest are forgotten.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = _MOST) -> None:
        self._clock = clock
        self._most = most
        self._lock = threading.Lock()
        self._running: dict[str, Lease] = {}
        self._at: dict[str, str] = {}

    def holder(self, digest: str) -> str | None:
        """The node that has an entry, as far as is known."""
        with self._lock:
            return self._at.get(digest)

    def ask(self, digest: str, node: str, *, wait_s: float, gone: str = "") -> Word:
        """``node`` misses an entry.

        Parameters
        ----------
        digest, node : str
        wait_s : float
            Wait so long for the one who is fetching it.
        gone : str
            A node that was said to have it and does not.
        """
        deadline_s = self._clock() + wait_s
        while True:
            with self._lock:
                holder = self._at.get(digest)
                if holder is not None and holder not in (node, gone):
                    return Word("at", holder)
                self._at.pop(digest, None)
                running = self._running.get(digest)
                if running is None or running.until_s <= self._clock():
                    lease = self._running[digest] = Lease(digest, node, self._clock() + LEASE_S)
                    return Word("lease", lease=lease)
                left_s = min(deadline_s, running.until_s) - self._clock()
            running.over.wait(max(0.0, left_s))
            if running.is_given_up:
                return Word("alone")
            if not running.over.is_set() and self._clock() >= deadline_s:
                return Word("busy")

    def end(self, lease: Lease, outcome: Literal["stored", "given up", "lost"]) -> None:
        """A lease is over.

        Parameters
        ----------
        lease : Lease
        outcome : str
            ``stored``: those who wait are told where. ``given up``: it was fetched and cannot be
            kept, so each of them fetches it alone. ``lost``: the holder is gone, or its fetch
            failed; one of them has the next lease, and the others wait on.
        """
        with self._lock:
            if self._running.get(lease.digest) is lease:
                del self._running[lease.digest]
                if outcome == "stored":
                    self._at[lease.digest] = lease.node
                    while len(self._at) > self._most:
                        del self._at[next(iter(self._at))]
                lease.is_given_up = outcome == "given up"
        lease.over.set()
