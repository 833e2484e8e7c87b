"""Hostile stores, zips, maps and files: refused with an error that names them, with little memory,
and without writing.

The bombs are real: they hold what they claim, so that a reader that believes them is caught by its
memory.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from tests.support.memory import MIB, peak_of
from tests.support.readers import make_reader
from tests.support.stores import STRUCTURE, plain_read, random_density, small_group
from zarrcache import ConfigError, SchemaError, ZarrCacheError
from zarrcache.arrays import OriginArray, read_array
from zarrcache.convert.density import read_density
from zarrcache.convert.plan import plan_convert
from zarrcache.data.splits import mapped_ids
from zarrcache.origin import open_origin

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured through /proc"
)

ARRAY = "charge_density_total"
#: What a refused read may take: the buffers of a chunk, an exception, a module that is imported
#: late.
SMALL = 96 * MIB
#: Size of the bombs' contents.
LARGE = 768 * MIB


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import everything first, so that imports do not count as memory."""
    directory = tmp_path_factory.mktemp("imported")
    for i, layout in enumerate(LAYOUTS.values()):
        small_group(directory / f"mp-{i}.zarr", shape=(8, 8, 8), **layout)
        read(directory, f"mp-{i}.zarr")


def read(directory: Path, store: str, cache: Any = None) -> str:
    """One density without a cache; the error's message, or the values."""
    try:
        decoded = read_array(OriginArray(open_origin(directory), store, ARRAY))
    except ZarrCacheError as exc:
        return f"{type(exc).__name__}: {exc}"
    return f"read {decoded.array.shape}"


LAYOUTS: dict[str, dict[str, Any]] = {
    "v2": {"zarr_format": 2},
    "v2 through zarr": {"zarr_format": 2, "order": "F"},
    "v2 with a filter": {"zarr_format": 2, "filters": [numcodecs.Delta("f4")]},
    "v3": {"zarr_format": 3},
    "v3 sharded": {"zarr_format": 3, "chunks": (4, 4, 4), "shards": (8, 8, 8)},
}


# -- chunks that unpack to gigabytes


