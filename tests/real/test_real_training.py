"""The whole task on real input: VASP densities converted, put on S3, and trained on from the cache,
compared with pymatgen's arrays.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tests.support.faultproxy import FaultProxy
from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from zarrcache import RhoData, ZarrDataset, ZarrS3Reader, collate, convert_directory, get_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

ROLES = ("data", "label")
FOLDERS = {"data": "input", "label": "label"}


def by_pymatgen(path: Path, *, normalize: bool) -> NDArray[np.float32]:
    """The total density of a file, as the users' converter and reader return it."""
    outputs = pytest.importorskip(
        "pymatgen.io.vasp.outputs",
        reason="pymatgen is part of the extra: pip install -e '.[convert]'",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = np.asarray(outputs.Chgcar.from_file(str(path)).data["total"], dtype=np.float32)
    if normalize:
        values /= np.prod(values.shape)
    return values


@pytest.fixture(scope="module")
def files(real_data: Path) -> dict[tuple[str, str], Path]:
    """The pairs of ``mp/half``, by role and task id."""
    found = {
        (role, path.name.split(".")[0]): path
        for role, folder in FOLDERS.items()
        for path in (real_data / "mp" / "half" / folder).iterdir()
    }
    assert len(found) >= 4
    return found


@pytest.fixture(scope="module")
def trained_on(
    files: dict[tuple[str, str], Path],
    s3_server: S3Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """Both folders converted directly to S3, and a config with the users' keys."""
    root, bucket = tmp_path_factory.mktemp("real"), s3_server.new_bucket()
    ids = sorted({task_id for _, task_id in files})
    for role in ROLES:
        source = files[role, ids[0]].parent
        report = convert_directory(
            source,
            f"s3://{bucket}/{role}",
            pattern="*.CHGCAR*",
            s3_kwargs=s3_server.s3_kwargs,
            workers=1,
        )
        assert [result.error for result in report.failed] == []
        assert len(report.converted) == len(ids)
    (root / "map.json").write_text(json.dumps({"GGA": ids, "SCAN": []}))
    return SimpleNamespace(
        dataset_name="zarr_s3_data",
        data_dir=f"s3://{bucket}/data",
        label_dir=f"s3://{bucket}/label",
        map_dir=str(root / "map.json"),
        functional="GGA",
        normalize_data=True,
        train_fraction=0.6,
        random_state=42,
        epochs=2,
        s3_kwargs=s3_server.s3_kwargs,
    )


def test_real_pairs_train_for_two_epochs_the_second_without_a_server(
    trained_on: SimpleNamespace,
    files: dict[tuple[str, str], Path],
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    """Training and test set deliver pymatgen's numbers in both epochs."""
    kwargs = s3_server.kwargs_at(fault_proxy.endpoint_url)
    cfg = SimpleNamespace(
        **{
            **vars(trained_on),
            "s3_kwargs": kwargs,
            "cache": {"dir": str(tmp_path / "cache"), "min_free": 0},
        }
    )
    for epoch in range(cfg.epochs):
        if epoch == 1:
            fault_proxy.down()
        asked = fault_proxy.count()
        sides = get_dataset(cfg)
        reader: ZarrS3Reader = sides[0][0].reader
        seen = []
        for ids, sets in zip(reader.split_task_ids(), sides, strict=True):
            dataset = RhoData(*sets, downsample_data=1, downsample_label=1, data_augmentation=False)
            for task_id, pair in zip(
                ids, DataLoader(dataset, batch_size=None, num_workers=2), strict=True
            ):
                for role, tensor in zip(ROLES, pair, strict=True):
                    np.testing.assert_array_equal(
                        tensor.numpy()[0], by_pymatgen(files[role, task_id], normalize=True)
                    )
                seen.append(task_id)
        assert sorted(seen) == sorted({task_id for _, task_id in files})
        assert (reader.stats.misses, reader.stats.hits) == (
            (2 * len(seen), 0) if epoch == 0 else (0, 2 * len(seen))
        )
        assert (fault_proxy.count() - asked > 0) == (epoch == 0)


def test_real_densities_hold_whole_numbers_of_electrons(
    trained_on: SimpleNamespace, tmp_path: Path
) -> None:
    """With ``normalize`` a converged density sums up to its valence electrons, which checks labels
    and scale.
    """
    train, test = get_dataset(SimpleNamespace(**vars(trained_on)))
    for label in (*train[1], *test[1]):
        electrons = float(label.sum(dtype=np.float64))
        assert electrons == pytest.approx(round(electrons), abs=1e-3)
        assert electrons > 1


def test_small_network_learns_from_real_batches(
    trained_on: SimpleNamespace, tmp_path: Path
) -> None:
    """Augmented, downsampled, mixed grids, through workers: finite, falling losses."""
    cfg = trained_on
    reader = make_reader(
        tmp_path,
        data_dir=cfg.data_dir,
        label_dir=cfg.label_dir,
        map_dir=cfg.map_dir,
        train_fraction=0.6,
        s3_kwargs=cfg.s3_kwargs,
        cache={},
    )
    dataset = ZarrDataset(
        reader, "train", augmentation=True, downsample_data=2, downsample_label=4, seed=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv3d(1, 1, 3, padding="same", padding_mode="circular")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            total = 0.0
            for batch in DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collate):
                for data, label in zip(batch["data"], batch["label"], strict=True):
                    predicted = torch.nn.functional.interpolate(
                        model(data[None]), size=label.shape[-3:]
                    )
                    loss = torch.nn.functional.l1_loss(predicted[0], label) / label.abs().mean()
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += float(loss.detach())
            losses.append(total)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
