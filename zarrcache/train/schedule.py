"""Which rank reads which sample, in each epoch: a function of the seed, so that every process knows
the past and the future of all.

Two ways to share an epoch out:

``global``
    One shuffle over all samples, dealt out to the ranks. A node sees other samples in each epoch,
    so a cache that holds a share of the data has a sample with the probability of that share.
``node``
    A sample belongs to one node for good and is shuffled within it. Each node needs room for its
    own share only, and from the second epoch on nothing is read from the origin. The price: a batch
    that all nodes make together holds as many samples of each node's share, and two samples of one
    node never meet on two nodes. Shares are drawn by a hash of the name, so that a share looks like
    the whole.

With one node both are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zarrcache.errors import ConfigError

__all__ = ["Assignment", "Schedule", "Segment", "node_of"]

Assignment = Literal["global", "node"]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """What was read of an epoch before the job was started anew.

    Attributes
    ----------
    node_of_rank : tuple of int
        The ranks of that job and their nodes.
    taken : int
        Samples that each rank had trained on.
    """

    node_of_rank: tuple[int, ...]
    taken: int


@dataclass(frozen=True)
class Schedule:
    """Orders of all ranks.

    Attributes
    ----------
    names : tuple of str
        Of the samples: task ids. Which node a sample belongs to depends on its name, not on its
        position.
    assignment : {"global", "node"}
    node_of_rank : tuple of int
        The node of each rank.
    seed : int
    shuffle : bool
        False: in the order of the names, shared out all the same.
    drop_last : bool
        Ranks get equal counts: by reading up to one sample a rank twice, or, with this, by leaving
        up to that many out. As torch's ``DistributedSampler`` does.
    nbytes : tuple of int, optional
        Sizes of the samples: shares of the nodes are balanced by bytes then, not only by number.
    """

    names: tuple[str, ...]
    assignment: Assignment = "global"
    node_of_rank: tuple[int, ...] = (0,)
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    nbytes: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.assignment not in ("global", "node"):
            raise ConfigError(
                f"assignment is {self.assignment!r}; it has to be 'global' or 'node'."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it has to be a whole number from 0.")
        if self.nbytes is not None and len(self.nbytes) != len(self.names):
            raise ConfigError(f"nbytes has {len(self.nbytes)} sizes for {len(self.names)} samples.")

    @property
    def samples_of_rank(self) -> int:
        """How many samples each rank reads in a whole epoch."""
        return self._each(len(self.names), len(self.node_of_rank))

    def orders(self, epoch: int, history: Sequence[Segment] = ()) -> Indices:
        """Indices that each rank reads in an epoch, in its order.

        Parameters
        ----------
        epoch : int
        history : sequence of Segment
            What earlier starts of the job have read of this epoch: the rest is shared out anew,
            among however many ranks there are now.

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
        """What the ranks of one node read in an epoch, in the order of time if they keep step."""
        ranks = [rank for rank, its_node in enumerate(self.node_of_rank) if its_node == node]
        return self.orders(epoch, history)[ranks].T.ravel()

    def node_orders(self, epoch: int) -> list[Indices]:
        """`node_order` of every node, for the work of one."""
        orders = self.orders(epoch)
        ranks = np.argsort(self.node_of_rank, kind="stable")
        counts = np.bincount(self.node_of_rank)
        return [orders[own].T.ravel() for own in np.split(ranks, np.cumsum(counts)[:-1])]

    @cached_property
    def owners(self) -> Indices:
        """The node that each sample belongs to; 0 for all with ``global``."""
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
        return node_of(self.names, [len(ranks) for ranks in groups], nbytes=self.nbytes)

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
            # Repeated from its beginning, as torch does; where there are more ranks than samples,
            # from the beginning of all.
            order = np.resize(share if len(share) else left, len(members) * each)
            for place, rank in enumerate(members):
                orders[rank] = order[place :: len(members)]
        return orders


def node_of(
    names: Sequence[str], nodes: int | Sequence[int], *, nbytes: Sequence[int] | None = None
) -> Indices:
    """The node that each sample belongs to; the same in every process, and whatever the order of
    the names.

    Samples are put in the order of a hash of their names, which is cut into equal parts: shares
    differ by one sample at the most, and if samples are added, few change their node.

    Parameters
    ----------
    names : sequence of str
    nodes : int or sequence of int
        How many nodes, or the weight (number of ranks) of each.
    nbytes : sequence of int, optional
        Balance the bytes as well: the largest come first, each to the node that has least for its
        weight and has not its number yet.

    Returns
    -------
    ndarray, shape (samples,), int64
    """
    weights = np.ones(nodes, np.int64) if isinstance(nodes, int) else np.asarray(nodes, np.int64)
    if not len(weights) or (weights < 1).any():
        raise ConfigError(f"{nodes!r} is no number of nodes; there has to be one at the least.")
    quotas = _quotas(len(names), weights)
    owners = np.empty(len(names), np.int64)
    if len(weights) == 1:
        owners[:] = 0
        return owners
    hashed = np.array(
        [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) for name in names],
        np.uint64,
    )
    if nbytes is None:
        owners[np.argsort(hashed, kind="stable")] = np.repeat(np.arange(len(weights)), quotas)
        return owners
    sizes = np.asarray(nbytes, np.int64)
    filled, counts = np.zeros(len(weights)), np.zeros(len(weights), np.int64)
    for index in np.lexsort((hashed, -sizes)):
        node = int(np.argmin(np.where(counts < quotas, filled / weights, np.inf)))
        owners[index] = node
        filled[node] += sizes[index]
        counts[node] += 1
    return owners


def _quotas(count: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """``count`` in parts proportional to ``weights``. None is larger than its weight times the
    samples of a rank, rounded up, nor smaller than that rounded down: no rank reads twice what
    another one could read once.
    """
    ends: NDArray[np.int64] = np.concatenate(([0], np.cumsum(weights))) * count // weights.sum()
    return np.diff(ends)


def _shares(left: Indices, owners: Indices, weights: Sequence[int]) -> list[Indices]:
    """Cut what is left of an epoch by its owners, and even that out.

    As long as a job goes on with the same nodes nothing has to be evened out. After a change of
    their number a few samples have to be read by a node that does not own them, so that all ranks
    end together.
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