def _deflated(wbits: int) -> bytes:
    """A stream of zeros made of one repeated block, so that a bomb is quick to make."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    head = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (LARGE // MIB - 1) + packer.flush(zlib.Z_FINISH)


def zstd_bomb(*, tells: bool, frames: int = 1) -> bytes:
    """Blocks that repeat one byte 128 KiB long, in frames with or without their size (RFC 8878)."""
    count = LARGE // frames // (128 * 1024)
    blocks = [
        ((128 * 1024) << 3 | 1 << 1 | (i == count - 1)).to_bytes(3, "little") + b"\0"
        for i in range(count)
    ]
    head = b"\x28\xb5\x2f\xfd" + (
        b"\xa0" + (LARGE // frames).to_bytes(4, "little") if tells else b"\x00\x38"
    )
    return (head + b"".join(blocks)) * frames


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "blosc": ("blosc", lambda: bytes(numcodecs.Blosc("lz4", 9).encode(np.zeros(LARGE, np.uint8)))),
    "blosc claims 2 GB": (
        "blosc",
        lambda: b"\x02\x01\x21\x04" + struct.pack("<III", 2**31 - 17, 4096, 64) + bytes(48),
    ),
    "blosc claims 4 GB": (
        "blosc",
        lambda: b"\x02\x01\x21\x04" + struct.pack("<III", 2**32 - 1, 4096, 64) + bytes(48),
    ),
    "lz4": ("lz4", lambda: bytes(numcodecs.LZ4().encode(np.zeros(LARGE, np.uint8)))),
    "zstd": ("zstd", lambda: zstd_bomb(tells=True)),
    "zstd that tells no size": ("zstd", lambda: zstd_bomb(tells=False)),
    "zstd in frames": (
        "zstd",
        lambda: (
            bytes(numcodecs.Zstd().encode(np.zeros(256, np.uint8)))
            + zstd_bomb(tells=True, frames=8)
        ),
    ),
    "zstd claims 16 EB": ("zstd", lambda: b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + b"\x01\0\0"),
    "gzip": ("gzip", lambda: gzip.compress(bytes(16 * MIB)) * (LARGE // MIB // 16)),
    "gzip in one": ("gzip", lambda: _deflated(31)),
    "zlib": ("zlib", lambda: _deflated(15)),
    "bz2": ("bz2", lambda: bz2.compress(bytes(16 * MIB)) * (LARGE // MIB // 16)),
    "lzma": ("lzma", lambda: lzma.compress(bytes(16 * MIB)) * (LARGE // MIB // 16)),
}


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    return {name: make() for name, (_, make) in BOMBS.items()}


def codec_of(layout: str, kind: str) -> dict[str, Any] | None:
    """As ``create_array`` takes it; None if the format has no such codec."""
    if layout.startswith("v2"):
        return {"compressors": numcodecs.get_codec({"id": kind})}
    v3 = {
        "blosc": zarr.codecs.BloscCodec(),
        "zstd": zarr.codecs.ZstdCodec(),
        "gzip": zarr.codecs.GzipCodec(),
    }
    return {"compressors": v3[kind]} if kind in v3 else None


def first_chunk(store: Path) -> Path:
    """One chunk of the array, not its metadata."""
    return next(
        path
        for path in sorted((store / ARRAY).rglob("*"))
        if path.is_file() and path.name not in (".zarray", ".zattrs", "zarr.json")
    )


def in_shard(bomb: bytes, count: int) -> bytes:
    """A shard whose first chunk is the bomb; the others are absent. An index with its checksum at
    the end.
    """
    import google_crc32c

    index = struct.pack("<2Q", 0, len(bomb)) + b"\xff" * 16 * (count - 1)
    return bomb + index + struct.pack("<I", google_crc32c.value(index))


#: Chunks with a filter are decoded in a process with a limit of memory, whatever their codec: one
#: bomb of each kind, the others by --all.
IN_A_PROCESS = ("blosc claims 4 GB", "lz4", "zstd that tells no size", "gzip in one", "lzma")
CHUNKS = [
    pytest.param(
        layout,
        name,
        marks=[pytest.mark.slow] * (layout == "v2 with a filter" and name not in IN_A_PROCESS),
    )
    for layout in LAYOUTS
    for name, (kind, _) in BOMBS.items()
    if codec_of(layout, kind) is not None
]


@pytest.mark.parametrize(("layout", "name"), CHUNKS)
def test_chunk_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, bombs: dict[str, bytes], layout: str, name: str
) -> None:
    """On every decoding path; the error names the chunk."""
    small_group(
        tmp_path / "mp-1.zarr",
        shape=(8, 8, 8),
        **LAYOUTS[layout],
        **(codec_of(layout, BOMBS[name][0]) or {}),
    )
    chunk = first_chunk(tmp_path / "mp-1.zarr")
    chunk.write_bytes(in_shard(bombs[name], 8) if "sharded" in layout else bombs[name])
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("IncompleteArrayError")
    assert str(tmp_path / "mp-1.zarr") in words
    assert peak < SMALL + 2 * len(bombs[name])


@pytest.mark.parametrize("inner", ["zstd", "gzip"])
def test_bomb_within_a_bomb_is_refused(tmp_path: Path, bombs: dict[str, bytes], inner: str) -> None:
    """Two codecs in sequence: the outer one expands to little."""
    small_group(
        tmp_path / "mp-1.zarr",
        shape=(8, 8, 8),
        zarr_format=3,
        compressors=[codec_of("v3", inner)["compressors"], zarr.codecs.GzipCodec()],
    )  # type: ignore[index]
    first_chunk(tmp_path / "mp-1.zarr").write_bytes(gzip.compress(bombs[inner]))
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("IncompleteArrayError")
    assert peak < SMALL


def metadata_of(store: Path) -> Path:
    """The metadata document of the array."""
    return next(
        path
        for path in ((store / ARRAY / ".zarray"), (store / ARRAY / "zarr.json"))
        if path.exists()
    )


def described(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metadata of an array."""
    document = json.loads(metadata_of(store).read_text())
    change(document)
    metadata_of(store).write_text(json.dumps(document))


def claim_10_tb(document: dict[str, Any]) -> None:
    """Ten terabytes of fill value."""
    document["shape"] = [13_572, 13_572, 13_572]


