"""Work over a real Dask cluster: two workers behind sockets as two nodes with their own caches, one
of which is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import daskcluster
from tests.support.chgcars import SMALL
from tests.support.daskcluster import RunningCluster, running_cluster
from tests.support.training import start, write_config, write_pairs, zarrcache
from zarrcache import DataConfig
from zarrcache.cli.options import open_engine
from zarrcache.convert.converter import ConvertResult
from zarrcache.convert.plan import plan_convert
from zarrcache.data.reader import open_reader
from zarrcache.demo.synthetic import write_pairs as write_densities
from zarrcache.errors import ConfigError, OriginUnavailableError, ZarrCacheError
from zarrcache.parallel.dask import Cluster, cluster, open_cluster
from zarrcache.parallel.pool import Died
from zarrcache.train.schedule import node_of

# Not imported: that would change how exceptions are pickled in all tests of this process.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs the extra 'dask'"
)

NODES = ("node2", "node10")
HANG_S = 120.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of the nodes, ``home/node2`` and ``home/node10``, and the files of Dask."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[RunningCluster]:
    """A scheduler and one worker per node."""
    with running_cluster(
        home / "dask", {node: {"ZARRCACHE_DIR": str(home / node)} for node in NODES}
    ) as found:
        yield found


@pytest.fixture
def connected(running: RunningCluster) -> Iterator[Cluster]:
    """Wait until both workers are connected, also after a test has killed one."""
    with open_cluster(running.address) as found:
        found.client.wait_for_workers(len(NODES), timeout=HANG_S)
        yield found


def tree(root: Path) -> dict[str, bytes]:
    """Every file of the stores, without hidden files that a killed process left."""
    files = (path for store in root.glob("[!.]*") for path in store.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def outcome(result: ConvertResult) -> tuple[Any, ...]:
    """A result without the path of its store."""
    return (
        result.path,
        result.task_id,
        result.written_bytes,
        result.warnings,
        result.error,
        result.skipped,
    )


def test_every_item_gets_its_result_and_few_are_on_the_scheduler_at_a_time(
    connected: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many for 314,000 materials as for these sixty."""
    monkeypatch.setattr(cluster, "_MIN_AHEAD", 6)
    most = 0
    results = {}
    for n, result in connected.spread(daskcluster.double, range(60)):
        most = max(most, connected.client.run_on_scheduler(_tasks) if n % 10 == 5 else 0)
        results[n] = result
    assert results == {n: 2 * n for n in range(60)}
    assert 0 < most <= 2 * (4 * len(NODES) + 1)
    assert list(connected.spread(daskcluster.double, [])) == []


def _tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


def test_an_item_that_kills_its_worker_is_named_and_the_others_go_on(connected: Cluster) -> None:
    """It is given up after its second attempt, alone; items next to it have their results."""
    results = dict(connected.spread(daskcluster.die_of_seven, range(12)))
    assert {n: result for n, result in results.items() if n != 7} == {
        n: 2 * n for n in range(12) if n != 7
    }
    assert results[7] == Died(None)
    assert str(results[7]) == "cause unknown; see the system log of its machine"


def test_closed_early_what_has_begun_ends_and_the_rest_never_begins(
    connected: Cluster, tmp_path: Path
) -> None:
    """Ctrl-C does the same; no item is left half done."""
    outcomes = connected.spread(daskcluster.note, [f"see:{tmp_path}", *[str(tmp_path)] * 20])
    assert next(outcomes)[0] == f"see:{tmp_path}"
    (tmp_path / "go").touch()
    outcomes.close()
    begun = len(list(tmp_path.glob("*.begun")))
    assert 0 < begun == len(list(tmp_path.glob("*.ended"))) < 20


