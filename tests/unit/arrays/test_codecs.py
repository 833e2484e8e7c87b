"""Codecs of other packages are decoded by zarr, in a child process of bounded memory."""

from __future__ import annotations

import json
import resource
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from zarrcache.arrays.decode import ArrayDecoder
from zarrcache.errors import IncompleteArrayError, SchemaError, ZarrCacheError

VALUES = np.arange(24, dtype="<f4").reshape(4, 3, 2)
V2 = {
    "zarr_format": 2,
    "shape": [4, 3, 2],
    "chunks": [2, 3, 2],
    "dtype": "<f4",
    "order": "C",
    "filters": None,
    "fill_value": 0,
    "compressor": {"id": "example-reversed"},
}
V3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 3, 2],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 3, 2]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0.0,
    "attributes": {},
    "codecs": [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "example.reversed"},
    ],
}
#: A package with a codec that stores the bytes of a chunk in reverse. A chunk that starts with
#: "bomb" becomes 300 MiB; one that starts with "die" ends the process, with "kill" as the kernel
#: does when memory is full.
PACKAGE = """
    import os
    from dataclasses import dataclass
    from numcodecs.abc import Codec
    from zarr.abc.codec import BytesBytesCodec

    def decoded(data):
        if data.startswith(b"bomb"):
            return b"x" * (300 * 2**20)
        if data.startswith(b"die"):
            os._exit(1)
        if data.startswith(b"kill"):
            os.kill(os.getpid(), 9)
        return data[::-1]

    class Reversed(Codec):
        codec_id = "example-reversed"
        def encode(self, buf):
            return bytes(buf)[::-1]
        def decode(self, buf, out=None):
            return decoded(bytes(buf))

    @dataclass(frozen=True)
    class Reversed3(BytesBytesCodec):
        is_fixed_size = True
        @classmethod
        def from_dict(cls, data):
            return cls()
        def to_dict(self):
            return {"name": "example.reversed"}
        def compute_encoded_size(self, nbytes, spec):
            return nbytes
        async def _decode_single(self, chunk, spec):
            return spec.prototype.buffer.from_bytes(decoded(chunk.to_bytes()))
        def _decode_sync(self, chunk, spec):
            return spec.prototype.buffer.from_bytes(decoded(chunk.to_bytes()))
        async def _encode_single(self, chunk, spec):
            return chunk
    """
ENTRY_POINTS = """
    [numcodecs.codecs]
    example-reversed = example_reversed:Reversed
    [zarr.codecs]
    example.reversed = example_reversed:Reversed3
    """


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is on the path, with its entry points."""
    (tmp_path / "example_reversed.py").write_text(textwrap.dedent(PACKAGE))
    info = tmp_path / "example_reversed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-reversed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(ENTRY_POINTS))
    monkeypatch.syspath_prepend(tmp_path)


def decoded(zarr_format: Literal[2, 3], first: bytes | None = None) -> np.ndarray[Any, Any]:
    """The array of a store with two chunks and a stray file, ``first`` in place of the first."""
    keys = ("0.0.0", "1.0.0") if zarr_format == 2 else ("c/0/0/0", "c/1/0/0")
    chunks = {
        key: part.tobytes()[::-1] for key, part in zip(keys, (VALUES[:2], VALUES[2:]), strict=True)
    }
    if first is not None:
        chunks[keys[0]] = first
    name, document = (".zarray", V2) if zarr_format == 2 else ("zarr.json", V3)
    objects = {name: json.dumps(document).encode(), ".DS_Store": b"x"} | chunks
    decoder = ArrayDecoder(objects, "s3://b/mp-1.zarr/a")
    for key, data in objects.items():
        decoder.add(key, data)
    return decoder.finish()


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_codec_of_another_package_is_decoded(zarr_format: Literal[2, 3]) -> None:
    values = decoded(zarr_format)
    np.testing.assert_array_equal(values, VALUES)
    assert values.flags.writeable
    assert "example_reversed" not in sys.modules  # not in the process that trains


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"short", "ValueError"),
        (b"bomb", "it takes more than 64.0 MiB of memory"),
        (b"die", "the process that decoded it was ended"),
    ],
)
def test_chunk_of_such_a_codec_that_is_no_chunk_is_refused(first: bytes, reason: str) -> None:
    """The child process ends, not this one."""
    with pytest.raises(
        IncompleteArrayError, match=rf"^s3://b/mp-1\.zarr/a cannot be decoded by zarr \({reason}"
    ):
        decoded(2, first)


@pytest.mark.usefixtures("_installed")
def test_a_node_without_memory_is_not_taken_for_a_damaged_chunk() -> None:
    """The child is killed, or does not start."""
    words = r"mp-1\.zarr/a could not be decoded, because the process .* memory may be full"
    with pytest.raises(ZarrCacheError, match=words) as caught:
        decoded(2, b"kill")
    assert type(caught.value) is ZarrCacheError
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1, hard))  # inherited by the child
    try:
        with pytest.raises(ZarrCacheError, match=words):
            decoded(2)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_codec_that_is_not_installed_is_named(zarr_format: Literal[2, 3]) -> None:
    """Also what to do."""
    with pytest.raises(SchemaError, match=r"example.reversed.*install that package"):
        decoded(zarr_format)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"example.scale": {"must_understand": True, "factor": 2}}, "example.scale"),
        ({"example.scale": {"name": "example.scale"}}, "example.scale"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "little", "x": 1}}]}, "Codec"),
        ({"node_type": "group"}, "node_type 'group'"),
        ({"zarr_format": 2}, "zarr_format 2"),
    ],
)
def test_document_with_a_part_that_is_not_known_is_never_read_as_if_it_were_not_there(
    change: dict[str, Any], reason: str
) -> None:
    """They are refused by zarr too: the part may change what the chunks mean."""
    plain = {**V3, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    with pytest.raises(SchemaError, match=reason):
        _read_v3({**plain, **change})


def test_extension_that_need_not_be_understood_is_ignored() -> None:
    plain = {**V3, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    values = _read_v3({**plain, "example.note": {"must_understand": False}})
    np.testing.assert_array_equal(values, VALUES)


def _read_v3(document: dict[str, Any]) -> np.ndarray[Any, Any]:
    objects = {
        "zarr.json": json.dumps(document).encode(),
        "c/0/0/0": VALUES[:2].tobytes(),
        "c/1/0/0": VALUES[2:].tobytes(),
    }
    decoder = ArrayDecoder(objects, "s3://b/mp-1.zarr/a")
    for key, data in objects.items():
        decoder.add(key, data)
    return decoder.finish()
