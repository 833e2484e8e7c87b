"""The format of an entry of the array tier: one header page, then the raw array.

::

    offset 0     8 bytes   magic b"zarrcach"
           8     u32       FORMAT_VERSION
           12    u32       length of the JSON that follows
           16    u32       CRC-32C of the JSON
           20    JSON      identity (origin, url, array), source, dtype, shape, nbytes,
                           crc32c of the payload
           n*4096          payload: C order, little endian, page-aligned so that it can be mapped

All integers are little endian. The header repeats the entry's full identity, so that a file under
the wrong name is a miss, and the index can be rebuilt from the files alone.
``tests/golden/entry_v1.bin`` freezes the bytes: another format is another FORMAT_VERSION.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np

from zarrcache._keys import FORMAT_VERSION, ArrayKey
from zarrcache.disk._publish import write_all
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.mmap import map_file, open_regular, read_in
from zarrcache.errors import CorruptEntryError

__all__ = [
    "START_BYTES",
    "Entry",
    "EntryHeader",
    "checksum",
    "encode_header",
    "header_of",
    "map_entry",
    "parse_header",
    "prefix_bytes",
    "read_header",
    "write_entry",
]

_MAGIC = b"zarrcach"
_PREFIX = struct.Struct("<8sIII")
#: What tells how long the header is.
START_BYTES = _PREFIX.size
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
        :func:`zarrcache._keys.source_digest` of the objects it was decoded from.
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
    """A mapped entry. ``array`` is writable and private: what a reader writes never reaches the
    file.
    """

    header: EntryHeader
    array: np.ndarray[Any, np.dtype[Any]]

    def is_intact(self) -> bool:
        """Does the payload match its checksum? Reads all of it.

        Raises
        ------
        OSError
            The disk cannot read it.
        """
        read_in(self.array)
        return checksum(self.array) == self.header.crc32c


def checksum(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """CRC-32C of a C-contiguous array's bytes."""
    return crc32c(array.reshape(-1).view(np.uint8).data) if array.nbytes else 0


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
    raw = _PREFIX.pack(_MAGIC, FORMAT_VERSION, len(text), crc32c(text)) + text
    return raw.ljust(-(-len(raw) // _PAGE) * _PAGE, b"\0")


def write_entry(file: FileIO, header: EntryHeader, array: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Write header and payload to an unbuffered file."""
    # In one call: the kernel then keeps 5 MB in pages of up to 2 MiB, and whoever maps the file
    # faults 5 times, after two calls 10 times, after small ones 77 times (Linux 6.18, ext4).
    head, payload = (
        memoryview(encode_header(header)),
        memoryview(array.reshape(-1).view(np.uint8).data if array.nbytes else b""),
    )
    written = os.writev(file.fileno(), [head, payload])
    write_all(file, head[written:])
    write_all(file, payload[max(0, written - head.nbytes) :])


def read_header(path: str | os.PathLike[str]) -> EntryHeader:
    """The header of a file, checked against its own checksum and the file's length.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or not whole.
    OSError
        The file is gone or cannot be read.
    """
    fd, found = open_regular(path)
    try:
        return parse_header(os.pread(fd, _PREFIX.size + _MAX_JSON_BYTES, 0), found.st_size, path)
    finally:
        os.close(fd)


def map_entry(path: str | os.PathLike[str]) -> Entry:
    """Map an entry copy-on-write: no copy, no open file left behind, safe while the file is
    unlinked.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or not whole. The payload itself is not read: see
        :meth:`Entry.is_intact`.
    OSError
        The file is gone or cannot be read.
    """
    fd, found = open_regular(path)
    try:
        header = parse_header(os.pread(fd, _PAGE, 0), found.st_size, path, fd)
        return Entry(
            header,
            map_file(fd, found, path, found.st_size - header.nbytes, header.dtype, header.shape),
        )
    finally:
        os.close(fd)


def prefix_bytes(start: bytes, where: str) -> int:
    """Bytes that the header of an entry takes, told by its first :data:`START_BYTES`. ``where`` is
    for messages.

    Raises
    ------
    CorruptEntryError
        It is not an entry, or claims a header that none has.
    """
    magic: bytes
    length: int
    magic, _, length, _ = _PREFIX.unpack(start)
    if magic != _MAGIC or length > _MAX_JSON_BYTES:
        raise CorruptEntryError(f"{where} does not begin as an entry does.")
    return -(-(_PREFIX.size + length) // _PAGE) * _PAGE


def parse_header(
    raw: bytes, file_bytes: int, path: str | os.PathLike[str], fd: int | None = None
) -> EntryHeader:
    """The header in the first bytes of an entry.

    Parameters
    ----------
    raw : bytes
        The header's pages at least; with ``fd`` the first of them will do.
    file_bytes : int
        Length of the whole entry.
    path : path
        Where it is, for messages.
    fd : int, optional
        The file, to read further pages.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or not whole.
    """

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
    offset = -(-end // _PAGE) * _PAGE
    if offset > len(raw) and fd is not None:
        raw = os.pread(fd, offset, 0)
    text = raw[_PREFIX.size : end]
    if len(text) != length or crc32c(text) != crc:
        raise corrupt("header checksum does not match")
    # The checksum holds, so this is what encode_header wrote; a planted file with a right checksum
    # may still say anything.
    try:
        fields = json.loads(text.decode())
        if not all(
            isinstance(fields[name], str) for name in ("origin", "url", "array", "source", "dtype")
        ):
            raise TypeError("a name that is no text")
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
    except (ValueError, KeyError, TypeError, SyntaxError, OverflowError, RecursionError) as exc:
        raise corrupt(f"header cannot be read ({exc})") from exc
    if (
        dtype.hasobject
        or min(shape, default=0) < 0
        or math.prod(shape) * dtype.itemsize != header.nbytes
    ):
        raise corrupt("shape, dtype and length disagree")
    if offset + header.nbytes != file_bytes:
        raise corrupt(f"{file_bytes} bytes long, {offset + header.nbytes} expected")
    if raw[end:offset] != bytes(offset - end):  # no value is wrong yet, but the disk is
        raise corrupt("something was written behind its header")
    return header
