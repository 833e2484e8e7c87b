"""A server that records what arrives, as an S3 server and as the HTTP proxy of one.

It has one object of ten bytes under every key, accepts every PUT, and, as a proxy, answers in place
of the named host: so requests for hosts of AWS can be looked at without a network.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__all__ = ["BODY", "Arrived", "Recorder", "recorder"]

BODY = b"0123456789"
_ETAG = '"781e5e245d69b566979b86e28d23f2c7"'
_WHEN = "Sun, 29 Nov 2026 10:00:00 GMT"
_LIST = (
    "<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{count}"
    "</KeyCount>{objects}</ListBucketResult>"
)
_OBJECT = (
    "<Contents><Key>{key}</Key><LastModified>2026-11-29T10:00:00.000Z</LastModified>"
    "<ETag>{etag}</ETag><Size>10</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


@dataclass(frozen=True)
class Arrived:
    """One request: where it went and how it was signed.

    Attributes
    ----------
    op : str
        ``LIST``, ``GET``, ``HEAD``, ``PUT``, ``DELETE``.
    host, path : str
        As the client meant them, also through the proxy.
    is_proxied : bool
        It came as to a proxy.
    scheme, key, region, service, token : str
        Of the signature; empty without one.
    payer, encryption : str
    has_checksum : bool
        A PUT brought a checksum to keep.
    engine : str
        By the name that the client gives itself: ``s3fs`` or ``obstore``.
    """

    op: str
    host: str
    path: str
    is_proxied: bool
    scheme: str
    key: str
    region: str
    service: str
    token: str
    payer: str
    encryption: str
    has_checksum: bool
    engine: str


class Recorder:
    """What has arrived, and the address: see `recorder`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = url.removeprefix("http://")
        self.arrived: list[Arrived] = []
        #: The server refuses requests that are signed for another region.
        self.only_region = ""


@contextlib.contextmanager
def recorder() -> Iterator[Recorder]:
    """Run the server in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.record = Recorder(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.record  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        record: Recorder = self.server.record  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        is_list = self.command == "GET" and "list-type" in url.query
        scheme, _, rest = self.headers.get("Authorization", "").partition(" ")
        scope = rest.partition("Credential=")[2].partition(",")[0].split("/")
        scope += [""] * (4 - len(scope))
        region = scope[2]
        record.arrived.append(
            Arrived(
                op="LIST" if is_list else self.command,
                host=url.netloc or self.headers["Host"],
                path=unquote(url.path),
                is_proxied=bool(url.netloc),
                scheme=scheme,
                key=scope[0] or rest.partition(":")[0],
                region=region,
                service=scope[3],
                token=self.headers.get("x-amz-security-token", ""),
                payer=self.headers.get("x-amz-request-payer", ""),
                encryption=self.headers.get("x-amz-server-side-encryption", ""),
                has_checksum=any(
                    n.lower().startswith(("x-amz-checksum-", "x-amz-trailer"))
                    and n.lower() != "x-amz-checksum-mode"
                    for n in self.headers
                ),
                engine="s3fs" if "botocore" in self.headers["User-Agent"].lower() else "obstore",
            )
        )
        if record.only_region and region != record.only_region:
            code = (
                "<Error><Code>AuthorizationHeaderMalformed</Code><Message>wrong region</Message>"
                f"<Region>{record.only_region}</Region></Error>"
            )
            self._send(400, code.encode(), xml=True)
        elif is_list:
            prefix = dict(p.partition("=")[::2] for p in url.query.split("&")).get("prefix", "")
            keys = [] if "new" in prefix else [f"{unquote(prefix)}x"]
            objects = "".join(_OBJECT.format(key=key, etag=_ETAG) for key in keys)
            text = _LIST.format(count=len(keys), objects=objects)
            self._send(200, text.encode(), xml=True)
        elif self.command == "HEAD" and "new" in url.path:
            self._send(404, b"")
        else:
            self._send(200, b"" if self.command in ("PUT", "DELETE") else BODY)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer

    def _send(self, status: int, body: bytes, *, xml: bool = False) -> None:
        self.send_response(status)
        self.send_header("ETag", _ETAG)
        self.send_header("Last-Modified", _WHEN)
        self.send_header("Content-Length", str(len(body)))
        if xml:
            self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
