"""The torch datasets: ``RhoData`` over four sequences, ``ZarrDataset`` over a reader, and the
collate function for mixed grids.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate, get_worker_info

from zarrcache._keys import ROLES, Role
from zarrcache._units import whole_number
from zarrcache.errors import ConfigError, SchemaError
from zarrcache.train.transforms import Grid, downsample, draw_rotation, rotate
from zarrcache.train.worker_transfer import Sender

__all__ = [
    "DensityReader",
    "Indexable",
    "RhoData",
    "Sample",
    "ZarrDataset",
    "collate",
    "collate_fn",
]

_T_co = TypeVar("_T_co", covariant=True)
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Indexable(Protocol[_T_co]):
    """What ``RhoData`` needs of a sequence: a length and access by position. A list has it, and so
    have the lazy ones of ``data_split()``.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> _T_co: ...


class DensityReader(Protocol):
    """What ``ZarrDataset`` needs of a reader. ``ZarrS3Reader`` has it."""

    def split_task_ids(self) -> tuple[list[str], list[str]]: ...

    def load(
        self, task_id: str, role: Role
    ) -> tuple[NDArray[np.float32], tuple[int, int, int]]: ...


class Sample(TypedDict):
    """One item of a ``ZarrDataset``: two tensors ``(1, nx, ny, nz)`` and the task id."""

    data: torch.Tensor
    label: torch.Tensor
    index: str


