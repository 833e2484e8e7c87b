"""Loaders are found by name, one's own as well as the built-in ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.stores import small_group
from zarrcache import ZarrS3Reader, registry
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.convert import RhoRead
from zarrcache.data import PairReader
from zarrcache.errors import ConfigError
from zarrcache.registry import get_dataset, load_chgcar_data, load_data, register_data

KEYS: dict[str, Any] = {
    "data_dir": "a",
    "label_dir": "b",
    "map_dir": "map.json",
    "functional": "GGA",
    "train_fraction": 0.8,
}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what a test registers."""
    monkeypatch.setattr(registry, "_loaders", dict(registry._loaders))


def test_own_loader_is_registered_in_one_line() -> None:
    """The decorator returns the function unchanged."""

    @register_data("mine")
    def load(cfg: Any) -> tuple[str, int]:
        return cfg.data_dir, cfg.my_key

    assert load(SimpleNamespace(data_dir="x", my_key=1)) == ("x", 1)
    assert get_dataset(SimpleNamespace(dataset_name="mine", data_dir="x", my_key=1)) == ("x", 1)


def test_loader_gets_a_namespace_from_a_mapping_and_anything_else_as_it_is() -> None:
    """Loaders use ``cfg.key``, as the users' do; a mapping must not break them."""
    register_data("mine")(lambda cfg: cfg)
    assert get_dataset({"dataset_name": "mine", "epochs": 3}) == SimpleNamespace(
        dataset_name="mine", epochs=3
    )
    cfg = SimpleNamespace(dataset_name="mine")
    assert get_dataset(cfg) is cfg


@pytest.mark.parametrize("name", ["zarr_s3_dta", "MINE", "", None, 3])
def test_unknown_name_tells_which_are_known(name: object) -> None:
    """The error has the given name, the nearest, and all names."""
    register_data("mine")(lambda cfg: cfg)
    with pytest.raises(
        ConfigError, match="chgcar_data, mine, mp_zarr_s3_data, zarr_s3_data"
    ) as caught:
        get_dataset({"dataset_name": name})
    assert repr(name) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert ("Did you mean 'zarr_s3_data'?" in str(caught.value)) == (name == "zarr_s3_dta")


def test_second_loader_of_a_name_is_refused() -> None:
    """Two packages with the same name do not replace each other silently; the error names both."""

    def one(cfg: Any) -> str:
        return "one"

    def other(cfg: Any) -> str:
        return "other"

    register_data("mine")(one)
    with pytest.raises(
        ConfigError, match=r"'mine' is taken by .*\.one\..* Register .*\.other under another name"
    ):
        register_data("mine")(other)
    assert get_dataset({"dataset_name": "mine"}) == "one"


def test_loaders_of_one_factory_are_different_loaders() -> None:
    """They share a name and a module."""

    def make(value: int) -> Any:
        def load(cfg: Any) -> int:
            return value

        return load

    register_data("mine")(make(1))
    with pytest.raises(ConfigError, match="taken"):
        register_data("mine")(make(2))


def test_same_loader_may_be_registered_again() -> None:
    """The function itself, and its definition executed again: a notebook cell run twice, a reloaded
    module.
    """
    namespace: dict[str, Any] = {"register_data": register_data, "__name__": "notebook"}
    cell = "@register_data('mine')\ndef load(cfg):\n    return {}\n"
    exec(cell.format(1), namespace)
    register_data("mine")(namespace["load"])
    exec(cell.format(2), namespace)
    assert get_dataset({"dataset_name": "mine"}) == 2


@pytest.mark.parametrize("name", ["", " ", None, load_data])
def test_loader_needs_a_name(name: Any) -> None:
    """``@register_data`` without a name raises an error that shows the syntax."""
    with pytest.raises(ConfigError, match=r'@register_data\("my_data"\)'):
        register_data(name)


