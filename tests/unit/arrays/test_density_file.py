"""Density files are read without pymatgen; the structure is pymatgen's own."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.stores import STRUCTURE
from zarrcache.arrays import read_vasp_text
from zarrcache.arrays.density_file import read_density_file
from zarrcache.errors import ConfigError, SchemaError

HEAD = (
    b"toy\n   2.0\n  2.0 0.0 0.0\n  0.0 2.0 0.0\n  0.0 0.5 2.0\n  Si O\n  1 1\nDirect\n"
    b"  0.0 0.0 0.0\n  0.5 0.5 0.25\n\n"
)
BODY = b"  1  2  3\n 0.10E+01 0.20E+01 0.30E+01\n -.40E+01 0.50E+01 0.60E+01\n"
VALUES = np.array([1.0, 2, 3, -4, 5, 6]).reshape((1, 2, 3), order="F")


def test_the_grid_and_the_lattice_come_without_pymatgen(tmp_path: Path) -> None:
    """It takes a second to import, and is no dependency of reading."""
    path = tmp_path / "mp-1.CHGCAR"
    path.write_bytes(HEAD + BODY)
    script = (
        "import sys\nfrom zarrcache.arrays.density_file import read_density_file\n"
        f"found = read_density_file({str(path)!r})\n"
        "print(found.blocks['total'].sum(), found.lattice[0, 0], 'pymatgen' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["13.0", "4.0", "False"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ"])
def test_an_object_in_memory_is_read_by_its_name(suffix: str) -> None:
    """As of an S3 object; the name decides how."""
    body = gzip.compress(HEAD + BODY) if suffix else HEAD + BODY
    found = read_density_file(io.BytesIO(body), name=f"s3://bucket/mp-1.CHGCAR{suffix}")
    assert found.name.startswith("s3://")
    assert np.array_equal(found.blocks["total"], VALUES)
    document = {"data": {"total": VALUES.tolist()}, "structure": STRUCTURE}
    text = json.dumps(document).encode()
    packed = io.BytesIO(gzip.compress(text) if suffix else text)
    found = read_density_file(packed, name=f"mp-1.json{suffix}")
    assert np.array_equal(found.blocks["total"], VALUES)
    assert np.array_equal(found.lattice, STRUCTURE["lattice"]["matrix"])
    with pytest.raises(ConfigError, match="without a name"):
        read_density_file(io.BytesIO(body))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"toy", b"toy"),
        (b"   2.0\n", b"   -100.0\n"),
        (b"Direct", b"Cartesian"),
        (b"Direct\n", b"Selective dynamics\nDirect\n"),
        (b"  Si O\n", b""),
        (b"  Si O\n", b"  Si_sv/1a2b O_h\n"),
        (b"0.5 0.5 0.25", b"0.5 0.5 0.25 O"),
        (b"0.5 0.5 0.25", b"5E-01 0.5 0.25"),
        (b"Si O\n  1 1", b"Si\n  2"),
        (b"Si O\n  1 1", b"Si Xx\n  1 1"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_structure_is_pymatgens(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Of the POSCAR of VASP 5, which is read without loading scipy, and of every other."""
    poscar = pytest.importorskip("pymatgen.io.vasp.inputs").Poscar
    head = HEAD.replace(old, new)
    found = read_vasp_text(io.BytesIO(head + BODY), name="mp-1.CHGCAR")
    expected = poscar.from_str(head.decode()).structure
    assert found.structure_dict() == expected.as_dict()
    assert np.array_equal(found.lattice, expected.lattice.matrix)


def test_a_file_without_a_lattice_is_refused_when_the_lattice_is_used() -> None:
    found = read_vasp_text(io.BytesIO(HEAD.replace(b"2.0 0.0 0.0", b"2.0 0.0") + BODY), name="x")
    with pytest.raises(SchemaError, match="x has no lattice of nine numbers"):
        assert found.lattice is None


