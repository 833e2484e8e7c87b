"""``cache.arrays.encoding``: rounded entries, their bound, and readers that want other values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tests.support.cachedirs import on_disk_bytes
from tests.support.cluster import start_cluster
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache import (
    DataConfig,
    Lookahead,
    NodeSampler,
    ZarrDataset,
    ZarrS3Reader,
    plan_evict,
    plan_warm,
    verify,
)
from zarrcache.cli.cache import format_verification, status_lines
from zarrcache.cli.plan import plan_lines
from zarrcache.data.reader import open_reader
from zarrcache.disk.entry import read_header
from zarrcache.ops.forecast import measure_split
from zarrcache.ops.status import read_status

Make = Callable[..., ZarrS3Reader]
ENCODINGS = ["float16", "bfloat16", "bits:12"]
RELATIVE = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "bits:12": 2.0**-13}
SHAPE = (24, 20, 18)
PAIRS = 4
TOTAL = "charge_density_total"
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


def config_of(tmp_path: Path, **cache: Any) -> DataConfig:
    return DataConfig(
        data_dir=tmp_path / "data",
        label_dir=tmp_path / "label",
        map_dir=tmp_path / "map.json",
        functional="GGA",
        normalize_data=False,
        train_fraction=1.0,
        cache={"dir": tmp_path / "cache", "min_free": 0, **cache},
    )


def test_commands_know_the_encoding(stores: Any, tmp_path: Path) -> None:
    """``warm`` encodes what is in float32 first, ``status`` says what is left to encode."""
    limit = HALF + 2 * 2 * 4096  # attributes of both directories
    exact = config_of(tmp_path, limit=limit)
    plan_warm(exact, ids=["mp-0", "mp-1"], workers=1).execute()
    small = config_of(tmp_path, limit=limit, **encoded("float16"))
    covered = read_status(small).coverage
    assert covered is not None
    assert (covered.warm, covered.to_encode, covered.half) == (2, 2, 0)
    assert "2 ids of these still in float32" in "\n".join(status_lines(read_status(small)))
    plan = plan_warm(small, revalidate=True, workers=1)
    assert plan.densities[:4] == (
        ("mp-0", "data", TOTAL), ("mp-0", "label", TOTAL),
        ("mp-1", "data", TOTAL), ("mp-1", "label", TOTAL),
    )  # fmt: skip
    assert (plan.estimate().fresh, plan.estimate().to_fetch) == (4, 4)
    report = plan_warm(small, workers=1).execute()
    assert (report.warm, report.fresh, report.bypassed) == (4, 2, ())
    assert report.nbytes == sum(values.nbytes for values in stores.values())
    assert report.disk_bytes == 8 * 4096 * 5
    state = read_status(small)
    assert state.coverage is not None
    assert (state.coverage.warm, state.coverage.to_encode) == (4, 0)
    assert state.coverage.nbytes == report.disk_bytes == state.volume_bytes - 4 * 4096
    cold = read_status(exact).coverage
    assert cold is not None
    assert cold.warm == 0
    assert plan_warm(small).densities == ()
    assert len(plan_evict(small, ids=["mp-3"]).entries) == 2


@pytest.mark.parametrize("encoding", ["float32", *ENCODINGS])
def test_the_forecast_has_the_size_of_the_entries(
    encoding: str, stores: Any, tmp_path: Path
) -> None:
    config = config_of(tmp_path, **encoded(encoding, limit=HALF))
    plan = measure_split(config).forecast(epochs=3, lookahead_bytes=0)
    plan_warm(config_of(tmp_path, **encoded(encoding)), workers=1).execute()
    covered = read_status(config).coverage
    assert covered is not None
    assert plan.disk_bytes == pytest.approx(covered.nbytes, rel=0.05)
    assert plan.epochs[-1].hit_ratio == (0.5 if encoding == "float32" else 1.0)
    shown = next(iter(plan_lines(plan)))
    assert (f"in a cache as {encoding}" in shown) == (encoding != "float32")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_verify_compares_a_sample_with_the_origin_within_the_bound(
    encoding: str, stores: Any, tmp_path: Path
) -> None:
    """An entry whose own checksum is right, but whose values are not the store's."""
    config = config_of(tmp_path, **encoded(encoding))
    plan_warm(config, workers=1).execute()
    report = verify(config, against_origin=True)
    assert (report.is_good, report.within_bound, report.corrupt) == (True, 8, ())
    assert "8 rounded entries read from the origin: within the error bound" in (
        format_verification(report)
    )
    reader = open_reader(config)
    arrays, key = reader.cache.arrays, reader.key("mp-2", "label")
    assert arrays is not None
    entry = arrays.get(key)
    assert entry is not None
    wrong = entry.array * np.float32(1 + 2.5 * RELATIVE[encoding])
    assert arrays.put(key, wrong, source=entry.header.source)
    report = verify(config, against_origin=True)
    assert not report.is_good
    assert [problem.url for problem in report.corrupt] == [key.url]
    assert "more than the error bound" in report.corrupt[0].why
    assert verify(config).entries == 2 + 7  # listings, densities


