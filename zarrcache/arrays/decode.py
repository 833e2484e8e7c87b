"""Decode the objects of one Zarr array into a numpy array as they arrive.

Chains of known codecs (:mod:`zarrcache.arrays.codecs`) are decoded here: 343 blosc chunks take 16
ms this way and 109 ms through zarr's pipeline, which spends the rest on scheduling. All other
arrays go through zarr itself, in a child process (:mod:`zarrcache.arrays.foreign`).
``tests/property/test_decode_parity.py`` compares the two for any shape, chunking and codec.

Objects that are not chunks of the grid are ignored, as by zarr: what an editor, a file system or
macOS leaves beside them.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from typing_extensions import Buffer

from zarrcache._keys import safe_repr
from zarrcache._units import most_bytes
from zarrcache.arrays.codecs import Chunk, UnknownCodecError
from zarrcache.errors import IncompleteArrayError, SchemaError, ZarrCacheError

__all__ = [
    "FORMATS",
    "MAX_DOCUMENT_BYTES",
    "ArrayDecoder",
    "absent_chunks",
    "attributes_in",
    "attributes_key",
    "check_attributes_size",
    "check_chunk_count",
    "check_metadata",
    "check_unpacked",
    "count_missing",
    "is_array_key",
    "is_chunk_of_nothing",
    "metadata_key",
    "parse_document",
]

#: Largest document that describes an array, and the objects in it: JSON of empty lists takes 50
#: times its size when it is parsed.
MAX_DOCUMENT_BYTES, _MAX_DOCUMENT_OBJECTS = 4 * 1024**2, 200_000
#: Documents with the attributes of a store, and the Zarr format of each.
FORMATS = {".zattrs": 2, "zarr.json": 3}
#: A chunk may be larger than its array, because all stores may have the same chunks; what lies
#: outside of the array may take this memory while the chunk is decoded.
_MAX_EXCESS_BYTES = 72 * 1024**2
#: Most chunks of an array that zarr reads: it makes a list of them before it looks at the first.
_MAX_CHUNKS_OF_ZARR = 2**24

_REPAIR = "Convert the store again, or repair or shorten this file."
_NUMBERS = "biuf"
_MAX_AXES, _MAX_LENGTH = 32, 2**63
#: Keys below an array: its metadata, and what may be a chunk of some grid.
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"  # int() refuses thousands of digits
_ARRAY_KEY = re.compile(rf"\.zarray|zarr\.json|c|(?:c[/.])?{_NUMBER}(?:[/.]{_NUMBER})*")
#: Last part of a chunk's key: ``0.0.0`` (v2), ``c/0/0/0`` and ``c.0.0.0`` (v3), ``c`` (a scalar).
_CHUNK_NAME = re.compile(r"c(\.\d+)*|\d+(\.\d+)*")
#: Codecs of numcodecs that make objects instead of numbers: pickle runs code from the data, and the
#: others take sizes from it.
_OBJECT_CODECS = frozenset(
    {"pickle", "json2", "msgpack2", "vlen-utf8", "vlen-bytes", "vlen-array", "categorize"}
)
#: Members of ``zarr.json`` that are followed here, or do not affect the values.
_V3_MEMBERS = frozenset(
    "attributes chunk_grid chunk_key_encoding codecs data_type dimension_names fill_value "
    "node_type shape storage_transformers zarr_format".split()
)
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class _Layout:
    """The places of the chunks of an array, and how to decode them."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    chunk: Chunk
    chunk_key: re.Pattern[str]
    separator: str


def is_array_key(key: str) -> bool:
    """Whether an object below an array may be its metadata or a chunk.

    Others are ignored: ``.DS_Store``, ``._0.0.0``, ``0.0.0~``, markers of directories.
    """
    return _ARRAY_KEY.fullmatch(key) is not None


