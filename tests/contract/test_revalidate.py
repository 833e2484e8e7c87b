"""Freshness: ``never`` trusts warm entries, ``run`` checks once per run, ``epoch`` at each read;
versions are never mixed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache import (
    IncompleteArrayError,
    OriginAccessError,
    OriginNotFoundError,
    OriginUnavailableError,
    RhoData,
    ZarrS3Reader,
)
from zarrcache.config import CacheConfig
from zarrcache.ops import plan_evict

IDS = ["mp-1", "mp-2"]
ROLES = ("data", "label")
ARRAY = "charge_density_total"


@dataclass(frozen=True)
class Place:
    """Two materials that can be overwritten, in a directory or on S3."""

    root: Path
    server: S3Server | None
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}" if self.server else str(self.root / "origin")

    def reader(
        self, revalidate: str, *, arrays: bool = True, endpoint_url: str = ""
    ) -> ZarrS3Reader:
        kwargs = (
            self.server.kwargs_at(endpoint_url or self.server.endpoint_url) if self.server else None
        )
        cache = {
            "revalidate": revalidate,
            "arrays": {"enabled": arrays},
            "retry": {"attempts": 1},
        }
        return make_reader(self.root, self.url, train_fraction=1, s3_kwargs=kwargs, cache=cache)

    def write(
        self, role: str, task_id: str, seed: int, shape: tuple[int, int, int] = (6, 5, 7)
    ) -> NDArray[np.float32]:
        """Replace a store; its values, flat."""
        self.delete(role, task_id)
        path = self.root / "origin" / role / f"{task_id}.zarr"
        values = small_group(path, shape=shape, seed=seed)[ARRAY]
        if self.server:
            self.server.put_tree(path, f"s3://{self.bucket}/{role}/{task_id}.zarr")
        return values.ravel()

    def delete(self, role: str, task_id: str) -> None:
        shutil.rmtree(self.root / "origin" / role / f"{task_id}.zarr", ignore_errors=True)
        if self.server:
            for key in self.server.keys(f"s3://{self.bucket}/{role}/{task_id}.zarr/"):
                self.server.delete(f"s3://{self.bucket}/{key}")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Version 1 of everything."""
    place = Place(tmp_path, None, "")
    if request.param == "s3":
        place = Place(
            tmp_path, request.getfixturevalue("s3_server"), request.getfixturevalue("bucket")
        )
    return fill(place)


@pytest.fixture
def s3_place(tmp_path: Path, s3_server: S3Server, bucket: str) -> Place:
    """Version 1 of everything, on S3."""
    return fill(Place(tmp_path, s3_server, bucket))


def fill(place: Place) -> Place:
    """Write the map and version 1."""
    (place.root / "map.json").write_text(json.dumps({"GGA": IDS}))
    for role, (i, task_id) in itertools.product(ROLES, enumerate(IDS)):
        place.write(role, task_id, seed=i)
    return place


@pytest.mark.parametrize("arrays", [True, False], ids=["array tier", "byte tier"])
class TestOverwrittenOrigin:
    """What a reader gives after a store was replaced at the origin."""

    def test_never_serves_warm_entries_until_they_are_warmed_again(
        self, place: Place, arrays: bool
    ) -> None:
        """Also in a new process. ``ensure``, which ``warm`` calls, fetches the present version."""
        old, _ = place.reader("never", arrays=arrays).load("mp-1", "data")
        old = old.copy()
        new = place.write("data", "mp-1", seed=9)
        reader = place.reader("never", arrays=arrays)
        np.testing.assert_array_equal(reader.load("mp-1", "data")[0], old)
        assert reader.stats.requests == 0
        reader.ensure("mp-1", "data")
        again = place.reader("never", arrays=arrays)
        np.testing.assert_array_equal(again.load("mp-1", "data")[0], new)
        assert again.stats.requests == 0

    def test_epoch_gives_the_present_version_at_once(self, place: Place, arrays: bool) -> None:
        """The same reader at its next read; unchanged stores are not fetched again."""
        reader = place.reader("epoch", arrays=arrays)
        same, _ = reader.load("mp-2", "data")
        for seed, shape in ((0, (6, 5, 7)), (5, (6, 5, 7)), (6, (4, 3, 9)), (7, (6, 5, 7))):
            new = place.write("data", "mp-1", seed, shape)  # type: ignore[arg-type]
            values, gridsize = reader.load("mp-1", "data")
            np.testing.assert_array_equal(values, new)
            assert gridsize == shape
            fetched = reader.stats.fetched_bytes
            np.testing.assert_array_equal(reader.load("mp-2", "data")[0], same)
            assert reader.stats.fetched_bytes == fetched

    def test_store_that_was_deleted_is_an_error_not_an_old_density(
        self, place: Place, arrays: bool
    ) -> None:
        """With ``epoch``; ``never`` continues with its entry."""
        reader = place.reader("epoch", arrays=arrays)
        reader.load("mp-1", "data")
        warm = place.reader("never", arrays=arrays)
        old, _ = warm.load("mp-1", "data")
        place.delete("data", "mp-1")
        with pytest.raises(OriginNotFoundError, match=r"data/mp-1\.zarr does not exist"):
            reader.load("mp-1", "data")
        np.testing.assert_array_equal(
            place.reader("never", arrays=arrays).load("mp-1", "data")[0], old
        )


