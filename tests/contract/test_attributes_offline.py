"""Structures and metadata on a warm node: no request, few files, checked, within the limit."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.support.chgcars import SMALL
from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import STRUCTURE, small_group
from zarrcache import ZarrS3Reader, plan_warm
from zarrcache._keys import ArrayKey, Role
from zarrcache.cache.cache import Cache
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import LISTING, new_entry
from zarrcache.errors import (
    ConfigError,
    IncompleteArrayError,
    OriginNotFoundError,
    SchemaError,
)
from zarrcache.ops import verify
from zarrcache.stats import Counters

IDS = ["mp-1", "mp-2", "mp-3"]
METADATA = {"formula": "Si1"}


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """Stores of v2, v3 and a zip file, each with a structure and metadata."""
    for role in ("data", "label"):
        for id_ in IDS:
            name = f"{id_}.zarr{'.zip' if id_ == 'mp-3' else ''}"
            small_group(
                tmp_path / "stores" / role / name,
                zarr_format=3 if id_ == "mp-2" else 2,
                consolidated=id_ != "mp-3",
                as_zip=id_ == "mp-3",
                metadata={**METADATA, "task_id": id_},
            )
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    return tmp_path / "stores"


def _config(tmp_path: Path, url: object, **options: Any) -> DataConfig:
    return DataConfig(
        data_dir=f"{url}/data",
        label_dir=f"{url}/label",
        map_dir=tmp_path / "map.json",
        functional="GGA",
        train_fraction=0.5,
        **{"cache": {"dir": tmp_path / "cache", "min_free": 0}, **options},
    )


def _check(reader: ZarrS3Reader) -> None:
    for id_ in IDS:
        expected = {**METADATA, "task_id": id_, "structure": STRUCTURE}
        assert reader.metadata(id_) == reader.metadata(id_, "label") == expected
        assert reader.structure(id_) == STRUCTURE
        assert reader.volume(id_) == pytest.approx(3.8**3)
        assert reader.electrons(id_) is None
        path = reader.origin("label").url_of(reader.store_name(id_, "label"))
        for group in (
            reader.read_zarr_store(path),
            pickle.loads(pickle.dumps(reader.read_zarr_store(path))),
        ):
            assert reader.get_metadata(group) == expected
            assert reader.read_charge_density(group)[1] == (12, 10, 8)


def test_metadata_of_a_warm_node_sends_no_request(
    stores: Path, tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    """Nor did ``warm``, more than reading the densities does; a second ``warm`` only lists."""
    s3_server.put_tree(stores, f"s3://{bucket}")
    config = _config(tmp_path, f"s3://{bucket}", s3_kwargs=s3_server.s3_kwargs)
    log = RequestLog(s3_server, bucket)
    assert plan_warm(config, workers=1).execute().failed == ()
    keys = log.paths("GET")
    assert keys["data/mp-1.zarr/.zattrs"] == keys["data/mp-2.zarr/zarr.json"] == 1
    assert keys["data/mp-3.zarr.zip"] == 1
    log = RequestLog(s3_server, bucket)
    _check(ZarrS3Reader.from_config(config))
    assert log.seen() == []
    plan_warm(config, workers=1, revalidate=True).execute()
    assert log.seen("GET") == []


def test_warm_reads_attributes_once_where_there_are_none(
    stores: Path, tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    for role in ("data", "label"):
        (stores / role / "mp-1.zarr" / ".zattrs").write_text("{}")
    s3_server.put_tree(stores, f"s3://{bucket}")
    config = _config(tmp_path, f"s3://{bucket}", s3_kwargs=s3_server.s3_kwargs)
    log = RequestLog(s3_server, bucket)
    assert plan_warm(config, workers=1).execute().failed == ()
    assert log.paths("GET")["data/mp-1.zarr/.zattrs"] == 1
    assert ZarrS3Reader.from_config(config).metadata("mp-1") == {}


def test_metadata_of_a_warm_node_needs_no_origin(stores: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, stores)
    plan_warm(config, workers=2).execute()
    stores.rename(tmp_path / "away")
    _check(ZarrS3Reader.from_config(config))
    with pytest.raises(OriginNotFoundError):
        ZarrS3Reader.from_config(config).read_zarr_store(stores / "data" / "mp-404.zarr")
    assert verify(config).is_good


def test_a_cache_without_attributes_gets_them_from_warm_that_revalidates(
    stores: Path, tmp_path: Path
) -> None:
    """Its densities are hits; so are those that a training has stored."""
    config = _config(tmp_path, stores)
    reader = ZarrS3Reader.from_config(config)
    for id_ in IDS:
        reader.load(id_, "data")
        reader.load(id_, "label")
    assert plan_warm(config, workers=1).densities == ()
    plan_warm(config, workers=1, revalidate=True).execute()
    stores.rename(tmp_path / "away")
    _check(ZarrS3Reader.from_config(config))


def test_metadata_is_stored_when_it_is_first_read(stores: Path, tmp_path: Path) -> None:
    """Without ``warm``, if the density is cached; and read each time if entries are not trusted."""
    make_reader(tmp_path, stores, cache={}).load("mp-1", "data")
    trusting = make_reader(tmp_path, stores, cache={})
    doubting = make_reader(tmp_path, stores, cache={"revalidate": "epoch"})
    plain = make_reader(tmp_path, stores, cache=None)
    for reader in (trusting, doubting, plain):
        assert reader.structure("mp-1") == STRUCTURE
    wider = json.loads(json.dumps(STRUCTURE).replace("3.8", "4.2"))
    path = stores / "data" / "mp-1.zarr"
    zarr.open_group(path, mode="r+", use_consolidated=False).attrs["structure"] = wider
    assert trusting.structure("mp-1") == STRUCTURE
    assert doubting.structure("mp-1") == plain.structure("mp-1") == wider


def test_a_density_that_is_fetched_again_brings_its_attributes(
    stores: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, stores)
    plan_warm(config, workers=1).execute()
    wider = json.loads(json.dumps(STRUCTURE).replace("3.8", "4.2"))
    small_group(stores / "data" / "mp-1.zarr", seed=9, attrs={"structure": json.dumps(wider)})
    plan_warm(config, workers=1, revalidate=True).execute()
    reader = ZarrS3Reader.from_config(config)
    assert reader.structure("mp-1") == wider
    assert reader.structure("mp-2") == STRUCTURE


def test_a_density_that_training_fetches_again_brings_its_attributes(
    stores: Path, tmp_path: Path
) -> None:
    """Else a sample would have the grid of one version and the lattice of another."""
    plan_warm(_config(tmp_path, stores), workers=1).execute()
    wider = json.loads(json.dumps(STRUCTURE).replace("3.8", "4.2"))
    small_group(stores / "data" / "mp-1.zarr", seed=9, attrs={"structure": json.dumps(wider)})
    reader = ZarrS3Reader.from_config(_config(tmp_path, stores))
    assert reader.structure("mp-1") == STRUCTURE
    assert reader.cache.arrays is not None
    reader.cache.arrays.drop(reader.key("mp-1", "data"))
    reader.load("mp-1", "data")
    assert reader.structure("mp-1") == wider
    assert reader.volume("mp-1") == pytest.approx(4.2**3)


@pytest.mark.parametrize("encoding", ["float32", "float16"])
@pytest.mark.parametrize("uses_warm", [True, False])
def test_a_density_that_another_cache_gives_leaves_no_attributes_of_its_last_version(
    stores: Path, tmp_path: Path, uses_warm: bool, encoding: str
) -> None:
    """Which does not give attributes: they are read from the origin."""
    here = {"min_free": 0, "arrays": {"encoding": encoding}}
    first = _config(tmp_path, stores, cache={"dir": tmp_path / "cache", **here})
    plan_warm(first, workers=1).execute()
    wider = json.loads(json.dumps(STRUCTURE).replace("3.8", "4.2"))
    small_group(stores / "data" / "mp-1.zarr", seed=9, attrs={"structure": json.dumps(wider)})
    lower = tmp_path / "lower"
    plan_warm(_config(tmp_path, stores, cache={"dir": lower, "min_free": 0}), workers=1).execute()
    config = _config(tmp_path, stores, cache={"dir": tmp_path / "cache", "lower": lower, **here})
    reader = ZarrS3Reader.from_config(config)
    assert reader.structure("mp-1") == STRUCTURE
    if uses_warm:
        plan_warm(reader, workers=1, revalidate=True).execute()
    else:
        assert reader.cache.arrays is not None
        reader.cache.arrays.drop(reader.key("mp-1", "data"))
        reader.load("mp-1", "data")
    assert reader.stats.lower_hits == 1
    for one in (reader, ZarrS3Reader.from_config(config)):
        assert one.structure("mp-1") == wider
        assert one.volume("mp-1") == pytest.approx(4.2**3)
        assert one.structure("mp-2") == STRUCTURE


def test_a_cached_density_has_its_own_attributes_after_the_store_has_changed(
    stores: Path, tmp_path: Path
) -> None:
    """Else a sample would have the grid of one version and the lattice of another."""
    reader = make_reader(tmp_path, stores, cache={})
    for id_ in IDS:
        reader.load(id_, "data")
    for id_, zipped in (("mp-1", False), ("mp-3", True)):
        name = f"{id_}.zarr{'.zip' if zipped else ''}"
        small_group(stores / "data" / name, seed=9, as_zip=zipped, metadata={}, attrs={})
    for one in (reader, make_reader(tmp_path, stores, cache={})):
        assert [one.structure(id_) for id_ in IDS] == [STRUCTURE] * 3
    assert reader.structure("mp-1", "label") == STRUCTURE  # whose density is not cached


@pytest.mark.parametrize("uses_warm", [True, False])
def test_a_density_without_attributes_leaves_none_of_its_last_version(
    stores: Path, tmp_path: Path, uses_warm: bool
) -> None:
    config = _config(tmp_path, stores)
    plan_warm(config, workers=1).execute()
    small_group(stores / "data" / "mp-1.zarr", seed=9, attrs={})
    reader = ZarrS3Reader.from_config(config)
    if uses_warm:
        plan_warm(config, workers=1, revalidate=True).execute()
    else:
        assert reader.cache.arrays is not None
        reader.cache.arrays.drop(reader.key("mp-1", "data"))
        reader.load("mp-1", "data")
    with pytest.raises(SchemaError, match=r"mp-1\.zarr has no structure"):
        reader.structure("mp-1")
    assert reader.structure("mp-2") == STRUCTURE
    small_group(stores / "data" / "mp-1.zarr", seed=9)
    plan_warm(config, workers=1, revalidate=True).execute()
    if not uses_warm:
        with pytest.raises(IncompleteArrayError, match="read the density again"):
            reader.structure("mp-1")  # the caller may still have the density of the last version
        reader.load("mp-1", "data")
    assert reader.structure("mp-1") == STRUCTURE


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({}, "has no structure among its attributes"),
        ({"structure": [1]}, "has no structure among its attributes"),
        ({"structure": "{"}, "attribute 'structure' is not JSON"),
    ],
)
def test_a_material_without_a_structure_is_an_error_that_names_it(
    stores: Path, tmp_path: Path, attributes: Any, why: str
) -> None:
    path = stores / "data" / "mp-1.zarr"
    small_group(path, attrs=attributes)
    with pytest.raises(SchemaError, match=rf"{path}.*{why}"):
        make_reader(tmp_path, stores, cache={}).structure("mp-1")


# -- never the grid of one version and the lattice of another -------------------------------------


def _write(stores: Path, version: int, **options: Any) -> None:
    """Write ``mp-1``: all values are ``version``, and so is the edge of the cell in angstrom."""
    wider = json.loads(json.dumps(STRUCTURE).replace("3.8", f"{version}.0"))
    values = np.full((16, 16, 16), version, np.float32)
    arrays = {f"charge_density_{kind}": values for kind in ("total", "diff")}
    for role in ("data", "label"):
        path = stores / role / "mp-1.zarr"
        small_group(path, arrays, attrs={"structure": wider}, **options)
        for file in path.rglob("*"):
            os.utime(file, (1.6e9 + version,) * 2)  # a store of just now is listed twice


def _check_versions(reader: ZarrS3Reader, density: int, role: Role = "data") -> None:
    """The density is of this version, and the attributes are too, or are refused."""
    assert np.all(reader.load("mp-1", role)[0] == density)
    with contextlib.suppress(IncompleteArrayError):
        assert reader.volume("mp-1", role) == pytest.approx(density**3)


def test_documents_of_v2_beside_those_of_v3_are_not_read(stores: Path, tmp_path: Path) -> None:
    """As ``zarr migrate v3`` leaves them: the density is read by ``zarr.json``."""
    _write(stores, 1)
    path = stores / "data" / "mp-1.zarr"
    old = {name: (path / name).read_bytes() for name in (".zattrs", ".zgroup")}
    _write(stores, 2, zarr_format=3)
    for name, document in old.items():
        (path / name).write_bytes(document)
    for cache in (None, {}):
        reader = make_reader(tmp_path, stores, cache=cache)
        assert reader.volume("mp-1") == pytest.approx(8)
        _check_versions(reader, 2)


@pytest.mark.parametrize("is_zipped", [False, True])
def test_a_migration_to_v3_that_was_killed_loses_no_attributes(
    tmp_path: Path, is_zipped: bool
) -> None:
    """It writes the documents of arrays before that of their group; the units are in the latter."""
    attrs = {"structure": STRUCTURE, "charge_density_units": "volume"}
    arrays = {"charge_density_total": np.full((4, 4, 4), 0.5, np.float32)}
    store, new = tmp_path / "data" / "mp-1.zarr", tmp_path / "new.zarr"
    small_group(store, arrays, attrs=attrs)
    small_group(new, arrays, attrs=attrs, zarr_format=3, chunk_key_encoding={"name": "v2"})
    shutil.copytree(
        new / "charge_density_total", store / "charge_density_total", dirs_exist_ok=True
    )
    assert (store / "charge_density_total" / "zarr.json").exists()
    if is_zipped:
        shutil.make_archive(str(store), "zip", store)
        shutil.rmtree(store)
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    for cache in (None, {}):
        reader = make_reader(tmp_path, cache=cache, label_dir=tmp_path / "data", train_fraction=1)
        assert reader.load("mp-1", "data")[0] == pytest.approx(0.5 * 3.8**3)
        assert reader.volume("mp-1") == pytest.approx(3.8**3)


@pytest.mark.parametrize("density_type", ["diff", {"data": "total", "label": "diff"}])
@pytest.mark.parametrize("is_one_directory", [False, True])
def test_attributes_are_compared_with_each_cached_channel(
    stores: Path, tmp_path: Path, density_type: Any, is_one_directory: bool
) -> None:
    """Not only with the first one of the input, which may not be of that store."""
    options = {"label_dir": stores / "data"} if is_one_directory else {}
    _write(stores, 1)
    make_reader(tmp_path, stores, cache={}, density_type=density_type, **options).load(
        "mp-1", "label"
    )
    _write(stores, 2)
    reader = make_reader(tmp_path, stores, cache={}, density_type=density_type, **options)
    _check_versions(reader, 1, "label")


@pytest.mark.parametrize("tiers", [{"bytes": {"enabled": True}}, {"bytes": {"enabled": False}}])
@pytest.mark.parametrize("reads_attributes_first", [False, True])
def test_without_the_array_tier_attributes_come_from_where_the_density_does(
    stores: Path, tmp_path: Path, tiers: Any, reads_attributes_first: bool
) -> None:
    cache = {"arrays": {"enabled": False}, **tiers}
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache=cache)
    reader.load("mp-1", "data")
    if reads_attributes_first:
        assert reader.volume("mp-1") == 1
    _write(stores, 2)
    version = 1 if tiers["bytes"]["enabled"] else 2
    reader = make_reader(tmp_path, stores, cache=cache)
    _check_versions(reader, version)
    assert reader.volume("mp-1") == pytest.approx(version**3)
    reader.cache.forget_listing(reader.origin("data"), "mp-1.zarr")
    _write(stores, 3)
    with pytest.raises(IncompleteArrayError, match="has changed since"):
        reader.volume("mp-1")
    _check_versions(reader, 3)
    assert reader.volume("mp-1") == pytest.approx(27)


@pytest.mark.parametrize("revalidate", ["never", "run"])
def test_the_metadata_of_an_open_store_is_of_the_version_of_its_cached_density(
    stores: Path, tmp_path: Path, revalidate: str
) -> None:
    """With the methods of the users' reader: both come from one group."""
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache={"revalidate": revalidate})
    _check_versions(reader, 1, "label")
    path = stores / "label" / "mp-1.zarr"
    if revalidate == "run":
        group = reader.read_zarr_store(path)
        assert reader.get_metadata(group)["structure"]["lattice"]["matrix"][0][0] == 1
    _write(stores, 2)
    group = reader.read_zarr_store(path)
    assert np.all(reader.read_charge_density(group)[0] == 1)
    assert reader.get_metadata(group)["structure"]["lattice"]["matrix"][0][0] == 1
    fresh = make_reader(tmp_path, stores, cache={"dir": tmp_path / "other"})
    assert np.all(fresh.load("mp-1", "label")[0] == 2)
    _write(stores, 1)
    group = fresh.read_zarr_store(path)
    assert np.all(fresh.read_charge_density(group)[0] == 2)
    assert fresh.get_metadata(group)["structure"]["lattice"]["matrix"][0][0] == 2


