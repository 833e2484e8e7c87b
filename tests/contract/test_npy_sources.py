"""Training from the numpy files of QM9, as electrai keeps them, and from stores made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.s3server import S3Server
from zarrcache import ZarrS3Reader, plan_warm
from zarrcache.config import DataConfig
from zarrcache.convert.plan import convert_directory
from zarrcache.errors import SchemaError
from zarrcache.ops import find_ids, read_status, verify

IDS = ["dsgdb9nsd_000001", "dsgdb9nsd_000002", "dsgdb9nsd_000010"]
XYZ = "2\n\nC 2.0 2.0 2.0\nH 3.0 2.0 1.5*^0\n"


def write_molecule(
    path: Path, shape: tuple[int, int, int] = (6, 5, 4), *, seed: int = 0, has_box: bool = True
) -> np.ndarray[Any, Any]:
    """One directory as the users' PySCF script writes it; the flat density, e per cubic bohr."""
    path.mkdir(parents=True)
    box = np.array([4.2, 3.9, 3.8])
    rho = np.random.default_rng(seed).random(int(np.prod(shape)))
    rho *= 5 / (rho.mean() * np.prod(box) * 1.88973**3)  # five electrons
    np.save(path / "rho_22.npy", rho)
    np.savetxt(path / "grid_sizes_22.dat", shape, fmt="%d")
    np.save(path / "dm_22.npy", np.eye(3))
    if has_box:
        np.savetxt(path / "box.dat", np.diag(box))
        (path / "centered.xyz").write_text(XYZ)
    return rho


@pytest.fixture
def molecules(tmp_path: Path) -> Path:
    for role in ("data", "label"):
        for n, id_ in enumerate(IDS):
            write_molecule(tmp_path / role / id_, (6, 5, 4 + n), seed=n)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    return tmp_path


@pytest.mark.parametrize("on_s3", [True, False])
def test_values_per_volume_are_those_of_the_users_loader(
    molecules: Path,
    make_reader: Callable[..., ZarrS3Reader],
    s3_server: S3Server,
    bucket: str,
    on_s3: bool,
) -> None:
    """Bit for bit: the file's values times 1.88973**3 in float64, cast once."""
    if on_s3:
        for role in ("data", "label"):
            s3_server.put_tree(molecules / role, f"s3://{bucket}/{role}")
    reader = make_reader(
        url=f"s3://{bucket}" if on_s3 else None,
        s3_kwargs=s3_server.s3_kwargs if on_s3 else None,
        normalize="volume",
        cache={},
    )
    assert plan_warm(reader).execute().warm == 3
    for id_ in IDS:
        directory = molecules / "label" / id_
        shape = np.loadtxt(directory / "grid_sizes_22.dat", dtype=int)
        expected = np.load(directory / "rho_22.npy").reshape(shape) * 1.88973**3
        for _ in range(2):
            values, gridsize = reader.load(id_, "label")
            assert np.array_equal(values.reshape(gridsize), expected.astype(np.float32))


@pytest.mark.parametrize("normalize", [False, True])
def test_files_give_the_bits_of_the_stores_made_from_them(
    molecules: Path, tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], normalize: bool
) -> None:
    """The mean, or the sum, is the number of electrons."""
    pytest.importorskip("pymatgen.core", reason="needs the extra 'convert'")
    for role in ("data", "label"):
        report = convert_directory(molecules / role, tmp_path / "zarr" / role, workers=1)
        assert [result.warnings for result in report.converted] == [()] * 3
    direct = make_reader(normalize=normalize)
    converted = make_reader(data_dir=tmp_path / "zarr/data", label_dir=tmp_path / "zarr/label")
    converted.normalize = normalize
    assert direct.task_ids == converted.task_ids == IDS
    for id_ in IDS:
        values, gridsize = direct.load(id_, "label")
        expected, shape = converted.load(id_, "label")
        assert gridsize == shape
        assert np.array_equal(values, expected)
        electrons = values.sum(dtype=np.float64) if normalize else values.mean(dtype=np.float64)
        assert electrons == pytest.approx(5, abs=1e-4)
    metadata = converted.get_metadata(
        converted.read_zarr_store(tmp_path / "zarr/data" / f"{IDS[0]}.zarr")
    )
    assert metadata["formula"] == "H1 C1"


def test_every_command_works_on_numpy_files(molecules: Path) -> None:
    """A changed file makes its density stale; one that is not read does not."""
    config = DataConfig.of(
        {
            "data_dir": str(molecules / "data"),
            "label_dir": str(molecules / "label"),
            "map_dir": str(molecules / "map.json"),
            "functional": "GGA",
            "normalize_data": "volume",
            "cache": {"dir": molecules / "cache", "min_free": 0},
        }
    )
    assert find_ids([str(molecules / "data")]).ids == tuple(IDS)
    assert plan_warm(config).execute().warm == 3
    coverage = read_status(config).coverage
    assert coverage is not None
    assert coverage.warm == 3
    (molecules / "data" / IDS[0] / "energy_22.dat").write_text("-1.0\n")
    assert verify(config, against_origin=True).stale == ()
    np.save(molecules / "data" / IDS[0] / "rho_22.npy", np.ones(120))
    assert len(verify(config, against_origin=True).stale) == 1
    assert plan_warm(config, revalidate=True).execute().fresh == 2


