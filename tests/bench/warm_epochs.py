"""W1 and W2: epochs over local data, in one process and through DataLoader workers."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from tests.bench import peers_warm as peers
from tests.bench.harness import Bar, Context, Measured, Round, Table, interleave
from zarrcache import collate

__all__ = ["run"]

CONSUMER = "one value of each 4 KiB page of both arrays is read"
PAGE_CACHE = "warm: every file was read in the warm-up round, nothing is evicted between rounds"
ITERATED = (
    "iterated, as their datasets are made for; as many samples on disk as a round reads, or whole "
    "epochs"
)
#: Those that decode every chunk in every epoch: a round of all samples would take most of the run's
#: time.
SLOW = ("zarr", "zarr CacheStore", "zarr simplecache", "TensorStore", "TensorStore, cache pool")
#: What tells nothing more when every sample is copied.
NOT_COPIED = (
    "LitData, by index",
    "zarr CacheStore",
    "zarr simplecache",
    "zarrcache ZarrDataset, normalized",
)
WORKERS = 2


def run(context: Context) -> list[Table]:
    """W2 first: its workers are forked, and zarr and TensorStore must not have been used before
    that in this process.
    """
    warnings.filterwarnings("ignore", message=".*not writable.*")  # Mosaic's arrays
    shapes = (
        {"5 MiB": (80, 128, 128)}
        if context.quick
        else {"5 MiB": (80, 128, 128), "8 MiB": (128, 128, 128)}
    )
    tables = [_through_workers(context, name, shape) for name, shape in shapes.items()]
    samples = peers.prepare(
        context.workdir / "W1",
        (48, 48, 48) if context.quick else (108, 108, 108),
        4 if context.quick else 16,
        context.seed,
    )
    datasets, missing = peers.available(
        {
            name: functools.partial(make, samples, context.workdir / "W1")
            for name, make in peers.PEERS.items()
        }
    )
    return [
        *tables,
        _in_one_process(context, samples, datasets, missing),
        _in_batches_of_one(context, samples, datasets, missing),
    ]


# -- W1


def _in_one_process(
    context: Context,
    samples: peers.Samples,
    datasets: Mapping[str, Any],
    missing: Mapping[str, str],
) -> Table:
    rounds, missing = _epochs(context, samples, datasets, missing, batch_size=None)
    floor = "np.load(mmap_mode=c)"
    return Table(
        "W1",
        "warm epoch, one process, no collation",
        "samples/s",
        floor,
        rounds,
        {
            **_facts(samples),
            "loader": "DataLoader(batch_size=None, num_workers=0)",
            "LitData, by index": "its chunks stay mapped between epochs; writing to such a tensor "
            "ends the process (SIGSEGV)",
        },
        [
            Bar(name, floor, at_least=0.90)
            for name in ("zarrcache ZarrDataset", "zarrcache RhoData")
        ],
        missing,
    )


def _in_batches_of_one(
    context: Context,
    samples: peers.Samples,
    datasets: Mapping[str, Any],
    missing: Mapping[str, str],
) -> Table:
    chosen = {name: dataset for name, dataset in datasets.items() if name not in NOT_COPIED}
    rounds, missing = _epochs(context, samples, chosen, missing, batch_size=1)
    return Table(
        "W1-batch",
        "warm epoch, one process, batches of one by default_collate, which copies",
        "samples/s",
        "np.load(mmap_mode=c)",
        rounds,
        {**_facts(samples), "loader": "DataLoader(batch_size=1, num_workers=0)"},
        missing=missing,
    )


def _epochs(
    context: Context,
    samples: peers.Samples,
    datasets: Mapping[str, Any],
    missing: Mapping[str, str],
    *,
    batch_size: int | None,
) -> tuple[dict[str, list[Measured]], dict[str, str]]:
    def loader(name: str, count: int) -> DataLoader[Any]:
        dataset = datasets[name]
        # A dataset that is iterated brings its own order; the others are read by position, some
        # over and over.
        sampler = (
            None if isinstance(dataset, IterableDataset) else list(peers.cycle(len(dataset), count))
        )
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler)

    def one(name: str, count: int) -> Measured:
        batches = loader(name, count)
        epochs = count // len(samples) if isinstance(batches.dataset, IterableDataset) else 1
        start_s = time.perf_counter()
        items = 0
        for _ in range(epochs):
            for batch in batches:
                peers.touch(batch)
                items += 1
        return Measured(time.perf_counter() - start_s, items)

    found = dict(missing)
    competitors: dict[str, Round] = {}
    for name in datasets:
        try:
            peers.check(
                itertools.islice(loader(name, 2), 2), samples, name, per_point="normalized" in name
            )
        except Exception as exc:
            if name.startswith(("zarrcache", "np.")):
                raise
            found[name] = f"does not work here: {type(exc).__name__}: {exc}"
            continue
        epochs = 8 if batch_size is None else 2  # a round of 0.1 s
        competitors[name] = functools.partial(
            one, name, 2 if name in SLOW else epochs * len(samples)
        )
    return interleave(competitors, context.rounds, warmup=2), found


def _facts(samples: peers.Samples) -> dict[str, object]:
    return {
        **samples.pairs.facts(),
        "page cache": PAGE_CACHE,
        "consumer": CONSUMER,
        "LitData and Mosaic Streaming": ITERATED,
    }


# -- W2


def _through_workers(context: Context, size: str, shape: tuple[int, int, int]) -> Table:
    home = context.workdir / f"W2 {size}"
    samples = peers.prepare(home, shape, 2 if context.quick else 8, context.seed)
    skip, count = (4, 8) if context.quick else (20, 60)
    length = skip + count

    def torchs(
        dataset: Any, batch_size: int | None, collate_fn: Callable[[list[Any]], Any] | None = None
    ) -> Callable[[], DataLoader[Any]]:
        return lambda: DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=None
            if isinstance(dataset, IterableDataset)
            else list(peers.cycle(len(dataset), length)),
            num_workers=WORKERS,
            collate_fn=collate_fn,
            multiprocessing_context=multiprocessing.get_context("fork"),
        )

    def litdatas() -> Callable[[], DataLoader[Any]]:
        dataset = peers.litdata(samples, home, length=length)
        from litdata import StreamingDataLoader

        return lambda: StreamingDataLoader(dataset, batch_size=1, num_workers=WORKERS)

    loaders, missing = peers.available(
        {
            "np.load": lambda: torchs(peers.np_load(samples, home), 1),
            "np.load(mmap_mode=c)": lambda: torchs(peers.np_mmap(samples, home), 1),
            "np.load, batch_size=None": lambda: torchs(peers.np_load(samples, home), None),
            "zarrcache ZarrDataset, default_collate": lambda: torchs(
                peers.zarr_dataset(samples, home), 1
            ),
            "zarrcache ZarrDataset, zarrcache.collate": lambda: torchs(
                peers.zarr_dataset(samples, home), 1, collate
            ),
            "zarrcache RhoData, default_collate": lambda: torchs(peers.rho_data(samples, home), 1),
            "zarrcache ZarrDataset, batch_size=None": lambda: torchs(
                peers.zarr_dataset(samples, home), None
            ),
            "zarrcache ZarrDataset, normalized": lambda: torchs(
                peers.zarr_dataset_normalized(samples, home), 1
            ),
            "LitData": litdatas,
            "Mosaic Streaming": lambda: torchs(peers.mosaic(samples, home, length=length), 1),
        }
    )
    competitors: dict[str, Round] = {}
    for name, loader in loaders.items():
        peers.check(
            itertools.islice(loader(), len(samples)), samples, name, per_point="normalized" in name
        )
        competitors[name] = functools.partial(_steady, loader, skip)
    rounds = interleave(competitors, _fewer(context))
    return Table(
        f"W2-{size.replace(' ', '')}",
        f"warm epoch through {WORKERS} DataLoader workers, batches of one pair of {size} arrays",
        "samples/s",
        "np.load",
        rounds,
        {
            **_facts(samples),
            "loader": f"DataLoader(batch_size=1, num_workers={WORKERS}), fork",
            "steady state": f"samples {skip + 1} to {length} of a new iterator; the values are "
            "read by the training process",
        },
        [
            Bar(f"zarrcache {name}", "np.load", at_least=3.0)
            for name in (
                "ZarrDataset, default_collate",
                "ZarrDataset, zarrcache.collate",
                "RhoData, default_collate",
            )
        ],
        missing,
    )


def _steady(loader: Callable[[], DataLoader[Any]], skip: int) -> Measured:
    """The rate after the first ``skip`` samples."""
    items, start_s = -skip, 0.0
    for batch in loader():
        peers.touch(batch)
        items += 1
        if items == 0:
            start_s = time.perf_counter()
        last_s = time.perf_counter()
    return Measured(last_s - start_s, items)


def _fewer(context: Context) -> int:
    """Rounds of W2: each starts workers for every competitor."""
    return min(context.rounds, 9)
