"""``RhoDataModule``: electrai's arguments, splits, order and batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from zarrcache._keys import DensityType, Missing
from zarrcache._units import whole_number
from zarrcache.errors import ConfigError
from zarrcache.lightning.base import DataModule, start_method, transforms_of
from zarrcache.train import (
    CombinedDataset,
    Sample,
    Side,
    Sources,
    Transforms,
    ZarrDataset,
    collate,
)

__all__ = ["RhoDataModule"]

logger = logging.getLogger(__name__)


class RhoDataModule(DataModule):
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
        Seed of the permutation only.
    downsample_data, downsample_label : int
        Ignored, as electrai ignores them for ``mp`` lists.
    datasets : list of mapping, optional
        Several lists instead of ``root``: ``{root, split_file, val_frac, dataset_id}``.
    default_val_frac : float
    default_split_file : path, optional
        For entries of ``datasets`` that have none.
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
        Other keys, which electrai ignores too; a warning lists them.

    Raises
    ------
    ConfigError
        The list or split file cannot be used; or a material has no density. The message has its
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
        self._transforms = transforms_of(transform)
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
            collate_fn=collate,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            drop_last=self.drop_last,
            multiprocessing_context=start_method(self.train_workers, self.val_workers)
            if workers and on_s3
            else None,
        )
