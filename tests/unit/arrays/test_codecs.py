"""A compressor of another package is decoded here once it is registered and named."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numcodecs
import numpy as np
import pytest
from numcodecs.abc import Codec

from zarrcache.arrays import decode
from zarrcache.arrays.decode import ArrayDecoder
from zarrcache.errors import IncompleteArrayError


class Reversed(Codec):  # type: ignore[misc]
    """Stores the bytes of a chunk in reverse."""

    codec_id: ClassVar[str] = "zarrcache-test-reversed"

    def encode(self, buf: Any) -> bytes:
        return bytes(buf)[::-1]

    def decode(self, buf: Any, out: Any = None) -> bytes:
        return bytes(buf)[::-1]


numcodecs.register_codec(Reversed)

VALUES = np.arange(24, dtype="<f4").reshape(4, 3, 2)
V2 = {
    "zarr_format": 2,
    "shape": [4, 3, 2],
    "chunks": [2, 3, 2],
    "dtype": "<f4",
    "order": "C",
    "filters": None,
    "fill_value": 0,
    "compressor": {"id": Reversed.codec_id},
}
V3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 3, 2],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 3, 2]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0.0,
    "codecs": [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "example.reversed"},
    ],
}


def decoded(documents: dict[str, Any], chunk_keys: tuple[str, str]) -> np.ndarray[Any, Any]:
    """The array of a store with two chunks."""
    chunks = {
        key: Reversed().encode(part.tobytes())
        for key, part in zip(chunk_keys, (VALUES[:2], VALUES[2:]), strict=True)
    }
    objects = {name: json.dumps(document).encode() for name, document in documents.items()} | chunks
    decoder = ArrayDecoder(objects, "s3://b/mp-1.zarr/a")
    for key, data in objects.items():
        decoder.add(key, data)
    return decoder.finish()


def test_v2_codec_of_another_package_is_decoded_by_its_numcodecs_id() -> None:
    """No entry in a table of ours is needed."""
    assert np.array_equal(decoded({".zarray": V2}, ("0.0.0", "1.0.0")), VALUES)


def test_v3_codec_of_another_package_is_decoded_once_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until then zarr decides, which does not know it."""
    keys = ("c/0/0/0", "c/1/0/0")
    with pytest.raises(IncompleteArrayError, match=r"s3://b/mp-1\.zarr/a cannot be decoded"):
        decoded({"zarr.json": V3}, keys)
    monkeypatch.setitem(decode.V3_CODECS, "example.reversed", Reversed.codec_id)
    assert np.array_equal(decoded({"zarr.json": V3}, keys), VALUES)
