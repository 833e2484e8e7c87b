"""``ZarrDataModule``: loaders of a config, resumable within an epoch, with look-ahead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from zarrcache._units import whole_number
from zarrcache.errors import ConfigError
from zarrcache.lightning.base import DataModule, start_method, transforms_of
from zarrcache.lightning.loader import Sampler, TrainLoader, world_of
from zarrcache.train import (
    Assignment,
    CombinedDataset,
    Config,
    Lookahead,
    NodeSampler,
    Sample,
    Selection,
    Side,
    Sources,
    Transforms,
    ZarrDataset,
    collate,
    collate_in_lists,
)

__all__ = ["ZarrDataModule"]


class ZarrDataModule(DataModule):
    """The densities of one training config, or of several combined.

    A batch is ``{"data", "label", "index"}`` as in ``ZarrDataset``, with lists if the grids differ
    in shape. For several datasets it also has ``"dataset"``, the number of each sample's dataset.

    Parameters
    ----------
    config : path, mapping, list or mapping of these
        The training config (``data_dir``, ``map_dir``, ``cache``, ...), as a YAML file or its keys,
        or a file with these keys in a block ``data:``. Parameters that are not passed come from the
        config, if it has keys of their names.
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
        If the config's ``precision`` is a value for Lightning's Trainer, it is ignored.
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
        Seed of the choice of the validation ids and of the order of the training samples. With
        several configs, each config's own seed chooses its validation ids, and the seed of the
        first one gives the order.
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
        How workers are started. Default: Python's default. If that is ``fork``, and exactly one of
        ``train_workers`` and ``val_workers`` is 0, the default is ``spawn``, because a process that
        reads from S3 itself should not fork workers that do.

    Raises
    ------
    ConfigError
        A config, the split file or an argument cannot be used, the ranks have different samples, or
        the sampler was replaced.

    Notes
    -----
    *Order.* `NodeSampler` computes it for all ranks. Lightning keeps this sampler, with
    ``use_distributed_sampler`` or without; if other code replaces it, the epoch does not start.

    *Look-ahead.* With a ``cache`` block, each rank has a
    :class:`~zarrcache.train.lookahead.Lookahead`: a process that fetches the next samples of the
    rank, at most ``cache.lookahead`` bytes ahead. 0 turns it off. With several datasets there is
    none.

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
        self._transforms = transforms_of(transform)
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
        self._defers = self._tensors["augment_on"] == "device"
        self._deferring: ZarrDataset | CombinedDataset | None = None
        self._loader: TrainLoader | None = None
        self._ahead: Lookahead | None = None
        self._loaded: dict[str, Any] = {}

    # -- datasets

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """Names of the datasets, in the order of the numbers in ``batch["dataset"]``."""
        return self.sources.names

    def _dataset(self, side: Side) -> ZarrDataset | CombinedDataset:
        dataset = self.sources.dataset(
            side,
            augmentation=self.augmentation and side == "train",
            transform=self._transforms.get(side),
            **self._tensors,
        )
        if self._defers:
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
        loader = TrainLoader(
            dataset, sampler=sampler, drop_last=self.drop_last, **self._options(self.train_workers)
        )
        self._loader = loader
        if self.trainer is not None:
            self._join(loader, sampler)
        self._stop_looking_ahead()
        # A combined dataset has one order over several caches.
        if isinstance(dataset, ZarrDataset):
            # Before the loader starts its workers.
            self._ahead = loader.ahead = Lookahead(dataset, sampler)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the look-ahead process."""
        self._stop_looking_ahead()

    def _stop_looking_ahead(self) -> None:
        # Not `teardown`, which a subclass may override with work of its own.
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _join(self, loader: TrainLoader, sampler: NodeSampler) -> None:
        """Set the epoch that Lightning is about to train, and the batch at which it continues.

        Lightning draws the first samples before it calls ``set_epoch``; a resumed run would start
        in the order of epoch 0.
        """
        assert self.trainer is not None
        # Lightning's counters: ready, started, processed, completed
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
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
    ) -> Sampler:
        return Sampler(
            dataset,
            assignment=self.assignment,
            seed=self.random_seed,
            shuffle=shuffle,
            drop_last=drop_last,
            world=world_of(self.trainer),
        )

    def _options(self, workers: int) -> dict[str, Any]:
        context = self.multiprocessing_context or start_method(self.train_workers, self.val_workers)
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "pin_memory": self.pin_memory and torch.cuda.is_available(),
            "persistent_workers": self.persistent_workers and workers > 0,
            "multiprocessing_context": context if workers else None,
            "collate_fn": collate_in_lists if self._defers else collate,
        }

    # -- position in the epoch

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, identical on all ranks; Lightning puts it into checkpoints."""
        loader, trainer = self._loader, self.trainer
        if loader is None or trainer is None or getattr(trainer, "overfit_batches", False):
            return dict(self._loaded)
        sampler = loader.planned
        # Batches trained on, not batches drawn: an exception may have ended a step in between.
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        trained = batches.processed
        if loader.begun != sampler.epoch:
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
