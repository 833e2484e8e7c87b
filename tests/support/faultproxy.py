"""A proxy in front of the S3 server, in its own process, that counts, records and faults requests.

It keeps the Host header, so a request signed for the proxy's address is valid behind it. The
server's code is in ``faultproxy_server``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = ["FaultProxy", "Rule", "Seen", "running_proxy"]

_START_S = 60.0


@dataclass(frozen=True)
class Rule:
    """What to do with some requests; the first rule that matches a request decides.

    Attributes
    ----------
    faults : tuple of str
        Used up in order, one a request: ``ok``; ``503``, ``403`` or any other status, with S3's XML
        (``403:ExpiredToken`` sets its code); ``reset`` before the first byte, ``reset_body`` after
        half a body; ``truncate`` (half a body, then the end of the connection), ``short`` (half a
        body, announced as whole), ``corrupt`` (one bit is flipped); of a PUT ``frames`` (stored
        with chunk frames) and ``flipped`` (stored with one bit flipped); ``opaque`` (an ETag that
        is no MD5); ``stall`` (half a body, then
        silence), ``hang`` (silence). Silence lasts until the client hangs up.
    then : str
        The fault of every later request.
    op : str
        ``GET``, ``HEAD``, ``LIST``, ``META`` (of a bucket), ``PUT``, ``POST``, ``DELETE``; several
        with ``|``; empty matches all.
    key : str
        Regular expression, searched in ``/bucket/key``, or in ``/bucket/prefix`` of a LIST.
    per_object : bool
        ``faults`` for each object on its own.
    latency_s : float
        Minimum time to the first byte.
    signed_with : str
        Regular expression, searched in the ``Authorization`` header.
    dice : float
        Share of the requests, by seeded dice, to which ``faults`` happen, any of them as likely as
        another; to the others, ``then``. The throw depends on the request and on how often it came,
        and not on the order of arrival: the same requests meet the same faults in every run.
    seed : int
        Of the dice.
    """

    faults: tuple[str, ...] = ()
    then: str = "ok"
    op: str = ""
    key: str = ""
    per_object: bool = False
    latency_s: float = 0.0
    signed_with: str = ""
    dice: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """One request as the proxy saw it. ``outcome`` is the status that was sent, or the fault;
    ``time_s`` when it came, ``time.time()``.
    """

    op: str
    path: str
    range: str
    outcome: str
    time_s: float
    headers: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class FaultProxy:
    """Address of the proxy and its controls: small, picklable, usable from any process."""

    endpoint_url: str
    admin_url: str

    def rules(self, *rules: Rule) -> None:
        """Replace all rules; the counts stay."""
        self._ask("PUT", "/rules", [asdict(rule) for rule in rules])

    def reset(self) -> None:
        """No rules, no counts, listening; waiting clients are disconnected."""
        self._ask("POST", "/reset")

    def down(self) -> None:
        """Refuse connections, and cut open ones. The port stays reserved."""
        self._ask("POST", "/down")

    def up(self) -> None:
        """Listen again."""
        self._ask("POST", "/up")

    def seen(self, op: str = "") -> list[Seen]:
        """Every request since the last reset, in the order of arrival; ``op`` as in ``Rule``."""
        return [
            s
            for s in (Seen(**fields) for fields in self._ask("GET", "/seen"))
            if not op or s.op in op.split("|")
        ]

    def count(self, op: str = "") -> int:
        """How many requests there were."""
        return len(self.seen(op))

    def repeats(self) -> int:
        """Number of GETs of something that was requested before."""
        asked = [(s.path, s.range) for s in self.seen("GET")]
        return len(asked) - len(set(asked))

    def peak(self) -> int:
        """Most requests in flight at once."""
        return int(self._ask("GET", "/flight")["peak"])

    def in_flight(self) -> int:
        """Requests that are neither answered nor given up by the client."""
        return int(self._ask("GET", "/flight")["now"])

    def wait_in_flight(self, n: int, deadline_s: float = 20.0) -> None:
        """Return when exactly ``n`` requests are in flight; raise after ``deadline_s``."""
        end = time.monotonic() + deadline_s
        while (now := self.in_flight()) != n:
            if time.monotonic() > end:
                raise AssertionError(
                    f"{now} requests are in flight at the proxy after {deadline_s:.0f} s, expected "
                    f"{n}"
                )
            time.sleep(0.01)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        url = urlsplit(self.admin_url)
        connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=_START_S)
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body))
            return json.loads(connection.getresponse().read())


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Start a proxy in front of ``upstream`` (``http://host:port``), yield its handle, stop it."""
    server = Path(__file__).with_name("faultproxy_server.py")
    process = subprocess.Popen(
        [sys.executable, server, upstream],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready = select.select([process.stdout], [], [], _START_S)[0]
        line = process.stdout.readline().decode().split() if ready else []
        if len(line) != 2:
            raise RuntimeError(f"the fault proxy did not start within {_START_S:.0f} s")
        yield FaultProxy(*line)
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(10)
        process.stdout.close()
