"""Read charge densities from the files that VASP and the Materials Project write, and say what
looks wrong with them.

pymatgen and monty are imported at the first read, not before: only people who convert need them
(``pip install 'zarrcache[convert]'``).
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings as python_warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._limits import most_bytes, read_bounded
from zarrcache.convert._names import is_json_name, task_id_of
from zarrcache.errors import ConfigError, SchemaError

__all__ = ["ChargeDensity", "check_blocks", "read_density"]

_GRID_LINE = re.compile(rb"^[ \t]*(\d+)[ \t]+(\d+)[ \t]+(\d+)[ \t]*\r?$", re.MULTILINE)
# Fortran drops the E of a three-digit exponent: 0.12345678901-100. Not at "-100.5", which is the
# next of two columns that touch.
_BARE_EXPONENT = re.compile(rb"(?<=\d)([+-]\d{3})(?![\d.])")
_READ_BYTES = 1 << 22
_LINE_BYTES = 1 << 20
#: What may come of a compressed file: so many times its size, and this in any case.
_MAX_RATIO, _ROOM_BYTES = 100, 64 * 1024**2
#: How far ``mean(total)`` may be from a whole number. 36 of 36 labels of the Materials Project are
#: within 1e-4 of one.
_ELECTRON_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ChargeDensity:
    """One density as its file has it: values unchanged but for the cast to float32.

    Attributes
    ----------
    task_id : str
    source : Path
    total : ndarray, shape (nx, ny, nz), float32, C order
        CHGCAR convention: electrons per volume times the volume of the cell, so ``total.mean()`` is
        the number of valence electrons.
    diff : ndarray or None
        The spin density, spin up minus spin down, where the file has one and it was asked for.
    structure : dict
        ``pymatgen.core.Structure.as_dict()``.
    formula : str
    electrons : float
        ``mean(total)`` in float64.
    blocks : tuple of str
        Every grid of the file, for example ``("total", "diff")``.
    pymatgen_version : str
    warnings : tuple of str
        What looks wrong, one sentence each; empty for a plain density.
    """

    task_id: str
    source: Path
    total: NDArray[np.float32]
    diff: NDArray[np.float32] | None
    structure: dict[str, Any]
    formula: str
    electrons: float
    blocks: tuple[str, ...]
    pymatgen_version: str
    warnings: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        """What goes beside the arrays of a store, under ``metadata``."""
        return {
            "task_id": self.task_id,
            "pymatgen_version": self.pymatgen_version,
            "formula": self.formula,
            "electrons": round(self.electrons, 6),
            "source": self.source.name,
        }


@dataclass
class _Parsed:
    """A file's grids by name, in float64, with its structure."""

    blocks: dict[str, NDArray[np.float64]]
    structure: Any
    task_id: str | None = None
    notes: list[str] = field(default_factory=list)


def read_density(path: Path, *, diff: bool = False, strict: bool = True) -> ChargeDensity:
    """Read and check one density.

    Parameters
    ----------
    path : Path
        A CHGCAR in VASP's text, or JSON as the Materials Project writes it; either may be
        compressed.
    diff : bool
        Also the spin density, if there is one.
    strict : bool
        Look for what is wrong with a charge density. False for other volumetric data, for example
        an ELFCAR.

    Raises
    ------
    SchemaError
        Not a volumetric file, cut short, not 3-D, or with NaN or infinity; names the file.
    ConfigError
        pymatgen is not installed.
    OSError
        The file cannot be opened.
    """
    task_id = task_id_of(path)
    parsed = _parse(path, _read_json if is_json_name(path.name) else _read_text)
    wanted = {"total": parsed.blocks["total"]}
    collinear = "diff" in parsed.blocks and "diff_x" not in parsed.blocks
    if diff and collinear:
        wanted["diff"] = parsed.blocks["diff"]
    arrays = {block: _as_float32(path, block, values) for block, values in wanted.items()}
    if "diff" in arrays and arrays["diff"].shape != arrays["total"].shape:
        raise SchemaError(
            f"{path}: total has the grid {arrays['total'].shape}, diff has {arrays['diff'].shape}. "
            "Get the file again."
        )
    notes = list(parsed.notes)
    if strict:
        notes += check_blocks(parsed.blocks, _protons(parsed.structure), len(parsed.structure))
        if diff and "diff" not in parsed.blocks:
            notes.append("has no spin density (one block): only charge_density_total is written.")
    if parsed.task_id not in (None, task_id):
        notes.append(
            f"calls itself {parsed.task_id} inside; it is stored under its file name, {task_id}."
        )
    return ChargeDensity(
        task_id=task_id,
        source=path,
        total=arrays["total"],
        diff=arrays.get("diff"),
        structure=parsed.structure.as_dict(),
        formula=str(parsed.structure.composition.formula),
        electrons=float(parsed.blocks["total"].mean()),
        blocks=tuple(parsed.blocks),
        pymatgen_version=_pymatgen_version(),
        warnings=tuple(notes),
    )