def test_a_store_that_changes_during_a_run_keeps_its_attributes(
    stores: Path, tmp_path: Path
) -> None:
    """Where the run has compared the density."""
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache={"revalidate": "run"})
    _check_versions(reader, 1)
    _check_versions(reader, 1, "label")
    _write(stores, 2)
    _check_versions(reader, 1)
    assert reader.volume("mp-1") == 1
    unread = make_reader(tmp_path, stores, cache={"revalidate": "run"})
    unread.load("mp-1", "data")
    _write(stores, 3)
    assert unread.volume("mp-1") == pytest.approx(8)
    _write(stores, 2)
    reader = make_reader(tmp_path, stores, cache={"revalidate": "run"})
    assert reader.volume("mp-1") == pytest.approx(8)
    _check_versions(reader, 2)


@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_a_density_of_another_cache_that_is_not_stored_here_brings_its_attributes(
    stores: Path, tmp_path: Path, encoding: str
) -> None:
    _write(stores, 1)
    lower = {"dir": tmp_path / "lower"}
    plan_warm(make_reader(tmp_path, stores, cache=lower), workers=1).execute()
    _write(stores, 2)
    cache = {"lower": tmp_path / "lower", "limit": "4 KiB", "arrays": {"encoding": encoding}}
    reader = make_reader(tmp_path, stores, cache=cache)
    for _ in range(2):
        _check_versions(reader, 1)
        assert reader.volume("mp-1") == 1
    assert reader.stats.bypasses == reader.stats.lower_hits == 2


