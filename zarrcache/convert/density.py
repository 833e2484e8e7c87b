"""Read one charge density from any input format, check it, and report suspicious values."""

from __future__ import annotations

import functools
import math
import re
import warnings as python_warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zarrcache._keys import Units
from zarrcache.arrays import DensityFile, lattice_volume, no_density, require_pymatgen
from zarrcache.convert.formats import InputFormat, format_of, is_density_name, task_id_of
from zarrcache.convert.parsers import RawDensity
from zarrcache.errors import ConfigError, SchemaError

__all__ = ["ChargeDensity", "check_blocks", "check_name", "read_density"]

#: Largest distance of ``mean(total)`` from a whole number. 36 of 36 labels of the Materials Project
#: are within 1e-4.
_ELECTRON_TOLERANCE = 1e-3
#: Names of potentials, unless the file is also named like a density: then its values decide, as in
#: readers. By name too, because the mean of a Hartree potential (LVHAR) is about zero.
_POTENTIAL = re.compile("LOCPOT", re.IGNORECASE)


@dataclass(frozen=True)
class ChargeDensity:
    """One density as read from its file, in the units and the precision given."""

    task_id: str
    source: Path
    #: Shape (nx, ny, nz), C order. Per cell (CHGCAR convention): electrons per volume times the
    #: volume of the cell, so ``total.mean()`` is the number of valence electrons. Per volume:
    #: electrons per cubic angstrom.
    total: NDArray[np.floating]
    #: The spin density, spin up minus spin down, if the file has one and ``diff`` was set.
    diff: NDArray[np.floating] | None
    #: ``pymatgen.core.Structure.as_dict()``.
    structure: dict[str, Any]
    formula: str
    #: The mean of ``total`` per cell in float64. Readers refuse a store whose values disagree.
    electrons: float
    #: Names of all grids in the file, for example ``("total", "diff")``.
    blocks: tuple[str, ...]
    pymatgen_version: str
    #: Suspicious findings, one sentence each.
    warnings: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        """The attribute ``metadata`` of the store. That of a potential states no electrons."""
        states = {} if no_density(self.electrons) else {"electrons": round(self.electrons, 6)}
        return {
            "task_id": self.task_id,
            "pymatgen_version": self.pymatgen_version,
            "formula": self.formula,
            **states,
            "source": self.source.name,
        }


def read_density(
    path: Path,
    *,
    diff: bool = False,
    strict: bool = True,
    formats: Sequence[InputFormat] | None = None,
    task_id: str | None = None,
    units: Units = "cell",
    dtype: DTypeLike = np.float32,
) -> ChargeDensity:
    """Read and check one density.

    Parameters
    ----------
    path : Path
        Of any input format, perhaps compressed; an unknown name is read as VASP's text.
    diff : bool
        Also read the spin density, if there is one.
    strict : bool
        Check that it is a charge density. False for other volumetric data: a LOCPOT, an ELFCAR.
    formats : sequence of InputFormat, optional
        Default: those that are registered in this process.
    task_id : str, optional
        Default: from the path.
    units : {"cell", "volume"}
        ``volume`` divides the file's float64 values by ``structure.lattice.volume``; they are
        rounded to ``dtype`` once.
    dtype : dtype
        float32 or float64.

    Raises
    ------
    SchemaError
        Not a volumetric file, cut short, not 3-D, or with NaN or infinity; with ``strict``, a
        potential; or ``units`` is ``volume`` and the lattice has none.
    ConfigError
        pymatgen is not installed.
    OSError
        The file cannot be opened.
    """
    task_id = task_id or task_id_of(path)
    if strict:
        check_name(path)
    parsed = _parse(path, format_of(path.name, formats).read)
    wanted = {"total": parsed.blocks["total"]}
    collinear = "diff" in parsed.blocks and "diff_x" not in parsed.blocks
    if diff and collinear:
        wanted["diff"] = parsed.blocks["diff"]
    structure = parsed.structure.as_dict()
    volume = _volume(path, structure) if units == "volume" else None
    arrays = {
        block: _rounded(path, block, values, volume, dtype) for block, values in wanted.items()
    }
    if "diff" in arrays and arrays["diff"].shape != arrays["total"].shape:
        raise SchemaError(
            f"{path}: total has the grid {arrays['total'].shape}, diff has {arrays['diff'].shape}. "
            "Get the file again."
        )
    notes = list(parsed.notes)
    if strict:
        if why := no_density(float(parsed.blocks["total"].mean())):
            raise _no_density(path, why)
        protons = sum(kind.Z * n for kind, n in parsed.structure.composition.items())
        notes += check_blocks(parsed.blocks, float(protons), len(parsed.structure))
        if diff and "diff" not in parsed.blocks:
            notes.append("has no spin density (one block): only charge_density_total is written.")
    if parsed.task_id not in (None, task_id):
        notes.append(f"contains the id {parsed.task_id}; it is stored as {task_id}.")
    return ChargeDensity(
        task_id=task_id,
        source=path,
        total=arrays["total"],
        diff=arrays.get("diff"),
        structure=structure,
        formula=str(parsed.structure.composition.formula),
        # The mean of the rounded values, because readers compare it with what is stored.
        electrons=float(arrays["total"].mean(dtype=np.float64) * (volume or 1.0)),
        blocks=tuple(parsed.blocks),
        pymatgen_version=_pymatgen_version(),
        warnings=tuple(notes),
    )


