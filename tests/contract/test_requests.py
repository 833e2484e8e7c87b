"""Promises 2 and 3, counted at the server: no request when warm, and every object is fetched once
per node.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache import RhoData, ZarrS3Reader

IDS = ["mp-0", "mp-1", "mp-2", "mp-3"]
ROLES = ("data", "label")
ARRAY = "charge_density_total"
#: A store that was written within two seconds is listed once more after it was read: it may still
#: be being written.
SETTLED_S = 2.1


@dataclass(frozen=True)
class Node:
    """What a process needs to make its reader; picklable."""

    bucket: str
    map_path: Path
    s3_kwargs: dict[str, Any]
    cache: dict[str, Any]

    def reader(self, **changes: Any) -> ZarrS3Reader:
        arguments = {"normalize": True, "s3_kwargs": self.s3_kwargs, "cache": self.cache}
        return make_reader(self.map_path.parent, f"s3://{self.bucket}", **arguments | changes)


@pytest.fixture(scope="module")
def uploaded(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Four materials in a bucket, old enough for a stable listing, and their map; read only."""
    root, bucket = tmp_path_factory.mktemp("requests"), s3_server.new_bucket()
    for role, (i, task_id) in itertools.product(ROLES, enumerate(IDS)):
        small_group(root / role / f"{task_id}.zarr", shape=(6, 5, 5 + i), diff=True)
    for role in ROLES:
        small_group(root / role / "mp-zip.zarr.zip", as_zip=True)
        s3_server.put_tree(root / role, f"s3://{bucket}/{role}")
    (root / "map.json").write_text(json.dumps({"GGA": IDS, "zipped": ["mp-zip", "mp-0"]}))
    time.sleep(SETTLED_S)
    return bucket, root / "map.json"


@pytest.fixture
def node(uploaded: tuple[str, Path], s3_server: S3Server, tmp_path: Path) -> Node:
    """A node with an empty cache."""
    return Node(*uploaded, s3_server.s3_kwargs, {"dir": tmp_path / "cache", "min_free": 0})


def expected_gets(server: S3Server, bucket: str, ids: list[str]) -> Counter[str]:
    """Each object of the densities once, and the attributes of each store, which may state the
    number of electrons; those of the array are not needed.
    """
    wanted: Counter[str] = Counter()
    for role, task_id in itertools.product(ROLES, ids):
        store = f"{role}/{task_id}.zarr"
        keys = server.keys(f"s3://{bucket}/{store}/{ARRAY}/")
        wanted.update(key for key in keys if not key.endswith("/.zattrs"))
        wanted[f"{store}/.zattrs"] += 1
    return wanted


def read_all(reader: ZarrS3Reader) -> float:
    """One pass over both sides of the split; the sum over all values."""
    return sum(
        float(values.sum())
        for sets in reader.data_split()
        for values in itertools.chain(sets[0], sets[1])
    )


def read_all_as_a_new_process(node: Node) -> tuple[float, int]:
    """What a training script does: its sum, and the requests that it counted itself."""
    reader = node.reader()
    return read_all(reader), reader.stats.requests


def read_all_at_once(node: Node, barrier: Any, answers: Any) -> None:
    """One of many processes that start at the same moment."""
    reader = node.reader()
    order = np.random.default_rng().permutation(len(IDS))
    barrier.wait(60)
    for task_id, role in itertools.product([IDS[i] for i in order], ROLES):
        reader.load(task_id, role)  # type: ignore[arg-type]
    answers.put(reader.stats.requests)


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_cold_pass_is_a_list_per_directory_and_store_and_a_get_per_object(
    node: Node, s3_server: S3Server, engine: str
) -> None:
    """No object twice, no HEAD, and no object of other arrays."""
    wanted = expected_gets(s3_server, node.bucket, IDS)
    assert len(wanted) == 2 * 4 * 10  # .zattrs, .zarray and eight chunks each
    log = RequestLog(s3_server, node.bucket)
    reader = node.reader(cache=node.cache | {"fetch": {"engine": engine}})
    read_all(reader)
    assert log.paths("LIST") == Counter(
        [*(f"{role}/" for role in ROLES), *(f"{r}/{i}.zarr/" for r in ROLES for i in IDS)]
    )
    assert log.paths("GET") == wanted
    assert len(log.seen()) == 2 + 8 + len(wanted) == reader.stats.requests


def test_zipped_store_is_one_get(node: Node, s3_server: S3Server) -> None:
    """And one HEAD for its version."""
    log = RequestLog(s3_server, node.bucket)
    reader = node.reader(functional="zipped")
    for role in ROLES:
        reader.load("mp-zip", role)  # type: ignore[arg-type]
    assert log.paths("GET") == Counter(f"{role}/mp-zip.zarr.zip" for role in ROLES)
    assert log.paths("HEAD") == log.paths("GET")