def test_attributes_are_of_the_density_that_was_read_last(stores: Path, tmp_path: Path) -> None:
    """Although another process has replaced or evicted its entry since."""
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache={})
    _check_versions(reader, 1)
    _write(stores, 2)
    plan_warm(make_reader(tmp_path, stores, cache={}), workers=1, revalidate=True).execute()
    with pytest.raises(IncompleteArrayError, match="read the density again"):
        reader.volume("mp-1")
    _check_versions(reader, 2)
    assert reader.volume("mp-1") == pytest.approx(8)
    _write(stores, 3)
    other = make_reader(tmp_path, stores, cache={})
    assert other.cache.arrays is not None
    other.cache.arrays.drop(other.key("mp-1", "data"))
    assert np.all(other.load("mp-1", "data")[0] == 3)
    other.cache.arrays.drop(other.key("mp-1", "data"))
    assert other.volume("mp-1") == pytest.approx(27)
    with pytest.raises(IncompleteArrayError, match="read the density again"):
        reader.volume("mp-1")


def test_attributes_of_a_density_that_look_ahead_lent_are_of_its_version(
    stores: Path, tmp_path: Path
) -> None:
    """It is removed when it is read."""
    _write(stores, 1)
    plan_warm(make_reader(tmp_path, stores, cache={"dir": tmp_path / "lower"})).execute()
    options = {"lower": tmp_path / "lower", "limit": "88 KiB"}
    ahead = make_reader(tmp_path, stores, cache=options)
    loans = ahead.cache.lend(60 << 10)
    for id_ in ("mp-2", "mp-3", "mp-1"):
        for role in ("label", "data"):
            ahead.load(id_, role)
    assert ahead.key("mp-1", "data").digest in loans
    _write(stores, 2)
    reader = make_reader(tmp_path, stores, cache=options)
    _check_versions(reader, 1)
    assert (reader.stats.hits, reader.stats.misses) == (1, 0)
    assert reader.volume("mp-1") == 1


