"""Check every entry against its checksum and identity; drop bad ones (``zarrcache verify``)."""

from __future__ import annotations

import contextlib
import errno
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from zarrcache._keys import Units
from zarrcache.arrays import count_nonfinite, disagreement, electrons_of, has_electrons
from zarrcache.config import CacheConfig, DataConfig, cache_of
from zarrcache.disk import (
    ARRAY,
    CACHE_FAULTS,
    OBJECT,
    SOUND,
    Flaws,
    Index,
    Row,
    array_note,
    crc32c,
    is_within,
    map_entry,
    open_regular,
    published_name,
    read_attributes_of,
)
from zarrcache.errors import ConfigError, CorruptEntryError, ZarrCacheError
from zarrcache.ops.selection import (
    Compared,
    Selection,
    concurrently,
    open_if_present,
    origin_and_url,
    select,
)

__all__ = ["Problem", "VerifyReport", "verify"]

#: Encoded entries that are compared with the origin.
_SAMPLED = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """A dropped entry: its file, the URL of its source, and why it was dropped."""

    file: str
    url: str
    why: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of a check.

    Attributes
    ----------
    directory : Path
    entries, nbytes : int
        Number of entries checked, and their bytes on disk.
    corrupt : tuple of Problem
        Entries that do not match their checksum or identity, or have no file. Dropped; the next
        read fetches them again.
    stale : tuple of Problem
        Entries that differ from the origin's present version. Dropped. Empty without
        ``against_origin``.
    gone : tuple of Problem
        Entries of stores that the origin no longer has. Kept: each may be the last copy. Empty
        without ``against_origin``.
    strays : tuple of str
        Files without an entry. Removed.
    unreadable : tuple of Problem
        Entries that the system cannot read now (EIO, EMFILE, EACCES). Kept, because they may be
        good: a read of one is a miss, and stores it again.
    is_read_only : bool
        The cache can only be read, so nothing was dropped or removed.
    flawed : tuple of Problem
        Densities that are bad at the origin: values that are NaN or infinite; a mean that is not
        the number of electrons that the store states (with ``against_origin``); and, unless
        ``cache.missing_chunks`` is ``fill``, absent chunks. Intact entries are kept.
    filled : tuple of Problem
        Densities with absent chunks, with ``cache.missing_chunks: fill``.
    within_bound : int
        With ``against_origin``: entries of another encoding than float32 that were read from the
        origin and are within their error bound. The others are ``corrupt``.
    """

    directory: Path
    entries: int
    nbytes: int
    corrupt: tuple[Problem, ...] = ()
    stale: tuple[Problem, ...] = ()
    strays: tuple[str, ...] = ()
    unreadable: tuple[Problem, ...] = ()
    is_read_only: bool = False
    flawed: tuple[Problem, ...] = ()
    filled: tuple[Problem, ...] = ()
    within_bound: int = 0
    gone: tuple[Problem, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether every entry could be read, none was corrupt, and no density is flawed or gone."""
        return not (self.corrupt or self.unreadable or self.flawed or self.gone)


