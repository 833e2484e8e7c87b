"""Synthetic densities resemble real ones and are read by the converter and pymatgen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.mpjson import write_json_pairs
from zarrcache.convert.density import read_density
from zarrcache.demo.synthetic import make_pair, write_pairs

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")


@pytest.mark.parametrize("index", range(8))
def test_a_pair_resembles_a_calculation(index: int) -> None:
    """Both densities hold every valence electron, are positive except for ripples, and differ as
    much as real pairs.
    """
    pair = make_pair(0, index)
    assert pair.data.shape == pair.label.shape
    for values in (pair.data, pair.label):
        assert abs(values.mean() - pair.electrons) < 1e-4
        assert values.min() > -0.01 * values.max()
    assert 0.02 < np.abs(pair.data - pair.label).sum() / np.abs(pair.label).sum() < 0.26
    assert 1 <= len(pair.structure["sites"]) <= pair.electrons


def test_a_pair_depends_on_seed_and_index_alone() -> None:
    again = make_pair(3, 1)
    make_pair(3, 0)
    assert np.array_equal(make_pair(3, 1).label, again.label)
    assert make_pair(3, 1).structure == again.structure
    assert make_pair(3, 2).structure != again.structure
    assert make_pair(4, 1).structure != again.structure


def test_grids_differ_in_shape_and_some_are_cubic() -> None:
    shapes = {make_pair(0, index).data.shape for index in range(16)}
    assert len(shapes) >= 8
    assert any(len(set(shape)) == 1 for shape in shapes)
    assert all(24 <= n <= 60 for shape in shapes for n in shape)


def test_the_structure_survives_the_round_trip_of_pymatgen() -> None:
    from pymatgen.core import Structure

    pair = make_pair(5, 2)
    structure = Structure.from_dict(pair.structure)
    assert len(structure) == len(pair.structure["sites"])
    assert np.allclose(structure.cart_coords, [site["xyz"] for site in pair.structure["sites"]])
    assert sum(site.specie.Z for site in structure) >= pair.electrons


@pytest.mark.parametrize(("write", "end"), [(write_pairs, "CHGCAR"), (write_json_pairs, "json.gz")])
def test_the_converter_reads_written_pairs_without_a_warning(
    tmp_path: Path, write: Callable[..., list[str]], end: str
) -> None:
    """To the last digit of float32."""
    task_ids = write(tmp_path, 2, seed=1)
    assert task_ids == ["syn-1-0000", "syn-1-0001"]
    for index, task_id in enumerate(task_ids):
        pair = make_pair(1, index)
        for role, values in (("input", pair.data), ("label", pair.label)):
            density = read_density(tmp_path / role / f"{task_id}.{end}")
            assert density.warnings == ()
            assert np.allclose(density.total, values, rtol=1e-6, atol=0)
            assert [site["label"] for site in density.structure["sites"]] == [
                site["label"] for site in pair.structure["sites"]
            ]


def test_pymatgen_reads_the_same_grid_from_the_text(tmp_path: Path) -> None:
    from pymatgen.io.vasp.outputs import Chgcar

    (task_id,) = write_pairs(tmp_path, 1, seed=8)
    total = Chgcar.from_file(str(tmp_path / "label" / f"{task_id}.CHGCAR")).data["total"]
    assert np.allclose(total, make_pair(8, 0).label, rtol=1e-10, atol=0)
