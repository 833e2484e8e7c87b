"""``RhoRead``: what one trains on before converting is what one trains on afterwards."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.chgcars import SMALL
from zarrcache import ZarrS3Reader
from zarrcache.convert.plan import convert_directory
from zarrcache.convert.rhoread import RhoRead
from zarrcache.demo.synthetic import make_pair, write_pairs
from zarrcache.errors import ConfigError, OriginNotFoundError, SchemaError

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five materials as text, one without a label, and a map that knows one more."""
    root = tmp_path_factory.mktemp("pairs")
    task_ids = write_pairs(root, 5, seed=SMALL)
    (root / "label" / f"{task_ids[4]}.CHGCAR").unlink()
    (root / "map.json").write_text(json.dumps({"GGA": [*reversed(task_ids), "mp-404"], "SCAN": []}))
    return root


def _reader(pairs: Path, **options: Any) -> RhoRead:
    arguments = {"functional": "GGA", "normalize": False, "train_fraction": 0.5, **options}
    return RhoRead(pairs / "input", pairs / "label", pairs / "map.json", **arguments)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_gives_what_the_zarr_reader_gives_after_conversion(
    pairs: Path, tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], normalize: bool
) -> None:
    """The same ids in the same order, the same bits."""
    for role in ("input", "label"):
        convert_directory(pairs / role, tmp_path / role, workers=1)
    before = _reader(pairs, normalize=normalize)
    after = make_reader(
        data_dir=tmp_path / "input", map_dir=pairs / "map.json", normalize=normalize
    )
    assert before.task_ids == after.task_ids
    assert before.missing == after.missing
    assert before.split_task_ids() == after.split_task_ids()
    for one, other in zip(before.data_split(), after.data_split(), strict=True):
        for ours, theirs in zip(one, other, strict=True):
            assert len(ours) == len(theirs) == 2
            for a, b in zip(ours, theirs, strict=True):
                assert np.array_equal(a, b)
                assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


def test_normalized_values_sum_up_to_the_electrons(pairs: Path) -> None:
    """Not normalized, their mean is the number of electrons."""
    values, gridsize = _reader(pairs, normalize=True).load(f"syn-{SMALL}-0001", "label")
    electrons = make_pair(SMALL, 1).electrons
    assert values.size == np.prod(gridsize)
    assert abs(values.sum(dtype=np.float64) - electrons) < 1e-4
    values, _ = _reader(pairs).load(f"syn-{SMALL}-0001", "label")
    assert abs(values.mean(dtype=np.float64) - electrons) < 1e-4
    assert values.dtype == np.float32
    assert values.flags.writeable


