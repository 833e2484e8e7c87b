"""Ways to read one density from S3 that is not cached anywhere, each in a process of its own whose
connections stay open.

``Client`` starts the process and measures in it. What a peer imports is imported there, so that a
client that is not installed is only that.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import multiprocessing
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.bench.bare_gets import get_all, obstore_of
from tests.bench.grids import FUNCTIONAL, ROLES

__all__ = [
    "ARRAY",
    "FLOOR",
    "PEERS",
    "Answer",
    "Client",
    "Place",
    "clean_process",
    "clients",
    "hush",
    "installed",
]

ARRAY = "charge_density_total"
FLOOR = "bare GETs (obstore)"
#: How long a client may take to start or to read one density before the benchmark is given up.
_HANG_S = 300.0

Density = NDArray[Any]
Read = Callable[[str], "Density | None"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the densities are, and a directory of the client's own.

    Attributes
    ----------
    s3_kwargs : dict
        As ``s3fs.S3FileSystem`` takes them.
    bucket : str
        Written by ``grids.write_pairs``.
    map_path, scratch : Path
    """

    s3_kwargs: dict[str, Any]
    bucket: str
    map_path: Path
    scratch: Path

    @property
    def prefix(self) -> str:
        """Bucket and directory of the stores that are read."""
        return f"{self.bucket}/{ROLES['data']}"


@dataclass(frozen=True, slots=True)
class Answer:
    """One density read by a client.

    Attributes
    ----------
    seconds : float
        Until the array is there, whole.
    cpu_s : float
        Of the client's process, all threads.
    shape : tuple of int
    crc : int
        Of the values as C-ordered float32; 0 of the floor, which decodes nothing.
    """

    seconds: float
    cpu_s: float
    shape: tuple[int, ...]
    crc: int


def _zarr_s3fs(place: Place) -> Read:
    """What the users have today: a mapping of s3fs under zarr."""
    import s3fs
    import zarr

    fs = s3fs.S3FileSystem(**place.s3_kwargs)

    def read(store: str) -> Density:
        group = zarr.open_group(s3fs.S3Map(f"{place.prefix}/{store}", s3=fs), mode="r")
        values: Any = group[ARRAY]
        return np.asarray(values[...])

    return read


def _zarr_simplecache(place: Place) -> Read:
    import zarr

    # there is no asynchronous simplecache
    warnings.filterwarnings("ignore", message=".*asynchronous=True", category=UserWarning)
    options = {"s3": place.s3_kwargs, "simplecache": {"cache_storage": os.fspath(place.scratch)}}

    def read(store: str) -> Density:
        group = zarr.open_group(
            f"simplecache::s3://{place.prefix}/{store}", mode="r", storage_options=options
        )
        values: Any = group[ARRAY]
        return np.asarray(values[...])

    return read


def _zarr_cachestore(place: Place) -> Read:
    import s3fs
    import zarr
    import zarr.storage
    from zarr.experimental.cache_store import CacheStore

    fs = s3fs.S3FileSystem(**place.s3_kwargs, asynchronous=True)

    def read(store: str) -> Density:
        origin = zarr.storage.FsspecStore(fs, read_only=True, path=f"{place.prefix}/{store}")
        cached = CacheStore(origin, cache_store=zarr.storage.LocalStore(place.scratch / store))
        values: Any = zarr.open_group(cached, mode="r")[ARRAY]
        return np.asarray(values[...])

    return read


def _zarr_obstore(place: Place) -> Read:
    import zarr
    import zarr.storage

    bucket = zarr.storage.ObjectStore(obstore_of(place.s3_kwargs, place.bucket), read_only=True)

    def read(store: str) -> Density:
        group = zarr.open_group(bucket, path=f"{ROLES['data']}/{store}", mode="r")
        values: Any = group[ARRAY]
        return np.asarray(values[...])

    return read


def _tensorstore(place: Place, **context: Any) -> Read:
    import tensorstore as ts

    # The other clients sign their requests; this one finds its credentials in the environment only.
    os.environ |= {
        "AWS_ACCESS_KEY_ID": place.s3_kwargs["key"],
        "AWS_SECRET_ACCESS_KEY": place.s3_kwargs["secret"],
    }
    shared = ts.Context(context)

    def read(store: str) -> Density:
        kvstore = {
            "driver": "s3",
            "bucket": place.bucket,
            "path": f"{ROLES['data']}/{store}/{ARRAY}/",
            "endpoint": place.s3_kwargs["endpoint_url"],
            "aws_region": "us-east-1",
            "aws_credentials": {"type": "environment"},
        }
        values: Density = (
            ts.open({"driver": "zarr", "kvstore": kvstore}, context=shared, read=True)
            .result()
            .read()
            .result()
        )
        return values

    return read


