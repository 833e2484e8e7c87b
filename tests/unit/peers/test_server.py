"""The server gives entries by their digest to clients with the token, and nothing else."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of, settings
from tests.support.signed import authorization, fields_of
from tests.support.users import CAROL, as_user, needs_users, open_to_all
from zarrcache._keys import is_digest
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import CacheDir
from zarrcache.errors import ConfigError
from zarrcache.peers import _seal as seal
from zarrcache.peers import server as entryserver
from zarrcache.peers.server import EntryServer
from zarrcache.stats import Counters

TOKEN = "t" * 32
DIGEST = key_of(1).digest
OWN = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one entry, and a file beside it that must not be served."""
    path = tmp_path_factory.mktemp("served")
    ArrayCache(settings(path), Counters()).put(key_of(1), array_of(1), source="s")
    (path / "secret").write_text("secret")
    return path / "cache"


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[EntryServer]:
    """A server with a token."""
    with EntryServer(directory, token=TOKEN) as server:
        yield server


def request(
    server: EntryServer, line: str, *headers: str, token: str | None = "its own"
) -> tuple[int, dict[str, str], bytes]:
    """Send one request over a connection of its own; its status, headers, and body without its
    digest.
    """
    lines = [
        f"{line} HTTP/1.1",
        "Connection: close",
        *headers,
        authorization(
            line,
            server.url,
            key=server._receiver.key if token == "its own" else seal.key_of(token),
        ),
    ]
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        parts = iter(lambda: connection.recv(2**20), b"")
        head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    return (
        int(first.split()[1]),
        {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)},
        body[: -seal.SEAL_BYTES],
    )


def signed(server: EntryServer, line: str, token: str | None = None) -> bytes:
    """One request, to be sent over a connection that a test keeps."""
    sealed = authorization(line, server.url, key=seal.key_of(token))
    return f"{line} HTTP/1.1\r\n{sealed}\r\n\r\n".encode()


def kind_of(answer: bytes | tuple[int, dict[str, str], bytes]) -> str:
    """The kind of an answer, raw or from :func:`request`."""
    if not isinstance(answer, bytes):
        return fields_of(answer[1])["kind"]
    return (
        answer.partition(b"Zarrcache-Answer: kind=")[2].partition(b"\r")[0].split(b"&")[0].decode()
    )


def test_entry_comes_byte_for_byte_as_on_disk(server: EntryServer, directory: Path) -> None:
    (path,) = (directory / "zarrcache-v1" / "entries").rglob(f"{DIGEST}-*")
    status, headers, body = request(server, f"GET /v2/entries/{DIGEST}")
    assert (status, body) == (200, path.read_bytes())
    assert int(headers["content-length"]) == len(body) + seal.SEAL_BYTES
    assert request(server, f"GET /v2/entries/{DIGEST}?source=s")[2] == body
    assert request(server, f"GET /v2/entries/{DIGEST}?source=other")[0] == 404


@pytest.mark.parametrize("token", [None, "", "t" * 31, "t" * 33, "T" * 32, "\xe4" * 32])
@pytest.mark.parametrize(
    "line",
    [f"GET /v2/entries/{DIGEST}", f"POST /v2/leases/{DIGEST}", "GET /", "GET /v2/entries/nothing"],
)
def test_client_without_the_token_learns_nothing(
    server: EntryServer, token: str | None, line: str
) -> None:
    """Every request gets the same answer."""
    status, headers, body = request(server, line, token=token)
    assert (status, body, headers["content-length"]) == (401, b"", "0")


