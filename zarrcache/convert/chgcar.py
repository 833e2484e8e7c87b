"""Parse the files that VASP and the Materials Project write into grids and a structure.

pymatgen and monty are imported at the first read, because only conversion needs them
(``pip install 'zarrcache[convert]'``).
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._units import most_bytes, read_bounded
from zarrcache.errors import ConfigError, SchemaError

__all__ = [
    "PymatgenMissingError",
    "RawDensity",
    "pymatgen_version",
    "read_mp_json",
    "read_vasp_text",
]

_GRID_LINE = re.compile(rb"[ \t]*(\d+)[ \t]+(\d+)[ \t]+(\d+)[ \t]*\r?\n?")
# Fortran drops the E of a three-digit exponent: 0.12345678901-100. "-100.5" does not match: it is
# the next of two columns that touch.
_BARE_EXPONENT = re.compile(rb"(?<=\d)([+-]\d{3})(?![\d.])")
_NOT_FINITE = re.compile(rb"nan|inf(inity)?|[ED](?=[-+]?\d)", re.IGNORECASE)
_NEWLINE, _SPACE, _PLUS, _MINUS, _ZERO, _NINE = b"\n +-09"
#: Letters and what follows them in ASCII; those of an exponent are part of a number.
_LETTERS, _EXPONENTS = ord("A"), np.frombuffer(b"EeDd", np.uint8)
_READ_BYTES = 1 << 22
_LINE_BYTES = 1 << 20
_TAIL_BYTES = 200
#: Largest decompressed size: this many times the file's size, and _ROOM_BYTES in any case.
_MAX_RATIO, _ROOM_BYTES = 100, 64 * 1024**2


class PymatgenMissingError(ConfigError):
    """pymatgen or monty cannot be imported, so no file can be read."""


@dataclass
class RawDensity:
    """The grids of one file by name, and its structure, as parsed.

    Attributes
    ----------
    blocks : dict of ndarray, shape (nx, ny, nz), float64
        ``total``, and perhaps ``diff`` (collinear spin) or ``diff_x``, ``diff_y``, ``diff_z``.
        CHGCAR convention: electrons per volume times the volume of the cell.
    structure : pymatgen.core.Structure
    task_id : str or None
        The id inside the file.
    notes : list of str
        Suspicious findings, one sentence each.
    """

    blocks: dict[str, NDArray[np.float64]]
    structure: Any
    task_id: str | None = None
    notes: list[str] = field(default_factory=list)


def read_vasp_text(path: Path) -> RawDensity:
    """Parse a CHGCAR or another volumetric file of VASP, perhaps compressed.

    Raises
    ------
    SchemaError
        Not such a file, cut short, or larger than memory; other errors are the parser's own.
    ConfigError
        pymatgen is not installed.
    """
    try:
        from monty.io import zopen
        from pymatgen.io.vasp import outputs
    except ImportError as exc:
        raise _not_installed(exc) from exc
    with zopen(path, "rb") as file:
        scan = _scan(file, path)
    if not scan.headers:
        raise SchemaError(
            f"{path} is not a CHGCAR, or is cut short: no line below a blank one gives the size of "
            "a grid as three whole numbers."
        )
    if scan.needs_repair:
        with tempfile.TemporaryDirectory(prefix="zarrcache-") as scratch:
            repaired = Path(scratch) / "CHGCAR"
            with zopen(path, "rb") as file, repaired.open("wb") as out:
                out.write(_ascii(_line(file, path)))
                while lines := file.readlines(_READ_BYTES):
                    out.write(_BARE_EXPONENT.sub(rb"E\1", b"".join(lines)))
            poscar, blocks, _ = outputs.VolumetricData.parse_file(str(repaired))
    else:
        poscar, blocks, _ = outputs.VolumetricData.parse_file(str(path))
    parsed = RawDensity(dict(blocks), poscar.structure)
    if scan.headers not in (1, 2, 4):
        parsed.notes.append(
            f"has {scan.headers} grids; VASP writes 1, 2 (spin) or 4 (non-collinear). It may be "
            "cut short; only the first is used."
        )
    if not scan.is_whole:
        parsed.notes.append("does not end with a line end: its last number may be cut short.")
    return parsed


@dataclass(frozen=True)
class _Scan:
    """What is found in a file before pymatgen parses it.

    Attributes
    ----------
    needs_repair : bool
        A number has an exponent without its E (pymatgen reads 0.1-100 as two numbers and silently
        shifts every later value by one place), or the title is not ASCII.
    headers : int
        Number of grids.
    is_whole : bool
        The file ends with a line end.
    """

    needs_repair: bool
    headers: int
    is_whole: bool


def _scan(file: Any, path: Path) -> _Scan:
    """Scan a file before pymatgen parses it, which trusts its counts and line lengths.

    Raises
    ------
    SchemaError
        A grid has more or fewer numbers than it announces, or something else follows it.
    """
    title = _line(file, path)  # may be blank
    head = [title]
    # Read up to the blank line below the atoms, where the grids begin.
    while (line := _line(file, path)).strip():
        head.append(line)
    counts = next(
        (
            line.split()
            for line in head[5:7]
            if line.split() and all(map(bytes.isdigit, line.split()))
        ),
        [],
    )
    atoms = sum(map(int, counts))
    if atoms > len(head):
        raise SchemaError(
            f"{path} announces {atoms} atoms and has {len(head)} lines for them. Get the file "
            "again."
        )
    rest = _line(file, path)
    grid = _GRID_LINE.fullmatch(rest)
    points = math.prod(map(int, grid.groups())) if grid else 0
    if 8 * points > most_bytes():
        raise SchemaError(
            f"{path} announces a grid of {points} points, more than fits in memory. Get the file "
            "again."
        )
    lines = _Lines(len(head) + 2)
    total, most = 0, _most_bytes_of(path)
    while block := file.read(_READ_BYTES):
        total += len(block)
        if total > most:
            raise SchemaError(
                f"{path} decompresses to more than {most} bytes of text, too many for a density. "
                "Get the file again."
            )
        rest += block
        end = rest.rfind(b"\n") + 1
        text, rest = rest[:end], rest[end:]
        if len(rest) > _LINE_BYTES:
            raise _endless(path)
        lines.add(text)
    if 2 * points > total + len(rest):
        raise SchemaError(
            f"{path} announces a grid of {points} points and ends after {total} bytes. It is cut "
            "short; get it again."
        )
    is_whole = not rest or rest.endswith(b"\n")
    if not is_whole:
        *before, last = (number.lstrip(b"+-") for number in rest[-_TAIL_BYTES:].split()[-5:])
        if len({len(number) for number in before}) == 1 and len(last) < len(before[0]):
            raise SchemaError(
                f"{path} ends within a number ({last.decode('ascii', 'replace')!r}). It is cut "
                "short; get it again."
            )
    lines.add(rest if is_whole else rest + b"\n")
    lines.check(path, atoms)
    return _Scan(lines.has_bare_exponent or not title.isascii(), len(lines.grids), is_whole)


class _Lines:
    """The lines below the atoms: how many numbers each has, and which ones are not numbers.

    Parameters
    ----------
    first : int
        Number of the first line in the file, from 1.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._counts: list[NDArray[np.int32]] = []
        self._lines = 0
        #: Number of points by line, of lines that begin a grid.
        self.grids: dict[int, int] = {}
        self._texts: dict[int, bytes] = {}
        self._stars: int | None = None
        self.has_bare_exponent = False

    def add(self, text: bytes) -> None:
        """Add whole lines."""
        if not text:
            return
        codes = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(codes == _NEWLINE)
        is_blank = codes <= _SPACE
        begins = ~is_blank
        begins[1:] &= is_blank[:-1]
        # A sign right behind a digit is a bare exponent, or the next of two columns that touch.
        is_sign = (codes == _PLUS) | (codes == _MINUS)
        is_digit = (codes >= _ZERO) & (codes <= _NINE)
        for place in np.flatnonzero(is_sign[1:] & is_digit[:-1]) + 1:
            if _BARE_EXPONENT.match(text, int(place)):
                self.has_bare_exponent = True
            else:
                begins[place] = True
        upto = np.cumsum(begins, dtype=np.int32)[ends]
        counts = np.diff(upto, prepend=np.int32(0))
        starts = np.concatenate([[0], ends[:-1] + 1])
        for index in np.flatnonzero(counts == 3):
            if grid := _GRID_LINE.fullmatch(text, starts[index], ends[index]):
                self.grids[self._lines + int(index)] = math.prod(map(int, grid.groups()))
        is_letter = (codes >= _LETTERS) & ~np.isin(codes, _EXPONENTS)
        for index in np.unique(np.searchsorted(ends, np.flatnonzero(is_letter))):
            line = text[starts[index] : ends[index]].strip()
            if re.search(rb"[A-Za-z]", _NOT_FINITE.sub(b"", line)):
                self._texts[self._lines + int(index)] = line[:60]
        if self._stars is None and (star := text.find(b"***")) >= 0:
            self._stars = self._lines + int(np.searchsorted(ends, star))
        self._counts.append(counts)
        self._lines += len(counts)

    def check(self, path: Path, atoms: int) -> None:
        """Refuse a grid with more or fewer numbers than it announces."""
        if not self.grids:
            return
        if self._stars is not None:
            raise SchemaError(
                f"{path}, line {self._first + self._stars}: stars stand for a number that did not "
                "fit into its column. Run the calculation again or get the file again."
            )
        counts = np.concatenate(self._counts)
        upto = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        others = np.array(sorted({*self.grids, *self._texts, len(counts)}))
        for line, points in self.grids.items():
            begin = line + 1
            #: The next line that is not numbers, and the line behind the last number of the grid.
            stop = int(others[np.searchsorted(others, begin)])
            end = int(np.searchsorted(upto, upto[begin] + points))
            found = int(upto[stop] - upto[begin])
            if found < points:
                raise self._wrong(path, line, points, found)
            is_exact = upto[end] == upto[begin] + points
            # VASP writes the moments of the atoms before the next grid; without the occupancies
            # they follow the numbers directly.
            is_moments = (
                stop in self.grids
                and found - points == atoms
                and len(set(counts[begin : end - 1])) <= 1
            )
            if not is_exact or (found > points and not is_moments):
                raise self._wrong(path, line, points, found)
            text = self._texts.get(stop)
            if text is not None and not text.lower().startswith(b"augmentation"):
                raise SchemaError(
                    f"{path}, line {self._first + stop}: {text.decode('ascii', 'replace')!r} "
                    "follows a grid. A file with the densities of several steps (the CHG of a "
                    "relaxation) is not converted: extract the last step."
                )

    def _wrong(self, path: Path, line: int, points: int, found: int) -> SchemaError:
        return SchemaError(
            f"{path}: the grid of line {self._first + line} announces {points} numbers and has "
            f"{found}. Values would be shifted; get the file again."
        )


