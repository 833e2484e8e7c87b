"""A power failure right after, or in the middle of, a conversion: copies of a mounted ext4 image
are what the disk would hold.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chgcars import SMALL
from tests.support.smalldisk import JournaledDisk
from tests.support.stores import plain_read
from tests.support.training import zarrcache
from zarrcache.convert import durable, writer
from zarrcache.convert.density import read_density
from zarrcache.convert.plan import convert_directory, plan_convert
from zarrcache.demo.synthetic import write_pairs

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[JournaledDisk]:
    """A file system, mounted at ``tmp_path/disk``."""
    made = JournaledDisk(tmp_path)
    with made.mounted(tmp_path / "disk"):
        yield made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two densities of the same ids as text, twice: ``old`` and ``new``."""
    for name, seed in (("old", SMALL), ("new", 93908)):
        write_pairs(tmp_path / "pairs", 2, seed=seed)
        (tmp_path / name).mkdir()
        for number, path in enumerate(sorted((tmp_path / "pairs" / "label").iterdir())):
            shutil.move(path, tmp_path / name / f"mp-{number}.CHGCAR")
        shutil.rmtree(tmp_path / "pairs")
    return tmp_path


def _is_version(store: Path, source: Path) -> bool:
    return np.array_equal(
        plain_read(store), read_density(source / f"{store.name.split('.')[0]}.CHGCAR").total
    )


@pytest.mark.parametrize("options", [("--chunks", "16"), ("--zip",)])
def test_what_was_reported_as_converted_survives(
    disk: JournaledDisk, source: Path, options: tuple[str, ...]
) -> None:
    """In directories that were created for it, with exit code 0 a moment ago; the next run skips
    it.
    """
    out = source / "disk" / "a" / "b"
    for version, more in (("old", ()), ("new", ("--overwrite",))):
        done = zarrcache("convert", source / version, out, "--workers", "1", *options, *more)
        assert done.code == 0, done.err
        with disk.after_power_failure() as mount:
            stores = sorted((mount / "a" / "b").iterdir())
            assert [store.name.split(".")[0] for store in stores] == ["mp-0", "mp-1"]
            assert all(_is_version(store, source / version) for store in stores)
            plan = plan_convert(source / version, mount / "a" / "b", zip="--zip" in options)
            assert (len(plan.skipped), plan.files, plan.refused) == (2, (), ())


@pytest.mark.parametrize("can_swap", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_at_each_step_of_an_overwrite_the_old_or_the_new_store_survives(
    disk: JournaledDisk, source: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool
) -> None:
    """Complete. Where two names cannot be swapped, the next run puts the old one back."""
    out = source / "disk" / "out"
    convert_directory(source / "old" / "mp-0.CHGCAR", out)
    seen: list[tuple[str, ...]] = []

    def look(step: str) -> None:
        with disk.after_power_failure() as mount:
            if not can_swap:
                writer.sweep_partials(mount / "out")
            stores = sorted((mount / "out").glob("[!.]*"))
            assert [store.name for store in stores] == ["mp-0.zarr"], step
            found = [name for name in ("old", "new") if _is_version(stores[0], source / name)]
            assert len(found) == 1, step
            seen.append((step, *found))

    def at_each(name: str) -> None:
        real = getattr(writer, name)

        def step(*arguments: Any) -> Any:
            look(f"before {name}")
            result = real(*arguments)
            look(f"after {name}")
            return result

        monkeypatch.setattr(writer, name, step)

    if not can_swap:
        monkeypatch.setattr(writer, "exchange", lambda *_: False)
        # the process that moved the old store aside is dead after a power failure
        monkeypatch.setattr("zarrcache.disk._publish._is_abandoned", lambda *_: True)
    for name in ("sync_tree", "exchange", "sync_directory", "remove_hidden"):
        at_each(name)
    convert_directory(source / "new" / "mp-0.CHGCAR", out, overwrite=True)
    assert seen[0] == ("before sync_tree", "old")
    assert ("before remove_hidden", "new") in seen
    assert seen[-1] == ("after remove_hidden", "new")


@pytest.mark.parametrize("has_syncfs", [True, False])
def test_a_tree_is_synced_with_and_without_syncfs(
    disk: JournaledDisk, source: Path, monkeypatch: pytest.MonkeyPatch, has_syncfs: bool
) -> None:
    """An fsync per file on macOS and FUSE; without either a copy has nothing."""
    if not has_syncfs:
        monkeypatch.setattr(durable, "_libc", lambda name: None)
    tree = source / "disk" / "tree"
    (tree / "below").mkdir(parents=True)
    for number in range(20):
        (tree / "below" / str(number)).write_bytes(b"x" * number)
    with disk.after_power_failure() as mount:
        assert not list(mount.rglob("*"))[1:]  # lost+found: the copies do lose what is not synced
    durable.sync_tree(tree)
    durable.sync_directory(tree.parent)
    with disk.after_power_failure() as mount:
        sizes = [(mount / "tree" / "below" / str(n)).stat().st_size for n in range(20)]
    assert sizes == list(range(20))


def test_two_names_are_swapped_at_once_where_the_system_can(tmp_path: Path) -> None:
    """A file system that cannot says so; an error of another kind is raised."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert durable.exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "two").exists()
    assert (tmp_path / "two" / "one").exists()
    with pytest.raises(FileNotFoundError):
        durable.exchange(tmp_path / "one", tmp_path / "three")
