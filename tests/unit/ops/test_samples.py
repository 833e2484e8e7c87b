"""The sample configs are in the installation; their schema accepts what the package accepts."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from tests.unit.test_configs import CONFIGS, NAMES
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.errors import ConfigError
from zarrcache.ops import config_schema, filled_in, sample


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema, itself valid."""
    found = config_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def document(**changes: Any) -> dict[str, Any]:
    """The sample, with other values."""
    found: dict[str, Any] = yaml.safe_load(sample())
    for key, value in changes.items():
        block = found
        *parents, name = key.split("__")
        for parent in parents:
            block = block[parent]
        block[name] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_samples_fit_the_schema(name: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(yaml.safe_load((CONFIGS / name).read_text()), schema)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache__limit": 1024},
        {"cache__limit": "1024"},
        {"cache__limit": "${CACHE_LIMIT:-1 GiB}"},
        {"cache__fetch__concurrency": "${N:-8}"},
        {"cache__retry__timeout": 5},
        {"cache__shared": "${SHARED:-false}"},
        {"cache__peers": "http://a:1 http://b:1"},
        {"cache__lower": None},
        {"model": {"layers": 4}, "epochs": 50},
        {"train_fraction": 100},
    ],
)
def test_what_the_package_accepts_fits_the_schema(
    changes: dict[str, Any], schema: dict[str, Any]
) -> None:
    DataConfig.of(document(**changes))
    jsonschema.validate(document(**changes), schema)


def test_a_config_with_a_file_list_fits_the_schema_without_a_functional(
    schema: dict[str, Any],
) -> None:
    listed = document(map_dir="ids.txt")
    del listed["functional"]
    DataConfig.of(listed)
    jsonschema.validate(listed, schema)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache__limt": 1},
        {"cache__retry__attempts": "many"},
        {"cache__retry__attempts": 0},
        {"cache__shared": "yes please"},
        {"cache__eviction": "lru"},
        {"density_type": "../total"},
        {"density_type": []},
        {"density_type": {"data": "total"}},
        {"missing": "zeros"},
    ],
)
def test_what_the_package_refuses_does_not_fit_the_schema(
    changes: dict[str, Any], schema: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        DataConfig.of(document(**changes))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document(**changes), schema)


def test_each_key_is_described_with_its_default_in_the_units_of_the_config(
    schema: dict[str, Any],
) -> None:
    keys = [
        (name, key, of_key)
        for name, block in {"": schema, **schema["$defs"]}.items()
        for key, of_key in block["properties"].items()
    ]
    assert len(keys) > 40
    assert not [(name, key) for name, key, of_key in keys if not of_key.get("description")]
    cache = schema["$defs"]["CacheConfig"]["properties"]
    assert (cache["limit"]["default"], cache["min_free"]["default"]) == ("200 GiB", "5 %")


@pytest.mark.parametrize(
    "value",
    ["s3://bucket/a b", "a: b", "# no comment", "[x]", "on", "12", 'C:\\"x"', "~", "ä", "a #b"],
)
def test_a_filled_in_value_is_read_back_as_the_same_text(value: str) -> None:
    text = filled_in(sample(), {"data_dir": value, "cache.dir": None})
    assert yaml.safe_load(text) == document(data_dir=value)
    assert text.count("\n") == sample().count("\n")


def test_a_filled_in_size_is_not_quoted() -> None:
    text = filled_in(sample(), {"cache.limit": "500 GB", "cache.dir": "/scratch/me"})
    assert "  limit: 500 GB\n" in text
    assert CacheConfig.of(yaml.safe_load(text)["cache"]).limit == 500 * 10**9


def test_a_key_that_the_sample_does_not_have_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"has no key cache\.dirr"):
        filled_in(sample(), {"cache.dirr": "/x"})
