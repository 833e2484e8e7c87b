"""The lazy sequences of ``data_split()`` behave as lists and hold no density."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

from zarrcache._keys import Role
from zarrcache.data.sequences import Density, split_sets

IDS = ["mp-1", "mp-2", "mp-3"]


class Loader:
    """Makes each density from its id and role, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Role]] = []
        self.made: list[weakref.ref[np.ndarray]] = []

    def load(self, task_id: str, role: Role) -> Density:
        self.calls.append((task_id, role))
        n = int(task_id[3:]) + (role == "label")
        values = np.full(n * 4, n, np.float32)
        self.made.append(weakref.ref(values))
        return values, (n, 2, 2)

    def __getstate__(self) -> dict[str, object]:
        return {"calls": [], "made": []}


def test_making_and_measuring_the_sequences_loads_nothing() -> None:
    """Neither the split nor ``len`` nor ``repr`` costs a request."""
    loader = Loader()
    sets = split_sets(loader, IDS)
    assert [len(s) for s in sets] == [3, 3, 3, 3]
    assert [repr(s) for s in sets] == [
        f"<{what} of 3 materials, loaded when indexed>"
        for what in ("data", "label", "gs_data", "gs_label")
    ]
    assert loader.calls == []


def test_each_sequence_gives_its_own_role() -> None:
    data, label, gs_data, gs_label = split_sets(Loader(), IDS)
    for i in range(3):
        assert data[i].tolist() == [i + 1] * 4 * (i + 1)
        assert label[i].tolist() == [i + 2] * 4 * (i + 2)
        assert (gs_data[i], gs_label[i]) == ((i + 1, 2, 2), (i + 2, 2, 2))


def test_grid_size_after_the_density_loads_nothing_more() -> None:
    """``RhoData`` takes all four of a sample: two loads, not four."""
    loader = Loader()
    data, label, gs_data, gs_label = split_sets(loader, IDS)
    assert (data[1].size, label[1].size) == (8, 12)
    assert (gs_data[1], gs_label[1]) == ((2, 2, 2), (3, 2, 2))
    assert loader.calls == [("mp-2", "data"), ("mp-2", "label")]


def test_grid_size_alone_loads_the_density_once() -> None:
    """It is remembered: it is three numbers."""
    loader = Loader()
    _, _, gs_data, _ = split_sets(loader, IDS)
    assert [gs_data[0], gs_data[0]] == [(1, 2, 2)] * 2
    assert loader.calls == [("mp-1", "data")]


def test_sequences_hold_no_density() -> None:
    """After a pass every array is freed as soon as its user drops it."""
    loader = Loader()
    sets = split_sets(loader, IDS)
    for sequence in sets:
        for _ in sequence:
            pass
    gc.collect()
    assert len(loader.made) == 6
    assert [ref() for ref in loader.made] == [None] * 6
    assert sets[0][0] is not sets[0][0]


def test_sequences_are_indexed_and_iterated_as_lists() -> None:
    """Negative positions, slices, iteration, ``reversed`` and the end."""
    data = split_sets(Loader(), IDS)[0]
    assert isinstance(data, Sequence)
    assert data[-1].tolist() == data[2].tolist()
    assert [d.size for d in data[1:]] == [8, 12]
    assert [d.size for d in data[::-2]] == [12, 4]
    assert [d.size for d in data] == [4, 8, 12]
    assert [d.size for d in reversed(data)] == [12, 8, 4]
    assert data[np.int64(1)].size == 8
    for index in (3, -4):
        with pytest.raises(IndexError):
            data[index]


def test_sequences_pickle_for_spawned_workers() -> None:
    """The four of one split come out together, and load in the other process."""
    data, _, gs_data, _ = pickle.loads(pickle.dumps(split_sets(Loader(), IDS)))
    assert data[2].size == 12
    assert gs_data[2] == (3, 2, 2)
