"""Every sample is read once per epoch, with any ranks and after any number of restarts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarrcache.errors import ConfigError
from zarrcache.train.schedule import Schedule, Segment, node_of

WORLDS = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda counts: tuple(node for node, count in enumerate(counts) for _ in range(count))
)
ASSIGNMENTS = st.sampled_from(["global", "node"])


def names(count: int) -> tuple[str, ...]:
    """Task ids."""
    return tuple(f"mp-{number}" for number in range(count))


def read(orders: Any) -> Counter[int]:
    """Number of reads of each sample."""
    return Counter(orders.ravel().tolist())


@settings(deadline=None)
@given(
    count=st.integers(0, 60),
    assignment=ASSIGNMENTS,
    world=WORLDS,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 9),
    shuffle=st.booleans(),
)
def test_an_epoch_is_every_sample_once(
    count: int, assignment: Any, world: tuple[int, ...], seed: int, epoch: int, shuffle: bool
) -> None:
    """Less than one sample per rank is read twice, or left out with ``drop_last``."""
    schedule = Schedule(
        names(count), assignment=assignment, node_of_rank=world, seed=seed, shuffle=shuffle
    )
    orders = schedule.orders(epoch)
    assert orders.shape == (len(world), -(-count // len(world)))
    assert set(read(orders)) == set(range(count))
    assert orders.size - count < len(world)
    dropped = Schedule(
        names(count),
        assignment=assignment,
        node_of_rank=world,
        seed=seed,
        shuffle=shuffle,
        drop_last=True,
    ).orders(epoch)
    assert dropped.shape == (len(world), count // len(world))
    assert max(read(dropped).values(), default=1) == 1


@settings(deadline=None)
@given(
    count=st.integers(1, 80),
    assignment=ASSIGNMENTS,
    worlds=st.lists(WORLDS, min_size=2, max_size=4),
    taken=st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_a_restarted_job_reads_the_rest_of_the_epoch(
    count: int, assignment: Any, worlds: list[tuple[int, ...]], taken: list[int]
) -> None:
    """With other ranks and nodes each time. Only the last run may repeat samples."""
    seen: Counter[int] = Counter()
    history: tuple[Segment, ...] = ()
    for world, some in zip(worlds[:-1], taken, strict=False):
        orders = Schedule(names(count), assignment=assignment, node_of_rank=world, seed=3).orders(
            7, history
        )
        steps = min(some, max(0, orders.shape[1] - 1))  # killed before its last step
        seen += read(orders[:, :steps])
        history += (Segment(world, steps),)
    assert max(seen.values(), default=1) == 1
    rest = Schedule(names(count), assignment=assignment, node_of_rank=worlds[-1], seed=3).orders(
        7, history
    )
    assert set(read(rest)) == set(range(count)) - set(seen)
    assert rest.size - len(read(rest)) < len(worlds[-1])


def test_with_one_node_both_assignments_are_the_same() -> None:
    """And every epoch is another order."""
    one, other = (
        Schedule(names(50), assignment=assignment, node_of_rank=(0, 0), seed=1)
        for assignment in ("global", "node")
    )  # type: ignore[arg-type]
    assert np.array_equal(one.orders(4), other.orders(4))
    assert not np.array_equal(one.orders(4), one.orders(5))


def test_a_node_reads_the_same_samples_in_every_epoch_and_after_a_restart() -> None:
    schedule = Schedule(names(1000), assignment="node", node_of_rank=(0, 0, 1, 1, 2), seed=5)
    own = [set(schedule.node_order(0, node).tolist()) for node in range(3)]
    assert [set(schedule.node_order(9, node).tolist()) for node in range(3)] == own
    assert [set(np.flatnonzero(schedule.owners == node).tolist()) for node in range(3)] == own
    history = (Segment((0, 0, 1, 1, 2), 37),)
    for node in range(3):
        assert set(schedule.node_order(0, node, history).tolist()) < own[node]


def test_the_order_of_a_node_interleaves_those_of_its_ranks() -> None:
    schedule = Schedule(names(12), node_of_rank=(0, 1, 0), seed=5)
    orders = schedule.orders(2)
    assert schedule.node_order(2, 0).tolist() == [
        index for step in range(4) for index in (orders[0][step], orders[2][step])
    ]


def test_a_sample_stays_with_its_node_whatever_else_there_is() -> None:
    """Neither the order of the names nor added samples change it."""
    some = list(names(20_000))
    nodes = node_of(some, 4)
    assert np.bincount(nodes).tolist() == [5000] * 4
    backwards = node_of(some[::-1], 4)
    assert np.array_equal(backwards[::-1], nodes)
    more = node_of(some + [f"mp-x{number}" for number in range(2000)], 4)[: len(some)]
    assert (more != nodes).mean() < 0.02


def test_shares_follow_the_weights() -> None:
    """A node with three ranks has three times the samples."""
    assert np.bincount(node_of(names(100), [3, 1])).tolist() == [75, 25]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule(names(3), assignment="rank"), "'global' or 'node'"),  # type: ignore[arg-type]
        (lambda: Schedule(names(3), seed=-1), "seed is -1"),
        (lambda: node_of(names(3), 0), "nodes is 0; it has to be a whole number from 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
