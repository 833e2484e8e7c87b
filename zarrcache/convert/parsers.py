"""What a parser of ``convert`` returns, and the parser of the files of QM9."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache.arrays import members_of, read_npy_density, structure_of
from zarrcache.errors import SchemaError

__all__ = ["RawDensity", "read_npy"]


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


def read_npy(path: Path) -> RawDensity:
    """Read ``rho_*.npy`` and the files beside it, as the QM9 data sets of electrai keep them."""
    where = path.parent
    names = [name for name in members_of(os.listdir(where), str(where)) if name != path.name]
    beside = [name for name in names if not name.startswith("rho")]
    files = {name: (where / name).read_bytes() for name in (path.name, *beside)}
    found = read_npy_density(files, str(where))
    if found.lattice is None or not found.symbols:
        lacks = "no .xyz file" if found.lattice is not None else "no box.npy or box.dat"
        raise SchemaError(
            f"{path} has {lacks} beside it, and a store needs box and atoms. Add it, or train from "
            "these files as they are: normalize_data: volume."
        )
    assert found.volume is not None  # of a lattice
    structure = structure_of(found.lattice, found.symbols, found.positions)
    return RawDensity({"total": found.values * np.float64(found.volume)}, structure)
