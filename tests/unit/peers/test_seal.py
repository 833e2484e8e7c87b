"""Keyed digests of requests and answers: what is accepted, and what a listener sees."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.support.cachedirs import array_of, key_of, settings
from zarrcache.cache.tiers import ArrayCache
from zarrcache.peers import _seal as seal
from zarrcache.peers.client import Peers
from zarrcache.peers.server import EntryServer
from zarrcache.stats import Counters

TOKEN = "t0ken-that-no-other-program-knows"
KEY = seal.key_of(TOKEN)
HOST, TARGET = "node1:7070", "/v2/entries/" + "0" * 32 + "?source=s"


class Clock:
    """A clock that a test sets."""

    now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the client and, at first, of the server."""
    clock = Clock()
    monkeypatch.setattr(seal.time, "time", clock)
    return clock


def test_a_request_is_accepted_once_and_unchanged_only(clock: Clock) -> None:
    """Each part of it is covered, and an unknown key accepts nothing."""
    receiver = seal.Receiver(KEY, clock=clock)
    header, digest = seal.Sender().authorization(KEY, "GET", HOST, TARGET)
    scheme, stamp, nonce, _ = header.split()
    changed = [
        (header, "POST", HOST, TARGET),
        (header, "GET", "node2:7070", TARGET),
        (header, "GET", HOST, TARGET.replace("source", "Source")),
        (header, "GET", HOST, TARGET + "&node=http://evil:1"),
        (header.replace(stamp, f"{float(stamp) + 1:.6f}"), "GET", HOST, TARGET),
        (header.replace(nonce, "0" * 32), "GET", HOST, TARGET),
        (header.replace(digest, "0" * 64), "GET", HOST, TARGET),
        (header.replace(digest, digest.upper()), "GET", HOST, TARGET),
        (header.replace(scheme, "Bearer"), "GET", HOST, TARGET),
        (header + " ", "GET", HOST, TARGET),
        (f"Bearer {TOKEN}", "GET", HOST, TARGET),
        ("", "GET", HOST, TARGET),
        ("\udcff\udce4", "GET", HOST, TARGET),
    ]
    assert [receiver.check(*request) for request in changed] == [None] * len(changed)
    assert (
        seal.Receiver(seal.key_of("other"), clock=clock).check(header, "GET", HOST, TARGET) is None
    )
    assert seal.Receiver(seal.key_of(None), clock=clock).check(header, "GET", HOST, TARGET) is None
    assert receiver.check(header, "GET", HOST, TARGET) == digest
    for later_s in (0.0, seal.WINDOW_S - 1, 2 * seal.WINDOW_S, 3600.0):
        clock.now_s = 1_700_000_000.0 + later_s
        with pytest.raises(seal.StaleError):
            receiver.check(header, "GET", HOST, TARGET)
    with pytest.raises(seal.StaleError):  # a restarted server
        seal.Receiver(KEY, clock=clock).check(header, "GET", HOST, TARGET)


@pytest.mark.parametrize("ahead_s", [-86_400.0, -40.0, 40.0, 3600.0])
def test_a_client_whose_clock_differs_is_told_the_time_once(clock: Clock, ahead_s: float) -> None:
    now_s = clock.now_s
    receiver, sender = seal.Receiver(KEY, clock=lambda: now_s + ahead_s), seal.Sender()
    header, _ = sender.authorization(KEY, "GET", HOST, TARGET)
    with pytest.raises(seal.StaleError):
        receiver.check(header, "GET", HOST, TARGET)
    sender.adopt(f"{now_s + ahead_s:.6f}")
    for _ in range(3):
        header, digest = sender.authorization(KEY, "GET", HOST, TARGET)
        assert receiver.check(header, "GET", HOST, TARGET) == digest
    with pytest.raises(ValueError, match="number"):
        sender.adopt("nan")


def test_server_whose_clock_is_set_back_goes_on(clock: Clock) -> None:
    """By an hour, as when a time server is reached at last. Repetitions stay refused."""
    receiver, sender = seal.Receiver(KEY, clock=clock), seal.Sender()
    clock.now_s -= 3600.0
    sender.adopt(f"{clock.now_s:.6f}")
    header, digest = sender.authorization(KEY, "GET", HOST, TARGET)
    assert receiver.check(header, "GET", HOST, TARGET) == digest
    with pytest.raises(seal.StaleError):
        receiver.check(header, "GET", HOST, TARGET)


def test_digests_of_requests_answers_and_entries_differ() -> None:
    """One cannot be passed off as another, and parts do not run into each other."""
    assert len({
        seal.answer_seal(KEY, "r", 404, "kind=none"),
        seal.answer_seal(KEY, "r", 303, "kind=none"),
        seal.answer_seal(KEY, "s", 404, "kind=none"),
        seal.answer_seal(KEY, "r4", 4, "kind=none"),
        seal.body_seal(KEY, "r").digest(),
        seal.body_seal(KEY, "s").digest(),
    }) == 6  # fmt: skip


def test_a_client_with_another_clock_gets_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a socket; the second request needs one round trip only."""
    ArrayCache(settings(tmp_path), Counters()).put(key_of(1), array_of(1), source="s")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    with EntryServer(tmp_path / "cache", token=TOKEN) as server:
        config = settings(tmp_path).model_copy(
            update={"peers": (server.url,), "peer_token_file": token}
        )
        peers = Peers(config)
        peers._senders[server.url] = sender = seal.Sender(ahead_s=-7200.0)
        for _ in range(2):
            reply = next(peers.replies(key_of(1).digest, source=None))
            assert reply.kind == "entry"
            reply.close()
            assert abs(sender.ahead_s) < 60


def test_nothing_on_the_wire_contains_the_token(tmp_path: Path) -> None:
    """Both directions of a real transfer, as a listener sees them. Nor any half of it."""
    ArrayCache(settings(tmp_path), Counters()).put(key_of(1), array_of(1), source="s")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    seen: list[bytes] = []
    with (
        EntryServer(tmp_path / "cache", token=TOKEN) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        port = int(server.url.rpartition(":")[2])

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", port)) as to:
                for source, sink in ((client, to), (to, client)):
                    while part := source.recv(2**20):
                        seen.append(part)
                        sink.sendall(part)
                        if source is client and b"\r\n\r\n" in part:
                            break

        thread = threading.Thread(target=relay)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = settings(tmp_path).model_copy(update={"peers": (url,), "peer_token_file": token})
        reply = next(Peers(config).replies(key_of(1).digest, source=None))
        body = bytearray(reply.nbytes)
        view = memoryview(body)
        while view.nbytes:
            view = view[reply.readinto(view) :]
        reply.close()
        thread.join(60)
    traffic = b"".join(seen)
    assert len(traffic) > len(body)
    assert bytes(body) in traffic  # not encrypted
    halves = TOKEN.encode()[:16], TOKEN.encode()[16:]
    assert not any(part in traffic for half in halves for part in (half, half.hex().encode()))
