"""L1: how much of a cold epoch the training waits for data, with and without look-ahead."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import math
import os
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
from tests.bench.server import running, serve_from_memory

__all__ = ["run"]

_BUCKET = "densities"
_LATENCY_S, _STEP_S = 0.02, 0.05
# Of 64**3 points. A training that takes a pair every 50 ms would ask for 17,000 chunks of 16**3 a
# second, at 20 ms each: 340 requests in flight and the CPU of three cores, in any client.
_CHUNK = 64
# Densities of the Materials Project that two cores can carry beside the training and the server: a
# pair of 13 MiB, its mean, is 57 ms of CPU, and the memory for 265 MiB a second of new files.
_MOST_BYTES = 4 * 2**20
_MOST_ROUNDS = 3  # two minutes each
# Names of a pair: the epoch is 768 steps. What its start costs, a second, is in it.
_NAMES = 8
# Without look-ahead one step is like another.
_STEPS_ALONE = 192
_SKIPPED = 20
_BUDGET = "1 GiB"
_WAITING = "waiting_percent"
_STEADY = "waiting_after_20_steps_percent"
_ALONE, _WORKERS, _AHEAD, _AHEAD_WORKERS = (
    "no look-ahead",
    "no look-ahead, 2 workers",
    "look-ahead",
    "look-ahead, 2 workers",
)
_TITLE = (
    "waiting for data in a cold epoch: 768 steps of 50 ms, densities of at most "
    f"{_MOST_BYTES // 2**20} MiB"
)
_COMPETITORS = {
    _ALONE: (0, False),
    _WORKERS: (2, False),
    _AHEAD: (0, True),
    _AHEAD_WORKERS: (2, True),
}


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One cold epoch, in a process of its own."""

    s3_kwargs: dict[str, Any]
    map_path: Path
    cache: Path
    workers: int
    lookahead: str
    most_steps: int | None


@dataclass(frozen=True, slots=True)
class _Waited:
    """Seconds until each sample came, and the sum of the values that were looked at in the steps
    that every competitor takes.
    """

    seconds: list[float]
    total: float


