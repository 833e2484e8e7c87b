"""An entry that comes from elsewhere: the lower layer, another node. Nothing of it is believed that
is not checked.
"""

from __future__ import annotations

import http.client
from io import FileIO
from typing import Any, Protocol

import numpy as np

from zarrcache._keys import ArrayKey, safe_repr
from zarrcache._limits import most_bytes
from zarrcache.disk._publish import write_all
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.entry import START_BYTES, EntryHeader, encode_header, parse_header, prefix_bytes
from zarrcache.errors import CorruptEntryError

__all__ = ["EntryStream"]

_STEP_BYTES = 2**20


class _Stream(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


class EntryStream:
    """An entry on its way. Its header is read and checked now, its payload once, by :meth:`write`
    or :meth:`read`.

    Parameters
    ----------
    stream : object with ``readinto``
    file_bytes : int
        Bytes that will come, as the sender says.
    key : ArrayKey
        What was asked for.
    where : str
        Who sends it, for messages.

    Attributes
    ----------
    is_spent : bool
        Some of its payload has been read: neither method can be called any more.

    Raises
    ------
    CorruptEntryError
        It is not an entry as this version writes it, is of another key, is no density of float32,
        does not have the length that its header says, or is larger than any array
        (:func:`zarrcache.arrays.limits.most_bytes`).
    """

    def __init__(self, stream: _Stream, file_bytes: int, key: ArrayKey, where: str) -> None:
        self._stream, self._where = stream, where
        start = self._exactly(bytearray(START_BYTES))
        raw = bytes(start) + bytes(
            self._exactly(bytearray(prefix_bytes(start, where) - START_BYTES))
        )
        self.header: EntryHeader = parse_header(raw, file_bytes, where)
        if self.header.key != key:
            raise CorruptEntryError(f"{where} holds {safe_repr(self.header.key)}.")
        # What is stored once is mapped by every reader: it has to be what they take.
        if self.header.dtype != "<f4" or len(self.header.shape) != 3 or not self.header.nbytes:
            raise CorruptEntryError(
                f"{where} holds {self.header.dtype} of shape {self.header.shape}, which is no "
                "density."
            )
        if raw != encode_header(self.header) or self.header.nbytes > most_bytes():
            raise CorruptEntryError(f"{where} has a header that zarrcache does not write.")
        self.is_spent = False

    def write(self, file: FileIO) -> None:
        """Write the whole entry to an unbuffered file, a megabyte in memory at a time.

        Raises
        ------
        CorruptEntryError
            It broke off, or its checksum does not match.
        OSError
            It cannot be written.
        """
        write_all(file, memoryview(encode_header(self.header)))
        self.is_spent = True
        buffer, left, crc = (
            memoryview(bytearray(min(_STEP_BYTES, self.header.nbytes))),
            self.header.nbytes,
            0,
        )
        while left:
            part = self._exactly(buffer[: min(left, len(buffer))])
            crc = crc32c(part, crc)
            write_all(file, memoryview(part))
            left -= len(part)
        self._compare(crc)

    def read(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The array, in memory. Raises CorruptEntryError as :meth:`write`."""
        array = np.empty(self.header.shape, self.header.dtype)
        self.is_spent = True
        self._compare(crc32c(self._exactly(array.reshape(-1).view(np.uint8).data)))
        return array

    def _compare(self, crc: int) -> None:
        if crc != self.header.crc32c:
            raise CorruptEntryError(f"{self._where}: its checksum does not match.")

    def _exactly(self, buffer: Any) -> Any:
        """Fill a buffer."""
        view = memoryview(buffer)
        while view.nbytes:
            try:
                got = self._stream.readinto(view)
            except (OSError, http.client.HTTPException) as exc:
                raise CorruptEntryError(
                    f"{self._where} broke off ({str(exc) or type(exc).__name__})."
                ) from exc
            if not got:
                raise CorruptEntryError(f"{self._where} broke off.")
            view = view[got:]
        return buffer
