"""Real files of the Materials Project, read as they lie, against pymatgen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zarrcache import ZarrS3Reader, plan_warm
from zarrcache.errors import ConfigError, SchemaError

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")


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


def test_real_labels_have_the_spin_density_as_a_second_channel(
    pairs: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    """The inputs have none. The values are those of pymatgen, per volume."""
    from monty.serialization import loadfn
    from pymatgen.io.vasp.outputs import Chgcar

    both = ("total", "diff")
    with pytest.raises(ConfigError, match=r"6 of 6 materials lack diff \(data\).*data: \.\.\."):
        make_reader(density_type=both, cache={}).data_split()
    density_type = {"data": "total", "label": both}
    reader = make_reader(density_type=density_type, normalize="volume", cache={})
    for id_ in reader.task_ids:
        path = pairs / "label" / reader.store_name(id_, "label")
        chgcar = loadfn(path)["data"] if ".json" in path.name else Chgcar.from_file(str(path))
        values, gridsize = reader.load(id_, "label")
        for channel, name in zip(values, both, strict=True):
            expected = chgcar.data[name] / chgcar.structure.lattice.volume
            assert np.array_equal(channel.reshape(gridsize), expected.astype(np.float32))


def test_non_collinear_spin_is_never_taken_for_none(
    real_data: Path, tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    for role in ("data", "label"):
        for name in ("NO_soi", "NO_pol", "graphene"):
            target = tmp_path / role / f"{name}.CHGCAR.gz"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(real_data / "vasp" / f"{name}_CHGCAR.gz", target)
    ids = ["NO_pol", "graphene", "NO_soi"]
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    reader = make_reader(density_type=["total", "diff"], missing="zero", cache={})
    with pytest.raises(SchemaError, match="non-collinear"):
        reader.data_split()
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids[:2]}))
    reader = make_reader(density_type=["total", "diff"], missing="zero", cache={})
    zeros = {id_: not reader.load(id_, "label")[0][1].any() for id_ in reader.task_ids}
    assert zeros == {"NO_pol": False, "graphene": True}
    spin = ["total", "diff_x", "diff_y", "diff_z"]
    assert make_reader(density_type=spin, cache={}).load("NO_soi", "label")[0].shape[0] == 4
