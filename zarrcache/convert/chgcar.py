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

_GRID_LINE = re.compile(rb"^[ \t]*(\d+)[ \t]+(\d+)[ \t]+(\d+)[ \t]*\r?$", re.MULTILINE)
# Fortran drops the E of a three-digit exponent: 0.12345678901-100. "-100.5" does not match: it is
# the next of two columns that touch.
_BARE_EXPONENT = re.compile(rb"(?<=\d)([+-]\d{3})(?![\d.])")
_READ_BYTES = 1 << 22
_LINE_BYTES = 1 << 20
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
        bare_exponents, headers, whole = _scan(file, path)
    if not headers:
        raise SchemaError(
            f"{path} is not a CHGCAR, or is cut short: no line below a blank one gives the size of "
            "a grid as three whole numbers."
        )
    if bare_exponents:
        # pymatgen reads 0.1-100 as two numbers and silently shifts every later value by one place.
        with tempfile.TemporaryDirectory(prefix="zarrcache-") as scratch:
            repaired = Path(scratch) / "CHGCAR"
            with zopen(path, "rb") as file, repaired.open("wb") as out:
                while lines := file.readlines(_READ_BYTES):
                    out.write(_BARE_EXPONENT.sub(rb"E\1", b"".join(lines)))
            poscar, blocks, _ = outputs.VolumetricData.parse_file(str(repaired))
    else:
        poscar, blocks, _ = outputs.VolumetricData.parse_file(str(path))
    parsed = RawDensity(dict(blocks), poscar.structure)
    if headers not in (1, 2, 4):
        parsed.notes.append(
            f"has {headers} grids; VASP writes 1, 2 (spin) or 4 (non-collinear). It may be cut "
            "short; only the first is used."
        )
    if not whole:
        parsed.notes.append("does not end with a line end: its last number may be cut short.")
    return parsed


def _scan(file: Any, path: Path) -> tuple[bool, int, bool]:
    """Scan a file before pymatgen parses it, which trusts its counts and line lengths.

    Returns
    -------
    bare_exponents : bool
        A number has an exponent without its E.
    headers : int
        Number of lines that look like the start of a grid.
    is_whole : bool
        The file ends with a line end.
    """
    head = [_line(file, path)]  # the title, which may be blank
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
    if sum(map(int, counts)) > len(head):
        raise SchemaError(
            f"{path} announces {sum(map(int, counts))} atoms and has {len(head)} lines for them. "
            "Get the file again."
        )
    rest = _line(file, path)
    grid = _GRID_LINE.match(rest)
    points = math.prod(map(int, grid.groups())) if grid else 0
    if 8 * points > most_bytes():
        raise SchemaError(
            f"{path} announces a grid of {points} points, more than fits in memory. Get the file "
            "again."
        )
    bare_exponents, headers, total, most = False, 0, 0, _most_bytes_of(path)
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
        bare_exponents = bare_exponents or _BARE_EXPONENT.search(text) is not None
        headers += sum(1 for _ in _GRID_LINE.finditer(text))
    if 2 * points > total + len(rest):
        raise SchemaError(
            f"{path} announces a grid of {points} points and ends after {total} bytes. It is cut "
            "short; get it again."
        )
    return (
        bare_exponents or _BARE_EXPONENT.search(rest) is not None,
        headers + len(_GRID_LINE.findall(rest)),
        not rest or rest.endswith(b"\n"),
    )


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
        (d for d in (payload.get("data"), payload.get("chgcar"), payload) if _is_density(d)), None
    )
    if density is None:
        raise SchemaError(
            f"{path} is JSON without a charge density (keys: "
            f"{', '.join(map(str, list(payload)[:8])) or 'none'})."
        )
    # Decode only what is stored, not the augmentation occupancies of a Chgcar object.
    structure = density["poscar"]["structure"] if "poscar" in density else density["structure"]
    blocks = {str(name): _decoded(values) for name, values in density["data"].items()}
    task_id, notes = payload.get("task_id"), _without_objects(structure)
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