def test_missing_files_are_told_once_and_left_out(
    pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With their number and the first of them."""
    reader = _reader(pairs)
    with caplog.at_level(logging.WARNING, "zarrcache.convert.rhoread"):
        assert reader.task_ids == [f"syn-{SMALL}-000{n}" for n in (3, 2, 1, 0)]
        assert reader.missing == (f"syn-{SMALL}-0004", "mp-404")
        reader.data_split()
    (record,) = caplog.records
    assert "2 of 6 task ids of GGA have no file" in record.getMessage()
    assert f"syn-{SMALL}-0004, mp-404" in record.getMessage()


def test_the_registry_trains_from_files_under_the_users_keys(pairs: Path) -> None:
    """``chgcar_data``, and torch's dataset on top; lengths cost no read."""
    from zarrcache.registry import get_dataset
    from zarrcache.train.rho_data import RhoData

    cfg = SimpleNamespace(
        dataset_name="chgcar_data",
        data_dir=str(pairs / "input"),
        label_dir=str(pairs / "label"),
        map_dir=str(pairs / "map.json"),
        functional="GGA",
        normalize_data=True,
        train_fraction=0.5,
        random_state=3,
    )
    train_sets, test_sets = get_dataset(cfg)
    assert len(train_sets[0]) == len(test_sets[0]) == 2
    assert train_sets[0].reader.stats.requests == 0  # type: ignore[attr-defined]  # a script may print the counters, as the README's does
    data, label = RhoData(*train_sets, data_augmentation=False)[0]
    assert data.shape == label.shape == (1, *train_sets[2][0])
    assert np.array_equal(data.numpy().reshape(-1), train_sets[0][0])


def test_it_serves_the_lazy_dataset_and_spawned_workers(pairs: Path) -> None:
    """``ZarrDataset`` needs ``split_task_ids`` and ``load``; a pickle of the reader has both."""
    from zarrcache.train.datasets import ZarrDataset

    reader = pickle.loads(pickle.dumps(_reader(pairs)))
    dataset = ZarrDataset(reader, "all")
    sample = dataset[0]
    values, gridsize = reader.load(sample["index"], "label")
    assert np.array_equal(sample["label"].numpy(), values.reshape(1, *gridsize))


def test_a_reader_of_the_users_own_may_have_other_attributes(pairs: Path) -> None:
    """Of names that ours have for something else."""
    from zarrcache.train import RandomCrop, ZarrDataset

    class Own:
        def __init__(self) -> None:
            self.inner = _reader(pairs)
            self.grids, self.decide = {"mp-1": (4, 4, 4)}, "nothing"

        def split_task_ids(self) -> tuple[list[str], list[str]]:
            return self.inner.split_task_ids()

        def load(self, task_id: str, role: Any) -> Any:
            return self.inner.load(task_id, role)

    own = Own()
    ids = own.split_task_ids()[0]
    dataset = ZarrDataset(own, ids, transform=RandomCrop(2))
    assert dataset[0]["data"].shape == (1, 2, 2, 2)


def test_real_pairs_of_text_and_json_are_found_by_their_id(real_data: Path, tmp_path: Path) -> None:
    """Input as CHGCAR.gz, label as json.gz: the Materials Project's own forms."""
    from monty.serialization import loadfn
    from pymatgen.io.vasp.outputs import Chgcar

    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-2680643"]}))
    reader = RhoRead(
        real_data / "mp" / "input",
        real_data / "mp" / "jsongz",
        tmp_path / "map.json",
        "GGA",
        False,
        0.5,
    )
    assert reader.task_ids == ["mp-2680643"]
    data, gridsize = reader.load("mp-2680643", "data")
    assert gridsize == (60, 60, 60)
    expected = Chgcar.from_file(str(real_data / "mp" / "input" / "mp-2680643.CHGCAR.gz")).data[
        "total"
    ]
    assert np.array_equal(data.reshape(gridsize), expected.astype("float32"))
    label, gridsize = reader.load("mp-2680643", "label")
    expected = loadfn(real_data / "mp" / "jsongz" / "mp-2680643.json.gz")["data"].data["total"]
    assert np.array_equal(label.reshape(gridsize), expected.astype("float32"))


def test_a_spin_density_is_read_where_there_is_one(real_data: Path, tmp_path: Path) -> None:
    """Where there is none, the blocks that are there are named."""
    from pymatgen.io.vasp.outputs import Chgcar

    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-2458922"]}))
    half = real_data / "mp" / "half"
    reader = RhoRead(
        half / "input",
        half / "label",
        tmp_path / "map.json",
        "GGA",
        False,
        0.5,
        density_type="diff",
    )
    values, gridsize = reader.load("mp-2458922", "label")
    expected = Chgcar.from_file(str(half / "label" / "mp-2458922.CHGCAR")).data["diff"]
    assert np.array_equal(values.reshape(gridsize), expected.astype("float32"))
    with pytest.raises(
        SchemaError, match=r"input/mp-2458922\.CHGCAR has no diff density. It has: total"
    ):
        reader.load("mp-2458922", "data")


def test_a_density_that_looks_wrong_is_told_once(
    real_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in every epoch again."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["NO_soi"]}))
    shutil.copy(real_data / "vasp" / "NO_soi_CHGCAR.gz", tmp_path / "NO_soi.CHGCAR.gz")
    reader = RhoRead(tmp_path, tmp_path, tmp_path / "map.json", "GGA", False, 0.5)
    with caplog.at_level(logging.WARNING, "zarrcache.convert.rhoread"):
        for _ in range(3):
            reader.load("NO_soi", "data")
    assert [record.getMessage().count("is non-collinear") for record in caplog.records] == [1]


def test_a_potential_named_like_a_density_is_refused(real_data: Path, tmp_path: Path) -> None:
    """Whatever else its name says, as by the reader with a cache."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["Li_LOCPOT"]}))
    shutil.copy(real_data / "vasp" / "Li_LOCPOT.gz", tmp_path / "Li_LOCPOT.CHGCAR.gz")
    reader = RhoRead(tmp_path, tmp_path, tmp_path / "map.json", "GGA", False, 0.5)
    with pytest.raises(SchemaError, match="looks like a potential"):
        reader.load("Li_LOCPOT", "data")


def test_an_id_without_a_file_is_named(pairs: Path) -> None:
    """Also one that would leave the directory: only files that were found are opened."""
    for task_id in ("mp-404", f"../label/syn-{SMALL}-0000"):
        with pytest.raises(
            OriginNotFoundError, match=rf"input has no file of {task_id}\. It would be"
        ):
            _reader(pairs).load(task_id, "data")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"functional": "HSE"},
            r"'HSE' not found in mapping\. Available: \['GGA', 'SCAN'\].*/map\.json",
        ),
        ({"functional": "SCAN"}, "of 0 task ids of SCAN in .*, none has both"),
        ({"train_fraction": 1.5}, "Change train_fraction"),
    ],
)
def test_settings_that_cannot_be_used_say_what_can(
    pairs: Path, options: dict[str, Any], words: str
) -> None:
    """In the words of ``ZarrS3Reader``, for it is the same code."""
    with pytest.raises(ConfigError, match=words):
        _reader(pairs, **options).data_split()


def test_directories_have_to_be_local(pairs: Path, tmp_path: Path) -> None:
    """S3 is for converted stores; a directory that is not there is named."""
    with pytest.raises(
        ConfigError, match=r"s3://b/label is not a directory of this machine. .*convert"
    ):
        RhoRead(pairs / "input", "s3://b/label", pairs / "map.json", "GGA", True, 0.5)
    with pytest.raises(ConfigError, match="gone does not exist"):
        _ = RhoRead(
            pairs / "input", tmp_path / "gone", pairs / "map.json", "GGA", True, 0.5
        ).task_ids


def test_a_cache_that_would_do_nothing_is_told(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is accepted so that a config can be switched, and not passed over in silence."""
    with caplog.at_level(logging.WARNING, "zarrcache.convert.rhoread"):
        _reader(pairs, cache={"dir": str(tmp_path / "never-made")})
    assert "parsed at every read" in caplog.text
    assert not (tmp_path / "never-made").exists()


@pytest.mark.parametrize(
    "options", [{"units": "volume"}, {"dtype": "float64"}, {"units": "volume", "dtype": "float64"}]
)
def test_values_per_volume_are_those_of_pymatgen_through_stores_too(
    pairs: Path, tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], options: dict[str, Any]
) -> None:
    """``float64 total / structure.lattice.volume``, rounded once: from the file, and from stores
    per volume or of float64.
    """
    from pymatgen.io.vasp import Chgcar

    for role in ("input", "label"):
        convert_directory(pairs / role, tmp_path / role, workers=1, **options)
    before = _reader(pairs, normalize="volume")
    after = make_reader(
        data_dir=tmp_path / "input", map_dir=pairs / "map.json", normalize="volume", cache={}
    )
    for task_id in before.task_ids:
        chgcar = Chgcar.from_file(str(pairs / "label" / f"{task_id}.CHGCAR"))
        expected = (chgcar.data["total"] / chgcar.structure.lattice.volume).astype(np.float32)
        for reader in (before, after, after):
            values, shape = reader.load(task_id, "label")
            assert shape == expected.shape
            assert np.array_equal(values.reshape(shape), expected)
    per_cell = {normalize: _reader(pairs, normalize=normalize) for normalize in (True, False)}
    for normalize, reader in per_cell.items():
        other = make_reader(data_dir=tmp_path / "input", normalize=normalize)
        ours, theirs = (one.load(task_id, "data")[0] for one in (other, reader))
        assert np.allclose(ours, theirs, rtol=2.0**-22)
        assert options.get("units") or np.array_equal(ours, theirs)
