"""Encode one density as a Zarr store in memory, and publish it as a directory or a zip file.

The layout is what ``ZarrS3Reader`` reads: a group with ``charge_density_total`` and perhaps
``charge_density_diff``, float32 in chunks, and the attributes ``structure`` and ``metadata``,
each a JSON string. With encoding in memory, a directory, a zip file and S3 (``upload``) get the
same bytes, and one file always the same ETags. A store becomes visible only when it is complete
and durable.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Units
from zarrcache.arrays import MAX_DOCUMENT_BYTES, UNITS_ATTRIBUTE
from zarrcache.convert.durable import exchange, sync_directory, sync_tree
from zarrcache.convert.provenance import ATTRIBUTE, Existing, Source, examine, examine_zip, record
from zarrcache.disk import hidden_path, remove_hidden, sweep_hidden
from zarrcache.errors import ConfigError, SchemaError

__all__ = [
    "DEFAULT_CHUNKS",
    "StoreExistsError",
    "check_layout",
    "encode_store",
    "examine_store",
    "is_document",
    "publish_store",
    "store_exists",
    "sweep_partials",
    "witness_in",
    "zipped",
]

#: One request per 262,144 points: a whole density is read in a third of the time of 16³ chunks
#: (docs/guides/data-layout.md).
DEFAULT_CHUNKS = (64, 64, 64)
#: Documents by which a reader finds a group or an array, in the order of publishing, the group's
#: last.
_DOCUMENTS = (".zattrs", ".zarray", "zarr.json", ".zmetadata", ".zgroup")


class StoreExistsError(ConfigError, FileExistsError):
    """The store exists, and ``overwrite`` is False."""


def encode_store(
    total: NDArray[Any],
    diff: NDArray[Any] | None,
    structure: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    chunks: Sequence[int] = DEFAULT_CHUNKS,
    zarr_format: Literal[2, 3] = 2,
    source: Source | None = None,
    diff_wanted: bool = False,
    units: Units = "cell",
    dtype: Literal["float32", "float64"] = "float32",
) -> dict[str, bytes]:
    """Encode a store: its objects by key, in the order to publish them (chunks first, group last).

    Parameters
    ----------
    total, diff : ndarray, shape (nx, ny, nz)
        Stored as ``dtype``.
    structure, metadata : mapping
        Stored as JSON strings.
    chunks : three ints
        Chunk size along each axis; clipped to the shape.
    zarr_format : 2 or 3
        Compressors are the defaults of the format: Blosc (lz4, shuffle) in 2, Zstandard in 3.
    source : Source, optional
        Recorded in the store, with the number and bytes of its objects.
    diff_wanted : bool
        Recorded: the spin density was requested, whether the file has one or not.
    units : {"cell", "volume"}
        Of the arrays. ``volume`` is an attribute of the store, without which readers would divide
        again.
    """
    import numcodecs
    import zarr
    import zarr.storage

    objects: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(store_dict=objects)
    attributes = {
        "structure": json.dumps(dict(structure), default=_plain),
        "metadata": json.dumps(dict(metadata), default=_plain),
    }
    if units != "cell":
        attributes[UNITS_ATTRIBUTE] = units
        if sum(map(len, attributes.values())) > MAX_DOCUMENT_BYTES // 2:
            raise SchemaError(
                f"its structure and metadata have {sum(map(len, attributes.values()))} bytes; "
                "readers do not read such attributes, so they would not see its units. Convert it "
                "per cell."
            )
    group = zarr.create_group(store=store, zarr_format=zarr_format, attributes=attributes)
    for name, values in (("charge_density_total", total), ("charge_density_diff", diff)):
        if values is None:
            continue
        group.create_array(
            name,
            data=np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")),
            # Larger chunks would be padded to their full size in memory (1000: 4 GB).
            chunks=tuple(min(*sides) for sides in zip(chunks, values.shape, strict=True)),
            compressors=numcodecs.Blosc() if zarr_format == 2 else "auto",
            # A spin density may be zero. With every chunk written, one that is absent is lost.
            config={"write_empty_chunks": True},
        )
    if source is not None:
        sizes = {key: len(value) for key, value in objects.items()}
        noted = record(source, sizes, has_diff=diff_wanted, dtype=dtype)
        group.update_attributes({ATTRIBUTE: noted})
    with warnings.catch_warnings():
        # zarr warns that v3 does not specify consolidated metadata yet; readers may ignore it.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)
    encoded = {key: bytes(value.to_bytes()) for key, value in objects.items()}
    return {key: encoded[key] for key in sorted(encoded, key=_publishing_order)}


def check_layout(chunks: Sequence[object], zarr_format: int) -> None:
    """Raise unless there are three positive chunk sizes, and the format is 2 or 3."""
    if zarr_format not in (2, 3):
        raise ConfigError(f"zarr_format is {zarr_format!r}; Zarr has the formats 2 and 3.")
    if len(chunks) != 3 or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in chunks
    ):
        raise ConfigError(
            f"chunks is {chunks!r}; give three positive whole numbers, for example (64, 64, 64)."
        )


def _publishing_order(key: str) -> tuple[int, int, str]:
    directory, _, name = key.rpartition("/")
    return (
        (0, 0, key)
        if name not in _DOCUMENTS
        else (1 if directory else 2, _DOCUMENTS.index(name), key)
    )


def is_document(key: str) -> bool:
    """Whether an object makes a group or an array visible; all others are chunks."""
    return key.rpartition("/")[2] in _DOCUMENTS


def publish_store(final: Path, objects: Mapping[str, bytes], *, overwrite: bool = False) -> int:
    """Write one store, completely or not at all. Returns the bytes written.

    ``objects`` are those of `encode_store`; a zip file has one whose key is empty. When this
    returns, the store survives a power failure. During ``overwrite`` the old or the new store is
    there at each instant, also after a power failure; on file systems that cannot swap two names
    (NFS) the next run restores the old one, should both names be gone.

    Raises
    ------
    StoreExistsError
        It exists, and ``overwrite`` is False.
    ConfigError
        Something that is no store has this name.
    OSError
        Writing failed; nothing of the store is left.
    """
    _refuse_what_is_there(final, overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden_path(final, "partial")
    try:
        _write(partial, objects)
        sync_tree(partial)
        _move_into_place(partial, final, overwrite)
    except BaseException:  # KeyboardInterrupt and SystemExit too
        remove_hidden(partial)
        raise
    return sum(map(len, objects.values()))


def examine_store(path: Path) -> Existing:
    """Whether the store at a local path is complete, and what it was made from."""
    if path.name.endswith(".zip"):
        return examine_zip(path)
    sizes = {}
    for directory, _, names in os.walk(path):
        for name in names:
            file = Path(directory, name)
            sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    return examine(sizes, lambda key: (path / key).read_bytes(), all_documents=True)


def store_exists(path: Path) -> bool:
    """Whether a complete store is at this local path, as a directory or a zip file."""
    if path.name.endswith(".zarr.zip"):
        return path.is_file()
    # With .zattrs alone it is a store that has lost its group document.
    names = (".zgroup", ".zarray", "zarr.json", ".zattrs")
    return any((path / name).is_file() for name in names)


def sweep_partials(directory: Path) -> list[Path]:
    """Remove unfinished stores of killed writers, and put back a store that one had moved aside.

    Returns the hidden paths that are gone.
    """
    return sweep_hidden(directory, lambda name: name.endswith((".zarr", ".zarr.zip")))


@contextlib.contextmanager
def witness_in(directory: Path) -> Iterator[Path]:
    """An empty hidden file, which a machine sees only if it shares this directory.

    A directory of the same name on a machine's own disk does not have it. Swept like a partial
    file.
    """
    path = hidden_path(directory / "witness.zarr", "partial")
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Convert NumPy values in a structure's site properties for JSON."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def zipped(objects: Mapping[str, bytes]) -> bytes:
    """Pack all objects into one uncompressed zip file, without dates: equal stores, equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key, body in objects.items():
            archive.writestr(zipfile.ZipInfo(key, date_time=(1980, 1, 1, 0, 0, 0)), body)
    return buffer.getvalue()


