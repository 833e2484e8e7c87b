"""Dividing a density, and what counts as one."""

from __future__ import annotations

import numpy as np
import pytest

from zarrcache.arrays import as_density, per_point
from zarrcache.errors import SchemaError

NAME = "charge_density_total"


def test_float32_is_not_copied_and_other_numbers_are_cast() -> None:
    """The mapped entry itself is handed on."""
    exact = np.ones((2, 3, 4), np.float32)
    assert as_density(exact, "url", NAME) is exact
    assert as_density(exact.astype(np.int16), "url", NAME).dtype == np.float32


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3, 4), (0, 2, 2)])
def test_what_is_not_3d_or_empty_is_no_density(shape: tuple[int, ...]) -> None:
    """The shape is in the message."""
    with pytest.raises(SchemaError) as caught:
        as_density(np.ones(shape, np.float32), "s3://b/a.zarr", NAME)
    assert f"s3://b/a.zarr {NAME} has the shape {shape}" in str(caught.value)


def test_dividing_makes_an_array_of_its_own() -> None:
    """What was given may be the cache's."""
    values = np.ones((2, 2, 2), np.float32)
    divided = per_point(values)
    assert not np.shares_memory(values, divided)
    assert divided.dtype == np.float32
    assert (values == 1).all()
    assert divided.sum() == 1
