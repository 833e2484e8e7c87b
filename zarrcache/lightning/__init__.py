"""Data modules for Lightning's ``Trainer``, on one or many nodes.

``ZarrDataModule`` resumes within an epoch and looks ahead; ``RhoDataModule`` takes electrai's
arguments and gives its batches.

>>> data = ZarrDataModule("configs/s3_cached.yaml", batch_size=1, train_workers=8, val_workers=2)
>>> Trainer(devices=8, num_nodes=4, strategy="ddp").fit(model, data, ckpt_path="last")

Requires the extra ``lightning``. docs/guides/training.md has whole training scripts.
"""

from __future__ import annotations

try:
    # Before the modules that use them, for a message that says what to install.
    import torch  # noqa: F401
    from lightning.pytorch import LightningDataModule  # noqa: F401
except ImportError as exc:
    raise ImportError(
        f"zarrcache.lightning needs PyTorch and Lightning ({exc}). Install them: pip install "
        "'zarrcache[lightning]'"
    ) from exc

from zarrcache.lightning.monitor import CacheMonitor
from zarrcache.lightning.rho_module import RhoDataModule
from zarrcache.lightning.zarr_module import ZarrDataModule

__all__ = ["CacheMonitor", "RhoDataModule", "ZarrDataModule"]
