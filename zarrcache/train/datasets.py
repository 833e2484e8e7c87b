"""``ZarrDataset``: pairs of densities as tensors, by task id; what it shares with ``RhoData``."""

from __future__ import annotations

import logging
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Any,
    Literal,
    NotRequired,
    Protocol,
    SupportsIndex,
    TypeAlias,
    TypedDict,
    cast,
)

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from zarrcache import _pages
from zarrcache._keys import ROLES, Role, safe_repr
from zarrcache._units import one_of
from zarrcache.data import PairReader, Split, ZarrS3Reader, first_ids
from zarrcache.disk import LazyGrid, LazyStack
from zarrcache.errors import ConfigError, SchemaError, ZarrCacheError
from zarrcache.stats import LogOnce, html_table
from zarrcache.train.crops import Selection, times
from zarrcache.train.precision import DTYPES
from zarrcache.train.transforms import Grid, PairToTensors, Rotation, kind_name
from zarrcache.train.worker_transfer import Sender, Structure, collate, in_pages

__all__ = [
    "DensityReader",
    "PairDataset",
    "Sample",
    "Transform",
    "ZarrDataset",
    "grid_of",
    "position_in",
    "steps_of",
]

logger = logging.getLogger(__name__)

_LEAVE_OUT = "Leave the material out of the map, or change the transform."

#: A function of a sample's dict that returns the sample to use: the same dict or another mapping.
Transform: TypeAlias = Callable[[dict[str, Any]], Mapping[str, Any]]
#: What ``transform=`` takes. Only the first of several may be a `Selection`.
Transforms: TypeAlias = Selection | Transform | Sequence[Selection | Transform]


def steps_of(transform: Any) -> tuple[Selection | None, tuple[Transform, ...]]:
    """Split ``transform=`` into the selection of points and the functions that follow."""
    # A Sequence: Hydra makes a list of its own type.
    is_several = isinstance(transform, Sequence) and not isinstance(transform, str)
    steps = [*transform] if is_several else [transform]
    selection = steps.pop(0) if steps and isinstance(steps[0], Selection) else None
    for step in steps if transform is not None else ():
        if isinstance(step, Selection):
            raise ConfigError(
                f"transform has {step!r} after another step; it decides what is read, so it has to "
                "be the first and only one of its kind."
            )
        if isinstance(step, type) and issubclass(step, Selection):
            raise ConfigError(
                f"transform is the class {step.__name__}; create it: {step.__name__}(32)."
            )
        if not callable(step):
            raise ConfigError(
                f"transform is {step!r}; it has to be a function of the sample's dict, a "
                "RandomCrop or Probes, or a list of these."
            )
    return selection, tuple(steps) if transform is not None else ()


class DensityReader(Protocol):
    """A reader as ``ZarrDataset`` needs it. ``ZarrS3Reader`` qualifies."""

    def split_task_ids(self) -> tuple[list[str], list[str]]: ...

    def load(
        self, task_id: str, role: Role
    ) -> tuple[NDArray[np.float32], tuple[int, int, int]]: ...


class Sample(TypedDict):
    """An item of a ``ZarrDataset``: two tensors of shape ``(C, nx, ny, nz)`` and the task id.

    C is the number of channels of the reader's ``density_type``: 1 for a single density.
    """

    data: torch.Tensor
    label: torch.Tensor
    index: str
    structure: NotRequired[Structure]