def run(context: Context) -> list[Table]:
    """One process and DataLoader workers, with and without look-ahead."""
    root = context.workdir / "s3" / _BUCKET
    grids = [grid for grid in mp_grids(400, context.seed) if 4 * math.prod(grid) <= _MOST_BYTES]
    pairs = write_pairs(
        root, grids[: 12 if context.quick else 120], chunks=_CHUNK, seed=context.seed
    )
    task_ids = _under_other_names(root, pairs)
    sums: set[float] = set()
    numbers = itertools.count()
    with running(context.workdir / "s3", latency_s=_LATENCY_S) as server, ExitStack() as stack:
        serve_from_memory(
            server,
            _BUCKET,
            [
                f"{directory}/{task_id}.zarr/{ARRAY}/"
                for directory in ROLES.values()
                for task_id in task_ids
            ],
        )

        def round_(pool: ProcessPoolExecutor, workers: int, *, ahead: bool) -> Measured:
            cache = context.workdir / f"cache-{next(numbers)}"
            server.reset_log()
            epoch = _Epoch(
                server.s3_kwargs,
                pairs.map_path,
                cache,
                workers,
                _BUDGET if ahead else "0",
                None if ahead else _STEPS_ALONE,
            )
            waited = pool.submit(_train, epoch).result()
            log = server.log()
            shutil.rmtree(cache)
            sums.add(waited.total)
            extra = {
                _WAITING: _share(waited.seconds),
                _STEADY: _share(waited.seconds[min(_SKIPPED, len(waited.seconds) // 2) :]),
            }
            seconds = sum(waited.seconds) + _STEP_S * len(waited.seconds)
            return Measured(
                seconds,
                len(waited.seconds),
                len(log),
                sum(request.nbytes for request in log),
                extra,
            )

        pools = {name: stack.enter_context(clean_process()) for name in _COMPETITORS}
        competitors = {
            name: functools.partial(round_, pools[name], workers, ahead=ahead)
            for name, (workers, ahead) in _COMPETITORS.items()
        }
        rounds = interleave(competitors, min(context.rounds, _MOST_ROUNDS))
    if len(sums) != 1:
        raise AssertionError(f"epochs gave the sums {sums}: they did not read the same")
    facts = pairs.facts() | {
        "chunks": f"{_CHUNK}³",
        "ids": f"{len(task_ids)}: each pair under {_NAMES} names, in objects of its own",
        "read": "ZarrDataset in a NodeSampler's order, the training split: 4 of 5 pairs; "
        "batch_size=None, workers forked; a value of each 4 KiB page",
        "a step": f"{1000 * _STEP_S:.0f} ms, in which the training process sleeps",
        "latency, ms a request": 1000 * _LATENCY_S,
        "a round": "a run's first epoch, an empty cache; waiting from the loop's start on; "
        f"without look-ahead {_STEPS_ALONE} steps of it",
        "lookahead": _BUDGET,
        "after 20": f"without the first {_SKIPPED} steps: until the look-ahead's process has "
        "started, the training fetches by itself",
    }
    bars = [
        Bar(name, None, at_most=5.0, of=of)
        for name in (_AHEAD, _AHEAD_WORKERS)
        for of in (_WAITING, _STEADY)
    ]
    return [Table("L1", _TITLE, "% of the time", _ALONE, rounds, facts, bars, of=_WAITING)]


def _under_other_names(root: Path, pairs: Pairs) -> list[str]:
    """Make the epoch longer without making more densities: every store is there ``_NAMES`` times.
    All task ids, which the map has too.
    """
    found = [
        f"{task_id}-{number}" if number else task_id
        for number in range(_NAMES)
        for task_id in pairs.task_ids
    ]
    for directory in ROLES.values():
        for task_id in pairs.task_ids:
            for number in range(1, _NAMES):
                shutil.copytree(
                    root / directory / f"{task_id}.zarr",
                    root / directory / f"{task_id}-{number}.zarr",
                    copy_function=os.link,
                )
    pairs.map_path.write_bytes(gzip.compress(json.dumps({FUNCTIONAL: found}).encode()))
    return found


def _share(waited_s: list[float]) -> float:
    return 100 * sum(waited_s) / (sum(waited_s) + _STEP_S * len(waited_s))


def _train(epoch: _Epoch) -> _Waited:
    from torch.utils.data import DataLoader

    from zarrcache import Lookahead, NodeSampler, ZarrDataset, ZarrS3Reader

    reader = ZarrS3Reader(
        f"s3://{_BUCKET}/{ROLES['data']}",
        f"s3://{_BUCKET}/{ROLES['label']}",
        epoch.map_path,
        FUNCTIONAL,
        normalize=True,
        train_fraction=0.8,
        s3_kwargs=epoch.s3_kwargs,
        cache={"dir": epoch.cache, "min_free": 0, "lookahead": epoch.lookahead},
    )
    dataset = ZarrDataset(reader)
    sampler = NodeSampler(dataset, seed=1)
    # A spawned process would spawn its workers too, and each would import torch in the epoch's
    # time.
    context = "fork" if epoch.workers else None
    waited, total = [], 0.0
    with Lookahead(dataset, sampler):
        samples = iter(
            DataLoader(
                dataset,
                batch_size=None,
                sampler=sampler,
                num_workers=epoch.workers,
                multiprocessing_context=context,
            )
        )
        for step in range(len(sampler))[: epoch.most_steps]:
            start_s = time.perf_counter()
            sample = next(samples)
            seen = float(sample["data"].reshape(-1)[::1024].sum()) + float(
                sample["label"].reshape(-1)[::1024].sum()
            )
            total += seen if step < _STEPS_ALONE else 0.0
            waited.append(time.perf_counter() - start_s)
            time.sleep(_STEP_S)
    return _Waited(waited, total)
