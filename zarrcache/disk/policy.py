"""Decisions, without I/O: may this entry be written, which entries make room, is this entry still
the origin's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, Protocol

from zarrcache._units import Percent

__all__ = [
    "BLOCK_BYTES",
    "Admission",
    "EvictionPolicy",
    "admit",
    "choose_victims",
    "disk_bytes",
    "is_fresh",
    "min_free_bytes",
]

#: What a file occupies is counted in file-system blocks, so that the sum agrees with ``du``.
BLOCK_BYTES = 4096


class Admission(Enum):
    """Outcome of :func:`admit`."""

    ADMIT = "admit"
    OVER_LIMIT = "the limit is reached"
    TOO_LARGE = "it is larger than the whole limit"
    DISK_FULL = "the file system has less than min_free left"


class EvictionPolicy(Protocol):
    """Chooses which entries make room for a new one once the limit is reached.

    Called in the process that stores, from any of its threads, and pickled to spawned workers.
    """

    def victims(
        self, digest: str, needed_bytes: int, stored: Callable[[], Sequence[tuple[Any, ...]]]
    ) -> list[str]:
        """Digests of the entries to drop; an empty list leaves the cache as it is (a bypass).

        Parameters
        ----------
        digest : str
            The new entry.
        needed_bytes : int
            Bytes that have to be freed on disk.
        stored : callable
            Returns ``(digest, size_bytes)`` of every entry of the array tier. Costs one query.
        """


def disk_bytes(nbytes: int) -> int:
    """Bytes that a file of ``nbytes`` occupies on disk."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def min_free_bytes(min_free: int | Percent, total_bytes: int) -> int:
    """Bytes of a file system of ``total_bytes`` that are left to others."""
    return int(total_bytes * min_free / 100) if isinstance(min_free, Percent) else min_free


def admit(
    size_bytes: int, *, volume_bytes: int, limit_bytes: int, free_bytes: int, min_free_bytes: int
) -> Admission:
    """May ``size_bytes`` more be written?

    Admit-until-full is the default policy because every epoch reads every sample once in a fresh
    order: then no policy beats cache/dataset, and LRU, which evicts what the rest of the epoch
    still needs, reaches 15 % where this reaches 50 %.
    """
    if size_bytes > limit_bytes:
        return Admission.TOO_LARGE
    if volume_bytes + size_bytes > limit_bytes:
        return Admission.OVER_LIMIT
    if free_bytes - size_bytes < min_free_bytes:
        return Admission.DISK_FULL
    return Admission.ADMIT


def choose_victims(oldest_first: Iterable[tuple[str, int]], needed_bytes: int) -> list[str]:
    """Names from ``(name, size_bytes)`` whose sizes add up to ``needed_bytes``, oldest first; all
    of them if they do not suffice.
    """
    victims: list[str] = []
    freed = 0
    for name, size_bytes in oldest_first:
        if freed >= needed_bytes:
            break
        victims.append(name)
        freed += size_bytes
    return victims


def is_fresh(stored_source: str, current_source: str | None) -> bool:
    """Does an entry still hold what the origin lists? ``None`` means "nobody asked": trusted."""
    return current_source is None or stored_source == current_source
