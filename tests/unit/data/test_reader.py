"""The users' reader: its attributes, its methods on groups, which materials it finds, and whose the
arrays are.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from tests.support.stores import STRUCTURE, random_density
from tests.support.stores import small_group as write_group
from zarrcache import ConfigError, IncompleteArrayError, OriginNotFoundError, ZarrS3Reader
from zarrcache._keys import source_digest

Arrays = dict[str, NDArray[Any]]
IDS = [f"mp-{i}" for i in range(5)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Arrays]]:
    """Five materials with input and label below ``data`` and ``label``, a map of them, and what is
    in them.
    """
    root = tmp_path_factory.mktemp("written")
    (root / "map.json").write_text(
        json.dumps({"GGA": IDS, "SCAN": ["mp-4", "mp-77", "mp-0", "mp-78"]})
    )
    return root, {
        (role, task_id): write_group(
            root / role / f"{task_id}.zarr",
            shape=(4 + i, 5, 6),
            seed=i + 10 * (role == "label"),
            diff=True,
        )
        for role in ("data", "label")
        for i, task_id in enumerate(IDS)
    }


@pytest.fixture
def stores(
    written: tuple[Path, dict[tuple[str, str], Arrays]], tmp_path: Path
) -> dict[tuple[str, str], Arrays]:
    """A copy of them below ``tmp_path``."""
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    return written[1]


@pytest.fixture
def reader_of(make_reader: Callable[..., ZarrS3Reader]) -> Callable[..., ZarrS3Reader]:
    """``reader_of(cache=True, functional=...)`` makes a reader of ``stores``."""

    def make(*, cache: bool = False, **changes: Any) -> ZarrS3Reader:
        return make_reader(cache={} if cache else None, **{"train_fraction": 0.6, **changes})

    return make


class TestMaking:
    """Constructing, copying, showing."""

    def test_defaults_are_those_of_the_users_reader(self, tmp_path: Path) -> None:
        """Another seed would be another split."""
        reader = ZarrS3Reader(str(tmp_path), str(tmp_path), "map.json.gz", "GGA", False, 0.8)
        assert (reader.rs, reader.density_type, reader.s3_kwargs) == (42, "total", {})

    def test_arguments_are_kept_under_the_users_names(self, tmp_path: Path) -> None:
        """Their scripts read ``tf`` and ``rs``; a directory is a Path, a URL stays a string."""
        reader = ZarrS3Reader(
            "s3://bucket/data",
            str(tmp_path),
            "map.json.gz",
            "GGA+U",
            True,
            0.8,
            7,
            "diff",
            {"anon": True},
        )
        assert (reader.data_dir, reader.label_dir, reader.map_dir) == (
            "s3://bucket/data",
            tmp_path,
            Path("map.json.gz"),
        )
        assert (reader.functional, reader.normalize, reader.tf, reader.rs, reader.density_type) == (
            "GGA+U",
            True,
            0.8,
            7,
            "diff",
        )
        assert reader.s3_kwargs == {"anon": True}
        assert reader.use_s3
        assert reader._get_zarr_path("s3://bucket/data", "mp-1") == "s3://bucket/data/mp-1.zarr"
        assert not ZarrS3Reader(tmp_path, f"file://{tmp_path}", "map.json", "GGA", True, 0.8).use_s3

    def test_making_one_touches_neither_the_origin_nor_the_disk(self, tmp_path: Path) -> None:
        """No directory has to exist, and the cache directory is not made yet."""
        ZarrS3Reader(
            tmp_path / "no",
            "s3://no-such-bucket/x",
            tmp_path / "no.json",
            "GGA",
            True,
            0.8,
            cache={"dir": tmp_path / "cache"},
        )
        assert list(tmp_path.iterdir()) == []

    def test_without_a_cache_nothing_is_written(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        before = sorted(tmp_path.rglob("*"))
        reader = reader_of()
        for _ in range(2):
            np.testing.assert_array_equal(
                reader.load("mp-1", "data")[0],
                stores["data", "mp-1"]["charge_density_total"].ravel(),
            )
        reader.data_split()
        assert sorted(tmp_path.rglob("*")) == before
        assert (reader.stats.hits, reader.stats.misses) == (0, 2)

    def test_relative_directory_stays_the_same_one_when_the_process_moves(
        self,
        stores: Any,
        reader_of: Callable[..., ZarrS3Reader],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Hydra changes the working directory; the entries have to be found again."""
        monkeypatch.chdir(tmp_path)
        reader = reader_of(data_dir="data", label_dir="label", cache=True)
        reader.load("mp-1", "data")
        (tmp_path / "run").mkdir()
        monkeypatch.chdir(tmp_path / "run")
        reader.load("mp-1", "data")
        assert reader.key("mp-1", "data") == reader_of(cache=True).key("mp-1", "data")
        assert (reader.stats.misses, reader.stats.hits) == (1, 1)

    @pytest.mark.parametrize("used", [False, True])
    def test_reader_pickles(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], used: bool
    ) -> None:
        """Spawned workers and job schedulers get a copy, before and after it was used; it goes on
        counting for its parent.
        """
        reader = reader_of(cache=True)
        if used:
            reader.load("mp-2", "label")
        copy = pickle.loads(pickle.dumps(reader))
        np.testing.assert_array_equal(
            copy.load("mp-2", "label")[0], stores["label", "mp-2"]["charge_density_total"].ravel()
        )
        assert copy.split_task_ids() == reader.split_task_ids()
        assert (reader.stats.misses, reader.stats.hits) == (1, int(used))
        assert repr(copy) == repr(reader)

    def test_repr_shows_where_the_data_is_and_no_credentials(self, tmp_path: Path) -> None:
        reader = ZarrS3Reader(
            "s3://b/x",
            "s3://b/y",
            "m",
            "GGA",
            True,
            0.8,
            s3_kwargs={"key": "AKIA", "secret": "hush"},
            cache={"dir": tmp_path},
        )
        assert (
            repr(reader)
            == f"ZarrS3Reader('s3://b/x', 's3://b/y', 'GGA', 'total', cache='{tmp_path}')"
        )

    def test_s3_kwargs_that_s3fs_does_not_know_are_refused_at_once(self) -> None:
        """When the reader is made, not an hour later in a worker."""
        with pytest.raises(ConfigError, match="s3_kwargs"):
            ZarrS3Reader(
                "s3://b/x",
                "s3://b/y",
                "m",
                "GGA",
                True,
                0.8,
                s3_kwargs={"endpoint": 7, "client_kwargs": 3},
            )


