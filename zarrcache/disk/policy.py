"""Decisions without I/O: admission, eviction, and freshness of entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Protocol

from zarrcache._keys import Eviction
from zarrcache._units import Percent

__all__ = [
    "BLOCK_BYTES",
    "Admission",
    "AdmitUntilFull",
    "EvictionPolicy",
    "LeastRecentlyStored",
    "StoredEntries",
    "admit",
    "choose_victims",
    "disk_bytes",
    "is_fresh",
    "min_free_bytes",
    "policy_of",
]

#: Smallest unit in which file systems allocate. Estimates count in it; what is stored counts with
#: what it occupies.
BLOCK_BYTES = 4096
#: Numbers of entries to read for victims, step by step: one or two victims are usually enough, and
#: a full cache evicts at every put.
_PAGES = (100, 10_000, -1)


class Admission(Enum):
    """Outcome of :func:`admit`."""

    ADMIT = "admit"
    OVER_LIMIT = "the limit is reached"
    TOO_LARGE = "it is larger than the whole limit"
    DISK_FULL = "the file system has less than min_free left"
    READ_ONLY = "the cache directory cannot be written"


class StoredEntries(Protocol):
    """Lists the entries of a cache for an eviction policy. Each call is one query."""

    def __call__(self, most: int = -1, *, kind: str | None = None) -> Sequence[tuple[str, int]]:
        """``(digest, size_bytes)`` of entries, oldest first.

        Parameters
        ----------
        most : int
            Largest number of entries; -1: all. Reading 10,000 takes 8 ms.
        kind : str, optional
            Only ``"array"`` (densities) or ``"object"`` (byte tier). By default both. Listings are
            never included: they are small, and offline runs need them.
        """


class EvictionPolicy(Protocol):
    """Chooses which entries make room for a new one once ``cache.limit`` is reached.

    ``cache.eviction`` names a built-in policy. Any object with this method can take its place, in
    one process and in the DataLoader workers that it starts later::

        from zarrcache.disk import choose_victims

        class Smallest:
            def victims(self, digest, needed_bytes, stored):
                by_size = sorted(stored(), key=lambda entry: entry[1])
                return choose_victims(by_size, needed_bytes)

        reader.cache.set_eviction_policy(Smallest())

    If ``victims`` raises an exception, the read that stores raises it: it is not a cache fault.

    It is called in the process that stores, from any of its threads, and has to be picklable if
    workers are spawned. Whatever it returns, the limit holds: a new entry is stored only if there
    is room.
    """

    def victims(self, digest: str, needed_bytes: int, stored: StoredEntries) -> Sequence[str]:
        """Digests of the entries to drop; if empty, the new entry is a bypass.

        Parameters
        ----------
        digest : str
            The new entry.
        needed_bytes : int
            Bytes to free on disk.
        stored : StoredEntries
        """


class AdmitUntilFull:
    """``eviction: none``: drop nothing.

    This is the default because each epoch reads each sample once, in a new order. No policy that
    does not know this order has a higher hit rate than cache size / dataset size. LRU evicts what
    the rest of the epoch still needs, and reaches 15 % where this policy reaches 50 %.
    """

    def victims(self, digest: str, needed_bytes: int, stored: StoredEntries) -> Sequence[str]:
        """See :class:`EvictionPolicy`."""
        return ()


class LeastRecentlyStored:
    """``eviction: least-recently-stored``: drop the oldest entries."""

    def victims(self, digest: str, needed_bytes: int, stored: StoredEntries) -> Sequence[str]:
        """See :class:`EvictionPolicy`."""
        for most in _PAGES:
            oldest = stored(most)
            if sum(size_bytes for _, size_bytes in oldest) >= needed_bytes:
                break
        return choose_victims(oldest, needed_bytes)


def policy_of(eviction: Eviction) -> EvictionPolicy:
    """The policy that ``cache.eviction`` names.

    ``belady`` needs the order of the samples. Until the training installs it
    (``zarrcache.train.Lookahead``), the cache admits until it is full.
    """
    return LeastRecentlyStored() if eviction == "least-recently-stored" else AdmitUntilFull()


def disk_bytes(nbytes: int) -> int:
    """Bytes that a file of ``nbytes`` occupies in blocks of 4 KiB, the smallest unit."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def min_free_bytes(min_free: int | Percent, total_bytes: int) -> int:
    """Bytes of a file system of ``total_bytes`` that stay free for other programs."""
    return int(total_bytes * min_free / 100) if isinstance(min_free, Percent) else min_free


def admit(
    size_bytes: int, *, volume_bytes: int, limit_bytes: int, free_bytes: int, min_free_bytes: int
) -> Admission:
    """Whether a file of ``size_bytes`` may be written, or why not."""
    if size_bytes > limit_bytes:
        return Admission.TOO_LARGE
    if volume_bytes + size_bytes > limit_bytes:
        return Admission.OVER_LIMIT
    if free_bytes - size_bytes < min_free_bytes:
        return Admission.DISK_FULL
    return Admission.ADMIT


def choose_victims(candidates: Iterable[tuple[str, int]], needed_bytes: int) -> list[str]:
    """The first names whose sizes add up to ``needed_bytes``; all names if they do not suffice.

    ``candidates`` are pairs ``(name, size_bytes)``.
    """
    victims: list[str] = []
    freed = 0
    for name, size_bytes in candidates:
        if freed >= needed_bytes:
            break
        victims.append(name)
        freed += size_bytes
    return victims


def is_fresh(stored_source: str, current_source: str | None) -> bool:
    """Whether an entry still matches the origin's listing; True for ``None`` (not listed)."""
    return current_source is None or stored_source == current_source
