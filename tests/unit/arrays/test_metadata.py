"""What the metadata of an array may claim, and which objects are its chunks."""

from __future__ import annotations

from typing import Any

import pytest

from zarrcache.arrays import decode
from zarrcache.arrays.decode import (
    check_chunk_count,
    check_metadata,
    count_missing,
    is_array_key,
    is_chunk_of_nothing,
    metadata_key,
)
from zarrcache.errors import SchemaError

MIB = 2**20


def v2(**changes: Any) -> dict[str, Any]:
    return {"zarr_format": 2, "shape": [4, 4, 4], "chunks": [2, 2, 2], "dtype": "<f4", **changes}


def v3(shape: list[int], chunks: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [],
        **changes,
    }


@pytest.mark.parametrize(
    "document",
    [
        v2(),
        v2(dtype="|u1"),
        v2(dtype="|b1"),
        v2(dtype="<i8"),
        v2(shape=[1] * 32, chunks=[1] * 32),
        v2(shape=[], chunks=[]),
        v2(shape=[0, 4, 4]),
        v2(shape=[0, 4, 4], chunks=[0, 4, 4]),
        v2(shape=[2**63 - 1, 0, 1], chunks=[1, 1, 1]),
        {"shape": [4], "dtype": "<f4"},
        v3([4, 4, 4], [2, 2, 2]),
        v3([4, 4, 4], [2, 2, 2], data_type="bool"),
        v3([4], [4], attributes={"scale_factor": 1.0, "add_offset": 0, "units": "electrons"}),
    ],
)
def test_an_array_of_real_numbers_is_accepted(document: Any) -> None:
    check_metadata(document, "url")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "does not describe a Zarr array"),
        ({}, "does not describe a Zarr array"),
        ({"shape": 4, "dtype": "<f4"}, "does not describe a Zarr array"),
        (v2(zarr_format=3), "says node_type 'array' and zarr_format 3"),
        (v3([4], [4], zarr_format=2), "zarr_format 2"),
        (v3([4], [4], node_type="group"), "node_type 'group'"),
        *((v2(shape=[4, 4, n]), "it has to be a list of lengths") for n in (-1, 1.0, "4", True)),
        (v2(shape=[2**63, 0, 1]), "it has to be a list of lengths"),
        (v2(shape=[1] * 33, chunks=[1] * 33), "33 axes; a charge density is 3-D"),
        (v2(chunks=[2, 0, 2]), "each must be at least 1"),
        (v2(dtype=None), "a charge density holds real numbers"),
        (v2(dtype="no type"), "values of type 'no type'"),
        (v2(dtype="<c8"), r"\(complex\)"),
        (v2(dtype="|O"), r"\(objects\)"),
        (v2(dtype="<U4"), r"\(strings\)"),
        (v2(dtype="|S4"), r"\(strings\)"),
        (v2(dtype=[["a", "<f4"]]), r"\(structured\)|of type"),
        (v2(dtype="<M8[s]"), r"\(M\)"),
        (v3([4], [4], attributes={"scale_factor": 0.01}), "attribute scale_factor .packed values"),
        (
            v3([4], [4], attributes={"scale_factor": 2, "add_offset": 5}),
            "attribute scale_factor and add_offset",
        ),
        (v2(filters=[{"id": "pickle"}]), "uses the codec pickle, which makes objects"),
        (v2(compressor={"id": "vlen-utf8"}), "uses the codec vlen-utf8"),
        (v3([4], [4], codecs=[{"name": "numcodecs.json2"}]), "uses the codec json2"),
        (
            v3([4], [4], codecs=[{"name": "s", "configuration": {"codecs": [{"name": "pickle"}]}}]),
            "uses the codec pickle",
        ),
    ],
)
def test_anything_else_is_refused_in_words(document: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=rf"^url .*{words}"):
        check_metadata(document, "url")


def test_an_array_of_the_limit_is_accepted_and_one_value_more_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "most_bytes", lambda: 4 * MIB)
    check_metadata(v2(shape=[MIB], chunks=[1]), "url")
    with pytest.raises(SchemaError, match=f"claims {4 * MIB + 4} bytes .* more than {4 * MIB}"):
        check_metadata(v2(shape=[MIB + 1], chunks=[1]), "url")


def test_a_chunk_may_exceed_its_array_by_72_mib() -> None:
    """All stores may have the same chunks."""
    for one in (lambda n: v2(shape=[1], chunks=[n]), lambda n: v3([1], [n])):
        check_metadata(one(18 * MIB + 1), "url")
        with pytest.raises(SchemaError, match=f"claims chunks of {72 * MIB + 8} bytes"):
            check_metadata(one(18 * MIB + 2), "url")