def _ascii(title: bytes) -> bytes:
    """The title, which is not used, in characters that pymatgen can decode."""
    return bytes(code if code < 128 else ord("?") for code in title)


def _line(file: Any, path: Path) -> bytes:
    line: bytes = file.readline(_LINE_BYTES)
    if len(line) == _LINE_BYTES:
        raise _endless(path)
    return line


def _endless(path: Path) -> SchemaError:
    return SchemaError(
        f"{path} has a line of more than {_LINE_BYTES} bytes; VASP writes a hundred. Get the file "
        "again."
    )


def _most_bytes_of(path: Path) -> int:
    """Largest decompressed size of a file. Densities compress by a factor of three to ten."""
    return min(most_bytes(), max(_ROOM_BYTES, _MAX_RATIO * path.stat().st_size))


def read_mp_json(path: Path) -> RawDensity:
    """Parse JSON as the Materials Project writes it, perhaps compressed.

    Raises
    ------
    SchemaError
        No charge density in it, or larger than memory; other errors are the parser's own.
    ConfigError
        pymatgen is not installed.
    """
    try:
        from monty.io import zopen
        from pymatgen.core.structure import Structure
    except ImportError as exc:
        raise _not_installed(exc) from exc
    with zopen(path, "rb") as file:
        payload = json.loads(read_bounded(file, _most_bytes_of(path)))
    if isinstance(payload, list) and len(payload) == 1:
        payload = payload[0]
    if not isinstance(payload, Mapping):
        raise SchemaError(f"{path} is JSON but not an object; it holds no charge density.")
    density = next(
        (
            d
            for d in (payload.get("data"), payload.get("chgcar"), payload)
            if _is_density(d) or _is_flat_density(d)
        ),
        None,
    )
    if density is None:
        raise SchemaError(
            f"{path} is JSON without a charge density (keys: "
            f"{', '.join(map(str, list(payload)[:8])) or 'none'})."
        )
    # Decode only what is stored, not the augmentation occupancies of a Chgcar object.
    structure = density["poscar"]["structure"] if "poscar" in density else density["structure"]
    data = _unflattened(density, path) if _is_flat_density(density) else density["data"]
    blocks = {str(name): _decoded(values) for name, values in data.items() if values is not None}
    task_id = payload.get("task_id", payload.get("identifier"))
    notes = _without_objects(structure)
    return RawDensity(
        blocks,
        Structure.from_dict(structure),
        task_id if isinstance(task_id, str) else None,
        notes,
    )