class PairDataset(Sender):
    """Reads two grids per sample and converts them to tensors."""

    #: Gives the structure of a sample by its name.
    _structure_of: Callable[[str], Mapping[str, Any]] | None = None

    def __init__(self, to_tensors: PairToTensors, transform: Transforms | None) -> None:
        super().__init__()
        self._to_tensors = to_tensors
        self.transform = transform
        self._selection, self._functions = steps_of(transform)
        if (
            self._selection is not None
            and self._selection.never_rotated is not None
            and to_tensors.augmentation
        ):
            raise ConfigError(
                f"{self._selection!r} cannot be combined with rotations, because "
                f"{self._selection.never_rotated}. Set augmentation to false."
            )
        self._log_once = LogOnce()

    def reread(self, index: int, field: int) -> Grid:
        """One side of a sample, neither rotated nor transformed; called by the worker transfer."""
        return self._to_tensors.unrotated(self._read(index, field), field)

    def _sample(self, i: int, name: str, **rest: Any) -> dict[str, Any]:
        """The sample at position ``i``, as the transform returns it."""
        try:
            return self._transformed(i, name, rest)
        except (IndexError, StopIteration) as exc:
            # Raised by a transform, or by a reader or sequence of the user. A loop over a dataset
            # or a DataLoader would take them for its end.
            raise ZarrCacheError(
                f"{name} could not be read or transformed ({type(exc).__name__}: {exc}); see the "
                "exception above for the place."
            ) from exc

    def _transformed(self, i: int, name: str, rest: dict[str, Any]) -> dict[str, Any]:
        if get_worker_info() is not None:
            _pages.share()
        if self._selection is not None:
            return self._apply(self._selected(self._selection, i, name, rest), name)
        whole = self._read(i, 0), self._read(i, 1)
        if whole[0].shape[1:] != whole[1].shape[1:]:
            # Not an error: the label may be on a finer grid on purpose. Most networks fail on the
            # sample, in words that do not name the material. One warning is enough: the first
            # such sample fails, or none does.
            self._log_once.warning(
                "grids",
                logger,
                "%s: the data is on a grid of %s points, the label on one of %s. If the network "
                "needs equal grids, leave the material out of the map. Others are not reported.",
                name,
                *(times(grid.shape[1:]) for grid in whole),
            )
        (data, data_grid), (label, label_grid), rotation = self._to_tensors(*whole, i, name=name)
        if rotation is not None:
            # A tuple: Lightning refuses frozen dataclasses in a batch.
            rest = {**rest, "rotation": (rotation.axis, rotation.turns)}
        if self._structure_of is None:
            sample = {
                "data": self.for_transfer(data, data_grid, i, 0),
                "label": self.for_transfer(label, label_grid, i, 1),
                **rest,
            }
        else:
            # The structure is of the version of the density that was read last. The values are
            # copied: a grid that the training has to read again may be of a newer version.
            sample = {"data": in_pages(data), "label": in_pages(label), **rest}
            sample["structure"] = self._structure(name)
        return self._apply(sample, name)

    def _apply(self, sample: dict[str, Any], name: str) -> dict[str, Any]:
        """Apply the functions of ``transform`` to a sample."""
        result: Any = sample
        for function in self._functions:
            result = function(result)
            if not isinstance(result, Mapping) or not {"data", "label"} <= result.keys():
                raise ConfigError(
                    f"transform returned {kind_name(result)} for {name}. It has to return the "
                    "sample: a mapping with at least 'data' and 'label'."
                )
        return (
            {key: in_pages(value) for key, value in result.items()} if self._functions else result
        )

    def _selected(
        self, selection: Selection, i: int, name: str, rest: dict[str, Any]
    ) -> dict[str, Any]:
        """Read only the part of a sample that ``selection`` chooses."""
        grids = self._open(i, 0), self._open(i, 1)
        reason = self._to_tensors.misfit(selection, *(grid.shape[-3:] for grid in grids))
        if reason is not None:
            raise SchemaError(f"{name}: {reason}. {_LEAVE_OUT}")
        if self._structure_of is not None:  # after the density, as above
            rest = {**rest, "structure": self._structure(name)}
        pair, rng = self._to_tensors.views(*grids, i, name=name, structure=rest.get("structure"))
        found: Any = selection.select(pair, rng)
        if not isinstance(found, Mapping) or not {*ROLES} <= found.keys():
            raise ConfigError(
                f"select() of {selection!r} returned {kind_name(found)} for {name}. It has to "
                "return a mapping with at least 'data' and 'label'."
            )
        found = {**found}
        for field, role in enumerate(ROLES):
            found[role] = self._to_tensors.cast(found[role], field, f"{role} of {name}")
        tensors = {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in found.items()
        }
        return {key: in_pages(value) for key, value in tensors.items()} | rest

    def _structure(self, task_id: str) -> Structure:
        assert self._structure_of is not None
        return Structure(self._structure_of(task_id))

    def _open(self, i: int, field: int) -> LazyGrid | LazyStack:
        """Open one side of a sample. Only the values that are used will be read."""
        return LazyGrid(self._read(i, field))

    @abstractmethod
    def _read(self, i: int, field: int) -> Grid:
        """Read one side of a sample."""


