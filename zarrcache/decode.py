"""From the objects of one Zarr array to a numpy array, while they arrive.

Plain arrays (regular grid, C order, at most one of the usual codecs, no filters, no shards) are decoded here: 343 blosc chunks take
16 ms this way and 109 ms through zarr's pipeline, which spends the rest on scheduling.  Everything else goes through zarr itself.
``tests/unit/test_decode.py`` holds the two to the same values for any shape, chunking and codec.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Buffer

from zarrcache.errors import IncompleteArrayError, SchemaError

__all__ = ["DECODE_ERRORS", "MAX_ARRAY_BYTES", "ArrayDecoder", "check_metadata", "metadata_key"]

#: No density is this large (the largest of 122,689 is 601 MiB); a store that claims more is broken or hostile, and is refused before
#: anything is allocated.
MAX_ARRAY_BYTES = 64 * 1024**3

#: What codecs raise over damaged data: numcodecs' own RuntimeError, wrong lengths ValueError, gzip and bz2 OSError or EOFError; zlib and
#: lzma have an Exception of their own; a damaged zstd frame may ask for more memory than there is.
DECODE_ERRORS = (RuntimeError, ValueError, OSError, EOFError, MemoryError, zlib.error, lzma.LZMAError)
#: What comes of metadata with parts of the wrong type, or without them.
_NONSENSE = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)

_NUMBERS = "biuf"
#: Codecs of numcodecs that run code from the data.
_UNSAFE_CODECS = frozenset({"pickle"})
_V3_CODECS = {"zstd": "zstd", "gzip": "gzip", "numcodecs.zlib": "zlib"}
_SPECIAL_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class _Plain:
    """Layout of an array that is decoded here."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int | float | bool
    codec: Any  # a numcodecs codec; None for raw chunks
    chunk_key: re.Pattern[str]
    separator: str


def metadata_key(keys: Collection[str]) -> str | None:
    """The key of the document that describes the array: ``zarr.json`` (v3) before ``.zarray`` (v2), as zarr looks for them."""
    return next((name for name in ("zarr.json", ".zarray") if name in keys), None)


