"""One array read whole: what is missing, damaged or being written is said, never filled in."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from typing_extensions import Buffer

from tests.support.stores import plain_read, small_group
from zarrcache._keys import ObjectInfo, source_digest
from zarrcache.arrays import metadata_of, per_point
from zarrcache.arrays.listing import RELIST_WAITS_S, OriginArray, list_array, unstable_s
from zarrcache.arrays.read import density_of_group, examine_array, read_array
from zarrcache.errors import IncompleteArrayError, OriginNotFoundError, SchemaError
from zarrcache.origin._local import LocalOrigin
from zarrcache.stats import Counters

NAME = "charge_density_total"
STORE = "mp-1.zarr"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are written down, not waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def age(path: Path, seconds: float) -> None:
    """Have every file below be written ``seconds`` ago."""
    then = time.time() - seconds
    for file in [path, *path.rglob("*")]:
        os.utime(file, (then, then))


class Hooked(LocalOrigin):
    """A directory in which something happens before the first object is fetched."""

    def __init__(self, path: Path, *hooks: Any) -> None:
        super().__init__(str(path))
        self.hooks = list(hooks)

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        if self.hooks:
            self.hooks.pop(0)()
        yield from super().fetch(objects)


@pytest.mark.parametrize(
    ("ages_s", "wait_s"),
    [
        ([], 0.0),
        ([None], 0.0),  # without a date, nothing is known
        ([None, 3600.0], 0.0),
        ([3600.0, 7200.0], 0.0),
        ([1.5, 3600.0], 0.5),
        ([None, 1.5], 0.5),
        ([-100.0], 2.0),  # the server's clock is ahead
        ([10.0, 10.5], 0.0),  # written at once
        ([10.0, 3600.0], 2.0),  # one chunk is recent: a writer may be at it
    ],
)
def test_a_listing_is_trusted_at_once_or_after_two_seconds(
    ages_s: list[float | None], wait_s: float
) -> None:
    now_s = time.time()
    listed = [
        ObjectInfo(str(n), 1, "e", 0.0 if age_s is None else now_s - age_s)
        for n, age_s in enumerate(ages_s)
    ]
    assert unstable_s(listed) == pytest.approx(wait_s, abs=0.4)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"zarr_format": 3},
        {"zarr_format": 3, "shards": (8, 8, 8)},
        {"as_zip": True},
        {"zarr_format": 3, "as_zip": True},
    ],
)
def test_stable_array_is_one_list_and_one_get_per_object(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    """Values as zarr reads them, and the digest of what was listed, among it the attributes of the
    store.
    """
    store = f"{STORE}.zip" if layout.get("as_zip") else STORE
    small_group(tmp_path / store, **layout)
    age(tmp_path, 3600)
    counters = Counters()
    origin = LocalOrigin(str(tmp_path), counters=counters)
    decoded = read_array(OriginArray(origin, store, NAME))
    assert np.array_equal(decoded.array, plain_read(tmp_path / store))
    listed = list_array(OriginArray(LocalOrigin(str(tmp_path)), store, NAME))
    assert decoded.source == source_digest(listed)
    assert counters.snapshot().requests == 1 + len(listed)


@pytest.mark.parametrize("store", [STORE, f"{STORE}.zip"])
def test_missing_store_is_named(tmp_path: Path, store: str) -> None:
    """As a whole store that the origin does not have."""
    with pytest.raises(OriginNotFoundError, match=f"{tmp_path}/{store} does not exist"):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), store, NAME))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("as_zip", [False, True])
def test_missing_array_names_those_that_are_there(
    tmp_path: Path, zarr_format: Any, as_zip: bool
) -> None:
    """The users' words."""
    store = f"{STORE}.zip" if as_zip else STORE
    small_group(tmp_path / store, zarr_format=zarr_format, as_zip=as_zip, diff=True)
    with pytest.raises(SchemaError) as caught:
        read_array(OriginArray(LocalOrigin(str(tmp_path)), store, "charge_density_spin"))
    url = tmp_path / store
    assert str(caught.value) == (
        f"'charge_density_spin' not found in zarr store {url}. Available arrays: "
        "['charge_density_diff', 'charge_density_total']"
    )


def test_array_without_its_metadata_is_refused(tmp_path: Path) -> None:
    """Chunks alone say nothing."""
    small_group(tmp_path / STORE)
    (tmp_path / STORE / NAME / ".zarray").unlink()
    with pytest.raises(SchemaError, match=f"{STORE}/{NAME} holds neither .zarray nor zarr.json"):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME))


def test_damaged_chunk_is_named(tmp_path: Path) -> None:
    """Not filled, not retried: the listing is the same."""
    small_group(tmp_path / STORE)
    (tmp_path / STORE / NAME / "0.1.0").write_bytes(b"damaged")
    age(tmp_path, 3600)
    with pytest.raises(
        IncompleteArrayError,
        match=rf"{tmp_path}/{STORE}/{NAME}/0\.1\.0 cannot be decoded .* convert the store again",
    ):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME))


