"""Processes that fetch, decode, publish, index, evict and convert are killed at random: what is
left is valid and needs no clean-up.

A process is killed after a random time, or before its n-th file system call, which reaches moments
that a random time misses.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import key_of, payload_files, settings
from tests.support.cacheprocess import STEPS, die_at_step
from tests.support.damage import chance_of
from tests.support.localnode import LocalNode
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import plain_read, random_density
from tests.support.training import write_config, write_pairs
from zarrcache import DataConfig, plan_evict, plan_warm, verify
from zarrcache.convert.writer import encode_store, publish_store, sweep_partials, zipped
from zarrcache.data.reader import open_reader
from zarrcache.disk._database import Stored
from zarrcache.disk.index import Index

FORK = get_context("fork")
#: Only a hang takes this long.
HANG_S = 120

LONG = [pytest.mark.slow, pytest.mark.timeout(1800)]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def kills(default: int, slow: int) -> Any:
    """Parameters ``count, seed``: few kills with a fixed seed, hundreds with a new one."""
    return pytest.mark.parametrize(
        ("count", "seed"),
        [
            pytest.param(default, 1, id=f"{default}"),
            pytest.param(slow, None, marks=LONG, id=f"{slow}"),
        ],
    )


def kill_one(child: BaseProcess, began: Event, chance: random.Random) -> None:
    """Kill after a random time, unless it killed itself before. Any other end is an error."""
    # not from its start on: on a busy machine most would die before they leave anything
    assert began.wait(HANG_S)
    child.join(0.02 + 0.2 * chance.random())
    child.kill()
    child.join(HANG_S)
    assert child.exitcode == -signal.SIGKILL


def a_death(chance: random.Random) -> dict[str, Any] | None:
    """After a time, before any step, or before a step that writes."""
    return chance.choice(
        [
            None,
            {"number": chance.randrange(1, 200)},
            {"number": chance.randrange(1, 10), "writes": True},
        ]
    )


# -- the cache

LIMIT = 40 * 4096


def use_for_ever(node: LocalNode, began: Event, seed: float, death: dict[str, Any] | None) -> None:
    """What training, ``warm`` and ``evict`` do, in random order. Every value read is checked."""
    chance = random.Random(seed)
    reader = node.reader(limit=LIMIT, eviction="least-recently-stored")
    began.set()
    if death is not None:
        die_at_step(**death)
    while True:
        task_id, role = chance.choice(list(node.values))
        match chance.randrange(8):
            case 0:
                reader.cache.arrays.drop(reader.key(task_id, role))  # type: ignore[union-attr, arg-type]
            case 1:
                plan_evict(reader.cache.config, everything=True, target_bytes=LIMIT // 2).execute()  # type: ignore[arg-type]
            case 2:
                reader = node.reader(limit=LIMIT, eviction="least-recently-stored")
            case 3:
                reader.ensure(task_id, role)  # type: ignore[arg-type]
            case 4 | 5:
                group = reader.read_zarr_store(node.directory / role / f"{task_id}.zarr")
                assert np.array_equal(
                    group["charge_density_total"][:3, :3, :3],
                    node.values[task_id, role][:3, :3, :3],
                )  # type: ignore[index]
            case _:
                assert np.array_equal(
                    reader.load(task_id, role)[0], node.values[task_id, role].ravel()
                )  # type: ignore[arg-type]


@kills(36, 300)
def test_killed_at_any_instant_the_cache_is_whole_and_cleans_up_by_itself(
    tmp_path: Path, count: int, seed: int | None
) -> None:
    """Two processes at a time: the survivor is not disturbed, and when both are dead the next
    opening leaves exactly the files of the index.
    """
    node, chance = LocalNode(tmp_path, 4, shape=(14, 10, 8)), chance_of(seed)
    left_over = 0
    for _ in range(count // 2):
        two = []
        for _ in range(2):
            began = FORK.Event()
            two.append(
                (
                    FORK.Process(
                        target=use_for_ever, args=(node, began, chance.random(), a_death(chance))
                    ),
                    began,
                )
            )
        for child, _ in two:
            child.start()
        for child, began in two:
            kill_one(child, began, chance)
        files = payload_files(tmp_path)
        reader = node.reader(limit=LIMIT, eviction="least-recently-stored")
        node.check_settled()
        left_over += files != payload_files(tmp_path)
        node.read(reader)
        assert (reader.stats.purges, reader.stats.cache_errors) == (0, 0)
        node.check_settled()
        assert list(node.root.glob("*.broken-*")) == []
    assert left_over  # otherwise no process was killed in the middle of a store


# -- converting


def convert_for_ever(
    out: Path,
    versions: list[dict[str, dict[str, bytes]]],
    began: Event,
    seed: float,
    death: dict[str, Any] | None,
) -> None:
    """Write two stores, a directory and a zip file, repeatedly in one of two versions."""
    chance = random.Random(seed)
    began.set()
    if death is not None:
        die_at_step(**death)
    while True:
        sweep_partials(out)
        for name, objects in chance.choice(versions).items():
            publish_store(out / name, objects, overwrite=True)


@kills(10, 80)
def test_killed_while_it_converts_every_store_is_one_version_or_the_other(
    tmp_path: Path, count: int, seed: int | None
) -> None:
    """Never absent, never mixed; the next run removes what killed processes left, nothing else."""
    chance, out = chance_of(seed), tmp_path / "out"
    arrays = [random_density((6, 5, 4), seed=n) for n in range(2)]
    versions = []
    for values in arrays:
        objects = encode_store(values, None, {}, {}, chunks=(3, 3, 3))
        versions.append({"mp-1.zarr": objects, "mp-2.zarr.zip": {"": zipped(objects)}})
    for name, objects in versions[0].items():
        publish_store(out / name, objects)
    left_over = 0
    for _ in range(count):
        began = FORK.Event()
        child = FORK.Process(
            target=convert_for_ever, args=(out, versions, began, chance.random(), a_death(chance))
        )
        child.start()
        kill_one(child, began, chance)
        left_over += len(sweep_partials(out))
        assert sorted(path.name for path in out.iterdir()) == ["mp-1.zarr", "mp-2.zarr.zip"]
        for path in out.iterdir():
            assert any(np.array_equal(plain_read(path), values) for values in arrays)
    assert left_over


# -- zarrcache warm


def warm(config: DataConfig) -> None:
    """What ``zarrcache warm`` does, in one process."""
    plan_warm(config, workers=1).execute()


@kills(3, 40)
def test_killed_warm_fetches_again_only_what_was_in_flight(
    tmp_path: Path, s3_server: S3Server, bucket: str, count: int, seed: int | None
) -> None:
    """Counted at the server, after kills at random requests: no stored object is requested again,
    and finally all are there.
    """
    chance, values = chance_of(seed), write_pairs(tmp_path, 5, shape=(8, 8, 6))
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    path = write_config(tmp_path, f"s3://{bucket}", s3_kwargs=s3_server.s3_kwargs)
    config = DataConfig.from_yaml(path).model_copy(update={"normalize_data": False})
    assert config.cache is not None
    index, stored, in_flight = Index(config.cache), set[str](), 0
    index.open()
    for number in range(count + 1):
        log = RequestLog(s3_server, bucket)
        child = FORK.Process(target=warm, args=(config,))
        child.start()
        requests, deadline_s = chance.randrange(1, 50), time.monotonic() + HANG_S
        while (
            number < count
            and child.is_alive()
            and log.paths("GET", settled=False).total() < requests
        ):
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        if number < count:
            child.kill()
        child.join(HANG_S)
        assert child.exitcode in (0, -signal.SIGKILL)
        asked = Counter("/".join(key.split("/")[:2]) for key in log.paths("GET"))
        assert not asked.keys() & stored
        assert max(log.paths("GET").values(), default=1) == 1
        now = {
            row.note.split("\n")[1].removeprefix(f"s3://{bucket}/")
            for row in index.rows("array")
            if not row.note.endswith("\n")
        }
        assert now <= stored | asked.keys()
        in_flight += len(asked.keys() - now)
        stored = now
        if number < count and len(stored) == len(values):
            plan_evict(config, everything=True).execute()
            stored = set()
    assert in_flight
    assert len(stored) == len(values)
    report = verify(config)
    assert (report.corrupt, report.strays) == ((), ())
    reader = open_reader(config)
    for (task_id, role), array in values.items():
        assert np.array_equal(reader.load(task_id, role)[0], array.ravel())  # type: ignore[arg-type]
    assert reader.stats.requests == 0


# -- starting again


def count_opening(directory: Path) -> dict[str, int]:
    """Open an existing index; counts of file system calls, and the number of SQLite VM
    instructions.
    """
    counts: Counter[str] = Counter()
    connect = sqlite3.connect

    def connect_and_count(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_progress_handler(lambda: counts.update(instructions=1), 1)
        return connection

    sqlite3.connect = connect_and_count  # type: ignore[assignment]
    try:
        sys.addaudithook(lambda event, _: counts.update([event] if event in STEPS else ()))
        index = Index(settings(directory))
        index.open()
        return dict(counts)
    finally:
        sqlite3.connect = connect


def test_opening_after_a_kill_costs_the_same_with_10_and_with_3000_entries(tmp_path: Path) -> None:
    """Counts instead of times: files opened, directories listed, SQLite instructions. Two files of
    a dead writer are removed each time.
    """
    found = []
    for number in (10, 3000):
        directory = tmp_path / str(number)
        child = FORK.Process(target=fill_and_die, args=(directory, number))
        child.start()
        child.join(HANG_S)
        assert child.exitcode == -signal.SIGKILL
        assert len(payload_files(directory)) == 2
        with FORK.Pool(1) as pool:
            found.append(pool.apply(count_opening, (directory,)))
        assert Index(settings(directory)).totals() == {"array": (number, 8192 * number)}
        assert payload_files(directory) == []
    assert found[0]["instructions"] > 100
    assert found[0].pop("instructions") == pytest.approx(found[1].pop("instructions"), rel=0.02)
    assert found[0] == found[1]


def fill_and_die(directory: Path, number: int) -> None:
    """An index of so many entries, two partial files, and no orderly exit."""
    index = Index(settings(directory))
    index.open()
    with index._file.transaction() as table:
        for n in range(number):
            digest = key_of(n).digest
            table.set(
                digest, Stored(f"entries/{digest[:2]}/{digest}-1", 8192, "a note"), tag="array"
            )
    for name in ("one", "two"):
        index.begin(f"entries/ab/{name}", 4096)
        index.dir.make(index.dir.entries / "ab")
        (index.dir.entries / "ab" / name).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
