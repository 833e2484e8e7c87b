"""``plan_warm``: what is fetched, skipped and reported, over local directories."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.stores import small_group
from tests.support.training import write_config, write_pairs
from zarrcache import ConfigError, DataConfig, ZarrS3Reader, plan_evict, plan_warm
from zarrcache._units import format_bytes, parse_bytes
from zarrcache.cli.warm import format_warm_estimate, warm_errors, warm_notes
from zarrcache.config import ArrayTierConfig
from zarrcache.data.reader import open_reader
from zarrcache.disk.entry import read_header
from zarrcache.ops.status import read_status
from zarrcache.parallel import World
from zarrcache.parallel import pool as workpool
from zarrcache.train import NodeSampler, Sources


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Four pairs, and an id without stores."""
    write_pairs(tmp_path, 4)
    return DataConfig.from_yaml(write_config(tmp_path))


TOTAL = "charge_density_total"


def write_map(directory: Path, count: int) -> None:
    """Write a map of ids that all have stores."""
    (directory / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(count)]}))


def settings(config: DataConfig, **cache: object) -> DataConfig:
    """The config with other cache settings."""
    assert config.cache is not None
    return config.model_copy(update={"cache": config.cache.model_copy(update=cache)})


def test_a_plan_fetches_nothing_and_its_estimate_counts_objects_and_bytes(
    config: DataConfig, tmp_path: Path
) -> None:
    """One LIST per density, one GET per object, and one of the attributes of its store."""
    plan = plan_warm(config)
    assert plan.task_ids == ("mp-0", "mp-1", "mp-2", "mp-3")
    assert plan.missing == ("mp-absent",)
    estimate = plan.estimate()
    files = [
        path
        for role in ("data", "label")
        for path in (tmp_path / role).glob("*/charge_density_total/*")
    ]
    files = [path for path in files if path.name != ".zattrs"]
    files += [
        path for role in ("data", "label") for path in (tmp_path / role).glob("mp-?.zarr/.zattrs")
    ]
    assert (estimate.fresh, estimate.to_fetch, estimate.failed) == (0, 8, ())
    assert estimate.requests == 8 + len(files)
    assert estimate.fetch_bytes == sum(path.stat().st_size for path in files)
    assert plan.reader.stats.fetched_bytes == 0


@pytest.mark.parametrize("cache", [{"revalidate": "run"}, {"revalidate": "epoch"}, {}])
def test_a_second_run_fetches_nothing(config: DataConfig, cache: dict[str, object]) -> None:
    """If it revalidates, it lists the directories and each density once."""
    config, revalidate = settings(config, **cache), None if cache else True
    report = plan_warm(config).execute()
    assert (report.ids, report.warm, report.fresh, report.failed, report.bypassed) == (
        4,
        4,
        0,
        (),
        (),
    )
    assert report.nbytes == 8 * 6 * 5 * 4 * 4
    assert report.is_good
    again = plan_warm(config, revalidate=revalidate)
    assert again.reader.stats.requests == 2
    assert again.estimate().fresh == 8
    report = again.execute()
    assert (report.warm, report.fresh, report.stats.fetched_bytes, report.stats.requests) == (
        4,
        4,
        0,
        8,
    )


def test_warm_densities_cost_no_request_with_revalidate_never(
    config: DataConfig, tmp_path: Path
) -> None:
    """Planned, estimated and executed without the origin; only missing densities are fetched."""
    write_map(tmp_path, 4)
    plan_warm(config).execute()
    for role in ("data", "label"):
        (tmp_path / role).rename(tmp_path / f"{role}-gone")
    plan = plan_warm(config)
    assert (len(plan.task_ids), plan.trusted, plan.densities, plan.estimate().fresh) == (
        4,
        8,
        (),
        8,
    )
    report = plan.execute()
    assert (report.warm, report.fresh, report.untried, report.is_good, report.stats.requests) == (
        4,
        4,
        0,
        True,
        0,
    )
    assert report.disk_bytes == 8 * 8192
    assert 8 * 480 <= report.nbytes <= 8 * 4096
    assert plan.reader.stats.requests == 0
    for role in ("data", "label"):
        (tmp_path / f"{role}-gone").rename(tmp_path / role)
    (entry,) = [row for row in plan_evict(config, ids=["mp-1"]).entries if "/label/" in row.note]
    index = plan_evict(config).index
    assert index is not None
    index.drop([entry.digest])
    plan = plan_warm(config)
    assert plan.densities == (("mp-1", "label", TOTAL),)
    report = plan.execute()
    assert (report.warm, report.fresh, report.stats.misses, report.stats.hits) == (4, 3, 1, 0)


