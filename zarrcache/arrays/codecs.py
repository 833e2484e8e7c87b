"""From the bytes of a chunk to its values: known codec chains of Zarr v2 and v3, each step bounded.

A chunk of a few bytes may claim, or be, gigabytes. Codecs do not use the size that the metadata
gives: numcodecs allocates what a header claims and decompresses streams to their end. Here the
chain is followed once in the direction of writing, from the shape of the chunk outwards, which
gives the size of the data after each step:

* numbers that a filter stores in another type: the number of values times the size of that type;
* a checksum: 4 bytes more; shuffle: as many; base64: four thirds;
* a compressor: at most a quarter and 4 KiB more. This is the only step whose size is not exact;
* a shard: its index, and at most its chunks.

Reading then goes backwards, and each step may make as many bytes as the next one needs. blosc,
zstd and lz4 declare the decompressed size in their headers, which their libraries enforce; streams
(gzip, zlib, bz2, lzma) are read up to one byte past the limit.

A chain with a codec that is not listed here raises `UnknownCodecError`; nothing is guessed.
``tests/property/test_decode_parity.py`` compares the chains with zarr, and
``tests/faults/test_bombs.py`` their memory with the size of the array.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from zarrcache._keys import safe_repr
from zarrcache._units import read_bounded
from zarrcache.disk import single_threaded_blosc

__all__ = ["Chunk", "UnknownCodecError"]

#: Compressors of v3, which are numcodecs ids too. Decoding them needs no parameters, because their
#: frames describe themselves.
_V3_COMPRESSORS = frozenset({"zstd", "gzip", "blosc"})
_NUMCODECS = "numcodecs."
_CHECKSUMS = frozenset({"crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3"})
_CHECKSUM_BYTES = 4
#: Filters that store numbers in another type, and the attributes with the two types.
_CASTS = {
    "delta": ("dtype", "astype"),
    "fixedscaleoffset": ("dtype", "astype"),
    "quantize": ("dtype", "astype"),
    "astype": ("decode_dtype", "encode_dtype"),
}
_FILTERS = frozenset({*_CASTS, "bitround", "packbits"})
#: Largest numbers: complex128. A type of a megabyte per number could exhaust memory.
_MAX_ITEM_BYTES = 16
#: Room for what a compressor makes of data that it cannot compress.
_PACKED_SLACK = 4096
#: Data that is compressed twice, or a compressed shard, has no exact size. It may take twice the
#: chunk's own bytes and this, and less where less suffices.
_INEXACT_ROOM = 48 * 1024**2
#: zstd's largest block, and the excess allowed for a frame that does not declare its size.
_ZSTD_BLOCK, _ZSTD_SLACK = 128 * 1024, 32 * 1024**2
_NOT_WRITTEN = 2**64 - 1


class UnknownCodecError(Exception):
    """The chain has a codec whose output is not bounded here. The argument is its name."""


class _Step:
    """One codec of numcodecs, from bytes to bytes.

    Parameters
    ----------
    codec : numcodecs codec
    nbytes : int
        Size of the decoded data.
    is_exact : bool
        False: it may be smaller.
    room : int
        Bound of the encoded data, if it has no exact size.
    """

    __slots__ = (
        "_claimed",
        "_stream",
        "codec",
        "encoded_bytes",
        "has_exact_size",
        "is_exact",
        "nbytes",
    )

    def __init__(self, codec: Any, nbytes: int, is_exact: bool, room: int) -> None:
        self.codec, self.nbytes, self.is_exact = codec, nbytes, is_exact
        self._stream, self._claimed = STREAMS.get(codec.codec_id), CLAIMED_BYTES.get(codec.codec_id)
        encoded = _encoded_bytes(codec, nbytes)
        self.has_exact_size = is_exact and encoded is not None
        self.encoded_bytes = (
            encoded if encoded is not None else min(nbytes + nbytes // 4 + _PACKED_SLACK, room)
        )

    def decode(self, data: Buffer, out: NDArray[Any] | None = None) -> Any:
        """Decode; with ``out``, which has ``nbytes`` bytes, perhaps into it.

        Raises
        ------
        ValueError
            The result would not have ``nbytes``. Damaged data raises what the codec raises.
        """
        if self._claimed is not None:
            view = memoryview(data).cast("B")
            claimed = self._claimed(view)
            if claimed is None and self.is_exact:
                # zstd without a size: the library writes no more than fits, and has to fill it.
                return self.codec.decode(
                    data, out=np.empty(self.nbytes, np.uint8) if out is None else out
                )
            if claimed is None:
                claimed = _zstd_bound(view)
                if claimed > 2 * self.nbytes + _ZSTD_SLACK:
                    raise ValueError(f"it may decompress to {claimed} bytes, not {self.nbytes}")
            elif claimed > self.nbytes or (self.is_exact and claimed != self.nbytes):
                raise ValueError(
                    f"it would decompress to {claimed} bytes; its shape needs {self.nbytes}"
                )
            return self.codec.decode(data, out if self.is_exact else None)
        if self._stream is not None:
            plain = self._stream(self.codec, data, self.nbytes)
            if self.is_exact and len(plain) != self.nbytes:
                raise ValueError(f"it decompresses to {len(plain)} bytes instead of {self.nbytes}")
            return plain
        size = memoryview(data).nbytes
        if self.has_exact_size and size != self.encoded_bytes:
            raise ValueError(f"it has {size} bytes instead of {self.encoded_bytes}")
        if size < _CHECKSUM_BYTES and self.codec.codec_id in _CHECKSUMS:
            raise ValueError(f"{size} bytes hold no checksum")
        return self.codec.decode(data)


class _Filter(Protocol):
    """An array-to-array codec of v3. ``shape`` and ``dtype`` are those of its result."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def decode(self, values: NDArray[Any]) -> NDArray[Any]: ...


