"""Request an entry from other nodes.

A peer that fails, hangs or is slow costs this node a few seconds in all (`_patience`). No request
is repeated, and no error is raised: at worst the entry is read from the origin.

Each request uses a new connection. The one over which a lease was granted stays open until the
lease ends: if this process is killed, the kernel closes it, and the home lets another node fetch.
No thread and no connection pool is used, so a fork at any time is safe.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit

from zarrcache._units import most_bytes
from zarrcache.config import CacheConfig
from zarrcache.errors import ConfigError
from zarrcache.peers._connection import Connection
from zarrcache.peers._patience import Patience
from zarrcache.peers._seal import (
    ANSWER_HEADER,
    PROTOCOL,
    SEAL_BYTES,
    SEAL_HEADER,
    VERSION,
    Sender,
    answer_seal,
    body_seal,
    is_equal,
    key_of,
    unpack,
)
from zarrcache.stats import LogOnce

__all__ = [
    "WAIT_S",
    "Peers",
    "Reply",
    "nodes_by_duty",
    "read_token",
    "transfer_limit_s",
]

logger = logging.getLogger(__name__)

#: Longest time of a connection. The kernel sends a lost SYN again after one second.
_CONNECT_S = 1.3
#: Longest time of a request up to the answer's body. A node of the same cluster answers within
#: milliseconds, or not at all.
_ANSWER_S = 1.5
#: The same where the home may wait for another node before it answers.
_WAITING_ANSWER_S = 2.5
#: How long a home may wait for another node before it answers.
WAIT_S = 1.0
#: A holder of a lease reports at most this often, in seconds, that it proceeds.
_RENEW_S = 0.7
#: Silence of a holder, in seconds, that is not charged to it.
_SILENT_S = 1.5
#: Seconds for which a node trusts its last check that its own server answers.
_OWN_CHECK_S = 5.0
#: Name of the budget for waits, by a node whose own server does not answer, for other nodes.
_FOLLOWING = "following"
#: The digest of no entry, to find out whether a node answers.
_NO_ENTRY = "0" * 32
#: After this time no further node is asked, not counting the transfer of entries. A cluster of
#: dead nodes must not delay every miss for longer.
_LOOK_S = 5.0
#: A server ends slower transfers: they would occupy one of its ``_MAX_SERVED`` connections.
_TRANSFER_S = 10.0
_SLOWEST_BYTES_PER_S = 2**20
#: Upper bound of an entry's header.
_HEADER_BYTES = 2**17
#: Nodes that a request asks its home not to name; bounded, to keep a request below 4 KiB.
_MAX_WITHOUT = 16

#: Printable ASCII without blanks. A shorter token could be guessed.
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
        With ``at``: the node that has the entry. With ``busy``: the one that is fetching it.
    waited_s, silent_s : float
        Seconds that the home waited for another node, and how long that was silent at the end.
    spent_s : float
        Seconds that the peer took, without those that it waited.
    """

    kind: Literal["entry", "at", "lease", "busy", "alone", "none", "failed"]
    peer: str
    digest: str
    nbytes: int = 0
    node: str = ""
    waited_s: float = 0.0
    silent_s: float = 0.0
    spent_s: float = 0.0
    connection: Connection | None = None
    body: http.client.HTTPResponse | None = None
    seal: Any = None
    ended: Callable[[Reply], None] | None = None
    left_bytes: int = 0
    failure: str = ""
    renewed_s: float = 0.0

    @property
    def url(self) -> str:
        """URL of the entry at this peer."""
        return f"{self.peer}/{VERSION}/entries/{self.digest}"

    def readinto(self, buffer: memoryview) -> int:
        """Read the next bytes of the entry. The last ones are returned once its digest is right.

        Raises
        ------
        OSError, http.client.HTTPException
            The bytes do not arrive, or too slowly, or were changed on the way.
        """
        assert self.body is not None
        if not self.left_bytes:
            return 0
        begin_s = time.monotonic()
        try:
            got = self.body.readinto(buffer[: self.left_bytes])
            self.seal.update(buffer[:got])
            self.left_bytes -= got
            if not self.left_bytes and not is_equal(self.body.read(SEAL_BYTES), self.seal.digest()):
                raise OSError("its keyed digest does not match")
            if not got:
                self.failure = "an entry ended early"
            return got
        except (OSError, http.client.HTTPException) as exc:
            self.failure = str(exc) or type(exc).__name__
            raise
        finally:
            self.spent_s += time.monotonic() - begin_s

    def close(self) -> None:
        """Close the connection, which ends its lease."""
        if self.connection is not None:
            self.connection.hang_up()
        if self.body is not None:
            self.body.close()
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(self)


