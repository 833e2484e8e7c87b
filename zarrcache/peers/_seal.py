"""Prove requests and answers with a keyed digest of the token, which itself is never sent.

Both ends share a token. Each request carries its time, a random nonce, and a digest over them, the
method, the path with its query, and the host it is meant for. Each answer carries a digest over the
request's digest, its status and what it says; behind an entry follows one over all of its bytes. So
a listener learns no token, and a byte that is changed, left out, added, repeated, or taken from
another answer is detected. Nothing is encrypted.

Digests are keyed BLAKE2b (RFC 7693), about 1 GB/s on one core of any processor; HMAC-SHA-256 is
faster only where the processor has instructions for it, and half as fast elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

__all__ = [
    "ANSWER_HEADER",
    "PROTOCOL",
    "SEAL_BYTES",
    "SEAL_HEADER",
    "VERSION",
    "WINDOW_S",
    "Receiver",
    "Sender",
    "StaleError",
    "answer_seal",
    "body_seal",
    "is_equal",
    "key_of",
    "pack",
    "unpack",
]

#: Version of the protocol between nodes, the first part of every path.
VERSION = "v2"
#: The header ``Server`` of every answer.
PROTOCOL = f"zarrcache-{VERSION}"
#: Header of every answer: what it says, as fields of a query.
ANSWER_HEADER = "Zarrcache-Answer"
#: Header of every answer: its digest.
SEAL_HEADER = "Zarrcache-Digest"
#: Bytes of the digest that follow those of an entry.
SEAL_BYTES = 32
#: A request is valid for this many seconds before and after its time. A client whose clock differs
#: by more is sent the server's time once.
WINDOW_S = 30.0
#: Requests whose nonces are remembered; 60 s of 3,000 requests per second, in about 30 MB.
_MAX_NONCES = 200_000

_SCHEME = "Zarrcache"
_AUTHORIZATION = re.compile(
    rf"{_SCHEME} (\d{{1,12}}\.\d{{6}}) ([0-9a-f]{{32}}) ([0-9a-f]{{{2 * SEAL_BYTES}}})"
)


class StaleError(Exception):
    """A request of a client with the token, made too long ago by this clock, or seen before."""


def key_of(token: str | None) -> bytes:
    """The key of a token; without one the digests only detect accidents."""
    return hashlib.blake2b(
        (token or "").encode(), digest_size=32, person=b"zarrcache peers"
    ).digest()


def _digest(key: bytes, purpose: bytes, *texts: str) -> Any:
    digest = hashlib.blake2b(key=key, digest_size=SEAL_BYTES, person=purpose)
    for text in texts:
        raw = text.encode("utf-8", "surrogateescape")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest


def is_equal(given: str | bytes, expected: bytes) -> bool:
    """Compare a digest, in bytes or hex digits, in constant time."""
    raw = given if isinstance(given, bytes) else given.encode("utf-8", "surrogateescape")
    return hmac.compare_digest(
        raw, expected if isinstance(given, bytes) else expected.hex().encode()
    )


def answer_seal(key: bytes, request: str, status: int, text: str) -> bytes:
    """Digest of an answer without its body: the request's digest, the status, `ANSWER_HEADER`."""
    return bytes(_digest(key, b"answer", request, str(status), text).digest())


def body_seal(key: bytes, request: str) -> Any:
    """A hash object for the bytes of an entry in the answer to a request."""
    return _digest(key, b"entry", request)


def pack(**fields: object) -> str:
    """The text of `ANSWER_HEADER`; fields without a value are left out."""
    return urlencode({name: value for name, value in fields.items() if value not in ("", None)})


def unpack(text: str) -> dict[str, str]:
    """The fields of `ANSWER_HEADER`."""
    return dict(parse_qsl(text))


@dataclass(slots=True)
class Sender:
    """Signs the requests to one server.

    Attributes
    ----------
    ahead_s : float
        Seconds by which the server's clock is ahead of this one; 0.0 until the server has sent its
        time, which it does if the difference matters.
    """

    ahead_s: float = 0.0

    def authorization(self, key: bytes, method: str, host: str, target: str) -> tuple[str, str]:
        """The header ``Authorization`` of a request, and the request's digest."""
        stamp, nonce = f"{time.time() + self.ahead_s:.6f}", secrets.token_hex(16)
        seal = _digest(key, b"request", method, host, target, stamp, nonce).hexdigest()
        return f"{_SCHEME} {stamp} {nonce} {seal}", seal

    def adopt(self, server_s: str) -> None:
        """Adopt the server's time, from an answer whose digest is right. Raises ValueError."""
        ahead_s = float(server_s) - time.time()
        if not math.isfinite(ahead_s):
            raise ValueError("its time is not a number")
        self.ahead_s = ahead_s


class Receiver:
    """Checks the requests to one server. Not safe from several threads.

    Parameters
    ----------
    key : bytes
    clock : callable
        Seconds; differences to those of the clients matter.
    """

    def __init__(self, key: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self.key, self._clock = key, clock
        self._start_s = clock()  # nonces of an earlier process of this server are not known
        self._nonces: dict[str, float] = {}  # in order of arrival

    def check(self, authorization: str, method: str, host: str, target: str) -> str | None:
        """The request's digest; None if it does not prove the token.

        Raises
        ------
        StaleError
            It does, but it may be a repetition of an earlier request. ``args`` has the digest.
        """
        match = _AUTHORIZATION.fullmatch(authorization)
        if match is None:
            return None
        stamp, nonce, seal = match.groups()
        expected = _digest(self.key, b"request", method, host, target, stamp, nonce).digest()
        if not is_equal(seal, expected):
            return None
        now_s = self._clock()
        # A clock that was set back would otherwise make all requests too old until it catches up.
        self._start_s = min(self._start_s, now_s)
        while self._nonces and (
            len(self._nonces) >= _MAX_NONCES
            or abs(next(iter(self._nonces.values())) - now_s) > 2 * WINDOW_S
        ):
            del self._nonces[next(iter(self._nonces))]
        if not max(self._start_s, now_s - WINDOW_S) <= float(stamp) <= now_s + WINDOW_S or (
            nonce in self._nonces
        ):
            raise StaleError(seal)
        self._nonces[nonce] = now_s
        return seal
