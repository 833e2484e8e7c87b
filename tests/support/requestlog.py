"""What the S3 server was asked for, read from its own log: the counts that the promises are about."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.support.s3server import S3Server

__all__ = ["Request", "RequestLog"]

#: The server colours every answer that is not 200: ranges (206) and errors too have to be counted.
_LINE = re.compile(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP/[0-9.]+(?:\x1b\[0m)?" (\d{3})')


@dataclass(frozen=True)
class Request:
    """One request. ``op`` is ``LIST`` or the HTTP method; ``path`` is ``bucket/key``, of a LIST ``bucket/prefix``."""

    op: str
    path: str
    status: int


class RequestLog:
    """The requests to one bucket from now on.

    Parameters
    ----------
    server : S3Server
        Without a log (a server that was not started by the tests) the test is skipped.
    bucket : str
        Others' requests are left out.
    """

    def __init__(self, server: S3Server, bucket: str) -> None:
        if server.log is None:
            pytest.skip("this S3 server keeps no log that the tests can read")
        self._log, self._bucket = server.log, bucket
        self._start = self._log.stat().st_size

    def seen(self, op: str = "") -> list[Request]:
        """In the order of arrival."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode().splitlines()
        requests = [_parse(*match.groups()) for line in lines if (match := _LINE.search(line))]
        return [r for r in requests if r.path.split("/")[0] == self._bucket and op in ("", r.op)]

    def paths(self, op: str) -> Counter[str]:
        """How often each key (or prefix) was asked for, without the bucket."""
        return Counter(r.path.partition("/")[2] for r in self.seen(op))


def _parse(method: str, target: str, status: str) -> Request:
    url = urlsplit(target)
    query = parse_qs(url.query, keep_blank_values=True)
    path = unquote(url.path).strip("/")
    if method == "GET" and "list-type" in query:
        return Request("LIST", f"{path}/{query.get('prefix', [''])[0]}", int(status))
    return Request(method, path, int(status))
