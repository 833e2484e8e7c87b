"""Decide whether what arrived is the listed version, and whether its content is right.

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

import hashlib
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from zarrcache._keys import ObjectInfo
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin._requests import Received

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "HELD_BYTES",
    "HELD_OBJECTS",
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
HELD_BYTES, HELD_OBJECTS = 64 * 1024**2, 64
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
    """The MD5 that a version may be: 32 hexadecimal digits, in lower case; else None."""
    return version.lower() if len(version) == 32 and _HEX.fullmatch(version) else None


def is_same_version(listed: ObjectInfo, received: Received) -> bool:
    """Whether an answer is of the listed version, as far as it says.

    ETags are compared if both are known, modification times otherwise. If the server gives neither,
    only the size can tell versions apart.
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
            Not encrypted with a key, as far as the server says.
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
