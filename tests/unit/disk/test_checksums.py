"""CRC-32C against published values and a reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarrcache.disk import crc32c


def _reference(data: bytes, previous: int = 0) -> int:
    """Bit by bit, with the reflected polynomial of RFC 3720."""
    crc = previous ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_values_are_met(data: bytes, crc: int) -> None:
    """RFC 3720, appendix B.4, and the catalogue's check value of CRC-32/ISCSI."""
    assert crc32c(data) == crc


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_values_are_those_of_the_reference_and_continue(first: bytes, second: bytes) -> None:
    assert crc32c(first) == _reference(first)
    assert crc32c(second, crc32c(first)) == _reference(first + second)


def test_a_grid_a_view_of_it_and_its_bytes_have_one_value() -> None:
    """100 kB: the library releases the GIL from 32 KiB on."""
    grid = np.random.default_rng(0).standard_normal((25, 32, 32)).astype(np.float32)
    assert crc32c(grid) == crc32c(memoryview(grid)) == crc32c(grid.tobytes())
    assert crc32c(grid.tobytes()) == _reference(grid.tobytes())


def test_a_grid_with_gaps_is_refused() -> None:
    """Its bytes are not those between its first and last address."""
    with pytest.raises(ValueError, match="C-contiguous"):
        crc32c(np.zeros((4, 4), np.float32)[:, ::2])
