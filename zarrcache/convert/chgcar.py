"""The files of VASP and the Materials Project as an input of ``convert``, with their structure."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache.arrays import DensityFile, PymatgenMissingError, require_pymatgen
from zarrcache.arrays import read_mp_json as _read_mp_json
from zarrcache.arrays import read_vasp_text as _read_vasp_text

__all__ = [
    "PymatgenMissingError",
    "RawDensity",
    "pymatgen_version",
    "read_mp_json",
    "read_vasp_text",
]


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
        Not such a file, cut short, or larger than memory; errors of the structure are pymatgen's.
    ConfigError
        pymatgen is not installed.
    """
    require_pymatgen()
    return _raw(_read_vasp_text(path))


def read_mp_json(path: Path) -> RawDensity:
    """Parse JSON as the Materials Project writes it, perhaps compressed.

    Raises
    ------
    SchemaError
        No charge density in it, or larger than memory; errors of the structure are pymatgen's.
    ConfigError
        pymatgen is not installed.
    """
    require_pymatgen()
    return _raw(_read_mp_json(path))


def _raw(found: DensityFile) -> RawDensity:
    return RawDensity(found.blocks, found.structure, found.task_id, found.notes)


@functools.cache
def pymatgen_version() -> str:
    """Version of pymatgen, or of pymatgen-core if only that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pymatgen")
    except PackageNotFoundError:
        return version("pymatgen-core")
