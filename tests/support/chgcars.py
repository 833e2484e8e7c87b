"""A writer of small CHGCARs that shares nothing with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["write_chgcar"]


def write_chgcar(path: Path, shape: tuple[int, ...], seed: int) -> None:
    """Two atoms in a cell of no symmetry; ten electrons."""
    rng = np.random.default_rng(seed)
    lattice = np.diag([2.9, 3.3, 4.1]) + rng.random((3, 3)) / 2
    values = rng.random(int(np.prod(shape)))
    values *= 10 * values.size / values.sum()
    rows = [" ".join(f"{v:.11E}" for v in values[i : i + 5]) for i in range(0, values.size, 5)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(
            [
                "toy", "   1.00000000000000",
                *(" ".join(f"{x:.6f}" for x in row) for row in lattice),
                "   Si O", "   1 1", "Direct", " 0.0 0.0 0.0", " 0.5 0.5 0.5", "",
                " ".join(map(str, shape)), *rows, "",
            ]
        )
    )  # fmt: skip
