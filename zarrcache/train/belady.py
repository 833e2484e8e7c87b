"""Belady's choice: of what is stored, drop what is needed last, and store nothing that is needed
later than all of it.

With random orders known beforehand that is the most that a cache can do: 4 nodes that each have
room for a quarter of the data hit 54 to 56 % of a global shuffle, where admit-until-full hits 25 %
and LRU 14 %.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import is_digest
from zarrcache.disk import StoredEntries
from zarrcache.train.progress import ReadProgress

__all__ = ["NEVER", "BeladyPolicy", "NextUses"]

Indices = NDArray[np.int64]

#: Next use of what is not needed in the epochs that are looked at.
NEVER = np.iinfo(np.int64).max
#: What is stored is looked at anew when there was no room for one sixty-fourth of its number.
_SHARE = 64
#: Samples that were read last, and stay: what the workers of a DataLoader have ahead of the
#: training.
_GRACE = 64


class NextUses:
    """When samples are used, by the order of the coming epochs in one array. Pure.

    Parameters
    ----------
    order : array of int
        Samples in the order of their use.
    samples : int
        How many there are.
    """

    def __init__(self, order: Indices, samples: int) -> None:
        self._uses = np.append(np.argsort(order, kind="stable"), NEVER)
        self._starts = np.concatenate(([0], np.cumsum(np.bincount(order, minlength=samples))))

    def of(self, samples: Indices, passed: Indices) -> Indices:
        """Positions of the next use.

        Parameters
        ----------
        samples : array of int
        passed : array of int
            How many uses of each of them, from the beginning of the order, are over.
        """
        at = self._starts[samples] + passed
        found: Indices = np.where(
            at < self._starts[samples + 1], self._uses[np.minimum(at, len(self._uses) - 1)], NEVER
        )
        return found


@dataclass
class _Known:
    """What follows from the orders, for one epoch; and what was found in it to be needed last."""

    epoch: int
    uses: NextUses
    order: Indices  # of the node, this epoch
    own: Indices  # samples of this rank
    # next use, digest, bytes; last first
    candidates: deque[tuple[int, str, int]] = field(default_factory=deque)
    until_anew: int = 0


class BeladyPolicy:
    """Chooses victims by what this node reads next. One for each process, for all of its threads;
    pickles without what it has worked out.

    Without a lock, which a process forked meanwhile would wait for: two threads never get the same
    victim, and at worst one gets the second best.

    Parameters
    ----------
    progress : Course
    names : array of uint64, shape (samples, 2)
        The first 16 hex digits of the entry of each sample's data and label.
    """

    def __init__(self, progress: ReadProgress, names: NDArray[np.uint64]) -> None:
        self._progress = progress
        self._names = names
        self._place = np.argsort(self._names, axis=None)
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[type[BeladyPolicy], tuple[ReadProgress, NDArray[np.uint64]]]:
        return type(self), (self._progress, self._names)

    def victims(self, digest: str, needed_bytes: int, stored: StoredEntries) -> list[str]:
        """Entries that make room for a new one; none if all of those that would have to go are
        needed before it.

        Entries that are no samples of the course are no victims, and are themselves never worth
        one.

        Parameters
        ----------
        digest : str
            Of the new entry.
        needed_bytes : int
        stored : StoredEntries
        """
        known = self._now()
        counts = self._progress.counts(known.epoch)
        # an epoch has ended just now; the room of a look-ahead has another name
        if counts is None or not is_digest(digest):
            return []
        own = int(self._next_uses(known, counts[0], *self._found([digest]))[0])
        if own < 0:
            return []
        if known.until_anew <= 0:
            self._look(known, stored(kind="array"))
        known.until_anew -= 1
        chosen: list[tuple[int, str, int]] = []
        while sum(size for *_, size in chosen) < needed_bytes:
            try:
                chosen.append(known.candidates.popleft())
            except IndexError:
                break
            # A use that is over meanwhile only moves the next one further away: what was needed
            # later than `own` still is.
            if chosen[-1][0] <= own:
                break
        else:
            # By what was needed last in the epoch that has ended meanwhile, nothing may be chosen
            # for this one.
            return (
                [digest for _, digest, _ in chosen] if self._progress.epoch == known.epoch else []
            )
        known.candidates.extendleft(reversed(chosen))
        return []

    def _look(self, known: _Known, rows: Sequence[tuple[Any, ...]]) -> None:
        # a damaged row must stop nobody
        stored = [row for row in rows if is_digest(row[0]) and isinstance(row[1], int)]
        counts = self._progress.counts(known.epoch)
        if counts is None:
            return
        asked_for, had = counts
        sample, role = self._found([digest for digest, _ in stored])
        uses = self._next_uses(known, asked_for, sample, role)
        # A use counts as over when it begins, and its file has to be there until it ends.
        uses[(asked_for > had)[sample, role]] = -1
        # What a DataLoader worker has read may not have reached the training yet.
        steps = self._steps(known, asked_for)
        uses[
            np.isin(sample, known.order[max(0, steps - min(_GRACE, len(stored) // 16)) : steps])
        ] = -1
        last_first = np.argsort(-uses, kind="stable")
        known.candidates = deque(
            (int(uses[place]), *stored[place]) for place in last_first if uses[place] >= 0
        )
        known.until_anew = max(1, len(stored) // _SHARE)

    def _found(self, digests: Sequence[str]) -> tuple[Indices, Indices]:
        """Sample and role of each entry; sample -1 for what is no sample."""
        if not digests or not self._names.size:
            return np.full(len(digests), -1), np.zeros(len(digests), np.int64)
        wanted = np.array([int(digest[:16], 16) for digest in digests], np.uint64)
        flat = self._names.ravel()
        at = self._place[
            np.minimum(np.searchsorted(flat, wanted, sorter=self._place), flat.size - 1)
        ]
        sample, role = np.divmod(at, self._names.shape[1])
        return np.where(flat[at] == wanted, sample, -1), role

    def _next_uses(
        self, known: _Known, asked_for: Indices, sample: Indices, role: Indices
    ) -> Indices:
        """Positions of the next uses; -1 for what is no sample, NEVER for one that is not needed."""
        return np.where(
            sample >= 0, known.uses.of(sample, self._passed(known, asked_for)[sample, role]), -1
        )

    def _now(self) -> _Known:
        known, epoch, orders = self._known, self._progress.epoch, self._progress.orders
        if known is None or known.epoch != epoch:
            coming = [orders.of_node(epoch + ahead) for ahead in range(orders.epochs_ahead)]
            known = _Known(
                epoch,
                NextUses(np.concatenate(coming), len(self._names)),
                coming[0],
                np.unique(orders.of_rank(epoch)),
            )
            self._known = known
        return known

    def _passed(self, known: _Known, asked_for: Indices) -> Indices:
        """Uses in this epoch that are over, shape (samples, 2): counted for this rank, and the
        others of the node are as far.
        """
        if self._progress.orders.ranks == 1:
            return asked_for
        passed = np.bincount(known.order[: self._steps(known, asked_for)], minlength=len(asked_for))
        both = np.repeat(passed[:, None], asked_for.shape[1], axis=1)
        both[known.own] = asked_for[known.own]
        return both

    def _steps(self, known: _Known, asked_for: Indices) -> int:
        """How much of the node's order is over."""
        return (
            int(asked_for[known.own].sum()) // int(asked_for.shape[1]) * self._progress.orders.ranks
        )
