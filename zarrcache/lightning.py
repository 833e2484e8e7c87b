"""Data modules for Lightning's ``Trainer``, on one or many nodes.

``ZarrDataModule`` resumes within an epoch and looks ahead; ``RhoDataModule`` takes electrai's
arguments and gives its batches.

>>> data = ZarrDataModule("configs/s3_cached.yaml", batch_size=1, train_workers=8, val_workers=2)
>>> Trainer(devices=8, num_nodes=4, strategy="ddp").fit(model, data, ckpt_path="last")

Requires the extra ``lightning``. docs/guides/training.md has whole training scripts.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import multiprocessing
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

try:
    import torch
    from lightning.fabric.utilities.seed import pl_worker_init_function
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info
    from lightning.pytorch.utilities.parsing import collect_init_args
    from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
except ImportError as exc:
    raise ImportError(
        f"zarrcache.lightning needs PyTorch and Lightning ({exc}). Install them: pip install "
        "'zarrcache[lightning]'"
    ) from exc

from zarrcache._keys import DensityType, Missing
from zarrcache._units import whole_number
from zarrcache.config import plain
from zarrcache.data import Split, ZarrS3Reader
from zarrcache.errors import ConfigError
from zarrcache.origin import secret_names
from zarrcache.parallel import World
from zarrcache.train import (
    Assignment,
    CombinedDataset,
    Config,
    EpochTimes,
    Lookahead,
    NodeSampler,
    Recorder,
    Sample,
    Selection,
    Side,
    Sources,
    Transforms,
    Verdict,
    ZarrDataset,
    collate_fn,
    collate_in_lists,
)

__all__ = ["CacheMonitor", "RhoDataModule", "ZarrDataModule"]

logger = logging.getLogger(__name__)

_SIDES: tuple[Side, ...] = ("train", "validation", "test")


class _DataModule(LightningDataModule):
    """A data module whose hyperparameters, which go to loggers and checkpoints, have no secrets."""

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: types.FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As Lightning's, without arguments that hold secrets, such as an inline ``s3_kwargs``."""
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        if frame is not None:
            for given in collect_init_args(frame, [], classes=(LightningDataModule,)):
                ignored |= {name for name, value in given.items() if _holds_secret(value)}
        public = [
            {name: value for name, value in one.items() if not _holds_secret({name: value})}
            if isinstance(one, Mapping)
            else one
            for one in args
            if not (isinstance(one, str) and one in ignored)
        ]
        if args and not public:
            return
        super().save_hyperparameters(*public, ignore=list(ignored), frame=frame, logger=logger)


def _holds_secret(value: Any) -> bool:
    value = plain(value)
    if isinstance(value, Mapping):
        return bool(secret_names(value)) or any(map(_holds_secret, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_secret, value))


