"""``configs/*.yaml`` are valid, complete, and say of every key what its default is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from zarrcache.config import CacheConfig, DataConfig

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("local.yaml", "s3.yaml", "s3_cached.yaml")
KEY_LINE = re.compile(r"( *)([a-z0-9_]+):(?: (.*))?")


def documented(path: Path) -> dict[tuple[str, ...], str]:
    """Every key of a config, as a path, and the comment that stands right above it."""
    found: dict[tuple[str, ...], str] = {}
    comment: list[str] = []
    parents: list[str] = []
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip().removeprefix("#").strip())
        elif match := KEY_LINE.fullmatch(line):
            parents = [*parents[: len(match[1]) // 2], match[2]]
            found[tuple(parents)] = "\n".join(comment)
            comment = []
        else:
            comment = []
    return found


def settings(model: type[BaseModel], *parents: str) -> dict[tuple[str, ...], Any]:
    """Every setting of a model, as a path, and its field."""
    found: dict[tuple[str, ...], Any] = {}
    for name, field in model.model_fields.items():
        found[(*parents, name)] = field
        nested = CacheConfig if name == "cache" else field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            found |= settings(nested, *parents, name)
    return found


SETTINGS = settings(DataConfig)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is read by the class, and as the users read it: YAML into a namespace."""
    monkeypatch.setenv("SLURM_TMPDIR", "/scratch/job")
    config = DataConfig.from_yaml(CONFIGS / name)
    assert config == DataConfig.of(SimpleNamespace(**yaml.safe_load((CONFIGS / name).read_text())))
    assert (config.cache is not None) == (name == "s3_cached.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_setting_with_its_default_right_above_it(name: str) -> None:
    """A key that nothing reads, a key without a comment, and a default that is not the real one all
    fail.
    """
    keys = documented(CONFIGS / name)
    assert len(keys) >= 9
    for path, comment in keys.items():
        if path[0] == "s3_kwargs" and len(path) > 1:
            continue  # they are s3fs's settings, explained together above s3_kwargs
        field = SETTINGS[path]
        last = comment.splitlines()[-1] if comment else ""
        assert len(comment.splitlines()) >= 2, f"{name}: {path} has no explanation"
        if field.is_required():
            assert re.fullmatch(r"Required(, unless .*)?\.", last), (path, last)
            continue
        match = re.fullmatch(r"Default: (.*?)(?: \(.*\))?", last)
        assert match, f"{name}: {path} has no default above it, but {last!r}"
        if match[1] == "as below":
            assert isinstance(field.default, BaseModel)
            continue
        assert default_of(path, yaml.safe_load(match[1])) == field.default, path


def default_of(path: tuple[str, ...], written: Any) -> Any:
    """What the package reads when the default of a comment is written into the file."""
    document: dict[str, Any] = {
        "data_dir": "a",
        "label_dir": "b",
        "map_dir": "c",
        "functional": "GGA",
    }
    if path[0] == "cache" and len(path) > 1:
        document["cache"] = {"dir": "/scratch"}
    block = document
    for part in path[:-1]:
        block = block.setdefault(part, {})
    block[path[-1]] = written
    value: Any = DataConfig(**document)
    for part in path:
        value = getattr(value, part)
    return value


def test_cached_config_shows_every_setting() -> None:
    """A setting that is added to the package has to be explained in ``s3_cached.yaml``."""
    assert set(SETTINGS) <= set(documented(CONFIGS / "s3_cached.yaml"))


def test_cached_config_shows_the_defaults() -> None:
    """Copying ``s3_cached.yaml`` changes nothing but the directory."""
    cache = CacheConfig.from_yaml(CONFIGS / "s3_cached.yaml")
    assert cache == CacheConfig(dir=cache.dir)


def test_cache_directory_is_the_jobs_scratch_or_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Slurm job the cache is on the job's scratch disk, elsewhere in /tmp, and ZARRCACHE_DIR
    overrides both.
    """
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    assert CacheConfig.from_yaml(CONFIGS / "s3_cached.yaml").dir == Path("/tmp/zarrcache")
    monkeypatch.setenv("SLURM_TMPDIR", "/scratch/job")
    assert CacheConfig.from_yaml(CONFIGS / "s3_cached.yaml").dir == Path("/scratch/job/zarrcache")
    monkeypatch.setenv("ZARRCACHE_DIR", "/elsewhere")
    assert CacheConfig.from_yaml(CONFIGS / "s3_cached.yaml").dir == Path("/elsewhere")


def test_shared_keys_are_explained_alike() -> None:
    """The three files differ in where the data is and in the cache, not in what a word means."""
    local, s3, cached = (documented(CONFIGS / name) for name in NAMES)
    for path in set(local) - {("data_dir",), ("label_dir",), ("map_dir",)}:
        assert local[path].splitlines()[-3:] == s3[path].splitlines()[-3:]
    for path, comment in s3.items():
        if path != ("dataset_name",):
            assert cached[path] == comment
