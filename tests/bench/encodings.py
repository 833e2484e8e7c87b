"""D1 and D2: entries in other encodings than float32: a hit, and a data set of twice the disk."""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.grids import FUNCTIONAL, ROLES, Pairs, mp_grids, write_pairs
from tests.bench.harness import Bar, Context, Measured, Round, Table, interleave
from tests.bench.peers_cold import ARRAY, clean_process
from tests.bench.server import BenchServer, running, serve_from_memory

__all__ = ["run"]

_BUCKET = "densities"
_LATENCY_S = 0.02
_EPOCHS = 3
_ENCODINGS = ("float32", "float16", "bfloat16", "bits:12")
#: Entries of float32 start with a page of header.
_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Run:
    """Epochs to read, in a process of its own."""

    s3_kwargs: dict[str, Any]
    map_path: Path
    cache: Path
    limit: int
    encoding: str
    epochs: int


def run(context: Context) -> list[Table]:
    """Both tables read the same pairs."""
    pairs = write_pairs(
        context.workdir / "s3" / _BUCKET,
        mp_grids(5 if context.quick else 15, context.seed),
        seed=context.seed,
    )
    with running(context.workdir / "s3", latency_s=_LATENCY_S) as server:
        prefixes = [
            f"{directory}/{task_id}.zarr/{ARRAY}/"
            for directory in ROLES.values()
            for task_id in pairs.task_ids
        ]
        serve_from_memory(server, _BUCKET, prefixes)
        with ExitStack() as stack:
            pools = {name: stack.enter_context(clean_process()) for name in _ENCODINGS}
            return [
                _hits(context, server, pairs, pools),
                _twice_the_disk(context, server, pairs, pools),
            ]


def _hits(
    context: Context, server: BenchServer, pairs: Pairs, pools: dict[str, ProcessPoolExecutor]
) -> Table:
    """The cache holds all; each round is one warm epoch."""

    def round_(pool: ProcessPoolExecutor, encoding: str) -> Measured:
        cache = context.workdir / f"whole-{encoding.replace(':', '')}"
        todo = _Run(server.s3_kwargs, pairs.map_path, cache, 2**50, encoding, 2)
        ((_, *_), (seconds, cpu_s, hits, reads)), on_disk = pool.submit(_read, todo).result()
        if hits != reads:
            raise AssertionError(f"{reads - hits} of {reads} reads were misses")
        return Measured(
            seconds, reads, extra={"cpu_ms": 1000 * cpu_s / reads, "mib": on_disk / 2**20}
        )

    rounds = interleave(_competitors(round_, pools), context.rounds, warmup=1)
    bars = [Bar(name, "float32", at_most=1.2) for name in ("float16", "bfloat16")]
    return Table(
        "D1",
        "a hit by encoding of the entries, every value copied",
        "ms",
        "float32",
        rounds,
        pairs.facts()
        | {
            "read": "ZarrS3Reader.load in one process; every value is copied into a buffer that "
            "exists",
            "page cache": "warm",
            "extra": "cpu_ms: CPU per hit; mib: bytes of all entries on disk",
        },
        [
            *bars,
            Bar("bits:12", "float32", at_most=4.0),
            Bar("float16", "float32", at_most=0.5, of="mib"),
            Bar("bits:12", "float32", at_most=1 / 2.2, of="mib"),
        ],
    )


def _twice_the_disk(
    context: Context, server: BenchServer, pairs: Pairs, pools: dict[str, ProcessPoolExecutor]
) -> Table:
    """``cache.limit`` is half of what float32 needs."""
    numbers = itertools.count()
    decoded = sum(_HEADER_BYTES + 4 * int(np.prod(shape)) for shape in pairs.shapes) * len(ROLES)

    def round_(pool: ProcessPoolExecutor, encoding: str) -> Measured:
        cache = context.workdir / f"half-{next(numbers)}"
        server.reset_log()
        limit = decoded // 2 + 2**17  # the listings
        todo = _Run(server.s3_kwargs, pairs.map_path, cache, limit, encoding, _EPOCHS)
        epochs, _ = pool.submit(_read, todo).result()
        shutil.rmtree(cache)
        seconds, _, hits, reads = (sum(column) for column in zip(*epochs[1:], strict=True))
        log = server.log()
        return Measured(
            seconds,
            int(reads),
            len(log),
            sum(request.nbytes for request in log),
            {"hits_percent": 100 * hits / reads},
        )

    rounds = interleave(_competitors(round_, pools), min(context.rounds, 5))
    return Table(
        "D2",
        "a data set of twice the disk, epochs 2 and 3",
        "ms",
        "float32",
        rounds,
        pairs.facts()
        | {
            "read": f"{_EPOCHS} epochs by ZarrS3Reader.load in one process, every value copied; "
            "milliseconds per density and hits of the epochs after the first, requests of all",
            "latency, ms a request": 1000 * _LATENCY_S,
            "cache.limit": "half of the bytes of all densities in float32, and the listings",
        },
        [
            Bar("float16", None, at_least=100, of="hits_percent"),
            Bar("bits:12", None, at_least=100, of="hits_percent"),
        ],
    )


def _competitors(round_: Any, pools: dict[str, ProcessPoolExecutor]) -> dict[str, Round]:
    return {name: functools.partial(round_, pool, name) for name, pool in pools.items()}


def _read(todo: _Run) -> tuple[list[tuple[float, float, int, int]], int]:
    """Per epoch: seconds, seconds of CPU, hits and reads; and bytes on disk at the end."""
    import torch

    from zarrcache import ZarrDataset, ZarrS3Reader

    assert ZarrDataset  # has been imported, as in a training: it decodes by torch
    torch.set_num_threads(1)  # as in a DataLoader worker
    reader = ZarrS3Reader(
        f"s3://{_BUCKET}/{ROLES['data']}",
        f"s3://{_BUCKET}/{ROLES['label']}",
        todo.map_path,
        FUNCTIONAL,
        normalize=True,
        train_fraction=1.0,
        s3_kwargs=todo.s3_kwargs,
        cache={
            "dir": todo.cache,
            "min_free": 0,
            "limit": todo.limit,
            "arrays": {"encoding": todo.encoding},
        },
    )
    buffer, found = np.empty(0, np.float32), []
    for _ in range(todo.epochs):
        before = reader.stats
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for task_id in reader.task_ids:
            for role in reader.roles:
                values, _ = reader.load(task_id, role)
                if len(buffer) < len(values):
                    buffer = np.zeros(len(values), np.float32)
                np.copyto(buffer[: len(values)], values)
                del values
        seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        new = reader.stats - before
        found.append((seconds, cpu_s, new.hits, new.hits + new.misses))
    return found, sum(size for sizes in reader.stored().values() for size in sizes.values())