def claim_half_the_machine(document: dict[str, Any]) -> None:
    """Less than 64 GiB, but more than the available memory."""
    document["shape"] = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 // 64, 8, 16]


def claim_a_large_chunk(document: dict[str, Any]) -> None:
    """A small array in a chunk that could hold thousands of it."""
    if "chunks" in document:
        document["chunks"] = [2000, 2000, 2000]
    else:
        document["chunk_grid"]["configuration"]["chunk_shape"] = [2000, 2000, 2000]


def claim_in_the_type(document: dict[str, Any]) -> None:
    """One value of a gigabyte."""
    document.update(
        {"dtype": "|V1000000000"} if "dtype" in document else {"data_type": "r8000000000"}
    )


@pytest.mark.parametrize(
    "change", [claim_10_tb, claim_half_the_machine, claim_a_large_chunk, claim_in_the_type]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["store", "zip"])
def test_metadata_that_claims_terabytes_is_refused_before_anything_is_taken(
    tmp_path: Path, layout: str, place: str, change: Any
) -> None:
    """The error names the array, its metadata document and the claimed bytes."""
    store = tmp_path / "mp-1.zarr"
    small_group(store, shape=(8, 8, 8), **LAYOUTS[layout])
    described(store, change)
    if place == "zip":
        zip_up(store)
    words, peak = peak_of(read, tmp_path, store.name if place == "store" else f"{store.name}.zip")
    assert words.startswith("SchemaError")
    assert str(store) in words
    assert peak < SMALL


def zip_up(store: Path) -> Path:
    """Replace the store by a zip file of it."""
    path = store.with_name(f"{store.name}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in store.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(store))
    shutil.rmtree(store)
    return path


@pytest.mark.parametrize(
    "cache",
    [None, {"arrays": {"enabled": True}}, {"arrays": {"enabled": False}}],
    ids=["no cache", "array tier", "byte tier"],
)
def test_reader_refuses_what_claims_terabytes_and_reads_the_others(
    tmp_path: Path, cache: Any
) -> None:
    """With any tier; nothing of it is cached, and nothing is written outside the cache
    directory.
    """
    for role, number in itertools.product(("data", "label"), (1, 2)):
        small_group(tmp_path / role / f"mp-{number}.zarr", shape=(5, 6, 7), seed=number)
    described(tmp_path / "data" / "mp-1.zarr", claim_10_tb)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", "mp-2"]}))
    reader = make_reader(tmp_path, cache=cache)
    for _ in range(2):
        with pytest.raises(SchemaError, match=r"mp-1\.zarr.*claims 9999805300992 bytes"):
            reader.load("mp-1", "data")
    np.testing.assert_array_equal(
        reader.load("mp-2", "data")[0], plain_read(tmp_path / "data" / "mp-2.zarr").ravel()
    )
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["data", "label", "map.json", *(["cache"] if cache else [])]
    )


@pytest.mark.parametrize(
    "codec", ["pickle", "json2", "msgpack2", "vlen-utf8", "vlen-bytes", "vlen-array", "categorize"]
)
@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_codec_that_makes_objects_is_refused(tmp_path: Path, codec: str, place: str) -> None:
    """One runs code, the others take sizes from the data; densities hold numbers."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    described(
        tmp_path / "mp-1.zarr",
        lambda d: d.update({place: {"id": codec} if place == "compressor" else [{"id": codec}]}),
    )
    chunk = first_chunk(tmp_path / "mp-1.zarr")
    chunk.write_bytes(
        json.dumps([0.0, "<f4", [LARGE // 4]]).encode()
        if codec == "json2"
        else b"cos\nmkdir\n(S'" + os.fsencode(tmp_path) + b"/executed'\ntR."
    )
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("SchemaError")
    assert f"the codec {codec}" in words
    assert not (tmp_path / "executed").exists()
    assert peak < SMALL


def test_a_codec_name_in_an_attribute_is_not_a_codec(tmp_path: Path) -> None:
    """Zarr v3 keeps attributes in the same document."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8), zarr_format=3)
    described(
        tmp_path / "mp-1.zarr",
        lambda d: d.update(attributes={"made by": {"name": "pickle"}, "id": "pickle"}),
    )
    assert read(tmp_path, "mp-1.zarr") == "read (8, 8, 8)"


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        NESTED,
        '{"shape": ' + NESTED,
        '{"shape": [' + "1," * 200_000 + '1], "chunks": [1], "dtype": "<f4"}',
        "9" * 100_000,
    ],
)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_metadata_that_is_deep_or_wide_is_refused(
    tmp_path: Path, text: str, zarr_format: Any
) -> None:
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8), zarr_format=zarr_format)
    metadata_of(tmp_path / "mp-1.zarr").write_text(text)
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("SchemaError")
    assert len(words) < 2000
    assert peak < SMALL


