"""X1 and X2: crops and probes of a warm cache, and the same points through numpy's own files.

Each competitor makes tensors of the same number of points of both grids of a pair. A round of
"first epoch of a run" has a new reader, so that each entry's checksum is verified at its first use
(``cache.verify: first``), which reads all of it; the other rounds are those that follow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench import peers_warm as peers
from tests.bench.grids import ROLES
from tests.bench.harness import Bar, Context, Measured, Table, interleave
from zarrcache import Probes, RandomCrop, ZarrDataset
from zarrcache.train import Selection

__all__ = ["run"]

FLOOR, WHOLE = "np.load(mmap_mode=r)", "np.load"
OURS = "zarrcache ZarrDataset"
SIZE, POINTS = 32, 200


def run(context: Context) -> list[Table]:
    """A table for crops and one for probes."""
    n, count = (64, 2) if context.quick else (160, 6)
    samples = peers.prepare(context.workdir, (n, n, n), count, context.seed)
    peers.np_load(samples, context.workdir)  # writes the files
    rng = np.random.default_rng(context.seed)

    def cropped(grid: NDArray[np.float32]) -> NDArray[np.float32]:
        x, y, z = rng.integers(n - SIZE + 1, size=3)
        return np.array(grid[x : x + SIZE, y : y + SIZE, z : z + SIZE])

    def points(grid: NDArray[np.float32]) -> NDArray[np.float32]:
        return grid.reshape(-1)[rng.integers(grid.size, size=POINTS)]

    return [
        _table(context, samples, "X1", f"crops of {SIZE}³", RandomCrop(SIZE), cropped),
        _table(context, samples, "X2", f"{POINTS} probes", Probes(POINTS, structure=False), points),
    ]


def _table(
    context: Context,
    samples: peers.Samples,
    name: str,
    title: str,
    selection: Selection,
    pick: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> Table:
    home = context.workdir
    rounds = 2 if context.quick else 20

    def numpy(mode: Any) -> Measured:
        return _timed(lambda i: _from_files(home / "npy", i, mode, pick), len(samples), rounds)

    def ours(dataset: ZarrDataset) -> Measured:
        return _timed(dataset.__getitem__, len(samples), rounds)

    def first_epoch() -> Measured:
        dataset = ZarrDataset(peers.reader(samples, home), "all", transform=selection)
        return _timed(dataset.__getitem__, len(samples), 1)

    warm = peers.warm_reader(samples, home)
    competitors: dict[str, Callable[[], Measured]] = {
        WHOLE: functools.partial(numpy, None),
        FLOOR: functools.partial(numpy, "r"),
        OURS: functools.partial(ours, ZarrDataset(warm, "all", transform=selection, seed=1)),
        f"{OURS}, first epoch of a run": first_epoch,
    }
    if isinstance(selection, Probes):
        competitors[f"{OURS}, with coordinates and structures"] = functools.partial(
            ours, ZarrDataset(warm, "all", transform=Probes(selection.k), seed=1)
        )
    else:
        competitors[f"{OURS}, rotated"] = functools.partial(
            ours, ZarrDataset(warm, "all", transform=selection, augmentation=True, seed=1)
        )
    return Table(
        name,
        f"{title} of pairs of {samples.shape[0]}³, warm, in one process",
        "samples/s",
        FLOOR,
        interleave(competitors, context.rounds),
        {
            **samples.pairs.facts(),
            "page cache": "warm",
            "sample": "tensors of both grids; each file is opened for each sample",
        },
        [Bar(OURS, FLOOR, at_least=1 / 1.5), Bar(OURS, WHOLE, at_least=10)],
    )


def _from_files(
    home: Path, index: int, mode: Any, pick: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> list[torch.Tensor]:
    return [
        torch.from_numpy(pick(np.load(home / f"{index}-{role}.npy", mmap_mode=mode)))[None]
        for role in ROLES.values()
    ]


def _timed(read: Callable[[int], object], count: int, rounds: int) -> Measured:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        for index in range(count):
            read(index)
    cpu_s = time.process_time() - start_cpu_s
    items = rounds * count
    return Measured(time.perf_counter() - start_s, items, extra={"cpu_ms": 1e3 * cpu_s / items})
