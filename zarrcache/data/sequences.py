"""Lazy sequences of ``data_split()``: each index loads one density; none is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Role
from zarrcache._units import counted

__all__ = ["Density", "DensityLoader", "GridSize", "SplitSets", "split_sets"]

GridSize = tuple[int, int, int]
Density = tuple[NDArray[np.float32], GridSize]
#: ``(data, label, gs_data, gs_label)``: the first four arguments of ``RhoData``.
SplitSets = tuple[
    Sequence[NDArray[np.float32]],
    Sequence[NDArray[np.float32]],
    Sequence[GridSize],
    Sequence[GridSize],
]

T = TypeVar("T")


class DensityLoader(Protocol):
    """Loads one density: a reader."""

    def load(self, task_id: str, role: Role) -> Density: ...


class _Lazy(Sequence[T]):
    """One value per task id, computed by ``read`` on indexing.

    Attributes
    ----------
    reader : DensityLoader
        ``train_sets[0].reader.stats`` has the counters of an epoch.
    task_ids : tuple of str
    """

    def __init__(
        self, reader: DensityLoader, task_ids: Sequence[str], read: Callable[[str], T], what: str
    ) -> None:
        self.reader, self.task_ids, self._read, self._what = reader, tuple(task_ids), read, what

    def __len__(self) -> int:
        return len(self.task_ids)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._read(task_id) for task_id in self.task_ids[index]]
        return self._read(self.task_ids[index])

    def __repr__(self) -> str:
        return f"<{self._what} of {counted(len(self), 'material')}, loaded when indexed>"


class _Grids:
    """Remembers grid sizes: ``RhoData`` needs one after each density, without a second load."""

    def __init__(self, loader: DensityLoader) -> None:
        self._loader = loader
        self._known: dict[tuple[Role, str], GridSize] = {}

    def density(self, role: Role, task_id: str) -> NDArray[np.float32]:
        values, self._known[role, task_id] = self._loader.load(task_id, role)
        return values

    def gridsize(self, role: Role, task_id: str) -> GridSize:
        if (role, task_id) not in self._known:
            self.density(role, task_id)
        return self._known[role, task_id]


def split_sets(loader: DensityLoader, task_ids: Sequence[str]) -> SplitSets:
    """The four lazy sequences of one side of a split."""
    grids = _Grids(loader)
    return (
        _Lazy(loader, task_ids, partial(grids.density, "data"), "data"),
        _Lazy(loader, task_ids, partial(grids.density, "label"), "label"),
        _Lazy(loader, task_ids, partial(grids.gridsize, "data"), "gs_data"),
        _Lazy(loader, task_ids, partial(grids.gridsize, "label"), "gs_label"),
    )