def test_a_worker_that_cannot_do_it_is_one_error_and_not_a_thousand(
    connected: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug, missing packages, or another version of this package on the worker."""
    with pytest.raises(
        ConfigError,
        match=r"cannot do this: ValueError: number \d\. Every worker needs the same zarrcache as "
        r"this machine",
    ):
        list(connected.spread(daskcluster.fail, range(3)))
    monkeypatch.setattr(cluster, "_version", lambda: "0.0.1")
    with pytest.raises(
        ConfigError,
        match=r"on node\d+ has zarrcache [\d.]+.*, and this machine 0\.0\.1\. Install the same "
        r"version on both",
    ):
        list(connected.spread(daskcluster.double, range(3)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six densities as text, and a file that does not hold one."""
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    write_densities(tmp_path / "pairs", 6, seed=SMALL)
    (tmp_path / "pairs" / "label" / "bad-1.CHGCAR").write_text("not a density\n")
    return tmp_path / "pairs" / "label"


def test_a_conversion_gives_the_same_bytes_and_the_same_report_as_without_dask(
    connected: Cluster, running: RunningCluster, source: Path, tmp_path: Path
) -> None:
    """One task per material, from Python and from the command line; the second run only tries the
    failed file again.
    """
    seen: list[ConvertResult] = []
    here = plan_convert(source, tmp_path / "here", workers=1).execute()
    there = plan_convert(source, tmp_path / "there").execute(seen.append, engine=connected.spread)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert len(os.listdir(tmp_path / "there")) == 6
    assert [outcome(result) for result in there.converted] == [
        outcome(result) for result in here.converted
    ]
    assert [outcome(result) for result in there.failed] == [
        outcome(result) for result in here.failed
    ]
    assert sorted(result.path for result in seen) == sorted(source.iterdir())
    assert [path.name for path in plan_convert(source, tmp_path / "there").files] == [
        "bad-1.CHGCAR"
    ]
    done = zarrcache("convert", source, tmp_path / "command", "--dask", running.file)
    assert done.code == 1
    assert done.out.startswith(f"Converted 6 of 7 files to {tmp_path}/command (")
    assert f"failed: {source}/bad-1.CHGCAR " in done.err
    assert tree(tmp_path / "command") == tree(tmp_path / "here")


def test_with_a_worker_killed_in_the_middle_everything_is_converted_once(
    connected: Cluster, source: Path, tmp_path: Path
) -> None:
    """By SIGKILL, as a batch system does; another worker converts its item."""
    victims = iter([connected.client.run(os.getpid)])

    def kill_one(_: ConvertResult) -> None:
        for pids in victims:
            os.kill(next(iter(pids.values())), signal.SIGKILL)

    report = plan_convert(source, tmp_path / "there").execute(kill_one, engine=connected.spread)
    plan_convert(source, tmp_path / "here", workers=1).execute()
    # skipped: the worker had finished it and died before reporting it
    assert len(report.converted) + len(report.skipped) == 6
    assert [result.task_id for result in report.failed] == ["bad-1"]
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_a_missing_scheduler_is_an_error_within_seconds(source: Path, tmp_path: Path) -> None:
    """The error lists what --dask accepts; nothing is written."""
    done = zarrcache("convert", source, tmp_path / "out", "--dask", "tcp://127.0.0.1:9")
    assert done.code == 2
    assert (
        "error: no Dask scheduler answers at tcp://127.0.0.1:9 (Timed out trying to connect"
        in done.err
    )
    assert "tcp://host:8786, or its scheduler file; or pass `local`" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_scheduler_that_goes_away_ends_the_run_with_an_error(home: Path, tmp_path: Path) -> None:
    """It does not wait forever."""
    with (
        running_cluster(home / "second", {"node1": {}}) as second,
        open_cluster(second.address) as found,
    ):
        outcomes = found.spread(daskcluster.note, [f"see:{tmp_path}", *[str(tmp_path)] * 5])
        next(outcomes)
        second.scheduler.kill()
        with pytest.raises(
            ZarrCacheError,
            match=r"the Dask scheduler tcp://[\d.:]+ is gone\. Finished work is kept",
        ):
            next(outcomes)


@pytest.mark.slow
def test_ctrl_c_ends_a_local_cluster_with_whole_stores_only(source: Path, tmp_path: Path) -> None:
    """The terminal sends it to every process of the group; only the command prints a message."""
    process = start(
        "convert", source, tmp_path / "out", "--dask", "local", "--workers", "2", "--chunks", "4"
    )
    try:
        deadline = time.monotonic() + HANG_S
        while not any(
            ".partial-" in path.name and "witness" not in path.name
            for path in tmp_path.glob("out/.*")
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=HANG_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert (
        err.splitlines()[-1]
        == "Interrupted. Finished work is kept; run the same command again to continue."
    ), err
    assert "Traceback" not in err
    assert list(tmp_path.glob("out/.*")) == []
    plan_convert(source, tmp_path / "out", chunks=4, workers=1).execute()
    plan_convert(source, tmp_path / "here", chunks=4, workers=1).execute()
    assert tree(tmp_path / "out") == tree(tmp_path / "here")


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [("login1", "missing port"), ("x://a:1", "unknown address scheme"), ("{file}", "'address'")],
)
def test_an_invalid_address_is_refused_at_once(scheduler: str, words: str, tmp_path: Path) -> None:
    """Before connecting."""
    (tmp_path / "scheduler.json").write_text("{}")
    with (
        pytest.raises(ConfigError, match=words),
        open_cluster(scheduler.format(file=tmp_path / "scheduler.json")),
    ):
        pass


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'zarrcache\[dask\]'"),
        open_cluster("local"),
    ):
        pass
    monkeypatch.undo()
    with (
        pytest.raises(ConfigError, match="only `local` starts workers"),
        open_cluster("tcp://127.0.0.1:9", workers=3),
    ):
        pass


