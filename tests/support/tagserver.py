"""An S3 server whose ETags, dates and conditions are scripted per object.

moto and Ceph write strong, quoted MD5s and honour If-Match. Other servers and proxies do not, and
here a test says how. It is a thread of the test process; only reading is implemented.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["TagServer", "Tagged", "running_tag_server"]

LONG_AGO = datetime(2020, 5, 17, 10, 20, 30, 250_000, tzinfo=UTC)


@dataclass
class Tagged:
    """One object.

    Attributes
    ----------
    body : bytes
    listed, answered : str or None
        The ETag in a LIST, and that of GET and HEAD; None: left out.
    modified : datetime or None
        Microseconds appear in the LIST only.
    headers : dict
        More headers of GET and HEAD.
    flips : int
        How many of the next GETs have a bit flipped in the middle of their body; -1: all.
    if_match : {"ignored", "weak", "refused"}
        A condition has no effect; is compared as RFC 9110 says (a weak ETag never matches); or
        never holds.
    has_ranges : bool
        False: a request for a range gets the whole object.
    range_sent : str or None
        What the answer to any range says that it is (``Content-Range``).
    has_length : bool
        False: answers come without ``Content-Length``.
    """

    body: bytes
    listed: str | None
    answered: str | None
    modified: datetime | None = LONG_AGO
    headers: dict[str, str] = field(default_factory=dict)
    flips: int = 0
    if_match: str = "weak"
    has_ranges: bool = True
    range_sent: str | None = None
    has_length: bool = True


@dataclass
class TagServer:
    """Address, objects by key, and the requests so far."""

    endpoint_url: str = ""
    objects: dict[str, Tagged] = field(default_factory=dict)
    seen: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def s3_kwargs(self) -> dict[str, Any]:
        return {"key": "k", "secret": "s", "endpoint_url": self.endpoint_url}

    def count(self) -> Counter[str]:
        """Requests by kind: GET, HEAD, LIST."""
        return Counter(kind for kind, _, _ in self.seen)


@contextlib.contextmanager
def running_tag_server() -> Iterator[TagServer]:
    """Start a server for one bucket, ``b``; stop it at the end."""
    state = TagServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            key = unquote(url.path).removeprefix("/b").lstrip("/")
            if not key:
                query = parse_qs(url.query)
                state.seen.append(("LIST", query.get("prefix", [""])[0], ""))
                self._send(200, _listing(state, query), {"Content-Type": "application/xml"})
                return
            state.seen.append((self.command, key, self.headers.get("Range", "")))
            obj = state.objects.get(key)
            if obj is None:
                self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
                return
            headers = dict(obj.headers)
            if obj.answered is not None:
                headers["ETag"] = obj.answered
            if obj.modified is not None:
                headers["Last-Modified"] = format_datetime(
                    obj.modified.replace(microsecond=0), usegmt=True
                )
            condition = self.headers.get("If-Match")
            if condition is not None and (
                obj.if_match == "refused"
                or (
                    obj.if_match == "weak"
                    and condition.strip('"') != (obj.answered or "").strip('"')
                )
            ):
                self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>", {})
                return
            body, status = obj.body, 200
            part = self.headers.get("Range")
            if part is not None and obj.has_ranges:
                first, last = part.removeprefix("bytes=").split("-")
                body, status = body[int(first) : int(last) + 1], 206
                headers["Content-Range"] = (
                    f"bytes {first}-{int(first) + len(body) - 1}/{len(obj.body)}"
                    if obj.range_sent is None
                    else obj.range_sent
                )
            if obj.flips and body and self.command == "GET":
                obj.flips -= 1
                body = bytearray(body)
                body[len(body) // 2] ^= 0x10
            if not obj.has_length:
                headers["Transfer-Encoding"] = "chunked"
                if self.command == "GET":
                    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            self._send(status, bytes(body), headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Transfer-Encoding" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        state.endpoint_url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            server.shutdown()
            thread.join(10)


def _listing(state: TagServer, query: dict[str, list[str]]) -> bytes:
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    entries, prefixes = [], set()
    for key, obj in sorted(state.objects.items()):
        if not key.startswith(prefix):
            continue
        if delimiter and delimiter in key[len(prefix) :]:
            prefixes.add(prefix + key[len(prefix) :].split(delimiter)[0] + delimiter)
            continue
        modified = obj.modified or LONG_AGO
        tag = "" if obj.listed is None else f"<ETag>{escape(obj.listed)}</ETag>"
        entries.append(
            f"<Contents><Key>{escape(key)}</Key>"
            f"<LastModified>{modified:%Y-%m-%dT%H:%M:%S}.{modified.microsecond // 1000:03}Z"
            f"</LastModified>{tag}<Size>{len(obj.body)}</Size></Contents>"
        )
    common = "".join(f"<CommonPrefixes><Prefix>{p}</Prefix></CommonPrefixes>" for p in prefixes)
    return (
        '<?xml version="1.0"?><ListBucketResult><Name>b</Name>'
        f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(entries)}</KeyCount>"
        f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(entries)}{common}"
        "</ListBucketResult>"
    ).encode()