@pytest.mark.parametrize("revalidate", ["never", "run"])
def test_deleted_entry_files_are_fetched_again(config: DataConfig, revalidate: str) -> None:
    """A cleaner of the scratch disk removes old files and leaves the index."""
    config = settings(config, revalidate=revalidate)
    plan_warm(config).execute()
    assert config.cache is not None
    for path in config.cache.dir.glob("zarrcache-v1/entries/*/*"):
        if read_header(path).key.array:  # the listings stay
            path.unlink()
    coverage = read_status(config).coverage
    assert coverage is not None
    assert coverage.warm == 0
    report = plan_warm(config).execute()
    assert (report.warm, report.fresh) == (report.ids, 0)
    assert report.stats.misses == 2 * report.ids
    coverage = read_status(config).coverage
    assert coverage is not None
    assert coverage.is_complete


def test_a_trusted_density_that_is_gone_at_the_end_is_not_reported_as_warm(
    config: DataConfig,
) -> None:
    plan_warm(config).execute()
    plan = plan_warm(config)
    plan_evict(config, ids=["mp-1"]).execute()
    report = plan.execute()
    assert (report.warm, report.bypassed, report.untried) == (3, ("mp-1",), 0)


def test_an_id_that_the_stored_listing_lacks_makes_it_list_again(
    config: DataConfig, tmp_path: Path
) -> None:
    """It may be new. Warm densities are not compared."""
    write_map(tmp_path, 4)
    plan_warm(config).execute()
    write_pairs(tmp_path, 5)
    write_map(tmp_path, 5)
    plan = plan_warm(config)
    assert (plan.missing, plan.densities, plan.reader.stats.requests) == (
        (),
        (("mp-4", "data", TOTAL), ("mp-4", "label", TOTAL)),
        2,
    )
    write_pairs(tmp_path, 6)
    plan = plan_warm(config, ids=["mp-0", "mp-5"])
    assert (plan.densities, plan.trusted) == (
        (("mp-5", "data", TOTAL), ("mp-5", "label", TOTAL)),
        2,
    )
    assert plan.execute().warm == 2


def test_one_directory_for_input_and_label_is_listed_and_counted_once(
    config: DataConfig,
) -> None:
    same = config.model_copy(update={"label_dir": config.data_dir})
    plan = plan_warm(same)
    assert plan.reader.roles == ("data",)
    report = plan.execute()
    assert (
        report.warm,
        report.nbytes,
        report.disk_bytes,
        report.stats.misses,
        report.stats.hits,
    ) == (4, 4 * 480, 4 * 8192, 4, 0)
    report = plan_warm(same, revalidate=True).execute()
    assert (report.warm, report.fresh, report.nbytes) == (4, 4, 4 * 480)


def test_revalidate_fetches_changed_stores_again(config: DataConfig, tmp_path: Path) -> None:
    """Without it the change is not noticed."""
    plan_warm(config).execute()
    new = small_group(tmp_path / "label" / "mp-2.zarr", shape=(6, 5, 4), seed=77)[
        "charge_density_total"
    ]
    assert plan_warm(config).densities == ()
    plan = plan_warm(config, revalidate=True)
    assert (plan.estimate().fresh, plan.estimate().to_fetch) == (7, 1)
    assert (plan.execute().fresh, plan.execute().stats.misses) == (3, 0)
    reader = open_reader(config)
    assert np.array_equal(reader.load("mp-2", "label")[0], new.ravel() / np.float32(new.size))
    assert reader.stats.requests == 0


def test_a_new_id_in_the_map_is_found_and_its_listing_stored(
    config: DataConfig, tmp_path: Path
) -> None:
    plan_warm(config).execute()
    write_pairs(tmp_path, 5)
    assert plan_warm(config).execute().warm == 5
    for role in ("data", "label"):
        (tmp_path / role).rename(tmp_path / f"{role}-gone")
    assert len(open_reader(config).task_ids) == 5


def test_a_damaged_store_is_named_and_the_others_are_warm(
    config: DataConfig, tmp_path: Path
) -> None:
    """The error has the URL of the chunk."""
    chunk = tmp_path / "data" / "mp-1.zarr" / "charge_density_total" / "0.0.0"
    chunk.write_bytes(b"not a chunk")
    report = plan_warm(config).execute()
    assert (report.warm, report.failed_ids) == (3, ("mp-1",))
    assert str(chunk) in report.failed[0].error
    assert not report.is_good


