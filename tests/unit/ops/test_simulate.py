"""Simulated caches against a slow, literal implementation of each policy, and the figures quoted in
docs/guides/large-data.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarrcache.errors import ConfigError
from zarrcache.ops.simulate import POLICIES, Policy, simulate
from zarrcache.train.schedule import Schedule

EPOCHS = st.lists(st.lists(st.integers(0, 9), max_size=14), min_size=1, max_size=4)
SIZES = st.lists(st.integers(1, 9), min_size=10, max_size=10)


def slow(epochs: list[list[int]], sizes: list[int], capacity: int, policy: Policy) -> list[int]:
    """Hits of each epoch, by a full search at each read."""
    every = [index for epoch in epochs for index in epoch]
    stored: list[int] = []  # the next to go comes first
    hits, now = [0] * len(epochs), 0
    for number, epoch in enumerate(epochs):
        for index in epoch:
            future, now = every[now + 1 :], now + 1
            if index in stored:
                hits[number] += 1
                if policy == "least-recently-used":
                    stored.append(stored.pop(stored.index(index)))
                continue
            kept = list(stored)
            if policy == "belady":
                distance = {
                    other: future.index(other) if other in future else len(future)
                    for other in (*stored, index)
                }
                kept.sort(key=lambda other: -distance[other])
            while kept and sum(sizes[other] for other in kept) + sizes[index] > capacity:
                if (
                    policy == "none"
                    or sizes[index] > capacity
                    or (policy == "belady" and distance[kept[0]] <= distance[index])
                ):
                    break
                kept.pop(0)
            if sum(sizes[other] for other in kept) + sizes[index] <= capacity:
                stored = [*(other for other in stored if other in kept), index]
    return hits


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "belady"])
@settings(deadline=None)
@given(epochs=EPOCHS, sizes=SIZES, capacity=st.integers(0, 40))
def test_hits_equal_those_of_the_literal_policy(
    policy: Policy, epochs: list[list[int]], sizes: list[int], capacity: int
) -> None:
    """For any order, also with repeats, and any sizes, also larger than the cache."""
    found = simulate([np.array(epoch, np.int64) for epoch in epochs], sizes, capacity, policy)
    assert [epoch.hits for epoch in found] == slow(epochs, sizes, capacity, policy)
    assert (
        [len(epoch.missed) + epoch.hits for epoch in found]
        == [epoch.reads for epoch in found]
        == list(map(len, epochs))
    )


@settings(deadline=None)
@given(epochs=EPOCHS, capacity=st.integers(0, 6))
def test_belady_has_the_most_hits_of_all_policies(epochs: list[list[int]], capacity: int) -> None:
    """With equal sizes, where ties do not matter."""
    arrays = [np.array(epoch, np.int64) for epoch in epochs]
    best = sum(epoch.hits for epoch in simulate(arrays, [1] * 10, capacity, "belady"))
    assert best == sum(slow(epochs, [1] * 10, capacity, "belady"))
    assert best >= max(
        sum(epoch.hits for epoch in simulate(arrays, [1] * 10, capacity, policy))
        for policy in POLICIES
    )


@pytest.mark.parametrize(
    ("assignment", "policy", "percent"),
    [
        ("global", "none", 25),
        ("global", "least-recently-used", 14),
        ("global", "belady", 56),
        ("node", "none", 100),
        ("node", "belady", 100),
    ],
)
def test_four_nodes_with_room_for_a_quarter_each(
    assignment: Any, policy: Policy, percent: int
) -> None:
    """Figures of docs/guides/large-data.md; sizes are log-normal, sigma 0.8, as in the Materials
    Project.
    """
    count = 4000
    sizes = (1.3e6 * np.random.default_rng(0).lognormal(0, 0.8, count)).astype(int).tolist()
    schedule = Schedule(
        tuple(f"mp-{number}" for number in range(count)),
        assignment=assignment,
        node_of_rank=(0, 1, 2, 3),
        seed=1,
    )
    # One percent more than a quarter: shares are equal in number, not in bytes.
    room = int(sum(sizes) * (0.27 if assignment == "node" else 0.25))
    nodes = [
        simulate([schedule.node_order(epoch, node) for epoch in range(12)], sizes, room, policy)
        for node in range(4)
    ]
    ratio = sum(epoch.hits for node in nodes for epoch in node[6:]) / sum(
        epoch.reads for node in nodes for epoch in node[6:]
    )
    assert 100 * ratio == pytest.approx(percent, abs=3)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="'least-recently-stored'"):
        simulate([], [], 1, "lru")  # type: ignore[arg-type]
