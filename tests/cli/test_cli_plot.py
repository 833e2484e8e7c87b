"""``zarrcache plot``: pairs in the terminal and as PNG files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import write_config, write_pairs, zarrcache


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two pairs in a directory."""
    directory = tmp_path_factory.mktemp("plot")
    write_pairs(directory, 2, diff=True)
    return write_config(directory)


def test_a_pair_is_drawn_with_characters_where_there_is_no_colour(config: Path) -> None:
    done = zarrcache("plot", config, "mp-0", env={"COLUMNS": "60"})
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[:2] == ["mp-0", "total: electrons per grid point (normalize_data: true)"]
    planes = "input yz, x=3/6 label yz, x=3/6 label - input yz,"
    assert " ".join(lines[2].split()) == planes
    assert max(map(len, lines)) <= 60
    assert sum(line.startswith("input") for line in lines) == 3


@pytest.mark.parametrize("columns", ["80", "60", "20"])
def test_no_number_loses_digits_in_a_narrow_terminal(config: Path, columns: str) -> None:
    """A range that is cut within its exponent is another range."""
    wide, narrow = (
        zarrcache("plot", config, "mp-1", env={"COLUMNS": width}).out.split()
        for width in ("200", columns)
    )
    assert sorted(filter(_is_number, narrow)) == sorted(filter(_is_number, wide))
    assert len(list(filter(_is_number, narrow))) == 18


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def test_a_png_is_written_where_asked_and_its_name_is_the_last_line(
    config: Path, tmp_path: Path
) -> None:
    pytest.importorskip("PIL")
    path = tmp_path / "a.png"
    done = zarrcache("plot", config, "mp-1", "-o", path, "--at", "0,0.3,1")
    assert (done.code, done.out, done.err) == (0, "", f"wrote {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("mp-99",), 2, "mp-99.zarr does not exist"),
        (("mp-0", "--at", "0.5,2,0"), 2, "is not three numbers from 0 to 1"),
        (("mp-0", "--at", "middle"), 2, "is not three numbers from 0 to 1"),
        (("mp-0", "-o", "a.jpg"), 2, "does not end in .png"),
        (("mp-0", "-o", "/nowhere/a.png"), 2, "cannot be written"),
        (("../mp-0",), 2, "../mp-0"),
    ],
)
def test_wrong_input_is_named(
    config: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = zarrcache("plot", config, *arguments)
    assert message in done.err
    assert (done.code, done.out) == (code, "")


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ("normalize_data: false", "total: density times cell volume (normalize_data: false)"),
        (
            "normalize_data: volume",
            "total: electrons per cubic angstrom (normalize_data: volume)",
        ),
        ("density_type: {data: total, label: [diff, total]}", "total and diff: electrons per grid"),
    ],
)
def test_the_title_says_what_the_numbers_are(
    config: Path, tmp_path: Path, settings: str, title: str
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"{config.read_text()}{settings}\n")
    done = zarrcache("plot", other, "mp-1")
    assert done.out.splitlines()[1].startswith(title), done.err