def test_other_directory_names_are_read_when_source_is_directory(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    for role in ("data", "label"):
        write_molecule(tmp_path / role / "mp-1245_Sr2N")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1245_Sr2N"]}))
    assert make_reader().missing == ("mp-1245_Sr2N",)
    reader = make_reader(source="directory", normalize="volume")
    assert reader.load("mp-1245_Sr2N", "data")[1] == (6, 5, 4)


def test_a_density_without_a_box_has_values_per_volume_only(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    """As the users' inputs: they have no box, and convert names it."""
    for role in ("data", "label"):
        write_molecule(tmp_path / role / IDS[0], has_box=False)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS[:1]}))
    assert make_reader(normalize="volume").load(IDS[0], "data")[1] == (6, 5, 4)
    with pytest.raises(SchemaError, match=r"does not say the volume.*normalize_data: volume"):
        make_reader(normalize=True).load(IDS[0], "data")
    report = convert_directory(tmp_path / "data", tmp_path / "zarr", workers=1)
    assert "has no box.npy or box.dat beside it" in str(report.failed[0].error)


def _no_grid(path: Path) -> None:
    (path / "grid_sizes_22.dat").unlink()


def _other_grid(path: Path) -> None:
    (path / "grid_sizes_22.dat").write_text("6\n5\n5\n")


def _other_axes(path: Path) -> None:
    np.save(path / "rho_22.npy", np.load(path / "rho_22.npy").reshape(5, 6, 4))


def _words(path: Path) -> None:
    (path / "grid_sizes_22.dat").write_text("six\n")


def _cut(path: Path) -> None:
    raw = (path / "rho_22.npy").read_bytes()
    (path / "rho_22.npy").write_bytes(raw[:-8])


def _pickled(path: Path) -> None:
    np.save(path / "rho_22.npy", np.array([{}], dtype=object), allow_pickle=True)


def _no_density(path: Path) -> None:
    (path / "rho_22.npy").unlink()


def _several(path: Path) -> None:
    (path / "rho_22.npy").rename(path / "rho_11.npy")
    np.save(path / "rho_21.npy", np.ones(3))


def _not_finite(path: Path) -> None:
    np.save(path / "rho_22.npy", np.full(120, np.nan))


def _flat_box(path: Path) -> None:
    (path / "box.dat").write_text("1 0 0\n1 0 0\n0 0 1\n")


def _atoms(path: Path) -> None:
    (path / "centered.xyz").write_text("3\n\nC 0 0 0\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_grid, r"rho_22\.npy has the shape \(120,\), and there is no grid_sizes"),
        (_other_grid, "says 6 x 5 x 5, which is 150 points, and rho_22.npy holds 120"),
        (_other_axes, r"rho_22.npy holds 120 in the shape \(5, 6, 4\)"),
        (_words, "does not hold numbers"),
        (_cut, r"rho_22\.npy is not a complete \.npy file"),
        (_pickled, r"rho_22\.npy is not a complete \.npy file"),
        (_no_density, r"nor rho_\*\.npy"),
        (_several, "several densities: rho_11.npy, rho_21.npy"),
        (_not_finite, "120 of 120 values of total are NaN"),
        (_flat_box, "does not hold the edges of a box"),
        (_atoms, "it announces 3 atoms and has 1"),
    ],
)
def test_files_that_do_not_fit_together_are_named(
    molecules: Path,
    make_reader: Callable[..., ZarrS3Reader],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    damage(molecules / "data" / IDS[0])
    with pytest.raises(SchemaError, match=f"{IDS[0]}.*{words}"):
        make_reader(normalize=True).load(IDS[0], "data")
    report = plan_warm(make_reader(normalize=True, cache={})).execute()
    assert (report.warm, report.failed_ids) == (2, (IDS[0],))


def test_the_lattice_of_extended_xyz_is_a_box(
    molecules: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    """Three-dimensional densities need no file for the grid."""
    path = molecules / "data" / IDS[0]
    expected, _ = make_reader(normalize=True).load(IDS[0], "data")
    lines = XYZ.splitlines()
    lines[1] = 'Lattice="4.2 0 0 0 3.9 0 0 0 3.8" Properties=species:S:1:pos:R:3'
    (path / "centered.xyz").unlink()
    (path / "molecule.xyz").write_text("\n".join(lines))
    (path / "box.dat").unlink()
    np.save(path / "rho_22.npy", np.asfortranarray(np.load(path / "rho_22.npy").reshape(6, 5, 4)))
    (path / "grid_sizes_22.dat").unlink()
    values, gridsize = make_reader(normalize=True).load(IDS[0], "data")
    assert gridsize == (6, 5, 4)
    assert np.array_equal(values, expected)
