"""How large the densities of a data set are, at the origin and in the cache: asked of a few, said
of all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from zarrcache._keys import ObjectInfo, Role
from zarrcache.arrays import check_metadata, list_array, metadata_key, read_array
from zarrcache.data import ZarrS3Reader
from zarrcache.disk import BLOCK_BYTES, disk_bytes
from zarrcache.errors import IncompleteArrayError, SchemaError
from zarrcache.ops.selection import concurrently
from zarrcache.origin import PAGE_OBJECTS

__all__ = ["DensitySize", "Speed", "measure_size", "measure_sizes", "measure_speed"]


@dataclass(frozen=True, slots=True)
class DensitySize:
    """One density.

    Attributes
    ----------
    lists, gets : int
        Requests that a cold read takes; the HEAD of a zipped store counts with the GETs, as it does
        in the bill.
    stored_bytes : int
        At the origin.
    disk_bytes : int
        Of its entry in the array tier: decoded, with the header's page, in blocks of the file
        system.
    """

    lists: int
    gets: int
    stored_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What a cold read takes from here, now.

    Attributes
    ----------
    latency_s : float
        Median of a LIST of one small prefix.
    density_s : float
        Median of one density, fetched and decoded by one process.
    bytes_per_s : float
        Stored bytes of these densities over the time they took.
    densities : int
        How many were read.
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
    """Ask the origin: one LIST and one small GET each (a zipped store is fetched whole). Nothing is
    kept.

    Raises
    ------
    OriginError, SchemaError, IncompleteArrayError
        A density cannot be read: a plan without it would be wrong.
    """
    found = []
    with closing(concurrently(lambda density: measure_size(reader, *density), densities)) as sizes:
        for done, size in enumerate(sizes, start=1):
            found.append(size)
            if progress is not None:
                progress(done, len(densities))
    return found


def measure_speed(reader: ZarrS3Reader, densities: Sequence[tuple[str, Role]]) -> Speed:
    """Read a few densities past the cache, one after the other. The first only warms the
    connections.
    """
    latencies, seconds, nbytes = [], [], 0
    for number, (task_id, role) in enumerate(densities):
        start_s = time.perf_counter()
        listed = reader.listing(task_id, role)
        listed_s = time.perf_counter()
        read_array(
            reader.origin(role), reader.store_name(task_id, role), reader.array, listed=listed
        )
        if number or len(densities) == 1:
            latencies.append(listed_s - start_s)
            seconds.append(time.perf_counter() - start_s)
            nbytes += sum(obj.size_bytes for obj in listed)
    return Speed(
        float(np.median(latencies)), float(np.median(seconds)), nbytes / sum(seconds), len(seconds)
    )


def measure_size(reader: ZarrS3Reader, task_id: str, role: Role) -> DensitySize:
    """Of one density; as :func:`measure_sizes`."""
    origin, store, array = reader.origin(role), reader.store_name(task_id, role), reader.array
    listed = list_array(origin, store, array)
    stored_bytes = sum(obj.size_bytes for obj in listed)
    if store.endswith(".zip"):
        points = math.prod(read_array(origin, store, array, listed=listed).array.shape)
        return DensitySize(0, 2, stored_bytes, _entry_bytes(points))
    document = _document(reader, store, role, listed)
    return DensitySize(
        -(-len(listed) // PAGE_OBJECTS),
        len(listed),
        stored_bytes,
        _entry_bytes(math.prod(document)),
    )


def _document(
    reader: ZarrS3Reader, store: str, role: Role, listed: Sequence[ObjectInfo]
) -> list[int]:
    """The shape that an array's metadata gives."""
    origin, prefix = reader.origin(role), f"{store}/{reader.array}/"
    by_name = {obj.key.removeprefix(prefix): obj for obj in listed}
    name = metadata_key(by_name)
    url = origin.url_of(f"{prefix}{name or '.zarray'}")
    if name is None:
        raise IncompleteArrayError(
            f"{url} does not exist, though there are chunks. The store is incomplete: convert it "
            "again."
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
    return BLOCK_BYTES + disk_bytes(4 * points)  # one page of header; values are float32
