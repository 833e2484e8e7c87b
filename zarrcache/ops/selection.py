"""Which entries of a cache belong to a training config, and which of them the origin has changed
since.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from zarrcache._keys import Role, source_digest, stem_of, stored_array
from zarrcache.arrays import list_array
from zarrcache.cache import Cache
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.data import ids_of, read_map
from zarrcache.disk import CACHE_FAULTS, CacheDir, EntryHeader, Index, Row, read_header
from zarrcache.errors import ConfigError, CorruptEntryError, OriginNotFoundError, SchemaError
from zarrcache.origin import Origin
from zarrcache.stats import Counters

__all__ = [
    "Scope",
    "cache_at",
    "cache_of",
    "concurrently",
    "existing_index",
    "is_listing",
    "open_index",
    "origin_and_url",
    "stored_header",
    "stored_listing",
]

T = TypeVar("T")
R = TypeVar("R")

#: LISTs in flight. A listing is one small request whose time is all waiting; 32 keep one core busy
#: at 20 ms.
LISTERS = 32


class Scope:
    """The stores of a training config's ids, in any version, whether the origin has them or not.
    Making one costs no request.

    Parameters
    ----------
    config : DataConfig
        With a ``cache`` block.
    ids : sequence of str, optional
        Only these task ids. Default: every id that the map file has for the functional.

    Attributes
    ----------
    is_whole : bool
        All ids, not only some.
    is_one_directory : bool
        Input and label are the same stores.
    """

    def __init__(self, config: DataConfig, ids: Sequence[str] | None = None) -> None:
        self.cache = Cache(cache_of(config), Counters())
        assert self.cache.index is not None
        self.index = self.cache.index
        self.is_whole = ids is None
        self.ids = list(
            dict.fromkeys(
                ids if ids is not None else ids_of(read_map(config.map_dir), config.functional)
            )
        )
        self.origins: dict[Role, Origin] = {
            "data": self.cache.origin(config.data_dir, config.s3_kwargs),
            "label": self.cache.origin(config.label_dir, config.s3_kwargs),
        }
        self._stored_as = stored_array(
            f"charge_density_{config.density_type}", is_per_point=config.normalize_data
        )
        self.known = frozenset(self.ids)
        #: Origins by endpoint and the URL that the stores' names follow; one if both directories
        #: are the same.
        self._roots = {
            (origin.identity, origin.url_of("")): origin for origin in self.origins.values()
        }
        self.is_one_directory = len(self._roots) == 1

    def listing(self, role: Role) -> dict[str, str] | None:
        """As :func:`stored_listing` of one directory."""
        return stored_listing(self.cache, self.origins[role])

    def stored(
        self, listings: Mapping[Role, Mapping[str, str] | None]
    ) -> dict[Role, dict[str, int]]:
        """As :meth:`Cache.stored_densities`."""
        return self.cache.stored_densities(
            self._stored_as, {role: (self.origins[role], names) for role, names in listings.items()}
        )

    def store_of(self, row: Row) -> tuple[Origin, str] | None:
        """Origin and name of the config's store that an entry comes from; None if it is another's."""
        endpoint, url = origin_and_url(row)
        for (identity, root), origin in self._roots.items():
            if endpoint == identity and url.startswith(root):
                # The URL of an object goes on below its store.
                store = (
                    url[len(root) :] if row.tier == "array" else url[len(root) :].partition("/")[0]
                )
                if stem_of(store) in self.known:
                    return origin, store
        return None

    def is_directory(self, row: Row) -> bool:
        """Whether an entry is the stored listing of one of the two directories."""
        return is_listing(row) and origin_and_url(row) in self._roots

    def stale(
        self, rows: Sequence[Row], progress: Callable[[int], object] | None = None
    ) -> list[Row]:
        """Of these entries, those of the array tier that do not hold what the origin lists now. One
        LIST each.

        Raises
        ------
        OriginError
            The origin cannot be asked. A store that is gone there is stale.
        """
        asked = [
            row
            for row in rows
            if row.tier == "array" and not is_listing(row) and self.store_of(row) is not None
        ]

        def is_stale(row: Row) -> bool:
            found = self.store_of(row)
            header = stored_header(self.index, row.digest)
            assert found is not None
            origin, store = found
            if header is None:
                return False  # gone meanwhile, or damaged: not what was asked
            try:
                return (
                    source_digest(list_array(origin, store, header.key.source_array))
                    != header.source
                )
            except (OriginNotFoundError, SchemaError):
                return True

        found = []
        with closing(concurrently(is_stale, asked)) as answers:
            for done, (row, stale) in enumerate(zip(asked, answers, strict=True), start=1):
                if stale:
                    found.append(row)
                if progress is not None:
                    progress(done)
        return found


def stored_listing(cache: Cache, origin: Origin) -> dict[str, str] | None:
    """What a directory held when it was last listed, ``{task_id: name}``; None if it never was."""
    names = cache.stored_listing(origin, "")
    return names if isinstance(names, dict) else None


def concurrently(ask: Callable[[T], R], items: Sequence[T]) -> Generator[R]:
    """``ask(item)`` of each, in order, many at a time. Close it: what is not asked by then will not
    be (an error, Ctrl-C).
    """
    with ThreadPoolExecutor(LISTERS) as pool:
        try:
            yield from pool.map(ask, items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def origin_and_url(row: Row) -> tuple[str, str]:
    """Where an entry comes from: the endpoint, and the URL of its store (array tier) or object
    (byte tier).
    """
    fields = f"{row.note}\n\n".split("\n")  # a planted row may have too few
    return (fields[0], fields[1]) if row.tier == "array" else (fields[1], fields[2])


def is_listing(row: Row) -> bool:
    """Whether an entry is a stored listing, which lies in the array tier under the name of no
    array.
    """
    return row.tier == "array" and row.note.endswith("\n")


def stored_header(index: Index, digest: str) -> EntryHeader | None:
    """What an entry of the array tier says of itself; None if it is not there or cannot be read.
    The payload is not read.
    """
    try:
        stored = index.lookup(digest)
        header = read_header(index.dir.root / stored.filename) if stored is not None else None
    except (*CACHE_FAULTS, CorruptEntryError):
        return None
    return header if header is not None and header.key.digest == digest else None


def cache_of(config: DataConfig | CacheConfig) -> CacheConfig:
    """The cache block.

    Raises
    ------
    ConfigError
        There is none, or the config reads files that no cache keeps.
    """
    if isinstance(config, CacheConfig):
        return config
    if config.dataset_name == "chgcar_data":
        raise ConfigError(
            "dataset_name is chgcar_data: files that are not converted are not cached. Run "
            "zarrcache convert, then set dataset_name: zarr_s3_data "
            "and the directories of the stores."
        )
    if config.cache is None:
        raise ConfigError(
            "the config has no cache block, so there is nothing to fill or to look at. Add one, as "
            "in configs/s3_cached.yaml."
        )
    return config.cache


def cache_at(directory: Path) -> CacheConfig:
    """Settings for looking at the cache in ``directory``, whose own settings are not known."""
    directory = Path(directory).expanduser().absolute()
    root = CacheDir(directory).root
    try:
        # a directory of several users has to stay one, or their files are refused
        shared = bool(root.stat().st_mode & 0o020)
    except OSError:
        shared = False
    # By model_copy: the directory was given by hand, so ZARRCACHE_DIR does not override it. A cache
    # on a network file system may be looked at.
    return CacheConfig(dir=directory, shared=shared, allow_network_fs=True).model_copy(
        update={"dir": directory}
    )


def open_index(config: CacheConfig) -> Index:
    """The index of a cache; its directory is made if it is not there.

    Raises
    ------
    ConfigError
        The directory cannot be used. A training run would go on without a cache; who was told to
        fill one must not.
    """
    index = Index(config)
    try:
        index.open()
    except ConfigError:
        raise
    except CACHE_FAULTS as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ConfigError(
            f"cache.dir {config.dir} cannot be used ({why}). Choose a directory on this node's own "
            "disk that you may write."
        ) from exc
    return index


def existing_index(config: CacheConfig) -> Index | None:
    """As :func:`open_index`; None, and nothing is made, where there is no cache."""
    return open_index(config) if CacheDir(config.dir, config.shared).root.is_dir() else None
