"""Stores are written whole or not at all, in the layout that readers know."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tests.support.stores import STRUCTURE, plain_read, random_density, small_group
from zarrcache.convert import plan_convert
from zarrcache.convert import writer as storewriter
from zarrcache.convert.writer import (
    StoreExistsError,
    encode_store,
    is_document,
    publish_store,
    store_exists,
    sweep_partials,
    zipped,
)
from zarrcache.disk._publish import _tag_of, owner_id
from zarrcache.errors import ConfigError

TOTAL, DIFF = random_density((9, 8, 7), seed=1), random_density((9, 8, 7), seed=2)
METADATA = {"task_id": "mp-1", "electrons": 8.0}
LAYOUTS = [(2, False), (3, False), (2, True), (3, True)]


def _write(
    directory: Path,
    total: Any = TOTAL,
    diff: Any = None,
    *,
    as_zip: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    path = directory / f"mp-1.zarr{'.zip' if as_zip else ''}"
    objects = encode_store(
        total,
        diff,
        options.pop("structure", STRUCTURE),
        METADATA,
        **{"chunks": (4, 4, 4), **options},
    )
    written = publish_store(path, {"": zipped(objects)} if as_zip else objects, overwrite=overwrite)
    assert written == sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())
    return path


def _open(path: Path) -> Any:
    import zarr
    import zarr.storage

    return zarr.open_group(
        zarr.storage.ZipStore(path, mode="r") if path.is_file() else zarr.storage.LocalStore(path),
        mode="r",
    )


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_chunks_have_64_points_along_each_axis_or_the_length_of_the_grid(
    zarr_format: Literal[2, 3],
) -> None:
    """As docs/guides/data-layout.md recommends, when none are given."""
    objects = encode_store(
        np.zeros((70, 64, 5), np.float32), None, STRUCTURE, METADATA, zarr_format=zarr_format
    )
    name = "charge_density_total/" + (".zarray" if zarr_format == 2 else "zarr.json")
    document = json.loads(objects[name])
    chunks = (
        document["chunks"]
        if zarr_format == 2
        else document["chunk_grid"]["configuration"]["chunk_shape"]
    )
    assert tuple(chunks) == (64, 64, 5)


@pytest.mark.parametrize(("zarr_format", "as_zip"), LAYOUTS)
def test_zarr_reads_back_what_was_written(
    tmp_path: Path, zarr_format: Literal[2, 3], as_zip: bool
) -> None:
    """Arrays, chunks, attributes: in both formats, as a directory and as a zip file."""
    path = _write(tmp_path, diff=DIFF, as_zip=as_zip, zarr_format=zarr_format)
    assert np.array_equal(plain_read(path), TOTAL)
    assert np.array_equal(plain_read(path, "charge_density_diff"), DIFF)
    group = _open(path)
    array = group["charge_density_total"]
    assert (group.metadata.zarr_format, array.dtype, array.chunks) == (
        zarr_format,
        np.dtype("float32"),
        (4, 4, 4),
    )
    assert json.loads(group.attrs["structure"]) == STRUCTURE
    assert json.loads(group.attrs["metadata"]) == METADATA
    assert sorted(group.array_keys()) == ["charge_density_diff", "charge_density_total"]


@pytest.mark.parametrize(("zarr_format", "as_zip"), LAYOUTS)
def test_the_users_chunks_are_16_cubed_and_edges_are_cut(
    tmp_path: Path, zarr_format: Literal[2, 3], as_zip: bool
) -> None:
    """A grid smaller than a chunk along one axis has a chunk of its own size there, in every layout
    of the users.
    """
    total = random_density((20, 17, 6))
    path = _write(tmp_path, total, as_zip=as_zip, zarr_format=zarr_format, chunks=(16, 16, 16))
    assert np.array_equal(plain_read(path), total)
    assert _open(path)["charge_density_total"].cdata_shape == (2, 2, 1)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_equal_densities_give_equal_bytes(zarr_format: Literal[2, 3]) -> None:
    """So that a conversion done again does not make caches fetch again: ETags are sums of the
    bytes.
    """
    one, other = (
        encode_store(TOTAL, DIFF, STRUCTURE, METADATA, zarr_format=zarr_format) for _ in range(2)
    )
    assert list(one.items()) == list(other.items())
    assert zipped(one) == zipped(other)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_documents_come_after_the_chunks_and_the_group_comes_last(
    zarr_format: Literal[2, 3],
) -> None:
    """The order to publish in: what makes a store visible is written when the rest is there."""
    keys = list(
        encode_store(TOTAL, DIFF, STRUCTURE, METADATA, chunks=(4, 4, 4), zarr_format=zarr_format)
    )
    documents = [is_document(key) for key in keys]
    assert documents == sorted(documents)
    assert keys[-1] == {2: ".zgroup", 3: "zarr.json"}[zarr_format]
    assert all("/" in key for key in keys[: documents.index(True)])


def test_other_numbers_are_stored_as_float32(tmp_path: Path) -> None:
    """Float64 in Fortran order, as pymatgen has it."""
    total = np.asfortranarray(random_density((5, 6, 7), "float64"))
    assert np.array_equal(plain_read(_write(tmp_path, total)), total.astype("float32"))


def test_numpy_values_in_a_structure_become_plain_ones(tmp_path: Path) -> None:
    """Site properties of pymatgen hold them."""
    structure = {**STRUCTURE, "properties": {"forces": np.eye(2), "energy": np.float64(1.5)}}
    path = _write(tmp_path, structure=structure)
    assert json.loads(_open(path).attrs["structure"])["properties"] == {
        "forces": [[1.0, 0.0], [0.0, 1.0]],
        "energy": 1.5,
    }


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_store_that_is_there_is_left_alone(tmp_path: Path, as_zip: bool) -> None:
    """Unless it is to be overwritten; then nothing of the old one is left."""
    path = _write(tmp_path, as_zip=as_zip, chunks=(1, 4, 4))
    with pytest.raises(StoreExistsError, match=r"mp-1\.zarr.*--overwrite"):
        _write(tmp_path, DIFF, as_zip=as_zip)
    assert np.array_equal(plain_read(path), TOTAL)
    _write(tmp_path, DIFF, as_zip=as_zip, overwrite=True)
    assert np.array_equal(plain_read(path), DIFF)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert as_zip or len([p for p in path.rglob("*") if p.is_file()]) == len(
        encode_store(DIFF, None, STRUCTURE, METADATA, chunks=(4, 4, 4))
    )


def test_what_is_no_store_is_never_replaced(tmp_path: Path) -> None:
    """Overwriting is for stores; a directory of the user's under that name is not one."""
    mine = tmp_path / "mp-1.zarr" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"is not a Zarr store, so it is not replaced"):
        _write(tmp_path, overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("as_zip", "overwrite", "call"),
    [
        (False, False, "rename"),
        (True, False, "link"),
        (False, True, "exchange"),
        (False, True, "rename"),
        (True, True, "replace"),
    ],
)
def test_a_disk_that_takes_no_more_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_zip: bool, overwrite: bool, call: str
) -> None:
    """The old store if there was one, and nothing half written; also where names cannot be
    swapped.
    """
    if overwrite:
        _write(tmp_path, as_zip=as_zip)
    module = storewriter if call == "exchange" else os
    real = getattr(module, call)
    if call == "rename":
        monkeypatch.setattr(storewriter, "exchange", lambda *_: False)

    def full(source: Any, target: Any, **more: Any) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target, **more)

    monkeypatch.setattr(module, call, full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path, DIFF, as_zip=as_zip, overwrite=overwrite)
    names = [f"mp-1.zarr{'.zip' if as_zip else ''}"] if overwrite else []
    assert [p.name for p in tmp_path.iterdir()] == names
    assert all(np.array_equal(plain_read(tmp_path / name), TOTAL) for name in names)


