"""The error bound of each encoding, and the values that none may round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from zarrcache._keys import check_encoding
from zarrcache.disk import encoding as module
from zarrcache.disk.encoding import StoredAs, decode, encode, stored_layout

ENCODINGS = ["float16", "bfloat16", "bits:1", "bits:12", "bits:22"]
#: Mantissa bits that are kept, as the documentation states them.
KEPT = {"float16": 10, "bfloat16": 7, "bits:1": 1, "bits:12": 12, "bits:22": 22}
TINY = float(np.finfo(np.float32).smallest_subnormal)


def density(scale: float, shape: tuple[int, ...] = (5, 6, 7)) -> NDArray[np.float32]:
    """Positive values over five orders of magnitude around ``scale``."""
    spread = np.random.default_rng(1).uniform(-2.5, 2.5, shape)
    return (scale * 10**spread).astype(np.float32)


def check(values: NDArray[np.float32], encoding: str) -> StoredAs:
    """Encode, decode, and compare with the bound, in float64 and by another formula."""
    encoded = encode(values, encoding)
    assert encoded is not None
    stored_as, payload = encoded
    dtype, shape = stored_layout(stored_as, values.shape, payload.nbytes)
    assert (payload.dtype.newbyteorder("<"), payload.shape) == (np.dtype(dtype), shape)
    decoded = decode(stored_as, payload, values.shape)
    assert decoded.dtype == np.float32
    exact = values.astype(np.float64)
    allowed = stored_as.relative_error * np.abs(exact) + stored_as.absolute_error
    assert (np.abs(decoded.astype(np.float64) - exact) <= allowed).all()
    assert stored_as.relative_error == 2.0 ** -(1 + KEPT[encoding])
    return stored_as


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-7, 1e-5, 1.0, 1e3, 1e6, 1e15, 1e34])
def test_normalised_and_other_densities_keep_all_bits_of_the_encoding(
    encoding: str, scale: float
) -> None:
    """Also those that float16 itself turns into 0 or infinity: no absolute error is allowed."""
    assert check(density(scale), encoding).absolute_error == 0.0
    assert check(-density(scale), encoding).absolute_error == 0.0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_of_both_signs_are_kept(encoding: str) -> None:
    values = np.array([0.0, -0.0, 1.0, 0.0], np.float32)
    stored_as, payload = encode(values, encoding) or pytest.fail("not encoded")
    decoded = decode(stored_as, payload, values.shape)
    assert np.array_equal(np.signbit(decoded), np.signbit(values))
    assert np.array_equal(decoded, values)
    assert encode(np.zeros((3, 3, 3), np.float32), encoding) is not None


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_encoded(encoding: str, value: float) -> None:
    values = density(1.0)
    values[1, 2, 3] = value
    assert encode(values, encoding) is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_value_that_would_round_to_infinity_is_not_encoded(encoding: str) -> None:
    largest = np.full((2, 2, 2), np.finfo(np.float32).max)
    assert encode(largest, encoding) is None
    check((largest / 2).astype(np.float32), encoding)


def test_float16_holds_a_small_part_of_the_largest_value_with_a_stated_absolute_error() -> None:
    """A slab: vacuum with ripples beside nuclei."""
    values = density(1.0)
    values[0, 0, :3] = 1e-12, -3e-11, TINY
    stored_as = check(values, "float16")
    assert 0 < stored_as.absolute_error <= 2.0**-39 * values.max()


def test_float16_does_not_hold_a_density_of_nothing_but_tiny_values() -> None:
    """Their scale would need numbers that float32 has with fewer bits."""
    assert encode(density(1e-36), "float16") is None
    check(density(1e-36), "bfloat16")


def test_subnormal_float32_are_rounded_within_an_absolute_error() -> None:
    for encoding in ("bfloat16", "bits:12"):
        assert check(np.array([TINY, 1.0], np.float32), encoding).absolute_error > 0


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=4),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_every_density_is_within_its_bound_or_not_encoded(
    encoding: str, values: NDArray[np.float32]
) -> None:
    if encode(values, encoding) is not None:
        check(values, encoding)


def test_values_are_rounded_to_nearest_ties_to_even() -> None:
    """As NumPy and torch round: what the model sees equals a cast of the float32 values."""
    values = np.random.default_rng(2).uniform(0.1, 6e4, 200_000).astype(np.float32)
    stored_as, payload = encode(values, "float16") or pytest.fail("not encoded")
    assert stored_as.scale == 0
    assert np.array_equal(payload, values.astype(np.float16))
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1.0, -1 - 2.0**-8], np.float32)
    stored_as, payload = encode(ties, "bfloat16") or pytest.fail("not encoded")
    expected = [1.0, 1 + 2.0**-6, 1.0, -1.0]
    assert decode(stored_as, payload, ties.shape).tolist() == expected


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_grids_longer_than_a_step_and_a_frame(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zarrcache.disk.encoding._FRAME_BYTES", 2**16)
    check(density(1.0, (70, 40, 31)), encoding)


@pytest.mark.parametrize("damage", ["cut", "longer", "other length", "noise", "empty"])
def test_damaged_frames_are_refused(damage: str) -> None:
    """Their checksum may be right: a planted entry."""
    values = density(1.0, (20, 20, 20))
    stored_as, payload = encode(values, "bits:12") or pytest.fail("not encoded")
    raw = bytearray(payload.tobytes())
    if damage == "cut":
        del raw[-9:]
    elif damage == "longer":
        raw += b"\0"
    elif damage == "other length":
        raw[4:8] = (4 * values.size + 4).to_bytes(4, "little")
    elif damage == "noise":
        raw[16:200] = b"\xff" * 184
    else:
        raw.clear()
    with pytest.raises(ValueError, match=r"frame|decod|blosc"):
        decode(stored_as, np.frombuffer(bytes(raw), np.uint8), values.shape)


@pytest.mark.parametrize(
    "wrong",
    ["float64", "Float16", "half", "bits", "bits:", "bits:0", "bits:23", "bits:012", "bits:-3", 16,
     None, "", "bits: 12", "float16 "],
)  # fmt: skip
def test_other_encodings_are_refused_in_words(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"is not an encoding. Write float32, float16, bfloat16"):
        check_encoding(wrong)


@pytest.mark.parametrize("normal", [True, False])
@pytest.mark.parametrize("scale", [1e-20, 1e-7, 1.0, 1e34])
def test_torch_converts_to_the_same_values(
    scale: float, normal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where torch flushes subnormal numbers to 0."""
    from zarrcache.train import precision

    values = density(scale, (60, 50, 51))
    if not normal:
        values[0, 0, :3] *= np.float32(1e-9)
    stored_as, payload = encode(values, "float16") or pytest.fail("not encoded")
    monkeypatch.setattr(module, "_converters", [])
    by_numpy = decode(stored_as, payload, values.shape)
    monkeypatch.setattr(module, "_converters", [precision._convert])
    assert np.array_equal(decode(stored_as, payload, values.shape), by_numpy)
    monkeypatch.setattr(precision, "_imported_in", -1)  # a fork
    assert np.array_equal(decode(stored_as, payload, values.shape), by_numpy)
    torch.set_flush_denormal(True)
    try:
        for converters in ([], [precision._convert]):
            monkeypatch.setattr(module, "_converters", converters)
            assert np.array_equal(decode(stored_as, payload, values.shape), by_numpy)
    finally:
        torch.set_flush_denormal(False)
