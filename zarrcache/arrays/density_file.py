"""Read charge densities from the files that VASP and the Materials Project write.

The grids are read without pymatgen, which is imported for structures
(``pip install 'zarrcache[convert]'``).
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import cached_property
from zarrcache._units import counted, most_bytes, read_bounded
from zarrcache.arrays.vasp_text import parse_vasp_text
from zarrcache.errors import ConfigError, SchemaError

__all__ = [
    "HEAD",
    "DensityFile",
    "PymatgenMissingError",
    "read_density_file",
    "read_mp_json",
    "read_vasp_text",
    "require_pymatgen",
    "structure_of",
    "structure_of_poscar",
]

#: Largest decompressed size: this many times the file's size, and _ROOM_BYTES in any case.
_MAX_RATIO, _ROOM_BYTES = 100, 64 * 1024**2
_SYMBOL, _COUNT = re.compile(rb"[A-Z][a-z]?"), re.compile(rb"\d{1,9}")
_DECIMAL = re.compile(rb"[-+]?\d*\.\d+")
_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
}
#: Attribute of a file of VASP: the lines above its grids.
HEAD = "head_of_chgcar"


class PymatgenMissingError(ConfigError):
    """pymatgen cannot be imported, so no structure can be read."""


@dataclass
class DensityFile:
    """The grids of one file by name; its structure is parsed at the first access.

    Attributes
    ----------
    name : str
        Path or URL of the file.
    blocks : dict of ndarray, shape (nx, ny, nz), float64, in the file's order (Fortran's for text)
        ``total``, and perhaps ``diff`` (collinear spin) or ``diff_x``, ``diff_y``, ``diff_z`` and
        ``diff``, their norm with a sign as pymatgen defines it. CHGCAR convention: electrons per
        volume times the volume of the cell. Bit for bit the values of pymatgen.
    task_id : str or None
        The id inside the file.
    notes : list of str
        Suspicious findings, one sentence each.
    unnamed : int
        Number of grids beside the total density that cannot be identified by their number.
    """

    name: str
    blocks: dict[str, NDArray[np.float64]]
    task_id: str | None = None
    notes: list[str] = field(default_factory=list)
    unnamed: int = 0
    _poscar: tuple[bytes, ...] | None = field(default=None, repr=False)
    _document: Mapping[str, Any] | None = field(default=None, repr=False)

    @cached_property
    def lattice(self) -> NDArray[np.float64]:
        """Lattice vectors in rows, Å, shape (3, 3). Its determinant is the volume of the cell.

        Raises
        ------
        SchemaError
            The file does not give nine finite numbers.
        """
        try:
            if self._document is not None:
                matrix = np.array(self._document["lattice"]["matrix"], np.float64)
            else:
                matrix = _poscar_lattice(self._poscar or ())
        except (ValueError, TypeError, KeyError, IndexError):
            matrix = np.empty(0)
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
            raise SchemaError(f"{self.name} has no lattice of nine numbers. Get the file again.")
        return matrix

    @cached_property
    def structure(self) -> Any:
        """The ``pymatgen.core.Structure``, equal to the one that pymatgen reads from the file.

        Imports pymatgen: 0.2 s, or for an unusual POSCAR (other than VASP 5 with fractional
        coordinates alone) 1 to 2 s.

        Raises
        ------
        PymatgenMissingError
            pymatgen is not installed.
        Exception
            Errors of pymatgen's parser.
        """
        try:
            from pymatgen.core.structure import Structure

            if self._document is not None:
                return Structure.from_dict(dict(self._document))
            if (plain := _plain_poscar(self._poscar or ())) is not None:
                return Structure(*plain)
            # Loads scipy and matplotlib.
            from pymatgen.io.vasp.inputs import Poscar
        except ImportError as exc:
            raise _pymatgen_missing(exc) from exc
        return Poscar.from_str(b"\n".join(self._poscar or ()).decode("utf-8")).structure

    def attributes(self) -> dict[str, Any]:
        """The attributes that a store of this file would have, without pymatgen.

        For JSON ``structure``; for VASP's text only its lattice, and the lines above the grids as
        `HEAD`, from which :func:`structure_of_poscar` makes the structure. Empty without a lattice,
        which a density per cell does not need.
        """
        try:
            lattice = {"matrix": self.lattice.tolist()}
        except SchemaError:
            return {}
        found: dict[str, Any] = {
            "metadata": {} if self.task_id is None else {"task_id": self.task_id}
        }
        if self._document is not None:
            return found | {"structure": dict(self._document)}
        text = b"\n".join(self._poscar or ()).decode("utf-8", "replace")
        return found | {"structure": {"lattice": lattice}, HEAD: text}

    def structure_dict(self) -> dict[str, Any]:
        """``Structure.as_dict()``, as stores keep it. Imports pymatgen."""
        found: dict[str, Any] = self.structure.as_dict()
        return found


def require_pymatgen() -> None:
    """Raise PymatgenMissingError unless pymatgen can be imported, before a file is read for it."""
    try:
        import pymatgen  # noqa: F401
    except ImportError as exc:
        raise _pymatgen_missing(exc) from exc


def structure_of(
    lattice: NDArray[np.float64], symbols: Sequence[str], positions: NDArray[np.float64]
) -> Any:
    """The ``pymatgen.core.Structure`` of atoms in a cell, all in angstrom. Imports pymatgen.

    Raises
    ------
    PymatgenMissingError
        pymatgen is not installed.
    """
    require_pymatgen()
    from pymatgen.core.structure import Structure

    return Structure(lattice, symbols, positions, coords_are_cartesian=True)


def _pymatgen_missing(exc: ImportError) -> PymatgenMissingError:
    return PymatgenMissingError(
        f"Reading the structure of CHGCAR and MP files needs pymatgen ({exc}). Install it: pip "
        "install 'zarrcache[convert]'"
    )


def structure_of_poscar(text: str, name: str) -> dict[str, Any]:
    """``Structure.as_dict()`` of the head of a CHGCAR. Imports pymatgen (1 to 2 s).

    Raises
    ------
    PymatgenMissingError
        pymatgen is not installed.
    SchemaError
        It cannot read the text.
    """
    try:
        found = DensityFile(name, {}, _poscar=tuple(text.encode().split(b"\n"))).structure_dict()
    except (PymatgenMissingError, MemoryError):
        raise
    except Exception as exc:
        raise SchemaError(
            f"{name} has a structure that pymatgen cannot read ({type(exc).__name__}: {exc}). Get "
            "the file again."
        ) from exc
    return found


def read_density_file(
    source: str | os.PathLike[str] | IO[bytes], *, name: str | None = None
) -> DensityFile:
    """Read the grids of a CHGCAR or a Materials Project JSON file, perhaps compressed.

    Parameters
    ----------
    source : path or binary file object
        A file object is read from its present position; it must be seekable.
    name : str, optional
        Path or URL, for messages. Its last part decides how the file is read: ``.json`` is JSON,
        others are VASP's text; ``.gz``, ``.bz2``, ``.xz`` or ``.lzma`` after it is compressed.
        Default: the path.

    Raises
    ------
    SchemaError
        Not such a file, cut short, or larger than memory.
    OSError
        The file cannot be opened or read.
    """
    label = _label(source, name)
    bare = PurePosixPath(label.lower())
    suffix = bare.with_suffix("").suffix if bare.suffix in _OPENERS else bare.suffix
    return (read_mp_json if suffix == ".json" else read_vasp_text)(source, name=name)


def read_vasp_text(
    source: str | os.PathLike[str] | IO[bytes], *, name: str | None = None
) -> DensityFile:
    """Like `read_density_file`, for VASP's text with any file name."""
    label = _label(source, name)

    def parse(file: Any, limit_bytes: int) -> DensityFile:
        text = parse_vasp_text(file, label, limit_bytes)
        title = bytes(code if code < 128 else ord("?") for code in text.head[0])
        blocks = _named(text.grids)
        return DensityFile(
            label,
            blocks,
            notes=text.notes,
            unnamed=max(0, len(text.grids) - len(blocks)),
            _poscar=(title, *text.head[1:]),
        )

    return _parsed(source, label, parse)


