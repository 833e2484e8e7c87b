"""What a rank reads next, and how far it is: known to every process of the rank, so that the cache
need not guess.

The orders come from a sampler's seeds, or from lists. How far the training is, is counted where
densities are read, in memory that the rank's processes share: DataLoader workers count, a
prefetcher looks.
"""

from __future__ import annotations

import mmap
import operator
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ROLES, Role
from zarrcache._shared_memory import SharedFile
from zarrcache.data import Read
from zarrcache.errors import ConfigError
from zarrcache.train.schedule import Schedule, Segment

__all__ = ["Listed", "Orders", "ReadProgress", "Scheduled"]

Indices = NDArray[np.int64]
_ROLE = {role: number for number, role in enumerate(ROLES)}


class Orders(Protocol):
    """What is read in each epoch, as positions in ``names``; empty after the last epoch that is
    known.

    Attributes
    ----------
    names : sequence of str
    ranks : int
        Ranks of this node, which keep step.
    epochs_ahead : int
        How many epochs are worth looking at, the present one included, to tell which samples are
        needed last.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def ranks(self) -> int: ...

    @property
    def epochs_ahead(self) -> int: ...

    def of_rank(self, epoch: int) -> Indices: ...

    def of_node(self, epoch: int) -> Indices: ...


@dataclass(frozen=True)
class Scheduled:
    """The orders of a ``NodeSampler``.

    Attributes
    ----------
    schedule : Schedule
    rank : int
    epoch, history
        The epoch in which the job was started anew, and what had been read of it.
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
        return self.schedule.node_of_rank.count(self.node)

    @property
    def epochs_ahead(self) -> int:
        # A node of four comes back to a sample after four epochs, on average. Of what offline
        # Belady hits, two epochs ahead reach 75 %, three 92 %, four 99.5 % and five all (4 nodes,
        # room for a quarter; tests/unit/train/test_belady.py).
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
    """Orders that were drawn beforehand, a list an epoch: of any sampler, with replacement too.

    >>> Listed(("mp-1", "mp-2"), (("mp-2", "mp-2"), ("mp-1", "mp-2"))).of_rank(0).tolist()
    [1, 1]

    Raises
    ------
    ConfigError
        A sample that is not in ``names``.
    """

    names: tuple[str, ...]
    epochs: tuple[tuple[str, ...], ...] = field(repr=False)
    ranks: int = 1

    def __post_init__(self) -> None:
        unknown = sorted({name for order in self.epochs for name in order} - set(self.names))
        if unknown:
            more = (
                f" and {len(unknown) - 1} more, which are no samples"
                if len(unknown) > 1
                else ", which is no sample"
            )
            raise ConfigError(
                f"the order has {unknown[0]!r}{more}. Give names of dataset.task_ids."
            )

    @classmethod
    def of(cls, order: Any, names: tuple[str, ...], *, ranks: int = 1) -> Listed:
        """What a user gave: names or positions, a list an epoch.

        Raises
        ------
        ConfigError
            It is something else, or has a sample that is not in ``names``.
        """
        epochs = _listed(order)
        lists = None if epochs is None else [_listed(epoch) for epoch in epochs]
        if lists is None or None in lists:
            raise ConfigError(
                f"order is {reprlib.repr(order)}; give a NodeSampler, or a list of task ids or "
                "positions for each epoch (of one epoch: [positions])."
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
    """None of what is no sequence: a sampler of torch would draw anew, and a batch sampler's
    batches are no epochs.
    """
    if isinstance(values, (str, bytes, Mapping)) or not (
        hasattr(values, "__len__") and hasattr(values, "__getitem__")
    ):
        return None
    try:
        return list(values)
    except TypeError:  # an array of no dimension
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
            f"the order has {reprlib.repr(one)} in epoch {epoch}, and there are {len(names)} "
            "samples: give names of dataset.task_ids, or positions "
            f"from 0 to {len(names) - 1}."
        )
    return names[position]


class ReadProgress:
    """Orders, and how often each density was asked for in the present epoch. Shared by the
    processes of one rank, forked or spawned.

    A count is wrong by one if two processes ask for one density in the same microsecond. That costs
    a fetch too many or an eviction too early, never data.

    Parameters
    ----------
    orders : Orders
    epoch : int
    """

    def __init__(self, orders: Orders, epoch: int = 0) -> None:
        self.orders = orders
        self._token = secrets.randbits(62)
        self._file = SharedFile.new()
        self._words[1] = self._token
        self.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {"orders": self.orders, "_token": self._token, "_file": self._file}

    @property
    def epoch(self) -> int:
        """The epoch that is being read."""
        return int(self._words[0])

    @property
    def is_shared(self) -> bool:
        """Whether this process sees what the others count. Not if it was spawned where there is no
        ``/proc``.
        """
        return int(self._words[1]) == self._token

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: nothing of it has been asked for."""
        if epoch != self.epoch or not self.is_shared:
            # In this order: while the two words differ, the counts are of neither epoch.
            self._words[0] = epoch
            self._counts[:] = 0
            self._words[2] = epoch

    def read_started(self, task_id: str, role: Role) -> None:
        """Count a read as asked for. Names outside the training split are ignored."""
        sample = self._number.get(task_id)
        if sample is not None:
            self._counts[0, sample, _ROLE[role]] += 1

    def read_finished(self, read: Read) -> None:
        """Count a read as done."""
        sample = self._number.get(read.task_id)
        if sample is not None:
            self._counts[1, sample, _ROLE[read.role]] += 1

    def has_begun(self, epoch: int, sample: int, role: int, nth: int = 0) -> bool:
        """Whether the ``nth`` reading (from 0) of a sample in an epoch was asked for, or will not
        be any more.
        """
        return self._is_counted(0, epoch, sample, role, nth)

    def has_ended(self, epoch: int, sample: int, role: int, nth: int = 0) -> bool:
        """Whether it has been had."""
        return self._is_counted(1, epoch, sample, role, nth)

    def _is_counted(self, what: int, epoch: int, sample: int, role: int, nth: int) -> bool:
        now = self.epoch
        return epoch < now or (
            epoch == now == self._words[2] and int(self._counts[what, sample, role]) > nth
        )

    def counts(self, epoch: int) -> Indices | None:
        """How often each sample was asked for and had in an epoch, shape (2, samples, 2): data,
        label. None if another one is being read.
        """
        if self._words[2] != epoch:
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
    def _words(self) -> NDArray[np.int64]:
        """The epoch, the token, and the epoch that the counts are of."""
        return np.frombuffer(self._map, np.int64, 3)

    @cached_property
    def _counts(self) -> NDArray[np.uint16]:
        """Asked for and had, by sample and role."""
        return np.frombuffer(self._map, np.uint16, offset=24).reshape(2, self._samples, len(ROLES))
