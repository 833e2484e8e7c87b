"""Any array that zarr can write is read bit for bit as zarr reads it, or refused because it is not
a density.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import numcodecs
import numpy as np
import pytest
import zarr
import zarr.codecs
import zarr.storage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zarrcache.arrays import OriginArray, density_of_group, read_array
from zarrcache.errors import IncompleteArrayError, SchemaError
from zarrcache.origin._local import LocalOrigin

REAL = [
    f"{end}{kind}"
    for end in "<>"
    for kind in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
] + ["|i1", "|u1", "|b1"]
V2_CODECS: list[Any] = [
    None,
    *(
        numcodecs.Blosc(cname=name, shuffle=shuffle)
        for name in ("lz4", "zstd", "zlib", "lz4hc", "blosclz")
        for shuffle in (0, 1, 2)
    ),
    numcodecs.Zstd(),
    numcodecs.GZip(),
    numcodecs.Zlib(),
    numcodecs.BZ2(),
    numcodecs.LZ4(),
    numcodecs.LZMA(),
]
V3_CODECS: list[Any] = [
    None,
    zarr.codecs.ZstdCodec(),
    zarr.codecs.ZstdCodec(checksum=True),
    zarr.codecs.GzipCodec(),
    *(
        zarr.codecs.BloscCodec(cname=name, shuffle=shuffle)
        for name in ("lz4", "zstd")
        for shuffle in ("noshuffle", "shuffle", "bitshuffle")
    ),
    [zarr.codecs.GzipCodec(), zarr.codecs.Crc32cCodec()],
]
LAX = settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def values_of(draw: st.DrawFn, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Any bytes of the dtype, NaNs included."""
    seed = draw(st.integers(0, 2**32 - 1))
    if dtype.kind == "b":
        return np.random.default_rng(seed).random(shape) < 0.5
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)


