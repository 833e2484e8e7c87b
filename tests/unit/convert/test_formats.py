"""Which files are densities, and which material each one is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from zarrcache.convert import InputFormat, RawDensity, formats, plan_convert, register_format
from zarrcache.convert.formats import Naming, find_files, is_density_name, task_id_of
from zarrcache.errors import ConfigError


def read_npz(path: Path) -> RawDensity:
    """A reader as another package would write it."""
    from pymatgen.core.lattice import Lattice
    from pymatgen.core.structure import Structure

    with np.load(path) as file:
        return RawDensity({"total": file["total"]}, Structure(Lattice.cubic(3), ["H"], [[0, 0, 0]]))


@pytest.mark.parametrize(
    ("path", "task_id"),
    [
        ("mp-1.CHGCAR", "mp-1"),
        ("mp-1.CHGCAR.gz", "mp-1"),
        ("mp-1_CHGCAR.xz", "mp-1"),
        ("mp-1.chgcar", "mp-1"),
        ("mp-1.CHGCAR.vasp", "mp-1"),
        ("CHGCAR_mp-1", "mp-1"),
        ("CHGCAR.mp-1.bz2", "mp-1"),
        ("mp-1.json", "mp-1"),
        ("mp-1.json.gz", "mp-1"),
        ("mp-1/CHGCAR", "mp-1"),
        ("mp-1/CHGCAR.gz", "mp-1"),
        ("mp-1/AECCAR2.gz", "mp-1"),
        ("mp-1/CHGCAR.vasp", "mp-1"),
        ("run.7/mp-1.5.CHGCAR", "mp-1.5"),
        # a step of a calculation names no material
        ("mp-1/CHGCAR.3static", "mp-1"),
        ("mp-1/CHGCAR.relax2.gz", "mp-1"),
        ("mp-1/CHGCAR_scf.vasp", "mp-1"),
        ("mp-1/static.CHGCAR", "mp-1"),
        ("mp-1/CHGCAR.1", "mp-1"),
        ("mp-1/CHG.static", "mp-1"),
        ("mp-1/chgcar.json.gz", "mp-1"),
        ("mp-1_CHGCAR.static", "mp-1"),
        ("Si/relax/CHGCAR", "Si"),
        ("Si/01_relax/static_run2/CHGCAR.gz", "Si"),
        ("Fe2O3/pbe/CHGCAR.2relax", "Fe2O3"),
        # and these are not steps
        ("runs/12/CHGCAR", "12"),
        ("runs/CHGCAR.12", "12"),
        ("runs/CHGCAR_NaCl", "NaCl"),
        ("Si/relax-mp-149/CHGCAR", "relax-mp-149"),
    ],
)
def test_every_way_to_name_a_density_gives_its_task_id(path: str, task_id: str) -> None:
    """Name and directory are all that counts; nothing is opened."""
    assert task_id_of(Path("/nowhere") / path) == task_id


@pytest.mark.parametrize("name", ["..CHGCAR", ".json", "a b/../CHGCAR", "mp;1.CHGCAR", "mü-1.json"])
def test_a_name_that_no_store_can_have_is_refused(name: str) -> None:
    """The message shows the whole path and what to do."""
    path = Path("/nowhere") / name if "/" not in name else Path("/nowhere/a;b/CHGCAR")
    with pytest.raises(ConfigError, match=rf"{path.name}.*not a plain name.*Rename"):
        task_id_of(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CHGCAR", True),
        ("mp-1.CHGCAR.gz", True),
        ("mp-1.json.gz", True),
        ("LOCPOT", False),
        ("POSCAR", False),
        (".mp-1.CHGCAR.swp", False),
        ("._mp-1.json", False),
        ("mp-1.zarr", False),
        ("CHGCAR.3static.gz", True),
        ("CHGCAR.ncl", False),
        ("Li_CHGCAR.nospin.gz", False),
        ("CHGCAR.bak", False),
        ("CHGCAR.relax2.bak", False),
        ("CHGCAR.1.old.gz", True),
        ("CHGCAR.mp-1.relax", True),
        ("custodian.json.gz", False),
        ("chgcars_functional_to_task_ids.json.gz", False),
    ],
)
def test_without_a_pattern_only_densities_are_taken(name: str, expected: bool) -> None:
    """Other files of VASP, hidden files and stores are not."""
    assert is_density_name(name) is expected


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_tree_gives_all_its_densities(tmp_path: Path) -> None:
    """Sorted; stores and hidden directories are not searched."""
    _touch(
        tmp_path,
        "mp-2.json.gz",
        "mp-1.CHGCAR",
        "mp-3/CHGCAR",
        "mp-4/CHGCAR.gz",
        "mp-5/deep/CHGCAR",
        "mp-6.zarr/CHGCAR",
        ".git/CHGCAR",
        "INCAR",
        "mp-7/mp-8.CHGCAR",
    )
    assert [p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path).files] == [
        "mp-1.CHGCAR",
        "mp-2.json.gz",
        "mp-3/CHGCAR",
        "mp-4/CHGCAR.gz",
        "mp-5/deep/CHGCAR",
        "mp-7/mp-8.CHGCAR",
    ]


@pytest.mark.parametrize(
    ("rule", "path", "task_id"),
    [
        ("name", "a/mp-1.CHGCAR", "mp-1"),
        ("name", "a/CHGCAR.3static", "3static"),
        ("name", "a/relax.CHGCAR", "relax"),
        ("directory", "Si/relax/CHGCAR", "relax"),
        ("directory", "a/mp-1.CHGCAR", "a"),
        ("path", "Si/relax/CHGCAR.gz", "Si_relax"),
        ("path", "Si/CHGCAR.3static", "Si_3static"),
        ("path", "mp-1.CHGCAR", "mp-1"),
        ("path", "Si/LOCPOT", "Si"),
        (r"(mp-\d+)", "runs/x_mp-12_y/relax/CHGCAR", "mp-12"),
        (r"mp-\d+|mvc-\d+", "runs/mvc-3/CHGCAR", "mvc-3"),
        (r"^([^/]+)/", "Si/relax/CHGCAR", "Si"),
    ],
)
def test_a_rule_gives_the_task_id(rule: str, path: str, task_id: str) -> None:
    naming = Naming(rule, Path("/data"))
    assert task_id_of(Path("/data") / path, naming) == task_id


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("(", r"id_from '\(' is not a regular expression"),
        ("folder", "'folder' is unknown. Write auto, name, directory, path"),
        ("name", r"CHGCAR gives no task id \(id_from is 'name'\).*--id-from"),
        (r"(mp-\d+)", r"CHGCAR gives no task id"),
    ],
)
def test_a_rule_that_gives_no_task_id_is_refused(rule: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_id_of(Path("/data/Si/CHGCAR"), Naming(rule, Path("/data")))


def test_a_file_that_resembles_a_density_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """Other files are counted. A link to a directory above does not make the search endless."""
    _touch(
        tmp_path,
        "mp-1/CHGCAR",
        "x/CHGCAR.ncl",
        "x/Li_CHGCAR.nospin.gz",
        "x/AECCAR0.gz",
        "x/._mp-2.CHGCAR",
        "x/INCAR",
        "x/custodian.json",
    )
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    (tmp_path / "x" / "mp-3.CHGCAR").symlink_to("nowhere")
    found = find_files(tmp_path)
    assert found.files == {tmp_path / "mp-1" / "CHGCAR": "mp-1"}
    assert {item.path.name: item.reason.split()[:3] for item in found.left_out} == {
        "CHGCAR.ncl": ["'ncl'", "after", "CHGCAR"],
        "Li_CHGCAR.nospin.gz": ["'nospin'", "after", "CHGCAR"],
        "AECCAR0.gz": ["not", "named", "like"],
        "._mp-2.CHGCAR": ["a", "hidden", "file"],
        "mp-3.CHGCAR": ["a", "broken", "link"],
    }
    assert found.unreadable == ()


@pytest.fixture
def as_user() -> Iterator[Path]:
    """A directory that every user can read, in a process that is not root's: root reads all."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    if os.getuid() == 0:
        os.seteuid(0)
    for path in directory.glob("**"):
        path.chmod(0o755)
    shutil.rmtree(directory)


