"""S1: what a cache of very many entries costs: opening it, a hit, ``status``, ``warm`` when all is
warm.

The entries are small, their number is not: files of the real format, each with its own name and
identity, in an index that zarrcache rebuilds from them by itself, as it does after the index was
lost.
"""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.grids import FUNCTIONAL, ROLES
from tests.bench.harness import TIMES, Bar, Context, Measured, Round, Table, cores, interleave
from tests.bench.server import BenchServer, running
from zarrcache import ZarrS3Reader, plan_warm
from zarrcache._keys import ArrayKey, stored_array, units_of
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk._publish import publish
from zarrcache.disk.directory import CacheDir
from zarrcache.disk.entry import header_of, write_entry
from zarrcache.disk.index import Index

__all__ = ["run"]

_SHAPE = (4, 4, 4)
_HITS = 400  # in a round
_ROLES = tuple(ROLES)
_LEAST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class _Node:
    """A warm node: its config, its task ids, and what it took to rebuild the index."""

    config: Path
    task_ids: Sequence[str]
    rebuild_s: float

    @property
    def entries(self) -> int:
        return len(_ROLES) * len(self.task_ids)

    def reader(self) -> ZarrS3Reader:
        given = json.loads(self.config.read_text())
        return ZarrS3Reader(
            normalize=True,
            train_fraction=0.8,
            **{name: value for name, value in given.items() if name != "normalize_data"},
        )


