"""Densities per cell, per grid point and per volume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.support.stores import STRUCTURE, random_density, small_group
from zarrcache import ZarrS3Reader
from zarrcache._keys import units_of
from zarrcache.arrays.density import cell_volume, in_units, lattice_volume
from zarrcache.errors import ConfigError, IncompleteArrayError, SchemaError

NAME = "charge_density_total"
VOLUME = 3.8**3


def _lattice(matrix: Any) -> dict[str, Any]:
    return {"structure": {"lattice": {"matrix": matrix}}}


def test_the_volume_is_that_of_pymatgen_bit_for_bit() -> None:
    core = pytest.importorskip("pymatgen.core")
    draw = np.random.default_rng(5)
    for _ in range(200):
        structure = core.Structure(core.Lattice(draw.normal(size=(3, 3)) * 7), ["Si"], [[0, 0, 0]])
        written = json.loads(json.dumps(structure.as_dict()))
        assert lattice_volume(written) == structure.lattice.volume
        assert lattice_volume(written) == core.Structure.from_dict(written).lattice.volume


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({}, "it has no attribute 'structure'"),
        ({"structure": None}, "it has no attribute 'structure'"),
        ({"structure": "{"}, "its structure has no lattice"),
        ({"structure": {"sites": []}}, "its structure has no lattice"),
        ({"structure": {"lattice": [1, 2, 3]}}, "its structure has no lattice"),
        ({"structure": {"lattice": {"a": 3.0}}}, "no matrix of three finite vectors"),
        (_lattice([[1, 2], [3, 4]]), "no matrix of three finite vectors"),
        (_lattice([["x", 0, 0], [0, 1, 0], [0, 0, 1]]), "no matrix of three finite vectors"),
        (_lattice([[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]]), "no matrix of three finite"),
        (_lattice([[1, 0, 0], [0, 1, 0], [1, 1, 0]]), "has the volume 0 cubic angstrom"),
        (_lattice([[0, 0, 0], [0, 0, 0], [0, 0, 0]]), "has the volume 0 cubic angstrom"),
        (_lattice([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.5, 0.7, 0.9]]), "has the volume"),
        (_lattice([[1e200, 0, 0], [0, 1e200, 0], [0, 0, 1e200]]), "has the volume inf"),
    ],
)
def test_a_cell_without_a_volume_is_refused_by_name(attributes: Any, why: str) -> None:
    with pytest.raises(SchemaError, match=rf"s3://b/mp-1.zarr: .*{why}.*set normalize_data"):
        cell_volume(attributes, "s3://b/mp-1.zarr")


def test_the_structure_may_be_inside_the_metadata_and_text() -> None:
    metadata = {"structure": json.dumps(STRUCTURE)}
    assert cell_volume({"metadata": json.dumps(metadata)}, "url") == pytest.approx(VOLUME)


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<i4", "<f2"])
def test_values_per_volume_are_divided_in_float64_and_rounded_once(dtype: str) -> None:
    values = (random_density((6, 5, 4)) * 100).astype(dtype)
    attributes = {"structure": json.dumps(STRUCTURE)}
    expected = (values.astype(np.float64) / cell_volume(attributes, "url")).astype(np.float32)
    for array in (values.copy(), np.asfortranarray(values)):
        assert np.array_equal(in_units(array, "volume", attributes, "url", NAME), expected)


def test_float32_values_per_volume_differ_by_at_most_one_unit_in_the_last_place() -> None:
    """Of those computed from float64; so do values per cell of a store per volume."""
    exact = np.random.default_rng(1).random((40, 40, 40)) * 10.0 ** np.arange(-20, 20)
    attributes = {"structure": STRUCTURE}
    volume = cell_volume(attributes, "url")
    single = in_units(exact.astype(np.float32), "volume", attributes, "url", NAME)
    per_volume = (exact / volume).astype(np.float32)
    assert _ulps(single, per_volume) == 1
    stored = {**attributes, "charge_density_units": "volume"}
    back = in_units(per_volume.copy(), "cell", stored, "url", NAME)
    assert _ulps(back, exact.astype(np.float32)) == 1


def _ulps(one: Any, other: Any) -> int:
    return int(np.abs(one.view(np.int32).astype(np.int64) - other.view(np.int32)).max())


def test_a_store_per_volume_is_never_divided_again() -> None:
    values = random_density((4, 4, 4))
    stored = {"structure": STRUCTURE, "charge_density_units": "volume"}
    assert np.array_equal(in_units(values.copy(), "volume", stored, "url", NAME), values)
    # The cell is not needed then.
    bare = {"charge_density_units": "volume"}
    assert np.array_equal(in_units(values.copy(), "volume", bare, "url", NAME), values)
    with pytest.raises(SchemaError, match="has no attribute"):
        in_units(values, "cell", bare, "url", NAME)
    with pytest.raises(SchemaError, match=r"charge_density_units: .bohr.; known are .cell."):
        in_units(values, "cell", {"charge_density_units": "bohr"}, "url", NAME)


def test_an_array_that_is_no_density_has_no_units() -> None:
    values = random_density((4, 4, 4))
    assert in_units(values, "volume", {}, "url", "elf") is values


@pytest.mark.parametrize("value", ["Volume", "cell", "", "true"])
def test_only_known_units_are_accepted(value: Any, make_reader: Any) -> None:
    with pytest.raises(ConfigError, match=r"normalize is .* true or points .* or volume"):
        units_of(value)
    with pytest.raises(ConfigError):
        make_reader(normalize=value)


# -- through the reader ---------------------------------------------------------------------------


@pytest.fixture(params=["zarr2", "zarr3", "zip"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Stores of float64 with a stated number of electrons; their values."""
    as_zip = request.param == "zip"
    values = random_density((12, 10, 8), "float64")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", "mp-2"]}))
    for role in ("data", "label"):
        for name in ("mp-1", "mp-2"):
            small_group(
                tmp_path / role / f"{name}.zarr{'.zip' if as_zip else ''}",
                {NAME: values, "charge_density_diff": -values},
                zarr_format=3 if request.param == "zarr3" else 2,
                as_zip=as_zip,
                metadata={"electrons": float(values.mean())},
            )
    return values