def read_mp_json(
    source: str | os.PathLike[str] | IO[bytes], *, name: str | None = None
) -> DensityFile:
    """Like `read_density_file`, for JSON with any file name."""
    label = _label(source, name)
    return _parsed(source, label, lambda file, limit: _from_json(file, label, limit))


def _label(source: str | os.PathLike[str] | IO[bytes], name: str | None) -> str:
    if isinstance(source, (str, os.PathLike)):
        return name or os.fspath(source)
    if not name:
        raise ConfigError("read_density_file has a file object without a name. Give name=.")
    return name


def _parsed(
    source: str | os.PathLike[str] | IO[bytes],
    label: str,
    parse: Callable[[Any, int], DensityFile],
) -> DensityFile:
    """Open and parse a file. Errors because of its content become a SchemaError."""
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            return _parsed(file, label, parse)
    place = source.tell()
    size = source.seek(0, os.SEEK_END) - place
    source.seek(place)
    limit_bytes = min(most_bytes(), max(_ROOM_BYTES, _MAX_RATIO * size))
    opener = _OPENERS.get(PurePosixPath(label).suffix.lower())
    try:
        if opener is None:
            return parse(source, limit_bytes)
        with opener(source, "rb") as file:
            return parse(file, limit_bytes)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        raise SchemaError(
            f"{label} cannot be decompressed ({exc}). It is cut short or not what its name says; "
            "get it again."
        ) from exc
    except SchemaError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as exc:
        text = str(exc).splitlines()[0] if str(exc) else ""
        cause = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
        raise SchemaError(
            f"{label} cannot be read as a charge density ({cause}). Check that it is a whole "
            "CHGCAR or MP JSON file."
        ) from exc


