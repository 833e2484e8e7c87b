"""Read densities that PySCF scripts save with numpy, as the QM9 data sets of electrai keep them.

One directory per molecule, ``dsgdb9nsd_000001``, holds

- ``rho_22.npy``: the density in electrons per cubic bohr, flat in C order or 3-D;
- ``grid_sizes_22.dat``: the grid, three whole numbers, if the density is flat;
- ``box.npy`` or ``box.dat``: the edges of the box in angstrom, three numbers or three vectors;
- ``centered.xyz``: the atoms in angstrom. Instead of a box file, its second line may hold
  ``Lattice="ax ay az bx by bz cx cy cz"`` (extended XYZ).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import safe_repr
from zarrcache._units import counted, most_bytes
from zarrcache.errors import SchemaError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ATOMS", "PER_CUBIC_ANGSTROM", "NpyDensity", "members_of", "read_npy_density"]

#: Attribute of numpy files: symbols and positions in angstrom.
ATOMS = "atoms_of_xyz"

#: Cubic bohr per cubic angstrom, with the digits of electrai's loader, to give the same values.
PER_CUBIC_ANGSTROM = 1.88973**3

_RHO = re.compile(r"rho(_\w+)?\.npy")
_LATTICE = re.compile(rb"""Lattice\s*=\s*["']([^"']*)["']""", re.IGNORECASE)
_MAX_TEXT_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class NpyDensity:
    """A density and what is known of its cell.

    Attributes
    ----------
    values : ndarray, shape (nx, ny, nz), C order
        Electrons per cubic angstrom, in the precision of the file.
    lattice : ndarray, shape (3, 3), or None
        Vectors of the box in rows, in angstrom.
    symbols : tuple of str
    positions : ndarray, shape (n, 3)
        Of the atoms, in angstrom.
    """

    values: NDArray[Any]
    lattice: NDArray[np.float64] | None
    symbols: tuple[str, ...]
    positions: NDArray[np.float64]

    @property
    def volume(self) -> float | None:
        """Volume of the box in cubic angstrom; None if the files do not say it."""
        if self.lattice is None:
            return None
        a, b, c = self.lattice
        return float(abs(np.dot(np.cross(a, b), c)))

    def attributes(self) -> dict[str, Any]:
        """The attributes that a store of these files would have, without pymatgen.

        The structure has only its lattice; the atoms are in `ATOMS`. Empty without a lattice.
        """
        if self.lattice is None:
            return {}
        return {
            "structure": {"lattice": {"matrix": self.lattice.tolist()}},
            ATOMS: {"symbols": list(self.symbols), "positions": self.positions.tolist()},
        }


def members_of(names: Collection[str], url: str) -> list[str]:
    """The names of a directory that its density is read from: first ``rho_*.npy``.

    Raises
    ------
    SchemaError
        There is no density, or more than one and no ``rho_22.npy``.
    """
    densities = sorted(name for name in names if _RHO.fullmatch(name))
    if not densities:
        raise SchemaError(
            f"{url} holds neither a CHGCAR nor rho_*.npy, so no density: "
            f"{safe_repr(sorted(names)[:5])}."
        )
    rho = "rho_22.npy" if "rho_22.npy" in densities else densities[0]
    if rho != "rho_22.npy" and densities[1:]:
        raise SchemaError(
            f"{url} holds several densities: {', '.join(densities)}. Leave one of them, or name "
            "it rho_22.npy."
        )
    suffix = rho.removeprefix("rho").removesuffix(".npy")
    wanted = [
        (f"grid_sizes{suffix}.dat", "grid_sizes.dat"),
        ("box.npy", "box.dat"),
        ("centered.xyz", *sorted(name for name in names if name.endswith(".xyz"))),
    ]
    found = (next((name for name in choice if name in names), None) for choice in wanted)
    return [rho, *filter(None, found)]


def read_npy_density(files: Mapping[str, Buffer], url: str) -> NpyDensity:
    """Read the density of one directory.

    Parameters
    ----------
    files : mapping
        Contents by name, of `members_of`.
    url : str
        Of the directory, for messages.

    Raises
    ------
    SchemaError
        A file has other content.
    """
    (rho,) = (name for name in files if _RHO.fullmatch(name))
    values = _array(files[rho], f"{url}/{rho}")
    grid = next((name for name in files if name.startswith("grid_sizes")), None)
    if grid is not None:
        shape = _numbers(files[grid], f"{url}/{grid}").reshape(-1)
        if shape.size != 3 or not (shape == np.floor(shape)).all() or (shape < 1).any():
            raise SchemaError(f"{url}/{grid} does not hold three whole numbers: the grid.")
        points = tuple(int(n) for n in shape)
        is_flat = values.size in values.shape
        if math.prod(points) != values.size or not (is_flat or values.shape == points):
            raise SchemaError(
                f"{url}: {grid} says {' x '.join(map(str, points))}, which is "
                f"{math.prod(points)} points, and {rho} holds {values.size} in the shape "
                f"{values.shape}. Get both again."
            )
        values = values.reshape(points)
    if values.ndim != 3 or not values.size:
        raise SchemaError(
            f"{url}/{rho} has the shape {values.shape}, and there is no grid_sizes file beside it "
            "that says the grid."
        )
    lattice: NDArray[np.float64] | None = None
    symbols: tuple[str, ...] = ()
    positions: NDArray[np.float64] = np.empty((0, 3))
    xyz = next((name for name in files if name.endswith(".xyz")), None)
    if xyz is not None:
        lattice, symbols, positions = _atoms(files[xyz], f"{url}/{xyz}")
    box = next((name for name in files if name.startswith("box.")), None)
    if box is not None:
        where = f"{url}/{box}"
        read = _array if box.endswith(".npy") else _numbers
        lattice = _box(read(files[box], where), where)
    scaled = np.ascontiguousarray(values * PER_CUBIC_ANGSTROM)
    return NpyDensity(scaled, lattice, symbols, positions)


def _array(data: Buffer, where: str) -> NDArray[Any]:
    """An array of real numbers from the content of a ``.npy`` file."""
    file = io.BytesIO(data)
    try:
        # The header says how much is allocated; the numbers lie in the file as they are.
        if memoryview(data).nbytes > most_bytes():
            raise ValueError("it is larger than memory")
        values: NDArray[Any] = np.asarray(np.load(file, allow_pickle=False))
    except (ValueError, EOFError, OSError, TypeError, SyntaxError, OverflowError) as exc:
        raise SchemaError(f"{where} is not a complete .npy file ({exc}). Get it again.") from exc
    except MemoryError as exc:
        raise SchemaError(f"{where} announces more numbers than fit in memory.") from exc
    if values.dtype.kind not in "iuf":
        raise SchemaError(f"{where} does not hold real numbers. Get it again.")
    return values


def _numbers(data: Buffer, where: str) -> NDArray[np.float64]:
    text = bytes(memoryview(data)[:_MAX_TEXT_BYTES])
    try:
        rows = [
            [float(word) for word in line.split()] for line in text.splitlines() if line.split()
        ]
        found = np.array(rows, np.float64)
    except ValueError as exc:
        raise SchemaError(f"{where} does not hold numbers ({exc}). Get it again.") from exc
    return found


def _box(numbers: NDArray[Any], where: str) -> NDArray[np.float64]:
    matrix = np.asarray(numbers, np.float64)
    if matrix.size == 3:
        matrix = np.diag(matrix.reshape(3))
    if matrix.size != 9 or not np.isfinite(matrix).all() or not np.linalg.det(matrix.reshape(3, 3)):
        raise SchemaError(
            f"{where} does not hold the edges of a box: three lengths or three vectors, in "
            "angstrom. Get it again."
        )
    return matrix.reshape(3, 3)


def _atoms(
    data: Buffer, where: str
) -> tuple[NDArray[np.float64] | None, tuple[str, ...], NDArray[np.float64]]:
    """Lattice (of extended XYZ), symbols and positions."""
    lines = bytes(memoryview(data)[:_MAX_TEXT_BYTES]).splitlines()
    try:
        count = int(lines[0])
        rows = [line.split() for line in lines[2 : 2 + count]]
        if len(rows) != count:
            raise ValueError(f"it announces {counted(count, 'atom')} and has {len(rows)}")
        symbols = tuple(row[0].decode("ascii") for row in rows)
        # QM9's own files write 1.5*^-6.
        positions = [[float(word.replace(b"*^", b"e")) for word in row[1:4]] for row in rows]
        found = np.array(positions, np.float64).reshape(count, 3)
    except (ValueError, IndexError) as exc:
        raise SchemaError(f"{where} is not an XYZ file ({exc}). Get it again.") from exc
    match = _LATTICE.search(lines[1])
    if match is None:
        return None, symbols, found
    return _box(_numbers(match[1], where), where), symbols, found