class _Transpose:
    def __init__(self, order: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if not isinstance(order, list) or sorted(order) != list(range(len(shape))):
            raise ValueError(f"it transposes {len(shape)} axes in the order {safe_repr(order)}")
        self.shape, self.dtype = tuple([shape[axis] for axis in order]), dtype
        self._inverse = tuple(int(axis) for axis in np.argsort(order))

    def decode(self, values: NDArray[Any]) -> NDArray[Any]:
        return values.transpose(self._inverse)


class _NumberFilter:
    def __init__(self, codec: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.codec, self._decoded_shape = codec, shape
        self.shape, self.dtype = shape, dtype
        if codec.codec_id == "packbits":
            self.shape, self.dtype = (1 + -(-math.prod(shape) // 8),), np.dtype(np.uint8)
        elif codec.codec_id in _CASTS:
            _, stored = _types_of(codec)
            if codec.codec_id != "quantize":  # zarr keeps the type there
                self.dtype = stored

    def decode(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(self.codec.decode(values)).reshape(self._decoded_shape)


class Chunk:
    """Decodes the chunks of an array, which have one shape and one chain of codecs.

    Attributes
    ----------
    shape : tuple of int
    nbytes : int
        Size of the decoded values.
    encoded_bytes : int
        Size of the stored data, or a bound of it.
    has_exact_size : bool
        Whether ``encoded_bytes`` is exact.
    peak_bytes : int
        Largest sum of two consecutive results while a chunk is decoded.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        *,
        stored_dtype: np.dtype[Any],
        order: Any = "C",
        filters: Sequence[_Filter] = (),
        shard: _Shard | None = None,
        packers: Sequence[Any],
    ) -> None:
        if not all(type(n) is int and 0 < n < 2**63 for n in shape):
            raise ValueError(f"its chunks have the shape {safe_repr(shape)}")
        self.shape = tuple(shape)
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._filters, self._shard, self._order = filters, shard, order
        self._stored_shape = filters[-1].shape if filters else self.shape
        self._stored_dtype = stored_dtype
        raw_bytes = math.prod(self._stored_shape) * stored_dtype.itemsize
        room = 2 * self.nbytes + _INEXACT_ROOM
        if shard is not None:
            raw_bytes = min(shard.encoded_bytes, room)
        self.encoded_bytes: int = raw_bytes
        self.has_exact_size = shard is None
        self._steps = _steps(packers, raw_bytes, shard is None, room)
        self._reversed_steps = self._steps[::-1]
        made = [
            self.nbytes,
            *(math.prod(f.shape) * f.dtype.itemsize for f in filters),
            *(step.nbytes for step in self._steps),
        ]
        if not filters:
            del made[0]  # a view
        self.peak_bytes = max([a + b for a, b in itertools.pairwise(made)], default=self.nbytes)
        if self._steps:
            last = self._steps[-1]
            self.encoded_bytes, self.has_exact_size = last.encoded_bytes, last.has_exact_size
        # Whether a chunk may be decompressed where its values belong.
        self._is_direct = (
            len(self._steps) == 1
            and not filters
            and shard is None
            and order == "C"
            and stored_dtype.isnative
            and self._steps[0].codec.codec_id in CLAIMED_BYTES
        )

    def write(self, data: Buffer, target: NDArray[Any], fill: Any) -> None:
        """Decode one chunk into ``target``, which is smaller than the chunk at the array's edges.

        ``fill`` is the value of chunks that a shard does not hold.

        Raises
        ------
        Exception
            Any that a codec raises for damaged data, and ValueError if sizes are wrong.
        """
        is_whole = target.shape == self.shape
        if is_whole and self._is_direct and target.flags.c_contiguous:
            self._steps[0].decode(data, target.reshape(-1).view(np.uint8))
            return
        for step in self._reversed_steps:
            data = step.decode(data)
        if self._shard is not None:
            if not self._filters:
                self._shard.write(data, target, fill)
                return
            values = np.empty(self._stored_shape, self._stored_dtype)
            self._shard.write(data, values, fill)
        else:
            values = _values(data, self._stored_dtype).reshape(
                self._stored_shape, order=self._order
            )
        if self._filters:
            # Filters read numbers in their own byte order. Zarr before 3.4 leaves that of the chunk
            # and misreads what it wrote itself.
            values = values.astype(self._filters[-1].dtype, copy=False)
        for one in reversed(self._filters):
            values = one.decode(values)
        target[...] = values if is_whole else values[tuple([slice(n) for n in target.shape])]

    @classmethod
    def v2(cls, document: Mapping[str, Any]) -> Chunk:
        """The chunks of a v2 array.

        Raises
        ------
        UnknownCodecError
        ValueError, TypeError, LookupError
            The metadata makes no sense.
        """
        dtype, order = np.dtype(document["dtype"]), document["order"]
        if order not in ("C", "F"):
            raise ValueError(f"its order is {safe_repr(order)}")
        compressor = document.get("compressor")
        configurations = [
            *(document.get("filters") or ()),
            *([] if compressor is None else [compressor]),
        ]
        return cls(
            document["chunks"],
            dtype,
            stored_dtype=dtype,
            order=order,
            packers=[_v2_codec(configuration) for configuration in configurations],
        )

    @classmethod
    def v3(cls, shape: Sequence[int], dtype: np.dtype[Any], codecs: Sequence[Any]) -> Chunk:
        """The chunks of a v3 array, the chunks of a shard, or the index of a shard.

        Raises
        ------
        UnknownCodecError
        ValueError, TypeError, LookupError
            The metadata makes no sense.
        """
        rest = [_named(codec) for codec in codecs]
        filters: list[_Filter] = []
        stored_shape, stored_dtype = tuple(shape), dtype
        while rest:
            name, settings = rest.pop(0)
            if name in ("bytes", "endian"):
                endian = settings.get("endian")
                if endian not in ("little", "big", None):
                    raise ValueError(f"its endian is {safe_repr(endian)}")
                # numpy takes no notice of the order for types of one byte
                stored_dtype = stored_dtype.newbyteorder(">" if endian == "big" else "<")
                shard = None
                break
            if name == "sharding_indexed":
                shard = _Shard(stored_shape, stored_dtype, settings)
                break
            if name == "transpose":
                filters.append(_Transpose(settings["order"], stored_shape, stored_dtype))
            else:
                codec = _v3_filter(name, settings, stored_dtype)
                filters.append(_NumberFilter(codec, stored_shape, stored_dtype))
            stored_shape, stored_dtype = filters[-1].shape, filters[-1].dtype
        else:
            raise ValueError("no codec makes bytes of its values")
        return cls(
            shape,
            dtype,
            stored_dtype=stored_dtype,
            filters=filters,
            shard=shard,
            packers=[_v3_packer(name, settings, dtype) for name, settings in rest],
        )


class _Shard:
    """Many chunks in one object, found by its index: 64-bit (offset, length) of each."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], settings: Mapping[str, Any]
    ) -> None:
        inner = settings["chunk_shape"]
        if (
            len(inner) != len(shape)
            or not all(type(n) is int and n > 0 for n in inner)
            or any(n % m for n, m in zip(shape, inner, strict=True))
        ):
            raise ValueError(
                f"chunks of shape {safe_repr(inner)} do not fill a shard of {safe_repr(shape)}"
            )
        location = settings.get("index_location", "end")
        if location not in ("start", "end"):
            raise ValueError(f"the place of its index is {safe_repr(location)}")
        counts = [n // m for n, m in zip(shape, inner, strict=True)]
        self._is_at_start = location == "start"
        self._chunk = Chunk.v3(inner, dtype, settings["codecs"])
        index_codecs = settings.get("index_codecs", [{"name": "bytes"}, {"name": "crc32c"}])
        self._index = Chunk.v3([*counts, 2], np.dtype(np.uint64), index_codecs)
        if not self._index.has_exact_size:
            raise ValueError("the index of its shards has no fixed size")
        self.encoded_bytes: int = (
            self._index.encoded_bytes + math.prod(counts) * self._chunk.encoded_bytes
        )

    def write(self, data: Buffer, target: NDArray[Any], fill: Any) -> None:
        """Decode the chunks that lie in ``target``; the others hold ``fill``."""
        view = memoryview(data).cast("B")
        index_bytes = self._index.encoded_bytes
        if view.nbytes < index_bytes:
            raise ValueError(
                f"a shard of {view.nbytes} bytes cannot hold an index of {index_bytes}"
            )
        index = np.empty(self._index.shape, np.uint64)
        at = 0 if self._is_at_start else view.nbytes - index_bytes
        self._index.write(view[at : at + index_bytes], index, 0)
        is_written = (index != _NOT_WRITTEN).any(axis=-1)
        if not is_written.all():
            target[...] = fill
        for place in np.argwhere(is_written).tolist():
            starts = [i * n for i, n in zip(place, self._chunk.shape, strict=True)]
            if any(start >= n for start, n in zip(starts, target.shape, strict=True)):
                continue  # beyond the array's edge
            offset, length = index[tuple(place)].tolist()
            if offset + length > view.nbytes:
                raise ValueError(
                    f"its index places a chunk at {offset} to {offset + length} of {view.nbytes} "
                    "bytes"
                )
            part = target[
                tuple(
                    [
                        slice(start, start + n)
                        for start, n in zip(starts, self._chunk.shape, strict=True)
                    ]
                )
            ]
            self._chunk.write(view[offset : offset + length], part, fill)


def _values(data: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers in a buffer, or the same bytes of an array."""
    if isinstance(data, np.ndarray):
        return data.view(dtype).reshape(-1, order="A")
    return np.frombuffer(data, dtype)


# -- the steps of a chain ------------------------------------------------------------------------


def _steps(codecs: Sequence[Any], nbytes: int, is_exact: bool, room: int) -> list[_Step]:
    """The steps of codecs of numcodecs, in the direction of writing, from data of ``nbytes``."""
    steps: list[_Step] = []
    for codec in codecs:
        steps.append(_Step(codec, nbytes, is_exact, room))
        nbytes, is_exact = steps[-1].encoded_bytes, steps[-1].has_exact_size
    return steps


def _encoded_bytes(codec: Any, nbytes: int) -> int | None:
    """Size of what a codec makes of ``nbytes``; None for compressors."""
    kind = codec.codec_id
    if kind in _CHECKSUMS:
        return nbytes + _CHECKSUM_BYTES
    if kind in ("shuffle", "bitround"):
        return nbytes
    if kind == "base64":
        return -(-nbytes // 3) * 4
    if kind == "packbits":
        return 1 + -(-nbytes // 8)
    if kind in _CASTS:
        decoded, stored = _types_of(codec)
        return nbytes // decoded.itemsize * stored.itemsize
    return None


def _types_of(codec: Any) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """The types of the numbers before and after a filter."""
    decoded, stored = (getattr(codec, name) for name in _CASTS[codec.codec_id])
    for dtype in (decoded, stored):
        if dtype.kind not in "biufc" or dtype.itemsize > _MAX_ITEM_BYTES:
            raise ValueError(f"its codec {codec.codec_id} makes {safe_repr(str(dtype))}")
    return decoded, stored


def _numcodec(kind: str, settings: Mapping[str, Any]) -> Any:
    """Make a codec of numcodecs, one of those above."""
    if kind not in _FILTERS | _CHECKSUMS | STREAMS.keys() | CLAIMED_BYTES.keys() | _OTHERS:
        raise UnknownCodecError(kind)
    import numcodecs

    if kind == "blosc":
        return single_threaded_blosc().from_config(
            {name: value for name, value in settings.items() if name != "id"}
        )
    codec = numcodecs.get_codec({**settings, "id": kind})
    if kind == "fixedscaleoffset":
        for value in (codec.scale, codec.offset):
            # numpy would broadcast a list, to any size
            if type(value) not in (int, float):
                raise ValueError(f"it scales by {safe_repr(value)}")
    if kind == "shuffle" and not (type(codec.elementsize) is int and codec.elementsize > 0):
        raise ValueError(f"it shuffles items of {safe_repr(codec.elementsize)} bytes")
    return codec


_OTHERS = frozenset({"shuffle", "base64"})


def _v2_codec(configuration: Any) -> Any:
    if not isinstance(configuration, dict) or not isinstance(configuration.get("id"), str):
        raise ValueError(f"{safe_repr(configuration)} is not a codec")
    return _numcodec(configuration["id"], configuration)


#: Settings of codecs that are decoded here without numcodecs. An array with any other setting is
#: left to zarr, because it may change the meaning of the bytes.
_SETTINGS: dict[str, frozenset[str]] = {
    "bytes": frozenset({"endian"}),
    "endian": frozenset({"endian"}),
    "transpose": frozenset({"order"}),
    "sharding_indexed": frozenset({"chunk_shape", "codecs", "index_codecs", "index_location"}),
}


def _named(codec: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and settings of a codec in ``zarr.json``.

    Raises
    ------
    ValueError
        It is not a codec.
    UnknownCodecError
        It has a setting that is not known here.
    """
    if isinstance(codec, str):
        return codec, {}
    if not isinstance(codec, dict) or not isinstance(codec.get("name"), str):
        raise ValueError(f"{safe_repr(codec)} is not a codec")
    settings = codec.get("configuration")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"{safe_repr(codec)} is not a codec")
    known = _SETTINGS.get(codec["name"])
    if settings and known is not None and settings.keys() - known:
        raise UnknownCodecError(codec["name"])
    return codec["name"], settings or {}


def _v3_filter(name: str, settings: Mapping[str, Any], dtype: np.dtype[Any]) -> Any:
    """An array-to-array codec. Types that are not given are those of the array, as in zarr."""
    kind = name.removeprefix(_NUMCODECS)
    if kind == name or kind not in _FILTERS:
        raise UnknownCodecError(name)
    if kind in _CASTS:
        decoded = _CASTS[kind][0]
        if settings.get(decoded) is None:
            settings = {**settings, decoded: str(dtype)}
    return _numcodec(kind, settings)


def _v3_packer(name: str, settings: Mapping[str, Any], dtype: np.dtype[Any]) -> Any:
    """A bytes-to-bytes codec."""
    if name in _V3_COMPRESSORS:
        return _numcodec(name, {})
    if name == "crc32c":
        return _numcodec("crc32c", {"location": "end"})
    kind = name.removeprefix(_NUMCODECS)
    if kind == name or kind in _FILTERS:
        raise UnknownCodecError(name)
    if kind == "shuffle" and settings.get("elementsize") is None:
        settings = {**settings, "elementsize": dtype.itemsize}
    return _numcodec(kind, settings)


# -- decompression limits ------------------------------------------------------------------------


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


def _blosc(view: memoryview) -> int:
    # The library reads as many bytes as the header gives, whether they are there or not.
    if len(view) < 16 or int.from_bytes(view[12:16], "little") > len(view):
        raise ValueError(f"{len(view)} bytes are not a whole blosc buffer")
    return int.from_bytes(view[4:8], "little")


def _lz4(view: memoryview) -> int:
    return int.from_bytes(view[:4], "little")


def _zstd(view: memoryview) -> int | None:
    """Sum of the sizes that the frames declare; None if one declares none."""
    sizes = [size for size, _ in _zstd_frames(view)]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _zstd_bound(view: memoryview) -> int:
    """Bytes that the frames hold at most."""
    return sum(most if size is None else size for size, most in _zstd_frames(view))


def _zstd_frames(view: memoryview) -> Iterator[tuple[int | None, int]]:
    """Declared size and largest possible size of each frame (RFC 8878, section 3.1).

    Raises
    ------
    ValueError
        It is not a sequence of frames.
    """
    at = 0
    while at < len(view):
        magic = int.from_bytes(view[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a skippable frame
            at += 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528 or at + 6 > len(view):
            # Some builds of zstd also read frames of older formats, which declare nothing.
            raise ValueError("it is not a zstd frame")
        descriptor = view[at + 4]
        is_single = descriptor >> 5 & 1
        width = (is_single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
        declared = int.from_bytes(view[at : at + width], "little") + (256 if width == 2 else 0)
        at += width
        most = 0
        while at + 3 <= len(view):
            block = int.from_bytes(view[at : at + 3], "little")
            kind, size = block >> 1 & 3, block >> 3
            most += _ZSTD_BLOCK if kind == 2 else size
            at += 3 + (1 if kind == 1 else size)  # one byte that repeats
            if block & 1:
                break
        at += 4 * (descriptor >> 2 & 1)
        yield (declared if width else None), most


#: Codecs whose header declares the decompressed size, by numcodecs id: read that size. None: this
#: header declares none.
CLAIMED_BYTES: dict[str, Callable[[memoryview], int | None]] = {
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
}
