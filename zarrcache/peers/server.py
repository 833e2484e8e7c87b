"""Serve entries of this node's cache to other nodes over HTTP, read-only and by digest alone.

::

    GET  /v1/entries/DIGEST?source=…&node=…&wait=…&gone=…
         200                            the entry, byte for byte as it lies on disk
         no body, and Zarrcache-Answer:
             none   (404)  not here
             at     (303)  the node in Location has it
             lease  (404)  fetch it from the origin, keep this connection, report the outcome
             busy   (202)  a node is fetching it: ask again
             alone  (404)  its fetcher could not store it: fetch it for yourself
    POST /v1/leases/DIGEST?outcome=stored|given-up
         204

Only a client that gives its own address as ``node`` waits (at most ``wait`` seconds) and is
granted leases.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import math
import os
import re
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from io import FileIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from zarrcache._keys import is_digest
from zarrcache.disk import CacheDir, is_fresh, open_entries, parse_header
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.peers.client import ANSWER, WAIT_S
from zarrcache.peers.leases import LEASE_S, Lease, Leases

__all__ = ["EntryServer"]

logger = logging.getLogger(__name__)

#: Connections at a time. Each has a thread; whoever comes beyond them is told so at once, and goes
#: to the origin.
_MOST_CONNECTIONS = 256
#: Seconds for each part of a request to come, and of an answer to go. A client that is slower is
#: hung up on. One that sends a byte in that time keeps its connection: it could as well open
#: another one, and more than :data:`_MOST_CONNECTIONS` it does not get.
_IDLE_S = 10.0
_NODE = re.compile(r"http://[A-Za-z0-9._:\[\]-]{1,255}")
#: Seconds without a word, between two questions, and how many, after which the kernel takes a node
#: for dead that holds a lease.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_STATUS = {"none": 404, "at": 303, "lease": 404, "busy": 202, "alone": 404}


class EntryServer:
    """Serves the array tier of one cache directory, which need not exist yet. A context manager: it
    listens when it is made, answers inside.

    Parameters
    ----------
    directory : Path
        A ``cache.dir``.
    host : str
        Name or address to listen on.
    port : int
        0: any that is free.
    token : str, optional
        What clients have to show. None is allowed on a loopback address only.

    Attributes
    ----------
    url : str
        ``http://host:port``, with the port that was found.

    Raises
    ------
    ConfigError
        The address cannot be listened on, or others than this machine could reach it and there is
        no token.
    """

    def __init__(
        self, directory: Path, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
    ) -> None:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            if (
                token is None
                and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
            ):
                raise ConfigError(
                    f"{host} can be reached by other machines, and there is no token: anybody "
                    "could read the cache. Give --token-file FILE, or set "
                    "cache.peer_token_file, or listen on 127.0.0.1."
                )
            self._server = _Server(family, address, CacheDir(directory).entries, token)
        except OSError as exc:
            raise ConfigError(
                f"{host}:{port} cannot be listened on ({exc.strerror or exc}). Choose another "
                "--host or --port."
            ) from exc
        safe_repr = f"[{host}]" if ":" in host else host
        self.url = f"http://{safe_repr}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="zarrcache serve", daemon=True
        )

    def __enter__(self) -> EntryServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop within a second. What is on its way is cut off; clients see that it is short, and
        look elsewhere.
        """
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, family: int, address: Any, entries: Path, token: str | None) -> None:
        self.address_family = family
        self.entries = entries
        self.token = token
        self.leases = Leases()
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, if there is one left."""
        if not self._free.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.send(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: "
                    b"close\r\n\r\n"
                )
            self.shutdown_request(request)
            return
        self._open.add(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread could be started
            self._open.discard(request)
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)
            self._free.release()

    def hang_up(self) -> None:
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or is too slow, is no error of this node."""
        logger.debug("connection of %s ended", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "zarrcache", ""
    timeout = _IDLE_S
    disable_nagle_algorithm = True
    server: _Server
    lease: Lease | None = None

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                self.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def finish(self) -> None:
        """The connection is over, and with it the lease that was given over it."""
        self._end_lease("lost")
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.address_string(), format % args)

    def do_GET(self) -> None:
        digest, words = self._context("entries")
        if digest is None:
            return
        node, gone = (
            value if _NODE.fullmatch(value) else ""
            for value in (words.get("node", ""), words.get("gone", ""))
        )
        if self._send_entry(digest, words.get("source")):
            return
        if not node:
            holder = self.server.leases.holder(digest)
            self._answer("at" if holder else "none", holder or "")
            return
        # who asks again over the same connection has not fetched what it was given
        self._end_lease("lost")
        word = self.server.leases.ask(
            digest, node, wait_s=_wait_s(words.get("wait", "")), gone=gone
        )
        # by a process of this node
        if word.kind == "at" and self._send_entry(digest, words.get("source")):
            return
        if word.lease is not None:
            self.lease = word.lease
            self.connection.settimeout(LEASE_S)
        self._answer(word.kind, word.node)

    def do_POST(self) -> None:
        digest, words = self._context("leases")
        if digest is None:
            return
        if self.lease is None or self.lease.digest != digest:
            self._refuse(409)
            return
        self._end_lease("stored" if words.get("outcome") == "stored" else "given up")
        self._answer("", status=204)

    def _context(self, kind: str) -> tuple[str | None, dict[str, str]]:
        """Digest and words of a request; no digest if it was refused. No other part of it becomes
        the name of a file.
        """
        url = urlsplit(self.path)
        token = self.server.token
        if token is not None and not hmac.compare_digest(
            self.headers.get("Authorization", "").encode("latin-1", "replace"),
            f"Bearer {token}".encode(),
        ):
            self._refuse(401)
            return None, {}
        start, _, digest = url.path.rpartition("/")
        if start != f"/v1/{kind}" or not is_digest(digest):
            self._refuse(400)
            return None, {}
        return digest, {
            name: values[-1] for name, values in parse_qs(url.query, max_num_fields=8).items()
        }

    def _send_entry(self, digest: str, source: str | None) -> bool:
        """Send the entry, if it is here. Its checksum is compared by who gets it."""
        try:
            for file, nbytes, path in open_entries(self.server.entries, digest):
                if _is_entry(file, nbytes, path, digest, source):
                    self.send_response(200)
                    self.send_header("Content-Type", "application/octet-stream")
                    self.send_header("Content-Length", str(nbytes))
                    self.end_headers()
                    self.close_connection = True
                    self.connection.sendfile(file)
                    return True
        except OSError as exc:
            if self.close_connection:  # the client has hung up
                raise
            logger.warning("entries in %s cannot be read: %s", self.server.entries, exc)
        return False

    def _answer(self, kind: str, node: str = "", *, status: int | None = None) -> None:
        self.send_response(status or _STATUS[kind])
        if kind:
            self.send_header(ANSWER, kind)
        if node:
            self.send_header("Location", node)
        if status != 204:
            self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: int) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def _end_lease(self, outcome: Literal["stored", "given up", "lost"]) -> None:
        if self.lease is not None:
            self.server.leases.end(self.lease, outcome)
            self.lease = None
            self.connection.settimeout(_IDLE_S)


def _is_entry(file: FileIO, nbytes: int, path: str, digest: str, source: str | None) -> bool:
    """Whether a file is what it is called, and of the source that is asked for."""
    try:
        header = parse_header(os.pread(file.fileno(), 4096, 0), nbytes, path, file.fileno())
    except CorruptEntryError as exc:
        logger.warning("not served: %s Run `zarrcache verify`.", exc)
        return False
    return header.key.digest == digest and is_fresh(header.source, source)


def _wait_s(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return min(seconds, WAIT_S) if math.isfinite(seconds) and seconds > 0 else 0.0
