"""Read the members of a Zarr store in one zip file, in memory, after one GET."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from zarrcache._keys import ObjectInfo, safe_repr
from zarrcache.errors import IncompleteArrayError, SchemaError, ZarrCacheError

__all__ = ["ZippedStore"]

#: Largest member without another bound, unless it is compressed by less than _MAX_RATIO.
_ROOM_BYTES, _MAX_RATIO = 64 * 1024**2, 100
#: Python needs 20 bytes for each byte of the directory. 4 MiB are 45,000 members: an array of
#: 700 MiB in chunks of 16 x 16 x 16. In a larger zip, the directory may be a sixteenth: a store
#: with chunks of 8 x 8 x 8.
_MAX_DIRECTORY_BYTES, _MAX_DIRECTORY_SHARE = 4 * 1024**2, 16
#: The end record of a zip and the longest comment that may follow it; before it the two records of
#: a large zip.
_TAIL_BYTES = 22 + 2**16 + 20 + 56
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_REMEDY = "Zip the store again, uncompressed (zip -0)."


class ZippedStore:
    """The members of a zip file by name. Nothing is unpacked before it is read.

    Parameters
    ----------
    data : buffer
        The whole file.
    url : str
        For messages.

    Attributes
    ----------
    sizes : dict
        Bytes of each member, by name below the directory that holds the store.

    Raises
    ------
    IncompleteArrayError
        It is not a zip file, or is damaged.
    SchemaError
        It has more members than its size explains, or holds several stores.
    """

    def __init__(self, data: Any, url: str) -> None:
        self.url = url
        _check_directory(data, url)
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
            infos = {_key_of(i): i for i in self._archive.infolist() if not i.is_dir()}
        except MemoryError:
            raise
        except Exception as exc:  # zipfile has no common error for damaged files
            raise self._damaged(exc) from exc
        root = _zip_root(infos, url)
        # Of two members of one name the last one counts: zarr's own ZipStore appends a second copy.
        self._infos = {name.removeprefix(root): info for name, info in infos.items()}
        self.sizes = {name: info.file_size for name, info in self._infos.items()}
        self._last: tuple[str, bytes] = ("", b"")

    def objects(self, store: str) -> list[ObjectInfo]:
        """The members, as if ``store`` were a directory of objects."""
        return [ObjectInfo(f"{store}/{name}", size, "") for name, size in self.sizes.items()]

    def fetch(
        self, store: str, objects: Iterable[ObjectInfo], most: Callable[[str], int | None]
    ) -> Iterator[tuple[ObjectInfo, bytes]]:
        """Unpack some of the :meth:`objects` of ``store``, one at a time.

        ``most`` returns the largest allowed size of a member in bytes, by its key. 0: the member is
        left out. None: as for :meth:`read`.
        """
        for obj in objects:
            nbytes = most(obj.key)
            if nbytes != 0:
                yield obj, self.read(obj.key.removeprefix(f"{store}/"), nbytes)

    def read(self, name: str, most: int | None = None) -> bytes:
        """Unpack one member.

        Parameters
        ----------
        name : str
        most : int, optional
            Its largest size in bytes. Default: 64 MiB, or 100 times its compressed size.

        Raises
        ------
        SchemaError
            It claims more bytes, or is compressed by another method than deflate. Nothing is
            unpacked.
        IncompleteArrayError
            It is damaged.
        """
        last = self._last  # once: another thread may read another member meanwhile
        if last[0] == name:
            return last[1]  # zarr reads a shard in many ranges
        info = self._infos[name]
        if most is None:
            most = max(_ROOM_BYTES, _MAX_RATIO * info.compress_size)
        # zipfile unpacks bz2 and lzma in pieces whose size it does not bound.
        if info.compress_type not in _METHODS:
            raise SchemaError(
                f"{self.url} member {info.filename} uses zip method {info.compress_type}; only "
                f"stored and deflated members are read. {_REMEDY}"
            )
        if info.file_size > most:
            raise SchemaError(
                f"{self.url} member {info.filename} claims {info.file_size} bytes unpacked; more "
                f"than {most} are refused. {_REMEDY}"
            )
        try:
            with self._archive.open(info) as member:
                # Not ``ZipFile.read``, which unpacks everything and truncates the result.
                data = member.read(info.file_size)
        except MemoryError:
            raise
        except Exception as exc:
            raise self._damaged(exc) from exc
        self._last = name, data
        return data

    def _damaged(self, exc: Exception) -> ZarrCacheError:
        return IncompleteArrayError(f"{self.url} is not a readable zip file ({exc}). {_REMEDY}")


def _check_directory(data: Any, url: str) -> None:
    """Refuse a directory with more members than any store has chunks, before it is parsed."""
    view = memoryview(data)
    tail = bytes(view[-_TAIL_BYTES:])
    size = 0
    # zipfile believes the records of a large zip wherever they are. Take the largest of all sizes.
    for signature, start, width in ((b"PK\x05\x06", 12, 4), (b"PK\x06\x06", 40, 8)):
        at = tail.find(signature)
        while at >= 0:
            field = int.from_bytes(tail[at + start : at + start + width], "little")
            if field <= view.nbytes:
                size = max(size, field)
            at = tail.find(signature, at + 1)
    if size > max(_MAX_DIRECTORY_BYTES, view.nbytes // _MAX_DIRECTORY_SHARE):
        raise SchemaError(
            f"{url} has a directory of {size} bytes, for more members than a store has chunks; it "
            "is refused."
        )


def _key_of(info: zipfile.ZipInfo) -> str:
    """Key of a member. Some tools write backslashes, ``./`` or absolute names."""
    return info.filename.replace("\\", "/").removeprefix("./").lstrip("/")


def _zip_root(names: Collection[str], url: str) -> str:
    """Directory inside the zip that holds the store, with a slash, or nothing.

    Zipping the directory ``mp-1.zarr`` puts every member below that name.
    """
    split = [name.rpartition("/") for name in names]
    roots = {above for above, _, name in split if name in (".zgroup", "zarr.json")} or {
        above.rpartition("/")[0] for above, _, name in split if name == ".zarray"
    }
    depths = {root: root.count("/") + bool(root) for root in sorted(roots)}
    highest = [root for root in depths if depths[root] == min(depths.values())]
    if len(highest) > 1:
        raise SchemaError(
            f"{url} holds several stores ({', '.join(map(safe_repr, highest[:3]))}). Zip each into "
            "a file of its own."
        )
    return f"{highest[0]}/" if highest and highest[0] else ""
