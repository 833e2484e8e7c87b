"""``RhoData``: pairs of densities as tensors, from sequences of arrays and grid sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, SupportsIndex, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from zarrcache.errors import ConfigError
from zarrcache.train.crops import Probes
from zarrcache.train.datasets import PairDataset, Transforms, grid_of, position_in, steps_of
from zarrcache.train.transforms import Grid, PairToTensors

__all__ = ["Indexable", "RhoData"]

_T_co = TypeVar("_T_co", covariant=True)


class Indexable(Protocol[_T_co]):
    """A sequence as ``RhoData`` needs it: a length and access by position.

    Lists and the lazy sequences of ``data_split()`` qualify.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _T_co: ...


class RhoData(PairDataset, Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs ``(data, label)`` of float32 tensors, each of shape ``(C, nx, ny, nz)``.

    C is the number of channels of ``density_type``: 1 for a single density.

    >>> train_sets, test_sets = get_dataset(cfg)
    >>> train_data = RhoData(*train_sets, downsample_data=2, data_augmentation=True)

    Indexing reads a sample, with one access to each of the four sequences. With the lazy sequences
    of ``data_split()`` no density stays in memory.

    Parameters
    ----------
    data, label : sequence of array
        Densities, flat in C order, or of shape (C, nx*ny*nz).
    gs_data, gs_label : sequence of (nx, ny, nz)
        Their grid sizes.
    downsample_data, downsample_label : int
        Keep every n-th point along each axis of the data and of the label, after cropping **both**
        to a multiple of ``downsample_data``.
    data_augmentation : bool
        Rotate each pair, before downsampling, by random quarter turns about a random axis: 0 turns
        with probability 10 %, 1, 2 and 3 turns with 30 % each. Data and label rotate together.
    seed : int, optional
        See Notes. The default follows torch: with ``torch.manual_seed`` a run is reproducible,
        without it every run differs.
    transform : callable, optional
        A function of the dict ``{"data": tensor, "label": tensor}`` that returns that dict, changed
        or not, or another mapping with both keys. The item is the pair of the two values; other
        keys are ignored. See Notes. Or a `RandomCrop`, or a list of one and functions.

    Raises
    ------
    ConfigError
        The sequences differ in length, a factor or the seed is not a whole number, or
        ``transform`` is not callable.

    Notes
    -----
    *Memory.* A density of a lazy sequence is not copied: the tensor of a grid that is neither
    rotated nor downsampled is the memory-mapped cache file, copy-on-write. Rotated and downsampled
    grids are copied once. Arrays in a list, a tuple or a numpy array are copied once too, so
    in-place work on a tensor never changes your list.

    *Randomness.* The rotation depends on the seed, the position of the sample, the number of
    samples that this process has drawn, and, in a DataLoader worker, the seed that torch gave to
    the worker. Therefore

    * in the main process (``num_workers=0``) the same ``seed`` gives the same rotations in the same
      order, and every epoch draws new ones;
    * workers differ from each other, and every epoch differs, under fork and spawn, with or
      without persistent workers;
    * with workers a run is repeatable if torch is: give the DataLoader
      ``generator=torch.Generator().manual_seed(...)`` or call ``torch.manual_seed``, and keep
      ``num_workers``; ``shuffle=True`` needs the same;
    * ranks of a distributed run that share a seed read different samples and rotate them
      differently.

    *Transform.* It runs in the process that reads the sample, which is the DataLoader worker if
    there is one, after rotation, downsampling and the cast to the precision. It may change tensors
    in place; the cache is not affected. Its random numbers should come from ``torch``, which seeds
    each worker. With ``spawn`` it has to be picklable: a function of a module or an instance of a
    class, not a lambda. A tensor that it does not touch reaches the training process as a map of
    the cache file. A tensor that it makes, changes or slices is copied once, into memory that
    workers use again.

    *Samples that a worker keeps.* A dataset around this one may keep samples in the worker and
    return them again. It must not change them in place after it has returned them, because the
    training process may not have read them yet. If the training process writes to a sample, only
    that process sees the change.
    """

    def __init__(
        self,
        data: Indexable[Any],
        label: Indexable[Any],
        gs_data: Indexable[Any],
        gs_label: Indexable[Any],
        downsample_data: int = 1,
        downsample_label: int = 1,
        data_augmentation: bool = True,
        *,
        seed: int | None = None,
        transform: Transforms | None = None,
    ) -> None:
        lengths = len(data), len(label), len(gs_data), len(gs_label)
        if len(set(lengths)) != 1:
            raise ConfigError(
                f"data, label, gs_data and gs_label have {lengths} elements. Give one element per "
                "sample in each."
            )
        if isinstance(steps_of(transform)[0], Probes):
            raise ConfigError(
                "RhoData returns pairs, which cannot hold the coordinates of Probes. Use "
                "ZarrDataset."
            )
        self.data = data
        self.label = label
        self.gs_data = gs_data
        self.gs_label = gs_label
        super().__init__(
            PairToTensors(
                downsample_data, downsample_label, data_augmentation, seed, torch.float32
            ),
            transform,
        )

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Task ids if the sequences are those of ``data_split()``, else positions as strings."""
        names: Sequence[str] = getattr(self.data, "task_ids", None) or [
            str(i) for i in range(len(self))
        ]
        return tuple(names)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: SupportsIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one pair.

        Raises
        ------
        SchemaError
            The values do not fill the grid, or the grid is smaller than ``downsample_data``.
        """
        i = position_in(index, len(self))
        sample = self._sample(i, f"sample {i}")
        return sample["data"], sample["label"]

    def _read(self, i: int, field: int) -> Grid:
        values, sizes, name = (
            (self.data, self.gs_data, "data"),
            (self.label, self.gs_label, "label"),
        )[field]
        # These return the same array at every access, with which a tensor would share its memory.
        held = isinstance(values, (list, tuple, np.ndarray))
        return grid_of(values[i], sizes[i], held=held, name=f"{name} of sample {i}")
