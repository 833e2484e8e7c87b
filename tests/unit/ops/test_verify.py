"""``verify`` finds, names and drops bad entries, and keeps good ones."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.support.stores import small_group
from tests.support.training import write_config, write_pairs
from zarrcache import ConfigError, DataConfig, ZarrCacheError, plan_warm, verify
from zarrcache.config import CacheConfig
from zarrcache.data.reader import open_reader
from zarrcache.disk.index import Index
from zarrcache.ops.selection import cache_at


@pytest.fixture
def warm(tmp_path: Path) -> DataConfig:
    """Two pairs, warm, and metadata of one store in the byte tier."""
    write_pairs(tmp_path, 2)
    config = DataConfig.from_yaml(write_config(tmp_path))
    plan_warm(config).execute()
    group = open_reader(config).read_zarr_store(tmp_path / "data" / "mp-1.zarr")
    _ = group["charge_density_total"][0, 0, 0]  # objects of the byte tier
    return config


def files(tmp_path: Path, tier: str) -> list[Path]:
    """Files of a tier, the largest first."""
    return sorted(
        (tmp_path / "cache" / "zarrcache-v1" / tier).glob("*/*"),
        key=lambda path: -path.stat().st_size,
    )


def flip(path: Path, offset: int) -> None:
    """Flip one bit."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)


def test_an_intact_cache_has_no_problems(warm: DataConfig, tmp_path: Path) -> None:
    seen = []
    report = verify(warm, progress=lambda done, total: seen.append((done, total)))
    count = len(files(tmp_path, "entries")) + len(files(tmp_path, "bytes"))
    assert (report.entries, report.corrupt, report.stale, report.strays) == (count, (), (), ())
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert verify(cache_at(tmp_path / "cache")).entries == count


@pytest.mark.parametrize(
    ("tier", "offset", "words"),
    [("entries", -1, "checksum"), ("entries", 30, "header checksum"), ("bytes", 0, "checksum")],
)
def test_an_entry_with_a_flipped_bit_is_dropped(
    warm: DataConfig, tmp_path: Path, tier: str, offset: int, words: str
) -> None:
    """In a payload, a header or an object. A second run finds nothing."""
    victim = files(tmp_path, tier)[0]
    flip(victim, offset)
    report = verify(warm)
    assert not report.is_good
    assert [Path(problem.file).name for problem in report.corrupt] == [victim.name]
    assert words in report.corrupt[0].why
    assert report.corrupt[0].url.startswith(str(tmp_path))
    assert not victim.exists()
    assert verify(warm).is_good


def test_a_swapped_file_is_found(warm: DataConfig, tmp_path: Path) -> None:
    """An entry of another density under this name has a good checksum but another identity."""
    one, other = [path for path in files(tmp_path, "entries") if path.stat().st_size > 4096 + 400][
        :2
    ]
    one.write_bytes(other.read_bytes())
    report = verify(warm)
    assert [Path(problem.file).name for problem in report.corrupt] == [one.name]
    assert "it holds" in report.corrupt[0].why


def test_entries_without_files_and_files_without_entries_are_removed(
    warm: DataConfig, tmp_path: Path
) -> None:
    """The file of a running writer is announced, and stays."""
    lost = files(tmp_path, "entries")[0]
    lost.unlink()
    stray = lost.with_name("0123456789abcdef")
    stray.write_bytes(b"no entry has this name")
    report = verify(warm)
    assert [problem.why for problem in report.corrupt] == ["its file is gone"]
    assert report.strays == (f"{stray.relative_to(tmp_path / 'cache' / 'zarrcache-v1')}",)
    assert not stray.exists()
    assert verify(warm).strays == ()


def test_against_origin_drops_stale_entries(warm: DataConfig, tmp_path: Path) -> None:
    small_group(tmp_path / "label" / "mp-0.zarr", shape=(6, 5, 4), seed=9)
    assert verify(warm).stale == ()
    report = verify(warm, against_origin=True)
    assert [problem.url for problem in report.stale] == [str(tmp_path / "label" / "mp-0.zarr")]
    assert report.is_good
    assert verify(warm, against_origin=True).stale == ()


def test_an_entry_of_a_store_that_is_gone_at_the_origin_is_named_and_kept(
    warm: DataConfig, tmp_path: Path
) -> None:
    """It may be the last copy. In bfloat16 too, whose values are compared with the origin's."""
    rounded = write_config(
        tmp_path, name="r.yaml", dir=str(tmp_path / "r"), arrays={"encoding": "bfloat16"}
    )
    other = DataConfig.from_yaml(rounded)
    plan_warm(other).execute()
    store = tmp_path / "label" / "mp-0.zarr"
    shutil.rmtree(store)
    for config in (warm, other):
        before = verify(config).entries
        report = verify(config, against_origin=True)
        assert [(one.url, one.why) for one in report.gone] == [
            (str(store), "it is gone at the origin; the entry is kept")
        ]
        assert (report.is_good, report.stale, report.corrupt) == (False, (), ())
        assert verify(config).entries == before


def test_a_failing_disk_is_an_error_in_words(
    warm: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(index: Index) -> int:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Index, "sweep", fail)
        with pytest.raises(ZarrCacheError, match=r"index cannot be read .*disk I/O error"):
            verify(warm)
    assert verify(warm).is_good


def test_against_origin_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a training config"):
        verify(CacheConfig(dir=tmp_path), against_origin=True)


def test_an_absent_cache_is_not_created(tmp_path: Path) -> None:
    assert verify(CacheConfig(dir=tmp_path / "nothing")).entries == 0
    assert not (tmp_path / "nothing").exists()
