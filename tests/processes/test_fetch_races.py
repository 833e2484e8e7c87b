"""Many processes and threads want the same data at once: each object is fetched once, and no
process waits for a dead one.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.cachedirs import array_of, settings
from tests.support.faultproxy import FaultProxy, Rule
from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.training import write_pairs
from zarrcache import ZarrS3Reader
from zarrcache.cache.cache import Cache
from zarrcache.stats import Counters, Stats

FORK = get_context("fork")
#: Only a hang takes this long; it says nothing about speed.
HANG_S = 240
LONG = [pytest.mark.slow, pytest.mark.timeout(1800)]

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@dataclass(frozen=True)
class Node:
    """Pairs on S3 and a cold cache; picklable."""

    directory: Path
    bucket: str
    s3_kwargs: dict[str, Any]
    values: dict[tuple[str, str], NDArray[Any]]

    def reader(self) -> ZarrS3Reader:
        return make_reader(
            self.directory,
            f"s3://{self.bucket}",
            s3_kwargs=self.s3_kwargs,
            cache={"retry": {"attempts": 2}},
        )

    def read(self, reader: ZarrS3Reader, chance: np.random.Generator) -> None:
        """Read everything in a random order and compare."""
        for i in chance.permutation(len(self.values)):
            task_id, role = list(self.values)[i]
            assert np.array_equal(
                reader.load(task_id, role)[0], self.values[task_id, role].ravel()
            ), (task_id, role)  # type: ignore[arg-type]


def node_of(
    directory: Path, server: S3Server, bucket: str, pairs: int, endpoint_url: str | None = None
) -> Node:
    values = write_pairs(directory, pairs, shape=(6, 5, 4), chunks=(6, 5, 2))
    (directory / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(pairs)]}))
    for role in ("data", "label"):
        server.put_tree(directory / role, f"s3://{bucket}/{role}")
    time.sleep(2.1)  # a store that was written within two seconds is listed twice
    return Node(directory, bucket, server.kwargs_at(endpoint_url or server.endpoint_url), values)


def finish(children: list[BaseProcess]) -> None:
    """Wait for all; none fails or hangs."""
    for child in children:
        child.join(HANG_S)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung
    assert [child.exitcode for child in children] == [0] * len(children)


# -- once per node


def read_with_threads(node: Node, threads: int, barrier: Any, answers: Any) -> None:
    """One process of a job, with one reader for all its threads."""
    reader = node.reader()
    start = threading.Barrier(threads)

    def read(_: int) -> None:
        start.wait(HANG_S)
        node.read(reader, np.random.default_rng())

    barrier.wait(HANG_S)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    answers.put(reader.stats)


@pytest.mark.parametrize(
    ("processes", "threads", "pairs"),
    [pytest.param(4, 4, 3, id="4x4x6"), pytest.param(8, 4, 100, id="8x4x200", marks=LONG)],
)
def test_every_object_is_fetched_once_for_all_processes_and_threads(
    tmp_path: Path, s3_server: S3Server, bucket: str, processes: int, threads: int, pairs: int
) -> None:
    """All cold at the same moment, each in its own order. The server's log and the readers'
    counters agree.
    """
    node = node_of(tmp_path, s3_server, bucket, pairs)
    assert node.reader().task_ids
    wanted = {
        key
        for key in s3_server.keys(f"s3://{bucket}/")
        if key.endswith(".zarr/.zattrs")
        or ("/charge_density_total/" in key and not key.endswith("/.zattrs"))
    }
    log, barrier, answers = RequestLog(s3_server, bucket), FORK.Barrier(processes), FORK.Queue()
    children: list[BaseProcess] = [
        FORK.Process(target=read_with_threads, args=(node, threads, barrier, answers))
        for _ in range(processes)
    ]
    for child in children:
        child.start()
    stats = sum((answers.get(timeout=HANG_S) for _ in children), Stats())
    finish(children)
    assert log.paths("GET") == Counter(wanted)
    assert set(log.paths("LIST").values()) == {1}
    assert stats.misses == len(node.values) == len(log.paths("LIST"))
    assert stats.hits == (processes * threads - 1) * len(node.values)
    assert stats.requests == len(log.seen())
    assert (stats.purges, stats.cache_errors, stats.bypasses) == (0, 0, 0)


OBJECT_BYTES = 32 * 2**20


def read_object(
    directory: Path,
    url: str,
    s3_kwargs: dict[str, Any],
    want: bytes,
    threads: int,
    barrier: Any,
    answers: Any,
) -> None:
    """A whole object and its last bytes, through the byte tier, in several threads."""
    counters = Counters()
    cache = Cache(settings(directory), counters)
    origin = cache.origin(url, s3_kwargs)
    (obj,) = origin.list_objects("large")
    cache = cache.bytes(origin)
    assert cache is not None
    barrier.wait(HANG_S)
    with ThreadPoolExecutor(threads) as pool:
        for data in pool.map(lambda _: cache.read(obj), range(threads)):
            assert data == want
    assert cache.read(obj, OBJECT_BYTES - 100) == want[-100:]
    answers.put(counters.snapshot())


def test_24_readers_of_one_object_of_32_mib_fetch_it_once(
    tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    """8 processes of 3 threads. With fsspec's simplecache alone 13 of 24 got short data."""
    url = f"s3://{bucket}/objects"
    want = array_of(1, OBJECT_BYTES).tobytes()
    s3_server.put(f"{url}/large", want)
    log, barrier, answers = RequestLog(s3_server, bucket), FORK.Barrier(8), FORK.Queue()
    arguments = (tmp_path, url, s3_server.s3_kwargs, want, 3, barrier, answers)
    children: list[BaseProcess] = [
        FORK.Process(target=read_object, args=arguments) for _ in range(8)
    ]
    for child in children:
        child.start()
    stats = sum((answers.get(timeout=HANG_S) for _ in children), Stats())
    finish(children)
    assert log.paths("GET") == {"objects/large": 1}
    assert stats.fetched_bytes == OBJECT_BYTES
    assert (stats.byte_misses + stats.byte_hits, stats.purges, stats.cache_errors) == (24 + 8, 0, 0)


