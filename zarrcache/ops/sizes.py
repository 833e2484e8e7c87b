"""Measure densities at the origin: requests, bytes, size of the entry, speed of a cold read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from zarrcache._keys import ObjectInfo, Role, units_of
from zarrcache._sources import is_object
from zarrcache.arrays import check_metadata, count_gets, list_array, metadata_key, read_array
from zarrcache.data import ZarrS3Reader
from zarrcache.disk import BLOCK_BYTES, disk_bytes
from zarrcache.errors import IncompleteArrayError, SchemaError
from zarrcache.ops.selection import concurrently
from zarrcache.origin import PAGE_OBJECTS

__all__ = ["DensitySize", "Speed", "measure_size", "measure_sizes", "measure_speed"]


@dataclass(frozen=True, slots=True)
class DensitySize:
    """Requests and sizes of one density.

    Attributes
    ----------
    lists, gets : int
        Requests of a cold read. The HEAD of a zipped store counts as a GET, as in the bill.
    stored_bytes : int
        Size at the origin.
    disk_bytes : int
        Size of its array tier entry: decoded, with the header page, in whole file system blocks.
    """

    lists: int
    gets: int
    stored_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of cold reads from this machine at this time.

    Attributes
    ----------
    latency_s : float
        Median of a LIST of one small prefix.
    density_s : float
        Median of one density, fetched and decoded by one process.
    bytes_per_s : float
        Stored bytes of the densities over the seconds they took.
    densities : int
        Number of densities read.
    """

    latency_s: float
    density_s: float
    bytes_per_s: float
    densities: int


def measure_sizes(
    reader: ZarrS3Reader,
    densities: Sequence[tuple[str, Role]],
    progress: Callable[[int, int], object] | None = None,
) -> list[DensitySize]:
    """Measure each density as :func:`measure_size` does, many at once."""
    found = []
    with closing(concurrently(lambda density: measure_size(reader, *density), densities)) as sizes:
        for done, size in enumerate(sizes, start=1):
            found.append(size)
            if progress is not None:
                progress(done, len(densities))
    return found


def measure_size(reader: ZarrS3Reader, task_id: str, role: Role) -> DensitySize:
    """Measure one density by one LIST and one small GET, without caching it.

    A zipped store and a file are fetched whole.

    Raises
    ------
    OriginError, SchemaError, IncompleteArrayError
        The density cannot be read.
    """
    origin, store, array = reader.origin(role), reader.store_name(task_id, role), reader.array
    listed = list_array(origin, store, array, units_of(reader.normalize))
    stored_bytes = sum(obj.size_bytes for obj in listed)
    if is_object(store):
        shape = read_array(
            origin, store, array, listed=listed, fills=True, uses_values=False
        ).array.shape
        return DensitySize(0, 2, stored_bytes, _entry_bytes(math.prod(shape)))
    points = math.prod(_shape(reader, store, role, listed))
    lists = -(-len(listed) // PAGE_OBJECTS)
    return DensitySize(lists, count_gets(store, array, listed), stored_bytes, _entry_bytes(points))


def measure_speed(reader: ZarrS3Reader, densities: Sequence[tuple[str, Role]]) -> Speed:
    """Read a few densities past the cache, one after the other. The first one is a warm-up."""
    latencies, seconds, nbytes = [], [], 0
    for number, (task_id, role) in enumerate(densities):
        start_s = time.perf_counter()
        listed = reader.listing(task_id, role)
        listed_s = time.perf_counter()
        origin, store = reader.origin(role), reader.store_name(task_id, role)
        read_array(origin, store, reader.array, listed=listed, fills=True, uses_values=False)
        if number or len(densities) == 1:
            latencies.append(listed_s - start_s)
            seconds.append(time.perf_counter() - start_s)
            nbytes += sum(obj.size_bytes for obj in listed)
    rate = nbytes / sum(seconds)
    return Speed(float(np.median(latencies)), float(np.median(seconds)), rate, len(seconds))


def _shape(reader: ZarrS3Reader, store: str, role: Role, listed: Sequence[ObjectInfo]) -> list[int]:
    """The shape in the array's metadata object."""
    origin, prefix = reader.origin(role), f"{store}/{reader.array}/"
    by_name = {obj.key.removeprefix(prefix): obj for obj in listed}
    name = metadata_key(by_name)
    url = origin.url_of(f"{prefix}{name or '.zarray'}")
    if name is None:
        raise IncompleteArrayError(
            f"{url} does not exist, but chunks of the array do. The store is incomplete: convert "
            "it again."
        )
    ((_, data),) = origin.fetch([by_name[name]])
    try:
        document = json.loads(bytes(data))
    except ValueError as exc:
        raise SchemaError(f"{url} is not JSON ({exc}). Convert the store again.") from exc
    check_metadata(document, url)
    shape: list[int] = document["shape"]
    return shape


def _entry_bytes(points: int) -> int:
    return BLOCK_BYTES + disk_bytes(4 * points)  # a header page; values are float32
