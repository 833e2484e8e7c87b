"""A peer that answers as a test requires: one thread, one request per connection, raw bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from zarrcache.peers import _seal as seal

__all__ = [
    "Answer",
    "RoguePeer",
    "claiming",
    "entry_answer",
    "hanging",
    "running_peer",
    "says",
    "signed_head",
    "trickling",
    "trickling_head",
]

#: Gets the connection after the request was read, and the request; sends any bytes.
Answer = Callable[[socket.socket, str], None]


@dataclass
class RoguePeer:
    """Its address, and the first line and headers of each request."""

    url: str
    asked: list[str] = field(default_factory=list)


def request_seal(request: str) -> str:
    """The digest of a request, from its header."""
    return request.partition("Authorization: Zarrcache ")[2].split()[2]


def signed_head(
    request: str, status: int, *, length: int, token: str | None = None, **fields: object
) -> bytes:
    """Status line and headers of an answer to ``request`` that proves the token."""
    text = seal.pack(**fields)
    digest = seal.answer_seal(seal.key_of(token), request_seal(request), status, text).hex()
    return (
        f"HTTP/1.1 {status} X\r\nServer: {seal.PROTOCOL}\r\nContent-Length: {length}\r\n"
        f"{seal.ANSWER_HEADER}: {text}\r\n{seal.SEAL_HEADER}: {digest}\r\n\r\n"
    ).encode()


def says(
    status: int, *, token: str | None = None, after_s: float = 0.0, **fields: object
) -> Answer:
    """A signed answer without a body."""

    def answer(connection: socket.socket, request: str) -> None:
        time.sleep(after_s)
        connection.sendall(signed_head(request, status, length=0, token=token, **fields))

    return answer


def entry_answer(
    raw: bytes,
    *,
    claims: int | None = None,
    sends: int | None = None,
    reset: bool = False,
    change: Callable[[bytes], bytes] = bytes,
    token: str | None = None,
) -> Answer:
    """200 with an entry, which a node with the token has signed; with a wrong length, or cut off
    after ``sends`` bytes, by a close or a reset, or changed on its way.
    """

    def answer(connection: socket.socket, request: str) -> None:
        nbytes = len(raw) if claims is None else claims
        digest = seal.body_seal(seal.key_of(token), request_seal(request))
        digest.update(raw[:nbytes])
        head = signed_head(
            request,
            200,
            length=nbytes + seal.SEAL_BYTES,
            token=token,
            kind="entry",
            nbytes=nbytes,
        )
        connection.sendall(head + change(raw + digest.digest())[:sends])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def hanging(connection: socket.socket, request: str = "") -> None:
    """Sends nothing until the client disconnects."""
    connection.settimeout(60)
    with contextlib.suppress(OSError):
        connection.recv(1)


def trickling(raw: bytes) -> Answer:
    """Sends an entry byte by byte."""

    def answer(connection: socket.socket, request: str) -> None:
        length = len(raw) + seal.SEAL_BYTES
        connection.sendall(signed_head(request, 200, length=length, kind="entry", nbytes=len(raw)))
        for i in range(len(raw)):
            connection.sendall(raw[i : i + 1])
            time.sleep(0.02)

    return answer


def trickling_head(raw: bytes) -> Answer:
    """Sends a header of 500 bytes one at a time, each within the timeout of a recv, and then a good
    entry.
    """

    def answer(connection: socket.socket, request: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(500):
            connection.sendall(b"x")
            time.sleep(0.02)
        length = len(raw) + seal.SEAL_BYTES
        head = signed_head(request, 200, length=length, kind="entry", nbytes=len(raw))
        connection.sendall(head[head.index(b"\r\n") :] + raw)

    return answer


def claiming(raw: bytes, length: int) -> Answer:
    """Announces ``length`` bytes, sends what it has, and keeps the connection open."""

    def answer(connection: socket.socket, request: str) -> None:
        head = signed_head(
            request, 200, length=length + seal.SEAL_BYTES, kind="entry", nbytes=length
        )
        connection.sendall(head + raw)
        hanging(connection)

    return answer


@contextlib.contextmanager
def running_peer(answer: Answer) -> Iterator[RoguePeer]:
    """Serve until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = RoguePeer(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # the test is over
                    return
                with connection, contextlib.suppress(OSError):
                    request = b""
                    while b"\r\n\r\n" not in request and (part := connection.recv(65536)):
                        request += part
                    if request:
                        peer.asked.append(request.decode("latin-1"))
                        answer(connection, peer.asked[-1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield peer
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(90)
