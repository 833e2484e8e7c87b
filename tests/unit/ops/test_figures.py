"""Planes of a pair: the right ones, in colours that order their values."""

from __future__ import annotations

import io

import numpy as np
import pytest

from zarrcache.ops import as_png, draw_pair, shrunk

RNG = np.random.default_rng(3)


def brightness(colours: np.ndarray) -> np.ndarray:
    """As the eye weighs the channels."""
    return colours.astype(float) @ (0.2126, 0.7152, 0.0722)


def test_each_row_cuts_one_axis_at_its_share_of_the_length() -> None:
    grid = np.zeros((4, 6, 8), np.float32)
    grid[3, 1, 2] = 1
    rows = draw_pair(grid, grid, at=(0.8, 0.2, 0.25))
    for row, shape, place in zip(
        rows, ((6, 8), (4, 8), (4, 6)), ((1, 2), (3, 2), (3, 1)), strict=True
    ):
        assert row[0].colours.shape == (*shape, 3)
        lit = brightness(row[0].colours)
        assert np.unravel_index(lit.argmax(), shape) == place
    assert [row[0].caption.splitlines()[0] for row in rows] == [
        "input yz, x=3/4",
        "input xz, y=1/6",
        "input xy, z=2/8",
    ]
    assert rows[1][2].caption.startswith("label - input xz, y=1/6\n")
    assert rows[0][0].caption.splitlines()[1] == "0 to 1"


def test_the_end_of_an_axis_is_its_last_plane() -> None:
    grid = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    assert "4 to 7" in draw_pair(grid, grid, at=(1, 1, 1))[0][0].caption


def test_larger_values_are_brighter_on_one_scale_for_input_and_label() -> None:
    data, label = RNG.random((5, 6, 7)), 3 * RNG.random((5, 6, 7))
    for row, axis in zip(draw_pair(data, label), range(3), strict=True):
        values = np.concatenate(
            [np.take(grid, grid.shape[axis] // 2, axis).ravel() for grid in (data, label)]
        )
        shown = np.concatenate([brightness(panel.colours).ravel() for panel in row[:2]])
        assert np.all(np.diff(shown[np.argsort(values)]) > -2)  # rounding of the channels


def test_a_difference_of_zero_is_white_and_its_sign_is_red_or_blue() -> None:
    data = np.zeros((3, 3, 3))
    label = data.copy()
    label[1, 1, 1], label[1, 1, 2] = 2, -1
    colours = draw_pair(data, label)[0][2].colours
    assert colours[0, 0].tolist() == [247, 247, 247]
    assert colours[1, 1, 0] > colours[1, 1, 2]
    assert colours[1, 2, 0] < colours[1, 2, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_grey(value: float) -> None:
    data = RNG.random((3, 3, 3))
    data[1, 0, 0] = value
    for panel in draw_pair(data, np.ones((3, 3, 3)))[0][::2]:
        assert panel.colours[0, 0].tolist() == [128, 128, 128]


def test_grids_that_differ_have_no_difference_and_constants_are_drawn() -> None:
    rows = draw_pair(np.ones((2, 2, 2)), np.ones((3, 4, 5)))
    assert [len(row) for row in rows] == [2, 2, 2]


def test_the_png_shows_each_panel_with_its_proportions() -> None:
    image_module = pytest.importorskip("PIL.Image")
    rows = draw_pair(RNG.random((4, 8, 16)), RNG.random((4, 8, 16)))
    image = image_module.open(io.BytesIO(as_png(rows)))
    assert image.format == "PNG"
    pixels = np.asarray(image)
    for panel in rows[0]:
        for corner in (panel.colours[0, 0], panel.colours[-1, -1]):
            assert (pixels == corner).all(axis=-1).any()


@pytest.mark.parametrize("shape", [(3, 3), (40, 10), (1, 90), (7, 100)])
def test_a_shrunk_plane_fits_and_shows_points_of_the_plane(shape: tuple[int, int]) -> None:
    colours = RNG.integers(0, 255, (*shape, 3)).astype(np.uint8)
    small = shrunk(colours, 12)
    assert max(small.shape[:2]) == 12
    assert {tuple(point) for point in small.reshape(-1, 3)} <= {
        tuple(point) for point in colours.reshape(-1, 3)
    }
