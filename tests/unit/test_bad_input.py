"""Bad input raises an error that says what is wrong, where, and what to do; nothing is lost
silently.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.support.readers import make_reader
from tests.support.stores import plain_read, random_density, small_group
from zarrcache import (
    CacheConfig,
    ConfigError,
    IncompleteArrayError,
    OriginError,
    OriginNotFoundError,
    RhoData,
    SchemaError,
    ZarrDataset,
    get_dataset,
    plan_evict,
    plan_warm,
    verify,
)
from zarrcache.registry import open_reader

IDS = ["mp-1", "mp-2", "mp-3"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good materials and their map."""
    root = tmp_path_factory.mktemp("good")
    for role, task_id in itertools.product(("data", "label"), IDS):
        small_group(root / role / f"{task_id}.zarr", shape=(5, 6, 7), seed=int(task_id[3:]))
    (root / "map.json").write_text(json.dumps({"GGA": IDS, "SCAN": [], "r2SCAN": ["mp-9"]}))
    return root


@pytest.fixture
def data(good: Path, tmp_path: Path) -> Path:
    """A copy, which a test may damage."""
    return Path(shutil.copytree(good, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def cache() -> dict[str, Any]:
    """A cache with its defaults: densities are read through the array tier."""
    return {}


@pytest.fixture(
    params=[None, {"arrays": {"enabled": True}}, {"arrays": {"enabled": False}}],
    ids=["no cache", "array tier", "byte tier"],
)
def any_cache(request: pytest.FixtureRequest) -> Any:
    """For one test of each kind of error: the three ways that a density is read."""
    return request.param


def replace_store(path: Path, arrays: dict[str, Any], **layout: Any) -> None:
    """Replace a store."""
    shutil.rmtree(path, ignore_errors=True)
    small_group(path, arrays, **layout)


class TestMap:
    """The map file and what it says."""

    def test_unknown_functional_names_those_in_the_map(self, data: Path) -> None:
        """A ``ValueError``, as in the users' reader."""
        with pytest.raises(
            ValueError,
            match=re.escape(
                "Functional 'PBE' not found in mapping. Available: ['GGA', 'SCAN', 'r2SCAN']. Set "
                f"functional to one of them; the map is {data}/map.json."
            ),
        ) as caught:
            make_reader(data, functional="PBE").data_split()
        assert isinstance(caught.value, ConfigError)

    def test_functional_without_ids_says_that_nothing_can_be_split(self, data: Path) -> None:
        with pytest.raises(
            ConfigError,
            match=rf"Nothing to split: of 0 task ids of SCAN in {data}/map\.json, none has both",
        ):
            make_reader(data, functional="SCAN").data_split()

    def test_functional_whose_stores_are_all_missing_names_them(
        self, data: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """In the warning; the error says that nothing is left."""
        with (
            caplog.at_level(logging.WARNING),
            pytest.raises(ConfigError, match="none has both input"),
        ):
            make_reader(data, functional="r2SCAN").data_split()
        assert "1 of 1 task ids of r2SCAN have no store" in caplog.text
        assert caplog.text.rstrip().endswith("mp-9")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"{'GGA': ['mp-1']}", "is not JSON"),
            (b"", "is not JSON"),
            (b"\xff\xfe\x00", "is not JSON"),
            (b'{"GGA": ["mp-1"', "is not JSON"),
            (gzip.compress(b"{", mtime=0)[:-4], "is not JSON"),
            (gzip.compress(b'{"GGA"', mtime=0), "is not JSON"),
            (b'["mp-1"]', "does not hold {functional: [task_id, ...]}"),
            (b"3", "does not hold {functional: [task_id, ...]}"),
            (b'{"GGA": "mp-1"}', "does not hold {functional: [task_id, ...]}"),
            (b'{"GGA": {"mp-1": 1}}', "does not hold {functional: [task_id, ...]}"),
        ],
    )
    def test_an_invalid_map_is_named_with_the_form_it_needs(
        self, data: Path, content: bytes, words: str
    ) -> None:
        """Broken JSON, broken gzip, and other JSON."""
        (data / "map.json").write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            make_reader(data).data_split()
        assert str(data / "map.json") in str(caught.value)
        assert words in str(caught.value)
        assert "{functional: [task_id, ...]}" in str(caught.value)

    @pytest.mark.parametrize("name", ["no.json", "data", "map.json/x"])
    def test_map_that_cannot_be_read_is_named(self, data: Path, name: str) -> None:
        """Missing, a directory, below a file."""
        with pytest.raises(
            ConfigError, match=rf"{re.escape(str(data / name))} cannot be read \(.+\)\. Set map_dir"
        ):
            make_reader(data, map_dir=data / name).data_split()

    @pytest.mark.parametrize(
        "task_id",
        [
            "../mp-1",
            "a/b",
            "/etc/passwd",
            "",
            ".",
            "..",
            ".hidden",
            "mp..1",
            "mp-1\n",
            "a\\b",
            "mp-1\0",
            "x" * 300,
            3,
            None,
            ["mp-1"],
        ],
    )
    def test_a_task_id_that_is_not_a_plain_name_is_refused(self, data: Path, task_id: Any) -> None:
        """In the map and in a call, before any path is made of it."""
        (data / "map.json").write_text(json.dumps({"GGA": [*IDS, task_id]}))
        for use in (
            lambda: make_reader(data).data_split(),
            lambda: make_reader(data).load(task_id, "data"),
        ):
            with pytest.raises(ConfigError, match="is not a plain name") as caught:
                use()
            assert repr(task_id) in str(caught.value)