@pytest.mark.parametrize("depth", range(200, 1200, 100))
@pytest.mark.parametrize(
    "key", ["filters", "codecs", "attributes", "fill_value", "chunks", "dtype"]
)
def test_metadata_as_deep_as_a_parser_allows_raises_no_recursion_error(
    tmp_path: Path, depth: int, key: str
) -> None:
    """What ``json`` can just parse is too deep for a recursive function."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    text = metadata_of(tmp_path / "mp-1.zarr").read_text().rstrip()
    metadata_of(tmp_path / "mp-1.zarr").write_text(
        text[:-1] + f', "{key}": ' + '[{"a": ' * (depth // 2) + "1" + "}]" * (depth // 2) + "}"
    )
    words = read(tmp_path, "mp-1.zarr")
    assert words == "read (8, 8, 8)" or words.startswith(("SchemaError", "IncompleteArrayError")), (
        words
    )


def test_metadata_of_gigabytes_is_refused_unparsed(tmp_path: Path) -> None:
    """A list of small numbers takes twenty times the memory of its text."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    path = metadata_of(tmp_path / "mp-1.zarr")
    path.write_text(path.read_text().rstrip()[:-1] + ', "x": [' + "1," * 20 * MIB + "1]}")
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("SchemaError")
    assert str(path) in words
    assert peak < SMALL + 2 * path.stat().st_size