def is_chunk_of_nothing(key: str, keys: Container[str]) -> bool:
    """Whether ``key`` looks like a chunk, and ``keys`` has no array that it would belong to.

    The array was opened, so its metadata was there: the store is gone, or was replaced. zarr would
    take the chunk for one that was never written.

    Parameters
    ----------
    key : str
        Below a store, for example ``charge_density_total/c/0/1/0``.
    keys : container of str
        All keys of the store.
    """
    directory, _, name = key.rpartition("/")
    if _CHUNK_NAME.fullmatch(name) is None:
        return False
    while True:
        below = f"{directory}/" if directory else ""
        if f"{below}zarr.json" in keys or f"{below}.zarray" in keys:
            return False
        directory, _, name = directory.rpartition("/")
        if _CHUNK_NAME.fullmatch(name) is None:
            return True


def metadata_key(keys: Collection[str]) -> str | None:
    """Key of the metadata document: ``zarr.json`` (v3) before ``.zarray`` (v2), as in zarr."""
    return next((name for name in ("zarr.json", ".zarray") if name in keys), None)


def attributes_key(metadata_key: str | None, keys: Container[str]) -> str:
    """Key below a store of the document with its attributes: ``zarr.json`` (v3) or ``.zattrs``.

    If the ``keys`` of the store have the document of the array's format (its ``metadata_key``), it
    is that document, otherwise the other: ``zarr migrate v3`` writes the documents of arrays before
    those of their group, and may have been killed between them.
    """
    names = ("zarr.json", ".zattrs") if metadata_key == "zarr.json" else (".zattrs", "zarr.json")
    return next((name for name in names if name in keys), names[0])


def attributes_in(document: Any, key: str, store_url: str) -> dict[str, Any]:
    """The attributes in the document ``key`` of a store.

    Raises
    ------
    SchemaError
        It is not a JSON object. It might state other units than a store without attributes
        has.
    """
    try:
        parsed = parse_document(bytes(document))
    except (ValueError, RecursionError) as exc:
        raise SchemaError(
            f"{store_url}/{key} cannot be read ({exc}), so the units of the density are unknown. "
            f"{_REPAIR}"
        ) from exc
    if key == "zarr.json" and isinstance(parsed, dict):
        parsed = parsed.get("attributes") or {}
    if not isinstance(parsed, dict):
        raise SchemaError(
            f"{store_url}/{key} does not hold attributes but {safe_repr(parsed)}, so the units "
            f"of the density are unknown. {_REPAIR}"
        )
    return parsed


def check_attributes_size(nbytes: int, key: str, store_url: str) -> None:
    """Refuse a document with the attributes of a store before it is read.

    Raises
    ------
    SchemaError
        It has more than 4 MiB.
    """
    if nbytes > MAX_DOCUMENT_BYTES:
        raise SchemaError(
            f"{store_url}/{key} has {nbytes} bytes; attributes, which state the units of the "
            f"density, may have at most {MAX_DOCUMENT_BYTES}. {_REPAIR}"
        )


