"""The format of an entry of the array tier: one header page, then the raw array.

::

    offset 0     8 bytes   magic b"zarrcach"
           8     u32       FORMAT_VERSION
           12    u32       length of the JSON that follows
           16    u32       CRC-32C of the JSON
           20    JSON      identity (origin, url, array), source, dtype, shape, nbytes, crc32c of the payload
           n*4096          payload: C order, little endian, page-aligned so that it can be mapped

All integers are little endian. The header repeats the entry's full identity, so that a file under the wrong name is a miss, and the
index can be rebuilt from the files alone. ``tests/golden/entry_v1.bin`` freezes the bytes: another format is another FORMAT_VERSION.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from io import FileIO
from typing import Any

import google_crc32c
import numpy as np

from zarrcache.atomic import write_all
from zarrcache.errors import CorruptEntryError
from zarrcache.keys import FORMAT_VERSION, ArrayKey

__all__ = ["Entry", "EntryHeader", "checksum", "encode_header", "header_of", "map_entry", "read_header", "write_entry"]

_MAGIC = b"zarrcach"
_PREFIX = struct.Struct("<8sIII")
_PAGE = 4096
#: A header is identity and numbers; one that claims more is not ours.
_MAX_JSON_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """What a file of the array tier says of itself.

    Attributes
    ----------
    key : ArrayKey
    source : str
        :func:`zarrcache.keys.source_digest` of the objects it was decoded from.
    dtype : str
        numpy's, little endian, for example ``<f4``.
    shape : tuple of int
    nbytes : int
        Length of the payload.
    crc32c : int
        CRC-32C of the payload.
    """

    key: ArrayKey
    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32c: int

    @property
    def offset(self) -> int:
        """Where the payload starts, bytes."""
        return len(encode_header(self))

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A mapped entry. ``array`` is writable and private: what a reader writes never reaches the file."""

    header: EntryHeader
    array: np.ndarray[Any, np.dtype[Any]]

    def is_intact(self) -> bool:
        """Does the payload match its checksum? Reads all of it."""
        return checksum(self.array) == self.header.crc32c


def checksum(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """CRC-32C of a C-contiguous array's bytes. 0.45 ms for 8 MB."""
    return int(google_crc32c.value(array.reshape(-1).view(np.uint8))) if array.nbytes else 0


def header_of(key: ArrayKey, array: np.ndarray[Any, np.dtype[Any]], source: str) -> EntryHeader:
    """The header under which ``array`` (C-contiguous, little endian) is stored."""
    return EntryHeader(key, source, array.dtype.str, array.shape, array.nbytes, checksum(array))


def encode_header(header: EntryHeader) -> bytes:
    """The header's bytes, padded to whole pages."""
    text = json.dumps(
        {
            "array": header.key.array,
            "crc32c": header.crc32c,
            "dtype": header.dtype,
            "nbytes": header.nbytes,
            "origin": header.key.origin,
            "shape": list(header.shape),
            "source": header.source,
            "url": header.key.url,
        },
        separators=(",", ":"),
    ).encode()
    raw = _PREFIX.pack(_MAGIC, FORMAT_VERSION, len(text), google_crc32c.value(text)) + text
    return raw.ljust(-(-len(raw) // _PAGE) * _PAGE, b"\0")


def write_entry(file: FileIO, header: EntryHeader, array: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Write header and payload to an unbuffered file."""
    write_all(file, memoryview(encode_header(header)))
    if array.nbytes:
        write_all(file, array.reshape(-1).view(np.uint8).data)


def read_header(path: str | os.PathLike[str]) -> EntryHeader:
    """The header of a file, checked against its own checksum and the file's length.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or not whole.
    OSError
        The file is gone or cannot be read.
    """
    fd, size = _open(path)
    try:
        return _parse(os.pread(fd, _PREFIX.size + _MAX_JSON_BYTES, 0), size, path)
    finally:
        os.close(fd)


def map_entry(path: str | os.PathLike[str]) -> Entry:
    """Map an entry copy-on-write: no copy, no open file left behind, safe while the file is unlinked.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or not whole. The payload itself is not read: see :meth:`Entry.is_intact`.
    OSError
        The file is gone or cannot be read.
    """
    fd, size = _open(path)
    try:
        header = _parse(os.pread(fd, _PAGE, 0), size, path, fd)
        mapping = _Mapping(fd, size, header)
    finally:
        os.close(fd)
    return Entry(header, np.asarray(mapping))


def _open(path: str | os.PathLike[str]) -> tuple[int, int]:
    # O_NOFOLLOW: a symbolic link in place of an entry was planted. O_NONBLOCK: a planted FIFO must not hang us.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise CorruptEntryError(f"{os.fspath(path)} is not a regular file.")
    return fd, found.st_size


def _parse(raw: bytes, file_bytes: int, path: str | os.PathLike[str], fd: int | None = None) -> EntryHeader:
    def corrupt(why: str) -> CorruptEntryError:
        return CorruptEntryError(f"{os.fspath(path)} is not a whole entry: {why}.")

    if len(raw) < _PREFIX.size:
        raise corrupt(f"{len(raw)} bytes long")
    magic, version, length, crc = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise corrupt("wrong magic number")
    if version != FORMAT_VERSION:
        raise corrupt(f"format version {version}, this is version {FORMAT_VERSION}")
    if length > _MAX_JSON_BYTES:
        raise corrupt(f"header of {length} bytes")
    end = _PREFIX.size + length
    if end > len(raw) and fd is not None:
        raw = os.pread(fd, end, 0)
    text = raw[_PREFIX.size : end]
    if len(text) != length or google_crc32c.value(text) != crc:
        raise corrupt("header checksum does not match")
    # The checksum holds, so this is what encode_header wrote; a planted file with a right checksum may still say anything.
    try:
        fields = json.loads(text)
        shape = tuple(int(n) for n in fields["shape"])
        dtype = np.dtype(fields["dtype"])
        header = EntryHeader(
            ArrayKey(fields["origin"], fields["url"], fields["array"]),
            fields["source"],
            dtype.str,
            shape,
            int(fields["nbytes"]),
            int(fields["crc32c"]),
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise corrupt(f"header cannot be read ({exc})") from exc
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != header.nbytes:
        raise corrupt("shape, dtype and length disagree")
    offset = -(-end // _PAGE) * _PAGE
    if offset + header.nbytes != file_bytes:
        raise corrupt(f"{file_bytes} bytes long, {offset + header.nbytes} expected")
    return header


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """A private, writable map of one file, as numpy's array interface; unmapped when the last array over it is gone.

    Python's ``mmap`` keeps a duplicate of the file descriptor as long as the map lives (until 3.13's ``trackfd=False``): a user who
    keeps a list of a few thousand densities, as the original reader does, would run out of descriptors.
    """

    __slots__ = ("__array_interface__", "_address", "_length")

    def __init__(self, fd: int, length: int, header: EntryHeader) -> None:
        address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map an entry: {os.strerror(code)}")
        self._address, self._length = address, length
        self.__array_interface__ = {
            "version": 3,
            "typestr": header.dtype,
            "shape": header.shape,
            "data": (address + length - header.nbytes, False),
        }

    def __del__(self) -> None:
        address = getattr(self, "_address", None)
        if address is not None:
            _libc.munmap(address, self._length)
