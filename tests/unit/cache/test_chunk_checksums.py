"""Checksums in the chunks of Zarr v3: what a whole object or any range of one contradicts."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import google_crc32c
import pytest

from zarrcache.cache import chunk_checksums
from zarrcache.cache.chunk_checksums import ChunkChecksums

CRC: dict[str, Any] = {"name": "crc32c"}
RAW: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
CHUNKS = [b"first chunk", b"", b"third", b"the fourth chunk"]
#: In the order of the object, which is not that of the grid; None: never written.
PLACES = [2, 0, None, 3]


def document(*codecs: Any) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": [4, 2, 6]}}
    return {"zarr_format": 3, "chunk_grid": grid, "codecs": list(codecs)}


def sharded(
    *,
    endian: str = "little",
    location: str | None = "end",
    inner: Any = (RAW, CRC),
    index: Any = (),
) -> dict[str, Any]:
    """Shards of 4 chunks."""
    settings = {
        "chunk_shape": [2, 1, 6],
        "codecs": list(inner),
        "index_codecs": list(index) or [{**RAW, "configuration": {"endian": endian}}, CRC],
    }
    if location is not None:
        settings["index_location"] = location
    return document({"name": "sharding_indexed", "configuration": settings})


def checked(raw: bytes) -> bytes:
    return raw + google_crc32c.value(raw).to_bytes(4, "little")


def shard_of(*, endian: str = "little", at_start: bool = False) -> tuple[bytes, dict[int, slice]]:
    """A shard, and where each of its chunks lies."""
    index_bytes = 4 * 16 + 4
    body, places = b"", {}
    numbers = [2**64 - 1] * 8
    for n in (place for place in PLACES if place is not None):
        start = len(body) + (index_bytes if at_start else 0)
        body += checked(CHUNKS[n])
        places[n] = slice(start, start + len(CHUNKS[n]) + 4)
        numbers[2 * n : 2 * n + 2] = start, len(CHUNKS[n]) + 4
    index = checked(struct.pack(f"{'>' if endian == 'big' else '<'}8Q", *numbers))
    return (index + body if at_start else body + index), places


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_whole_chunk_is_compared_with_its_checksum() -> None:
    checks = ChunkChecksums.of(json.dumps(document(RAW, CRC)).encode())
    assert checks is not None
    data = checked(b"values")
    assert checks.is_intact("c/0", data, 0, len(data))
    assert checks.is_intact("c/0", b"\0\0\0\0", 0, 4)  # the checksum of nothing is 0
    for at in range(len(data)):
        assert not checks.is_intact("c/0", flipped(data, at), 0, len(data))
    for n in range(4):
        assert not checks.is_intact("c/0", data[:n], 0, n)
    # A part of one has no checksum.
    assert checks.is_intact("c/0", b"whatever", 0, len(data))
    assert checks.is_intact("c/0", flipped(data, 1)[1:], 1, len(data))


@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("at_start", [True, False])
def test_a_whole_shard_is_compared_with_all_its_checksums(endian: str, at_start: bool) -> None:
    raw = json.dumps(sharded(endian=endian, location="start" if at_start else "end")).encode()
    data, _ = shard_of(endian=endian, at_start=at_start)
    checks = ChunkChecksums.of(raw)
    assert checks is not None
    assert checks.is_intact("c/0", data, 0, len(data))
    for at in range(len(data)):
        fresh = ChunkChecksums.of(raw)
        assert fresh is not None
        assert not fresh.is_intact("c/0", flipped(data, at), 0, len(data))


@pytest.mark.parametrize("at_start", [True, False])
def test_a_range_is_compared_with_the_checksums_that_it_covers(at_start: bool) -> None:
    """Those of its chunks once the index was read; chunks of which it has a part are not."""
    document_ = sharded(location="start" if at_start else "end")
    data, places = shard_of(at_start=at_start)
    index = slice(0, 68) if at_start else slice(len(data) - 68, len(data))
    raw = json.dumps(document_).encode()

    def intact(bad: bytes, start: int, stop: int, *, knows: bool = True, key: str = "c/0") -> bool:
        checks = ChunkChecksums.of(raw)
        assert checks is not None
        if knows:
            assert checks.is_intact("c/0", data[index], index.start, len(data))
        return checks.is_intact(key, bad[start:stop], start, len(data))

    for n, place in places.items():
        for at in (place.start, place.stop - 1):
            bad = flipped(data, at)
            for before, after in ((0, 0), (1, 0), (0, 1), (3, 2)):
                start, stop = max(place.start - before, 0), min(place.stop + after, len(data))
                assert intact(data, start, stop), n
                assert not intact(bad, start, stop), n
                assert intact(bad, start, stop, knows=False) or (
                    start <= index.start and index.stop <= stop
                )
                assert intact(bad, start, stop, key="c/1")
            assert intact(bad, place.start + 1, place.stop)
            assert intact(bad, place.start, place.stop - 1)
    bad = flipped(data, index.start)
    for start, stop in ((index.start, index.stop), (0, len(data))):
        assert not intact(bad, start, stop, knows=False)
    assert intact(bad, index.start + 1, index.stop, knows=False)
    assert intact(bad, index.start, index.stop - 1, knows=False)


def test_an_index_without_checksums_of_its_chunks_is_still_checked() -> None:
    checks = ChunkChecksums.of(json.dumps(sharded(inner=[RAW], location=None)).encode())
    assert checks is not None
    data, places = shard_of()
    assert checks.is_intact("c/0", data, 0, len(data))
    assert checks.is_intact("c/0", flipped(data, places[2].start), 0, len(data))
    assert not checks.is_intact("c/0", flipped(data, len(data) - 68), 0, len(data))
    assert not checks.is_intact("c/0", flipped(data, len(data) - 1), 0, len(data))
    assert checks.is_intact("c/0", data[-67:], 0, 67)  # smaller than an index: zarr reports it
    assert not checks.is_intact("c/0", flipped(data, len(data) - 1)[-68:], 0, 68)


def test_indexes_of_few_shards_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_checksums, "_MAX_SHARDS", 3)
    checks = ChunkChecksums.of(json.dumps(sharded()).encode())
    assert checks is not None
    data, places = shard_of()
    bad = flipped(data, places[0].start)[places[0]]
    for n in range(7):
        assert checks.is_intact(f"c/{n}", data, 0, len(data))
        assert not checks.is_intact(f"c/{n}", bad, places[0].start, len(data))
        assert len(checks._indexes) <= 3


def without(*path: str) -> dict[str, Any]:
    made = sharded()
    place: Any = made
    for name in path[:-1]:
        place = place[int(name) if name.isdigit() else name]
    del place[path[-1]]
    return made


@pytest.mark.parametrize(
    "description",
    [
        document(RAW),
        document(CRC, RAW),
        document(),
        sharded(index=[RAW]),
        sharded(index=[RAW, CRC, CRC]),
        sharded(index=[RAW, {"name": "zstd"}, CRC]),
        without("codecs"),
        without("chunk_grid", "configuration"),
        without("codecs", "0", "configuration"),
        {"codecs": 5},
        {"codecs": ["crc32c"]},
        {**sharded(), "chunk_grid": {"configuration": {"chunk_shape": [4, 2]}}},
        [],
        None,
    ],
)
def test_other_metadata_describes_no_checksum(description: Any) -> None:
    assert ChunkChecksums.of(json.dumps(description).encode()) is None


def test_metadata_that_is_not_json_or_divides_by_zero_describes_no_checksum() -> None:
    assert ChunkChecksums.of(b"{") is None
    broken = copy.deepcopy(sharded())
    broken["codecs"][0]["configuration"]["chunk_shape"] = [0, 1, 6]
    assert ChunkChecksums.of(json.dumps(broken).encode()) is None
