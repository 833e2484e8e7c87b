"""The cache that a command works on: settings, index, and the entries of a config."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import (
    ROLES,
    ArrayKey,
    Channel,
    Role,
    arrays_of,
    density_array,
    source_digest,
    stored_array,
    units_of,
)
from zarrcache.arrays import (
    OriginArray,
    as_density,
    cell_volume,
    choose,
    examine_array,
    kinds_of,
    list_array,
    read_array,
    several_sources,
    stem_of,
)
from zarrcache.cache import CONTENTS, Cache
from zarrcache.config import CacheConfig, DataConfig, cache_of
from zarrcache.data import ZarrS3Reader, distinct_directories, mapped_ids, open_reader
from zarrcache.disk import (
    ARRAY,
    CACHE_FAULTS,
    LISTING,
    OBJECT,
    CacheDir,
    EntryHeader,
    Index,
    Row,
    read_header,
)
from zarrcache.errors import (
    ConfigError,
    CorruptEntryError,
    IncompleteArrayError,
    OriginNotFoundError,
    SchemaError,
    ZarrCacheError,
)
from zarrcache.origin import Origin
from zarrcache.stats import Counters

__all__ = [
    "Compared",
    "Selection",
    "all_pairs",
    "cache_at",
    "concurrently",
    "known_refusal",
    "open_if_present",
    "origin_and_url",
    "select",
    "stored_header",
]

T = TypeVar("T")
R = TypeVar("R")

#: LISTs in flight. A listing is one small request that mostly waits; 32 of them keep one core busy
#: at a latency of 20 ms.
LISTERS = 32


def all_pairs(reader: ZarrS3Reader) -> list[str]:
    """The task ids of a config that have input and label, with or without all channels.

    Raises
    ------
    ConfigError
        There is none: an empty report would look like a good one.
    """
    if not reader.stored_ids:
        directories = " and ".join(dict.fromkeys(reader.origin(role).url for role in ROLES))
        raise ConfigError(
            f"no material of {reader.functional} has input and label. Check functional and map_dir "
            f"({reader.map_dir}), and data_dir, label_dir and source ({directories})."
        )
    return reader.stored_ids


def cache_at(directory: Path) -> CacheConfig:
    """Settings to maintain the cache in ``directory``, whose own settings are unknown."""
    directory = Path(directory).expanduser().absolute()
    root = CacheDir(directory).root
    if not _is_there(root):
        what = "does not exist" if not os.path.isdir(directory) else f"has no {root.name} in it"
        raise ConfigError(
            f"There is no cache in {directory}: it {what}. Give the directory that cache.dir names "
            "in the training config."
        )
    try:
        # A shared directory has to be opened as one, or the other users' files are refused.
        shared = bool(root.stat().st_mode & 0o020)
    except OSError:
        shared = False
    # dir by model_copy: it was given explicitly, so ZARRCACHE_DIR must not override it.
    # allow_network_fs: a cache on a network file system may be inspected and emptied.
    config = CacheConfig(dir=directory, shared=shared, allow_network_fs=True)
    return config.model_copy(update={"dir": directory})


def open_if_present(index: Index) -> bool:
    """Open an index if there is a cache; otherwise return False and create nothing."""
    is_present = _is_there(index.dir.root)
    if is_present:
        index.open()
    return is_present


def _is_there(root: Path) -> bool:
    """Whether the directory exists. A directory that cannot be entered is an error, not absence."""
    try:
        return stat.S_ISDIR(os.stat(root).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:  # another user's directory, or a disk that fails
        raise ConfigError(
            f"cache.dir {root.parent} cannot be used by user {os.getuid()} ({exc.strerror}). Run "
            "the command as its owner, or choose another cache.dir."
        ) from exc


class Compared(NamedTuple):
    """An entry of the array tier, and the present state of its density at the origin."""

    row: Row
    #: It is of another version, or the origin no longer has the store.
    is_stale: bool
    #: Which chunks the origin lacks; empty if it has all, or was not examined.
    lacks: str = ""
    #: The number of electrons that the store states.
    electrons: float | None = None
    #: Of the cell, in cubic angstrom, for an entry per volume.
    volume: float | None = None
    #: The origin no longer has the store.
    is_gone: bool = False


class Selection:
    """The stores of a training config's ids, of any version, whether or not the origin has them.

    Creating one sends no request, and does not open its ``index``. It selects ``ids``, or every id
    that the map file has for the functional (``is_whole``).
    """

    def __init__(self, config: DataConfig, ids: Sequence[str] | None = None) -> None:
        self._cache = Cache(cache_of(config), Counters())
        assert self._cache.index is not None
        self.index = self._cache.index
        self.is_whole = ids is None
        if ids is None:
            ids = mapped_ids(config.map_dir, config.functional)
        self.ids = list(dict.fromkeys(ids))
        self._kinds = kinds_of(config.source)
        self._known = frozenset(self.ids)
        self._origins: dict[Role, Origin] = {
            "data": self._cache.origin(config.data_dir, config.s3_kwargs),
            "label": self._cache.origin(config.label_dir, config.s3_kwargs),
        }
        units, encoding = units_of(config.normalize_data), cache_of(config).arrays.encoding
        self._arrays = arrays_of(config.density_type)
        #: The name in keys of entries of each array.
        self._stored_as = {
            array: stored_array(array, units, encoding=encoding)
            for arrays in self._arrays.values()
            for array in arrays
        }
        self.if_missing = config.missing
        self._roots = distinct_directories(self._origins)
        self._chosen: tuple[object, dict[str, str]] | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        """``("data", "label")``, or ``("data",)`` where both are the same directory."""
        return ROLES[: len(self._roots)]

    def listing(self, role: Role) -> dict[str, str] | None:
        """Names of the stores by task id, as listed last; None if they were never listed."""
        stored = self._cache.stored_listing(self._origins[role], "")
        if not isinstance(stored, dict):
            return None
        chosen = self._chosen
        if chosen is None or chosen[0] is not stored:  # often one for both roles
            chosen = self._chosen = stored, choose(stored, self._kinds)
        return chosen[1]

    @property
    def channels(self) -> tuple[Channel, ...]:
        """See `ZarrS3Reader.channels`."""
        roles = self.roles
        found = (
            Channel(role if role in roles else roles[0], array)
            for role in ROLES
            for array in self._arrays[role]
        )
        return tuple(dict.fromkeys(found))

    def lacking(self, channel: Channel) -> set[str]:
        """Names of the stores that are known to lack a channel; see `Absences.stored`.

        Empty if a material that lacks it is an error.
        """
        if self.if_missing == "error":
            return set()
        contents = self._cache.stored_listing(self._origins[channel.role], CONTENTS)
        known = contents.get(channel.array, {}) if isinstance(contents, dict) else {}
        return {name for name, has in known.items() if not has}

    def stored(
        self, listings: Mapping[Role, Mapping[str, str] | None], array: str
    ) -> dict[Role, dict[str, int]]:
        """See :meth:`Cache.stored_densities`."""
        return self._cache.stored_densities(
            array,
            {role: (self._origins[role], names) for role, names in listings.items()},
        )

    def stored_as(self, channel: Channel) -> list[str]:
        """The array of a channel in keys, and if it is encoded, the same in float32."""
        key = ArrayKey("", "", self._stored_as[channel.array])
        return [key.array, *([key.exact.array] if key.exact is not None else [])]

    def stored_names(self, array: str) -> dict[Role, tuple[set[str], int]]:
        """See :meth:`Cache.stored_names`, by role."""
        origins = [self._origins[role] for role in self.roles]
        found = self._cache.stored_names(array, origins)
        return dict(zip(self.roles, found, strict=True))

    def unused(self) -> Counter[str]:
        """Cached densities of the ids that this config does not read, by their array in keys:
        those in other units or encodings, or of other channels.
        """
        own = {(one.role, array) for one in self.channels for array in self.stored_as(one)}
        found: Counter[str] = Counter()
        for role in self.roles:
            for array in self._cache.stored_arrays(self._origins[role]):
                if (role, array) not in own:
                    names, _ = self.stored_names(array)[role]
                    found[array] += len(self._known.intersection(map(stem_of, names)))
        return +found

    def several_sources(self) -> list[str]:
        """See `zarrcache.arrays.several_sources`; of the directories as they were listed last."""
        found = []
        for origin in self._roots.values():
            stored = self._cache.stored_listing(origin, "")
            if isinstance(stored, dict) and (
                text := several_sources(origin.url, stored, self._kinds)
            ):
                found.append(text)
        return found

    def roles_of(self, origin: Origin) -> str:
        """``data``, ``label``, or ``data+label`` for a directory of both."""
        own = origin.identity, origin.url_of("")
        return "+".join(
            role for role, of in self._origins.items() if (of.identity, of.url_of("")) == own
        )

    def store_of(self, row: Row) -> tuple[Origin, str] | None:
        """Origin and name of an entry's store; None if the store is not selected."""
        endpoint, url = origin_and_url(row)
        for (identity, root), origin in self._roots.items():
            if endpoint == identity and url.startswith(root):
                store = url[len(root) :]
                if row.kind == OBJECT:  # the URL of an object continues below its store
                    store = store.partition("/")[0]
                if stem_of(store) in self._known:
                    return origin, store
        return None

    def is_directory(self, row: Row) -> bool:
        """Whether an entry is the stored listing of one of the two directories, or says which
        arrays its stores have.
        """
        endpoint, url = origin_and_url(row)
        root = url.removesuffix(CONTENTS)
        return row.kind == LISTING and (endpoint, root) in self._roots

    def compare(self, rows: Sequence[Row], *, examines: bool) -> list[Compared]:
        """Compare entries of the array tier, among ``rows``, with the origin.

        One LIST each, and with ``examines`` one GET of the array's metadata and one of the store's
        attributes.
        """
        candidates = [
            (row, *store)
            for row in rows
            if row.kind == ARRAY and (store := self.store_of(row)) is not None
        ]
        with concurrently(
            lambda one: self._compare(*one, examines=examines), candidates
        ) as answers:
            return list(answers)

    def _compare(self, row: Row, origin: Origin, store: str, *, examines: bool) -> Compared:
        header = stored_header(self.index, row.digest)
        if header is None:
            return Compared(row, False)  # evicted meanwhile, or damaged, which verify reports
        array, units = header.key.source_array, header.key.units
        what = OriginArray(origin, store, array)
        try:
            listed = list_array(what)
        except OriginNotFoundError:
            return Compared(row, True, is_gone=True)
        except SchemaError:
            return Compared(row, True)
        lacks, electrons, volume = "", None, None
        if examines:
            try:
                examined = examine_array(what, listed)
                electrons = examined.electrons(array)
                if examined.missing_chunks:
                    lacks = (
                        f"the origin lacks {examined.missing_chunks} of {examined.chunks} chunks"
                    )
                if units == "volume" and electrons is not None:
                    volume = cell_volume(examined.attributes, what.store_url)
            except (SchemaError, IncompleteArrayError) as exc:
                lacks = str(exc)
        is_stale = source_digest(listed) != header.source
        return Compared(row, is_stale, lacks, electrons, volume)

    def density_of(self, row: Row) -> NDArray[np.float32]:
        """The density of an entry, read from the origin past the cache, absent chunks filled."""
        found, header = self.store_of(row), stored_header(self.index, row.digest)
        if found is None or header is None:
            raise SchemaError(f"{row.note} is not a density of this config any more.")
        origin, store = found
        key = header.key
        decoded = read_array(
            OriginArray(origin, store, key.source_array, fills=True, units=key.units)
        )
        return as_density(
            decoded.array,
            key.url,
            key.source_array,
            units=key.units,
            attributes=decoded.attributes,
        )


