"""Once per cluster: nodes that miss the same density at the same moment fetch it once, counted at
the S3 server.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cluster import Cluster, Node, start_cluster
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group

IDS = [f"mp-{n}" for n in range(5)]
ROLES = ("data", "label")
STORES = tuple(itertools.product(IDS, ROLES))  # ten
ARRAY = "charge_density_total"
NODES = 4
SETTLED_S = 2.1


@pytest.fixture(scope="module")
def uploaded(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[tuple[str, str], Any]]:
    """Ten stores in a bucket, old enough for a stable listing, and their values."""
    root, bucket = tmp_path_factory.mktemp("peers"), s3_server.new_bucket()
    values = {}
    for seed, (task_id, role) in enumerate(STORES):
        values[task_id, role] = small_group(
            root / role / f"{task_id}.zarr", shape=(4, 3, 8), seed=seed
        )[ARRAY].ravel()
    for role in ROLES:
        s3_server.put_tree(root / role, f"s3://{bucket}/{role}")
    (root / "map.json").write_text(json.dumps({"GGA": IDS}))
    time.sleep(SETTLED_S)
    return bucket, root, values


@pytest.fixture
def cluster(
    uploaded: tuple[str, Path, Any], s3_server: S3Server, tmp_path: Path
) -> Iterator[Cluster]:
    """Four nodes with empty caches and a token."""
    bucket, root, _ = uploaded
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("a word that nobody guesses\n".replace(" ", "-"))
    with start_cluster(
        NODES, tmp_path, root, f"s3://{bucket}", s3_kwargs=s3_server.s3_kwargs, token_file=token
    ) as cluster:
        yield cluster


def gets(log: RequestLog) -> Counter[str]:
    """How often each object of a density was fetched."""
    return Counter({path: n for path, n in log.paths("GET").items() if f"/{ARRAY}/" in path})


def objects(server: S3Server, bucket: str) -> set[str]:
    """Every object of the ten densities."""
    return {
        key
        for key in server.keys(f"s3://{bucket}")
        if f"/{ARRAY}/" in key and not key.endswith("/.zattrs")
    }


def read_all(
    node: Node, seed: int | None, barrier: Any, answers: Any, block: dict[str, Any]
) -> None:
    """One process on one node: read everything, in its own or a common order, once all processes
    are ready.
    """
    reader = node.reader(**block)
    assert reader.task_ids == IDS
    order = (
        range(len(STORES)) if seed is None else np.random.default_rng(seed).permutation(len(STORES))
    )
    barrier.wait(120)
    sums = {STORES[i]: float(reader.load(*STORES[i])[0].astype("f8").sum()) for i in order}  # type: ignore[arg-type]
    answers.put((sums, reader.stats))


def run(nodes: list[Node], *, same_order: bool, **block: Any) -> list[Any]:
    """One process per node, all at once; what each read, and its counters."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(len(nodes)), context.SimpleQueue()
    processes = [
        context.Process(
            target=read_all, args=(node, None if same_order else seed, barrier, answers, block)
        )
        for seed, node in enumerate(nodes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * len(nodes)
    return [answers.get() for _ in processes]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("same_order", [True, False], ids=["same order", "orders of their own"])
def test_four_cold_nodes_fetch_every_object_once(
    cluster: Cluster, uploaded: tuple[str, Path, Any], s3_server: S3Server, same_order: bool
) -> None:
    """1.00 GETs per object and cluster; every node has the right values."""
    bucket, _, values = uploaded
    log = RequestLog(s3_server, bucket)
    answers = run(cluster.nodes, same_order=same_order)
    wanted = {store: float(v.astype("f8").sum()) for store, v in values.items()}
    assert [sums for sums, _ in answers] == [wanted] * NODES
    counted = gets(log)
    assert counted == dict.fromkeys(objects(s3_server, bucket), 1)
    assert counted.total() / len(counted) == 1.00
    stats = [stats for _, stats in answers]
    assert sum(s.peer_hits for s in stats) == (NODES - 1) * len(STORES)
    assert [(s.misses, s.hits, s.purges, s.cache_errors, s.bypasses) for s in stats] == [
        (len(STORES), 0, 0, 0, 0)
    ] * NODES
    assert sum(len(node.files()) for node in cluster.nodes) == NODES * len(STORES)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("same_order", "most"), [(True, 1.10), (False, 1.25)])
def test_with_one_server_dead_every_object_is_fetched_once(
    cluster: Cluster,
    uploaded: tuple[str, Path, Any],
    s3_server: S3Server,
    same_order: bool,
    most: float,
) -> None:
    """What its node fetches, the others cannot get from it, so it lets them go first. In orders of
    their own it may wait in vain, and the objects it needs first are fetched by another node too.
    """
    bucket, _, values = uploaded
    cluster.servers[1].close()
    log = RequestLog(s3_server, bucket)
    answers = run(cluster.nodes, same_order=same_order)
    wanted = {store: float(v.astype("f8").sum()) for store, v in values.items()}
    assert [sums for sums, _ in answers] == [wanted] * NODES
    counted = gets(log)
    assert set(counted) == objects(s3_server, bucket)
    assert counted.total() / len(counted) <= most
    assert [s.cache_errors for _, s in answers] == [0] * NODES


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_without_peers_each_node_fetches_for_itself(
    cluster: Cluster, uploaded: tuple[str, Path, Any], s3_server: S3Server
) -> None:
    """4.00 GETs per object: the cost without peers, and proof that the count can fail."""
    bucket = uploaded[0]
    log = RequestLog(s3_server, bucket)
    run(cluster.nodes, same_order=True, peers=[])
    counted = gets(log)
    assert counted.total() / len(counted) == 4.00
    assert set(counted) == objects(s3_server, bucket)


def test_node_that_comes_later_asks_s3_for_no_object(
    cluster: Cluster, uploaded: tuple[str, Path, Any], s3_server: S3Server
) -> None:
    """The other nodes have everything, from a lease or from before they were served; no state of
    the home node is needed.
    """
    bucket, _, values = uploaded
    first, *_, last = cluster.nodes
    for task_id, role in STORES:
        first.reader(peers=[]).load(task_id, role)  # type: ignore[arg-type]
    log = RequestLog(s3_server, bucket)
    reader = last.reader()
    for (task_id, role), wanted in values.items():
        assert np.array_equal(reader.load(task_id, role)[0], wanted)  # type: ignore[arg-type]
    assert gets(log) == {}
    assert (reader.stats.peer_hits, reader.stats.misses, reader.stats.fetched_bytes) == (10, 10, 0)
    again = last.reader()
    again.load(*STORES[0])  # type: ignore[arg-type]
    assert (again.stats.hits, again.stats.peer_hits) == (1, 0)


def test_full_node_takes_entries_into_memory(
    cluster: Cluster, uploaded: tuple[str, Path, Any], s3_server: S3Server
) -> None:
    """It cannot store them, and still makes no request to S3."""
    bucket, _, values = uploaded
    first, second, *_ = cluster.nodes
    first.reader().load("mp-1", "data")
    log = RequestLog(s3_server, bucket)
    reader = second.reader(limit=1)
    assert np.array_equal(reader.load("mp-1", "data")[0], values["mp-1", "data"])
    assert (gets(log), reader.stats.peer_hits, reader.stats.bypasses) == ({}, 1, 1)


def test_nodes_that_can_store_nothing_do_not_wait(
    cluster: Cluster, uploaded: tuple[str, Path, Any]
) -> None:
    """The node that fetched an entry reports that it did not store it, so the next one does not ask
    for it.
    """
    values = uploaded[2]
    for node in cluster.nodes:
        reader = node.reader(limit=1)
        assert np.array_equal(reader.load("mp-2", "label")[0], values["mp-2", "label"])
        assert (reader.stats.peer_hits, reader.stats.bypasses) == (0, 1)


def test_entry_that_its_holder_has_evicted_is_fetched_again(
    cluster: Cluster, uploaded: tuple[str, Path, Any], s3_server: S3Server
) -> None:
    """The home node still names the former holder, and is told that it has no copy."""
    bucket = uploaded[0]
    first, second, third, _ = cluster.nodes
    for node in (first, second):
        reader = node.reader()
        reader.load("mp-3", "data")
        assert reader.cache.arrays is not None
        reader.cache.arrays.drop(reader.key("mp-3", "data"))
    log = RequestLog(s3_server, bucket)
    third.reader().load("mp-3", "data")
    assert set(gets(log).values()) == {1}


def test_entry_comes_from_the_lower_layer_before_any_node_is_asked(
    cluster: Cluster, uploaded: tuple[str, Path, Any], s3_server: S3Server
) -> None:
    """Another cache directory, which is only read."""
    bucket, _, values = uploaded
    lower, node, *_ = cluster.nodes
    for task_id, role in STORES:
        lower.reader(peers=[]).load(task_id, role)  # type: ignore[arg-type]
    entries = lower.directory / "zarrcache-v1" / "entries"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in entries.rglob("*")}
    log = RequestLog(s3_server, bucket)
    reader = node.reader(lower=lower.directory)
    for (task_id, role), wanted in values.items():
        assert np.array_equal(reader.load(task_id, role)[0], wanted)  # type: ignore[arg-type]
    assert gets(log) == {}
    assert (reader.stats.lower_hits, reader.stats.peer_hits) == (10, 0)
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in entries.rglob("*")
    } == before


