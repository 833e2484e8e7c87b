"""Entries of the array tier: the file format, reading, writing, and receiving a stream.

An entry is a header and the array::

    offset 0     8 bytes   magic b"zarrcach"
           8     u32       version of the format: 1, or 2 if the payload is encoded
           12    u32       length of the JSON that follows
           16    u32       CRC-32C of the JSON
           20    JSON      identity (origin, url, array), source, dtype, shape, nbytes,
                           crc32c of the payload; missing_chunks and nonfinite if they are not 0;
                           version 2: encoding, relative_error, absolute_error, scale;
                           attributes: length and CRC-32C of what follows the payload
           n*4096          payload: C order, little endian, page-aligned so that it can be mapped
           (n*64)          of version 2, whose values are decoded or cast: with a page of header
                           float16 would hold 1.9 times the densities of 24**3 points, not 2.0

The attributes of the store follow the payload, if it has any: they say the units and the cell of
the density, so both are of one version. Readers of densities do not read them.

All integers are little endian. The header repeats the full identity of the entry, so that a file
under the wrong name is a miss, and the index can be rebuilt from the files alone. ``nbytes`` and
``crc32c`` are those of the payload as stored, ``dtype`` and ``shape`` those of its values.
``tests/golden`` freezes the bytes of both versions: another format needs another version. A reader
of version 1 takes version 2 for a miss, and never meets it, because the encoding is in the digest.

The stored listing of a store or directory is an entry too: JSON text as bytes, with an empty array
name. Its kind in the index is :data:`LISTING`.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import struct
from dataclasses import dataclass, replace
from io import FileIO
from typing import Any

import numpy as np

from zarrcache._keys import FLOAT32, ArrayKey, safe_repr
from zarrcache._units import most_bytes
from zarrcache.disk._publish import write_all
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.encoding import (
    LazyGrid,
    StoredAs,
    decode,
    encode,
    is_by_value,
    is_known,
    stored_layout,
)
from zarrcache.disk.mmap import map_file, open_regular, read_in
from zarrcache.errors import CorruptEntryError

__all__ = [
    "ARRAY",
    "HEADER_BYTES",
    "LISTING",
    "MAX_ATTRIBUTES_BYTES",
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
    "new_entry",
    "parse_header",
    "read_attributes_of",
    "read_header",
    "write_entry",
    "written_stamp",
]

#: Kinds of entries in the index: a density or a stored listing (array tier); an object or a block
#: of one (byte tier).
ARRAY, LISTING, OBJECT = "array", "listing", "object"

#: Versions of the header: values as they are, and an encoded payload.
_PLAIN, _ENCODED = 1, 2
_MAGIC = b"zarrcach"
_PREFIX = struct.Struct("<8sIII")
_PAGE = 4096
#: Length of a usual header of an encoded entry; longer URLs need a little more.
HEADER_BYTES = 512
#: The payload starts at a multiple of this, by version.
_ALIGNMENT = {_PLAIN: _PAGE, _ENCODED: 64}
#: Longest header that is accepted; this package writes much shorter ones.
_MAX_JSON_BYTES = 64 * 1024
#: Longest attributes that are accepted, compressed; a store's own may have 4 MiB.
MAX_ATTRIBUTES_BYTES = 5 * 2**20
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
    """Flaws of a density at the origin that could be read nevertheless.

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
    stored_as : StoredAs or None
        How the payload is encoded; None: it is the values.
    attributes_bytes, attributes_crc32c : int
        Of the attributes after the payload.
    """

    key: ArrayKey
    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32c: int
    flaws: Flaws = SOUND
    stored_as: StoredAs | None = None
    attributes_bytes: int = 0
    attributes_crc32c: int = 0

    @property
    def decoded_bytes(self) -> int:
        """Length of the values in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def offset(self) -> int:
        """Offset of the payload in bytes."""
        return len(encode_header(self))

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.offset + self.nbytes + self.attributes_bytes


