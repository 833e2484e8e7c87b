"""Upload stores to S3. Chunks first, the documents that make a store visible last: a reader finds
all of it or none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from fsspec.asyn import get_loop

from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.convert.writer import StoreExistsError, is_document
from zarrcache.errors import OriginAccessError, OriginError, OriginUnavailableError
from zarrcache.origin import (
    SLOWEST_BYTES_PER_S,
    Received,
    RequestContext,
    RetryPolicy,
    S3Fault,
    S3fsEngine,
    S3Options,
    TransientError,
    pump,
    split_s3_url,
    to_error,
)

__all__ = ["S3Destination"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Answers = Iterator[tuple[ObjectInfo, Received | S3Fault | None]]

CONCURRENCY = 32  # PUTs of one store in flight; several processes write at once
#: After Ctrl-C or an error, what is on its way may take this long to arrive and be removed
#: (seconds).
_SETTLE_S = 5.0
ROOT_DOCUMENTS = (".zgroup", "zarr.json")


class _Writer(S3fsEngine):
    """The s3fs engine, which reads, with the requests that write. Retries nothing."""

    def __init__(self, bucket: str, options: S3Options, fetch: FetchConfig) -> None:
        super().__init__(bucket, options, fetch)
        self._puts: set[asyncio.Task[Any]] = set()

    def put_many(self, bodies: Mapping[str, bytes], *, patience_s: float) -> Answers:
        """One PUT for each key; see ``pump``. A silent server is given up after ``patience_s`` plus
        what a very slow line needs.
        """
        has_ended = False

        async def put(obj: ObjectInfo) -> Received:
            if has_ended:
                raise asyncio.CancelledError
            sent = self._call(
                "put_object",
                patience_s + obj.size_bytes / SLOWEST_BYTES_PER_S,
                Key=obj.key,
                Body=bodies[obj.key],
            )
            request = asyncio.get_running_loop().create_task(sent)
            self._puts.add(request)
            request.add_done_callback(self._landed)
            # What has been sent is not cancelled with the rest: the server may take it all the
            # same, after we have looked for what to remove.
            answer = await asyncio.shield(request)
            return Received(b"", answer.get("ETag", ""))

        try:
            yield from pump(
                get_loop(),
                put,
                [ObjectInfo(key, len(body), "") for key, body in bodies.items()],
                CONCURRENCY,
            )
        finally:
            has_ended = True

    def settle(self, patience_s: float) -> None:
        """Wait for what is on its way when a ``put_many`` was stopped, ``patience_s`` at the most."""

        async def landed() -> None:
            if self._puts:
                await asyncio.wait(self._puts, timeout=patience_s)

        asyncio.run_coroutine_threadsafe(landed(), get_loop()).result()

    def _landed(self, request: asyncio.Task[Any]) -> None:
        self._puts.discard(request)
        if not request.cancelled():
            request.exception()  # heard; or asyncio would complain of those that nobody waited for

    def delete_many(self, keys: Collection[str], *, patience_s: float) -> Answers:
        """One DELETE for each key. Not DeleteObjects, which answers 200 for keys that it could not
        delete, and which not every server has.
        """

        async def delete(obj: ObjectInfo) -> Received:
            await self._call("delete_object", patience_s, Key=obj.key)
            return Received(b"", "")

        return pump(get_loop(), delete, [ObjectInfo(key, 0, "") for key in keys], CONCURRENCY)

    def head_many(self, keys: Collection[str], *, patience_s: float) -> Answers:
        """One HEAD for each key; the ETag of what is not there is empty."""

        async def head(obj: ObjectInfo) -> Received:
            try:
                answer = await self._call("head_object", patience_s, Key=obj.key)
            except S3Fault as fault:
                if fault.status == 404 and fault.code != "NoSuchBucket":
                    return Received(b"", "")
                raise
            return Received(b"", answer["ETag"])

        return pump(get_loop(), head, [ObjectInfo(key, 0, "") for key in keys], CONCURRENCY)


class S3Destination:
    """A prefix on S3 that stores are written to. One object belongs to one process; making it costs
    no request.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``.
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.
    retry : RetryConfig
    """

    def __init__(
        self,
        url: str,
        s3_kwargs: Mapping[str, Any] | None = None,
        *,
        retry: RetryConfig | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._bucket, self._prefix = split_s3_url(self.url)
        self._options = S3Options.of(s3_kwargs)
        self._retry = retry or RetryConfig()
        self._fetch = FetchConfig(concurrency=CONCURRENCY)
        self._engine = _Writer(self._bucket, self._options, self._fetch)

    def names(self) -> set[str]:
        """Names directly below the prefix, those of unfinished stores too. The first request shows
        whether bucket and credentials are right.

        Raises
        ------
        OriginError
            No such bucket, no access, no answer.
        """
        below = f"{self._prefix}/" if self._prefix else ""
        found: set[str] = set()
        token: str | None = None
        while True:
            page = self._once(
                self.url,
                functools.partial(self._engine.list_page, below, delimiter="/", token=token),
            )
            found.update(
                key.removeprefix(below).rstrip("/")
                for key in (*page.prefixes, *(obj.key for obj in page.objects))
            )
            if (token := page.next_token) is None:
                return found - {""}

    def finished(self, names: Collection[str]) -> set[str]:
        """Which of these stores, ``mp-1.zarr`` or ``mp-1.zarr.zip``, are there and whole. One
        request each, two for Zarr v3 or an unfinished one.
        """
        found: set[str] = set()
        zips = [name for name in names if name.endswith(".zip")]
        trees = [name for name in names if not name.endswith(".zip")]
        for document, asked in (
            ("", zips),
            *((f"/{document}", trees) for document in ROOT_DOCUMENTS),
        ):
            name_of = {self._key(name) + document: name for name in asked if name not in found}
            found.update(
                name_of[key]
                for key, answer in self._all(
                    self.url, list(name_of), self._engine.head_many
                ).items()
                if answer.etag
            )
        return found

    def upload(self, name: str, objects: Mapping[str, bytes], *, overwrite: bool = False) -> int:
        """Write one store, whole or not at all.

        Parameters
        ----------
        name : str
            ``mp-1.zarr``, or ``mp-1.zarr.zip`` with a single object whose key is empty.
        objects : mapping
            Key below the store to bytes, in the order to publish them.
        overwrite : bool
            Take an old store away first: its documents before its chunks, so that nobody reads a
            mixture.

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
        if not overwrite and self.finished([name]):
            raise StoreExistsError(
                f"{url} is there already. Overwrite it on purpose (--overwrite) or choose another "
                "destination."
            )
        bodies = {
            f"{self._key(name)}/{key}" if key else self._key(name): body
            for key, body in objects.items()
        }
        if name.endswith(".zip"):
            # one PUT replaces an object at once: there is nothing to take away before or after
            self._put(url, bodies)
            return sum(map(len, bodies.values()))
        touched = False
        try:
            # What is below the store without belonging to it: the old store, or the chunks that a
            # killed process left.
            old = self._list(name)
            for keys in (
                sorted(filter(is_document, old), key=lambda key: key.count("/")),
                [key for key in old if not is_document(key)],
            ):
                touched = touched or bool(keys)
                self._all(url, keys, self._engine.delete_many)
            touched = True
            self._put(url, {key: body for key, body in bodies.items() if not is_document(key)})
            for key in filter(is_document, bodies):  # one after the other: the order is the point
                self._put(url, {key: bodies[key]})
        except BaseException:  # KeyboardInterrupt and SystemExit too
            if touched:
                self._take_back(name)
            raise
        return sum(map(len, bodies.values()))

    def _take_back(self, name: str) -> None:
        url = f"{self.url}/{name}"
        self._engine.settle(_SETTLE_S)
        try:
            # Again until nothing is listed: one that has got no answer may still arrive.
            for _ in range(5):
                keys = self._list(name)
                if not keys:
                    break
                for part in (
                    list(filter(is_document, keys)),
                    [key for key in keys if not is_document(key)],
                ):
                    self._all(
                        url, part, self._engine.delete_many, RetryConfig(attempts=2, timeout=5)
                    )
        except OriginError as exc:
            logger.warning(
                "objects of an unfinished store stay behind, the next conversion of it removes "
                "them: %s (%s)",
                url,
                exc,
            )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _list(self, name: str) -> list[str]:
        keys: list[str] = []
        token: str | None = None
        while True:
            page = self._once(
                f"{self.url}/{name}",
                functools.partial(self._engine.list_page, f"{self._key(name)}/", token=token),
            )
            keys += [obj.key for obj in page.objects]
            if (token := page.next_token) is None:
                return keys

    def _put(self, url: str, bodies: Mapping[str, bytes]) -> None:
        self._all(
            url,
            list(bodies),
            lambda keys, patience_s: self._engine.put_many(
                {key: bodies[key] for key in keys}, patience_s=patience_s
            ),
        )

    def _once(self, url: str, request: Callable[..., T]) -> T:
        """One request under the retry policy. ``request`` takes ``patience_s``."""
        policy = RetryPolicy(self._retry)
        attempts = 0

        def attempt() -> T:
            nonlocal attempts
            attempts += 1
            try:
                return request(patience_s=min(self._fetch.read_timeout, policy.remaining_s))
            except S3Fault as fault:
                raise self._error(fault, url) from fault

        try:
            return policy.call(attempt)
        except OriginUnavailableError as exc:
            raise _unavailable(url, exc, attempts) from exc.__cause__

    def _all(
        self,
        url: str,
        keys: Collection[str],
        send: Callable[..., Answers],
        retry: RetryConfig | None = None,
    ) -> dict[str, Received]:
        """One request for every key, in passes over what has failed. ``send`` takes keys and
        ``patience_s``.
        """
        answers: dict[str, Received] = {}
        missing = list(keys)
        policy = RetryPolicy(retry or self._retry)
        attempts = 0
        try:
            for attempt in policy:
                attempts += 1
                failure: Exception | None = None
                with contextlib.closing(
                    send(missing, patience_s=min(self._fetch.read_timeout, policy.remaining_s))
                ) as arrived:  # type: ignore[type-var]
                    for obj, answer in arrived:
                        if isinstance(answer, Received):
                            answers[obj.key] = answer
                            policy.progress()
                        elif answer is not None:
                            failure = self._error(answer, url)
                            if not isinstance(failure, TransientError):
                                raise failure
                if failure is None:
                    break
                missing = [key for key in missing if key not in answers]
                with attempt:
                    raise failure
        except OriginUnavailableError as exc:
            raise _unavailable(url, exc, attempts) from exc.__cause__
        return answers

    def _error(self, fault: S3Fault, url: str) -> Exception:
        error = to_error(
            fault,
            RequestContext(url, self._bucket, self._options.identity, anon=self._options.anon),
        )
        if isinstance(error, OriginAccessError) and (
            fault.code == "AccessDenied" or fault.status in (401, 403)
        ):
            error = OriginAccessError(
                f"{url}: writing was refused: {fault}. Converting needs s3:ListBucket, "
                "s3:GetObject, s3:PutObject and s3:DeleteObject "
                f"on bucket {self._bucket!r}. Set other credentials (key and secret, or profile)."
            )
        error.__cause__ = fault
        return error


def _unavailable(url: str, exc: OriginUnavailableError, attempts: int) -> OriginUnavailableError:
    return OriginUnavailableError(
        f"{url} could not be written: {exc.__cause__} ({attempts} "
        f"{'attempt' if attempts == 1 else 'attempts'}). "
        "Check that the server runs and is reachable, then convert again: finished stores are "
        "skipped."
    )
