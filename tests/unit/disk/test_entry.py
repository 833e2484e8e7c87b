"""The format of an entry: any array comes back unchanged, and no other file passes for an entry."""

from __future__ import annotations

import gc
import io
import os
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tests.support.cachedirs import key_of
from zarrcache._keys import ArrayKey
from zarrcache.disk._publish import publish
from zarrcache.disk.entry import (
    EntryHeader,
    EntryStream,
    _checksum,
    encode_header,
    header_of,
    map_entry,
    read_header,
    write_entry,
)
from zarrcache.errors import CorruptEntryError

KEY = key_of(1)


def write(path: Path, array: NDArray[Any]) -> EntryHeader:
    """Publish one entry."""
    header = header_of(KEY, array, "source")
    publish(path, lambda file: write_entry(file, header, array), expected_bytes=header.file_bytes)
    return header


@given(
    array=hnp.arrays(
        st.sampled_from(["<f4", "<f8", "<f2", "<i8", "<u2", "|u1", "|i1", "|b1"]),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9),
    )
)
def test_any_array_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, array: NDArray[Any]
) -> None:
    """NaNs too."""
    path = tmp_path_factory.getbasetemp() / "entry"
    header = write(path, array)
    assert read_header(path) == header
    entry = map_entry(path)
    assert entry.header == header
    assert (entry.array.dtype, entry.array.shape, entry.array.tobytes()) == (
        array.dtype,
        array.shape,
        array.tobytes(),
    )
    assert entry.is_intact()
    assert path.stat().st_size == header.file_bytes == header.offset + array.nbytes
    assert header.offset % 4096 == 0


@pytest.mark.parametrize("written", [1, 4095, 4096, 4097, 4096 + 4 * 5000])
def test_a_write_that_stops_early_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Linux writes at most 2 GiB per call, and less when the disk is nearly full. Here it stops in
    the header, at its end, and in the array.
    """

    def writev(fd: int, parts: list[memoryview]) -> int:
        return os.write(fd, b"".join(parts)[:written])

    monkeypatch.setattr("os.writev", writev)
    array = np.arange(5000, dtype="<f4")
    write(tmp_path / "entry", array)
    assert map_entry(tmp_path / "entry").is_intact()


def test_mapped_array_is_writable_and_private(tmp_path: Path) -> None:
    array = np.arange(5000, dtype="f4")
    write(tmp_path / "entry", array)
    mine, other = map_entry(tmp_path / "entry"), map_entry(tmp_path / "entry")
    mine.array[:] = -1
    assert np.array_equal(other.array, array)
    assert np.array_equal(map_entry(tmp_path / "entry").array, array)
    assert not mine.is_intact()
    assert other.is_intact()


def test_array_outlives_its_entry_and_its_file(tmp_path: Path) -> None:
    array = np.arange(5000, dtype="f4")
    write(tmp_path / "entry", array)
    view = map_entry(tmp_path / "entry").array[10:20]
    os.unlink(tmp_path / "entry")
    gc.collect()
    assert np.array_equal(view, array[10:20])
    assert np.array_equal(pickle.loads(pickle.dumps(view)), array[10:20])


def test_many_mapped_entries_hold_no_descriptor(tmp_path: Path) -> None:
    """The users' original reader keeps a list of thousands of densities."""
    write(tmp_path / "entry", np.zeros(10, "f4"))
    before = len(os.listdir("/dev/fd"))
    kept = [map_entry(tmp_path / "entry").array for _ in range(2000)]
    assert len(os.listdir("/dev/fd")) == before
    assert len(kept) == 2000