class ZarrDataModule(_DataModule):
    """The densities of one training config, or of several combined.

    A batch is ``{"data", "label", "index"}`` as in ``ZarrDataset``, with lists if the grids differ
    in shape. For several datasets it also has ``"dataset"``, the number of each sample's dataset.

    Parameters
    ----------
    config : path, mapping, list or mapping of these
        The training config (``data_dir``, ``map_dir``, ``cache``, ...), as a YAML file or its keys;
        also a file whose block ``data:`` has them. The parameters below that are not given are
        taken from it, where it has keys of their names.
        ``[a.yaml, b.yaml]`` and ``{"pbe": a.yaml, "scan": b.yaml}`` are several datasets, numbered
        from 0; ``dataset_names`` has their names.
    batch_size : int, default 1
        Samples per rank and batch.
    train_workers, val_workers : int, default 8 and 2
        DataLoader workers per rank; the test loader has ``val_workers``. 0 reads in the training
        process.
    pin_memory : bool, default True
        Ignored without a GPU.
    precision : {"f32", "f16", "bf16"}, default "f32"
        Of a config's key ``precision``, values for Lightning's Trainer are ignored.
    augmentation : bool, default True
        Rotate the training samples randomly. With `Probes` the default is False.
    augment_on : {"cpu", "device"}, default "cpu"
        Where samples are rotated, downsampled and cast. ``cpu``: in the workers. ``device``: after
        the transfer to the GPU, in ``on_after_batch_transfer``, with the same result; the samples
        of a warm cache are then maps of their files, and ``precision`` and ``downsample_data`` do
        not make the transfer to the GPU smaller. Without a Trainer, call that method.
    transform : callable, `RandomCrop`, `Probes`, or list, optional
        As in `ZarrDataset`, for all samples; or a mapping of ``train``, ``validation`` and ``test``
        to these, for some of them: ``{"train": RandomCrop(32)}``.
    split_file : path or mapping, optional
        JSON of task ids or of positions in the map: ``{"train": [...], "validation": [...],
        "test": [...]}``. For several datasets, one file per name. Default: the training and test
        ids of ``train_fraction`` and ``random_state`` in the config.
    val_frac : float, default 0.005
        Without ``split_file``: the fraction of the training ids that is kept for validation, at
        least one. 0 means no validation.
    random_seed : int, default 42
        Seed of the choice of the validation ids and of the order of the training samples. Of
        several configs, each has its own for the choice, and the order has that of the first.
    assignment : {"global", "node"}, default "global"
        Assignment of samples to ranks, see `NodeSampler`.
    shuffle : bool, default True
        Shuffle the training samples.
    drop_last : bool, default False
        Leave out samples that do not fill a batch on every rank, instead of reading up to one
        sample per rank twice.
    downsample_data, downsample_label : int, default 1
    persistent_workers : bool, default True
        Keep the workers between epochs.
    multiprocessing_context : {"fork", "forkserver", "spawn"}, optional
        How workers are started. Default: Python's own; but ``spawn`` if that is ``fork`` and
        exactly one of ``train_workers`` and ``val_workers`` is 0, because a process that reads from
        S3 itself should not fork workers that do.

    Raises
    ------
    ConfigError
        A config, the split file or an argument cannot be used, the ranks have different samples, or
        the sampler was replaced.

    Notes
    -----
    *Order.* `NodeSampler` computes it for all ranks. Lightning keeps this sampler, with
    ``use_distributed_sampler`` or without; if something else replaces it, the epoch does not start.

    *Look-ahead.* With a ``cache`` block, each rank has a
    :class:`~zarrcache.train.lookahead.Lookahead`: a process that fetches what the rank reads next,
    at most ``cache.lookahead`` bytes ahead. 0 turns it off. Several datasets have none.

    *Resume.* A checkpoint records how many batches of the epoch were trained on. A resumed run
    continues the epoch with the remaining samples, each once, also with another number of ranks,
    nodes or workers, or another batch size.
    """

    def __init__(
        self,
        config: Config | Sequence[Config] | Mapping[str, Config],
        batch_size: int | None = None,
        train_workers: int | None = None,
        val_workers: int | None = None,
        pin_memory: bool | None = None,
        precision: Literal["f32", "f16", "bf16"] | None = None,
        augmentation: bool | None = None,
        split_file: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
        val_frac: float | None = None,
        random_seed: int | None = None,
        *,
        assignment: Assignment | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        downsample_data: int | None = None,
        downsample_label: int | None = None,
        augment_on: Literal["cpu", "device"] | None = None,
        transform: Transforms | Mapping[str, Transforms] | None = None,
        persistent_workers: bool | None = None,
        multiprocessing_context: str | None = None,
    ) -> None:
        super().__init__()
        self.sources = Sources(
            config, split_file=split_file, val_frac=val_frac, random_seed=random_seed
        )
        setting = self.sources.setting
        self.batch_size = whole_number("batch_size", setting("batch_size", batch_size, 1), least=1)
        self.train_workers = whole_number(
            "train_workers", setting("train_workers", train_workers, 8), least=0
        )
        self.val_workers = whole_number(
            "val_workers", setting("val_workers", val_workers, 2), least=0
        )
        self.pin_memory: bool = setting("pin_memory", pin_memory, True)
        self._transforms = _transforms_of(transform)
        first = self._transforms.get("train")
        first = first[0] if isinstance(first, Sequence) and first else first
        may_rotate = not isinstance(first, Selection) or first.never_rotated is None
        self.augmentation: bool = setting("augmentation", augmentation, may_rotate)
        self.random_seed = self.sources.random_seed
        self.assignment: Assignment = setting("assignment", assignment, "global")
        self.shuffle: bool = setting("shuffle", shuffle, True)
        self.drop_last: bool = setting("drop_last", drop_last, False)
        self.persistent_workers: bool = setting("persistent_workers", persistent_workers, True)
        self.multiprocessing_context: str | None = setting(
            "multiprocessing_context", multiprocessing_context, None
        )
        self._tensors: dict[str, Any] = {
            "precision": setting("precision", precision, "f32"),
            "downsample_data": setting("downsample_data", downsample_data, 1),
            "downsample_label": setting("downsample_label", downsample_label, 1),
            "augment_on": setting("augment_on", augment_on, "cpu"),
        }
        self._deferring: ZarrDataset | CombinedDataset | None = None
        self._loader: _TrainLoader | None = None
        self._ahead: Lookahead | None = None
        self._begun: int | None = None
        self._loaded: dict[str, Any] = {}

    # -- datasets

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """Names of the datasets, in the order of the numbers in ``batch["dataset"]``."""
        return self.sources.names

    @property
    def readers(self) -> Mapping[str, ZarrS3Reader]:
        """The readers by name; ``readers[name].stats`` counts hits and misses of the rank."""
        return self.sources.readers

    @property
    def splits(self) -> Mapping[str, Split]:
        """Training, validation and test ids of each dataset. Lists the origin at first use."""
        return self.sources.splits

    def prepare_data(self) -> None:
        """List the origin, on one process per node; the others find the listing in the cache."""
        self.sources.list_into_cache()

    def setup(self, stage: str | None = None) -> None:
        """Compute the splits and check that they are identical on all ranks.

        Raises
        ------
        ConfigError
            Too few samples, a split file that does not match them, or ranks with different samples.
        """
        _check_ranks(self)

    def _dataset(self, side: Side) -> ZarrDataset | CombinedDataset:
        dataset = self.sources.dataset(
            side,
            augmentation=self.augmentation and side == "train",
            transform=self._transforms.get(side),
            **self._tensors,
        )
        if self._tensors["augment_on"] == "device":
            self._deferring = dataset
        return dataset

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Rotate, downsample and cast on the device, with ``augment_on="device"``."""
        if self._deferring is not None and isinstance(batch, Mapping) and "rotation" in batch:
            return self._deferring.augment(batch)
        return batch

    # -- loaders

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loader of this rank. Lightning calls this after it has loaded a checkpoint."""
        dataset = self._dataset("train")
        if not len(dataset):  # Lightning would end the training at once, with success
            raise ConfigError(
                "There are no training samples: 'train' is empty in the split file. Add some, or "
                "call trainer.test() only."
            )
        sampler = self._sampler(dataset, shuffle=self.shuffle, drop_last=self.drop_last)
        batch_size = self.batch_size or 1
        if self.drop_last and sampler.schedule.samples_of_rank < batch_size:
            raise ConfigError(
                f"drop_last leaves nothing to train on: each rank has "
                f"{sampler.schedule.samples_of_rank} of the {len(dataset)} samples, fewer than "
                f"batch_size={batch_size}. Set drop_last=False or a smaller batch_size."
            )
        state, self._loaded = self._loaded, {}
        if state:
            sampler.load_state_dict(state)
        loader = _TrainLoader(
            dataset, sampler=sampler, drop_last=self.drop_last, **self._options(self.train_workers)
        )
        loader.on_begin = self._epoch_begins
        self._loader, self._begun = loader, None
        if self.trainer is not None:
            self._join(loader, sampler)
        self._look_ahead(dataset, sampler)
        return loader

    def _look_ahead(self, dataset: ZarrDataset | CombinedDataset, sampler: NodeSampler) -> None:
        """Start the look-ahead of this rank. Call before the loader starts its workers."""
        self._stop_looking_ahead()
        # A combined dataset has one order over several caches.
        if isinstance(dataset, ZarrDataset):
            self._ahead = Lookahead(dataset, sampler)

    def _stop_looking_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def teardown(self, stage: str | None = None) -> None:
        """End the look-ahead process."""
        self._stop_looking_ahead()

    def _join(self, loader: _TrainLoader, sampler: NodeSampler) -> None:
        """Set the epoch that Lightning is about to train, and the batch at which it continues.

        Lightning draws the first samples before it calls ``set_epoch``; a resumed run would start
        in the order of epoch 0.
        """
        assert self.trainer is not None
        epochs, batches = (
            _counts(progress)
            for progress in (
                self.trainer.fit_loop.epoch_progress,
                self.trainer.fit_loop.epoch_loop.batch_progress,
            )
        )
        # Saved after the last batch but before the end of the epoch: Lightning continues with the
        # next epoch.
        is_over = (
            epochs.ready > epochs.processed
            and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        )
        sampler.set_epoch(epochs.processed + is_over)
        if is_over or sampler.history:
            # With the same ranks and batch size as before, the shift is 0.
            shift = (len(loader) if is_over else loader.batches_before) - batches.processed
            for name in ("ready", "started", "processed", "completed"):
                setattr(batches, name, getattr(batches, name) + shift)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Loader of this rank, or an empty list without validation samples."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Loader of this rank, or an empty list without test samples."""
        return self._in_order("test")

    def _in_order(self, side: Side) -> DataLoader[Sample] | list[Any]:
        dataset = self._dataset(side)
        if not len(dataset):
            return []
        return DataLoader(
            dataset,
            sampler=self._sampler(dataset, shuffle=False, drop_last=False),
            **self._options(self.val_workers),
        )

    def _sampler(
        self, dataset: ZarrDataset | CombinedDataset, *, shuffle: bool, drop_last: bool
    ) -> _Sampler:
        return _Sampler(
            dataset,
            assignment=self.assignment,
            seed=self.random_seed,
            shuffle=shuffle,
            drop_last=drop_last,
            world=_world_of(self.trainer),
        )

    def _options(self, workers: int) -> dict[str, Any]:
        context = self.multiprocessing_context or _start_method(
            self.train_workers, self.val_workers
        )
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "pin_memory": self.pin_memory and torch.cuda.is_available(),
            "persistent_workers": self.persistent_workers and workers > 0,
            "multiprocessing_context": context if workers else None,
            "collate_fn": collate_in_lists
            if self._tensors["augment_on"] == "device"
            else collate_fn,
        }

    # -- position in the epoch

    def _epoch_begins(self, epoch: int) -> None:
        """Called when the training loader is about to draw the first samples of an epoch."""
        self._begun = epoch
        if self._ahead is not None:
            self._ahead.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, identical on all ranks; Lightning puts it into checkpoints."""
        loader, trainer = self._loader, self.trainer
        if loader is None or trainer is None or getattr(trainer, "overfit_batches", False):
            return dict(self._loaded)
        sampler = loader.planned
        # Batches trained on, not batches drawn: an exception may have ended a step in between.
        trained = _counts(trainer.fit_loop.epoch_loop.batch_progress).processed
        if self._begun != sampler.epoch:
            taken = 0
        elif trained >= len(loader):
            taken = len(sampler)
        else:
            taken = (trained - loader.batches_before) * self.batch_size
        return sampler.state_dict(taken=taken)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint; takes effect when the training loader is created."""
        # trainer.test() loads checkpoints too.
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._loaded = dict(state_dict)


