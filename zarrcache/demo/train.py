"""One epoch of a small 3-D network, in a process of its own: ``python -m zarrcache.demo.train
CONFIG OUT [--plain]``.

Also an example of a training script: the lines between the two rulers are all that zarrcache asks
for.
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


def epoch(config: dict[str, Any], state: Path, *, plain: bool) -> dict[str, Any]:
    """Train for one epoch; the network continues where the last one ended.

    Returns
    -------
    dict
        ``seconds``, ``samples``, ``loss``, ``hit_ratio`` (None for a plain read), and ``digests``:
        BLAKE2b of each sample's tensors.
    """
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(2, 1, 3, padding=1)
    )
    if state.exists():
        network.load_state_dict(torch.load(state, weights_only=True))

    # ------------------------------------------------------------------------------------------------------------------------------
    dataset: Dataset[Any]
    if plain:
        dataset = PlainZarr(config)
    else:
        (data, label, gs_data, gs_label), _ = get_dataset(config)
        dataset = RhoData(
            data,
            label,
            gs_data,
            gs_label,
            downsample_data=1,
            downsample_label=1,
            data_augmentation=False,
        )
    loader = DataLoader(dataset, batch_size=1, num_workers=WORKERS, shuffle=False)
    # ------------------------------------------------------------------------------------------------------------------------------
    digests, total = [], 0.0
    start_s = time.perf_counter()
    for crude, converged in loader:
        digests.append(
            hashlib.blake2b(
                crude.numpy().tobytes() + converged.numpy().tobytes(), digest_size=16
            ).hexdigest()
        )
        mean = crude.mean()
        guess = crude / mean + network(crude / mean)
        loss = torch.nn.functional.l1_loss(guess, converged / mean)
        loss.backward()  # type: ignore[no-untyped-call]
        # gradient descent by hand: torch.optim imports torch's compiler, which takes longer than
        # this epoch
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(LEARNING_RATE * parameter.grad)
                parameter.grad = None
        total += loss.item()
    seconds = time.perf_counter() - start_s

    torch.save(network.state_dict(), state)
    hit_ratio = None if plain else data.reader.stats.hit_ratio
    return {
        "seconds": seconds,
        "samples": len(digests),
        "loss": total / len(digests),
        "hit_ratio": hit_ratio,
        "digests": digests,
    }


class PlainZarr(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same samples in the same order through zarr and s3fs alone: nothing of zarrcache between
    S3 and the tensor.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._task_ids: Sequence[str] = ZarrS3Reader(
            config["data_dir"], config["label_dir"], config["map_dir"], config["functional"], True, config["train_fraction"],
            config["random_state"], s3_kwargs=config["s3_kwargs"],
        ).split_task_ids()[0]  # fmt: skip

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
    """Read the config, train, write the result as JSON."""
    config, out = Path(sys.argv[1]), Path(sys.argv[2])
    result = epoch(
        yaml.safe_load(config.read_text()), out.with_name("network.pt"), plain="--plain" in sys.argv
    )
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
