"""Quarter turns and downsampling of density grids, as views of numpy arrays. Pure: no torch, no
state.

The law is the users' own: an axis of three with equal chance, then no turn with 10 %, one, two and
three quarter turns with 30 % each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rotation", "downsample", "draw_rotation", "rotate"]

Grid = NDArray[np.float32]

#: The plane that turns about x, y and z. One turn swaps its two axes and then reverses the second.
_PLANES = ((-2, -1), (-3, -1), (-3, -2))


@dataclass(frozen=True, slots=True)
class Rotation:
    """Some quarter turns about one axis.

    Attributes
    ----------
    axis : 0, 1 or 2
        About x, y or z: the axis of ``(nx, ny, nz)`` that keeps its place.
    turns : 0, 1, 2 or 3
        Quarter turns.
    """

    axis: Literal[0, 1, 2]
    turns: Literal[0, 1, 2, 3]


def draw_rotation(*key: int) -> Rotation:
    """Draw the rotation that belongs to ``key``: whole numbers from 0, the same key gives the same
    rotation on every machine.

    A function of a key instead of a generator with a state: nothing has to be carried through fork,
    spawn and pickle, and samples that are read by different processes with the same seed do not
    turn in step.
    """
    rng = np.random.default_rng(key)
    axis = rng.integers(3)
    r = rng.random()
    turns = 0 if r < 0.1 else 1 if r < 0.4 else 2 if r < 0.7 else 3
    return Rotation(axis=int(axis), turns=turns)  # type: ignore[arg-type]  # integers(3) is 0, 1 or 2


def rotate(grid: Grid, rotation: Rotation) -> Grid:
    """Turn the last three axes of ``grid``. A view; ``numpy.rot90`` with ``k=-turns`` about the
    same axis gives the same values.
    """
    first, second = _PLANES[rotation.axis]
    if rotation.turns % 2:
        grid = grid.swapaxes(first, second)
    if rotation.turns == 0:
        return grid
    reversed_axes = {1: (second,), 2: (first, second), 3: (first,)}[rotation.turns]
    return np.flip(grid, reversed_axes)


def downsample(grid: Grid, step: int, *, multiple: int) -> Grid:
    """Crop each of the last three axes to a multiple of ``multiple`` from its start, then take
    every ``step``-th point. A view.

    Data and label of a pair are both cropped to a multiple of the data's factor, so that their
    grids stay matched.
    """
    nx, ny, nz = (n // multiple * multiple for n in grid.shape[-3:])
    return grid[..., :nx:step, :ny:step, :nz:step]