class Peers:
    """The other nodes of a config. Safe from any thread, and in the child of a fork.

    Parameters
    ----------
    config : CacheConfig
    node_dir : Path, optional
        An existing directory of this node, where its processes share how long each peer has made
        them wait.

    Attributes
    ----------
    own : str or None
        The address by which other nodes reach this one.
    """

    def __init__(self, config: CacheConfig, node_dir: Path | None = None) -> None:
        self.own = config.advertise
        self._nodes = (
            tuple({*config.peers, *((self.own,) if self.own else ())}) if config.peers else ()
        )
        self._token_file = config.peer_token_file
        self._patience_s = config.retry.timeout
        self._key: bytes | None = None
        self._patience = Patience(node_dir)
        self._senders: dict[str, Sender] = defaultdict(Sender)
        self._own_until_s, self._can_serve = 0.0, True
        self._log_once = LogOnce()

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def check(self) -> None:
        """Raise ConfigError if the token file cannot be used."""
        if self._nodes:
            self._key = key_of(read_token(self._token_file) if self._token_file else None)

    def probe(self) -> Iterator[tuple[str, str]]:
        """Request an entry that no node has from each node; yield its URL and the failure or ''."""
        self.check()
        for peer in self._nodes:
            yield peer, self._ask(peer, _NO_ENTRY, None).failure

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
            if peer in asked or not self._patience.left_s(peer):
                continue
            if time.monotonic() > look_until_s:
                return
            asked.add(peer)
            if not has_home and self.own is not None:
                for reply in self._of_home(peer, digest, source, asked):
                    has_home = has_home or (reply.peer == peer and reply.kind != "failed")
                    if reply.kind in ("entry", "lease"):
                        yield reply
                look_until_s = time.monotonic() + _LOOK_S
            elif peer != self.own:
                reply = self._ask(peer, digest, source)
                if reply.kind == "at" and self._may_ask(reply.node, asked):
                    asked.add(reply.node)
                    reply = self._ask(reply.node, digest, source)
                if reply.kind == "entry":
                    yield reply

    def renew(self, lease: Reply, silent_s: float) -> None:
        """Report to the home that the fetch proceeds, if the last report was a while ago.

        Without a report for a few seconds the home lets another node fetch.

        Parameters
        ----------
        silent_s : float
            Seconds for which no sign of life is to be expected.
        """
        now_s = time.monotonic()
        if lease.connection is None or now_s + silent_s < lease.renewed_s + _RENEW_S:
            return
        lease.renewed_s = now_s + silent_s
        if not self._report(lease, outcome="busy", silent=f"{silent_s:.1f}"):
            lease.close()

    def end(self, lease: Reply, *, is_stored: bool) -> None:
        """Report to the home how the lease ended."""
        # Closing the connection ends the lease as well, for another node to take. So it is with an
        # entry that others cannot get from here.
        if self._can_serve:
            self._report(lease, outcome="stored" if is_stored else "given-up")
        lease.close()

    def _report(self, lease: Reply, **fields: str) -> bool:
        connection = lease.connection
        if connection is None:
            return False
        begin_s = time.monotonic()
        try:
            connection.limit_s(self._patience.limit_s(lease.peer, _ANSWER_S))
            answer = self._exchange(
                connection,
                lease.peer,
                "POST",
                f"/{VERSION}/leases/{lease.digest}?{urlencode(fields)}",
            )
            answer.response.read()
        except (OSError, http.client.HTTPException, ValueError) as exc:
            logger.debug("lease of %s not reported to %s: %s", lease.digest, lease.peer, exc)
            self._charge(lease.peer, time.monotonic() - begin_s, str(exc) or type(exc).__name__)
            return False
        self._charge(lease.peer, time.monotonic() - begin_s)
        return answer.response.status == 204

    def _may_ask(self, node: str, asked: Collection[str]) -> bool:
        """Whether to follow a home to the node that it has named."""
        return (
            node in self._nodes
            and node != self.own
            and node not in asked
            and bool(self._patience.left_s(node))
        )

    def _of_home(
        self, home: str, digest: str, source: str | None, asked: set[str]
    ) -> Iterator[Reply]:
        until_s = time.monotonic() + self._patience_s
        begin_s, charged_s = time.monotonic(), 0.0
        named: set[str] = set()
        self._check_own_server(home)
        while True:
            left_out = (node for node in self._nodes if not self._patience.left_s(node))
            reply = self._ask(
                home,
                digest,
                source,
                wants_lease=True,
                without=sorted({*asked, *left_out} - {home, self.own})[:_MAX_WITHOUT],
            )
            yield reply
            if reply.kind == "at" and reply.node not in named:
                named.add(reply.node)
                if self._may_ask(reply.node, asked):
                    asked.add(reply.node)
                    yield self._ask(reply.node, digest, source)
                # Reached only if the entry was absent or bad: a caller that has a good one stops.
                asked.add(reply.node)
            elif reply.kind == "busy":
                # The silence of a holder is charged to it as if this node had asked it directly.
                silent_s = min(reply.silent_s, time.monotonic() - begin_s)
                if silent_s > _SILENT_S and reply.node:
                    self._charge(reply.node, silent_s - charged_s)
                    charged_s = silent_s
                elif reply.silent_s < charged_s:
                    begin_s, charged_s = time.monotonic(), 0.0
            else:
                return
            if time.monotonic() > until_s:
                return

    def _check_own_server(self, home: str) -> None:
        """Find out, every 5 s at most, whether the other nodes can get entries from this one.

        If they cannot, this node still gets entries from others, but the next node that misses an
        entry that this one has fetched has to fetch it again. So this node lets another one that
        misses the same entry go first.
        """
        assert self.own is not None
        if home != self.own and time.monotonic() >= self._own_until_s:
            is_left_out = not self._patience.left_s(self.own)
            self._can_serve = (
                not is_left_out and self._ask(self.own, _NO_ENTRY, None).kind != "failed"
            )
            self._own_until_s = time.monotonic() + _OWN_CHECK_S

    def _ask(
        self,
        peer: str,
        digest: str,
        source: str | None,
        *,
        wants_lease: bool = False,
        without: Collection[str] = (),
    ) -> Reply:
        limit_s = self._patience.limit_s(peer, _WAITING_ANSWER_S if wants_lease else _ANSWER_S)
        fields: list[tuple[str, str]] = [("source", source)] if source else []
        if wants_lease:
            fields += [("node", self.own or ""), ("wait", f"{min(WAIT_S, limit_s / 2):.2f}")]
            fields += [("without", node) for node in without]
            if not self._can_serve and self._patience.left_s(_FOLLOWING):
                fields.append(("after", "others"))
        target = f"/{VERSION}/entries/{digest}?{urlencode(fields)}"
        begin_s = time.monotonic()
        reply = Reply("failed", peer, digest)
        try:
            reply = self._reply(peer, target, digest, limit_s)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            reply.failure = str(exc) or type(exc).__name__
        reply.spent_s = max(0.0, time.monotonic() - begin_s - min(reply.waited_s, WAIT_S))
        if reply.kind == "entry":
            reply.ended = self._entry_ended
            assert reply.connection is not None
            reply.connection.limit_s(
                Patience.transfer_s(reply.nbytes) + self._patience.left_s(peer)
            )
        else:
            self._charge(peer, reply.spent_s, reply.failure)
            if reply.kind == "lease" and not self._can_serve:
                self._patience.charge(_FOLLOWING, reply.waited_s)
        if peer == self.own and reply.kind == "failed":
            self._can_serve, self._own_until_s = False, time.monotonic() + _OWN_CHECK_S
        return reply

    def _reply(self, peer: str, target: str, digest: str, limit_s: float) -> Reply:
        """Send a request over a connection of its own, which is kept if the answer needs it."""
        url = urlsplit(peer)
        until_s = time.monotonic() + limit_s
        for is_last in (False, True):
            connection = Connection(url.hostname or "", url.port)
            is_kept = False
            try:
                connection.limit_s(min(_CONNECT_S, until_s - time.monotonic()))
                connection.connect()
                connection.limit_s(until_s - time.monotonic())
                answer = self._exchange(connection, peer, "GET", target)
                if answer.fields.get("kind") == "time" and not is_last:
                    self._senders[peer].adopt(answer.fields.get("now", ""))
                    continue
                reply = _reply_of(answer, peer, digest)
                if reply.kind in ("entry", "lease"):
                    reply.connection, is_kept = connection, True
                if reply.kind == "entry":
                    reply.seal = body_seal(self._digest_key(), answer.request)
                return reply
            finally:
                if not is_kept:
                    connection.close()
        raise AssertionError

    def _exchange(self, connection: Connection, peer: str, method: str, target: str) -> _Answer:
        """Send a signed request; its answer, whose digest is right."""
        key, host = self._digest_key(), urlsplit(peer).netloc
        authorization, seal = self._senders[peer].authorization(key, method, host, target)
        connection.request(method, target, headers={"Host": host, "Authorization": authorization})
        response = connection.getresponse()
        text = response.headers.get(ANSWER_HEADER, "")
        if response.headers.get("Server") != PROTOCOL:
            raise ValueError(
                f"it answered {response.status} and is not a server of this version of zarrcache; "
                "install the same version on all nodes"
            )
        given = response.headers.get(SEAL_HEADER, "")
        if not is_equal(given, answer_seal(key, seal, response.status, text)):
            raise ValueError(
                "it does not accept this node's token (cache.peer_token_file)"
                if response.status == 401
                else f"it answered {response.status} without proving the token "
                "(cache.peer_token_file)"
            )
        return _Answer(response, unpack(text), seal)

    def _entry_ended(self, reply: Reply) -> None:
        self._charge(reply.peer, reply.spent_s, reply.failure, entry_bytes=reply.nbytes)

    def _charge(
        self, peer: str, seconds: float, failure: str = "", *, entry_bytes: int | None = None
    ) -> None:
        out_s = self._patience.charge(
            peer,
            seconds,
            entry_bytes=None if failure else entry_bytes,
            failed=bool(failure),
        )
        if out_s:
            text = (
                "this node's own server %s does not answer, so other nodes cannot get entries from "
                "it. Start `zarrcache serve` here (left out for %.0f s: %s)"
                if peer == self.own
                else "peer %s is left out for %.0f s, and again after each further failure or "
                "delay: %s"
            )
            why = failure or "it is too slow"
            self._log_once.warning(("failed", peer), logger, text, peer, out_s, why)

    def _digest_key(self) -> bytes:
        if self._key is None:
            try:
                self.check()
            except ConfigError as exc:
                # The file disappeared during the run; the peers will answer 401.
                self._log_once.warning("token", logger, "%s", exc)
        return self._key or key_of(None)


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer whose digest is right: its fields, and the digest of its request."""

    response: http.client.HTTPResponse
    fields: dict[str, str]
    request: str


def _reply_of(answer: _Answer, peer: str, digest: str) -> Reply:
    response, fields = answer.response, answer.fields
    kind: Any = fields.get("kind", "")
    nbytes = 0
    if response.status == 200 and kind == "entry":
        nbytes = int(fields.get("nbytes", ""))
        if response.length != nbytes + SEAL_BYTES:
            raise ValueError("its answer has another length than it says")
        if not 0 <= nbytes <= most_bytes() + _HEADER_BYTES:
            raise ValueError(f"it announced {nbytes} bytes, more than any entry has")
    elif kind in ("at", "lease", "busy", "alone", "none") and response.length == 0:
        response.read()  # frees the connection for the next request
    elif response.status == 503:  # it serves too many clients; the next miss may succeed
        kind = "none"
    else:
        raise ValueError(f"it answered {response.status}")
    return Reply(
        kind,
        peer,
        digest,
        nbytes=nbytes,
        left_bytes=nbytes,
        body=response if kind == "entry" else None,
        node=fields.get("node", ""),
        waited_s=float(fields.get("waited", "0")),
        silent_s=float(fields.get("silent", "0")),
    )


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
    """Seconds after which a server stops sending an entry of ``nbytes``."""
    return _TRANSFER_S + nbytes / _SLOWEST_BYTES_PER_S


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
