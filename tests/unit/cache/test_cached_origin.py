"""Stores read through stored listings and the byte tier."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import Buffer

from tests.support.cachedirs import payload_files, settings
from tests.support.stores import small_group
from zarrcache._keys import ObjectInfo
from zarrcache.arrays import OriginArray, read_array
from zarrcache.cache.cache import Cache
from zarrcache.cache.cached_origin import CachedOrigin
from zarrcache.errors import OriginNotFoundError, SchemaError
from zarrcache.origin._local import LocalOrigin
from zarrcache.stats import Counters

NAME = "charge_density_total"


class CountingOrigin(LocalOrigin):
    """A directory that remembers its calls."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.listed: list[str] = []
        self.passes: list[list[str]] = []

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        self.listed.append(prefix)
        return super().list_objects(prefix)

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        self.passes.append([obj.key for obj in objects])
        return super().fetch(objects)


def write(tmp_path: Path, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    """Write the store, as if a while ago: a fresh one is listed until it is stable."""
    array = small_group(tmp_path / "data" / "mp-1.zarr", shape=(8, 8, 8), seed=seed)[NAME]
    for path in (tmp_path / "data").rglob("*"):
        os.utime(path, (1e9 + seed, 1e9 + seed))
    return array


@pytest.fixture
def origin(tmp_path: Path) -> CountingOrigin:
    write(tmp_path, 1)
    return CountingOrigin(str(tmp_path / "data"))


def read(origin: CachedOrigin) -> np.ndarray:  # type: ignore[type-arg]
    return read_array(OriginArray(origin, "mp-1.zarr", NAME)).array


def cached(tmp_path: Path, origin: CountingOrigin, *, relist: bool = False) -> CachedOrigin:
    return CachedOrigin(origin, Cache(settings(tmp_path), Counters()), relist=relist)


def test_a_second_read_makes_no_request(tmp_path: Path, origin: CountingOrigin) -> None:
    first = read(cached(tmp_path, origin))
    calls = list(origin.listed), list(origin.passes)
    np.testing.assert_array_equal(read(cached(tmp_path, origin)), first)
    assert (origin.listed, origin.passes) == calls


def test_it_pickles(tmp_path: Path, origin: CountingOrigin) -> None:
    through = cached(tmp_path, origin)
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(through))), read(through))


def test_what_is_missing_is_fetched_in_one_pass(tmp_path: Path, origin: CountingOrigin) -> None:
    first = read(cached(tmp_path, origin))
    assert len(origin.passes) == 1
    assert len(origin.passes[0]) > 2
    evicted = [path for path in payload_files(tmp_path) if path.parts[-3] == "bytes"][:2]
    for path in evicted:
        path.unlink()
    np.testing.assert_array_equal(read(cached(tmp_path, origin)), first)
    assert len(origin.passes) == 2
    assert len(origin.passes[1]) == 2


def test_a_listing_that_turns_out_old_is_made_again(tmp_path: Path, origin: CountingOrigin) -> None:
    read(cached(tmp_path, origin))
    changed = write(tmp_path, 2)
    for path in payload_files(tmp_path):
        if path.parts[-3] == "bytes":
            path.unlink()
    np.testing.assert_array_equal(read(cached(tmp_path, origin)), changed)


def test_relisting_sees_a_store_that_was_overwritten(
    tmp_path: Path, origin: CountingOrigin
) -> None:
    read(cached(tmp_path, origin))
    changed = write(tmp_path, 2)
    np.testing.assert_array_equal(read(cached(tmp_path, origin, relist=True)), changed)


def test_stores_and_arrays_that_are_absent_are_named(
    tmp_path: Path, origin: CountingOrigin
) -> None:
    through = cached(tmp_path, origin)
    with pytest.raises(OriginNotFoundError, match=r"mp-2\.zarr does not exist or is empty"):
        read_array(OriginArray(through, "mp-2.zarr", NAME))
    with pytest.raises(SchemaError, match=rf"Available arrays: \['{NAME}'\]"):
        read_array(OriginArray(through, "mp-1.zarr", "charge_density_diff"))
