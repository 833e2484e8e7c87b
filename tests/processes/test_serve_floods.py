"""``zarrcache serve`` under floods: bounded memory, and answers for valid clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.signed import authorization
from tests.support.training import start, write_config
from zarrcache.peers._seal import key_of

TOKEN = "k" * 40
DIGEST = "0" * 32
START = f"GET /v2/entries/{DIGEST} HTTP/1.1\r\nHost: x\r\n".encode()
ATTACKERS = 200  # the server keeps 128 connections without a valid request
FLOOD_S = 0.5
MOST_MORE_BYTES = 100 * 2**20


def wait_in_silence(connection: socket.socket) -> None:
    time.sleep(FLOOD_S)


def send_headers_slowly(connection: socket.socket) -> None:
    """Within any limit of one header and of their number, and never the end."""
    connection.sendall(START + b"".join(b"X%d: %s\r\n" % (n, b"x" * 100) for n in range(30)))
    for _ in range(30):
        time.sleep(FLOOD_S / 30)
        connection.sendall(b"x")


def send_large_headers(connection: socket.socket) -> None:
    connection.sendall(START)
    for n in range(100):
        connection.sendall(b"X%d: %s\r\n" % (n, b"x" * 65000))


def send_requests_without_reading(connection: socket.socket) -> None:
    for _ in range(200):
        connection.sendall((START + b"X: " + b"x" * 900 + b"\r\n\r\n") * 30)


def send_a_body(connection: socket.socket) -> None:
    connection.sendall(START + b"Content-Length: 1000000000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(bytes(65536))


def send_no_http(connection: socket.socket) -> None:
    for _ in range(100):
        connection.sendall(bytes(65536))


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """One server for all floods; it ends silently on SIGTERM after them."""
    with serving(tmp_path_factory.mktemp("served")) as (process, port):
        yield process, port
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``serve`` in its own process, with a token, and its port."""
    token = directory / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    config = write_config(directory)
    process = start("serve", config, "--port", "0", "--token-file", token, "--json")
    try:
        assert process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("}"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        yield process, int(json.loads("".join(lines))["url"].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def memory_bytes(process: subprocess.Popen[str]) -> int:
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def ask(port: int) -> str | None:
    """Ask for an entry as a valid client; the kind of the answer.

    The server makes room for a connection by closing the one that has waited longest without a
    valid request. That may be a valid client's on a busy machine, which then asks again.
    """
    for _ in range(2):
        with contextlib.suppress(http.client.RemoteDisconnected, ConnectionError):
            return _ask(port)
    return _ask(port)


def _ask(port: int) -> str | None:
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    ) as connection:
        line = f"GET /v2/entries/{DIGEST}"
        header = authorization(line, f"http://127.0.0.1:{port}", key=key_of(TOKEN))
        headers = dict(field.split(": ", 1) for field in header.split("\r\n"))
        connection.request("GET", line[4:], headers=headers)
        return connection.getresponse().headers["Zarrcache-Answer"].removeprefix("kind=")


@pytest.mark.parametrize(
    "attack",
    [
        wait_in_silence,
        send_headers_slowly,
        send_large_headers,
        send_requests_without_reading,
        send_a_body,
        send_no_http,
    ],
)
def test_flood_without_the_token_takes_little_memory_and_keeps_no_valid_client_out(
    served: tuple[subprocess.Popen[str], int], attack: Callable[[socket.socket], None]
) -> None:
    process, port = served
    assert ask(port) == "none"
    idle_bytes = memory_bytes(process)
    begun, is_over = threading.Semaphore(0), threading.Event()

    def flood() -> None:
        while not is_over.is_set():
            with (
                contextlib.suppress(OSError),  # the server hangs up
                socket.create_connection(("127.0.0.1", port), timeout=FLOOD_S) as connection,
            ):
                begun.release()
                attack(connection)

    threads = [threading.Thread(target=flood, daemon=True) for _ in range(ATTACKERS)]
    for thread in threads:
        thread.start()
    for _ in range(ATTACKERS * 3 // 4):
        assert begun.acquire(timeout=60)
    answers, most_bytes, ends_s = [], 0, time.monotonic() + FLOOD_S
    while not answers or time.monotonic() < ends_s:
        answers.append(ask(port))
        most_bytes = max(most_bytes, memory_bytes(process))
    is_over.set()
    for thread in threads:
        thread.join(60)
    assert set(answers) == {"none"}
    assert max(most_bytes, memory_bytes(process)) < idle_bytes + MOST_MORE_BYTES


def test_ten_thousand_connections_take_little_memory_and_keep_no_valid_client_out(
    served: tuple[subprocess.Popen[str], int],
) -> None:
    """One after the other, each left open with half a request by a client that never reads."""
    process, port = served
    assert ask(port) == "none"
    idle_bytes, most_bytes, kept = memory_bytes(process), 0, []
    try:
        for n in range(10_000):
            connection = socket.socket()
            connection.setblocking(False)
            kept.append(connection)
            with contextlib.suppress(OSError):
                connection.connect_ex(("127.0.0.1", port))
                connection.send(START)
            if n % 500 == 499:
                assert ask(port) == "none"
                most_bytes = max(most_bytes, memory_bytes(process))
                while len(kept) > 200:  # limits of this process, not of the server
                    kept.pop(0).close()
        assert most_bytes < idle_bytes + MOST_MORE_BYTES
    finally:
        for connection in kept:
            connection.close()


def test_serve_that_was_suspended_answers_again_and_ends_on_sigterm(tmp_path: Path) -> None:
    """Batch systems suspend jobs; some system calls fail after that."""
    with serving(tmp_path) as (process, port):
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
            assert ask(port) == "none"
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0


def test_signal_just_after_a_suspension_ends_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread is not waiting yet, so the kernel may give the signal to one of OpenBLAS."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    for ends in (signal.SIGTERM, signal.SIGINT):
        process = start("serve", write_config(tmp_path), "--port", "0")
        try:
            assert process.stdout is not None
            assert "Serving" in process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            process.send_signal(signal.SIGCONT)
            process.send_signal(ends)
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()
