"""Conversions of directories: what is planned is done, what fails is named, what is there is
skipped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr

from tests.support.chgcars import SMALL
from tests.support.mpjson import write_json_pairs
from tests.support.stores import plain_read, small_group
from zarrcache.config import ConfigError
from zarrcache.convert.converter import ConvertResult
from zarrcache.convert.density import read_density
from zarrcache.convert.plan import convert_directory, plan_convert
from zarrcache.demo.synthetic import make_pair, write_pairs
from zarrcache.errors import OriginError

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three small densities as text."""
    write_pairs(tmp_path / "pairs", 3, seed=SMALL)
    return tmp_path / "pairs" / "label"


IDS = [f"syn-{SMALL}-000{n}" for n in range(3)]


def _attributes(path: Path) -> dict[str, Any]:
    attributes = json.loads((path / ".zattrs").read_text())
    return {name: json.loads(value) for name, value in attributes.items()}


def test_a_directory_becomes_one_store_per_file(source: Path, tmp_path: Path) -> None:
    """Values as in the file, attributes as the users' reader wants them."""
    seen: list[ConvertResult] = []
    report = convert_directory(source, tmp_path / "out", workers=1, progress=seen.append)
    assert [result.task_id for result in report.converted] == IDS
    assert report.failed == report.skipped == ()
    assert {result.path for result in seen} == set(source.iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{task_id}.zarr" for task_id in IDS
    ]
    for index, result in enumerate(report.converted):
        pair, store = make_pair(SMALL, index), Path(result.target)
        assert np.array_equal(plain_read(store), read_density(result.path).total)
        assert np.allclose(plain_read(store), pair.label, rtol=1e-6)
        assert result.written_bytes == sum(
            p.stat().st_size for p in store.rglob("*") if p.is_file()
        )
        assert result.warnings == ()
        attributes = _attributes(store)
        assert attributes["metadata"]["task_id"] == result.task_id
        assert attributes["metadata"]["electrons"] == pair.electrons
        assert [site["label"] for site in attributes["structure"]["sites"]] == [
            site["label"] for site in pair.structure["sites"]
        ]


@pytest.mark.parametrize(("zarr_format", "as_zip"), [(2, False), (3, False), (2, True), (3, True)])
def test_real_files_of_every_kind_keep_their_values(
    real_data: Path, tmp_path: Path, zarr_format: Literal[2, 3], as_zip: bool
) -> None:
    """Pymatgen's values in float32, total and spin, in both formats, as directories and as zip
    files.
    """
    from pymatgen.io.vasp.outputs import Chgcar

    report = convert_directory(
        real_data / "mp" / "half" / "label",
        tmp_path,
        diff=True,
        zarr_format=zarr_format,
        zip=as_zip,
        workers=1,
    )
    assert report.failed == ()
    assert len(report.converted) == 5
    for result in report.converted:
        expected = Chgcar.from_file(str(result.path)).data
        assert result.target.endswith(".zarr.zip" if as_zip else ".zarr")
        assert np.array_equal(plain_read(Path(result.target)), expected["total"].astype("float32"))
        assert np.array_equal(
            plain_read(Path(result.target), "charge_density_diff"),
            expected["diff"].astype("float32"),
        )


def test_real_files_that_look_wrong_are_converted_with_a_word_and_what_is_none_is_named(
    real_data: Path, tmp_path: Path
) -> None:
    """Spin-orbit and a slab; an unreadable toy and a potential."""
    report = convert_directory(real_data / "vasp", tmp_path, pattern="*", diff=True, workers=1)
    warnings = {result.task_id: " ".join(result.warnings) for result in report.converted}
    assert warnings.pop("NO_pol") == ""
    assert "non-collinear" in warnings.pop("NO_soi")
    assert "no spin density" in warnings.pop("graphene")
    assert warnings == {}
    errors = {failed.path.name: failed.error or "" for failed in report.failed}
    assert f"{real_data / 'vasp' / 'CHGCAR.nospin'}, line 24: " in errors.pop("CHGCAR.nospin")
    assert "Li_LOCPOT.gz: its name is that of a potential" in errors.pop("Li_LOCPOT.gz")
    assert errors == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "NO_pol.zarr",
        "NO_soi.zarr",
        "graphene.zarr",
    ]


