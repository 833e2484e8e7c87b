"""Decode the bytes of a chunk with the usual codec chains of Zarr, with a bound for each step.

A chunk of a few bytes may claim, or be, gigabytes. Codecs do not use the size that the metadata
gives: numcodecs allocates what a header claims and decompresses streams to their end. So only
chains are decoded here in which the shape of the chunk gives the size of the data at each step. In
the direction of writing they are

* transpositions of the values, then their bytes, or a shard: an index, and chunks with a chain of
  their own;
* checksums (4 bytes more), shuffle and bitround (as many bytes);
* at most one compressor, and not of a shard. Its result has no exact size, but a bound: a quarter
  and 4 KiB more than its input;
* further checksums.

blosc, zstd and lz4 declare the decompressed size in their headers, which their libraries enforce;
streams (gzip, zlib, bz2, lzma) are read up to one byte past the limit.

Any other chain raises `UnknownCodecError`; zarr decodes it (:mod:`zarrcache.arrays.foreign`).
``tests/property/test_decode_parity.py`` compares the chains with zarr, and
``tests/faults/test_bombs.py`` their memory with the size of the array.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
#: Codecs whose result has the size of their input.
_SAME_SIZE = frozenset({"shuffle", "bitround"})
#: Room for what a compressor makes of data that it cannot compress.
_PACKED_SLACK = 4096
_NOT_WRITTEN = 2**64 - 1


class UnknownCodecError(Exception):
    """The chain has a codec whose output is not bounded here. The argument is its name."""


class _Step:
    """One codec of numcodecs, from bytes to bytes.

    ``nbytes`` is the size of the decoded data; or a bound of it, behind a compressor or a shard,
    where a compressor raises UnknownCodecError.
    """

    __slots__ = ("_claimed", "_stream", "codec", "encoded_bytes", "has_exact_size", "nbytes")

    def __init__(self, codec: Any, nbytes: int, is_exact: bool) -> None:
        self.codec, self.nbytes, self.has_exact_size = codec, nbytes, is_exact
        kind = codec.codec_id
        self._stream, self._claimed = STREAMS.get(kind), CLAIMED_BYTES.get(kind)
        if kind in _CHECKSUMS:
            self.encoded_bytes = nbytes + _CHECKSUM_BYTES
        elif kind in _SAME_SIZE:
            self.encoded_bytes = nbytes
        elif is_exact:
            self.encoded_bytes = nbytes + nbytes // 4 + _PACKED_SLACK
            self.has_exact_size = False
        else:
            raise UnknownCodecError(kind)

    def decode(self, data: Buffer, out: NDArray[Any] | None = None) -> Any:
        """Decode; if ``out`` is given, which has ``nbytes`` bytes, perhaps into ``out``.

        Raises
        ------
        ValueError
            The result would not have ``nbytes``. Damaged data raises what the codec raises.
        """
        view = memoryview(data).cast("B")
        if self._claimed is not None:
            claimed = self._claimed(view)
            if claimed is None:
                # zstd without a size: the library writes no more than fits, and has to fill it.
                out = np.empty(self.nbytes, np.uint8) if out is None else out
            elif claimed != self.nbytes:
                raise ValueError(
                    f"it would decompress to {claimed} bytes; its shape needs {self.nbytes}"
                )
            return self.codec.decode(data, out)
        if self._stream is not None:
            plain = self._stream(self.codec, data, self.nbytes)
            if len(plain) != self.nbytes:
                raise ValueError(f"it decompresses to {len(plain)} bytes instead of {self.nbytes}")
            return plain
        if self.has_exact_size and view.nbytes != self.encoded_bytes:
            raise ValueError(f"it has {view.nbytes} bytes instead of {self.encoded_bytes}")
        if view.nbytes < _CHECKSUM_BYTES and self.codec.codec_id in _CHECKSUMS:
            raise ValueError(f"{view.nbytes} bytes hold no checksum")
        return self.codec.decode(data)


class Chunk:
    """Decodes the chunks of an array, which have one shape and one chain of codecs.

    Parameters
    ----------
    shape : sequence of int
    dtype : dtype
        Of the values as they are stored.
    axes : sequence of int
        The order in which the axes are stored.
    shard : optional
        Decodes the result of the steps, if these are not the values yet.
    packers : sequence of numcodecs codecs
        From bytes to bytes, in the direction of writing.

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
        axes: Sequence[int],
        shard: _Shard | None = None,
        packers: Sequence[Any],
    ) -> None:
        if not all(type(n) is int and 0 < n < 2**63 for n in shape):
            raise ValueError(f"its chunks have the shape {safe_repr(shape)}")
        self.shape, self._dtype, self._shard = tuple(shape), dtype, shard
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._stored_shape = tuple([shape[axis] for axis in axes])
        self._inverse = tuple(int(axis) for axis in np.argsort(axes))
        is_transposed = list(axes) != sorted(axes)
        self._is_transposed_shard = shard is not None and is_transposed
        self.encoded_bytes = self.nbytes if shard is None else shard.encoded_bytes
        self.has_exact_size = shard is None
        steps: list[_Step] = []
        for codec in packers:
            steps.append(_Step(codec, self.encoded_bytes, self.has_exact_size))
            self.encoded_bytes = steps[-1].encoded_bytes
            self.has_exact_size = steps[-1].has_exact_size
        self._steps = steps[::-1]
        self.peak_bytes = self.nbytes * (1 + (len(steps) > 1 or self._is_transposed_shard))
        # Whether a chunk may be decompressed where its values belong.
        self._is_direct = (
            len(steps) == 1
            and shard is None
            and not is_transposed
            and dtype.isnative
            and steps[0].codec.codec_id in CLAIMED_BYTES
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
        for step in self._steps:
            data = step.decode(data)
        if self._shard is not None and not self._is_transposed_shard:
            self._shard.write(data, target, fill)
            return
        if self._shard is not None:
            values = np.empty(self._stored_shape, self._dtype)
            self._shard.write(data, values, fill)
        else:
            values = np.frombuffer(memoryview(data), self._dtype).reshape(self._stored_shape)
        values = values.transpose(self._inverse)
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
        shape, order = document["chunks"], document["order"]
        if order not in ("C", "F"):
            raise ValueError(f"its order is {safe_repr(order)}")
        compressor = document.get("compressor")
        configurations = [
            *(document.get("filters") or ()),
            *([] if compressor is None else [compressor]),
        ]
        return cls(
            shape,
            np.dtype(document["dtype"]),
            axes=range(len(shape))[:: 1 if order == "C" else -1],
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
        axes, shard = list(range(len(shape))), None
        while rest:
            name, settings = rest.pop(0)
            if name in ("bytes", "endian"):
                endian = settings.get("endian")
                if endian not in ("little", "big", None):
                    raise ValueError(f"its endian is {safe_repr(endian)}")
                # numpy takes no notice of the order for types of one byte
                dtype = dtype.newbyteorder(">" if endian == "big" else "<")
                break
            if name == "sharding_indexed":
                shard = _Shard([shape[axis] for axis in axes], dtype, settings)
                break
            if name == "transpose":
                order = settings["order"]
                if not isinstance(order, list) or sorted(order) != list(range(len(shape))):
                    raise ValueError(
                        f"it transposes {len(shape)} axes in the order {safe_repr(order)}"
                    )
                axes = [axes[axis] for axis in order]
            elif name != f"{_NUMCODECS}bitround":  # which changes nothing when it is read
                raise UnknownCodecError(name)
        else:
            raise ValueError("no codec makes bytes of its values")
        packers = [_v3_packer(name, settings, dtype) for name, settings in rest]
        return cls(shape, dtype, axes=axes, shard=shard, packers=packers)


class _Shard:
    """Many chunks in one object, found by its index: 64-bit (offset, length) of each."""

    def __init__(
        self, shape: Sequence[int], dtype: np.dtype[Any], settings: Mapping[str, Any]
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


# -- the steps of a chain ------------------------------------------------------------------------


def _numcodec(kind: str, settings: Mapping[str, Any]) -> Any:
    """Make a codec of numcodecs, one of those above."""
    if kind not in _SAME_SIZE | _CHECKSUMS | STREAMS.keys() | CLAIMED_BYTES.keys():
        raise UnknownCodecError(kind)
    import numcodecs

    if kind == "blosc":
        return single_threaded_blosc().from_config(
            {name: value for name, value in settings.items() if name != "id"}
        )
    codec = numcodecs.get_codec({**settings, "id": kind})
    if kind == "shuffle" and not (type(codec.elementsize) is int and codec.elementsize > 0):
        raise ValueError(f"it shuffles items of {safe_repr(codec.elementsize)} bytes")
    return codec


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
    """Name and settings of a codec in ``zarr.json``."""
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


def _v3_packer(name: str, settings: Mapping[str, Any], dtype: np.dtype[Any]) -> Any:
    """A bytes-to-bytes codec."""
    if name in _V3_COMPRESSORS:
        return _numcodec(name, {})
    if name == "crc32c":
        return _numcodec("crc32c", {"location": "end"})
    kind = name.removeprefix(_NUMCODECS)
    if kind == name or kind == "bitround":
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
    sizes = list(_zstd_frames(view))
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _zstd_frames(view: memoryview) -> Iterator[int | None]:
    """The size that each frame declares (RFC 8878, section 3.1).

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
        while at + 3 <= len(view):
            block = int.from_bytes(view[at : at + 3], "little")
            at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # one byte that repeats
            if block & 1:
                break
        at += 4 * (descriptor >> 2 & 1)
        yield declared if width else None


#: Codecs whose header declares the decompressed size, by numcodecs id: read that size. None: this
#: header declares none.
CLAIMED_BYTES: dict[str, Callable[[memoryview], int | None]] = {
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
}
