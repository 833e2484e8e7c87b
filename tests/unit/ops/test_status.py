"""``read_status`` agrees with the disk and makes no request."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.stores import small_group
from tests.support.training import write_config, write_pairs
from zarrcache import ConfigError, DataConfig, plan_evict, plan_warm
from zarrcache.data.reader import open_reader
from zarrcache.ops.selection import cache_at
from zarrcache.ops.status import read_status


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Four pairs, and an id without stores."""
    write_pairs(tmp_path, 4)
    return DataConfig.from_yaml(write_config(tmp_path, limit="1 MiB"))


def test_an_absent_cache_is_reported_and_not_created(config: DataConfig, tmp_path: Path) -> None:
    state = read_status(config)
    assert (state.exists, state.volume_bytes, state.limit_bytes) == (False, 0, 1024**2)
    assert state.coverage is not None
    assert (state.coverage.ids, state.coverage.warm, state.coverage.is_listed) == (5, 0, False)
    assert not (tmp_path / "cache").exists()


def test_warm_ids_are_counted_without_the_origin(config: DataConfig, tmp_path: Path) -> None:
    """An id with one of its densities cached is half warm."""
    plan_warm(config, ids=["mp-0", "mp-1", "mp-2"]).execute()
    label = [
        row.digest for row in plan_evict(config, ids=["mp-2"]).entries if "/label/" in row.note
    ]
    plan = plan_evict(config)
    assert plan.index is not None
    plan.index.drop(label)
    for role in ("data", "label"):
        os.rename(tmp_path / role, tmp_path / f"{role}-gone")
    state = read_status(config)
    files = list((tmp_path / "cache" / "zarrcache-v1" / "entries").glob("*/*"))
    assert state.array_tier.entries == len(files)
    assert (
        state.volume_bytes
        == state.array_tier.nbytes
        == sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    )
    covered = state.coverage
    assert covered is not None
    assert (covered.ids, covered.missing, covered.warm, covered.half, covered.is_listed) == (
        5,
        1,
        2,
        1,
        True,
    )
    assert covered.warm_ratio == 0.5
    assert covered.nbytes == 5 * 8192
    assert not covered.is_complete


def test_coverage_is_complete_when_every_present_id_is_warm(config: DataConfig) -> None:
    plan_warm(config).execute()
    covered = read_status(config).coverage
    assert covered is not None
    assert covered.is_complete
    assert covered.warm_ratio == 1.0


def test_a_directory_alone_has_no_limit(config: DataConfig, tmp_path: Path) -> None:
    plan_warm(config).execute()
    state = read_status(cache_at(tmp_path / "cache"), has_settings=False)
    assert (state.limit_bytes, state.min_free_bytes, state.coverage) == (None, None, None)
    assert state.array_tier == read_status(config).array_tier


def test_zarrcache_dir_does_not_override_an_explicit_directory(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_warm(config).execute()
    monkeypatch.setenv("ZARRCACHE_DIR", str(tmp_path / "elsewhere"))
    assert read_status(cache_at(tmp_path / "cache")).exists


def test_a_config_without_cache_is_refused(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"no cache block.*zarrcache init"):
        read_status(config.model_copy(update={"cache": None}))


def test_one_directory_for_input_and_label_is_counted_once(config: DataConfig) -> None:
    same = config.model_copy(update={"label_dir": config.data_dir})
    plan_warm(same).execute()
    covered = read_status(same).coverage
    assert covered is not None
    assert (covered.warm, covered.half, covered.nbytes) == (4, 0, 4 * 8192)


def test_an_id_listed_twice_in_the_map_is_one_id(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", "mp-0", "mp-1"]}))
    plan_warm(config).execute()
    covered = read_status(config).coverage
    assert covered is not None
    assert (covered.ids, covered.warm, covered.is_complete) == (2, 2, True)


def test_an_entry_of_the_store_that_is_no_longer_read_is_not_warm(
    config: DataConfig, tmp_path: Path
) -> None:
    """The origin has a directory now where it had a zip file, and the directory is read. Without a
    listing either counts.
    """
    os.rename(tmp_path / "data" / "mp-0.zarr", tmp_path / "mp-0.zarr")
    small_group(tmp_path / "data" / "mp-0.zarr.zip", shape=(6, 5, 4), as_zip=True)
    plan_warm(config).execute()
    os.rename(tmp_path / "mp-0.zarr", tmp_path / "data" / "mp-0.zarr")
    open_reader(config).relist()
    covered = read_status(config).coverage
    assert covered is not None
    assert (covered.warm, covered.half) == (3, 1)
    index = plan_evict(config, ids=[]).index
    assert index is not None
    index.drop([row.digest for row in index.rows("listing")])
    covered = read_status(config).coverage
    assert covered is not None
    assert (covered.ids, covered.missing, covered.warm, covered.is_listed) == (5, 0, 4, False)


def test_a_config_of_unconverted_files_is_refused_with_advice(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="caches nothing"):
        read_status(config.model_copy(update={"dataset_name": "chgcar_data"}))
