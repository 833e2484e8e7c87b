"""Open the Zarr stores of an origin through the byte tier: for metadata, crops, other arrays."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from typing import Any

import zarr
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)

from zarrcache._keys import ObjectInfo, cached_property, source_digest
from zarrcache.arrays import (
    OriginArray,
    StoreAttributes,
    ZippedStore,
    check_sizes,
    is_chunk_of_nothing,
    is_file,
    objects_of,
)
from zarrcache.cache.cache import Cache
from zarrcache.cache.cached_origin import CachedOrigin
from zarrcache.cache.chunk_checksums import ChunkChecksums
from zarrcache.config import CacheConfig
from zarrcache.errors import (
    ConfigError,
    IncompleteArrayError,
    OriginError,
    OriginNotFoundError,
    SchemaError,
    ZarrCacheError,
)
from zarrcache.origin import Origin
from zarrcache.stats import Counters

__all__ = ["CachedStore", "group_of", "open_group", "open_store", "store_at"]

_ROOT_DOCUMENTS = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata", ".zarray")


class CachedStore(Store):
    """A read-only zarr store over one store of an origin, through the byte tier.

    The listing decides what exists, never a failed read, because zarr silently uses the fill value
    for a missing chunk. An object that is listed and cannot be read raises another error.

    Parameters
    ----------
    origin : Origin
    name : str
        The store below the origin, for example ``mp-1.zarr``.
    cache : Cache
        With ``revalidate: never`` the stored listing is used, if there is one.
    relist : bool
        Do not use the stored listing.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, origin: Origin, name: str, cache: Cache, *, relist: bool = False) -> None:
        super().__init__(read_only=True)
        self.origin, self.name, self.cache = origin, name, cache
        is_trusted = cache.config is not None and cache.config.revalidate == "never"
        self._through = CachedOrigin(origin, cache, relist=relist or not is_trusted)
        self._listing = threading.Lock()
        self._was_there = False
        #: Attributes that are served without a request (:meth:`know_attributes`).
        self.known: StoreAttributes | None = None
        #: What readers have taken: the source of the density, and those of the attributes.
        self.density_source: str | None = None
        self.attribute_sources: Collection[str] | None = None
        self._documents: dict[str, bytes | None] = {}
        self._sizes: dict[str, int] | None = None
        #: The listing, once there is one.
        self.listed: list[ObjectInfo] | None = None
        self._objects: dict[str, ObjectInfo] = {}
        self._by_array: dict[str, ChunkChecksums | None] = {}
        self._checksums: dict[str, ChunkChecksums | None] = {}  # by directory of the chunks
        self._zipped: ZippedStore | None = None

    @property
    def url(self) -> str:
        """Full URL or path of the store."""
        return self.origin.url_of(self.name)

    def know_attributes(self, stored: StoreAttributes) -> None:
        """Serve the documents of the root group from these attributes, without a request.

        The group then opens without consolidated metadata. Arrays are read as before.
        """
        self.known = stored
        attributes, zarr_format = stored.attributes, stored.zarr_format
        group: dict[str, object] = {"zarr_format": zarr_format}
        documents: dict[str, dict[str, object] | None] = dict.fromkeys(_ROOT_DOCUMENTS)
        if zarr_format == 3:
            documents["zarr.json"] = group | {"node_type": "group", "attributes": attributes}
        else:
            documents |= {".zgroup": group, ".zattrs": attributes}
        self._documents = {
            key: None if document is None else json.dumps(document).encode()
            for key, document in documents.items()
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CachedStore) and (self.origin.identity, self.url) == (
            other.origin.identity,
            other.url,
        )

    def __hash__(self) -> int:
        return hash((self.origin.identity, self.url))

    def __repr__(self) -> str:
        return f"CachedStore({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "name": self.name,
            "cache": self.cache,
            "was_there": self._was_there or bool(self._sizes),
            "known": self.known,
            "taken": (self.density_source, self.attribute_sources),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["origin"], state["name"], state["cache"])  # type: ignore[misc]
        self._was_there = state["was_there"]
        self.density_source, self.attribute_sources = state["taken"]
        if state["known"] is not None:
            self.know_attributes(state["known"])

    def with_read_only(self, read_only: bool = False) -> CachedStore:
        if not read_only:
            super().with_read_only(read_only)  # raises zarr's NotImplementedError
        return type(self)(self.origin, self.name, self.cache)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(
            await asyncio.gather(
                *(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)
            )
        )

    async def exists(self, key: str) -> bool:
        if key in self._documents:
            return self._documents[key] is not None
        return key in await asyncio.to_thread(self._listed)

    async def getsize(self, key: str) -> int:
        sizes = await asyncio.to_thread(self._listed)
        if key not in sizes:
            raise FileNotFoundError(f"{self.url}/{key}")
        return sizes[key]

    async def list(self) -> AsyncIterator[str]:
        for key in await asyncio.to_thread(self._listed):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await asyncio.to_thread(self._listed):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        base = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        names = {
            key[len(base) :].split("/")[0]: None
            for key in await asyncio.to_thread(self._listed)
            if key.startswith(base)
        }
        for name in names:
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        raise self._read_only_error()

    async def delete(self, key: str) -> None:
        raise self._read_only_error()

    def _read_only_error(self) -> ValueError:
        return ValueError(
            f"{self.url}: store was opened in read-only mode and does not support writing. Write "
            "to it with zarr directly."
        )

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        if key in self._documents:
            document = self._documents[key]
            if document is None:
                return None
            start, stop = _bounds(byte_range, len(document))
            return document[start:stop]
        sizes = self._listed()
        size = sizes.get(key)
        if size is None:
            if is_chunk_of_nothing(key, sizes):
                raise IncompleteArrayError(
                    f"{self.url} was deleted or replaced after it was opened: it has no metadata "
                    f"of the array of {key}. Open it again when it is back."
                )
            return None
        start, stop = _bounds(byte_range, size)
        if self._zipped is not None:
            return self._zipped.read(key)[start:stop]
        return self.read(self._objects[key], start, stop)

    def read(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of one of :meth:`objects`.

        Raises
        ------
        IncompleteArrayError
            It is gone or was changed. Its stored listing is dropped.
        OriginError
        """
        try:
            return self._object(obj, start, stop)
        except OriginNotFoundError as exc:
            # The bucket is gone. As a FileNotFoundError this would look like a missing chunk.
            raise IncompleteArrayError(
                f"{self.origin.url_of(obj.key)} is listed ({obj.size_bytes} bytes) but is gone: "
                f"{exc}"
            ) from exc

    def _object(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of an object, read again if they contradict a checksum of its chunks."""
        check_sizes([stop - start], self.origin.url_of(obj.key))
        data = self._fetched(obj, start, stop)
        parent, _, name = obj.key.rpartition("/")
        if name == "zarr.json":
            self._by_array[parent] = ChunkChecksums.of(data)
            return data
        checks = self._checksums_of(obj.key)
        if checks is None or checks.is_intact(obj.key, data, start, obj.size_bytes):
            return data
        # Either the copy in the byte tier is bad, or the object at the origin.
        self._through.purge(obj, start, stop, "it contradicts a checksum (crc32c) of its chunks")
        data = self._fetched(obj, start, stop)
        if not checks.is_intact(obj.key, data, start, obj.size_bytes):
            raise IncompleteArrayError(
                f"{self.origin.url_of(obj.key)} contradicts the checksum (crc32c) of its chunk or "
                "shard index, in two readings. The store is damaged: write it again."
            )
        return data

    def _checksums_of(self, key: str) -> ChunkChecksums | None:
        """Checksums in the chunks of the array that an object belongs to, if it is of Zarr v3."""
        directory = key.rpartition("/")[0]
        if directory not in self._checksums:
            parent = directory
            while len(parent) > len(self.name) and self._document(parent) is None:
                parent = parent.rpartition("/")[0]
            document = self._document(parent)
            if parent not in self._by_array:
                self._by_array[parent] = (
                    None
                    if document is None
                    else ChunkChecksums.of(self._fetched(document, 0, document.size_bytes))
                )
            self._checksums[directory] = self._by_array[parent]
        return self._checksums[directory]

    def _document(self, parent: str) -> ObjectInfo | None:
        return self._objects.get(f"{parent}/zarr.json".removeprefix(f"{self.name}/"))

    def _fetched(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        if (start, stop) == (0, obj.size_bytes):
            ((_, data),) = self._through.fetch([obj])
            return bytes(data)
        return self._through.fetch_range(obj, start, stop)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every key; empty if the store does not exist.

        One LIST at first use, or the stored listing.

        Raises
        ------
        OriginNotFoundError
            There is no such bucket or directory.
        IncompleteArrayError
            The store was there when it was opened, in the process that pickled it.
        OriginError
        """
        if self._sizes is None:
            with self._listing:  # zarr calls from several threads at once
                if self._sizes is None:
                    self._sizes = self._open_listing()
        return self._sizes

    def _listed(self) -> dict[str, int]:
        """`sizes`, for zarr: it takes a FileNotFoundError for an object that was never written."""
        try:
            return self.sizes()
        except OriginNotFoundError as exc:
            raise OriginError(str(exc)) from exc

    def objects(self) -> dict[str, ObjectInfo]:
        """Listed objects by key below the store; empty for a zip file."""
        self.sizes()
        return self._objects

    @cached_property
    def version(self) -> str:
        """Digest of the listing. One LIST at first use, or the stored listing."""
        return source_digest(self.objects().values())

    def _open_listing(self) -> dict[str, int]:
        zipped = self.name.endswith(".zip")
        prefix = self.name if zipped else f"{self.name}/"
        try:
            listed = self._through.list_objects(prefix)
        except OriginNotFoundError:
            if not self._was_there:
                raise
            listed = []
        # If the store has vanished since, an open array would read as its fill value.
        if self._was_there and not listed:
            raise IncompleteArrayError(
                f"{self.url} was deleted after it was opened. Open it again when it is back."
            )
        if self.known is not None and not self._is_of(self.known, listed):
            raise IncompleteArrayError(
                f"{self.url} has changed since its density was cached, so its attributes are of "
                "another version than its arrays. Run `zarrcache warm --revalidate`, and open it "
                "again."
            )
        self.listed = listed
        if zipped and listed:
            self._zipped = ZippedStore(self._object(listed[0], 0, listed[0].size_bytes), self.url)
            return self._zipped.sizes
        self._objects = {o.key.removeprefix(prefix): o for o in listed}
        return {key: o.size_bytes for key, o in self._objects.items()}

    def _is_of(self, known: StoreAttributes, listed: Collection[ObjectInfo]) -> bool:
        """Whether attributes belong to an array of a listing."""
        names = {obj.key.removeprefix(f"{self.name}/").partition("/")[0] for obj in listed}
        arrays = (OriginArray(self.origin, self.name, name) for name in names)
        return any(source_digest(objects_of(one, listed)) in known.sources for one in arrays)


def _bounds(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    match byte_range:
        case None:
            return 0, size
        case RangeByteRequest(start, end):
            return min(start, size), min(end, size)
        case OffsetByteRequest(offset):
            return min(offset, size), size
        case SuffixByteRequest(suffix):
            return max(size - suffix, 0), size
    raise TypeError(f"Unexpected byte_range, got {byte_range!r}.")


def open_store(
    url: str | os.PathLike[str],
    *,
    s3_kwargs: Mapping[str, Any] | None = None,
    cache: CacheConfig | Mapping[str, Any] | None = None,
) -> CachedStore:
    """A read-only zarr store over ``url``, through the byte tier.

    >>> store = zarrcache.open_store("s3://bucket/mp-1.zarr", cache={"dir": "/scratch/me"})
    >>> group = zarr.open_group(store, mode="r")

    Parameters
    ----------
    url : str or path
        A Zarr store, directory or ``.zip``: ``s3://…`` or local.
    s3_kwargs : mapping, optional
        As s3fs takes them.
    cache : CacheConfig or mapping, optional
        None: no cache.

    Raises
    ------
    ConfigError
        The URL names no store, or the settings are invalid.
    SchemaError
        It is a file of VASP or the Materials Project.
    """
    config = CacheConfig.of(cache) if cache is not None else None
    return store_at(url, Cache(config, Counters()), s3_kwargs)


def store_at(
    url: str | os.PathLike[str], cache: Cache, s3_kwargs: Mapping[str, Any] | None = None
) -> CachedStore:
    """Like :func:`open_store`, through an open cache."""
    parent, _, name = _clean(url).rpartition("/")
    if not name or parent.endswith("/"):  # "/" or s3://bucket
        raise ConfigError(
            f"{os.fspath(url)!r} names no store. Write s3://bucket/prefix/mp-1.zarr or a path such "
            "as /data/mp-1.zarr."
        )
    if is_file(name):
        raise SchemaError(
            f"{os.fspath(url)} is not a Zarr store but a file of VASP or the Materials Project. "
            "Read it with reader.load(task_id, role), or convert it: zarrcache convert."
        )
    return CachedStore(cache.origin(parent or "/", s3_kwargs), name, cache)


def open_group(
    url: str | os.PathLike[str],
    *,
    s3_kwargs: Mapping[str, Any] | None = None,
    cache: CacheConfig | Mapping[str, Any] | None = None,
) -> zarr.Group:
    """Open a Zarr group through the byte tier, read-only.

    Parameters
    ----------
    url, s3_kwargs, cache
        As :func:`open_store`.

    Raises
    ------
    ConfigError, SchemaError
        As :func:`open_store`; ``SchemaError`` also if zarr cannot open the store.
    OriginNotFoundError
        There is no such store, or it holds no group (a ``FileNotFoundError``).
    """
    return group_of(open_store(url, s3_kwargs=s3_kwargs, cache=cache))


def group_of(store: CachedStore) -> zarr.Group:
    """The root group of a store."""
    if store.known is None and not store.sizes():
        raise OriginNotFoundError(f"{store.url} does not exist or is empty.")
    try:
        return zarr.open_group(store, mode="r")
    except ZarrCacheError:
        raise
    except FileNotFoundError as exc:
        raise OriginNotFoundError(f"{store.url} holds no Zarr group ({exc}).") from exc
    except (ValueError, TypeError, LookupError, AttributeError) as exc:  # of its JSON documents
        raise SchemaError(
            f"{store.url} cannot be opened by zarr ({type(exc).__name__}: {exc}). Convert the "
            "store again."
        ) from exc


def _clean(url: str | os.PathLike[str]) -> str:
    text = os.fspath(url)
    return text.rstrip("/") if "://" in text else os.path.abspath(os.path.expanduser(text))
