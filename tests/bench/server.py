"""An S3 server that is not the bottleneck: one asyncio process that serves a directory, with a
latency for each request and a request log.

It knows what readers need: LIST v2, GET with ranges, HEAD, ``If-Match``, and the two questions
about a bucket. Signatures are not looked at, nothing can be written. ETags are MD5 sums. Contents,
sums and listings are kept in memory from the first request on and are looked at again when a
modification time says so; so files may be replaced while it runs, as ``os.replace`` does it, but
not rewritten in place.

``BenchServer`` is a handle: small, picklable, usable from any process. The process behind it ends
with its standard input, which the kernel closes when the benchmark is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import email.utils
import functools
import gc
import hashlib
import json
import os
import re
import selectors
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["BenchServer", "Request", "running", "serve_from_memory"]

_START_S = 60.0
_KEPT_BYTES = 6 * 1024**3  # bodies in memory; those above it are read from disk at each request
_PAGE = 1000
_XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_STATUS = {
    200: "OK",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
} | {412: "Precondition Failed", 416: "Range Not Satisfiable"}
#: No bucket has this name: what is below it is for the benchmark, not for S3 clients, and is
#: neither logged nor delayed.
_CONTROL = "/-/"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the server saw it.

    Attributes
    ----------
    op : str
        ``LIST``, ``GET``, ``HEAD``, ``BUCKET`` (a question about the bucket), or the HTTP method of
        anything else.
    bucket, key : str
        Of a LIST the prefix.
    status : int
    nbytes : int
        Of the body that was sent.
    """

    op: str
    bucket: str
    key: str
    status: int
    nbytes: int


