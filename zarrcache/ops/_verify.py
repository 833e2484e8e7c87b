"""Read every entry and drop what is bad: what ``zarrcache verify`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import Index, Row, array_note, crc32c, disk_bytes, map_entry
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.ops.selection import Scope, cache_of, existing_index, origin_and_url

__all__ = ["Problem", "VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class Problem:
    """An entry that was dropped: its file, the URL that it is from, and what was wrong with it."""

    file: str
    url: str
    why: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found.

    Attributes
    ----------
    directory : Path
    entries, nbytes : int
        Looked at: number and bytes on disk.
    corrupt : tuple of Problem
        Did not match their checksum or identity, or had lost their file. Dropped; they will be
        fetched again.
    stale : tuple of Problem
        The origin has something else now. Dropped. Empty without ``against_origin``.
    strays : tuple of str
        Files that no entry knew. Removed.
    """

    directory: Path
    entries: int
    nbytes: int
    corrupt: tuple[Problem, ...]
    stale: tuple[Problem, ...]
    strays: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Nothing was corrupt."""
        return not self.corrupt


def verify(
    config: DataConfig | CacheConfig,
    *,
    against_origin: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> VerifyReport:
    """Read every entry of both tiers, and drop what is not what it says.

    Safe while others read and write the cache: they see a miss where an entry was dropped.

    Parameters
    ----------
    config : DataConfig or CacheConfig
    against_origin : bool
        Also list the stores of the config's ids, and drop entries that are not of the version that
        the origin has now.
    progress : callable, optional
        Called with bytes looked at and bytes in all.

    Raises
    ------
    ConfigError
        ``against_origin`` without a training config, no cache block, a cache directory that cannot
        be used.
    OriginError
        ``against_origin``, and the origin cannot be asked.
    """
    if against_origin and not isinstance(config, DataConfig):
        raise ConfigError(
            "against_origin needs a training config, which says how to reach the origin."
        )
    cache = cache_of(config)
    # the index is looked at as a whole, too
    index = existing_index(cache.model_copy(update={"verify": "always"}))
    if index is None:
        return VerifyReport(cache.dir, 0, 0, (), (), ())
    index.sweep()
    rows = list(index.rows())
    in_all = sum(row.size_bytes for row in rows)
    corrupt, good, looked_at = [], [], 0
    for row in rows:
        try:
            _check(row, index.dir.root / row.filename)
        except FileNotFoundError:
            # Evicted since the rows were read? Then there is nothing left to drop.
            if index.drop([row.digest], filename=row.filename):
                corrupt.append(_problem(row, "its file is gone"))
        except (CorruptEntryError, OSError) as exc:
            index.drop([row.digest], filename=row.filename)
            corrupt.append(_problem(row, str(exc)))
        else:
            good.append(row)
        looked_at += row.size_bytes
        if progress is not None:
            progress(looked_at, in_all)
    stale = []
    if against_origin and isinstance(config, DataConfig):
        for row in Scope(config).stale(good):
            index.drop([row.digest], filename=row.filename)
            stale.append(_problem(row, "the origin has another version"))
    return VerifyReport(
        cache.dir, len(rows), in_all, tuple(corrupt), tuple(stale), _remove_strays(index)
    )


def _check(row: Row, path: Path) -> None:
    """Compare one file with what the index and its own header say of it."""
    if row.tier == "array":
        entry = map_entry(path)
        key = entry.header.key
        if array_note(key.origin, key.url, key.array) != row.note or key.digest != row.digest:
            raise CorruptEntryError(f"it holds {key.url} {key.array}")
        if not entry.is_intact():
            raise CorruptEntryError("its checksum does not match")
        return
    data = path.read_bytes()
    if disk_bytes(len(data)) != row.size_bytes or str(crc32c(data)) != row.note.partition("\n")[0]:
        raise CorruptEntryError("its checksum does not match")


def _problem(row: Row, why: str) -> Problem:
    return Problem(row.filename, origin_and_url(row)[1], why)


def _remove_strays(index: Index) -> tuple[str, ...]:
    """Unlink files that neither an entry nor an intent names."""
    # Files first, rows after: whatever is written is announced before it exists, so a file that was
    # seen and has no row is nobody's.
    found = list(index.dir.files())
    known = index.filenames()
    strays = [
        path
        for path in found
        if f"{path.relative_to(index.dir.root)}" not in known
        and not _is_partial_of(path, known, index.dir.root)
    ]
    for path in strays:
        path.unlink(missing_ok=True)
    return tuple(f"{path.relative_to(index.dir.root)}" for path in strays)


def _is_partial_of(path: Path, known: set[str], root: Path) -> bool:
    """Whether a file is being written under an announced name: ``.NAME.PID-RANDOM.partial``."""
    name = path.name.removeprefix(".").rpartition(".")[0].rpartition(".")[0]
    return path.name.startswith(".") and f"{path.with_name(name).relative_to(root)}" in known
