"""Serve entries of this node's cache to other nodes over HTTP, read-only, by digest.

::

    GET  /v1/entries/DIGEST?source=…&node=…&wait=…&gone=…
         200                            the entry, byte for byte as it is on disk
         no body, and Zarrcache-Answer:
             none   (404)  not here
             at     (303)  the node in Location has it
             lease  (404)  fetch it from the origin, keep this connection, report the outcome
             busy   (202)  a node is fetching it: ask again
             alone  (404)  its fetcher could not store it: each node fetches for itself
    POST /v1/leases/DIGEST?outcome=stored|given-up
         204

Only a client that gives its own address as ``node`` waits (at most ``wait`` seconds) and gets
leases. Every answer except ``lease`` ends its connection.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import math
import os
import re
import socket
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from zarrcache._keys import is_digest
from zarrcache.disk import CacheDir, is_fresh, open_entries, parse_header
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.peers.client import ANSWER_HEADER, WAIT_S, transfer_limit_s
from zarrcache.peers.leases import LEASE_S, Lease, Leases

__all__ = ["EntryServer"]

logger = logging.getLogger(__name__)

#: Clients that are served at once. Each may cost three descriptors: its connection, the entry, and
#: the entry's directory. Further clients are answered 503 and read from the origin.
_MAX_SERVED = 256
#: Connections that have not sent a valid request yet. When one more arrives, the oldest is closed:
#: a valid client sends its request immediately, so idle connections cannot keep it out. Together
#: with the descriptors of the served clients this stays below 1024, the usual limit of a process.
_MAX_PENDING = 128
#: Connections accepted per round of the event loop. A request is read and answered within three
#: rounds, so none is closed in a burst of valid clients; the rest waits in the kernel's queue.
_ACCEPTED_PER_ROUND = 32
_KERNEL_QUEUE = 1024
#: Bytes that a connection may send until its request is valid. A request of zarrcache has less than
#: 2 KiB, with a token of up to 512 characters, two addresses, and a source.
_MAX_REQUEST_BYTES = 4096
#: Seconds from the connection to the end of its first request.
_REQUEST_S = 10.0
#: Seconds that requests in progress get when the server closes.
_CLOSE_S = 0.1
#: After 5 s of silence and three unanswered probes, 5 s apart, the kernel reports the connection of
#: a lease as broken.
_TCP_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_NODE = re.compile(r"http://[A-Za-z0-9._:\[\]-]{1,255}")
_STATUS = {"none": 404, "at": 303, "lease": 404, "busy": 202, "alone": 404}


def _is_own_error(record: logging.LogRecord) -> bool:
    """Whether aiohttp reports an error of this node, not a malformed request."""
    exc = record.exc_info[1] if record.exc_info else None
    return not isinstance(exc, HttpProcessingError | ConnectionError)


_http_logger = logging.getLogger(f"{__name__}.http")
_http_logger.addFilter(_is_own_error)


class EntryServer:
    """Serves the array tier of one cache directory, which need not exist yet.

    A context manager. It listens once constructed, and answers inside the block, in a thread.

    Parameters
    ----------
    directory : Path
        A ``cache.dir``.
    host : str
        Name or address to listen on.
    port : int
        0 chooses a free one.
    token : str, optional
        The secret that clients have to send. It may be None only on a loopback address.

    Attributes
    ----------
    url : str
        ``http://host:port``, with the actual port.

    Raises
    ------
    ConfigError
        Listening on the address fails, or other machines can reach it and there is no token.
    """

    def __init__(
        self, directory: Path, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
    ) -> None:
        self._entries, self._token = CacheDir(directory).entries, token
        self._listener = _listen(host, port, needs_loopback=token is None)
        bracketed = f"[{host}]" if ":" in host else host
        self.url = f"http://{bracketed}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="zarrcache serve", daemon=True)

    def __enter__(self) -> EntryServer:
        self._loop, self._is_closing = asyncio.new_event_loop(), asyncio.Event()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop within a second. Calling it again does nothing.

        Entries that are being sent are cut off; their clients detect that they are too short and
        try other sources.
        """
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._is_closing.set)
            self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._service = _Service(self._entries, self._token)
        # asyncio uses one number for the connections per round and for the kernel's queue.
        listening = await self._loop.create_server(
            self._service.connect, sock=self._listener, backlog=_ACCEPTED_PER_ROUND
        )
        self._listener.listen(_KERNEL_QUEUE)
        await self._is_closing.wait()
        listening.close()
        await self._service.close()


