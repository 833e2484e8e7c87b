"""Upload stores to S3 so that a reader finds a complete store or none.

Chunks are uploaded first, and the documents that make a store visible last. Each object is checked
after its upload: the ETag of the answer is the MD5 of what was sent, or the object is read back and
compared (SSE-KMS, and servers whose ETags are not MD5s).
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from fsspec.asyn import get_loop

from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.convert.provenance import Existing, examine, examine_zip
from zarrcache.convert.writer import StoreExistsError, is_document
from zarrcache.errors import OriginError
from zarrcache.origin import ObjectInfo, Received, S3Bucket, altered, split_s3_url

__all__ = ["S3Destination"]

logger = logging.getLogger(__name__)

CONCURRENCY = 32  # PUTs of one store in flight; several processes write at the same time
#: Seconds for requests in flight to end after Ctrl-C or an error, before their objects are removed.
_SETTLE_S = 5.0
_CLEAN_UP_RETRY = RetryConfig(attempts=2, timeout=5)
ROOT_DOCUMENTS = (".zgroup", "zarr.json")
#: Bytes at the end of a zip file that hold its directory and the documents of its group.
_TAIL_BYTES = 1024**2


class S3Destination:
    """A prefix on S3 for writing stores. One object per process; creating it sends no request.

    Stores are written through obstore if possible. The planning process, which starts the others,
    lists names and finished stores through s3fs, so that a later fork may use obstore.
    """

    def __init__(
        self,
        url: str,
        s3_kwargs: Mapping[str, Any] | None = None,
        *,
        retry: RetryConfig | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        name, self._prefix = split_s3_url(self.url)
        self._bucket = S3Bucket(
            name,
            s3_kwargs,
            fetch=FetchConfig(concurrency=CONCURRENCY),
            retry=retry or RetryConfig(),
            writes=True,
        )
        self._in_flight: set[asyncio.Task[Received]] = set()

    def names(self) -> set[str]:
        """Names directly below the prefix, including unfinished stores.

        The first request shows whether bucket and credentials are right.
        """
        below = f"{self._prefix}/" if self._prefix else ""
        found: set[str] = set()
        for page in self._bucket.pages(below, self._bucket.context(self.url), delimiter="/"):
            for key in (*page.prefixes, *(obj.key for obj in page.objects)):
                found.add(key.removeprefix(below).rstrip("/"))
        return found - {""}

    def finished(
        self, names: Collection[str], open_engine: Callable[[], Any] | None = None
    ) -> set[str]:
        """The ``names`` (``mp-1.zarr`` or ``mp-1.zarr.zip``) that exist and are complete.

        One HEAD each; two for a store that is unfinished or of Zarr format 3.
        """
        found: set[str] = set()
        zips = {name for name in names if name.endswith(".zip")}
        trees = set(names) - zips
        for document, stores in (("", zips), *((f"/{name}", trees) for name in ROOT_DOCUMENTS)):
            name_of = {self._key(name) + document: name for name in stores - found}
            answers = self._bucket.call_all(
                _head,
                [ObjectInfo(key, 0, "") for key in name_of],
                lambda _: self._bucket.context(self.url),
                open_engine=open_engine or self._bucket.s3fs,
            )
            found.update(name_of[key] for key, answer in answers.items() if answer.etag)
        return found

    def examine(self, name: str) -> Existing:
        """Whether a store is complete, and what it was made from. One LIST and one GET."""
        root = self._key(name)
        context = self._bucket.context(f"{self.url}/{name}")
        if name.endswith(".zip"):
            listed = self._bucket.list_objects(root, context)
            (found,) = (obj for obj in listed if obj.key == root)
            tail = self._read(found, context, max(0, found.size_bytes - _TAIL_BYTES))
            return examine_zip(io.BytesIO(tail))
        objects = {
            obj.key.removeprefix(f"{root}/"): obj
            for obj in self._bucket.list_objects(f"{root}/", context)
        }
        return examine(
            {key: obj.size_bytes for key, obj in objects.items()},
            lambda key: self._read(objects[key], context),
        )

    def _read(self, found: ObjectInfo, context: Any, start: int = 0) -> bytes:
        """GET an object, or its end, through s3fs: the planning process may be forked later."""
        part = (start, found.size_bytes) if start else None
        answers = self._bucket.call_all(
            lambda engine, obj, s: engine.get(obj, part, patience_s=s),
            [found],
            lambda _: context,
            open_engine=self._bucket.s3fs,
        )
        return bytes(answers[found.key].body)

    def upload(self, name: str, objects: Mapping[str, bytes], *, overwrite: bool = False) -> int:
        """Write one store, completely or not at all. Returns the bytes written.

        ``objects`` are those of `encode_store`, in the order in which to publish them; a zip file
        has one whose key is empty. With ``overwrite`` an old store is removed first: its documents
        before its chunks, so that no reader gets a mixture. After an error the uploaded objects are
        removed again, if the server allows.

        Raises
        ------
        StoreExistsError
            The store exists, and ``overwrite`` is False.
        OriginError
            S3 did not accept an object, or stored other bytes.
        """
        root = self._key(name)
        if not overwrite and self.finished([name], lambda: self._bucket.engine(root)):
            raise StoreExistsError(
                f"{self.url}/{name} exists already. Overwrite it (--overwrite) or choose another "
                "destination."
            )
        bodies = {f"{root}/{key}" if key else root: body for key, body in objects.items()}
        if name.endswith(".zip"):
            self._put(name, bodies)  # one PUT replaces an object atomically
            return sum(map(len, bodies.values()))
        has_changed = False
        try:
            # The old store, or chunks that a killed process left behind.
            old = self._list(name)
            has_changed = bool(old)
            self._delete(name, old)
            has_changed = True
            self._put(name, {key: body for key, body in bodies.items() if not is_document(key)})
            for key in filter(is_document, bodies):
                self._put(name, {key: bodies[key]})  # one by one: the last makes the store visible
        except BaseException:  # KeyboardInterrupt and SystemExit too
            if has_changed:
                self._remove_unfinished(name)
            raise
        return sum(map(len, bodies.values()))

    def _remove_unfinished(self, name: str) -> None:
        try:
            self._settle()
            # Repeat until nothing is listed: a PUT without an answer may still take effect.
            for _ in range(5):
                keys = self._list(name)
                if not keys:
                    break
                self._delete(name, keys, _CLEAN_UP_RETRY)
        except OriginError as exc:
            logger.warning(
                "objects of an unfinished store are left; its next conversion removes them: %s "
                "(%s)",
                f"{self.url}/{name}",
                exc,
            )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _list(self, name: str) -> list[str]:
        found = self._bucket.list_objects(
            f"{self._key(name)}/", self._bucket.context(f"{self.url}/{name}")
        )
        return [obj.key for obj in found]

    def _put(self, name: str, bodies: Mapping[str, bytes]) -> None:
        """Make one PUT per object, repeated until all are written as they were sent.

        An object that is stored with other bytes in the end is removed.
        """
        wrong: set[str] = set()

        async def put(engine: Any, obj: ObjectInfo, patience_s: float) -> Received:
            body = bodies[obj.key]
            answer = await self._shielded(engine.put(obj.key, body, patience_s=patience_s))
            if answer.etag.strip('"') != hashlib.md5(body, usedforsecurity=False).hexdigest():
                stored = await engine.get(ObjectInfo(obj.key, len(body), ""), patience_s=patience_s)
                if stored.body != body:
                    wrong.add(obj.key)
                    raise altered(obj.key, len(body), len(stored.body))
            wrong.discard(obj.key)
            return answer

        try:
            self._bucket.call_all(
                put,
                [ObjectInfo(key, len(body), "") for key, body in bodies.items()],
                lambda _: self._bucket.context(f"{self.url}/{name}"),
                open_engine=lambda: self._bucket.engine(*bodies),
            )
        except OriginError:
            if wrong:
                self._delete(name, wrong, _CLEAN_UP_RETRY)
            raise

    def _delete(self, name: str, keys: Collection[str], retry: RetryConfig | None = None) -> None:
        """Make one DELETE per object, documents before chunks and those nearest the root first.

        Through s3fs: obstore sends DeleteObjects.
        """
        documents = sorted(filter(is_document, keys), key=lambda key: key.count("/"))
        for part in (documents, [key for key in keys if not is_document(key)]):
            self._bucket.call_all(
                lambda engine, obj, s: engine.delete(obj.key, patience_s=s),
                [ObjectInfo(key, 0, "") for key in part],
                lambda _: self._bucket.context(f"{self.url}/{name}"),
                open_engine=self._bucket.s3fs,
                retry=retry,
            )

    async def _shielded(self, request: Coroutine[Any, Any, Received]) -> Received:
        """Result of a PUT, which is not cancelled with the upload.

        The server might accept a cancelled PUT after the clean-up has listed what to remove.
        """
        task = asyncio.get_running_loop().create_task(request)
        self._in_flight.add(task)
        task.add_done_callback(self._has_ended)
        return await asyncio.shield(task)

    def _has_ended(self, task: asyncio.Task[Received]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would log it if the upload was stopped

    def _settle(self) -> None:
        """Wait for the PUTs that are in flight, at most ``_SETTLE_S`` seconds."""

        async def settle() -> None:
            if self._in_flight:
                await asyncio.wait(self._in_flight, timeout=_SETTLE_S)

        asyncio.run_coroutine_threadsafe(settle(), get_loop()).result()


async def _head(engine: Any, obj: ObjectInfo, patience_s: float) -> Received:
    """Make one HEAD; the ETag of an object that does not exist is empty."""
    found = await engine.head(obj.key, patience_s=patience_s)
    return Received(b"", found.etag if found is not None else "")