def check_blocks(
    blocks: Mapping[str, NDArray[np.float64]], protons: float, atoms: int
) -> list[str]:
    """What looks wrong with the numbers of a charge density; one sentence each.

    Parameters
    ----------
    blocks : mapping
        ``total`` and perhaps ``diff``, ``diff_x``, ...
    protons : float
        Sum of the atomic numbers: valence electrons cannot be many more.
    atoms : int
        Every atom brings one valence electron at the least.
    """
    notes = []
    electrons = float(blocks["total"].mean())
    nearest = round(electrons)
    if electrons < 0:
        notes.append(
            f"mean(total) is {electrons:.4f}, which cannot be a number of electrons: this looks "
            "like a potential (LOCPOT), not a density."
        )
    elif electrons < 0.9 * atoms:
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


def _parse(path: Path, read: Any) -> _Parsed:
    """Run one reader; whatever a third-party parser trips over becomes one error that names the
    file.
    """
    with python_warnings.catch_warnings(record=True) as caught:
        python_warnings.simplefilter("always")
        try:
            parsed: _Parsed = read(path)
        except (ConfigError, SchemaError):
            raise
        except OSError as exc:
            if exc.errno is not None:
                raise
            raise SchemaError(
                f"{path} cannot be unpacked ({exc}). It is cut short or not what its name says; "
                "get it again."
            ) from exc
        except Exception as exc:
            raise SchemaError(
                f"{path} cannot be read as a charge density ({_cause(exc)}). Check that it is a "
                "whole CHGCAR or MP JSON file."
            ) from exc
    if "total" not in parsed.blocks:
        raise SchemaError(
            f"{path} holds no total density (blocks: {', '.join(parsed.blocks) or 'none'})."
        )
    # pymatgen warns where it had to guess, for example the elements of a VASP 4 file. People who
    # train on the structure have to know.
    guesses = {
        str(w.message).splitlines()[0]
        for w in caught
        if not issubclass(w.category, (DeprecationWarning, PendingDeprecationWarning))
    }
    parsed.notes += [f"pymatgen says: {guess}" for guess in sorted(guesses)]
    return parsed


def _cause(exc: Exception) -> str:
    text = str(exc).splitlines()[0] if str(exc) else ""
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def _read_text(path: Path) -> _Parsed:
    outputs, zopen = _import("pymatgen.io.vasp.outputs"), _import("monty.io").zopen
    with zopen(path, "rb") as file:
        bare_exponents, headers, whole = _looked_through(file, path)
    if not headers:
        raise SchemaError(
            f"{path} is no CHGCAR, or is cut short: no line below a blank one gives the size of a "
            "grid as three whole numbers."
        )
    if bare_exponents:
        # pymatgen takes 0.1-100 for two numbers and moves every later value by one place, without a
        # word.
        with tempfile.TemporaryDirectory(prefix="zarrcache-") as scratch:
            repaired = Path(scratch) / "CHGCAR"
            with zopen(path, "rb") as file, repaired.open("wb") as out:
                while lines := file.readlines(_READ_BYTES):
                    out.write(_BARE_EXPONENT.sub(rb"E\1", b"".join(lines)))
            poscar, blocks, _ = outputs.VolumetricData.parse_file(str(repaired))
    else:
        poscar, blocks, _ = outputs.VolumetricData.parse_file(str(path))
    parsed = _Parsed(dict(blocks), poscar.structure)
    if headers not in (1, 2, 4):
        parsed.notes.append(
            f"has {headers} grids; VASP writes 1, 2 (spin) or 4 (non-collinear). It may be cut "
            "short; only the first is used."
        )
    if not whole:
        parsed.notes.append("does not end with a line end: its last number may be cut short.")
    return parsed