def test_object_that_is_listed_as_larger_than_memory_is_not_fetched(tmp_path: Path) -> None:
    """A sparse file, or what a hostile server lists."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    os.truncate(first_chunk(tmp_path / "mp-1.zarr"), 2**40)
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("SchemaError")
    assert str(2**40) in words
    assert peak < SMALL


# -- zip files


def zip_bomb(path: Path, **layout: Any) -> zipfile.ZipFile:
    """A zipped store, open for further members."""
    small_group(path, as_zip=True, shape=(8, 8, 8), **layout)
    return zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED)


def patch_sizes(path: Path, name: str, file_size: int) -> None:
    """Make the headers claim another size of a member."""
    raw = bytearray(path.read_bytes())
    for signature, at, skip in ((b"PK\x03\x04", 22, 30), (b"PK\x01\x02", 24, 46)):
        start = -1
        while (start := raw.find(signature, start + 1)) >= 0:
            if raw[start + skip : start + skip + len(name)] == name.encode():
                raw[start + at : start + at + 4] = struct.pack("<I", file_size)
    path.write_bytes(raw)


METHODS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


@pytest.mark.parametrize(
    ("name", "method", "claims"),
    [
        ("0.0.0", "deflate", "what it holds"),
        *(("0.0.0", method, "little") for method in METHODS),
        # ignored, so not unpacked by any method
        ("bomb", "deflate", "what it holds"),
        ("bomb", "deflate", "little"),
    ],
)
def test_zip_bomb_is_refused(tmp_path: Path, name: str, method: str, claims: str) -> None:
    """With correct headers, and with a header that claims a small size, beyond which nothing is
    read. A member that is no chunk is ignored.
    """
    with (
        warnings.catch_warnings(),
        zip_bomb(tmp_path / "mp-1.zarr.zip") as archive,
    ):
        warnings.simplefilter("ignore")  # two members of one name
        with archive.open(zipfile.ZipInfo(f"{ARRAY}/{name}"), "w") as member:
            member._compressor = zipfile._get_compressor(METHODS[method], 1)  # type: ignore[attr-defined]
            member._zinfo.compress_type = METHODS[method]  # type: ignore[attr-defined]
            for _ in range(320 if claims == "what it holds" else 160):
                member.write(bytes(MIB))
    if claims == "little":
        patch_sizes(tmp_path / "mp-1.zarr.zip", f"{ARRAY}/{name}", 100)
    words, peak = peak_of(read, tmp_path, "mp-1.zarr.zip")
    assert peak < SMALL
    if name == "bomb":
        assert words == "read (8, 8, 8)"
        return
    assert str(tmp_path / "mp-1.zarr.zip") in words
    is_read = method == "deflate" and claims == "little"
    assert words.startswith("IncompleteArrayError" if is_read else "SchemaError")
    assert "Zip the store again" in words


def test_zip_with_a_million_members_is_refused(tmp_path: Path) -> None:
    """Each costs a kilobyte of memory per 50 bytes of zip."""
    path = tmp_path / "mp-1.zarr.zip"
    small_group(path, as_zip=True, shape=(8, 8, 8))
    raw = path.read_bytes()
    end = raw.rfind(b"PK\x05\x06")
    start = struct.unpack_from("<I", raw, end + 16)[0]
    name = f"{ARRAY}/0.0.0".encode()
    entry = (
        b"PK\x01\x02"
        + struct.pack(
            "<4B4HL2L5H2L", 20, 0, 20, 0, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0
        )
        + name
    )
    directory = entry * 400_000
    path.write_bytes(
        raw[:start]
        + directory
        + raw[end : end + 8]
        + struct.pack("<2H2LH", 0xFFFF, 0xFFFF, len(directory), start, 0)
    )
    words, peak = peak_of(read, tmp_path, "mp-1.zarr.zip")
    assert words.startswith("SchemaError")
    assert "members" in words
    assert peak < SMALL + 2 * path.stat().st_size


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/tmp/outside",
        f"{ARRAY}/../../outside",
        f"{ARRAY}/0.0.0/../../../outside",
        "a\\..\\outside",
        "C:outside",
    ],
)
def test_zip_member_that_points_elsewhere_is_never_written(tmp_path: Path, name: str) -> None:
    """Members are only names in memory; no zip is extracted to disk."""
    (tmp_path / "data").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with zip_bomb(tmp_path / "data" / "mp-1.zarr.zip") as archive:
        archive.writestr(name, b"out")
    assert read(tmp_path / "data", "mp-1.zarr.zip") == "read (8, 8, 8)"
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "data" / "mp-1.zarr.zip"]


def test_zip_within_a_zip_stays_closed(tmp_path: Path) -> None:
    """A member that is a zip is an ordinary member."""
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(64 * MIB))
    with zip_bomb(tmp_path / "mp-1.zarr.zip") as archive:
        archive.write(inner, f"{ARRAY}/inner.zip")
    words, peak = peak_of(read, tmp_path, "mp-1.zarr.zip")
    assert words == "read (8, 8, 8)"
    assert peak < SMALL


# -- the map file


def read_ids(path: Path, functional: str = "GGA") -> str:
    """The error's message, or the number of ids."""
    try:
        return f"{len(mapped_ids(path, functional))} ids"
    except ConfigError as exc:
        return str(exc)


@pytest.mark.parametrize(
    "make",
    [lambda: gzip.compress(bytes(16 * MIB)) * (LARGE // MIB // 16), lambda: b" " * (300 * MIB)],
    ids=["gzip", "plain"],
)
def test_map_of_gigabytes_is_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    """A real one has 2 MB."""
    (tmp_path / "map.json").write_bytes(make())
    words, peak = peak_of(read_ids, tmp_path / "map.json")
    assert str(tmp_path / "map.json") in words
    assert "{functional: [task_id, ...]}" in words
    assert peak < 300 * MIB


@pytest.mark.parametrize(
    "text", [NESTED, '{"GGA": ' + NESTED, '{"GGA": [' + NESTED + "]" * 100_001 + "}", "9" * 100_000]
)
def test_map_that_is_deep_is_refused(tmp_path: Path, text: str) -> None:
    """With our error, not a ``RecursionError``."""
    (tmp_path / "map.json").write_text(text)
    words = read_ids(tmp_path / "map.json")
    assert str(tmp_path / "map.json") in words
    assert len(words) < 2000


@pytest.mark.parametrize("depth", [100, 500, 900, 980])
def test_task_id_that_is_a_nest_is_refused(tmp_path: Path, depth: int) -> None:
    """As deep as ``json`` can parse: its ``repr`` would recurse too."""
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1", ' + "[" * depth + "]" * depth + "]}")
    words = read_ids(tmp_path / "map.json")
    assert "is not a plain name" in words or "is not JSON" in words


