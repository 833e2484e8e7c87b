"""Request an entry from other nodes.

A node that fails is skipped for a while. No request is repeated, and no error is raised: at worst
the entry is read from the origin.

Each request uses a new connection. The one over which a lease was granted stays open until the
lease ends: if this process is killed, the kernel closes it, and the home lets another node fetch.
No thread and no connection pool is used, so a fork at any time is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit

from zarrcache._units import most_bytes
from zarrcache.config import CacheConfig
from zarrcache.errors import ConfigError
from zarrcache.stats import LogOnce

__all__ = [
    "ANSWER_HEADER",
    "WAIT_S",
    "Peers",
    "Reply",
    "nodes_by_duty",
    "read_token",
    "transfer_limit_s",
]

logger = logging.getLogger(__name__)

#: Header that says what an answer without an entry means: a kind of `leases.Answer`, or ``none``.
ANSWER_HEADER = "Zarrcache-Answer"
#: A node of the same cluster answers within milliseconds, or not at all.
_CONNECT_S = 2.0
#: Timeout for a whole answer up to its body, and between two parts of a body.
_READ_S = 10.0
#: How long a home may wait for another node before it answers. Less than :data:`_READ_S`.
WAIT_S = 5.0
#: A node that failed is skipped for this long.
_SKIP_S = 60.0
#: After this time no further node is asked, not counting the transfer of entries. A cluster of
#: dead nodes must not delay every miss for longer.
_LOOK_S = 5.0
#: A slower transfer is given up: S3 is about as fast.
_SLOWEST_BYTES_PER_S = 2**20
#: Upper bound of an entry's header.
_HEADER_BYTES = 2**17

#: Characters that an HTTP header can carry. A shorter token could be guessed.
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
_MAKE_TOKEN = "Make one with: (umask 077; openssl rand -hex 32 > FILE)"


@dataclass(slots=True)
class Reply:
    """One node's answer.

    Attributes
    ----------
    kind : str
        ``entry``: :meth:`readinto` reads its ``nbytes`` bytes. ``none``: the node does not have it.
        ``failed``: there was no valid answer. The others are those of `leases.Answer`.
    peer, digest : str
        The node and the entry that were requested.
    node : str
        With ``at``: the node that has the entry.
    """

    kind: Literal["entry", "at", "lease", "busy", "alone", "none", "failed"]
    peer: str
    digest: str
    nbytes: int = 0
    node: str = ""
    connection: _Connection | None = None
    body: http.client.HTTPResponse | None = None

    def readinto(self, buffer: memoryview) -> int:
        """Read the next bytes of the entry.

        Raises
        ------
        OSError, http.client.HTTPException
            The bytes do not arrive, or too slowly.
        """
        assert self.body is not None
        return self.body.readinto(buffer)

    def close(self) -> None:
        """Close the connection, which ends its lease."""
        if self.connection is not None:
            self.connection.hang_up()
        if self.body is not None:
            self.body.close()


class Peers:
    """The other nodes of a config. Safe from any thread, and in the child of a fork.

    Parameters
    ----------
    config : CacheConfig

    Attributes
    ----------
    own : str or None
        The address by which other nodes reach this one.
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
        """Raise ConfigError if the token file cannot be used."""
        if self._nodes and self._token_file is not None:
            self._token = read_token(self._token_file)

    def replies(self, digest: str, *, source: str | None) -> Iterator[Reply]:
        """Ask one node after the other; yield the lease, if this node gets it, and each entry.

        The caller checks and closes each entry (``entry``).

        The home of an entry is the first of its nodes that answers. It is asked to wait for a node
        that is fetching the entry, for at most the time that the retries of a fetch may take.

        Parameters
        ----------
        digest : str
        source : str, optional
            Accept only entries of this source.
        """
        asked: set[str] = set()
        has_home = False
        look_until_s = time.monotonic() + _LOOK_S
        for peer in nodes_by_duty(digest, self._nodes):
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
        """Report to the home how the lease ended."""
        try:
            assert lease.connection is not None
            outcome = "stored" if is_stored else "given-up"
            lease.connection.limit_s(_READ_S)
            lease.connection.request(
                "POST",
                f"/v1/leases/{lease.digest}?{urlencode({'outcome': outcome})}",
                headers=self._headers(),
            )
            lease.connection.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            # Closing the connection ends the lease as well.
            logger.debug(
                "outcome of the lease of %s not reported to %s: %s", lease.digest, lease.peer, exc
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
                # Reached only if the entry was absent or bad: a caller that has a good one stops.
                gone = reply.node
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
        fields = {
            "source": source,
            "gone": gone,
            **({"node": self.own, "wait": WAIT_S} if wants_lease else {}),
        }
        query = urlencode({name: value for name, value in fields.items() if value})
        connection = _Connection(url.hostname or "", url.port, timeout=_CONNECT_S)
        is_kept = False
        try:
            connection.connect()
            connection.limit_s(_READ_S)
            connection.request("GET", f"/v1/entries/{digest}?{query}", headers=self._headers())
            reply = self._reply_of(connection.getresponse(), peer, digest)
            if reply.kind in ("entry", "lease"):
                reply.connection, is_kept = connection, True
                connection.limit_s(transfer_limit_s(reply.nbytes))
            return reply
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self._skip(peer, str(exc) or type(exc).__name__)
            return Reply("failed", peer, digest)
        finally:
            if not is_kept:
                connection.close()

    def _reply_of(self, response: http.client.HTTPResponse, peer: str, digest: str) -> Reply:
        if response.status == 200:
            if response.length is None:
                raise ValueError("its answer has no Content-Length")
            if response.length > most_bytes() + _HEADER_BYTES:
                raise ValueError(f"it announced {response.length} bytes, more than any entry has")
            return Reply("entry", peer, digest, nbytes=response.length, body=response)
        kind = response.headers.get(ANSWER_HEADER, "")
        if (
            response.status in (202, 303, 404)
            and kind in ("at", "lease", "busy", "alone", "none")
            and response.length == 0
        ):
            response.read()  # frees the connection for the next request
            node = response.headers.get("Location", "")
            return Reply(kind, peer, digest, node=node)  # type: ignore[arg-type]
        if response.status == 503:  # it serves too many clients; the next miss may succeed
            return Reply("none", peer, digest)
        raise ValueError(
            "it does not accept this node's token (cache.peer_token_file)"
            if response.status == 401
            else f"it answered {response.status}"
        )

    def _skip(self, peer: str, why: str) -> None:
        self._skipped_until_s[peer] = time.monotonic() + _SKIP_S
        self._log_once.warning(
            ("failed", peer),
            logger,
            "peer %s is skipped for %d s, now and after each further failure: %s",
            peer,
            _SKIP_S,
            why,
        )

    def _headers(self) -> dict[str, str]:
        if self._token is None and self._token_file is not None:
            try:
                self._token = read_token(self._token_file)
            except ConfigError as exc:
                # The file disappeared during the run; the peers will answer 401.
                self._log_once.warning("token", logger, "%s", exc)
        return {"Authorization": f"Bearer {self._token}"} if self._token is not None else {}


def nodes_by_duty(digest: str, nodes: Iterable[str]) -> list[str]:
    """Nodes in the order of their responsibility for an entry; the first one is its home.

    Every node with the same list computes the same order. Rendezvous hashing: each node is home of
    an equal share, and a node that joins or leaves changes the home of its own share only.
    """
    return sorted(
        set(nodes),
        key=lambda node: hashlib.blake2b(f"{digest} {node}".encode(), digest_size=8).digest(),
    )


def transfer_limit_s(nbytes: int) -> float:
    """Time limit in seconds, at both ends, for the transfer of an entry of ``nbytes``."""
    return _READ_S + nbytes / _SLOWEST_BYTES_PER_S


def read_token(path: Path) -> str:
    """Read the token, the secret that the nodes of one cluster share.

    It is read from a file that only its owner can read, never from a config or a command line.

    Raises
    ------
    ConfigError
        The file cannot be read, other users can read it, or it does not hold one word of 16 to 512
        printable characters. The message does not contain the word.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (
                not stat.S_ISREG(status.st_mode)
                or status.st_mode & 0o077
                or status.st_uid not in (os.getuid(), 0)
            ):
                raise ConfigError(
                    f"token file {path} has to be a file of this user that no other user can read; "
                    f"it belongs to user {status.st_uid} and has mode "
                    f"{stat.S_IMODE(status.st_mode):04o}. Run: chmod 600 {path}"
                )
            raw = file.read(1024)
    except OSError as exc:
        raise ConfigError(
            f"token file {path} cannot be read ({exc.strerror}). {_MAKE_TOKEN}"
        ) from exc
    token = raw.decode("latin-1").strip()
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError(
            f"token file {path} does not hold one word of 16 to 512 printable characters. "
            f"{_MAKE_TOKEN}"
        )
    return token


class _Connection(http.client.HTTPConnection):
    """An HTTP connection with a limit of the total time, besides the timeout of each part.

    The timeout of a plain socket is per part only, and a part may be one byte.
    """

    def connect(self) -> None:
        super().connect()
        # Keep it, because http.client drops `sock` when only the body of an answer is left.
        self.sock = self._limited = _LimitedSocket(fileno=self.sock.detach())

    def limit_s(self, seconds: float) -> None:
        """Limit the total time of all transfers until the next call to ``seconds``."""
        self._limited.until_s = time.monotonic() + seconds

    def hang_up(self) -> None:
        """Close the connection, also if a child that was forked meanwhile holds its descriptor."""
        with contextlib.suppress(OSError):
            self._limited.shutdown(socket.SHUT_RDWR)
        self.close()


class _LimitedSocket(socket.socket):
    """A socket that raises TimeoutError after ``until_s`` of the monotonic clock."""

    until_s = 0.0

    def sendall(self, *args: Any) -> None:
        self._set_timeout()
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        # http.client reads through this method.
        self._set_timeout()
        return super().recv_into(*args)

    def _set_timeout(self) -> None:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it is too slow")
        self.settimeout(min(left_s, _READ_S))
