"""The competitors that read what is on the local disk already: one small dataset each, all of the
same pairs.

A peer is imported when it is asked for; one that is not installed, or does not work here, is named
in the table with the reason.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tests.bench.grids import FUNCTIONAL, ROLES, Pairs, Shape, values_of, write_pairs
from zarrcache import RhoData, ZarrDataset, ZarrS3Reader

__all__ = [
    "PEERS",
    "Samples",
    "available",
    "check",
    "cycle",
    "prepare",
    "reader",
    "tensors_of",
    "touch",
    "warm_reader",
]

PAGE_FLOATS = 1024  # of 4 KiB
ARRAY = "charge_density_total"


@dataclass(frozen=True)
class Samples:
    """Pairs of one shape: as stores at a local origin, and in memory to compare with."""

    pairs: Pairs
    arrays: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]

    @property
    def shape(self) -> Shape:
        return self.pairs.shapes[0]

    def __len__(self) -> int:
        return len(self.arrays)

    def store(self, index: int, role: str) -> Path:
        return self.pairs.directory / role / f"{self.pairs.task_ids[index]}.zarr"


def prepare(directory: Path, shape: Shape, count: int, seed: int) -> Samples:
    """Write ``count`` pairs of ``shape`` in 16**3 chunks, and keep their values."""
    pairs = write_pairs(directory / "origin", [shape] * count, seed=seed)
    values = [values_of(index, shape, seed) for index in range(count)]
    return Samples(pairs, [(one["data"], one["label"]) for one in values])


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """Data and label of what a loader gave, whatever it is wrapped in."""
    if isinstance(batch, Mapping):
        batch = [batch["data"], batch["label"]]
    flat: list[torch.Tensor] = []
    for one in batch:
        flat += one if isinstance(one, list) else [one]
    return flat


def touch(batch: Any) -> None:
    """What the consumer does with a sample: read one value of every page of both tensors."""
    for tensor in tensors_of(batch):
        tensor.numpy().reshape(-1)[::PAGE_FLOATS].sum()


def check(batches: Iterable[Any], samples: Samples, name: str, *, per_point: bool = False) -> None:
    """Every pair is one of ours, with all of its values.

    Raises
    ------
    ValueError
        One is not: this competitor does not do the same work.
    """
    scale = np.float32(np.prod(samples.shape) if per_point else 1)
    by_value = {
        float(data.flat[0] / scale): index for index, (data, _) in enumerate(samples.arrays)
    }
    for batch in batches:
        data, label = (tensor.numpy().reshape(samples.shape) for tensor in tensors_of(batch))
        index = by_value.get(float(data.flat[0]), -1)
        if index < 0 or not all(
            np.array_equal(a, b / scale)
            for a, b in zip((data, label), samples.arrays[index], strict=True)
        ):
            raise ValueError(f"{name} gave other values than were written")


def by_role(samples: Samples, read: Callable[[int, str], Any]) -> Dataset[Any]:
    """A map-style dataset of pairs; ``read(index, role)`` gives an array or a tensor."""
    return _Pairs(samples, read)


class _Pairs(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, samples: Samples, read: Callable[[int, str], Any]) -> None:
        self._length, self._read = len(samples), read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.as_tensor(self._read(index, role)) for role in ROLES.values())


class _Kept:
    """``open_(index, role)`` called once a process: the best case for those who have handles that
    are worth keeping.
    """

    def __init__(self, open_: Callable[[int, str], Any], read: Callable[[Any], Any]) -> None:
        self._open, self._read = open_, read
        self._handles: dict[tuple[int, int, str], Any] = {}

    def __call__(self, index: int, role: str) -> Any:
        key = (os.getpid(), index, role)
        if key not in self._handles:
            self._handles[key] = self._open(index, role)
        return self._read(self._handles[key])


# -- files of numpy


def _npy(samples: Samples, directory: Path) -> Path:
    """The arrays as ``.npy`` files, written once."""
    home = directory / "npy"
    if not home.exists():
        home.mkdir(parents=True)
        for index, pair in enumerate(samples.arrays):
            for role, values in zip(ROLES.values(), pair, strict=True):
                np.save(home / f"{index}-{role}.npy", values)
    return home


def np_load(samples: Samples, directory: Path) -> Dataset[Any]:
    """What a training script does that keeps decoded arrays in files."""
    home = _npy(samples, directory)
    return by_role(samples, lambda index, role: np.load(home / f"{index}-{role}.npy"))


def np_mmap(samples: Samples, directory: Path) -> Dataset[Any]:
    """The floor: no index, no checksum, no header but numpy's."""
    home = _npy(samples, directory)
    return by_role(
        samples, lambda index, role: np.load(home / f"{index}-{role}.npy", mmap_mode="c")
    )