def test_split_alone_costs_the_listing_of_two_directories(node: Node, s3_server: S3Server) -> None:
    """No store is opened; ``len`` and ``repr`` of the sequences make no request."""
    log = RequestLog(s3_server, node.bucket)
    for sets in node.reader(cache=None).data_split():
        assert [len(s) for s in sets] == [2, 2, 2, 2]
    assert [(r.op, r.path) for r in log.seen()] == [
        ("LIST", f"{node.bucket}/data/"),
        ("LIST", f"{node.bucket}/label/"),
    ]


def test_directory_of_more_than_a_thousand_stores_is_listed_by_the_page(
    bucket: str, s3_server: S3Server, node: Node
) -> None:
    """A thousand stores per request, whatever they hold."""
    client = s3_server.client()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda i: client.put_object(
                    Bucket=bucket, Key=f"all/mp-{i}.zarr/.zgroup", Body=b"{}"
                ),
                range(1001),
            )
        )
    node.map_path.with_name("many.json").write_text(
        json.dumps({"GGA": [f"mp-{i}" for i in range(1001)]})
    )
    log = RequestLog(s3_server, bucket)
    reader = node.reader(
        data_dir=f"s3://{bucket}/all",
        label_dir=f"s3://{bucket}/all",
        map_dir=node.map_path.with_name("many.json"),
    )
    assert len(reader.task_ids) == 1001
    assert log.paths("LIST")["all/"] == len(log.seen()) <= 2 * 2


def test_new_process_on_a_warm_node_makes_no_request(node: Node, s3_server: S3Server) -> None:
    """Neither for the split nor for a density, in this process and in a new one."""
    want = read_all(node.reader())
    log = RequestLog(s3_server, node.bucket)
    assert read_all_as_a_new_process(node) == (want, 0)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(read_all_as_a_new_process, node).result(120) == (want, 0)
    assert log.seen() == []


def test_warm_groups_make_no_request(node: Node, s3_server: S3Server) -> None:
    """A new reader finds metadata and a crop in the byte tier."""

    def use(reader: ZarrS3Reader) -> tuple[dict[str, Any], float]:
        group = reader.read_zarr_store(f"s3://{node.bucket}/data/mp-1.zarr")
        return reader.get_metadata(group), float(
            np.asarray(group["charge_density_diff"][:2, :2, :2]).sum()
        )  # type: ignore[index]

    log = RequestLog(s3_server, node.bucket)
    want = use(node.reader())
    assert max(log.paths("GET").values()) == 1
    assert not any(
        ARRAY in path and not path.endswith((".zarray", ".zattrs")) for path in log.paths("GET")
    )
    log = RequestLog(s3_server, node.bucket)
    assert use(node.reader()) == want
    assert log.seen() == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_eight_cold_processes_fetch_every_object_once(node: Node, s3_server: S3Server) -> None:
    """They start at the same moment and read the same stores in different orders."""
    wanted = expected_gets(s3_server, node.bucket, IDS)
    node.reader().data_split()
    log = RequestLog(s3_server, node.bucket)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(8), context.SimpleQueue()
    processes = [
        context.Process(target=read_all_at_once, args=(node, barrier, answers)) for _ in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    assert log.paths("GET") == wanted
    assert log.paths("LIST") == Counter(f"{r}/{i}.zarr/" for r in ROLES for i in IDS)
    assert sum(answers.get() for _ in processes) == len(log.seen())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
# on a machine with fewer cores
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_four_cold_workers_fetch_every_object_once_and_their_parent_none(
    node: Node, s3_server: S3Server
) -> None:
    """Each worker reads each sample; the parent only lists the directories."""
    # not for the new process, which would import it too
    import torch
    from torch.utils.data import ConcatDataset, DataLoader

    wanted = expected_gets(s3_server, node.bucket, IDS)
    log = RequestLog(s3_server, node.bucket)
    reader = node.reader()
    both = ConcatDataset([RhoData(*sets, data_augmentation=False) for sets in reader.data_split()])
    # Batch i goes to worker i % 4: sample 0 for all four, then sample 1 for all four, ...
    loader = DataLoader(
        both, batch_size=None, sampler=[i for i in range(4) for _ in range(4)], num_workers=4
    )
    tensors = [data for data, _ in loader]
    assert len(tensors) == 16
    assert all(torch.equal(tensors[i], tensors[i // 4 * 4]) for i in range(16))
    assert log.paths("GET") == wanted
    assert log.paths("LIST") == Counter(
        [*(f"{role}/" for role in ROLES), *(f"{r}/{i}.zarr/" for r in ROLES for i in IDS)]
    )
    parent = reader.cache.counters.snapshot()
    assert (parent.requests, parent.misses, parent.hits) == (2, 0, 0)
    assert (reader.stats.misses, reader.stats.hits) == (8, 24)


def test_reader_without_a_cache_asks_each_time(node: Node, s3_server: S3Server) -> None:
    """The count can fail: without a cache the second pass costs as much as the first."""
    reader = node.reader(cache=None)
    log = RequestLog(s3_server, node.bucket)
    read_all(reader)
    first = len(log.seen())
    read_all(reader)
    assert len(log.seen()) == 2 * first - 2  # the directories are listed once a reader
