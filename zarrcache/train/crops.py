"""Crops and probes: samples of a part of each grid. Only this part is read."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zarrcache._units import whole_number
from zarrcache.arrays import lattice_volume
from zarrcache.disk import LazyGrid, LazyStack
from zarrcache.errors import ConfigError, SchemaError

__all__ = ["LazyPair", "Probes", "RandomCrop", "Selection", "copy_rotated", "times"]

#: Makes an array of a shape and dtype, with undefined values.
Empty: TypeAlias = Callable[[Sequence[int], Any], NDArray[Any]]
#: Bytes of a slab that `copy_rotated` reads at a time: so many that the slab stays in the CPU's L2
#: cache. Where the copy jumps by whole planes, fewer are faster.
_SLAB_BYTES, _SMALL_SLAB_BYTES = 400 << 10, 100 << 10


@dataclass(frozen=True, slots=True)
class Points:
    """The places of the points of a downsampled grid in the cell.

    Attributes
    ----------
    whole : (nx, ny, nz)
        Points of the grid as it was read, which fill the cell.
    step : int
        Every `step`-th point is kept.
    shape : (nx, ny, nz)
        Points that are kept. Downsampling may have cut the grid to a multiple before.
    """

    whole: tuple[int, ...]
    step: int
    shape: tuple[int, ...]

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each axis, whether the last point is as far from the first as from its neighbour."""
        return tuple(n == self.step * m for n, m in zip(self.whole, self.shape, strict=True))

    def ratios(self, finer: Points) -> tuple[int, ...] | None:
        """Steps of a finer grid per step of this grid, along each axis; None if not whole."""
        ratios = []
        for n, m, n_finer, m_finer in zip(
            self.whole, self.shape, finer.whole, finer.shape, strict=True
        ):
            ratio, rest = divmod(m_finer, max(m, 1))
            if rest or not ratio or self.step * n_finer != ratio * finer.step * n:
                return None
            ratios.append(ratio)
        return tuple(ratios)

    def __str__(self) -> str:
        every = f" (every {_ordinal(self.step)} of {times(self.whole)})" if self.step > 1 else ""
        return f"{times(self.shape)} points{every}"


@dataclass(frozen=True, slots=True)
class LazyPair:
    """The grids of a sample, rotated and downsampled as views; no values have been read yet.

    Attributes
    ----------
    data, label : LazyGrid or LazyStack
        Shape (channels, nx, ny, nz). ``data[index]`` reads what it returns, an array of float32.
    points : (Points, Points)
        Where the points of data and label are.
    name : str
        The sample, for messages: its task id.
    structure : mapping or None
        The pymatgen dict, if `Selection.needs_structure`.
    empty : callable
        ``empty(shape, dtype)`` makes an array like ``numpy.empty``, in memory that reaches the
        training process without a copy.
    """

    data: LazyGrid | LazyStack
    label: LazyGrid | LazyStack
    points: tuple[Points, Points]
    name: str
    structure: Mapping[str, Any] | None = None
    empty: Empty = np.empty


class Selection(ABC):
    """Chooses the part of each sample that is read. Give an instance as ``transform=``.

    For the built-in ones see `RandomCrop` and `Probes`; a subclass defines ``select``. It has to be
    picklable where DataLoader workers are spawned.
    """

    #: Whether `LazyPair.structure` is read.
    needs_structure: bool = False
    #: Why the grids must not be rotated (``augmentation=True``); None if they may.
    never_rotated: ClassVar[str | None] = None

    @abstractmethod
    def select(self, pair: LazyPair, rng: np.random.Generator) -> Mapping[str, Any]:
        """The sample: arrays ``data`` and ``label`` of float32, and other arrays by other names.

        Parameters
        ----------
        pair : LazyPair
        rng : numpy.random.Generator
            Of this sample and draw; seeded as rotations are.
        """

    def misfit(self, data: Points, label: Points) -> str | None:
        """Why grids of these points cannot be used; None if they can."""
        return None