@pytest.mark.parametrize("pattern", [None, "**/CHGCAR", "*/CHGCAR"])
def test_a_directory_that_cannot_be_read_is_said_in_words(
    as_user: Path, pattern: str | None
) -> None:
    """The materials in it would be missing; the plan refuses it, the others are converted."""
    _touch(as_user, "mp-1/CHGCAR", "mp-2/CHGCAR")
    (as_user / "mp-2").chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    plan = plan_convert(as_user, as_user / "out", pattern=pattern)
    (refused,) = plan.refused
    assert refused.error == (
        f"{as_user}/mp-2 cannot be read (Permission denied): files in it are missing here. Make it "
        "readable (chmod u+rx)."
    )
    assert list(plan.task_ids.values()) == ["mp-1"]
    with pytest.raises(ConfigError, match=r"mp-2 cannot be read \(Permission denied\)\. Make it"):
        find_files(as_user / "mp-2", pattern)


def test_a_link_to_a_directory_is_followed_once(tmp_path: Path) -> None:
    _touch(tmp_path, "store/mp-1/CHGCAR", "set/mp-2/CHGCAR")
    (tmp_path / "set" / "mp-1").symlink_to(tmp_path / "store" / "mp-1")
    assert [p.parent.name for p in find_files(tmp_path / "set").files] == ["mp-1", "mp-2"]


