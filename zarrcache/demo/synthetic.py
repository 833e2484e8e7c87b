"""Synthetic pairs of a crude and a converged charge density, reproducible from a seed.

The crude density is a superposition of neutral atoms, as VASP starts from. In the converged one the
atoms are contracted and some charge is transferred to the more electronegative ones. Both are
summed in reciprocal space, where form factor times structure factor is exactly the sum over all
periodic images of an atom, and the number of electrons is the coefficient at G = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SyntheticPair", "make_pair", "write_pairs"]

Grid = NDArray[np.floating[Any]]

# Symbol: valence electrons of VASP's PBE dataset, radius in angstrom, electronegativity (Pauling).
_ELEMENTS = {
    "Al": (3, 0.80, 1.61),
    "C": (4, 0.50, 2.55),
    "Ca": (10, 0.90, 1.00),
    "Cl": (7, 0.60, 3.16),
    "Fe": (8, 0.62, 1.83),
    "Mg": (2, 0.75, 1.31),
    "N": (5, 0.47, 3.04),
    "O": (6, 0.44, 3.44),
    "S": (6, 0.65, 2.58),
    "Si": (4, 0.75, 1.90),
    "Sr": (10, 1.00, 0.95),
    "Ti": (12, 0.70, 1.54),
}
# Sizes that VASP's FFT accepts: factors 2, 3, 5 and 7 only.
_AXES = (24, 28, 30, 32, 36, 40, 42, 48, 54, 56, 60)
_POINTS_PER_ANGSTROM = 9.0  # half of VASP's fine grid at ENCUT = 700 eV
_VOLUME_PER_ATOM = 20.0  # cubic angstrom; the median of the Materials Project is 22
_SMEARING = 0.14  # angstrom; a PAW density has no cusp at the nucleus


@dataclass(frozen=True)
class SyntheticPair:
    """One material.

    Attributes
    ----------
    task_id : str
        ``syn-<seed>-<index>``.
    data, label : ndarray, shape (nx, ny, nz), float64
        Crude and converged, in the CHGCAR convention: ``mean()`` is the number of valence
        electrons, the same in both.
    structure : dict
        As from ``pymatgen.core.Structure.as_dict()``.
    electrons : int
        Number of valence electrons.
    """

    task_id: str
    data: Grid
    label: Grid
    structure: dict[str, Any]
    electrons: int


def make_pair(seed: int, index: int, *, shape: tuple[int, int, int] | None = None) -> SyntheticPair:
    """Make pair ``index`` of ``seed``. Equal arguments give equal pairs.

    Parameters
    ----------
    seed, index : int
        From 0.
    shape : (nx, ny, nz), optional
        The grid. Default: drawn like real ones, 24 to 60 points per axis, every third cubic.
    """
    rng = np.random.default_rng([seed, index])
    grid = _draw_shape(rng) if shape is None else shape
    lattice = _draw_lattice(rng, grid)
    symbols, positions = _draw_atoms(rng, lattice)
    valence = np.array([_ELEMENTS[symbol][0] for symbol in symbols], dtype=np.float64)
    affinity = np.array([_ELEMENTS[symbol][2] for symbol in symbols])
    # Electrons gained per atom: sums to zero, and is less than one, so no atom becomes negative.
    transfer = 0.2 * (affinity - affinity.mean())
    shrink = rng.uniform(0.86, 0.95)
    squared, indices = _reciprocal(lattice, grid)
    crude = np.zeros(squared.shape, dtype=np.complex128)
    converged = np.zeros_like(crude)
    for symbol in sorted(set(symbols)):
        atoms = [i for i, other in enumerate(symbols) if other == symbol]
        radius = _ELEMENTS[symbol][1]
        structure_factor = sum(_structure_factor(indices, positions[i]) for i in atoms)
        crude += valence[atoms[0]] * structure_factor * _form_factor(squared, radius)
        converged += (
            (valence + transfer)[atoms[0]]
            * structure_factor
            * _form_factor(squared, radius * shrink)
        )
    data, label = (
        np.fft.irfftn(f, s=grid, axes=(0, 1, 2), norm="forward") for f in (crude, converged)
    )
    # Real pairs differ by 6 to 21 % (mean absolute difference over the mean). Scaling the
    # difference conserves the electrons.
    wanted = float(np.clip(np.exp(rng.normal(np.log(0.13), 0.3)), 0.05, 0.25))
    label = data + (label - data) * min(
        1.0, wanted * np.abs(label).sum() / np.abs(label - data).sum()
    )
    return SyntheticPair(
        f"syn-{seed}-{index:04d}",
        data,
        label,
        _structure(lattice, symbols, positions),
        round(valence.sum()),
    )


def write_pairs(directory: Path, n: int, seed: int = 0) -> list[str]:
    """Write ``n`` pairs to ``directory/input`` and ``directory/label``.

    Returns
    -------
    list of str
        The task ids; the files are ``<task_id>.CHGCAR``.
    """
    task_ids = []
    for index in range(n):
        pair = make_pair(seed, index)
        for role, values in (("input", pair.data), ("label", pair.label)):
            path = directory / role / f"{pair.task_id}.CHGCAR"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_chgcar(pair, values))
        task_ids.append(pair.task_id)
    return task_ids


def _draw_shape(rng: np.random.Generator) -> tuple[int, int, int]:
    a, b, c = (int(n) for n in rng.choice(_AXES, size=3))
    kind = rng.random()
    if kind < 0.3:
        return a, a, a
    return (a, a, b) if kind < 0.7 else (a, b, c)


def _draw_lattice(rng: np.random.Generator, shape: tuple[int, int, int]) -> Grid:
    """Lattice vectors as rows, in angstrom, rounded to the precision of a CHGCAR."""
    a, b, c = (n / _POINTS_PER_ANGSTROM for n in shape)
    kind = rng.choice(["orthorhombic", "hexagonal", "monoclinic"], p=[0.6, 0.2, 0.2])
    if kind == "hexagonal":
        rows = [[a, 0, 0], [-b / 2, b * np.sqrt(3) / 2, 0], [0, 0, c]]
    else:
        beta = np.radians(rng.uniform(92, 112)) if kind == "monoclinic" else np.pi / 2
        rows = [[a, 0, 0], [0, b, 0], [c * np.cos(beta), 0, c * np.sin(beta)]]
    return np.round(np.array(rows, dtype=np.float64), 6) + 0.0  # no -0.0


def _draw_atoms(rng: np.random.Generator, lattice: Grid) -> tuple[list[str], Grid]:
    """Elements, sorted, and fractional positions, each the most distant of 24 random candidates."""
    atoms = max(1, round(float(np.linalg.det(lattice)) / _VOLUME_PER_ATOM))
    kinds = rng.choice(sorted(_ELEMENTS), size=min(atoms, int(rng.integers(1, 4))), replace=False)
    symbols = sorted(str(kinds[i % len(kinds)]) for i in range(atoms))
    positions = [np.round(rng.random(3), 6)]
    while len(positions) < atoms:
        candidates = np.round(rng.random((24, 3)), 6)
        apart = (candidates[:, None] - np.array(positions)[None] + 0.5) % 1 - 0.5
        positions.append(
            candidates[np.argmax(np.linalg.norm(apart @ lattice, axis=-1).min(axis=1))]
        )
    return symbols, np.array(positions)


def _reciprocal(lattice: Grid, shape: tuple[int, int, int]) -> tuple[Grid, list[Grid]]:
    """``|G|**2`` in 1/angstrom**2 on the half grid of ``rfftn``, and the Miller indices by axis."""
    indices = [
        np.fft.fftfreq(shape[0], 1 / shape[0]),
        np.fft.fftfreq(shape[1], 1 / shape[1]),
        np.fft.rfftfreq(shape[2], 1 / shape[2]),
    ]
    vectors = 2 * np.pi * np.linalg.inv(lattice)  # columns
    miller = np.stack(np.meshgrid(*indices, indexing="ij", sparse=False), axis=-1)
    return ((miller @ vectors.T) ** 2).sum(axis=-1), indices


def _structure_factor(indices: list[Grid], position: Grid) -> NDArray[np.complex128]:
    x, y, z = (np.exp(-2j * np.pi * i * p) for i, p in zip(indices, position, strict=True))
    factor: NDArray[np.complex128] = x[:, None, None] * y[None, :, None] * z[None, None, :]
    return factor


def _form_factor(squared: Grid, radius: float) -> Grid:
    """Fourier transform of ``exp(-r / a)``, smeared; 1 at G = 0."""
    factor: Grid = np.exp(-squared * _SMEARING**2 / 2) / (1 + squared * (radius / 2.2) ** 2) ** 2
    return factor


def _structure(lattice: Grid, symbols: list[str], positions: Grid) -> dict[str, Any]:
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": 0,
        "lattice": {
            "matrix": lattice.tolist(),
            "pbc": [True, True, True],
            "volume": float(np.linalg.det(lattice)),
        },
        "properties": {},
        "sites": [
            {
                "species": [{"element": s, "occu": 1}],
                "abc": p.tolist(),
                "properties": {},
                "label": s,
                "xyz": (p @ lattice).tolist(),
            }
            for s, p in zip(symbols, positions, strict=True)
        ],
    }


def _chgcar(pair: SyntheticPair, values: Grid) -> bytes:
    symbols = [site["label"] for site in pair.structure["sites"]]
    kinds = sorted(set(symbols))
    lines = [pair.task_id, "   1.00000000000000"]
    lines += ["".join(f"{x:12.6f}" for x in row) for row in pair.structure["lattice"]["matrix"]]
    lines += [
        "".join(f"{kind:>5}" for kind in kinds),
        "".join(f"{symbols.count(kind):6d}" for kind in kinds),
        "Direct",
    ]
    lines += ["".join(f"{x:10.6f}" for x in site["abc"]) for site in pair.structure["sites"]]
    lines += ["", "".join(f"{n:5d}" for n in values.shape), ""]
    numbers = values.ravel(order="F").tolist()  # x runs fastest
    rows, rest = divmod(len(numbers), 5)
    form = (" %.11E" * 5 + "\n") * rows + (" %.11E" * rest + "\n" if rest else "")
    return ("\n".join(lines) + form % tuple(numbers)).encode()