def _listen(host: str, port: int, *, needs_loopback: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if needs_loopback and not ip.is_loopback:
            raise ConfigError(
                f"{host} can be reached by other machines, and there is no token, so any of them "
                "could read the cache. Give --token-file FILE, set cache.peer_token_file, or "
                "listen on 127.0.0.1."
            )
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit these; aiohttp turns the probes on.
            for name, value in _TCP_KEEPALIVE.items():
                if hasattr(socket, name):
                    listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            listener.bind(address)
            listener.listen(_KERNEL_QUEUE)
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({exc.strerror or exc}). Choose another --host or "
            "--port."
        ) from exc
    return listener


class _Connection(web.RequestHandler):
    """One connection of aiohttp, with a limit of bytes and seconds for each request.

    Parameters
    ----------
    service : _Service
    server : web.Server
        Calls the service for each request.

    Attributes
    ----------
    lease : Lease or None
        Granted over this connection; it ends with the connection.
    """

    def __init__(self, service: _Service, server: web.Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            # Idle connections are closed by limit_s.
            keepalive_timeout=2 * LEASE_S,
            lingering_time=0,
            logger=_http_logger,
            access_log=_http_logger,
        )
        self.lease: Lease | None = None
        self._service = service
        self._left_bytes = _MAX_REQUEST_BYTES
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.limit_s(_REQUEST_S)
        self._service.add(self)

    def data_received(self, data: bytes) -> None:
        # Count before passing it to aiohttp, which keeps a multiple of a malformed or pipelined
        # request until Python's garbage collector runs.
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self.abort()
        else:
            super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.limit_s(None)
        self._service.remove(self)
        super().connection_lost(exc)

    def limit_s(self, seconds: float | None) -> None:
        """Close the connection after ``seconds``; None lifts the limit."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.abort)

    def accept_request(self) -> None:
        """Lift the limits of a valid request; the next one starts with new limits."""
        self.limit_s(None)
        self._left_bytes = _MAX_REQUEST_BYTES

    def abort(self) -> None:
        """Close the connection now."""
        if self.transport is not None:
            self.transport.abort()


class _Service:
    """Answers each request from the entries on disk and the leases.

    Used in the event loop only.
    """

    def __init__(self, entries: Path, token: str | None) -> None:
        self._entries = entries
        self._expected = f"Bearer {token}".encode() if token is not None else None
        self._leases = Leases()
        self._served: set[_Connection] = set()
        self._pending: dict[_Connection, None] = {}  # a set in order of arrival
        # With cancellation, the handler of a client that has hung up stops waiting.
        self._server = web.Server(self._answer, handler_cancellation=True)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._served) + len(self._pending)

    def connect(self) -> _Connection:
        """Create the protocol of a new connection."""
        return _Connection(self, self._server)

    async def close(self) -> None:
        """Close all connections."""
        await self._server.shutdown(_CLOSE_S)

    def add(self, connection: _Connection) -> None:
        """Add a new connection; if too many are idle, close the oldest."""
        if len(self._pending) >= _MAX_PENDING:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.abort()
        self._pending[connection] = None

    def remove(self, connection: _Connection) -> None:
        """Forget a connection that has ended, and its lease."""
        self._pending.pop(connection, None)
        self._served.discard(connection)
        self._end_lease(connection, "lost")

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        # Check the token first, in constant time: without it every answer is the same.
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            return _empty(401)
        if request.method not in ("GET", "POST"):
            return _empty(501)
        # Only the digest becomes part of a file name.
        kind, _, digest = request.rel_url.raw_path.rpartition("/")
        expected_kind = "/v1/entries" if request.method == "GET" else "/v1/leases"
        if kind != expected_kind or not is_digest(digest) or request.body_exists:
            return _empty(400)
        connection = request.protocol
        assert isinstance(connection, _Connection)
        if connection not in self._served:
            if len(self._served) >= _MAX_SERVED:
                return _empty(503)
            self._pending.pop(connection, None)
            self._served.add(connection)
        connection.accept_request()
        if request.method == "GET":
            return await self._entry(request, connection, digest)
        return self._report(request, connection, digest)

    async def _entry(
        self, request: web.BaseRequest, connection: _Connection, digest: str
    ) -> web.StreamResponse:
        query = request.query
        source = query.get("source")
        for file, nbytes in self._open(digest, source):
            return await _send(connection, request, file, nbytes)
        node, gone = (
            value if _NODE.fullmatch(value) else ""
            for value in (query.get("node", ""), query.get("gone", ""))
        )
        if not node:
            holder = self._leases.holder(digest)
            return _of_kind("at" if holder else "none", holder or "")
        # A client that asks again over the connection of its lease did not fetch the entry.
        self._end_lease(connection, "lost")
        answer = await self._leases.ask(
            digest, node, wait_s=_wait_s(query.get("wait", "")), gone=gone
        )
        if answer.kind == "at":
            # Perhaps stored by another process of this node.
            for file, nbytes in self._open(digest, source):
                return await _send(connection, request, file, nbytes)
        if answer.lease is not None:
            connection.lease = answer.lease
            connection.limit_s(LEASE_S)
        return _of_kind(answer.kind, answer.node)

    def _report(
        self, request: web.BaseRequest, connection: _Connection, digest: str
    ) -> web.Response:
        if connection.lease is None or connection.lease.digest != digest:
            return _empty(409)
        is_stored = request.query.get("outcome") == "stored"
        self._end_lease(connection, "stored" if is_stored else "given-up")
        return _empty(204)

    def _open(self, digest: str, source: str | None) -> Iterator[tuple[FileIO, int]]:
        """Entries that may be sent, each open until the next one is requested.

        Their payload is not read; the client verifies its checksum.
        """
        try:
            for file, nbytes, path in open_entries(self._entries, digest):
                if _is_entry(file, nbytes, path, digest, source):
                    yield file, nbytes
        except OSError as exc:
            logger.warning("entries in %s cannot be read: %s", self._entries, exc)

    def _end_lease(
        self, connection: _Connection, outcome: Literal["stored", "given-up", "lost"]
    ) -> None:
        if connection.lease is not None:
            self._leases.end(connection.lease, outcome)
            connection.lease = None


async def _send(
    connection: _Connection, request: web.BaseRequest, file: FileIO, nbytes: int
) -> web.StreamResponse:
    """Send an entry within the time that the client allows."""
    response = web.StreamResponse(
        headers={"Server": "zarrcache", "Content-Type": "application/octet-stream"}
    )
    response.content_length = nbytes
    response.force_close()
    await response.prepare(request)
    if connection.transport is None or connection.transport.is_closing():
        raise ConnectionResetError("the client has hung up")
    try:
        # Not limit_s: asyncio's sendfile has to be cancelled before its connection is closed.
        async with asyncio.timeout(transfer_limit_s(nbytes)):
            await asyncio.get_running_loop().sendfile(connection.transport, file, 0, nbytes)
    except TimeoutError:
        connection.abort()
    return response


def _of_kind(kind: str, node: str = "") -> web.Response:
    response = _empty(_STATUS[kind], is_last=kind != "lease")
    response.headers[ANSWER_HEADER] = kind
    if node:
        response.headers["Location"] = node
    return response


def _empty(status: int, *, is_last: bool = True) -> web.Response:
    response = web.Response(status=status, headers={"Server": "zarrcache"})
    if is_last:
        response.force_close()
    return response


def _is_entry(file: FileIO, nbytes: int, path: str, digest: str, source: str | None) -> bool:
    """Whether a file is the entry that its name says, and of the requested source."""
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