class RhoDataModule(_DataModule):
    """electrai's ``RhoRead`` through the cache: same arguments, samples, split and order.

    In its config only ``_target_`` changes, and ``cache:`` is added::

        data:
          _target_: zarrcache.lightning.RhoDataModule
          root: /data/mp/mp_filelist.txt
          cache: {dir: "${oc.env:TMPDIR,/tmp}/zarrcache"}

    A sample is ``{"data", "label", "index"}``: two tensors of shape (C, nx, ny, nz) in electrons
    per cubic angstrom, and the task id. C is 1 unless ``density_type`` names several channels. With
    ``datasets`` it also has ``"Dataset_ID"``.

    Parameters
    ----------
    root : path
        The file list, one task id per line. The densities lie beside it in ``data/`` and
        ``label/``, as ``.zarr``, ``.zarr.zip``, ``.json.gz`` or ``.CHGCAR``.
    precision : {"f32", "f16", "bf16"}
    batch_size : int
        Of training and validation; the test loader has batches of one.
    train_workers, val_workers : int
        DataLoader workers per rank; the test loader has ``val_workers``.
    pin_memory : bool
        Ignored without a GPU.
    val_frac : float
        Without ``split_file``: the first ``int(n * val_frac)`` samples of a permutation of the list
        are for validation, the others for training, and there is no test set.
    drop_last : bool
    split_file : path, optional
        JSON of positions in the list, from 0, or of task ids: ``{"train": [...], "validation":
        [...], "test": [...]}``.
    augmentation : bool
        Rotate the samples randomly; as in electrai, those for validation and test too.
    random_seed : int
        Seed of the permutation, and of nothing else.
    downsample_data, downsample_label : int
        Ignored, as electrai ignores them for ``mp`` lists.
    datasets : list of mapping, optional
        Several lists instead of ``root``: ``{root, split_file, val_frac, dataset_id}``.
    default_val_frac : float
    default_split_file : path, optional
        For those of ``datasets`` that have none.
    data_dir, label_dir : path or URL, optional
        Where the densities are, if not beside the list; may be ``s3://bucket/prefix``.
    source : str or list of str, optional
        Kinds of files to read, see ``ZarrS3Reader``. Default: ``[zarr, zarr.zip, CHGCAR,
        json.gz]``.
    cache : mapping
        The block ``cache:``. None: read the files in every epoch.
    s3_kwargs : mapping, optional
        As ``s3fs.S3FileSystem`` takes them.
    density_type, missing : optional
        As in ``ZarrS3Reader``: the channels of input and label. Default: the total density.
    transform : callable, `RandomCrop`, `Probes` or list, optional
        As in `ZarrDataModule`. electrai has none.
    **ignored
        Other keys, which electrai ignores too; they are named in a warning.

    Raises
    ------
    ConfigError
        The list or split file cannot be used; or a material has no density, which is named with its
        line.

    Notes
    -----
    *Order and rotations.* The loaders are plain ``DataLoader`` objects, and the rotations draw from
    torch's global generator as electrai's do. After the same ``seed_everything``, with the same
    number of workers, batches are therefore equal bit for bit, on one rank or many.

    *Differences from ZarrDataModule.* It has no look-ahead, so warm the cache before (``zarrcache
    warm CONFIG`` reads this block), and a job that is killed repeats its epoch, as with electrai.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        precision: Literal["f32", "f16", "bf16"] = "f32",
        batch_size: int = 2,
        train_workers: int = 8,
        val_workers: int = 2,
        pin_memory: bool = False,
        val_frac: float = 0.005,
        drop_last: bool = False,
        split_file: str | os.PathLike[str] | None = None,
        augmentation: bool = False,
        random_seed: int = 42,
        downsample_data: int = 1,
        downsample_label: int = 1,
        *,
        datasets: Sequence[Mapping[str, Any]] | None = None,
        default_val_frac: float | None = None,
        default_split_file: str | os.PathLike[str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        label_dir: str | os.PathLike[str] | None = None,
        source: str | Sequence[str] | None = None,
        cache: Mapping[str, Any] | None = None,
        s3_kwargs: Mapping[str, Any] | None = None,
        density_type: DensityType | None = None,
        missing: Missing | None = None,
        transform: Transforms | Mapping[str, Transforms] | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        # A checkpoint with objects of other classes cannot be loaded with weights_only=True.
        self.save_hyperparameters(ignore=["transform"])
        self._transforms = _transforms_of(transform)
        if ignored:
            logger.warning("RhoDataModule ignores %s, as electrai does.", ", ".join(ignored))
        if {downsample_data, downsample_label} - {0, 1, None}:
            logger.warning(
                "RhoDataModule ignores downsample_data=%s and downsample_label=%s, as electrai "
                "does for mp lists. ZarrDataModule downsamples.",
                downsample_data,
                downsample_label,
            )
        self.precision: Literal["f32", "f16", "bf16"] = precision
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.train_workers = whole_number("train_workers", train_workers, least=0)
        self.val_workers = whole_number("val_workers", val_workers, least=0)
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.augmentation = augmentation
        self.random_seed = random_seed
        self._key = None if datasets is None else "Dataset_ID"
        block = {
            "root": root,
            "datasets": datasets,
            "split_file": split_file,
            "val_frac": val_frac,
            "default_split_file": default_split_file,
            "default_val_frac": default_val_frac,
            "random_seed": random_seed,
            "data_dir": data_dir,
            "label_dir": label_dir,
            "source": source,
            "cache": cache,
            "s3_kwargs": s3_kwargs,
            "density_type": density_type,
            "missing": missing,
        }
        if root is None and datasets is None:
            raise ConfigError(
                "RhoDataModule has neither root nor datasets. Give root, the path of a file list "
                "(mp_filelist.txt)."
            )
        self.sources = Sources(
            {key: value for key, value in block.items() if value is not None}, is_permuted=True
        )
        self._sets: dict[Side, ZarrDataset | CombinedDataset] = {}

    @property
    def readers(self) -> Mapping[str, ZarrS3Reader]:
        """The readers by ``dataset_id``; ``readers[name].stats`` counts hits and misses."""
        return self.sources.readers

    @property
    def splits(self) -> Mapping[str, Split]:
        """Training, validation and test ids of each dataset. Lists the origin at first use."""
        return self.sources.splits

    @property
    def train_set(self) -> ZarrDataset | CombinedDataset:
        """The samples to train on, in the order of the split."""
        return self._set("train")

    @property
    def val_set(self) -> ZarrDataset | CombinedDataset:
        """The samples for validation."""
        return self._set("validation")

    @property
    def test_set(self) -> ZarrDataset | CombinedDataset:
        """The samples to test on.

        Raises
        ------
        ConfigError
            There are none.
        """
        found = self._set("test")
        if not len(found):
            raise ConfigError(
                "There is no test set. Give a split_file with the key 'test', positions in the "
                "file list."
            )
        return found

    def _set(self, side: Side) -> ZarrDataset | CombinedDataset:
        if side not in self._sets:
            self._sets[side] = self.sources.dataset(
                side,
                key=self._key,
                precision=self.precision,
                augmentation=self.augmentation,
                rng="torch",
                # Only the lists of a batch of unequal grids keep it.
                layout="rotated" if self.batch_size > 1 else "C",
                transform=self._transforms.get(side),
            )
        return self._sets[side]

    def prepare_data(self) -> None:
        """List the origin, on one process per node; the others find the listing in the cache."""
        self.sources.list_into_cache()

    def setup(self, stage: str | None = None) -> None:
        """Compute the splits and check that they are identical on all ranks.

        Raises
        ------
        ConfigError
            A list, a split file or a material cannot be used.
        """
        _check_ranks(self)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loader of shuffled samples; Lightning divides them among the ranks."""
        if not len(self.train_set):
            raise ConfigError("There are no training samples: 'train' is empty in the split file.")
        return self._loader(self.train_set, self.batch_size, self.train_workers, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Loader in the order of the split."""
        return self._loader(self.val_set, self.batch_size, self.val_workers)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Loader in the order of the split, with batches of one sample."""
        return self._loader(self.test_set, 1, self.val_workers)

    def _loader(
        self, dataset: Any, batch_size: int, workers: int, *, shuffle: bool = False
    ) -> DataLoader[Sample]:
        # Nothing here may draw from torch's generator: that would move the order and rotations.
        # Where nothing is on S3, workers start as electrai's do, in scripts of any form.
        on_s3 = any(reader.use_s3 for reader in self.readers.values())
        return DataLoader(
            dataset,
            batch_size,
            shuffle=shuffle,
            num_workers=workers,
            collate_fn=collate_fn,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            drop_last=self.drop_last,
            multiprocessing_context=_start_method(self.train_workers, self.val_workers)
            if workers and on_s3
            else None,
        )


def _transforms_of(transform: Any) -> dict[str, Any]:
    """The transform of each side of the split.

    Raises
    ------
    ConfigError
        It is for a side that there is none of.
    """
    if not isinstance(transform, Mapping):
        return {} if transform is None else dict.fromkeys(_SIDES, transform)
    if unknown := sorted(map(str, transform.keys() - {*_SIDES})):
        raise ConfigError(
            f"transform names {', '.join(unknown)}; known are {', '.join(_SIDES)}. Give a "
            "transform for each of these that has one."
        )
    return dict(transform)


def _check_ranks(module: ZarrDataModule | RhoDataModule) -> None:
    """Compute the splits and compare them across the ranks.

    Raises
    ------
    ConfigError
        They differ.
    """
    counts = {name: len(split.train) for name, split in module.splits.items()}
    trainer = module.trainer
    if trainer is None or trainer.world_size == 1:
        return
    # Nodes whose stored listings differ in age would compute different orders. All ranks exchange
    # the outcome, so that none is left waiting in a collective operation.
    mine = hashlib.blake2b(repr(module.splits).encode(), digest_size=8).hexdigest(), counts
    first = trainer.strategy.broadcast(mine)
    if not trainer.strategy.reduce_boolean_decision(first == mine, all=True):
        raise ConfigError(
            f"The ranks have different samples: training samples are {first[1]} on rank 0 and "
            f"{mine[1]} on rank {trainer.global_rank}. Give all nodes the same config, map and "
            "split file, and list the origin again: zarrcache warm CONFIG."
        )


def _start_method(train_workers: int, val_workers: int) -> str | None:
    """How workers are started, unless the user says; None is Python's own way."""
    if bool(train_workers) != bool(val_workers) and multiprocessing.get_start_method() == "fork":
        # Not forkserver: its workers do not notice when the training is killed, and keep on
        # running.
        return "spawn"
    return None


class _Sampler(NodeSampler, DistributedSampler[int]):
    """A `NodeSampler` that Lightning keeps.

    Lightning wraps any sampler that is not a ``DistributedSampler`` to distribute it over the
    ranks, here a second time.
    """

    def __init__(self, source: ZarrDataset | CombinedDataset, **settings: Any) -> None:
        super().__init__(source, **settings)
        # Attributes of a DistributedSampler.
        self.num_replicas, self.rank = self.world.ranks, self.world.rank


class _TrainLoader(DataLoader[Sample]):
    """A resumable DataLoader. Its length is that of the whole epoch; it yields the rest of it."""

    on_begin: Callable[[int], None]

    @property
    def planned(self) -> NodeSampler:
        """The sampler.

        Raises
        ------
        ConfigError
            Something has replaced it.
        """
        if not isinstance(self.sampler, NodeSampler):
            raise ConfigError(
                "The sampler of the training loader was replaced by a "
                f"{type(self.sampler).__name__}, so the ranks would not read in the order computed "
                "for them. Set Trainer(use_distributed_sampler=False), and remove other code that "
                "changes the data module's loaders."
            )
        return self.sampler

    @property
    def batches_before(self) -> int:
        """Number of batches of this epoch that were trained on before the run was resumed."""
        return len(self) - self._batches(len(self.planned))

    def _batches(self, samples: int) -> int:
        assert self.batch_size is not None
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __len__(self) -> int:
        return (
            self._batches(self.sampler.schedule.samples_of_rank)
            if isinstance(self.sampler, NodeSampler)
            else super().__len__()
        )

    def __iter__(self) -> Any:
        # Trainer(overfit_batches=...) replaces the sampler on purpose, and warns.
        if not isinstance(self.sampler, SequentialSampler):
            epoch = self.planned.epoch
            self.on_begin(epoch)
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module's state has everything.

        Lightning resumes within an epoch if the loader has this method and ``load_state_dict``.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


def _world_of(trainer: Any) -> World | None:
    """Ranks and nodes as Lightning numbers them.

    Raises
    ------
    ConfigError
        The ranks are not numbered node by node.
    """
    if trainer is None:
        return None
    shares = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    rank, ranks = int(shares["rank"]), int(shares["num_replicas"])
    if ranks != trainer.world_size:  # several ranks share a model, and a sample
        return World.even(rank, ranks)
    world = World.even(rank, ranks, trainer.num_nodes)
    if world.node != trainer.node_rank:
        raise ConfigError(
            f"Rank {rank} of {ranks} is on node {trainer.node_rank} of {trainer.num_nodes}, and "
            f"would be on node {world.node} if ranks were numbered node by node. Start the job "
            "with srun --distribution=block, and set Trainer(num_nodes=..., devices=...) to match "
            "the job."
        )
    return world


def _counts(progress: Any) -> Any:
    """Lightning's counters of epochs or batches: ready, started, processed, completed."""
    return progress.current


class CacheMonitor(Callback):
    """Logs how long the training waits for data, and says for what at its end.

    >>> Trainer(callbacks=[CacheMonitor()], logger=CSVLogger("logs")).fit(model, data)
    The training waited 12 % of the time, for S3 (cold misses). Do this: ...

    Every ``log_every_n_steps`` of the Trainer, and at the end of each epoch (with ``_epoch``
    appended), it logs ``zarrcache/waiting_ratio``, ``hit_ratio``, ``requests`` and
    ``fetched_bytes`` of the epoch so far to every logger. A logger that fails is named once and
    left alone. ``zarrcache.train.LoaderMonitor`` is the same for a plain loop.

    Attributes
    ----------
    epochs : list of EpochTimes
    verdict : Verdict
    """

    def __init__(self) -> None:
        self._recorder = Recorder()
        self._undo: list[Callable[[], None]] = []
        self._failed: set[int] = set()

    @property
    def epochs(self) -> list[EpochTimes]:
        """Epochs that have ended."""
        return self._recorder.epochs

    @property
    def verdict(self) -> Verdict:
        """What the training waits for."""
        return self._recorder.verdict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach to the training loader before its workers start, wherever it comes from."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            loader = process(loader)
            # That for training comes first, but for the check of the validation.
            if not (trainer.sanity_checking or self._recorder.is_attached):
                if (
                    isinstance(loader, DataLoader)
                    and loader.worker_init_fn is None
                    and int(os.environ.get("PL_SEED_WORKERS", "0"))
                ):
                    # As Lightning does next if there is none: seed_everything(workers=True).
                    loader.worker_init_fn = functools.partial(
                        pl_worker_init_function, rank=trainer.global_rank
                    )
                self._attach(loader)
            return loader

        setattr(strategy, "process_dataloader", process_dataloader)  # noqa: B010
        self._undo.append(lambda: delattr(strategy, "process_dataloader"))

    def _attach(self, loader: Any) -> None:
        try:
            self._recorder.attach(loader)
        except Exception:
            # It measures; the training must not end because of that.
            logger.warning("CacheMonitor cannot measure this loader", exc_info=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waiting for the first batch begins."""
        self._recorder.begin()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Waiting ends."""
        self._recorder.got_batch(batch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Work ends."""
        self._recorder.ends_step()
        if (batch_idx + 1) % max(1, getattr(trainer, "log_every_n_steps", 50)) == 0:
            self._log(trainer, self._recorder.so_far(), "")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation between two batches is not waiting."""
        self._recorder.interrupt()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor is the writing of a checkpoint."""
        self._recorder.interrupt()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._log(trainer, self._recorder.end(), "_epoch")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach, and say what the training waited for."""
        if stage != "fit":
            return
        self._recorder.detach()
        while self._undo:
            self._undo.pop()()
        if self.epochs:
            rank_zero_info(self.verdict.text)

    def _log(self, trainer: Trainer, times: EpochTimes | None, ending: str) -> None:
        if times is None:
            return
        values = {
            "waiting_ratio": times.waiting_ratio,
            "hit_ratio": times.stats.hit_ratio,
            "requests": float(times.stats.requests),
            "fetched_bytes": float(times.stats.fetched_bytes),
        }
        metrics = {f"zarrcache/{name}{ending}": value for name, value in values.items()}
        for one in trainer.loggers:
            try:
                one.log_metrics(metrics, step=trainer.global_step)
            except Exception:
                if id(one) not in self._failed:
                    self._failed.add(id(one))
                    logger.warning(
                        "CacheMonitor cannot log to %s", type(one).__name__, exc_info=True
                    )
