"""Peers and lower layers that are dead, slow, damaged or hostile: each sample is right, each fault
is logged once, and no bad entry is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cluster import Node, start_cluster
from tests.support.localnode import LocalNode
from tests.support.readers import make_reader
from tests.support.roguepeer import (
    Answer,
    claiming,
    entry_answer,
    hanging,
    running_peer,
    says,
    trickling,
    trickling_head,
)
from zarrcache import ConfigError, ZarrS3Reader
from zarrcache._keys import ArrayKey
from zarrcache.cache.loans import Loans
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.entry import encode_header, header_of
from zarrcache.peers import _patience
from zarrcache.peers import client as peers
from zarrcache.peers.client import Peers, nodes_by_duty

TASK, ROLE = "mp-1", "data"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> LocalNode:
    """Densities in a directory, and a cache that has all of them."""
    node = LocalNode(tmp_path_factory.mktemp("node"))
    node.read(node.reader())
    return node


@pytest.fixture
def key(node: LocalNode) -> ArrayKey:
    """The key of the requested entry."""
    return node.reader().key(TASK, ROLE)


@pytest.fixture
def good(node: LocalNode, key: ArrayKey) -> bytes:
    """The bytes of the entry on disk."""
    (path,) = (node.root / "entries").rglob(f"{key.digest}-*")
    return path.read_bytes()


def reader_at(node: LocalNode, directory: Path, **block: Any) -> ZarrS3Reader:
    """A reader with an empty cache of its own."""
    return make_reader(node.directory, cache={"dir": directory / "own", **block})


def flipped(raw: bytes, byte: int) -> bytes:
    """With one bit of this byte flipped."""
    return raw[:byte] + bytes([raw[byte] ^ 4]) + raw[byte + 1 :]


def header_with(**fields: Any) -> Callable[[bytes], bytes]:
    """With changed header fields and a correct checksum; the payload is unchanged."""

    def change(raw: bytes) -> bytes:
        length = int.from_bytes(raw[12:16], "little")
        text = json.dumps(
            {**json.loads(raw[20 : 20 + length]), **fields}, separators=(",", ":"), sort_keys=True
        ).encode()
        return (
            raw[:12] + len(text).to_bytes(4, "little") + crc32c(text).to_bytes(4, "little") + text
        ).ljust(4096, b"\0") + raw[4096:]

    return change


def of_kind(dtype: str, shape: tuple[int, ...]) -> Callable[[bytes], bytes]:
    """A valid entry of the right key that does not hold a density."""

    def change(raw: bytes) -> bytes:
        fields = json.loads(raw[20 : 20 + int.from_bytes(raw[12:16], "little")])
        array = np.zeros(shape, dtype)
        header = header_of(
            ArrayKey(fields["origin"], fields["url"], fields["array"]), array, fields["source"]
        )
        return encode_header(header) + array.tobytes()

    return change


def nested(raw: bytes) -> bytes:
    """JSON that overflows a parser's stack, with a correct checksum."""
    text = b"[" * 60000
    prefix = raw[:12] + len(text).to_bytes(4, "little") + crc32c(text).to_bytes(4, "little")
    return (prefix + text).ljust(61440, b"\0") + raw[4096:]


BAD: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the values": lambda raw: flipped(raw, 4096 + 17),
    "a bit of the header": lambda raw: flipped(raw, 60),
    "a bit of the checksum": lambda raw: flipped(raw, 17),
    "a bit behind the header": lambda raw: flipped(raw, 4000),
    "another version": lambda raw: raw[:8] + b"\x07" + raw[9:],
    "another density": header_with(url="/data/mp-2.zarr"),
    "a key of no text": header_with(url=["/data"]),
    "an endless shape": header_with(shape=[float("inf"), 1, 1]),
    "a strange dtype": header_with(dtype="f4,,("),
    "objects": header_with(dtype="|O8"),
    "a header with blanks": header_with(more="words"),
    "float64": of_kind("<f8", (6, 5, 4)),
    "two axes": of_kind("<f4", (30, 4)),
    "no values": of_kind("<f4", (0, 5, 4)),
    "less than it says": lambda raw: raw[:-8],
    "more than it says": lambda raw: raw + bytes(8),
    "nothing": lambda raw: b"",
    "half a header": lambda raw: raw[:30],
    "a web page": lambda raw: b"<html>" * 1000,
    "nested text": nested,
}