def test_a_file_that_cannot_be_read_is_named_and_the_rest_goes_on(
    source: Path, tmp_path: Path
) -> None:
    """Truncated, not a density, and with a name that no store can have."""
    (source / "bad-1.CHGCAR").write_bytes((source / f"{IDS[0]}.CHGCAR").read_bytes()[:5000])
    (source / "bad-2.json.gz").write_bytes(b"not gzip")
    shutil.copy(source / f"{IDS[0]}.CHGCAR", source / "bad;3.CHGCAR")
    report = convert_directory(source, tmp_path / "out", workers=1)
    assert [result.task_id for result in report.converted] == IDS
    errors = {result.path.name: result.error or "" for result in report.failed}
    assert list(errors) == ["bad-1.CHGCAR", "bad-2.json.gz", "bad;3.CHGCAR"]
    assert all(str(source / name) in error for name, error in errors.items())
    assert "not a plain name" in errors["bad;3.CHGCAR"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{task_id}.zarr" for task_id in IDS
    ]


def test_what_is_converted_is_skipped_and_the_rest_is_done(source: Path, tmp_path: Path) -> None:
    """A run that was stopped goes on; the plan says so before anything is read."""
    out = tmp_path / "out"
    convert_directory(source / f"{IDS[1]}.CHGCAR", out)
    before = (out / f"{IDS[1]}.zarr" / ".zgroup").stat().st_mtime_ns
    plan = plan_convert(source, out, workers=1)
    assert [path.name for path in plan.skipped] == [f"{IDS[1]}.CHGCAR"]
    assert [path.name for path in plan.files] == [f"{IDS[0]}.CHGCAR", f"{IDS[2]}.CHGCAR"]
    assert plan.source_bytes == sum(path.stat().st_size for path in plan.files)
    report = plan.execute()
    assert [result.task_id for result in report.skipped] == [IDS[1]]
    assert [result.task_id for result in report.converted] == [IDS[0], IDS[2]]
    assert (out / f"{IDS[1]}.zarr" / ".zgroup").stat().st_mtime_ns == before
    assert plan_convert(source, out).files == ()


