"""The orders of reads, and the counts of reads that the processes of a rank share."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

import numpy as np
import pytest

from zarrcache.data import Read
from zarrcache.errors import ConfigError
from zarrcache.train.lookahead import _orders
from zarrcache.train.progress import Listed, ReadProgress, Scheduled
from zarrcache.train.schedule import Schedule, Segment

NAMES = ("mp-0", "mp-1", "mp-2")


def listed(*epochs: tuple[str, ...]) -> ReadProgress:
    """The progress along lists."""
    return ReadProgress(Listed(NAMES, epochs))


def read(progress: ReadProgress, name: str, role: str = "data") -> None:
    progress.read_started(name, role)
    progress.read_finished(Read(name, role, "hit", 0, 0.0))


def asked_for(progress: ReadProgress, epoch: int) -> Any:
    """By sample: data, label."""
    counts = progress.counts(epoch)
    assert counts is not None
    return counts[0].tolist()


def test_lists_are_epochs_and_after_them_nothing_is_known() -> None:
    """A sample may occur twice; one that the dataset does not have is refused."""
    orders = Listed(NAMES, (("mp-2", "mp-0", "mp-2"), ("mp-1",)))
    assert [orders.of_rank(epoch).tolist() for epoch in range(3)] == [[2, 0, 2], [1], []]
    with pytest.raises(ConfigError, match="order contains 'mp-9', which the dataset does not"):
        Listed(NAMES, (("mp-9",),))
    with pytest.raises(ConfigError, match="'mp-8' and 1 more, which"):
        Listed(NAMES, (("mp-9", "mp-8"),))


@pytest.mark.parametrize("order", [[[2, "mp-0"], []], ((2, 0), ()), [np.array([2, 0]), range(0)]])
def test_an_order_is_of_names_or_positions(order: Any) -> None:
    assert _orders(order, NAMES).of_rank(0).tolist() == [2, 0]
    assert _orders(np.array([[2, 0]]), NAMES).of_rank(0).tolist() == [2, 0]


@pytest.mark.parametrize(
    "order",
    [None, 3, [1, 2, 3], np.array([1, 2]), "mp-1", ["mp-1"], [["mp-1"], None],
     {"mp-1": 0}, [{"mp-1": 0}]],
)  # fmt: skip
def test_what_is_not_one_list_per_epoch_is_refused(order: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^order is .*give a NodeSampler, or a list of task ids or positions for each epoch",
    ):
        _orders(order, NAMES)


def test_a_sampler_of_torch_is_refused() -> None:
    """A batch sampler's batches are not epochs; a torch sampler draws another order each time."""
    from torch.utils.data import BatchSampler, RandomSampler  # not for the spawned process below

    one = RandomSampler(NAMES)
    for order in (one, [one], BatchSampler(one, 2, False)):
        test_what_is_not_one_list_per_epoch_is_refused(order)


@pytest.mark.parametrize(
    ("position", "said"),
    [(100, "100"), (3, "3"), (-1, "-1"), (0.5, "0.5"), (None, "None"), ((1,), r"\(1,\)")],
)
def test_a_position_without_a_sample_is_named_with_its_epoch(position: Any, said: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"order contains {said} in epoch 1; .* 3 samples\. .*positions from 0 to 2",
    ):
        _orders([[0], [2, position]], NAMES)


def test_a_schedule_has_the_ranks_own_order_and_its_nodes() -> None:
    """Reads before a restart are left out, in the epoch of the restart only."""
    schedule = Schedule(tuple(f"mp-{n}" for n in range(24)), node_of_rank=(0, 1, 1), seed=3)
    orders = Scheduled(schedule, rank=2, epoch=4, history=(Segment((0, 1, 1), 2),))
    assert (orders.node, orders.ranks, orders.epochs_ahead) == (1, 2, 3)
    assert np.array_equal(orders.of_rank(5), schedule.orders(5)[2])
    assert np.array_equal(orders.of_node(5), schedule.node_order(5, 1))
    assert len(orders.of_rank(4)) == 6


def test_reads_are_counted_by_sample_role_and_epoch() -> None:
    """The second read of a sample is a read of its own; all reads of a past epoch have started."""
    progress = listed(("mp-0", "mp-0"))
    read(progress, "mp-0", "label")
    read(progress, "mp-7")  # of the validation set
    assert asked_for(progress, 0) == [[0, 1], [0, 0], [0, 0]]
    assert progress.has_started(0, 0, 1)
    assert not progress.has_started(0, 0, 1, nth=1)
    assert not progress.has_started(0, 0, 0)
    assert not progress.has_started(1, 0, 1)
    progress.set_epoch(1)
    assert progress.has_started(0, 2, 0)
    assert progress.counts(0) is None
    assert asked_for(progress, 1) == [[0, 0], [0, 0], [0, 0]]


def test_a_read_that_failed_has_started_and_not_finished() -> None:
    """The look-ahead may still be fetching it for a second attempt."""
    progress = listed(("mp-0",))
    progress.read_started("mp-0", "data")
    assert progress.has_started(0, 0, 0)
    assert not progress.has_finished(0, 0, 0)
    read(progress, "mp-0")
    assert progress.has_finished(0, 0, 0)


def test_while_an_epoch_changes_the_counts_belong_to_neither() -> None:
    """Reads of the old epoch must not be taken for reads of the new one, or vice versa."""
    progress = listed(("mp-0",), ("mp-0",))
    read(progress, "mp-0")
    progress._header[0] = 1  # as far as set_epoch(1) when its process is suspended
    assert progress.counts(0) is None
    assert progress.counts(1) is None
    assert progress.has_started(0, 0, 0)
    assert not progress.has_started(1, 0, 0)
    assert not progress.has_finished(1, 0, 0)


def _worker(progress: ReadProgress, pipe: Any) -> None:
    pipe.send((progress.is_shared, progress.epoch))
    read(progress, "mp-1")
    pipe.recv()
    pipe.send(progress.epoch)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_and_parent_see_one_count(method: str) -> None:
    progress = listed(("mp-1",))
    progress.set_epoch(6)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(progress, theirs))  # type: ignore[attr-defined]
    process.start()
    assert ours.recv() == (True, 6)
    progress.set_epoch(7)
    ours.send(None)
    assert ours.recv() == 7
    process.join()
    read(progress, "mp-2")
    assert asked_for(progress, 7)[2] == [1, 0]


def test_a_copy_from_another_machine_knows_that_it_shares_nothing() -> None:
    """The same holds for a spawned process on a system without ``/proc``."""
    progress = listed(("mp-1",))
    state = pickle.dumps(progress)
    assert pickle.loads(state).is_shared
    del progress
    assert not pickle.loads(state).is_shared
