"""Record and examine which file a store was made from, and whether the store is complete.

``convert`` records both in the group's attribute ``converted_from``, a JSON string like
``structure`` and ``metadata``, so that a later run reports "converted already" only for a complete
store of the same file.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from zarrcache.arrays import UNITS_ATTRIBUTE

__all__ = ["ATTRIBUTE", "Existing", "Source", "examine", "examine_zip", "record", "source_of"]

ATTRIBUTE = "converted_from"
#: Documents with the attributes of the group, and one more that each format needs.
_ROOTS = {".zattrs": ".zgroup", "zarr.json": "zarr.json"}


@dataclass(frozen=True)
class Source:
    """The identity of a source file."""

    #: Without its directory, which may be private.
    name: str
    #: Size as it lies on the disk, perhaps compressed.
    bytes: int
    #: Time of the last change, which no program can set: with it and the size an unchanged file is
    #: recognised without reading it.
    ctime_ns: int
    sha256: str

    def is_of(self, path: Path) -> bool:
        """Whether ``path`` has the same content. Reads it only if it was copied or touched."""
        state = path.stat()
        if state.st_size != self.bytes:
            return False
        return state.st_ctime_ns == self.ctime_ns or _sha256(path) == self.sha256


@dataclass(frozen=True)
class Existing:
    """A store that is there already."""

    #: Why it is incomplete; empty if no object is missing or too short.
    problem: str
    #: None: another program or an earlier version wrote it.
    source: Source | None = None
    #: The spin density was requested when it was converted.
    has_diff: bool = False
    #: Of its arrays: ``cell`` or ``volume``, ``float32`` or ``float64``.
    units: str = "cell"
    dtype: str = "float32"
    #: Why a file may not replace it, nor counts as converted.
    refusal: str = ""

    @property
    def is_damaged(self) -> bool:
        """Whether the store is incomplete, and is to be replaced."""
        return not self.refusal and bool(self.problem)

    @property
    def is_done(self) -> bool:
        """Whether the store is complete and was made from this file."""
        return not self.refusal and not self.problem


def source_of(path: Path) -> Source:
    """Read the identity of a file."""
    state = path.stat()
    return Source(path.name, state.st_size, state.st_ctime_ns, _sha256(path))


def _tally(objects: Mapping[str, int]) -> dict[str, int]:
    """Number and bytes of a store's objects, without the group's documents, given their sizes."""
    sizes = [size for key, size in objects.items() if "/" in key]
    return {"objects": len(sizes), "object_bytes": sum(sizes)}


def record(
    source: Source, objects: Mapping[str, int], *, has_diff: bool, dtype: str = "float32"
) -> str:
    """The value of the attribute, given the sizes of the store's objects by key."""
    # Without the default, the bytes of a store are those of earlier versions.
    kind = {} if dtype == "float32" else {"dtype": dtype}
    return json.dumps({**asdict(source), "diff": has_diff, **kind, **_tally(objects)})


def examine(
    objects: Mapping[str, int], read: Callable[[str], bytes], *, all_documents: bool = False
) -> Existing:
    """Compare the sizes of a store's objects, by their keys below it, with its record.

    Documents are read by ``read``, which gets their key; contents of chunks are not. With
    ``all_documents`` every document of the group is parsed, not only the one with the attributes: a
    file may have been cut short, while an object on S3 is written at once.
    """
    root = next((name for name in _ROOTS if name in objects), None)
    if root is None:
        return Existing("it has no attributes")
    try:
        document = json.loads(read(root))
        attributes: Mapping[str, Any] = document["attributes"] if root == "zarr.json" else document
        units = str(attributes.get(UNITS_ATTRIBUTE, "cell"))
        noted = attributes.get(ATTRIBUTE)
        noted = None if noted is None else json.loads(noted)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Existing(f"its {root} cannot be read")
    documents = [key for key in objects if "/" not in key]
    problem = "" if _ROOTS[root] in objects else f"it has no {_ROOTS[root]}"
    for key in documents if all_documents else ():
        try:
            json.loads(read(key))
        except ValueError:
            problem = problem or f"its {key} cannot be read"
    if empty := [key for key, size in objects.items() if size == 0]:
        problem = problem or f"{len(empty)} of its objects are empty, {empty[0]} for example"
    if noted is None:
        return Existing(problem or _unrecorded_problem(objects), units=units)
    now = _tally(objects)
    try:
        source = Source(*(noted[name] for name in ("name", "bytes", "ctime_ns", "sha256")))
        expected = {name: noted[name] for name in now}
        has_diff = bool(noted["diff"])
        dtype = str(noted.get("dtype", "float32"))
    except (KeyError, TypeError):
        return Existing(f"its attribute {ATTRIBUTE} cannot be read")
    if now != expected:
        problem = problem or (
            f"it has {now['objects']} of {expected['objects']} objects and {now['object_bytes']} "
            f"of {expected['object_bytes']} bytes"
        )
    return Existing(problem, source, has_diff, units, dtype)


def examine_zip(file: Path | IO[bytes]) -> Existing:
    """Like `examine`, for a zip file, or for the end of it with its directory and documents."""
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            return examine(sizes, archive.read, all_documents=True)
    except (zipfile.BadZipFile, EOFError, ValueError):
        return Existing("it is not a zip file, or is cut short")


def _unrecorded_problem(objects: Mapping[str, int]) -> str:
    """The problem of a store that does not record its number of objects; empty if none is seen."""
    total = [key for key in objects if key.startswith("charge_density_total/")]
    documents = [key for key in total if key.endswith(("/.zarray", "/zarr.json"))]
    if not documents:
        return "charge_density_total has no metadata"
    return "" if len(total) > len(documents) else "charge_density_total has no chunks"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