def test_empty_chunk_in_a_zip_is_damaged_and_not_missing(tmp_path: Path) -> None:
    """It has a name, so it is not the fill value."""
    small_group(tmp_path / STORE, compressors=None)
    (tmp_path / STORE / NAME / "0.1.0").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / f"{STORE}.zip", "w") as archive:
        for file in sorted(p for p in (tmp_path / STORE).rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(tmp_path / STORE))
    for store in (STORE, f"{STORE}.zip"):
        with pytest.raises(IncompleteArrayError, match=r"0\.1\.0 cannot be decoded"):
            read_array(OriginArray(LocalOrigin(str(tmp_path)), store, NAME))


def test_missing_chunk_is_an_error_or_has_the_fill_value(tmp_path: Path) -> None:
    """The caller decides; in both cases it is counted."""
    small_group(tmp_path / STORE, chunks=(4, 4, 4), fill_value=7)
    (tmp_path / STORE / NAME / "0.1.0").unlink()
    with pytest.raises(IncompleteArrayError, match=f"{NAME}: 1 of 18 chunks are absent"):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME))
    decoded = read_array(OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME, fills=True))
    assert decoded.missing_chunks == 1
    assert np.array_equal(decoded.array, plain_read(tmp_path / STORE))
    assert (decoded.array[0:4, 4:8, 0:4] == 7).all()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("as_zip", [False, True])
def test_missing_chunks_are_counted_from_the_names_alone(
    tmp_path: Path, zarr_format: Any, as_zip: bool
) -> None:
    """As many as a read finds."""
    store = f"{STORE}.zip" if as_zip else STORE
    small_group(tmp_path / store, zarr_format=zarr_format, as_zip=as_zip, chunks=(4, 4, 4))
    origin = LocalOrigin(str(tmp_path))

    def counted() -> tuple[int, int]:
        what = OriginArray(origin, store, NAME)
        return examine_array(what, list_array(what))[:2]

    assert counted() == (0, 18)
    separator = "c/0/1/0" if zarr_format == 3 else "0.1.0"
    if as_zip:
        with zipfile.ZipFile(tmp_path / store) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(tmp_path / store, "w") as archive:
            for name, data in members.items():
                if not name.endswith(f"{NAME}/{separator}"):
                    archive.writestr(name, data)
    else:
        (tmp_path / store / NAME / separator).unlink()
    assert counted() == (1, 18)
    assert read_array(OriginArray(origin, store, NAME, fills=True)).missing_chunks == 1


def test_keys_of_another_encoding_are_refused_by_name(tmp_path: Path) -> None:
    """In a read, which leaves them to zarr, and where chunks are counted."""
    small_group(tmp_path / STORE, zarr_format=3)
    path = tmp_path / STORE / NAME / "zarr.json"
    document = json.loads(path.read_bytes())
    document["chunk_key_encoding"] = {"name": "suffixed"}
    path.write_text(json.dumps(document))
    what = OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME)
    assert examine_array(what, list_array(what))[:2] == (0, 0)
    with pytest.raises(SchemaError, match=r"mp-1.zarr.*suffixed"):
        read_array(what)


def test_missing_chunks_are_not_counted_without_valid_metadata(tmp_path: Path) -> None:
    small_group(tmp_path / STORE)
    what = OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME)
    document = tmp_path / STORE / NAME / ".zarray"
    document.write_bytes(b"{")
    with pytest.raises(SchemaError, match=rf"{NAME}/\.zarray is not JSON"):
        examine_array(what, list_array(what))
    document.write_bytes(b"{}")
    with pytest.raises(SchemaError, match=rf"{NAME}/\.zarray"):
        examine_array(what, list_array(what))
    document.unlink()
    with pytest.raises(SchemaError, match=f"{NAME} holds neither .zarray nor zarr.json"):
        examine_array(what, list_array(what))


def test_store_that_is_overwritten_while_it_is_read_is_read_again(
    tmp_path: Path, naps: list[float]
) -> None:
    """Never a mixture: each object has to be the one that was listed."""
    small_group(tmp_path / STORE, seed=1)

    def overwrite() -> None:
        shutil.rmtree(tmp_path / STORE)
        small_group(tmp_path / STORE, seed=2)

    decoded = read_array(OriginArray(Hooked(tmp_path, overwrite), STORE, NAME))
    assert np.array_equal(decoded.array, plain_read(tmp_path / STORE))
    assert decoded.source == source_digest(
        list_array(OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME))
    )
    assert naps == [0.5]


def test_chunk_that_appears_while_a_young_store_is_read_is_not_missed(
    tmp_path: Path, naps: list[float]
) -> None:
    """Every listed object was right, and the array still is not what the writer meant."""
    small_group(tmp_path / STORE)
    late = tmp_path / STORE / NAME / "0.1.0"
    late.rename(tmp_path / "late")
    decoded = read_array(
        OriginArray(Hooked(tmp_path, lambda: (tmp_path / "late").rename(late)), STORE, NAME)
    )
    assert np.array_equal(decoded.array, plain_read(tmp_path / STORE))


