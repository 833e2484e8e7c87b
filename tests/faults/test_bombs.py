"""Stores that hold or claim gigabytes in a few bytes are refused within 96 MiB.

The bombs are real: they hold what they claim, so that a reader that believes them is caught by its
memory.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import itertools
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest

from tests.support.memory import MIB, peak_of
from zarrcache import ZarrCacheError
from zarrcache.arrays import OriginArray, read_array
from zarrcache.origin import open_origin

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured through /proc"
)

ARRAY = "charge_density_total"
#: What a read may take above the size of the array.
SMALL = 96 * MIB
#: Size of the bombs' contents.
LARGE = 128 * MIB

Objects = dict[str, bytes]
RAW = {"name": "bytes", "configuration": {"endian": "little"}}
NOTHING = b"\xff" * 16


def v2(chunk: bytes, compressor: Any = None, filters: Any = None, **changes: Any) -> Objects:
    """A v2 array of 8 x 8 x 8 in one chunk."""
    document = {
        "zarr_format": 2,
        "shape": [8, 8, 8],
        "chunks": [8, 8, 8],
        "dtype": "<f4",
        "compressor": compressor,
        "filters": filters,
        "fill_value": 0,
        "order": "C",
        **changes,
    }
    return {".zarray": json.dumps(document).encode(), "0.0.0": chunk}


def v3(chunk: bytes, *codecs: Any, n: int = 8, **changes: Any) -> Objects:
    """A v3 array of n x n x n in one chunk."""
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n, n, n],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [n, n, n]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "attributes": {},
        "codecs": list(codecs),
        **changes,
    }
    return {"zarr.json": json.dumps(document).encode(), "c/0/0/0": chunk}


def codec(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "configuration": configuration}


def sharded(inner: list[int], *codecs: Any, at: str = "end", index: Any = (RAW,)) -> dict[str, Any]:
    """The codec that puts chunks of ``inner`` into shards; by default its index has no checksum."""
    return codec(
        "sharding_indexed",
        chunk_shape=inner,
        codecs=list(codecs),
        index_codecs=list(index),
        index_location=at,
    )


def grid(*chunk: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}


ZEROS: dict[str, Callable[[int], bytes]] = {
    "zlib": lambda n: zlib.compress(bytes(n), 1),
    "gzip": lambda n: gzip.compress(bytes(n), 1),
    "bz2": lambda n: bz2.compress(bytes(n)),
    "lzma": lambda n: lzma.compress(bytes(n), preset=0),
    "lz4": lambda n: bytes(numcodecs.LZ4().encode(np.zeros(n, np.uint8))),
    "zstd": lambda n: bytes(numcodecs.Zstd().encode(np.zeros(n, np.uint8))),
    "blosc": lambda n: bytes(numcodecs.Blosc().encode(np.zeros(n, np.uint8))),
}


@functools.cache
def zeros(kind: str) -> bytes:
    """128 MiB of zeros."""
    return ZEROS[kind](LARGE)


def skippable(content: bytes) -> bytes:
    """A zstd frame that decoders pass over."""
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(content)) + content


def zstd_of_repeated_blocks(nbytes: int) -> bytes:
    """A frame that declares no size, of blocks that repeat one byte 128 KiB long (RFC 8878)."""
    count = nbytes // (128 * 1024)
    return b"\x28\xb5\x2f\xfd\x00\x38" + b"".join(
        ((128 * 1024) << 3 | 1 << 1 | (i == count - 1)).to_bytes(3, "little") + b"\0"
        for i in range(count)
    )


def summed(index: bytes) -> bytes:
    return index + struct.pack("<I", google_crc32c.value(index))


def deep_json(count: int) -> bytes:
    """Lists within lists, side by side: 50 times the memory of the text."""
    return b"[" + b",".join([b"[" * 400 + b"]" * 400] * count) + b"]"


def attributes(value: bytes) -> Objects:
    """An array whose metadata holds ``value``."""
    objects = v3(bytes(2048), RAW)
    text = objects["zarr.json"].replace(b'"attributes": {}', b'"attributes": {"a": ' + value + b"}")
    return {**objects, "zarr.json": text}


def shard_of_one(kind: str, at: str) -> bytes:
    """A shard whose first chunk of eight is the bomb; its index has a checksum."""
    bomb = zeros(kind)
    offset = 0 if at == "end" else 16 * 8 + 4
    index = summed(struct.pack("<2Q", offset, len(bomb)) + NOTHING * 7)
    return bomb + index if at == "end" else index + bomb


def same_bytes_everywhere(count: int) -> bytes:
    """A shard in which all chunks are one: 4 KiB of zeros, gzipped, where 32 bytes are due."""
    bomb = gzip.compress(bytes(4096))
    return bomb + struct.pack("<2Q", 0, len(bomb)) * count


CRC = (RAW, {"name": "crc32c"})
WIDE = {"id": "astype", "encode_dtype": "<c16", "decode_dtype": "<f4"}
BOMBS: dict[str, Callable[[], Objects]] = {
    **{f"v2 {kind}": functools.partial(lambda k: v2(zeros(k), {"id": k}), kind) for kind in ZEROS},
    **{
        f"v2 filter {kind}": functools.partial(lambda k: v2(zeros(k), filters=[{"id": k}]), kind)
        for kind in ZEROS
    },
    **{
        f"v2 filter {kind} in zstd": functools.partial(
            lambda k: v2(zstd_of(zeros(k)), {"id": "zstd"}, [{"id": k}]),
            kind,
        )
        for kind in ("zlib", "bz2", "lzma", "gzip")
    },
    **{
        f"v3 numcodecs.{kind}": functools.partial(
            lambda k: v3(zeros(k), RAW, codec(f"numcodecs.{k}")), kind
        )
        for kind in ZEROS
    },
    "v3 checksum of a bomb": lambda: v3(
        summed(zeros("gzip")), RAW, codec("gzip", level=1), {"name": "crc32c"}
    ),
    "v3 bomb of a checksum": lambda: v3(
        gzip.compress(summed(bytes(LARGE)), 1), RAW, {"name": "crc32c"}, codec("gzip", level=1)
    ),
    "v3 three compressors": lambda: v3(
        zstd_of(gzip.compress(zeros("gzip"))),
        RAW,
        codec("gzip", level=1),
        codec("gzip", level=1),
        codec("zstd", level=0, checksum=False),
    ),
    "v3 filter that widens": lambda: v3(
        zeros("zstd"),
        codec("numcodecs.astype", encode_dtype="<f8", decode_dtype="<f4"),
        RAW,
        codec("zstd", level=0, checksum=False),
    ),
    "v3 filter of a megabyte": lambda: v3(
        b"x", codec("numcodecs.astype", encode_dtype="S1000000", decode_dtype="<f4"), RAW
    ),
    "v3 filter of many numbers": lambda: v3(
        b"x", codec("numcodecs.delta", dtype="(1000000,)f8"), RAW
    ),
    "v2 filter of a megabyte": lambda: v2(
        bytes(4 * MIB), filters=[{"id": "delta", "dtype": "<f4", "astype": "|V4000000"}]
    ),
    "v2 raw chunk that is too large, widened": lambda: v2(bytes(48 * MIB), filters=[WIDE]),
    "v2 filter that adds a list": lambda: v2(
        bytes(2048),
        filters=[
            {"id": "fixedscaleoffset", "scale": 1, "offset": [[0.0]] * 100_000, "dtype": "<f4"}
        ],
    ),
    "lengths of 3,000 digits": lambda: v2(b"", shape=[10**3000] * 3, chunks=[8, 8, 8]),
    "chunks of 3,000 digits": lambda: v2(b"", chunks=[10**3000] * 3),
    "v2 packed bits": lambda: v2(
        bytes(24 * MIB), filters=[{"id": "packbits"}], dtype="|b1", fill_value=False
    ),
    "zstd behind a skippable frame": lambda: v2(
        skippable(b"x" * 64) + zeros("zstd"), {"id": "zstd"}
    ),
    "zstd of many small frames": lambda: v2(
        bytes(numcodecs.Zstd().encode(np.zeros(MIB, np.uint8))) * 128, {"id": "zstd"}
    ),
    "zstd that tells no size behind one that does": lambda: v2(
        zstd_of(bytes(2048)) + zstd_of_repeated_blocks(LARGE), {"id": "zstd"}
    ),
    "zstd that tells no size, of an older format": lambda: v2(
        b"\x27\xb5\x2f\xfd" + zstd_of_repeated_blocks(LARGE)[4:], {"id": "zstd"}
    ),
    "zstd that tells no size in gzip": lambda: v3(
        zstd_of_repeated_blocks(LARGE),
        RAW,
        codec("gzip", level=1),
        codec("zstd", level=0, checksum=False),
    ),
    "shard, index at the start": lambda: v3(
        shard_of_one("gzip", "start"),
        sharded([4, 4, 4], RAW, codec("gzip", level=1), at="start", index=CRC),
    ),
    "shard, inner bomb smaller than the shard": lambda: v3(
        gzip.compress(bytes(200 * 1024))
        + struct.pack("<2Q", 0, len(gzip.compress(bytes(200 * 1024))))
        + NOTHING * 511,
        sharded([8, 8, 8], RAW, codec("gzip", level=1)),
        n=64,
    ),
    "shard in zstd": lambda: v3(
        zstd_of(zeros("gzip") + struct.pack("<2Q", 0, len(zeros("gzip")))),
        sharded([64, 64, 64], RAW, codec("gzip", level=1)),
        codec("zstd", level=0, checksum=False),
        n=64,
    ),
    "shard whose chunks are all the same bytes": lambda: v3(
        same_bytes_everywhere(64**3 // 8),
        sharded([2, 2, 2], RAW, codec("gzip", level=1)),
        n=64,
    ),
    "shard of a billion chunks in zstd": lambda: v3(
        zeros("zstd"),
        sharded([1, 1, 1], RAW),
        codec("zstd", level=0, checksum=False),
        n=8,
        chunk_grid=grid(1024, 1024, 1024),
    ),
    "shard that points outside": lambda: v3(
        bytes(64) + struct.pack("<2Q", 2**63, 2**63 - 1), sharded([8, 8, 8], RAW)
    ),
    "shard in a shard": lambda: v3(
        (inner := zeros("gzip") + struct.pack("<2Q", 0, len(zeros("gzip"))) + NOTHING * 7)
        + struct.pack("<2Q", 0, len(inner))
        + NOTHING * 511,
        sharded([8, 8, 8], sharded([4, 4, 4], RAW, codec("gzip", level=1))),
        n=64,
    ),
    "a billion chunks": lambda: v2(bytes(4), shape=[10**9, 1, 1], chunks=[1, 1, 1], dtype="|i1"),
    "a billion chunks for zarr": lambda: v2(
        bytes(4), {"id": "nope"}, shape=[10**9, 1, 1], chunks=[1, 1, 1], dtype="|i1"
    ),
    "a chunk of a gigabyte": lambda: v2(zeros("zstd"), {"id": "zstd"}, chunks=[512, 512, 1024]),
    "a chunk of 64 MiB, widened": lambda: v2(
        zeros("zstd"), {"id": "zstd"}, [WIDE], chunks=[256, 256, 256]
    ),
    "petabytes": lambda: v2(b"", shape=[10**5] * 3),
    "axes without end": lambda: v2(b"", shape=[1] * 10**5, chunks=[1] * 10**5),
    "deep attributes": lambda: attributes(deep_json(4000)),
    "wide attributes": lambda: attributes(b"[" + b"{}," * 1_300_000 + b"{}]"),
    "long attributes": lambda: attributes(b'"' + b"x" * (8 * MIB) + b'"'),
    "deep codecs": lambda: v3(b"", *json.loads(b"[" * 900 + b"]" * 900)),
}


def zstd_of(data: bytes) -> bytes:
    return bytes(numcodecs.Zstd().encode(data))


def read(directory: Path, store: str) -> str:
    """The error's message, or the shape."""
    try:
        decoded = read_array(OriginArray(open_origin(directory), store, ARRAY))
    except ZarrCacheError as exc:
        return f"{type(exc).__name__}: {exc}"
    return f"read {decoded.array.shape}"


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import everything first, so that imports do not count as memory."""
    directory = tmp_path_factory.mktemp("imported")
    sound = [v2(bytes(2048)), v3(bytes(2048), RAW), v2(b"", {"id": "nope"})]
    for (i, objects), as_zip in itertools.product(enumerate(sound), (False, True)):
        write(directory, objects, as_zip=as_zip, name=f"mp-{i}.zarr")
        read(directory, f"mp-{i}.zarr{'.zip' * as_zip}")


def write(directory: Path, objects: Objects, *, as_zip: bool, name: str = "mp-1.zarr") -> None:
    if as_zip:
        with zipfile.ZipFile(directory / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(".zgroup", '{"zarr_format": 2}')
            for key, data in objects.items():
                archive.writestr(f"{ARRAY}/{key}", data)
        return
    for key, data in objects.items():
        path = directory / name / ARRAY / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_takes_little_memory(tmp_path: Path, name: str) -> None:
    """It is refused by name; no bomb is a sound array."""
    objects = BOMBS[name]()
    write(tmp_path, objects, as_zip=False)
    words, peak = peak_of(read, tmp_path, "mp-1.zarr")
    assert words.startswith(("SchemaError", "IncompleteArrayError"))
    assert str(tmp_path) in words
    assert peak < SMALL + sum(map(len, objects.values())), words


@pytest.mark.parametrize("name", ["v2 zstd", "v3 three compressors", "deep attributes"])
def test_bomb_in_a_zip_takes_little_memory(tmp_path: Path, name: str) -> None:
    write(tmp_path, BOMBS[name](), as_zip=True)
    words, peak = peak_of(read, tmp_path, "mp-1.zarr.zip")
    assert str(tmp_path) in words
    assert peak < SMALL
