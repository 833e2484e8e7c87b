"""``zarrcache map``: from a directory to the map of a training config."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.support.s3server import S3Server
from tests.support.training import zarrcache
from zarrcache.ops import find_ids


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_the_map_holds_the_ids_of_every_kind_of_source(tmp_path: Path) -> None:
    """Numbers are sorted by value; what is no source is left out."""
    _touch(tmp_path / "in", "mp-10.json.gz", "mp-2.CHGCAR.xz", "mp-9.zarr/.zgroup", "README.md")
    done = zarrcache("map", tmp_path / "in", "-o", tmp_path / "map.json.gz")
    assert (done.code, done.out) == (0, f"Wrote 3 ids as GGA to {tmp_path}/map.json.gz.\n")
    assert f"map_dir: {tmp_path}/map.json.gz, functional: GGA" in done.err
    assert "--functional was not given, so the ids are those of GGA, the default." in done.err
    document = json.loads(gzip.decompress((tmp_path / "map.json.gz").read_bytes()))
    assert document == {"GGA": ["mp-2", "mp-9", "mp-10"]}


def test_a_second_functional_is_added_and_a_known_one_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    _touch(tmp_path / "in", "mp-1.json.gz")
    assert zarrcache("map", tmp_path / "in", "-o", path).code == 0
    _touch(tmp_path / "in", "mp-2.json.gz")
    done = zarrcache("map", tmp_path / "in", "-o", path, "--functional", "r2SCAN")
    assert "beside 1 other functional" in done.out
    again = zarrcache("map", tmp_path / "in", "-o", path)
    assert again.code == 2
    assert "has 1 id of GGA. Give --force" in again.err
    expected = {"GGA": ["mp-1"], "r2SCAN": ["mp-1", "mp-2"]}
    assert json.loads(path.read_text()) == expected
    assert zarrcache("map", tmp_path / "in", "-o", path, "--force").code == 0
    assert json.loads(path.read_text()) == expected | {"GGA": ["mp-1", "mp-2"]}


def test_of_two_directories_it_holds_the_ids_that_both_have(
    tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    """One of them on S3; the others are named."""
    _touch(tmp_path / "in", "mp-1.CHGCAR", "mp-2.CHGCAR", "mp;3.CHGCAR")
    for name in ("mp-1.json.gz", "mp-4.json.gz"):
        s3_server.put(f"s3://{bucket}/chgcars/{name}", b"{}")
    options = tmp_path / "s3.json"
    options.write_text(json.dumps(s3_server.s3_kwargs))
    done = zarrcache(
        *("map", tmp_path / "in", f"s3://{bucket}/chgcars", "-o", tmp_path / "m.json"),
        *("--s3-kwargs", f"@{options}", "--json"),
    )
    assert done.code == 0
    found = json.loads(done.out)
    assert found["ids"] == ["mp-1"]
    assert found["partial"] == ["mp-2", "mp-4"]
    assert found["refused"] == ["mp;3.CHGCAR"]
    assert "left out: 2 ids not in every directory: mp-2, mp-4" in done.err


@pytest.mark.parametrize(
    ("names", "arguments", "code", "words"),
    [
        ((), (), 2, "in is not a directory of this machine"),
        (("in/mp-1/CHGCAR",), (), 2, "no name in it ends with .zarr, .zarr.zip, .json.gz, .CHGCAR"),
        (("in/mp-1.zarr/x",), ("--source", "json.gz"), 2, "holds 1 other name, such as mp-1.zarr"),
        (("in/mp-1.zarr/x",), ("--source", "cube"), 2, "source is 'cube'. Write auto, one of"),
        (("in/mp-1.json", "m"), ("-o", "{}/m"), 2, "m is not JSON"),
        (("in/mp-1.json", "file"), ("-o", "{}/file/m.json"), 2, "file/m.json cannot be written"),
    ],
)
def test_what_cannot_be_mapped_is_an_error_and_writes_nothing(
    tmp_path: Path, names: tuple[str, ...], arguments: tuple[str, ...], code: int, words: str
) -> None:
    _touch(tmp_path, *names)
    output = () if "-o" in arguments else ("-o", tmp_path / "map.json")
    done = zarrcache("map", tmp_path / "in", *output, *(a.format(tmp_path) for a in arguments))
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert not list(tmp_path.rglob("*map*"))


def test_an_error_about_s3_kwargs_names_the_option(tmp_path: Path) -> None:
    """The command has no config, where the words of the error are those of a key."""
    done = zarrcache("map", "s3://no-bucket/in", "-o", tmp_path / "map.json")
    assert (done.code, done.out) == (1, "")
    assert "no credentials were found. Set key and secret or profile in s3_kwargs" in done.err
    assert done.err.endswith("Pass s3_kwargs with --s3-kwargs or --config CONFIG.\n")


def test_a_kind_of_source_can_be_chosen(tmp_path: Path) -> None:
    _touch(tmp_path, "mp-1.json.gz", "mp-2.CHGCAR", "mp-3.zarr/.zgroup")
    assert find_ids([str(tmp_path)], source=["json.gz", "CHGCAR"]).ids == ("mp-1", "mp-2")
    done = zarrcache("map", tmp_path, "-o", tmp_path / "map.json", "--source", "CHGCAR")
    assert done.err.endswith(", functional: GGA, source: CHGCAR\n")


@pytest.mark.parametrize(
    ("name", "functional", "message"),
    [
        ("a" * 300, "GGA", "aaa cannot be written (File name too long)"),
        ("map.json", " ", "the name of the functional is empty"),
    ],
)
def test_a_map_that_cannot_be_written_is_named(
    tmp_path: Path, name: str, functional: str, message: str
) -> None:
    _touch(tmp_path / "in", "mp-1.json.gz")
    done = zarrcache("map", tmp_path / "in", "-o", tmp_path / name, "--functional", functional)
    assert (done.code, message in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_no_functional_is_added_to_a_split_file(tmp_path: Path) -> None:
    """It is JSON of lists of ids, as a map is."""
    _touch(tmp_path / "in", "mp-1.json.gz")
    path = tmp_path / "split.json"
    path.write_text('{"train": ["mp-1"], "test": ["mp-2"]}')
    done = zarrcache("map", tmp_path / "in", "-o", path)
    assert (done.code, done.out) == (2, "")
    assert f"{path} is a split file, not a map." in done.err
    assert json.loads(path.read_text()) == {"train": ["mp-1"], "test": ["mp-2"]}


def test_the_map_itself_is_no_density(tmp_path: Path) -> None:
    """It lies among the densities, and its name ends as theirs do."""
    path = _touch(tmp_path, "mp-1.json.gz") / "map.json.gz"
    for options in ([], ["--force"]):
        done = zarrcache("map", tmp_path, "-o", path, *options)
        assert (done.code, done.out) == (0, f"Wrote 1 id as GGA to {path}.\n")
