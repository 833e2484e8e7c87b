"""Unpack a Zarr store in one zip file in memory, after one GET."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

from zarrcache._units import most_bytes
from zarrcache.arrays.decode import DECODE_ERRORS
from zarrcache.errors import IncompleteArrayError, SchemaError

__all__ = ["unzip"]

#: Chunks are compressed already, so the members are hardly larger than the zip, except an array of
#: zeros that was zipped raw.
_MAX_RATIO, _ROOM_BYTES = 100, 256 * 1024**2
#: Enough for 250,000 members: an array of 4 GiB in chunks of 16 x 16 x 16.
_MAX_DIRECTORY_BYTES = 20 * 1024**2
_TAIL_BYTES = 66 * 1024  # the end record of a zip and the longest comment that may follow it
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_REMEDY = "Zip the store again, uncompressed (zip -0)."
#: Errors of zipfile for a damaged file; RuntimeError for an encrypted one.
_DAMAGED = (zipfile.BadZipFile, struct.error, *DECODE_ERRORS)


def unzip(data: Any, url: str, prefix: str = "") -> dict[str, bytes]:
    """Return the members of a zipped store by name.

    Members outside ``prefix`` have empty content: messages only need their names.

    Raises
    ------
    IncompleteArrayError
        The file is not a zip file, or is damaged.
    SchemaError
        It claims more bytes than any density has (a zip bomb), or a member is compressed by
        another method than deflate. Nothing is unpacked.
    """
    try:
        _check_directory(data, url)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            root = _zip_root([info.filename for info in infos])
            wanted = [info for info in infos if info.filename.startswith(root + prefix)]
            claimed = sum(info.file_size for info in wanted)
            most = min(most_bytes(), max(_ROOM_BYTES, _MAX_RATIO * memoryview(data).nbytes))
            if claimed > most:
                raise SchemaError(
                    f"{url} claims {claimed} bytes unpacked; more than {most} are refused. "
                    f"{_REMEDY}"
                )
            members = {info.filename.removeprefix(root): b"" for info in infos}
            for info in wanted:
                # zipfile unpacks bz2 and lzma in pieces whose size it does not bound.
                if info.compress_type not in _METHODS:
                    raise SchemaError(
                        f"{url} member {info.filename} uses zip method {info.compress_type}; only "
                        f"stored and deflated members are read. {_REMEDY}"
                    )
                with archive.open(info) as member:
                    # Not ``ZipFile.read``, which unpacks everything and truncates the result.
                    members[info.filename.removeprefix(root)] = member.read(info.file_size)
            return members
    except SchemaError:
        raise
    except _DAMAGED as exc:
        raise IncompleteArrayError(f"{url} is not a readable zip file ({exc}). {_REMEDY}") from exc


def _check_directory(data: Any, url: str) -> None:
    """Refuse a directory with more members than any store has chunks.

    Python needs 20 bytes for each byte of it.
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
    """Directory inside the zip that holds the store.

    Zipping the directory ``mp-1.zarr`` puts every member below that name.
    """
    roots = [
        name.rpartition("/")[0]
        for name in names
        if name.rpartition("/")[2] in (".zgroup", "zarr.json")
    ]
    root = min(roots, key=lambda r: (r.count("/") + bool(r), r), default="")
    return f"{root}/" if root else ""
