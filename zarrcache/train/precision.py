"""The precision of a training: what float16 cannot hold, and float16 and bfloat16 made float32."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zarrcache.disk import use_converter
from zarrcache.errors import SchemaError

__all__ = ["DTYPES", "Precision"]

logger = logging.getLogger(__name__)

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

#: Below it, float16 has fewer bits. The share of such values that is not worth a warning: a density
#: that crosses zero has some.
_SUBNORMAL_FLOAT16, _TOLERATED_SHARE = 2.0**-14, 0.01

_imported_in = os.getpid()
_CONVERTED_AT_ONCE = 2**20


def _convert(stored: NDArray[Any], floats: NDArray[np.float32], scale: int) -> bool:
    """Decode float16, or bfloat16 as uint16, in half of NumPy's time, unless torch could hang."""
    # In a fork of a process that has used OpenMP, a copy by several threads hangs. A DataLoader
    # worker has one thread.
    if os.getpid() != _imported_in and torch.get_num_threads() > 1:
        return False
    halves = torch.from_numpy(stored)
    if stored.dtype == np.uint16:
        halves = halves.view(torch.bfloat16)
    # In steps that stay in the last-level cache. Smaller ones cost more calls than they save.
    for source, target in zip(
        torch.split(halves, _CONVERTED_AT_ONCE),
        torch.split(torch.from_numpy(floats), _CONVERTED_AT_ONCE),
        strict=True,
    ):
        target.copy_(source)
        if scale:
            target.mul_(2.0**scale)
    return True


use_converter(_convert)


class Precision:
    """Checks the casts of one dataset."""

    def __init__(self) -> None:
        #: Sides with a reported underflow.
        self._underflows: set[int] = set()

    def check(self, tensor: torch.Tensor, cast: torch.Tensor, field: int, name: str) -> None:
        """Refuse values that float16 cannot hold.

        Warn once per dataset, side and process if it loses small ones.
        """
        if cast.dtype is not torch.float16:
            return
        low, high = (x.item() for x in torch.aminmax(tensor))
        limit = torch.finfo(torch.float16).max
        if low < -limit or high > limit:
            raise SchemaError(
                f"{name} has values from {low:.6g} to {high:.6g}; the largest float16 is "
                f"{limit:.0f}. Use bf16 or f32, or normalize the densities (normalize_data: true) "
                "and heed the warning about small values."
            )
        is_large = low >= _SUBNORMAL_FLOAT16 or high <= -_SUBNORMAL_FLOAT16
        if is_large or field in self._underflows:
            return
        lost = int(torch.count_nonzero(tensor)) - int(torch.count_nonzero(cast))
        is_small = (tensor != 0) & (tensor.abs() < _SUBNORMAL_FLOAT16)
        small = int(torch.count_nonzero(is_small)) - lost
        if lost or small > _TOLERATED_SHARE * tensor.numel():
            self._underflows.add(field)
            logger.warning(
                "%s: float16 turns %.3g %% of the values into 0, and another %.3g %% are below "
                "%.2g, where it has less than 11 bits (%d and %d of %d values). Use bf16 or f32%s. "
                "Other samples of this dataset are not reported.",
                name,
                100 * lost / tensor.numel(),
                100 * small / tensor.numel(),
                _SUBNORMAL_FLOAT16,
                lost,
                small,
                tensor.numel(),
                ", or densities that are not normalized" if high < 1 else "",
            )