def test_a_pattern_takes_what_it_matches_whatever_its_name(tmp_path: Path) -> None:
    """The user has chosen; files in stores stay left out."""
    _touch(tmp_path, "a/b/AECCAR0", "c/AECCAR0", "d.zarr/AECCAR0", "mp-1.CHGCAR")
    assert [
        p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path, "**/AECCAR0").files
    ] == [
        "a/b/AECCAR0",
        "c/AECCAR0",
    ]


def test_a_single_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Also one that no pattern would find."""
    _touch(tmp_path, "odd.name")
    assert find_files(tmp_path / "odd.name").files == {tmp_path / "odd.name": "odd.name"}


@pytest.mark.parametrize("names", [("mp-1.CHGCAR", "mp-1.json.gz"), ("mp-1.CHGCAR", "mp-1/CHGCAR")])
def test_two_files_of_one_material_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """One of them would silently win; both are named."""
    with pytest.raises(ConfigError, match=r"mp-1.* and .*mp-1.* are both mp-1"):
        find_files(_touch(tmp_path, *names))


def test_input_and_label_below_one_directory_are_to_be_converted_one_by_one(
    tmp_path: Path,
) -> None:
    """At most three of the pairs are named; no other way is advised."""
    _touch(tmp_path, *(f"{role}/mp-{n}.CHGCAR" for role in ("input", "label") for n in range(5)))
    with pytest.raises(ConfigError) as caught:
        find_files(tmp_path)
    assert str(caught.value).count(" are both ") == 3
    assert str(caught.value).endswith(
        f"; several files each for 2 more. Convert {tmp_path}/input and {tmp_path}/label one by "
        "one, each to its own DST."
    )


def test_an_empty_directory_says_what_it_was_searched_for(tmp_path: Path) -> None:
    """With and without a pattern."""
    with pytest.raises(ConfigError, match=r"No densities in .*no file is named .*CHGCAR"):
        find_files(tmp_path)
    with pytest.raises(ConfigError, match=r"no file matches '\*\.cube'\. Give another pattern, "):
        find_files(tmp_path, "*.cube")


@pytest.mark.parametrize("pattern", ["", "/etc/*"])
def test_a_pattern_that_cannot_be_used_is_shown(tmp_path: Path, pattern: str) -> None:
    """``Path.glob`` refuses it in words of its own."""
    with pytest.raises(ConfigError, match=r"pattern .* cannot be used"):
        find_files(tmp_path, pattern)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Rather than an empty conversion."""
    with pytest.raises(ConfigError, match=r"gone does not exist"):
        find_files(tmp_path / "gone")


def test_a_registered_format_is_found_named_read_and_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two arrays of a ``.npz`` become a density, in worker processes too."""
    monkeypatch.setattr(formats, "_formats", list(formats._formats))
    register_format(InputFormat("npz", r"(.+)\.npz", read_npz))
    register_format(InputFormat("npz", r"(.+)\.npz", read_npz))
    values = np.arange(2 * 8 * 64, dtype=float).reshape(2, 8, 8, 8)
    for number, total in enumerate(values):
        np.savez(tmp_path / f"mp-{number}.npz", total=total)
    assert [p.name for p in find_files(tmp_path).files] == ["mp-0.npz", "mp-1.npz"]
    report = plan_convert(tmp_path, tmp_path / "out", workers=2, strict=False).execute()
    assert not report.failed
    for number, total in enumerate(values):
        stored = zarr.open_array(tmp_path / f"out/mp-{number}.zarr/charge_density_total")[...]
        assert np.array_equal(stored, total.astype(np.float32))


@pytest.mark.parametrize(
    ("fmt", "words"),
    [
        (InputFormat("vasp", r"(.+)\.xyz", print), "'vasp' is registered already"),
        (InputFormat("cube", "(", print), "of format 'cube'"),
    ],
)
def test_a_format_that_cannot_be_used_is_refused(fmt: InputFormat, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        register_format(fmt)