def test_a_row_that_cannot_be_replaced_is_not_used(stores: Path, tmp_path: Path) -> None:
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache={})
    plan_warm(reader, workers=1).execute()
    assert reader.cache.arrays is not None
    reader.cache.arrays.drop(reader.key("mp-1", "data"))
    _write(stores, 2)
    full = make_reader(tmp_path, stores, cache={"min_free": "1000 TiB"})
    for _ in range(2):
        _check_versions(full, 2)
        assert full.volume("mp-1") == pytest.approx(8)
    assert full.stats.bypasses == 2


def test_a_row_without_a_cached_density_is_not_used(stores: Path, tmp_path: Path) -> None:
    """The density that is read next is of the version that the origin has now."""
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache={})
    plan_warm(reader, workers=1).execute()
    assert reader.cache.arrays is not None
    reader.cache.arrays.drop(reader.key("mp-1", "data"))
    _write(stores, 2)
    reader = make_reader(tmp_path, stores, cache={})
    path = stores / "data" / "mp-1.zarr"
    assert _edge(reader, reader.read_zarr_store(path)) == 2
    assert reader.volume("mp-1") == pytest.approx(8)
    _check_versions(reader, 2)


def test_a_changed_lattice_makes_other_arrays_stale_too(stores: Path, tmp_path: Path) -> None:
    """Not only charge densities, whose units the attributes say."""

    def write(edge: int, *, only_attributes: bool) -> None:
        path = stores / "data" / "mp-1.zarr"
        wider = json.loads(json.dumps(STRUCTURE).replace("3.8", f"{edge}.0"))
        if only_attributes:
            (path / ".zattrs").write_text(json.dumps({"structure": wider}))
        else:
            small_group(path, {"elf": np.ones((4, 4, 4), np.float32)}, attrs={"structure": wider})

    options: Any = {"density_type": "elf", "label_dir": stores / "data", "train_fraction": 1}
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    write(1, only_attributes=False)
    reader = make_reader(tmp_path, stores, cache={}, **options)
    plan_warm(reader, workers=1).execute()
    assert reader.volume("mp-1") == 1
    write(2, only_attributes=True)
    running = make_reader(tmp_path, stores, cache={"revalidate": "run"}, **options)
    running.load("mp-1", "data")
    assert running.volume("mp-1") == pytest.approx(8)
    write(3, only_attributes=True)
    plan_warm(reader, workers=1, revalidate=True).execute()
    assert make_reader(tmp_path, stores, cache={}, **options).volume("mp-1") == pytest.approx(27)


