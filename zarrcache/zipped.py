"""A Zarr store in one zip file: one GET, then members in memory."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

from zarrcache.decode import DECODE_ERRORS, MAX_ARRAY_BYTES
from zarrcache.errors import IncompleteArrayError, SchemaError

__all__ = ["unzip"]


#: What zipfile raises over a damaged file; encrypted or in a method that is not there: RuntimeError.
_DAMAGED = (zipfile.BadZipFile, struct.error, *DECODE_ERRORS)


def unzip(data: Any, url: str, prefix: str = "") -> dict[str, bytes]:
    """Members of a zipped store; those outside ``prefix`` by name only, with empty content, for messages.

    Raises
    ------
    IncompleteArrayError
        Not a zip file, or a damaged one.
    SchemaError
        It claims more than any density holds (a zip bomb): nothing is unpacked.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            root = _zip_root([info.filename for info in infos])
            wanted = [info for info in infos if info.filename.startswith(root + prefix)]
            claimed = sum(info.file_size for info in wanted)
            if claimed > MAX_ARRAY_BYTES:
                raise SchemaError(f"{url} claims {claimed} bytes unpacked; more than {MAX_ARRAY_BYTES} are refused.")
            members = {info.filename.removeprefix(root): b"" for info in infos}
            members.update((info.filename.removeprefix(root), archive.read(info)) for info in wanted)
            return members
    except SchemaError:
        raise
    except _DAMAGED as exc:
        raise IncompleteArrayError(f"{url} is not a readable zip file ({exc}). Zip the store again, uncompressed (zip -0).") from exc


def _zip_root(names: list[str]) -> str:
    """Directory inside the zip that holds the store: zipping ``mp-1.zarr`` itself, as people do, puts everything below that name."""
    roots = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in (".zgroup", "zarr.json")]
    root = min(roots, key=lambda r: (r.count("/") + bool(r), r), default="")
    return f"{root}/" if root else ""
