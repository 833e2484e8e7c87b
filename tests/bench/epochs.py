"""E1 and E2: the first three epochs of a training, from empty caches, loader beside loader.

Every loader runs in a process of its own, with an empty directory for what it keeps, against a
server that waits 20 ms a request. Samples are rotated, and every value of them is copied into a
buffer that exists. The first epoch says what filling a cache costs, the others what it is worth.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import multiprocessing
import os
import resource
import shutil
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from tests.bench.grids import FUNCTIONAL, ROLES, Shape, values_of, write_pairs
from tests.bench.harness import Bar, Context, Measured, Table, interleave
from tests.bench.peers_cold import ARRAY, Place, clean_process
from tests.bench.peers_warm import available, tensors_of
from tests.bench.server import BenchServer, running, serve_from_memory
from zarrcache.train.transforms import draw_rotation, rotate

__all__ = ["EPOCHS", "run"]

EPOCHS = 3
LATENCY_S = 0.02
WORKERS = 2
OURS, PLAIN = "zarrcache", "zarr + s3fs"
STORES, LITDATA, MDS, STACKED = "densities", "litdata", "mds", "stacked"
MOST_ROUNDS = 3  # of minutes

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Job:
    """Three epochs of one loader, in a process that does nothing else.

    Attributes
    ----------
    loader : str
        A key of ``LOADERS``.
    place : Place
    task_ids : tuple of str
    seed : int
    sums : sequence of (float, float), optional
        Sums of data and label of every pair. Given, a fourth epoch, which is not measured, compares
        them with what comes from the cache.
    """

    loader: str
    place: Place
    task_ids: tuple[str, ...]
    seed: int
    sums: tuple[tuple[float, float], ...] | None


def run(context: Context) -> list[Table]:
    """E1: grids of several shapes, as a data set of materials has them. E2: of one shape, which is
    what insitubatch takes.
    """
    if context.quick:
        return [
            _table(context, "E1", [(24, 24, 24), (32, 32, 32)] * 2, MIXED),
            _table(context, "E2", [(32, 32, 32)] * 4, EQUAL),
        ]
    mixed = [(n, n, n) for n in (64, 80, 96, 108)] * 3
    return [
        _table(context, "E1", mixed, MIXED),
        _table(context, "E2", [(96, 96, 96)] * 12, EQUAL),
    ]


def _table(context: Context, name: str, shapes: Sequence[Shape], loaders: Sequence[str]) -> Table:
    home = context.workdir / name
    pairs = write_pairs(home / "s3" / STORES, shapes, seed=context.seed)
    values = [values_of(index, shape, context.seed) for index, shape in enumerate(shapes)]
    arrays = [(one["data"], one["label"]) for one in values]
    copies = {
        loader: functools.partial(write, home / "s3", arrays)
        for loader, write in COPIES.items()
        if loader in loaders
    }
    _, missing = available(copies)
    if len(set(shapes)) > 1:
        missing["insitubatch"] = (
            "takes samples of one array, so of one shape; the pairs have several. See E2"
        )
    sums = tuple((float(a.sum(dtype="f8")), float(b.sum(dtype="f8"))) for a, b in arrays)
    with running(home / "s3", latency_s=LATENCY_S) as server:
        place = Place(server.s3_kwargs, STORES, pairs.map_path, home)
        serve_from_memory(
            server, STORES, [f"{d}/{t}.zarr/" for d in ROLES.values() for t in pairs.task_ids]
        )
        first: dict[str, list[Measured]] = {}
        for loader in loaders:
            try:
                if loader not in missing:
                    job = _Job(loader, place, pairs.task_ids, context.seed, sums)
                    first[loader] = [_round(server, home, job)]
            except Exception as exc:
                if loader == OURS:
                    raise
                missing[loader] = f"does not work here: {type(exc).__name__}: {exc}"
        competitors = {
            loader: functools.partial(
                _round, server, home, _Job(loader, place, pairs.task_ids, context.seed, None)
            )
            for loader in first
        }
        more = interleave(competitors, min(context.rounds, MOST_ROUNDS) - 1, warmup=0)
        rounds = {loader: [*measured, *more[loader]] for loader, measured in first.items()}
    shutil.rmtree(home)
    kind = "of several shapes" if len(set(shapes)) > 1 else f"of {shapes[0][0]}³"
    return Table(
        name,
        f"epochs 1 to {EPOCHS} from empty caches, pairs {kind}, rotated, 20 ms a request",
        "samples/s",
        PLAIN if PLAIN in loaders else OURS,
        rounds,
        {**pairs.facts(), **_facts(name)},
        [Bar(OURS, PLAIN, at_least=4.0)] if PLAIN in loaders else [],
        missing,
    )


def _facts(name: str) -> dict[str, object]:
    return {
        "latency, ms a request": 1e3 * LATENCY_S,
        "median, P90, P99": "of the three epochs together",
        "consumer": "every value of both arrays is copied into a buffer that exists",
        "order": "another one in each epoch, by each loader's own way to shuffle",
        "rotation": "0 quarter turns for 10 % of the samples, 1, 2 and 3 for 30 % each; in the "
        "worker, by each loader's own hook",
        "loader": f"batches of one, {WORKERS} workers, forked, kept between epochs; their start is "
        "in the first epoch. insitubatch: no workers, threads of the training's process, as its "
        "documentation says",
        "caches": "empty at the start of each round, on the local disk; larger than the data set. "
        "TensorStore's pool is in memory, one per worker, and each worker may keep everything",
        "stores": "read by zarr, TensorStore and zarrcache as they are, in chunks of 16³; LitData, "
        "Mosaic Streaming (chunks and shards of 64 MB, not compressed) and insitubatch (an array "
        "per role, a chunk per sample) read copies in a layout of their own, whose making is in no "
        "figure",
        "cpu": "of the training's process and its workers; the server has another process on the "
        "same cores",
        "where others are ahead": _AHEAD[name],
    }


#: Said with the figures; what is measured is in the table.
_AHEAD = {
    "E1": "epoch 1. LitData and Mosaic Streaming take one request per 64 MB instead of one per "
    "chunk of 16³ and decode nothing, but need a second copy of the data set. TensorStore reads "
    "the same chunks with less CPU and writes nothing to disk; its pool is lost with the process, "
    "and as each worker has one, a chunk is fetched once per worker",
    "E2": "epoch 1. insitubatch, LitData and Mosaic Streaming read few large objects of a copy; "
    "insitubatch starts no processes. It needs all samples as one array, so of one shape",
}


# -- one round


def _round(server: BenchServer, home: Path, job: _Job) -> Measured:
    scratch = home / f"cache-{next(_NUMBERS)}"
    scratch.mkdir()
    server.reset_log()
    place = Place(job.place.s3_kwargs, job.place.bucket, job.place.map_path, scratch)
    try:
        with clean_process() as pool:
            seconds, cpu_s = pool.submit(
                _three_epochs, _Job(job.loader, place, job.task_ids, job.seed, job.sums)
            ).result()
    finally:
        shutil.rmtree(scratch)
    log = server.log()
    count = len(job.task_ids)
    return Measured(
        sum(seconds),
        EPOCHS * count,
        len(log),
        sum(request.nbytes for request in log),
        {
            **{f"epoch_{n}_samples_per_s": count / s for n, s in enumerate(seconds, 1)},
            "cpu_s": cpu_s,
        },
    )


_NUMBERS = itertools.count()


def _three_epochs(job: _Job) -> tuple[list[float], float]:
    """Seconds of each epoch, and CPU time of this process and its workers."""
    torch.set_num_threads(1)
    # This process was spawned, and so would be the workers of loaders that take the default.
    multiprocessing.set_start_method("fork", force=True)
    loader = LOADERS[job.loader](job)
    buffers = [torch.empty(0), torch.empty(0)]
    cpu_s = -_cpu_s()
    seconds = []
    for epoch in range(EPOCHS):
        start_s, items = time.perf_counter(), 0
        for batch in _epoch(loader, epoch):
            for number, tensor in enumerate(tensors_of(batch)):
                if buffers[number].numel() < tensor.numel():
                    buffers[number] = torch.empty(tensor.numel())
                buffers[number][: tensor.numel()].copy_(tensor.reshape(-1))
            items += 1
        seconds.append(time.perf_counter() - start_s)
        if items != len(job.task_ids):
            raise ValueError(f"epoch {epoch + 1} has {items} of {len(job.task_ids)} samples")
    if job.sums is not None:
        _compare(_epoch(loader, EPOCHS), job.sums)
    del loader, batch, tensor
    gc.collect()  # ends the workers, whose time counts when they are reaped
    return seconds, cpu_s + _cpu_s()


def _epoch(loader: Any, epoch: int) -> Any:
    """An iterator over one epoch, in an order of its own."""
    if isinstance(loader, DataLoader):
        for one in (loader.dataset, loader.sampler):
            if hasattr(one, "set_epoch"):
                one.set_epoch(epoch)
        return loader
    return loader(epoch)


def _compare(batches: Any, sums: Sequence[tuple[float, float]]) -> None:
    """Each pair once, with all of its values: a rotation changes their order alone."""
    found = sorted(
        tuple(float(tensor.double().sum()) for tensor in tensors_of(batch)) for batch in batches
    )
    if len(found) != len(sums) or not np.allclose(found, sorted(sums), rtol=1e-9):
        raise ValueError("other values than were written")


def _cpu_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


# -- what a worker does with a sample


class _Rotated:
    """Rotates samples, another rotation for each that this process reads."""

    def __init__(self) -> None:
        self._read = 0

    def __call__(self, arrays: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        self._read += 1
        rotation = draw_rotation(self._read, os.getpid())
        return tuple(map(_tensor, (rotate(np.asarray(array), rotation) for array in arrays)))


def _tensor(grid: NDArray[Any]) -> torch.Tensor:
    if not (grid.flags.c_contiguous and grid.flags.writeable):
        grid = np.array(grid, order="C")
    return torch.from_numpy(grid)


class _Pairs(Dataset[tuple[torch.Tensor, ...]]):
    """Pairs by position; ``open_(role, task_id)`` is called once in each worker and gives what
    reads the values, so that handles are kept.
    """

    def __init__(self, job: _Job, open_: Callable[[str, str], Callable[[], Any]]) -> None:
        self._task_ids, self._open, self._rotated = job.task_ids, open_, _Rotated()
        self._handles: dict[tuple[str, str], Callable[[], Any]] = {}

    def __len__(self) -> int:
        return len(self._task_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self._rotated([self._read(role, self._task_ids[index]) for role in ROLES.values()])

    def _read(self, role: str, task_id: str) -> Any:
        key = (role, task_id)
        if key not in self._handles:
            self._handles[key] = self._open(role, task_id)
        return self._handles[key]()


def _loader(dataset: Any, seed: int, *, shuffle: bool | None = True) -> DataLoader[Any]:
    """As a training has it. ``shuffle=None``: a dataset that brings its order."""
    return DataLoader(
        dataset,
        batch_size=1,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        num_workers=WORKERS,
        persistent_workers=True,
    )


# -- over the stores


def _zarr_s3fs(job: _Job) -> DataLoader[Any]:
    import s3fs
    import zarr

    opened: dict[int, Any] = {}

    def open_(role: str, task_id: str) -> Callable[[], Any]:
        fs = opened.setdefault(os.getpid(), None) or s3fs.S3FileSystem(**job.place.s3_kwargs)
        opened[os.getpid()] = fs
        url = f"{job.place.bucket}/{role}/{task_id}.zarr"
        array: Any = zarr.open_group(s3fs.S3Map(url, s3=fs), mode="r")[ARRAY]
        return lambda: array[...]

    return _loader(_Pairs(job, open_), job.seed)


def _zarr_cachestore(job: _Job) -> DataLoader[Any]:
    import s3fs
    import zarr
    import zarr.storage
    from zarr.experimental.cache_store import CacheStore

    opened: dict[int, Any] = {}

    def open_(role: str, task_id: str) -> Callable[[], Any]:
        if os.getpid() not in opened:
            opened[os.getpid()] = s3fs.S3FileSystem(**job.place.s3_kwargs, asynchronous=True)
        store = f"{role}/{task_id}.zarr"
        origin = zarr.storage.FsspecStore(
            opened[os.getpid()], read_only=True, path=f"{job.place.bucket}/{store}"
        )
        # What is in the directory is not found by another instance, which has no time of it: each
        # worker has a cache of its own.
        kept = zarr.storage.LocalStore(job.place.scratch / str(os.getpid()) / store)
        cached = CacheStore(origin, cache_store=kept)
        array: Any = zarr.open_group(cached, mode="r")[ARRAY]
        return lambda: array[...]

    return _loader(_Pairs(job, open_), job.seed)


def _tensorstore(job: _Job) -> DataLoader[Any]:
    importlib.import_module("tensorstore")
    os.environ |= {
        "AWS_ACCESS_KEY_ID": job.place.s3_kwargs["key"],
        "AWS_SECRET_ACCESS_KEY": job.place.s3_kwargs["secret"],
    }
    contexts: dict[int, Any] = {}

    def open_(role: str, task_id: str) -> Callable[[], Any]:
        import tensorstore as ts  # used in the worker alone: it does not survive a fork

        if os.getpid() not in contexts:
            contexts[os.getpid()] = ts.Context(
                {
                    "cache_pool": {"total_bytes_limit": 8 * 1024**3},
                    "s3_request_concurrency": {"limit": 64},
                }
            )
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "s3",
                "bucket": job.place.bucket,
                "path": f"{role}/{task_id}.zarr/{ARRAY}/",
                "endpoint": job.place.s3_kwargs["endpoint_url"],
                "aws_region": "us-east-1",
                "aws_credentials": {"type": "environment"},
            },
            # a chunk in the pool is not asked for again
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        array = ts.open(spec, read=True, context=contexts[os.getpid()]).result()
        return lambda: array.read().result()

    return _loader(_Pairs(job, open_), job.seed)


def _zarrcache(job: _Job) -> DataLoader[Any]:
    from zarrcache import ZarrDataset, ZarrS3Reader

    reader = ZarrS3Reader(
        f"s3://{job.place.bucket}/{ROLES['data']}",
        f"s3://{job.place.bucket}/{ROLES['label']}",
        job.place.map_path,
        FUNCTIONAL,
        normalize=False,
        train_fraction=0.8,
        s3_kwargs=job.place.s3_kwargs,
        cache={"dir": job.place.scratch, "min_free": 0},
    )
    return _loader(ZarrDataset(reader, "all", augmentation=True), job.seed)


# -- over copies


def _write_litdata(s3: Path, arrays: Sequence[tuple[Values, Values]]) -> None:
    from litdata.streaming.cache import Cache

    (s3 / LITDATA).mkdir()
    cache = Cache(str(s3 / LITDATA), chunk_bytes="64MB")
    for index, pair in enumerate(arrays):
        cache[index] = tuple(torch.from_numpy(values) for values in pair)
    cache.done()
    cache.merge()


def _litdata(job: _Job) -> DataLoader[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.resolver import Dir

    class Rotated(StreamingDataset):  # type: ignore[misc]
        """With the hook that its documentation names for transforms."""

        def __getitem__(self, index: Any) -> Any:
            pair = super().__getitem__(index)
            if not hasattr(self, "rotated"):
                self.rotated = _Rotated()
            return self.rotated([tensor.numpy() for tensor in pair])

    # Its fast client refuses http:// and there is no option for it; an endpoint of S3 has TLS.
    client_options = importlib.import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS
    client_options["allow_http"] = True
    options = {
        "endpoint_url": job.place.s3_kwargs["endpoint_url"],
        "aws_access_key_id": job.place.s3_kwargs["key"],
        "aws_secret_access_key": job.place.s3_kwargs["secret"],
        "region_name": "us-east-1",
    }
    dataset = Rotated(
        Dir(path=str(job.place.scratch), url=f"s3://{LITDATA}"),
        shuffle=True,
        seed=job.seed,
        storage_options=options,
    )
    loader: DataLoader[Any] = StreamingDataLoader(
        dataset, batch_size=1, num_workers=WORKERS, persistent_workers=True
    )
    return loader


def _mosaic_package() -> Any:
    # The package imports its datasets of pictures, and with them torchvision, whose wheel from PyPI
    # does not load beside a CPU build of torch.
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    return importlib.import_module("streaming")


def _write_mds(s3: Path, arrays: Sequence[tuple[Values, Values]]) -> None:
    columns = {"data": "ndarray:float32", "label": "ndarray:float32"}
    with _mosaic_package().MDSWriter(out=str(s3 / MDS), columns=columns) as writer:
        for data, label in arrays:
            writer.write({"data": data, "label": label})


def _mosaic(job: _Job) -> DataLoader[Any]:
    os.environ |= {
        "S3_ENDPOINT_URL": job.place.s3_kwargs["endpoint_url"],
        "AWS_ACCESS_KEY_ID": job.place.s3_kwargs["key"],
        "AWS_SECRET_ACCESS_KEY": job.place.s3_kwargs["secret"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    streaming = _mosaic_package()

    class Rotated(streaming.StreamingDataset):  # type: ignore[misc, name-defined]
        """With the hook that its documentation names for transforms."""

        def __getitem__(self, index: int) -> Any:
            pair = super().__getitem__(index)
            if not hasattr(self, "rotated"):
                self.rotated = _Rotated()
            return self.rotated([pair["data"], pair["label"]])

    dataset = Rotated(
        remote=f"s3://{MDS}",
        local=str(job.place.scratch),
        batch_size=1,
        shuffle=True,
        shuffle_seed=job.seed,
    )
    return _loader(dataset, job.seed, shuffle=None)


def _write_stacked(s3: Path, arrays: Sequence[tuple[Values, Values]]) -> None:
    importlib.import_module("insitubatch")  # named if it is missing
    import zarr

    group = zarr.create_group(s3 / STACKED / "pairs.zarr", zarr_format=3)
    for role, values in zip(ROLES, zip(*arrays, strict=True), strict=True):
        stack = np.stack(values)
        group.create_array(role, data=stack, chunks=(1, *stack.shape[1:]), compressors=None)


def _insitubatch(job: _Job) -> Callable[[int], DataLoader[Any]]:
    from insitubatch import (
        InSituDataset,
        as_torch,
        obstore_store,
        open_geometries,
        split_by_chunk,
    )

    rotated = _Rotated()

    def rotate_batch(batch: Any) -> Any:
        pair = rotated([batch.arrays[role] for role in ROLES])
        for role, tensor in zip(ROLES, pair, strict=True):
            batch.arrays[role] = tensor.numpy()
        return batch

    store = obstore_store(
        f"s3://{STACKED}/pairs.zarr",
        endpoint=job.place.s3_kwargs["endpoint_url"],
        access_key_id=job.place.s3_kwargs["key"],
        secret_access_key=job.place.s3_kwargs["secret"],
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    geometries = open_geometries(store, variables=list(ROLES))
    dataset = InSituDataset(
        store,
        split_by_chunk(geometries["data"], fractions=(1.0, 0.0, 0.0)),
        geometries,
        batch_size=1,
        seed=job.seed,
        cache_dir=str(job.place.scratch),
        persist=True,
        batch_transforms=[rotate_batch],
    )

    def epoch(number: int) -> DataLoader[Any]:
        dataset.set_epoch(number)
        return DataLoader(as_torch(dataset.train), batch_size=None, num_workers=0)

    return epoch


#: What writes a copy in a layout of the loader's own.
COPIES: dict[str, Callable[[Path, Sequence[tuple[Values, Values]]], None]] = {
    "LitData": _write_litdata,
    "Mosaic Streaming": _write_mds,
    "insitubatch": _write_stacked,
}
LOADERS: dict[str, Callable[[_Job], Any]] = {
    PLAIN: _zarr_s3fs,
    "zarr CacheStore": _zarr_cachestore,
    "TensorStore, cache pool": _tensorstore,
    "LitData": _litdata,
    "Mosaic Streaming": _mosaic,
    "insitubatch": _insitubatch,
    OURS: _zarrcache,
}
MIXED = tuple(loader for loader in LOADERS if loader != "insitubatch")
EQUAL = ("LitData", "Mosaic Streaming", "insitubatch", OURS)
