"""Write and compare lock files (``zarrcache lock``, ``zarrcache diff``)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from zarrcache._keys import ROLES, Role, source_digest
from zarrcache.config import DataConfig
from zarrcache.data import (
    DataLock,
    LockedDensity,
    ZarrS3Reader,
    crc_of,
    digest_of,
    open_reader,
)
from zarrcache.ops.selection import all_pairs, concurrently, stored_header

__all__ = ["make_lock"]


def make_lock(
    config: DataConfig, *, progress: Callable[[int, int], object] | None = None
) -> DataLock:
    """Read every density of a config, and return its lock.

    Parameters
    ----------
    config : DataConfig
        ``cache.lock`` is ignored.
    progress : callable, optional
        Called with the densities read so far and their number.

    Raises
    ------
    ZarrCacheError
        A density cannot be read, or the config has none.
    """
    if config.cache is not None:
        config = config.model_copy(update={"cache": config.cache.model_copy(update={"lock": None})})
    reader = open_reader(config)
    wanted = [(task_id, role) for task_id in all_pairs(reader) for role in ROLES]

    def locked(one: tuple[str, Role]) -> LockedDensity:
        values, gridsize = reader.load(*one)
        payload = np.ascontiguousarray(values, "<f4")
        return LockedDensity(
            shape=tuple(gridsize),
            crc32c=crc_of(payload),
            sha256=hashlib.sha256(payload.view(np.uint8).data).hexdigest(),
            source=_source(reader, *one),
        )

    densities: dict[str, dict[Role, LockedDensity]] = {}
    found = concurrently(locked, wanted)
    for done, ((task_id, role), density) in enumerate(zip(wanted, found, strict=True), 1):
        densities.setdefault(task_id, {})[role] = density
        if progress is not None:
            progress(done, len(wanted))
    settings = reader.lock_settings
    if reader.split_file is not None:
        settings["split_file"] = digest_of(reader.split_of_file(reader.split_file))
    return DataLock(settings, densities)


def _source(reader: ZarrS3Reader, task_id: str, role: Role) -> str:
    """Digest of the objects that the values came from: of the entry, or of a listing now."""
    index = reader.cache.index
    if index is not None:
        header = stored_header(index, reader.key(task_id, role).digest)
        if header is not None:
            return header.source
    return source_digest(reader.listing(task_id, role))
