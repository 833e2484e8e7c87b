"""What a worker's pickle of a mapped tensor becomes on arrival."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cachedirs import key_of
from zarrcache.disk import header_of, map_entry, publish, write_entry
from zarrcache.train.worker_transfer import Sender, SentTensor

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/pagemap"),
    reason="this system does not tell which pages were written",
)

VALUES = np.arange(24, dtype="<f4").reshape(2, 3, 4)


class Samples(Sender):
    """Field ``f`` of sample ``i`` is ``10 i + f`` everywhere."""

    def __init__(self, shape: tuple[int, ...] = (2, 3, 4)) -> None:
        super().__init__()
        self.shape = shape

    def reread(self, index: int, field: int) -> NDArray[np.float32]:
        return np.full(self.shape, 10 * index + field, np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An entry with ``VALUES``."""
    path = tmp_path / "entry"
    header = header_of(key_of(1), VALUES, "source")
    publish(path, lambda file: write_entry(file, header, VALUES))
    return path


def sent(path: Path, sender: Sender, shape: tuple[int, ...] = (2, 3, 4)) -> bytes:
    """What a worker puts into its queue for sample 7, field 1."""
    grid = map_entry(path).array
    tensor = SentTensor.over(torch.from_numpy(grid).reshape(shape), grid, (sender._name, 7, 1))
    return bytes(ForkingPickler.dumps(tensor))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 3, 4), (1, 1, 2, 3, 4)])
def test_a_place_is_sent_and_its_values_arrive(path: Path, shape: tuple[int, ...]) -> None:
    sender = Samples()
    raw = sent(path, sender, shape)
    assert os.fspath(path).encode() in raw
    assert torch.equal(pickle.loads(raw), torch.from_numpy(VALUES).reshape(shape))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("replaced", [False, True], ids=["evicted", "replaced"])
def test_an_entry_that_is_gone_is_read_again_by_its_sample(
    path: Path, shape: tuple[int, ...], replaced: bool
) -> None:
    sender = Samples()
    raw = sent(path, sender, shape)
    content = path.read_bytes()
    path.rename(path.with_name("evicted"))
    if replaced:
        path.write_bytes(content)
    assert torch.equal(pickle.loads(raw), torch.full(shape, 71.0))


@pytest.mark.parametrize(
    ("shape", "now"),
    [
        ((2, 3, 4), (5, 2, 2)),
        ((1, 2, 3, 4), (1, 5, 2, 2)),
        ((2, 3, 4), (4, 3, 2)),  # as many points
        ((1, 2, 3, 4), (1, 3, 2, 4)),
    ],
)
def test_another_grid_by_now_arrives_with_its_own_shape(
    path: Path, shape: tuple[int, ...], now: tuple[int, ...]
) -> None:
    sender = Samples(now[-3:])
    raw = sent(path, sender, shape)
    path.unlink()
    assert torch.equal(pickle.loads(raw), torch.full(now, 71.0))


def test_a_rotated_thin_grid_keeps_its_shape(tmp_path: Path) -> None:
    """The dataset rereads it unrotated."""
    thin = np.full((1, 24, 1), 71, "<f4")
    header = header_of(key_of(1), thin, "source")
    publish(tmp_path / "thin", lambda file: write_entry(file, header, thin))
    sender = Samples((1, 24, 1))
    grid = map_entry(tmp_path / "thin").array.transpose(1, 2, 0)
    tensor = SentTensor.over(torch.from_numpy(grid), grid, (sender._name, 7, 1))
    raw = bytes(ForkingPickler.dumps(tensor))
    assert b"thin" in raw
    (tmp_path / "thin").unlink()
    assert pickle.loads(raw).shape == (24, 1, 1)


def test_an_entry_that_is_gone_with_its_dataset_is_an_error_with_advice(path: Path) -> None:
    """The dataset was deleted while its loader was still iterated."""
    sender = Samples()
    raw = sent(path, sender)
    del sender
    gc.collect()
    assert torch.equal(pickle.loads(raw), torch.from_numpy(VALUES))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"entry, which .* Keep the dataset as long as"):
        pickle.loads(raw)


def test_a_copy_in_the_same_process_is_another_sender_and_one_elsewhere_is_the_same() -> None:
    sender = Samples()
    raw, name = pickle.dumps(sender), sender._name
    assert copy.copy(sender)._name != name
    assert pickle.loads(raw)._name != name
    del sender
    gc.collect()
    assert pickle.loads(raw)._name == name


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(1),
        lambda t: t.transpose_(1, 2),
        lambda t: t.requires_grad_(),
        lambda t: t.resize_(1, 3, 4),
        lambda t: t.set_(t.plain()[1:]),
    ],
    ids=["values", "strides", "gradient", "size", "part"],
)
def test_a_tensor_that_was_changed_is_sent_by_its_values(path: Path, change: Any) -> None:
    sender = Samples()
    grid = map_entry(path).array
    tensor = SentTensor.over(torch.from_numpy(grid), grid, (sender._name, 7, 1))
    change(tensor)
    raw = bytes(ForkingPickler.dumps(tensor))
    assert os.fspath(path).encode() not in raw
    arrived = pickle.loads(raw)
    assert torch.equal(arrived, tensor.plain())
    assert arrived.requires_grad == tensor.requires_grad