def test_ids_of_a_split_or_explicit_ids_are_warmed(config: DataConfig) -> None:
    """Explicit ids need not be in the map."""
    train, test = (
        plan_warm(config, split="train").task_ids,
        plan_warm(config, split="test").task_ids,
    )
    assert (list(train), list(test)) == open_reader(config).split_task_ids()
    report = plan_warm(config, ids=["mp-3", "mp-3", "mp-77"]).execute()
    assert (report.ids, report.warm, report.failed_ids) == (2, 1, ("mp-77",))
    with pytest.raises(ConfigError, match="exclude each other"):
        plan_warm(config, ids=["mp-3"], split="train")
    with pytest.raises(ConfigError, match="not a plain name"):
        plan_warm(config, ids=["../mp-3"])


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_the_share_of_a_node_is_that_of_a_training_that_holds_out_validation(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """But for a few samples at the edges of the shares: it divides fewer ids than are warmed."""
    ids = [f"mp-{number}" for number in range(1000)]
    for role in ("data", "label"):
        for id_ in ids:
            (tmp_path / role / f"{id_}.zarr").mkdir(parents=True)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    config = DataConfig.from_yaml(write_config(tmp_path))
    warmed = [set(plan_warm(config, world=World.even(node, 4, 4)).task_ids) for node in range(4)]
    dataset = Sources(dict.fromkeys(names, config)).dataset("train")
    read = missed = 0
    for node in range(4):
        for index in NodeSampler(dataset, assignment="node", world=World.even(node, 4, 4)):
            read += 1
            missed += dataset.task_ids[index].rpartition("/")[2] not in warmed[node]
    assert read >= 490 * len(names)
    assert missed <= 0.05 * read


def test_it_stops_at_limit_bytes(config: DataConfig) -> None:
    report = plan_warm(config, limit_bytes=4 * 6 * 5 * 4 * 4).execute()
    assert (report.warm, report.untried, report.is_good) == (2, 2, True)


def test_after_three_that_do_not_fit_the_rest_is_only_listed(
    tmp_path: Path,
) -> None:
    write_pairs(tmp_path, 8, chunks=(6, 5, 4))
    config = DataConfig.from_yaml(write_config(tmp_path, limit=6 * 8192))
    report = plan_warm(config, workers=1).execute()
    assert (report.warm, len(report.bypassed), report.is_good) == (2, 6, True)
    assert report.stats.misses == 4 + 3
    again = plan_warm(config, workers=1, revalidate=True).execute()
    assert (again.fresh, again.stats.misses) == (2, 3)
    plan = plan_warm(config, workers=1)
    assert len(plan.densities) == 12
    assert (plan.execute().fresh, plan.reader.stats.misses) == (2, 3)


def test_a_limit_below_any_density_gets_advice_too(tmp_path: Path) -> None:
    """From the densities that were read."""
    write_pairs(tmp_path, 2)
    plan = plan_warm(DataConfig.from_yaml(write_config(tmp_path, limit=4096)))
    report = plan.execute()
    assert (report.warm, report.disk_bytes) == (0, 0)
    assert report.needed_bytes > 4 * 4096
    (error,) = warm_errors(plan, report)
    assert f"about {format_bytes(report.needed_bytes)} on disk for all ids: raise" in error


@pytest.mark.parametrize(("limit", "min_free"), [("256 KiB", 0), ("4 KiB", 0), ("1 GiB", "99.9 %")])
@pytest.mark.parametrize("layout", [{}, {"as_zip": True}])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_from_a_limit_that_is_reached(
    tmp_path: Path, limit: str, min_free: object, layout: dict[str, Any], workers: int
) -> None:
    """Even if the densities that were not tried are much larger."""
    for number in range(6):
        for role in ("data", "label"):
            path = tmp_path / role / f"mp-{number}.zarr{'.zip' if layout else ''}"
            small_group(path, shape=(8 * (number + 1), 20, 20), seed=number, **layout)
    write_map(tmp_path, 6)
    plan = plan_warm(
        DataConfig.from_yaml(write_config(tmp_path, limit=limit, min_free=min_free)),
        workers=workers,
    )
    report = plan.execute()
    assert len(report.bypassed) >= 3
    assert report.is_disk_full == (limit == "1 GiB")
    assert report.is_good == (limit == "256 KiB")  # an id at least is warm, and the disk has room
    (words,) = [*warm_errors(plan, report), *warm_notes(plan, report)]
    assert ("the disk of" in words) == report.is_disk_full


def test_of_many_densities_an_estimate_lists_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other numbers follow from it; a failure is named once."""
    monkeypatch.setattr("zarrcache.ops.warm._COMPARED", 5)
    for number in range(10):
        for role in ("data", "label"):
            small_group(tmp_path / role / f"mp-{number}.zarr", seed=number)
    write_map(tmp_path, 10)
    plan = plan_warm(DataConfig.from_yaml(write_config(tmp_path)))
    listed: list[tuple[int, int]] = []
    estimate = plan.estimate(lambda *done_of_all: listed.append(done_of_all))
    assert listed == [(done, 5) for done in range(1, 6)]
    monkeypatch.undo()
    exact = plan.estimate()
    assert (estimate.compared, exact.compared) == (5, 20)
    assert estimate.requests == exact.requests
    assert estimate.fetch_bytes == pytest.approx(exact.fetch_bytes, rel=0.05)
    assert "20 of 20 densities of 10 ids (extrapolated from 5) (" in format_warm_estimate(
        plan, estimate
    )


@pytest.mark.parametrize("limit_kib", [200, 1200, 6000, 7600])
@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_the_advised_limit_is_sufficient(
    config: DataConfig, tmp_path: Path, limit_kib: int, encoding: str
) -> None:
    """However many densities fit, and although the largest ones do not."""
    for number in range(10):
        for role in ("data", "label"):
            path = tmp_path / role / f"mp-{number}.zarr"
            small_group(path, shape=(40 + 16 * number, 30, 30), seed=number)
    write_map(tmp_path, 10)
    limit = limit_kib * (1024 if encoding == "float32" else 512)
    cache = {"arrays": ArrayTierConfig(encoding=encoding)}
    part = plan_warm(settings(config, limit=limit, **cache), workers=1).execute()
    assert part.bypassed
    assert not part.is_disk_full
    assert part.needed_bytes > limit
    advised = parse_bytes(format_bytes(part.needed_bytes))
    full = plan_warm(settings(config, limit=advised, **cache), workers=1).execute()
    assert (full.warm, full.bypassed) == (10, ())
    assert advised < 1.3 * full.disk_bytes


def test_an_evicted_density_is_not_reported_as_warm(tmp_path: Path) -> None:
    """With ``least-recently-stored`` and a small limit, late entries evict early ones."""
    write_pairs(tmp_path, 5)
    config = DataConfig.from_yaml(
        write_config(tmp_path, limit=8 * 8192, eviction="least-recently-stored")
    )
    report = plan_warm(config, workers=1).execute()
    covered = read_status(config).coverage
    assert covered is not None
    assert 1 <= report.warm == covered.warm <= 3
    assert report.warm + len(report.bypassed) == 5


def test_two_processes_do_the_same_as_one(config: DataConfig) -> None:
    report = plan_warm(config, workers=2).execute()
    assert (report.warm, report.stats.misses, report.stats.hits) == (4, 8, 0)


def test_one_worker_starts_no_process(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workpool, "ChildProcess", None)
    plan = plan_warm(config, workers=1)
    report = replace(plan, densities=plan.densities * 5).execute()
    assert (report.warm, report.stats.misses, report.stats.hits) == (4, 8, 32)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cache_directory_lost_during_the_run_is_an_error(
    config: DataConfig, tmp_path: Path, workers: int
) -> None:
    """A file has its name now, so it cannot be made again."""
    results = []

    def lose(result: object) -> None:
        results.append(result)
        if len(results) == 8:
            shutil.rmtree(tmp_path / "cache")
            (tmp_path / "cache").touch()

    with pytest.raises(ConfigError, match=r"cache\.dir .* cannot be used"):
        plan_warm(config, workers=workers).execute(lose)


def test_an_existing_reader_can_be_warmed(config: DataConfig) -> None:
    reader = open_reader(config)
    assert plan_warm(reader).execute().warm == 4
    before = reader.stats
    reader.load("mp-0", "data")
    assert (reader.stats - before).requests == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache": None}, "no cache block"),
        (
            {"functional": "r2SCAN"},
            r"Functional 'r2SCAN' not found in mapping\. Available: \['GGA'\].*/map\.json",
        ),
    ],
)
def test_a_config_that_cannot_be_warmed_is_refused(
    config: DataConfig, change: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_warm(config.model_copy(update=change))


def test_an_unusable_cache_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache\.dir .*file/cache cannot be used"):
        plan_warm(settings(config, dir=tmp_path / "file" / "cache"))
    assert config.cache is not None
    with pytest.raises(ConfigError, match=r"cache\.arrays\.enabled is false"):
        plan_warm(
            settings(config, arrays=config.cache.arrays.model_copy(update={"enabled": False}))
        )
    with pytest.raises(ConfigError, match="The reader has no cache"):
        plan_warm(ZarrS3Reader(config.data_dir, config.label_dir, config.map_dir, "GGA", True, 0.5))
    with pytest.raises(ConfigError, match="whole number from 1"):
        plan_warm(config, workers=0)


def test_an_empty_functional_is_warm_at_once(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"GGA": []}))
    report = plan_warm(config).execute()
    assert (report.ids, report.is_good) == (0, True)