# -- a fetcher that dies


def read_one(node: Node, reached: Any, answers: Any) -> None:
    """The first density."""
    reader = node.reader()
    assert "mp-0" in reader.task_ids
    reached.set()
    values = reader.load("mp-0", "data")[0]
    answers.put((bool(np.array_equal(values, node.values["mp-0", "data"].ravel())), reader.stats))


def test_when_a_fetcher_is_killed_one_waiting_reader_takes_over(
    tmp_path: Path, s3_server: S3Server, bucket: str, fault_proxy: FaultProxy
) -> None:
    """The server delays the fetcher, so the others wait for it; after its death exactly one of them
    fetches.
    """
    node = node_of(tmp_path, s3_server, bucket, 1, fault_proxy.endpoint_url)
    assert node.reader().task_ids
    fault_proxy.rules(Rule(op="GET", then="hang"))
    answers = FORK.Queue()
    reached = [FORK.Event() for _ in range(5)]
    children = [FORK.Process(target=read_one, args=(node, event, answers)) for event in reached]
    children[0].start()
    fault_proxy.wait_in_flight(4)  # two chunks, the array's metadata, the store's attributes
    for child in children[1:]:
        child.start()
    assert all(event.wait(HANG_S) for event in reached)
    fault_proxy.rules()
    time.sleep(0.3)  # let them reach the lock; a late one only makes the test easier
    assert fault_proxy.count("GET") == 4
    children[0].kill()
    found = [answers.get(timeout=HANG_S) for _ in children[1:]]
    finish(children[1:])  # type: ignore[arg-type]
    children[0].join(HANG_S)
    assert all(is_right for is_right, _ in found)
    assert sorted((stats.misses, stats.hits) for _, stats in found) == [
        (0, 1),
        (0, 1),
        (0, 1),
        (1, 0),
    ]
    assert fault_proxy.count("GET") == 4 + 4
    assert fault_proxy.repeats() == 4