def _edge(reader: ZarrS3Reader, group: zarr.Group) -> float:
    return float(reader.get_metadata(group)["structure"]["lattice"]["matrix"][0][0])


_CACHES = [
    None,
    {},
    {"revalidate": "run"},
    {"revalidate": "epoch"},
    {"limit": "4 KiB"},
    {"arrays": {"enabled": False}},
]


@pytest.mark.parametrize("reads_points", [False, True])
@pytest.mark.parametrize("cache", [{}, {"limit": "4 KiB"}, {"arrays": {"enabled": False}}])
def test_a_sample_that_is_read_again_has_the_lattice_of_its_density(
    stores: Path, tmp_path: Path, cache: Any, reads_points: bool
) -> None:
    """Although the store was converted again, and the density is not cached."""
    from zarrcache import Probes, ZarrDataset

    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    reader = make_reader(tmp_path, stores, cache=cache, train_fraction=1.0)
    transform = Probes(3) if reads_points else None
    dataset = ZarrDataset(reader, augmentation=False, structure=True, transform=transform)
    for version in (1, 2, 3):
        _write(stores, version)
        if reader.cache.arrays is not None:
            reader.cache.arrays.drop(reader.key("mp-1", "data"))
        reader.cache.forget_listing(reader.origin("data"), "mp-1.zarr")
        sample = dataset[0]
        assert sample["data"].ravel()[0] == version
        assert sample["structure"]["lattice"]["matrix"][0][0] == version