def _without_objects(structure: dict[str, Any]) -> list[str]:
    """Remove properties that are Python objects, whose modules monty would import.

    Returns
    -------
    list of str
        One sentence that names them, or nothing.
    """
    removed = set()
    for owner in (structure, *structure["sites"]):
        properties = owner.get("properties") or {}
        for name in [
            name for name, value in properties.items() if '"@module"' in json.dumps(value)
        ]:
            del properties[name]
            removed.add(str(name))
    if not removed:
        return []
    return [f"has properties that are Python objects ({', '.join(sorted(removed))}): left out."]


def _is_density(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("data"), Mapping)
        and ("poscar" in value or "structure" in value)
    )


def _is_flat_density(value: object) -> bool:
    """Whether this is emmet's ``ChgcarLike`` with flat lists: labels, data and their shapes."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(value.get(name), list) for name in ("labels", "data", "data_rank"))
        and "structure" in value
    )


def _unflattened(density: Mapping[str, Any], path: Path) -> dict[str, Any]:
    labels, data, shapes = (density[name] for name in ("labels", "data", "data_rank"))
    if not len(labels) == len(data) == len(shapes):
        raise SchemaError(
            f"{path} has {len(labels)} labels, {len(data)} grids and {len(shapes)} shapes. Get the "
            "file again."
        )
    return {
        str(label): None
        if values is None
        else np.asarray(values, dtype=np.float64).reshape([int(n) for n in shape])
        for label, values, shape in zip(labels, data, shapes, strict=True)
    }


def _decoded(values: object) -> NDArray[np.float64]:
    """Make an array from nested lists, or from monty's ``{"@class": "array", "data": ...}``."""
    return np.asarray(values["data"] if isinstance(values, Mapping) else values, dtype=np.float64)


def _not_installed(exc: ImportError) -> PymatgenMissingError:
    return PymatgenMissingError(
        f"Reading CHGCAR and MP files needs pymatgen ({exc}). Install it: pip install "
        "'zarrcache[convert]'"
    )


def pymatgen_version() -> str:
    """Version of pymatgen, or of pymatgen-core if only that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pymatgen")
    except PackageNotFoundError:
        return version("pymatgen-core")
