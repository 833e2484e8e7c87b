"""Real files of the Materials Project, read as they lie, against pymatgen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zarrcache import ZarrS3Reader, plan_warm

pytest.importorskip("pymatgen.io.vasp.outputs", reason="needs the extra 'convert'")


@pytest.fixture
def pairs(real_data: Path, tmp_path: Path) -> Path:
    """Inputs and labels in two directories, CHGCAR and json.gz, and their map."""
    for role, folders in (("data", ("half/input", "input")), ("label", ("half/label", "jsongz"))):
        (tmp_path / role).mkdir()
        for folder in folders:
            for path in (real_data / "mp" / folder).iterdir():
                shutil.copy(path, tmp_path / role)
    ids = sorted({path.name.partition(".")[0] for path in (tmp_path / "data").iterdir()})
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    return tmp_path


@pytest.mark.parametrize("normalize", [False, "volume"])
def test_real_files_give_the_values_of_pymatgen(
    pairs: Path, make_reader: Callable[..., ZarrS3Reader], normalize: bool | str
) -> None:
    """In float64 divided by the volume of pymatgen's lattice, cast once; from the cache too."""
    from monty.serialization import loadfn
    from pymatgen.io.vasp.outputs import Chgcar

    reader = make_reader(normalize=normalize, cache={})
    assert plan_warm(reader, workers=1).execute().warm == len(reader.task_ids) == 6
    for id_ in reader.task_ids:
        for role in ("data", "label"):
            path = pairs / role / reader.store_name(id_, role)
            is_json = ".json" in path.name
            chgcar = loadfn(path)["data"] if is_json else Chgcar.from_file(str(path))
            expected = chgcar.data["total"]
            if normalize:
                expected = expected / chgcar.structure.lattice.volume
            values, gridsize = reader.load(id_, role)
            assert np.array_equal(values.reshape(gridsize), expected.astype(np.float32))
