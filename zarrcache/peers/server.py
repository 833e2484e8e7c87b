"""Serve entries of this node's cache to other nodes over HTTP, read-only, by digest.

::

    GET  /v2/entries/DIGEST?source=…&node=…&wait=…&without=…&after=others
         200 and the entry, byte for byte as it is on disk, followed by its keyed digest; or
         no body, and a kind:
             none   (404)  not here
             at     (303)  ``node`` has it
             lease  (404)  fetch it from the origin, keep this connection, report on it
             busy   (202)  ``node`` is fetching it: ask again
             alone  (404)  its fetcher could not store it: each node fetches for itself
    POST /v2/leases/DIGEST?outcome=busy&silent=SECONDS
    POST /v2/leases/DIGEST?outcome=stored|given-up
         204; 409 if this connection has no such lease

Requests and answers carry keyed digests, see `_seal`. What an answer says is in the header
``Zarrcache-Answer``. Only a client that gives its own address as ``node`` waits (at most ``wait``
seconds) and gets leases. Every answer except ``lease`` and 204 to ``busy`` ends its connection.

Requests of any other version get status 426, before all other checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from zarrcache._keys import is_digest
from zarrcache.disk import CacheDir, is_fresh, open_entries, parse_header
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.peers._seal import (
    ANSWER_HEADER,
    PROTOCOL,
    SEAL_BYTES,
    SEAL_HEADER,
    VERSION,
    Receiver,
    StaleError,
    answer_seal,
    body_seal,
    key_of,
    pack,
)
from zarrcache.peers.client import WAIT_S, transfer_limit_s
from zarrcache.peers.leases import Lease, Leases
from zarrcache.stats import Counters, LogOnce

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
#: Bytes that a connection may send until its request is valid. Usual requests have less than 2 KiB:
#: up to 18 addresses, a source and a digest.
_MAX_REQUEST_BYTES = 4096
#: Seconds from the connection to the end of its first request.
_REQUEST_S = 10.0
#: Longest time, in seconds, between two reports over the connection of a lease. The lease itself
#: lapses earlier; a holder that is late may still report that it has stored the entry.
_LEASE_CONNECTION_S = 120.0
#: Bytes of an entry that are hashed at a time.
_STEP_BYTES = 2**20
#: Seconds that requests in progress get when the server closes.
_CLOSE_S = 0.1
#: After 5 s of silence and three unanswered probes, 5 s apart, the kernel reports the connection of
#: a lease as broken.
_TCP_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_NODE = re.compile(r"http://[A-Za-z0-9._:\[\]-]{1,255}")
_OTHER_VERSION = (
    f"This server speaks {VERSION} of zarrcache's protocol between nodes. Install the same version "
    "of zarrcache on all nodes.\n"
)
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
        The secret that clients have to prove. It may be None only on a loopback address.
    metrics : callable, optional
        Returns the text of ``/metrics``, which needs no token. Called in a thread.

    Attributes
    ----------
    url : str
        ``http://host:port``, with the actual port.
    counters : Counters
        ``sent_bytes`` counts the entries that were sent.

    Raises
    ------
    ConfigError
        Listening on the address fails, or other machines can reach it and there is no token.
    """

    def __init__(
        self,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        metrics: Callable[[], bytes] | None = None,
    ) -> None:
        self._entries = CacheDir(directory).entries
        try:
            os.listdir(self._entries)
        except FileNotFoundError:
            pass  # nothing is cached yet
        except OSError as exc:
            raise ConfigError(
                f"cache.dir {directory} cannot be read by user {os.getuid()} ({exc.strerror}). Run "
                "`zarrcache serve` as its owner."
            ) from exc
        self.counters = Counters(shared=True, directory=directory)
        self._metrics = metrics
        self._receiver = Receiver(key_of(token))  # before the first request can be made
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
        self._service = _Service(self._entries, self._receiver, self.counters, self._metrics)
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

    Its ``lease``, if one was granted over it, ends with it.
    """

    def __init__(self, service: _Service, server: web.Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            # Idle connections are closed by limit_s.
            keepalive_timeout=2 * _LEASE_CONNECTION_S,
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

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # aiohttp's answer names the versions of Python and aiohttp, and quotes the request.
        super().handle_error(request, status, exc, message)
        response = web.Response(status=status, headers={"Server": PROTOCOL})
        response.force_close()
        return response

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

    def __init__(
        self,
        entries: Path,
        receiver: Receiver,
        counters: Counters,
        metrics: Callable[[], bytes] | None,
    ) -> None:
        self._entries = entries
        self._counters = counters
        self._metrics = metrics
        self._receiver = receiver
        self._leases = Leases()
        self._log_once = LogOnce()
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
        path, _, digest = request.rel_url.raw_path.rpartition("/")
        version = path.split("/")[1] if path else ""
        if version != VERSION and re.fullmatch(r"v\d{1,3}", version):
            return self._other_version(version)
        if self._metrics is not None and (request.method, request.path) == ("GET", "/metrics"):
            return await self._measured(self._metrics)
        # Check the token first: without it every answer is the same.
        answer = _Answer(self._receiver.key, request)
        try:
            seal = self._receiver.check(
                request.headers.get("Authorization", ""),
                request.method,
                request.headers.get("Host", ""),
                request.raw_path,
            )
        except StaleError as exc:
            answer.seal = exc.args[0]
            return answer.empty(401, kind="time", now=f"{time.time():.6f}")
        if seal is None:
            return answer.empty(401)
        answer.seal = seal
        if request.method not in ("GET", "POST"):
            return answer.empty(501)
        # Only the digest becomes part of a file name.
        expected = f"/{VERSION}/entries" if request.method == "GET" else f"/{VERSION}/leases"
        if path != expected or not is_digest(digest) or request.body_exists:
            return answer.empty(400)
        connection = request.protocol
        assert isinstance(connection, _Connection)
        if connection not in self._served:
            if len(self._served) >= _MAX_SERVED:
                return answer.empty(503)
            self._pending.pop(connection, None)
            self._served.add(connection)
        connection.accept_request()
        if request.method == "GET":
            return await self._entry(answer, connection, digest)
        return self._report(answer, connection, digest)

    async def _measured(self, metrics: Callable[[], bytes]) -> web.Response:
        """Answer with the counters of this node, which Prometheus fetches without the token."""
        content = await asyncio.get_running_loop().run_in_executor(None, metrics)
        response = web.Response(
            body=content,
            headers={"Server": PROTOCOL, "Content-Type": "text/plain; version=0.0.4"},
        )
        response.force_close()
        return response

    def _other_version(self, version: str) -> web.Response:
        self._log_once.warning(
            "version",
            logger,
            "a node that speaks %s of zarrcache's protocol was refused; this server speaks %s. "
            "Install the same version of zarrcache on all nodes (logged once)",
            version,
            VERSION,
        )
        response = web.Response(status=426, text=_OTHER_VERSION, headers={"Server": PROTOCOL})
        response.force_close()
        return response

    async def _entry(
        self, answer: _Answer, connection: _Connection, digest: str
    ) -> web.StreamResponse:
        query = answer.request.query
        source = query.get("source")
        for file, nbytes in self._open(digest, source):
            return await self._send(answer, connection, file, nbytes)
        node = query.get("node", "")
        if not _NODE.fullmatch(node):
            holder = self._leases.holder(digest)
            return answer.of_kind("at" if holder else "none", node=holder)
        # A client that asks again over the connection of its lease did not fetch the entry.
        self._end_lease(connection, "lost")
        begin_s = time.monotonic()
        reply = await self._leases.ask(
            digest,
            node,
            wait_s=_seconds(query.get("wait", ""), WAIT_S),
            without=query.getall("without", ()),
            lets_others_first=query.get("after") == "others",
        )
        waited = f"{time.monotonic() - begin_s:.3f}"
        if reply.kind == "at":
            # Perhaps stored by another process of this node.
            for file, nbytes in self._open(digest, source):
                return await self._send(answer, connection, file, nbytes, waited=waited)
        if reply.lease is not None:
            connection.lease = reply.lease
            connection.limit_s(_LEASE_CONNECTION_S)
        silent = f"{reply.silent_s:.3f}" if reply.kind == "busy" else None
        return answer.of_kind(reply.kind, node=reply.node, waited=waited, silent=silent)

    async def _send(
        self, answer: _Answer, connection: _Connection, file: FileIO, nbytes: int, **fields: object
    ) -> web.StreamResponse:
        response = await answer.entry(connection, file, nbytes, **fields)
        self._counters.add(sent_bytes=nbytes)
        return response

    def _report(self, answer: _Answer, connection: _Connection, digest: str) -> web.Response:
        lease, query = connection.lease, answer.request.query
        if lease is None or lease.digest != digest:
            return answer.empty(409)
        if query.get("outcome") == "busy":
            self._leases.renew(lease, _seconds(query.get("silent", ""), _LEASE_CONNECTION_S))
            connection.limit_s(_LEASE_CONNECTION_S)
            return answer.empty(204, is_last=False)
        self._end_lease(connection, "stored" if query.get("outcome") == "stored" else "given-up")
        return answer.empty(204)

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


class _Answer:
    """The answer to one request.

    ``seal`` is the digest of the request, once it has proved the token.
    """

    def __init__(self, key: bytes, request: web.BaseRequest) -> None:
        self.request, self.seal = request, ""
        self._key = key

    def empty(self, status: int, *, is_last: bool = True, **fields: object) -> web.Response:
        """Without a body."""
        response = web.Response(status=status, headers=self._headers(status, fields))
        if is_last:
            response.force_close()
        return response

    def of_kind(self, kind: str, **fields: object) -> web.Response:
        """Without a body, of a kind."""
        return self.empty(_STATUS[kind], is_last=kind != "lease", kind=kind, **fields)

    async def entry(
        self, connection: _Connection, file: FileIO, nbytes: int, **fields: object
    ) -> web.StreamResponse:
        """Send an entry within the time that the client allows."""
        headers = self._headers(200, {"kind": "entry", "nbytes": nbytes, **fields})
        response = web.StreamResponse(
            headers={**headers, "Content-Type": "application/octet-stream"}
        )
        response.content_length = nbytes + SEAL_BYTES
        response.force_close()
        await response.prepare(self.request)
        if connection.transport is None or connection.transport.is_closing():
            raise ConnectionResetError("the client has hung up")
        loop = asyncio.get_running_loop()
        # A descriptor of its own: the thread may still read when the transfer has been given up.
        hashing = loop.run_in_executor(
            None, _hash, os.dup(file.fileno()), nbytes, body_seal(self._key, self.seal)
        )
        try:
            # Not limit_s: asyncio's sendfile has to be cancelled before its connection is closed.
            async with asyncio.timeout(transfer_limit_s(nbytes)):
                await loop.sendfile(connection.transport, file, 0, nbytes)
                await response.write(await hashing)
        except TimeoutError:
            connection.abort()
        return response

    def _headers(self, status: int, fields: dict[str, object]) -> dict[str, str]:
        headers = {"Server": PROTOCOL}
        text = pack(**fields)
        if text:
            headers[ANSWER_HEADER] = text
        if self.seal:
            headers[SEAL_HEADER] = answer_seal(self._key, self.seal, status, text).hex()
        return headers


def _hash(fd: int, nbytes: int, seal: Any) -> bytes:
    """Digest of a file's first bytes. Runs in a thread; closes the descriptor."""
    try:
        buffer, offset = memoryview(bytearray(_STEP_BYTES)), 0
        while offset < nbytes:
            got = os.preadv(fd, [buffer[: nbytes - offset]], offset)
            if not got:
                break
            seal.update(buffer[:got])
            offset += got
        return bytes(seal.digest())
    finally:
        os.close(fd)


def _is_entry(file: FileIO, nbytes: int, path: str, digest: str, source: str | None) -> bool:
    """Whether a file is the entry that its name says, and of the requested source."""
    try:
        header = parse_header(os.pread(file.fileno(), 4096, 0), nbytes, path, file.fileno())
    except CorruptEntryError as exc:
        logger.warning("not served: %s Run `zarrcache verify`.", exc)
        return False
    return header.key.digest == digest and is_fresh(header.source, source)


def _seconds(text: str, most_s: float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return min(seconds, most_s) if math.isfinite(seconds) and seconds > 0 else 0.0
