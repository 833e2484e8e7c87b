"""The demo's S3 server: moto on 127.0.0.1 and a free port, in a thread, with a traffic counter and
the latency of a real one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zarrcache.errors import ConfigError

__all__ = ["DemoServer", "Traffic", "running_server"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests that a server answered, and the bytes of their bodies."""

    requests: int
    sent_bytes: int

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.requests - other.requests, self.sent_bytes - other.sent_bytes)


class DemoServer:
    """A WSGI application that counts requests and bytes, with its endpoint.

    Parameters
    ----------
    application : callable
        The WSGI application.
    latency_s : float
        Time that each request waits before the application sees it, as on the way to S3. Requests
        of different connections wait at the same time.
    """

    def __init__(
        self, application: Callable[..., Iterable[bytes]], *, latency_s: float = 0.0
    ) -> None:
        self._application = application
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self.endpoint_url = ""
        self.traffic = Traffic(0, 0)

    @property
    def s3_kwargs(self) -> dict[str, Any]:
        """Arguments of ``s3fs.S3FileSystem``, with the dummy credentials that clients require."""
        return {"key": "demo", "secret": "demo", "endpoint_url": self.endpoint_url}

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            sizes = [int(value) for name, value in headers if name.lower() == "content-length"]
            sent_bytes = 0 if environ["REQUEST_METHOD"] == "HEAD" else sum(sizes)
            with self._lock:
                self.traffic = Traffic(
                    self.traffic.requests + 1, self.traffic.sent_bytes + sent_bytes
                )
            return start_response(status, headers, *rest)

        time.sleep(self._latency_s)
        return self._application(environ, start)


@contextlib.contextmanager
def running_server(*, latency_s: float = 0.0) -> Iterator[DemoServer]:
    """Start a server whose requests take ``latency_s`` longer; stop it at the end.

    Raises
    ------
    ConfigError
        moto is not installed.
    """
    try:
        from moto.moto_server.werkzeug_app import create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server
    except ImportError as exc:
        raise ConfigError(
            f"The demo's S3 server cannot start ({exc}). Install it: pip install 'zarrcache[demo]'"
        ) from exc

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open, as S3 does

        def log_request(self, *args: object) -> None:
            """Log nothing; requests are counted instead."""

    # S3 only: to find the service of a request, moto's dispatcher searches its 180 directories.
    server = DemoServer(create_backend_app("s3"), latency_s=latency_s)
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    server.endpoint_url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