class ArrayDecoder:
    """Collects the objects of one array and decodes what it can at once.

    Parameters
    ----------
    keys : collection of str
        What the origin lists below the array, relative to it. A grid chunk that is not listed has the fill value.
    url_of : callable
        Full URL of a key, for messages.
    """

    def __init__(self, keys: Collection[str], url_of: Callable[[str], str]) -> None:
        self._keys = keys
        self._url_of = url_of
        self._metadata_key = metadata_key(keys)
        self._document: dict[str, Any] | None = None
        self._plain: _Plain | None = None
        self._out: np.ndarray[Any, np.dtype[Any]] | None = None
        self._kept: dict[str, Buffer] = {}

    def add(self, key: str, data: Buffer) -> None:
        """Take one object.

        Raises
        ------
        SchemaError
            The metadata describes an array that is not supported.
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
        """The whole array, C order, native byte order. Call after every listed key was added."""
        if self._document is None:
            raise SchemaError(f"{self._url_of('')} holds neither .zarray nor zarr.json; it is not a Zarr array.")
        if self._out is not None:
            return self._out
        return self._through_zarr()

    def _describe(self, data: Buffer) -> None:
        url = self._url_of(self._metadata_key or "")
        try:
            document = json.loads(bytes(data))
        except (ValueError, RecursionError) as exc:
            raise SchemaError(f"{url} is not JSON ({exc}); convert the store again.") from exc
        check_metadata(document, url)
        self._document = document
        try:
            plain = self._plain = _plain_v3(document) if self._metadata_key == "zarr.json" else _plain_v2(document)
        except _NONSENSE as exc:
            raise SchemaError(f"{url} does not describe a Zarr array ({exc}); convert the store again.") from exc
        except ValueError as exc:  # numcodecs.UnknownCodecError
            raise SchemaError(f"{url} uses a compressor that is not available here ({exc}).") from exc
        if plain is None:
            return
        grid = [-(-n // c) for n, c in zip(plain.shape, plain.chunks, strict=True)]
        listed = sum(self._position(key) is not None for key in self._keys)
        dtype = plain.dtype.newbyteorder("=")
        # The fill value is only written where a chunk is missing: touching 5 MB of fresh memory costs as much as decoding it.
        self._out = np.empty(plain.shape, dtype) if listed == math.prod(grid) else np.full(plain.shape, plain.fill, dtype)

    def _position(self, key: str) -> tuple[int, ...] | None:
        """Grid position of a chunk key, None for any other key."""
        plain = self._plain
        assert plain is not None
        match = plain.chunk_key.fullmatch(key)
        if match is None:
            return None
        position = tuple(int(part) for part in match[1].split(plain.separator))
        inside = all(i * c < n for i, c, n in zip(position, plain.chunks, plain.shape, strict=True))
        return position if inside else None

    def _decode(self, key: str, data: Buffer) -> None:
        plain, out = self._plain, self._out
        assert plain is not None
        assert out is not None
        position = self._position(key)
        if position is None:
            return
        try:
            raw = data if plain.codec is None else plain.codec.decode(data)
            chunk = np.frombuffer(memoryview(raw), plain.dtype).reshape(plain.chunks)
        except DECODE_ERRORS as exc:
            raise IncompleteArrayError(
                f"{self._url_of(key)} cannot be decoded ({exc}). The object is damaged at the origin: convert the store again."
            ) from exc
        starts = [i * c for i, c in zip(position, plain.chunks, strict=True)]
        target = out[tuple(slice(s, s + c) for s, c in zip(starts, plain.chunks, strict=True))]
        target[...] = chunk[tuple(slice(0, n) for n in target.shape)]

    def _through_zarr(self) -> np.ndarray[Any, np.dtype[Any]]:
        import zarr
        from zarr.core.buffer import default_buffer_prototype

        make = default_buffer_prototype().buffer.from_bytes
        store = zarr.storage.MemoryStore({f"a/{key}": make(bytes(data)) for key, data in self._kept.items()}, read_only=True)
        try:
            array = zarr.open_array(store=store, path="a", mode="r", zarr_format=3 if self._metadata_key == "zarr.json" else 2)
            values = np.asarray(array[...])
        except (*DECODE_ERRORS, *_NONSENSE) as exc:  # zarr wraps what codecs raise in no class of its own
            raise IncompleteArrayError(
                f"{self._url_of('')} cannot be decoded by zarr ({type(exc).__name__}: {exc}). Convert the store again."
            ) from exc
        return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def check_metadata(document: object, url: str) -> None:
    """Refuse an array that must not be decoded: not numbers, larger than :data:`MAX_ARRAY_BYTES`, or with a codec that runs code.

    Raises
    ------
    SchemaError
    """
    if not isinstance(document, dict) or not isinstance(document.get("shape"), list):
        raise SchemaError(f"{url} does not describe a Zarr array.")
    name = document.get("dtype", document.get("data_type"))
    if not all(isinstance(n, int) and n >= 0 for n in document["shape"]):
        raise SchemaError(f"{url} gives the shape {document['shape']!r}; it has to be a list of lengths.")
    chunks = document.get("chunks")
    if isinstance(chunks, list) and 0 in chunks and 0 not in document["shape"]:
        raise SchemaError(f"{url} gives the chunks {chunks!r}; each has to have a point at least.")  # zarr 3.4 would read the fill value
    try:
        dtype = np.dtype("?!" if name is None else name)  # numpy takes None for float64
    except (TypeError, ValueError, KeyError):
        raise SchemaError(f"{url} holds values of type {name!r}; a charge density holds real numbers.") from None
    if dtype.kind not in _NUMBERS:
        what = {"c": "complex", "O": "objects", "U": "strings", "S": "strings", "V": "structured"}.get(dtype.kind, dtype.kind)
        raise SchemaError(f"{url} holds values of type {name!r} ({what}); a charge density holds real numbers.")
    claimed = math.prod(document["shape"]) * dtype.itemsize
    if claimed > MAX_ARRAY_BYTES:
        raise SchemaError(f"{url} claims {claimed} bytes (shape {document['shape']}); more than {MAX_ARRAY_BYTES} are refused.")
    used = {str(codec.get("id", codec.get("name"))).removeprefix("numcodecs.") for codec in _codecs(document)}
    if used & _UNSAFE_CODECS:
        raise SchemaError(f"{url} uses the codec {', '.join(used & _UNSAFE_CODECS)}, which runs code from the data; it is refused.")


def _codecs(document: Any) -> list[dict[str, Any]]:
    """Every codec mentioned anywhere in a metadata document, those inside shards too."""
    found: list[dict[str, Any]] = []
    if isinstance(document, dict):
        if isinstance(document.get("id", document.get("name")), str):
            found.append(document)
        for value in document.values():
            found += _codecs(value)
    elif isinstance(document, list):
        for value in document:
            found += _codecs(value)
    return found


def _fill(value: object, dtype: np.dtype[Any]) -> int | float | bool | None:
    """A fill value as a number; None where only zarr knows what it means."""
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
    shape: Sequence[int], chunks: Sequence[Any], dtype: np.dtype[Any], fill: object, codec: Any, prefix: str, separator: str
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
    return _Plain(tuple(shape), tuple(chunks), dtype, value, codec, pattern, separator)


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
    grid, keys, codecs = document.get("chunk_grid", {}), document.get("chunk_key_encoding", {}), document.get("codecs", [])
    if (
        grid.get("name") != "regular"
        or keys.get("name") not in ("default", "v2")
        or document.get("storage_transformers")
        or not 1 <= len(codecs) <= 2
    ):
        return None
    if codecs[0].get("name") != "bytes" or (len(codecs) == 2 and codecs[1].get("name") not in (*_V3_CODECS, "blosc")):
        return None
    endian = codecs[0].get("configuration", {}).get("endian", "little")
    dtype = np.dtype(document["data_type"]).newbyteorder(">" if endian == "big" else "<")
    default = keys["name"] == "default"
    separator = keys.get("configuration", {}).get("separator", "/" if default else ".")
    codec = None
    if len(codecs) == 2:
        # Decoding needs no parameters: blosc, zstd and gzip frames describe themselves.
        codec = _numcodec({"id": _V3_CODECS.get(codecs[1]["name"], codecs[1]["name"])})
    return _layout(
        document["shape"],
        grid["configuration"]["chunk_shape"],
        dtype,
        document.get("fill_value"),
        codec,
        f"c{separator}" if default else "",
        separator,
    )


def _numcodec(configuration: Any) -> Any:
    import numcodecs

    return numcodecs.get_codec(dict(configuration))