def _looked_through(file: Any, path: Path) -> tuple[bool, int, bool]:
    """Read a file once from end to end, before pymatgen does, which believes what it is told and
    keeps lines of any length.

    Returns
    -------
    bare_exponents : bool
        Whether a number has an exponent without its E.
    headers : int
        How many lines look like the first one of a grid.
    is_whole : bool
        Whether it ends with a line end.
    """
    head = [_line(file, path)]  # the title may be blank
    # up to the blank line below the atoms, where the grids begin
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
            f"{path} announces a grid of {points} points, which this machine has no memory for. "
            "Get the file again."
        )
    bare_exponents, headers, total, most = False, 0, 0, _most_bytes_of(path)
    while block := file.read(_READ_BYTES):
        total += len(block)
        if total > most:
            raise SchemaError(
                f"{path} unpacks to more than {most} bytes of text, far more than a density of its "
                "size. Get the file again."
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
    """What a file may unpack to. The text of a density is three to ten times its compressed file."""
    return min(most_bytes(), max(_ROOM_BYTES, _MAX_RATIO * path.stat().st_size))


def _read_json(path: Path) -> _Parsed:
    zopen = _import("monty.io").zopen
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
    # Only what is stored is decoded: the augmentation occupancies of a Chgcar object are left
    # alone.
    structure = density["poscar"]["structure"] if "poscar" in density else density["structure"]
    blocks = {str(name): _decoded(values) for name, values in density["data"].items()}
    task_id, notes = payload.get("task_id"), _without_objects(structure)
    return _Parsed(
        blocks,
        _import("pymatgen.core").Structure.from_dict(structure),
        task_id if isinstance(task_id, str) else None,
        notes,
    )


def _without_objects(structure: dict[str, Any]) -> list[str]:
    """Take out properties that are objects of Python: monty would import the module that they name,
    whatever that is, and make one of its class.

    Returns
    -------
    list of str
        A sentence that names them, if there are any.
    """
    removed = set()
    for owner in (structure, *structure["sites"]):
        properties = owner.get("properties") or {}
        for name in [
            name for name, value in properties.items() if '"@module"' in json.dumps(value)
        ]:
            del properties[name]
            removed.add(str(name))
    return (
        [
            (
                f"has properties that are objects of Python ({', '.join(sorted(removed))}): they are "
                "left out."
            )
        ]
        if removed
        else []
    )


def _is_density(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("data"), Mapping)
        and ("poscar" in value or "structure" in value)
    )


def _protons(structure: Any) -> float:
    return float(sum(element.Z * amount for element, amount in structure.composition.items()))


def _decoded(values: object) -> NDArray[np.float64]:
    """An array from nested lists, or from monty's ``{"@class": "array", "dtype": ..., "data":
    ...}``.
    """
    return np.asarray(values["data"] if isinstance(values, Mapping) else values, dtype=np.float64)


def _as_float32(path: Path, block: str, values: NDArray[np.float64]) -> NDArray[np.float32]:
    if values.ndim != 3 or 0 in values.shape:
        raise SchemaError(
            f"{path}: {block} has the shape {values.shape}; a density is 3-D. Get the file again."
        )
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bad = single.size - int(np.count_nonzero(np.isfinite(single)))
    if bad:
        raise SchemaError(
            f"{path}: {bad} of {single.size} values of {block} are NaN or infinite. Run the "
            "calculation again or get the file again."
        )
    return single


def _import(name: str) -> ModuleType:
    """Import a module of pymatgen or monty, or say how to get them."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"Reading CHGCAR and MP files needs pymatgen ({exc}). Install it: pip install "
            "'zarrcache[convert]'"
        ) from exc


def _pymatgen_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pymatgen")
    except PackageNotFoundError:
        return version("pymatgen-core")
