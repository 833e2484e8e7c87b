"""Read objects of the listed version, and confirm that their content is right.

An ETag is an opaque text; without one, the modification time stands in. S3 lets a server leave the
ETag out, mark it weak (a proxy does that on GET, but not in the body of a LIST), and write it with
or without quotes. All spellings of one ETag are one version here.

Content is confirmed by one of three: its MD5, where the ETag is one; TLS, which detects every bit
that the network changes; or a second reading of the same version by other requests. The second
reading has other boundaries, so that a fault that depends on the length or the offset of an answer
does not repeat.

Whether ETags are MD5s is found out, because 32 hexadecimal digits need not be one: an object
encrypted with a KMS key has such an ETag, and some servers use another digest for all objects. One
object whose MD5 matches shows that they are MD5s (by chance: 1 in 2**128). If they are, an object
that does not match, in two readings alike, is damaged at the origin, unless the server says that it
is encrypted. docs/explanation/decisions/021-etags-and-ranges.md has the reasons.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from zarrcache._keys import ObjectInfo
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin._requests import Received, unsent
from zarrcache.origin._s3_errors import RequestContext, S3Error, TransientError, changed

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from zarrcache.origin._s3 import Engine, S3Bucket
    from zarrcache.origin._s3fs import S3fsEngine

__all__ = [
    "CheckedReads",
    "ContentCheck",
    "etag_in",
    "is_same_date",
    "is_same_version",
    "md5_in",
    "other_shape",
    "version_of",
]

logger = logging.getLogger(__name__)

#: Contents that are not confirmed are collected for one second reading, up to this many bytes and
#: objects.
_HELD_BYTES, _HELD_OBJECTS = 64 * 1024**2, 64
#: Other objects that are compared with their ETags to find out whether these are MD5s.
_SAMPLE = 8
_DIFFER = "two readings of the same bytes differ"
#: A second reading of a range begins or ends this many bytes outside it.
_MARGIN_BYTES = 64

#: Quotes around an ETag: also single ones, and those of a body that was escaped twice.
_QUOTES = re.compile(r"""^(?:\s|"|'|&quot;|&#34;)+|(?:\s|"|'|&quot;|&#34;)+$""")
_PLAIN = re.compile(r'"([0-9a-zA-Z-]+)"')
_WEAK = re.compile(r"^W/", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-fA-F]{32}(?:-[0-9]+)?")
#: Prefix of a version without an ETag. No ETag contains a blank (RFC 9110, section 8.8.3).
_MODIFIED = "modified "


def version_of(etag: str | None, modified_s: float) -> str:
    """The text that identifies a version: `ObjectInfo.etag`.

    Parameters
    ----------
    etag : str or None
        As the server writes it: ``"abc"``, ``W/"abc"`` and ``abc`` are the same version.
    modified_s : float
        Last change in seconds since 1970, 0.0 if unknown; used only without an ETag. In whole
        seconds, because the header of an answer has no fractions, and a LIST may have some.
    """
    before, text = None, etag or ""
    if (plain := _PLAIN.fullmatch(text)) is not None:  # nearly all
        return plain[1]
    while text != before:
        before, text = text, _WEAK.sub("", _QUOTES.sub("", text))
    if text or not modified_s:
        return text
    return f"{_MODIFIED}{int(modified_s)}"


def etag_in(version: str) -> str:
    """The ETag of a version, for ``If-Match``; empty without one."""
    return "" if version.startswith(_MODIFIED) else version


def md5_in(version: str) -> str | None:
    """The MD5 that a version may be: 32 hexadecimal digits, in lower case; or None."""
    return version.lower() if len(version) == 32 and _HEX.fullmatch(version) else None


def is_same_version(listed: ObjectInfo, received: Received) -> bool:
    """Whether an answer is of the listed version, by its own headers.

    ETags are compared if both are known, modification times otherwise. If the server gives neither,
    versions differ only by their size.
    """
    etag = etag_in(listed.etag)
    if etag and received.etag:
        is_hex = _HEX.fullmatch(etag) is not None
        return etag == received.etag or (is_hex and etag.lower() == received.etag.lower())
    return is_same_date(listed, received) or not (listed.modified_s and received.modified_s)


def is_same_date(listed: ObjectInfo, received: Received) -> bool:
    """Whether both say when the object was changed, and that is the same second."""
    return bool(listed.modified_s) and int(listed.modified_s) == int(received.modified_s)


class ContentCheck:
    """Decides whether contents of one origin are confirmed. Safe from any thread.

    It also finds out whether the ETags of the origin are MD5s.

    Parameters
    ----------
    etag : {"auto", "md5", "opaque"}
        ``cache.fetch.etag``.
    is_plain : bool
        The endpoint is ``http://``, so that nothing else detects a bit that the network changes.
    """

    def __init__(self, etag: Literal["auto", "md5", "opaque"], *, is_plain: bool) -> None:
        self._etag = etag
        self.is_plain = is_plain
        self._are_md5: bool | None = {"auto": None, "md5": True, "opaque": False}[etag]

    def matches(self, obj: ObjectInfo, body: Buffer) -> bool:
        """Whether the MD5 of ``body`` is the listed ETag. A match shows that ETags are MD5s."""
        md5 = md5_in(obj.etag)
        if md5 is None or hashlib.md5(body, usedforsecurity=False).hexdigest() != md5:
            return False
        self._are_md5 = True
        return True

    def is_confirmed(self, obj: ObjectInfo, body: Buffer) -> bool:
        """Whether a whole object needs no second reading."""
        if self._etag == "opaque" or not obj.size_bytes or self.matches(obj, body):
            return True
        return not self.is_plain and not self.is_doubtful(obj)

    def is_doubtful(self, obj: ObjectInfo) -> bool:
        """Whether an object that does not match its ETag may be damaged at the origin."""
        return self._are_md5 is not False and md5_in(obj.etag) is not None

    @property
    def asks_for_encryption(self) -> bool:
        """Whether an object that the server says is encrypted with a key may differ."""
        return self._etag == "auto"

    @property
    def needs_sample(self) -> bool:
        """Whether other objects have to show what the ETags are."""
        return self._are_md5 is None

    def judge(self, stuck: Sequence[ObjectInfo], sample: Sequence[ObjectInfo], where: str) -> None:
        """Decide about objects that differ from their ETags in two readings alike.

        Parameters
        ----------
        stuck : sequence of ObjectInfo
            The server does not report them as encrypted with a key.
        sample : sequence of ObjectInfo
            Others that were read and do not match either.
        where : str
            URL of the origin.

        Raises
        ------
        IncompleteArrayError
            They are damaged, or nothing shows that they are not.
        """
        compared = len({obj.etag.lower() for obj in (*stuck, *sample)})
        if self._are_md5 is None and compared > 1:
            self._are_md5 = False
            logger.warning(
                "ETags of %s have 32 hexadecimal digits and are not MD5 sums (%d objects "
                "compared): contents are checked by size and version%s. Set cache.fetch.etag to "
                "opaque if that is known, or to md5 to refuse such objects.",
                where,
                compared,
                ", and read twice, because the endpoint is http://" if self.is_plain else "",
            )
        if self._are_md5 is False:
            return
        obj = stuck[0]
        why = (
            "other objects there match theirs: it is damaged"
            if self._are_md5 and self._etag == "auto"
            else "cache.fetch.etag is md5"
            if self._are_md5
            else "there is no other object to compare with"
        )
        raise IncompleteArrayError(
            f"{where}/{obj.key} does not match its ETag {obj.etag} as an MD5, in two readings "
            f"alike, and {why}. Write it again; if its ETag is not an MD5, set cache.fetch.etag: "
            "opaque."
        )


def other_shape(start: int, stop: int, size_bytes: int) -> list[tuple[int, int]]:
    """Ranges that cover ``start`` to ``stop`` with other boundaries, for a second reading.

    One range where the object is larger, otherwise two halves.
    """
    if stop < size_bytes:
        return [(start, min(stop + _MARGIN_BYTES, size_bytes))]
    if start > 0:
        return [(max(start - _MARGIN_BYTES, 0), stop)]
    middle = (start + stop) // 2
    return [(start, middle), (middle, stop)] if middle > start else [(start, stop)]


class CheckedReads:
    """Reads objects of one prefix: of the listed version, and with a confirmed content.

    Parameters
    ----------
    bucket : S3Bucket
    prefix : str
        Of the objects' full keys.
    url : str
        Of the prefix.
    """

    def __init__(self, bucket: S3Bucket, prefix: str, url: str) -> None:
        self._bucket, self._prefix, self._url = bucket, prefix, url
        self._content = ContentCheck(bucket.fetch.etag, is_plain=bucket.is_plain)
        self._can_match = True  # the server understands If-Match, until it refuses a listed version
        self._has_two_tags = False  # the ETags of its answers are not those of its listings

    def below(self, path: str) -> CheckedReads:
        """Reads below a longer prefix, with the same knowledge about the server."""
        reads = copy.copy(self)
        reads._prefix, reads._url = f"{self._prefix}{path}/", f"{self._url}/{path}"
        return reads

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects. See ``Origin.fetch``."""
        held: dict[ObjectInfo, Buffer] = {}
        held_bytes = 0
        for obj, body in self._arrivals(objects):
            if self._content.is_confirmed(obj, body):
                yield obj, body
                continue
            held[obj] = body
            held_bytes += obj.size_bytes
            if len(held) >= _HELD_OBJECTS or held_bytes > _HELD_BYTES:
                yield from self._confirmed(held)
                held, held_bytes = {}, 0
        if held:
            yield from self._confirmed(held)

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed object. See ``Origin.fetch_range``.

        No ETag covers a range. Over ``http://`` it is therefore requested a second time, with other
        boundaries, and returned only if both answers agree.
        """
        if start >= stop:
            return b""
        full = self._full(obj)
        parts = [(start, stop)]
        if self._content.is_plain:
            parts += other_shape(start, stop, obj.size_bytes)

        async def request(engine: Engine, patience_s: float) -> bytes:
            first, *others = await self._parts(engine, full, parts, patience_s)
            if others:
                again = b"".join(others)
                skipped = start - parts[1][0]
                if again[skipped : skipped + stop - start] != first:
                    raise S3Error(None, "Mismatch", _DIFFER)
            self._bucket.counters.add(fetched_bytes=len(first) + sum(map(len, others)))
            return first

        return self._bucket.call(
            request,
            self._context(obj.key, obj),
            open_engine=lambda: self._bucket.engine(full.key),
        )

    # -- reading whole objects

    def _arrivals(self, objects: Collection[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Fetch objects in one pass, each of the listed version and length."""
        engine: Engine | None = None
        operation = self._bucket.operation()
        listed = {self._full(obj).key: obj for obj in objects}

        def send(missing: list[ObjectInfo], remaining_s: float) -> Any:
            nonlocal engine
            try:
                engine = self._bucket.engine(*(obj.key for obj in missing))
            except S3Error as error:  # the settings cannot be resolved
                return unsent(missing[0], error)
            return engine.get_many(
                [self._conditional(obj) for obj in missing],
                patience_s=remaining_s,
                backoff=self._bucket.backoff,
            )

        def accept(
            full: ObjectInfo, answer: Received | S3Error
        ) -> tuple[ObjectInfo, Buffer] | Exception | None:
            obj = listed[full.key]
            if isinstance(answer, S3Error):
                if self._bucket.leaves_obstore(answer, engine):
                    return None
                if answer.status == 412 and self._is_refused_wrongly(obj):
                    return TransientError(self._url_of(obj.key), "If-Match was refused wrongly")
                return operation.error(answer, self._context(obj.key, obj), engine)
            is_same = self._is_same(obj, answer)
            if is_same and memoryview(answer.body).nbytes == obj.size_bytes:
                return obj, answer.body
            if not is_same and self._is_doubtful(obj, answer) and self._is_still_current(obj):
                self._has_two_tags = is_same = True
            error = self._check(obj, answer, obj.size_bytes, is_same=is_same)
            return (obj, answer.body) if error is None else error

        return operation.policy.call_all(
            [self._full(obj) for obj in objects],
            send,
            accept,
            url_of=lambda full: self._url_of(listed[full.key].key),
            counters=self._bucket.counters,
        )

    def _confirmed(self, held: Mapping[ObjectInfo, Buffer]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Confirm contents that neither an MD5 nor TLS confirms, or raise what `fetch` raises."""
        doubtful = {obj for obj in held if self._content.is_doubtful(obj)}
        encrypted = self._encrypted(doubtful) if self._content.asks_for_encryption else set()
        again = {}
        for obj, body in held.items():
            if obj in encrypted and not self._content.is_plain:
                yield obj, body
            else:
                again[obj] = body
        self._bucket.counters.add(retries=len(doubtful - encrypted))
        stuck = {}
        for obj, body in self._read_again(again):
            if self._content.matches(obj, body):
                logger.warning(
                    "%s arrived with another content than its MD5; a second reading is right",
                    self._url_of(obj.key),
                )
            elif obj in doubtful - encrypted:
                stuck[obj] = body
                continue
            yield obj, body
        if stuck:
            sample = self._sample(stuck) if self._content.needs_sample else ()
            self._content.judge(list(stuck), sample, self._url)
            yield from stuck.items()

    def _read_again(self, held: Mapping[ObjectInfo, Buffer]) -> list[tuple[ObjectInfo, Buffer]]:
        """Read objects in halves, until that agrees with a reading as a whole or with the MD5."""
        whole: dict[str, Buffer] = {self._full(obj).key: body for obj, body in held.items()}
        listed = {self._full(obj).key: obj for obj in held}

        async def read(engine: Engine, full: ObjectInfo, patience_s: float) -> Received:
            parts = other_shape(0, full.size_bytes, full.size_bytes)
            try:
                body = b"".join(await self._parts(engine, full, parts, patience_s))
            except S3Error as error:
                if error.code != "RangeIgnored":
                    raise
                self._bucket.counters.add(requests=1)
                body = await self._part(engine, full, None, patience_s)
            if full.key not in whole:
                self._bucket.counters.add(requests=1)
                whole[full.key] = await self._part(engine, full, None, patience_s)
            if not self._content.matches(full, body) and bytes(whole.pop(full.key)) != body:
                raise S3Error(None, "Mismatch", _DIFFER)
            return Received(body, "")

        found = self._bucket.call_all(
            read,
            [self._full(obj) for obj in held],
            lambda full: self._context(listed[full.key].key, listed[full.key]),
            open_engine=lambda: self._bucket.engine(*listed),
        )
        return [(listed[key], answer.body) for key, answer in found.items()]

    def _encrypted(self, objects: Collection[ObjectInfo]) -> set[ObjectInfo]:
        """The objects that the server says are encrypted with a key: their ETag is not an MD5."""
        listed = {self._full(obj).key: obj for obj in objects}

        async def ask(engine: S3fsEngine, full: ObjectInfo, patience_s: float) -> Received:
            is_hidden = await engine.is_md5_hidden(full.key, patience_s=patience_s)
            return Received(b"hidden" if is_hidden else b"", "")

        found = self._bucket.call_all(
            ask,
            [ObjectInfo(key, 0, "") for key in listed],
            lambda full: self._context(listed[full.key].key, listed[full.key]),
            open_engine=self._bucket.s3fs,
        )
        return {listed[key] for key, answer in found.items() if bytes(answer.body)}

    def _sample(self, stuck: Collection[ObjectInfo]) -> list[ObjectInfo]:
        """Read some other objects of the origin, to find out whether its ETags are MD5s."""
        known = {obj.etag.lower() for obj in stuck}
        page = next(self._bucket.pages(self._prefix, self._context("")))
        start = len(self._prefix)
        others = {
            obj.etag.lower(): ObjectInfo(obj.key[start:], obj.size_bytes, obj.etag, obj.modified_s)
            for obj in page.objects
            if obj.size_bytes and md5_in(obj.etag) and obj.etag.lower() not in known
        }
        smallest = sorted(others.values(), key=lambda obj: obj.size_bytes)[:_SAMPLE]
        differ = [
            obj for obj, body in self._arrivals(smallest) if not self._content.matches(obj, body)
        ]
        encrypted = self._encrypted(differ)  # these say nothing about the ETags of others
        return [obj for obj in differ if obj not in encrypted]

    # -- versions

    def _full(self, obj: ObjectInfo) -> ObjectInfo:
        return ObjectInfo(self._prefix + obj.key, obj.size_bytes, obj.etag, obj.modified_s)

    def _conditional(self, full: ObjectInfo) -> ObjectInfo:
        """``full`` as the engines get it: its ETag becomes ``If-Match``."""
        if self._can_match:
            return full
        return ObjectInfo(full.key, full.size_bytes, "", full.modified_s)

    async def _parts(
        self,
        engine: Engine,
        full: ObjectInfo,
        parts: Sequence[tuple[int, int]],
        patience_s: float,
    ) -> list[bytes]:
        """Parts of one version of an object, one after the other: the first that fails ends it."""
        received = [await self._part(engine, full, parts[0], patience_s)]
        for part in parts[1:]:
            self._bucket.counters.add(requests=1)  # the caller counts the first
            received.append(await self._part(engine, full, part, patience_s))
        return received

    async def _part(
        self,
        engine: Engine,
        full: ObjectInfo,
        part: tuple[int, int] | None,
        patience_s: float,
    ) -> bytes:
        """One part of a version of an object; None: the whole."""
        can_match = self._can_match
        try:
            received = await engine.get(self._conditional(full), part, patience_s=patience_s)
        except S3Error as error:
            if error.status != 412 or not can_match:
                raise
            self._bucket.counters.add(requests=1)
            if not await self._is_current(engine, full, patience_s):
                raise
            self._can_match = False
            self._bucket.counters.add(requests=1)
            received = await engine.get(self._conditional(full), part, patience_s=patience_s)
        obj = ObjectInfo(full.key[len(self._prefix) :], full.size_bytes, full.etag, full.modified_s)
        is_same = self._is_same(obj, received)
        if not is_same and self._is_doubtful(obj, received):
            self._bucket.counters.add(requests=1)
            if await self._is_current(engine, full, patience_s):
                self._has_two_tags = is_same = True
        size_bytes = full.size_bytes if part is None else part[1] - part[0]
        error_found = self._check(obj, received, size_bytes, is_same=is_same)
        if isinstance(error_found, TransientError):
            raise S3Error(None, "ShortBody", str(error_found))
        if error_found is not None:
            raise error_found
        return bytes(received.body)

    def _is_refused_wrongly(self, obj: ObjectInfo) -> bool:
        """Whether the server refuses ``If-Match`` for what is the listed version.

        Some compare the condition with another spelling of the ETag, or with a weak one, which by
        RFC 9110 never matches. Then no condition is sent any more: the ETags of the answers tell.
        """
        if self._can_match and self._is_still_current(obj):
            self._can_match = False
        return not self._can_match

    def _is_doubtful(self, obj: ObjectInfo, received: Received) -> bool:
        """Whether an answer with another ETag than the listing has the listed modification time.

        It is another version of that second, or the server has two ETags for one version.
        """
        return not self._has_two_tags and is_same_date(obj, received)

    def _is_same(self, obj: ObjectInfo, received: Received) -> bool:
        """Whether an answer is of the listed version, by its own headers."""
        return (is_same_date if self._has_two_tags else is_same_version)(obj, received)

    def _is_still_current(self, obj: ObjectInfo) -> bool:
        full = self._full(obj)
        return self._bucket.call(
            lambda engine, patience_s: self._is_current(engine, full, patience_s),
            self._context(obj.key, obj),
            open_engine=lambda: self._bucket.engine(full.key),
        )

    async def _is_current(self, engine: Engine, full: ObjectInfo, patience_s: float) -> bool:
        """Whether the server still has the listed version, by a HEAD or by a LIST.

        An answer that came before is then of that version, whatever its ETag is.
        """
        head = await engine.head(full.key, patience_s=patience_s)
        if head is None or head.size_bytes != full.size_bytes:
            return False
        if _is_listed(full, head):
            return True
        self._bucket.counters.add(requests=1)  # the caller counts the HEAD
        page = await self._bucket.s3fs().list_page(full.key, patience_s=patience_s)
        return any(
            obj.key == full.key and obj.size_bytes == full.size_bytes and _is_listed(full, obj)
            for obj in page.objects
        )

    def _context(self, key: str, obj: ObjectInfo | None = None) -> RequestContext:
        return self._bucket.context(self._url_of(key), obj)

    def _check(
        self, obj: ObjectInfo, received: Received, size_bytes: int, *, is_same: bool
    ) -> Exception | None:
        """The error if an answer is not of the listed version, or has not ``size_bytes`` bytes."""
        if not is_same:
            return changed(self._url_of(obj.key))
        n = memoryview(received.body).nbytes
        if n != size_bytes:
            why = (
                ", as if a server or proxy packs or unpacks its answers (Content-Encoding)"
                if n > size_bytes
                else ""
            )
            return TransientError(
                self._url_of(obj.key), f"{n} bytes arrived, {size_bytes} were announced{why}"
            )
        return None

    def _url_of(self, key: str) -> str:
        return f"{self._url}/{key}"


def _is_listed(listed: ObjectInfo, now: ObjectInfo) -> bool:
    return is_same_version(listed, Received(b"", etag_in(now.etag), now.modified_s))