def test_a_lower_layer_in_float32_serves_a_reader_of_float16(
    make_reader: Make, stores: Any, tmp_path: Path
) -> None:
    load_all(make_reader(cache={"dir": tmp_path / "lower"}))
    lower = sorted(path.stat() for path in (tmp_path / "lower").rglob("entries/*/*"))
    wanted = load_all(make_reader(cache=encoded("float16", dir=tmp_path / "other")))
    reader = make_reader(cache=encoded("float16", lower=tmp_path / "lower"))
    assert_same(load_all(reader), wanted)
    assert (reader.stats.lower_hits, reader.stats.fetched_bytes) == (8, 0)
    assert sorted(path.stat() for path in (tmp_path / "lower").rglob("entries/*/*")) == lower
    assert_same(load_all(make_reader(cache=encoded("float16"))), wanted)


def test_peers_exchange_entries_of_the_same_encoding_only(stores: Any, tmp_path: Path) -> None:
    """A node that wants float32 reads the origin, although its peer has the density in float16."""
    with start_cluster(3, tmp_path / "nodes", tmp_path, str(tmp_path)) as cluster:
        first, second, third = cluster.nodes
        values = load_all(first.reader(**encoded("float16")))
        reader = second.reader(**encoded("float16"))
        assert_same(load_all(reader), values)
        assert (reader.stats.peer_hits, reader.stats.fetched_bytes) == (8, 0)
        exact = third.reader()
        assert_same(load_all(exact), stores)
        assert exact.stats.peer_hits == 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_damaged_encoded_entry_is_dropped_and_fetched_again(
    encoding: str, make_reader: Make, stores: Any, tmp_path: Path
) -> None:
    """Damage in the payload, in the header, and a payload that is cut."""
    wanted = load_all(make_reader(cache=encoded(encoding)))
    for damage in ("payload", "header", "cut"):
        path = max((tmp_path / "cache/zarrcache-v1/entries").rglob("*-*"), key=os.path.getsize)
        raw = bytearray(path.read_bytes())
        if damage == "cut":
            del raw[-1:]
        else:
            raw[len(raw) // 2 if damage == "payload" else 100] ^= 1
        path.write_bytes(raw)
        reader = make_reader(cache=encoded(encoding))
        assert_same(load_all(reader), wanted)
        assert (reader.stats.purges, reader.stats.misses) == (1, 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_samples_through_workers_equal_those_of_one_process(
    encoding: str, make_reader: Make, stores: Any
) -> None:
    """Cold in the workers, then warm; batches of one and of two."""
    reader = make_reader(cache=encoded(encoding))
    for batch_size in (1, 2):
        dataset = ZarrDataset(reader, "all")
        loader = DataLoader(
            dataset, batch_size=batch_size, num_workers=2, multiprocessing_context="fork"
        )
        found = [
            (name, batch["data"][n], batch["label"][n])
            for batch in loader
            for n, name in enumerate(batch["index"])
        ]
        assert len(found) == PAIRS
        for i, (name, data, label) in enumerate(found):
            wanted = dataset[i]
            assert name == wanted["index"]
            assert torch.equal(data, wanted["data"])
            assert torch.equal(label, wanted["label"])


def test_a_precision_of_16_bits_gets_the_bits_that_float32_gives(
    make_reader: Make, stores: Any
) -> None:
    """Rounding once on the disk and once to the tensor is rounding once."""
    pairs: tuple[tuple[str, Literal["bf16", "f16"]], ...]
    pairs = (("bfloat16", "bf16"), ("float16", "f16"))
    for encoding, precision in pairs:
        for normalize in (False, True):
            if precision == "f16" and normalize:
                continue  # subnormal float16: rounded to 11 bits, and then to fewer
            exact, rounded = (
                ZarrDataset(
                    make_reader(cache=cache, normalize=normalize), "all", precision=precision
                )
                for cache in (None, encoded(encoding))
            )
            for i in range(PAIRS):
                assert torch.equal(exact[i]["data"], rounded[i]["data"])
                assert torch.equal(exact[i]["label"], rounded[i]["label"])


def test_look_ahead_lends_encoded_entries(make_reader: Make, stores: Any, tmp_path: Path) -> None:
    """On a disk with room for few of them: every value as with room for all."""
    wanted = load_all(make_reader(cache=encoded("bits:12", dir=tmp_path / "whole")))
    cache = encoded("bits:12", limit=4096 * 24, lookahead=4096 * 24)
    reader = make_reader(cache=cache, train_fraction=1.0)
    dataset = ZarrDataset(reader)
    sampler = NodeSampler(dataset, seed=1)
    with Lookahead(dataset, sampler):
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for index in sampler:
                sample = dataset[index]
                for role in ("data", "label"):
                    read = sample[role].numpy()[0]  # type: ignore[literal-required]
                    assert np.array_equal(read, wanted[sample["index"], role])
    assert reader.stats.purges == reader.stats.cache_errors == 0
