"""Encodings of a density on disk: float16, bfloat16, or rounded mantissas compressed by LZ4.

Each is a lossy encoding of float32 with a bound of its error that depends on the values alone::

    |decoded - value| <= relative_error * |value| + absolute_error

Encoding checks the bound for every value and gives up if one exceeds it, and if a value is NaN or
infinite: such a density is stored as float32. So whether a density is encoded, and every decoded
bit, depends on nothing but the density: not on the machine, the reader, or the state of a cache.

- ``float16``: IEEE 754 binary16, 11 significant bits, times a power of two (``scale``). Normalised
  densities are around 1e-5, where float16 itself has few bits left; scaled so that the largest
  value is just below 2**15, all values down to 2**-29 of the largest one have 11 bits.
- ``bfloat16``: the upper half of float32, 8 significant bits, rounded to nearest, ties to even.
- ``bits:N``: float32 whose mantissa is rounded to N bits (numcodecs' BitRound), in frames of Blosc
  (LZ4, bit shuffle). Without the shuffle LZ4 finds a factor of 1.2 at N = 12, with it 2.4.
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zarrcache import _pages
from zarrcache._keys import FLOAT32, mantissa_bits

__all__ = [
    "LazyGrid",
    "LazyStack",
    "StoredAs",
    "decode",
    "encode",
    "expected_bytes",
    "is_by_value",
    "is_known",
    "is_within",
    "stored_layout",
    "use_converter",
]

#: Values per step. Four passes over a step stay in the second-level cache.
_STEP = 2**17
#: Decoded bytes per frame of Blosc, which cannot hold 2 GiB.
_FRAME_BYTES = 2**26
_FRAME_HEADER = struct.Struct("<4xIII")  # of Blosc 1: decoded bytes, block size, encoded bytes
#: float16: significant bits, exponent of the smallest normal number and of the subnormals' step.
_BITS16, _NORMAL16, _STEP16 = 11, -14, -24
#: Largest exponent of a scaled value; the smallest scale whose products are normal float32, and
#: that of the largest float32.
_TOP, _MIN_SCALE, _MAX_SCALE = 15, -100, 113
#: Exponent by which the bits of a float16, in the place of those of a float32, are too small.
_BIAS = 112
#: Exponent of the step of float32's subnormal numbers.
_STEP32 = -149


@dataclass(frozen=True, slots=True)
class StoredAs:
    """The encoding of the payload of an entry.

    Attributes
    ----------
    encoding : str
        ``float16``, ``bfloat16`` or ``bits:N``.
    relative_error, absolute_error : float
        ``|decoded - value| <= relative_error * |value| + absolute_error``, checked when the entry
        was stored.
    scale : int
        float16 only: values are the stored numbers times ``2**scale``.
    """

    encoding: str
    relative_error: float
    absolute_error: float
    scale: int = 0


#: Writes stored float16, or bfloat16 as uint16, times two to the power of an integer into an array
#: of float32 faster than NumPy, or does nothing and returns False.
Converter: TypeAlias = Callable[[NDArray[Any], NDArray[np.float32], int], bool]
_converters: list[Converter] = []


def use_converter(converter: Converter) -> None:
    """Decode float16 and bfloat16 by ``converter`` from now on. The values are the same.

    For torch, which this package does not import.
    """
    _converters[:] = [converter]


def is_known(stored_as: StoredAs) -> bool:
    """Whether this version can decode it."""
    name, bits = stored_as.encoding, mantissa_bits(stored_as.encoding)
    return (
        (name == "float16" and _MIN_SCALE <= stored_as.scale <= _MAX_SCALE)
        or (name == "bfloat16" and stored_as.scale == 0)
        or (bits is not None and bits <= 22 and stored_as.scale == 0)
    )


def is_by_value(stored_as: StoredAs) -> bool:
    """Whether a value can be decoded without the others: float16 and bfloat16."""
    return mantissa_bits(stored_as.encoding) is None


@dataclass(frozen=True, slots=True)
class LazyGrid:
    """A density that reads and decodes only the values that are used.

    ``grid[index]`` takes what numpy takes; it returns a new array of float32, with the values of
    the whole decoded density.

    Attributes
    ----------
    stored : ndarray
        The values as they are stored, perhaps a view of a mapped entry.
    stored_as : StoredAs or None
        An encoding that `is_by_value`; None: they are the values.
    count : callable, optional
        Called with the bytes of each array that is returned.
    """

    stored: NDArray[Any]
    stored_as: StoredAs | None = None
    count: Callable[[int], object] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Points per axis."""
        return self.stored.shape

    def view(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> LazyGrid:
        """Return a grid of the same values, seen through the view that ``change`` returns."""
        return LazyGrid(change(self.stored), self.stored_as, self.count)

    def decoded(self, picked: NDArray[Any]) -> NDArray[np.float32]:
        """Stored values that were copied from `stored`, C-contiguous, as float32."""
        if self.stored_as is not None:
            picked = decode(self.stored_as, picked, picked.shape)
        if self.count is not None:
            self.count(picked.nbytes)
        return picked

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        return self.decoded(np.array(self.stored[index], order="C"))


@dataclass(frozen=True, slots=True)
class LazyStack:
    """Grids of one shape as one array with an axis more, the first one; read as `LazyGrid`.

    Attributes
    ----------
    channels : tuple of LazyGrid
    """

    channels: tuple[LazyGrid, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, and points per axis."""
        return (len(self.channels), *self.channels[0].shape)

    def view(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> LazyStack:
        """Like `LazyGrid.view`. ``change`` is called with each channel, and changes only the last
        three axes.
        """
        return LazyStack(tuple(channel.view(change) for channel in self.channels))

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """Return the values at an index. An index that begins with a number or a slice reads only
        these values; other indices read the whole array.
        """
        index = index if isinstance(index, tuple) else (index,)
        first = index[0] if index else ...
        if isinstance(first, (int, np.integer)) and not isinstance(first, bool):
            return self.channels[first].view(_with_axis)[0, *index[1:]]
        chosen = range(len(self.channels))[first] if isinstance(first, slice) else ()
        if not chosen:
            whole = np.stack([channel[...] for channel in self.channels])
            return np.asarray(whole[index], np.float32)
        part = slice(None), *index[1:]
        parts = [self.channels[number].view(_with_axis)[part] for number in chosen]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, _first_axis(self.shape, part))


def _with_axis(grid: NDArray[Any]) -> NDArray[Any]:
    return grid[np.newaxis]


def _first_axis(shape: tuple[int, ...], index: tuple[Any, ...]) -> int:
    """The place of the first axis of an array of this shape in ``array[index]``.

    Arrays of indices that are not side by side move their axes to the front.
    """
    shapes = [np.broadcast_to(np.uint8(0), (n, *shape[1:]))[index].shape for n in (1, 2)]
    return next(axis for axis, pair in enumerate(zip(*shapes, strict=True)) if len({*pair}) > 1)


def stored_layout(
    stored_as: StoredAs, shape: tuple[int, ...], nbytes: int
) -> tuple[str, tuple[int, ...]]:
    """NumPy's type string and the shape of the payload as it is stored."""
    if mantissa_bits(stored_as.encoding) is not None:
        return "|u1", (nbytes,)
    return ("<f2" if stored_as.encoding == "float16" else "<u2"), shape


def expected_bytes(decoded_bytes: int, encoding: str) -> int:
    """Bytes of the payload of a density of ``decoded_bytes`` in float32.

    With ``bits:N`` without what the compression finds beyond the dropped bits: an upper bound of
    real densities, which need about four fifths of it.
    """
    if encoding == FLOAT32:
        return decoded_bytes
    kept = mantissa_bits(encoding)
    # Of 32 bits, the sign, eight of the exponent and the kept ones.
    return decoded_bytes // 2 if kept is None else decoded_bytes * (9 + kept) // 32


def encode(values: NDArray[np.float32], encoding: str) -> tuple[StoredAs, NDArray[Any]] | None:
    """Encode finite values, C-contiguous, and check the error bound.

    Returns
    -------
    StoredAs, ndarray or None
        The payload. None: the encoding cannot hold a value within its bound, or one is not finite.
    """
    largest, smallest = _magnitudes(values)
    if not math.isfinite(largest):
        return None
    bits = mantissa_bits(encoding)
    with np.errstate(over="ignore", under="ignore"):
        if encoding == "float16":
            scale = _scale_of(largest, smallest)
            if scale < _MIN_SCALE:
                return None
            is_normal = smallest >= math.ldexp(1.0, _NORMAL16 + scale)
            stored_as = StoredAs(
                encoding,
                math.ldexp(1.0, -_BITS16),
                0.0 if is_normal else math.ldexp(1.0, _STEP16 - 1 + scale),
                scale,
            )
            factor = np.float32(math.ldexp(1.0, -scale))
            payload: NDArray[Any] = (values * factor if scale else values).astype("<f2")
        else:
            kept = 7 if bits is None else bits
            stored_as = StoredAs(
                encoding,
                math.ldexp(1.0, -1 - kept),
                # Only float32's own subnormal numbers need it.
                math.ldexp(1.0, _STEP32 + 22 - kept) if smallest < 2.0**-126 else 0.0,
            )
            payload = _upper_halves(values) if bits is None else _frames(values, bits)
        decoded = decode(stored_as, payload, values.shape)
        return (stored_as, payload) if is_within(stored_as, values, decoded) else None


def decode(
    stored_as: StoredAs, payload: NDArray[Any], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The values of a payload, as a new array.

    Raises
    ------
    ValueError
        The payload does not decode to ``shape``.
    """
    out = _pages.empty(shape, np.float32)
    flat = out.reshape(-1)
    if not is_by_value(stored_as):
        _from_frames(payload, flat)
        return out
    halves = payload.reshape(-1)
    if _converters and _converters[0](halves, flat, stored_as.scale):
        return out
    if stored_as.encoding == "float16":
        _from_float16(halves, stored_as, flat)
        return out
    bits = flat.view(np.uint32)
    for start in range(0, len(flat), _STEP):
        part = bits[start : start + _STEP]
        np.copyto(part, halves[start : start + _STEP])
        np.left_shift(part, 16, out=part)
    return out


@functools.cache
def single_threaded_blosc() -> Any:
    """The codec blosc, which works in the calling thread.

    In a process without memory for another thread, or with too many, c-blosc's pool of threads is
    half made, and from then on it hangs or returns wrong bytes without an error. One thread is not
    slower (108^3 points: 0.9 ms of CPU in one, 0.9 to 4.5 ms in two).
    """
    import numcodecs.blosc

    @contextlib.contextmanager
    def one_thread() -> Iterator[None]:
        # By default numcodecs uses threads if it is called from the main thread.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        others = numcodecs.blosc.use_threads
        numcodecs.blosc.use_threads = False
        try:
            yield
        finally:
            numcodecs.blosc.use_threads = others

    class SingleThreaded(numcodecs.blosc.Blosc):  # type: ignore[misc]
        def encode(self, buf: Any) -> Any:
            with one_thread():
                return super().encode(buf)

        def decode(self, buf: Any, out: Any = None) -> Any:
            with one_thread():
                return super().decode(buf, out)

    return SingleThreaded


def _magnitudes(values: NDArray[np.float32]) -> tuple[float, float]:
    """The largest magnitude, and the smallest that is not 0; NaN and infinity if there are any."""
    largest, smallest = 0.0, math.inf
    flat = values.reshape(-1)
    for start in range(0, len(flat), _STEP):
        part = np.abs(flat[start : start + _STEP])
        top, low = float(part.max()), float(part.min())
        if not math.isfinite(top):
            return math.inf, smallest
        if not low:
            part = part[part > 0]
            low = float(part.min()) if len(part) else math.inf
        largest, smallest = max(largest, top), min(smallest, low)
    return largest, smallest


def _scale_of(largest: float, smallest: float) -> int:
    """The power of two of float16: 0 if all values have 11 bits without it."""
    if largest <= 65504 and smallest >= math.ldexp(1.0, _NORMAL16):
        return 0
    return math.frexp(largest)[1] - _TOP


def _upper_halves(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to bfloat16. A value near the largest float32 becomes infinite."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype("<u2")


def _frames(values: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    from numcodecs import BitRound

    # At level 9 the blocks are larger than at 1, which finds 5 to 10 % more.
    blosc, rounding = single_threaded_blosc(), BitRound(bits)
    compress = blosc("lz4", 9, blosc.BITSHUFFLE)
    flat = values.reshape(-1)
    step = _FRAME_BYTES // flat.itemsize
    frames = [
        compress.encode(rounding.encode(flat[start : start + step]))
        for start in range(0, len(flat), step)
    ]
    return np.frombuffer(b"".join(frames), np.uint8)


def _from_frames(payload: NDArray[np.uint8], flat: NDArray[np.float32]) -> None:
    codec, start, at = single_threaded_blosc()(), 0, 0
    step = _FRAME_BYTES // flat.itemsize
    while start < len(flat):
        out = flat[start : start + step]
        if len(payload) - at < 16:
            raise ValueError("its last frame is cut")
        decoded_bytes, _, encoded_bytes = _FRAME_HEADER.unpack_from(payload.data, at)
        if decoded_bytes != out.nbytes or not 16 <= encoded_bytes <= len(payload) - at:
            raise ValueError("a frame has another length than it should")
        try:
            codec.decode(payload[at : at + encoded_bytes], out)
        except RuntimeError as exc:
            raise ValueError(str(exc)) from exc
        start, at = start + step, at + encoded_bytes
    if at != len(payload):
        raise ValueError("it goes on behind its last frame")


def _from_float16(
    halves: NDArray[np.float16], stored_as: StoredAs, flat: NDArray[np.float32]
) -> None:
    # NumPy converts float16 value by value, at a fifth of this speed. Moved to the place of
    # float32's exponent and mantissa, the bits are a float32 that is too small by 2**112.
    if stored_as.absolute_error or _BIAS + stored_as.scale > 127:
        # There are subnormal numbers. As such float32 they would be lost in a thread with
        # torch.set_flush_denormal(True).
        factor = np.float32(math.ldexp(1.0, stored_as.scale))
        for start in range(0, len(flat), _STEP):
            part = flat[start : start + _STEP]
            np.copyto(part, halves[start : start + _STEP])
            np.multiply(part, factor, out=part)
        return
    signed, bits = halves.view(np.int16), flat.view(np.int32)
    factor = np.float32(math.ldexp(1.0, _BIAS + stored_as.scale))
    mask = np.int32(-0x70000001)  # 0x8FFFFFFF: the sign was extended over three bits
    for start in range(0, len(flat), _STEP):
        words = bits[start : start + _STEP]
        np.copyto(words, signed[start : start + _STEP])
        np.left_shift(words, 13, out=words)
        np.bitwise_and(words, mask, out=words)
        floats = flat[start : start + _STEP]
        np.multiply(floats, factor, out=floats)


def is_within(
    stored_as: StoredAs, values: NDArray[np.float32], decoded: NDArray[np.float32]
) -> bool:
    """Whether every decoded value is within the error bound of the value that was encoded."""
    relative = np.float32(stored_as.relative_error)
    absolute = np.float32(stored_as.absolute_error)
    one, other = values.reshape(-1), decoded.reshape(-1)
    for start in range(0, len(one), _STEP):
        part = one[start : start + _STEP]
        error = other[start : start + _STEP] - part
        np.abs(error, out=error)
        error -= absolute
        if not (error <= relative * np.abs(part)).all():
            return False
    return True
