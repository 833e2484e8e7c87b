"""Rotate and downsample density grids as views of numpy arrays, without torch and without state.

The distribution is that of the original training code: one of three axes with equal probability,
then 0 quarter turns with probability 10 %, and 1, 2 and 3 quarter turns with 30 % each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rotation", "downsample", "draw_rotation", "rotate", "rotation_of"]

Grid = NDArray[np.float32]

#: The plane that rotates about x, y and z. A quarter turn swaps its axes, then reverses the second.
_PLANES = ((-2, -1), (-3, -1), (-3, -2))


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
    if rotation.turns == 0:
        return grid
    reversed_axes = {1: (second,), 2: (first, second), 3: (first,)}[rotation.turns]
    return np.flip(grid, reversed_axes)


def downsample(grid: Grid, step: int, *, multiple: int) -> Grid:
    """Crop the last three axes to a multiple of ``multiple``, then take every ``step``-th point.

    Returns a view. Data and label of a pair are both cropped to a multiple of the data's factor,
    so their grids stay matched.
    """
    nx, ny, nz = (n // multiple * multiple for n in grid.shape[-3:])
    return grid[..., :nx:step, :ny:step, :nz:step]
