"""The training of a rank of ``tests.support.ranks``: a toy network under Lightning, whose import
takes seconds.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.support.ranks import Job, Step
from zarrcache.lightning import ZarrDataModule

__all__ = ["train"]


class Toy(pl.LightningModule):
    """A convolution that learns, and records its samples."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.network = torch.nn.Conv3d(1, 1, 3, padding=1)

    def on_train_start(self) -> None:
        (self.job.root / f"{self.job.name}.start").write_text(str(self.global_step))

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        pairs = list(zip(batch["data"], batch["label"], strict=True))
        loss = torch.stack(
            [
                torch.nn.functional.l1_loss(self.network(data[None]), label[None])
                for data, label in pairs
            ]
        ).mean()
        if self.global_step == self.job.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        datasets = [int(number) for number in batch["dataset"]] if "dataset" in batch else None
        step = Step(
            self.global_rank,
            self.current_epoch,
            self.global_step,
            list(batch["index"]),
            float(loss.detach()).hex(),
            datasets,
        )
        with (self.job.root / f"{self.job.name}.steps.{self.global_rank}").open("a") as file:
            file.write(json.dumps(vars(step)) + "\n")
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        with (self.job.root / f"{self.job.name}.validation.{self.global_rank}").open("a") as file:
            file.writelines(f"{name}\n" for name in batch["index"])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(job: Job) -> None:
    """One rank: train, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    pl.seed_everything(7)
    ranks = sum(job.nodes)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": job.nodes[0],
        "num_nodes": len(job.nodes),
        "strategy": "ddp" if ranks > 1 else "auto",
        "max_epochs": job.epochs,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": job.root,
        "enable_checkpointing": job.checkpoint is not None,
        "callbacks": []
        if job.checkpoint is None
        else [ModelCheckpoint(job.root, save_last=True, **job.checkpoint)],
    }
    trainer = pl.Trainer(**settings | dict(job.trainer))
    trainer.fit(
        Toy(job), ZarrDataModule(**job.data), ckpt_path=None if job.checkpoint is None else "last"
    )
