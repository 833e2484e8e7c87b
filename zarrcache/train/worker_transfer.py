"""Zero-copy transfer from DataLoader workers: send the place of the values, map it on arrival.

torch copies a worker's tensor into new shared memory, at about 1 GB/s per worker: for two arrays of
8 MiB that takes longer than everything else in a warm read. Here

* a tensor over a cache file is sent as the place in that file, which the training process maps, in
  0.1 ms for any size;
* a tensor with new values (rotated, cast, stacked or made by a transform) is in memory that
  both processes have mapped and use again (:mod:`zarrcache._pages`).

torch sends all other values, and those that do not fit in this memory.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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

from zarrcache import _pages
from zarrcache.disk import Place, is_mapped, map_place, place_of
from zarrcache.errors import SchemaError

__all__ = [
    "Sender",
    "SentTensor",
    "Structure",
    "collate",
    "collate_in_lists",
    "empty_tensor",
    "in_pages",
]

logger = logging.getLogger(__name__)


class Structure(dict[str, Any]):
    """``pymatgen.core.Structure.as_dict()`` of a sample; a batch has the list of them.

    torch's own collate function would merge dicts key by key, and fails where they have different
    numbers of sites.
    """


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
        self, tensor: torch.Tensor, grid: NDArray[Any], index: int, field: int
    ) -> torch.Tensor:
        """Return ``tensor``, a view of ``grid``, as a subclass that is sent without a copy.

        Unchanged outside DataLoader workers.
        """
        if get_worker_info() is None:
            return tensor
        if not is_mapped(grid):
            is_in_pages = _pages.block_of(grid) is not None
            return SentTensor.over(tensor, grid) if is_in_pages else in_pages(tensor)
        if tensor.dtype is not torch.float32:
            return tensor
        parent = multiprocessing.parent_process()
        # A dataset that was made or copied in the worker: the training process cannot reread it.
        if parent is None or parent.pid not in self._known_in:
            return tensor
        return SentTensor.over(tensor, grid, (self._name, index, field))


_senders: WeakValueDictionary[str, Sender] = WeakValueDictionary()


class SentTensor(torch.Tensor):
    """A tensor that is sent from a worker without a copy.

    Every result computed from it is a plain tensor.

    Attributes
    ----------
    memory : ndarray
        The array in which it lies: a mapped entry, or shared pages of :mod:`zarrcache._pages`.
    sample : (str, int, int) or None
        Of a mapped entry: the sender, index and field by which it can be read again. If its memory
        was written to, which :func:`zarrcache.disk.mmap.place_of` detects, its values are sent.
    """

    memory: NDArray[Any]
    sample: tuple[str, int, int] | None

    @classmethod
    def over(
        cls, plain: torch.Tensor, memory: NDArray[Any], sample: tuple[str, int, int] | None = None
    ) -> SentTensor:
        """``plain``, which lies in ``memory``."""
        tensor = plain.as_subclass(cls)
        tensor.memory, tensor.sample = memory, sample
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` and return plain tensors."""
        # torch's default for the class Tensor leaves results as they are; that of a subclass
        # converts them to the subclass. No types: it would refuse those that are not Tensor.
        default: Any = torch.Tensor.__torch_function__
        return default(func, (), args, kwargs or {})

    def plain(self) -> torch.Tensor:
        """The same memory as a plain tensor."""
        return self.as_subclass(torch.Tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return copy.deepcopy(self.plain(), memo)


#: Element types that numpy lacks are sent as integers of the same size.
_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}


def empty_tensor(shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, NDArray[Any]]:
    """A tensor of undefined values on used pages, and the array over them."""
    pages = _pages.empty(shape, _INTEGERS[dtype.itemsize])
    return torch.from_numpy(pages).view(dtype), pages


def in_pages(value: Any) -> Any:
    """A plain tensor copied into shared pages, to be sent from this worker; else ``value``."""
    if (
        type(value) is not torch.Tensor
        or get_worker_info() is None
        or value.device.type != "cpu"
        or value.layout is not torch.strided
        or value.is_quantized
        or value.requires_grad
        or value.numel() == 0
        or value.is_shared()  # type: ignore[no-untyped-call]
    ):
        return value
    tensor, pages = empty_tensor(value.shape, value.dtype)
    if _pages.block_of(pages) is None:
        return value
    # In another order of axes, which torch would keep; not one whose points share memory.
    if _extent(value) == value.numel() and 0 not in value.stride():
        tensor = tensor.view(-1).as_strided(value.shape, value.stride())
    # The copy is also what resolves conj() and imag, which torch does not transfer.
    return SentTensor.over(tensor.copy_(value), pages)


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one in memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether shape, strides, type and memory describe the tensor completely."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.requires_grad
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _reduce(tensor: SentTensor) -> tuple[Any, ...]:
    """Pickle for a worker's queue: the place of the values, or the values themselves."""
    return _place(tensor) or _position(tensor) or (_identity, (_for_torch(tensor),))