def verify(
    config: DataConfig | CacheConfig,
    *,
    against_origin: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> VerifyReport:
    """Read every entry of both tiers and drop those that are corrupt.

    Safe while other processes use the cache: a dropped entry is a miss for them.

    Parameters
    ----------
    config : DataConfig or CacheConfig
    against_origin : bool
        Also compare the stores of the config's ids with the origin, one LIST and two GETs of
        metadata per entry (a zipped store is fetched whole): drop entries of older versions, and
        list stores that are gone, lack chunks, or state another number of electrons than the entry
        has. Up to 16 entries that are not in float32 are read whole and compared within their error
        bound.
    progress : callable, optional
        Called with the bytes checked so far and the bytes to check.

    Raises
    ------
    ConfigError
        ``against_origin`` without a training config, no cache block, or a cache directory that
        cannot be used.
    OriginError
        With ``against_origin``: the origin cannot be listed.
    ZarrCacheError
        The disk failed: nothing was checked.
    """
    if against_origin and not isinstance(config, DataConfig):
        raise ConfigError("against_origin needs a training config, which names the origin.")
    # verify: always, so that opening the index checks the whole index file as well
    always = cache_of(config).model_copy(update={"verify": "always"})
    if isinstance(config, DataConfig) and against_origin:
        selection, index = select(config.model_copy(update={"cache": always}))
    else:
        selection, index = select(always)
    if not open_if_present(index):
        return VerifyReport(index.dir.parent, 0, 0)
    try:
        index.sweep()
        rows = list(index.rows())
    except CACHE_FAULTS as exc:
        raise ZarrCacheError(
            f"{index.dir.parent}: the index cannot be read ({exc}). Check the disk, then run the "
            "command again."
        ) from exc
    total_bytes = sum(row.size_bytes for row in rows)
    found = _Findings(index, fills=always.missing_chunks == "fill")
    good: dict[str, tuple[Row, _Checked]] = {}
    checked_bytes = 0
    for row in rows:
        checked = found.check(row)
        if checked is not None:
            good[row.digest] = row, checked
        checked_bytes += row.size_bytes
        if progress is not None:
            progress(checked_bytes, total_bytes)
    compared: dict[str, Compared] = {}
    if selection is not None:
        intact = [row for row, _ in good.values()]
        compared = {one.row.digest: one for one in selection.compare(intact, examines=True)}
    rounded = []
    for digest, (row, checked) in good.items():
        is_current = found.judge(checked, compared.get(digest, Compared(row, False)))
        if digest in compared and checked.relative_error and is_current:
            rounded.append(row)
    within_bound = 0 if selection is None else found.compare_rounded(selection, rounded)
    return VerifyReport(
        directory=index.dir.parent,
        entries=len(rows),
        nbytes=total_bytes,
        strays=() if index.is_read_only else _remove_strays(index),
        is_read_only=index.is_read_only,
        within_bound=within_bound,
        **{kind: tuple(problems) for kind, problems in found.problems.items()},
    )


class _Findings:
    """The problems of the entries of a cache, by the names of `VerifyReport`.

    With ``fills`` absent chunks are not a flaw (``cache.missing_chunks: fill``).
    """

    def __init__(self, index: Index, *, fills: bool) -> None:
        self._index, self._fills = index, fills
        self.problems: dict[str, list[Problem]] = defaultdict(list)

    def _note(self, kind: str, row: Row, why: str) -> None:
        self.problems[kind].append(Problem(row.filename, origin_and_url(row)[1], why))

    def _drop(self, row: Row) -> int:
        if self._index.is_read_only:
            return row.size_bytes
        return self._index.drop_rows([row])

    def _drop_corrupt(self, row: Row, why: str) -> None:
        self._drop(row)
        self._note("corrupt", row, why)

    def check(self, row: Row) -> _Checked | None:
        """Check one file; None if it is corrupt, which drops the entry, or cannot be read."""
        try:
            return _check(row, self._index.dir.root / row.filename)
        except FileNotFoundError:
            # If it was evicted after the rows were read, there is no row left to drop.
            if self._drop(row):
                self._note("corrupt", row, "its file is gone")
        except CorruptEntryError as exc:
            self._drop_corrupt(row, str(exc))
        except OSError as exc:
            if exc.errno == errno.ELOOP:  # a planted link
                self._drop_corrupt(row, "it is a symbolic link")
            else:
                self._note("unreadable", row, exc.strerror or str(exc))
        return None

    def judge(self, checked: _Checked, compared: Compared) -> bool:
        """Note the flaws of an intact entry. Returns whether the origin has this version of it.

        One of another version is dropped; one that is gone there is kept.
        """
        row, is_stale, lacks, stated, volume, is_gone = compared
        if is_gone:
            self._note("gone", row, "it is gone at the origin; the entry is kept")
            return False
        # A store that lacks chunks is no version to replace a whole entry with.
        is_stale = is_stale and (not lacks or self._fills)
        if is_stale:
            self._drop(row)
            self._note("stale", row, "the origin has another version")
        else:
            electrons = checked.mean
            if electrons is not None and checked.units == "volume":
                electrons = None if volume is None else electrons * volume
            why = disagreement(electrons, stated, checked.relative_error)
            if why:
                self._note("flawed", row, why)
            if not lacks and checked.flaws.missing_chunks:
                lacks = str(Flaws(missing_chunks=checked.flaws.missing_chunks))
            if checked.flaws.nonfinite:
                self._note("flawed", row, str(Flaws(nonfinite=checked.flaws.nonfinite)))
        if lacks:
            self._note("filled" if self._fills else "flawed", row, lacks)
        return not is_stale

    def compare_rounded(self, selection: Selection, rows: Sequence[Row]) -> int:
        """Compare some entries of another encoding than float32 with the origin.

        Returns how many are within their error bound; the others are dropped.
        """
        sample = rows[:: max(1, -(-len(rows) // _SAMPLED))]
        within_bound = 0
        with concurrently(functools.partial(_exceeds, selection), sample) as answers:
            for row, why in zip(sample, answers, strict=True):
                if why:
                    self._drop_corrupt(row, why)
                else:
                    within_bound += 1
        return within_bound


def _exceeds(selection: Selection, row: Row) -> str:
    """Describe how a rounded entry exceeds its error bound.

    Empty if it does not, or if the entry was evicted meanwhile.
    """
    try:
        entry = map_entry(selection.index.dir.root / row.filename)
    except (OSError, CorruptEntryError):
        return ""
    stored_as, values = entry.header.stored_as, selection.density_of(row)
    if stored_as is None or (
        values.shape == entry.array.shape and is_within(stored_as, values, entry.array)
    ):
        return ""
    return f"it differs from the origin by more than the error bound of {stored_as.encoding}"


class _Checked(NamedTuple):
    """The content of an intact entry."""

    flaws: Flaws
    #: The mean of its values, times the points if it is per point; None if it holds no electrons.
    mean: float | None = None
    units: Units = "cell"
    #: Of its encoding.
    relative_error: float = 0.0


def _check(row: Row, path: Path) -> _Checked:
    """Compare one file with its index row and its own header; count the flaws of a density."""
    if row.kind != OBJECT:
        entry = map_entry(path)
        key = entry.header.key
        if array_note(key) != row.note or key.digest != row.digest:
            raise CorruptEntryError(f"it holds {key.url} {key.array}")
        if not entry.is_intact():
            raise CorruptEntryError("its checksum does not match")
        read_attributes_of(path)
        # Counted again: versions before the header had the count stored entries too.
        if row.kind != ARRAY:
            return _Checked(Flaws(entry.header.flaws.missing_chunks))
        flaws = Flaws(entry.header.flaws.missing_chunks, count_nonfinite(entry.array))
        stored_as, mean = entry.header.stored_as, None
        if has_electrons(key.source_array) and entry.array.size:
            mean = electrons_of(entry.array, "cell" if key.units == "volume" else key.units)
        return _Checked(flaws, mean, key.units, stored_as.relative_error if stored_as else 0.0)
    fd, _ = open_regular(path)
    with FileIO(fd, "rb") as file:
        data = file.readall()
    if len(data) > row.size_bytes or str(crc32c(data)) != row.note.partition("\n")[0]:
        raise CorruptEntryError("its checksum does not match")
    return _Checked(SOUND)


def _remove_strays(index: Index) -> tuple[str, ...]:
    """Unlink files that neither an entry nor an intent names."""
    # List the files before the rows: every file is recorded before it exists, so a listed file
    # without a row does not belong to any process.
    found = list(index.dir.files())
    known = index.filenames()
    strays = []
    for path in found:
        # A file that is being written has a hidden name.
        published = path.with_name(published_name(path.name) or path.name)
        if not known & {f"{one.relative_to(index.dir.root)}" for one in (path, published)}:
            with contextlib.suppress(FileNotFoundError):
                index.dir.unlink(path)
            strays.append(f"{path.relative_to(index.dir.root)}")
    return tuple(strays)
