"""Reading a density object by object, dividing it, and what counts as one."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.stores import plain_read, small_group
from zarrcache.arrays.density import as_density, density_of_objects, per_point
from zarrcache.errors import OriginUnavailableError, SchemaError

NAME = "charge_density_total"


@pytest.fixture
def objects(tmp_path: Path) -> dict[str, bytes]:
    """Every object of a store by its key, with a second array beside the density."""
    small_group(tmp_path / "a.zarr", shape=(9, 8, 7), diff=True)
    return {
        path.relative_to(tmp_path / "a.zarr").as_posix(): path.read_bytes()
        for path in (tmp_path / "a.zarr").rglob("*")
        if path.is_file()
    }


def test_only_the_objects_of_the_array_are_read_each_once(
    objects: dict[str, bytes], tmp_path: Path
) -> None:
    """From several threads, and the values are zarr's."""
    asked: list[str] = []
    threads: set[int] = set()
    numbers = itertools.count()
    together = threading.Barrier(2)

    def read(key: str) -> bytes:
        asked.append(key)
        if next(numbers) < 2:
            together.wait(60)  # two readings are in flight at once, or this breaks
        threads.add(threading.get_ident())
        return objects[key]

    values = density_of_objects(objects, read, "s3://b/a.zarr", NAME)
    np.testing.assert_array_equal(values, plain_read(tmp_path / "a.zarr"))
    assert sorted(asked) == sorted(key for key in objects if key.startswith(f"{NAME}/"))
    assert threading.get_ident() not in threads


def test_failure_of_one_object_ends_the_reading_with_its_error(objects: dict[str, bytes]) -> None:
    """The origin's own error, not one of the pool and not one of a decoder that lacks a chunk."""

    def read(key: str) -> bytes:
        if key.endswith("1.1.1"):
            raise OriginUnavailableError(f"s3://b/a.zarr/{key} did not answer.")
        return objects[key]

    with pytest.raises(OriginUnavailableError, match=rf"{NAME}/1\.1\.1 did not answer"):
        density_of_objects(objects, read, "s3://b/a.zarr", NAME)


def test_array_that_no_key_belongs_to_is_named_with_those_that_are_there(
    objects: dict[str, bytes],
) -> None:
    """A name that only begins alike is another array."""
    names = r"\['charge_density_diff', 'charge_density_total'\]"
    with pytest.raises(
        SchemaError, match=rf"'charge_density' not found in zarr store s3://b/a\.zarr\. .*{names}"
    ):
        density_of_objects(objects, objects.__getitem__, "s3://b/a.zarr", "charge_density")


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
