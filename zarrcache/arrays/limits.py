"""How far compressed data unpacks, found out before it does: a chunk of a few bytes may claim, or
be, gigabytes.

The bytes that a chunk has to give are known from the metadata.  Codecs are no help: numcodecs
allocates what a header claims, and unpacks streams to their end.  blosc, zstd and lz4 say in their
headers how far they go, and are held to it by their libraries; streams (gzip, zlib, bz2, lzma) are
read no further than one byte past what is due.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import Buffer

from zarrcache._limits import read_bounded

__all__ = ["V3_CODECS", "check", "check_chunk", "decode", "numcodec"]

#: zstd's largest block, and what a frame that does not tell its size may unpack to beyond what is
#: due.
_ZSTD_BLOCK, _ZSTD_SLACK = 128 * 1024, 32 * 1024**2
#: zarr v3's names of codecs that numcodecs has under another one.
V3_CODECS = {"zstd": "zstd", "gzip": "gzip", "blosc": "blosc", "numcodecs.zlib": "zlib"}
_SHARDS = "sharding_indexed"
_NOT_WRITTEN = 2**64 - 1


def numcodec(configuration: Mapping[str, Any]) -> Any:
    """A codec of numcodecs."""
    import numcodecs

    return numcodecs.get_codec(dict(configuration))


def decode(codec: Any, data: Buffer, nbytes: int) -> Any:
    """``codec.decode(data)``, if that takes no more than ``nbytes``.

    Raises
    ------
    ValueError
        It would take more. Otherwise what the codec raises over damaged data.
    """
    read = _STREAMS.get(codec.codec_id)
    if read is not None:
        return read(codec, data, nbytes)
    check(codec, data, nbytes)
    return codec.decode(data)


def check(codec: Any, data: Buffer, nbytes: int) -> None:
    """As :func:`decode`, without the result. Of codecs that are none of the usual nothing is known,
    and they pass.
    """
    kind = codec.codec_id
    if kind in _STREAMS:  # there is no other way to know
        _STREAMS[kind](codec, data, nbytes)
    elif (
        kind in _CLAIMS and (claimed := _CLAIMS[kind](memoryview(data).cast("B"), nbytes)) > nbytes
    ):
        raise ValueError(f"it would unpack to {claimed} bytes where {nbytes} are due")


def check_chunk(
    codecs: Sequence[Mapping[str, Any]], data: Buffer, shape: Sequence[int], itemsize: int
) -> None:
    """Raise ValueError if a chunk of zarr v3, or a part of a shard, would unpack to more than its
    shape and a little.

    Parameters
    ----------
    codecs : sequence of mapping
        As in ``zarr.json``; the last is the first to be decoded.
    data : buffer
    shape : sequence of int
    itemsize : int
    """
    due = math.prod(shape) * itemsize
    rest = [dict(codec) for codec in codecs]
    while rest:
        codec = rest.pop()
        name = str(codec.get("name"))
        if name == _SHARDS:
            settings = codec["configuration"]
            inner = settings["chunk_shape"]
            for part in _parts_of(
                data, settings, math.prod(-(-n // c) for n, c in zip(shape, inner, strict=True))
            ):
                check_chunk(settings["codecs"], part, inner, itemsize)
            return
        if name == "crc32c":
            data = memoryview(data).cast("B")[:-4]
        elif name in V3_CODECS:
            packed = numcodec({"id": V3_CODECS[name]})
            if not any(str(inner.get("name")) in V3_CODECS for inner in rest):
                check(packed, data, due)
                return
            data = decode(packed, data, due + due // 8 + 1024)  # it is to be unpacked once more
        else:
            return


def _parts_of(data: Buffer, settings: Mapping[str, Any], count: int) -> list[memoryview]:
    """The chunks in a shard, by its index: (offset, length) of each as 64-bit numbers, and a
    checksum.
    """
    if not {str(codec.get("name")) for codec in settings["index_codecs"]} <= {"bytes", "crc32c"}:
        raise ValueError("the index of its shards has codecs that zarr does not write")
    view, checksum = (
        memoryview(data).cast("B"),
        4 * any(codec.get("name") == "crc32c" for codec in settings["index_codecs"]),
    )
    big = any(
        (codec.get("configuration") or {}).get("endian") == "big"
        for codec in settings["index_codecs"]
    )
    length = 16 * count
    if len(view) < length + checksum:
        raise ValueError(f"a shard of {len(view)} bytes cannot hold an index of {length}")
    start = 0 if settings.get("index_location") == "start" else len(view) - length - checksum
    numbers = struct.unpack(f"{'>' if big else '<'}{2 * count}Q", view[start : start + length])
    return [
        view[at : at + size]
        for at, size in zip(numbers[::2], numbers[1::2], strict=True)
        if (at, size) != (_NOT_WRITTEN, _NOT_WRITTEN)
    ]


def _zlib(codec: Any, data: Buffer, nbytes: int) -> bytes:
    stream = zlib.decompressobj()
    out = stream.decompress(data, nbytes + 1)
    if len(out) > nbytes:
        raise ValueError(f"it unpacks to more than {nbytes} bytes")
    if not stream.eof:
        raise zlib.error("incomplete or truncated stream")
    return out


def _lzma(codec: Any, data: Buffer, nbytes: int) -> bytes:
    with lzma.LZMAFile(io.BytesIO(data), format=codec.format, filters=codec.filters) as file:
        return read_bounded(file, nbytes)


def _gzip(codec: Any, data: Buffer, nbytes: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return read_bounded(file, nbytes)


def _bz2(codec: Any, data: Buffer, nbytes: int) -> bytes:
    with bz2.BZ2File(io.BytesIO(data)) as file:
        return read_bounded(file, nbytes)


_STREAMS: dict[str, Callable[[Any, Buffer, int], bytes]] = {
    "zlib": _zlib,
    "gzip": _gzip,
    "bz2": _bz2,
    "lzma": _lzma,
}


def _blosc(view: memoryview, nbytes: int) -> int:
    return int.from_bytes(view[4:8], "little")


def _lz4(view: memoryview, nbytes: int) -> int:
    return int.from_bytes(view[:4], "little")


def _zstd(view: memoryview, nbytes: int) -> int:
    """Of all frames: what they say, or their whole blocks if they do not and it is much more than
    is due (RFC 8878, section 3.1).
    """
    told, untold, at = 0, 0, 0
    while at + 6 <= len(view):
        magic = int.from_bytes(view[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # to be skipped
            at += 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            break  # zstd refuses it
        descriptor = view[at + 4]
        is_single = descriptor >> 5 & 1
        size = (is_single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
        if size:
            told += int.from_bytes(view[at : at + size], "little") + (256 if size == 2 else 0)
        at += size
        while at + 3 <= len(view):
            block = int.from_bytes(view[at : at + 3], "little")
            at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            untold += 0 if size else _ZSTD_BLOCK
            if block & 1:
                break
        at += 4 * (descriptor >> 2 & 1)
    return told + (untold if untold > 2 * nbytes + _ZSTD_SLACK else 0)


_CLAIMS: dict[str, Callable[[memoryview, int], int]] = {"blosc": _blosc, "lz4": _lz4, "zstd": _zstd}