class TestWhichMaterials:
    """The ids that a run is about."""

    def test_ids_are_those_of_the_map_that_both_directories_have(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        """In the map's order."""
        shutil.rmtree(tmp_path / "label" / "mp-3.zarr")
        shutil.rmtree(tmp_path / "data" / "mp-1.zarr")
        assert reader_of().task_ids == ["mp-0", "mp-2", "mp-4"]
        assert reader_of().missing == ("mp-1", "mp-3")
        assert reader_of(functional="SCAN").task_ids == ["mp-4", "mp-0"]

    def test_missing_stores_are_logged_once_with_count_and_first_ids(
        self,
        stores: Any,
        reader_of: Callable[..., ZarrS3Reader],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """One warning for all of them."""
        ids = [*IDS, *(f"mp-9{i}" for i in range(7))]
        (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
        with caplog.at_level(logging.WARNING):
            reader = reader_of()
            train, test = reader.data_split()
            reader.data_split()
            assert reader.missing == tuple(ids[5:])
        (record,) = caplog.records
        assert record.getMessage() == (
            f"7 of 12 task ids of GGA have no store in {tmp_path}/data or {tmp_path}/label and are "
            "left out: mp-90, mp-91, mp-92, mp-93, mp-94, …"
        )
        assert len(train[0]) + len(test[0]) == 5

    def test_directory_wins_over_zip_and_zip_is_found(
        self,
        stores: Any,
        reader_of: Callable[..., ZarrS3Reader],
        small_group: Callable[..., Arrays],
    ) -> None:
        """People zip a store and forget to delete it; the one that can be rewritten in part is the
        newer one.
        """
        small_group("data/mp-0.zarr.zip", shape=(3, 3, 3), as_zip=True)
        only_zip = small_group("data/mp-77.zarr.zip", shape=(3, 3, 3), as_zip=True, seed=77)[
            "charge_density_total"
        ]
        small_group("label/mp-77.zarr", shape=(3, 3, 3))
        reader = reader_of(functional="SCAN")
        assert reader.task_ids == ["mp-4", "mp-77", "mp-0"]
        assert reader.load("mp-0", "data")[1] == (4, 5, 6)
        np.testing.assert_array_equal(reader.load("mp-77", "data")[0], only_zip.ravel())

    def test_other_files_in_the_directories_do_not_matter(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        """A README, a hidden file, a log."""
        for name in (".DS_Store", "README.md", ".zarr", "mp-77.zarr.tmp", "mp-78.zip"):
            (tmp_path / "data" / name).touch()
            (tmp_path / "label" / name).touch()
        assert reader_of().task_ids == IDS
        assert reader_of(functional="SCAN").missing == ("mp-77", "mp-78")

    def test_new_stores_are_seen_after_relist(
        self,
        stores: Any,
        reader_of: Callable[..., ZarrS3Reader],
        small_group: Callable[..., Arrays],
    ) -> None:
        """With ``revalidate: never`` a run keeps the listing it has, so its split never moves under
        it; warming refreshes it.
        """
        assert reader_of(cache=True, functional="SCAN").task_ids == ["mp-4", "mp-0"]
        for role in ("data", "label"):
            small_group(f"{role}/mp-77.zarr", shape=(3, 3, 3))
        assert reader_of(cache=True, functional="SCAN").task_ids == ["mp-4", "mp-0"]
        with pytest.raises(
            OriginNotFoundError, match=r"data/mp-77.zarr does not exist.*zarrcache warm"
        ):
            reader_of(cache=True).load("mp-77", "data")
        reader = reader_of(cache=True, functional="SCAN")
        reader.relist()
        assert reader.task_ids == ["mp-4", "mp-77", "mp-0"]
        assert reader_of(cache=True, functional="SCAN").task_ids == ["mp-4", "mp-77", "mp-0"]

    def test_functional_can_be_changed_on_a_reader(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """As on the users' reader, whose every ``data_split()`` looks it up."""
        reader = reader_of()
        assert reader.task_ids == IDS
        reader.functional = "SCAN"
        assert (reader.task_ids, reader.missing) == (["mp-4", "mp-0"], ("mp-77", "mp-78"))
        reader.functional = "GGA"
        assert (reader.task_ids, reader.missing) == (IDS, ())

    def test_split_sets_are_those_of_the_split_ids(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """Every array of every sequence is the one of its id."""
        reader = reader_of()
        for ids, (data, label, gs_data, gs_label) in zip(
            reader.split_task_ids(), reader.data_split(), strict=True
        ):
            for i, task_id in enumerate(ids):
                np.testing.assert_array_equal(
                    data[i], stores["data", task_id]["charge_density_total"].ravel()
                )
                np.testing.assert_array_equal(
                    label[i], stores["label", task_id]["charge_density_total"].ravel()
                )
                assert (
                    gs_data[i]
                    == gs_label[i]
                    == stores["data", task_id]["charge_density_total"].shape
                )


class TestOneDensity:
    """``load`` and what warming needs beside it."""

    def test_without_the_array_tier_a_repaired_store_is_read(
        self,
        stores: dict[tuple[str, str], Arrays],
        reader_of: Callable[..., ZarrS3Reader],
        make_reader: Callable[..., ZarrS3Reader],
        tmp_path: Path,
    ) -> None:
        """The stored listing is older than the repaired chunk."""
        chunk = next((tmp_path / "data/mp-0.zarr/charge_density_total").glob("[0-9]*"))
        whole = chunk.read_bytes()
        chunk.write_bytes(b"no chunk at all")
        reader = make_reader(cache={"arrays": {"enabled": False}}, train_fraction=0.6)
        with pytest.raises(IncompleteArrayError):
            reader.load("mp-0", "data")
        chunk.write_bytes(whole)
        values, _ = reader.load("mp-0", "data")
        assert np.array_equal(values, reader_of(normalize=reader.normalize).load("mp-0", "data")[0])

    def test_an_id_may_be_a_string_of_numpy(
        self, stores: dict[tuple[str, str], Arrays], reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """Ids that were shuffled or split as an array are such strings."""
        reader = reader_of(cache=True)
        for task_id in np.array(reader.task_ids):
            values, _ = reader.load(task_id, "data")
            assert np.array_equal(values, reader.load(str(task_id), "data")[0])

    @pytest.mark.parametrize("task_id", [["mp-0"], {}, None, 3, "../mp-0", "a/b"])
    def test_an_id_that_is_no_plain_name_is_refused(
        self,
        task_id: Any,
        stores: dict[tuple[str, str], Arrays],
        reader_of: Callable[..., ZarrS3Reader],
    ) -> None:
        with pytest.raises(ConfigError, match="is not a plain name"):
            reader_of().load(task_id, "data")

    @pytest.mark.parametrize("cache", [False, True])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_array_is_writable_and_the_callers_own(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], cache: bool, normalize: bool
    ) -> None:
        """Work in place reaches neither the cache nor another array, on a miss and on a hit."""
        reader = reader_of(cache=cache, normalize=normalize)
        want = stores["data", "mp-3"]["charge_density_total"].ravel() / np.float32(
            7 * 5 * 6 if normalize else 1
        )
        kept = []
        for _ in range(3):
            values, gridsize = reader.load("mp-3", "data")
            assert (values.dtype, values.shape, gridsize) == (np.float32, (210,), (7, 5, 6))
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(values, want)
            values *= -1
            kept.append(values)
        assert not np.shares_memory(kept[0], kept[1])
        assert not np.shares_memory(kept[1], kept[2])

    def test_both_density_types_are_kept_apart(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        for _ in range(2):
            for density_type in ("total", "diff"):
                values, _ = reader_of(cache=True, density_type=density_type).load("mp-0", "label")
                np.testing.assert_array_equal(
                    values, stores["label", "mp-0"][f"charge_density_{density_type}"].ravel()
                )

    def test_normalize_can_be_changed_on_a_reader(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """What training reads is what is stored: an entry for each of the two, and a hit divides
        nothing.
        """
        reader = reader_of(cache=True)
        raw = stores["data", "mp-0"]["charge_density_total"].ravel()
        for _ in range(2):
            for normalize, wanted in ((False, raw), (True, raw / np.float32(raw.size))):
                reader.normalize = normalize
                np.testing.assert_array_equal(reader.load("mp-0", "data")[0], wanted)
        assert (reader.stats.misses, reader.stats.hits) == (2, 2)

    @pytest.mark.parametrize(
        ("normalize", "divided"),
        [(None, False), (np.True_, True), (np.False_, False), (0, False), (1, True), (2, True)],
    )
    def test_normalize_is_what_python_takes_for_true(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], normalize: Any, divided: bool
    ) -> None:
        reader = reader_of(cache=True)
        raw = stores["data", "mp-0"]["charge_density_total"].ravel()
        reader.normalize = normalize
        np.testing.assert_array_equal(
            reader.load("mp-0", "data")[0], raw / np.float32(raw.size) if divided else raw
        )

    def test_a_density_type_with_a_blank_is_refused(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """It could be the name of a normalized entry."""
        with pytest.raises(ConfigError, match=r"total per point.*without blanks"):
            reader_of(cache=True, density_type="total per point").load("mp-0", "data")

    def test_warm_hits_hold_no_descriptor_and_copy_nothing(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """Users that keep thousands of densities, as the original reader does, must not run out of
        either.
        """
        reader = reader_of(cache=True)
        reader.load("mp-0", "data")
        reader.load("mp-0", "data")
        gc.collect()  # what other tests left open must not end in between
        descriptors = len(os.listdir("/dev/fd"))
        kept = [reader.load("mp-0", "data")[0] for _ in range(300)]
        assert len(os.listdir("/dev/fd")) <= descriptors
        assert len(kept) == 300

    def test_a_pass_over_warm_data_holds_no_density(
        self, reader_of: Callable[..., ZarrS3Reader], small_group: Callable[..., Arrays]
    ) -> None:
        """Of twelve densities of 1 MiB, Python allocates far less than one."""
        for role in ("data", "label"):
            small_group(f"{role}/mp-1.zarr", shape=(64, 64, 64), chunks=(32, 32, 32))
        reader = reader_of(cache=True)
        reader.load("mp-1", "data")
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(12):
                reader.load("mp-1", "data")[0].sum()
            assert tracemalloc.get_traced_memory()[1] < 300_000
        finally:
            tracemalloc.stop()

    def test_ensure_says_how_it_was_had(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        """Fetched, fresh, or not admitted; and its size."""
        reader = reader_of(cache=True)
        assert reader.ensure("mp-1", "data") == ("miss", 5 * 5 * 6 * 4)
        assert reader.ensure("mp-1", "data") == ("hit", 5 * 5 * 6 * 4)
        assert reader_of().ensure("mp-1", "data") == ("bypass", 5 * 5 * 6 * 4)

    def test_key_and_listing_are_those_of_the_entry(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        """What ``warm`` compares: identity, and the digest of what the origin lists."""
        reader = reader_of(cache=True)
        reader.load("mp-1", "data")
        key = reader.key("mp-1", "data")
        assert (key.origin, key.url, key.array) == (
            "file",
            f"{tmp_path}/data/mp-1.zarr",
            "charge_density_total",
        )
        listed = reader.listing("mp-1", "data")
        assert listed[0].key == "mp-1.zarr/charge_density_total/.zarray"
        assert listed[-1].key == "mp-1.zarr/.zattrs"
        assert len(listed) == 1 + 2 * 2 * 2 + 1  # .zarray, the chunks, and .zattrs
        assert reader.cache.arrays is not None
        entry = reader.cache.arrays.get(key)
        assert entry is not None
        assert entry.header.source == source_digest(listed)

    def test_stats_say_what_was_read(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader]
    ) -> None:
        reader = reader_of(cache=True)
        assert reader.stats.hit_ratio == 0.0
        for _ in range(3):
            reader.load("mp-0", "data")
        assert (reader.stats.misses, reader.stats.hits, reader.stats.served_bytes) == (
            1,
            2,
            2 * 4 * 5 * 6 * 4,
        )
        assert reader.stats.hit_ratio == pytest.approx(2 / 3)


class TestGroups:
    """``read_zarr_store`` and ``read_charge_density``."""

    @pytest.mark.parametrize("cache", [False, True])
    @pytest.mark.parametrize(
        "layout", [{}, {"zarr_format": 3}, {"consolidated": True}, {"as_zip": True}]
    )
    def test_group_shows_everything_that_is_in_the_store(
        self,
        reader_of: Callable[..., ZarrS3Reader],
        small_group: Callable[..., Arrays],
        tmp_path: Path,
        cache: bool,
        layout: dict[str, Any],
    ) -> None:
        """Arrays, attributes, crops; read-only."""
        name = "data/mp-1.zarr" + (".zip" if layout.get("as_zip") else "")
        arrays = small_group(name, diff=True, **layout)
        for path in (tmp_path / name, str(tmp_path / name)):
            group = reader_of(cache=cache).read_zarr_store(path)
            assert isinstance(group, zarr.Group)
            assert group.read_only
            assert sorted(group.array_keys()) == ["charge_density_diff", "charge_density_total"]
            for array_name, want in arrays.items():
                array = group[array_name]
                assert isinstance(array, zarr.Array)
                np.testing.assert_array_equal(array[2:5, :, 3:], want[2:5, :, 3:])

    def test_density_of_a_group_is_that_of_load_and_shares_its_entry(
        self, stores: Any, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        """The users' two ways to one density read the origin once."""
        reader = reader_of(cache=True, normalize=True)
        for _ in range(2):
            values, gridsize = reader.read_charge_density(
                reader.read_zarr_store(tmp_path / "data" / "mp-2.zarr")
            )
            again, same_size = reader.load("mp-2", "data")
            np.testing.assert_array_equal(values, again)
            assert gridsize == same_size == (6, 5, 6)
        assert (reader.stats.misses, reader.stats.hits) == (1, 3)

    @pytest.mark.parametrize("dtype", ["f4", ">f8", "i2", "?"])
    def test_density_of_a_group_that_zarr_opened_itself(
        self,
        reader_of: Callable[..., ZarrS3Reader],
        tmp_path: Path,
        small_group: Callable[..., Arrays],
        dtype: str,
    ) -> None:
        """Also of a group that is not the root of its store."""
        # Chunks of integers that are all 0 are written as well.
        stored = small_group(
            "x.zarr", shape=(4, 5, 6), dtype=dtype, config={"write_empty_chunks": True}
        )
        want = stored["charge_density_total"]
        root = zarr.create_group(zarr.storage.MemoryStore(), zarr_format=2)
        root.create_array("inner/charge_density_total", data=want)
        inner = root["inner"]
        assert isinstance(inner, zarr.Group)
        for group in (zarr.open_group(str(tmp_path / "x.zarr"), mode="r"), inner):
            values, gridsize = reader_of().read_charge_density(group)
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, want.astype("float32").ravel())
            assert gridsize == (4, 5, 6)

    def test_nested_group_of_a_cached_store_is_not_taken_for_its_root(
        self, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        root = zarr.open_group(str(tmp_path / "data" / "n.zarr"), mode="w", zarr_format=2)
        outer, inner = random_density((3, 4, 5), seed=1), random_density((5, 4, 3), seed=2)
        root.create_array("charge_density_total", data=outer)
        root.create_array("inner/charge_density_total", data=inner)
        reader = reader_of(cache=True)
        group = reader.read_zarr_store(tmp_path / "data" / "n.zarr")
        nested = group["inner"]
        assert isinstance(nested, zarr.Group)
        np.testing.assert_array_equal(reader.read_charge_density(group)[0], outer.ravel())
        np.testing.assert_array_equal(reader.read_charge_density(nested)[0], inner.ravel())

    def test_store_that_is_not_there_is_a_file_not_found_error(
        self, reader_of: Callable[..., ZarrS3Reader], tmp_path: Path
    ) -> None:
        """The users catch it; it names the path."""
        with pytest.raises(FileNotFoundError, match=r"no\.zarr does not exist"):
            reader_of().read_zarr_store(tmp_path / "no.zarr")


class TestMetadata:
    """``get_metadata``."""

    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_json_strings_and_json_itself_give_the_same(
        self,
        reader_of: Callable[..., ZarrS3Reader],
        small_group: Callable[..., Arrays],
        tmp_path: Path,
        zarr_format: int,
    ) -> None:
        """The users' converter writes strings."""
        metadata = {"task_id": "mp-1", "functional": "GGA"}
        small_group("a.zarr", zarr_format=zarr_format, metadata=metadata)
        small_group(
            "b.zarr", zarr_format=zarr_format, attrs={"metadata": metadata, "structure": STRUCTURE}
        )
        for name in ("a.zarr", "b.zarr"):
            reader = reader_of(cache=True)
            assert reader.get_metadata(reader.read_zarr_store(tmp_path / name)) == {
                **metadata,
                "structure": STRUCTURE,
            }

    def test_store_without_attributes_has_no_metadata(
        self,
        reader_of: Callable[..., ZarrS3Reader],
        small_group: Callable[..., Arrays],
        tmp_path: Path,
    ) -> None:
        want = small_group("a.zarr", attrs={})["charge_density_total"]
        reader = reader_of()
        group = reader.read_zarr_store(tmp_path / "a.zarr")
        assert reader.get_metadata(group) == {}
        np.testing.assert_array_equal(reader.read_charge_density(group)[0], want.ravel())