def check_blocks(
    blocks: Mapping[str, NDArray[np.float64]], protons: float, atoms: int
) -> list[str]:
    """List suspicious values of a charge density, one sentence each.

    The ``protons`` are an upper bound of the valence electrons, and each of the ``atoms``
    contributes at least one.
    """
    notes = []
    electrons = float(blocks["total"].mean())
    nearest = round(electrons)
    if electrons < 0.9 * atoms:
        notes.append(
            f"mean(total) is {electrons:.4g} electrons for {atoms} atoms: not VASP's convention "
            "(density times cell volume); "
            "perhaps it is divided by the volume or by the number of grid points already."
        )
    elif electrons > 1.01 * protons + 1:
        notes.append(
            f"mean(total) is {electrons:.4f} electrons, more than the {protons:g} protons of the "
            "structure."
        )
    elif abs(electrons - nearest) > max(_ELECTRON_TOLERANCE, 1e-6 * electrons):
        notes.append(
            f"mean(total) is {electrons:.4f}, not a whole number of electrons: regridded, charged, "
            "or not a CHGCAR."
        )
    if "diff_x" in blocks:
        others = ", ".join(name for name in blocks if name not in ("total", "diff"))
        notes.append(f"is non-collinear: {others} are not written, only charge_density_total is.")
    elif "diff" in blocks:
        moment = float(blocks["diff"].mean())
        if math.isfinite(moment) and abs(moment) > abs(electrons) + _ELECTRON_TOLERANCE:
            notes.append(
                f"mean(diff) is {moment:.4f}, more than all {electrons:.4f} electrons: the spin "
                "density looks wrong."
            )
    return notes


def check_name(path: Path) -> None:
    """Raise SchemaError if a file has the name of a potential, and not also that of a density."""
    if _POTENTIAL.search(path.name) and not is_density_name(path.name):
        raise _no_density(path, "its name is that of a potential (LOCPOT), not of a density")


def _no_density(path: Path, why: str) -> SchemaError:
    return SchemaError(
        f"{path}: {why}. Convert the CHGCAR of that calculation; in Python, strict=False converts "
        "other volumetric data."
    )


def _parse(path: Path, read: Callable[[Path], RawDensity | DensityFile]) -> RawDensity:
    """Run a parser; any error becomes a SchemaError that names the file."""
    require_pymatgen()
    with python_warnings.catch_warnings(record=True) as caught:
        python_warnings.simplefilter("always")
        try:
            found = read(path)
            # The structure of a file of VASP is parsed now.
            parsed = RawDensity(found.blocks, found.structure, found.task_id, found.notes)
        except (ConfigError, SchemaError, MemoryError):
            raise
        except Exception as exc:
            if isinstance(exc, OSError) and exc.errno is not None:
                raise
            raise SchemaError(
                f"{path} cannot be read as a charge density ({_cause(exc)}). Check that it is a "
                "whole CHGCAR or MP JSON file."
            ) from exc
    if "total" not in parsed.blocks:
        raise SchemaError(
            f"{path} holds no total density (blocks: {', '.join(parsed.blocks) or 'none'})."
        )
    # pymatgen warns if it guesses, for example the elements of a VASP 4 file, which matters for
    # training on the structure. A ResourceWarning is of another object that was just freed.
    guesses = {
        str(w.message).splitlines()[0]
        for w in caught
        if not issubclass(
            w.category, (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)
        )
    }
    parsed.notes += [f"pymatgen says: {guess}" for guess in sorted(guesses)]
    return parsed


@functools.cache
def _pymatgen_version() -> str:
    """Version of pymatgen, or of pymatgen-core if only that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pymatgen")
    except PackageNotFoundError:
        return version("pymatgen-core")


def _cause(exc: Exception) -> str:
    text = str(exc).splitlines()[0] if str(exc) else ""
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def _volume(path: Path, structure: Mapping[str, Any]) -> float:
    try:
        return lattice_volume(structure)
    except ValueError as exc:
        raise SchemaError(
            f"{path}: {exc}, so its density per volume is unknown. Correct the file, or read it "
            "per cell."
        ) from exc


def _rounded(
    path: Path,
    block: str,
    values: NDArray[np.float64],
    volume: float | None,
    dtype: DTypeLike,
) -> NDArray[np.floating]:
    """The values, divided by the volume if one is given, rounded once."""
    if values.ndim != 3 or 0 in values.shape:
        raise SchemaError(
            f"{path}: {block} has the shape {values.shape}; a density is 3-D. Get the file again."
        )
    with np.errstate(over="ignore"):
        result: NDArray[np.floating] = np.ascontiguousarray(
            values if volume is None else values / volume, dtype=dtype
        )
    bad = result.size - int(np.count_nonzero(np.isfinite(result)))
    if bad:
        raise SchemaError(
            f"{path}: {bad} of {result.size} values of {block} are NaN or infinite. Run the "
            "calculation again or get the file again."
        )
    return result