@pytest.mark.parametrize(
    ("place", "zarr_format", "normalize", "arrays"),
    [
        ("local", 2, False, True),
        ("local", 2, True, False),
        ("local", 3, "volume", True),
        ("s3", 2, "volume", False),
        ("s3", 3, False, False),
        ("s3", 3, True, True),
    ],
    indirect=["place"],
)
def test_changed_attributes_are_another_version(
    place: Place, zarr_format: Any, normalize: Any, arrays: bool
) -> None:
    """Other units, or another lattice, are other values of the same chunks."""

    def write(units: str, edge: float) -> NDArray[np.float32]:
        attrs = {
            "structure": {"lattice": {"matrix": [[edge, 0, 0], [0, 3, 0], [0, 0, 4]]}},
            "charge_density_units": units,
        }
        stores = place.root / "changed" / "mp-1.zarr", place.root / "origin/data/mp-1.zarr"
        values = small_group(stores[0], seed=3, zarr_format=zarr_format, attrs=attrs)[ARRAY]
        if place.server:
            place.server.put_tree(stores[0], f"s3://{place.bucket}/data/mp-1.zarr")
        elif (stores[1] / ARRAY).exists():
            name = ".zattrs" if zarr_format == 2 else "zarr.json"
            (stores[1] / name).write_bytes((stores[0] / name).read_bytes())
        else:
            shutil.copytree(stores[0], stores[1])
        volume, exact = edge * 12, values.astype(np.float64).ravel()
        if units == "volume":
            scale = {False: volume, True: volume / exact.size, "volume": 1.0}[normalize]
            return (exact * scale).astype(np.float32)
        if normalize is True:
            return values.ravel() / np.float32(exact.size)
        return (exact / {False: 1.0, "volume": volume}[normalize]).astype(np.float32)

    place.delete("data", "mp-1")
    cache = {"arrays": {"enabled": arrays}, "retry": {"attempts": 1}}
    kwargs = place.server.s3_kwargs if place.server else None

    def reader(revalidate: str) -> ZarrS3Reader:
        return make_reader(
            place.root,
            place.url,
            normalize=normalize,
            train_fraction=1,
            s3_kwargs=kwargs,
            cache={**cache, "revalidate": revalidate},
        )

    old, old_edge = write("cell", 2.0), 2.0
    following = reader("epoch")
    np.testing.assert_array_equal(following.load("mp-1", "data")[0], old)
    for units, edge in (("volume", 2.0), ("volume", 2.5), ("cell", 2.5)):
        new = write(units, edge)
        trusting = reader("never")
        if arrays:
            np.testing.assert_array_equal(trusting.load("mp-1", "data")[0], old)
            with contextlib.suppress(IncompleteArrayError):  # unless they are stored
                assert trusting.volume("mp-1") == old_edge * 12
        assert following.volume("mp-1") == edge * 12
        np.testing.assert_array_equal(following.load("mp-1", "data")[0], new)
        np.testing.assert_array_equal(reader("run").load("mp-1", "data")[0], new)
        np.testing.assert_array_equal(reader("never").load("mp-1", "data")[0], new)
        old, old_edge = new, edge


