"""Make a batch of samples whose grids may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from zarrcache.train.worker_transfer import Structure

__all__ = ["collate", "collate_fn", "collate_in_lists"]


def collate_fn(batch: Sequence[Any]) -> Any:
    """Collate samples into a batch; if any shapes differ, into lists.

    Samples of equal shapes go through ``default_collate``. Otherwise every field of the batch is a
    list of the samples' values: ``{"data": [...], "label": [...], "index": [...]}`` for dicts,
    ``[[...], [...]]`` for tuples. All fields are lists then, so a model that finds a list in
    ``data`` finds one in ``label``. Only the shapes decide; errors of ``default_collate`` are not
    caught.
    """
    first = batch[0]
    shapes = _shapes(first)
    if all(_shapes(sample) == shapes for sample in batch[1:]):
        return default_collate(list(batch))
    if isinstance(first, Mapping):
        return {key: [sample[key] for sample in batch] for key in first}
    if isinstance(first, (tuple, list)):
        return [list(values) for values in zip(*batch, strict=True)]
    return list(batch)


def collate_in_lists(batch: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Collate samples with ``augment_on="device"``: a list for each key, nothing is copied."""
    return {key: [sample[key] for sample in batch] for key in batch[0]}


#: The public name of ``collate_fn``, which is named after DataLoader's argument.
collate = collate_fn


def _shapes(sample: Any) -> Any:
    """The shapes of a sample's tensors and arrays, nested as the sample is."""
    if isinstance(sample, Mapping):
        return [
            None if isinstance(value, Structure) else _shapes(value) for value in sample.values()
        ]
    if isinstance(sample, (tuple, list)):
        return [_shapes(value) for value in sample]
    return tuple(sample.shape) if isinstance(sample, (torch.Tensor, np.ndarray)) else None