class Entry:
    """An entry: its header, and its payload in a private map of the file or in memory.

    Attributes
    ----------
    header : EntryHeader
    stored : ndarray
        The payload as it is stored. Writable; writes never reach the file.
    written : int
        `written_stamp` of its file; 0 in memory.
    attributes : bytes or None
        Of an entry in memory. None: they are in its file, see `read_attributes_of`.
    """

    __slots__ = ("_array", "attributes", "header", "stored", "written")

    def __init__(
        self,
        header: EntryHeader,
        stored: np.ndarray[Any, np.dtype[Any]],
        written: int = 0,
        attributes: bytes | None = None,
    ) -> None:
        self.header, self.stored, self.written = header, stored, written
        self.attributes = attributes
        self._array = stored if header.stored_as is None else None

    @property
    def array(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The values: ``stored`` itself, or decoded at the first access.

        Raises
        ------
        CorruptEntryError
            The payload cannot be decoded, although its checksum may be right.
        """
        if self._array is None:
            assert self.header.stored_as is not None
            try:
                self._array = decode(self.header.stored_as, self.stored, self.header.shape)
            except ValueError as exc:
                raise CorruptEntryError(f"it cannot be decoded: {exc}") from exc
        return self._array

    @property
    def grid(self) -> LazyGrid:
        """The values, decoded where they are used if the encoding allows it.

        Raises
        ------
        CorruptEntryError
            As `array`.
        """
        stored_as = self.header.stored_as
        if stored_as is None or not is_by_value(stored_as):
            return LazyGrid(self.array)
        return LazyGrid(self.stored, stored_as)

    def is_intact(self) -> bool:
        """Whether the payload matches its checksum. Reads all of it.

        Raises
        ------
        OSError
            The disk cannot read it.
        """
        read_in(self.stored)
        return _checksum(self.stored) == self.header.crc32c


def _checksum(array: np.ndarray[Any, np.dtype[Any]]) -> int:
    """CRC-32C of the bytes of a C-contiguous array."""
    return crc32c(array.reshape(-1).view(np.uint8).data) if array.nbytes else 0


def header_of(
    key: ArrayKey,
    array: np.ndarray[Any, np.dtype[Any]],
    source: str,
    flaws: Flaws = SOUND,
    attributes: bytes = b"",
) -> EntryHeader:
    """The header under which ``array`` (C-contiguous, little endian) is stored as it is."""
    return EntryHeader(
        key,
        source,
        array.dtype.str,
        array.shape,
        array.nbytes,
        _checksum(array),
        flaws,
        None,
        len(attributes),
        crc32c(attributes),
    )


def new_entry(
    key: ArrayKey,
    array: np.ndarray[Any, np.dtype[Any]],
    source: str,
    flaws: Flaws = SOUND,
    attributes: bytes = b"",
) -> Entry:
    """An entry in memory of ``array``, in the encoding of ``key``.

    Where the encoding cannot hold the array within its bound, ``header.stored_as`` is None and the
    payload is the array itself.
    """
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    if key.encoding != FLOAT32 and not flaws.nonfinite:
        encoded = encode(array, key.encoding)
        if encoded is not None:
            stored_as, payload = encoded
            header = replace(
                header_of(key, payload, source, flaws, attributes),
                dtype=array.dtype.str,
                shape=array.shape,
                stored_as=stored_as,
            )
            return Entry(header, payload, attributes=attributes)
    header = header_of(key, array, source, flaws, attributes)
    return Entry(header, array, attributes=attributes)


def encode_header(header: EntryHeader) -> bytes:
    """The bytes of a header, padded to the start of the payload."""
    flaws = {name: n for name in _FLAWS if (n := getattr(header.flaws, name))}
    attributes = [header.attributes_bytes, header.attributes_crc32c]
    fields = {
        "array": header.key.array,
        **({"attributes": attributes} if header.attributes_bytes else {}),
        "crc32c": header.crc32c,
        "dtype": header.dtype,
        **flaws,
        "nbytes": header.nbytes,
        "origin": header.key.origin,
        "shape": list(header.shape),
        "source": header.source,
        "url": header.key.url,
    }
    if header.stored_as is not None:
        fields.update(
            encoding=header.stored_as.encoding,
            relative_error=header.stored_as.relative_error,
            absolute_error=header.stored_as.absolute_error,
            scale=header.stored_as.scale,
        )
    text = json.dumps(fields, separators=(",", ":")).encode()
    version = _PLAIN if header.stored_as is None else _ENCODED
    raw = _PREFIX.pack(_MAGIC, version, len(text), crc32c(text)) + text
    return raw.ljust(_aligned(len(raw), version), b"\0")


def _aligned(length: int, version: int) -> int:
    step = _ALIGNMENT[version]
    return -(-length // step) * step


def write_entry(
    file: FileIO,
    header: EntryHeader,
    stored: np.ndarray[Any, np.dtype[Any]],
    attributes: bytes = b"",
) -> None:
    """Write header, payload as it is stored, and attributes to an unbuffered file."""
    # In one call: the kernel then keeps 5 MB in pages of up to 2 MiB, and a process that maps the
    # file faults 5 times; after two calls 10 times, after small ones 77 times (Linux 6.18, ext4).
    parts = [
        memoryview(encode_header(header)),
        memoryview(stored.reshape(-1).view(np.uint8).data if stored.nbytes else b""),
        memoryview(attributes),
    ]
    written = os.writev(file.fileno(), parts)
    for part in parts:
        write_all(file, part[written:])
        written = max(0, written - part.nbytes)


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


def read_attributes_of(path: str | os.PathLike[str]) -> tuple[EntryHeader, bytes]:
    """The header of a file, and the attributes after its payload; b"" if it has none.

    Raises
    ------
    CorruptEntryError
        Not an entry of this version, incomplete, or the attributes do not match their checksum.
    OSError
        The file is gone or cannot be read.
    """
    fd, found = open_regular(path)
    try:
        header = parse_header(os.pread(fd, _PAGE, 0), found.st_size, path, fd)
        nbytes = header.attributes_bytes
        attributes = os.pread(fd, nbytes, found.st_size - nbytes) if nbytes else b""
    finally:
        os.close(fd)
    if crc32c(attributes) != header.attributes_crc32c:
        raise CorruptEntryError("the checksum of its attributes does not match")
    return header, attributes


def written_stamp(found: os.stat_result) -> int:
    """32 bits that change when a file is replaced by another one or written to."""
    return (found.st_ino ^ found.st_mtime_ns) & 0xFFFFFFFF


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
        dtype, shape = header.dtype, header.shape
        if header.stored_as is not None:
            dtype, shape = stored_layout(header.stored_as, shape, header.nbytes)
        offset = found.st_size - header.nbytes - header.attributes_bytes
        stored = map_file(fd, found, path, offset, dtype, shape)
        return Entry(header, stored, written_stamp(found))
    finally:
        os.close(fd)


def parse_header(
    raw: bytes, file_bytes: int, path: str | os.PathLike[str], fd: int | None = None
) -> EntryHeader:
    """Parse and check the header in the first bytes of an entry.

    Parameters
    ----------
    raw : bytes
        At least the whole header; with ``fd`` the first page is enough.
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
        return CorruptEntryError(f"{os.fspath(path)} is not a complete entry: {why}.")

    if len(raw) < _PREFIX.size:
        raise corrupt(f"{len(raw)} bytes long")
    magic, version, length, crc = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise corrupt("wrong magic number")
    if version not in _ALIGNMENT:
        raise corrupt(f"format version {version}, known are {_PLAIN} and {_ENCODED}")
    if length > _MAX_JSON_BYTES:
        raise corrupt(f"header of {length} bytes")
    end = _PREFIX.size + length
    offset = _aligned(end, version)
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
        attributes_bytes, attributes_crc = map(int, fields.get("attributes", (0, 0)))
        if min(counts) < 0 or not 0 <= attributes_bytes <= MAX_ATTRIBUTES_BYTES:
            raise ValueError("a count that is negative or too large")
        header = EntryHeader(
            ArrayKey(fields["origin"], fields["url"], fields["array"]),
            fields["source"],
            dtype.str,
            shape,
            int(fields["nbytes"]),
            int(fields["crc32c"]),
            Flaws(*counts) if any(counts) else SOUND,
            _stored_as_of(fields) if version == _ENCODED else None,
            attributes_bytes,
            attributes_crc,
        )
    except (ValueError, KeyError, TypeError, SyntaxError, OverflowError, RecursionError) as exc:
        raise corrupt(f"header cannot be read ({exc})") from exc
    if dtype.hasobject or min(shape, default=0) < 0 or not _is_length_of(header, dtype.itemsize):
        raise corrupt("shape, dtype and length disagree")
    expected = offset + header.nbytes + attributes_bytes
    if expected != file_bytes:
        raise corrupt(f"{file_bytes} bytes long, {expected} expected")
    if raw[end:offset] != bytes(offset - end):  # no value is affected, but the disk is faulty
        raise corrupt("the padding after the header is not zero")
    return header


def _stored_as_of(fields: dict[str, Any]) -> StoredAs:
    """The encoding in a header of version 2. Raises ValueError."""
    stored_as = StoredAs(
        str(fields["encoding"]),
        float(fields["relative_error"]),
        float(fields["absolute_error"]),
        int(fields["scale"]),
    )
    key = ArrayKey(fields["origin"], fields["url"], fields["array"])
    if not is_known(stored_as) or stored_as.encoding != key.encoding:
        raise ValueError(f"encoding {safe_repr(stored_as.encoding)} for {safe_repr(key.array)}")
    if not (0 <= stored_as.relative_error < 1 and 0 <= stored_as.absolute_error < math.inf):
        raise ValueError("an error bound that is not a number from 0")
    return stored_as


def _is_length_of(header: EntryHeader, itemsize: int) -> bool:
    """Whether the payload can have its length. Frames are checked when they are decoded."""
    values = math.prod(header.shape)
    if header.stored_as is None:
        return values * itemsize == header.nbytes
    stored_dtype, stored_shape = stored_layout(header.stored_as, header.shape, header.nbytes)
    return (
        header.dtype == "<f4"
        and values * itemsize <= most_bytes()
        and math.prod(stored_shape) * np.dtype(stored_dtype).itemsize == header.nbytes
    )


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

    def __init__(self, stream: Any, file_bytes: int, key: ArrayKey, where: str) -> None:
        self._stream, self._where = stream, where
        start = bytes(self._fill(bytearray(_PREFIX.size)))
        magic, version, length, _ = _PREFIX.unpack(start)
        if magic != _MAGIC or version not in _ALIGNMENT or length > _MAX_JSON_BYTES:
            raise CorruptEntryError(f"{where} does not begin like an entry.")
        n_rest = _aligned(_PREFIX.size + length, version) - _PREFIX.size
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
        if raw != encode_header(self.header) or self.header.decoded_bytes > most_bytes():
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
        self._compare(crc, self.header.crc32c)
        write_all(file, memoryview(self._attributes()))

    def read(self) -> Entry:
        """Read the entry into memory. Raises CorruptEntryError like :meth:`write`."""
        header = self.header
        dtype, shape = header.dtype, header.shape
        if header.stored_as is not None:
            dtype, shape = stored_layout(header.stored_as, shape, header.nbytes)
        stored = np.empty(shape, dtype)
        self.is_spent = True
        crc = crc32c(self._fill(stored.reshape(-1).view(np.uint8).data))
        self._compare(crc, header.crc32c)
        return Entry(header, stored, attributes=self._attributes())

    def _attributes(self) -> bytes:
        attributes = bytes(self._fill(bytearray(self.header.attributes_bytes)))
        self._compare(crc32c(attributes), self.header.attributes_crc32c)
        return attributes

    def _compare(self, crc: int, expected: int) -> None:
        if crc != expected:
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