def check(reader: ZarrS3Reader, node: LocalNode, *, purges: int, peer_hits: int = 0) -> None:
    """Read from the origin what a plain read gives, and check that nothing else was stored."""
    assert np.array_equal(reader.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())
    stats = reader.stats
    assert (stats.purges, stats.peer_hits, stats.lower_hits, stats.cache_errors) == (
        purges,
        peer_hits,
        0,
        0,
    )
    own = Path(reader.cache.config.dir) / "zarrcache-v1"  # type: ignore[union-attr]
    assert len(list((own / "entries").rglob(f"*{reader.key(TASK, ROLE).digest}*"))) == 1
    again = make_reader(node.directory, cache={"dir": own.parent})
    assert np.array_equal(again.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())
    assert (again.stats.hits, again.stats.purges) == (1, 0)


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("place", ["peer", "lower"])
def test_bad_entry_is_counted_logged_once_and_not_kept(
    node: LocalNode,
    key: ArrayKey,
    good: bytes,
    tmp_path: Path,
    what: str,
    place: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For any kind of damage, the next source is asked."""
    raw = BAD[what](good)
    assert raw != good
    if place == "lower":
        lower = tmp_path / "lower" / "zarrcache-v1" / "entries" / key.digest[:2]
        lower.mkdir(parents=True)
        (lower / f"{key.digest}-01234567").write_bytes(raw)
        check(reader_at(node, tmp_path, lower=tmp_path / "lower"), node, purges=1)
    else:
        with running_peer(entry_answer(raw)) as peer:
            reader = reader_at(node, tmp_path, peers=[peer.url])
            check(reader, node, purges=1)
            assert len(peer.asked) == 1
            reader.load("mp-2", ROLE)  # another key, and damaged as well
            assert reader.stats.purges == 2
    assert caplog.text.count("entry rejected") == 1


REFUSED: dict[str, Callable[[bytes], Answer]] = {
    "hangs": lambda raw: hanging,
    "garbage": lambda raw: (
        lambda connection, request: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    ),
    "no answer": lambda raw: lambda connection, request: None,
    "error": lambda raw: (
        lambda connection, request: connection.sendall(
            b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
        )
    ),
    "other page": lambda raw: (
        lambda connection, request: connection.sendall(
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!"
        )
    ),
    "no length": lambda raw: (
        lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + raw)
    ),
    "endless header": lambda raw: (
        lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100000)
    ),
    "trickled header": trickling_head,
    "claims a terabyte": lambda raw: claiming(raw[:100], 2**40),
}


@pytest.mark.parametrize("how", REFUSED)
def test_peer_that_does_not_answer_is_left_out_for_a_while(
    node: LocalNode,
    good: bytes,
    tmp_path: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One request, one log line, and another request after the pause."""
    monkeypatch.setattr(peers, "_WAITING_ANSWER_S", 0.2)
    with running_peer(REFUSED[how](good)) as peer:
        reader = reader_at(node, tmp_path, peers=[peer.url], advertise="http://127.0.0.1:1")
        check(reader, node, purges=0)
        reader.load("mp-2", ROLE)
        assert len(peer.asked) == 1
        assert caplog.text.count(f"peer {peer.url} is left out") == 1
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 100)
        reader.load("mp-0", ROLE)
        assert len(peer.asked) == 2
        assert caplog.text.count(f"peer {peer.url} is left out") == 1


