"""A Zarr store in one zip file: one GET, then members in memory."""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zipfile
import zlib
from typing import Any

from zarrcache._limits import most_bytes
from zarrcache.arrays.decode import DECODE_ERRORS
from zarrcache.errors import IncompleteArrayError, SchemaError

__all__ = ["unzip"]


#: Chunks are compressed already, so what a zip holds is hardly more than the zip; but an array of
#: zeros that was zipped raw is.
_MAX_RATIO, _ROOM_BYTES = 100, 256 * 1024**2
#: A quarter of a million members, of an array of 4 GiB in chunks of 16 x 16 x 16.
_MAX_DIRECTORY_BYTES = 20 * 1024**2
# the header of a member; the last two are lengths of what follows
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1
_TAIL_BYTES = 66 * 1024  # the end of a zip and the longest comment that may follow
_REMEDY = "Zip the store again, uncompressed (zip -0)."
#: What zipfile raises over a damaged file; encrypted or in a method that is not there:
#: RuntimeError.
_DAMAGED = (zipfile.BadZipFile, struct.error, *DECODE_ERRORS)


def unzip(data: Any, url: str, prefix: str = "") -> dict[str, bytes]:
    """Members of a zipped store; those outside ``prefix`` by name only, with empty content, for
    messages.

    Raises
    ------
    IncompleteArrayError
        Not a zip file, or a damaged one.
    SchemaError
        It claims more than any density holds (a zip bomb): nothing is unpacked.
    """
    try:
        _check_directory(data, url)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            root = _zip_root([info.filename for info in infos])
            wanted = [info for info in infos if info.filename.startswith(root + prefix)]
            claimed, most = (
                sum(info.file_size for info in wanted),
                min(most_bytes(), max(_ROOM_BYTES, _MAX_RATIO * memoryview(data).nbytes)),
            )
            if claimed > most:
                raise SchemaError(
                    f"{url} claims {claimed} bytes unpacked; more than {most} are refused. "
                    f"{_REMEDY}"
                )
            members = {info.filename.removeprefix(root): b"" for info in infos}
            for info in wanted:
                members[info.filename.removeprefix(root)] = _content(archive, info, data)
            return members
    except SchemaError:
        raise
    except _DAMAGED as exc:
        raise IncompleteArrayError(f"{url} is not a readable zip file ({exc}). {_REMEDY}") from exc


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, data: Any) -> bytes:
    """One member: what its header says, and no more. ``ZipFile.read`` unpacks all that is there,
    and cuts it after that.
    """
    if (
        info.compress_type not in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        or info.flag_bits & _ENCRYPTED
    ):
        with archive.open(info) as member:
            return member.read(info.file_size)
    # zipfile gives these two 4 KiB at a time, which may be anything.
    start = (
        info.header_offset + _LOCAL.size + sum(_LOCAL.unpack_from(data, info.header_offset)[-2:])
    )
    packed = bytes(memoryview(data)[start : start + info.compress_size])
    if info.compress_type == zipfile.ZIP_BZIP2:
        out = bz2.BZ2Decompressor().decompress(packed, info.file_size + 1)
    else:
        # a version, the length of the properties, these, and then what FORMAT_ALONE is after its
        # size
        end = 4 + int.from_bytes(packed[2:4], "little")
        out = lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(
            packed[4:end] + b"\xff" * 8 + packed[end:], info.file_size + 1
        )
    if len(out) != info.file_size or zlib.crc32(out) != info.CRC:
        raise zipfile.BadZipFile(
            f"{info.filename!r} does not have the size and the checksum that it should have"
        )
    return out


def _check_directory(data: Any, url: str) -> None:
    """Refuse more members than any store has: each of the 50 bytes of its entry becomes 20 of
    Python.
    """
    tail = bytes(memoryview(data)[-_TAIL_BYTES:])
    end, large = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if size == 0xFFFFFFFF and large >= 0:
        size = int.from_bytes(tail[large + 40 : large + 48], "little")
    if size > _MAX_DIRECTORY_BYTES:
        raise SchemaError(
            f"{url} has a directory of {size} bytes, for more members than a store has chunks; it "
            "is refused."
        )


def _zip_root(names: list[str]) -> str:
    """Directory inside the zip that holds the store: zipping ``mp-1.zarr`` itself, as people do,
    puts everything below that name.
    """
    roots = [
        name.rpartition("/")[0]
        for name in names
        if name.rpartition("/")[2] in (".zgroup", "zarr.json")
    ]
    root = min(roots, key=lambda r: (r.count("/") + bool(r), r), default="")
    return f"{root}/" if root else ""
