"""Convert a pair of grids to tensors: rotate, downsample, cast to the precision of a training.

The distribution of rotations is that of the original training code: one of three axes with equal
probability, then 0 quarter turns with probability 10 %, and 1, 2 and 3 quarter turns with 30 %
each.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from zarrcache import _pages
from zarrcache._units import whole_number
from zarrcache.disk import LazyGrid, LazyStack
from zarrcache.errors import ConfigError, SchemaError
from zarrcache.train.crops import LazyPair, Points, Selection, copy_rotated, times
from zarrcache.train.precision import Precision
from zarrcache.train.worker_transfer import SentTensor, empty_tensor

__all__ = [
    "Grid",
    "PairToTensors",
    "Rotation",
    "downsample",
    "draw_rotation",
    "kind_name",
    "rotate",
    "rotation_of",
]

logger = logging.getLogger(__name__)

Grid = NDArray[np.float32]

#: The plane that rotates about x, y and z. A quarter turn swaps its axes, then reverses the second.
_PLANES = ((-2, -1), (-3, -1), (-3, -2))
#: How a quarter turn may order the axes.
_ORIENTATIONS = (0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)


@dataclass(frozen=True, slots=True)
class Rotation:
    """A number of quarter turns about one axis.

    Attributes
    ----------
    axis : 0, 1 or 2
        The axis of ``(nx, ny, nz)`` that is fixed: x, y or z.
    turns : 0, 1, 2 or 3
    """

    axis: Literal[0, 1, 2]
    turns: Literal[0, 1, 2, 3]

    @property
    def plane(self) -> tuple[int, int]:
        """The two axes, counted from the end, that quarter turns swap."""
        return _PLANES[self.axis]

    @property
    def reversed_axes(self) -> tuple[int, ...]:
        """The axes to reverse, after an odd number of turns has swapped those of the plane."""
        first, second = self.plane
        return ((), (second,), (first, second), (first,))[self.turns]


def draw_rotation(*key: int) -> Rotation:
    """Draw the rotation of ``key``, one or more non-negative integers.

    The same key gives the same rotation on every machine. A function of a key was chosen over a
    generator with a state: no state has to survive fork, spawn and pickle, and processes with the
    same seed draw different rotations for different samples.
    """
    rng = np.random.default_rng(key)
    axis = int(rng.integers(3))
    return rotation_of(axis, rng.random())


def rotation_of(axis: int, r: float) -> Rotation:
    """The rotation that two uniform draws select: one of 0, 1 and 2, and a number in [0, 1)."""
    turns: Literal[0, 1, 2, 3] = 0 if r < 0.1 else 1 if r < 0.4 else 2 if r < 0.7 else 3
    return Rotation(axis=axis, turns=turns)  # type: ignore[arg-type]  # of the caller's three


def rotate(grid: Grid, rotation: Rotation) -> Grid:
    """Rotate the last three axes of ``grid``; returns a view.

    The values are those of ``numpy.rot90`` with ``k=-turns`` about the same axis.
    """
    first, second = rotation.plane
    if rotation.turns % 2:
        grid = grid.swapaxes(first, second)
    return np.flip(grid, rotation.reversed_axes) if rotation.turns else grid


def downsample(grid: Grid, step: int, *, multiple: int) -> Grid:
    """Crop the last three axes to a multiple of ``multiple``, then take every ``step``-th point.

    Returns a view. Data and label of a pair are both cropped to a multiple of the data's factor,
    so their grids stay matched.
    """
    nx, ny, nz = (n // multiple * multiple for n in grid.shape[-3:])
    return grid[..., :nx:step, :ny:step, :nz:step]


#: A tensor, and the array over the same memory.
_TensorAndGrid: TypeAlias = tuple[torch.Tensor, NDArray[Any]]


class PairToTensors:
    """Rotates, downsamples and casts a pair of grids."""

    def __init__(
        self,
        downsample_data: int,
        downsample_label: int,
        augmentation: bool,
        seed: int | None,
        dtype: torch.dtype,
        rng: Literal["keyed", "torch"] = "keyed",
        layout: Literal["C", "rotated"] = "C",
        *,
        is_deferred: bool = False,
    ) -> None:
        self.rng, self.layout, self.is_deferred = rng, layout, is_deferred
        self.downsample_data = whole_number("downsample_data", downsample_data, least=1)
        self.downsample_label = whole_number("downsample_label", downsample_label, least=1)
        if augmentation not in (True, False, None):  # "no" would rotate
            raise ConfigError(f"augmentation is {augmentation!r}; it has to be true or false.")
        self.augmentation = bool(augmentation)
        self.seed = None if seed is None else whole_number("seed", seed, least=0)
        self.dtype = dtype
        self.drawn = 0
        self._precision = Precision()

    def __call__(
        self, data: Grid, label: Grid, index: int, *, name: str
    ) -> tuple[_TensorAndGrid, _TensorAndGrid, Rotation | None]:
        """Return the tensors, and the rotation if `on_device` has to apply it."""
        names = f"data of {name}", f"label of {name}"
        rotation = Rotation(0, 0)
        if self.augmentation:
            rotation, _ = self._draw(index)
        if self.is_deferred:
            sides = [self._whole(grid, k, names[k]) for k, grid in enumerate((data, label))]
            return sides[0], sides[1], rotation
        if self.augmentation:
            data, label = rotate(data, rotation), rotate(label, rotation)
            if self.layout == "rotated" and rotation.turns % 2:
                first, second = rotation.plane
                x, x_grid = self._tensor(data.swapaxes(first, second), 0, names[0])
                y, y_grid = self._tensor(label.swapaxes(first, second), 1, names[1])
                x, y = x.transpose(first, second), y.transpose(first, second)
                return (x, x_grid), (y, y_grid), None
        return self._tensor(data, 0, names[0]), self._tensor(label, 1, names[1]), None

    def _draw(self, index: int) -> tuple[Rotation, tuple[int, ...]]:
        """Draw the rotation of the next sample; return it and its key."""
        if self.rng == "torch":
            # In the order of electrai's loader.
            axis = int(torch.randint(0, 3, ()))
            return rotation_of(axis, float(torch.rand(()))), ()
        key = (*self._stream(), self.drawn, index)
        self.drawn += 1
        return draw_rotation(*key), key

    def views(
        self,
        data: LazyGrid | LazyStack,
        label: LazyGrid | LazyStack,
        index: int,
        *,
        name: str,
        structure: Mapping[str, Any] | None,
    ) -> tuple[LazyPair, np.random.Generator]:
        """Return the pair as rotated, downsampled views, and the generator for the selection."""
        if self.augmentation:
            rotation, key = self._draw(index)
            turn = functools.partial(rotate, rotation=rotation)
            data, label = data.view(turn), label.view(turn)
        else:
            key = (*self._stream(), self.drawn, index)
            self.drawn += 1
        if self.rng == "torch":
            key = (int(torch.randint(0, 2**63 - 1, ())),)
        sides = [
            grid.view(functools.partial(downsample, step=step, multiple=self.downsample_data))
            for grid, step in ((data, self.downsample_data), (label, self.downsample_label))
        ]
        points = self._points(data.shape[-3:], 0), self._points(label.shape[-3:], 1)
        pair = LazyPair(sides[0], sides[1], points, name, structure, _pages.empty)
        # Another stream than that of the rotation, which has the same key.
        sequence = np.random.SeedSequence(key, spawn_key=(1,))
        return pair, np.random.default_rng(sequence)

    def misfit(
        self, selection: Selection, data: tuple[int, ...], label: tuple[int, ...]
    ) -> str | None:
        """Say why ``selection`` cannot use grids of these sizes in some orientation, or None."""
        for order in _ORIENTATIONS if self.augmentation else _ORIENTATIONS[:1]:
            sides = [
                self._points(tuple(whole[axis] for axis in order), field)
                for field, whole in enumerate((data, label))
            ]
            reason = selection.misfit(*sides)
            if reason is not None:
                is_turned = order != _ORIENTATIONS[0]
                return f"{reason}, as a rotation may turn it" if is_turned else reason
        return None

    def _points(self, whole: tuple[int, ...], field: int) -> Points:
        multiple, step = self.downsample_data, self._step(field)
        return Points(whole, step, tuple(-(-(n // multiple * multiple) // step) for n in whole))

    def unrotated(self, whole: Grid, field: int) -> Grid:
        """Return the grid that `__call__` converts to a tensor if no rotation is applied."""
        if self.is_deferred:
            return whole
        return np.array(
            downsample(whole, self._step(field), multiple=self.downsample_data), order="C"
        )

    def _step(self, field: int) -> int:
        return (self.downsample_data, self.downsample_label)[field]

    def _stream(self) -> tuple[int, ...]:
        """Numbers that make this process's draws differ from other processes and epochs."""
        worker = get_worker_info()
        if worker is not None:
            # torch draws this seed for every worker and, unless workers persist, for every epoch.
            return (self.seed or 0, worker.seed)
        # The initial seed is that of torch.manual_seed, or random. Reading it does not advance the
        # generator.
        return (0, torch.initial_seed()) if self.seed is None else (self.seed, 0)

    def on_device(
        self, whole: torch.Tensor, rotation: Rotation, field: int, name: str
    ) -> torch.Tensor:
        """Rotate, downsample and cast a tensor on any device, as `__call__` does for a grid."""
        first, second = rotation.plane
        grid = whole.transpose(first, second) if rotation.turns % 2 else whole
        reversed_axes = rotation.reversed_axes
        if reversed_axes:
            grid = grid.flip(reversed_axes)
        nx, ny, nz = (n // self.downsample_data * self.downsample_data for n in grid.shape[-3:])
        step = self._step(field)
        grid = grid[..., :nx:step, :ny:step, :nz:step].contiguous()
        cast = grid.to(self.dtype)
        self._precision.check(grid, cast, field, name)
        return cast

    def _downsampled(self, whole: Grid, field: int, name: str) -> Grid:
        grid = downsample(whole, self._step(field), multiple=self.downsample_data)
        if grid.size == 0:
            raise SchemaError(
                f"{name}: a grid of {times(whole.shape[-3:])} points is empty after cropping to a "
                f"multiple of downsample_data={self.downsample_data}. Use a smaller factor, or "
                "leave the sample out of the map."
            )
        return grid

    def _whole(self, whole: Grid, field: int, name: str) -> _TensorAndGrid:
        """Return the unchanged grid as a tensor. Raises if downsampling would leave no point."""
        self._downsampled(whole, field, name)
        if not whole.flags.writeable:
            whole = whole.copy()
        return torch.from_numpy(whole), whole

    def _tensor(self, whole: Grid, field: int, name: str) -> _TensorAndGrid:
        grid = self._downsampled(whole, field, name)
        # torch has no negative strides, a worker sends the whole storage of a strided tensor, and a
        # network would gather the view anyway, in the training process: gather it here. numpy calls
        # an array contiguous whatever the stride of an axis of length one.
        is_plain = grid.flags.c_contiguous and grid.flags.writeable and min(grid.strides) > 0
        if not is_plain:
            gathered = _pages.empty(grid.shape, grid.dtype)
            copy_rotated(grid, gathered)
            grid = gathered
        return self._cast(grid, field, name)

    def cast(self, chosen: Any, field: int, name: str) -> torch.Tensor:
        """An array or tensor that a selection made, in the precision of the dataset.

        Raises
        ------
        ConfigError
            It is neither.
        """
        if not isinstance(chosen, (np.ndarray, torch.Tensor)):
            raise ConfigError(
                f"{name}: select() returned {kind_name(chosen)}; it has to return arrays."
            )
        array = np.asarray(chosen)
        if array.dtype != np.float32 or not (array.flags.c_contiguous and array.flags.writeable):
            array = np.array(array, np.float32, order="C")
        tensor, pages = self._cast(array, field, name)
        in_blocks = get_worker_info() is not None and _pages.block_of(pages) is not None
        return SentTensor.over(tensor, pages) if in_blocks else tensor

    def _cast(self, grid: Grid, field: int, name: str) -> _TensorAndGrid:
        tensor = torch.from_numpy(grid)
        if self.dtype is torch.float32:
            return tensor, grid
        cast, pages = empty_tensor(tensor.shape, self.dtype)
        self._precision.check(tensor, cast.copy_(tensor), field, name)
        return cast, pages


def kind_name(result: Any) -> str:
    """Describe the return value of a function, for messages."""
    if isinstance(result, Mapping):
        return f"a mapping with the keys {list(result)}"
    return "None" if result is None else f"a {type(result).__name__}"
