"""Compute which rank reads which sample in each epoch, as a function of the seed.

Every process can therefore compute the past and the future order of all ranks. There are two ways
to assign samples to ranks:

``global``
    One shuffle over all samples, dealt out to the ranks. A node reads other samples in each epoch,
    so the hit rate of a cache that holds a fraction of the data is that fraction.
``node``
    Each sample belongs to one node permanently and is shuffled within it. A node's cache needs room
    for the node's share only, and from the second epoch on nothing is read from the origin. The
    cost: a global batch has equally many samples of each share, and two samples of one share are
    never on two nodes in the same step. Shares are drawn by a hash of the names, so that each is a
    random part of the whole.

With one node both are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import cached_property
from zarrcache._units import one_of, whole_number
from zarrcache.errors import ConfigError

__all__ = ["Assignment", "Schedule", "Segment", "node_of"]

Assignment = Literal["global", "node"]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of an epoch that one run of the job read before it ended.

    Attributes
    ----------
    node_of_rank : tuple of int
        The node of each rank of that run.
    taken : int
        Number of samples that each rank trained on.
    """

    node_of_rank: tuple[int, ...]
    taken: int


@dataclass(frozen=True)
class Schedule:
    """The orders of all ranks, in all epochs.

    Attributes
    ----------
    names : tuple of str
        Task ids of the samples. The node of a sample depends on its id, not on its position.
    assignment : {"global", "node"}
    node_of_rank : tuple of int
        The node of each rank.
    seed : int
    shuffle : bool
        False keeps the order of ``names`` and deals it out to the ranks.
    drop_last : bool
        All ranks get the same number of samples, as with torch's ``DistributedSampler``: by leaving
        out up to one sample per rank, or, if False, by reading up to one per rank twice.
    """

    names: tuple[str, ...]
    assignment: Assignment = "global"
    node_of_rank: tuple[int, ...] = (0,)
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        one_of("assignment", self.assignment, "global", "node")
        whole_number("seed", self.seed)

    @property
    def samples_of_rank(self) -> int:
        """Number of samples that each rank reads in a whole epoch."""
        return self._each(len(self.names), len(self.node_of_rank))

    def orders(self, epoch: int, history: Sequence[Segment] = ()) -> Indices:
        """Indices that each rank reads in an epoch, in its order.

        Parameters
        ----------
        epoch : int
        history : sequence of Segment
            The part of this epoch that earlier runs of the job have read. The rest is distributed
            over the current ranks, whose number may differ.

        Returns
        -------
        ndarray, shape (ranks, samples of a rank), int64
        """
        left = np.arange(len(self.names))
        for number, segment in enumerate(history):
            taken = self._share_out(epoch, left, number, segment.node_of_rank)[:, : segment.taken]
            left = np.setdiff1d(left, taken)
        return self._share_out(epoch, left, len(history), self.node_of_rank)

    def node_order(self, epoch: int, node: int, history: Sequence[Segment] = ()) -> Indices:
        """Indices that one node reads in an epoch, in time order if its ranks advance together."""
        ranks = [rank for rank, its_node in enumerate(self.node_of_rank) if its_node == node]
        return self.orders(epoch, history)[ranks].T.ravel()

    def node_orders(self, epoch: int) -> list[Indices]:
        """`node_order` of every node, at the cost of one call."""
        orders = self.orders(epoch)
        ranks = np.argsort(self.node_of_rank, kind="stable")
        counts = np.bincount(self.node_of_rank)
        return [orders[own].T.ravel() for own in np.split(ranks, np.cumsum(counts)[:-1])]

    @cached_property
    def owners(self) -> Indices:
        """The node of each sample; 0 for all with ``global``."""
        return self._owners_among(self._groups(self.node_of_rank))

    def _each(self, count: int, ranks: int) -> int:
        return count // ranks if self.drop_last else -(-count // ranks)

    def _groups(self, node_of_rank: Sequence[int]) -> list[list[int]]:
        """Ranks that share one shuffle: all of them, or those of each node."""
        if self.assignment == "global":
            return [list(range(len(node_of_rank)))]
        return [
            [rank for rank, node in enumerate(node_of_rank) if node == number]
            for number in range(max(node_of_rank) + 1)
        ]

    def _owners_among(self, groups: Sequence[Sequence[int]]) -> Indices:
        return node_of(self.names, [len(ranks) for ranks in groups])

    def _share_out(
        self, epoch: int, left: Indices, start: int, node_of_rank: tuple[int, ...]
    ) -> Indices:
        groups, ranks = self._groups(node_of_rank), len(node_of_rank)
        each = self._each(len(left), ranks)
        orders = np.empty((ranks, each), np.int64)
        if not each:
            return orders
        owners = self.owners if node_of_rank == self.node_of_rank else self._owners_among(groups)
        for number, (members, share) in enumerate(
            zip(groups, _shares(left, owners[left], list(map(len, groups))), strict=True)
        ):
            if self.shuffle:
                share = np.random.default_rng([self.seed, epoch, number, start]).permutation(share)
            # Padded by repeating from the start, as torch does. A share without samples (more
            # ranks than samples) repeats those of all nodes.
            order = np.resize(share if len(share) else left, len(members) * each)
            for place, rank in enumerate(members):
                orders[rank] = order[place :: len(members)]
        return orders