def test_a_store_overwritten_while_half_of_it_was_warm_is_read_again(place: Place) -> None:
    """The byte tier has the listing and metadata of the old version, whose chunks no longer
    exist.
    """
    reader = place.reader("never", arrays=False)
    reader.get_metadata(reader.read_zarr_store(f"{place.url}/data/mp-1.zarr"))
    new = place.write("data", "mp-1", seed=9)
    np.testing.assert_array_equal(place.reader("never", arrays=False).load("mp-1", "data")[0], new)


def test_run_asks_at_the_first_use_of_a_run(place: Place) -> None:
    """A reader keeps the version that it first read; the next run reads the present one."""
    place.reader("never").load("mp-1", "data")
    first = place.write("data", "mp-1", seed=8)
    reader = place.reader("run")
    np.testing.assert_array_equal(reader.load("mp-1", "data")[0], first)
    second = place.write("data", "mp-1", seed=9)
    np.testing.assert_array_equal(reader.load("mp-1", "data")[0], first)
    np.testing.assert_array_equal(place.reader("run").load("mp-1", "data")[0], second)


def test_stale_entry_is_replaced_not_kept_beside(place: Place) -> None:
    """One entry per density, with the bytes of one version."""
    reader = place.reader("epoch")
    index = reader.cache.index
    assert index is not None
    reader.load("mp-1", "data")
    before = index.totals(), index.volume_bytes()
    for seed in range(5, 9):
        place.write("data", "mp-1", seed)
        reader.load("mp-1", "data")
    assert (index.totals(), index.volume_bytes()) == before
    assert len(list(index.dir.entries.glob("*/*"))) == sum(n for n, _ in index.totals().values())


