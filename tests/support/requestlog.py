"""Requests that the S3 server got, read from its own log."""

from __future__ import annotations

import contextlib
import functools
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.support.s3server import S3Server

__all__ = ["Request", "RequestLog"]

_DEADLINE_S = 60.0
_MARK = "mark-of-the-request-log-"
#: moto colours every answer that is not 200: ranges (206) and errors too have to be counted. A
#: gateway's line has more to its left and right.
_LINE = re.compile(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP/[0-9.]+(?:\x1b\[0m)?" (\d{3})')


@dataclass(frozen=True)
class Request:
    """One request. ``op`` is ``LIST`` or the HTTP method; ``path`` is ``bucket/key``, of a LIST
    ``bucket/prefix``.
    """

    op: str
    path: str
    status: int


class RequestLog:
    """The requests to one bucket from now on.

    Parameters
    ----------
    server : S3Server
        Without a log (a server that ZARRCACHE_TEST_S3 names, without ZARRCACHE_TEST_S3_LOG) the
        test is skipped.
    bucket : str
        Others' requests are left out.
    """

    def __init__(self, server: S3Server, bucket: str) -> None:
        if server.log is None:
            pytest.skip("this S3 server keeps no log that the tests can read")
        self._server, self._log, self._bucket = server, server.log, bucket
        self._start = self._log.stat().st_size
        self._start = self.settle()

    def settle(self) -> int:
        """Wait until all requests so far are logged, those of killed clients included; the size of
        the log.

        Some servers log in another thread after they have answered: a request of ours comes last.
        """
        mark, end, lines = _MARK + uuid.uuid4().hex, time.monotonic() + _DEADLINE_S, -1
        client = _client_of(self._server)
        with contextlib.suppress(client.exceptions.ClientError):  # the object does not exist
            client.head_object(Bucket=self._bucket, Key=mark)
        while True:
            size, text = self._log.stat().st_size, self._text()
            if mark in text and text.count(f"/{self._bucket}") == lines:
                return size
            lines = text.count(f"/{self._bucket}")
            if time.monotonic() > end:
                raise AssertionError(
                    f"{self._log} has no line for a request that was answered {_DEADLINE_S:.0f} s "
                    "ago"
                )
            time.sleep(0.02)

    def seen(self, op: str = "", *, settled: bool = True) -> list[Request]:
        """In the order of the answers. Without ``settled`` the last ones may be missing."""
        if settled:
            self.settle()
        requests = [
            _parse(*match.groups())
            for line in self._text().splitlines()
            if (match := _LINE.search(line))
        ]
        return [
            r
            for r in requests
            if r.path.split("/")[0] == self._bucket and op in ("", r.op) and _MARK not in r.path
        ]

    def paths(self, op: str, *, settled: bool = True) -> Counter[str]:
        """Number of requests by key (or prefix), without the bucket."""
        return Counter(r.path.partition("/")[2] for r in self.seen(op, settled=settled))

    def _text(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")


@functools.cache
def _client_of(server: S3Server) -> Any:
    """One client for all: creating one takes longer than a test."""
    return server.client()


def _parse(method: str, target: str, status: str) -> Request:
    url = urlsplit(target)
    query = parse_qs(url.query, keep_blank_values=True)
    path = unquote(url.path).strip("/")
    if method == "GET" and "list-type" in query:
        return Request("LIST", f"{path}/{query.get('prefix', [''])[0]}", int(status))
    return Request(method, path, int(status))