def test_an_array_that_zarr_reads_has_at_most_2_to_the_24_chunks() -> None:
    """It makes a list of them first. Grids that are not regular are not counted."""
    check_chunk_count(v2(shape=[2**24, 3], chunks=[1, 3]), "url")
    check_chunk_count(v2(shape=[2**25 - 1, 3], chunks=[2, 3]), "url")
    with pytest.raises(SchemaError, match=f"claims {2**24 + 1} chunks of shape"):
        check_chunk_count(v2(shape=[2**24 + 1, 3], chunks=[1, 3]), "url")
    with pytest.raises(SchemaError, match=f"claims {2**24 + 1} chunks of shape"):
        check_chunk_count(v3([2**25 + 1, 3], [2, 3]), "url")
    check_chunk_count(v2(shape=[2**40], chunks=[1, 1]), "url")
    check_chunk_count(v2(shape=[2**40], chunks=[0]), "url")
    check_chunk_count(v2(shape=[2**40], chunks="x"), "url")


@pytest.mark.parametrize(
    ("document", "keys", "counts"),
    [
        (v2(), ["0.0.0", "1.1.1"], (6, 8)),
        (v2(shape=[5, 4, 1]), ["2.1.0"], (5, 6)),
        (v2(), ["2.0.0", "0.2.0", "0.0.2", "0.0", "0.0.0.0", "00.0.0", "x", "0/0/0"], (8, 8)),
        (v2(dimension_separator="/"), ["0/0/0", "0.0.1"], (7, 8)),
        (v2(shape=[0, 4, 4]), [], (0, 0)),
        (v2(shape=[], chunks=[]), ["0"], (0, 1)),
        (v2(shape=[], chunks=[]), ["0.0"], (1, 1)),
        (v2(chunks=[2, 2]), ["0.0"], (0, 0)),
        (v2(chunks=[2, 0, 2]), ["0.0.0"], (0, 0)),
        (v2(dimension_separator="-"), ["0-0-0"], (0, 0)),
        (v3([4, 4, 4], [2, 2, 2]), ["c/0/0/0", "c/1/1/1", "0/0/0", "c.0.0.1"], (6, 8)),
        (v3([], []), ["c"], (0, 1)),
        (v3([4], [2], chunk_key_encoding={"name": "v2"}), ["0", "c/1"], (1, 2)),
        (v3([4], [2], chunk_key_encoding="default"), ["c/0", "1"], (1, 2)),
        (v3([4], [2], chunk_key_encoding={"name": "other"}), ["c/0"], (0, 0)),
    ],
)
def test_missing_chunks_are_those_of_the_grid_without_a_key(
    document: Any, keys: list[str], counts: tuple[int, int]
) -> None:
    assert count_missing(document, keys) == counts


@pytest.mark.parametrize(
    "key", [".zarray", "zarr.json", "c", "0", "0.1.2", "0/1/2", "c/0", "c.0.1"]
)
def test_metadata_and_chunks_are_of_an_array(key: str) -> None:
    assert is_array_key(key)


@pytest.mark.parametrize(
    "key", [".DS_Store", "._0.0.0", "0.0.0~", "c/", "0.", "00", "c0", "a/0", ".zattrs", "0.0\n", ""]
)
def test_other_objects_are_not(key: str) -> None:
    assert not is_array_key(key)


def test_metadata_of_v3_comes_before_that_of_v2() -> None:
    assert metadata_key([".zarray", "zarr.json"]) == "zarr.json"
    assert metadata_key([".zarray", "0.0"]) == ".zarray"
    assert metadata_key(["0.0"]) is None


@pytest.mark.parametrize(
    ("key", "keys", "is_orphan"),
    [
        ("a/0.0.0", ["a/.zarray"], False),
        ("a/c/0/1", ["a/zarr.json"], False),
        ("a/c/0/1", ["b/zarr.json"], True),
        ("a/0.0.0", [], True),
        ("0.0.0", [".zarray"], False),
        ("0.0.0", [], True),
        ("c/0", ["zarr.json"], False),
        ("c", ["zarr.json"], False),
        ("c", [], True),
        ("a/.zattrs", [], False),
        ("a/b/zarr.json", [], False),
        ("a/c/0", ["zarr.json"], True),
    ],
)
def test_a_chunk_without_its_array_is_of_a_store_that_is_gone(
    key: str, keys: list[str], is_orphan: bool
) -> None:
    assert is_chunk_of_nothing(key, keys) is is_orphan