class TestArray:
    """Stores that can be read and do not hold a density."""

    def test_missing_array_names_those_that_are_there(self, data: Path, any_cache: Any) -> None:
        """And the store. A ``ValueError`` with the users' message."""
        replace_store(
            data / "data" / "mp-1.zarr",
            {"rho": random_density((2, 2, 2)), "charge_density_diff": random_density((2, 2, 2))},
        )
        with pytest.raises(SchemaError) as caught:
            make_reader(data, cache=any_cache).load("mp-1", "data")
        expected = (
            f"'charge_density_total' not found in zarr store {data}/data/mp-1.zarr. "
            "Available arrays: ['charge_density_diff', 'rho']"
        )
        assert str(caught.value) == expected
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize(
        ("density_type", "array"),
        [("diff", "charge_density_diff"), ("spin", "spin"), ("volumetric/elf", "volumetric/elf")],
    )
    def test_unknown_density_type_names_the_arrays(
        self, data: Path, cache: Any, density_type: str, array: str
    ) -> None:
        with pytest.raises(
            SchemaError,
            match=rf"'{re.escape(array)}' not found .*\['charge_density_total'\]",
        ):
            make_reader(data, cache=cache, density_type=density_type).load("mp-1", "data")

    @pytest.mark.parametrize("density_type", ["Total", "", "../x", ["total", ""], 3, None])
    def test_what_cannot_be_an_array_is_refused_by_the_reader(
        self, data: Path, cache: Any, density_type: Any
    ) -> None:
        with pytest.raises(ConfigError, match="density_type"):
            make_reader(data, cache=cache, density_type=density_type)

    @pytest.mark.parametrize("shape", [(6, 7), (210,), (1, 5, 6, 7), (5, 0, 7)])
    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_array_that_is_not_3d_is_named_with_its_shape(
        self, data: Path, cache: Any, shape: tuple[int, ...], zarr_format: Any
    ) -> None:
        """Flat, a slice, with a channel axis, and empty."""
        replace_store(
            data / "data" / "mp-1.zarr",
            {"charge_density_total": np.ones(shape, np.float32)},
            zarr_format=zarr_format,
        )
        with pytest.raises(SchemaError) as caught:
            make_reader(data, cache=cache).load("mp-1", "data")
        assert str(shape) in str(caught.value)
        assert "3-D" in str(caught.value)
        assert f"{data}/data/mp-1.zarr" in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "v2", "v3"),
        [
            (np.ones((2, 2, 2), np.complex64), "'<c8' (complex)", "'complex64' (complex)"),
            (np.full((2, 2, 2), "x"), "'<U1' (strings)", "fixed_length_utf32"),
            (np.full((2, 2, 2), b"xy"), "'|S2' (strings)", "null_terminated_bytes"),
            (
                np.zeros((2, 2, 2), [("a", "f4"), ("b", "f4")]),
                "[['a', '<f4'], ['b', '<f4']]",
                "struct",  # zarr 3.1: "structured"; 3.2 and newer: "struct"
            ),
            (np.zeros((2, 2, 2), "M8[s]"), "'<M8[s]'", "datetime64"),
        ],
    )
    @pytest.mark.parametrize("zarr_format", [2, 3])
    # zarr: some of these types have no specification in v3
    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_array_of_something_else_than_real_numbers_says_of_what(
        self, data: Path, cache: Any, values: Any, v2: str, v3: str, zarr_format: Any
    ) -> None:
        """A complex density would silently lose its imaginary part. The type is shown as in the
        metadata.
        """
        fill_value = None if values.dtype.kind in "VM" else np.zeros((), values.dtype)[()]
        replace_store(
            data / "data" / "mp-1.zarr",
            {"charge_density_total": values},
            zarr_format=zarr_format,
            fill_value=fill_value,
        )
        with pytest.raises(SchemaError) as caught:
            make_reader(data, cache=cache).load("mp-1", "data")
        assert "a charge density holds real numbers" in str(caught.value)
        assert (v2 if zarr_format == 2 else v3) in str(caught.value)
        assert f"{data}/data/mp-1.zarr/charge_density_total" in str(caught.value)

    @pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", ">f8", "i1", "u2", "i8", "u8", "?"])
    @pytest.mark.parametrize("zarr_format", [2, 3])
    def test_other_numbers_are_cast_to_float32_as_numpy_does(
        self, data: Path, cache: Any, dtype: str, zarr_format: Any
    ) -> None:
        """As the users' reader: ``np.array(array, dtype=np.float32)``."""
        values = (np.random.default_rng(0).random((5, 6, 7)) * 200).astype(dtype)
        path = data / "data" / "mp-1.zarr"
        replace_store(path, {"charge_density_total": values}, zarr_format=zarr_format)
        for _ in range(2):
            got, gridsize = make_reader(data, cache=cache).load("mp-1", "data")
            assert (got.dtype, gridsize) == (np.float32, (5, 6, 7))
            np.testing.assert_array_equal(got, np.array(plain_read(path), dtype=np.float32).ravel())

    def test_a_group_in_place_of_the_array_is_an_error(self, data: Path, any_cache: Any) -> None:
        """The array is one level too deep."""
        path = data / "data" / "mp-1.zarr"
        shutil.rmtree(path)
        zarr.open_group(str(path), mode="w", zarr_format=2).create_array(
            "charge_density_total/0", data=random_density((2, 2, 2))
        )
        with pytest.raises(SchemaError, match="charge_density_total"):
            make_reader(data, cache=any_cache).load("mp-1", "data")


