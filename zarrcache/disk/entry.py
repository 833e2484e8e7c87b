"""Entries of the array tier: the file format, reading, writing, and receiving a stream.

An entry is one header page and the raw array::

    offset 0     8 bytes   magic b"zarrcach"
           8     u32       FORMAT_VERSION
           12    u32       length of the JSON that follows
           16    u32       CRC-32C of the JSON
           20    JSON      identity (origin, url, array), source, dtype, shape, nbytes,
                           crc32c of the payload; missing_chunks and nonfinite if they are not 0
           n*4096          payload: C order, little endian, page-aligned so that it can be mapped

All integers are little endian. The header repeats the full identity of the entry, so that a file
under the wrong name is a miss, and the index can be rebuilt from the files alone.
``tests/golden/entry_v1.bin`` freezes the bytes: another format needs another FORMAT_VERSION.

The stored listing of a store or directory is an entry too: JSON text as bytes, with an empty array
name. Its kind in the index is :data:`LISTING`.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import struct
from dataclasses import dataclass
from io import FileIO
from typing import Any, Protocol

import numpy as np

from zarrcache._keys import FORMAT_VERSION, ArrayKey, safe_repr
from zarrcache._units import most_bytes
from zarrcache.disk._publish import write_all
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.mmap import map_file, open_regular, read_in
from zarrcache.errors import CorruptEntryError

__all__ = [
    "ARRAY",
    "LISTING",
    "OBJECT",
    "SOUND",
    "Entry",
    "EntryHeader",
    "EntryStream",
    "Flaws",
    "array_note",
    "encode_header",
    "header_of",
    "kind_of",
    "map_entry",
    "parse_header",
    "read_header",
    "write_entry",
]

#: Kinds of entries in the index: a density or a stored listing (array tier); an object or a block
#: of one (byte tier).
ARRAY, LISTING, OBJECT = "array", "listing", "object"

_MAGIC = b"zarrcach"
_PREFIX = struct.Struct("<8sIII")
_PAGE = 4096
#: Longest header that is accepted; this package writes much shorter ones.
_MAX_JSON_BYTES = 64 * 1024
_STEP_BYTES = 2**20  # of a stream, held in memory at once
#: Fields of a header that are written only if they are not 0: entries without flaws keep the bytes
#: of the first version.
_FLAWS = ("missing_chunks", "nonfinite")


def kind_of(key: ArrayKey) -> str:
    """:data:`ARRAY` or :data:`LISTING`."""
    return ARRAY if key.array else LISTING


def array_note(key: ArrayKey) -> str:
    """The note in the index for an entry of the array tier. URLs have no newline."""
    return f"{key.origin}\n{key.url}\n{key.array}"


@dataclass(frozen=True, slots=True)
class Flaws:
    """What is wrong with a density at the origin, although it could be read.

    Attributes
    ----------
    missing_chunks : int
        Chunks of the grid that the origin does not have; they hold the fill value.
    nonfinite : int
        Values that are NaN or infinite.
    """

    missing_chunks: int = 0
    nonfinite: int = 0

    def __str__(self) -> str:
        """For example "2 chunks are absent and hold the fill value; 3 values are infinite"."""
        parts = []
        if self.missing_chunks:
            parts.append(f"{self.missing_chunks} of its chunks are absent (read as the fill value)")
        if self.nonfinite:
            parts.append(f"{self.nonfinite} of its values are NaN or infinite")
        return ", and ".join(parts)


#: Nothing is wrong. Readers compare with ``is``: one per hit.
SOUND = Flaws()


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """The header of an entry.

    Attributes
    ----------
    key : ArrayKey
    source : str
        :func:`zarrcache._keys.source_digest` of the objects it was decoded from.
    dtype : str
        NumPy's type string, little endian, for example ``<f4``.
    shape : tuple of int
    nbytes : int
        Length of the payload.
    crc32c : int
        CRC-32C of the payload.
    flaws : Flaws
        `SOUND` itself if there are none.
    """

    key: ArrayKey
    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32c: int
    flaws: Flaws = SOUND

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
    """A mapped entry. ``array`` is writable and private: writes never reach the file."""

    header: EntryHeader
    array: np.ndarray[Any, np.dtype[Any]]

    def is_intact(self) -> bool:
        """Whether the payload matches its checksum. Reads all of it.

        Raises
        ------
        OSError
            The disk cannot read it.
        """
        read_in(self.array)
        return _checksum(self.array) == self.header.crc32c


def _checksum(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """CRC-32C of the bytes of a C-contiguous array."""
    return crc32c(array.reshape(-1).view(np.uint8).data) if array.nbytes else 0


def header_of(
    key: ArrayKey, array: np.ndarray[Any, np.dtype[Any]], source: str, flaws: Flaws = SOUND
) -> EntryHeader:
    """The header under which ``array`` (C-contiguous, little endian) is stored."""
    crc = _checksum(array)
    return EntryHeader(key, source, array.dtype.str, array.shape, array.nbytes, crc, flaws)


def encode_header(header: EntryHeader) -> bytes:
    """The bytes of a header, padded to whole pages."""
    flaws = {name: n for name in _FLAWS if (n := getattr(header.flaws, name))}
    text = json.dumps(
        {
            "array": header.key.array,
            "crc32c": header.crc32c,
            "dtype": header.dtype,
            **flaws,
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
    # In one call: the kernel then keeps 5 MB in pages of up to 2 MiB, and a process that maps the
    # file faults 5 times; after two calls 10 times, after small ones 77 times (Linux 6.18, ext4).
    head, payload = (
        memoryview(encode_header(header)),
        memoryview(array.reshape(-1).view(np.uint8).data if array.nbytes else b""),
    )
    written = os.writev(file.fileno(), [head, payload])
    write_all(file, head[written:])
    write_all(file, payload[max(0, written - head.nbytes) :])


def read_header(path: str | os.PathLike[str]) -> EntryHeader:
    """The header of a file, checked against its own checksum and the length of the file.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or incomplete.
    OSError
        The file is gone or cannot be read.
    """
    fd, found = open_regular(path)
    try:
        return parse_header(os.pread(fd, _PREFIX.size + _MAX_JSON_BYTES, 0), found.st_size, path)
    finally:
        os.close(fd)


def map_entry(path: str | os.PathLike[str]) -> Entry:
    """Map an entry copy-on-write, without a copy or an open file. It survives an unlink.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or incomplete. The payload is not read:
        :meth:`Entry.is_intact` checks it.
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


