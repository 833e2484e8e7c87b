"""One node as a training run finds it: pairs of densities in a directory, with a stable listing,
and a cache. Small, usable from any process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.cachedirs import on_disk_bytes, payload_files, settings
from tests.support.readers import make_reader
from tests.support.training import write_pairs
from zarrcache import ZarrS3Reader
from zarrcache.disk.index import Index

__all__ = ["LocalNode"]


class LocalNode:
    """``data/mp-N.zarr`` and ``label/mp-N.zarr`` below ``directory``, and ``directory/cache``.

    Attributes
    ----------
    values : dict
        What a plain read gives, by task id and role.
    root : Path
        All that the cache may write.
    """

    def __init__(self, directory: Path, pairs: int = 3, **layout: Any) -> None:
        self.directory = directory
        self.values = write_pairs(directory, pairs, **layout)
        (directory / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(pairs)]}))
        self.root = directory / "cache" / "zarrcache-v1"
        for path in directory.rglob("*"):
            os.utime(path, (1.6e9, 1.6e9))  # a store that was written just now is listed twice

    def reader(self, **block: Any) -> ZarrS3Reader:
        """As a new run makes it."""
        return make_reader(self.directory, cache=block)

    def read(self, reader: ZarrS3Reader) -> None:
        """Read everything through both tiers, and compare."""
        assert reader.task_ids == sorted({task_id for task_id, _ in self.values})
        for (task_id, role), values in self.values.items():
            assert np.array_equal(reader.load(task_id, role)[0], values.ravel()), (task_id, role)  # type: ignore[arg-type]
        group = reader.read_zarr_store(self.directory / "data" / "mp-1.zarr")
        assert reader.get_metadata(group)["seed"] == 1
        found = group["charge_density_total"][0, 0, 0]  # by zarr, through the byte tier
        assert found == self.values["mp-1", "data"].flat[0]

    def check_settled(self) -> None:
        """The files on disk are those of the index, with the same sizes."""
        index = Index(settings(self.directory))
        index.open()
        assert {
            str(path.relative_to(self.root)) for path in payload_files(self.directory)
        } == index.filenames()
        assert (
            index.volume_bytes()
            == on_disk_bytes(self.directory)
            == sum(row.size_bytes for row in index.rows())
        )
