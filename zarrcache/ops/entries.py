"""The densities in a cache, one by one (``zarrcache ls``)."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from zarrcache.arrays import stem_of
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import ARRAY
from zarrcache.errors import ConfigError
from zarrcache.ops.selection import open_if_present, origin_and_url, select, stored_header

__all__ = ["CachedDensity", "list_entries"]


@dataclass(frozen=True)
class CachedDensity:
    """An entry of the array tier."""

    task_id: str
    #: ``data``, ``label``, or ``data+label`` where both are one directory; empty without a training
    #: config.
    role: str
    #: Of the store, and the name of the array in it.
    url: str
    array: str
    #: ``cell``, ``points`` or ``volume``. This and the next two are empty if the entry could not be
    #: read.
    units: str
    shape: tuple[int, ...]
    #: ``cache.arrays.encoding`` of the reader that stored it.
    encoding: str
    disk_bytes: int
    #: Seconds since 1970.
    stored_s: float


#: Columns to sort by, and the fields that they show.
_COLUMNS = {
    "id": "task_id",
    "role": "role",
    "shape": "shape",
    "bytes": "disk_bytes",
    "units": "units",
    "encoding": "encoding",
    "stored": "stored_s",
}


def list_entries(
    config: DataConfig | CacheConfig,
    *,
    ids: Sequence[str] | None = None,
    match: str = "*",
    sort: str = "id",
    reverse: bool = False,
) -> list[CachedDensity]:
    """List the cached densities of a training config, or of the whole cache. Sends no request.

    ``ids``, and the pattern ``match`` (``mp-12*``), narrow the choice. ``sort`` is a key of
    ``_COLUMNS``.
    """
    if sort not in _COLUMNS:
        raise ConfigError(f"Cannot sort by {sort!r}. Columns: {', '.join(_COLUMNS)}.")
    selection, index = select(config, ids if isinstance(config, DataConfig) else None)
    if not open_if_present(index):
        return []
    wanted = None if ids is None else frozenset(ids)
    found = []
    for row in index.rows(ARRAY):
        _, url = origin_and_url(row)
        name = url.rpartition("/")[2]
        task_id = stem_of(name) or name
        if not fnmatch.fnmatchcase(task_id, match):
            continue
        if wanted is not None and task_id not in wanted:
            continue
        role = ""
        if selection is not None:
            store = selection.store_of(row)
            if store is None:
                continue
            role = selection.roles_of(store[0])
        header = stored_header(index, row.digest)
        if header is None and index.lookup(row.digest) is None:
            continue  # evicted meanwhile
        found.append(
            CachedDensity(
                task_id=task_id,
                role=role,
                url=url,
                array=header.key.source_array if header else "",
                units=header.key.units if header else "",
                shape=header.shape if header else (),
                encoding=header.key.encoding if header else "",
                disk_bytes=row.size_bytes,
                stored_s=row.stored_s,
            )
        )
    key = operator.attrgetter(_COLUMNS[sort], "task_id", "role")
    return sorted(found, key=key, reverse=reverse)
