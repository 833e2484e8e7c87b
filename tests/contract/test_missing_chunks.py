"""Chunks that the grid has and the origin lacks, and values that are no numbers, are named."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr

from tests.support.gateway import BUCKET, running_gateway
from tests.support.readers import make_reader
from tests.support.stores import plain_read, small_group
from tests.support.training import zarrcache
from zarrcache import ZarrS3Reader, open_store, ops
from zarrcache.config import DataConfig
from zarrcache.errors import IncompleteArrayError, OriginError, ZarrCacheError

NAME = "charge_density_total"
LAYOUTS: dict[str, dict[str, Any]] = {
    "v2": {"chunks": (4, 4, 4)},
    "v2-slashes": {"chunks": (5, 3, 4), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v3": {"chunks": (4, 4, 4), "zarr_format": 3},
    "v3-dots": {
        "chunks": (4, 4, 4),
        "zarr_format": 3,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    },
    "sharded": {"chunks": (2, 5, 2), "shards": (4, 5, 4), "zarr_format": 3},
    "zip": {"chunks": (4, 4, 4), "as_zip": True},
    "zip-v3": {"chunks": (4, 4, 4), "as_zip": True, "zarr_format": 3},
}


def chunks_of(store: Path) -> list[str]:
    """Keys of the chunks of the density, below the store."""
    if store.suffix == ".zip":
        with zipfile.ZipFile(store) as archive:
            names = archive.namelist()
    else:
        names = [f"{path.relative_to(store)}" for path in store.rglob("*") if path.is_file()]
    return sorted(n for n in names if n.startswith(f"{NAME}/") and n[-1].isdigit())


def lose(store: Path, keys: list[str]) -> None:
    """Remove objects from a store."""
    if store.suffix != ".zip":
        for key in keys:
            (store / key).unlink()
        return
    whole = store.with_suffix(".whole")
    store.rename(whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(store, "w") as new:
        for info in old.infolist():
            if info.filename not in keys:
                new.writestr(info, old.read(info))
    whole.unlink()


def pair(directory: Path, layout: dict[str, Any] | None = None, **more: Any) -> tuple[Path, Path]:
    """Input and label of mp-1, and the map."""
    name = "mp-1.zarr.zip" if (layout or {}).get("as_zip") else "mp-1.zarr"
    stores = directory / "data" / name, directory / "label" / name
    for seed, store in enumerate(stores):
        small_group(store, seed=seed, **(layout or {"chunks": (4, 4, 4)}), **more)
    (directory / "map.json").write_text(json.dumps({"GGA": ["mp-1"]}))
    return stores


def config_of(directory: Path, **cache: Any) -> DataConfig:
    return DataConfig(
        data_dir=str(directory / "data"),
        label_dir=str(directory / "label"),
        map_dir=str(directory / "map.json"),
        functional="GGA",
        cache={"dir": directory / "cache", "min_free": 0, **cache},
    )


def config_file(directory: Path, **cache: Any) -> Path:
    """The config of `config_of` as a file."""
    document = {
        "data_dir": str(directory / "data"),
        "label_dir": str(directory / "label"),
        "map_dir": str(directory / "map.json"),
        "functional": "GGA",
        "cache": {"dir": str(directory / "cache"), "min_free": 0, **cache},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("n_lost", [1, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_absent_chunk_is_an_error_or_the_fill_value(
    tmp_path: Path, layout: str, n_lost: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """In every layout, with a cache or without; ``fill`` gives what zarr gives, and says so."""
    store, _ = pair(tmp_path, LAYOUTS[layout])
    keys = chunks_of(store)
    lose(store, keys[:n_lost])
    said = f"{len(keys[:n_lost])} of {len(keys)} chunks are absent"
    for cache in (None, {}, {"arrays": {"enabled": False}}):
        with pytest.raises(IncompleteArrayError, match=said) as caught:
            make_reader(tmp_path, cache=cache).load("mp-1", "data")
        assert f"{store}/{NAME}" in str(caught.value)
        assert "cache.missing_chunks: fill" in str(caught.value)
    wanted = plain_read(store)
    for name, outcome in (("first", "miss"), ("second", "hit")):
        caplog.clear()
        reader = make_reader(tmp_path, cache={"missing_chunks": "fill"})
        for _ in range(2):
            values, gridsize = reader.load("mp-1", "data")
            assert np.array_equal(values.reshape(gridsize), wanted), name
        assert caplog.text.count(f"{len(keys[:n_lost])} of its chunks are absent") == 1, outcome


def test_of_many_densities_with_absent_chunks_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``fill`` they are expected: spin densities, for example. The others are only counted."""
    for role in ("data", "label"):
        for number in range(5):
            store = tmp_path / role / f"mp-{number}.zarr"
            small_group(store, seed=number, chunks=(4, 4, 4))
            lose(store, chunks_of(store)[:1])
    (tmp_path / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(5)]}))
    reader = make_reader(tmp_path, cache={"missing_chunks": "fill"})
    for number in range(5):
        reader.load(f"mp-{number}", "data")
    assert caplog.text.count("of its chunks are absent") == 1


