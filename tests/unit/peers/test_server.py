"""What a node serves, and to whom: entries by their digest to who has the token, and nothing else
to anybody.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cachedirs import array_of, key_of, settings
from zarrcache._keys import is_digest
from zarrcache.cache.array_tier import ArrayCache
from zarrcache.errors import ConfigError
from zarrcache.peers import server as entryserver
from zarrcache.peers.server import EntryServer
from zarrcache.stats import Counters

TOKEN = "t" * 32
DIGEST = key_of(1).digest
OWN = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one entry, and files beside it that are nobody else's business."""
    path = tmp_path_factory.mktemp("served")
    ArrayCache(settings(path), Counters()).put(key_of(1), array_of(1), source="s")
    (path / "secret").write_text("secret")
    return path / "cache"


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[EntryServer]:
    """With a token."""
    with EntryServer(directory, token=TOKEN) as server:
        yield server


def request(
    server: EntryServer, line: str, *headers: str, token: str | None = TOKEN
) -> tuple[int, dict[str, str], bytes]:
    """One request as it stands, over a connection of its own: status, headers, body."""
    lines = [
        f"{line} HTTP/1.1",
        "Host: x",
        "Connection: close",
        *headers,
        *([f"Authorization: Bearer {token}"] if token else []),
    ]
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    return (
        int(first.split()[1]),
        {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)},
        body,
    )


def test_entry_comes_byte_for_byte(server: EntryServer, directory: Path) -> None:
    """As it is on disk, with its length."""
    (path,) = (directory / "zarrcache-v1" / "entries").rglob(f"{DIGEST}-*")
    status, headers, body = request(server, f"GET /v1/entries/{DIGEST}")
    assert (status, int(headers["content-length"]), body) == (200, len(body), path.read_bytes())
    assert request(server, f"GET /v1/entries/{DIGEST}?source=s")[2] == body
    assert request(server, f"GET /v1/entries/{DIGEST}?source=other")[:2][0] == 404


@pytest.mark.parametrize("token", [None, "", "t" * 31, "t" * 33, "T" * 32, "\xe4" * 32])
@pytest.mark.parametrize(
    "line",
    [f"GET /v1/entries/{DIGEST}", f"POST /v1/leases/{DIGEST}", "GET /", "GET /v1/entries/nothing"],
)
def test_who_has_no_token_learns_nothing(server: EntryServer, token: str | None, line: str) -> None:
    """Whatever is asked for, the answer is the same."""
    status, headers, body = request(server, line, token=token)
    assert (status, body, headers["content-length"]) == (401, b"", "0")


PATHS = [
    "/v1/entries/../../../secret",
    "/v1/entries/..%2f..%2f..%2fsecret",
    f"/v1/entries/{DIGEST}/../../secret",
    f"/v1/entries/{DIGEST}-01234567",
    f"/v1/entries/{DIGEST.upper()}",
    f"/v1/entries/{DIGEST}%00",
    f"/v1/entries/{DIGEST[:-1]}",
    f"/v1/entries/{DIGEST}0",
    f"/v1/entries/.{DIGEST[1:]}",
    f"/v1/../v1/entries/{DIGEST}",
    "/v1/entries/" + "*" * 32,
    "/v1/entries/" + "%d9%a0" * 16,
    "/v1/entries/",
    "/zarrcache-v1/cache.db",
    "/",
]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_digest_becomes_no_name_of_a_file(server: EntryServer, path: str) -> None:
    """Refused before anything is opened."""
    status, _, body = request(server, f"GET {path}")
    assert (status, body) == (400, b"")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_not_there(server: EntryServer, directory: Path, method: str) -> None:
    """Nothing can be changed."""
    before = sorted(directory.rglob("*"))
    assert request(server, f"{method} /v1/entries/{DIGEST}")[0] == 501
    assert sorted(directory.rglob("*")) == before


def test_only_digests_have_the_form_of_one() -> None:
    """32 hex digits, small."""
    assert is_digest(DIGEST)
    wrong = [
        None,
        b"0" * 32,
        "",
        DIGEST[1:],
        f"{DIGEST}\n",
        f" {DIGEST[1:]}",
        DIGEST.upper(),
        "g" * 32,
        "\u0661" * 32,
    ]
    assert [text for text in wrong if is_digest(text)] == []


@pytest.mark.parametrize(
    "node",
    [
        "http://x:1%0d%0aSet-Cookie:%20a",
        "file:///etc",
        "http://x:1/path",
        "http://" + "x" * 400,
        "javascript:1",
    ],
)
def test_address_of_a_node_that_is_none_is_nobody(server: EntryServer, node: str) -> None:
    """It would come back to others in a header."""
    status, headers, _ = request(server, f"GET /v1/entries/{key_of(2).digest}?node={node}&wait=1")
    assert (status, headers["zarrcache-answer"]) == (404, "none")


def test_lease_is_of_the_connection_that_got_it(server: EntryServer) -> None:
    """Another one cannot end it, and it ends with the connection."""
    digest = key_of("lease").digest
    with socket.create_connection(
        ("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30
    ) as connection:
        connection.sendall(
            f"GET /v1/entries/{digest}?node={OWN} HTTP/1.1\r\nAuthorization: Bearer "
            f"{TOKEN}\r\n\r\n".encode()
        )
        assert b"Zarrcache-Answer: lease" in connection.recv(65536)
        assert request(server, f"POST /v1/leases/{digest}?outcome=stored")[0] == 409
        assert (
            request(server, f"GET /v1/entries/{digest}?node={OWN}&wait=nan")[1]["zarrcache-answer"]
            == "busy"
        )
        assert request(server, f"GET /v1/entries/{digest}")[1]["zarrcache-answer"] == "none"
        connection.sendall(
            f"POST /v1/leases/{digest}?outcome=stored HTTP/1.1\r\nAuthorization: Bearer "
            f"{TOKEN}\r\n\r\n".encode()
        )
        assert b" 204 " in connection.recv(65536)
    status, headers, _ = request(server, f"GET /v1/entries/{digest}?node=http://127.0.0.1:2")
    assert (status, headers["location"]) == (303, OWN)


def test_more_connections_than_threads_are_turned_away(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and the others go on."""
    monkeypatch.setattr(entryserver, "_MOST_CONNECTIONS", 2)
    with EntryServer(directory) as server:
        port = int(server.url.rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port)),
            socket.create_connection(("127.0.0.1", port)) as second,
        ):
            second.sendall(f"GET /v1/entries/{DIGEST} HTTP/1.1\r\n".encode())
            assert request(server, f"GET /v1/entries/{DIGEST}")[0] == 503
            second.sendall(b"\r\n")
            assert second.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_address_that_others_reach_needs_a_token(tmp_path: Path, host: str) -> None:
    """Refused before it is bound."""
    with pytest.raises(
        ConfigError, match=r"can be reached by other machines, and there is no token.*--token-file"
    ):
        EntryServer(tmp_path, host=host)


def test_address_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """A port that is taken, a name that does not exist."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} cannot be listened on"):
            EntryServer(tmp_path, port=port)


def test_cache_that_is_not_there_yet_is_served_and_not_made(tmp_path: Path) -> None:
    """A node begins to serve before its first read."""
    with EntryServer(tmp_path / "cache") as server:
        assert request(server, f"GET /v1/entries/{DIGEST}")[0] == 404
        assert os.listdir(tmp_path) == []
    assert not server._thread.is_alive()