@dataclass(frozen=True)
class BenchServer:
    """Where the server listens and how to talk to it and about it.

    Attributes
    ----------
    endpoint_url : str
        ``http://127.0.0.1:PORT``.
    """

    endpoint_url: str

    @property
    def s3_kwargs(self) -> dict[str, Any]:
        """A fresh dict as ``s3fs.S3FileSystem`` and ``ZarrS3Reader(s3_kwargs=...)`` take it."""
        return {
            "key": "bench",
            "secret": "bench",
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def log(self) -> list[Request]:
        """Every request since the start or the last ``reset_log``, in the order of arrival."""
        return [Request(*row) for row in json.loads(self._ask("log"))]

    def reset_log(self) -> None:
        """Forget the requests so far."""
        self._ask("reset")

    def cpu_s(self) -> float:
        """CPU time that the server has taken so far."""
        return float(self._ask("cpu"))

    def set(
        self, *, latency_s: float | None = None, bandwidth_bytes_s: float | None = None
    ) -> None:
        """Change the latency, the bandwidth (0 for no cap), or both."""
        given = {"latency_s": latency_s, "bandwidth_bytes_s": bandwidth_bytes_s}
        self._ask(
            "set?"
            + "&".join(f"{name}={value}" for name, value in given.items() if value is not None)
        )

    def _ask(self, what: str) -> bytes:
        with urllib.request.urlopen(self.endpoint_url + _CONTROL + what) as answer:
            return bytes(answer.read())


@contextlib.contextmanager
def running(
    root: Path, *, latency_s: float = 0.0, bandwidth_bytes_s: float | None = None
) -> Iterator[BenchServer]:
    """Serve ``root``: its directories are the buckets, the files below them the objects.

    Parameters
    ----------
    root : Path
    latency_s : float
        From a request's arrival to the answer's first byte, for every request.
    bandwidth_bytes_s : float, optional
        Of all answers together, as a network card has it: each body is sent when the cap lets its
        last byte through.
    """
    command = [
        sys.executable,
        __file__,
        os.fspath(root),
        "--latency",
        str(latency_s),
        "--bandwidth",
        str(bandwidth_bytes_s or 0),
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline().decode().strip() if selector.select(_START_S) else ""
        if not line.startswith("http://"):
            raise RuntimeError(
                "the benchmark's S3 server did not start; its standard error says why"
            )
        yield BenchServer(line)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def serve_from_memory(server: BenchServer, bucket: str, prefixes: Iterable[str]) -> None:
    """Make the server read these objects now, so that its disk is in no measurement."""
    for prefix in prefixes:
        query, token = (
            f"{server.endpoint_url}/{bucket}?list-type=2&prefix={quote(prefix, safe='')}",
            "",
        )
        while True:
            with urllib.request.urlopen(query + token) as answer:
                more = _TOKEN.search(answer.read())
            if more is None:
                break
            token = f"&continuation-token={more[1].decode()}"


_TOKEN = re.compile(rb"<NextContinuationToken>([^<]*)<")


# -- the server's process


@dataclass(slots=True)
class _Object:
    """A file as S3 shows it. ``answer`` is the whole 200, head and body; empty for an object that
    is not kept in memory.
    """

    path: str
    size: int
    mtime_ns: int
    etag: str
    answer: bytes

    @property
    def fields(self) -> str:
        modified = email.utils.formatdate(self.mtime_ns / 1e9, usegmt=True)
        return (
            f'ETag: "{self.etag}"\r\nLast-Modified: {modified}\r\nAccept-Ranges: bytes\r\n'
            "Content-Type: application/octet-stream\r\n"
        )

    def part(self, start: int, stop: int) -> bytes:
        if not self.answer:
            with open(self.path, "rb") as file:
                return os.pread(file.fileno(), stop - start, start)
        body = len(self.answer) - self.size
        return self.answer[body + start : body + stop]


@dataclass(slots=True)
class _Listing:
    """What lies below a directory, sorted as S3 sorts; good as long as no directory has changed."""

    directories: dict[str, int]  # path: mtime_ns
    names: list[str]  # below the bucket; with a slash at the end for what lies deeper
    paths: list[str]
    pages: dict[tuple[object, ...], bytes]


class _Bucket:
    """Objects and listings below ``root``, remembered."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._objects: dict[str, _Object] = {}
        self._listings: dict[tuple[str, bool], _Listing] = {}
        self._kept_bytes = 0
        # by device and inode: other names of it share its body
        self._linked: dict[tuple[int, int], _Object] = {}

    def has(self, bucket: str) -> bool:
        return bool(bucket) and os.path.isdir(os.path.join(self._root, bucket))

    def names(self) -> list[str]:
        return sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir())

    def get(self, bucket: str, key: str) -> _Object | None:
        return None if key.endswith("/") or ".." in key else self.at(f"{self._root}/{bucket}/{key}")

    def at(self, path: str) -> _Object | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        known = self._objects.get(path)
        if (
            known is not None
            and known.mtime_ns == status.st_mtime_ns
            and known.size == status.st_size
        ):
            return known
        if not stat.S_ISREG(status.st_mode):
            return None
        linked = self._linked.get((status.st_dev, status.st_ino))
        if (
            linked is not None
            and linked.mtime_ns == status.st_mtime_ns
            and linked.size == status.st_size
        ):
            self._objects[path] = linked
            return linked
        body = Path(path).read_bytes()
        found = _Object(
            path,
            len(body),
            status.st_mtime_ns,
            hashlib.md5(body, usedforsecurity=False).hexdigest(),
            b"",
        )
        if known is not None and known.answer:
            self._kept_bytes -= known.size
        if self._kept_bytes + len(body) <= _KEPT_BYTES:
            self._kept_bytes += len(body)
            found.answer = _answer(200, found.fields, body)
        self._objects[path] = found
        if status.st_nlink > 1:
            self._linked[status.st_dev, status.st_ino] = found
        return found

    def page(self, bucket: str, prefix: str, *, delimiter: str, after: str, limit: int) -> bytes:
        """XML of one LIST."""
        listing = self._listing(bucket, prefix.rpartition("/")[0], deep=not delimiter)
        asked = (bucket, prefix, after, limit)
        xml = listing.pages.get(asked)
        if xml is None:
            xml = listing.pages[asked] = self._write(
                listing, bucket, prefix, delimiter, after, limit
            )
        return xml

    def _listing(self, bucket: str, directory: str, *, deep: bool) -> _Listing:
        top = "/".join(part for part in (self._root, bucket, directory) if part)
        known = self._listings.get((top, deep))
        if known is not None and all(
            _mtime_ns(path) == seen for path, seen in known.directories.items()
        ):
            return known
        directories: dict[str, int] = {}
        found: list[tuple[str, str]] = []
        waiting = [top]
        skip = len(self._root) + 1 + len(bucket) + 1
        while waiting:
            here = waiting.pop()
            directories[here] = _mtime_ns(here)
            try:
                entries = list(os.scandir(here))
            except OSError:
                continue
            for entry in entries:
                if not entry.is_dir():
                    found.append((entry.path[skip:], entry.path))
                elif deep:
                    waiting.append(entry.path)
                else:
                    found.append((entry.path[skip:] + "/", ""))
        found.sort(key=lambda pair: pair[0].encode())
        listing = _Listing(
            directories, [name for name, _ in found], [path for _, path in found], {}
        )
        self._listings[top, deep] = listing
        return listing

    def _write(
        self, listing: _Listing, bucket: str, prefix: str, delimiter: str, after: str, limit: int
    ) -> bytes:
        names = listing.names
        start = max(
            bisect.bisect_left(names, prefix.encode(), key=str.encode),
            bisect.bisect_right(names, after.encode(), key=str.encode),
        )
        objects: list[str] = []
        prefixes: list[str] = []
        last = ""
        i = start
        while (
            i < len(names) and names[i].startswith(prefix) and len(objects) + len(prefixes) < limit
        ):
            name, path = names[i], listing.paths[i]
            i += 1
            last = name
            obj = self.at(path) if path else None
            if obj is not None:
                modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(obj.mtime_ns / 1e9))
                objects.append(
                    f"<Contents><Key>{escape(name)}</Key><LastModified>{modified}</LastModified><ETag>&quot;{obj.etag}&quot;</ETag>"
                    f"<Size>{obj.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
            elif not path:
                prefixes.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
        more = i < len(names) and names[i].startswith(prefix)
        token = (
            f"<NextContinuationToken>{quote(last, safe='')}</NextContinuationToken>" if more else ""
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult '
            f"{_XMLNS}><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<Delimiter>{escape(delimiter)}</Delimiter><MaxKeys>{limit}</MaxKeys>"
            f"<KeyCount>{len(objects) + len(prefixes)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(objects)}{''.join(prefixes)}</ListBucketResult>"
        ).encode()


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _answer(status: int, fields: str, body: bytes, *, head: bool = False) -> bytes:
    start = (
        f"HTTP/1.1 {status} {_STATUS[status]}\r\nx-amz-request-id: 0\r\n"
        f"{fields}Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    return start if head else start + body


_XML = "Content-Type: application/xml\r\n"
_REGION = "x-amz-bucket-region: us-east-1\r\n"


def _error(status: int, code: str, resource: str, *, head: bool = False) -> tuple[int, bytes, int]:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code} at the '
        "benchmark's server</Message>"
        f"<Resource>{escape(resource)}</Resource><RequestId>0</RequestId></Error>"
    ).encode()
    return status, _answer(status, _XML + _REGION, body, head=head), 0 if head else len(body)


class _Server:
    """State that the connections share."""

    def __init__(self, root: str, latency_s: float, bandwidth_bytes_s: float) -> None:
        self.files = _Bucket(root)
        self.latency_s = latency_s
        self.bandwidth_bytes_s = bandwidth_bytes_s
        self.log: list[tuple[str, str, str, int, int]] = []
        self._line_free_s = 0.0

    def due_s(self, now_s: float, nbytes: int) -> float:
        """When an answer may be sent."""
        if not self.bandwidth_bytes_s:
            return now_s + self.latency_s
        self._line_free_s = (
            max(self._line_free_s, now_s + self.latency_s) + nbytes / self.bandwidth_bytes_s
        )
        return self._line_free_s

    def control(self, target: str) -> bytes:
        url = urlsplit(target)
        what, query = url.path.removeprefix(_CONTROL), parse_qs(url.query)
        body = b""
        if what == "log":
            body = json.dumps(self.log).encode()
        elif what == "cpu":
            body = repr(time.process_time()).encode()
        elif what == "reset":
            self.log.clear()
        elif what == "set":
            self.latency_s = float(query.get("latency_s", [self.latency_s])[0])
            self.bandwidth_bytes_s = float(
                query.get("bandwidth_bytes_s", [self.bandwidth_bytes_s])[0]
            )
        return _answer(200, "Content-Type: application/json\r\n", body)

    def answer(self, method: str, target: str, head: bytes) -> bytes:
        path, _, query = target.partition("?")
        bucket, _, key = _split(path)
        if key and method in ("GET", "HEAD") and (not query or query.startswith("x-id=")):
            status, data, nbytes = self._object(method, bucket, key, head)
            op = method
        else:
            op, key, (status, data, nbytes) = self._other(
                method, bucket, key, parse_qs(query, keep_blank_values=True)
            )
        self.log.append((op, bucket, key, status, nbytes))
        return data

    def _object(self, method: str, bucket: str, key: str, head: bytes) -> tuple[int, bytes, int]:
        obj, is_head = self.files.get(bucket, key), method == "HEAD"
        if obj is None:
            return _error(
                404,
                "NoSuchKey" if self.files.has(bucket) else "NoSuchBucket",
                f"/{bucket}/{key}",
                head=is_head,
            )
        conditional = _IF.search(head)
        if conditional is not None:
            matches = conditional[2].strip() in (
                b"*",
                obj.etag.encode(),
                b'"%s"' % obj.etag.encode(),
            )
            if matches is bool(conditional[1]):
                return (
                    (304, _answer(304, obj.fields, b"", head=True), 0)
                    if conditional[1]
                    else _error(412, "PreconditionFailed", key, head=is_head)
                )
        part = _RANGE.search(head)
        if part is None:
            if is_head:
                return 200, obj.answer[: -obj.size or None] if obj.answer else _head(obj), 0
            return 200, obj.answer or _answer(200, obj.fields, obj.part(0, obj.size)), obj.size
        start, stop = _span(part, obj.size)
        if start >= stop:
            return _error(416, "InvalidRange", key, head=is_head)
        fields = f"{obj.fields}Content-Range: bytes {start}-{stop - 1}/{obj.size}\r\n"
        return (
            206,
            _answer(206, fields, obj.part(start, stop), head=is_head),
            0 if is_head else stop - start,
        )

    def _other(
        self, method: str, bucket: str, key: str, query: dict[str, list[str]]
    ) -> tuple[str, str, tuple[int, bytes, int]]:
        if method not in ("GET", "HEAD") or key:
            return (
                method,
                key,
                _error(405, "MethodNotAllowed", f"/{bucket}/{key}", head=method == "HEAD"),
            )
        if not bucket:
            row = (
                "<Bucket><Name>{}</Name>"
                "<CreationDate>2026-01-01T00:00:00.000Z</CreationDate></Bucket>"
            )
            rows = "".join(map(row.format, self.files.names()))
            return (
                "BUCKET",
                "",
                _document(
                    "<ListAllMyBucketsResult "
                    f"{_XMLNS}><Buckets>{rows}</Buckets></ListAllMyBucketsResult>".encode()
                ),
            )
        prefix = query.get("prefix", [""])[0]
        is_list = method == "GET" and "location" not in query
        if not self.files.has(bucket):
            return (
                "LIST" if is_list else "BUCKET",
                prefix,
                _error(404, "NoSuchBucket", f"/{bucket}", head=method == "HEAD"),
            )
        if method == "HEAD":
            return "BUCKET", "", (200, _answer(200, _XML + _REGION, b"", head=True), 0)
        if not is_list:
            return (
                "BUCKET",
                "",
                _document(f"<LocationConstraint {_XMLNS}>us-east-1</LocationConstraint>".encode()),
            )
        after = (
            unquote(query["continuation-token"][0])
            if "continuation-token" in query
            else query.get("start-after", [""])[0]
        )
        limit = min(_PAGE, int(query.get("max-keys", [_PAGE])[0]))
        delimiter = query.get("delimiter", [""])[0]
        if delimiter not in ("", "/"):
            return "LIST", prefix, _error(400, "InvalidArgument", f"delimiter {delimiter}")
        return (
            "LIST",
            prefix,
            _document(
                self.files.page(bucket, prefix, delimiter=delimiter, after=after, limit=limit)
            ),
        )


_IF = re.compile(rb"\r\n[Ii]f-(?:([Nn]one)-)?[Mm]atch: *([^\r]*)")
_RANGE = re.compile(rb"\r\n[Rr]ange: *bytes=(\d*)-(\d*)")


@functools.lru_cache(1 << 20)
def _split(path: str) -> tuple[str, str, str]:
    bucket, slash, key = unquote(path).removeprefix("/").partition("/")
    return bucket, slash, key


def _span(part: re.Match[bytes], size: int) -> tuple[int, int]:
    if not part[1]:
        return max(0, size - int(part[2] or 0)), size
    return int(part[1]), min(size, int(part[2]) + 1) if part[2] else size


def _head(obj: _Object) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nx-amz-request-id: 0\r\n{obj.fields}"
    return f"{head}Content-Length: {obj.size}\r\n\r\n".encode()


def _document(body: bytes) -> tuple[int, bytes, int]:
    return 200, _answer(200, _XML + _REGION, body), len(body)


class _Connection(asyncio.Protocol):
    """One client's connection, kept alive; requests are answered in their order."""

    def __init__(self, server: _Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._unread = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head, rest = data[: end + 2], data[end + 4 :]
            length = _LENGTH.search(head)
            nbytes = int(length[1]) if length is not None else 0
            if len(rest) < nbytes:
                break  # an unwanted body, which must be consumed
            data = rest[nbytes:]
            method, target, _ = head[: head.index(b"\r\n")].decode("latin-1").split(" ", 2)
            if target.startswith(_CONTROL):
                self._transport.write(self._server.control(target))
                continue
            self._send(self._server.answer(method, target, head))
        self._unread = data

    def _send(self, answer: bytes) -> None:
        server = self._server
        if server.latency_s or server.bandwidth_bytes_s:
            self._loop.call_at(
                server.due_s(self._loop.time(), len(answer)), self._transport.write, answer
            )
        else:
            self._transport.write(answer)


_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)")


async def _serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    server = _Server(os.path.abspath(arguments.root), arguments.latency, arguments.bandwidth)
    listening = await loop.create_server(
        lambda: _Connection(server, loop), "127.0.0.1", 0, backlog=1024
    )
    sys.stdout.write(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await listening.serve_forever()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float, default=0.0)
    arguments = parser.parse_args()
    # everything here is kept or acyclic, and a collection over a million log rows is a pause that a
    # client would be blamed for
    gc.disable()

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    asyncio.run(_serve(arguments))


if __name__ == "__main__":
    _main()
