"""``zarrcache audit``: every planted fault is found, and nothing in good data."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support.stores import small_group
from tests.support.training import write_config, zarrcache

DATA = Path(__file__).parents[3] / "shared" / "data"
ELECTRONS = 8
STRUCTURE = {
    "lattice": {"matrix": [[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]], "volume": 27.0},
    "sites": [{"species": [{"element": "Si", "occu": 1}], "abc": [0, 0, 0]}] * 2,
}


def density(seed: int, shape: tuple[int, ...] = (6, 6, 8), electrons: float = ELECTRONS) -> Any:
    """Positive values with a mean of ``electrons``."""
    values = np.random.default_rng(seed).random(shape) + 0.1
    return (values * electrons / values.mean()).astype(np.float32)


def put(directory: Path, role: str, task_id: str, values: Any, **options: Any) -> None:
    """Write a store, in place of one that is there."""
    shutil.rmtree(directory / role / f"{task_id}.zarr", ignore_errors=True)
    small_group(
        directory / role / f"{task_id}.zarr",
        {"charge_density_total": values},
        attrs={"structure": json.dumps(STRUCTURE)},
        **options,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good pairs, one of them with an input of half the grid."""
    directory = tmp_path_factory.mktemp("audit")
    for number in range(6):
        data = density(number, (3, 3, 4) if number == 5 else (6, 6, 8))
        put(directory, "data", f"mp-{number}", data)
        put(directory, "label", f"mp-{number}", density(100 + number))
    (directory / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(6)]}))
    return directory


@pytest.fixture
def planted(good: Path, tmp_path: Path) -> Path:
    """A copy of the good pairs, to plant a fault in."""
    shutil.copytree(good, tmp_path / "planted")
    return tmp_path / "planted"


def test_good_pairs_have_no_finding(good: Path) -> None:
    for units in (True, False, "volume"):
        path = write_config(good, name="audit.yaml")
        document = yaml.safe_load(path.read_text()) | {"normalize_data": units}
        path.write_text(yaml.safe_dump(document))
        done = zarrcache("audit", path)
        assert (done.code, done.err) == (0, ""), done
        assert done.out.startswith("Nothing is wrong with 6 pairs (")


def nan(directory: Path, id_: str) -> None:
    values = density(102)
    values[1, 2, 3] = np.nan
    put(directory, "label", id_, values)


def potential(directory: Path, id_: str) -> None:
    put(directory, "label", id_, -density(1))


def shifted_potential(directory: Path, id_: str) -> None:
    values = density(1)
    put(directory, "data", id_, values - 0.99 * values.mean())


def constant(directory: Path, id_: str) -> None:
    put(directory, "data", id_, np.full((6, 6, 8), 8, np.float32))


def other_grid(directory: Path, id_: str) -> None:
    put(directory, "label", id_, density(3, (6, 6, 9)))


def half_of_two_axes(directory: Path, id_: str) -> None:
    put(directory, "data", id_, density(3, (3, 3, 8)))


def one_axis_finer_one_coarser(directory: Path, id_: str) -> None:
    put(directory, "data", id_, density(3, (3, 6, 16)))
    put(directory, "label", id_, density(3, (6, 3, 8)))


def fewer_electrons(directory: Path, id_: str) -> None:
    put(directory, "data", id_, density(3, electrons=ELECTRONS - 1))


def slightly_fewer_electrons(directory: Path, id_: str) -> None:
    put(directory, "data", id_, density(3, electrons=ELECTRONS - 0.1))


def too_many_electrons(directory: Path, id_: str) -> None:
    for role in ("data", "label"):
        put(directory, role, id_, density(3 + len(role), electrons=30))


def too_few_electrons(directory: Path, id_: str) -> None:
    for role in ("data", "label"):
        put(directory, role, id_, density(3 + len(role), electrons=5))


def half_an_electron(directory: Path, id_: str) -> None:
    for role in ("data", "label"):
        put(directory, role, id_, density(3 + len(role), electrons=8.5))


def negative(directory: Path, id_: str) -> None:
    values = density(1)
    values[0] -= 10
    put(directory, "label", id_, values * np.float32(ELECTRONS / values.mean()))


def duplicate(directory: Path, id_: str) -> None:
    put(directory, "label", id_, density(101))


def lost_chunk(directory: Path, id_: str) -> None:
    [chunk] = (directory / "label" / f"{id_}.zarr" / "charge_density_total").glob("1.0.1")
    chunk.unlink()


def damaged_chunk(directory: Path, id_: str) -> None:
    [chunk] = (directory / "label" / f"{id_}.zarr" / "charge_density_total").glob("0.0.0")
    chunk.write_bytes(b"\x00" * 7)


FAULTS: tuple[tuple[Callable[[Path, str], None], str, str], ...] = (
    (nan, "not finite", r"1 of 288 values are NaN or infinite"),
    (potential, "potential", r"its mean is -0\.02778"),
    (shifted_potential, "potential", r"its minimum -"),
    (constant, "constant", r"all 288 values are 8|all 288 values are 0\.02"),
    (other_grid, "grids", r"input and label are 6x6x8 and 6x6x9"),
    (half_of_two_axes, "grids", r"3x3x8 and 6x6x8"),
    (one_axis_finer_one_coarser, "grids", r"3x6x16 and 6x3x8"),
    (fewer_electrons, "electrons", r"input has 7\.00 electrons, label 8\.00"),
    (slightly_fewer_electrons, "electrons", r"input has 7\.90 electrons, label 8\.00"),
    (too_many_electrons, "valence", r"30\.00 electrons; .* 8 valence .* 28 protons"),
    (too_few_electrons, "valence", r"it has 5\.00 electrons"),
    (half_an_electron, "fraction", r"it has 8\.5000 electrons"),
    (negative, "negative", r"negative values sum up to \d+"),
    (duplicate, "duplicate", r"it has the values of mp-1"),
    (lost_chunk, "unreadable", r"1 of 8 chunks are absent"),
    (damaged_chunk, "unreadable", r"0\.0\.0"),
)


