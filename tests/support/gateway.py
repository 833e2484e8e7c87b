"""An S3 gateway over a directory whose ListObjectsV2 is faulty in ways that have been reported of
real servers. It listens on 127.0.0.1, in threads of the test process.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["BUCKET", "INCOMPLETE", "Gateway", "running_gateway"]

BUCKET = "densities"
#: Faults by which a client cannot know all names.
INCOMPLETE = (
    "no_token",
    "empty_token",
    "one_page",
    "no_is_truncated",
    "repeats",
    "repeats_forever",
    "counts_more",
    "other_prefix",
    "other_delimiter",
    "other_document",
    "empty_body",
)


class Gateway(ThreadingHTTPServer):
    """The files below ``root`` are the objects of one bucket.

    Attributes
    ----------
    fault : str
        Of every LIST; empty for none. It can be changed while clients are connected.
    page : int
        Names on one page.
    gone : str
        Code of the error with which every request is answered; empty for none.
    faults : dict
        Status of every request for a key; not in it: none.
    gets : list of str
        Keys of all requests for objects, in order.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, page: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.page, self.fault, self.gone = root, page, "", ""
        self.lists = 0
        self.faults: dict[str, int] = {}
        self.gets: list[str] = []

    @property
    def s3_kwargs(self) -> dict[str, Any]:
        """For ``ZarrS3Reader``."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {
            "key": "testing",
            "secret": "testing",
            "endpoint_url": url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def sorted_keys(self) -> list[str]:
        """All keys, sorted as S3 sorts them."""
        return sorted(f"{p.relative_to(self.root)}" for p in self.root.rglob("*") if p.is_file())


@contextlib.contextmanager
def running_gateway(root: Path, *, page: int = 1000) -> Iterator[Gateway]:
    """Serve ``root`` until the end of the block."""
    with Gateway(root, page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway
    _STATUS: ClassVar[dict[str, int]] = {"AccessDenied": 403}

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).removeprefix(f"/{BUCKET}").lstrip("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self.server.gone:
            self._error(self._STATUS.get(self.server.gone, 404), self.server.gone)
        elif not key and "list-type" in query:
            self.server.lists += 1
            self._answer(self._listing(query))
        elif not key:
            self._answer(b"", **{"x-amz-bucket-region": "us-east-1"})
        elif key in self.server.faults:
            self._error(self.server.faults[key], "")
        elif not (path := self.server.root / key).is_file():
            self.server.gets.append(key)
            self._error(404, "NoSuchKey")
        else:
            self.server.gets.append(key)
            body = path.read_bytes()
            etag = f'"{hashlib.md5(body).hexdigest()}"'
            modified = formatdate(path.stat().st_mtime, usegmt=True)
            self._answer(body, **{"ETag": etag, "Last-Modified": modified})

    def _listing(self, query: dict[str, str]) -> bytes:
        fault, page = self.server.fault, self.server.page
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        if fault == "other_delimiter":
            delimiter = "" if delimiter else "/"
        after = query.get("continuation-token", "") or query.get("start-after", "")
        if (fault == "repeats" and after.endswith("!")) or fault == "repeats_forever":
            after = ""
        names: dict[str, bool] = {}
        for key in self.server.sorted_keys():
            if key.startswith(prefix):
                below, found, _ = key[len(prefix) :].partition(delimiter or "\0")
                names[prefix + below + delimiter if found else key] = bool(found)
        rest = [name for name in names if name > after.rstrip("!")]
        shown, is_truncated = rest[:page], len(rest) > page
        token = f"{shown[-1]}!" if is_truncated else ""
        count = len(shown)
        if fault in ("no_token", "empty_token", "one_page"):
            token = ""
        if fault == "one_page":
            is_truncated = False
        if fault == "names_twice":
            shown = [name for name in shown for _ in range(2)]
            count = len(shown)
        if fault == "token_only":
            is_truncated = False
        if fault == "repeats_forever":
            is_truncated, token = True, "again!"
        if fault == "counts_more":
            count += 1
        if fault == "other_document":
            return b"<html><body>Sign in to the network</body></html>"
        if fault == "empty_body":
            return b""
        parts = [f"<Prefix>{escape(prefix)}</Prefix><MaxKeys>{page}</MaxKeys>"]
        if fault != "no_is_truncated":
            parts.append(f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>")
        parts.append(f"<KeyCount>{count}</KeyCount>")
        if token or fault == "empty_token":
            parts.append(f"<NextContinuationToken>{escape(token)}</NextContinuationToken>")
        for name in shown:
            if fault == "other_prefix":
                name = f"cached/{name}"
            if names.get(name):
                parts.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
                continue
            path = self.server.root / name
            body = path.read_bytes() if path.is_file() else b""
            size = {"no_size": "", "negative_size": "<Size>-1</Size>"}
            parts.append(
                f"<Contents><Key>{escape(name)}</Key><ETag>{hashlib.md5(body).hexdigest()}</ETag>"
                f"<LastModified>2024-01-01T00:00:00.000Z</LastModified>"
                f"{size.get(fault, f'<Size>{len(body)}</Size>')}</Contents>"
            )
        xmlns = "http://s3.amazonaws.com/doc/2006-03-01/"
        document = f'<ListBucketResult xmlns="{xmlns}">{"".join(parts)}</ListBucketResult>'
        return document.encode()

    def _error(self, status: int, code: str) -> None:
        self._answer(f"<Error><Code>{code}</Code></Error>".encode(), status)

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True