def node_of(names: Sequence[str], nodes: int | Sequence[int]) -> Indices:
    """Assign each sample to a node, identically in every process and for any order of the names.

    The samples are sorted by a hash of their task ids, and the sorted list is cut into equal parts.
    Shares differ by at most one sample; if samples are added or left out, few change their node. A
    dataset's name before the id (``0/mp-1``) does not count, so that `zarrcache warm`, which
    knows one dataset, and a training with several agree.

    Parameters
    ----------
    names : sequence of str
    nodes : int or sequence of int
        The number of nodes, or the weight (number of ranks) of each.

    Returns
    -------
    ndarray, shape (samples,), int64

    Raises
    ------
    ConfigError
        There is no node, or one has no rank.
    """
    weights = np.ones(nodes, np.int64) if isinstance(nodes, int) else np.asarray(nodes, np.int64)
    if not len(weights) or (weights < 1).any():
        raise ConfigError(
            f"nodes is {nodes!r}; it has to be a whole number from 1, or the number of ranks of "
            "each node."
        )
    quotas = _quotas(len(names), weights)
    owners = np.empty(len(names), np.int64)
    if len(weights) == 1:
        owners[:] = 0
        return owners
    hashed = np.array(
        [
            int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest())
            for id_ in (name.rpartition("/")[2] for name in names)
        ],
        np.uint64,
    )
    owners[np.argsort(hashed, kind="stable")] = np.repeat(np.arange(len(weights)), quotas)
    return owners


def _quotas(count: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cut ``count`` into parts proportional to ``weights``.

    Each part is the weight times the samples per rank, rounded up or down, so no rank repeats a
    sample while another has one to spare.
    """
    ends: NDArray[np.int64] = np.concatenate(([0], np.cumsum(weights))) * count // weights.sum()
    return np.diff(ends)


def _shares(left: Indices, owners: Indices, weights: Sequence[int]) -> list[Indices]:
    """Distribute the rest of an epoch by owner, then even out the numbers.

    While the nodes stay the same there is nothing to even out. After their number has changed, a
    few samples are read by nodes that do not own them, so that all ranks end together.
    """
    quotas = _quotas(len(left), np.asarray(weights, np.int64))
    own = [left[owners == number] for number in range(len(weights))]
    spare = np.concatenate([mine[quota:] for mine, quota in zip(own, quotas, strict=True)])
    shares = []
    for mine, quota in zip(own, quotas, strict=True):
        lacking = max(0, quota - len(mine))
        shares.append(np.concatenate((mine[:quota], spare[:lacking])))
        spare = spare[lacking:]
    return shares
