"""Drop good entries to make room: what ``zarrcache evict`` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import Index, Row, choose_victims
from zarrcache.errors import ConfigError
from zarrcache.ops.selection import Scope, cache_of, existing_index, is_listing

__all__ = ["EvictPlan", "plan_evict"]

_STEP = 500  # entries dropped between two calls of progress


@dataclass(frozen=True)
class EvictPlan:
    """What is to be dropped. Making it dropped nothing.

    Attributes
    ----------
    entries : tuple of Row
        Of both tiers, oldest first.
    directory : Path
        Of the cache.
    """

    entries: tuple[Row, ...]
    directory: Path
    _index: Index | None = field(repr=False)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk of the entries."""
        return sum(row.size_bytes for row in self.entries)

    def execute(self, progress: Callable[[int], object] | None = None) -> int:
        """Drop them. A reader that has one open keeps it; one that comes later fetches it again.

        Parameters
        ----------
        progress : callable, optional
            Called with the number of entries dropped so far.

        Returns
        -------
        int
            Bytes freed on disk.
        """
        if self._index is None:
            return 0
        freed = 0
        for start in range(0, len(self.entries), _STEP):
            freed += self._index.drop([row.digest for row in self.entries[start : start + _STEP]])
            if progress is not None:
                progress(min(start + _STEP, len(self.entries)))
        self._index.sweep()
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
    """Choose entries: those of the config's ids, or all; then, of these, what every other argument
    agrees to.

    Parameters
    ----------
    config : DataConfig or CacheConfig
        A CacheConfig only says where the cache is: then ``everything`` is needed.
    ids : sequence of str, optional
        Only the stores of these task ids.
    older_than_s : float, optional
        Only what was stored this long ago.
    target_bytes : int, optional
        Only the oldest, as many as it takes to bring the whole cache down to this size.
    stale : bool
        Only stores that the origin has changed or no longer has; one LIST for each entry.
    everything : bool
        Entries of other configs in the same directory too.

    Raises
    ------
    ConfigError
        Arguments that do not go together, no cache block, a cache directory that cannot be used.
    OriginError
        ``stale``, and the origin cannot be asked.
    """
    if not isinstance(config, DataConfig) and (not everything or stale):
        raise ConfigError(
            "which entries? Give a training config for those of its ids"
            + (
                ", for only with one the origin can be asked what is stale."
                if stale
                else ", or --all for all of the directory."
            )
        )
    if everything and ids is not None:
        raise ConfigError("ids and all exclude each other. Give one of them.")
    scope = Scope(config, ids) if isinstance(config, DataConfig) else None
    cache = cache_of(config)
    index = existing_index(cache)
    if index is None:
        return EvictPlan((), cache.dir, None)
    rows = list(index.rows())
    narrowed = stale or older_than_s is not None or target_bytes is not None
    if scope is not None and not everything:
        rows = [
            row
            for row in rows
            if scope.store_of(row) is not None or (scope.is_whole and scope.is_directory(row))
        ]
    if narrowed:
        # A stored listing is a few bytes, and without it no run starts offline: it goes with the
        # whole only.
        rows = [row for row in rows if not is_listing(row)]
    if older_than_s is not None:
        rows = [row for row in rows if time.time() - row.stored_s >= older_than_s]
    if stale and scope is not None:
        changed = {scope.store_of(row) for row in scope.stale(rows)}
        rows = [row for row in rows if scope.store_of(row) in changed]
    if target_bytes is not None:
        victims = set(
            choose_victims(
                ((row.digest, row.size_bytes) for row in rows), index.volume_bytes() - target_bytes
            )
        )
        rows = [row for row in rows if row.digest in victims]
    return EvictPlan(tuple(rows), cache.dir, index)
