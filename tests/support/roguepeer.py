"""A peer that answers as a test requires: one thread, one request per connection, raw bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

__all__ = [
    "Answer",
    "RoguePeer",
    "claiming",
    "entry_answer",
    "hanging",
    "running_peer",
    "trickling",
    "trickling_head",
]

#: Gets the connection after the request was read, and sends any bytes.
Answer = Callable[[socket.socket], None]


@dataclass
class RoguePeer:
    """Its address, and the first line and headers of each request."""

    url: str
    asked: list[str] = field(default_factory=list)


def entry_answer(
    raw: bytes, *, claims: int | None = None, sends: int | None = None, reset: bool = False
) -> Answer:
    """200 with an entry; with a wrong length, or cut off after ``sends`` bytes, by a close or a
    reset.
    """

    def answer(connection: socket.socket) -> None:
        length = len(raw) if claims is None else claims
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + raw[:sends])
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def hanging(connection: socket.socket) -> None:
    """Sends nothing until the client disconnects."""
    connection.settimeout(60)
    with contextlib.suppress(OSError):
        connection.recv(1)


def trickling(raw: bytes) -> Answer:
    """Sends an entry byte by byte."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw))
        for i in range(len(raw)):
            connection.sendall(raw[i : i + 1])
            time.sleep(0.02)

    return answer


def trickling_head(raw: bytes) -> Answer:
    """Sends a header of 500 bytes one at a time, each within the timeout of a recv, and then a good
    entry.
    """

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(500):
            connection.sendall(b"x")
            time.sleep(0.02)
        connection.sendall(b"\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)

    return answer


def claiming(raw: bytes, length: int) -> Answer:
    """Announces ``length`` bytes, sends what it has, and keeps the connection open."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + raw)
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
                        answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield peer
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(90)
