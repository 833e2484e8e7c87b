"""Which source each task id has, by the names of a directory."""

from __future__ import annotations

import pytest

from zarrcache.arrays import (
    KINDS,
    Kind,
    choose,
    is_file,
    is_object,
    kinds_of,
    sources_of,
    stem_of,
)
from zarrcache.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("mp-1.zarr", "mp-1"),
        ("mp-1.zarr.zip", "mp-1"),
        ("a.b.zarr", "a.b"),
        ("mp-1.json.gz", "mp-1"),
        ("mp-1.json", "mp-1"),
        ("mp-1.CHGCAR", "mp-1"),
        ("mp-1.CHGCAR.xz", "mp-1"),
        ("mp-1_CHGCAR.gz", "mp-1"),
        ("mp-1.chgcar.lzma", "mp-1"),
        (".zarr", None),
        (".json.gz", None),
        ("mp-1.zip", None),
        ("mp-1.gz", None),
        ("dsgdb9nsd_000001", "dsgdb9nsd_000001"),
        (".zarr.zip", None),
    ],
)
def test_the_name_of_a_source_gives_its_task_id(name: str, stem: str | None) -> None:
    assert stem_of(name) == stem


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mp-1.zarr", (False, False)),
        ("mp-1.zarr.zip", (True, False)),
        ("mp-1.json.gz", (True, True)),
        ("mp-1.CHGCAR.bz2", (True, True)),
        ("dsgdb9nsd_000001", (False, False)),
    ],
)
def test_files_and_zipped_stores_are_one_object(name: str, expected: tuple[bool, bool]) -> None:
    assert (is_object(name), is_file(name)) == expected


def test_a_converted_store_is_preferred_to_the_file_it_was_made_from() -> None:
    names = ["b.CHGCAR.gz", "a.CHGCAR", "b.json.gz", "a.json.gz", "a.zarr", "a.zarr.zip", "README"]
    found = sources_of(names)
    assert found["a"] == ["a.zarr", "a.zarr.zip", "a.json.gz", "a.CHGCAR"]
    assert choose(found) == {"a": "a.zarr", "b": "b.json.gz"}
    assert choose(found, ["CHGCAR", "zarr.zip"]) == {"a": "a.CHGCAR", "b": "b.CHGCAR.gz"}


def test_a_plain_file_is_preferred_to_a_compressed_one() -> None:
    names = ["a.CHGCAR.xz", "a.CHGCAR.gz", "a.CHGCAR", "b.json.xz", "b.json.gz"]
    assert choose(sources_of(names)) == {"a": "a.CHGCAR", "b": "b.json.gz"}


def test_of_directories_only_those_of_qm9_are_sources_unless_source_says_so() -> None:
    names = ["dsgdb9nsd_000001", "logs", "mp-1", "mp-1.zarr"]
    found = sources_of(names)
    assert choose(found) == {"dsgdb9nsd_000001": "dsgdb9nsd_000001", "mp-1": "mp-1.zarr"}
    assert choose(found, ["directory"]) == {name: name for name in names[:3]}


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("auto", KINDS),
        ("json.gz", ("json.gz",)),
        (["CHGCAR", "zarr", "CHGCAR"], ("CHGCAR", "zarr")),
        (("zarr",), ("zarr",)),
    ],
)
def test_a_source_setting_names_kinds_in_order(source: object, kinds: tuple[Kind, ...]) -> None:
    assert kinds_of(source) == kinds


@pytest.mark.parametrize("source", ["jsongz", [], ["zarr", "cube"], 7, {"zarr": 1}, ""])
def test_an_unknown_source_is_refused_with_the_known_ones(source: object) -> None:
    with pytest.raises(
        ConfigError, match=r"source is .*zarr, zarr.zip, json.gz, CHGCAR, directory"
    ):
        kinds_of(source)