def run(context: Context) -> list[Table]:
    """A cache of few entries and one of many; commands and calls in processes of their own, hits in
    this one.
    """
    few, many = (_HITS, 4_000) if context.quick else (_HITS, 400_000)
    (context.workdir / "s3" / "densities").mkdir(parents=True)
    with running(context.workdir / "s3") as server:
        nodes = [
            _fill(context.workdir / str(entries), entries // len(_ROLES), server)
            for entries in (few, many)
        ]
        return [_hits(context, *nodes), _whole(context, server, *nodes)]


def _hits(context: Context, few: _Node, many: _Node) -> Table:
    seeds = iter(range(context.seed, context.seed + 10_000))

    def round_(node: _Node) -> Measured:
        reader, rng = node.reader(), random.Random(next(seeds))
        # opens the index and reads the listings, as the first one of a run does
        reader.load(node.task_ids[0], _ROLES[0])
        spans = []
        # each once: the first use of a run, with its checksum
        for number in rng.sample(range(node.entries), _HITS):
            task_id, role = node.task_ids[number // 2], _ROLES[number % 2]
            start_s = time.perf_counter()
            reader.load(task_id, role)
            spans.append(time.perf_counter() - start_s)
        if reader.stats.misses:
            raise AssertionError(
                f"{reader.stats.misses} of {_HITS} loads were misses; this measures hits"
            )
        p99_us = statistics.quantiles(spans, n=100)[98] * TIMES["µs"]
        return Measured(statistics.median(spans), extra={"p99_us": p99_us})

    competitors: dict[str, Round] = {
        _entries(node): functools.partial(round_, node) for node in (few, many)
    }
    rounds = interleave(competitors, context.rounds, warmup=2)
    facts = _facts(many) | {
        "a round": f"the median of {_HITS} first hits at random, checksums included, by a new "
        "reader with a new connection to the index",
        "page cache": "warm as far as the memory goes: the files were written before",
    }
    bar = Bar(_entries(many), _entries(few), at_most=1.2)
    return Table(
        "S1-hit",
        "a hit in a small cache and in a large one",
        "µs",
        _entries(few),
        rounds,
        facts,
        [bar],
    )


def _whole(context: Context, server: BenchServer, few: _Node, many: _Node) -> Table:
    def round_(node: _Node, what: str) -> Measured:
        server.reset_log()
        if what in _CALLS:
            found = json.loads(_python("-m", "tests.bench.scale", what, str(node.config)))
            return Measured(requests=len(server.log()), **found)
        start_s, before = time.perf_counter(), os.times()
        _python("-m", "zarrcache", what, str(node.config))
        seconds, after = time.perf_counter() - start_s, os.times()
        cpu_s = (
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        return Measured(seconds, requests=len(server.log()), extra={"cpu_s": cpu_s})

    competitors: dict[str, Round] = {}
    for what, words in _WORDS.items():
        for node in (few, many):
            competitors[f"{words}, {_entries(node)}"] = functools.partial(round_, node, what)
    rounds = interleave(competitors, min(context.rounds, _LEAST_ROUNDS))
    facts = _facts(many) | {
        "measured": "opening and plan_warm: the call alone, in a new process that has imported "
        "zarrcache; status and warm: the command, from the "
        "start of its process to its end (0.3 s of it are Python's start and the imports)",
        "the config": f"{len(many.task_ids):,} ids; revalidate: never; the listings of both "
        "directories are stored",
        "requests": "counted by the S3 server that the config names",
        "rebuilding a lost index": f"{many.rebuild_s:.0f} s for {many.entries:,} entries, once",
    }
    large = {what: f"{words}, {_entries(many)}" for what, words in _WORDS.items()}
    bars = [
        Bar(large["open"], None, at_most=0.3),
        Bar(large["status"], None, at_most=1.0),
        Bar(large["plan"], None, at_most=10.0),
        *(Bar(large[what], None, at_most=0, of="requests") for what in ("plan", "warm", "status")),
    ]
    return Table(
        "S1",
        "a cache of 400,000 entries: opening it, looking at it, planning",
        "s",
        f"{_WORDS['open']}, {_entries(few)}",
        rounds,
        facts,
        bars,
    )


def _entries(node: _Node) -> str:
    return f"{node.entries:,} entries"


def _facts(node: _Node) -> dict[str, object]:
    return {
        "entries": f"arrays of {'×'.join(map(str, _SHAPE))} float32, two for each task id, a file "
        "each",
        "bytes on disk": f"{node.entries * 8192:,}",
    }


# -- making it


def _fill(home: Path, count: int, server: BenchServer) -> _Node:
    """A cache in which every density of ``count`` ids is warm."""
    home.mkdir()
    task_ids = [f"mp-{n}" for n in range(count)]
    (home / "map.json").write_text(json.dumps({FUNCTIONAL: task_ids}))
    config = {
        "data_dir": f"s3://densities/{ROLES['data']}",
        "label_dir": f"s3://densities/{ROLES['label']}",
        "map_dir": str(home / "map.json"),
        "functional": FUNCTIONAL,
        "s3_kwargs": server.s3_kwargs,
        "cache": {"dir": str(home / "cache"), "min_free": 0},
    }
    path = home / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    cache = CacheConfig.of(config["cache"])  # type: ignore[arg-type]
    CacheDir(cache.dir, shared=False).ensure()
    parts = 4 * cores()
    with ProcessPoolExecutor(cores(), get_context("spawn")) as pool:
        list(pool.map(_write, [path] * parts, range(parts), [parts] * parts))
    start_s = time.perf_counter()
    Index(cache).open()
    rebuild_s = time.perf_counter() - start_s
    node = _Node(path, task_ids, rebuild_s)
    reader = node.reader()
    for role in _ROLES:
        reader.cache.store_listing(
            reader.origin(role), "", {task_id: f"{task_id}.zarr" for task_id in task_ids}
        )
    totals = Index(cache).totals()
    found = totals["array"][0] + totals["listing"][0]
    if found != node.entries + len(_ROLES):
        raise AssertionError(
            f"the index has {found} entries, not {node.entries} and {len(_ROLES)} listings"
        )
    return node


def _write(config: Path, part: int, parts: int) -> None:
    """Every ``parts``-th entry, as the array tier writes it."""
    reader = _Node(config, (), 0.0).reader()
    task_ids = json.loads(Path(reader.map_dir).read_text())[FUNCTIONAL]
    cache = reader.cache
    assert cache.index is not None
    root = cache.index.dir.root
    directories = [(reader.origin(role).identity, reader.origin(role)) for role in _ROLES]
    array = stored_array("charge_density_total", units_of(reader.normalize))
    for number in range(part, len(task_ids), parts):
        for identity, origin in directories:
            key = ArrayKey(identity, origin.url_of(f"{task_ids[number]}.zarr"), array)
            values = np.full(_SHAPE, number, "<f4")
            header = header_of(key, values, source=f"{number:032x}")
            file = root / "entries" / key.digest[:2] / f"{key.digest}-{number % 2**32:08x}"
            cache.index.dir.make(file.parent)
            publish(
                file,
                lambda out, header=header, values=values: write_entry(out, header, values),
                expected_bytes=header.file_bytes,
            )


# -- in a process of its own


def _open(config: DataConfig) -> None:
    assert config.cache is not None
    Index(config.cache).open()


def _plan(config: DataConfig) -> None:
    plan = plan_warm(config)
    if plan.densities or plan.trusted != 2 * len(plan.task_ids):
        raise AssertionError(
            f"plan_warm would ask for {len(plan.densities)} densities; all are warm"
        )


_CALLS = {"open": _open, "plan": _plan}
_WORDS = {
    "open": "opening the index",
    "status": "zarrcache status",
    "plan": "plan_warm",
    "warm": "zarrcache warm",
}


def _python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(arguments[:3])} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return done.stdout


def _main(what: str, path: str) -> Mapping[str, Any]:
    config = DataConfig.from_yaml(path)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    _CALLS[what](config)
    seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "extra": {"cpu_s": cpu_s, "peak_resident_mib": peak_mib}}


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
