"""Evict by Belady's rule: drop the entry that is needed last, and admit none needed later.

For orders that are known in advance no policy has a higher hit rate. Four nodes with room for a
quarter of the data each hit 54 to 56 % of a global shuffle; admit-until-full hits 25 %, LRU 14 %.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import is_digest
from zarrcache.disk import StoredEntries
from zarrcache.train.progress import Orders, ReadProgress

__all__ = ["NEVER", "BeladyPolicy", "ComingEpochs"]

Indices = NDArray[np.int64]

#: Next use of a sample that is not needed in the epochs considered.
NEVER = np.iinfo(np.int64).max
#: Victims are ranked again after this fraction (1/64) of the stored entries was not admitted.
_RANKED_SHARE = 64
#: Number of samples read last that are kept: DataLoader workers may hold them before training.
_GRACE = 64


class ComingEpochs:
    """The orders from one epoch on, and the candidates for eviction found in it.

    Attributes
    ----------
    order : array of int
        Samples that the node reads in this epoch.
    own : array of int
        Samples of this rank.
    candidates : deque of (next use, digest, bytes)
        Those that are needed last come first.
    until_ranking : int
        Entries to choose for before the candidates are ranked again.
    """

    def __init__(self, orders: Orders, epoch: int) -> None:
        self.epoch, self._ranks = epoch, orders.ranks
        coming = [orders.of_node(epoch + ahead) for ahead in range(orders.epochs_ahead)]
        self.order, self.own = coming[0], np.unique(orders.of_rank(epoch))
        self.candidates: deque[tuple[int, str, int]] = deque()
        self.until_ranking = 0
        order = np.concatenate(coming)
        counts = np.bincount(order, minlength=len(orders.names))
        self._uses = np.append(np.argsort(order, kind="stable"), NEVER)
        self._starts = np.concatenate(([0], np.cumsum(counts)))

    def next_uses(self, samples: Indices, passed: Indices) -> Indices:
        """Positions of the next uses in the concatenated orders, or NEVER.

        Parameters
        ----------
        samples : array of int
        passed : array of int
            Number of uses of each sample, from the start of the order, that are over.
        """
        at = self._starts[samples] + passed
        found: Indices = np.where(
            at < self._starts[samples + 1], self._uses[np.minimum(at, len(self._uses) - 1)], NEVER
        )
        return found

    def passed(self, started: Indices) -> Indices:
        """Uses in this epoch that are over, shape (samples, 2).

        Counted for this rank; the other ranks of the node are assumed to be as far.
        """
        if self._ranks == 1:
            return started
        passed = np.bincount(self.order[: self.steps(started)], minlength=len(started))
        both = np.repeat(passed[:, None], started.shape[1], axis=1)
        both[self.own] = started[self.own]
        return both

    def steps(self, started: Indices) -> int:
        """Number of reads of the node's order that are over."""
        return int(started[self.own].sum()) // int(started.shape[1]) * self._ranks


class BeladyPolicy:
    """Chooses victims by what this node reads next.

    One object serves all threads of a process. Cached orders are not pickled. It has no lock,
    because a process forked while a thread holds one would wait for it forever. Two threads never
    get the same victim; in a race one gets the second best.

    Parameters
    ----------
    progress : ReadProgress
    names : array of uint64, shape (samples, channels)
        The first 16 hex digits of the digests of each sample's channels of data and label.
    roles : sequence of int, optional
        The role of each channel: 0 data, 1 label. Default: one channel of each.
    """

    def __init__(
        self, progress: ReadProgress, names: NDArray[np.uint64], roles: Sequence[int] = (0, 1)
    ) -> None:
        self._progress = progress
        self._names = names
        self._roles = np.array(roles, np.int64)
        self._place = np.argsort(self._names, axis=None)
        self._current: ComingEpochs | None = None

    def __reduce__(self) -> tuple[type[BeladyPolicy], tuple[Any, ...]]:
        return type(self), (self._progress, self._names, self._roles)

    def victims(self, digest: str, needed_bytes: int, stored: StoredEntries) -> list[str]:
        """Entries to drop for a new one; empty if one of them is needed before it.

        Entries that are not samples of the orders are never victims and never displace any.

        Parameters
        ----------
        digest : str
            Digest of the new entry.
        needed_bytes : int
        stored : StoredEntries
        """
        now = self._of_this_epoch()
        counts = self._progress.counts(now.epoch)
        # None: an epoch has just ended. Loans of the look-ahead have names that are not digests.
        if counts is None or not is_digest(digest):
            return []
        own = int(self._next_uses(now, counts[0], *self._found([digest]))[0])
        if own < 0:
            return []
        if now.until_ranking <= 0:
            self._rank(now, stored(kind="array"))
        now.until_ranking -= 1
        chosen: list[tuple[int, str, int]] = []
        while sum(size for *_, size in chosen) < needed_bytes:
            try:
                chosen.append(now.candidates.popleft())
            except IndexError:
                break
            # A use that has begun since the ranking only moves the next use further away, so a
            # candidate that was needed after `own` still is.
            if chosen[-1][0] <= own:
                break
        else:
            # A ranking of an epoch that has ended by now says nothing about this one.
            return [digest for _, digest, _ in chosen] if self._progress.epoch == now.epoch else []
        now.candidates.extendleft(reversed(chosen))
        return []

    def _rank(self, now: ComingEpochs, rows: Sequence[tuple[Any, ...]]) -> None:
        """Rank the stored entries by their next use, needed last first."""
        # Skip damaged rows.
        stored = [row for row in rows if is_digest(row[0]) and isinstance(row[1], int)]
        counts = self._progress.counts(now.epoch)
        if counts is None:
            return
        started, finished = counts
        sample, role = self._found([digest for digest, _ in stored])
        uses = self._next_uses(now, started, sample, role)
        # A use counts as over when it starts; its file has to stay until it finishes.
        uses[(started > finished)[sample, role]] = -1
        # What a DataLoader worker has read may not have been trained on yet.
        steps = now.steps(started)
        first = max(0, steps - min(_GRACE, len(stored) // 16))
        uses[np.isin(sample, now.order[first:steps])] = -1
        last_first = np.argsort(-uses, kind="stable")
        now.candidates = deque(
            (int(uses[place]), *stored[place]) for place in last_first if uses[place] >= 0
        )
        now.until_ranking = max(1, len(stored) // _RANKED_SHARE)

    def _found(self, digests: Sequence[str]) -> tuple[Indices, Indices]:
        """Sample and role of each entry; sample -1 if the entry is not a sample."""
        if not digests or not self._names.size:
            return np.full(len(digests), -1), np.zeros(len(digests), np.int64)
        wanted = np.array([int(digest[:16], 16) for digest in digests], np.uint64)
        flat = self._names.ravel()
        at = self._place[
            np.minimum(np.searchsorted(flat, wanted, sorter=self._place), flat.size - 1)
        ]
        sample, channel = np.divmod(at, self._names.shape[1])
        return np.where(flat[at] == wanted, sample, -1), self._roles[channel]

    def _next_uses(
        self, now: ComingEpochs, started: Indices, sample: Indices, role: Indices
    ) -> Indices:
        """Positions of the next uses: -1 if not a sample, NEVER if not needed."""
        passed = now.passed(started)[sample, role]
        return np.where(sample >= 0, now.next_uses(sample, passed), -1)

    def _of_this_epoch(self) -> ComingEpochs:
        now, epoch = self._current, self._progress.epoch
        if now is None or now.epoch != epoch:
            now = self._current = ComingEpochs(self._progress.orders, epoch)
        return now
