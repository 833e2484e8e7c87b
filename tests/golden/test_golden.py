"""The bytes of an entry are frozen: caches outlive the version that wrote them."""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.cachedirs import settings
from zarrcache._keys import FORMAT_VERSION, ArrayKey
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk.entry import (
    header_of,
    map_entry,
    new_entry,
    read_attributes_of,
    write_entry,
)
from zarrcache.stats import Counters

GOLDEN = Path(__file__).parent / "entry_v1.bin"
KEY = ArrayKey("https://s3.example.org", "s3://bucket/label/mp-1.zarr", "charge_density_total")
SOURCE = "31fcf2fb78e78e3ea834ade5ea9c542c"


def golden_array() -> NDArray[Any]:
    """Values whose bytes are the same on every machine."""
    return (np.arange(24, dtype="<f4") / np.float32(8)).reshape(2, 3, 4)


def test_entry_format_has_not_changed(tmp_path: Path) -> None:
    """One changed byte would make existing caches unreadable, or readable wrongly."""
    with FileIO(tmp_path / "entry", "wb") as file:
        write_entry(file, header_of(KEY, golden_array(), SOURCE), golden_array())
    assert (tmp_path / "entry").read_bytes() == GOLDEN.read_bytes(), (
        "entry format changed: bump FORMAT_VERSION"
    )


def test_golden_entry_can_be_read() -> None:
    """Identity, source, shape and values."""
    entry = map_entry(GOLDEN)
    assert entry.header == header_of(KEY, golden_array(), SOURCE)
    assert np.array_equal(entry.array, golden_array())
    assert entry.is_intact()


def test_attributes_follow_the_payload(tmp_path: Path) -> None:
    """What precedes them is the entry of the same values; their length and checksum are named."""
    attributes = b"compressed attributes"
    entry = new_entry(KEY, golden_array(), SOURCE, attributes=attributes)
    with FileIO(tmp_path / "entry", "wb") as file:
        write_entry(file, entry.header, entry.stored, attributes)
    raw = (tmp_path / "entry").read_bytes()
    plain = GOLDEN.read_bytes()
    assert raw[4096:] == plain[4096:] + attributes
    wanted = {**json.loads(plain[20:4096].rstrip(b"\0")), "attributes": [21, 1564636153]}
    assert json.loads(raw[20:4096].rstrip(b"\0")) == wanted
    assert read_attributes_of(tmp_path / "entry") == (entry.header, attributes)
    assert np.array_equal(map_entry(tmp_path / "entry").array, golden_array())


def encoded_key(encoding: str) -> ArrayKey:
    return ArrayKey(KEY.origin, KEY.url, f"{KEY.array} as {encoding}")


def encoded_array() -> NDArray[Any]:
    """Values that every encoding rounds, and one that float16 holds as a subnormal number."""
    values = np.arange(1, 25, dtype="<f4") / np.float32(7e6)
    values[3] = 3e-17
    return values.reshape(2, 3, 4)


def golden_of(encoding: str) -> Path:
    return GOLDEN.with_name(f"entry_v2_{encoding.replace(':', '')}.bin")


@pytest.mark.parametrize("encoding", ["float16", "bfloat16"])
def test_format_of_encoded_entries_has_not_changed(encoding: str, tmp_path: Path) -> None:
    """The bytes of ``bits:N`` are those of the Blosc that is installed, so only its reading is."""
    entry = new_entry(encoded_key(encoding), encoded_array(), SOURCE)
    with FileIO(tmp_path / "entry", "wb") as file:
        write_entry(file, entry.header, entry.stored)
    assert (tmp_path / "entry").read_bytes() == golden_of(encoding).read_bytes()


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "bits:12"])
def test_encoded_golden_entry_can_be_read(encoding: str) -> None:
    entry = map_entry(golden_of(encoding))
    assert entry.is_intact()
    assert entry.header.key == encoded_key(encoding)
    stored_as = entry.header.stored_as
    assert stored_as is not None
    assert stored_as.encoding == encoding
    assert entry.array.dtype == np.float32
    assert np.array_equal(entry.array, new_entry(entry.header.key, encoded_array(), SOURCE).array)
    error = np.abs(entry.array.astype(np.float64) - encoded_array())
    bound = stored_as.relative_error * np.abs(encoded_array()) + stored_as.absolute_error
    assert error.max() > 0
    assert (error <= bound).all()


def test_version_is_in_path_digest_and_header(tmp_path: Path) -> None:
    """In three places, so that no version meets files of another."""
    assert (
        ArrayCache(settings(tmp_path), Counters()).index.dir.root.name
        == f"zarrcache-v{FORMAT_VERSION}"
    )
    assert int.from_bytes(GOLDEN.read_bytes()[8:12], "little") == FORMAT_VERSION


def test_entry_of_an_unknown_version_is_a_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is dropped and counted, and the next put can be read."""
    counters = Counters()
    cache = ArrayCache(settings(tmp_path), counters)
    cache.put(KEY, golden_array(), source=SOURCE)
    (info,) = cache.entries()
    path = cache.index.dir.root / info.filename
    raw = bytearray(path.read_bytes())
    raw[8] = 3
    path.write_bytes(raw)
    assert cache.get(KEY) is None
    assert "format version 3, known are 1 and 2" in caplog.text
    assert counters.snapshot().purges == 1
    assert cache.put(KEY, golden_array(), source=SOURCE)
    assert cache.get(KEY) is not None
