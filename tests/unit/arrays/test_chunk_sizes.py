"""A chunk is what its shape says, byte for byte: less, more and unknown sizes are refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numcodecs
import numpy as np
import pytest
from numpy.typing import NDArray

from zarrcache.arrays.codecs import Chunk, UnknownCodecError, _zstd, _zstd_frames

VALUES = np.arange(1, 513, dtype="<f4").reshape(8, 8, 8)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "lzma": lzma.compress,
    "lz4": lambda raw: bytes(numcodecs.LZ4().encode(raw)),
    "zstd": lambda raw: bytes(numcodecs.Zstd().encode(raw)),
    "blosc": lambda raw: bytes(numcodecs.Blosc().encode(raw)),
}


def chunk_of(*codecs: dict[str, Any], order: str = "C") -> Chunk:
    """The chunk of a v2 array of 8 x 8 x 8 float32."""
    *filters, compressor = codecs or (None,)
    return Chunk.v2(
        {
            "dtype": "<f4",
            "order": order,
            "chunks": [8, 8, 8],
            "filters": filters,
            "compressor": compressor,
        }
    )


def decoded(chunk: Chunk, data: bytes) -> NDArray[Any]:
    target = np.full((8, 8, 8), -1, "<f4")
    chunk.write(data, target, 0)
    return target


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", PACK)
def test_a_chunk_of_its_size_is_read(kind: str, order: Any) -> None:
    chunk = chunk_of({"id": kind}, order=order)
    assert np.array_equal(decoded(chunk, PACK[kind](VALUES.tobytes(order))), VALUES)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("nbytes", [0, 4, 1024, 2044, 2047, 2049, 2052, 4096])
@pytest.mark.parametrize("kind", PACK)
def test_a_chunk_that_unpacks_to_another_size_is_refused(
    kind: str, nbytes: int, order: str
) -> None:
    """The rest of a short one would be memory that was never written."""
    data = PACK[kind]((VALUES.tobytes() * 2)[:nbytes])
    with pytest.raises(Exception, match=r"."):
        decoded(chunk_of({"id": kind}, order=order), data)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("nbytes", [0, 4, 2044, 2049, 2052, 4096])
@pytest.mark.parametrize("codec", [None, "crc32c", "adler32", "shuffle"])
def test_a_chunk_without_a_compressor_of_another_size_is_refused(
    codec: str | None, nbytes: int, order: str
) -> None:
    chunk = chunk_of(*([] if codec is None else [{"id": codec}]), order=order)
    data = (VALUES.tobytes() * 2)[:nbytes]
    if codec not in (None, "shuffle"):
        data = bytes(numcodecs.get_codec({"id": codec}).encode(np.frombuffer(data, np.uint8)))
    with pytest.raises(ValueError, match=r"."):
        decoded(chunk, data)


@pytest.mark.parametrize("n", [0, -1, True, 1.0, "8", None, 2**63])
def test_a_chunk_shape_that_is_none_is_refused(n: Any) -> None:
    with pytest.raises(ValueError, match="its chunks have the shape"):
        Chunk.v2({"dtype": "<f4", "order": "C", "chunks": [1, n]})


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ([2, 4], "do not fill a shard"),
        ([2, 4, 4, 1], "do not fill a shard"),
        ([3, 4, 4], "do not fill a shard"),
        ([0, 4, 4], "do not fill a shard"),
        ([-2, 4, 4], "do not fill a shard"),
        ([2.0, 4, 4], "do not fill a shard"),
        ([16, 4, 4], "do not fill a shard"),
    ],
)
def test_a_shard_that_its_chunks_do_not_fill_is_refused(inner: Any, words: str) -> None:
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": inner, "codecs": [raw], "index_codecs": [raw]},
    }
    with pytest.raises(ValueError, match=words):
        Chunk.v3([8, 8, 8], np.dtype("<f4"), [shard])


@pytest.mark.parametrize(
    "codecs",
    [
        [{"id": "delta", "dtype": "<f4"}],
        [{"id": "packbits"}],
        [{"id": "base64"}],
        [{"id": "zstd"}, {"id": "zstd"}],
        [{"id": "zlib"}, {"id": "crc32c"}, {"id": "zstd"}],
    ],
)
def test_a_chain_whose_sizes_are_not_known_is_left_to_zarr(codecs: list[dict[str, Any]]) -> None:
    with pytest.raises(UnknownCodecError, match=codecs[-1]["id"]):
        chunk_of(*codecs)


def test_a_compressed_shard_is_left_to_zarr() -> None:
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [4, 4, 4], "codecs": [raw], "index_codecs": [raw]},
    }
    with pytest.raises(UnknownCodecError, match="zstd"):
        Chunk.v3([8, 8, 8], np.dtype("<f4"), [shard, {"name": "zstd"}])


# -- zstd

RAW, RLE = 0, 1


def block(content: bytes, kind: int, size: int, *, is_last: bool) -> bytes:
    return (size << 3 | kind << 1 | is_last).to_bytes(3, "little") + content


def frame(*blocks: bytes, descriptor: int = 0, header: bytes = b"\x58", tail: bytes = b"") -> bytes:
    """A frame; by default with a window of 2 MiB and without the size of its content."""
    return b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + header + b"".join(blocks) + tail


def raw(content: bytes, *, is_last: bool = True) -> bytes:
    return block(content, RAW, len(content), is_last=is_last)


def rle(size: int, *, is_last: bool = True) -> bytes:
    return block(b"x", RLE, size, is_last=is_last)


def packed(size: int, *, is_last: bool = True) -> bytes:
    """A compressed block of ``size`` bytes, which no decoder would accept."""
    return block(b"?" * size, 2, size, is_last=is_last)


def skippable(content: bytes, magic: int = 0x184D2A50) -> bytes:
    return struct.pack("<II", magic, len(content)) + content


#: Descriptor and header for a content of 512 bytes: all widths of the size, with and without a
#: window, a dictionary and a checksum (RFC 8878, section 3.1.1.1).
SIZED = {
    "two bytes": (0x40, b"\x58" + (512 - 256).to_bytes(2, "little")),
    "four bytes": (0x80, b"\x58" + (512).to_bytes(4, "little")),
    "eight bytes": (0xC0, b"\x58" + (512).to_bytes(8, "little")),
    "two bytes, one segment": (0x60, (512 - 256).to_bytes(2, "little")),
    "eight bytes, one segment": (0xE0, (512).to_bytes(8, "little")),
    "dictionary of one byte": (0x81, b"\x58\x07" + (512).to_bytes(4, "little")),
    "dictionary of two bytes": (0x82, b"\x58\x07\x07" + (512).to_bytes(4, "little")),
    "dictionary of four bytes": (0xA3, b"\x07\x07\x07\x07" + (512).to_bytes(4, "little")),
}
FRAMES: dict[str, tuple[bytes, list[int | None]]] = {
    "no size": (frame(raw(b"a" * 9)), [None]),
    "blocks": (frame(raw(b"a" * 9, is_last=False), rle(7)), [None]),
    "compressed": (frame(packed(5, is_last=False), raw(b"ab")), [None]),
    "one byte, one segment": (frame(raw(b"a" * 9), descriptor=0x20, header=b"\x09"), [9]),
    "checksum": (
        frame(rle(5), descriptor=0x04, tail=b"1234") + frame(rle(6)),
        [None, None],
    ),
    "two": (
        frame(rle(5)) + frame(raw(b"abc"), descriptor=0x20, header=b"\x03"),
        [None, 3],
    ),
    "nothing": (b"", []),
    "cut off after a block": (frame(rle(5, is_last=False)), [None]),
    **{
        f"skippable {magic:x}": (
            skippable(b"x" * 11, magic) + frame(rle(5)) + skippable(b"", magic) + frame(rle(6)),
            [None, None],
        )
        for magic in (0x184D2A50, 0x184D2A57, 0x184D2A5F)
    },
    **{
        name: (frame(rle(512), descriptor=descriptor, header=header) * 2, [512] * 2)
        for name, (descriptor, header) in SIZED.items()
    },
}


@pytest.mark.parametrize(("data", "frames"), FRAMES.values(), ids=FRAMES)
def test_frames_of_zstd_are_measured(data: bytes, frames: list[int | None]) -> None:
    """The claim is unknown where one declares nothing."""
    view = memoryview(data)
    assert list(_zstd_frames(view)) == frames
    assert _zstd(view) == (None if None in frames else sum(frames))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        b"no frame at all",
        frame(rle(5))[:5],
        b"\x28\xb5\x2f",
        frame(rle(5)) + b"\0",
        b"\x27\xb5\x2f\xfd" + frame(rle(5))[4:],  # format 0.7
        skippable(b"x", 0x184D2A60),
        skippable(b"x", 0x184D2A4F),
    ],
)
def test_what_is_no_frame_of_zstd_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="it is not a zstd frame"):
        list(_zstd_frames(memoryview(data)))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_chunk_of_zstd_without_a_size_is_read_if_it_fills_the_chunk(order: Any) -> None:
    """As streaming writers leave it; in several blocks, and behind a skippable frame."""
    content = VALUES.tobytes(order)
    chunk = chunk_of({"id": "zstd"}, order=order)
    one = frame(raw(content[:100], is_last=False), raw(content[100:]))
    for data in (one, skippable(b"x" * 5) + one):
        assert np.array_equal(decoded(chunk, data), VALUES)
    for wrong in (content[:-4], content[:100], content + b"1234"):
        with pytest.raises((ValueError, RuntimeError)):
            decoded(chunk, frame(raw(wrong)))