class _Pairs(Sender):
    """What both datasets are: grids read one by one, made tensors in pairs."""

    def __init__(self, to_tensors: _PairToTensors) -> None:
        super().__init__()
        self._to_tensors = to_tensors

    def reread(self, index: int, field: int) -> Grid:
        """For `handover`: one side of a sample that a worker sent and that was evicted on the way."""
        return self._to_tensors.unturned(self._stored(index, field), field)

    def _pair(self, i: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        (data, data_grid), (label, label_grid) = self._to_tensors(
            self._stored(i, 0), self._stored(i, 1), i, name=name
        )
        return self.sent(data, data_grid, i, 0), self.sent(label, label_grid, i, 1)

    @abstractmethod
    def _stored(self, i: int, field: int) -> Grid:
        """One side of a sample as it is read."""


class RhoData(_Pairs, Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Pairs of densities for training: ``(data, label)``, each float32 of shape ``(1, nx, ny,
    nz)``.

    >>> train_sets, test_sets = get_dataset(cfg)
    >>> train_data = RhoData(*train_sets, downsample_data=2, downsample_label=1, data_augmentation=True)

    An item is read when it is indexed, by one access to each of the four sequences; the lazy
    sequences of ``data_split()`` therefore keep no density in memory.

    Parameters
    ----------
    data, label : sequence of array
        Densities, flat in C order.
    gs_data, gs_label : sequence of (nx, ny, nz)
        Their grid sizes.
    downsample_data, downsample_label : int
        Every how many points along each axis to take of the data and of the label, after **both**
        were cropped to a multiple of ``downsample_data``.
    data_augmentation : bool
        Turn each pair, before downsampling, by a random number of quarter turns about a random
        axis: none with 10 %, one, two and three with 30 % each. Data and label turn alike.
    seed : int, optional
        See Notes. The default follows torch: ``torch.manual_seed`` makes it reproducible, without
        it every run is different.

    Raises
    ------
    ConfigError
        The sequences differ in length, or a factor or the seed is not a whole number.

    Notes
    -----
    *Memory.* A density that a lazy sequence hands out is used where it is: a tensor of an
    undivided, unturned grid is the memory-mapped file itself, copy-on-write. One copy is made of
    what is turned or downsampled, and of arrays that a list, a tuple or a numpy array holds, so
    that work on a tensor in place never changes your list.

    *Randomness.* The rotation is a function of the seed, the position of the sample, the number of
    samples that this process has drawn, and, in a DataLoader worker, the seed that torch gave to
    the worker. So

    * in the main process (``num_workers=0``) the same ``seed`` gives the same rotations in the same
      order, and every epoch goes on to new ones;
    * workers differ from each other, and every epoch is new, under fork and spawn, with persistent
      workers or without;
    * with workers a run repeats if torch repeats: give the DataLoader
      ``generator=torch.Generator().manual_seed(...)`` or call ``torch.manual_seed``, and keep
      ``num_workers``; ``shuffle=True`` asks for the same;
    * ranks of a distributed run that share a seed read different samples and turn them differently.
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
    ) -> None:
        lengths = len(data), len(label), len(gs_data), len(gs_label)
        if len(set(lengths)) != 1:
            raise ConfigError(
                f"data, label, gs_data and gs_label have {lengths} elements. They have to be of "
                "one length, one element a sample."
            )
        self.data = data
        self.label = label
        self.gs_data = gs_data
        self.gs_label = gs_label
        super().__init__(
            _PairToTensors(
                downsample_data, downsample_label, data_augmentation, seed, torch.float32
            )
        )

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Names of the samples: task ids, where the sequences are those of ``data_split()``; else
        their positions.
        """
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
        i = _position(index, len(self))
        return self._pair(i, f"sample {i}")

    def _stored(self, i: int, field: int) -> Grid:
        values, sizes, name = (
            (self.data, self.gs_data, "data"),
            (self.label, self.gs_label, "label"),
        )[field]
        return _grid(values[i], sizes[i], held=_holds_arrays(values), name=f"{name} of sample {i}")


class ZarrDataset(_Pairs, Dataset[Sample]):
    """A split of a reader, read in ``__getitem__`` through the cache: ``{"data", "label",
    "index"}``.

    >>> train = ZarrDataset(ZarrS3Reader(...), "train", augmentation=True)
    >>> loader = DataLoader(train, batch_size=4, shuffle=True, num_workers=8, collate_fn=collate_fn)

    ``data`` and ``label`` are tensors of shape ``(1, nx, ny, nz)``, ``index`` is the task id.
    Downsampling, augmentation and ``seed`` are those of `RhoData`.

    Parameters
    ----------
    reader : ZarrS3Reader
        Or anything with its ``split_task_ids()`` and ``load()``. It has to be picklable for
        DataLoader workers that are spawned.
    split : {"train", "test", "all"} or sequence of str
        ``all`` is the training ids followed by the test ids. Or the task ids themselves, for a
        split of your own.
    precision : {"f32", "f16", "bf16"}
        float32, float16 or bfloat16. float16 holds numbers up to 65504, which a density that is not
        normalized can exceed.
    augmentation : bool
    downsample_data, downsample_label : int
    seed : int, optional

    Raises
    ------
    ConfigError
        Unknown split or precision; and whatever ``split_task_ids()`` raises, which is called here,
        once, and not in every worker. With ids it is not called.
    """

    def __init__(
        self,
        reader: DensityReader,
        split: Literal["train", "test", "all"] | Sequence[str] = "train",
        *,
        precision: Literal["f32", "f16", "bf16"] = "f32",
        augmentation: bool = False,
        downsample_data: int = 1,
        downsample_label: int = 1,
        seed: int | None = None,
    ) -> None:
        if isinstance(split, str) and split not in ("train", "test", "all"):
            raise ConfigError(
                f"split is {split!r}; it has to be 'train', 'test', 'all' or a list of task ids."
            )
        if precision not in _DTYPES:
            raise ConfigError(
                f"precision is {precision!r}; it has to be one of {', '.join(map(repr, _DTYPES))}."
            )
        super().__init__(
            _PairToTensors(
                downsample_data, downsample_label, augmentation, seed, _DTYPES[precision]
            )
        )
        self.reader = reader
        self.split = split
        if isinstance(split, str):
            train, test = reader.split_task_ids()
            split = {"train": train, "test": test, "all": [*train, *test]}[split]
        self.task_ids: tuple[str, ...] = tuple(split)

    def __len__(self) -> int:
        return len(self.task_ids)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read one pair through the cache.

        Raises
        ------
        SchemaError
            The grid is smaller than ``downsample_data``, or holds values that ``precision`` cannot.
        ZarrCacheError
            The reader cannot deliver; see ``ZarrS3Reader.load``.
        """
        i = _position(index, len(self))
        task_id = self.task_ids[i]
        data, label = self._pair(i, task_id)
        return {"data": data, "label": label, "index": task_id}

    def _stored(self, i: int, field: int) -> Grid:
        task_id, role = self.task_ids[i], ROLES[field]
        # load() hands out an array of its own at every call, so nothing is copied here.
        return _grid(*self.reader.load(task_id, role), held=False, name=f"{role} of {task_id}")


def collate_fn(batch: Sequence[Any]) -> Any:
    """Collate samples; where grids differ in shape, give lists.

    Samples of one shape become what ``default_collate`` makes of them. Otherwise every field of the
    batch is the list of the samples' values: ``{"data": [...], "label": [...], "index": [...]}``
    for dictionaries, ``[[...], [...]]`` for tuples. Always all of them: a model that finds a list
    in ``data`` finds one in ``label``. The shapes decide; an error of ``default_collate`` is an
    error.
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


#: The same by the package's name; ``collate_fn`` is the name of DataLoader's argument.
collate = collate_fn


#: A tensor and the array beneath it, before it was cast.
_TensorAndGrid: TypeAlias = tuple[torch.Tensor, Grid]


class _PairToTensors:
    """What happens to a pair between the reader and the network: turn, downsample, convert."""

    def __init__(
        self,
        downsample_data: int,
        downsample_label: int,
        augmentation: bool,
        seed: int | None,
        dtype: torch.dtype,
    ) -> None:
        self.downsample_data = whole_number("downsample_data", downsample_data, least=1)
        self.downsample_label = whole_number("downsample_label", downsample_label, least=1)
        self.augmentation = augmentation
        self.seed = None if seed is None else whole_number("seed", seed, least=0)
        self.dtype = dtype
        self.drawn = 0

    def __call__(
        self, data: Grid, label: Grid, index: int, *, name: str
    ) -> tuple[_TensorAndGrid, _TensorAndGrid]:
        if self.augmentation:
            rotation = draw_rotation(*self._stream(), self.drawn, index)
            self.drawn += 1
            data, label = rotate(data, rotation), rotate(label, rotation)
        return self._tensor(data, 0, f"data of {name}"), self._tensor(label, 1, f"label of {name}")

    def unturned(self, whole: Grid, field: int) -> Grid:
        """What `_tensor` makes of a grid that no rotation has turned, before it becomes a tensor."""
        return np.array(
            downsample(whole, self._step(field), multiple=self.downsample_data), order="C"
        )

    def _step(self, field: int) -> int:
        return (self.downsample_data, self.downsample_label)[field]

    def _stream(self) -> tuple[int, ...]:
        """The numbers that set this process's draws apart from those of other processes and epochs."""
        worker = get_worker_info()
        if worker is not None:
            # torch draws it anew for every worker and, unless the workers are persistent, every
            # epoch.
            return (self.seed or 0, worker.seed)
        # The initial seed is that of torch.manual_seed, or random. Asking for it uses up no random
        # state.
        return (0, torch.initial_seed()) if self.seed is None else (self.seed, 0)

    def _tensor(self, whole: Grid, field: int, name: str) -> _TensorAndGrid:
        grid = downsample(whole, self._step(field), multiple=self.downsample_data)
        if grid.size == 0:
            raise SchemaError(
                f"{name}: a grid of {_times(whole.shape[-3:])} points has none left when it is "
                "cropped to a multiple of "
                f"downsample_data={self.downsample_data}. Use a smaller factor, or leave the "
                "sample out of the map."
            )
        # torch knows no negative strides, a worker that sends a strided tensor sends all the memory
        # beneath it, and a network would gather such a view anyway, in the training process: gather
        # it here.
        if not (grid.flags.c_contiguous and grid.flags.writeable):
            grid = np.array(grid, order="C")
        tensor = torch.from_numpy(grid)
        if self.dtype is torch.float16:
            _check_fits_float16(tensor, name)
        return tensor.to(self.dtype), grid


def _grid(values: Any, gridsize: Any, *, held: bool, name: str) -> Grid:
    """``values`` as a float32 grid ``(1, nx, ny, nz)``: a view, read-only if somebody else holds
    the array.

    Raises
    ------
    SchemaError
        ``gridsize`` is not three sizes, or the values do not fill it.
    """
    flat = np.asarray(values, dtype=np.float32)
    shape = tuple(int(n) for n in gridsize)
    if len(shape) != 3 or flat.size != math.prod(shape):
        raise SchemaError(
            f"{name} has {flat.size} values and grid size {_times(shape)}. The product of three "
            "sizes has to be the number of values."
        )
    grid = flat.reshape(1, *shape)
    if held:
        grid.flags.writeable = False  # of this view only; it makes _tensor copy
    return grid


def _holds_arrays(sequence: object) -> bool:
    """Whether ``sequence`` gives the same array at every access, so that a tensor over it would
    share memory with it.
    """
    return isinstance(sequence, (list, tuple, np.ndarray))


def _position(index: SupportsIndex, length: int) -> int:
    """``index`` counted from the start.

    Raises
    ------
    IndexError
        There is no such sample. It also ends a ``for`` loop over the dataset.
    """
    i = operator.index(index)
    if not -length <= i < length:
        raise IndexError(f"sample {i} of a dataset of {length}")
    return i % length


def _check_fits_float16(tensor: torch.Tensor, name: str) -> None:
    """Refuse what would become infinite.

    Raises
    ------
    SchemaError
        A value beyond 65504.
    """
    low, high = (x.item() for x in torch.aminmax(tensor))
    limit = torch.finfo(torch.float16).max
    if low < -limit or high > limit:
        raise SchemaError(
            f"{name} holds values from {low:.6g} to {high:.6g}, and f16 ends at {limit:.0f}. "
            "Normalize the densities (normalize_data: true) or use bf16."
        )


def _shapes(sample: Any) -> Any:
    """The shapes of everything in a sample that has one, nested as the sample is."""
    if isinstance(sample, Mapping):
        return [_shapes(value) for value in sample.values()]
    if isinstance(sample, (tuple, list)):
        return [_shapes(value) for value in sample]
    return tuple(sample.shape) if isinstance(sample, (torch.Tensor, np.ndarray)) else None


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