HOSTILE = {
    "parent": "../mp-1",
    "absolute": "/etc/passwd",
    "drive": "C:\\mp-1",
    "url": "s3://other/mp-1",
    "NUL": "mp-1\0.zarr",
    "line end": "mp-1\n",
    "escape": "mp-\x1b[31m1",
    "very long": "x" * 10**6,
    "another hyphen": "mp\u20111",
    "fullwidth dots": "\uff0e\uff0e/mp-1",
    "fullwidth slash": "a\uff0fb",
    "right to left": "mp-\u202e1",
    "zero width": "mp-\u200b1",
    "other digits": "mp-\u0661",
    "accent": "mp-e\u0301",
    "surrogate": "mp-\ud800",
    "percent": "%2e%2e%2fmp-1",
    "home": "~root",
    "shell": "$(id)",
    "glob": "*",
    "query": "mp-1?x",
    "fragment": "mp-1#x",
    "dots": "...",
    "option": "-rf",
}


@pytest.mark.parametrize("task_id", HOSTILE.values(), ids=HOSTILE)
def test_hostile_task_id_is_refused_before_any_path_is_made_of_it(
    tmp_path: Path, task_id: str
) -> None:
    """Shown in ASCII, so that look-alike characters are distinct, and shortened."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", task_id]}))
    words = read_ids(tmp_path / "map.json")
    assert "is not a plain name" in words
    assert words.isascii()
    assert words.isprintable()
    assert len(words.removeprefix(f"map file {tmp_path}")) < 500


def test_functional_of_a_hostile_map_is_not_repeated_at_length(tmp_path: Path) -> None:
    """The error lists the functionals of the map, of which there may be a million."""
    (tmp_path / "map.json").write_text(
        json.dumps({f"functional {i}" * 20: [] for i in range(10_000)})
    )
    words = read_ids(tmp_path / "map.json")
    assert "'GGA' not found in mapping" in words
    assert len(words) < 5000


def test_map_that_never_ends_is_refused() -> None:
    """A device file."""
    words, peak = peak_of(read_ids, Path("/dev/zero"))
    assert "/dev/zero" in words
    assert peak < 300 * MIB


# -- the origin's directory


def test_a_named_pipe_in_a_store_does_not_hang(tmp_path: Path) -> None:
    """Opening one would block until it has a writer."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    chunk = first_chunk(tmp_path / "mp-1.zarr")
    chunk.unlink()
    os.mkfifo(chunk)
    words, _ = peak_of(read, tmp_path, "mp-1.zarr")
    assert str(chunk) in words


def test_links_in_circles_end(tmp_path: Path) -> None:
    """Two links to their own directory: each level doubles the paths."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    for name in ("a", "b"):
        (tmp_path / "mp-1.zarr" / ARRAY / name).symlink_to(tmp_path / "mp-1.zarr" / ARRAY)
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("OriginError")
    assert "symbolic links" in words
    assert peak < SMALL


def test_links_that_branch_end(tmp_path: Path) -> None:
    """Not a cycle, but a billion paths to thirty directories."""
    small_group(tmp_path / "mp-1.zarr", shape=(8, 8, 8))
    above = tmp_path / "mp-1.zarr" / ARRAY
    for number in range(30):
        below = tmp_path / "branches" / str(number)
        below.mkdir(parents=True)
        for name in ("a", "b"):
            (above / name).symlink_to(below)
        above = below
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith("OriginError")
    assert "more than 1000 symbolic links" in words
    assert peak < SMALL


# -- files to be converted


CHGCAR = b"Si\n1.0\n1 0 0\n0 1 0\n0 0 1\nSi\n1\nDirect\n0 0 0\n\n"


def read_file(path: Path) -> str:
    """The error's message."""
    try:
        return f"read {read_density(path).total.shape}"
    except ZarrCacheError as exc:
        return f"{type(exc).__name__}: {exc}"
    except OSError as exc:
        return f"OSError: {exc}"


