"""C3: what filling the cache costs the first epoch."""

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

from tests.bench.grids import FUNCTIONAL, ROLES, Pairs, mp_grids, write_pairs
from tests.bench.harness import Bar, Context, Measured, Table, interleave
from tests.bench.peers_cold import ARRAY, clean_process
from tests.bench.server import BenchServer, running, serve_from_memory

__all__ = ["run"]

_BUCKET = "densities"
_LATENCY_S = 0.02
_WORKERS = 2
_PLAIN, _FILLING = "without a cache", "through an empty cache"


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One epoch to read, in a process of its own."""

    s3_kwargs: dict[str, Any]
    map_path: Path
    cache: Path | None
    workers: int


def run(context: Context) -> list[Table]:
    """In one process, and through DataLoader workers."""
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
        return [_table(context, server, pairs, workers) for workers in (0, _WORKERS)]


def _table(context: Context, server: BenchServer, pairs: Pairs, workers: int) -> Table:
    sums: set[float] = set()
    numbers = itertools.count()

    def round_(pool: ProcessPoolExecutor, *, cached: bool) -> Measured:
        cache = context.workdir / f"cache-{next(numbers)}" if cached else None
        server.reset_log()
        seconds, samples, total = pool.submit(
            _read, _Epoch(server.s3_kwargs, pairs.map_path, cache, workers)
        ).result()
        log = server.log()
        sums.add(total)
        if cache is not None:
            shutil.rmtree(cache)
        return Measured(seconds, samples, len(log), sum(request.nbytes for request in log))

    with ExitStack() as stack:
        pools = {name: stack.enter_context(clean_process()) for name in (_PLAIN, _FILLING)}
        competitors = {
            name: functools.partial(round_, pool, cached=name == _FILLING)
            for name, pool in pools.items()
        }
        rounds = interleave(competitors, context.rounds)
    if len(sums) != 1:
        raise AssertionError(f"epochs gave the sums {sums}: they did not read the same")
    how = f"{workers} DataLoader workers" if workers else "one process"
    facts = pairs.facts() | {
        "read": "ZarrDataset, the training split: 4 of 5 pairs; batch_size=None, "
        f"num_workers={workers}, forked; one value of each 4 KiB page",
        "latency, ms a request": 1000 * _LATENCY_S,
        "a round": "one epoch by a new reader with new connections; the seconds include the start "
        "of the workers",
    }
    bar = Bar(_FILLING, _PLAIN, at_most=1.10)
    return Table(
        "C3-workers" if workers else "C3",
        f"first epoch of a run, {how}",
        "ms",
        _PLAIN,
        rounds,
        facts,
        [bar],
    )


def _read(epoch: _Epoch) -> tuple[float, int, float]:
    """Seconds, samples, and a sum over what was looked at."""
    from torch.utils.data import DataLoader

    from zarrcache import ZarrDataset, ZarrS3Reader

    reader = ZarrS3Reader(
        f"s3://{_BUCKET}/{ROLES['data']}",
        f"s3://{_BUCKET}/{ROLES['label']}",
        epoch.map_path,
        FUNCTIONAL,
        normalize=True,
        train_fraction=0.8,
        s3_kwargs=epoch.s3_kwargs,
        cache=None if epoch.cache is None else {"dir": epoch.cache, "min_free": 0},
    )
    # A spawned process would spawn its workers too, and each would import torch in the epoch's
    # time.
    loader = DataLoader(
        ZarrDataset(reader),
        batch_size=None,
        num_workers=epoch.workers,
        multiprocessing_context="fork" if epoch.workers else None,
    )
    start, total = time.perf_counter(), 0.0
    for sample in loader:
        total += float(sample["data"].reshape(-1)[::1024].sum()) + float(
            sample["label"].reshape(-1)[::1024].sum()
        )
    return time.perf_counter() - start, len(loader), total