@pytest.mark.parametrize("word", [b"0.20D+01", b"0.2d1", b"2", b"2.", b"+2.0E0", b"200.0-002"])
def test_a_number_may_be_written_otherwise_than_its_neighbours(word: bytes) -> None:
    found = read_vasp_text(io.BytesIO(HEAD + BODY.replace(b"0.20E+01", word)), name="x")
    assert np.array_equal(found.blocks["total"], VALUES)


@pytest.mark.parametrize(
    "word",
    [b"0x20E+01", b"0.20F+01", b"0,20E+01", b"0.20E+", b"0..0E+01", b"0.2\x00E+01", b"--2.0"],
)
def test_what_is_not_a_number_is_refused(word: bytes) -> None:
    with pytest.raises(SchemaError, match=r"^x"):
        read_vasp_text(io.BytesIO(HEAD + BODY.replace(b"0.20E+01", word)), name="x")


def test_whole_numbers_three_in_a_line_are_not_taken_for_the_size_of_a_grid() -> None:
    """Other programs write zeros as ``0 0 0``; a grid of the same size would be another block."""
    body = b"  1  2  3\n 0 0 0\n 7 8 9\n"
    found = read_vasp_text(io.BytesIO(HEAD + body), name="x")
    assert found.blocks["total"].ravel("F").tolist() == [0, 0, 0, 7, 8, 9]
    with pytest.raises(SchemaError, match="announces 6 numbers and has 3"):
        read_vasp_text(
            io.BytesIO(HEAD + b"  1  2  3\n 0 0 0\n 1 2 3\n" + b" 0 0 0\n" * 2), name="x"
        )


def test_the_size_of_the_grid_is_the_first_line_below_the_blank_one() -> None:
    """If it is damaged, the second grid is not taken for the first."""
    spoilt = BODY.replace(b"3\n", b"3\r", 1)
    for between in (spoilt, b" 0.1 0.2\n" + BODY, b"velocities\n" + BODY):
        with pytest.raises(SchemaError, match="x, line 12: below the blank line something else"):
            read_vasp_text(io.BytesIO(HEAD + between + BODY), name="x")
    blank = read_vasp_text(io.BytesIO(HEAD + b"\n \n" + BODY), name="x")
    assert np.array_equal(blank.blocks["total"], VALUES)


@pytest.mark.parametrize("atom", ["   1", " 999", "1000", "9999", "****"])
@pytest.mark.parametrize(
    "words", ["augmentation occupancies", "Augmentation occupancies (imaginary part)"]
)
def test_the_number_of_an_atom_has_four_columns(words: str, atom: str) -> None:
    """From 1000 atoms on it touches the words; from 10000 on it is stars, which hide nothing."""
    block = f"{words}{atom}   2\n 0.1 0.2\n".encode()
    found = read_vasp_text(io.BytesIO(HEAD + BODY + block + BODY + block), name="x")
    assert list(found.blocks) == ["total", "diff"]
    assert np.array_equal(found.blocks["diff"], VALUES)
    for damaged in (block[:-4] + b"\n", block.replace(b"0.2", b"***"), block.replace(b"   2", b"")):
        with pytest.raises(SchemaError):
            read_vasp_text(io.BytesIO(HEAD + BODY + damaged + BODY + block), name="x")


def test_occupancies_with_too_few_or_too_many_numbers_are_refused() -> None:
    """Moments of the atoms, one each, may follow the last ones."""
    heading = b"augmentation occupancies   1   2\n"
    for numbers, is_read in ((b"0.1", False), (b"0.1 0.2", True), (b"0.1 0.2 0.3", False)):
        file = io.BytesIO(HEAD + BODY + heading + numbers + b"\n")
        if is_read:
            assert np.array_equal(read_vasp_text(file, name="x").blocks["total"], VALUES)
        else:
            with pytest.raises(SchemaError, match=r"occupancies of line \d+ announce 2 numbers"):
                read_vasp_text(file, name="x")
    moments = heading + b"0.1 0.2\n 0.5 0.5\n"
    two = read_vasp_text(io.BytesIO(HEAD + BODY + moments + BODY), name="x")
    assert list(two.blocks) == ["total", "diff"]
