"""Asking other nodes for an entry. A node that fails is left out for a while; nothing here is tried
twice, and nothing raises.

One connection a question. The one over which a lease was given stays open until the lease ends: if
this process is killed, the kernel closes it, and the home sends the next node.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode, urlsplit

from zarrcache._limits import most_bytes
from zarrcache.config import CacheConfig
from zarrcache.errors import ConfigError
from zarrcache.peers._token import read_token
from zarrcache.stats import LogOnce

__all__ = ["ANSWER", "WAIT_S", "Peers", "Reply", "nodes_by_duty"]

logger = logging.getLogger(__name__)

#: The header that says what an answer without an entry means: a kind of `leases.Word`.
ANSWER = "Zarrcache-Answer"
#: A node of the same cluster answers within milliseconds, or not at all.
_CONNECT_S = 2.0
_READ_S = 10.0  # for a whole answer up to its body, and for each part of a body
#: How long a home may keep a question until it has an answer. Less than :data:`_READ_S`.
WAIT_S = 5.0
#: A node that failed is not asked again for so long.
_SKIP_S = 60.0
#: Asking around ends after this time, entries that are on their way not included: a cluster of dead
#: nodes must not hold up every miss.
_LOOK_S = 5.0
#: The slowest transfer that is worth waiting for: S3 is about as fast.
_SLOWEST_BYTES_PER_S = 2**20
#: What an entry may have beyond its values: more than any header.
_HEADER_BYTES = 2**17
#: Of a body at a time. A part is what has come by then, so that a body that trickles is noticed.
_PART_BYTES = 2**18


@dataclass(slots=True)
class Reply:
    """An answer. ``entry``: its bytes are next, ``nbytes`` of them, by :meth:`readinto`; the other
    kinds are those of `leases.Word`, or ``none``.
    """

    kind: Literal["entry", "at", "lease", "busy", "alone", "none", "failed"]
    peer: str
    digest: str
    nbytes: int = 0
    node: str = ""
    connection: http.client.HTTPConnection | None = None
    body: http.client.HTTPResponse | None = None
    until_s: float = 0.0

    def readinto(self, buffer: memoryview) -> int:
        """The next bytes of the entry.

        Raises
        ------
        OSError, http.client.HTTPException
            They do not come, or too slowly.
        """
        assert self.body is not None
        if time.monotonic() > self.until_s:
            raise TimeoutError(f"slower than {_SLOWEST_BYTES_PER_S // 2**20} MiB/s")
        # Not its own readinto(): that stays inside until the buffer is full, however slowly the
        # bytes come.
        part = self.body.read1(min(len(buffer), _PART_BYTES))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Hang up."""
        if self.connection is not None:
            self.connection.close()