class ArrayDecoder:
    """Collects the objects of one array, and decodes each chunk once the metadata is known.

    Parameters
    ----------
    keys : collection of str
        All keys that the origin lists below the array, relative to it.
    url : str
        Full URL of the array, for messages.
    reserve : callable, optional
        Called with the array's size in bytes before that memory is allocated. It may wait.
    fills : bool
        Chunks of the grid that are not among ``keys`` have the fill value. False: they are an
        error.

    Attributes
    ----------
    missing_chunks : int
        Chunks of the grid that are not among ``keys``; 0 before the metadata is known.
    """

    def __init__(
        self,
        keys: Collection[str],
        url: str,
        reserve: Callable[[int], object] | None = None,
        *,
        fills: bool = True,
    ) -> None:
        self._keys = keys
        self._url = url
        self._fills = fills
        self.missing_chunks = 0
        self._reserve = reserve
        self._metadata_key = metadata_key(keys)
        self._document: dict[str, Any] | None = None
        self._layout: _Layout | None = None
        # First point along each axis of every listed chunk of the grid.
        self._starts: dict[str, tuple[int, ...]] = {}
        self._out: np.ndarray[Any, np.dtype[Any]] | None = None
        self._kept: dict[str, Buffer] = {}

    def add(self, key: str, data: Buffer) -> None:
        """Add one object.

        Raises
        ------
        SchemaError
            The metadata describes an unsupported array.
        IncompleteArrayError
            A chunk cannot be decoded, or is absent and ``fills`` is False.
        """
        if key == self._metadata_key:
            self._describe(data)
            if self._layout is not None:
                kept, self._kept = self._kept, {}
                for name, chunk in kept.items():
                    self._decode(name, chunk)
                return
        if self._layout is not None:
            self._decode(key, data)
        elif is_array_key(key):
            self._kept[key] = data

    def most_bytes_of(self, key: str) -> int | None:
        """Size of the largest object that may be stored as ``key``; 0: it is not of the array.

        None: not known, because zarr decodes the array. Call after adding the metadata.
        """
        if key == self._metadata_key:
            return MAX_DOCUMENT_BYTES
        if self._layout is None:
            return None if is_array_key(key) else 0
        return self._layout.chunk.encoded_bytes if key in self._starts else 0

    def finish(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the array, C order, native byte order. Call after adding every listed key."""
        if self._document is None:
            raise SchemaError(
                f"{self._url} holds neither .zarray nor zarr.json; it is not a Zarr array."
            )
        if self._out is not None:
            return self._out
        from zarrcache.arrays.foreign import decode_in_child

        nbytes = _claimed_bytes(self._document)
        return decode_in_child(self._kept, self._zarr_format, nbytes, self._url)

    @property
    def _zarr_format(self) -> Literal[2, 3]:
        return 3 if self._metadata_key == "zarr.json" else 2

    def _describe(self, data: Buffer) -> None:
        url = f"{self._url}/{self._metadata_key}"
        raw = memoryview(data)
        if raw.nbytes > MAX_DOCUMENT_BYTES:
            raise SchemaError(
                f"{url} has {raw.nbytes} bytes, too many for the description of an array; convert "
                "the store again."
            )
        try:
            document = parse_document(bytes(raw))
        except (ValueError, RecursionError) as exc:
            raise SchemaError(f"{url} is not JSON ({exc}); convert the store again.") from exc
        check_metadata(document, url)
        self._document = document
        try:
            layout = self._layout = (_v3 if self._zarr_format == 3 else _v2)(document)
        except ZarrCacheError:
            raise
        except UnknownCodecError:
            check_chunk_count(document, url)
            layout = None
        except (MemoryError, ImportError):  # of this process, which says nothing about the store
            raise
        except Exception as exc:  # parts that are missing, of other types, or that no codec takes
            raise SchemaError(
                f"{url} does not describe a Zarr array that can be read ({type(exc).__name__}: "
                f"{exc}); convert the store again."
            ) from exc
        if layout is not None:
            _check_excess(layout, url)
        self.missing_chunks, n_chunks = count_missing(document, self._keys)
        if self.missing_chunks and not self._fills:
            raise absent_chunks(self._url, self.missing_chunks, n_chunks)
        if self.missing_chunks == n_chunks:
            self._check_other_keys(n_chunks)
        if self._reserve is not None:
            self._reserve(_claimed_bytes(document))
        if layout is None:
            return
        self._starts = {
            key: starts for key in self._keys if (starts := _starts_of(key, layout)) is not None
        }
        dtype = layout.dtype.newbyteorder("=")
        # Write the fill value only where chunks are missing: first touching 5 MB of fresh memory
        # costs as much as decoding it.
        grid = [-(-n // c) for n, c in zip(layout.shape, layout.chunk.shape, strict=True)]
        if len(self._starts) == math.prod(grid):
            self._out = np.empty(layout.shape, dtype)
        elif np.full(1, layout.fill, dtype).tobytes().strip(b"\0"):
            self._out = np.full(layout.shape, layout.fill, dtype)
        else:  # memory that is not touched is zero
            self._out = np.zeros(layout.shape, dtype)

    def _check_other_keys(self, n_chunks: int) -> None:
        """Refuse to fill an array whose chunks are there under keys of another kind.

        Zarr before 2.8 wrote ``0/0/0`` without saying so in the metadata.
        """
        documents = {"zarr.json", ".zarray"}
        other = next((k for k in self._keys if k not in documents and is_array_key(k)), None)
        if n_chunks and other is not None:
            raise IncompleteArrayError(
                f"{self._url} has none of its {n_chunks} chunks, but objects that are named like "
                f"chunks of another array: {other}. Correct dimension_separator (v2) or "
                "chunk_key_encoding (v3) in its metadata, or convert the store again."
            )

    def _decode(self, key: str, data: Buffer) -> None:
        layout, out, starts = self._layout, self._out, self._starts.get(key)
        if starts is None:
            return
        assert layout is not None
        assert out is not None
        target = out[
            tuple(
                [
                    slice(start, start + n)
                    for start, n in zip(starts, layout.chunk.shape, strict=True)
                ]
            )
        ]
        try:
            layout.chunk.write(data, target, layout.fill)
        except MemoryError:  # of this node, which says nothing about the store
            raise
        except Exception as exc:
            # Codecs have no common error: for damaged data they raise those of zlib, lzma, numpy,
            # RuntimeError, IndexError, and others.
            raise IncompleteArrayError(
                f"{self._url}/{key} cannot be decoded ({type(exc).__name__}: {exc}). The object is "
                "damaged at the origin: convert the store again."
            ) from exc


def parse_document(text: bytes) -> Any:
    """Parse JSON of bounded size, in bounded memory.

    Raises
    ------
    ValueError, RecursionError
        It is not JSON, or has too many lists and objects.
    """
    if text.count(b"[") + text.count(b"{") > _MAX_DOCUMENT_OBJECTS:
        raise ValueError("it has too many lists and objects")
    return json.loads(text)


def absent_chunks(url: str, missing: int, chunks: int) -> IncompleteArrayError:
    """The error for an array without some of its chunks."""
    return IncompleteArrayError(
        f"{url}: {missing} of {chunks} chunks are absent. Convert the store again. If they were "
        "never written because all their values are the fill value, set cache.missing_chunks: "
        "fill."
    )


def count_missing(document: Mapping[str, Any], keys: Collection[str]) -> tuple[int, int]:
    """Count the chunks (or shards) of an array that no key names, and all of its grid.

    An inner chunk that the index of a shard leaves out was never written.

    Parameters
    ----------
    document : mapping
        The array's metadata; see `check_metadata`.
    keys : collection of str
        Below the array, as the origin lists them.

    Returns
    -------
    missing, chunks : int
        Both 0 for a grid that is not regular, or keys of another encoding.
    """
    shape, chunks = document["shape"], _chunk_shape(document)
    if chunks is None or len(chunks) != len(shape) or 0 in chunks:
        return 0, 0
    try:
        pattern, separator = _chunk_keys(document)
    except (LookupError, TypeError, ValueError, AttributeError, UnknownCodecError):
        # Refused, with the reason, where the layout is read, or by zarr.
        return 0, 0
    grid = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    found = 0
    # Some servers list a name twice, which must not make up for one that is absent.
    for key in set(keys):
        match = pattern.fullmatch(key)
        if match is not None:
            at = map(int, match[1].split(separator)) if shape else ()
            found += all(map(operator.lt, at, grid))
    return math.prod(grid) - found, math.prod(grid)


def _chunk_keys(document: Mapping[str, Any]) -> tuple[re.Pattern[str], str]:
    """Pattern of the keys of chunks, whose only group holds the position, and its separator."""
    prefix, separator = _key_encoding(document)
    n_axes = len(document["shape"])
    if separator not in ("/", "."):
        raise ValueError(f"its separator is {safe_repr(separator)}")
    if n_axes:
        name = f"{re.escape(prefix)}({re.escape(separator).join([_NUMBER] * n_axes)})"
    else:
        name = re.escape(prefix.rstrip("/.") or "0")
    return re.compile(name), separator


def _key_encoding(document: Mapping[str, Any]) -> tuple[str, Any]:
    """Prefix and separator of the keys of chunks."""
    if "chunk_key_encoding" not in document:
        return "", document.get("dimension_separator", ".")
    keys = document["chunk_key_encoding"]
    keys = {"name": keys} if isinstance(keys, str) else keys
    if keys["name"] not in ("default", "v2"):
        raise UnknownCodecError(str(keys["name"]))
    is_default = keys["name"] == "default"
    separator = (keys.get("configuration") or {}).get("separator", "/" if is_default else ".")
    return f"c{separator}" if is_default else "", separator


def _starts_of(key: str, layout: _Layout) -> tuple[int, ...] | None:
    """First point of a chunk along each axis; None if the key is not a chunk of the grid."""
    match = layout.chunk_key.fullmatch(key)
    if match is None:
        return None
    if not layout.shape:
        return ()
    starts = tuple(
        [
            int(part) * n
            for part, n in zip(match[1].split(layout.separator), layout.chunk.shape, strict=True)
        ]
    )
    return starts if all(map(operator.lt, starts, layout.shape)) else None


def _check_excess(layout: _Layout, url: str) -> None:
    """Refuse chunks that take far more memory than their array."""
    chunk, array_bytes = layout.chunk, math.prod(layout.shape) * layout.dtype.itemsize
    if chunk.nbytes > array_bytes:
        excess = chunk.peak_bytes * (chunk.nbytes - array_bytes) // chunk.nbytes
        if excess > _MAX_EXCESS_BYTES:
            raise SchemaError(
                f"{url} claims chunks of {chunk.nbytes} bytes (shape {list(chunk.shape)}), larger "
                f"than the array of {array_bytes}; decoding one takes {chunk.peak_bytes} bytes. "
                "They are refused; convert the store again with smaller chunks."
            )


def check_chunk_count(document: Mapping[str, Any], url: str) -> None:
    """Refuse an array with more chunks than zarr can list, for arrays that zarr itself reads.

    Raises
    ------
    SchemaError
    """
    chunk = _chunk_shape(document)
    if chunk is None or len(chunk) != len(document["shape"]) or 0 in chunk:
        return
    count = math.prod(-(-n // c) for n, c in zip(document["shape"], chunk, strict=True))
    if count > _MAX_CHUNKS_OF_ZARR:
        raise SchemaError(
            f"{url} claims {count} chunks of shape {chunk}; more than {_MAX_CHUNKS_OF_ZARR} are "
            "refused. Convert the store again with larger chunks."
        )


def check_metadata(document: object, url: str) -> None:
    """Refuse an array that is not of numbers, exceeds memory, or has a codec that runs code.

    Raises
    ------
    SchemaError
    """
    if not isinstance(document, dict) or not isinstance(document.get("shape"), list):
        raise SchemaError(f"{url} does not describe a Zarr array.")
    # A document without these two is read.
    kind, version = document.get("node_type", "array"), document.get("zarr_format")
    if kind != "array" or version not in (None, 3 if "data_type" in document else 2):
        raise SchemaError(
            f"{url} says node_type {safe_repr(kind)} and zarr_format {safe_repr(version)}; it does "
            "not describe a Zarr array."
        )
    if not all(type(n) is int and 0 <= n < _MAX_LENGTH for n in document["shape"]):
        raise SchemaError(
            f"{url} gives the shape {safe_repr(document['shape'])}; it has to be a list of lengths."
        )
    if len(document["shape"]) > _MAX_AXES:
        raise SchemaError(f"{url} gives {len(document['shape'])} axes; a charge density is 3-D.")
    chunks = document.get("chunks")
    if isinstance(chunks, list) and 0 in chunks and 0 not in document["shape"]:
        # zarr 3.4 would read the fill value instead of failing.
        raise SchemaError(f"{url} gives the chunks {safe_repr(chunks)}; each must be at least 1.")
    check_unpacked(document.get("attributes"), url)  # of v3; those of v2 are an object of their own
    _check_dtype(document, url)
    _check_sizes(document, url)
    _check_codecs(document, url)


def check_unpacked(attributes: object, url: str) -> None:
    """Refuse an array whose numbers are not its values, by the attributes of CF, as of xarray.

    Raises
    ------
    SchemaError
    """
    if not isinstance(attributes, dict):
        return
    packed = [
        name
        for name, neutral in (("scale_factor", 1), ("add_offset", 0))
        if attributes.get(name, neutral) != neutral
    ]
    if packed:
        raise SchemaError(
            f"{url} has the attribute {' and '.join(packed)} (packed values, as xarray writes them "
            "with an encoding). They are not unpacked here: write the store again without "
            "these."
        )


def _check_dtype(document: Mapping[str, Any], url: str) -> None:
    """Refuse values that are not real numbers."""
    name = document.get("dtype", document.get("data_type"))
    try:
        dtype = np.dtype("?!" if name is None else name)  # numpy takes None for float64
    except Exception as exc:  # numpy parses many forms, and raises as many errors
        raise SchemaError(
            f"{url} holds values of type {safe_repr(name)}; a charge density holds real numbers."
        ) from exc
    if dtype.kind not in _NUMBERS:
        what = {
            "c": "complex",
            "O": "objects",
            "U": "strings",
            "S": "strings",
            "V": "structured",
        }.get(dtype.kind, dtype.kind)
        raise SchemaError(
            f"{url} holds values of type {safe_repr(name)} ({what}); a charge density holds real "
            "numbers."
        )


def _check_sizes(document: Mapping[str, Any], url: str) -> None:
    """Refuse an array that exceeds memory, and chunks that are far larger than their array."""
    claimed, most = _claimed_bytes(document), most_bytes()
    if claimed > most:
        raise SchemaError(
            f"{url} claims {claimed} bytes (shape {document['shape']}); more than {most} are "
            "refused on this machine."
        )
    chunk = _chunk_shape(document)
    if chunk is not None and (nbytes := math.prod(chunk) * _dtype_of(document).itemsize) > (
        claimed + _MAX_EXCESS_BYTES
    ):
        raise SchemaError(
            f"{url} claims chunks of {nbytes} bytes (shape {chunk}), larger than the array of "
            f"{claimed}; they are refused. Convert the store again with smaller chunks."
        )


def _check_codecs(document: Mapping[str, Any], url: str) -> None:
    """Refuse codecs that make objects of the data."""
    try:
        used = {
            str(codec.get("id", codec.get("name"))).removeprefix("numcodecs.")
            for codec in _codecs(document)
        }
    except RecursionError:
        raise SchemaError(f"{url} is nested too deeply; convert the store again.") from None
    if used & _OBJECT_CODECS:
        raise SchemaError(
            f"{url} uses the codec {', '.join(used & _OBJECT_CODECS)}, which makes objects of the "
            "data; it is refused."
        )
    if "data_type" in document and _misreads(document.get("codecs")):
        raise SchemaError(
            f"{url} has a filter of numbers in the other byte order, which zarr {_zarr_version()} "
            "misreads. Convert the store again."
        )


def _misreads(codecs: Any, has_filter: bool = False) -> bool:
    """Whether a filter of v3 gets, or makes, numbers of the other byte order.

    In v3 only ``bytes`` decides about the order: no version of zarr reads back right what it wrote
    with such settings of a filter, and versions before 3.4 misread such ``bytes`` behind a filter.
    """
    for codec in codecs if isinstance(codecs, list) else ():
        settings = codec.get("configuration") if isinstance(codec, dict) else None
        if not isinstance(settings, dict):
            settings = {}
        name = codec.get("name") if isinstance(codec, dict) else codec
        if name == "sharding_indexed":
            return _misreads(settings.get("codecs"), has_filter)
        if name in ("bytes", "endian"):
            endian = settings.get("endian")
            other = "big" if sys.byteorder == "little" else "little"
            return has_filter and endian == other and _is_old_zarr()
        if name != "transpose":
            has_filter = True
            if any(map(_is_swapped, settings.values())):
                return True
    return False


def _is_swapped(setting: object) -> bool:
    """Whether a setting is a data type of the other byte order."""
    swapped = ">" if sys.byteorder == "little" else "<"
    return isinstance(setting, str) and setting.startswith(swapped)


def _zarr_version() -> str:
    return importlib.metadata.version("zarr")


def _is_old_zarr() -> bool:
    return tuple(map(int, _zarr_version().split(".")[:2])) < (3, 4)


def _claimed_bytes(document: Mapping[str, Any]) -> int:
    """Bytes of the decoded array, from metadata with a valid shape and type."""
    nbytes: int = math.prod(document["shape"]) * _dtype_of(document).itemsize
    return nbytes


def _dtype_of(document: Mapping[str, Any]) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(document.get("dtype", document.get("data_type")))
    return dtype


def _chunk_shape(document: Mapping[str, Any]) -> list[int] | None:
    """Points per chunk (or shard) along each axis; None if the metadata has no such list."""
    grid = document.get("chunk_grid")
    settings = grid.get("configuration") if isinstance(grid, dict) else None
    chunks = (
        document.get("chunks")
        if grid is None
        else settings.get("chunk_shape")
        if isinstance(settings, dict)
        else None
    )
    return (
        chunks
        if isinstance(chunks, list) and all(type(n) is int and 0 <= n < _MAX_LENGTH for n in chunks)
        else None
    )


def _codecs(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every codec of an array, those inside shards included."""
    found: list[dict[str, Any]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("id", value.get("name")), str):
                found.append(value)
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for key in ("compressor", "filters", "codecs"):
        walk(document.get(key))
    return found


def _fill(value: object, dtype: np.dtype[Any]) -> Any:
    """Convert a fill value to a number. Raises ValueError if its type cannot hold it."""
    number = value
    if value is None:
        return 0
    if isinstance(value, str) and dtype.kind == "f":
        number = _SPECIAL_FLOATS.get(value)
        if re.fullmatch(rf"0x[0-9a-fA-F]{{{2 * dtype.itemsize}}}", value):  # its bits
            return np.frombuffer(bytes.fromhex(value[2:]), dtype.newbyteorder(">"))[0]
    if not isinstance(number, int if dtype.kind in "biu" else (int, float)):
        raise ValueError(f"its fill value is {safe_repr(value)}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        raise ValueError(f"its fill value is {safe_repr(value)}")  # numpy 1.26 would wrap it
    np.full((), number, dtype)  # raises OverflowError: an integer beyond any float
    return number


def _layout(
    document: Mapping[str, Any],
    chunk: Chunk,
    dtype: np.dtype[Any],
) -> _Layout:
    shape, chunks = document["shape"], chunk.shape
    if len(shape) != len(chunks):
        raise ValueError(f"chunks of shape {safe_repr(list(chunks))} for {len(shape)} axes")
    pattern, separator = _chunk_keys(document)
    fill = _fill(document.get("fill_value"), dtype)
    return _Layout(tuple(shape), dtype, fill, chunk, pattern, separator)


def _v2(document: Mapping[str, Any]) -> _Layout:
    return _layout(document, Chunk.v2(document), np.dtype(document["dtype"]))


def _v3(document: Mapping[str, Any]) -> _Layout:
    grid = document["chunk_grid"]
    if grid["name"] != "regular" or document.get("storage_transformers"):
        raise UnknownCodecError(str(grid["name"]))
    for name in document.keys() - _V3_MEMBERS:
        # An extension may change the meaning of the chunks, unless it declares that it does not.
        extension = document[name]
        if not isinstance(extension, dict) or extension.get("must_understand") is not False:
            raise UnknownCodecError(str(name))
    _ = document["chunk_key_encoding"]
    dtype = np.dtype(document["data_type"])
    chunk = Chunk.v3(grid["configuration"]["chunk_shape"], dtype, document["codecs"])
    return _layout(document, chunk, dtype)