def id_of(plant: Callable[[Path, str], None]) -> str:
    return "planted-" + plant.__name__.replace("_", "-")


@pytest.fixture(scope="module")
def audited(good: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What the audit of the good pairs, and of a pair for each fault, prints: JSON, text."""
    directory = tmp_path_factory.mktemp("planted") / "pairs"
    shutil.copytree(good, directory)
    for number, (plant, _, _) in enumerate(FAULTS):
        id_ = id_of(plant)
        put(directory, "data", id_, density(200 + number))
        put(directory, "label", id_, density(300 + number))
        plant(directory, id_)
    ids = [path.name.removesuffix(".zarr") for path in (directory / "data").iterdir()]
    (directory / "map.json").write_text(json.dumps({"GGA": sorted(ids)}))
    config = write_config(directory)
    return zarrcache("audit", config, "--json"), zarrcache("audit", config)


@pytest.mark.parametrize(("plant", "kind", "message"), FAULTS)
def test_a_planted_fault_is_found(
    audited: tuple[Any, Any], plant: Callable[[Path, str], None], kind: str, message: str
) -> None:
    id_ = id_of(plant)
    done, text = audited
    assert {one["kind"] for one in done.document["findings"] if one["task_id"] == id_} == {kind}
    assert re.search(rf"{id_}\b.*(?:{message})", text.out), text.out


def test_nothing_else_is_a_finding(audited: tuple[Any, Any]) -> None:
    done, text = audited
    assert (done.code, text.code) == (1, 1)
    assert {one["task_id"] for one in done.document["findings"]} == {
        id_of(plant) for plant, _, _ in FAULTS
    }
    assert done.document["counts"].keys() == {kind for _, kind, _ in FAULTS}


def test_spin_densities_may_be_negative_and_have_any_sum(tmp_path: Path) -> None:
    for number in range(2):
        for role in ("data", "label"):
            values = density(number + len(role)) - ELECTRONS
            small_group(tmp_path / role / f"mp-{number}.zarr", {"charge_density_diff": values})
    (tmp_path / "map.json").write_text('{"GGA": ["mp-0", "mp-1"]}')
    path = write_config(tmp_path)
    path.write_text(path.read_text() + "density_type: diff\n")
    assert zarrcache("audit", path).code == 0


def test_the_page_shows_the_worst_pairs_and_fetches_nothing(planted: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    put(planted, "label", "mp-2", density(101))
    page = planted / "audit.html"
    done = zarrcache("audit", write_config(planted), "--html", page)
    assert (done.code, done.err.splitlines()[-1]) == (1, f"wrote {page}")
    text = page.read_text()
    assert "it has the values of mp-1" in text
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    [picture] = re.findall(r"data:image/png;base64,([^\"]+)", text)
    image_module.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert zarrcache("audit", write_config(planted), "--html", "/nowhere/a.html").code == 2


@pytest.mark.parametrize("command", ["audit", "lock"])
def test_a_config_without_pairs_is_an_error_and_not_a_clean_report(
    good: Path, tmp_path: Path, command: str
) -> None:
    path = write_config(good, name="none.yaml")
    document = yaml.safe_load(path.read_text()) | {"map_dir": str(tmp_path / "none.json")}
    path.write_text(yaml.safe_dump(document))
    (tmp_path / "none.json").write_text('{"GGA": ["mp-77"]}')
    output = ["-o", tmp_path / "out"] if command == "lock" else []
    done = zarrcache(command, path, *output)
    assert (done.code, done.out) == (2, "")
    assert "error: no material of GGA has input and label. Check functional and map_dir" in done.err
    assert not (tmp_path / "out").exists()


def test_ids_narrow_the_audit_and_unknown_ones_are_findings(planted: Path) -> None:
    (planted / "ids").write_text("mp-1\nmp-99\n")
    done = zarrcache("audit", write_config(planted), "--ids", planted / "ids", "--json")
    assert done.document["materials"] == 2
    assert {(one["kind"], one["task_id"]) for one in done.document["findings"]} == {
        ("unreadable", "mp-99")
    }


@pytest.mark.skipif(not DATA.is_dir(), reason="the real densities are not here")
def test_of_real_pairs_only_the_bad_one_is_named(tmp_path: Path) -> None:
    """Its input has 4 electrons, its label 16."""
    for role in ("input", "label"):
        source = DATA / "mp" / "half" / role
        assert zarrcache("convert", source, tmp_path / role).code == 0
    names = [path.name.removesuffix(".zarr") for path in (tmp_path / "input").iterdir()]
    (tmp_path / "map.json").write_text(json.dumps({"GGA": names}))
    path = write_config(tmp_path)
    document = yaml.safe_load(path.read_text()) | {"data_dir": str(tmp_path / "input")}
    path.write_text(yaml.safe_dump(document))
    done = zarrcache("audit", path, "--json")
    assert [(one["kind"], one["task_id"]) for one in done.document["findings"]] == [
        ("electrons", "mp-2375532")
    ]