def test_store_that_never_comes_to_rest_is_an_error(tmp_path: Path, naps: list[float]) -> None:
    """After five readings."""
    small_group(tmp_path / STORE)
    chunk = tmp_path / STORE / NAME / "0.0.0"
    touches = [lambda n=n: os.utime(chunk, ns=(n, n)) for n in range(1, 9)]
    origin = Hooked(tmp_path, *touches)
    with pytest.raises(
        IncompleteArrayError,
        match=f"{STORE} kept changing while it was read. Wait until its writer has finished",
    ):
        read_array(OriginArray(origin, STORE, NAME))
    assert naps == list(RELIST_WAITS_S)
    assert len(origin.hooks) == 8 - 5


def test_listed_chunk_that_is_gone_is_an_error(tmp_path: Path, naps: list[float]) -> None:
    """A stale listing from the caller is replaced; one that is fresh and still wrong is not."""
    small_group(tmp_path / STORE)
    listed = list_array(OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME))
    (tmp_path / STORE / NAME / "0.1.0").unlink()
    decoded = read_array(
        OriginArray(LocalOrigin(str(tmp_path)), STORE, NAME, fills=True), listed=listed
    )
    assert np.array_equal(decoded.array, plain_read(tmp_path / STORE))

    class Stubborn(LocalOrigin):
        def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
            return listed

    with pytest.raises(IncompleteArrayError, match=r"0\.1\.0 is listed .* but is gone"):
        read_array(OriginArray(Stubborn(str(tmp_path)), STORE, NAME))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        ("complex64", (4, 5, 6), "complex"),
        ("bool", (2**14, 2**14, 2**14), r"\d"),
        ("float32", (2**15, 2**15, 2**13), r"\d"),
    ],
)
def test_plain_group_is_checked_before_it_is_read(
    tmp_path: Path, zarr_format: Any, dtype: str, shape: tuple[int, ...], said: str
) -> None:
    """Imaginary parts would be dropped, and 32 TB of fill value allocated."""
    group = zarr.create_group(store=str(tmp_path / STORE), zarr_format=zarr_format)
    chunks = tuple(min(n, 1024) for n in shape)
    group.create_array(NAME, shape=shape, dtype=dtype, chunks=chunks)
    with pytest.raises(SchemaError, match=said):
        density_of_group(group, NAME, "where")


def test_plain_group_of_strings_is_refused(tmp_path: Path) -> None:
    """They could be read as numbers."""
    group = zarr.create_group(store=str(tmp_path / STORE), zarr_format=2)
    array = group.create_array(NAME, shape=(1, 1, 2), dtype="U1", chunks=(1, 1, 2))
    array[...] = np.array([[["1", "2"]]])
    with pytest.raises(SchemaError, match=STORE):
        density_of_group(group, NAME, STORE)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, {}),
        ({"metadata": {"a": 1}}, {"a": 1}),
        ({"metadata": '{"a": 1}', "structure": '{"b": 2}'}, {"a": 1, "structure": {"b": 2}}),
        ({"metadata": {"structure": 1}, "structure": {"b": 2}}, {"structure": {"b": 2}}),
        ({"structure": [1]}, {"structure": [1]}),
        ({"metadata": "[1]"}, r"attribute 'metadata' is \[1\]; it has to be a mapping"),
        ({"metadata": 5}, r"attribute 'metadata' is 5; it has to be a mapping"),
        ({"metadata": "{"}, "attribute 'metadata' is not JSON"),
        ({"structure": "{"}, "attribute 'structure' is not JSON"),
    ],
)
def test_metadata_and_structure_are_merged_or_refused_by_name(
    tmp_path: Path, attributes: dict[str, Any], expected: Any
) -> None:
    group = zarr.create_group(tmp_path / STORE, attributes=attributes)
    if isinstance(expected, dict):
        assert metadata_of(group) == expected
    else:
        with pytest.raises(SchemaError, match=expected):
            metadata_of(group)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("limit", [10, 2**24])
def test_values_per_point_are_those_of_the_users_reader_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, limit: int, in_place: bool
) -> None:
    """On both sides of the number of points that a float32 holds exactly."""
    monkeypatch.setattr("zarrcache.arrays.density._EXACT_IN_FLOAT32", limit)
    values = np.random.default_rng(3).random((7, 11, 13), np.float32) * 1e3
    theirs, before = values.copy(), values.copy()
    theirs /= np.prod(values.shape)
    out = values if in_place else None
    result = per_point(values, out=out)
    assert (result is values) is in_place
    assert result.dtype == np.float32
    assert result.tobytes() == theirs.tobytes()
    assert in_place or np.array_equal(values, before)
