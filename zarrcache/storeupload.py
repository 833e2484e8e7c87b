"""Upload stores to S3. Chunks first, the documents that make a store visible last: a reader finds all of it or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from fsspec.asyn import get_loop

from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.engine_s3fs import S3fsEngine
from zarrcache.errors import OriginAccessError, OriginError, OriginUnavailableError
from zarrcache.faults import Asked, S3Fault, to_error
from zarrcache.keys import ObjectInfo
from zarrcache.pump import Received, pump
from zarrcache.retry import RetryPolicy, TransientError
from zarrcache.s3options import S3Options, split_s3_url
from zarrcache.storewriter import StoreExistsError, is_document

__all__ = ["S3Destination", "upload_store"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONCURRENCY = 32  # PUTs of one store in flight; several processes write at once
SLOWEST_BYTES_PER_S = 16 * 1024
ROOT_DOCUMENTS = (".zgroup", "zarr.json")


class _Writer(S3fsEngine):
    """The s3fs engine, which reads, with the two requests that write. Retries nothing."""

    def put_many(self, bodies: Mapping[str, bytes], keys: Collection[str]) -> Iterator[tuple[ObjectInfo, Received | S3Fault | None]]:
        """One PUT for each of ``keys``; see ``pump``."""

        async def put(obj: ObjectInfo) -> Received:
            body = bodies[obj.key]
            try:
                async with asyncio.timeout(self._fetch.read_timeout + len(body) / SLOWEST_BYTES_PER_S):
                    answer = await self._call("put_object", Key=obj.key, Body=body)
            except TimeoutError as exc:
                raise S3Fault(None, "Timeout", "the server did not take the object in time") from exc
            return Received(b"", answer.get("ETag", ""))

        return pump(get_loop(), put, [ObjectInfo(key, len(bodies[key]), "") for key in keys], CONCURRENCY)

    def delete_many(self, keys: Collection[str]) -> Iterator[tuple[ObjectInfo, Received | S3Fault | None]]:
        """One DELETE for each of ``keys``. Not DeleteObjects, which answers 200 for keys that it could not delete, and which not every server has."""

        async def delete(obj: ObjectInfo) -> Received:
            await self._call("delete_object", Key=obj.key)
            return Received(b"", "")

        return pump(get_loop(), delete, [ObjectInfo(key, 0, "") for key in keys], CONCURRENCY)


class S3Destination:
    """A prefix on S3 that stores are written to. One object belongs to one process; making it costs no request.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``.
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.
    retry : RetryConfig
    """

    def __init__(self, url: str, s3_kwargs: Mapping[str, Any] | None = None, *, retry: RetryConfig | None = None) -> None:
        self.url = url.rstrip("/")
        self._bucket, self._prefix = split_s3_url(self.url)
        self._options = S3Options.of(s3_kwargs)
        self._retry = retry or RetryConfig()
        self._engine = _Writer(self._bucket, self._options, FetchConfig(concurrency=CONCURRENCY))

    def names(self) -> set[str]:
        """Names directly below the prefix, those of unfinished stores too. The first request shows whether bucket and credentials are right.

        Raises
        ------
        OriginError
            No such bucket, no access, no answer.
        """
        below = f"{self._prefix}/" if self._prefix else ""
        found: set[str] = set()
        token: str | None = None
        while True:
            page = self._once(self.url, lambda token=token: self._engine.list_page(below, delimiter="/", token=token))  # type: ignore[misc]
            found.update(key.removeprefix(below).rstrip("/") for key in (*page.prefixes, *(obj.key for obj in page.objects)))
            if (token := page.next_token) is None:
                return found - {""}

    def exists(self, name: str) -> bool:
        """Whether a whole store, ``mp-1.zarr`` or ``mp-1.zarr.zip``, is there."""
        keys = [self._key(name)] if name.endswith(".zip") else [f"{self._key(name)}/{document}" for document in ROOT_DOCUMENTS]
        return any(self._once(f"{self.url}/{name}", lambda key=key: self._engine.head(key)) is not None for key in keys)  # type: ignore[misc]

    def upload(self, name: str, objects: Mapping[str, bytes], *, overwrite: bool = False) -> int:
        """Write one store, whole or not at all.

        Parameters
        ----------
        name : str
            ``mp-1.zarr``, or ``mp-1.zarr.zip`` with a single object whose key is empty.
        objects : mapping
            Key below the store to bytes, in the order to publish them.
        overwrite : bool
            Take an old store away first: its documents before its chunks, so that nobody reads a mixture.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        StoreExistsError
            It is there, and ``overwrite`` is False.
        OriginError
            S3 did not take it; what was uploaded is removed again, as far as the server lets us.
        """
        url = f"{self.url}/{name}"
        if not overwrite and self.exists(name):
            raise StoreExistsError(f"{url} is there already. Overwrite it on purpose (--overwrite) or choose another destination.")
        bodies = {f"{self._key(name)}/{key}" if key else self._key(name): body for key, body in objects.items()}
        if name.endswith(".zip"):
            self._all(url, bodies, self._engine.put_many)  # one PUT replaces an object at once: there is nothing to take away before or after
            return sum(map(len, bodies.values()))
        chunks = [key for key in bodies if not is_document(key)]
        documents = [key for key in bodies if is_document(key)]
        touched = False
        try:
            # What is below the store without belonging to it: the old store, or the chunks that a killed process left.
            old = self._list(name)
            for keys in (sorted(filter(is_document, old), key=lambda key: key.count("/")), [key for key in old if not is_document(key)]):
                self._all(url, dict.fromkeys(keys, b""), lambda _, keys: self._engine.delete_many(keys))
                touched = touched or bool(keys)
            touched = True
            self._all(url, {key: bodies[key] for key in chunks}, self._engine.put_many)
            for key in documents:  # one after the other: the order is the point
                self._all(url, {key: bodies[key]}, self._engine.put_many)
        except BaseException:  # KeyboardInterrupt and SystemExit too
            if touched:
                self._take_back(name)
            raise
        return sum(map(len, bodies.values()))

    def _take_back(self, name: str) -> None:
        url = f"{self.url}/{name}"
        try:
            keys = self._list(name)
            for part in (list(filter(is_document, keys)), [key for key in keys if not is_document(key)]):
                self._all(url, dict.fromkeys(part, b""), lambda _, keys: self._engine.delete_many(keys), RetryConfig(attempts=2, timeout=5))
        except OriginError as exc:
            logger.warning("objects of an unfinished store stay behind, the next conversion of it removes them: %s (%s)", url, exc)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _list(self, name: str) -> list[str]:
        keys: list[str] = []
        token: str | None = None
        while True:
            page = self._once(f"{self.url}/{name}", lambda token=token: self._engine.list_page(f"{self._key(name)}/", token=token))  # type: ignore[misc]
            keys += [obj.key for obj in page.objects]
            if (token := page.next_token) is None:
                return keys

    def _once(self, url: str, request: Callable[[], T]) -> T:
        """One request under the retry policy."""

        def attempt() -> T:
            try:
                return request()
            except S3Fault as fault:
                raise self._error(fault, url) from fault

        try:
            return RetryPolicy(self._retry, url).call(attempt)
        except OriginUnavailableError as exc:
            raise _unavailable(url, exc) from exc.__cause__

    def _all(
        self,
        url: str,
        bodies: Mapping[str, bytes],
        send: Callable[[Mapping[str, bytes], Collection[str]], Iterator[tuple[ObjectInfo, Received | S3Fault | None]]],
        retry: RetryConfig | None = None,
    ) -> None:
        """Send a request for every key, in passes over what is still missing."""
        missing = list(bodies)
        if not missing:
            return
        policy = RetryPolicy(retry or self._retry, url)
        try:
            for attempt in policy:
                missing, failure = self._one_pass(url, policy, send(bodies, missing))
                if failure is None:
                    break
                with attempt:
                    raise failure
        except OriginUnavailableError as exc:
            raise _unavailable(url, exc) from exc.__cause__

    def _one_pass(
        self, url: str, policy: RetryPolicy, answers: Iterator[tuple[ObjectInfo, Received | S3Fault | None]]
    ) -> tuple[list[str], Exception | None]:
        failed: list[str] = []
        failure: Exception | None = None
        for obj, answer in answers:
            if isinstance(answer, Received):
                policy.progress()
                continue
            failed.append(obj.key)
            if answer is not None:
                failure = self._error(answer, url)
                if not isinstance(failure, TransientError):
                    raise failure
        return failed, failure

    def _error(self, fault: S3Fault, url: str) -> Exception:
        error = to_error(fault, Asked(url, self._bucket, self._options.identity, anon=self._options.anon))
        if isinstance(error, OriginAccessError) and (fault.code == "AccessDenied" or fault.status in (401, 403)):
            refused = OriginAccessError(
                f"{url}: writing was refused: {fault}. Converting needs s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject "
                f"on bucket {self._bucket!r}. Set other credentials (key and secret, or profile)."
            )
            refused.__cause__ = error.__cause__
            return refused
        return error


def _unavailable(url: str, exc: OriginUnavailableError) -> OriginUnavailableError:
    return OriginUnavailableError(
        f"{url} could not be written: {exc.__cause__ or exc}. Check that the server runs and is reachable, then convert again: finished stores are skipped."
    )


def upload_store(url: str, objects: Mapping[str, bytes], *, s3_kwargs: Mapping[str, Any] | None = None, overwrite: bool = False) -> int:
    """Write one store to ``url``; see ``S3Destination.upload``."""
    directory, _, name = url.rstrip("/").rpartition("/")
    return S3Destination(directory, s3_kwargs).upload(name, objects, overwrite=overwrite)
