"""Decode the objects of one Zarr array into a numpy array as they arrive.

Plain arrays (regular grid, C order, at most one compressor, no filters, no shards) are decoded
here: 343 blosc chunks take 16 ms this way and 109 ms through zarr's pipeline, which spends the rest
on scheduling. Everything else goes through zarr itself. ``tests/property/test_decode_parity.py``
compares the two for any shape, chunking and codec.

A chunk of a few bytes may claim, or be, gigabytes. The size of a decoded chunk is known from the
metadata, but codecs do not use it: numcodecs allocates what a header claims and decompresses
streams to their end. blosc, zstd and lz4 declare the decompressed size in their headers, which
their libraries enforce; streams (gzip, zlib, bz2, lzma) are read up to one byte past the limit.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import operator
import re
import struct
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Buffer

from zarrcache._keys import safe_repr
from zarrcache._units import most_bytes, read_bounded
from zarrcache.errors import IncompleteArrayError, SchemaError

__all__ = [
    "CLAIMED_BYTES",
    "DECODE_ERRORS",
    "STREAMS",
    "V3_CODECS",
    "ArrayDecoder",
    "check_metadata",
    "metadata_key",
]

#: Compressors of zarr v3 that are decoded here, and their numcodecs ids. Chunks of all others are
#: decoded by zarr. To add one, register it with numcodecs, name it here, and give its limit in
#: ``CLAIMED_BYTES`` or ``STREAMS`` below; v2 has numcodecs ids and needs no entry here.
V3_CODECS = {"zstd": "zstd", "gzip": "gzip", "blosc": "blosc", "numcodecs.zlib": "zlib"}
#: zstd's largest block, and the excess allowed for a frame that does not declare its size.
_ZSTD_BLOCK, _ZSTD_SLACK = 128 * 1024, 32 * 1024**2
_SHARDS = "sharding_indexed"
_NOT_WRITTEN = 2**64 - 1
#: Largest document that describes an array; parsed it takes twenty times the memory.
_MAX_DOCUMENT_BYTES = 4 * 1024**2
#: A chunk may be larger than its array (all stores may have the same chunks), up to this.
_MAX_CHUNK_BYTES = 1024**3
#: Errors of codecs for damaged data: RuntimeError by numcodecs, ValueError for a wrong length,
#: OSError or EOFError by gzip and bz2, classes of their own by zlib and lzma, and MemoryError for a
#: zstd frame whose damaged header claims more memory than the machine has.
DECODE_ERRORS = (
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    zlib.error,
    lzma.LZMAError,
)
#: Errors caused by metadata with missing parts or parts of the wrong type.
_NONSENSE = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)

_NUMBERS = "biuf"
_MAX_AXES = 32
_CHUNK_KEY = re.compile(r"(?:^|[/.])[0-9]+$|^c$")
#: Codecs of numcodecs that make objects instead of numbers: pickle runs code from the data, and the
#: others take sizes from it.
_OBJECT_CODECS = frozenset(
    {"pickle", "json2", "msgpack2", "vlen-utf8", "vlen-bytes", "vlen-array", "categorize"}
)
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class _Plain:
    """Layout of a plain array."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int | float | bool
    codec: Any  # a numcodecs codec; None for raw chunks
    chunk_key: re.Pattern[str]
    separator: str
    chunk_bytes: int


def metadata_key(keys: Collection[str]) -> str | None:
    """Key of the metadata document: ``zarr.json`` (v3) before ``.zarray`` (v2), as in zarr."""
    return next((name for name in ("zarr.json", ".zarray") if name in keys), None)