def _write(root: Path, objects: Mapping[str, bytes]) -> None:
    if set(objects) == {""}:
        root.write_bytes(objects[""])
        return
    root.mkdir()
    made = {root}
    for key, body in objects.items():
        path = root / key
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(body)


def _refuse_what_is_there(final: Path, overwrite: bool) -> None:
    if not os.path.lexists(final) or (
        final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    ):
        return
    if not store_exists(final):
        raise ConfigError(
            f"{final} exists but is not a Zarr store, so it is not replaced. Move it away or "
            "choose another destination."
        )
    if not overwrite:
        raise StoreExistsError(
            f"{final} exists already. Overwrite it (--overwrite) or choose another destination."
        )


def _move_into_place(partial: Path, final: Path, overwrite: bool) -> None:
    replaced = None
    if not overwrite:
        _move_unless_present(partial, final)
    elif partial.is_file() or not os.path.lexists(final):
        os.replace(partial, final)
    # A rename cannot replace a directory that is not empty.
    elif exchange(partial, final):
        replaced = partial
    else:
        # After a crash between the two renames the next run restores the old store.
        replaced = hidden_path(final, "replaced")
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, replaced)
        try:
            os.rename(partial, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.rename(replaced, final)
            raise
    sync_directory(final.parent)
    if replaced is not None:  # only now that the new store is durable
        remove_hidden(replaced)


def _move_unless_present(partial: Path, final: Path) -> None:
    try:
        if final.name.endswith(".zip"):
            # Unlike a rename, a link never replaces what another writer has just made.
            os.link(partial, final)
            os.unlink(partial)
        else:
            os.rename(partial, final)  # refuses a directory that is not empty
    except OSError as exc:
        # The file system has no hard links.
        if exc.errno in (errno.EPERM, errno.ENOTSUP) and not final.exists():
            os.rename(partial, final)
            return
        if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise StoreExistsError(
            f"{final} was written by another process meanwhile; it is not replaced."
        ) from exc