def _bare_gets(place: Place) -> Read:
    """The floor: the same objects, known beforehand, and nothing done with them."""
    bucket = obstore_of(place.s3_kwargs, place.bucket)
    names: dict[str, list[str]] = {}

    loop = asyncio.new_event_loop()
    for page in bucket.list(f"{ROLES['data']}/"):
        for meta in page:
            store, _, key = meta["path"].split("/", 1)[1].partition("/")
            if key.startswith(f"{ARRAY}/") and not key.endswith(".zattrs"):
                names.setdefault(store, []).append(meta["path"])

    def read(store: str) -> None:
        loop.run_until_complete(get_all(bucket, names[store]))

    return read


def _zarrcache(place: Place, **cache: Any) -> Read:
    from zarrcache import ZarrS3Reader

    reader = ZarrS3Reader(
        f"s3://{place.bucket}/{ROLES['data']}",
        f"s3://{place.bucket}/{ROLES['label']}",
        place.map_path,
        FUNCTIONAL,
        normalize=False,
        train_fraction=0.8,
        s3_kwargs=place.s3_kwargs,
        cache={"dir": place.scratch, "min_free": 0} if cache else None,
    )
    assert reader.task_ids  # which stores there are is listed once a run, not once a store

    def read(store: str) -> Density:
        values, gridsize = reader.load(store.removesuffix(".zip").removesuffix(".zarr"), "data")
        return values.reshape(gridsize)

    return read


#: Name to what opens it. The first is what the others are compared with.
PEERS: dict[str, Callable[[Place], Read]] = {
    "zarr + s3fs": _zarr_s3fs,
    "zarr + simplecache": _zarr_simplecache,
    "zarr CacheStore + s3fs": _zarr_cachestore,
    "zarr + obstore": _zarr_obstore,
    "TensorStore": _tensorstore,
    "TensorStore, 64 in flight": lambda place: _tensorstore(
        place, s3_request_concurrency={"limit": 64}
    ),
    FLOOR: _bare_gets,
    "zarrcache, no cache": _zarrcache,
    "zarrcache, empty cache": lambda place: _zarrcache(place, cache=True),
}
_PACKAGES = {"TensorStore": "tensorstore", "TensorStore, 64 in flight": "tensorstore"}


class Client:
    """A peer in a process of its own.

    Parameters
    ----------
    name : str
        Of ``PEERS``.
    place : Place
    """

    def __init__(self, name: str, place: Place) -> None:
        # a forked child could not use obstore after its parent did
        spawn = multiprocessing.get_context("spawn")
        self._mine, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(name, place, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._name = name

    def wait(self) -> None:
        """Until it has opened what it keeps open."""
        self._receive()

    def read(self, store: str) -> Answer:
        """Have it read one density."""
        self._mine.send(store)
        answer: Answer = self._receive()
        return answer

    def close(self) -> None:
        """End the process."""
        self._mine.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        if not self._mine.poll(_HANG_S):
            raise TimeoutError(f"{self._name} did not answer within {_HANG_S:.0f} s")
        return self._mine.recv()


@contextlib.contextmanager
def clients(wanted: Mapping[str, tuple[str, Place]]) -> Iterator[dict[str, Client]]:
    """Clients by name, each a peer at a place, all started and all ended; each has an empty
    directory of its own below the place's scratch.
    """
    started: dict[str, Client] = {}
    try:
        for name, (peer, place) in wanted.items():
            scratch = place.scratch / f"client-{len(started)}"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            started[name] = Client(peer, replace(place, scratch=scratch))
        for client in started.values():
            client.wait()
        yield started
    finally:
        for client in started.values():
            client.close()


def installed(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Which peers can run, and how to get the others."""
    missing = {}
    for name in names:
        package = _PACKAGES.get(name)
        try:
            if package is not None:
                importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing[name] = f"not installed: pip install {package}"
    return [name for name in names if name not in missing], missing


def hush() -> None:
    """Call last in a process: s3fs has pages to say at its end about connections that were kept
    open.
    """
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _serve(name: str, place: Place, pipe: Connection) -> None:
    """Run in the client's process."""
    read = PEERS[name](place)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            store = pipe.recv()
            start, cpu = time.perf_counter(), time.process_time()
            values = read(store)
            seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
            if values is None:
                pipe.send(Answer(seconds, cpu_s, (), 0))
            else:
                pipe.send(
                    Answer(
                        seconds,
                        cpu_s,
                        values.shape,
                        zlib.crc32(np.ascontiguousarray(values, "<f4").data),
                    )
                )
    hush()


@contextlib.contextmanager
def clean_process() -> Iterator[ProcessPoolExecutor]:
    """A process that has used no client yet, and ends its own quietly."""
    # Spawned: what it forks itself, the workers, can use obstore only if no process above them has.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool
        pool.submit(hush)