def parse_header(
    raw: bytes, file_bytes: int, path: str | os.PathLike[str], fd: int | None = None
) -> EntryHeader:
    """Parse and check the header in the first bytes of an entry.

    Parameters
    ----------
    raw : bytes
        At least the pages of the header; with ``fd`` the first page is enough.
    file_bytes : int
        Length of the whole entry.
    path : path
        Of the entry, for messages.
    fd : int, optional
        The file, to read further pages.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, or incomplete.
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
    # The checksum holds, so encode_header wrote this; but a planted file can have a valid checksum
    # and any content.
    try:
        fields = json.loads(text.decode())
        if not all(
            isinstance(fields[name], str) for name in ("origin", "url", "array", "source", "dtype")
        ):
            raise TypeError("a name is not a string")
        shape = tuple(int(n) for n in fields["shape"])
        dtype = np.dtype(fields["dtype"])
        counts = [int(fields.get(name, 0)) for name in _FLAWS]
        if min(counts) < 0:
            raise ValueError("a negative count")
        header = EntryHeader(
            ArrayKey(fields["origin"], fields["url"], fields["array"]),
            fields["source"],
            dtype.str,
            shape,
            int(fields["nbytes"]),
            int(fields["crc32c"]),
            Flaws(*counts) if any(counts) else SOUND,
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
    if raw[end:offset] != bytes(offset - end):  # no value is affected, but the disk is faulty
        raise corrupt("the padding after the header is not zero")
    return header


class _Stream(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


class EntryStream:
    """An entry that is received from another node or directory; everything in it is checked.

    The constructor reads and checks the header; one call of :meth:`write` or :meth:`read` reads and
    checks the payload.

    Parameters
    ----------
    stream : object with ``readinto``
    file_bytes : int
        Length of the entry, as the sender declares it.
    key : ArrayKey
        The entry that was requested.
    where : str
        The sender, for messages.

    Attributes
    ----------
    is_spent : bool
        Part of the payload was read, so neither method can be called any more.

    Raises
    ------
    CorruptEntryError
        It is not an entry as this version writes it, has another key, is not a float32 density, has
        another length than its header says, or is larger than any array may be
        (:func:`zarrcache._units.most_bytes`).
    """

    def __init__(self, stream: _Stream, file_bytes: int, key: ArrayKey, where: str) -> None:
        self._stream, self._where = stream, where
        start = bytes(self._fill(bytearray(_PREFIX.size)))
        magic, _, length, _ = _PREFIX.unpack(start)
        if magic != _MAGIC or length > _MAX_JSON_BYTES:
            raise CorruptEntryError(f"{where} does not begin like an entry.")
        n_rest = -(-(_PREFIX.size + length) // _PAGE) * _PAGE - _PREFIX.size
        raw = start + bytes(self._fill(bytearray(n_rest)))
        self.header: EntryHeader = parse_header(raw, file_bytes, where)
        if self.header.key != key:
            raise CorruptEntryError(f"{where} holds {safe_repr(self.header.key)}.")
        # Once stored, every reader maps it, and readers accept nothing else.
        if self.header.dtype != "<f4" or len(self.header.shape) != 3 or not self.header.nbytes:
            raise CorruptEntryError(
                f"{where} holds {self.header.dtype} of shape {self.header.shape}, which is not a "
                "density."
            )
        if raw != encode_header(self.header) or self.header.nbytes > most_bytes():
            raise CorruptEntryError(f"{where} has a header that zarrcache does not write.")
        self.is_spent = False

    def write(self, file: FileIO) -> None:
        """Write the whole entry to an unbuffered file, in steps of 1 MiB.

        Raises
        ------
        CorruptEntryError
            The stream ended early, or its checksum does not match.
        OSError
            The file cannot be written.
        """
        write_all(file, memoryview(encode_header(self.header)))
        self.is_spent = True
        buffer, left, crc = (
            memoryview(bytearray(min(_STEP_BYTES, self.header.nbytes))),
            self.header.nbytes,
            0,
        )
        while left:
            part = self._fill(buffer[: min(left, len(buffer))])
            crc = crc32c(part, crc)
            write_all(file, memoryview(part))
            left -= len(part)
        self._compare(crc)

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Read the array into memory. Raises CorruptEntryError like :meth:`write`."""
        array = np.empty(self.header.shape, self.header.dtype)
        self.is_spent = True
        self._compare(crc32c(self._fill(array.reshape(-1).view(np.uint8).data)))
        return array

    def _compare(self, crc: int) -> None:
        if crc != self.header.crc32c:
            raise CorruptEntryError(f"{self._where}: its checksum does not match.")

    def _fill(self, buffer: Any) -> Any:
        """Fill a buffer from the stream."""
        view = memoryview(buffer)
        while view.nbytes:
            try:
                got = self._stream.readinto(view)
            except (OSError, http.client.HTTPException) as exc:
                raise CorruptEntryError(
                    f"{self._where} ended early ({str(exc) or type(exc).__name__})."
                ) from exc
            if not got:
                raise CorruptEntryError(f"{self._where} ended early.")
            view = view[got:]
        return buffer
