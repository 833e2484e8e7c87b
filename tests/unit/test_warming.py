"""``plan_warm``: what is fetched, what is skipped, what is said of the rest. Over directories; S3 is in tests/cli."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.stores import small_group
from tests.support.training import write_config, write_pairs
from zarrcache import ConfigError, DataConfig, ZarrS3Reader, plan_warm
from zarrcache.registry import open_reader
from zarrcache.status import look


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Four pairs, and an id without stores."""
    write_pairs(tmp_path, 4)
    return DataConfig.from_yaml(write_config(tmp_path))


def settings(config: DataConfig, **cache: object) -> DataConfig:
    """The config with other cache settings."""
    assert config.cache is not None
    return config.model_copy(update={"cache": config.cache.model_copy(update=cache)})


def test_a_plan_fetches_nothing_and_its_estimate_counts_objects_and_bytes(config: DataConfig, tmp_path: Path) -> None:
    """Requests are one LIST a density and one GET an object; the ids of the map that have no store are named."""
    plan = plan_warm(config)
    assert plan.task_ids == ("mp-0", "mp-1", "mp-2", "mp-3")
    assert plan.missing == ("mp-absent",)
    estimate = plan.estimate()
    files = [path for role in ("data", "label") for path in (tmp_path / role).glob("*/charge_density_total/*")]
    assert (estimate.fresh, estimate.to_fetch, estimate.failed) == (0, 8, ())
    assert estimate.requests == 8 + len(files)
    assert estimate.fetch_bytes == sum(path.stat().st_size for path in files)
    assert plan.reader.stats.fetched_bytes == 0


def test_executing_makes_everything_warm_and_a_second_time_fetches_nothing(config: DataConfig) -> None:
    """The second run lists each density once and reads no object."""
    report = plan_warm(config).execute()
    assert (report.ids, report.warm, report.fresh, report.failed, report.bypassed) == (4, 4, 0, (), ())
    assert report.nbytes == 8 * 6 * 5 * 4 * 4
    assert report.is_good
    again = plan_warm(config)
    assert again.estimate().fresh == 8
    report = again.execute()
    assert (report.warm, report.fresh, report.stats.fetched_bytes, report.stats.requests) == (4, 4, 0, 8)


def test_what_the_origin_changed_is_fetched_again(config: DataConfig, tmp_path: Path) -> None:
    """Only the one store, and a reader that trusts its cache sees the new values."""
    plan_warm(config).execute()
    new = small_group(tmp_path / "label" / "mp-2.zarr", shape=(6, 5, 4), seed=77)["charge_density_total"]
    plan = plan_warm(config)
    assert (plan.estimate().fresh, plan.estimate().to_fetch) == (7, 1)
    assert (plan.execute().fresh, plan.execute().stats.misses) == (3, 0)
    values, _ = open_reader(config.model_copy(update={"normalize_data": False})).load("mp-2", "label")
    assert np.array_equal(values, new.ravel())


def test_a_new_id_is_found_although_the_listing_is_stored(config: DataConfig, tmp_path: Path) -> None:
    """Warm lists the directories anew, and a run without the origin then knows the new id."""
    plan_warm(config).execute()
    write_pairs(tmp_path, 5)
    assert plan_warm(config).execute().warm == 5
    for role in ("data", "label"):
        (tmp_path / role).rename(tmp_path / f"{role}-gone")
    assert len(open_reader(config).task_ids) == 5


def test_a_damaged_store_is_named_and_the_others_are_warm(config: DataConfig, tmp_path: Path) -> None:
    """The error has the URL of the chunk, and the run goes on."""
    chunk = tmp_path / "data" / "mp-1.zarr" / "charge_density_total" / "0.0.0"
    chunk.write_bytes(b"not a chunk")
    report = plan_warm(config).execute()
    assert (report.warm, report.failed_ids) == (3, ("mp-1",))
    assert str(chunk) in report.failed[0].error
    assert not report.is_good