def damaged(raw: bytes) -> dict[str, bytes]:
    """Ways in which a file is not an entry."""
    text = raw[20 : 20 + int.from_bytes(raw[12:16], "little")]

    def with_json(new: bytes) -> bytes:
        head = (
            raw[:12]
            + len(new).to_bytes(4, "little")
            + google_crc32c.value(new).to_bytes(4, "little")
            + new
        )
        return head.ljust(-(-len(head) // 4096) * 4096, b"\0") + raw[4096:]

    return {
        "empty": b"",
        "shorter than a prefix": raw[:10],
        "cut header": raw[:100],
        "cut payload": raw[:-1],
        "longer": raw + b"\0",
        "magic": b"ZARRCACH" + raw[8:],
        "version": raw[:8] + (2).to_bytes(4, "little") + raw[12:],
        "header length": raw[:12] + (2**31).to_bytes(4, "little") + raw[16:],
        "flipped header": raw[:30] + bytes([raw[30] ^ 1]) + raw[31:],
        "object dtype": with_json(text.replace(b"<f4", b"|O8")),
        "object dtype of the same length": with_json(
            text.replace(b"<f4", b"|O8").replace(b'"shape":[10]', b'"shape":[5]')
        ),
        "another shape": with_json(text.replace(b'"shape":[10]', b'"shape":[11]')),
        "negative shape": with_json(text.replace(b'"shape":[10]', b'"shape":[-2,-5]')),
        "negative count": with_json(text[:-1] + b',"nonfinite":-1}'),
        "count is text": with_json(text[:-1] + b',"missing_chunks":"two"}'),
        "infinite size": with_json(re.sub(rb'"nbytes":\d+', b'"nbytes":Infinity', text)),
        "infinite axis": with_json(text.replace(b'"shape":[10]', b'"shape":[1e999]')),
        "dtype with an open bracket": with_json(text.replace(b"<f4", b"(2,f4")),
        "dtype of many fields": with_json(text.replace(b"<f4", b"f4,f4")),
        "nested too deeply": with_json(b"[" * 30_000 + b"]" * 30_000),
        "shape is text": with_json(text.replace(b'"shape":[10]', b'"shape":"ten"')),
        "no such field": with_json(text.replace(b'"dtype"', b'"dtipe"')),
        "json is a list": with_json(b"[]"),
        "origin is a number": with_json(re.sub(rb'"origin":"[^"]*"', b'"origin":5', text)),
        "array is null": with_json(re.sub(rb'"array":"[^"]*"', b'"array":null', text)),
    }


CASES = sorted(damaged(bytes(8000)))


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_not_a_whole_entry_is_refused(tmp_path: Path, case: str) -> None:
    """When its header is read and when it is mapped; the message names the file."""
    path = tmp_path / "entry"
    write(path, np.arange(10, dtype="f4"))
    path.write_bytes(damaged(path.read_bytes())[case])
    for read in (read_header, map_entry):
        with pytest.raises(CorruptEntryError, match="entry is not a complete entry"):
            read(path)


def test_a_flipped_bit_of_the_payload_is_found_by_its_checksum(tmp_path: Path) -> None:
    """Mapping does not read the payload; ``is_intact`` does."""
    path = tmp_path / "entry"
    write(path, np.arange(1000, dtype="f4"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert not map_entry(path).is_intact()


def test_a_long_url_takes_a_second_page(tmp_path: Path) -> None:
    """The payload stays page-aligned."""
    key = type(KEY)("file", "/" + "x" * 6000, "a")
    array = np.arange(10, dtype="f4")
    header = header_of(key, array, "s")
    publish(tmp_path / "entry", lambda file: write_entry(file, header, array))
    assert header.offset == 8192
    assert map_entry(tmp_path / "entry").header == header
    assert np.array_equal(map_entry(tmp_path / "entry").array, array)


def test_planted_link_fifo_or_directory_is_refused(tmp_path: Path) -> None:
    """A link would read another file, a FIFO would hang."""
    write(tmp_path / "entry", np.arange(10, dtype="f4"))
    (tmp_path / "link").symlink_to(tmp_path / "entry")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="symbolic links"):
        map_entry(tmp_path / "link")
    for planted in (tmp_path / "fifo", tmp_path):
        with pytest.raises(CorruptEntryError, match="not a regular file"):
            map_entry(planted)
    with pytest.raises(FileNotFoundError):
        map_entry(tmp_path / "nothing")


def test_the_checksum_is_of_the_bytes() -> None:
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    assert _checksum(array) == google_crc32c.value(array.tobytes())
    assert _checksum(np.empty((0, 3))) == 0
    assert len(encode_header(header_of(KEY, array, "s"))) == 4096


def test_a_planted_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    write(path, np.arange(10, dtype="f4"))
    with path.open("r+b") as file:
        file.seek(12)
        file.write((2**30).to_bytes(4, "little"))
        file.truncate(2**30 + 2**20)  # sparse
    for read in (read_header, map_entry):
        assert peak_bytes(lambda read=read: refused(read, path)) < 2**20  # type: ignore[misc]


def refused(read: Callable[..., object], *args: Any) -> None:
    with pytest.raises(CorruptEntryError):
        read(*args)


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- entries that stream in


def entry_bytes(array: np.ndarray[Any, Any], key: ArrayKey = KEY) -> bytes:
    return encode_header(header_of(key, array, "source")) + array.tobytes()


DENSITY = np.arange(60, dtype="<f4").reshape(3, 4, 5)


class Dribble(io.RawIOBase):
    """A stream that gives few bytes at a time, as a socket may."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def readinto(self, buffer: Any) -> int:
        part, self._raw = self._raw[: min(7, len(buffer))], self._raw[min(7, len(buffer)) :]
        buffer[: len(part)] = part
        return len(part)


def test_a_streamed_entry_is_written_byte_for_byte_or_read(tmp_path: Path) -> None:
    raw = entry_bytes(DENSITY)
    stream = EntryStream(Dribble(raw), len(raw), KEY, "node")
    assert not stream.is_spent
    publish(tmp_path / "entry", stream.write)
    assert stream.is_spent
    assert (tmp_path / "entry").read_bytes() == raw
    stream = EntryStream(io.BytesIO(raw), len(raw), KEY, "node")
    assert np.array_equal(stream.read().array, DENSITY)
    assert stream.is_spent


@pytest.mark.parametrize("cut", [1, 19, 100, 4096, 4097])
def test_a_stream_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    raw = entry_bytes(DENSITY)
    for use in ("read", "write"):
        with pytest.raises(CorruptEntryError, match="node ended early"):  # noqa: PT012
            stream = EntryStream(io.BytesIO(raw[:cut]), len(raw), KEY, "node")
            if use == "read":
                stream.read()
            else:
                publish(tmp_path / "entry", stream.write)
    assert os.listdir(tmp_path) == []


def test_a_streamed_payload_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    raw = bytearray(entry_bytes(DENSITY))
    raw[-1] ^= 1
    stream = EntryStream(io.BytesIO(raw), len(raw), KEY, "node")
    with pytest.raises(CorruptEntryError, match="its checksum does not match"):
        publish(tmp_path / "entry", stream.write)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"HTTP" * 2000, "does not begin like an entry"),
        (entry_bytes(DENSITY, ArrayKey("file", "/other", "a")), "holds ArrayKey"),
        (entry_bytes(DENSITY.astype("<f8")), "not a density"),
        (entry_bytes(DENSITY.ravel()), "not a density"),
        (entry_bytes(DENSITY)[:4000] + b"x" + entry_bytes(DENSITY)[4001:], "padding"),
    ],
    ids=["no entry", "another key", "float64", "1-D", "padding"],
)
def test_a_stream_of_anything_else_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(CorruptEntryError, match=why):
        EntryStream(io.BytesIO(raw), len(raw), KEY, "node")


def test_a_streamed_header_that_claims_a_gigabyte_is_not_waited_for() -> None:
    raw = entry_bytes(DENSITY)
    raw = raw[:12] + (2**30).to_bytes(4, "little") + raw[16:]
    stream = io.BytesIO(raw)
    assert peak_bytes(lambda: refused(EntryStream, stream, len(raw), KEY, "node")) < 2**20