@pytest.mark.parametrize("density_type", ["total", "diff"])
@pytest.mark.parametrize("cache", [None, {}, {"arrays": {"enabled": False}}])
def test_the_reader_gives_each_unit_and_keeps_their_entries_apart(
    pair: Any, make_reader: Any, cache: Any, density_type: str
) -> None:
    sign = -1 if density_type == "diff" else 1
    single = (sign * pair).astype(np.float32)
    expected = {
        False: single,
        True: single / np.float32(single.size),
        "points": single / np.float32(single.size),
        "volume": (sign * pair / lattice_volume(STRUCTURE)).astype(np.float32),
    }
    for _ in range(2):
        for normalize, values in expected.items():
            reader: ZarrS3Reader = make_reader(
                cache=cache, normalize=normalize, density_type=density_type
            )
            found, shape = reader.load("mp-1", "data")
            assert np.array_equal(found.reshape(shape), values), normalize
            store = reader.origin("label").url_of(reader.store_name("mp-1", "label"))
            group = reader.read_zarr_store(store)
            assert np.array_equal(reader.read_charge_density(group)[0].reshape(shape), values)
            plain = zarr.open_group(group.store, mode="r")
            assert np.array_equal(reader.read_charge_density(plain)[0].reshape(shape), values)
    if cache == {}:
        assert reader.stats.misses == 0
        stored = {
            normalize: make_reader(cache=cache, normalize=normalize).key("mp-1", "data").digest
            for normalize in expected
        }
        assert len(set(stored.values())) == 3
        assert stored[True] == stored["points"]


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_changed_lattice_makes_entries_stale(
    tmp_path: Path, make_reader: Any, zarr_format: Any
) -> None:
    """Those per cell too, whose values depend on it if the store is per volume."""
    path = tmp_path / "data" / "mp-1.zarr"
    values = small_group(path, zarr_format=zarr_format)[NAME]
    small_group(tmp_path / "label" / "mp-1.zarr")
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    readers = {n: make_reader(cache={}, normalize=n) for n in ("volume", False)}
    for reader in readers.values():
        assert reader.ensure("mp-1", "data")[0] == "miss"
    wider = json.loads(json.dumps(STRUCTURE).replace("3.8", "4.2"))
    zarr.open_group(path, mode="r+").attrs["structure"] = json.dumps(wider)
    assert readers["volume"].ensure("mp-1", "data")[0] == "miss"
    assert readers[False].ensure("mp-1", "data")[0] == "miss"
    expected = (values.astype(np.float64) / lattice_volume(wider)).astype(np.float32)
    assert np.array_equal(readers["volume"].load("mp-1", "data")[0], expected.reshape(-1))


def test_electrons_of_a_store_per_volume_are_compared(tmp_path: Path, make_reader: Any) -> None:
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    values = random_density((6, 6, 6))
    for factor, role in ((1.0, "data"), (1.1, "label")):
        electrons = factor * float(values.mean()) * lattice_volume(STRUCTURE)
        attributes = {
            "structure": json.dumps(STRUCTURE),
            "metadata": json.dumps({"electrons": electrons}),
            "charge_density_units": "volume",
        }
        small_group(tmp_path / role / "mp-1.zarr", {NAME: values}, attrs=attributes)
    reader = make_reader(cache={}, normalize="volume")
    assert np.array_equal(reader.load("mp-1", "data")[0], values.reshape(-1))
    with pytest.raises(IncompleteArrayError, match=r"its values hold .* electrons"):
        reader.load("mp-1", "label")
    per_cell = make_reader(cache={}, normalize=False).load("mp-1", "data")[0]
    assert per_cell.mean() == pytest.approx(values.mean() * lattice_volume(STRUCTURE))