class ZarrDataset(PairDataset, Dataset[Sample]):
    """A split of a reader as dicts ``{"data", "label", "index"}``, read through the cache.

    >>> train = ZarrDataset(ZarrS3Reader(...), "train", augmentation=True)
    >>> loader = DataLoader(train, batch_size=4, shuffle=True, num_workers=8, collate_fn=collate)

    ``data`` and ``label`` are tensors of shape ``(C, nx, ny, nz)``, of the C channels of the
    reader's ``density_type`` (1 for a single density); ``index`` is the task id.
    Downsampling, augmentation and ``seed`` are those of `RhoData`.

    Parameters
    ----------
    reader : ZarrS3Reader
        Or any object with ``split_task_ids()`` and ``load()``. It has to be picklable for
        DataLoader workers that are spawned.
    split : {"train", "validation", "test", "all"} or sequence of str
        ``validation`` needs a split file. ``all`` is the ids of the sides in this order. For your
        own split, pass its task ids. The reader's ``missing`` sets whether ids that lack a channel
        are filled, dropped or an error.
    precision : {"f32", "f16", "bf16"}
        float32, float16 or bfloat16. The largest float16 is 65504; a density that is not
        normalized can exceed it, which is an error. Below 6.1e-5 it has fewer than 11 bits, and
        below 3e-8 it is 0; normalized densities have such values, which is logged once per dataset,
        side and process, with their share. bfloat16 has the range of float32 and 8 bits.
    augmentation : bool
    downsample_data, downsample_label : int
    seed : int, optional
    rng : {"keyed", "torch"}
        Source of the random rotations. ``keyed``: see the Notes of `RhoData`. ``torch``: torch's
        global generator of the process, two numbers per sample, as in electrai's loader.
    augment_on : {"cpu", "device"}
        ``device``: samples are whole grids in float32 and have a key ``rotation``, the axis and the
        number of quarter turns. `augment` then rotates, downsamples and casts a batch on its
        device, for example the GPU, with the same result. Not with ``transform`` or ``layout``.
    layout : {"C", "rotated"}
        Order of a rotated tensor in memory. ``rotated``: strided, as ``transpose`` and ``flip``
        of torch leave it. Sums over it may differ in the last bit from those over C order, which is
        faster.
    structure : bool
        Add ``sample["structure"]``, the pymatgen dict of the input's structure. No request once
        ``zarrcache warm`` has stored the sample. Not with ``augmentation``, which rotates the grid
        alone. A batch has the list of its samples' structures, with any collate function that
        builds on torch's ``default_collate``.
    transform : callable, optional
        A function of the dict ``{"data": tensor, "label": tensor, "index": task id}`` that returns
        the item: that dict, changed or not, or another mapping with at least ``data`` and
        ``label``. Keys that it adds are collated like the others. See the Notes of `RhoData`.
        Or a `RandomCrop`, `Probes` or other `Selection`, which chooses the part of the grids that
        is read; or a list of a `Selection` and functions.

    Raises
    ------
    ConfigError
        Unknown split or precision, or an option that cannot be used. Errors of
        ``split_task_ids()`` are raised too; it is called here once, not in every worker, and not at
        all if ``split`` is a sequence of ids.
    """

    def __init__(
        self,
        reader: DensityReader,
        split: Literal["train", "validation", "test", "all"] | Sequence[str] = "train",
        *,
        precision: Literal["f32", "f16", "bf16"] = "f32",
        augmentation: bool = False,
        downsample_data: int = 1,
        downsample_label: int = 1,
        seed: int | None = None,
        rng: Literal["keyed", "torch"] = "keyed",
        augment_on: Literal["cpu", "device"] = "cpu",
        layout: Literal["C", "rotated"] = "C",
        structure: bool = False,
        transform: Transforms | None = None,
    ) -> None:
        if not callable(getattr(reader, "load", None)):
            raise ConfigError(
                f"reader is {safe_repr(reader)}. Give open_reader(DataConfig.from_yaml(path)) of "
                "zarrcache.registry, or another object with split_task_ids() and load()."
            )
        one_of("augment_on", augment_on, "cpu", "device")
        one_of("layout", layout, "C", "rotated")
        one_of("rng", rng, "keyed", "torch")
        one_of("precision", precision, *DTYPES)
        if augment_on == "device" and (transform is not None or layout != "C"):
            raise ConfigError(
                "augment_on='device' sends samples before they are rotated, downsampled and cast, "
                "so it cannot be combined with transform= or layout='rotated'. Leave these out, or "
                "use augment_on='cpu'."
            )
        if rng == "torch" and seed is not None:
            raise ConfigError("rng='torch' has no seed of its own. Call torch.manual_seed(seed).")
        selection, _ = steps_of(transform)
        if selection is not None and selection.needs_structure and not augmentation:
            structure = True
        if structure and augmentation:
            raise ConfigError(
                "structure and augmentation exclude each other: a rotation turns the grid, not the "
                "structure. Switch one of them off."
            )
        structure_of = getattr(reader, "structure", None) if structure else None
        if structure and not callable(structure_of):
            raise ConfigError(
                f"structure needs a reader that has structures; {type(reader).__name__} has no "
                "method structure(task_id). Use ZarrS3Reader."
            )
        if isinstance(split, str) and split not in ("train", "validation", "test", "all"):
            raise ConfigError(
                f"split is {split!r}; it has to be 'train', 'validation', 'test', 'all' or a list "
                "of task ids."
            )
        super().__init__(
            PairToTensors(
                downsample_data,
                downsample_label,
                augmentation,
                seed,
                DTYPES[precision],
                rng,
                layout,
                is_deferred=augment_on == "device",
            ),
            transform,
        )
        self.reader = reader
        self.split = split
        self._structure_of = structure_of
        if isinstance(split, str):
            split = _ids_of(reader, split)
        elif isinstance(reader, PairReader):
            split = reader.decide(split).ids
        self.task_ids: tuple[str, ...] = tuple(split)
        if self._selection is not None:
            self._check_cached(self._selection)

    def _check_cached(self, selection: Selection) -> None:
        """Raise if a selection does not fit some of the cached grids. The error lists these."""
        grids = self.reader.grids if isinstance(self.reader, ZarrS3Reader) else None
        reasons = {
            task_id: reason
            for task_id, *sides in (grids.pairs(self.task_ids) if grids else ())
            if (reason := self._to_tensors.misfit(selection, *sides)) is not None
        }
        if reasons:
            first, *others = reasons
            more = f" {len(others)} more do not fit: {first_ids(others)}." if others else ""
            raise ConfigError(
                f"{selection!r} does not fit {first}: {reasons[first]}.{more} {_LEAVE_OUT}"
            )

    def __len__(self) -> int:
        return len(self.task_ids)

    def _repr_html_(self) -> str:
        """Show a table in notebooks. Reads nothing."""
        split = self.split if isinstance(self.split, str) else "task ids"
        first = ", ".join(self.task_ids[:3]) + (", ..." if len(self.task_ids) > 3 else "")
        rows = {"split": split, "samples": f"{len(self):,}", "task_ids": first}
        reader = getattr(self.reader, "_repr_html_", lambda: "")
        return html_table(type(self).__name__, rows) + reader()

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """Read one pair through the cache.

        Raises
        ------
        SchemaError
            The grid is smaller than ``downsample_data``, or a value is beyond ``precision``.
        ZarrCacheError
            The reader cannot load the sample; see ``ZarrS3Reader.load``.
        """
        i = position_in(index, len(self))
        task_id = self.task_ids[i]
        return cast(Sample, self._sample(i, task_id, index=task_id))

    def augment(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Rotate, downsample and cast samples of ``augment_on="device"`` on their device.

        Parameters
        ----------
        batch : mapping
            From `collate_in_lists`, with the tensors on any device.

        Returns
        -------
        dict
            The batch that `collate` makes of samples with ``augment_on="cpu"``, bit for bit.

        Raises
        ------
        SchemaError
            A value is beyond float16.
        """
        samples = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        for sample in samples:
            name = sample["index"]
            rotation = Rotation(*sample.pop("rotation"))
            sample["data"], sample["label"] = (
                self._to_tensors.on_device(sample[role], rotation, field, f"{role} of {name}")
                for field, role in enumerate(ROLES)
            )
        device = samples[0]["data"].device
        return {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in collate(samples).items()
        }

    def _open(self, i: int, field: int) -> LazyGrid | LazyStack:
        open_grid = getattr(self.reader, "open_grid", None)
        if open_grid is None:
            return super()._open(i, field)
        grid: LazyGrid | LazyStack = open_grid(self.task_ids[i], ROLES[field])
        return grid.view(lambda stored: stored[None]) if isinstance(grid, LazyGrid) else grid

    def _read(self, i: int, field: int) -> Grid:
        task_id, role = self.task_ids[i], ROLES[field]
        # load() returns a new array at every call, so nothing is copied here.
        return grid_of(*self.reader.load(task_id, role), held=False, name=f"{role} of {task_id}")


def _ids_of(reader: DensityReader, split: str) -> Sequence[str]:
    """The ids of a side of the split, or of all."""
    if getattr(reader, "split_file", None) is None:
        if split == "validation":
            raise ConfigError(
                "split is 'validation', which needs a split file (split_file in the config). "
                "ZarrDataModule holds out a share of the training materials instead."
            )
        train, test = reader.split_task_ids()
        return {"train": train, "test": test, "all": [*train, *test]}[split]
    sides: Split = reader.split()  # type: ignore[attr-defined]
    if split == "all":
        return [*sides.train, *sides.validation, *sides.test]
    return {"train": sides.train, "validation": sides.validation, "test": sides.test}[split]


def grid_of(values: Any, gridsize: Any, *, held: bool, name: str) -> Grid:
    """View ``values`` as a float32 grid ``(C, nx, ny, nz)``, read-only if ``held`` by a caller.

    ``values`` are flat, or have a row for each of several channels.
    """
    flat = np.asarray(values, dtype=np.float32)
    shape = tuple(int(n) for n in gridsize)
    channels = flat.shape[0] if flat.ndim == 2 and len(shape) == 3 else 1
    if len(shape) != 3 or not channels or flat.size != channels * math.prod(shape):
        raise SchemaError(
            f"{name} has {flat.size} values and grid size {times(shape)}. The number of values "
            "has to be the product of three sizes."
        )
    grid = flat.reshape(channels, *shape)
    if held:
        grid.flags.writeable = False  # of this view only; it makes _tensor copy
    return grid


def position_in(index: SupportsIndex, length: int) -> int:
    """``index`` counted from the start.

    IndexError if there is no such sample: a ``for`` loop over the dataset ends with it.
    """
    try:
        i = operator.index(index)
    except TypeError as exc:
        raise ConfigError(
            f"the dataset has samples 0 to {length - 1}, not {index!r}. For several samples use "
            "torch.utils.data.Subset(dataset, indices)."
        ) from exc
    if not -length <= i < length:
        raise IndexError(f"sample {i} of a dataset of {length}")
    return i % length
