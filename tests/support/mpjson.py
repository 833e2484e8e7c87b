"""Synthetic pairs in the files of the Materials Project."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from zarrcache.demo.synthetic import SyntheticPair, make_pair

__all__ = ["write_json_pairs"]


def write_json_pairs(directory: Path, n: int, seed: int = 0) -> list[str]:
    """As ``write_pairs``, to ``<task_id>.json.gz``."""
    task_ids = []
    for index in range(n):
        pair = make_pair(seed, index)
        for role, values in (("input", pair.data), ("label", pair.label)):
            path = directory / role / f"{pair.task_id}.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_mp_json(pair, values))
        task_ids.append(pair.task_id)
    return task_ids


def _mp_json(pair: SyntheticPair, values: NDArray[Any]) -> bytes:
    """The layout of ``s3://materialsproject-parsed/chgcars/<task_id>.json.gz``."""
    chgcar = {
        "@module": "pymatgen.io.vasp.outputs",
        "@class": "Chgcar",
        "data": {
            "total": {
                "@module": "numpy",
                "@class": "array",
                "dtype": "float64",
                "data": values.tolist(),
            }
        },
        "data_aug": {"total": []},
        "poscar": {
            "@module": "pymatgen.io.vasp.inputs",
            "@class": "Poscar",
            "structure": pair.structure,
            "comment": pair.task_id,
        },
    }
    return gzip.compress(json.dumps({"task_id": pair.task_id, "data": chgcar}).encode(), 1, mtime=0)
