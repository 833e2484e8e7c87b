"""Checksums that Zarr codecs put into stored chunks and shard indexes (``crc32c``, Zarr v3).

zarr checks them too, but cannot report to the byte tier that a stored block is bad.
"""

from __future__ import annotations

import bisect
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from zarrcache.disk import crc32c

__all__ = ["ChunkChecksums"]

_CRC_BYTES = 4
_NOT_WRITTEN = 2**64 - 1
#: Shards whose index is remembered: 16 bytes per chunk, twice.
_MAX_SHARDS = 64


class ChunkChecksums:
    """Checks the bytes that are read of the chunks of one array. Safe from any thread.

    Parameters
    ----------
    document : mapping
        Content of ``zarr.json``.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        codecs = document["codecs"]
        self._is_whole = _ends_with_crc(codecs)
        self._index_bytes = 0
        self._has_inner = False
        self._indexes: dict[str, tuple[list[int], list[int]]] = {}
        if codecs and codecs[-1]["name"] == "sharding_indexed":
            shard = document["chunk_grid"]["configuration"]["chunk_shape"]
            settings = codecs[-1]["configuration"]
            chunks = math.prod(
                outer // inner for outer, inner in zip(shard, settings["chunk_shape"], strict=True)
            )
            index_codecs = settings["index_codecs"]
            if [codec["name"] for codec in index_codecs] == ["bytes", "crc32c"]:
                self._index_bytes = 16 * chunks + _CRC_BYTES
                big = (index_codecs[0].get("configuration") or {}).get("endian") == "big"
                self._index_format = f"{'>' if big else '<'}{2 * chunks}Q"
                self._is_at_start = settings.get("index_location") == "start"
                self._has_inner = _ends_with_crc(settings["codecs"])

    @classmethod
    def of(cls, raw: bytes) -> ChunkChecksums | None:
        """The checks for a ``zarr.json``; None if it has no checksum or is not understood."""
        try:
            checks = cls(json.loads(raw))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            return None  # zarr reports it
        return checks if checks._is_whole or checks._index_bytes else None

    def is_intact(self, key: str, data: bytes, start: int, size_bytes: int) -> bool:
        """False if ``data`` contradicts a checksum in it.

        Parameters
        ----------
        key : str
            Of the chunk or shard.
        data : bytes
            Bytes of the object from ``start``.
        size_bytes : int
            Size of the object.
        """
        if self._is_whole:
            return len(data) != size_bytes or _is_right(data)
        if not self._index_bytes or size_bytes < self._index_bytes:
            return True
        at = (0 if self._is_at_start else size_bytes - self._index_bytes) - start
        if at >= 0 and at + self._index_bytes <= len(data):
            index = data[at : at + self._index_bytes]
            if not _is_right(index):
                return False
            if self._has_inner:
                self._remember(key, struct.unpack(self._index_format, index[:-_CRC_BYTES]))
        offsets, lengths = self._indexes.get(key, ((), ()))
        for i in range(bisect.bisect_left(offsets, start), len(offsets)):
            first = offsets[i] - start
            if first >= len(data):
                break
            chunk = data[first : first + lengths[i]]
            if len(chunk) == lengths[i] and not _is_right(chunk):
                return False
        return True

    def _remember(self, key: str, numbers: Sequence[int]) -> None:
        pairs = sorted(
            pair
            for pair in zip(numbers[::2], numbers[1::2], strict=True)
            if _NOT_WRITTEN not in pair
        )
        if len(self._indexes) >= _MAX_SHARDS:
            self._indexes.clear()
        self._indexes[key] = ([at for at, _ in pairs], [n for _, n in pairs])


def _ends_with_crc(codecs: Sequence[Mapping[str, Any]]) -> bool:
    return bool(codecs) and codecs[-1]["name"] == "crc32c"


def _is_right(data: bytes) -> bool:
    """Whether bytes end with their own checksum, as the codec ``crc32c`` writes it."""
    body = memoryview(data)[:-_CRC_BYTES]
    return len(data) >= _CRC_BYTES and crc32c(body).to_bytes(4, "little") == data[-_CRC_BYTES:]
