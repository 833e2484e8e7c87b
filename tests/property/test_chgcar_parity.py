"""Any CHGCAR, as VASP and other programs lay it out, is read bit for bit as pymatgen reads it; a
damaged one is refused or gives pymatgen's values.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zarrcache.arrays import read_vasp_text
from zarrcache.errors import SchemaError

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")

HEAD = (
    "toy\n   1.00000000000000\n     4.000000    0.000000    0.000000\n     0.000000    4.000000    "
    "0.000000\n     0.000000    0.000000    4.000000\n   Si\n     2\nDirect\n  0.000000  0.000000  "
    "0.000000\n  0.250000  0.250000  0.250000\n\n"
)
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: pymatgen reads an exponent without its letter as a number of its own.
BARE = re.compile(rb"\d[+-]\d{3}(?![\d.])")
Blocks = dict[str, NDArray[np.float64]]


def fortran_e(value: float, digits: int = 11) -> str:
    """``E17.11`` of Fortran: the point first, and no letter before three digits."""
    mantissa, exponent = f"{value:.{digits - 1}E}".split("E")
    sign = "-." if mantissa.startswith("-") else "0."
    power = int(exponent) + (value != 0)
    tail = f"E{power:+03d}" if abs(power) < 100 else f"{power:+04d}"
    return sign + mantissa.lstrip("-").replace(".", "") + tail


def fortran_g(value: float) -> str:
    """``G11.5`` of Fortran, as in a CHG: blanks where an exponent would be."""
    if value and not 0.1 <= abs(value) < 1e5:
        return fortran_e(value, 5).rjust(11)
    whole = 0 if abs(value) < 1 else len(str(int(abs(value))))
    return f"{value:>7.{max(0, 5 - whole)}f}    "


#: How programs write a number, and numbers per line.
LAYOUTS: dict[str, tuple[Callable[[float], str], int]] = {
    "VASP's CHGCAR": (lambda value: " " + fortran_e(value), 5),
    "VASP's CHG": (lambda value: " " + fortran_g(value), 10),
    "ASE's CHGCAR": (lambda value: f" {value:#17.10E}", 5),
    "ASE's CHG": (lambda value: f" {value:#11.5G}", 10),
    "chgsum.pl": (lambda value: f" {value:20.10E}", 5),
    "printf %E": (lambda value: f"{value:22.14E}", 3),
    "printf %e": (lambda value: f"{value:14.5e}", 6),
    "printf %f": (lambda value: f" {value:17.8f}", 5),
    "printf %g": (lambda value: f" {value:.10g}", 7),
    "repr": (lambda value: f" {float(value)!r}", 5),
}

numbers = st.one_of(
    st.floats(-1e3, 1e3, allow_subnormal=False),
    st.floats(-1e30, 1e30),
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 1e-12, 1e-99, 1e-100, -1e-120, 5e-324, 1e120, 1e15, -38]),
    st.integers(-1000, 1000).map(float),
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A sound file."""
    write, per_line = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    end = draw(st.sampled_from(["\n", "\r\n", " \n"]))
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    points = int(np.prod(shape))
    seeds = draw(st.lists(numbers, min_size=1, max_size=40))
    has_occupancies = draw(st.booleans())
    text = HEAD
    for block in range(draw(st.sampled_from([1, 2, 4]))):
        values = itertools.islice(itertools.cycle(seeds[block:] or seeds), points)
        words = [write(value) for value in values]
        text += "   ".join(map(str, ("", *shape))) + end
        for first in range(0, points, per_line):
            text += "".join(words[first : first + per_line]) + end
        for atom in range(2 if has_occupancies else 0):
            text += f"augmentation occupancies {atom + 1:3d}   3\n  0.1E+00 -.2E-01  0.3E+01\n"
    return text.encode()


def ours(text: bytes) -> Blocks | SchemaError:
    try:
        return read_vasp_text(io.BytesIO(text), name="mp-1.CHGCAR").blocks
    except SchemaError as exc:
        return exc