class RandomCrop(Selection):
    """The values of a window at a random place, the same in data and label.

    >>> train = ZarrDataset(reader, "train", transform=RandomCrop(32), augmentation=True)

    Only the pages of the cached entries that the window touches are read. The grid is periodic, as
    the crystal is: a window may begin near one face of the cell and end behind the opposite one.
    Every place has the same probability.

    Parameters
    ----------
    size : int or (int, int, int)
        Points per axis of the sample's ``data``, after rotation and downsampling. Where each axis
        of the label has a whole multiple of the data's points (``downsample_data=2`` and
        ``downsample_label=1``, for example), the label's window covers the same part of the cell,
        with that multiple of points.

    Raises
    ------
    ConfigError
        ``size`` is not positive, or exceeds a grid of the dataset that is cached.
    SchemaError
        When a sample is read: a grid is smaller than ``size`` along an axis, or along one that a
        rotation can put in its place; or data and label do not match.

    Notes
    -----
    *Seed.* Places are drawn from the same seeds as rotations: see the Notes of `RhoData`. With
    ``rng="keyed"`` they do not change the rotations. With ``rng="torch"`` each place takes a number
    from torch's generator, so later rotations differ from those without crops.

    *Rotation.* The window is cut from the rotated grid, so the sample is, bit for bit,
    ``numpy.take`` of the rotated, downsampled grid with ``mode="wrap"``.

    *Downsampling.* Along an axis that downsampling cuts to a multiple, the points next to the cut
    are not evenly spaced, so windows do not wrap around there.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        given: Any = size
        is_several = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str)
        sizes = [*given] if is_several else [given] * 3
        if len(sizes) != 3:
            raise ConfigError(
                f"RandomCrop's size is {size!r}; it has to be a number of points or three of them."
            )
        nx, ny, nz = (whole_number("size of RandomCrop", n, least=1) for n in sizes)
        self.size: tuple[int, int, int] = nx, ny, nz

    def __repr__(self) -> str:
        return f"RandomCrop({self.size[0] if len(set(self.size)) == 1 else self.size})"

    def misfit(self, data: Points, label: Points) -> str | None:
        """Why grids of these points cannot be used; None if they can."""
        if any(n < size for n, size in zip(data.shape, self.size, strict=True)):
            return f"a window of {times(self.size)} does not fit in its grid of {data}"
        if data.ratios(label) is None:
            return (
                f"its data is on a grid of {data}, its label on one of {label}, which is not a "
                "whole multiple, so no window covers the same part of both"
            )
        return None

    def select(self, pair: LazyPair, rng: np.random.Generator) -> dict[str, Any]:
        """``data`` and ``label``, each of shape (channels, nx, ny, nz)."""
        data, label = pair.points
        start = [
            int(rng.integers(n if wraps else n - size + 1))
            for n, size, wraps in zip(data.shape, self.size, data.wraps, strict=True)
        ]
        ratios = data.ratios(label)
        assert ratios is not None  # `misfit`
        first, length = (
            [n * ratio for n, ratio in zip(of, ratios, strict=True)] for of in (start, self.size)
        )
        return {
            "data": window(pair.data, start, self.size, pair.empty),
            "label": window(pair.label, first, length, pair.empty),
        }


class Probes(Selection):
    """The values at ``k`` random points of the grid, with their coordinates and the structure.

    >>> train = ZarrDataset(reader, "train", transform=Probes(200), seed=1)

    For networks that predict a density at points from the atoms around them, such as ChargE3Net
    and DeepDFT. Only the pages of the cached entries that hold the points are read.

    A sample is a dict of

    * ``data``, ``label``: shape (channels, k), in the precision of the dataset;
    * ``frac``: shape (k, 3), float32, fractional coordinates in [0, 1): point (i, j, l) of the
      grid, counted from 0, is at ``(i / nx, j / ny, l / nz)``, as VASP writes them;
    * ``cart``: shape (k, 3), float32, the same points in angstrom, ``frac @ lattice``, computed in
      float64 and rounded once;
    * ``structure``: the pymatgen dict of the material;
    * ``index``: the task id.

    The points of a sample differ from each other, and all have the same probability.

    Parameters
    ----------
    k : int
    structure : bool
        Without it the sample has neither ``structure`` nor ``cart``, and the structure is not read.

    Raises
    ------
    ConfigError
        ``k`` is not positive or exceeds the points of a cached grid; data and label of a cached
        material are on different grids; or the dataset rotates (``augmentation=True``), which would
        turn the grid and not the structure.
    SchemaError
        When a sample is read: as above, or the material has no structure.

    Notes
    -----
    *Seed.* Points are drawn as rotations are: see the Notes of `RhoData`.

    *Downsampling.* With ``downsample_data`` and ``downsample_label`` the points are those of the
    grid that is left; their coordinates are right where it is cut to a multiple, too.
    """

    never_rotated = "its points have coordinates in the cell of the structure, which is not rotated"

    def __init__(self, k: int, *, structure: bool = True) -> None:
        self.k = whole_number("k of Probes", k, least=1)
        self.needs_structure = structure

    def __repr__(self) -> str:
        return f"Probes({self.k}{'' if self.needs_structure else ', structure=False'})"

    def misfit(self, data: Points, label: Points) -> str | None:
        """Why grids of these points cannot be used; None if they can."""
        n = math.prod(data.shape)
        if self.k > n:
            return f"its grid of {data} has fewer than {self.k} in all"
        if data.shape != label.shape or data.ratios(label) is None:
            return (
                f"its data is on a grid of {data}, its label on one of {label}, so they have "
                "no values at the same points"
            )
        return None

    def select(self, pair: LazyPair, rng: np.random.Generator) -> dict[str, Any]:
        """``data`` and ``label``, ``frac``, and with the structure ``cart``."""
        data, _ = pair.points
        flat = rng.choice(math.prod(data.shape), self.k, replace=False)
        index = np.unravel_index(flat, data.shape)
        frac = np.stack(index, axis=-1) * data.step / np.array(data.whole)
        found = {
            "data": pair.data[:, *index],
            "label": pair.label[:, *index],
            "frac": frac.astype(np.float32),
        }
        if pair.structure is not None:
            found["cart"] = (frac @ _lattice(pair.structure, pair.name)).astype(np.float32)
        return found


def window(
    grid: LazyGrid | LazyStack, start: Sequence[int], size: Sequence[int], empty: Empty = np.empty
) -> NDArray[np.float32]:
    """A window of a periodic grid (..., nx, ny, nz), as a new array.

    Parameters
    ----------
    start : (int, int, int)
        First point, within the grid.
    size : (int, int, int)
        At most the grid's.
    """
    if isinstance(grid, LazyStack):
        found = empty((*grid.shape[:-3], *size), np.float32)
        for channel, values in zip(grid.channels, found, strict=True):
            values[...] = window(channel, start, size)
        return found
    stored = grid.stored
    # What has to be decoded is copied once more; only the result has to be where `empty` puts it.
    make = empty if grid.stored_as is None else np.empty
    out = make((*stored.shape[:-3], *size), stored.dtype)
    axes = [
        _pieces(first, length, n)
        for first, length, n in zip(start, size, stored.shape[-3:], strict=True)
    ]
    for pieces in itertools.product(*axes):
        source, target = zip(*pieces, strict=True)
        copy_rotated(stored[..., *source], out[..., *target])
    return grid.decoded(out)


def _pieces(start: int, size: int, n: int) -> list[tuple[slice, slice]]:
    """A periodic range as slices of the grid, and of the window."""
    if start + size <= n:
        return [(slice(start, start + size), slice(size))]
    cut = n - start
    return [(slice(start, n), slice(cut)), (slice(size - cut), slice(cut, size))]


def copy_rotated(view: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy a view that `rotate` and `downsample` made into a C-contiguous array of its shape.

    The values are those of ``numpy.copyto(out, view)``, which reads memory in the order of ``out``:
    backwards, or in jumps of whole planes, where each value costs a cache miss. Here slabs are read
    in the order of memory, and rotated in the CPU's cache. For grids of 108 to 128 points per axis
    that takes 0.5 to 1 times as long, and 0.2 to 0.7 times for quarter turns about y, whose jumps
    also collide in the cache.
    """
    if view.ndim == 4:
        for channel, copied in zip(view, out, strict=True):
            copy_rotated(channel, copied)
        return
    steps = [abs(stride) for stride in view.strides]
    if view.ndim != 3 or view.nbytes < _SLAB_BYTES:
        np.copyto(out, view)
        return
    rows = steps.index(min(steps))
    if (rows == 2 and view.strides[2] > 0) or min(steps) > view.itemsize:
        # It copies whole rows; or the view skips points, and is small against what is read.
        np.copyto(out, view)
        return
    # Slabs are cut along an axis that is neither that of the rows in memory nor that of the result.
    axis = 1 if rows == 0 else 0
    limit = _SMALL_SLAB_BYTES if rows == 0 else _SLAB_BYTES
    width = max(1, min(limit * view.shape[axis] // view.nbytes, view.shape[axis]))
    # In the order of memory, and the way back
    order = sorted(range(3), key=lambda i: -steps[i])
    forwards = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in view.strides)
    slab_shape = [width if i == axis else view.shape[i] for i in order]
    slab = np.empty(slab_shape, view.dtype).transpose(np.argsort(order))
    for start in range(0, view.shape[axis], width):
        part = (slice(None),) * axis + (slice(start, start + width),)
        source = view[part]
        copied = slab[(slice(None),) * axis + (slice(source.shape[axis]),)]
        np.copyto(copied, source[forwards])
        np.copyto(out[part], copied[forwards])


def _lattice(structure: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    """The lattice vectors in angstrom, a row each."""
    try:
        lattice_volume(structure)
    except ValueError as exc:
        raise SchemaError(
            f"{name}: {exc}, so its probes have no coordinates in angstrom. Convert its store "
            "again, or use Probes(k, structure=False)."
        ) from exc
    return np.array(structure["lattice"]["matrix"], dtype=np.float64)


def times(shape: Sequence[int]) -> str:
    """``108 x 108 x 120``."""
    return " x ".join(map(str, shape))


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")