def test_ids_of_a_split_and_ids_by_name(config: DataConfig) -> None:
    """Train and test make up all; an id by name need not be in the map; both together are refused."""
    train, test = plan_warm(config, split="train").task_ids, plan_warm(config, split="test").task_ids
    assert (list(train), list(test)) == open_reader(config).split_task_ids()
    report = plan_warm(config, ids=["mp-3", "mp-3", "mp-77"]).execute()
    assert (report.ids, report.warm, report.failed_ids) == (2, 1, ("mp-77",))
    with pytest.raises(ConfigError, match="exclude each other"):
        plan_warm(config, ids=["mp-3"], split="train")
    with pytest.raises(ConfigError, match="not a plain name"):
        plan_warm(config, ids=["../mp-3"])


def test_it_stops_when_so_many_bytes_are_warm(config: DataConfig) -> None:
    """Two ids' bytes: two are warm, two are left, and nothing failed."""
    report = plan_warm(config, limit_bytes=4 * 6 * 5 * 4 * 4).execute()
    assert (report.warm, report.untried, report.is_good) == (2, 2, True)


def test_what_does_not_fit_is_counted_and_the_rest_is_not_fetched_for_nothing(tmp_path: Path) -> None:
    """Room for a few of twenty: after three that did not fit, the others are only listed."""
    write_pairs(tmp_path, 10, chunks=(6, 5, 4))
    config = DataConfig.from_yaml(write_config(tmp_path, limit=6 * 8192))
    report = plan_warm(config, workers=1).execute()
    assert (report.warm, len(report.bypassed), report.is_good) == (2, 8, True)
    assert report.stats.misses == 4 + 3
    again = plan_warm(config, workers=1).execute()
    assert (again.fresh, again.stats.misses) == (2, 3)


def test_what_was_evicted_again_is_not_said_to_be_warm(tmp_path: Path) -> None:
    """With ``least-recently-stored`` and too small a limit, late entries push out early ones; the report agrees with the disk."""
    write_pairs(tmp_path, 5)
    config = DataConfig.from_yaml(write_config(tmp_path, limit=6 * 8192, eviction="least-recently-stored"))
    report = plan_warm(config, workers=1).execute()
    covered = look(config).coverage
    assert covered is not None
    assert 1 <= report.warm == covered.warm <= 3
    assert report.warm + len(report.bypassed) == 5


def test_two_processes_do_the_same_as_one(config: DataConfig) -> None:
    """Every density is stored once, and the counters are those of all processes."""
    report = plan_warm(config, workers=2).execute()
    assert (report.warm, report.stats.misses, report.stats.hits) == (4, 8, 0)


def test_a_reader_can_be_warmed_too(config: DataConfig) -> None:
    """The reader that a script has already made."""
    reader = open_reader(config)
    assert plan_warm(reader).execute().warm == 4
    before = reader.stats
    reader.load("mp-0", "data")
    assert (reader.stats - before).requests == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache": None}, "no cache block"),
        ({"functional": "r2SCAN"}, r"Functional 'r2SCAN' not found in mapping. Available: \['GGA'\]"),
    ],
)
def test_a_config_that_cannot_be_warmed_is_refused(config: DataConfig, change: dict[str, object], words: str) -> None:
    """With the words that say what to change."""
    with pytest.raises(ConfigError, match=words):
        plan_warm(config.model_copy(update=change))


def test_a_cache_that_cannot_be_filled_is_refused(config: DataConfig, tmp_path: Path) -> None:
    """Training would go on without a cache; warm must not pretend."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache\.dir .*file/cache cannot be used"):
        plan_warm(settings(config, dir=tmp_path / "file" / "cache"))
    assert config.cache is not None
    with pytest.raises(ConfigError, match=r"cache\.arrays\.enabled is false"):
        plan_warm(settings(config, arrays=config.cache.arrays.model_copy(update={"enabled": False})))
    with pytest.raises(ConfigError, match="the reader has no cache"):
        plan_warm(ZarrS3Reader(config.data_dir, config.label_dir, config.map_dir, "GGA", True, 0.5))
    with pytest.raises(ConfigError, match="whole number from 1"):
        plan_warm(config, workers=0)


def test_an_empty_functional_is_warm_at_once(config: DataConfig, tmp_path: Path) -> None:
    """No ids, no failure."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": []}))
    report = plan_warm(config).execute()
    assert (report.ids, report.is_good) == (0, True)