@pytest.mark.parametrize("cache", _CACHES)
@pytest.mark.parametrize("is_pickled", [False, True])
def test_density_and_metadata_of_one_open_store_are_of_one_version(
    stores: Path, tmp_path: Path, cache: Any, is_pickled: bool
) -> None:
    """Or are refused: in either order, when the store changes after it was opened."""
    path = stores / "data" / "mp-1.zarr"
    for reads_density_first in (True, False):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        _write(stores, 1)
        reader = make_reader(tmp_path, stores, cache=cache)
        group = reader.read_zarr_store(path)
        found = [] if reads_density_first else [_edge(reader, group)]
        _write(stores, 2)
        if is_pickled:
            group = pickle.loads(pickle.dumps(group))
        with contextlib.suppress(IncompleteArrayError):
            found.append(float(reader.read_charge_density(group)[0][0]))
            found.append(_edge(reader, group))
        assert len(set(found)) == 1, found
        group = reader.read_zarr_store(path)
        if cache != {}:
            assert reader.read_charge_density(group)[0][0] == _edge(reader, group) == 2


def test_arrays_of_an_open_store_are_not_read_beside_stored_attributes_of_another_version(
    stores: Path, tmp_path: Path
) -> None:
    _write(stores, 1)
    reader = make_reader(tmp_path, stores, cache={})
    plan_warm(reader, workers=1).execute()
    path = stores / "data" / "mp-1.zarr"
    group = reader.read_zarr_store(path)
    array: Any = group["charge_density_total"]
    assert array[0, 0, 0] == group.attrs["structure"]["lattice"]["matrix"][0][0] == 1  # type: ignore[index,call-overload]
    reader.cache.forget_listing(reader.origin("data"), "mp-1.zarr")
    _write(stores, 2)
    with pytest.raises(IncompleteArrayError, match="has changed since its density was cached"):
        reader.read_zarr_store(path)["charge_density_total"]
    assert np.all(reader.read_charge_density(group)[0] == 1)


