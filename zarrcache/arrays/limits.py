"""Decompression limits: refuse a chunk that would decompress to more than its array needs.

A chunk of a few bytes may claim, or be, gigabytes. The size of a decoded chunk is known from the
metadata, but codecs do not use it: numcodecs allocates what a header claims and decompresses
streams to their end. blosc, zstd and lz4 declare the decompressed size in their headers, which
their libraries enforce; streams (gzip, zlib, bz2, lzma) are read up to one byte past the limit.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import Buffer

from zarrcache._limits import read_bounded

__all__ = ["CLAIMED_BYTES", "STREAMS", "check", "decode", "numcodec"]

#: zstd's largest block, and the excess allowed for a frame that does not declare its size.
_ZSTD_BLOCK, _ZSTD_SLACK = 128 * 1024, 32 * 1024**2


def numcodec(configuration: Mapping[str, Any]) -> Any:
    """Make a codec of numcodecs."""
    import numcodecs

    return numcodecs.get_codec(dict(configuration))


def decode(codec: Any, data: Buffer, nbytes: int) -> Any:
    """Call ``codec.decode(data)`` if the result has at most ``nbytes``.

    Raises
    ------
    ValueError
        It would have more. Damaged data raises what the codec raises.
    """
    read = STREAMS.get(codec.codec_id)
    if read is not None:
        return read(codec, data, nbytes)
    check(codec, data, nbytes)
    return codec.decode(data)


def check(codec: Any, data: Buffer, nbytes: int) -> None:
    """Raise as :func:`decode` would, without a result. Codecs without a known bound pass."""
    kind = codec.codec_id
    if kind in STREAMS:  # a stream declares no size: decompress up to the limit
        STREAMS[kind](codec, data, nbytes)
    elif (
        kind in CLAIMED_BYTES
        and (claimed := CLAIMED_BYTES[kind](memoryview(data).cast("B"), nbytes)) > nbytes
    ):
        raise ValueError(f"it would decompress to {claimed} bytes; its shape needs {nbytes}")


def _zlib(codec: Any, data: Buffer, nbytes: int) -> bytes:
    stream = zlib.decompressobj()
    out = stream.decompress(data, nbytes + 1)
    if len(out) > nbytes:
        raise ValueError(f"it decompresses to more than {nbytes} bytes")
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


#: Stream codecs by numcodecs id: decompress up to a limit.
STREAMS: dict[str, Callable[[Any, Buffer, int], bytes]] = {
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
    """Sum the declared sizes of all frames (RFC 8878, section 3.1).

    A frame that declares none counts with its whole blocks, if they are far beyond the limit.
    """
    declared, undeclared, at = 0, 0, 0
    while at + 6 <= len(view):
        magic = int.from_bytes(view[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
            at += 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            break  # not a frame; zstd refuses it
        descriptor = view[at + 4]
        is_single = descriptor >> 5 & 1
        size = (is_single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
        if size:
            declared += int.from_bytes(view[at : at + size], "little") + (256 if size == 2 else 0)
        at += size
        while at + 3 <= len(view):
            block = int.from_bytes(view[at : at + 3], "little")
            at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            undeclared += 0 if size else _ZSTD_BLOCK
            if block & 1:
                break
        at += 4 * (descriptor >> 2 & 1)
    return declared + (undeclared if undeclared > 2 * nbytes + _ZSTD_SLACK else 0)


#: Codecs whose header declares the decompressed size, by numcodecs id: read that size.
CLAIMED_BYTES: dict[str, Callable[[memoryview, int], int]] = {
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
}