def _place(tensor: SentTensor) -> tuple[Any, ...] | None:
    """Return the place in a file if the tensor still is the whole, unchanged entry."""
    grid, plain = tensor.memory, tensor.plain()
    if (
        tensor.sample is None
        or plain.data_ptr() != grid.__array_interface__["data"][0]
        or not plain.is_contiguous()
        or plain.numel() != grid.size
        or plain.dtype is not torch.float32
        or plain.requires_grad
    ):
        return None
    place = place_of(grid)
    if place is None:
        return None
    return _receive_place, (place, tuple(plain.shape), grid.shape, tensor.sample)


def _position(tensor: SentTensor) -> tuple[Any, ...] | None:
    """Return the position in the shared pages, and lend them."""
    if tensor.sample is not None:
        copied = in_pages(tensor.plain())
        if not isinstance(copied, SentTensor):
            return None
        tensor = copied
    plain = tensor.plain()
    start, nbytes = _pages.block_of(tensor.memory) or (0, 0)
    offset, size = plain.data_ptr() - start, plain.dtype.itemsize
    stop = offset + _extent(plain) * size
    is_in_block = _is_dense(plain) and plain.numel() > 0 and 0 <= offset <= stop <= nbytes
    lent = _pages.lend(tensor.memory) if is_in_block and offset % size == 0 else None
    if lent is None:
        return None
    return _receive_pages, (lent, offset, stop, plain.dtype, tuple(plain.shape), plain.stride())


def _for_torch(tensor: SentTensor) -> torch.Tensor:
    """The tensor as torch can send it."""
    # plain() of a tensor that requires a gradient is not a leaf, and torch sends only leaves.
    if tensor.is_leaf:
        return tensor.detach().requires_grad_(tensor.requires_grad)
    return tensor.plain()


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _receive_pages(
    lent: _pages.Lent,
    offset: int,
    stop: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> torch.Tensor:
    """Unpickle in the training process. The pages go back with the last tensor over them."""
    values = torch.from_numpy(_pages.receive(lent)[offset:stop]).view(dtype)
    return values.as_strided(shape, strides)


def _receive_place(
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
    """Leave a batch of one in place; stack a larger one in shared pages."""
    first = batch[0]
    if len(batch) == 1 and isinstance(first, SentTensor) and first.is_contiguous():
        return SentTensor.over(first.plain().unsqueeze(0), first.memory, first.sample)
    if len(shapes := {tuple(tensor.shape) for tensor in batch}) > 1:
        raise SchemaError(
            f"the samples of a batch have different shapes ({', '.join(map(str, sorted(shapes)))}) "
            "and cannot be stacked. Pass collate_fn=zarrcache.collate to the DataLoader, which "
            "makes lists of them, or use batch_size=1."
        )
    plain = [tensor.plain() if isinstance(tensor, SentTensor) else tensor for tensor in batch]
    if (
        get_worker_info() is not None
        and len({tensor.dtype for tensor in plain}) == 1
        and all(map(_is_dense, plain))
    ):
        _pages.share()
        stacked, pages = empty_tensor((len(plain), *plain[0].shape), plain[0].dtype)
        if _pages.block_of(pages) is not None:
            return SentTensor.over(torch.stack(plain, out=stacked), pages)
    result: torch.Tensor = default_collate(plain)
    return result


def _listed(batch: Sequence[Structure], *, collate_fn_map: Any = None) -> list[Structure]:
    return list(batch)


ForkingPickler.register(SentTensor, _reduce)
default_collate_fn_map[SentTensor] = _collate
default_collate_fn_map[Structure] = _listed


def collate(batch: Sequence[Any]) -> Any:
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


def _shapes(sample: Any) -> Any:
    """The shapes of a sample's tensors and arrays, nested as the sample is."""
    if isinstance(sample, Mapping):
        return [
            None if isinstance(value, Structure) else _shapes(value) for value in sample.values()
        ]
    if isinstance(sample, (tuple, list)):
        return [_shapes(value) for value in sample]
    return tuple(sample.shape) if isinstance(sample, (torch.Tensor, np.ndarray)) else None
