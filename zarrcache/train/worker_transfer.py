"""Zero-copy transfer from DataLoader workers: send the place in a cache file, map it on arrival.

torch copies a worker's tensor into shared memory, at about 1 GB/s per worker: for two arrays of
8 MiB that takes longer than everything else in a warm read. The training process can map the
worker's file itself, in 0.1 ms for any size. docs/explanation/performance.md has the figures and
the alternatives that were measured.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate, get_worker_info

# Private path of a documented extension point (see the docstring of ``default_collate``); listed in
# docs/explanation/architecture.md.
from torch.utils.data._utils.collate import default_collate_fn_map

from zarrcache.disk import Place, is_mapped, map_place, place_of
from zarrcache.errors import SchemaError

__all__ = ["MappedTensor", "Sender"]

logger = logging.getLogger(__name__)


class Sender(ABC):
    """A dataset whose samples can be transferred as places. Call ``super().__init__()``.

    Each object has a name, by which the training process finds it to read a sample again. Workers
    that the process starts know the same name. A second object with this name in one process is a
    copy, which may hold other samples, so it gets a new name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._name = secrets.token_hex(8)
        self._known_in = frozenset({os.getpid()})
        _senders[self._name] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._name in _senders:
            self._name, self._known_in = secrets.token_hex(8), frozenset()
        self._known_in |= {os.getpid()}
        _senders[self._name] = self

    @abstractmethod
    def reread(self, index: int, field: int) -> NDArray[np.float32]:
        """Read field 0 (data) or 1 (label) of a sample again, neither rotated nor cast."""

    def for_transfer(
        self, tensor: torch.Tensor, grid: NDArray[np.float32], index: int, field: int
    ) -> torch.Tensor:
        """``tensor``, as a `MappedTensor` if it lies over a mapped ``grid`` and leaves a worker."""
        if tensor.dtype is not torch.float32 or get_worker_info() is None or not is_mapped(grid):
            return tensor
        parent = multiprocessing.parent_process()
        # A dataset that was made or copied in the worker: the training process cannot reread it.
        if parent is None or parent.pid not in self._known_in:
            return tensor
        return MappedTensor.over(tensor, grid, (self._name, index, field))


_senders: WeakValueDictionary[str, Sender] = WeakValueDictionary()


class MappedTensor(torch.Tensor):
    """A tensor over a mapped entry, to be sent from a worker.

    Every result computed from it is a plain tensor. If its memory was written to, it is sent as
    torch sends any tensor; :func:`zarrcache.disk.mmap.place_of` detects that.
    """

    grid: NDArray[np.float32]
    sample: tuple[str, int, int]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` and return plain tensors."""
        # torch's default for the class Tensor leaves results as they are; that of a subclass
        # converts them to the subclass. No types: it would refuse those that are not Tensor.
        default: Any = torch.Tensor.__torch_function__
        return default(func, (), args, kwargs or {})

    @classmethod
    def over(
        cls, plain: torch.Tensor, grid: NDArray[np.float32], sample: tuple[str, int, int]
    ) -> MappedTensor:
        """``plain``, which has the memory of ``grid`` and perhaps more axes of length one."""
        tensor = plain.as_subclass(cls)
        tensor.grid, tensor.sample = grid, sample
        return tensor

    def plain(self) -> torch.Tensor:
        """The same memory as a plain tensor."""
        return self.as_subclass(torch.Tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self.plain(), memo)


def _reduce(tensor: MappedTensor) -> tuple[Any, ...]:
    """Pickle for a worker's queue: the place, if the tensor still is the whole entry unchanged."""
    grid, plain = tensor.grid, tensor.plain()
    is_grid = (
        plain.data_ptr() == grid.__array_interface__["data"][0]
        and plain.is_contiguous()
        and plain.numel() == grid.size
    )
    place = (
        place_of(grid)
        if is_grid and plain.dtype is torch.float32 and not plain.requires_grad
        else None
    )
    if place is None:
        # plain() of a tensor that requires a gradient is not a leaf, and torch sends only leaves.
        return _identity, (
            tensor.detach().requires_grad_(tensor.requires_grad) if tensor.is_leaf else plain,
        )
    return _receive, (place, tuple(plain.shape), grid.shape, tensor.sample)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _receive(
    place: Place, shape: tuple[int, ...], grid_shape: tuple[int, ...], sample: tuple[str, int, int]
) -> torch.Tensor:
    """Unpickle in the training process: map the file there, copy-on-write."""
    try:
        return torch.from_numpy(map_place(place, "<f4", shape))
    except OSError as exc:
        # The entry was evicted or replaced since the worker read it: read the sample once more.
        name, index, field = sample
        sender = _senders.get(name)
        if sender is None:
            raise FileNotFoundError(
                f"{place.path}, which a DataLoader worker sent, does not exist any more, and the "
                "dataset that could read it again was deleted. Keep the dataset as long as its "
                "loader."
            ) from exc
        logger.info(
            "%s, which a worker sent, cannot be mapped (%s); reading the sample again",
            place.path,
            exc,
        )
        grid = sender.reread(index, field)
        # Axes of length one may have moved: a rotation of a thin grid changes nothing else.
        if _long_axes(grid.shape) != _long_axes(grid_shape):
            # The origin has another grid now, perhaps of as many points. A batch of one has one
            # axis more than a sample.
            shape = shape[: max(0, len(shape) - grid.ndim)] + grid.shape
        return torch.from_numpy(grid.reshape(shape))


def _long_axes(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


def _collate(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """Leave a batch of one in place; stack a larger one in shared memory, as torch does."""
    first = batch[0]
    if len(batch) == 1 and isinstance(first, MappedTensor):
        return MappedTensor.over(first.plain().unsqueeze(0), first.grid, first.sample)
    if len(shapes := {tuple(tensor.shape) for tensor in batch}) > 1:
        raise SchemaError(
            f"the samples of a batch have different shapes ({', '.join(map(str, sorted(shapes)))}) "
            "and cannot be stacked. Pass collate_fn=zarrcache.collate to the DataLoader, which "
            "makes lists of them, or use batch_size=1."
        )
    stacked: torch.Tensor = default_collate(
        [tensor.plain() if isinstance(tensor, MappedTensor) else tensor for tensor in batch]
    )
    return stacked


ForkingPickler.register(MappedTensor, _reduce)
default_collate_fn_map[MappedTensor] = _collate