class TestDamage:
    """Stores that cannot be read. None is cached, and the other samples can be read."""

    def one_bad(self, data: Path, cache: Any, error: type[Exception], words: str) -> None:
        """``mp-1`` raises twice, with its path; ``mp-2`` can be read; the split keeps every id."""
        reader = make_reader(data, cache=cache)
        for _ in range(2):
            with pytest.raises(error, match=words) as caught:
                reader.load("mp-1", "data")
            assert f"{data}/data/mp-1.zarr" in str(caught.value)
            assert len(caught.value.args) == 1
        np.testing.assert_array_equal(
            reader.load("mp-2", "data")[0], plain_read(data / "data" / "mp-2.zarr").ravel()
        )
        assert reader.task_ids == IDS

    def test_store_without_metadata(self, data: Path, cache: Any) -> None:
        """Chunks only."""
        for name in (
            ".zgroup",
            ".zattrs",
            "charge_density_total/.zarray",
            "charge_density_total/.zattrs",
        ):
            (data / "data" / "mp-1.zarr" / name).unlink()
        self.one_bad(
            data,
            cache,
            SchemaError,
            r"not found in zarr store|holds neither \.zarray nor zarr\.json",
        )

    @pytest.mark.parametrize("keep", [0, 1, 40])
    def test_truncated_array_metadata(self, data: Path, any_cache: Any, keep: int) -> None:
        """An incomplete upload."""
        path = data / "data" / "mp-1.zarr" / "charge_density_total" / ".zarray"
        path.write_bytes(path.read_bytes()[:keep])
        self.one_bad(
            data, any_cache, SchemaError, r"\.zarray is not JSON .* convert the store again"
        )

    def test_truncated_chunk(self, data: Path, any_cache: Any) -> None:
        path = data / "data" / "mp-1.zarr" / "charge_density_total" / "0.1.0"
        path.write_bytes(path.read_bytes()[:20])
        self.one_bad(data, any_cache, IncompleteArrayError, r"0\.1\.0.*onvert the store again")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"\0" * 500])
    def test_unreadable_zip(self, data: Path, cache: Any, content: bytes) -> None:
        """Not a zip file, or only its beginning."""
        shutil.rmtree(data / "data" / "mp-1.zarr")
        (data / "data" / "mp-1.zarr.zip").write_bytes(content)
        self.one_bad(
            data, cache, IncompleteArrayError, r"mp-1\.zarr\.zip is not a readable zip file"
        )

    def test_zip_that_was_cut(self, data: Path, any_cache: Any) -> None:
        shutil.rmtree(data / "data" / "mp-1.zarr")
        path = data / "data" / "mp-1.zarr.zip"
        small_group(path, as_zip=True)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.one_bad(
            data, any_cache, IncompleteArrayError, r"mp-1\.zarr\.zip is not a readable zip file"
        )

    def test_zip_without_the_array(self, data: Path, cache: Any) -> None:
        shutil.rmtree(data / "data" / "mp-1.zarr")
        with zipfile.ZipFile(data / "data" / "mp-1.zarr.zip", "w") as archive:
            archive.writestr(".zgroup", json.dumps({"zarr_format": 2}))
            archive.writestr("readme.txt", "no density here")
        self.one_bad(
            data,
            cache,
            SchemaError,
            r"'charge_density_total' not found in zarr store .*mp-1\.zarr\.zip.*\[\]",
        )

    def test_empty_directory(self, data: Path, any_cache: Any) -> None:
        shutil.rmtree(data / "data" / "mp-1.zarr")
        (data / "data" / "mp-1.zarr").mkdir()
        self.one_bad(data, any_cache, OriginNotFoundError, "does not exist or is empty")

    def test_attributes_that_are_not_json(self, data: Path, cache: Any) -> None:
        """The error names the attribute; the density can still be read."""
        replace_store(
            data / "data" / "mp-1.zarr",
            {"charge_density_total": random_density((2, 2, 2))},
            attrs={"metadata": "{half", "structure": "{}"},
        )
        reader = make_reader(data, cache=cache)
        group = reader.read_zarr_store(data / "data" / "mp-1.zarr")
        with pytest.raises(SchemaError, match="attribute 'metadata' is not JSON"):
            reader.get_metadata(group)
        assert reader.read_charge_density(group)[1] == (2, 2, 2)


