"""Densities of real and damaged files: pymatgen's values, and a warning for what looks wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chgcars import write_chgcar
from tests.support.stores import STRUCTURE
from zarrcache.convert.density import check_blocks, read_density
from zarrcache.demo.synthetic import make_pair, write_pairs
from zarrcache.errors import SchemaError

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")


def _chgcar(path: Path) -> dict[str, Any]:
    from pymatgen.io.vasp.outputs import Chgcar

    return dict(Chgcar.from_file(str(path)).data)


def _same(values: np.ndarray, expected: np.ndarray) -> bool:
    return (
        values.dtype == np.float32
        and values.flags.c_contiguous
        and np.array_equal(values, expected.astype(np.float32))
    )


@pytest.mark.parametrize(
    ("name", "electrons", "formula"),
    [
        ("mp/input/mp-2680643.CHGCAR.gz", 16, "Sc1 N1"),
        ("mp/half/label/mp-2458922.CHGCAR", 12, "O2"),
        ("mp/half/label/mp-2390106.CHGCAR.gz", 16, "Si4"),
        ("vasp/NO_pol_CHGCAR.gz", 11, "N1 O1"),
        ("vasp/NO_soi_CHGCAR.gz", 11, "N1 O1"),
        ("vasp/graphene_CHGCAR.gz", 8, "C2"),
    ],
)
def test_text_gives_the_values_of_pymatgen(
    real_data: Path, name: str, electrons: int, formula: str
) -> None:
    """Bit for bit, cast to float32, in the order that a store keeps."""
    density = read_density(real_data / name, diff=True)
    expected = _chgcar(real_data / name)
    assert _same(density.total, expected["total"])
    assert abs(density.electrons - electrons) < 2e-3
    assert sorted(density.formula.split()) == sorted(formula.split())
    from pymatgen.io.vasp.outputs import Chgcar

    assert density.structure == Chgcar.from_file(str(real_data / name)).structure.as_dict()
    if "diff" in expected and "diff_x" not in expected:
        assert density.diff is not None
        assert _same(density.diff, expected["diff"])


@pytest.mark.parametrize("name", ["mp-2680643", "mp-1790998"])
def test_materials_project_json_gives_the_values_of_monty(real_data: Path, name: str) -> None:
    """The whole object, decoded by the library that wrote it, is the oracle."""
    from monty.serialization import loadfn

    path = real_data / "mp" / "jsongz" / f"{name}.json.gz"
    density, expected = read_density(path, diff=True), loadfn(path)["data"]
    assert _same(density.total, expected.data["total"])
    assert density.diff is not None
    assert _same(density.diff, expected.data["diff"])
    assert density.structure == expected.structure.as_dict()
    assert density.warnings == ()
    assert density.metadata["task_id"] == name


def test_a_spin_density_comes_only_when_asked_for(real_data: Path) -> None:
    """Half of the bytes; asked for where there is none, it is said."""
    path = real_data / "vasp" / "NO_pol_CHGCAR.gz"
    assert read_density(path).diff is None
    diff = read_density(path, diff=True).diff
    assert diff is not None
    assert abs(float(diff.mean(dtype=np.float64)) - 1.0) < 1e-3
    without = read_density(real_data / "vasp" / "graphene_CHGCAR.gz", diff=True)
    assert without.diff is None
    assert any("no spin density" in warning for warning in without.warnings)


def test_of_a_non_collinear_density_the_total_is_kept_and_the_rest_is_named(
    real_data: Path,
) -> None:
    """``diff`` of pymatgen would be a signed projection of the vectors: not a spin density that one
    can train on.
    """
    density = read_density(real_data / "vasp" / "NO_soi_CHGCAR.gz", diff=True)
    assert density.diff is None
    assert any(
        "non-collinear: diff_x, diff_y, diff_z are not written" in warning
        for warning in density.warnings
    )


def test_a_potential_is_told_from_a_density(real_data: Path, tmp_path: Path) -> None:
    """By its name, and under that of a density by its mean. Without the checks it is read."""
    path = real_data / "vasp" / "Li_LOCPOT.gz"
    with pytest.raises(SchemaError, match=r"Li_LOCPOT\.gz: its name is that of a potential"):
        read_density(path)
    density = read_density(path, strict=False)
    assert density.warnings == ()
    assert "electrons" not in density.metadata  # readers refuse a store that states one below zero
    renamed = tmp_path / "mp-1.CHGCAR.gz"
    renamed.write_bytes(path.read_bytes())
    with pytest.raises(SchemaError, match=r"mp-1.*looks like a potential \(LOCPOT\).*strict=False"):
        read_density(renamed)


def test_a_potential_with_a_mean_above_zero_is_refused_by_its_name(tmp_path: Path) -> None:
    """The mean of a Hartree potential is about zero."""
    path = tmp_path / "Li_LOCPOT"
    write_chgcar(path, (4, 3, 2), 1)
    with pytest.raises(SchemaError, match="its name is that of a potential"):
        read_density(path)
    assert read_density(path, strict=False).electrons > 0


def test_a_heading_of_occupancies_without_their_number_is_refused(real_data: Path) -> None:
    """As by pymatgen: what follows cannot be counted."""
    with pytest.raises(
        SchemaError, match=r"CHGCAR\.nospin, line 24: 'augmentation occupancies' does not say"
    ):
        read_density(real_data / "vasp" / "CHGCAR.nospin")


@pytest.fixture
def chgcar(tmp_path: Path) -> Path:
    """A small whole CHGCAR."""
    from zarrcache.demo import synthetic

    pair = make_pair(2, 0, shape=(8, 6, 10))
    path = tmp_path / f"{pair.task_id}.CHGCAR"
    path.write_bytes(synthetic._chgcar(pair, pair.label))
    return path


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_compressed_text_is_read(chgcar: Path, suffix: str) -> None:
    """Whatever the name says it is compressed with."""
    import bz2
    import lzma

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    packed = chgcar.with_name(chgcar.name + suffix)
    packed.write_bytes(compress(chgcar.read_bytes()))
    assert np.array_equal(read_density(packed).total, read_density(chgcar).total)


def test_a_text_cut_short_is_refused(chgcar: Path) -> None:
    """Half of the numbers are no density."""
    whole = chgcar.read_bytes()
    chgcar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        SchemaError,
        match=r"syn-2-0000\.CHGCAR(: the grid of line \d+ announces 480 numbers| ends within a n)",
    ):
        read_density(chgcar)


@pytest.mark.parametrize(
    "text",
    ["", "Dear diary,\n\nno density today.\n", "Si2\n1.0\n"],
    ids=["empty", "a letter", "a beginning"],
)
def test_a_text_without_a_grid_is_no_chgcar(tmp_path: Path, text: str) -> None:
    """Said in words; pymatgen trips over it with an IndexError."""
    (tmp_path / "mp-1.CHGCAR").write_text(text)
    with pytest.raises(
        SchemaError,
        match=r"mp-1\.CHGCAR is not a CHGCAR, or is cut short: no line .* size of a grid",
    ):
        read_density(tmp_path / "mp-1.CHGCAR")


@pytest.mark.parametrize("missing", [2, 3, 5, 9])
def test_a_last_number_cut_short_is_refused(chgcar: Path, missing: int) -> None:
    """It parses, with other digits or no exponent: only its length shows it."""
    chgcar.write_bytes(chgcar.read_bytes().rstrip()[: 1 - missing])
    with pytest.raises(SchemaError, match=r"ends within a number \('.*'\)"):
        read_density(chgcar)


def test_a_missing_last_line_end_is_a_warning(chgcar: Path) -> None:
    """The last number is as long as the others."""
    chgcar.write_bytes(chgcar.read_bytes().rstrip())
    assert any(
        "does not end with a line end" in warning for warning in read_density(chgcar).warnings
    )


def test_a_packed_file_cut_short_is_refused(chgcar: Path) -> None:
    """A download that broke off."""
    packed = chgcar.with_name(chgcar.name + ".gz")
    packed.write_bytes(gzip.compress(chgcar.read_bytes())[:-200])
    with pytest.raises(SchemaError, match="cannot be decompressed"):
        read_density(packed)


def test_what_is_named_packed_and_is_not_is_refused(chgcar: Path) -> None:
    """Plain text under the name of a gzip file."""
    packed = chgcar.with_name(chgcar.name + ".gz")
    packed.write_bytes(chgcar.read_bytes())
    with pytest.raises(SchemaError, match=r"cannot be decompressed.*not what its name says"):
        read_density(packed)


def test_an_exponent_without_its_letter_is_one_number(chgcar: Path) -> None:
    """Fortran writes 0.1-100 for 0.1E-100; pymatgen takes it for two numbers and moves every later
    value by one place.
    """
    expected = read_density(chgcar).total.copy()
    lines = chgcar.read_bytes().splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if line.strip() == b"8    6   10") + 1
    numbers = lines[row].split()
    numbers[1] = b"0.12345678901-100"
    lines[row] = b" " + b" ".join(numbers) + b"\n"
    chgcar.write_bytes(b"".join(lines))
    expected[1, 0, 0] = 0.0
    assert np.array_equal(read_density(chgcar, strict=False).total, expected)


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"1.0E+300"])
def test_numbers_that_are_none_are_counted_and_refused(chgcar: Path, word: bytes) -> None:
    """One of them would make every loss NaN. What float32 cannot hold is one too."""
    lines = chgcar.read_bytes().splitlines(keepends=True)
    lines[-2] = b" " + b" ".join([word, *lines[-2].split()[1:]]) + b"\n"
    chgcar.write_bytes(b"".join(lines))
    with pytest.raises(SchemaError, match=r"1 of 480 values of total are NaN or infinite"):
        read_density(chgcar)


def _json(path: Path, payload: object) -> Path:
    path.write_bytes(gzip.compress(json.dumps(payload).encode()))
    return path


GRID = np.full((2, 2, 2), 4.0).tolist()


@pytest.mark.parametrize(
    "payload",
    [
        {"data": {"data": {"total": GRID}, "poscar": {"structure": STRUCTURE}}},
        {"chgcar": {"data": {"total": GRID}, "poscar": {"structure": STRUCTURE}}},
        {"data": {"total": GRID}, "structure": STRUCTURE},
        [
            {
                "data": {
                    "data": {"total": {"@class": "array", "dtype": "float64", "data": GRID}},
                    "structure": STRUCTURE,
                }
            }
        ],
    ],
)
def test_every_known_nesting_of_json_is_read(tmp_path: Path, payload: object) -> None:
    """The Materials Project's, pymatgen's own, and a list of one."""
    density = read_density(_json(tmp_path / "mp-1.json.gz", payload))
    assert density.total.shape == (2, 2, 2)
    assert density.electrons == 4
    assert density.warnings == ()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (
            {"task_id": "mp-1", "bandgap": 1.0},
            r"without a charge density \(keys: task_id, bandgap\)",
        ),
        ([1, 2], r"is JSON but not an object"),
        (
            {"data": {"total": [[1.0, 2.0]]}, "structure": STRUCTURE},
            r"total has the shape \(1, 2\); a density is 3-D",
        ),
        (
            {"data": {"diff": GRID}, "structure": STRUCTURE},
            r"holds no total density \(blocks: diff\)",
        ),
        (
            {"data": {"total": [[[1.0], [1.0, 2.0]]]}, "structure": STRUCTURE},
            r"cannot be read as a charge density \(ValueError",
        ),
        (
            {"data": {"total": GRID}, "structure": {"sites": []}},
            r"cannot be read as a charge density \(KeyError",
        ),
    ],
)
def test_json_that_is_no_density_says_what_it_is(
    tmp_path: Path, payload: object, words: str
) -> None:
    """Each with the file's path."""
    path = _json(tmp_path / "mp-1.json.gz", payload)
    with pytest.raises(SchemaError, match=words) as error:
        read_density(path)
    assert str(path) in str(error.value)


