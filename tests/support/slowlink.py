"""A slow link to a server: a relay in a thread that holds back each answer for a time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

__all__ = ["slow_link"]


@contextlib.contextmanager
def slow_link(url: str, answer_s: float) -> Iterator[str]:
    """Relay connections to ``url``, with ``answer_s`` before the first byte of each answer."""
    server = urlsplit(url)
    target = server.hostname or "", server.port or 80
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(
                    target=_relay, args=(client, target, answer_s), daemon=True
                ).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def _relay(client: socket.socket, target: tuple[str, int], answer_s: float) -> None:
    with client, contextlib.suppress(OSError), socket.create_connection(target) as upstream:
        requests = threading.Thread(target=_pump, args=(client, upstream, 0.0), daemon=True)
        requests.start()
        _pump(upstream, client, answer_s)
        requests.join(10)


def _pump(source: socket.socket, sink: socket.socket, wait_s: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            time.sleep(wait_s)
            wait_s = 0.0
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
