"""The demo's S3 server: moto's threaded server in a process of its own, on 127.0.0.1 and a free
port, with a log of what it was asked.

The only import of moto. ``python -m zarrcache.demo.server LOG`` is the process;
:func:`running_server` starts and ends it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zarrcache.errors import ConfigError

__all__ = ["DemoServer", "Traffic", "running_server"]

_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a server was asked and what it sent."""

    requests: int
    sent_bytes: int

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests - other.requests, self.sent_bytes - other.sent_bytes)


@dataclass(frozen=True, slots=True)
class DemoServer:
    """Where it listens, and what it was asked so far."""

    endpoint_url: str
    log: Path

    @property
    def s3_kwargs(self) -> dict[str, Any]:
        """As ``s3fs.S3FileSystem`` takes them. The server checks no credentials, but clients want
        some.
        """
        return {"key": "demo", "secret": "demo", "endpoint_url": self.endpoint_url}

    @property
    def traffic(self) -> Traffic:
        """Requests so far; one line each in the log."""
        sizes = [int(line.rsplit(" ", 1)[1]) for line in self.log.read_text().splitlines()]
        return Traffic(len(sizes), sum(sizes))


@contextlib.contextmanager
def running_server(log: Path) -> Iterator[DemoServer]:
    """Start a server, stop it at the end. It also ends when this process is killed: it watches its
    standard input.

    Raises
    ------
    ConfigError
        moto is not installed, or the server does not start; with its last words.
    """
    log.touch()
    errors = log.with_suffix(".err")
    with errors.open("wb") as stderr:
        # A session of its own: Ctrl-C reaches the demo first, which then stops the server.
        command = [sys.executable, "-m", "zarrcache.demo.server", os.fspath(log)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline().decode().strip() if selector.select(_START_S) else ""
        if not line.startswith("http://"):
            last = (errors.read_text().strip().splitlines() or ["no message"])[-1]
            raise ConfigError(
                f"the demo's S3 server did not start ({last}). Install it with: pip install "
                "'zarrcache[demo]'"
            )
        yield DemoServer(line, log)
    finally:
        process.stdin.close()
        process.terminate()
        process.wait()
        process.stdout.close()


def serve(log: Path) -> None:
    """Listen, say where on standard output, log a line a request, end when standard input ends."""
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open, as S3 does

        def log_request(self, *args: object) -> None:
            """Nothing: requests are logged below, with their size."""

    # S3 alone: to find out which service is meant, moto's own dispatcher looks through its 180
    # directories, at every request.
    app = create_backend_app("s3")
    file = log.open("a", buffering=1)

    def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            size = next((value for name, value in headers if name.lower() == "content-length"), "0")
            sent = 0 if environ["REQUEST_METHOD"] == "HEAD" else int(size)
            file.write(
                f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {status.partition(' ')[0]} "
                f"{sent}\n"
            )
            return start_response(status, headers, *rest)

        answer: Iterable[bytes] = app(environ, start)
        return answer

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
