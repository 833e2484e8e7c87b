"""The distribution of rotations and the points of downsampling, against independent oracles."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from zarrcache.train.crops import copy_rotated
from zarrcache.train.transforms import Rotation, downsample, draw_rotation, rotate

#: The plane that numpy.rot90 turns for x, y and z.
PLANES = ((1, 2), (0, 2), (0, 1))
ROTATIONS = [Rotation(axis, turns) for axis, turns in itertools.product((0, 1, 2), (0, 1, 2, 3))]
#: Chi-square with nine degrees of freedom is above this in one of ten thousand fair experiments.
CHI_SQUARE_LIMIT = 33.7


def grid(*shape: int) -> NDArray[np.float32]:
    """No two cells are alike."""
    return (
        np.random.default_rng(1).permutation(int(np.prod(shape))).astype(np.float32).reshape(shape)
    )


def chi_square(outcomes: list[Rotation]) -> float:
    """How far outcomes are from 10 % for the identity and for each of the nine turns (three axes,
    one to three quarters).
    """
    counts = Counter(
        (rotation.axis, rotation.turns) if rotation.turns else None for rotation in outcomes
    )
    expected = len(outcomes) / 10
    keys = [None, *itertools.product((0, 1, 2), (1, 2, 3))]
    assert set(counts) <= set(keys)
    return sum((counts[key] - expected) ** 2 / expected for key in keys)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_rotation_is_numpys(rotation: Rotation) -> None:
    """A quarter turn is ``rot90`` backwards, in the plane of the two other axes."""
    values = grid(3, 4, 5)
    expected = np.rot90(values, k=-rotation.turns, axes=PLANES[rotation.axis])
    np.testing.assert_array_equal(rotate(values, rotation), expected)
    np.testing.assert_array_equal(rotate(values[None], rotation), expected[None])


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_a_rotation_is_a_view_and_four_of_it_are_the_identity(rotation: Rotation) -> None:
    values = grid(3, 4, 5)
    turned = rotate(values, rotation)
    assert np.shares_memory(turned, values)
    for _ in range(3):
        turned = rotate(turned, rotation)
    np.testing.assert_array_equal(turned, values)


def test_one_quarter_turn_moves_the_cells_as_the_users_do() -> None:
    """The formulas of their ``rotate_x``, ``rotate_y`` and ``rotate_z``, cell by cell."""
    values = grid(3, 4, 5)
    nx, ny, nz = values.shape
    x, y, z = (rotate(values, Rotation(axis, 1)) for axis in (0, 1, 2))
    assert (x.shape, y.shape, z.shape) == ((nx, nz, ny), (nz, ny, nx), (ny, nx, nz))
    for i, j, k in np.ndindex(nx, ny, nz):
        assert x[i, k, ny - 1 - j] == values[i, j, k]
        assert y[k, j, nx - 1 - i] == values[i, j, k]
        assert z[j, nx - 1 - i, k] == values[i, j, k]


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_every_rotation_has_its_probability(seed: int) -> None:
    """Over the draws of a process, the samples of an epoch, and the seeds of workers."""
    n = 4000
    assert chi_square([draw_rotation(seed, 0, drawn, 7) for drawn in range(n)]) < CHI_SQUARE_LIMIT
    assert chi_square([draw_rotation(seed, 0, 7, index) for index in range(n)]) < CHI_SQUARE_LIMIT
    assert (
        chi_square([draw_rotation(seed, 2**60 + worker, 0, 7) for worker in range(n)])
        < CHI_SQUARE_LIMIT
    )


def test_the_statistics_can_fail() -> None:
    """Equal probabilities of 0 to 3 turns, and an axis that is never drawn, exceed the limit."""
    rng = np.random.default_rng(0)
    fair_turns = [Rotation(int(rng.integers(3)), int(rng.integers(4))) for _ in range(4000)]  # type: ignore[arg-type]
    no_x = [
        rotation
        for rotation in (draw_rotation(0, i) for i in range(6000))
        if rotation.axis != 0 or not rotation.turns
    ]
    assert chi_square(fair_turns) > 3 * CHI_SQUARE_LIMIT
    assert chi_square(no_x) > 3 * CHI_SQUARE_LIMIT


def test_draws_of_neighbouring_keys_are_independent() -> None:
    """About one pair in ten agrees, as for independent draws."""
    for i in range(4):
        one = [draw_rotation(*(n if j == i else 3 for j in range(4))) for n in range(2000)]
        same = sum(a == b or a.turns == b.turns == 0 for a, b in itertools.pairwise(one))
        assert 140 < same < 260


def test_a_key_gives_the_same_rotation_everywhere() -> None:
    """Another distribution would make earlier runs irreproducible."""
    drawn = [draw_rotation(42, 0, n, 3) for n in range(12)]
    assert [(r.axis, r.turns) for r in drawn] == [
        (1, 2),
        (1, 3),
        (1, 1),
        (1, 2),
        (0, 1),
        (0, 3),
        (2, 2),
        (1, 1),
        (0, 1),
        (0, 3),
        (1, 3),
        (2, 3),
    ]


@pytest.mark.parametrize(("step", "multiple"), list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4))))
def test_downsampling_takes_the_points_it_should(step: int, multiple: int) -> None:
    """Each axis ends at its last multiple; every ``step``-th point of what is left stays."""
    values = grid(7, 4, 9)
    kept = [[i for i in range(n) if i < n - n % multiple and i % step == 0] for n in values.shape]
    expected = np.array([[[values[i, j, k] for k in kept[2]] for j in kept[1]] for i in kept[0]])
    np.testing.assert_array_equal(downsample(values, step, multiple=multiple), expected)
    assert np.shares_memory(downsample(values, step, multiple=multiple), values)


def test_a_grid_smaller_than_the_factor_has_no_points_left() -> None:
    """The dataset raises an error for it."""
    assert downsample(grid(2, 4, 4), 1, multiple=3).size == 0


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("shape", [(48, 60, 40), (1, 64, 50, 36), (200, 3, 250), (1, 1, 400, 400)])
def test_a_copy_of_a_rotated_grid_has_the_values_of_the_view(
    shape: tuple[int, ...], step: int
) -> None:
    """Of grids that are copied in slabs, and of thin ones."""
    grid = np.random.default_rng(1).random(shape, dtype=np.float32)
    for axis, turns in itertools.product((0, 1, 2), (0, 1, 2, 3)):
        view = downsample(rotate(grid, Rotation(axis, turns)), step, multiple=step)  # type: ignore[arg-type]
        out = np.empty(view.shape, np.float32)
        copy_rotated(view, out)
        assert np.array_equal(out, view)