def test_of_two_writers_one_wins_and_the_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked, and neither saw the other: the rename decides."""
    monkeypatch.setattr(
        storewriter, "_refuse_what_is_there", lambda *_: small_group(tmp_path / "mp-1.zarr")
    )
    with pytest.raises(StoreExistsError, match="written by another process meanwhile"):
        _write(tmp_path)
    assert np.array_equal(plain_read(tmp_path / "mp-1.zarr"), random_density((12, 10, 8)))
    assert [p.name for p in tmp_path.iterdir()] == ["mp-1.zarr"]


def _dead_owner() -> str:
    code = "from zarrcache.disk._publish import owner_id; print(owner_id())"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def _hidden(final: Path, kind: str, owner: str) -> Path:
    path = final.with_name(f".{final.name}.{kind}-{_tag_of(owner)}-0123abcd")
    small_group(path)
    return path


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    """Also a day-old one of another machine; a fresh one of another machine may be at work."""
    dead = _hidden(tmp_path / "mp-1.zarr", "partial", _dead_owner())
    alive = _hidden(tmp_path / "mp-2.zarr", "partial", owner_id())
    elsewhere = _hidden(tmp_path / "mp-3.zarr", "partial", "elsewhere 1 1")
    forgotten = _hidden(tmp_path / "mp-4.zarr", "partial", "elsewhere 2 1")
    os.utime(forgotten, (time.time() - 2 * 86400,) * 2)
    mine = tmp_path / ".mp-5.zarr.partial-mine"
    mine.mkdir()
    assert sorted(sweep_partials(tmp_path)) == sorted([dead, forgotten])
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere, mine])
    assert sweep_partials(tmp_path / "gone") == []


def test_a_store_that_a_killed_writer_had_moved_aside_comes_back(tmp_path: Path) -> None:
    """It died between the two renames of an overwrite. If the new one is there already, the old one
    goes.
    """
    dead = _dead_owner()
    _hidden(tmp_path / "mp-1.zarr", "replaced", dead)
    _hidden(tmp_path / "mp-2.zarr", "replaced", dead)
    _write(tmp_path).rename(tmp_path / "mp-2.zarr")
    sweep_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mp-1.zarr", "mp-2.zarr"]
    assert np.array_equal(plain_read(tmp_path / "mp-1.zarr"), random_density((12, 10, 8)))
    assert np.array_equal(plain_read(tmp_path / "mp-2.zarr"), TOTAL)


def test_a_store_that_is_being_written_is_not_there_yet(tmp_path: Path) -> None:
    """Neither a directory without a group's document, nor nothing."""
    assert not store_exists(tmp_path / "mp-1.zarr")
    (tmp_path / "mp-1.zarr" / "charge_density_total").mkdir(parents=True)
    assert not store_exists(tmp_path / "mp-1.zarr")
    assert store_exists(_write(tmp_path / "other"))
    assert store_exists(_write(tmp_path / "other", as_zip=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunks": (16, 16)}, r"chunks is \(16, 16\); give three positive whole numbers"),
        ({"chunks": (16, 0, 16)}, "three positive whole numbers"),
        ({"chunks": (16, 1.5, 16)}, "three positive whole numbers"),
        ({"zarr_format": 1}, "zarr_format is 1; Zarr has the formats 2 and 3"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """Before a file is looked for."""
    with pytest.raises(ConfigError, match=words):
        plan_convert(tmp_path / "nowhere", tmp_path / "out", **options)
