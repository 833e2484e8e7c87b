"""Track the order of a rank's reads and its position, shared by all processes of the rank.

The orders come from a sampler's seeds, or from lists. Reads are counted where they happen, in
memory that the rank's processes share: DataLoader workers count, and the look-ahead process reads
the counts.
"""

from __future__ import annotations

import mmap
import operator
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ROLES, Role, cached_property
from zarrcache.data import Read
from zarrcache.errors import ConfigError
from zarrcache.stats import SharedFile
from zarrcache.train.schedule import Schedule, Segment

__all__ = ["Listed", "Orders", "ReadProgress", "Scheduled"]

Indices = NDArray[np.int64]
_ROLE = {role: number for number, role in enumerate(ROLES)}


@dataclass(frozen=True)
class Scheduled:
    """The order of reads in each epoch, by a ``NodeSampler``, as positions in ``names``.

    Attributes
    ----------
    schedule : Schedule
    rank : int
    epoch : int
        The epoch in which the job was resumed.
    history : tuple of Segment
        The part of that epoch that earlier runs of the job have read.
    """

    schedule: Schedule
    rank: int = 0
    epoch: int = 0
    history: tuple[Segment, ...] = ()

    @property
    def names(self) -> Sequence[str]:
        return self.schedule.names

    @property
    def node(self) -> int:
        """Number of this node."""
        return self.schedule.node_of_rank[self.rank]

    @property
    def ranks(self) -> int:
        """Number of ranks on this node; they are assumed to advance together."""
        return self.schedule.node_of_rank.count(self.node)

    @property
    def epochs_ahead(self) -> int:
        """Epochs, with the current one, that decide which samples are needed last."""
        # With n nodes, a node reads a sample again after n epochs on average. For four nodes with
        # room for a quarter each, two epochs reach 75 % of the hits of offline Belady, three 92 %,
        # four 99.5 % and five all (tests/unit/train/test_belady.py).
        return 1 + max(self.schedule.node_of_rank) + 1

    def of_rank(self, epoch: int) -> Indices:
        order: Indices = self.schedule.orders(epoch, self._history(epoch))[self.rank]
        return order

    def of_node(self, epoch: int) -> Indices:
        return self.schedule.node_order(epoch, self.node, self._history(epoch))

    def _history(self, epoch: int) -> tuple[Segment, ...]:
        return self.history if epoch == self.epoch else ()


@dataclass(frozen=True)
class Listed:
    """Orders that any sampler drew in advance, one list per epoch, with repetitions or without.

    An epoch after the last one is empty.

    >>> Listed(("mp-1", "mp-2"), (("mp-2", "mp-2"), ("mp-1", "mp-2"))).of_rank(0).tolist()
    [1, 1]

    Raises
    ------
    ConfigError
        A sample is not in ``names``.
    """

    names: tuple[str, ...]
    epochs: tuple[tuple[str, ...], ...] = field(repr=False)
    ranks: int = 1

    def __post_init__(self) -> None:
        unknown = sorted({name for order in self.epochs for name in order} - set(self.names))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ConfigError(
                f"order contains {unknown[0]!r}{more}, which the dataset does not. Give names of "
                "dataset.task_ids."
            )

    @classmethod
    def of(cls, order: Any, names: tuple[str, ...], *, ranks: int = 1) -> Listed:
        """Convert a user's lists of names or positions, one per epoch.

        Raises
        ------
        ConfigError
            ``order`` is something else, or contains a sample that is not in ``names``.
        """
        epochs = _listed(order)
        lists = None if epochs is None else [_listed(epoch) for epoch in epochs]
        if lists is None or None in lists:
            raise ConfigError(
                f"order is {reprlib.repr(order)}; give a NodeSampler, or a list of task ids or "
                "positions for each epoch (for one epoch: [positions])."
            )
        return cls(
            names,
            tuple(
                tuple(_named(one, names, number) for one in epoch or ())
                for number, epoch in enumerate(lists)
            ),
            ranks,
        )

    @property
    def epochs_ahead(self) -> int:
        return max(1, len(self.epochs))

    def of_rank(self, epoch: int) -> Indices:
        number = {name: i for i, name in enumerate(self.names)}
        return np.array(
            [number[name] for name in self.epochs[epoch]] if 0 <= epoch < len(self.epochs) else [],
            np.int64,
        )

    def of_node(self, epoch: int) -> Indices:
        return self.of_rank(epoch)


