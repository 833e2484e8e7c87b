"""From a DataLoader worker to the training process: where an entry lies, instead of its values.

torch sends a tensor through shared memory, at about 1 GB/s a worker: two pairs of 8 MiB arrays take
longer than everything else that happens to a warm sample.  What a worker has mapped, the training
process can map as well, and it takes 0.1 ms whatever the size. docs/explanation/performance.md has the figures,
and what was tried.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from zarrcache.disk import Place, is_mapped, map_place, place_of

__all__ = ["MappedTensor", "Sender"]

logger = logging.getLogger(__name__)


class Sender(ABC):
    """A dataset whose samples are handed over. ``super().__init__()`` gives it the name by which
    the training process finds it again.

    The name belongs to one object in each process, and travels with it to the workers that the
    process starts. A second one in a process, a copy, gets a name of its own: it may have been
    given other samples.
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
        """Field 0 (data) or 1 (label) of a sample, neither turned nor cast, read again."""

    def sent(
        self, tensor: torch.Tensor, grid: NDArray[np.float32], index: int, field: int
    ) -> torch.Tensor:
        """``tensor`` over ``grid``; if ``grid`` is mapped and the training process waits for it,
        ready to be handed over.
        """
        if tensor.dtype is not torch.float32 or get_worker_info() is None or not is_mapped(grid):
            return tensor
        parent = multiprocessing.parent_process()
        # made or copied in the worker: the training process could not read it again
        if parent is None or parent.pid not in self._known_in:
            return tensor
        return MappedTensor.over(tensor, grid, (self._name, index, field))


_senders: WeakValueDictionary[str, Sender] = WeakValueDictionary()


class MappedTensor(torch.Tensor):
    """A tensor over a mapped entry, on its way out of a worker. Everything that is computed from it
    is a plain tensor.

    What was written in place is sent as torch sends any tensor:
    :func:`zarrcache.disk.mmap.place_of` knows.
    """

    grid: NDArray[np.float32]
    sample: tuple[str, int, int]

    # torch's own way to say: results are plain tensors, and no call takes a detour through Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def over(
        cls, plain: torch.Tensor, grid: NDArray[np.float32], sample: tuple[str, int, int]
    ) -> MappedTensor:
        """``plain`` is ``grid``, perhaps with more axes of length one."""
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
    """How a worker's queue pickles."""
    grid = tensor.grid
    is_grid = (
        tensor.data_ptr() == grid.__array_interface__["data"][0]
        and tensor.is_contiguous()
        and tensor.numel() == grid.size
    )
    place = (
        place_of(grid)
        if is_grid and tensor.dtype is torch.float32 and not tensor.requires_grad
        else None
    )
    if place is None:
        # A view that needs a gradient is no leaf, and torch sends leaves only.
        return _itself, (
            tensor.detach().requires_grad_(tensor.requires_grad)
            if tensor.is_leaf
            else tensor.plain(),
        )
    return _arrive, (place, tuple(tensor.shape), tensor.sample)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _arrive(place: Place, shape: tuple[int, ...], sample: tuple[str, int, int]) -> torch.Tensor:
    """How the training process unpickles: a copy-on-write map of its own."""
    try:
        return torch.from_numpy(map_place(place, "<f4", shape))
    except OSError as exc:
        # Evicted or replaced between the worker and here. The sample is read once more, through the
        # cache.
        name, index, field = sample
        sender = _senders.get(name)
        if sender is None:
            raise FileNotFoundError(
                f"{place.path}, which a DataLoader worker sent, is not there any more, and neither "
                "is the dataset that could read it again. "
                "Keep the dataset as long as its loader."
            ) from exc
        logger.info(
            "%s, which a worker sent, cannot be mapped (%s); the sample is read again",
            place.path,
            exc,
        )
        grid = sender.reread(index, field)
        # The origin may have another grid by now; a batch of one has an axis more.
        return torch.from_numpy(grid.reshape(shape[: len(shape) - grid.ndim] + grid.shape))


def _collate(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """A batch of one stays where it is; a larger one is written once, into shared memory, as torch
    does it.
    """
    first = batch[0]
    if len(batch) == 1 and isinstance(first, MappedTensor):
        return MappedTensor.over(first.plain().unsqueeze(0), first.grid, first.sample)
    plain = [tensor.plain() if isinstance(tensor, MappedTensor) else tensor for tensor in batch]
    stacked: torch.Tensor = default_collate_fn_map[torch.Tensor](
        plain, collate_fn_map=collate_fn_map
    )
    return stacked


ForkingPickler.register(MappedTensor, _reduce)
# What torch's default_collate looks into for types that it does not know: how to extend it, by its
# own documentation.
default_collate_fn_map[MappedTensor] = _collate
