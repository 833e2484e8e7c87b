"""Choose and drop good entries to make room (``zarrcache evict``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zarrcache._units import format_bytes
from zarrcache.arrays import stem_of
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import CACHE_FAULTS, LISTING, Index, Row, choose_victims
from zarrcache.errors import ConfigError, ZarrCacheError
from zarrcache.ops.selection import open_if_present, select

__all__ = ["EvictPlan", "plan_evict"]

_STEP = 500  # entries dropped between two progress calls


@dataclass(frozen=True)
class EvictPlan:
    """Entries to drop. Making the plan drops nothing.

    Attributes
    ----------
    entries : tuple of Row
        Entries of both tiers, oldest first.
    directory : Path
        Root of the cache.
    absent : tuple of str
        The given ids without any entry.
    """

    entries: tuple[Row, ...]
    directory: Path
    index: Index = field(repr=False)
    absent: tuple[str, ...] = ()

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk of the entries."""
        return sum(row.size_bytes for row in self.entries)

    def execute(self, progress: Callable[[int], object] | None = None) -> int:
        """Drop the entries. Existing maps stay valid; a later read is a miss.

        An entry that has been stored again since the plan was made is kept.

        Parameters
        ----------
        progress : callable, optional
            Called with the number of entries dropped so far.

        Returns
        -------
        int
            Bytes freed on disk.

        Raises
        ------
        ConfigError
            The cache can only be read.
        ZarrCacheError
            The disk failed. What was dropped until then is dropped.
        """
        if not self.entries:
            return 0
        if self.index.is_read_only:
            raise ConfigError(
                f"cache.dir {self.directory} cannot be written by this process, so nothing was "
                "evicted. Run the command as its owner, where it is mounted writable."
            )
        freed = 0
        try:
            for start in range(0, len(self.entries), _STEP):
                freed += self.index.drop_rows(self.entries[start : start + _STEP])
                if progress is not None:
                    progress(min(start + _STEP, len(self.entries)))
            self.index.sweep()
        except CACHE_FAULTS as exc:
            raise ZarrCacheError(
                f"{self.directory}: not all entries could be dropped ({exc}); "
                f"{format_bytes(freed)} are free. Check the disk, then run the command again."
            ) from exc
        return freed


def plan_evict(
    config: DataConfig | CacheConfig,
    *,
    ids: Sequence[str] | None = None,
    older_than_s: float | None = None,
    target_bytes: int | None = None,
    stale: bool = False,
    everything: bool = False,
) -> EvictPlan:
    """Choose the entries of the config's ids, or all; every further argument narrows the choice.

    Parameters
    ----------
    config : DataConfig or CacheConfig
        A CacheConfig names the cache but no ids; it needs ``everything``.
    ids : sequence of str, optional
        Only the stores of these task ids.
    older_than_s : float, optional
        Only entries stored at least this many seconds ago.
    target_bytes : int, optional
        Only the oldest, until the whole cache takes at most this many bytes on disk.
    stale : bool
        Only entries of stores that changed or are gone at the origin; one LIST per entry.
    everything : bool
        Also entries of other configs in the same cache directory.

    Raises
    ------
    ConfigError
        The arguments exclude each other, there is no cache block, or the cache directory cannot
        be used.
    OriginError
        With ``stale``: the origin cannot be listed.
    """
    if not isinstance(config, DataConfig):
        if stale:
            raise ConfigError(
                "Finding stale entries needs the origin of a training config. Pass CONFIG."
            )
        if not everything:
            raise ConfigError(
                "No entries are selected. Pass a training config to select those of its ids, or "
                "--all to select the whole cache."
            )
    if everything and ids is not None:
        raise ConfigError("ids and all exclude each other. Give one of them.")
    selection, index = select(config, ids)
    if not open_if_present(index):
        return EvictPlan((), index.dir.parent, index, tuple(ids or ()))
    rows, cached = list(index.rows()), set()
    if selection is not None and not everything:
        every, rows = rows, []
        for row in every:
            if (found := selection.store_of(row)) is not None:
                cached.add(stem_of(found[1]))
                rows.append(row)
            elif selection.is_whole and selection.is_directory(row):
                rows.append(row)
    absent = tuple(task_id for task_id in ids or () if task_id not in cached)
    if stale or older_than_s is not None or target_bytes is not None:
        # A stored listing takes few bytes, and without it no training starts offline: it is
        # dropped only together with all other entries.
        rows = [row for row in rows if row.kind != LISTING]
    if older_than_s is not None:
        rows = [row for row in rows if time.time() - row.stored_s >= older_than_s]
    if stale and selection is not None:
        compared = selection.compare(rows, examines=False)
        changed = {selection.store_of(one.row) for one in compared if one.is_stale}
        rows = [row for row in rows if selection.store_of(row) in changed]
    if target_bytes is not None:
        sizes = ((row.digest, row.size_bytes) for row in rows)
        victims = set(choose_victims(sizes, index.volume_bytes() - target_bytes))
        rows = [row for row in rows if row.digest in victims]
    return EvictPlan(tuple(rows), index.dir.parent, index, absent)
