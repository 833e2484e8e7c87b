"""A1 to A4: epochs as people train: pairs are rotated, and every value of them is used.

The consumer copies both arrays of a batch into buffers that exist, as pinning memory or a transfer
to a GPU does. A consumer that looks at one value per page would flatter maps, whose other values
are never read.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tests.bench import peers_warm as peers
from tests.bench.grids import ROLES
from tests.bench.harness import Bar, Context, Measured, Table, interleave
from zarrcache import RhoData, ZarrDataset
from zarrcache.train.transforms import downsample, draw_rotation, rotate

__all__ = ["run"]

CONSUMER = "every value of both arrays is copied into a buffer that exists"
WORKERS = 2
FLOOR = "np.load"


class _Files(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Decoded arrays in ``.npy`` files, rotated by the same law as those of zarrcache."""

    def __init__(
        self,
        samples: peers.Samples,
        directory: Path,
        *,
        mmap: bool,
        is_rotated: bool,
        step: int,
        dtype: torch.dtype,
    ) -> None:
        # Writes the files.
        (peers.np_mmap if mmap else peers.np_load)(samples, directory)
        self._home, self._length = directory / "npy", len(samples)
        self._mode = "c" if mmap else None
        self._is_rotated, self._step, self._dtype = is_rotated, step, dtype
        self._drawn = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self._drawn += 1
        rotation = draw_rotation(self._drawn, index)
        tensors = []
        for role in ROLES.values():
            grid = np.load(self._home / f"{index}-{role}.npy", mmap_mode=self._mode)[None]
            if self._is_rotated:
                grid = rotate(grid, rotation)
            grid = downsample(grid, self._step, multiple=self._step)
            if not (grid.flags.c_contiguous and grid.flags.writeable):
                grid = np.array(grid, order="C")
            tensors.append(torch.from_numpy(grid).to(self._dtype))
        return tuple(tensors)


def run(context: Context) -> list[Table]:
    """A table per way of use, all over the same pairs."""
    shape = (48, 48, 48) if context.quick else (108, 108, 108)
    samples = peers.prepare(context.workdir, shape, 2 if context.quick else 8, context.seed)
    of = functools.partial(_table, context, samples)
    return [
        of("A1", "rotated, batches of one", at_least=2.5),
        of("A2-half", "rotated, downsampled by two", at_least=2.0, step=2),
        of("A2-bf16", "rotated, cast to bfloat16", at_least=2.0, dtype=torch.bfloat16),
        of("A2-batch", "rotated, stacked in batches of four", at_least=2.0, batch_size=4),
        of("A3", "rotated, in one process", at_least=1.5, workers=0),
        of("A4", "not rotated, batches of one", at_least=3.5, is_rotated=False),
    ]


def _table(
    context: Context,
    samples: peers.Samples,
    name: str,
    title: str,
    *,
    at_least: float,
    step: int = 1,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    workers: int = WORKERS,
    is_rotated: bool = True,
) -> Table:
    home = context.workdir
    files = functools.partial(_Files, samples, home, is_rotated=is_rotated, step=step, dtype=dtype)
    precision = "bf16" if dtype is torch.bfloat16 else "f32"
    datasets: dict[str, Dataset[Any]] = {
        FLOOR: files(mmap=False),
        "np.load(mmap_mode=c)": files(mmap=True),
        "zarrcache ZarrDataset": ZarrDataset(
            peers.warm_reader(samples, home),
            "all",
            augmentation=is_rotated,
            downsample_data=step,
            downsample_label=step,
            precision=precision,  # type: ignore[arg-type]
        ),
    }
    if dtype is torch.float32:
        train, _ = peers.warm_reader(samples, home).data_split()
        datasets["zarrcache RhoData"] = RhoData(*train, step, step, data_augmentation=is_rotated)
    skip, count = (4, 8) if context.quick else (24, 72)

    def loader(dataset: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=list(peers.cycle(len(dataset), skip + count)),
            num_workers=workers,
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        )

    competitors = {
        key: functools.partial(_steady, functools.partial(loader, dataset), skip // batch_size)
        for key, dataset in datasets.items()
    }
    where = f"through {workers} DataLoader workers" if workers else "in one process"
    return Table(
        name,
        f"warm epoch {where}: pairs of {samples.shape[0]}³, {title}; every value is used",
        "samples/s",
        FLOOR,
        interleave(competitors, min(context.rounds, 9)),
        {
            **samples.pairs.facts(),
            "page cache": "warm",
            "consumer": CONSUMER,
            "rotation": "0 quarter turns for 10 % of the samples, 1, 2 and 3 for 30 % each"
            if is_rotated
            else "none",
            "loader": f"DataLoader(batch_size={batch_size}, num_workers={workers})",
            "floors": "np.load and np.load(mmap_mode='c') with the same rotation, downsampling and "
            "cast",
        },
        [Bar("zarrcache ZarrDataset", FLOOR, at_least=at_least)],
    )


def _steady(loader: Callable[[], DataLoader[Any]], skip: int) -> Measured:
    """The rate after the first ``skip`` batches, in samples."""
    buffers: list[torch.Tensor] = []
    items, start_s, last_s = -skip, 0.0, 0.0
    samples = 0
    for batch in loader():
        tensors = peers.tensors_of(batch)
        if not buffers:
            buffers = [torch.empty(2 * tensor.numel(), dtype=tensor.dtype) for tensor in tensors]
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer[: tensor.numel()].copy_(tensor.reshape(-1))
        items += 1
        if items > 0:
            samples += len(tensors[0])
        if items == 0:
            start_s = time.perf_counter()
        last_s = time.perf_counter()
    return Measured(last_s - start_s, samples)
