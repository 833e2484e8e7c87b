"""Readers next to processes that drop entries: no error, no wrong value, and the index matches the
files.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.localnode import LocalNode
from zarrcache import plan_evict, verify
from zarrcache.stats import Stats

FORK = get_context("fork")
#: Only a hang takes this long; it says nothing about speed.
HANG_S = 600

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def read(
    node: LocalNode, reads: int, seconds: float, seed: int, block: dict[str, Any], answers: Any
) -> None:
    """Read random densities, crops and attributes in two threads of one reader. Mapped arrays are
    kept for a while and must not change.

    Each thread makes at least this many reads and runs at least this long.
    """
    reader, end_s = node.reader(**block), time.monotonic() + seconds

    def read_some(thread: int) -> None:
        chance = random.Random(seed + thread)
        held: list[tuple[Any, Any]] = []
        for number in itertools.count():
            if number >= reads and time.monotonic() >= end_s:
                break
            (task_id, role), want = chance.choice(list(node.values.items()))
            if chance.random() < 0.6:
                held.append((reader.load(task_id, role)[0], want.ravel()))  # type: ignore[arg-type]
            else:
                group = reader.read_zarr_store(node.directory / role / f"{task_id}.zarr")
                assert reader.get_metadata(group)["functional"] == "GGA"
                held.append((group["charge_density_total"][1:4, :, 2:], want[1:4, :, 2:]))  # type: ignore[index]
            if len(held) > 20:
                got, expected = held.pop(chance.randrange(len(held)))
                assert np.array_equal(got, expected)
        assert all(np.array_equal(got, expected) for got, expected in held)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read_some, range(2)))
    answers.put(reader.stats)


def evict(node: LocalNode, done: Any, seed: int, answers: Any) -> None:
    """Drop one entry, half of the cache or all of it, and verify the rest now and then, until the
    readers end.
    """
    chance, reader, rounds = random.Random(seed), node.reader(), 0
    config = reader.cache.config
    assert config is not None
    while not done.is_set():
        match chance.randrange(4):
            case 0:
                plan_evict(config, everything=True).execute()
            case 1:
                plan_evict(config, everything=True, target_bytes=40_000).execute()
            case 2:
                task_id, role = chance.choice(list(node.values))
                reader.cache.arrays.drop(reader.key(task_id, role))  # type: ignore[union-attr, arg-type]
            case _:
                report = verify(config)
                assert [
                    problem for problem in report.corrupt if problem.why != "its file is gone"
                ] == []
        rounds += 1
        done.wait(0.005)
    answers.put(rounds)


@pytest.mark.parametrize(
    ("reads", "seconds"),
    [
        pytest.param(25, 0, id="25"),
        pytest.param(25, 60, id="a minute", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
@pytest.mark.parametrize(
    "block",
    [{}, {"eviction": "least-recently-stored", "limit": 60_000}],
    ids=["evictor", "evictor and a small limit"],
)
def test_readers_beside_evictors_have_misses_and_no_errors(
    tmp_path: Path, reads: int, seconds: float, block: dict[str, Any]
) -> None:
    """Four processes of two threads read, two drop and verify."""
    node, done = LocalNode(tmp_path, 4), FORK.Event()
    answers, rounds = FORK.Queue(), FORK.Queue()
    evictors = [FORK.Process(target=evict, args=(node, done, seed, rounds)) for seed in range(2)]
    readers = [
        FORK.Process(target=read, args=(node, reads, seconds, 10 * seed, block, answers))
        for seed in range(4)
    ]
    watchdog = threading.Timer(HANG_S, lambda: [child.kill() for child in (*evictors, *readers)])
    watchdog.start()
    try:
        for child in (*evictors, *readers):
            child.start()
        for child in readers:
            child.join()
        done.set()
        for child in evictors:
            child.join()
    finally:
        watchdog.cancel()
    assert [child.exitcode for child in (*evictors, *readers)] == [0] * 6
    stats = sum((answers.get(timeout=10) for _ in readers), Stats())
    dropped = sum(rounds.get(timeout=10) for _ in evictors)
    print(f"{stats.hits} hits, {stats.misses} misses beside {dropped} rounds of dropping")
    assert dropped > 10
    assert stats.hits + stats.misses > 2 * reads
    assert stats.misses > len(node.values)
    assert (stats.purges, stats.cache_errors) == (0, 0)
    node.check_settled()