# -- zarr


def zarr_local(samples: Samples, directory: Path) -> Dataset[Any]:
    """The stores on the local disk, as the users have them."""
    import zarr

    return by_role(
        samples,
        _Kept(
            lambda index, role: zarr.open_group(samples.store(index, role), mode="r")[ARRAY],
            lambda array: array[...],
        ),
    )


def zarr_cache_store(samples: Samples, directory: Path) -> Dataset[Any]:
    """``zarr.experimental``'s cache over a local directory."""
    import zarr
    from zarr.experimental.cache_store import CacheStore
    from zarr.storage import LocalStore

    def open_(index: int, role: str) -> Any:
        store = samples.store(index, role)
        cached = CacheStore(
            LocalStore(store, read_only=True),
            cache_store=LocalStore(directory / "cachestore" / role / store.name),
        )
        return zarr.open_group(cached, mode="r")[ARRAY]

    return by_role(samples, _Kept(open_, lambda array: array[...]))


def zarr_simplecache(samples: Samples, directory: Path) -> Dataset[Any]:
    """The whole-object cache of fsspec, below zarr; filled in the warm-up round."""
    import zarr

    def open_(index: int, role: str) -> Any:
        options = {"simplecache": {"cache_storage": str(directory / "simplecache")}}
        return zarr.open_group(
            f"simplecache::file://{samples.store(index, role)}", mode="r", storage_options=options
        )[ARRAY]

    return by_role(samples, _Kept(open_, lambda array: array[...]))


# -- TensorStore


def tensorstore_local(samples: Samples, directory: Path, *, pool_bytes: int = 0) -> Dataset[Any]:
    """TensorStore's zarr driver over the local stores; a pool keeps decoded chunks in memory."""

    def open_(index: int, role: str) -> Any:
        # here, and so in the process that reads: it does not survive a fork
        import tensorstore as ts

        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{samples.store(index, role)}/{ARRAY}/"},
            "recheck_cached_data": "open",
        }
        context = contexts.setdefault(
            os.getpid(), ts.Context({"cache_pool": {"total_bytes_limit": pool_bytes}})
        )
        return ts.open(spec, read=True, context=context).result()

    importlib.import_module("tensorstore")
    contexts: dict[int, Any] = {}
    return by_role(samples, _Kept(open_, lambda array: array.read().result()))


def tensorstore_pool(samples: Samples, directory: Path) -> Dataset[Any]:
    """All of the decoded chunks in TensorStore's cache."""
    return tensorstore_local(samples, directory, pool_bytes=2 * samples.pairs.decoded_bytes)


# -- formats of their own


def litdata(samples: Samples, directory: Path, *, length: int | None = None) -> Any:
    """LitData's chunks of 64 MB, tensors serialized by itself. ``length``: that many samples, ours
    over and over.
    """
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    home = directory / f"litdata-{length}"
    if not home.exists():
        home.mkdir(parents=True)
        cache = Cache(str(home), chunk_bytes="64MB")
        for index in range(length or len(samples)):
            cache[index] = tuple(
                torch.from_numpy(values) for values in samples.arrays[index % len(samples)]
            )
        cache.done()
        cache.merge()
    return StreamingDataset(str(home))


def litdata_by_index(samples: Samples, directory: Path) -> Dataset[Any]:
    """``dataset[i]``: the chunks stay mapped between epochs, read-only."""
    return _ByIndex(litdata(samples, directory))


