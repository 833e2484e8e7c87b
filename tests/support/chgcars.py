"""A writer of small CHGCARs that shares nothing with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["SMALL", "write_chgcar"]

#: A seed of ``zarrcache.demo.synthetic`` whose first six grids are small: 24 to 36 points per axis.
SMALL = 93592


def write_chgcar(
    path: Path, shape: tuple[int, ...], seed: int, *, diff: bool = False
) -> dict[str, NDArray[np.float64]]:
    """Two atoms in a cell of no symmetry; ten electrons. Returns the grids: total, perhaps diff."""
    rng = np.random.default_rng(seed)
    lattice = np.diag([2.9, 3.3, 4.1]) + rng.random((3, 3)) / 2
    values = rng.random(int(np.prod(shape)))
    values *= 10 * values.size / values.sum()
    grids = {"total": values}
    if diff:
        grids["diff"] = values * rng.uniform(-1, 1, values.size)
    rows = []
    for grid in grids.values():
        numbers = [f"{v:.11E}" for v in grid]
        rows += [" ".join(map(str, shape))]
        rows += [" ".join(numbers[i : i + 5]) for i in range(0, len(numbers), 5)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(
            [
                "toy", "   1.00000000000000",
                *(" ".join(f"{x:.6f}" for x in row) for row in lattice),
                "   Si O", "   1 1", "Direct", " 0.0 0.0 0.0", " 0.5 0.5 0.5", "",
                *rows, "",
            ]
        )
    )  # fmt: skip
    return {name: grid.reshape(shape, order="F") for name, grid in grids.items()}
