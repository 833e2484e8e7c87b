"""How several configs are combined, and electrai's split."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zarrcache import ConfigError
from zarrcache.data import Split
from zarrcache.train.multi import permuted_split


@pytest.mark.parametrize(
    ("seed", "order"), [(42, [6, 3, 0, 7, 2, 1, 4, 5]), (7, [7, 0, 3, 4, 1, 5, 2, 6])]
)
def test_a_permuted_split_is_that_of_electrai(seed: int, order: list[int]) -> None:
    """Validation is the first ``int(n * val_frac)`` of torch's permutation, train the rest."""
    ids = [f"mp-{number}" for number in range(8)]
    drawn = tuple(ids[place] for place in order)
    assert permuted_split(ids, 0.29, seed) == Split(drawn[2:], drawn[:2])
    assert permuted_split(ids, 0.005, seed) == Split(drawn)


@pytest.mark.parametrize("val_frac", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.1", None, True])
def test_a_permuted_split_refuses_what_is_no_share(val_frac: Any) -> None:
    with pytest.raises(ConfigError, match=r"^val_frac is .*from 0 to below 1"):
        permuted_split(["mp-1", "mp-2"], val_frac, 42)