# -- damage and planted entries -------------------------------------------------------------


def test_damaged_attributes_are_not_used_and_their_entry_is_dropped(
    stores: Path, tmp_path: Path
) -> None:
    """By the next read that verifies it, or by ``zarrcache verify``."""
    config = _config(tmp_path, stores)
    plan_warm(config, workers=1).execute()
    reader = ZarrS3Reader.from_config(config)
    assert reader.cache.index is not None
    stored = reader.cache.index.lookup(reader.key("mp-1", "data").digest)
    assert stored is not None
    file = Path(reader.cache.index.path_of(stored))

    def flip_the_last_byte() -> None:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)

    flip_the_last_byte()
    assert reader.structure("mp-1") == STRUCTURE
    assert reader.load("mp-1", "data")[1] == (12, 10, 8)
    assert (reader.stats.purges, reader.stats.misses) == (1, 1)
    stored = reader.cache.index.lookup(reader.key("mp-1", "data").digest)
    assert stored is not None
    file = Path(reader.cache.index.path_of(stored))
    flip_the_last_byte()
    report = verify(config)
    assert not report.is_good
    assert len(report.corrupt) == 1
    plan_warm(config, workers=1).execute()
    stores.rename(tmp_path / "away")
    _check(ZarrS3Reader.from_config(config))


def test_structures_of_files_are_those_of_pymatgen(tmp_path: Path) -> None:
    """Of a CHGCAR it is made when it is asked for; nothing else needs pymatgen."""
    core = pytest.importorskip("pymatgen.core")
    from tests.support.mpjson import write_json_pairs
    from zarrcache.demo.synthetic import write_pairs

    for form, write in (("chgcar", write_pairs), ("json.gz", write_json_pairs)):
        root = tmp_path / form
        (id_,) = write(root, 1, seed=SMALL)
        (root / "map.json").write_text(json.dumps({"GGA": [id_]}))
        config = DataConfig(
            data_dir=str(root / "input"),
            label_dir=str(root / "label"),
            map_dir=root / "map.json",
            functional="GGA",
            cache={"dir": root / "cache", "min_free": 0},
        )
        plan_warm(config, split="all", workers=1).execute()
        (root / "input").rename(root / "away")
        reader = ZarrS3Reader.from_config(config)
        structure = core.Structure.from_dict(reader.structure(id_))
        (file,) = (root / "away").iterdir()
        if form == "chgcar":
            expected = core.Structure.from_str(file.read_text(), fmt="poscar")
        else:
            document = json.loads(gzip.decompress(file.read_bytes()))
            expected = core.Structure.from_dict(document["data"]["poscar"]["structure"])
        assert structure == expected
        assert reader.volume(id_) == expected.lattice.volume