class _ByIndex(Dataset[Any]):
    """torch takes LitData's dataset for one that is iterated; this is the same by position."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def mosaic(samples: Samples, directory: Path, *, length: int | None = None) -> Any:
    """Mosaic Streaming's MDS shards, not compressed."""
    # The package imports its datasets of pictures, and with them torchvision, whose wheel from PyPI
    # does not load beside a CPU build of torch.
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    from streaming import MDSWriter, StreamingDataset

    home = directory / f"mds-{length}"
    if not home.exists():
        kind = f"ndarray:float32:{','.join(map(str, samples.shape))}"
        with MDSWriter(out=str(home), columns={"data": kind, "label": kind}) as writer:
            for index in range(length or len(samples)):
                data, label = samples.arrays[index % len(samples)]
                writer.write({"data": data, "label": label})
    return StreamingDataset(local=str(home), batch_size=1, shuffle=False)


# -- zarrcache


def reader(
    samples: Samples, directory: Path, *, normalize: bool = False, **cache: Any
) -> ZarrS3Reader:
    """A reader over the local origin, with a cache in ``directory``."""
    origin = samples.pairs.directory
    settings = {"dir": str(directory / "zarrcache"), "min_free": 0, **cache}
    return ZarrS3Reader(
        origin / ROLES["data"],
        origin / ROLES["label"],
        samples.pairs.map_path,
        FUNCTIONAL,
        normalize,
        0.75,
        cache=settings,
    )


def warm_reader(samples: Samples, directory: Path, *, normalize: bool = False) -> ZarrS3Reader:
    """A reader whose array tier has every pair."""
    warm = reader(samples, directory, normalize=normalize)
    for task_id in samples.pairs.task_ids:
        for role in ROLES:
            warm.ensure(task_id, role)
    return warm


def zarr_dataset(samples: Samples, directory: Path, *, normalize: bool = False) -> ZarrDataset:
    """All pairs as dictionaries."""
    return ZarrDataset(warm_reader(samples, directory, normalize=normalize), "all")


def zarr_dataset_normalized(samples: Samples, directory: Path) -> ZarrDataset:
    """The same, each value divided by the number of grid points: ``normalize_data: true``."""
    return zarr_dataset(samples, directory, normalize=True)


def rho_data(samples: Samples, directory: Path) -> RhoData:
    """The training pairs as the users' tuples."""
    train, _ = warm_reader(samples, directory).data_split()
    return RhoData(*train, data_augmentation=False)


#: Everything that reads pairs by index or by iteration. The first is the floor.
PEERS: dict[str, Callable[[Samples, Path], Any]] = {
    "np.load(mmap_mode=c)": np_mmap,
    "np.load": np_load,
    "zarrcache ZarrDataset": zarr_dataset,
    "zarrcache RhoData": rho_data,
    "zarrcache ZarrDataset, normalized": zarr_dataset_normalized,
    "LitData": litdata,
    "LitData, by index": litdata_by_index,
    "Mosaic Streaming": mosaic,
    "TensorStore": tensorstore_local,
    "TensorStore, cache pool": tensorstore_pool,
    "zarr": zarr_local,
    "zarr CacheStore": zarr_cache_store,
    "zarr simplecache": zarr_simplecache,
}
_PACKAGES = {
    "insitubatch": "insitubatch",
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
    "tensorstore": "tensorstore",
}


def available(build: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What could be built, and why the others could not. zarrcache's own have to."""
    built: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, make in build.items():
        try:
            built[name] = make()
        except ModuleNotFoundError as exc:
            package = _PACKAGES.get((exc.name or "").partition(".")[0])
            if package is None:
                raise
            missing[name] = f"not installed: pip install -c tests/bench/constraints.txt {package}"
        except Exception as exc:
            if name.startswith(("zarrcache", "np.")):
                raise
            missing[name] = (
                f"does not work here: {type(exc).__name__}: "
                f"{str(exc).splitlines()[0] if str(exc) else ''}"
            )
    return built, missing


def cycle(length: int, count: int) -> Iterator[int]:
    """Positions of ``count`` samples, over and over those of a dataset of ``length``."""
    return (number % length for number in range(count))
