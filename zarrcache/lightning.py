"""``ZarrDataModule``: train, validation and test loaders for Lightning's ``Trainer``, on one GPU or
on many nodes, resumed where they ended.

>>> data = ZarrDataModule("configs/s3_cached.yaml", batch_size=1, train_workers=8, val_workers=2)
>>> Trainer(devices=8, num_nodes=4, strategy="ddp").fit(model, data, ckpt_path="last")

Needs the extra ``lightning``. docs/guides/training.md has whole training scripts.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

try:
    import torch
    from lightning.pytorch import LightningDataModule
    from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
except ImportError as exc:
    raise ImportError(
        f"zarrcache.lightning needs PyTorch and Lightning ({exc}). Install them: pip install "
        "'zarrcache[lightning]'"
    ) from exc

from zarrcache._units import whole_number
from zarrcache.data import Split, ZarrS3Reader
from zarrcache.errors import ConfigError
from zarrcache.parallel import World
from zarrcache.train import (
    Assignment,
    Config,
    Lookahead,
    NodeSampler,
    Sample,
    Side,
    SideBySide,
    Sources,
    ZarrDataset,
    collate_fn,
)

__all__ = ["ZarrDataModule"]


class ZarrDataModule(LightningDataModule):
    """Densities of one training config, or of several side by side.

    A batch is ``{"data", "label", "index"}`` as ``ZarrDataset`` gives it, lists where grids differ
    in shape; of several datasets also ``"dataset"``, the number of the one that the sample is of.

    Parameters
    ----------
    config : path, mapping, list or mapping of these
        The training config (``data_dir``, ``map_dir``, ``cache``, ...), as a YAML file or its keys.
        ``[a.yaml, b.yaml]`` and ``{"pbe": a.yaml, "scan": b.yaml}`` are several datasets, numbered
        from 0; ``dataset_names`` has their names.
    batch_size : int
        Of each rank.
    train_workers, val_workers : int
        DataLoader workers of each rank; those of the test loader are ``val_workers``. 0: in the
        training process.
    pin_memory : bool
        Where there is a GPU.
    precision : {"f32", "f16", "bf16"}
    augmentation : bool
        Random rotations, of the training samples only.
    split_file : path or mapping, optional
        JSON of indices into the reader's ``task_ids``: ``{"train": [...], "validation": [...],
        "test": [...]}``. Of several datasets a file for each name. Default: training and test ids
        are those of ``train_fraction`` and ``random_state`` of the config.
    val_frac : float
        Without ``split_file``: share of the training ids that is kept for validation, one at the
        least. 0: no validation.
    random_seed : int
        Of the choice of the validation ids, and of the order of the training samples.
    assignment : {"global", "node"}
        Which rank reads what: `NodeSampler`.
    shuffle : bool
        The training samples.
    drop_last : bool
        Leave out of an epoch what does not make a whole batch on every rank, instead of reading up
        to one sample a rank twice.
    downsample_data, downsample_label : int
    persistent_workers : bool
        Keep the workers from one epoch to the next.
    multiprocessing_context : str, optional
        How workers are started: ``fork``, ``forkserver`` or ``spawn``. Default: Python's own;
        ``spawn`` where that is ``fork`` and one of ``train_workers`` and ``val_workers`` is 0: a
        process that reads from S3 itself should not fork others that do.

    Raises
    ------
    ConfigError
        A config, the split file or an argument cannot be used; ranks that do not agree on the
        samples; or the sampler was replaced.

    Notes
    -----
    *Order.* `NodeSampler` plans it for all ranks. Lightning leaves it alone,
    ``use_distributed_sampler`` or not; if anything else replaces it, the epoch does not start.

    *Look-ahead.* With a ``cache`` block each rank has a
    :class:`~zarrcache.train.lookahead.Lookahead`: a process that fetches what the rank reads next,
    ``cache.lookahead`` bytes ahead at the most; 0 switches it off. Not for several datasets.

    *Resume.* A checkpoint holds how many batches of the epoch were trained on. Resumed from it,
    with as many ranks, nodes and workers as you like and another batch size, the epoch goes on with
    the samples that are left, each once.
    """

    def __init__(
        self,
        config: Config | Sequence[Config] | Mapping[str, Config],
        batch_size: int = 1,
        train_workers: int = 8,
        val_workers: int = 2,
        pin_memory: bool = True,
        precision: Literal["f32", "f16", "bf16"] = "f32",
        augmentation: bool = True,
        split_file: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
        val_frac: float = 0.005,
        random_seed: int = 42,
        *,
        assignment: Assignment = "global",
        shuffle: bool = True,
        drop_last: bool = False,
        downsample_data: int = 1,
        downsample_label: int = 1,
        persistent_workers: bool = True,
        multiprocessing_context: str | None = None,
    ) -> None:
        super().__init__()
        self.sources = Sources(
            config, split_file=split_file, val_frac=val_frac, random_seed=random_seed
        )
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.train_workers = whole_number("train_workers", train_workers, least=0)
        self.val_workers = whole_number("val_workers", val_workers, least=0)
        self.pin_memory = pin_memory
        self.augmentation = augmentation
        self.random_seed = random_seed
        self.assignment: Assignment = assignment
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.persistent_workers = persistent_workers
        self.multiprocessing_context = multiprocessing_context
        self._tensors: dict[str, Any] = {
            "precision": precision,
            "downsample_data": downsample_data,
            "downsample_label": downsample_label,
        }
        self._loader: _TrainLoader | None = None
        self._ahead: Lookahead | None = None
        self._begun: int | None = None
        self._loaded: dict[str, Any] = {}

    # -- what there is
    # -----------------------------------------------------------------------------------------------------------

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """Names of the datasets; the number in ``"dataset"`` counts them."""
        return self.sources.names

    @property
    def readers(self) -> Mapping[str, ZarrS3Reader]:
        """``readers[name].stats`` tells how an epoch went, in this rank and its workers."""
        return self.sources.readers

    @property
    def splits(self) -> Mapping[str, Split]:
        """Task ids of the training, validation and test samples of each dataset. Lists the origin
        if that has not been done.
        """
        return self.sources.splits

    def prepare_data(self) -> None:
        """On one process of each node: list the origin, so that the others find the listing in the
        cache.
        """
        self.sources.list_into_cache()

    def setup(self, stage: str | None = None) -> None:
        """Make the splits, and see that they are the same on all ranks.

        Raises
        ------
        ConfigError
            Too few samples, a split file that does not fit, or ranks that see different samples.
        """
        counts = {name: len(split.train) for name, split in self.splits.items()}
        if self.trainer is None or self.trainer.world_size == 1:
            return
        # Where a node's stored listing is older than another's, no order is one for both. All ranks
        # find out, so none waits for the others.
        mine = hashlib.blake2b(repr(self.splits).encode(), digest_size=8).hexdigest(), counts
        first = self.trainer.strategy.broadcast(mine)
        if not self.trainer.strategy.reduce_boolean_decision(first == mine, all=True):
            raise ConfigError(
                f"the ranks do not have the same samples: training samples are {first[1]} on rank "
                f"0 and {mine[1]} on rank "
                f"{self.trainer.global_rank}. Give all nodes the same config, map and split file, "
                "and list the origin again: zarrcache warm CONFIG."
            )

    def _dataset(self, side: Side) -> ZarrDataset | SideBySide:
        return self.sources.dataset(
            side, augmentation=self.augmentation and side == "train", **self._tensors
        )

    # -- loaders
    # -----------------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loader of this rank. Called after a checkpoint was loaded."""
        dataset = self._dataset("train")
        if not len(dataset):  # Lightning would end the training at once, and well
            raise ConfigError(
                "there is no sample to train on: the split file has none for train. Give it some, "
                "or call trainer.test() only."
            )
        sampler = self._sampler(dataset, shuffle=self.shuffle, drop_last=self.drop_last)
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

    def _look_ahead(self, dataset: ZarrDataset | SideBySide, sampler: NodeSampler) -> None:
        """Fetch what this rank reads next, as ``cache.lookahead`` and ``cache.eviction`` say.
        Before the loader starts its workers.
        """
        self._stop_looking_ahead()
        # of several datasets side by side each has a cache of its own, and no order of its own
        if isinstance(dataset, ZarrDataset):
            self._ahead = Lookahead(dataset, sampler)

    def _stop_looking_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def teardown(self, stage: str | None = None) -> None:
        """End the process that looks ahead."""
        self._stop_looking_ahead()

    def _join(self, loader: _TrainLoader, sampler: NodeSampler) -> None:
        """Take the epoch that Lightning is about to train, and have it count the batches of that
        from where the epoch stands.

        It asks for the first samples before it tells a sampler the epoch: a resumed run would begin
        with the order of epoch 0.
        """
        assert self.trainer is not None
        epochs, batches = (
            _counts(progress)
            for progress in (
                self.trainer.fit_loop.epoch_progress,
                self.trainer.fit_loop.epoch_loop.batch_progress,
            )
        )
        # Saved after the last batch, before the end of the epoch: Lightning goes on with the next
        # one.
        is_over = (
            epochs.ready > epochs.processed
            and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        )
        sampler.set_epoch(epochs.processed + is_over)
        if is_over or sampler.history:
            # With as many ranks as before and the same batch size that is where its own count
            # stands.
            shift = (len(loader) if is_over else loader.batches_before) - batches.processed
            for name in ("ready", "started", "processed", "completed"):
                setattr(batches, name, getattr(batches, name) + shift)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Loader of this rank; an empty list where nothing is kept for validation."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Loader of this rank; an empty list where nothing is kept for testing."""
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
        self, dataset: ZarrDataset | SideBySide, *, shuffle: bool, drop_last: bool
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
        context = self.multiprocessing_context
        if (
            context is None
            and bool(self.train_workers) != bool(self.val_workers)
            and multiprocessing.get_start_method() == "fork"
        ):
            # Not forkserver: its children do not notice that the training was killed, and stay.
            context = "spawn"
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "pin_memory": self.pin_memory and torch.cuda.is_available(),
            "persistent_workers": self.persistent_workers and workers > 0,
            "multiprocessing_context": context if workers else None,
            "collate_fn": collate_fn,
        }

    # -- where an epoch stands
    # ---------------------------------------------------------------------------------------------------

    def _epoch_begins(self, epoch: int) -> None:
        """The training loader is about to ask for the first samples of an epoch."""
        self._begun = epoch
        if self._ahead is not None:
            self._ahead.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """How far the training is; the same on every rank. Lightning puts it into each checkpoint."""
        loader, trainer = self._loader, self.trainer
        if loader is None or trainer is None or getattr(trainer, "overfit_batches", False):
            return dict(self._loaded)
        sampler = loader.planned
        # Trained on, not handed out: an exception may have stopped the step between the two.
        trained = _counts(trainer.fit_loop.epoch_loop.batch_progress).processed
        if self._begun != sampler.epoch:
            taken = 0
        elif trained >= len(loader):
            taken = len(sampler)
        else:
            taken = (trained - loader.batches_before) * self.batch_size
        return sampler.state_dict(taken=taken)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; takes effect when the training loader is made."""
        # a checkpoint is loaded to be tested, too
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._loaded = dict(state_dict)


class _Sampler(NodeSampler, DistributedSampler[int]):
    """A `NodeSampler` that Lightning leaves where it is: what is no ``DistributedSampler`` it would
    deal out to the ranks a second time.
    """

    def __init__(self, source: ZarrDataset | SideBySide, **settings: Any) -> None:
        super().__init__(source, **settings)
        # The names by which others ask a DistributedSampler.
        self.num_replicas, self.rank = self.world.ranks, self.world.rank


class _TrainLoader(DataLoader[Sample]):
    """torch's loader as Lightning takes a resumable one: its length is that of the whole epoch, and
    it gives what is left of it.
    """

    on_begin: Callable[[int], None]

    @property
    def planned(self) -> NodeSampler:
        """The sampler.

        Raises
        ------
        ConfigError
            It is another one.
        """
        if not isinstance(self.sampler, NodeSampler):
            raise ConfigError(
                "the sampler of the training loader was replaced by a "
                f"{type(self.sampler).__name__}, so the samples would not come in the order "
                "that was planned for all ranks. Set Trainer(use_distributed_sampler=False), and "
                "remove what else changes the data module's loaders."
            )
        return self.sampler

    @property
    def batches_before(self) -> int:
        """Batches of this epoch that were trained on before the run was resumed."""
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
        # Trainer(overfit_batches=...), which says so itself
        if not isinstance(self.sampler, SequentialSampler):
            epoch = self.planned.epoch
            self.on_begin(epoch)
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module's has it all. That there are these two tells Lightning that the
        epoch is resumed where it ended.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


def _world_of(trainer: Any) -> World | None:
    """Ranks and nodes as Lightning has them.

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
            f"rank {rank} of {ranks} is on node {trainer.node_rank} of {trainer.num_nodes}, and "
            f"would be on node {world.node} if ranks were numbered "
            "node by node. Start the job with srun --distribution=block, and set "
            "Trainer(num_nodes=..., devices=...) to what it has."
        )
    return world


def _counts(progress: Any) -> Any:
    """Lightning's counters of an epoch or its batches: ready, started, processed, completed."""
    return progress.current
