"""``cache.arrays.encoding``: rounded entries, their bound, and readers that want other values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.cachedirs import on_disk_bytes
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache import ZarrS3Reader
from zarrcache.disk.entry import read_header

Make = Callable[..., ZarrS3Reader]
ENCODINGS = ["float16", "bfloat16", "bits:12"]
RELATIVE = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "bits:12": 2.0**-13}
SHAPE = (24, 20, 18)
PAIRS = 4
#: Two listings of two blocks, and four of the eight densities in float32: a header page and nine
#: blocks each.
HALF = 4096 * (2 * 2 + 4 * 10)


def density(number: int) -> NDArray[np.float32]:
    """A smooth one, so that LZ4 finds something, over four orders of magnitude."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in SHAPE), indexing="ij")
    values = 300 * np.exp(-9 * ((x - 0.4) ** 2 + (y - 0.5) ** 2 + (z - 0.1 * number) ** 2)) + 0.1
    return np.asarray(values, np.float32)


@pytest.fixture
def stores(tmp_path: Path) -> dict[tuple[str, str], NDArray[np.float32]]:
    """Four pairs in a local directory."""
    made = {}
    for role in ("data", "label"):
        for number in range(PAIRS):
            values = density(number + 5 * (role == "label"))
            small_group(tmp_path / role / f"mp-{number}.zarr", {"charge_density_total": values})
            made[f"mp-{number}", role] = values
    (tmp_path / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(PAIRS)]}))
    return made


def encoded(name: str, **block: Any) -> dict[str, Any]:
    """A ``cache:`` block."""
    return {"arrays": {"encoding": name}, **block}


def load_all(reader: ZarrS3Reader) -> dict[tuple[str, str], NDArray[np.float32]]:
    return {
        (task_id, role): reader.load(task_id, role)[0].reshape(SHAPE)
        for task_id in reader.task_ids
        for role in ("data", "label")
    }  # type: ignore[return-value]


def assert_same(one: dict[Any, NDArray[Any]], other: dict[Any, NDArray[Any]]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_are_within_the_bound_and_the_same_cold_warm_and_not_admitted(
    encoding: str, normalize: bool, make_reader: Make, stores: Any, tmp_path: Path
) -> None:
    """A training must not depend on what the disk had room for. Without a cache it is exact."""
    exact = load_all(make_reader(normalize=normalize))
    reader = make_reader(cache=encoded(encoding), normalize=normalize)
    cold = load_all(reader)
    for key, values in exact.items():
        error = np.abs(cold[key].astype(np.float64) - values)
        assert error.max() > 0
        assert (error <= RELATIVE[encoding] * np.abs(values)).all()
    assert_same(load_all(reader), cold)
    assert (reader.stats.hits, reader.stats.misses, reader.stats.unencoded) == (8, 8, 0)
    assert_same(load_all(make_reader(cache=encoded(encoding), normalize=normalize)), cold)
    full = make_reader(
        cache=encoded(encoding, dir=tmp_path / "full", limit=20_000), normalize=normalize
    )
    assert_same(load_all(full), cold)
    assert full.stats.bypasses == 8


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_entries_take_half_the_bytes_and_survive_a_lost_index(
    encoding: str, make_reader: Make, stores: Any, tmp_path: Path
) -> None:
    load_all(make_reader(cache={"dir": tmp_path / "exact"}))
    small = make_reader(cache=encoded(encoding))
    cold = load_all(small)
    files = list((tmp_path / "cache/zarrcache-v1/entries").rglob("*-*"))
    headers = [header for path in files if (header := read_header(path)).key.array]
    assert len(headers) == 8
    assert {header.stored_as.encoding for header in headers if header.stored_as} == {encoding}
    payload = sum(header.nbytes for header in headers)
    assert payload <= sum(values.nbytes for values in stores.values()) / 2
    (tmp_path / "cache/zarrcache-v1/cache.db").unlink()
    again = make_reader(cache=encoded(encoding))
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "label")
    assert_same(load_all(again), cold)
    assert again.stats.misses == 0


def test_readers_of_other_encodings_in_one_directory_get_their_own_values(
    make_reader: Make, stores: Any
) -> None:
    """In any order; a reader of float32 gets every bit, whatever was stored before."""
    for encoding in [*ENCODINGS, "float32", *reversed(ENCODINGS), "float32"]:
        values = load_all(make_reader(cache=encoded(encoding)))
        if encoding == "float32":
            assert_same(values, stores)
        else:
            assert_same(values, load_all(make_reader(cache=encoded(encoding))))
            assert not np.array_equal(values["mp-1", "data"], stores["mp-1", "data"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_full_cache_of_float32_is_encoded_without_a_request(
    encoding: str, make_reader: Make, stores: Any, tmp_path: Path
) -> None:
    """Each entry is replaced when it is read, so the other half of the data then fits."""
    limit = HALF
    first = make_reader(cache={"limit": limit})
    for role in ("data", "label"):
        for number in range(PAIRS):
            first.load(f"mp-{number}", role)
    assert first.stats.bypasses == 4
    shutil.move(tmp_path / "data", tmp_path / "away")
    reader = make_reader(cache=encoded(encoding, limit=limit))
    for number in range(4):
        values = reader.load(f"mp-{number}", "data")[0].reshape(SHAPE)
        assert np.allclose(values, stores[f"mp-{number}", "data"], rtol=2.0**-8, atol=0)
    assert (reader.stats.hits, reader.stats.misses, reader.stats.requests) == (4, 0, 0)
    shutil.move(tmp_path / "away", tmp_path / "data")
    load_all(reader)
    assert (reader.stats.misses, reader.stats.bypasses) == (4, 0)
    assert on_disk_bytes(tmp_path) <= limit
    warm = make_reader(cache=encoded(encoding, limit=limit))
    load_all(warm)
    assert (warm.stats.hits, warm.stats.misses) == (8, 0)


def test_a_data_set_of_twice_the_disk_is_read_from_s3_once(
    make_reader: Make, stores: Any, tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    """Three epochs: half of the reads are hits with float32, all of them with float16."""
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    limit = HALF
    for encoding, hits, fetched in [("float32", 8, 4), ("float16", 16, 0)]:
        reader = make_reader(
            f"s3://{bucket}",
            cache=encoded(encoding, dir=tmp_path / encoding, limit=limit),
            s3_kwargs=s3_server.s3_kwargs,
        )
        load_all(reader)
        log = RequestLog(s3_server, bucket)
        load_all(reader)
        load_all(reader)
        assert reader.stats.hits == hits
        # Per density a LIST, the metadata and the eight chunks.
        assert len({request.path for request in log.seen("LIST")}) == fetched


def test_a_density_that_the_encoding_cannot_hold_is_stored_as_float32(
    make_reader: Make, stores: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named once, counted each time, and every bit is kept."""
    for number, value in ((0, np.inf), (1, np.nan), (2, 3.4e38)):
        values = density(number)
        values[1, 2, 3] = value
        shutil.rmtree(tmp_path / f"data/mp-{number}.zarr")
        small_group(tmp_path / f"data/mp-{number}.zarr", {"charge_density_total": values})
        stores[f"mp-{number}", "data"] = values
    reader = make_reader(cache=encoded("bfloat16"))
    for _ in range(2):
        for number in range(3):
            read = reader.load(f"mp-{number}", "data")[0].reshape(SHAPE)
            assert np.array_equal(read, stores[f"mp-{number}", "data"], equal_nan=True)
    assert (reader.stats.unencoded, reader.stats.misses, reader.stats.hits) == (3, 3, 3)
    assert caplog.text.count("is stored as float32, because bfloat16 cannot hold") == 1
