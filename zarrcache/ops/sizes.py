"""Measure densities at the origin: requests, bytes, size of the entry, speed of a cold read."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zarrcache._keys import (
    FLOAT32,
    ArrayKey,
    Role,
    mantissa_bits,
    stored_array,
)
from zarrcache.arrays import (
    OriginArray,
    as_density,
    examine_array,
    is_fetched_whole,
    is_object,
    list_array,
    read_array,
)
from zarrcache.data import ZarrS3Reader
from zarrcache.disk import BLOCK_BYTES, HEADER_BYTES, disk_bytes, expected_bytes, new_entry
from zarrcache.errors import ArrayNotFoundError
from zarrcache.ops.selection import concurrently
from zarrcache.origin import PAGE_OBJECTS

__all__ = [
    "DensitySize",
    "Speed",
    "measure_compression",
    "measure_sizes",
    "measure_speed",
]


@dataclass(frozen=True, slots=True)
class DensitySize:
    """Requests and sizes of one density."""

    #: Requests of a cold read. The HEAD of a zipped store counts as a GET, as in the bill.
    lists: int
    gets: int
    #: At the origin.
    stored_bytes: int
    #: Of its array tier entry, with its header, in whole file system blocks.
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of cold reads from this machine at this time."""

    #: Median of a LIST of one small prefix.
    latency_s: float
    #: Median of one density, fetched and decoded by one process.
    density_s: float
    #: Stored bytes of the densities over the seconds they took.
    bytes_per_s: float
    #: Number of densities read.
    densities: int


def measure_sizes(
    reader: ZarrS3Reader,
    densities: Sequence[tuple[str, Role, str]],
    progress: Callable[[int, int], object] | None,
    *,
    encoding: str,
    compression: float,
) -> list[DensitySize]:
    """Measure each density by one LIST and one small GET, without caching it; many at once.

    One that the material lacks, and that is filled with zeros, has no size. A zipped store and a
    file are fetched whole. With the encoding ``bits:N`` ``disk_bytes`` is an estimate by
    ``compression``, the result of :func:`measure_compression`.
    """
    entry_bytes = functools.partial(_entry_bytes, encoding=encoding, compression=compression)
    with concurrently(lambda of: _measured(reader, *of, entry_bytes), densities, progress) as sizes:
        return list(sizes)


def _measured(
    reader: ZarrS3Reader,
    task_id: str,
    role: Role,
    array: str,
    entry_bytes: Callable[[int, int], int],
) -> DensitySize:
    origin, store = reader.origin(role), reader.store_name(task_id, role)
    what = OriginArray(origin, store, array, fills=True, uses_values=False)
    try:
        listed = list_array(OriginArray(origin, store, array))
        own = listed
        if is_fetched_whole(store):
            shape = read_array(what, listed=listed).array.shape
        else:
            own = [obj for obj in listed if obj.key.startswith(what.prefix)]
            shape = examine_array(what, own).shape
    except ArrayNotFoundError:
        if reader.if_missing == "error" or not reader.is_optional(role, array):
            raise
        return DensitySize(0, 0, 0, 0)
    lists, gets = (0, 2) if is_object(store) else (-(-len(listed) // PAGE_OBJECTS), len(listed))
    stored_bytes = sum(obj.size_bytes for obj in listed)
    # At most: in the entry they are compressed.
    attributes_bytes = stored_bytes - sum(obj.size_bytes for obj in own)
    return DensitySize(lists, gets, stored_bytes, entry_bytes(math.prod(shape), attributes_bytes))


def measure_compression(
    reader: ZarrS3Reader, densities: Sequence[tuple[str, Role, str]], encoding: str
) -> float:
    """Bytes of encoded densities over those that the encoding suggests.

    Reads ``densities`` past the cache if the encoding is ``bits:N``; the others have a fixed size.
    """
    if mantissa_bits(encoding) is None:
        return 1.0
    stored, expected = 0, 0
    for task_id, role, name in densities:
        if reader.lacks(task_id, role, name):
            continue
        origin, store = reader.origin(role), reader.store_name(task_id, role)
        # In any units: a factor changes hardly anything about the mantissas.
        array = read_array(OriginArray(origin, store, name, fills=True, uses_values=False)).array
        values = as_density(array, store, name)
        key = ArrayKey("", "", stored_array(name, "cell", encoding))
        stored += new_entry(key, np.ascontiguousarray(values), "").header.nbytes
        expected += expected_bytes(values.nbytes, encoding)
    return stored / expected if expected else 1.0


def measure_speed(reader: ZarrS3Reader, densities: Sequence[tuple[str, Role, str]]) -> Speed:
    """Read a few densities past the cache, one after the other. The first one is a warm-up."""
    latencies, seconds, nbytes = [], [], 0
    for number, (task_id, role, array) in enumerate(densities):
        if reader.lacks(task_id, role, array):
            continue
        start_s = time.perf_counter()
        listed = reader.listing(task_id, role, array)
        listed_s = time.perf_counter()
        origin, store = reader.origin(role), reader.store_name(task_id, role)
        read_array(OriginArray(origin, store, array, fills=True, uses_values=False), listed=listed)
        if number or len(densities) == 1:
            latencies.append(listed_s - start_s)
            seconds.append(time.perf_counter() - start_s)
            nbytes += sum(obj.size_bytes for obj in listed)
    rate = nbytes / sum(seconds)
    return Speed(float(np.median(latencies)), float(np.median(seconds)), rate, len(seconds))


def _entry_bytes(points: int, attributes_bytes: int, encoding: str, compression: float) -> int:
    nbytes = expected_bytes(4 * points, encoding)
    if encoding == FLOAT32:
        return BLOCK_BYTES + disk_bytes(nbytes + attributes_bytes)  # the header has its own page
    return disk_bytes(HEADER_BYTES + int(compression * nbytes) + attributes_bytes)
