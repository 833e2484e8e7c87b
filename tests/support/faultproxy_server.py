"""The process of ``faultproxy``: ``python faultproxy_server.py http://host:port`` prints the
addresses of the proxy and of its admin interface, and serves.

One thread per connection, one request to the server per accepted request, no retries.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_START_S = 60.0
_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "upgrade",
    "proxy-connection",
    "expect",
    "content-length",
}
_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    500: "InternalError",
    503: "SlowDown",
}


class _Server(ThreadingHTTPServer):
    """Accepts connections on a port that stays reserved while it refuses them."""

    daemon_threads = True
    request_queue_size = 512
    allow_reuse_address = True

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], state: _State
    ) -> None:
        self.state = state
        self.open: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        with contextlib.suppress(OSError):
            if struct.unpack("ii", request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))[0]:
                # without a shutdown first, so that the peer gets a reset
                self.close_request(request)
                return
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for request in list(self.open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that disconnects is not an error."""


class _State:
    """State shared by the two servers."""

    def __init__(self, upstream: str) -> None:
        self.upstream = (str(urlsplit(upstream).hostname), int(urlsplit(upstream).port or 80))
        self.lock = threading.Lock()
        # Bound and never listening: the port is ours while the proxy is down, and connecting to it
        # is refused.
        self.holder = socket.socket()
        self.holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.holder.bind(("127.0.0.1", 0))
        self.address = self.holder.getsockname()
        self.server: _Server | None = None
        self.clear()

    def clear(self) -> None:
        with self.lock:
            self.rules: list[dict[str, Any]] = []
            self.used: collections.Counter[tuple[int, str]] = collections.Counter()
            self.seen: list[dict[str, Any]] = []
            # by id, so that a late request from before the last reset is not counted
            self.flying: set[int] = set()
            self.peak = 0

    def listen(self) -> None:
        if self.server is None:
            self.server = _Server(self.address, _Proxy, self)
            threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def refuse(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.socket.close()
            self.server.cut_connections()
            self.server = None

    def arrived(
        self, op: str, path: str, asked_range: str, headers: dict[str, str]
    ) -> tuple[dict[str, Any], str, float]:
        """Record a request; what to do with it."""
        with self.lock:
            seen = {
                "op": op,
                "path": path,
                "range": asked_range,
                "outcome": "",
                "headers": headers,
                "time_s": time.time(),
            }
            self.seen.append(seen)
            self.flying.add(id(seen))
            self.peak = max(self.peak, len(self.flying))
            for number, rule in enumerate(self.rules):
                if (rule["op"] and op not in rule["op"].split("|")) or not re.search(
                    rule["key"], path
                ):
                    continue
                if not re.search(
                    rule["signed_with"],
                    next((v for name, v in headers.items() if name.lower() == "authorization"), ""),
                ):
                    continue
                request = f"{op} {path} {asked_range}"
                slot = (number, request if rule["per_object"] or rule["dice"] else "")
                turn, self.used[slot] = self.used[slot], self.used[slot] + 1
                if rule["dice"]:
                    # Without the bucket, whose name differs in each run.
                    thrown = random.Random(
                        f"{rule['seed']} {op} {path.strip('/').partition('/')[2]} {asked_range} "
                        f"{turn}"
                    )
                    return (
                        seen,
                        thrown.choice(rule["faults"])
                        if thrown.random() < rule["dice"]
                        else rule["then"],
                        rule["latency_s"],
                    )
                return (
                    seen,
                    rule["faults"][turn] if turn < len(rule["faults"]) else rule["then"],
                    rule["latency_s"],
                )
            return seen, "ok", 0.0


def _altered(fault: str, body: bytes) -> bytes:
    """What a server stores that keeps the frames of an aws-chunked body, or flips a bit."""
    if fault == "frames":
        return b"%x\r\n%s\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n" % (len(body), body)
    return body[:-1] + bytes([body[-1] ^ 1])


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def handle_any(self) -> None:
        state, body, start = self.server.state, self._body(), time.monotonic()
        path, _, query = self.path.partition("?")
        path, options = unquote(path), parse_qs(query, keep_blank_values=True)
        is_bucket = not path.strip("/").partition("/")[2]
        op = self.command
        if is_bucket and op in ("GET", "HEAD"):
            op = (
                "LIST"
                if op == "GET"
                and not options.keys() & {"location", "versioning", "policy", "acl", "uploads"}
                else "META"
            )
        if op == "LIST":
            path = f"{path.rstrip('/')}/{options.get('prefix', [''])[0]}"
        seen, fault, latency_s = state.arrived(
            op, path, self.headers.get("Range", ""), dict(self.headers.items())
        )
        try:
            seen["outcome"] = fault
            time.sleep(max(0.0, start + latency_s - time.monotonic()))
            self._answer(fault, body, seen)
        except OSError:
            seen["outcome"] = "hung up"
            self.close_connection = True
        finally:
            self._landed(seen)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _answer(self, fault: str, body: bytes, seen: dict[str, Any]) -> None:
        if fault[0].isdigit():
            status, _, code = fault.partition(":")
            self._landed(seen)
            self._send_error_xml(int(status), code or _CODES.get(int(status), ""))
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "hang":
            self._silence()
            return
        if fault in ("frames", "flipped"):
            body = _altered(fault, body)
        upstream = http.client.HTTPConnection(*self.server.state.upstream, timeout=_START_S)
        with contextlib.closing(upstream):
            # Skip http.client's own headers: a signature may cover those of the request, each once.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            response = upstream.getresponse()
            content = response.read()
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP:
                is_etag = fault == "opaque" and name.lower() == "etag"
                self.send_header(name, f'"{value[3:-1]}-opaque"' if is_etag else value)
        length = (
            response.getheader("Content-Length", "0") if self.command == "HEAD" else len(content)
        )
        half = content[: len(content) // 2]
        if response.status != 204:
            self.send_header("Content-Length", str(len(half) if fault == "short" else length))
        if fault != "stall":
            self._landed(seen)
        self.end_headers()
        if fault in ("ok", "frames", "flipped", "opaque"):
            seen["outcome"] = str(response.status)
            self.wfile.write(content)
        elif fault == "corrupt":
            flipped = bytearray(content)
            flipped[len(flipped) // 2] ^= 0x10
            self.wfile.write(flipped)
        elif fault in ("short", "truncate", "stall", "reset_body"):
            self.wfile.write(half)
            self.close_connection = fault != "short"
            if fault == "reset_body":
                time.sleep(0.02)  # a reset overtakes what the peer has not read yet
                self._reset()
            if fault == "stall":
                self._silence()
        else:
            raise ValueError(f"unknown fault {fault!r}")

    def _landed(self, seen: dict[str, Any]) -> None:
        """Not in flight any more. Called before the last byte is sent: the client may send its next
        request right after it.
        """
        with self.server.state.lock:
            self.server.state.flying.discard(id(seen))

    def _send_error_xml(self, status: int, code: str) -> None:
        """S3's answer with its usual details; a status without a code is a load balancer's page."""
        if code:
            xml = (
                '<?xml version="1.0" '
                f'encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>Scripted {code}.</Message>'
                f"<AWSAccessKeyId>{self.headers.get('Authorization', '')}</AWSAccessKeyId>"
                "<RequestId>0</RequestId></Error>"
            ).encode()
        else:
            xml = b"<html><body><h1>Scripted.</h1></body></html>"
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml" if code else "text/html")
        self.send_header("Content-Length", str(len(xml)))
        if status == 301:
            self.send_header("x-amz-bucket-region", "eu-central-1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(xml)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _silence(self) -> None:
        self.close_connection = True
        self.connection.recv(1)  # until the client disconnects

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Admin(BaseHTTPRequestHandler):
    server: _Server

    def handle_any(self) -> None:
        state, body = (
            self.server.state,
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
        )
        answer: Any = None
        if self.path == "/rules":
            with state.lock:
                state.rules = json.loads(body)
                state.used.clear()
        elif self.path == "/reset":
            state.listen()
            assert state.server is not None
            state.server.cut_connections()
            state.clear()
        elif self.path == "/down":
            state.refuse()
        elif self.path == "/up":
            state.listen()
        elif self.path == "/seen":
            with state.lock:
                answer = [dict(s) for s in state.seen]
        elif self.path == "/flight":
            answer = {"peak": state.peak, "now": len(state.flying)}
        raw = json.dumps(answer).encode()
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_PUT = do_POST = handle_any

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _serve(upstream: str) -> None:
    state = _State(upstream)
    state.listen()
    admin = _Server(("127.0.0.1", 0), _Admin, state)
    threading.Thread(target=admin.serve_forever, daemon=True).start()
    print(
        f"http://127.0.0.1:{state.address[1]} http://127.0.0.1:{admin.server_address[1]}",
        flush=True,
    )
    sys.stdin.buffer.read()  # ends with the tests, also when they are killed


if __name__ == "__main__":
    _serve(sys.argv[1])