class Peers:
    """The other nodes of a config. Safe from any thread; in a child of a fork too.

    Parameters
    ----------
    config : CacheConfig

    Attributes
    ----------
    own : str or None
        The address by which others reach this node.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.own = config.advertise
        self._nodes = (
            tuple({*config.peers, *((self.own,) if self.own else ())}) if config.peers else ()
        )
        self._token_file = config.peer_token_file
        self._patience_s = config.retry.timeout
        self._token: str | None = None
        self._skipped_until_s: dict[str, float] = {}
        self._log_once = LogOnce()

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def check(self) -> None:
        """Raise ConfigError if there is a token file that cannot be used."""
        if self._nodes and self._token_file is not None:
            self._token = read_token(self._token_file)

    def replies(self, digest: str, *, source: str | None) -> Iterator[Reply]:
        """Entries (``entry``, each to be checked, and closed) from one node after the other, and
        before them the ``lease``, if this node is given it.

        The home of an entry, the first of its nodes that answers, is asked to wait for the one that
        is fetching it, if there is one; for at most the time that the retries of a fetch may take.

        Parameters
        ----------
        digest : str
        source : str, optional
            Entries of another source are not wanted.
        """
        order = nodes_by_duty(digest, self._nodes)
        asked: set[str] = set()
        has_home = False
        look_until_s = time.monotonic() + _LOOK_S
        for peer in order:
            if peer in asked or self._skipped_until_s.get(peer, 0.0) > time.monotonic():
                continue
            if time.monotonic() > look_until_s:
                return
            asked.add(peer)
            if not has_home and self.own is not None:
                for reply in self._of_home(peer, digest, source):
                    asked.add(reply.peer)
                    has_home = has_home or (reply.peer == peer and reply.kind != "failed")
                    if reply.kind in ("entry", "lease"):
                        yield reply
                look_until_s = time.monotonic() + _LOOK_S
            elif peer != self.own:
                reply = self._ask(peer, digest, source)
                if (
                    reply.kind == "at"
                    and reply.node in self._nodes
                    and reply.node not in {*asked, self.own}
                ):
                    asked.add(reply.node)
                    reply = self._ask(reply.node, digest, source)
                if reply.kind == "entry":
                    yield reply

    def end(self, lease: Reply, *, is_stored: bool) -> None:
        """Tell the home how the lease ended."""
        try:
            assert lease.connection is not None
            outcome = "stored" if is_stored else "given-up"
            with _hung_up_after(_READ_S, lease.connection):
                lease.connection.request(
                    "POST",
                    f"/v1/leases/{lease.digest}?{urlencode({'outcome': outcome})}",
                    headers=self._headers(),
                )
                lease.connection.getresponse()
        except (OSError, http.client.HTTPException, RuntimeError) as exc:  # it finds out by itself
            logger.debug(
                "%s was not told that the lease of %s is over: %s", lease.peer, lease.digest, exc
            )
        finally:
            lease.close()

    def _of_home(self, home: str, digest: str, source: str | None) -> Iterator[Reply]:
        until_s = time.monotonic() + self._patience_s
        gone = ""
        while True:
            reply = self._ask(home, digest, source, wants_lease=True, gone=gone)
            yield reply
            if reply.kind == "at" and reply.node in self._nodes and reply.node != self.own:
                yield self._ask(reply.node, digest, source)
                gone = reply.node  # the entry was not there, or not good: else nobody would ask on
            elif reply.kind != "busy":
                return
            if time.monotonic() > until_s:
                return

    def _ask(
        self,
        peer: str,
        digest: str,
        source: str | None,
        *,
        wants_lease: bool = False,
        gone: str = "",
    ) -> Reply:
        url = urlsplit(peer)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_CONNECT_S)
        words = {
            "source": source,
            "gone": gone,
            **({"node": self.own, "wait": WAIT_S} if wants_lease else {}),
        }
        query = urlencode({name: value for name, value in words.items() if value})
        keep = False
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(_READ_S)
            with _hung_up_after(_READ_S, connection):
                connection.request("GET", f"/v1/entries/{digest}?{query}", headers=self._headers())
                response = connection.getresponse()
            reply = self._reply_of(response, peer, digest)
            if reply.kind in ("entry", "lease"):
                reply.connection, keep = connection, True
            return reply
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as exc:
            # RuntimeError: no thread for the deadline
            self._skip(peer, str(exc) or type(exc).__name__)
            return Reply("failed", peer, digest)
        finally:
            if not keep:
                connection.close()

    def _reply_of(self, response: http.client.HTTPResponse, peer: str, digest: str) -> Reply:
        if response.status == 200:
            if response.length is None:
                raise ValueError("it does not say how long its answer is")
            if response.length > most_bytes() + _HEADER_BYTES:
                raise ValueError(f"it announced {response.length} bytes, which no entry has")
            until_s = time.monotonic() + _READ_S + response.length / _SLOWEST_BYTES_PER_S
            return Reply(
                "entry", peer, digest, nbytes=response.length, body=response, until_s=until_s
            )
        kind = response.headers.get(ANSWER, "")
        if (
            response.status in (202, 303, 404)
            and kind in ("at", "lease", "busy", "alone", "none")
            and response.length == 0
        ):
            response.read()  # nothing: the connection is free for the next request
            return Reply(kind, peer, digest, node=response.headers.get("Location", ""))  # type: ignore[arg-type]
        if response.status == 503:  # too many ask at once: the next miss may be luckier
            return Reply("none", peer, digest)
        why = (
            "it does not know our token (cache.peer_token_file)"
            if response.status == 401
            else f"it answered {response.status}"
        )
        raise ValueError(why)

    def _skip(self, peer: str, why: str) -> None:
        self._skipped_until_s[peer] = time.monotonic() + _SKIP_S
        self._log_once.warning(
            ("failed", peer),
            logger,
            "peer %s is left out for %d s, and each time that it fails again: %s",
            peer,
            _SKIP_S,
            why,
        )

    def _headers(self) -> dict[str, str]:
        if self._token is None and self._token_file is not None:
            try:
                self._token = read_token(self._token_file)
            except ConfigError as exc:  # the file has gone during the run; the peers refuse us then
                self._log_once.warning("token", logger, "%s", exc)
        return {"Authorization": f"Bearer {self._token}"} if self._token is not None else {}


@contextlib.contextmanager
def _hung_up_after(seconds: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """What is asked inside has so long for its whole answer: the timeout of a socket is for each
    part, and a part may be one byte.

    Raises
    ------
    TimeoutError
        It took longer. What was had inside is not to be used: http.client takes the end of a
        connection for the end of a header.
    """
    sock = connection.sock
    if sock is None:
        raise ConnectionError("it has hung up")
    is_late = threading.Event()

    def hang_up() -> None:
        is_late.set()
        with contextlib.suppress(OSError):  # it is closed already
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as exc:
        if is_late.is_set():
            raise TimeoutError(f"no whole answer within {seconds:g} s") from exc
        raise
    finally:
        timer.cancel()
        timer.join()  # it may be about to hang up
    if is_late.is_set():
        raise TimeoutError(f"no whole answer within {seconds:g} s")


def nodes_by_duty(digest: str, nodes: Iterable[str]) -> list[str]:
    """The nodes in the order in which they are in charge of an entry; the first is its home. Every
    node of one list finds the same order.

    Rendezvous hashing: each node is home of an equal share, and one that comes or goes changes the
    home of its own share alone.
    """
    return sorted(
        set(nodes),
        key=lambda node: hashlib.blake2b(f"{digest} {node}".encode(), digest_size=8).digest(),
    )