@st.composite
def stores(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``create_array``, the written values, and the unwritten regions."""
    zarr_format = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    chunks = tuple(draw(st.integers(1, 5)) for _ in shape)
    dtype = np.dtype(draw(st.sampled_from(REAL)))
    array: dict[str, Any] = {"shape": shape, "chunks": chunks, "dtype": dtype}
    fills: list[Any] = [0, 1]
    if dtype.kind == "f":
        fills += [np.nan, np.inf, -np.inf, -0.5]
    if zarr_format == 2:
        fills.append(None)
        array["order"] = draw(st.sampled_from("CF"))
        array["compressors"] = draw(st.sampled_from(V2_CODECS))
    else:
        array["compressors"] = draw(st.sampled_from(V3_CODECS))
        if draw(st.booleans()):
            array["filters"] = [
                zarr.codecs.TransposeCodec(order=draw(st.permutations(range(len(shape)))))
            ]
        if draw(st.booleans()):
            array["shards"] = tuple(n * draw(st.integers(1, 3)) for n in chunks)
    array["fill_value"] = draw(st.sampled_from(fills))
    array["chunk_key_encoding"] = {
        "name": draw(st.sampled_from(["v2"] if zarr_format == 2 else ["v2", "default"])),
        "separator": draw(st.sampled_from("./")),
    }
    box = tuple(slice(0, draw(st.integers(0, n))) for n in shape)
    return {
        "zarr_format": zarr_format,
        "array": array,
        "box": box,
        "values": values_of(draw, tuple(s.stop for s in box), dtype),
        "consolidated": draw(st.booleans()),
    }


def write(path: Path, store: dict[str, Any]) -> None:
    """With zarr alone."""
    with warnings.catch_warnings():
        # consolidated metadata and some codecs are no part of the v3 specification
        warnings.simplefilter("ignore")
        group = zarr.create_group(
            store=zarr.storage.LocalStore(path), zarr_format=store["zarr_format"], overwrite=True
        )
        array = group.create_array("rho", **store["array"])
        array[store["box"]] = store["values"]
        if store["consolidated"]:
            zarr.consolidate_metadata(group.store)


def read_by_zarr(path: Path) -> NDArray[Any]:
    """The oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(zarr.open_group(zarr.storage.LocalStore(path), mode="r")["rho"][...])


def same_bits(ours: NDArray[Any], zarrs: NDArray[Any]) -> bool:
    """Shape, kind and every bit, in native byte order."""
    native = zarrs.astype(zarrs.dtype.newbyteorder("="), copy=False)
    return (ours.dtype, ours.shape, ours.tobytes()) == (
        native.dtype,
        native.shape,
        native.tobytes(),
    )


@pytest.fixture(scope="module", autouse=True)
def settled(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Do not wait for a stable listing: no other process writes."""
    monkeypatch_module.setattr("zarrcache.arrays.listing._STABLE_S", 0.0)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    """A monkeypatch of module scope."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@LAX
@given(store=stores())
def test_any_array_is_read_as_zarr_reads_it(tmp_path: Path, store: dict[str, Any]) -> None:
    """Any shape, chunking, codec, order, byte order, fill value, separator; missing chunks;
    sharded, consolidated or not.
    """
    shutil.rmtree(tmp_path / "mp-1.zarr", ignore_errors=True)
    write(tmp_path / "mp-1.zarr", store)
    decoded = read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho", fills=True))
    assert same_bits(decoded.array, read_by_zarr(tmp_path / "mp-1.zarr"))
    assert decoded.array.flags.c_contiguous


#: Codecs that may stand anywhere between the values and the object, by the ids of numcodecs.
PLAIN_V2: list[dict[str, Any]] = [
    {"id": "shuffle", "elementsize": 4},
    *({"id": name} for name in ("adler32", "fletcher32", "jenkins_lookup3")),
    *({"id": name, "location": end} for name in ("crc32", "crc32c") for end in ("start", "end")),
]
COMPRESSORS_V3: list[dict[str, Any]] = [
    {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
    {"name": "gzip", "configuration": {"level": 1}},
    {
        "name": "blosc",
        "configuration": {
            "cname": "zlib",
            "clevel": 5,
            "shuffle": "shuffle",
            "typesize": 4,
            "blocksize": 0,
        },
    },
    *(
        {"name": f"numcodecs.{name}", "configuration": {}}
        for name in ("blosc", "zstd", "lz4", "gzip", "zlib", "bz2", "lzma")
    ),
]
PLAIN_V3: list[dict[str, Any]] = [
    {"name": "crc32c"},
    *(
        {
            "name": f"numcodecs.{codec['id']}",
            "configuration": {key: value for key, value in codec.items() if key != "id"},
        }
        for codec in PLAIN_V2
    ),
]
BITROUND = {"id": "bitround", "keepbits": 7}


@st.composite
def chains(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``zarr.create`` with codecs in any order that is decoded here, shards within
    shards included.
    """
    dtype = np.dtype(draw(st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i4", "|u1", "|b1"])))
    grid = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    chunks = [4 * n for n in grid]
    array: dict[str, Any] = {
        "shape": [draw(st.integers(1, 11)) for _ in grid],
        "chunks": chunks,
        "dtype": dtype,
        "fill_value": 0,
        "zarr_format": draw(st.sampled_from([2, 3])),
    }
    if array["zarr_format"] == 2:
        filters = draw(st.lists(st.sampled_from(PLAIN_V2), max_size=3))
        if dtype.kind == "f" and draw(st.booleans()):
            filters.insert(0, BITROUND)
        array["filters"] = [numcodecs.get_codec(dict(codec)) for codec in filters] or None
        array["compressor"] = draw(st.sampled_from(V2_CODECS))
        array["order"] = draw(st.sampled_from("CF"))
    else:
        array["dtype"] = dtype.newbyteorder("=")
        array["codecs"] = draw(v3_chain(array["dtype"], chunks, depth=2))
    return array


@st.composite
def v3_chain(
    draw: st.DrawFn, dtype: np.dtype[Any], shape: list[int], depth: int
) -> list[dict[str, Any]]:
    """The codecs of ``zarr.json``."""
    codecs: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 2))):
        order = draw(st.permutations(range(len(shape))))
        codecs.append({"name": "transpose", "configuration": {"order": list(order)}})
        shape = [shape[axis] for axis in order]
    endian = st.sampled_from(["little", "big"])
    plain = st.lists(st.sampled_from(PLAIN_V3), max_size=2)
    if depth > 0 and draw(st.booleans()):
        inner = [draw(st.sampled_from([m for m in (1, 2, 4) if n % m == 0])) for n in shape]
        index = [{"name": "bytes", "configuration": {"endian": draw(endian)}}]
        codecs.append(
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": inner,
                    "codecs": draw(v3_chain(dtype, inner, depth=depth - 1)),
                    "index_codecs": index + [{"name": "crc32c"}] * draw(st.integers(0, 1)),
                    "index_location": draw(st.sampled_from(["start", "end"])),
                },
            }
        )
        return codecs + draw(plain)
    order_of_bytes = draw(endian)
    if dtype.kind == "f" and order_of_bytes == "little" and draw(st.booleans()):
        codecs.append({"name": "numcodecs.bitround", "configuration": {"keepbits": 7}})
    codecs.append({"name": "bytes", "configuration": {"endian": order_of_bytes}})
    compressor = draw(st.lists(st.sampled_from(COMPRESSORS_V3), max_size=1))
    return codecs + draw(plain) + compressor + draw(plain)


def write_chain(
    path: Path, array: dict[str, Any], values: NDArray[Any], box: tuple[slice, ...] = ()
) -> NDArray[Any]:
    """Write one region with zarr, and return what zarr reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = zarr.create(store=zarr.storage.LocalStore(path), path="rho", **array)
            made[box] = values[box]
            return np.asarray(
                zarr.open_array(zarr.storage.LocalStore(path), path="rho", mode="r")[...]
            )
        except Exception:  # noqa: BLE001 chains that zarr cannot write or read
            hypothesis.reject()


@settings(LAX, max_examples=150)
@given(array=chains(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_chain_of_codecs_is_read_as_zarr_reads_it(
    tmp_path: Path, array: dict[str, Any], seed: int, data: st.DataObject
) -> None:
    """Checksums anywhere, shards in shards; and a region that was never written."""
    path = tmp_path / "mp-1.zarr"
    shutil.rmtree(path, ignore_errors=True)
    values = np.random.default_rng(seed).integers(0, 2, array["shape"]).astype(array["dtype"])
    box = tuple([slice(0, data.draw(st.integers(0, n))) for n in array["shape"]])
    expected = write_chain(path, array, values, box)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = read_array(
            OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho", fills=True)
        )
    assert same_bits(decoded.array, expected)


def v3_codecs(*codecs: dict[str, Any], endian: str = "little") -> dict[str, Any]:
    """A v3 array of two chunks whose last codecs follow the bytes of the values."""
    raw = {"name": "bytes", "configuration": {"endian": endian}}
    return {"zarr_format": 3, "codecs": [raw, *codecs]}


SWAPPED = ">" if sys.byteorder == "little" else "<"
DELTA = {"name": "numcodecs.delta", "configuration": {"dtype": "<f4", "astype": "<f8"}}
UNUSUAL: dict[str, dict[str, Any]] = {
    "filters that widen": {
        "zarr_format": 2,
        "filters": [numcodecs.Delta("<f4", "<f8"), numcodecs.Base64()],
        "compressor": numcodecs.Zstd(),
    },
    "compressed twice": v3_codecs(*COMPRESSORS_V3[:2]),
    "compressed shards": {
        "zarr_format": 3,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {"chunk_shape": [1, 2, 3], "codecs": v3_codecs()["codecs"]},
            },
            COMPRESSORS_V3[0],
        ],
    },
}


@pytest.mark.parametrize("array", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_chain_of_codecs_is_read_as_zarr_reads_it(
    tmp_path: Path, array: dict[str, Any]
) -> None:
    """By zarr itself, in a child process."""
    values = np.arange(96, dtype="f4").reshape(4, 4, 6)
    shape = {"shape": values.shape, "chunks": (2, 4, 6), "dtype": "f4", "fill_value": 0}
    expected = write_chain(tmp_path / "mp-1.zarr", {**shape, **array}, values)
    assert np.array_equal(expected, values)
    decoded = read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho"))
    assert same_bits(decoded.array, expected)


def test_codec_of_a_package_that_is_not_installed_is_no_damage(tmp_path: Path) -> None:
    """The store need not be converted again."""
    if "pcodec" in numcodecs.registry.codec_registry:
        pytest.skip("pcodec is installed")
    values = np.arange(96, dtype="f4").reshape(4, 4, 6)
    array = {"shape": values.shape, "chunks": (2, 4, 6), "dtype": "f4", "fill_value": 0}
    write_chain(tmp_path / "mp-1.zarr", {**array, **v3_codecs()}, values)
    path = tmp_path / "mp-1.zarr" / "rho" / "zarr.json"
    document = json.loads(path.read_text())
    document["codecs"] = [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}]
    path.write_text(json.dumps(document))
    with pytest.raises(SchemaError, match="install that package"):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho"))


def test_filtered_numbers_of_the_other_byte_order_are_read_right_or_refused(tmp_path: Path) -> None:
    """Zarr before 3.4 misreads them."""
    array = v3_codecs(endian="big")
    array["codecs"].insert(0, DELTA)
    values = np.arange(60, dtype="f4").reshape(3, 4, 5)
    shape = {"shape": values.shape, "chunks": (2, 4, 3), "dtype": "f4", "fill_value": 0}
    misread = write_chain(tmp_path / "mp-1.zarr", {**shape, **array}, values)
    what = OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho")
    if np.array_equal(misread, values):
        np.testing.assert_array_equal(read_array(what).array, values)
    else:
        check_that_byte_order_is_refused(tmp_path)


def check_that_byte_order_is_refused(directory: Path) -> None:
    """In both ways to read ``rho`` of ``mp-1.zarr``."""
    with pytest.raises(SchemaError, match="numbers in the other byte order"):
        read_array(OriginArray(LocalOrigin(str(directory)), "mp-1.zarr", "rho"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `write`
        group = zarr.open_group(str(directory / "mp-1.zarr"), mode="r")
        with pytest.raises(SchemaError, match="numbers in the other byte order"):
            density_of_group(group, "rho", "mp-1.zarr")


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "delta", "dtype": "f4"},
        {"name": "quantize", "dtype": "f4", "digits": 3},
        {"name": "fixedscaleoffset", "dtype": "f4", "astype": "i4", "offset": 0, "scale": 9},
        {"name": "astype", "encode_dtype": "f8", "decode_dtype": "f4"},
    ],
    ids=lambda settings: settings["name"],
)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_filter_set_to_the_other_byte_order_is_refused(
    tmp_path: Path, settings: dict[str, Any], is_sharded: bool
) -> None:
    """No version of zarr reads back what it writes with such settings in format 3."""
    settings = {key: SWAPPED + value if "type" in key else value for key, value in settings.items()}
    array = v3_codecs()
    array["codecs"].insert(
        0, {"name": f"numcodecs.{settings.pop('name')}", "configuration": settings}
    )
    if is_sharded:
        inner = {"chunk_shape": [1, 2, 3], "codecs": array["codecs"]}
        array["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
    values = np.arange(96, dtype="f4").reshape(4, 4, 6)
    shape = {"shape": values.shape, "chunks": (2, 4, 6), "dtype": "f4", "fill_value": 0}
    write_chain(tmp_path / "mp-1.zarr", {**shape, **array}, values)
    check_that_byte_order_is_refused(tmp_path)


@LAX
@given(store=stores() | chains(), data=st.data())
def test_damaged_store_gives_values_or_an_error_of_ours(
    tmp_path: Path, store: dict[str, Any], data: st.DataObject
) -> None:
    """One flipped bit or a truncation in any object: never another exception, never uninitialized
    memory.
    """
    path = tmp_path / "mp-1.zarr"
    shutil.rmtree(path, ignore_errors=True)
    if "array" in store:
        write(path, store)
    else:
        write_chain(path, store, np.ones(store["shape"]).astype(store["dtype"]))
    victim = data.draw(st.sampled_from(sorted(p for p in (path / "rho").rglob("*") if p.is_file())))
    raw = bytearray(victim.read_bytes())
    if raw and data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[data.draw(st.integers(0, len(raw))) :]
    victim.write_bytes(raw)
    with warnings.catch_warnings():
        # a damaged number may overflow, a damaged name may be a deprecated one
        warnings.simplefilter("ignore")
        try:
            read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho", fills=True))
        except (IncompleteArrayError, SchemaError):
            return


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.ones((4, 4), "c8"), "complex"),
        (np.array(["a", "b"], "U1"), "strings"),
        (np.array(["2020-01-01"], "M8[D]"), "M8"),
    ],
)
def test_array_that_is_not_of_real_numbers_is_refused(
    tmp_path: Path, values: NDArray[Any], word: str
) -> None:
    """The message names the type."""
    group = zarr.create_group(store=zarr.storage.LocalStore(tmp_path / "mp-1.zarr"), zarr_format=2)
    group.create_array("rho", shape=values.shape, dtype=values.dtype, chunks=values.shape)[...] = (
        values
    )
    with pytest.raises(SchemaError, match=f"{word}.*a charge density holds real numbers"):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho"))


GOOD_V2 = {
    "zarr_format": 2,
    "shape": [4],
    "chunks": [2],
    "dtype": "<f4",
    "compressor": None,
    "fill_value": 0,
    "order": "C",
}
CHANGES: list[dict[str, Any]] = [
    {"shape": "4"},
    {"shape": [-4]},
    {"shape": [4.5]},
    {"shape": None},
    {"shape": [2**60]},
    {"chunks": None},
    {"chunks": [0]},
    {"chunks": ["2"]},
    {"chunks": [2, 2]},
    {"chunks": 2},
    {"chunks": [2.0]},
    {"dtype": None},
    {"dtype": "<q9"},
    {"dtype": {"a": 1}},
    {"dtype": [["a", "<f4"]]},
    {"dtype": "|O"},
    {"compressor": "blosc"},
    {"compressor": {}},
    {"compressor": {"id": "nope"}},
    {"compressor": {"id": "pickle"}},
    {"compressor": {"id": "blosc", "x": 1}},
    {"fill_value": "zero"},
    {"fill_value": [1]},
    {"fill_value": 10**400},
    {"order": "X"},
    {"filters": 3},
    {"filters": [{"id": "pickle"}]},
    {"dimension_separator": "x"},
    {"dimension_separator": 3},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """With one of two errors and the URL; nothing is allocated, and no code from the data runs."""
    (tmp_path / "mp-1.zarr" / "rho").mkdir(parents=True)
    (tmp_path / "mp-1.zarr" / "rho" / ".zarray").write_text(json.dumps({**GOOD_V2, **change}))
    for number in (0, 1):
        (tmp_path / "mp-1.zarr" / "rho" / str(number)).write_bytes(bytes(8))
    with pytest.raises((SchemaError, IncompleteArrayError), match=r"mp-1\.zarr"):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "[" * 100_000, "\xff"])
def test_metadata_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    """The message names the document."""
    for name in (".zarray", "zarr.json"):
        store = f"{name.strip('.')}.zarr"
        path = tmp_path / store / "rho"
        path.mkdir(parents=True)
        (path / name).write_text(text, encoding="latin-1")
        with pytest.raises(SchemaError, match=re.escape(name)):
            read_array(OriginArray(LocalOrigin(str(tmp_path)), store, "rho"))


def test_array_larger_than_any_density_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    """A thousand bytes of metadata must not allocate a petabyte."""
    path = tmp_path / "mp-1.zarr"
    group = zarr.create_group(store=zarr.storage.LocalStore(path))
    group.create_array("rho", shape=(100_000,) * 3, dtype="f4", chunks=(16,) * 3)
    assert sum(os.stat(p).st_size for p in path.rglob("*")) < 100_000
    with pytest.raises(
        SchemaError, match=r"claims 4000000000000000 bytes .* more than [0-9]+ are refused"
    ):
        read_array(OriginArray(LocalOrigin(str(tmp_path)), "mp-1.zarr", "rho"))
