"""Fill values in every spelling of both formats are those of zarr, or the array is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.buffer import default_buffer_prototype

from zarrcache.arrays.decode import ArrayDecoder
from zarrcache.errors import SchemaError


def documents(zarr_format: int, dtype: str, fill_value: Any) -> dict[str, bytes]:
    """A small array without a chunk."""
    if zarr_format == 2:
        document = {
            "zarr_format": 2,
            "shape": [2, 2, 2],
            "chunks": [2, 2, 2],
            "dtype": np.dtype(dtype).str,
            "compressor": None,
            "filters": None,
            "order": "C",
        }
    else:
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [2, 2, 2],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 2, 2]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "attributes": {},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
    if fill_value is not ...:
        document["fill_value"] = fill_value
    return {".zarray" if zarr_format == 2 else "zarr.json": json.dumps(document).encode()}


def filled(objects: dict[str, bytes]) -> Any:
    decoder = ArrayDecoder(objects, "s3://b/mp-1.zarr/a")
    for key, data in objects.items():
        decoder.add(key, data)
    return decoder.finish()


@pytest.mark.parametrize(
    ("zarr_format", "dtype", "fill_value"),
    [
        *((n, "float32", fill) for n in (2, 3) for fill in (0, 1, -1.5, 0.1, 1e30, -0.0)),
        *((n, "float64", fill) for n in (2, 3) for fill in ("NaN", "Infinity", "-Infinity")),
        *((n, "int16", fill) for n in (2, 3) for fill in (0, 5, -(2**15), 2**15 - 1)),
        *((n, "uint8", 255) for n in (2, 3)),
        *((n, "bool", fill) for n in (2, 3) for fill in (True, False)),
        (2, "float32", None),
        (2, "int16", None),
        (3, "float32", "0x3fc00000"),
        (3, "float32", "0x7fc00001"),
        (3, "float64", "0x3ff8000000000000"),
        (3, "float16", "0x3e00"),
    ],
)
def test_a_fill_value_is_the_one_of_zarr(zarr_format: int, dtype: str, fill_value: Any) -> None:
    objects = documents(zarr_format, dtype, fill_value)
    raw = {
        f"a/{key}": default_buffer_prototype().buffer.from_bytes(data)
        for key, data in objects.items()
    }
    theirs = zarr.open_array(zarr.storage.MemoryStore(raw), path="a", mode="r")[...]
    ours = filled(objects)
    assert ours.dtype == theirs.dtype
    assert ours.tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize(
    ("zarr_format", "dtype", "fill_value"),
    [
        (3, "float32", "0x3f"),
        (3, "float32", "zero"),
        (3, "float32", [1]),
        (3, "int16", 2**15),
        (3, "int16", 1.5),
        (3, "uint8", -1),
        (2, "int16", 2**15),
        (2, "uint8", -1),
        (2, "int16", "NaN"),
        (2, "float32", {"a": 1}),
    ],
)
def test_a_fill_value_that_its_type_cannot_hold_is_refused(
    zarr_format: int, dtype: str, fill_value: Any
) -> None:
    with pytest.raises(SchemaError, match=r"does not describe a Zarr array that can be read"):
        filled(documents(zarr_format, dtype, fill_value))
