"""``zarrcache ls``: what is cached, by columns that scripts can read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.training import write_config, write_pairs, zarrcache


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three pairs; all are warm."""
    directory = tmp_path_factory.mktemp("ls")
    write_pairs(directory, 2)
    others = directory / "other"
    write_pairs(others, 11, shape=(8, 8, 8))
    for role in ("data", "label"):
        (others / role / "mp-10.zarr").rename(directory / role / "mp-10.zarr")
    (directory / "map.json").write_text('{"GGA": ["mp-0", "mp-1", "mp-10"]}')
    path = write_config(directory)
    assert zarrcache("warm", path).code == 0
    return path


def rows(*arguments: object) -> list[list[str]]:
    done = zarrcache("ls", *arguments)
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split() == ["ID", "ROLE", "ARRAY", "SHAPE", "BYTES", "UNITS", "ENCODING", "STORED"]
    return [line.split() for line in lines]


def test_each_density_is_a_line_with_its_role_shape_and_encoding(config: Path) -> None:
    found = rows(config)
    assert [row[:4] for row in found] == [
        [name, role, "total", shape]
        for name, shape in (("mp-0", "6x5x4"), ("mp-1", "6x5x4"), ("mp-10", "8x8x8"))
        for role in ("data", "label")
    ]
    # a size is two words: 4.5 KiB
    assert {tuple(row[6:8]) for row in found} == {("points", "float32")}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--match", "mp-1*"), {"mp-1", "mp-10"}),
        (("--match", "MP-1"), set()),
        (("--sort", "shape", "-r", "--match", "mp-1?"), {"mp-10"}),
    ],
)
def test_ids_are_chosen_by_a_pattern(
    config: Path, arguments: tuple[str, ...], names: set[str]
) -> None:
    assert {row[0] for row in rows(config, *arguments)} == names


def test_lines_are_sorted_by_any_column(config: Path) -> None:
    assert [row[3] for row in rows(config, "--sort", "shape", "--reverse")][:2] == ["8x8x8"] * 2
    assert [row[1] for row in rows(config, "--sort", "role")] == ["data"] * 3 + ["label"] * 3
    for column in ("bytes", "units", "encoding", "stored"):
        assert len(rows(config, "--sort", column)) == 6


def test_ids_of_a_file_and_json(config: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("mp-10\n")
    done = zarrcache("ls", config, "--ids", tmp_path / "ids", "--json")
    entries = done.document["entries"]
    assert [(e["task_id"], e["role"], e["shape"]) for e in entries] == [
        ("mp-10", "data", [8, 8, 8]),
        ("mp-10", "label", [8, 8, 8]),
    ]
    assert all(e["disk_bytes"] >= 4096 + 4 * 512 and e["stored_s"] > 1.7e9 for e in entries)
    assert {(e["array"], e["units"]) for e in entries} == {("charge_density_total", "points")}


def test_without_a_config_all_of_the_directory_is_listed(config: Path) -> None:
    directory = yaml.safe_load(config.read_text())["cache"]["dir"]
    assert rows("--dir", directory)[0][:2] == ["mp-0", "-"]
    assert len(rows("--dir", directory)) == 6


def test_a_damaged_header_is_listed_as_damaged(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "train.yaml"
    document = yaml.safe_load(config.read_text())
    document["cache"]["dir"] = str(tmp_path / "cache")
    other.write_text(yaml.safe_dump(document))
    assert zarrcache("warm", other).code == 0
    entries = [path for path in (tmp_path / "cache").rglob("entries/*/*") if path.is_file()]
    largest = max(entries, key=lambda path: path.stat().st_size)
    largest.chmod(0o600)
    with largest.open("r+b") as file:
        file.write(b"x" * 64)
    assert [row[3] for row in rows(other)].count("damaged") == 1


def test_an_empty_or_absent_cache(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "train.yaml"
    document = yaml.safe_load(config.read_text())
    document["cache"]["dir"] = str(tmp_path / "cache")
    other.write_text(yaml.safe_dump(document))
    assert rows(other) == []
    done = zarrcache("ls", "--dir", tmp_path / "none")
    assert (done.code, "There is no cache in" in done.err) == (2, True)
    done = zarrcache("ls", config, "--sort", "colour")
    assert (done.code, "colour" in done.err) == (2, True)