def _cut_chunk(store: Path) -> None:
    chunk = next((store / "charge_density_total").glob("[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])


def _empty_every_file(store: Path) -> None:
    for path in store.rglob("*"):
        if path.is_file() and path.name != ".zattrs":
            path.write_bytes(b"")


DAMAGE = {
    "no chunks": lambda store: [p.unlink() for p in store.glob("charge_density_total/[0-9]*")],
    "one chunk is missing": lambda store: next(store.glob("charge_density_diff/[0-9]*")).unlink(),
    "a chunk is cut short": _cut_chunk,
    "no group document": lambda store: (store / ".zgroup").unlink(),
    "no array document": lambda store: (store / "charge_density_total" / ".zarray").unlink(),
    "a group document is cut short": lambda store: (store / ".zmetadata").write_bytes(b'{"meta'),
    "empty files after a power failure": _empty_every_file,
}


@pytest.fixture(scope="module")
def pair_converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two densities and their stores; read only."""
    root = tmp_path_factory.mktemp("converted")
    write_json_pairs(root, 2, seed=SMALL)
    convert_directory(root / "label", root / "out", chunks=8, diff=True, workers=1)
    return root / "label", root / "out"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_store_that_is_not_whole_is_converted_again(
    pair_converted: tuple[Path, Path], tmp_path: Path, damage: str
) -> None:
    source, out = pair_converted[0], tmp_path / "out"
    shutil.copytree(pair_converted[1], out)
    store = out / f"{IDS[0]}.zarr"
    whole = _tree(store)
    if damage == "one chunk is missing" and not (store / "charge_density_diff").exists():
        next(store.glob("charge_density_total/[0-9]*")).unlink()
    else:
        DAMAGE[damage](store)
    report = convert_directory(source, out, chunks=8, diff=True, workers=1)
    assert [result.task_id for result in report.converted] == IDS[:1]
    assert report.converted[0].warnings[-1] == f"{store} was incomplete; it is converted again."
    assert [result.task_id for result in report.skipped] == IDS[1:2]
    assert _tree(store) == whole


def test_a_zip_store_that_is_cut_short_is_not_replaced_unasked(
    source: Path, tmp_path: Path
) -> None:
    """Its record is at its end, so nothing says what it was made from."""
    out = tmp_path / "out"
    convert_directory(source, out, zip=True, workers=1)
    assert len(plan_convert(source, out, zip=True).skipped) == 3
    store = out / f"{IDS[0]}.zarr.zip"
    os.truncate(store, store.stat().st_size - 100)
    plan = plan_convert(source, out, zip=True)
    (refused,) = plan.refused
    assert "is cut short) and does not name its source file" in (refused.error or "")
    assert (plan.files, len(plan.skipped)) == ((), 2)
    assert convert_directory(source, out, zip=True, overwrite=True, workers=1).failed == ()


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_store_of_another_file_is_named_and_not_replaced(
    source: Path, tmp_path: Path, as_zip: bool
) -> None:
    """Of the same name, size and time: input and label of one material, from one archive."""
    out, other = tmp_path / "out", tmp_path / "other" / f"{IDS[0]}.CHGCAR"
    convert_directory(source, out, zip=as_zip, workers=1)
    text = (source / other.name).read_bytes()
    other.parent.mkdir()
    other.write_bytes(text[:-30] + text[-30:].replace(b"1", b"2").replace(b"3", b"4"))
    assert other.read_bytes() != text
    for path in (other, source / other.name):
        os.utime(path, (0, 0))
    before = _tree(out)
    report = convert_directory(other, out, zip=as_zip)
    (failed,) = report.failed
    assert f"was made from another file ({other.name}, {len(text)} bytes" in (failed.error or "")
    assert f"than {other}, so it is not replaced. Replace it with --overwrite" in failed.error
    assert (report.converted, report.skipped) == ((), ())
    assert _tree(out) == before
    assert [p.name for p in plan_convert(source, out, zip=as_zip).skipped] == [
        f"{task_id}.CHGCAR" for task_id in IDS
    ]  # touched, so compared by content
    (done,) = convert_directory(other, out, zip=as_zip, overwrite=True).converted
    assert np.array_equal(plain_read(Path(done.target)), read_density(other).total)


def test_a_copy_of_the_file_is_the_same_source(source: Path, tmp_path: Path) -> None:
    convert_directory(source, tmp_path / "out", workers=1)
    shutil.copytree(source, tmp_path / "copy")
    assert len(plan_convert(tmp_path / "copy", tmp_path / "out").skipped) == 3


def test_a_store_without_the_spin_density_is_not_taken_for_one_with_it(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1, seed=SMALL)
    convert_directory(tmp_path / "label", tmp_path / "out")
    (refused,) = plan_convert(tmp_path / "label", tmp_path / "out", diff=True).refused
    assert "was converted without --diff. Replace it with --overwrite" in (refused.error or "")
    convert_directory(tmp_path / "label", tmp_path / "out", diff=True, overwrite=True)
    assert len(plan_convert(tmp_path / "label", tmp_path / "out", diff=True).skipped) == 1
    assert len(plan_convert(tmp_path / "label", tmp_path / "out").skipped) == 1


def test_a_store_of_another_program_is_skipped_and_said_or_refused_if_it_is_empty(
    source: Path, tmp_path: Path
) -> None:
    """It has no record of its file."""
    for task_id in IDS[:2]:
        small_group(tmp_path / "out" / f"{task_id}.zarr")
    shutil.rmtree(tmp_path / "out" / f"{IDS[1]}.zarr" / "charge_density_total")
    plan = plan_convert(source, tmp_path / "out", workers=1)
    assert [path.name for path in plan.unrecorded] == [f"{IDS[0]}.CHGCAR"]
    assert plan.skipped == plan.unrecorded
    (refused,) = plan.refused
    assert "charge_density_total has no metadata) and does not name its source" in (
        refused.error or ""
    )
    assert [result.task_id for result in plan.execute().failed] == IDS[1:2]


def test_a_tree_of_calculations_is_named_by_its_directories(source: Path, tmp_path: Path) -> None:
    """The attributes of the store have the same id."""
    for material, name in (("Si", "relax/CHGCAR"), ("mp-1", "CHGCAR.3static")):
        path = tmp_path / "runs" / material / name
        path.parent.mkdir(parents=True)
        shutil.copy(source / f"{IDS[0]}.CHGCAR", path)
    report = convert_directory(tmp_path / "runs", tmp_path / "runs" / "out", workers=1)
    assert [result.task_id for result in report.converted] == ["Si", "mp-1"]
    for result in report.converted:
        assert _attributes(Path(result.target))["metadata"]["task_id"] == result.task_id
    assert len(plan_convert(tmp_path / "runs", tmp_path / "runs" / "out").skipped) == 2
    by_path = convert_directory(tmp_path / "runs", tmp_path / "o", id_from="path", workers=1)
    assert [result.task_id for result in by_path.converted] == ["Si_relax", "mp-1_3static"]


def test_two_steps_of_one_material_are_refused_with_what_to_pass(
    source: Path, tmp_path: Path
) -> None:
    for step in ("1relax", "2relax", "3static"):
        path = tmp_path / "runs" / "mp-1" / f"CHGCAR.{step}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"{IDS[0]}.CHGCAR", path)
    with pytest.raises(ConfigError, match=r"2relax and .*3static are all mp-1\. .*--id-from path"):
        plan_convert(tmp_path / "runs", tmp_path / "out")
    plan = plan_convert(tmp_path / "runs", tmp_path / "out", pattern="**/CHGCAR.3static")
    assert list(plan.task_ids.values()) == ["mp-1"]


def test_a_store_of_another_file_that_appears_since_the_plan_is_named(
    source: Path, tmp_path: Path
) -> None:
    """Two nodes that convert different directories to one destination."""
    plan = plan_convert(source, tmp_path / "out", workers=1)
    other = tmp_path / "other" / f"{IDS[0]}.CHGCAR"
    other.parent.mkdir()
    shutil.copy(source / f"{IDS[1]}.CHGCAR", other)
    convert_directory(other, tmp_path / "out")
    report = plan.execute()
    assert [result.task_id for result in report.converted] == IDS[1:]
    (failed,) = report.failed
    assert "was made from another file" in (failed.error or "")


def test_a_file_that_vanishes_since_the_plan_is_named(source: Path, tmp_path: Path) -> None:
    plan = plan_convert(source, tmp_path / "out", workers=1)
    gone = source / f"{IDS[0]}.CHGCAR"
    gone.unlink()
    report = plan.execute()
    assert [result.error for result in report.failed] == [
        f"{gone} cannot be read (No such file or directory)."
    ]
    assert len(report.converted) == 2


def test_chunks_are_clipped_to_the_grid(source: Path, tmp_path: Path) -> None:
    """Otherwise each chunk would be padded to 4 GB in memory."""
    for zarr_format in (2, 3):
        report = convert_directory(
            source, tmp_path / f"v{zarr_format}", chunks=1000, zarr_format=zarr_format, workers=1
        )
        for result in report.converted:
            expected = read_density(result.path).total
            array = zarr.open_array(f"{result.target}/charge_density_total", mode="r")
            assert array.chunks == expected.shape
            assert np.array_equal(plain_read(Path(result.target)), expected)


def test_a_plan_writes_nothing(source: Path, tmp_path: Path) -> None:
    """Not even the directory."""
    plan_convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_that_somebody_else_made_since_the_plan_is_skipped(
    source: Path, tmp_path: Path
) -> None:
    """Two nodes convert the same directory: neither fails, nothing is written twice."""
    plan = plan_convert(source, tmp_path / "out", workers=1)
    small_group(tmp_path / "out" / f"{IDS[0]}.zarr")
    report = plan.execute()
    assert [result.task_id for result in report.skipped] == [IDS[0]]
    assert [result.task_id for result in report.converted] == IDS[1:]


def test_overwrite_converts_what_is_there(source: Path, tmp_path: Path) -> None:
    """With other chunks, so that old ones would be seen."""
    convert_directory(source, tmp_path / "out", chunks=8, workers=1)
    report = convert_directory(source, tmp_path / "out", overwrite=True, workers=1)
    assert len(report.converted) == 3
    for result in report.converted:
        fresh = convert_directory(result.path, tmp_path / "fresh").converted[0]
        assert _tree(Path(result.target)) == _tree(Path(fresh.target))


def _tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_destination_that_takes_no_more_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is not a thousand broken files."""
    import errno

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("zarrcache.convert.writer._move_into_place", full)
    seen: list[ConvertResult] = []
    with pytest.raises(
        OriginError, match=rf"{IDS[0]}\.zarr could not be written: No space left on device"
    ):
        convert_directory(source, tmp_path / "out", workers=1, progress=seen.append)
    assert seen == []
    assert list((tmp_path / "out").iterdir()) == []


def test_both_forms_of_a_store_beside_each_other_are_refused(source: Path, tmp_path: Path) -> None:
    """Readers would go on to read the old one."""
    convert_directory(source, tmp_path / "out", workers=1)
    with pytest.raises(
        ConfigError,
        match=rf"holds 3 of these stores as \.zarr \({IDS[0]}\.zarr, .*convert without zip",
    ):
        plan_convert(source, tmp_path / "out", zip=True)


@pytest.mark.parametrize(
    ("dst", "options", "words"),
    [
        ("out", {"chunks": (16, 16)}, "three positive whole numbers"),
        ("out", {"zarr_format": 4}, "formats 2 and 3"),
        ("out", {"workers": 0}, "workers is 0; it has to be a whole number from 1"),
        ("out", {"pattern": "*.cube"}, r"no file matches '\*\.cube'"),
        ("gs://bucket/x", {}, "not supported. Write s3://bucket/prefix or a directory"),
        ("out/mp-1.zarr", {}, "is the name of a store"),
        ("s3://", {}, "names no bucket"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_happens(
    source: Path, tmp_path: Path, dst: str, options: Any, words: str
) -> None:
    """Each in one sentence with what to write instead."""
    with pytest.raises(ConfigError, match=words):
        plan_convert(source, dst if "://" in dst else tmp_path / dst, **options)


def test_a_destination_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    """Below it no directory can be made either, which is found when it is tried."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is not a directory"):
        plan_convert(source, tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be created"):
        plan_convert(source, tmp_path / "file" / "below").execute()


def test_a_task_id_inside_of_the_file_is_only_mentioned(tmp_path: Path) -> None:
    """The store is found by the file's name."""
    write_json_pairs(tmp_path, 1, seed=SMALL)
    shutil.move(tmp_path / "label" / f"{IDS[0]}.json.gz", tmp_path / "mp-9.json.gz")
    (result,) = convert_directory(tmp_path / "mp-9.json.gz", tmp_path / "out").converted
    assert result.target == str(tmp_path / "out" / "mp-9.zarr")
    assert result.warnings == (f"contains the id {IDS[0]}; it is stored as mp-9.",)


def test_secrets_are_not_shown_by_a_plan(source: Path) -> None:
    """Plans get printed."""
    plan = plan_convert(source, source / "out")
    plan = dataclasses.replace(
        plan, _convert=dataclasses.replace(plan._convert, s3_kwargs={"secret": "hunter2"})
    )
    assert "hunter2" not in repr(plan) + repr(plan._convert)


@pytest.mark.parametrize("unseen", ["out", "pairs"])
def test_another_machine_that_does_not_see_the_same_files_ends_the_run(
    source: Path, tmp_path: Path, unseen: str
) -> None:
    """Otherwise stores would be written to a local disk of that machine."""

    def elsewhere(function: Any, items: Any) -> Any:
        (tmp_path / unseen).rename(tmp_path / "not there")
        if unseen == "out":
            (tmp_path / unseen).mkdir()
        for item in items:
            yield item, function(item, None)

    with pytest.raises(
        ConfigError,
        match=rf"does not see {tmp_path / unseen}[\w/]*\. Sources and destination must be",
    ):
        plan_convert(source, tmp_path / "out").execute(engine=elsewhere)
    assert not list((tmp_path / "out").glob("*"))


def test_source_on_s3_is_refused_by_its_url(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/chgcars is not on this machine\. Download"):
        plan_convert("s3://bucket/chgcars", tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({}, {"units": "volume"}, "was converted with --units cell"),
        ({"units": "volume"}, {}, "was converted with --units volume"),
        ({}, {"dtype": "float64"}, "was converted with --dtype float32"),
        ({"dtype": "float64"}, {"dtype": "float32"}, "was converted with --dtype float64"),
    ],
)
def test_a_store_in_other_units_is_not_taken_for_converted(
    source: Path, tmp_path: Path, first: Any, second: Any, why: str
) -> None:
    """It is refused until it is replaced."""
    out = tmp_path / "out"
    convert_directory(source, out, workers=1, **first)
    report = convert_directory(source, out, workers=1, **second)
    assert len(report.failed) == 3
    assert why in str(report.failed[0].error)
    assert "--overwrite" in str(report.failed[0].error)
    assert len(convert_directory(source, out, workers=1, **first).skipped) == 3
    assert len(convert_directory(source, out, workers=1, overwrite=True, **second).converted) == 3
    assert len(convert_directory(source, out, workers=1, **second).skipped) == 3


@pytest.mark.parametrize("option", [{"units": "points"}, {"dtype": "float16"}, {"units": None}])
def test_unknown_units_and_dtypes_are_refused(source: Path, tmp_path: Path, option: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(option))} is .* it has to be"):
        convert_directory(source, tmp_path / "out", **option)


def test_a_density_per_volume_needs_a_cell(source: Path, tmp_path: Path) -> None:
    path = source / f"{IDS[0]}.CHGCAR"
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = lines[3]  # two of the three vectors are the same
    path.write_text("".join(lines))
    report = convert_directory(source, tmp_path / "out", workers=1, units="volume")
    (failed,) = report.failed
    assert f"{path}: the lattice of its structure has the volume 0" in str(failed.error)