# -- in samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_have_the_structure_of_their_material(
    stores: Path, tmp_path: Path, workers: int
) -> None:
    """In batches as a list, with torch's own collate function too."""
    torch = pytest.importorskip("torch")
    from zarrcache import ZarrDataset, collate

    two_sites = {**STRUCTURE, "sites": STRUCTURE["sites"] * 2}
    small_group(stores / "data" / "mp-1.zarr", attrs={"structure": json.dumps(two_sites)})
    plan_warm(_config(tmp_path, stores), workers=1).execute()
    stores.rename(tmp_path / "away")
    reader = ZarrS3Reader.from_config(_config(tmp_path, stores))
    dataset = ZarrDataset(reader, IDS, structure=True)
    assert [dataset[i]["structure"] for i in range(3)] == [two_sites, STRUCTURE, STRUCTURE]
    assert "structure" not in ZarrDataset(reader, IDS)[0]
    for collate_fn in (None, collate):
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=3, num_workers=workers, collate_fn=collate_fn
        )
        (batch,) = loader
        assert batch["structure"] == [two_sites, STRUCTURE, STRUCTURE]
        assert batch["data"].shape == (3, 1, 12, 10, 8)


def test_structures_and_rotations_exclude_each_other(stores: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from zarrcache import ZarrDataset

    reader = make_reader(tmp_path, stores)
    with pytest.raises(ConfigError, match="a rotation turns the grid, not the structure"):
        ZarrDataset(reader, IDS, augmentation=True, structure=True)

    class Bare:
        def split_task_ids(self) -> Any:
            return IDS, []

        load = reader.load

    with pytest.raises(ConfigError, match="Bare has no method structure"):
        ZarrDataset(Bare(), structure=True)


def test_structures_of_numpy_files_are_made_of_their_xyz(tmp_path: Path) -> None:
    pytest.importorskip("pymatgen.core")
    for role in ("data", "label"):
        where = tmp_path / "qm9" / role / "dsgdb9nsd_000001"
        where.mkdir(parents=True)
        np.save(where / "rho_22.npy", np.ones((4, 5, 6)))
        np.save(where / "box.npy", np.diag([4.0, 5.0, 6.0]))
        (where / "centered.xyz").write_text("2\n\nC 0.0 0.0 0.0\nH 1.0 0.5 0.25\n")
    (tmp_path / "map.json").write_text('{"GGA": ["dsgdb9nsd_000001"]}')
    config = _config(tmp_path, tmp_path / "qm9", normalize_data="volume")
    plan_warm(config, split="all", workers=1).execute()
    (tmp_path / "qm9").rename(tmp_path / "away")
    reader = ZarrS3Reader.from_config(config)
    structure = reader.structure("dsgdb9nsd_000001")
    assert [site["label"] for site in structure["sites"]] == ["C", "H"]
    assert structure["sites"][1]["xyz"] == pytest.approx([1.0, 0.5, 0.25])
    assert reader.volume("dsgdb9nsd_000001") == pytest.approx(120)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 40,
        b"[]",
        b"\x02\x00\x00\x00[]more",
        b'\x0e\x00\x00\x00[["mp-1", 900]]',
        b"[" * 9999,
    ],
    ids=lambda raw: f"{raw[:8]!r}",
)
def test_listings_and_attributes_that_were_planted_are_misses(
    stores: Path, tmp_path: Path, raw: bytes
) -> None:
    """With a right checksum, by a user who may write to a shared directory."""
    config = _config(tmp_path, stores)
    plan_warm(config, workers=1).execute()
    planted = Cache(CacheConfig.of(config.cache), Counters())
    assert planted.arrays is not None
    keys = [ArrayKey(*row.note.split("\n")) for row in planted.arrays.index.rows(LISTING)]
    assert len(keys) >= 2
    for key in keys:
        assert planted.arrays.put(key, np.frombuffer(raw, np.uint8), source="listing") is not None
    for info in list(planted.arrays.entries()):
        entry = planted.arrays.get(info.key)
        assert entry is not None
        header = entry.header
        made = new_entry(header.key, entry.array, header.source, header.flaws, raw)
        assert planted.arrays.store(made) is not None
    _check(ZarrS3Reader.from_config(config))
