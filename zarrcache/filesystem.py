"""The byte tier as an fsspec filesystem: ``zarrcache::s3://bucket/key``.

Registered through the ``fsspec.specs`` entry point, so that all code that takes an fsspec URL can
read through the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fsspec.implementations.chained import ChainedFileSystem
from fsspec.spec import AbstractBufferedFile

from zarrcache._keys import ObjectInfo, stem_of
from zarrcache.cache import Cache, CachedStore
from zarrcache.config import CacheConfig
from zarrcache.errors import ConfigError, OriginNotFoundError
from zarrcache.origin import Origin
from zarrcache.stats import Counters, Stats

__all__ = ["ZarrCacheFileSystem"]


class ZarrCacheFileSystem(ChainedFileSystem):  # type: ignore[misc]
    """Reads files of S3 or of a directory through the byte tier. Read-only.

    >>> url = "zarrcache::s3://bucket/mp-1.zarr"
    >>> options = {"s3": {"anon": True}, "zarrcache": {"dir": "/scratch/me"}}
    >>> fsspec.open(f"{url}/.zattrs", **options)
    >>> zarr.open_group(url, mode="r", storage_options=options)

    Paths inside a Zarr store are resolved by the store's listing: one LIST per store, and none if
    that listing is cached.

    Parameters
    ----------
    target_protocol : {"s3", "file"}
        Set by fsspec from the URL.
    target_options : mapping, optional
        ``s3_kwargs``.
    **settings
        Keys of the ``cache:`` block. Without ``dir``, ``ZARRCACHE_DIR`` must be set.

    Raises
    ------
    ConfigError
        Another protocol, or invalid settings.
    """

    protocol: ClassVar[str] = "zarrcache"
    cachable = True  # equal arguments share one instance, its listings and its connections

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        fo: str | None = None,
        **settings: Any,
    ) -> None:
        if target_protocol not in ("s3", "s3a", "file", "local"):
            raise ConfigError(
                f"zarrcache reads s3:// and files, not {target_protocol or 'nothing'}. Write "
                "zarrcache::s3://bucket/key."
            )
        # zarr passes it to every filesystem, and wraps one that is not asynchronous.
        settings.pop("asynchronous", None)
        super().__init__()
        self._is_s3 = target_protocol.startswith("s3")
        self._options = dict(target_options or {}) if self._is_s3 else None
        self._counters = Counters()
        self._cache = Cache(CacheConfig(**settings), self._counters)
        self._stores: dict[str, CachedStore] = {}

    @property
    def stats(self) -> Stats:
        """Counters of what this process has read."""
        return self._counters.snapshot()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return (
            [cls._strip_protocol(p) for p in path]
            if isinstance(path, list)
            else str(path).removeprefix("zarrcache://").rstrip("/")
        )

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List a directory; a file lists itself."""
        below = ("" if self._is_s3 else "/") + f"{path.strip('/')}/"
        found = {}
        for name, obj in self._children(path).items():
            found[below + name] = (
                {"name": below + name, "size": 0, "type": "directory"}
                if obj is None
                else _file_info(below + name, obj)
            )
        if not found:
            found[path] = self.info(path)
        return list(found.values()) if detail else list(found)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size in bytes, type and ETag.

        Raises
        ------
        FileNotFoundError
        """
        path = self._strip_protocol(path)
        if (found := self._find(path)) is not None:
            return _file_info(path, found[1])
        if self._children(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(f"{'s3://' if self._is_s3 else ''}{path} does not exist.")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Read a file or a range of it; negative positions count from the end.

        Raises
        ------
        FileNotFoundError
        """
        found = self._find(self._strip_protocol(path))
        if found is None:
            raise FileNotFoundError(
                f"{'s3://' if self._is_s3 else ''}{self._strip_protocol(path)} does not exist."
            )
        origin, obj = found
        first, last, _ = slice(start, end).indices(obj.size_bytes)
        tier = self._cache.bytes(origin)
        if tier is not None:
            return tier.read(obj, first, last)
        return origin.fetch_range(obj, first, last)

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any
    ) -> _File:
        if mode != "rb":
            raise ValueError(
                f"zarrcache::{path} is read-only. To write, open it with its own filesystem."
            )
        config = self._cache.config
        assert config is not None
        size = self.info(path)["size"]
        return _File(
            self,
            path,
            mode,
            block_size or config.bytes.block_size,
            cache_type="readahead",
            size=size,
        )

    def _find(self, path: str) -> tuple[Origin, ObjectInfo] | None:
        """Origin and listed object of a file; None if there is no such file."""
        store, key = self._store_of(path)
        if store is not None:
            obj = store.objects().get(key)
            return None if obj is None else (store.origin, obj)
        parent, _, name = path.rpartition("/")
        origin = self._origin(parent)
        listed = origin.list_objects(name) if name else []
        return (origin, listed[0]) if listed else None

    def _children(self, path: str) -> dict[str, ObjectInfo | None]:
        """Objects directly below a directory by name, None for subdirectories; ``{}`` if absent."""
        store, key = self._store_of(path)
        if store is not None:
            prefix = f"{key}/" if key else ""
            below = {
                name.removeprefix(prefix): obj
                for name, obj in store.objects().items()
                if name.startswith(prefix)
            }
            return {
                name.partition("/")[0]: None if "/" in name else obj for name, obj in below.items()
            }
        origin = self._origin(path)
        try:
            names = origin.list_names()
        except OriginNotFoundError:
            return {}
        # One LIST of this level only: there may be 100,000 stores below it. Names that are not
        # stores are looked up one by one.
        return {
            name: None if name.endswith(".zarr") else next(iter(origin.list_objects(name)), None)
            for name in names
        }

    def _store_of(self, path: str) -> tuple[CachedStore | None, str]:
        """The Zarr store (a directory ``*.zarr``) that contains a path, and the key in it."""
        parts = path.split("/")
        for i, part in enumerate(parts):
            if part.endswith(".zarr") and stem_of(part) is not None:
                root = "/".join(parts[: i + 1])
                if root not in self._stores:
                    self._stores[root] = CachedStore(
                        self._origin("/".join(parts[:i])), part, self._cache
                    )
                return self._stores[root], "/".join(parts[i + 1 :])
        return None, ""

    def _origin(self, directory: str) -> Origin:
        return self._cache.origin(
            f"s3://{directory}" if self._is_s3 else directory or "/", self._options
        )


class _File(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path, start, end)
        return data


def _file_info(name: str, obj: ObjectInfo) -> dict[str, Any]:
    return {
        "name": name,
        "size": obj.size_bytes,
        "type": "file",
        "ETag": obj.etag,
        "mtime": obj.modified_s,
    }