def _named(grids: list[NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The grids by pymatgen's names."""
    if len(grids) == 2:
        return {"total": grids[0], "diff": grids[1]}
    if len(grids) != 4:
        return {"total": grids[0]}
    total, x, y, z = grids
    blocks = {"total": total, "diff_x": x, "diff_y": y, "diff_z": z}
    if x.shape == y.shape == z.shape:
        blocks["diff"] = np.sqrt(x**2 + y**2 + z**2) * np.sign(x * 1.01 + y * 1.02 + z * 1.03)
    return blocks


def _poscar_lattice(lines: tuple[bytes, ...]) -> NDArray[np.float64]:
    scale = float(lines[1])
    matrix: NDArray[np.float64] = np.array(
        [[float(word) for word in line.split()] for line in lines[2:5]]
    )
    if scale < 0:  # the volume of the cell
        scale = float(-scale / abs(np.linalg.det(matrix))) ** (1 / 3)
    return matrix * np.float64(scale)


def _plain_poscar(
    lines: tuple[bytes, ...],
) -> tuple[NDArray[np.float64], list[str], NDArray[np.float64]] | None:
    """Lattice, species and fractional coordinates of a POSCAR as VASP 5 and 6 write it.

    None for other POSCARs (selective dynamics, Cartesian coordinates, no symbols, labels behind
    the coordinates, comments), which pymatgen reads.
    """
    if len(lines) < 9 or not lines[0] or any(b"#" in line for line in lines[1:]):
        return None
    symbols, counts = lines[5].split(), lines[6].split()
    if (
        len(symbols) != len(counts)
        or not all(map(_SYMBOL.fullmatch, symbols))
        or not all(map(_COUNT.fullmatch, counts))
        or not lines[7].startswith((b"D", b"d"))
        or sum(map(int, counts)) != len(lines) - 8
    ):
        return None
    rows = [line.split() for line in (*lines[2:5], *lines[8:])]
    if any(len(row) != 3 or not all(map(_DECIMAL.fullmatch, row)) for row in rows):
        return None
    if not _DECIMAL.fullmatch(lines[1]):
        return None
    species = [
        symbol.decode()
        for symbol, count in zip(symbols, counts, strict=True)
        for _ in range(int(count))
    ]
    coords = np.array([[float(word) for word in row] for row in rows[3:]])
    return _poscar_lattice(lines), species, coords


def _from_json(file: Any, name: str, limit_bytes: int) -> DensityFile:
    payload = _loads(read_bounded(file, limit_bytes))
    if isinstance(payload, list) and len(payload) == 1:
        payload = payload[0]
    if not isinstance(payload, Mapping):
        raise SchemaError(f"{name} is JSON but not an object; it holds no charge density.")
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
            f"{name} is JSON without a charge density (keys: "
            f"{', '.join(map(str, list(payload)[:8])) or 'none'})."
        )
    # Decode only what is stored, not the augmentation occupancies of a Chgcar object.
    structure = density["poscar"]["structure"] if "poscar" in density else density["structure"]
    data = _unflattened(density, name) if _is_flat_density(density) else density["data"]
    blocks = {str(block): _decoded(values) for block, values in data.items() if values is not None}
    task_id = payload.get("task_id", payload.get("identifier"))
    notes = _without_objects(structure)
    return DensityFile(
        name, blocks, task_id if isinstance(task_id, str) else None, notes, _document=structure
    )


def _loads(text: bytes) -> Any:
    """Parse JSON with orjson if it is installed, as it is with pymatgen."""
    try:
        import orjson
    except ImportError:
        return json.loads(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # NaN, or another coding than UTF-8; the standard library's errors are clearer too.
        return json.loads(text)


def _without_objects(structure: dict[str, Any]) -> list[str]:
    """Remove properties that are Python objects, whose modules monty would import.

    Returns one sentence that names them, or nothing.
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


def _unflattened(density: Mapping[str, Any], name: str) -> dict[str, Any]:
    labels, data, shapes = (density[key] for key in ("labels", "data", "data_rank"))
    if not len(labels) == len(data) == len(shapes):
        raise SchemaError(
            f"{name} has {counted(len(labels), 'label')}, {counted(len(data), 'grid')} and "
            f"{counted(len(shapes), 'shape')}. Get the "
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
