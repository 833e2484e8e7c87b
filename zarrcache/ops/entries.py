"""The densities in a cache, one by one (``zarrcache ls``)."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zarrcache.arrays import stem_of
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import ARRAY
from zarrcache.errors import ConfigError
from zarrcache.ops.selection import open_if_present, origin_and_url, select, stored_header

__all__ = ["CachedDensity", "list_entries"]


@dataclass(frozen=True)
class CachedDensity:
    """An entry of the array tier.

    Attributes
    ----------
    task_id : str
    role : str
        ``data``, ``label``, or ``data+label`` where both are one directory; empty without a
        training config.
    url : str
        The store.
    array : str
        Name of the array in the store.
    unit : str
        What the values are divided by: ``points``, ``volume``, or empty.
    shape : tuple of int
        Empty if the entry could not be read.
    encoding : str
        ``float32``, ``float16``, ``bfloat16`` or ``bits:N``: ``cache.arrays.encoding`` of the
        reader that stored it.
    disk_bytes : int
    stored_s : float
        Seconds since the epoch.
    """

    task_id: str
    role: str
    url: str
    array: str
    units: str
    shape: tuple[int, ...]
    encoding: str
    disk_bytes: int
    stored_s: float


_ORDERS: dict[str, Callable[[CachedDensity], object]] = {
    "id": lambda entry: (entry.task_id, entry.role),
    "role": lambda entry: (entry.role, entry.task_id),
    "shape": lambda entry: entry.shape,
    "bytes": lambda entry: entry.disk_bytes,
    "units": lambda entry: (entry.units, entry.task_id),
    "encoding": lambda entry: (entry.encoding, entry.task_id),
    "stored": lambda entry: entry.stored_s,
}


def list_entries(
    config: DataConfig | CacheConfig,
    *,
    ids: Sequence[str] | None = None,
    match: str = "*",
    sort: str = "id",
    reverse: bool = False,
) -> list[CachedDensity]:
    """List the cached densities of the config's ids, or of the whole cache. Sends no request.

    Parameters
    ----------
    config : DataConfig or CacheConfig
        With a CacheConfig: every density of the cache.
    ids : sequence of str, optional
        Only these task ids.
    match : str
        Only ids that match this pattern: ``mp-12*``.
    sort : str
        ``id``, ``role``, ``shape``, ``bytes``, ``units``, ``encoding`` or ``stored``.
    reverse : bool
        Largest, or latest, first.

    Raises
    ------
    ConfigError
        There is no cache block, no such sort key, or the cache directory or the map file cannot be
        read.
    """
    if sort not in _ORDERS:
        raise ConfigError(f"{sort!r} is no column to sort by. Columns: {', '.join(_ORDERS)}.")
    selection, index = select(config, ids if isinstance(config, DataConfig) else None)
    if not open_if_present(index):
        return []
    wanted = None if ids is None else frozenset(ids)
    found = []
    for row in index.rows(ARRAY):
        _, url = origin_and_url(row)
        name = url.rpartition("/")[2]
        task_id = stem_of(name) or name
        if (
            not fnmatch.fnmatchcase(task_id, match)
            or (wanted is not None and task_id not in wanted)
            or (selection is not None and selection.store_of(row) is None)
        ):
            continue
        header = stored_header(index, row.digest)
        if header is None and index.lookup(row.digest) is None:
            continue  # evicted meanwhile
        found.append(
            CachedDensity(
                task_id=task_id,
                role="" if selection is None else selection.roles_of(row),
                url=url,
                array=header.key.source_array if header else "",
                units=header.key.units if header else "",
                shape=header.shape if header else (),
                encoding=header.key.encoding if header else "",
                disk_bytes=row.size_bytes,
                stored_s=row.stored_s,
            )
        )
    found.sort(key=_ORDERS[sort], reverse=reverse)  # type: ignore[arg-type]
    return found
