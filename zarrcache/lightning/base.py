"""The base class of both data modules: no secrets in hyperparameters, equal splits on all ranks."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import types
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.parsing import collect_init_args

from zarrcache.config import plain
from zarrcache.data import Split, ZarrS3Reader
from zarrcache.errors import ConfigError
from zarrcache.origin import secret_names
from zarrcache.train import Side, Sources

__all__ = ["SIDES", "DataModule", "start_method", "transforms_of"]

SIDES: tuple[Side, ...] = ("train", "validation", "test")


class DataModule(LightningDataModule):
    """A data module whose hyperparameters, which go to loggers and checkpoints, have no secrets.

    Attributes
    ----------
    sources : Sources
    """

    sources: Sources

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
            Too few samples, a list or split file that does not fit, or ranks with different
            samples.
        """
        counts = {name: len(split.train) for name, split in self.splits.items()}
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return
        # Nodes whose stored listings differ in age would compute different orders. All ranks
        # exchange the outcome, so that none is left waiting in a collective operation.
        mine = hashlib.blake2b(repr(self.splits).encode(), digest_size=8).hexdigest(), counts
        first = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(first == mine, all=True):
            raise ConfigError(
                f"The ranks have different samples: training samples are {first[1]} on rank 0 and "
                f"{mine[1]} on rank {trainer.global_rank}. Give all nodes the same config, map and "
                "split file, and list the origin again: zarrcache warm CONFIG."
            )


def _holds_secret(value: Any) -> bool:
    value = plain(value)
    if isinstance(value, Mapping):
        return bool(secret_names(value)) or any(map(_holds_secret, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_secret, value))


def transforms_of(transform: Any) -> dict[str, Any]:
    """The transform of each side of the split."""
    if not isinstance(transform, Mapping):
        return {} if transform is None else dict.fromkeys(SIDES, transform)
    if unknown := sorted(map(str, transform.keys() - {*SIDES})):
        raise ConfigError(
            f"transform names {', '.join(unknown)}; known are {', '.join(SIDES)}. Give a "
            "transform for each of these that has one."
        )
    return dict(transform)


def start_method(train_workers: int, val_workers: int) -> str | None:
    """Start method of workers if the user sets none; None is Python's default."""
    if bool(train_workers) != bool(val_workers) and multiprocessing.get_start_method() == "fork":
        # Not forkserver: its workers do not notice when the training is killed, and keep on
        # running.
        return "spawn"
    return None