class TestPlace:
    """Directories that are not there, and caches that cannot be."""

    @pytest.mark.parametrize("role", ["data", "label"])
    def test_directory_that_does_not_exist_is_named(
        self, data: Path, any_cache: Any, role: str
    ) -> None:
        """Not reported as missing stores."""
        with pytest.raises(
            OriginNotFoundError,
            match=rf"{data}/nowhere is not a directory of this machine. Check the path",
        ):
            make_reader(data, cache=any_cache, **{f"{role}_dir": data / "nowhere"}).data_split()

    def test_file_in_the_place_of_a_directory_is_named(self, data: Path, cache: Any) -> None:
        with pytest.raises(OriginError, match=rf"{data}/map.json"):
            make_reader(data, cache=cache, label_dir=data / "map.json").data_split()

    def test_other_schemes_are_refused_with_those_that_work(self, data: Path) -> None:
        """Of Google and of the web."""
        for url in ("gs://bucket/data", "https://bucket.s3.amazonaws.com/data"):
            with pytest.raises(
                ConfigError, match=r"is not supported\. Write s3://bucket/prefix, a path"
            ):
                make_reader(data, data_dir=url)

    def test_a_store_missing_on_one_side_is_left_out_with_a_warning(
        self, data: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One warning; ``missing`` has the id."""
        shutil.rmtree(data / "label" / "mp-2.zarr")
        reader = make_reader(data)
        train, test = reader.data_split()
        assert len(train[0]) + len(test[0]) == 2
        assert reader.missing == ("mp-2",)
        assert caplog.text.count("are left out: mp-2") == 1

    def test_store_that_goes_away_later_is_an_error_not_a_sample_less(
        self, data: Path, any_cache: Any
    ) -> None:
        """After the split was made."""
        reader = make_reader(data, cache=any_cache)
        (train, _), _ = (sets[:2] for sets in reader.data_split())
        first = reader.split_task_ids()[0][0]
        shutil.rmtree(data / "data" / f"{first}.zarr")
        with pytest.raises(OriginNotFoundError, match=rf"data/{first}.zarr does not exist"):
            train[0]

    @pytest.fixture(params=["a file", "below a file", "read-only"])
    def unusable(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """Directories that cannot be written."""
        if request.param == "read-only":
            if os.geteuid() == 0:
                path = Path("/proc/zarrcache")  # not writable, not even by root
                if not path.parent.is_dir():
                    pytest.skip("root may write everywhere on this machine")
                return path
            (tmp_path / "locked").mkdir(mode=0o500)
            return tmp_path / "locked" / "cache"
        (tmp_path / "file").touch()
        return tmp_path / "file" if request.param == "a file" else tmp_path / "file" / "cache"

    @pytest.mark.parametrize("arrays", [True, False])
    def test_cache_that_cannot_be_written_costs_one_warning_and_no_sample(
        self, data: Path, unusable: Path, arrays: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Training continues from the origin, with one warning, not one per sample."""
        cfg = {
            "data_dir": data / "data",
            "label_dir": data / "label",
            "map_dir": data / "map.json",
            "functional": "GGA",
            "normalize_data": False,
            "train_fraction": 2,
            "cache": {"dir": str(unusable), "arrays": {"enabled": arrays}},
        }
        with caplog.at_level(logging.WARNING):
            train, _ = get_dataset(cfg)
            dataset = RhoData(*train, data_augmentation=False)
            for _ in range(3):
                for i, task_id in enumerate(train[0].reader.split_task_ids()[0]):
                    np.testing.assert_array_equal(
                        dataset[i][0].numpy()[0], plain_read(data / "data" / f"{task_id}.zarr")
                    )
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 1, messages
        assert str(unusable) in messages[0]
        assert "serving" in messages[0]
        assert "from the origin" in messages[0]
        assert train[0].reader.stats.cache_errors > 0


def test_good_data_passes_everything_above(data: Path, any_cache: Any) -> None:
    """The errors above are not caused by the fixture."""
    reader = make_reader(data, cache=any_cache)
    for task_id in IDS:
        np.testing.assert_array_equal(
            reader.load(task_id, "label")[0], plain_read(data / "label" / f"{task_id}.zarr").ravel()
        )


@pytest.mark.parametrize(
    ("method", "words"),
    [("get_metadata", r"reader\.metadata\(task_id\)"), ("read_charge_density", r"reader\.load\(")],
)
def test_a_task_id_in_place_of_a_store_is_refused_with_the_method_that_takes_it(
    data: Path, method: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{method} takes an open store, .*'mp-1'.*{words}"):
        getattr(make_reader(data), method)("mp-1")


@pytest.mark.parametrize(
    "function", [plan_warm, verify, functools.partial(plan_evict, everything=True)]
)
def test_a_path_in_place_of_a_config_is_refused_with_what_reads_it(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"DataConfig\.from_yaml\(path\).*, not 'x\.yaml'"):
        function("x.yaml")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (open_reader, r"cfg is the path 'x\.yaml'. Read the file: DataConfig\.from_yaml\('x"),
        (ZarrDataset, r"reader is 'x\.yaml'. Give open_reader\(DataConfig\.from_yaml\(path\)\)"),
        (CacheConfig.of, r"cache is the path 'x\.yaml'. Give the keys: {'dir': 'x\.yaml'}"),
    ],
)
def test_a_path_in_python_is_refused_with_what_is_meant(
    call: Callable[[str], object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        call("x.yaml")