def _listed(values: Any) -> list[Any] | None:
    """``values`` as a list, or None if it is not a sequence.

    A torch sampler is refused: it would draw another order here than in the loader, and the batches
    of a batch sampler are not epochs.
    """
    if isinstance(values, (str, bytes, Mapping)) or not (
        hasattr(values, "__len__") and hasattr(values, "__getitem__")
    ):
        return None
    try:
        return list(values)
    except TypeError:  # a zero-dimensional array
        return None


def _named(one: Any, names: tuple[str, ...], epoch: int) -> str:
    if isinstance(one, str):
        return one
    try:
        position = operator.index(one)
    except TypeError:
        position = -1
    if not 0 <= position < len(names):
        raise ConfigError(
            f"order contains {reprlib.repr(one)} in epoch {epoch}; the dataset has {len(names)} "
            f"samples. Give names of dataset.task_ids, or positions from 0 to {len(names) - 1}."
        )
    return names[position]


Orders: TypeAlias = Scheduled | Listed


class ReadProgress:
    """The orders, and how often each density was read in the current epoch.

    Shared by the processes of one rank, forked or spawned. Counting takes no lock: if two processes
    read one density in the same microsecond, one count is lost. That costs an extra fetch or an
    early eviction, never data.

    Parameters
    ----------
    orders : Orders
    epoch : int
    """

    def __init__(self, orders: Orders, epoch: int = 0) -> None:
        self.orders = orders
        self._token = secrets.randbits(62)
        self._file = SharedFile.new()
        self._header[1] = self._token
        self.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {"orders": self.orders, "_token": self._token, "_file": self._file}

    @property
    def epoch(self) -> int:
        """The epoch that is being read."""
        return int(self._header[0])

    @property
    def is_shared(self) -> bool:
        """Whether this process shares the counts; False if it was spawned without /proc."""
        return int(self._header[1]) == self._token

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch with all counts at 0."""
        if epoch != self.epoch or not self.is_shared:
            # In this order: while the two header fields differ, the counts belong to no epoch.
            self._header[0] = epoch
            self._counts[:] = 0
            self._header[2] = epoch

    def read_started(self, task_id: str, role: Role) -> None:
        """Count a read that starts. Names outside the orders are ignored."""
        sample = self._number.get(task_id)
        if sample is not None:
            self._counts[0, sample, _ROLE[role]] += 1

    def read_finished(self, read: Read) -> None:
        """Count a read that has finished."""
        sample = self._number.get(read.task_id)
        if sample is not None:
            self._counts[1, sample, _ROLE[read.role]] += 1

    def has_started(self, epoch: int, sample: int, role: int, nth: int = 0) -> bool:
        """Whether the ``nth`` read (from 0) of a sample in an epoch has started.

        Also True for every read of an epoch that has ended.
        """
        return self._is_counted(0, epoch, sample, role, nth)

    def has_finished(self, epoch: int, sample: int, role: int, nth: int = 0) -> bool:
        """Whether it has finished, or its epoch is over."""
        return self._is_counted(1, epoch, sample, role, nth)

    def _is_counted(self, kind: int, epoch: int, sample: int, role: int, nth: int) -> bool:
        now = self.epoch
        return epoch < now or (
            epoch == now == self._header[2] and int(self._counts[kind, sample, role]) > nth
        )

    def counts(self, epoch: int) -> Indices | None:
        """Reads started and reads finished in an epoch, shape (2, samples, 2): data, label.

        None if another epoch is being read.
        """
        if self._header[2] != epoch:
            return None
        counts: Indices = self._counts.astype(np.int64)
        return counts if self.epoch == epoch else None

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.orders.names)}

    @cached_property
    def _map(self) -> mmap.mmap:
        return self._file.map(24 + 2 * self._samples * len(ROLES) * 2)

    @property
    def _samples(self) -> int:
        return len(self.orders.names)

    @cached_property
    def _header(self) -> NDArray[np.int64]:
        """The epoch, the token, and the epoch of the counts."""
        return np.frombuffer(self._map, np.int64, 3)

    @cached_property
    def _counts(self) -> NDArray[np.uint16]:
        """Reads started and finished, by sample and role."""
        return np.frombuffer(self._map, np.uint16, offset=24).reshape(2, self._samples, len(ROLES))
