"""Write and compare lock files (``zarrcache lock``, ``zarrcache diff``)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zarrcache._keys import Channel, source_digest
from zarrcache.config import DataConfig
from zarrcache.data import (
    DataLock,
    LockedDensity,
    ZarrS3Reader,
    crc_of,
    differences,
    digest_of,
    open_reader,
)
from zarrcache.errors import ConfigError
from zarrcache.ops.selection import all_pairs, concurrently, stored_header

__all__ = ["make_lock"]


def make_lock(
    config: DataConfig,
    output: Path | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> DataLock:
    """Read every density of a config, and return its lock. ``cache.lock`` is ignored.

    ``progress`` gets the number of densities read so far, and of all.

    Raises
    ------
    ConfigError
        ``output``, where the lock will be written, is a lock of other settings.
    """
    if config.cache is not None:
        config = config.model_copy(update={"cache": config.cache.model_copy(update={"lock": None})})
    reader = open_reader(config)
    ids = reader.decide(all_pairs(reader)).ids
    settings = reader.lock_settings
    if reader.split_file is not None:
        settings["split_file"] = digest_of(reader.split_of_file(reader.split_file))
    if output is not None:
        _refuse_other_settings(output, settings)
    wanted = [(task_id, channel) for task_id in ids for channel in reader.reads]

    def locked(one: tuple[str, Channel]) -> LockedDensity | None:
        task_id, channel = one
        found = reader.load_channel(task_id, *channel)
        if found is None:  # filled with zeros
            return None
        values, gridsize = found
        payload = np.ascontiguousarray(values, "<f4")
        return LockedDensity(
            shape=tuple(gridsize),
            crc32c=crc_of(payload),
            sha256=hashlib.sha256(payload.view(np.uint8).data).hexdigest(),
            source=_source(reader, task_id, channel),
        )

    densities: dict[str, dict[str, LockedDensity]] = {}
    with concurrently(locked, wanted, progress) as found:
        for (task_id, channel), density in zip(wanted, found, strict=True):
            of_material = densities.setdefault(task_id, {})
            if density is not None:
                of_material[reader.locked_as(*channel)] = density
    return DataLock(settings, densities)


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = DataLock.load(path).settings
    except ConfigError:  # absent, cut off or of another version
        return
    for difference in differences(DataLock(before, {}), DataLock(settings, {})):
        raise ConfigError(
            f"{path} is a lock of other settings ({difference}). Give another file, or remove it."
        )


def _source(reader: ZarrS3Reader, task_id: str, channel: Channel) -> str:
    """Digest of the objects that the values came from: of the entry, or of a listing now."""
    index = reader.cache.index
    if index is not None:
        header = stored_header(index, reader.key(task_id, *channel).digest)
        if header is not None:
            return header.source
    return source_digest(reader.listing(task_id, *channel))
