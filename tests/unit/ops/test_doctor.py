"""``doctor``: every check on this machine, and the messages of failed ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.training import write_config, write_pairs
from zarrcache import DataConfig
from zarrcache.ops.doctor import Finding, examine


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_pairs(tmp_path, 2)
    return DataConfig.from_yaml(write_config(tmp_path))


def findings(config: object) -> dict[str, Finding]:
    """Findings by name."""
    return {finding.name: finding for finding in examine(config)}  # type: ignore[arg-type]


def test_a_healthy_node_passes_every_check(config: DataConfig, tmp_path: Path) -> None:
    """Only the cache directory is left behind."""
    found = findings(config)
    assert {
        "versions",
        "cache directory",
        "permissions",
        "file system",
        "space",
        "file locks",
        "mmap",
    } <= found.keys()
    assert [finding for finding in found.values() if finding.verdict == "fail"] == []
    assert "mp-0.zarr lists" in found[f"data at {tmp_path / 'data'}"].found
    left = {path.name for path in (tmp_path / "cache" / "zarrcache-v1").iterdir()}
    assert {name for name in left if not name.startswith("cache.db")} == {
        "CACHEDIR.TAG",
        "entries",
        "bytes",
        "locks",
    }


def test_without_a_config_only_versions_are_checked() -> None:
    found = findings(None)
    assert list(found) == ["versions"]
    assert "zarr 3." in found["versions"].found


def test_an_unusable_directory_fails_with_its_path(config: DataConfig, tmp_path: Path) -> None:
    """Checks within it are skipped; the origin is still checked."""
    assert config.cache is not None
    (tmp_path / "file").touch()
    found = findings(
        config.model_copy(
            update={"cache": config.cache.model_copy(update={"dir": tmp_path / "file" / "cache"})}
        )
    )
    assert found["cache directory"].verdict == "fail"
    assert str(tmp_path / "file" / "cache") in found["cache directory"].found
    assert "space" not in found
    assert found[f"label at {tmp_path / 'label'}"].verdict == "ok"


def test_a_limit_beyond_the_disk_is_a_warning(config: DataConfig) -> None:
    assert config.cache is not None
    found = findings(
        config.model_copy(update={"cache": config.cache.model_copy(update={"limit": 2**60})})
    )["space"]
    assert found.verdict == "warn"
    assert "lower cache.limit" in found.advice


def test_a_limit_without_its_unit_is_a_warning(config: DataConfig) -> None:
    """``limit: 200`` are 200 bytes."""
    assert config.cache is not None
    found = findings(
        config.model_copy(update={"cache": config.cache.model_copy(update={"limit": 200})})
    )["space"]
    assert (found.verdict, "of the limit of 200 B" in found.found) == ("warn", True)
    assert "Write cache.limit with its unit" in found.advice


def test_a_cache_readable_by_others_is_a_warning(config: DataConfig, tmp_path: Path) -> None:
    findings(config)
    (tmp_path / "cache" / "zarrcache-v1").chmod(0o755)
    assert "chmod 700" in findings(config)["permissions"].advice


def test_an_origin_without_stores_and_an_unknown_functional_fail(
    config: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    found = findings(config.model_copy(update={"data_dir": str(tmp_path / "empty")}))[
        f"data at {tmp_path / 'empty'}"
    ]
    assert (found.verdict, "it answers, but holds no store" in found.found) == ("fail", True)
    found = findings(config.model_copy(update={"label_dir": str(tmp_path / "nowhere")}))[
        f"label at {tmp_path / 'nowhere'}"
    ]
    assert (found.verdict, "is not a directory of this machine" in found.found) == ("fail", True)
    found = findings(config.model_copy(update={"functional": "SCAN"}))["map"]
    assert (found.verdict, "Available: ['GGA']" in found.found) == ("fail", True)


def test_a_config_without_cache_is_a_warning_and_its_origin_is_checked(
    config: DataConfig, tmp_path: Path
) -> None:
    found = findings(config.model_copy(update={"cache": None}))
    assert found["cache"].verdict == "warn"
    assert found[f"data at {tmp_path / 'data'}"].verdict == "ok"


def test_a_clock_behind_the_origin_is_a_warning(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert "in the future" in findings(config)["clock against data"].found


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nfs4", "NFS"), ("lustre", "Lustre"), ("gpfs", "GPFS"), ("tmpfs", "in memory")],
)
def test_a_network_or_memory_file_system_is_a_warning(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    import zarrcache.ops.doctor

    monkeypatch.setattr(zarrcache.ops.doctor, "file_system_of", lambda path: kind)
    found = findings(config)["file system"]
    assert (found.verdict, words in found.found, bool(found.advice)) == ("warn", True, True)