@pytest.fixture
def config(tmp_path: Path, home: Path) -> Path:
    """Nine pairs in a directory; each node has an empty cache, at its own ZARRCACHE_DIR."""
    write_pairs(tmp_path, 9)
    for node in NODES:
        shutil.rmtree(home / node, ignore_errors=True)
    return write_config(tmp_path)


def test_each_node_warms_what_it_is_assigned_and_no_more(
    running: RunningCluster, config: Path, home: Path
) -> None:
    """Its share of training and test set, as NodeSampler assigns them; one line per node."""
    done = zarrcache("warm", config, "--dask", running.file, "--each-node", "--assignment", "node")
    assert done.code == 0, done.err
    for number, node in enumerate(NODES):  # node2 before node10, as Slurm counts
        owned = [
            task_id
            for part in open_reader(DataConfig.from_yaml(config)).split_task_ids()
            for task_id, owner in zip(part, node_of(part, len(NODES)), strict=True)
            if owner == number
        ]
        assert f"{node}: Warmed {len(owned)} of {len(owned)} ids (" in done.out
        assert stored(config, home / node) == set(owned)
    assert done.out.count("\n") == len(NODES)


def test_every_node_warms_everything_by_default_and_a_node_that_fails_is_named(
    running: RunningCluster, config: Path, home: Path
) -> None:
    """The other nodes finish, and the exit code is 1."""
    (home / "node10").write_text("a file where the cache is to be")
    try:
        done = zarrcache("warm", config, "--dask", running.address, "--each-node", "--json")
    finally:
        (home / "node10").unlink()
    assert done.code == 1
    by_node = {one["node"]: one for one in done.document["nodes"]}
    assert (by_node["node2"]["warm"], by_node["node2"]["ids"], by_node["node2"]["exit_code"]) == (
        9,
        9,
        0,
    )
    assert f"cache.dir {home / 'node10'}" in by_node["node10"]["error"]
    assert by_node["node10"]["exit_code"] == 2
    assert "1 of 2 nodes failed: node10." in done.err
    assert len(stored(config, home / "node2")) == 9


def stored(config: Path, directory: Path) -> set[str]:
    """Ids with both densities in a node's cache."""
    loaded = DataConfig.from_yaml(config)
    assert loaded.cache is not None
    reader = open_reader(
        loaded.model_copy(update={"cache": loaded.cache.model_copy(update={"dir": directory})})
    )
    found = reader.stored()
    return set.intersection(*(set(ids) for ids in found.values()))


def test_workers_of_other_nodes_do_not_fill_this_nodes_cache(
    running: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would fill its own cache with a random part; the error points to --each-node."""
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    words = (
        r"Workers of tcp://[\d.:]+ run on node10, and each node has its own cache; this node is "
        r"node2\. Add --each-node"
    )
    with (
        pytest.raises(ConfigError, match=words),
        open_engine(running.address, None, only_here=True),
    ):
        pass


def test_warm_over_workers_of_this_machine_is_what_it_is_without(
    config: Path, tmp_path: Path
) -> None:
    """``--dask local``: every density once, with the counters of all processes."""
    done = zarrcache("warm", config, "--dask", "local", "--workers", "2", "--json")
    assert done.code == 0, done.err
    assert (done.document["warm"], done.document["stats"]["misses"], done.document["failed"]) == (
        9,
        18,
        [],
    )
    assert len(stored(config, tmp_path / "cache")) == 9
    assert done.err.count("\n") == 1  # mp-absent


def test_quiet_reaches_the_workers(running: RunningCluster, config: Path, tmp_path: Path) -> None:
    """Warnings come from the processes that read: here that the limit is reached."""
    config.write_text(config.read_text().replace("1 GiB", "64 KiB"))
    loud = zarrcache("warm", config, "--workers", "2")
    assert (loud.code, "the limit is reached" in loud.err) == (0, True)
    for way in (("--workers", "2"), ("--dask", "local", "--workers", "1")):
        shutil.rmtree(tmp_path / "cache")
        done = zarrcache("warm", config, *way, "-q")
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("Warmed ")
    done = zarrcache("warm", config, "--dask", running.file, "--each-node", "-q")
    assert (done.code, done.err) == (0, "")
    assert sorted(line.split()[:2] for line in done.out.splitlines()) == sorted(
        [f"{node}:", "Warmed"] for node in NODES
    )


def test_errors_keep_their_messages_with_dask_imported(running: RunningCluster) -> None:
    """Dask changes how exceptions are pickled; a cause that holds a lock cannot be pickled."""
    with open_cluster(running.address):
        error = OriginUnavailableError("s3://b/mp-1.zarr could not be read")
        error.__cause__ = OSError(threading.RLock())
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