@pytest.mark.parametrize("name", ["v2", "v2-slashes", "v3", "v3-dots", "sharded", "zip"])
def test_array_is_not_filled_where_its_chunks_have_other_keys(tmp_path: Path, name: str) -> None:
    """As those of zarr before 2.8, which did not say that its keys have slashes."""
    stores = pair(tmp_path, LAYOUTS[name])
    for store in stores:
        rewrite_separator(store)
    with pytest.raises(IncompleteArrayError, match="named like chunks of another array"):
        make_reader(tmp_path, cache={"missing_chunks": "fill"}).load("mp-1", "data")


def rewrite_separator(store: Path) -> None:
    """Let the metadata name the other separator of keys."""
    if store.suffix == ".zip":
        with zipfile.ZipFile(store) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    else:
        members = {
            f"{NAME}/{f.name}": f.read_bytes() for f in (store / NAME).iterdir() if f.is_file()
        }
    key = next(k for k in (f"{NAME}/.zarray", f"{NAME}/zarr.json") if k in members)
    document = json.loads(members[key])
    keys = document.get("chunk_key_encoding", {}).get("configuration", document)
    field = "dimension_separator" if keys is document else "separator"
    keys[field] = "/" if keys.get(field, ".") == "." else "."
    members[key] = json.dumps(document).encode()
    if store.suffix != ".zip":
        (store / key).write_bytes(members[key])
        return
    with zipfile.ZipFile(store, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_sparse_array_is_read_as_zarr_reads_it(tmp_path: Path) -> None:
    """Zarr writes no object for chunks of zeros."""
    values = np.zeros((8, 5, 6), np.float32)
    values[-1, -1, -1] = 3.0
    store, _ = pair(tmp_path, {"zarr_format": 3, "fill_value": 2.5}, arrays={NAME: values})
    reader = make_reader(tmp_path, cache={"missing_chunks": "fill"})
    assert np.array_equal(reader.load("mp-1", "data")[0].reshape(8, 5, 6), plain_read(store))


def test_entry_that_was_filled_is_refused_under_error(tmp_path: Path) -> None:
    """The count is kept with the entry, so another setting, run or node does not take it."""
    store, _ = pair(tmp_path)
    lose(store, chunks_of(store)[:2])
    make_reader(tmp_path, cache={"missing_chunks": "fill"}).load("mp-1", "data")
    reader = make_reader(tmp_path, cache={})
    with pytest.raises(IncompleteArrayError, match="cached with 2 chunks"):
        reader.load("mp-1", "data")
    assert make_reader(tmp_path, cache={"missing_chunks": "fill"}).stats.misses == 0


def test_warm_verify_and_doctor_name_absent_chunks(tmp_path: Path) -> None:
    """Under ``error`` they exit with 1, under ``fill`` they say it."""
    _, label = pair(tmp_path)
    lose(label, chunks_of(label)[3:6])
    config = config_file(tmp_path)
    done = zarrcache("warm", config)
    assert done.code == 1
    assert "mp-1 (label)" in done.err
    assert "3 of 18 chunks are absent" in done.err
    done = zarrcache("doctor", config)
    assert done.code == 1
    assert f"{label} {NAME} lacks 3 of 18 chunks" in done.out
    config = config_file(tmp_path, missing_chunks="fill")
    for arguments in (["warm"], ["verify"], ["verify", "--against-origin"]):
        done = zarrcache(arguments[0], config, *arguments[1:])
        assert done.code == 0, done.err
        assert "3 of " in done.err, arguments
        assert f"{label}" in done.err or "mp-1 (label)" in done.err
    report = ops.verify(config_of(tmp_path))
    assert [problem.url for problem in report.flawed] == [str(label)]
    assert not report.is_good


def test_verify_against_the_origin_names_chunks_that_were_lost_later(tmp_path: Path) -> None:
    """The entry is whole and stays: no present version of the store could replace it."""
    _, label = pair(tmp_path)
    assert ops.plan_warm(config_of(tmp_path)).execute().is_good
    lose(label, chunks_of(label))
    assert ops.verify(config_of(tmp_path)).is_good
    report = ops.verify(config_of(tmp_path), against_origin=True)
    assert report.stale == ()
    assert [problem.why for problem in report.flawed] == ["the origin lacks 18 of 18 chunks"]
    assert ops.read_status(config_of(tmp_path)).coverage.warm == 1  # type: ignore[union-attr]
    assert not report.is_good


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_values_that_are_no_numbers_are_named(
    tmp_path: Path, bad: float, normalize: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The reader returns them and says it once per density; warm and verify exit with 1."""
    values = np.ones((6, 5, 4), np.float32)
    values[1, 2, :3] = bad
    store, _ = pair(tmp_path, arrays={NAME: values})
    shutil.rmtree(tmp_path / "label")
    pair_of_ones = np.ones((6, 5, 4), np.float32)
    small_group(tmp_path / "label" / "mp-1.zarr", {NAME: pair_of_ones})
    config = config_of(tmp_path).model_copy(update={"normalize_data": normalize})
    report = ops.plan_warm(config).execute()
    assert [(r.task_id, r.role, r.flaws.nonfinite) for r in report.flawed] == [("mp-1", "data", 3)]
    assert report.warm == 1
    assert not report.is_good
    verified = ops.verify(config)
    assert [(p.url, p.why) for p in verified.flawed] == [
        (str(store), "3 of its values are NaN or infinite")
    ]
    assert not verified.is_good
    caplog.clear()
    reader = make_reader(tmp_path, cache={}, normalize=normalize)
    for _ in range(3):
        assert np.count_nonzero(~np.isfinite(reader.load("mp-1", "data")[0])) == 3
    assert caplog.text.count("3 of its values are NaN or infinite") == 1


def test_double_that_overflows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Infinite as float32, although it is finite in the store."""
    pair(tmp_path, arrays={NAME: np.full((3, 4, 5), 1e300)})
    with np.errstate(over="ignore"), caplog.at_level(logging.WARNING):
        make_reader(tmp_path, cache={}).load("mp-1", "data")
    assert "60 of its values are NaN or infinite" in caplog.text


def _read_pickled(pickled: bytes) -> str:
    try:
        node = pickle.loads(pickled)
        read = node[...] if isinstance(node, zarr.Array) else node[NAME][...]
    except Exception as exc:  # noqa: BLE001 - any type is the finding
        return f"{type(exc).__name__}: {exc}"
    return f"read {np.asarray(read).sum()}"


@pytest.fixture(scope="module")
def other_process() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.parametrize("what", ["group", "array"])
@pytest.mark.parametrize("event", ["deleted", "NoSuchBucket", "AccessDenied", "down"])
def test_open_array_whose_origin_vanished_is_an_error_in_another_process(
    tmp_path: Path, event: str, what: str, other_process: Any
) -> None:
    """Zarr would take a FileNotFoundError or KeyError for chunks that were never written."""
    root = tmp_path / "bucket" / "data" / "mp-1.zarr"
    small_group(root, chunks=(4, 4, 4))
    config = {"dir": tmp_path / "cache", "min_free": 0, "retry": {"attempts": 1}}
    with running_gateway(tmp_path / "bucket") as gateway:
        url, kwargs = f"s3://{BUCKET}/data/mp-1.zarr", gateway.s3_kwargs
        group = zarr.open_group(open_store(url, s3_kwargs=kwargs, cache=config), mode="r")
        pickled = pickle.dumps(group[NAME] if what == "array" else group)
        shutil.rmtree(tmp_path / "cache")
        if event == "deleted":
            shutil.rmtree(root)
        elif event == "down":
            gateway.server_close()
        else:
            gateway.gone = event
        said = other_process.apply(_read_pickled, (pickled,))
    assert said.startswith(
        ("IncompleteArrayError", "OriginAccessError", "OriginUnavailableError")
    ), said


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
@pytest.mark.parametrize("event", ["deleted", "NoSuchBucket", "AccessDenied"])
def test_reader_whose_origin_vanished_is_an_error(tmp_path: Path, event: str, engine: str) -> None:
    """Named, and nothing is stored."""
    root = tmp_path / "bucket" / "data" / "mp-1.zarr"
    small_group(root, chunks=(4, 4, 4))
    with running_gateway(tmp_path / "bucket") as gateway:
        reader: ZarrS3Reader = make_reader(
            tmp_path,
            f"s3://{BUCKET}",
            s3_kwargs=gateway.s3_kwargs,
            cache={"fetch": {"engine": engine}},
        )
        assert reader.store_names("data")
        if event == "deleted":
            shutil.rmtree(root)
        else:
            gateway.gone = event
        with pytest.raises(OriginError, match=r"mp-1\.zarr"):
            reader.load("mp-1", "data")
        gateway.gone = ""
        small_group(root, chunks=(4, 4, 4))
        assert np.array_equal(reader.load("mp-1", "data")[0], plain_read(root).ravel())


def test_store_that_was_replaced_by_another_array_is_an_error(tmp_path: Path) -> None:
    """Its chunks would be absent, and read as the fill value."""
    root = tmp_path / "mp-1.zarr"
    small_group(root, chunks=(4, 4, 4))
    opened = zarr.open_group(open_store(root), mode="r")
    pickled = pickle.dumps(opened[NAME])
    shutil.rmtree(root / NAME)
    (root / "other").mkdir()
    (root / "other" / ".zarray").write_text("{}")
    with pytest.raises(ZarrCacheError, match="deleted or replaced"):
        pickle.loads(pickled)[...]