class ArrayDecoder:
    """Collects the objects of one array, and decodes each chunk once the metadata is known.

    Parameters
    ----------
    keys : collection of str
        All keys that the origin lists below the array, relative to it. A chunk of the grid that is
        not listed has the fill value.
    url : str
        Full URL of the array, for messages.
    reserve : callable, optional
        Called with the array's size in bytes before that memory is allocated. It may wait.
    """

    def __init__(
        self,
        keys: Collection[str],
        url: str,
        reserve: Callable[[int], object] | None = None,
    ) -> None:
        self._keys = keys
        self._url = url
        self._reserve = reserve
        self._metadata_key = metadata_key(keys)
        self._document: dict[str, Any] | None = None
        self._plain: _Plain | None = None
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
            A chunk cannot be decoded.
        """
        if key == self._metadata_key:
            self._describe(data)
            if self._plain is not None:
                kept, self._kept = self._kept, {}
                for name, chunk in kept.items():
                    self._decode(name, chunk)
                return
        if self._plain is not None:
            self._decode(key, data)
        else:
            self._kept[key] = data

    def finish(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the array, C order, native byte order. Call after adding every listed key."""
        if self._document is None:
            raise SchemaError(
                f"{self._url} holds neither .zarray nor zarr.json; it is not a Zarr array."
            )
        if self._out is not None:
            return self._out
        return self._through_zarr()

    def _describe(self, data: Buffer) -> None:
        url = f"{self._url}/{self._metadata_key}"
        raw = memoryview(data)
        if raw.nbytes > _MAX_DOCUMENT_BYTES:
            raise SchemaError(
                f"{url} has {raw.nbytes} bytes, too many for the description of an array; convert "
                "the store again."
            )
        try:
            document = json.loads(bytes(raw))
        except (ValueError, RecursionError) as exc:
            raise SchemaError(f"{url} is not JSON ({exc}); convert the store again.") from exc
        check_metadata(document, url)
        self._document = document
        try:
            plain = self._plain = (
                _plain_v3(document) if self._metadata_key == "zarr.json" else _plain_v2(document)
            )
        except _NONSENSE as exc:
            raise SchemaError(
                f"{url} does not describe a Zarr array ({exc}); convert the store again."
            ) from exc
        except ValueError as exc:  # numcodecs.UnknownCodecError
            raise SchemaError(
                f"{url} uses a compressor that is not available here ({exc})."
            ) from exc
        if self._reserve is not None:
            self._reserve(_claimed_bytes(document))
        if plain is None:
            return
        grid = [-(-n // c) for n, c in zip(plain.shape, plain.chunks, strict=True)]
        self._starts = {
            key: starts for key in self._keys if (starts := _starts_of(key, plain)) is not None
        }
        dtype = plain.dtype.newbyteorder("=")
        # Write the fill value only where chunks are missing: first touching 5 MB of fresh memory
        # costs as much as decoding it.
        self._out = (
            np.empty(plain.shape, dtype)
            if len(self._starts) == math.prod(grid)
            else np.full(plain.shape, plain.fill, dtype)
        )

    def _decode(self, key: str, data: Buffer) -> None:
        plain, out, starts = self._plain, self._out, self._starts.get(key)
        if starts is None:
            return
        assert plain is not None
        assert out is not None
        try:
            raw: Any = (
                data if plain.codec is None else _decompress(plain.codec, data, plain.chunk_bytes)
            )
            chunk = np.frombuffer(raw, plain.dtype).reshape(plain.chunks)
        except DECODE_ERRORS as exc:
            raise IncompleteArrayError(
                f"{self._url}/{key} cannot be decoded ({exc}). The object is damaged at the "
                "origin: convert the store again."
            ) from exc
        target = out[
            tuple([slice(start, start + n) for start, n in zip(starts, plain.chunks, strict=True)])
        ]
        target[...] = (
            chunk
            if target.shape == plain.chunks
            else chunk[tuple([slice(n) for n in target.shape])]
        )

    def _through_zarr(self) -> np.ndarray[Any, np.dtype[Any]]:
        import zarr
        from zarr.buffer import default_buffer_prototype

        make = default_buffer_prototype().buffer.from_bytes
        store = zarr.storage.MemoryStore(
            {f"a/{key}": make(bytes(data)) for key, data in self._kept.items()}, read_only=True
        )
        try:
            self._check_expansion()
            array = zarr.open_array(
                store=store,
                path="a",
                mode="r",
                zarr_format=3 if self._metadata_key == "zarr.json" else 2,
            )
            values = np.asarray(array[...])
        except (*DECODE_ERRORS, *_NONSENSE) as exc:
            # zarr has no class of its own for errors of codecs.
            raise IncompleteArrayError(
                f"{self._url} cannot be decoded by zarr ({type(exc).__name__}: {exc}). "
                "Convert the store again."
            ) from exc
        return np.ascontiguousarray(values, values.dtype.newbyteorder("="))

    def _check_expansion(self) -> None:
        """Check every chunk's decompressed size: zarr itself has no limit."""
        document = self._document
        assert document is not None
        shape, itemsize = _chunk_shape(document), _dtype_of(document).itemsize
        if shape is None:
            return
        for key, data in self._kept.items():
            if key == self._metadata_key or not _CHUNK_KEY.search(key):
                continue
            if "codecs" in document:
                _check_chunk(document["codecs"], data, shape, itemsize)
            elif document.get("compressor") is not None:
                # Filters run after it and may change the item size, to 16 bytes at most.
                _check_size(
                    _numcodec(document["compressor"]),
                    data,
                    math.prod(shape) * max(itemsize, 16),
                )


def _check_chunk(
    codecs: Sequence[Mapping[str, Any]], data: Buffer, shape: Sequence[int], itemsize: int
) -> None:
    """Raise ValueError if a v3 chunk, or a chunk in a shard, decompresses to more than its shape.

    Parameters
    ----------
    codecs : sequence of mapping
        As in ``zarr.json``; decoding starts with the last.
    data : buffer
    shape : sequence of int
    itemsize : int
    """
    due = math.prod(shape) * itemsize
    rest = [dict(codec) for codec in codecs]
    while rest:
        codec = rest.pop()
        name = str(codec.get("name"))
        if name == _SHARDS:
            settings = codec["configuration"]
            inner = settings["chunk_shape"]
            for part in _parts_of(
                data, settings, math.prod(-(-n // c) for n, c in zip(shape, inner, strict=True))
            ):
                _check_chunk(settings["codecs"], part, inner, itemsize)
            return
        if name == "crc32c":
            data = memoryview(data).cast("B")[:-4]
        elif name in V3_CODECS:
            packed = _numcodec({"id": V3_CODECS[name]})
            if not any(str(inner.get("name")) in V3_CODECS for inner in rest):
                _check_size(packed, data, due)
                return
            # Another compressor follows: decompress its input, with room for its overhead.
            data = _decompress(packed, data, due + due // 8 + 1024)
        else:
            return


def _parts_of(data: Buffer, settings: Mapping[str, Any], count: int) -> list[memoryview]:
    """Slice a shard into its chunks by its index: 64-bit (offset, length), and a checksum."""
    if not {str(codec.get("name")) for codec in settings["index_codecs"]} <= {"bytes", "crc32c"}:
        raise ValueError("its shard index has codecs that zarr does not write")
    view, checksum = (
        memoryview(data).cast("B"),
        4 * any(codec.get("name") == "crc32c" for codec in settings["index_codecs"]),
    )
    big = any(
        (codec.get("configuration") or {}).get("endian") == "big"
        for codec in settings["index_codecs"]
    )
    length = 16 * count
    if len(view) < length + checksum:
        raise ValueError(f"a shard of {len(view)} bytes cannot hold an index of {length}")
    start = 0 if settings.get("index_location") == "start" else len(view) - length - checksum
    numbers = struct.unpack(f"{'>' if big else '<'}{2 * count}Q", view[start : start + length])
    return [
        view[at : at + size]
        for at, size in zip(numbers[::2], numbers[1::2], strict=True)
        if (at, size) != (_NOT_WRITTEN, _NOT_WRITTEN)
    ]


def _starts_of(key: str, plain: _Plain) -> tuple[int, ...] | None:
    """First point of a chunk along each axis; None if the key is not a chunk of the grid."""
    match = plain.chunk_key.fullmatch(key)
    if match is None:
        return None
    starts = tuple(
        [
            int(part) * n
            for part, n in zip(match[1].split(plain.separator), plain.chunks, strict=True)
        ]
    )
    return starts if all(map(operator.lt, starts, plain.shape)) else None


def check_metadata(document: object, url: str) -> None:
    """Refuse an array that is not of numbers, exceeds memory, or has a codec that runs code.

    Raises
    ------
    SchemaError
    """
    if not isinstance(document, dict) or not isinstance(document.get("shape"), list):
        raise SchemaError(f"{url} does not describe a Zarr array.")
    name = document.get("dtype", document.get("data_type"))
    if not all(isinstance(n, int) and n >= 0 for n in document["shape"]):
        raise SchemaError(
            f"{url} gives the shape {safe_repr(document['shape'])}; it has to be a list of lengths."
        )
    if len(document["shape"]) > _MAX_AXES:
        raise SchemaError(f"{url} gives {len(document['shape'])} axes; a charge density is 3-D.")
    chunks = document.get("chunks")
    if isinstance(chunks, list) and 0 in chunks and 0 not in document["shape"]:
        # zarr 3.4 would read the fill value instead of failing.
        raise SchemaError(f"{url} gives the chunks {safe_repr(chunks)}; each must be at least 1.")
    try:
        dtype = np.dtype("?!" if name is None else name)  # numpy takes None for float64
    except (TypeError, ValueError, KeyError, SyntaxError, RecursionError):
        raise SchemaError(
            f"{url} holds values of type {safe_repr(name)}; a charge density holds real numbers."
        ) from None
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
    claimed, most = _claimed_bytes(document), most_bytes()
    if claimed > most:
        raise SchemaError(
            f"{url} claims {claimed} bytes (shape {document['shape']}); more than {most} are "
            "refused on this machine."
        )
    chunk = _chunk_shape(document)
    if chunk is not None and (nbytes := math.prod(chunk) * dtype.itemsize) > max(
        claimed, _MAX_CHUNK_BYTES
    ):
        raise SchemaError(
            f"{url} claims chunks of {nbytes} bytes (shape {chunk}), larger than the array of "
            f"{claimed}; they are refused."
        )
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
        if isinstance(chunks, list) and all(isinstance(n, int) and n >= 0 for n in chunks)
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


def _fill(value: object, dtype: np.dtype[Any]) -> int | float | bool | None:
    """Convert a fill value to a number; None if only zarr can interpret it."""
    if value is None:
        return 0
    if isinstance(value, str):
        return _SPECIAL_FLOATS.get(value) if dtype.kind == "f" else None
    if not isinstance(value, int if dtype.kind in "biu" else (int, float)):
        return None
    try:
        np.full((), value, dtype)
    except OverflowError:
        return None
    return value


def _layout(
    shape: Sequence[int],
    chunks: Sequence[Any],
    dtype: np.dtype[Any],
    fill: object,
    codec: Any,
    prefix: str,
    separator: str,
) -> _Plain | None:
    value = _fill(fill, dtype)
    if (
        not shape
        or 0 in shape
        or len(shape) != len(chunks)
        or not all(isinstance(n, int) and n > 0 for n in chunks)
        or value is None
        or separator not in ("/", ".")
    ):
        return None
    number = r"(?:0|[1-9][0-9]*)"
    pattern = re.compile(f"{re.escape(prefix)}({re.escape(separator).join([number] * len(shape))})")
    return _Plain(
        tuple(shape),
        tuple(chunks),
        dtype,
        value,
        codec,
        pattern,
        separator,
        math.prod(chunks) * dtype.itemsize,
    )


def _plain_v2(document: dict[str, Any]) -> _Plain | None:
    if document.get("order") != "C" or document.get("filters"):
        return None
    return _layout(
        document["shape"],
        document.get("chunks", ()),
        np.dtype(document["dtype"]),
        document.get("fill_value"),
        None if document.get("compressor") is None else _numcodec(document["compressor"]),
        "",
        document.get("dimension_separator", "."),
    )


def _plain_v3(document: dict[str, Any]) -> _Plain | None:
    grid, keys, codecs = (
        document.get("chunk_grid", {}),
        document.get("chunk_key_encoding", {}),
        document.get("codecs", []),
    )
    if (
        grid.get("name") != "regular"
        or keys.get("name") not in ("default", "v2")
        or document.get("storage_transformers")
        or not 1 <= len(codecs) <= 2
    ):
        return None
    if codecs[0].get("name") != "bytes" or (
        len(codecs) == 2 and codecs[1].get("name") not in V3_CODECS
    ):
        return None
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    dtype = np.dtype(document["data_type"]).newbyteorder(">" if endian == "big" else "<")
    default = keys["name"] == "default"
    separator = keys.get("configuration", {}).get("separator", "/" if default else ".")
    codec = None
    if len(codecs) == 2:
        # Decoding needs no parameters: blosc, zstd and gzip frames describe themselves.
        codec = _numcodec({"id": V3_CODECS[codecs[1]["name"]]})
    return _layout(
        document["shape"],
        grid["configuration"]["chunk_shape"],
        dtype,
        document.get("fill_value"),
        codec,
        f"c{separator}" if default else "",
        separator,
    )


# -- decompression limits -----------------------------------------------------------------------


def _numcodec(configuration: Mapping[str, Any]) -> Any:
    """Make a codec of numcodecs."""
    import numcodecs

    return numcodecs.get_codec(dict(configuration))


def _decompress(codec: Any, data: Buffer, nbytes: int) -> Any:
    """Call ``codec.decode(data)`` if the result has at most ``nbytes``.

    Raises
    ------
    ValueError
        It would have more. Damaged data raises what the codec raises.
    """
    read = STREAMS.get(codec.codec_id)
    if read is not None:
        return read(codec, data, nbytes)
    _check_size(codec, data, nbytes)
    return codec.decode(data)


def _check_size(codec: Any, data: Buffer, nbytes: int) -> None:
    """Raise as :func:`_decompress` would, without a result. Codecs without a known bound pass."""
    kind = codec.codec_id
    if kind in STREAMS:  # a stream declares no size: decompress up to the limit
        STREAMS[kind](codec, data, nbytes)
    elif (
        kind in CLAIMED_BYTES
        and (claimed := CLAIMED_BYTES[kind](memoryview(data).cast("B"), nbytes)) > nbytes
    ):
        raise ValueError(f"it would decompress to {claimed} bytes; its shape needs {nbytes}")


def _zlib(codec: Any, data: Buffer, nbytes: int) -> bytes:
    stream = zlib.decompressobj()
    out = stream.decompress(data, nbytes + 1)
    if len(out) > nbytes:
        raise ValueError(f"it decompresses to more than {nbytes} bytes")
    if not stream.eof:
        raise zlib.error("incomplete or truncated stream")
    return out


def _lzma(codec: Any, data: Buffer, nbytes: int) -> bytes:
    with lzma.LZMAFile(io.BytesIO(data), format=codec.format, filters=codec.filters) as file:
        return read_bounded(file, nbytes)


def _gzip(codec: Any, data: Buffer, nbytes: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return read_bounded(file, nbytes)


def _bz2(codec: Any, data: Buffer, nbytes: int) -> bytes:
    with bz2.BZ2File(io.BytesIO(data)) as file:
        return read_bounded(file, nbytes)


#: Stream codecs by numcodecs id: decompress up to a limit.
STREAMS: dict[str, Callable[[Any, Buffer, int], bytes]] = {
    "zlib": _zlib,
    "gzip": _gzip,
    "bz2": _bz2,
    "lzma": _lzma,
}


def _blosc(view: memoryview, nbytes: int) -> int:
    return int.from_bytes(view[4:8], "little")


def _lz4(view: memoryview, nbytes: int) -> int:
    return int.from_bytes(view[:4], "little")


def _zstd(view: memoryview, nbytes: int) -> int:
    """Sum the declared sizes of all frames (RFC 8878, section 3.1).

    A frame that declares none counts with its whole blocks, if they are far beyond the limit.
    """
    declared, undeclared, at = 0, 0, 0
    while at + 6 <= len(view):
        magic = int.from_bytes(view[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
            at += 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            break  # not a frame; zstd refuses it
        descriptor = view[at + 4]
        is_single = descriptor >> 5 & 1
        size = (is_single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
        if size:
            declared += int.from_bytes(view[at : at + size], "little") + (256 if size == 2 else 0)
        at += size
        while at + 3 <= len(view):
            block = int.from_bytes(view[at : at + 3], "little")
            at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            undeclared += 0 if size else _ZSTD_BLOCK
            if block & 1:
                break
        at += 4 * (descriptor >> 2 & 1)
    return declared + (undeclared if undeclared > 2 * nbytes + _ZSTD_SLACK else 0)


#: Codecs whose header declares the decompressed size, by numcodecs id: read that size.
CLAIMED_BYTES: dict[str, Callable[[memoryview, int], int]] = {
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
}