@pytest.mark.parametrize("place", ["peer", "lower"])
@pytest.mark.parametrize("revalidate", ["run", "epoch", "never, and warm"])
def test_an_older_entry_of_a_peer_is_not_taken_by_a_reader_that_revalidates(
    s3_server: S3Server, tmp_path: Path, bucket: str, revalidate: str, place: str
) -> None:
    """``never`` trusts entries of other nodes as it trusts its own."""
    for role in ROLES:
        small_group(tmp_path / role / "mp-1.zarr", seed=1)
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1"]}))
    with start_cluster(
        2, tmp_path, tmp_path, f"s3://{bucket}", s3_kwargs=s3_server.s3_kwargs
    ) as cluster:
        old_node, node = cluster.nodes
        old, _ = old_node.reader().load("mp-1", "data")
        new = small_group(tmp_path / "data" / "mp-1.zarr", seed=2)[ARRAY].ravel()
        s3_server.put_tree(tmp_path / "data", f"s3://{bucket}/data")
        places = {"peers": []} if place == "lower" else {}
        if place == "lower":
            places |= {"lower": old_node.directory}
        reader = node.reader(revalidate=revalidate.split(",")[0], **places)
        if "," in revalidate:
            reader.ensure("mp-1", "data")
        assert np.array_equal(reader.load("mp-1", "data")[0], new)
        assert (reader.stats.peer_hits, reader.stats.lower_hits, reader.stats.purges) == (0, 0, 0)
        never = Node(
            node.root, node.url, node.s3_kwargs, {**node.cache, "dir": tmp_path / "third"}
        ).reader(lower=old_node.directory)
        assert np.array_equal(never.load("mp-1", "data")[0], old)
