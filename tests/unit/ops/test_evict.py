"""``plan_evict`` chooses the right entries and drops nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.stores import small_group
from tests.support.training import write_config, write_pairs
from zarrcache import ConfigError, DataConfig, ZarrCacheError, plan_evict, plan_warm
from zarrcache.config import CacheConfig
from zarrcache.data.reader import open_reader
from zarrcache.disk.index import Row
from zarrcache.ops.selection import cache_at

ENTRY = 8192  # bytes on disk of one of these densities: a page of header and a page of values


@pytest.fixture
def warm(tmp_path: Path) -> DataConfig:
    """Three pairs, warm, and metadata of one store in the byte tier."""
    write_pairs(tmp_path, 3)
    config = DataConfig.from_yaml(write_config(tmp_path))
    fill(config, tmp_path)
    return config


def fill(config: DataConfig, tmp_path: Path) -> None:
    plan_warm(config).execute()
    group = open_reader(config).read_zarr_store(tmp_path / "data" / "mp-1.zarr")
    _ = group["charge_density_total"][0, 0, 0]  # objects of the byte tier


def stores(rows: tuple[Row, ...], tmp_path: Path) -> set[str]:
    """Stores of array entries, as ``role/task_id``."""
    urls = [row.note.split("\n") for row in rows if row.kind == "array"]
    return {
        url.removeprefix(f"{tmp_path}/").removesuffix(".zarr") for _, url, array in urls if array
    }


def test_a_config_alone_selects_all_entries_of_its_ids(warm: DataConfig, tmp_path: Path) -> None:
    """Arrays, objects of the byte tier and listings; afterwards index and disk are empty."""
    plan = plan_evict(warm)
    assert stores(plan.entries, tmp_path) == {
        f"{role}/mp-{n}" for role in ("data", "label") for n in range(3)
    }
    assert {row.kind for row in plan.entries} == {"array", "listing", "object"}
    assert plan.disk_bytes == plan.execute() > 6 * ENTRY
    assert plan_evict(warm).entries == ()
    root = tmp_path / "cache" / "zarrcache-v1"
    assert [
        path for tier in ("entries", "bytes") for path in (root / tier).rglob("*") if path.is_file()
    ] == []


def test_a_plan_drops_nothing(warm: DataConfig) -> None:
    assert plan_evict(warm).entries == plan_evict(warm).entries != ()


def test_entries_that_were_stored_again_since_the_plan_are_kept(
    warm: DataConfig, tmp_path: Path
) -> None:
    """``zarrcache evict`` may wait for its answer while a training fills the cache again. An object
    has the same file name again, so the name does not tell.
    """
    plan = plan_evict(warm, everything=True)
    plan_evict(warm, everything=True).execute()
    fill(warm, tmp_path)
    again = plan_evict(warm, everything=True).entries
    assert {row.kind for row in again} == {"array", "listing", "object"}
    assert plan.execute() == 0
    assert plan_evict(warm, everything=True).entries == again


def test_failure_of_the_disk_is_an_error_in_words(warm: DataConfig) -> None:
    """Not one of SQLite, which a script would not expect, and the command would not word."""
    plan = plan_evict(warm)
    plan.index._file.open().reset("sqlite_query_only", 1, update=False)
    with pytest.raises(ZarrCacheError, match=r"not all entries could be dropped .*readonly"):
        plan.execute()
    assert plan.execute() == plan.disk_bytes


def test_ids_select_their_stores_in_both_tiers(warm: DataConfig, tmp_path: Path) -> None:
    """Listings are not selected; an id without entries is named."""
    plan = plan_evict(warm, ids=["mp-1", "mp-unheard-of"])
    assert plan.absent == ("mp-unheard-of",)
    assert stores(plan.entries, tmp_path) == {"data/mp-1", "label/mp-1"}
    assert any(row.kind == "object" for row in plan.entries)
    plan.execute()
    assert stores(plan_evict(warm).entries, tmp_path) == {
        f"{role}/mp-{n}" for role in ("data", "label") for n in (0, 2)
    }


def test_entries_of_another_config_stay(warm: DataConfig, tmp_path: Path) -> None:
    """Only ``everything`` selects both."""
    other_root = tmp_path / "other"
    other_root.mkdir()
    write_pairs(other_root, 2)
    other = DataConfig.from_yaml(write_config(other_root, dir=str(tmp_path / "cache")))
    plan_warm(other).execute()
    plan_evict(warm).execute()
    assert len(stores(plan_evict(other).entries, tmp_path)) == 4
    assert len(plan_evict(other, everything=True).entries) == len(plan_evict(other).entries)


def test_older_than_selects_old_entries_but_no_listings(
    warm: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a listing no training starts offline."""
    assert plan_evict(warm, older_than_s=3600).entries == ()
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7 * 86400)
    plan = plan_evict(warm, older_than_s=3600)
    assert len(stores(plan.entries, tmp_path)) == 6
    plan.execute()
    for role in ("data", "label"):
        os.rename(tmp_path / role, tmp_path / f"{role}-gone")
    assert open_reader(warm).task_ids == ["mp-0", "mp-1", "mp-2"]


def test_a_target_selects_the_oldest_and_no_more_than_needed(
    warm: DataConfig, tmp_path: Path
) -> None:
    volume = plan_evict(warm, everything=True).disk_bytes
    plan = plan_evict(warm, target_bytes=volume - 2 * ENTRY)
    assert stores(plan.entries, tmp_path) == {"data/mp-0", "label/mp-0"}
    assert plan_evict(warm, target_bytes=volume).entries == ()


def test_stale_selects_stores_that_changed_or_are_gone_at_the_origin(
    warm: DataConfig, tmp_path: Path
) -> None:
    assert plan_evict(warm, stale=True).entries == ()
    small_group(tmp_path / "data" / "mp-1.zarr", shape=(6, 5, 4), seed=5)
    os.rename(tmp_path / "label" / "mp-2.zarr", tmp_path / "removed.zarr")
    plan = plan_evict(warm, stale=True)
    assert stores(plan.entries, tmp_path) == {"data/mp-1", "label/mp-2"}


def test_a_directory_without_a_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    plan = plan_evict(CacheConfig(dir=tmp_path / "mine"), everything=True)
    assert (plan.entries, plan.execute()) == ((), 0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_everything_leaves_other_files_of_the_directory_alone(
    warm: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "cache" / "thesis.tex").touch()
    plan_evict(cache_at(tmp_path / "cache"), everything=True).execute()
    assert (tmp_path / "cache" / "thesis.tex").exists()
    assert plan_evict(warm, everything=True).entries == ()


def test_a_mapped_entry_stays_readable_after_eviction(warm: DataConfig) -> None:
    """The next read is a miss."""
    reader = open_reader(warm)
    values, _ = reader.load("mp-0", "data")
    before = values.copy()
    plan_evict(warm).execute()
    assert (values == before).all()
    assert reader.load("mp-0", "data")[0].tolist() == before.tolist()
    assert reader.stats.misses == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "No entries are selected"),
        ({"stale": True, "everything": True}, "Finding stale entries"),
        ({"older_than_s": 1.0}, "No entries are selected"),
    ],
)
def test_a_directory_alone_needs_everything(
    tmp_path: Path, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_evict(CacheConfig(dir=tmp_path), **arguments)  # type: ignore[arg-type]


def test_ids_and_everything_exclude_each_other(warm: DataConfig) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        plan_evict(warm, ids=["mp-1"], everything=True)