@pytest.mark.parametrize("path", [f"/v1/entries/{DIGEST}", f"/v3/entries/{DIGEST}", "/v1/x"])
def test_an_older_client_is_refused_in_words(
    directory: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And a newer one, with any token, or none: at the client by the status, here by one line."""
    with EntryServer(directory, token=TOKEN) as server:
        for header in (f"Authorization: Bearer {TOKEN}", "X: y"):
            with connected(server) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
                answer = b"".join(iter(lambda: connection.recv(1000), b"")).decode()
            assert answer.startswith("HTTP/1.1 426 ")
            assert "Install the same version of zarrcache on all nodes" in answer
    assert caplog.text.count(f"speaks {path[1:3]} of zarrcache's protocol was refused") == 1
    assert TOKEN not in caplog.text


PATHS = [
    "/v2/entries/../../../secret",
    "/v2/entries/..%2f..%2f..%2fsecret",
    f"/v2/entries/{DIGEST}/../../secret",
    f"/v2/entries/{DIGEST}-01234567",
    f"/v2/entries/{DIGEST.upper()}",
    f"/v2/entries/{DIGEST}%00",
    f"/v2/entries/{DIGEST[:-1]}",
    f"/v2/entries/{DIGEST}0",
    f"/v2/entries/.{DIGEST[1:]}",
    f"/v2/../v2/entries/{DIGEST}",
    "/v2/entries/" + "*" * 32,
    "/v2/entries/" + "%d9%a0" * 16,
    "/v2/entries/",
    "/zarrcache-v1/cache.db",
    "/",
]


@pytest.mark.parametrize("path", PATHS)
def test_only_a_digest_becomes_part_of_a_file_name(server: EntryServer, path: str) -> None:
    """Other paths are refused before a file is opened."""
    status, _, body = request(server, f"GET {path}")
    assert (status, body) == (400, b"")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "TRACE"])
def test_methods_that_change_something_are_not_implemented(
    server: EntryServer, directory: Path, method: str
) -> None:
    before = sorted(directory.rglob("*"))
    assert request(server, f"{method} /v2/entries/{DIGEST}")[0] == 501
    assert sorted(directory.rglob("*")) == before


def test_a_digest_is_32_lower_case_hex_digits() -> None:
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
def test_node_that_is_not_an_address_is_ignored(server: EntryServer, node: str) -> None:
    """Other clients would get it in a header."""
    status, headers, _ = request(server, f"GET /v2/entries/{key_of(2).digest}?node={node}&wait=1")
    assert (status, fields_of(headers)) == (404, {"kind": "none"})


def test_only_the_connection_that_got_a_lease_can_end_it(server: EntryServer) -> None:
    digest = key_of("lease").digest
    with socket.create_connection(
        ("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30
    ) as connection:
        connection.sendall(signed(server, f"GET /v2/entries/{digest}?node={OWN}", TOKEN))
        assert kind_of(connection.recv(65536)) == "lease"
        assert request(server, f"POST /v2/leases/{digest}?outcome=stored")[0] == 409
        other = f"GET /v2/entries/{digest}?node=http://127.0.0.1:2"
        busy = request(server, f"{other}&wait=nan")
        assert (kind_of(busy), fields_of(busy[1])["node"]) == ("busy", OWN)
        assert kind_of(request(server, f"GET /v2/entries/{digest}")) == "none"
        for outcome in ("busy", "stored"):
            connection.sendall(signed(server, f"POST /v2/leases/{digest}?outcome={outcome}", TOKEN))
            assert b" 204 " in connection.recv(65536)
    status, headers, _ = request(server, other)
    assert (status, fields_of(headers)["node"]) == (303, OWN)


def connected(server: EntryServer) -> socket.socket:
    """A connection over which nothing has been sent."""
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)


def test_lease_ends_with_its_connection(server: EntryServer) -> None:
    digest = key_of("lost").digest
    line = f"GET /v2/entries/{digest}?node={OWN}&wait=30"
    other = f"GET /v2/entries/{digest}?node=http://127.0.0.1:2&wait=0"
    with connected(server) as connection:
        connection.sendall(signed(server, line, TOKEN))
        assert kind_of(connection.recv(65536)) == "lease"
        assert kind_of(request(server, other)) == "busy"
    assert kind_of(request(server, line)) == "lease"


def test_client_that_hangs_up_while_it_waits_gets_no_lease(server: EntryServer) -> None:
    """The next one that asks does, although the first has not been answered yet."""
    line = f"GET /v2/entries/{key_of('waited for').digest}?node={OWN}&wait=30"
    with connected(server) as holder:
        holder.sendall(signed(server, line, TOKEN))
        assert kind_of(holder.recv(65536)) == "lease"
        with connected(server) as waiting:
            waiting.sendall(signed(server, line.replace(OWN, "http://127.0.0.1:2"), TOKEN))
            time.sleep(0.2)
    answer = request(server, line.replace("wait=30", "wait=0"))
    assert kind_of(answer) == "lease"


def test_idle_connections_give_way_to_a_client_that_sends_its_request(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest is closed; the others can go on."""
    monkeypatch.setattr(entryserver, "_MAX_PENDING", 2)
    with EntryServer(directory) as server, connected(server) as first, connected(server) as second:
        asked = signed(server, f"GET /v2/entries/{DIGEST}")
        second.sendall(asked[:-2])
        assert request(server, f"GET /v2/entries/{DIGEST}")[0] == 200
        assert first.recv(100) == b""
        second.sendall(asked[-2:])
        assert second.recv(100).startswith(b"HTTP/1.1 200 ")


def test_more_clients_than_can_be_served_are_turned_away_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is served when one of them has gone."""
    monkeypatch.setattr(entryserver, "_MAX_SERVED", 2)
    lines = [f"GET /v2/entries/{key_of(name).digest}?node={OWN}" for name in ("a", "b", "c")]
    with EntryServer(directory) as server, connected(server) as first:
        with connected(server) as second:
            for connection, line in zip((first, second), lines, strict=False):
                connection.sendall(signed(server, line))
                assert kind_of(connection.recv(65536)) == "lease"
            assert request(server, f"GET /v2/entries/{DIGEST}")[0] == 503
            assert request(server, lines[2])[0] == 503
        hung_s = time.monotonic() + 30
        while request(server, f"GET /v2/entries/{DIGEST}")[0] != 200:
            assert time.monotonic() < hung_s


SLOW = {
    "no request": b"",
    "half a request": f"GET /v2/entries/{DIGEST} HTTP/1.1\r\nHost: x\r\n".encode(),
    "a request without its body": f"POST /v2/leases/{DIGEST} HTTP/1.1\r\nHost: x\r\n"
    "Content-Length: 9\r\n\r\n".encode(),
}


@pytest.mark.parametrize("sent", SLOW)
def test_request_that_never_ends_is_given_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    """The time is for the whole request: a byte now and then does not extend it."""
    monkeypatch.setattr(entryserver, "_REQUEST_S", 0.5)
    with EntryServer(directory) as server, connected(server) as connection:
        connection.sendall(SLOW[sent])
        connection.settimeout(0.05)
        ends_s = time.monotonic() + 30
        while time.monotonic() < ends_s:
            try:
                connection.sendall(b"x")
                if not connection.recv(1000):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert time.monotonic() < ends_s
        assert request(server, f"GET /v2/entries/{DIGEST}")[0] == 200


START = f"GET /v2/entries/{DIGEST}?node={OWN} HTTP/1.1\r\nHost: x\r\n".encode()
MALFORMED = {
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "no text": bytes(4000),
    "a header without a name": START + b": x\r\n\r\n",
    "two lengths": START + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
}
TOO_LONG = {
    "an endless line": b"GET /" + b"x" * 10_000,
    "an endless header": START + b"X: " + b"x" * 10_000,
    "many headers": START + b"".join(b"X%d: x\r\n" % n for n in range(1000)),
    "a body": START + b"Content-Length: 10000\r\n\r\n" + b"x" * 10_000,
    "what follows an upgrade": START + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n" + b"x" * 10_000,
    "many requests at once": (START + b"\r\n") * 100,
}


def answer_to(server: EntryServer, sent: bytes) -> bytes:
    """All that the server sends until it closes the connection, well before its deadline."""
    with connected(server) as connection:
        connection.settimeout(entryserver._REQUEST_S / 2)
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):  # of what it has not read
            return b"".join(iter(lambda: connection.recv(1000), b""))
        return b""


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_request_is_refused_without_a_word_in_the_log(
    server: EntryServer, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise any client could fill the log."""
    answer = answer_to(server, MALFORMED[what])
    assert answer.startswith(b"HTTP/1.0 400 ")
    assert b"Server: zarrcache-v2\r\n" in answer  # not the versions of Python and aiohttp
    assert answer.endswith(b"\r\n\r\n")  # and nothing of what was sent
    assert caplog.text == ""


@pytest.mark.parametrize("what", TOO_LONG)
def test_client_that_sends_more_than_a_request_is_disconnected(
    server: EntryServer, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it has shown the token, it makes the server keep 4 KiB at most."""
    assert answer_to(server, TOO_LONG[what]) == b""
    assert caplog.text == ""


def test_client_that_does_not_read_its_entry_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sends on to others meanwhile, and closes the connection when the time is over."""
    big = np.zeros((160, 256, 256), np.float32)  # 40 MiB, more than the kernel's buffers hold
    ArrayCache(settings(tmp_path), Counters()).put(key_of(1), big, source="s")
    monkeypatch.setattr(entryserver, "transfer_limit_s", lambda nbytes: 3.0)
    with EntryServer(tmp_path / "cache") as server, connected(server) as slow:
        slow.sendall(signed(server, f"GET /v2/entries/{DIGEST}"))
        assert len(request(server, f"GET /v2/entries/{DIGEST}")[2]) > big.nbytes
        ends_s = time.monotonic() + 30
        while server._service.connections and time.monotonic() < ends_s:
            time.sleep(0.01)
        assert server._service.connections == 0
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := slow.recv(2**20):
                received += len(part)
        assert received < big.nbytes


def test_client_that_resets_its_connection_is_forgotten_and_not_logged(
    server: EntryServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, during and after the answer."""
    for n in range(200):
        with connected(server) as client:
            client.sendall(signed(server, f"GET /v2/entries/{DIGEST}", TOKEN))
            time.sleep(n % 10 / 10_000)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert request(server, f"GET /v2/entries/{DIGEST}")[0] == 200
    ends_s = time.monotonic() + 30
    while server._service.connections and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert server._service.connections == 0
    assert caplog.text == ""


def test_close_cuts_off_an_entry_on_its_way(tmp_path: Path) -> None:
    """Within a second, without waiting for a client that does not read."""
    big = np.zeros((160, 256, 256), np.float32)
    ArrayCache(settings(tmp_path), Counters()).put(key_of(1), big, source="s")
    with EntryServer(tmp_path / "cache") as server, connected(server) as slow:
        slow.sendall(signed(server, f"GET /v2/entries/{DIGEST}"))
        assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
        start_s = time.monotonic()
        server.close()
        assert time.monotonic() - start_s < 5.0  # a second, on a machine that is not loaded
        with contextlib.suppress(ConnectionResetError):
            received = 0
            while part := slow.recv(2**20):
                received += len(part)
            assert received < big.nbytes
        server.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_address_that_others_reach_needs_a_token(tmp_path: Path, host: str) -> None:
    """It is refused before it is bound."""
    with pytest.raises(
        ConfigError, match=r"can be reached by other machines, and there is no token.*--token-file"
    ):
        EntryServer(tmp_path, host=host)


def test_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            EntryServer(tmp_path, port=port)


def test_cache_that_does_not_exist_yet_is_served_and_not_created(tmp_path: Path) -> None:
    """A node may serve before its first read."""
    with EntryServer(tmp_path / "cache") as server:
        assert request(server, f"GET /v2/entries/{DIGEST}")[0] == 404
        assert os.listdir(tmp_path) == []
    assert not server._thread.is_alive()


@needs_users
def test_the_cache_of_another_user_is_refused() -> None:
    """Instead of being served without any entry."""

    def serve(path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot be read by user \d+ \(Permission denied\)"):
            EntryServer(path)

    with open_to_all() as place:
        CacheDir(place).root.mkdir(mode=0o700)
        as_user(CAROL, serve, place)