CONVERTED: dict[str, Callable[[], bytes]] = {
    "mp-1.json.gz": lambda: gzip.compress(b" " * 16 * MIB) * (LARGE // MIB // 16),
    "mp-2.json.bz2": lambda: bz2.compress(b" " * 16 * MIB) * (LARGE // MIB // 16),
    "mp-3.json.xz": lambda: lzma.compress(b" " * 16 * MIB) * (LARGE // MIB // 16),
    "one-line.CHGCAR.gz": lambda: gzip.compress(b"1" * 16 * MIB) * (LARGE // MIB // 16),
    "title.CHGCAR.gz": lambda: gzip.compress(CHGCAR[:3] + b" " * 16 * MIB) * (LARGE // MIB // 16),
    "numbers.CHGCAR.gz": lambda: (
        gzip.compress(CHGCAR + b"2 2 2\n") + gzip.compress(b"1.5 2.5 3.5\n" * 1_000_000) * 20
    ),
    "grid.CHGCAR": lambda: CHGCAR + b"20000 20000 20000\n1 2 3 4 5\n",
    "atoms.CHGCAR": lambda: (
        CHGCAR.replace(b"\n1\nDirect", b"\n2000000000\nDirect") + b"2 2 2\n1 2 3 4 5 6 7 8\n"
    ),
    "nested.json": lambda: NESTED.encode(),
    "shape.json": lambda: json.dumps(
        {"data": {"total": {"@class": "array", "data": [[[1e400]]]}}, "structure": {}}
    ).encode(),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_file_that_was_made_to_do_harm_is_refused_by_convert(tmp_path: Path, name: str) -> None:
    """With an error that names it, within the memory of a large density."""
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    (tmp_path / name).write_bytes(CONVERTED[name]())
    words, peak = peak_of(read_file, tmp_path / name)
    assert words.startswith("SchemaError")
    assert str(tmp_path / name) in words
    assert peak < 2 * SMALL


@pytest.mark.parametrize("where", ["site", "structure", "nested"])
def test_object_in_a_file_is_neither_imported_nor_made(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pymatgen's JSON may name a module, which Python would import from the working directory."""
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    (tmp_path / "evil.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass X:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    thing: Any = {"@module": "evil", "@class": "X"}
    structure = json.loads(json.dumps(STRUCTURE))
    target = structure["sites"][0] if where != "structure" else structure
    target["properties"] = {"magmom": 1.5, "bad": [{"x": thing}] if where == "nested" else thing}
    (tmp_path / "mp-1.json").write_text(
        json.dumps({"structure": structure, "data": {"total": np.full((2, 2, 2), 4.0).tolist()}})
    )
    density = read_density(tmp_path / "mp-1.json")
    assert not (tmp_path / "executed").exists()
    assert "evil" not in sys.modules
    assert density.total.shape == (2, 2, 2)
    assert "1.5" in json.dumps(density.structure)
    assert [note for note in density.warnings if "Python objects (bad): left out" in note]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_convert_writes_nothing_of_hostile_files_and_goes_on(tmp_path: Path, workers: int) -> None:
    """Next to a good file, also in worker processes."""
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    (tmp_path / "src").mkdir()
    for name in ("grid.CHGCAR", "nested.json", "shape.json"):
        (tmp_path / "src" / name).write_bytes(CONVERTED[name]())
    values = random_density((2, 2, 2)).ravel(order="F")
    (tmp_path / "src" / "mp-9.CHGCAR").write_bytes(
        CHGCAR + b"2 2 2\n" + " ".join(f"{v:.11E}" for v in values).encode() + b"\n"
    )
    report = plan_convert(tmp_path / "src", str(tmp_path / "dst"), workers=workers).execute()
    assert sorted(os.listdir(tmp_path / "dst")) == ["mp-9.zarr"]
    assert len(report.failed) == 3
