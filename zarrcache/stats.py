"""Counters: what a run did, merged over the processes of a node."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields

__all__ = ["Counters", "Stats"]


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of counters. Add snapshots of several processes with ``+``.

    Attributes
    ----------
    hits, misses : int
        Array tier: densities served from disk, and densities that were not there.
    bypasses : int
        Densities read from the origin that were not admitted (limit reached, disk full, tier switched off).
    byte_hits, byte_misses : int
        The same for the byte tier, in objects and blocks.
    purges : int
        Bad entries dropped (checksum, identity, truncation).
    cache_errors : int
        Cache faults that became misses or pass-through.
    requests, retries : int
        Requests sent to the origin, and those among them that repeat a failed one.
    fetched_bytes, served_bytes : int
        Bytes from the origin, and bytes served from disk.
    """

    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    byte_hits: int = 0
    byte_misses: int = 0
    purges: int = 0
    cache_errors: int = 0
    requests: int = 0
    retries: int = 0
    fetched_bytes: int = 0
    served_bytes: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hit_ratio(self) -> float:
        """Hits over reads of the array tier, 0 to 1; 0.0 before the first read."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0


class Counters:
    """Live counters of one process. Safe from any thread; a copy in a forked or spawned child starts from zero."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys((f.name for f in fields(Stats)), 0)

    def add(self, **increments: int) -> None:
        """Add to counters by name, for example ``add(hits=1, served_bytes=5_000_000)``."""
        with self._lock:
            for name, n in increments.items():
                self._values[name] += n

    def snapshot(self) -> Stats:
        """All counters at one instant."""
        with self._lock:
            return Stats(**self._values)

    def __getstate__(self) -> dict[str, int]:
        return {}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__()  # type: ignore[misc]
