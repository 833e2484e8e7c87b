"""``CacheMonitor``: a callback that logs how long a training waits for data, and for what."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from zarrcache.train import EpochTimes, Recorder, Verdict

__all__ = ["CacheMonitor"]

logger = logging.getLogger(__name__)


class CacheMonitor(Callback):
    """Logs how long the training waits for data, and prints the cause at its end.

    >>> Trainer(callbacks=[CacheMonitor()], logger=CSVLogger("logs")).fit(model, data)
    The training waited 12 % of the time, for S3 (cold misses). Do this: ...

    Every ``log_every_n_steps`` of the Trainer, and at the end of each epoch (with ``_epoch``
    appended), it logs ``zarrcache/waiting_ratio``, ``hit_ratio``, ``requests`` and
    ``fetched_bytes`` of the epoch so far to every logger. If a logger fails, one warning names it,
    and it is not used again. ``zarrcache.train.LoaderMonitor`` is the same for a plain loop.

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
                self._recorder.attach(loader)
            return loader

        setattr(strategy, "process_dataloader", process_dataloader)  # noqa: B010
        self._undo.append(lambda: delattr(strategy, "process_dataloader"))

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
