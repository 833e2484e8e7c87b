"""One epoch of a small 3-D network: ``python -m zarrcache.demo.train CONFIG OUT [--plain]``.

Also an example of a training script: ``main`` uses ``get_dataset`` and ``RhoData``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from zarrcache import RhoData, ZarrS3Reader, get_dataset

WORKERS = 2
LEARNING_RATE = 0.01


def epoch(dataset: Dataset[Any]) -> dict[str, Any]:
    """Train for one epoch, from the same initial weights each time.

    Returns
    -------
    dict
        ``seconds``; ``waited_s``, the part of them between asking for a batch and having it;
        ``samples``, mean ``loss``, and ``digests``: BLAKE2b of each sample's tensors.
    """
    # More threads than idle cores wait for each other: the time would be that of other programs.
    torch.set_num_threads(1)
    # The first step of a process loads and compiles what later ones use. That is not the epoch's.
    torch.nn.Conv3d(1, 2, 3, padding=1)(torch.zeros(1, 1, 8, 8, 8)).sum().backward()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(2, 1, 3, padding=1)
    )
    digests, losses = [], []
    waited_s = 0.0
    start_s = asked_s = time.perf_counter()
    for crude, converged in DataLoader(dataset, batch_size=1, num_workers=WORKERS):
        waited_s += time.perf_counter() - asked_s
        raw = crude.numpy().tobytes() + converged.numpy().tobytes()
        digests.append(hashlib.blake2b(raw, digest_size=16).hexdigest())
        mean = crude.mean()
        guess = crude / mean + network(crude / mean)
        loss = torch.nn.functional.l1_loss(guess, converged / mean)
        loss.backward()  # type: ignore[no-untyped-call]
        # Gradient descent by hand: importing torch.optim takes longer than this epoch.
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(LEARNING_RATE * parameter.grad)
                parameter.grad = None
        losses.append(loss.item())
        asked_s = time.perf_counter()
    return {
        "seconds": time.perf_counter() - start_s,
        "waited_s": waited_s,
        "samples": len(digests),
        "loss": sum(losses) / len(losses),
        "digests": digests,
    }


class PlainZarr(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same samples in the same order, read with zarr and s3fs alone."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        reader = ZarrS3Reader(
            config["data_dir"],
            config["label_dir"],
            config["map_dir"],
            config["functional"],
            True,
            config["train_fraction"],
            config["random_state"],
            s3_kwargs=config["s3_kwargs"],
        )
        self._task_ids: Sequence[str] = reader.split_task_ids()[0]

    def __len__(self) -> int:
        return len(self._task_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tensor("data_dir", index), self._tensor("label_dir", index)

    def _tensor(self, directory: str, index: int) -> torch.Tensor:
        import zarr

        url = f"{self._config[directory]}/{self._task_ids[index]}.zarr"
        group = zarr.open_group(url, mode="r", storage_options=self._config["s3_kwargs"])
        array = np.array(group["charge_density_total"], dtype=np.float32)
        array /= np.prod(array.shape)
        return torch.from_numpy(array)[None]


def main() -> None:
    """Read the config, train for one epoch, write the result as JSON.

    ``hit_ratio`` in the result is that of the cache, None with ``--plain``.
    """
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    if "--plain" in sys.argv:
        result = epoch(PlainZarr(config)) | {"hit_ratio": None}
    else:
        (data, label, gs_data, gs_label), _ = get_dataset(config)
        dataset = RhoData(data, label, gs_data, gs_label, data_augmentation=False)
        result = epoch(dataset) | {"hit_ratio": data.reader.stats.hit_ratio}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