def test_a_file_that_calls_itself_something_else_keeps_its_file_name(tmp_path: Path) -> None:
    """The map finds it by its name; the other id is said."""
    payload = {"task_id": "mp-2", "data": {"data": {"total": GRID}, "structure": STRUCTURE}}
    density = read_density(_json(tmp_path / "mp-1.json.gz", payload))
    assert density.task_id == "mp-1"
    assert density.warnings == ("contains the id mp-2; it is stored as mp-1.",)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Not "cannot be read as a charge density"."""
    with pytest.raises(FileNotFoundError):
        read_density(tmp_path / "mp-1.CHGCAR")


@pytest.mark.parametrize(
    ("total", "words"),
    [
        (14.3, "not a whole number of electrons"),
        (0.01, "not VASP's convention"),
        (60.0, "more than the 28 protons"),
        (8.0, None),
    ],
)
def test_the_mean_tells_what_is_no_density(total: float, words: str | None) -> None:
    """Two silicon atoms have 8 valence electrons and 28 protons."""
    notes = check_blocks({"total": np.full((2, 2, 2), total)}, protons=28, atoms=2)
    assert [words in note for note in notes] == [True] if words else notes == []


def test_more_spin_than_electrons_is_told() -> None:
    """Blocks that were swapped, or of different files."""
    (note,) = check_blocks(
        {"total": np.full((2, 2, 2), 8.0), "diff": np.full((2, 2, 2), 9.0)}, protons=28, atoms=2
    )
    assert "mean(diff) is 9.0000, more than all 8.0000 electrons" in note


def test_the_pair_that_is_bad_on_purpose_reads_without_a_complaint(real_data: Path) -> None:
    """Each of its files is a density; that they do not belong together cannot be seen in one of
    them.
    """
    data, label = (
        read_density(real_data / "mp" / "half" / role / "mp-2375532.CHGCAR")
        for role in ("input", "label")
    )
    assert (round(data.electrons), round(label.electrons)) == (4, 16)
    assert label.warnings == ()


def test_many_columns_or_few_make_no_difference(tmp_path: Path) -> None:
    """The reader takes numbers as they come; a CHG has ten in a row."""
    (task_id,) = write_pairs(tmp_path, 1, seed=6)
    path = tmp_path / "label" / f"{task_id}.CHGCAR"
    expected = read_density(path).total
    head, _, body = path.read_bytes().partition(b"\n\n")
    size, _, numbers = body.partition(b"\n")
    words = numbers.split()
    rows = [b" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    path.write_bytes(b"\n".join([head, b"", size, *rows, b""]))
    assert np.array_equal(read_density(path).total, expected)


def _text(
    grid: tuple[int, int, int] = (3, 4, 5),
    *,
    atoms: int = 2,
    per_line: int = 5,
    blocks: int = 1,
    occupancies: bool = True,
    moments: bool = False,
    title: bytes = b"toy",
) -> list[bytes]:
    """A CHGCAR as lines, with the values 1.5, 2.5, ... in each grid."""
    lines = [title, b"1.0", b"5 0 0", b"0 5 0", b"0 0 5", b"H", str(atoms).encode(), b"Direct"]
    lines += [b"0.%d 0.1 0.2" % n for n in range(atoms)] + [b""]
    points = grid[0] * grid[1] * grid[2]
    for block in range(blocks):
        if block and moments:
            numbers = [b"0.5"] * atoms
            lines += [b" ".join(numbers[n : n + 5]) for n in range(0, atoms, 5)]
        lines.append(b"   ".join(b"%d" % n for n in grid))
        numbers = [b"%.1fE+00" % (n + 1.5) for n in range(points)]
        lines += [b" " + b" ".join(numbers[n : n + per_line]) for n in range(0, points, per_line)]
        if occupancies:
            for atom in range(atoms):
                lines += [b"augmentation occupancies %4d %4d" % (atom + 1, 3), b" 0.1 0.2 0.3"]
    return lines


def _written(path: Path, lines: list[bytes], end: bytes = b"\n") -> Path:
    path.write_bytes(end.join(lines) + end)
    return path


def _first_numbers(lines: list[bytes]) -> int:
    return next(n for n, line in enumerate(lines) if n > 8 and b"E+00" in line)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \n"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grid": (7, 3, 2)},  # the last line has two numbers
        {"grid": (1, 1, 1), "atoms": 1},
        {"per_line": 10, "occupancies": False},
        {"per_line": 3},  # as many as a line with a grid's size
        {"per_line": 1},
        {"blocks": 2, "moments": True},
        {"blocks": 2, "moments": True, "occupancies": False, "atoms": 7},
        {"blocks": 2, "occupancies": False},
        {"blocks": 4, "grid": (2, 2, 4)},
        {"atoms": 60, "blocks": 2, "moments": True},
    ],
    ids=str,
)
def test_every_way_to_lay_out_a_sound_file_is_read(
    tmp_path: Path, options: dict[str, Any], end: bytes
) -> None:
    path = _written(tmp_path / "mp-1.CHGCAR", _text(**options), end)
    grid = options.get("grid", (3, 4, 5))
    expected = (np.arange(np.prod(grid)) + 1.5).reshape(grid, order="F")
    assert _same(read_density(path, strict=False).total, expected)


@pytest.mark.parametrize("grid", [(3, 4, 5), (7, 3, 2), (2, 2, 4), (3, 3, 1)])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("occupancies", [True, False])
@pytest.mark.parametrize("where", ["in the first line", "a line of its own", "last", "split"])
def test_one_number_too_many_is_refused(
    tmp_path: Path, grid: tuple[int, int, int], blocks: int, occupancies: bool, where: str
) -> None:
    """Every later value would be shifted by one place: in total or in diff."""
    for block in range(blocks):
        lines = _text(grid, blocks=blocks, occupancies=occupancies)
        begins = [n for n, line in enumerate(lines) if line == b"   ".join(b"%d" % n for n in grid)]
        first = begins[block] + 1
        last = max(
            n
            for n in range(first, len(lines))
            if b"E+00" in lines[n] and (block == blocks - 1 or n < begins[-1])
        )
        if where == "in the first line":
            lines[first] += b" 9.5E+00"
        elif where == "a line of its own":
            lines.insert(first, b" 9.5E+00")
        elif where == "last":
            lines.insert(last + 1, b" 9.5E+00")
        else:  # a digit became a blank
            lines[first] = lines[first].replace(b"1.5E+00", b"1 5E+00")
        with pytest.raises(
            SchemaError, match=r"line \d+ announces \d+ numbers and has \d+\. Values"
        ):
            read_density(_written(tmp_path / "mp-1.CHGCAR", lines), strict=False)


def test_one_number_too_few_is_refused(tmp_path: Path) -> None:
    """Also if the next grid, or the occupancies, would fill the gap."""
    for options in ({}, {"blocks": 2}, {"blocks": 2, "occupancies": False}):
        lines = _text(**options)
        first = _first_numbers(lines)
        lines[first] = lines[first].rsplit(b" ", 1)[0]
        with pytest.raises(SchemaError, match="announces 60 numbers and has 59"):
            read_density(_written(tmp_path / "mp-1.CHGCAR", lines), strict=False)


def test_numbers_that_touch_are_counted_one_by_one(tmp_path: Path) -> None:
    """A minus sign fills the blank between two columns; pymatgen reads them, and so it stays."""
    lines = _text()
    first = _first_numbers(lines)
    lines[first] = b" 1.5E+00-2.5E+00-3.5E+00 4.5E+00 5.5E+00"
    density = read_density(_written(tmp_path / "mp-1.CHGCAR", lines), strict=False)
    assert density.total.ravel(order="F")[:5].tolist() == [1.5, -2.5, -3.5, 4.5, 5.5]


def test_stars_for_a_number_are_named_with_their_line(tmp_path: Path) -> None:
    """Stars in the title are none of it."""
    lines = _text(title=b"*** toy ***")
    first = _first_numbers(lines)
    assert read_density(_written(tmp_path / "mp-1.CHGCAR", lines), strict=False).total.size == 60
    lines[first + 3] = lines[first + 3][:-7] + b"*******"
    with pytest.raises(SchemaError, match=rf"line {first + 4}: stars stand for a number"):
        read_density(_written(tmp_path / "mp-1.CHGCAR", lines), strict=False)


def test_several_steps_in_one_file_are_refused_in_words(tmp_path: Path) -> None:
    """The CHG of a relaxation; the second step is not a spin density."""
    step = _text(occupancies=False, per_line=10)
    for steps in (2, 4):
        path = _written(tmp_path / "mp-1.CHG", step * steps)
        with pytest.raises(SchemaError, match=r"'toy' follows a grid.*extract the last step"):
            read_density(path, diff=True)


@pytest.mark.parametrize("title", ["\u00c5ngstr\u00f6m", "Si \u2013 relaxed"])
@pytest.mark.parametrize("coding", ["latin-1", "utf-8", "cp1252"])
def test_a_title_that_is_not_ascii_is_ignored(tmp_path: Path, title: str, coding: str) -> None:
    """VASP does not mind, and the title is not used."""
    lines = _text(title=title.encode(coding, "replace"))
    path = _written(tmp_path / "mp-1.CHGCAR", lines)
    assert read_density(path, strict=False).total.ravel(order="F")[59] == 60.5
    lines[5] = b"\xc5"
    with pytest.raises(SchemaError, match="cannot be read"):
        read_density(_written(path, lines), strict=False)


def test_emmets_flat_json_is_read(tmp_path: Path) -> None:
    """``ChgcarLike``: labels, flat lists in C order and their shapes; a spin density or null."""
    total = (np.arange(60) + 0.25).reshape(3, 4, 5)
    document: dict[str, Any] = {
        "identifier": "mp-1",
        "labels": ["total", "diff"],
        "data": [total.ravel().tolist(), (-total).ravel().tolist()],
        "data_rank": [[3, 4, 5], [3, 4, 5]],
        "structure": STRUCTURE,
    }
    path = tmp_path / "mp-1.json"
    path.write_text(json.dumps(document))
    density = read_density(path, diff=True, strict=False)
    assert _same(density.total, total)
    assert density.diff is not None
    assert _same(density.diff, -total)
    assert density.warnings == ()
    nested = {"data": {"total": total.tolist(), "diff": None}, "structure": STRUCTURE}
    for without in (nested, {**document, "data": [document["data"][0], None]}):
        path.write_text(json.dumps(without))
        density = read_density(path, diff=True)
        assert density.diff is None
        assert any("has no spin density" in warning for warning in density.warnings)
    for damage in ({"data_rank": [[3, 4, 5]]}, {"data_rank": [[3, 4, 4], [3, 4, 5]]}):
        path.write_text(json.dumps(document | damage))
        with pytest.raises(SchemaError, match=r"mp-1\.json"):
            read_density(path)