def pymatgens(path: Path, text: bytes) -> Blocks | Exception:
    from pymatgen.io.vasp.outputs import VolumetricData

    path.write_bytes(text)
    try:
        blocks: Blocks = VolumetricData.parse_file(str(path))[1]
    except Exception as exc:  # noqa: BLE001 - of any kind, from a damaged file
        return exc
    return blocks


def same_bits(found: Blocks, expected: Blocks) -> bool:
    return list(found) == list(expected) and all(
        np.array_equal(found[name], expected[name], equal_nan=True)
        and np.array_equal(np.signbit(found[name]), np.signbit(expected[name]))
        for name in found
    )


@SETTINGS
@given(text=texts())
def test_a_sound_file_has_pymatgens_values(tmp_path: Path, text: bytes) -> None:
    """Where pymatgen splits a number at an exponent without its letter, Python's own numbers."""
    found, expected = ours(text), pymatgens(tmp_path / "mp-1.CHGCAR", text)
    if BARE.search(text):
        repaired = BARE.sub(lambda match: match[0][:1] + b"E" + match[0][1:], text)
        expected = pymatgens(tmp_path / "mp-1.CHGCAR", repaired)
    if isinstance(found, SchemaError):
        # Columns that touch a number that is too wide for its own cannot be told apart.
        assert re.search(rb"\d-", text)
        assert "Values would be shifted" in str(found)
    else:
        assert isinstance(expected, dict)
        assert same_bits(found, expected)


@SETTINGS
@given(text=texts(), data=st.data())
def test_a_damaged_file_is_refused_or_has_pymatgens_values(
    tmp_path: Path, text: bytes, data: st.DataObject
) -> None:
    """One byte replaced, lost or added anywhere below the atoms, or the end cut off."""
    place = data.draw(st.integers(len(HEAD), len(text) - 1))
    byte = data.draw(st.sampled_from([bytes([code]) for code in b"0159 .-+EeDd\n\r\t*x,N\0\xff"]))
    kind = data.draw(st.sampled_from(["replaced", "lost", "added", "cut"]))
    behind = {"replaced": place + 1, "lost": place + 1, "added": place, "cut": len(text)}[kind]
    damaged = text[:place] + (b"" if kind in ("lost", "cut") else byte) + text[behind:]
    found, expected = ours(damaged), pymatgens(tmp_path / "mp-1.CHGCAR", damaged)
    if isinstance(found, dict) and isinstance(expected, dict) and not BARE.search(damaged):
        assert same_bits(found, expected)


@pytest.mark.parametrize("layout", ["VASP's CHGCAR", "ASE's CHGCAR", "printf %f", "printf %g"])
def test_many_chunks_of_lines_have_pymatgens_values(tmp_path: Path, layout: str) -> None:
    """More text than is read at a time, with small and large numbers in it."""
    write, per_line = LAYOUTS[layout]
    rng = np.random.default_rng(1)
    values = rng.normal(size=60 * 40 * 30) * 10.0 ** rng.integers(-14, 3, 60 * 40 * 30)
    values[::997] *= 1e-20
    words = [write(value) for value in values]
    rows = ["".join(words[n : n + per_line]) for n in range(0, len(words), per_line)]
    text = "\n".join([HEAD + "   60   40   30", *rows, ""]).encode()
    found, expected = ours(text), pymatgens(tmp_path / "mp-1.CHGCAR", text)
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    assert same_bits(found, expected)


@pytest.mark.parametrize("spin", [False, True])
def test_what_pymatgen_writes_has_pymatgens_values(tmp_path: Path, spin: bool) -> None:
    from pymatgen.core.structure import Structure
    from pymatgen.io.vasp.outputs import Chgcar

    rng = np.random.default_rng(2)
    structure = Structure(np.eye(3) * 4, ["Si", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    data = {"total": rng.gamma(0.3, 20, (7, 6, 5))}
    if spin:
        data["diff"] = rng.normal(size=(7, 6, 5)) * 1e-3
    path = tmp_path / "mp-1.CHGCAR"
    Chgcar(structure, data).write_file(str(path))
    found, expected = ours(path.read_bytes()), pymatgens(path, path.read_bytes())
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    assert same_bits(found, expected)