CUT: dict[str, Callable[[bytes], Answer]] = {
    "in the header": lambda raw: entry_answer(raw, sends=100),
    "in the values": lambda raw: entry_answer(raw, sends=len(raw) - 9),
    "before a byte": lambda raw: entry_answer(raw, sends=0),
    "by a reset": lambda raw: entry_answer(raw, sends=len(raw) - 9, reset=True),
    "longer than it says": lambda raw: entry_answer(raw, claims=len(raw) - 8),
}


@pytest.mark.parametrize("how", CUT)
def test_entry_that_breaks_off_is_not_kept(
    node: LocalNode, good: bytes, tmp_path: Path, how: str
) -> None:
    """A peer dies in the middle of a body; no partial file and no reservation remain."""
    with running_peer(CUT[how](good)) as peer:
        reader = reader_at(node, tmp_path, peers=[peer.url])
        check(reader, node, purges=1)
    assert list((tmp_path / "own").rglob("*.partial-*")) == []
    index = reader.cache.index
    assert index is not None
    assert index.volume_bytes() == sum(
        -(-p.stat().st_size // 4096) * 4096 for p in (tmp_path / "own").rglob("entries/*/*")
    )


def test_peer_that_trickles_is_given_up(
    node: LocalNode, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte arrives within the timeout, but the entry would take minutes."""
    monkeypatch.setattr(_patience, "BUDGET_S", 1.0)
    with running_peer(trickling(good)) as peer:
        check(reader_at(node, tmp_path, peers=[peer.url]), node, purges=1)


@pytest.mark.parametrize("place", ["peer", "lower"])
def test_an_entry_taken_as_a_loan_is_not_counted_against_its_sender(
    node: LocalNode,
    key: ArrayKey,
    good: bytes,
    tmp_path: Path,
    place: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A prefetcher with a full cache: the payload is in the loan, and is not fetched a second
    time.
    """
    room = 2 * -(-len(good) // 4096) * 4096
    for task_id in ("mp-0", "mp-2"):
        reader_at(node, tmp_path, limit=room).load(task_id, ROLE)
    with running_peer(entry_answer(good)) as peer:
        places: dict[str, Any] = (
            {"peers": [peer.url]} if place == "peer" else {"lower": node.root.parent}
        )
        reader = reader_at(node, tmp_path, limit=room, **places)
        arrays = reader.cache.arrays
        assert arrays is not None
        arrays.loans = Loans(arrays.index, room // 2)
        assert np.array_equal(reader.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())
        assert len(peer.asked) == (place == "peer")
    stats = reader.stats
    assert (stats.peer_hits, stats.lower_hits) == ((1, 0) if place == "peer" else (0, 1))
    assert (stats.bypasses, stats.purges, stats.cache_errors, stats.fetched_bytes) == (1, 0, 0, 0)
    assert arrays.index.loans() == {key.digest}
    assert "entry rejected" not in caplog.text
    training = reader_at(node, tmp_path, limit=room)
    assert np.array_equal(training.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())
    assert training.stats.hits == 1
    arrays.loans.close()


def test_peer_is_not_blamed_for_a_disk_that_fails_in_the_middle_of_an_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file ends after half of its values; the error is the cache's, and the origin is asked."""
    big = LocalNode(tmp_path / "big", 2, shape=(128, 128, 64), chunks=(64, 64, 64))
    full = big.reader()
    full.load(TASK, ROLE)
    (path,) = (big.root / "entries").rglob(f"{full.key(TASK, ROLE).digest}-*")
    raw = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with running_peer(entry_answer(raw)) as peer:
        reader = reader_at(big, tmp_path, peers=[peer.url])
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(raw) // 2, hard))
        try:
            values = reader.load(TASK, ROLE)[0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert np.array_equal(values, big.values[TASK, ROLE].ravel())
        assert len(peer.asked) == 1
    assert (reader.stats.purges, reader.stats.peer_hits, reader.stats.bypasses) == (0, 0, 1)
    assert reader.stats.cache_errors == 2  # the peer's entry, and the origin's failure
    assert "entry rejected" not in caplog.text
    assert [
        *(tmp_path / "own").rglob("*.partial-*"),
        *(tmp_path / "own").rglob(f"{path.name[:32]}*"),
    ] == []


def test_redirection_to_an_unknown_address_is_not_followed(
    node: LocalNode, good: bytes, tmp_path: Path
) -> None:
    """It would learn which densities are read. No address learns the token."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 32)
    with running_peer(entry_answer(good)) as stranger:
        away = says(303, token="x" * 32, kind="at", node=stranger.url)
        with running_peer(away) as peer:
            for own in (None, "http://127.0.0.1:1"):
                reader = reader_at(
                    node,
                    tmp_path / str(own is None),
                    peers=[peer.url],
                    advertise=own,
                    peer_token_file=token,
                )
                check(reader, node, purges=0)
            assert [len(peer.asked), "x" * 32 in "".join(peer.asked)] == [3, False]
        assert stranger.asked == []


def test_next_peer_is_asked_after_a_bad_one(node: LocalNode, good: bytes, tmp_path: Path) -> None:
    """In any order."""
    with (
        running_peer(entry_answer(flipped(good, 5000 - 900))) as bad,
        running_peer(entry_answer(good)) as fine,
    ):
        reader = reader_at(node, tmp_path, peers=[bad.url, fine.url])
        assert np.array_equal(reader.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())
        assert (reader.stats.peer_hits, reader.stats.purges) == (1, len(bad.asked))
        assert len(fine.asked) == 1


@pytest.mark.parametrize("given", [None, "w" * 32])
def test_wrong_token_is_refused_and_logged(
    node: LocalNode, tmp_path: Path, given: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing and a wrong token; no message contains the token."""
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for path, word in ((right, "r" * 32), (wrong, "w" * 32)):
        path.touch(0o600)
        path.write_text(word)
    with start_cluster(
        2, tmp_path, node.directory, str(node.directory), token_file=right
    ) as cluster:
        cluster.nodes[0].reader().load(TASK, ROLE)  # type: ignore[arg-type]
        reader = cluster.nodes[1].reader(peer_token_file=wrong if given else None)
        assert np.array_equal(reader.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())  # type: ignore[arg-type]
        assert reader.stats.peer_hits == 0
        assert "it does not accept this node's token (cache.peer_token_file)" in caplog.text
        assert "w" * 32 not in caplog.text
        assert "r" * 32 not in caplog.text + repr(cluster.nodes[1].cache) + repr(reader)


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "a link to the entry": lambda path, to: path.symlink_to(to),
    "a link to nothing": lambda path, to: path.symlink_to(path.with_name("nothing")),
    "a pipe": lambda path, to: os.mkfifo(path),
    "a directory": lambda path, to: path.mkdir(),
}


@pytest.mark.parametrize("what", PLANTED)
def test_an_entry_of_the_lower_layer_that_is_not_a_file_is_skipped(
    node: LocalNode, key: ArrayKey, tmp_path: Path, what: str
) -> None:
    """A good entry next to it is found; nothing hangs."""
    (path,) = (node.root / "entries").rglob(f"{key.digest}-*")
    directory = tmp_path / "lower" / "zarrcache-v1" / "entries" / key.digest[:2]
    directory.mkdir(parents=True)
    PLANTED[what](directory / f"{key.digest}-ffffffff", path)
    check(reader_at(node, tmp_path, lower=tmp_path / "lower"), node, purges=0)
    shutil.copy(path, directory / f"{key.digest}-00000000")
    other = reader_at(node, tmp_path / "other", lower=tmp_path / "lower")
    other.load(TASK, ROLE)
    assert (other.stats.lower_hits, other.stats.purges) == (1, 0)


def test_link_in_place_of_a_directory_of_the_lower_layer_is_not_followed(
    node: LocalNode, key: ArrayKey, tmp_path: Path
) -> None:
    """A user who may write there cannot lead a reader elsewhere."""
    entries = tmp_path / "lower" / "zarrcache-v1" / "entries"
    entries.mkdir(parents=True)
    (entries / key.digest[:2]).symlink_to(node.root / "entries" / key.digest[:2])
    check(reader_at(node, tmp_path, lower=tmp_path / "lower"), node, purges=0)


def test_missing_lower_layer_is_logged_once(
    node: LocalNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Perhaps it is not mounted on this node. A world-writable one is refused before the run."""
    reader = reader_at(node, tmp_path, lower=tmp_path / "lower")
    for task_id in ("mp-0", "mp-1", "mp-2"):
        reader.load(task_id, ROLE)
    assert caplog.text.count("there is no cache at") == 1
    (tmp_path / "lower" / "zarrcache-v1").mkdir(parents=True)
    (tmp_path / "lower" / "zarrcache-v1").chmod(0o777)
    with pytest.raises(ConfigError, match=r"cache\.lower: every user may write to .*chmod o-w"):
        reader_at(node, tmp_path / "other", lower=tmp_path / "lower")


# -- leases


@pytest.fixture
def pair(node: LocalNode, tmp_path: Path) -> Iterator[list[Node]]:
    """Two nodes, and an address that is the home of no key."""
    with start_cluster(2, tmp_path, node.directory, str(node.directory)) as cluster:
        yield cluster.nodes


def _take_a_lease_and_stop(node: Node, digest: str, pipe: Any) -> None:
    lease = next(Peers(node.reader().cache.config).replies(digest, source=None))  # type: ignore[arg-type]
    pipe.send(lease.kind)
    signal.pause()


def test_lease_of_a_killed_process_is_given_to_the_next_waiting_reader(
    pair: list[Node], node: LocalNode, key: ArrayKey
) -> None:
    """At once, before the lease would have expired: the kernel closes its connection."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    holder = context.Process(target=_take_a_lease_and_stop, args=(pair[0], key.digest, there))
    holder.start()
    assert here.poll(60)
    assert here.recv() == "lease"
    reader = pair[1].reader(retry={"timeout": 600})  # it would wait for the end of the lease
    loaded: list[Any] = []
    waiter = threading.Thread(target=lambda: loaded.append(reader.load(TASK, ROLE)[0]), daemon=True)  # type: ignore[arg-type]
    waiter.start()
    waiter.join(1.0)
    assert waiter.is_alive()  # it waits
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join(60)
    waiter.join(60)
    assert not waiter.is_alive()
    assert np.array_equal(loaded[0], node.values[TASK, ROLE].ravel())
    assert reader.stats.requests > 0
    other = pair[0].reader()
    other.load(TASK, ROLE)  # type: ignore[arg-type]
    assert other.stats.peer_hits == 1


def test_a_reader_that_waits_for_a_hanging_holder_goes_to_the_origin_at_last(
    pair: list[Node], node: LocalNode, key: ArrayKey
) -> None:
    """After the time that a fetch with its retries may take; here two seconds."""
    asked = Peers(pair[0].reader().cache.config).replies(key.digest, source=None)  # type: ignore[arg-type]
    lease = next(asked)
    assert lease.kind == "lease"
    reader = pair[1].reader(retry={"timeout": 2})
    assert np.array_equal(reader.load(TASK, ROLE)[0], node.values[TASK, ROLE].ravel())  # type: ignore[arg-type]
    assert reader.stats.peer_hits == 0
    lease.close()


def test_lease_is_given_back_when_the_origin_fails(
    pair: list[Node], node: LocalNode, tmp_path: Path
) -> None:
    """The reader gets the error; waiting readers do not wait longer."""
    broken = LocalNode(tmp_path / "broken")
    nodes = [dataclasses.replace(n, root=broken.directory, url=str(broken.directory)) for n in pair]
    (broken.directory / "data" / f"{TASK}.zarr" / "charge_density_total" / ".zarray").write_text(
        "{}"
    )
    for n in nodes:
        reader = n.reader()
        with pytest.raises(ValueError, match="mp-1"):
            reader.load(TASK, ROLE)  # type: ignore[arg-type]
    reader = nodes[0].reader()
    assert np.array_equal(reader.load("mp-2", ROLE)[0], broken.values["mp-2", ROLE].ravel())  # type: ignore[arg-type]


def test_lease_of_a_failed_fetch_is_given_to_one_waiting_reader(
    node: LocalNode, tmp_path: Path
) -> None:
    """The others wait for that one instead of all going to the origin."""
    with start_cluster(4, tmp_path, node.directory, str(node.directory)) as cluster:
        holder, *waiters = [n.reader(retry={"timeout": 600}) for n in cluster.nodes]
        key = holder.key(TASK, ROLE)
        home = next(
            s
            for s in cluster.servers
            if s.url == nodes_by_duty(key.digest, [s.url for s in cluster.servers])[0]
        )
        with ThreadPoolExecutor(3) as pool:
            with contextlib.suppress(OSError), holder.cache.remote.lookup(key, None) as lookup:
                assert lookup.take() is None
                loads = [pool.submit(reader.load, TASK, ROLE) for reader in waiters]  # type: ignore[arg-type]
                hung_s = time.monotonic() + 60
                while home._service.connections < 4 and time.monotonic() < hung_s:
                    time.sleep(0.01)
                assert home._service.connections == 4  # they wait
                raise OSError("the origin fails")
            for load in loads:
                assert np.array_equal(load.result(120)[0], node.values[TASK, ROLE].ravel())
        assert sorted(reader.stats.peer_hits for reader in waiters) == [0, 1, 1]


def test_remote_sources_pickle_as_their_configuration(node: LocalNode, tmp_path: Path) -> None:
    """Without the token. The node's directory holds which peers failed."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 32)
    reader = reader_at(node, tmp_path, peers=["http://127.0.0.1:1"], peer_token_file=token)
    reader.load(TASK, ROLE)
    remote = reader.cache.remote
    assert not remote.peers._patience.left_s("http://127.0.0.1:1")
    raw = pickle.dumps(remote)
    assert b"x" * 32 not in raw
    again = pickle.loads(raw)
    again.check()
    assert bool(again)
    assert again.peers._key is not None


def test_home_that_dies_leaves_the_others_to_the_origin(node: LocalNode, tmp_path: Path) -> None:
    """During a run, one after the other, until none is left."""
    with start_cluster(2, tmp_path, node.directory, str(node.directory)) as cluster:
        readers = [n.reader() for n in cluster.nodes]
        for server, task_id in zip([None, *cluster.servers], ("mp-0", "mp-1", "mp-2"), strict=True):
            if server is not None:
                server.close()
            for reader in readers:
                assert np.array_equal(
                    reader.load(task_id, ROLE)[0], node.values[task_id, ROLE].ravel()
                )  # type: ignore[arg-type]
        assert sum(reader.stats.peer_hits for reader in readers) >= 1
        assert all(reader.stats.cache_errors == 0 for reader in readers)


# -- the wire


CHANGED: dict[str, Callable[[bytes], bytes]] = {
    "a value, with the checksum of the entry": lambda raw: forged(raw),
    "a bit of the digest": lambda raw: flipped(raw, len(raw) - 1),
    "no digest": lambda raw: raw[:-32],
    "another entry's digest": lambda raw: raw[:-32] + bytes(32),
}


def forged(raw: bytes) -> bytes:
    """The same entry with other values and a right CRC-32C, as an attacker would make it."""
    entry = raw[:-32]
    fields = json.loads(entry[20 : 20 + int.from_bytes(entry[12:16], "little")])
    payload = bytes(fields["nbytes"])
    attributes = entry[4096 + len(payload) :]
    return header_with(crc32c=crc32c(payload))(entry[:4096] + payload + attributes) + raw[-32:]


@pytest.mark.parametrize("what", CHANGED)
def test_what_is_changed_on_its_way_is_refused(
    node: LocalNode, good: bytes, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By a machine between two nodes that share a token; a checksum without a key is no proof."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 32)
    with running_peer(entry_answer(good, change=CHANGED[what], token="x" * 32)) as peer:
        reader = reader_at(node, tmp_path, peers=[peer.url], peer_token_file=token)
        check(reader, node, purges=1)
        assert len(peer.asked) == 1
    assert "entry rejected" in caplog.text


def test_forged_entry_would_be_taken_without_its_digest(
    node: LocalNode, good: bytes, tmp_path: Path
) -> None:
    """The forgery is a good one: sent by a node with the token, it is an entry like any other."""
    entry = forged(good + bytes(32))[:-32]
    with running_peer(entry_answer(entry)) as peer:
        reader = reader_at(node, tmp_path, peers=[peer.url])
        assert not reader.load(TASK, ROLE)[0].any()
        assert (reader.stats.peer_hits, reader.stats.purges) == (1, 0)


@pytest.mark.parametrize("kind", ["lease", "at", "none", "busy"])
def test_answer_without_the_token_is_not_believed(
    node: LocalNode, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It could send a node elsewhere, or make it wait."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 32)
    forger = says(404, token="y" * 32, kind=kind, node="http://127.0.0.1:1")
    with running_peer(forger) as peer:
        reader = reader_at(
            node,
            tmp_path,
            peers=[peer.url, "http://127.0.0.1:1"],
            advertise="http://127.0.0.1:1",
            peer_token_file=token,
        )
        check(reader, node, purges=0)
        assert len(peer.asked) == 1
    assert "without proving the token (cache.peer_token_file)" in caplog.text


OLDER: dict[str, Answer] = {
    "401": lambda connection, request: connection.sendall(
        b"HTTP/1.1 401 Unauthorized\r\nServer: zarrcache\r\nContent-Length: 0\r\n\r\n"
    ),
    "400, without a token": lambda connection, request: connection.sendall(
        b"HTTP/1.1 400 Bad Request\r\nServer: zarrcache\r\nContent-Length: 0\r\n\r\n"
    ),
    "a later one": lambda connection, request: connection.sendall(
        b"HTTP/1.1 426 X\r\nServer: zarrcache-v3\r\nContent-Length: 6\r\n\r\nwords\n"
    ),
}


@pytest.mark.parametrize("how", OLDER)
def test_an_older_server_is_named_as_such(
    node: LocalNode, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The node reads from the origin, and the log says what to do."""
    with running_peer(OLDER[how]) as peer:
        check(reader_at(node, tmp_path, peers=[peer.url]), node, purges=0)
    assert "is not a server of this version of zarrcache; install the same version" in caplog.text


# -- peers that hang


@pytest.mark.parametrize("after_s", [0.5, 1.2])
def test_slow_peer_is_left_out_before_it_has_cost_five_seconds(
    tmp_path: Path, after_s: float
) -> None:
    """It gives no entry, and each of its answers is right and within the timeout."""
    big = LocalNode(tmp_path / "big", 20)
    with running_peer(says(404, after_s=after_s, kind="none")) as peer:
        reader = reader_at(big, tmp_path, peers=[peer.url])
        start_s = time.monotonic()
        for n in range(20):
            reader.load(f"mp-{n}", ROLE)
        assert len(peer.asked) * after_s < 5.5
        assert time.monotonic() - start_s < 20 * after_s
        # Another process of the node knows it as well.
        asked = len(peer.asked)
        reader_at(big, tmp_path, peers=[peer.url]).load("mp-0", "label")
        assert len(peer.asked) == asked


def test_hanging_node_is_left_out_whichever_home_names_it(tmp_path: Path) -> None:
    big = LocalNode(tmp_path / "big", 12)
    with running_peer(hanging) as stopped:
        hung = stopped.url
        with running_peer(says(303, kind="at", node=hung)) as home:
            reader = reader_at(
                big, tmp_path, peers=[home.url, hung], advertise="http://127.0.0.1:1"
            )
            start_s = time.monotonic()
            for n in range(12):
                reader.load(f"mp-{n}", ROLE)
            assert len(stopped.asked) <= 2
            assert len(home.asked) >= 12
            assert time.monotonic() - start_s < 15  # 24 s at 2 s each
