"""Simulate the hits of a cache of a given size under each eviction policy, from read orders.

Each epoch is a permutation of the samples, so the hit ratio depends only on which samples a node
reads again in later epochs, and when.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Eviction
from zarrcache.errors import ConfigError

__all__ = ["POLICIES", "Epoch", "Policy", "simulate"]

Policy = Literal[Eviction, "least-recently-used"]
Indices = NDArray[np.int64]
POLICIES: tuple[Policy, ...] = get_args(Policy)
#: Runs one epoch: from its reads, whether each of them is a hit.
_Run = Callable[[Indices], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of one node."""

    reads: int
    hits: int
    #: Densities read from the origin, in order.
    missed: Indices


def simulate(
    epochs: Sequence[Indices], sizes: Sequence[int], capacity: int, policy: Policy
) -> list[Epoch]:
    """Simulate consecutive epochs through a cache of ``capacity`` bytes that is empty at first.

    The reads of each epoch are positions in ``sizes``, the bytes on disk of each density.
    ``none`` admits until the cache is full. ``belady`` knows all epochs: it evicts the entry whose
    next use is furthest away, and does not admit a density whose next use is further away than
    those of all entries (L. A. Belady, IBM Systems Journal 5, 78 (1966)); sizes are not weighed.
    ``least-recently-used`` is for comparison; the cache does not offer it.
    """
    if policy not in POLICIES:
        raise ConfigError(
            f"policy is {policy!r}; it must be one of {', '.join(map(repr, POLICIES))}."
        )
    run = _RUNS[policy](np.asarray(sizes, np.int64), capacity, epochs)
    found = []
    for reads in epochs:
        is_hit = run(reads)
        found.append(Epoch(len(reads), int(is_hit.sum()), reads[~is_hit]))
    return found


def _admit_until_full(sizes: NDArray[np.int64], capacity: int, _: Sequence[Indices]) -> _Run:
    is_stored = np.zeros(len(sizes), np.bool_)
    free = capacity

    def run(reads: Indices) -> NDArray[np.bool_]:
        nonlocal free
        is_hit = is_stored[reads]
        for place in np.flatnonzero(~is_hit):
            index = reads[place]
            if is_stored[index]:  # read twice in one epoch
                is_hit[place] = True
            elif sizes[index] <= free:
                is_stored[index] = True
                free -= int(sizes[index])
        return is_hit

    return run


def _oldest_out(sizes: NDArray[np.int64], capacity: int, *, touched: bool) -> _Run:
    """Evict the entry stored first; with ``touched``, the one used least recently."""
    stored: OrderedDict[int, int] = OrderedDict()
    free = capacity

    def run(reads: Indices) -> NDArray[np.bool_]:
        nonlocal free
        is_hit = np.zeros(len(reads), np.bool_)
        for place, index in enumerate(reads.tolist()):
            size = int(sizes[index])
            if index in stored:
                is_hit[place] = True
                if touched:
                    stored.move_to_end(index)
            elif size <= capacity:
                while size > free:
                    free += stored.popitem(last=False)[1]
                stored[index] = size
                free -= size
        return is_hit

    return run


def _belady(sizes: NDArray[np.int64], capacity: int, epochs: Sequence[Indices]) -> _Run:
    every = np.concatenate([*epochs, np.empty(0, np.int64)])
    next_use = _next_uses(every, len(sizes))
    stored: dict[int, int] = {}  # index -> next use
    # (-next use, index); each use pushes a new item, and items that differ from `stored` are stale
    latest: list[tuple[int, int]] = []
    free, now = capacity, 0

    def run(reads: Indices) -> NDArray[np.bool_]:
        nonlocal free, now
        is_hit = np.zeros(len(reads), np.bool_)
        for place, index in enumerate(reads.tolist()):
            following, size = int(next_use[now]), int(sizes[index])
            now += 1
            is_hit[place] = index in stored
            if index in stored:
                stored[index] = following
                heapq.heappush(latest, (-following, index))
                continue
            dropped = []
            while size > free and latest and -latest[0][0] > following:
                when, victim = heapq.heappop(latest)
                if stored.get(victim) == -when:
                    dropped.append((when, victim))
                    free += int(sizes[victim])
                    del stored[victim]
            if size <= free:
                stored[index] = following
                heapq.heappush(latest, (-following, index))
                free -= size
            else:  # does not fit even so: keep the victims
                for when, victim in dropped:
                    stored[victim] = -when
                    free -= int(sizes[victim])
                    heapq.heappush(latest, (when, victim))
        return is_hit

    return run


def _next_uses(reads: Indices, count: int) -> Indices:
    """Position of the next read of the same density, for each read; beyond the end if none."""
    last = np.full(count, len(reads) + 1, np.int64)
    following = np.empty(len(reads), np.int64)
    for place in range(len(reads) - 1, -1, -1):
        following[place] = last[reads[place]]
        last[reads[place]] = place
    return following


_RUNS: dict[str, Callable[[NDArray[np.int64], int, Sequence[Indices]], _Run]] = {
    "none": _admit_until_full,
    "least-recently-stored": lambda sizes, capacity, _: _oldest_out(sizes, capacity, touched=False),
    "least-recently-used": lambda sizes, capacity, _: _oldest_out(sizes, capacity, touched=True),
    "belady": _belady,
}