def test_array_of_the_old_version_stays_whole_in_the_hands_of_its_user(place: Place) -> None:
    """It is mapped; replacing the entry unlinks the file and does not change it."""
    reader = place.reader("epoch")
    reader.load("mp-1", "data")
    old, _ = reader.load("mp-1", "data")
    kept = old.copy()
    new = place.write("data", "mp-1", seed=9)
    np.testing.assert_array_equal(reader.load("mp-1", "data")[0], new)
    np.testing.assert_array_equal(old, kept)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_dataset_sees_the_new_version_in_the_next_epoch(place: Place) -> None:
    """Both densities of a pair change their grid in the same epoch, through workers, with matching
    sizes.
    """
    for role in ROLES:
        place.write(role, "mp-1", seed=3)
    sets = place.reader("epoch").data_split()
    dataset = RhoData(*sets[0], data_augmentation=False)
    task_id = sets[0][0].reader.split_task_ids()[0][0]  # type: ignore[attr-defined]
    for persistent in (False, True):
        loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=persistent)
        for seed, shape in ((1, (6, 5, 7)), (2, (7, 5, 4))):
            want = [
                place.write(role, task_id, seed + 10 * (role == "label"), shape).reshape(1, *shape)
                for role in ROLES
            ]  # type: ignore[arg-type]
            ((data, label),) = list(loader)
            np.testing.assert_array_equal(data.numpy(), want[0])
            np.testing.assert_array_equal(label.numpy(), want[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("revalidate", "asked", "arrays"),
    [("never", 0, True), ("run", 1, True), ("epoch", 3, True), ("run", 1, False)],
)
def test_revalidation_costs_one_list_per_store(
    s3_place: Place, s3_server: S3Server, revalidate: str, asked: int, arrays: bool
) -> None:
    """Over three epochs with newly forked workers; fresh entries are not fetched. From either
    tier.
    """
    for role, task_id in itertools.product(ROLES, IDS):
        s3_place.reader("never", arrays=arrays).load(task_id, role)  # type: ignore[arg-type]
    time.sleep(2.1)  # a store that was just written is listed twice
    reader = s3_place.reader(revalidate, arrays=arrays)
    loader = DataLoader(RhoData(*reader.data_split()[0]), batch_size=None, num_workers=1)
    log = RequestLog(s3_server, s3_place.bucket)
    for _ in range(3):
        assert len(list(loader)) == 1
    assert log.paths("LIST") == Counter(
        {f"{r}/{i}.zarr/": asked for r in ROLES for i in reader.split_task_ids()[0] if asked}
    )
    assert log.paths("GET") == Counter()
    assert reader.stats.hits == (6 if arrays else 0)


@pytest.mark.parametrize("revalidate", ["run", "epoch"])
def test_an_origin_that_cannot_be_reached_is_an_error(
    s3_place: Place, fault_proxy: FaultProxy, revalidate: str
) -> None:
    """A reader that has to check does not serve what may be stale."""
    reader = s3_place.reader(revalidate, endpoint_url=fault_proxy.endpoint_url)
    for task_id, role in itertools.product(IDS, ROLES):
        reader.load(task_id, role)  # type: ignore[arg-type]
    fresh = s3_place.reader(revalidate, endpoint_url=fault_proxy.endpoint_url)
    fresh.data_split()
    fault_proxy.down()
    with pytest.raises(OriginUnavailableError, match=r"data/mp-1\.zarr"):
        fresh.load("mp-1", "data")
    warm = s3_place.reader("never", endpoint_url=fault_proxy.endpoint_url)
    assert warm.load("mp-1", "data")[1] == (6, 5, 7)


def test_a_run_lists_the_directory_again(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A removed store is missing and a new one is found; ``never`` keeps its split."""
    assert place.reader("never").task_ids == IDS
    (place.root / "map.json").write_text(json.dumps({"GGA": [*IDS, "mp-3"]}))
    for role in ROLES:
        place.delete(role, "mp-1")
        place.write(role, "mp-3", seed=3)
    assert place.reader("never").task_ids == IDS
    assert place.reader("run").task_ids == ["mp-2", "mp-3"]
    assert place.reader("run").missing == ("mp-1",)


def test_a_stale_entry_is_not_served_when_the_new_version_cannot_be_read(
    s3_place: Place, fault_proxy: FaultProxy
) -> None:
    """The origin lists a new version and then refuses it: the next load asks again instead of
    returning the old entry.
    """
    endpoint_url = fault_proxy.endpoint_url
    s3_place.reader("never", endpoint_url=endpoint_url).load("mp-1", "data")
    new = s3_place.write("data", "mp-1", seed=9)
    run = s3_place.reader("run", endpoint_url=endpoint_url)
    fault_proxy.rules(Rule(then="403", op="GET"))
    with pytest.raises(OriginAccessError):
        run.load("mp-1", "data")
    fault_proxy.rules()
    assert np.array_equal(run.load("mp-1", "data")[0], new)
    assert np.array_equal(
        s3_place.reader("never", endpoint_url=endpoint_url).load("mp-1", "data")[0], new
    )


@pytest.mark.parametrize("revalidate", ["run", "epoch"])
def test_a_checked_and_evicted_entry_does_not_come_back_old_from_the_lower_layer(
    tmp_path: Path, revalidate: str
) -> None:
    """The run knows that the density was fresh. The lower layer has the version before."""
    for role in ("data", "label"):
        old = small_group(tmp_path / role / "mp-1.zarr", seed=1)[ARRAY].ravel()
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1"]}))

    def reader(name: str, **more: Any) -> ZarrS3Reader:
        cache = {"dir": tmp_path / name, "limit": "1 GiB", "min_free": 0, **more}
        paths = (str(tmp_path / part) for part in ("data", "label", "map.json"))
        return ZarrS3Reader(*paths, "GGA", False, 0.5, cache=cache)

    assert np.array_equal(reader("lower").load("mp-1", "data")[0], old)
    new = small_group(tmp_path / "data" / "mp-1.zarr", seed=2)[ARRAY].ravel()
    upper = reader("upper", revalidate=revalidate, lower=tmp_path / "lower")
    assert np.array_equal(upper.load("mp-1", "data")[0], new)
    config = CacheConfig(dir=tmp_path / "upper", limit="1 GiB", min_free=0)
    assert plan_evict(config, everything=True).execute() > 0
    assert np.array_equal(upper.load("mp-1", "data")[0], new)
    assert upper.stats.lower_hits == 0
    trusting = reader("third", lower=tmp_path / "lower")
    assert np.array_equal(trusting.load("mp-1", "data")[0], old)
