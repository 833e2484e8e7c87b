"""Versions of objects. An ETag is an opaque text; without one, the modification time stands in.

S3 lets a server leave the ETag out, mark it weak (a proxy does that on GET, but not in the body of
a LIST), and write it with or without quotes. All spellings of one ETag are one version here.
"""

from __future__ import annotations

import re

from zarrcache._keys import ObjectInfo
from zarrcache.origin._concurrent import Received

__all__ = ["etag_in", "is_same_date", "is_same_version", "md5_in", "version_of"]

#: Quotes around an ETag: also single ones, and those of a body that was escaped twice.
_QUOTES = re.compile(r"""^(?:\s|"|'|&quot;|&#34;)+|(?:\s|"|'|&quot;|&#34;)+$""")
_WEAK = re.compile(r"^W/", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-fA-F]{32}(?:-[0-9]+)?")
#: Of a version without an ETag. No ETag contains a blank (RFC 9110, section 8.8.3).
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