def test_callable_object_can_be_a_loader() -> None:
    """It has no ``__name__``."""

    class Loader:
        def __call__(self, cfg: Any) -> int:
            return 1

    loader = Loader()
    register_data("mine")(loader)
    register_data("mine")(loader)
    assert get_dataset({"dataset_name": "mine"}) == 1
    with pytest.raises(ConfigError, match="taken by"):
        register_data("mine")(Loader())


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """The keys of a config for three pairs of stores."""
    for role in ("data", "label"):
        for task_id in ("mp-1", "mp-2", "mp-3"):
            small_group(tmp_path / role / f"{task_id}.zarr")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", "mp-2", "mp-3"]}))
    return {
        **KEYS,
        "data_dir": str(tmp_path / "data"),
        "label_dir": str(tmp_path / "label"),
        "map_dir": str(tmp_path / "map.json"),
    }


@pytest.mark.parametrize("name", ["zarr_s3_data", "mp_zarr_s3_data", None])
def test_zarr_loader_has_both_names_and_is_the_default(
    name: str | None, pairs: dict[str, Any]
) -> None:
    cfg = pairs if name is None else {**pairs, "dataset_name": name, "epochs": 2}
    train, test = get_dataset(cfg)
    expected_train, expected_test = ZarrS3Reader.from_config(pairs).data_split()
    for found, expected in ((train, expected_train), (test, expected_test)):
        assert len(found[0]) == len(expected[0]) > 0
        assert all(map(np.array_equal, found[0], expected[0]))


@pytest.mark.parametrize("reader", [ZarrS3Reader, RhoRead])
def test_readers_take_the_keys_of_a_config(reader: type[PairReader]) -> None:
    """Keys that are not given have the users' defaults; creating a reader reads nothing."""
    plain = reader.from_config(KEYS)
    assert (str(plain.data_dir), str(plain.label_dir)) == ("a", "b")
    assert plain.map_dir == Path("map.json")
    assert (plain.functional, plain.normalize, plain.tf) == ("GGA", True, 0.8)
    assert (plain.rs, plain.density_type, plain.s3_kwargs) == (42, "total", {})
    keys = {
        **KEYS,
        "normalize_data": False,
        "random_state": 7,
        "density_type": "diff",
        "s3_kwargs": {"anon": True},
    }
    for cfg in (keys, SimpleNamespace(**keys), DataConfig.of(keys)):
        other = reader.from_config(cfg)
        assert (other.normalize, other.rs, other.density_type) == (False, 7, "diff")
        assert other.s3_kwargs == {"anon": True}


def test_reader_has_the_cache_of_the_config(tmp_path: Path) -> None:
    cfg = {**KEYS, "cache": {"dir": str(tmp_path)}}
    assert ZarrS3Reader.from_config(cfg).cache_config == CacheConfig(dir=tmp_path)


def test_reader_of_stores_is_not_made_of_a_config_for_files() -> None:
    with pytest.raises(ConfigError, match=r"dataset_name is chgcar_data.*zarrcache convert"):
        registry.open_reader({**KEYS, "dataset_name": "chgcar_data"})


def test_misspelt_cache_key_is_named_before_anything_is_read() -> None:
    """The message suggests the nearest setting."""
    with pytest.raises(ConfigError, match=r"limti is not a setting. Did you mean 'limit'"):
        get_dataset({**KEYS, "cache": {"dir": "/scratch", "limti": "1 GiB"}})


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="functional is missing"):
        get_dataset({key: value for key, value in KEYS.items() if key != "functional"})


def test_chgcar_loader_reads_files_and_says_that_it_does_not_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same keys work for files that are not converted; a cache block has no effect."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1"]}))
    cfg = {**KEYS, "map_dir": str(tmp_path / "map.json"), "data_dir": str(tmp_path)}
    cfg |= {"label_dir": str(tmp_path), "cache": {"dir": str(tmp_path / "cache")}}
    for load in (load_chgcar_data, get_dataset):
        with pytest.raises(ConfigError, match="No densities in"):
            load({**cfg, "dataset_name": "chgcar_data"})
    assert "parsed at every read" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_importing_the_registry_loads_nothing_heavy() -> None:
    code = (
        "import sys, zarrcache.registry; "
        "heavy = {'torch', 'zarr', 's3fs', 'obstore', 'sklearn', 'pymatgen'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