def select(
    config: DataConfig | CacheConfig, ids: Sequence[str] | None = None
) -> tuple[Selection | None, Index]:
    """The selection of a training config (None for a CacheConfig) and the unopened index."""
    if isinstance(config, DataConfig):
        selection = Selection(config, ids)
        return selection, selection.index
    return None, Index(cache_of(config))


def known_refusal(config: DataConfig | CacheConfig) -> str:
    """The error with which the training refuses a config because materials lack channels.

    Empty if what the cache has stored proves none. Sends no request and creates no directory.
    """
    if not isinstance(config, DataConfig) or config.cache is None:
        return ""
    if set().union(*arrays_of(config.density_type).values()) == {density_array("total")}:
        return ""  # which every material has; a reader of 200,000 takes 0.3 s
    try:
        selection, index = select(config)
        assert selection is not None
        if not open_if_present(index) or any(selection.listing(of) is None for of in ROLES):
            return ""
        offline = config.cache.model_copy(update={"revalidate": "never", "lock": None})
        return open_reader(config.model_copy(update={"cache": offline})).absences.refusal()
    except (*CACHE_FAULTS, ZarrCacheError):  # which the command itself names
        return ""


@contextmanager
def concurrently(
    ask: Callable[[T], R],
    items: Sequence[T],
    progress: Callable[[int, int], object] | None = None,
    *,
    threads: int = LISTERS,
) -> Iterator[Iterator[R]]:
    """Call ``ask(item)`` for many items at once. A context manager.

    It gives an iterator over the answers, in the order of the items. After each answer,
    ``progress`` gets the number of answers and of items. At the end (also after an error or Ctrl-C)
    calls that have not started are cancelled.
    """

    def answers() -> Iterator[R]:
        for done, answer in enumerate(pool.map(ask, items), 1):
            yield answer
            if progress is not None:
                progress(done, len(items))

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield answers()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def origin_and_url(row: Row) -> tuple[str, str]:
    """Endpoint and URL of an entry's store (array tier) or object (byte tier)."""
    fields = f"{row.note}\n\n".split("\n")  # a planted row may have too few fields
    return (fields[0], fields[1]) if row.kind != OBJECT else (fields[1], fields[2])


def stored_header(index: Index, digest: str) -> EntryHeader | None:
    """The header of an entry of the array tier; None if it is absent or cannot be read."""
    try:
        stored = index.lookup(digest)
        header = read_header(index.dir.root / stored.filename) if stored is not None else None
    except (*CACHE_FAULTS, CorruptEntryError):
        return None
    return header if header is not None and header.key.digest == digest else None
