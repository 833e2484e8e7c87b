"""A training followed by a prefetcher, step by step: small pairs on S3, and conditions to wait for
instead of sleeping.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cachedirs import array_on_disk
from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from tests.support.training import write_pairs
from zarrcache import ZarrS3Reader
from zarrcache._keys import Role
from zarrcache.disk.index import Index

__all__ = ["ONE", "Pairs", "is_there", "occupied", "put_pairs", "wait_for"]

SHAPE, CHUNKS = (12, 12, 12), (12, 12, 6)
#: Bytes on disk of one density.
ONE = array_on_disk(4 * SHAPE[0] * SHAPE[1] * SHAPE[2])
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Pairs:
    """Pairs in a bucket. ``values`` by task id and role.

    ``objects`` of one density: two chunks, their metadata, and the attributes of the store.
    """

    bucket: str
    map_path: Path
    values: dict[tuple[str, str], Any] = field(repr=False)
    objects: int = 4

    def reader(self, directory: Path, s3_kwargs: dict[str, Any], **block: Any) -> ZarrS3Reader:
        """For a node with its cache in ``directory``. All pairs but one are training samples."""
        return make_reader(
            directory,
            f"s3://{self.bucket}",
            map_dir=self.map_path,
            train_fraction=len(self.values) // 2 - 1,
            s3_kwargs=s3_kwargs,
            cache=block,
        )


def put_pairs(server: S3Server, directory: Path, count: int) -> Pairs:
    """Write and upload them, and wait for a stable listing."""
    values = write_pairs(directory, count, shape=SHAPE, chunks=CHUNKS)
    (directory / "map.json").write_text(
        json.dumps({"GGA": [f"mp-{number}" for number in range(count)]})
    )
    bucket = server.new_bucket()
    for role in ("data", "label"):
        server.put_tree(directory / role, f"s3://{bucket}/{role}")
    time.sleep(2.1)
    return Pairs(bucket, directory / "map.json", values)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait; only a hang reaches the deadline."""
    end_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def is_there(reader: ZarrS3Reader, task_id: str, role: Role) -> bool:
    """Whether the next read of a density makes no request."""
    index = reader.cache.index
    assert index is not None
    digest = reader.key(task_id, role).digest
    found = index.lookup(digest) or index.lookup(f"-{digest}")
    return found is not None and os.path.exists(index.path_of(found))


def occupied(index: Index) -> int:
    """Bytes of the files of densities, partial ones included, listings excluded.

    The minimum of three walks: one walk may count both a removed file and its replacement.
    """
    return min(_walk(index) for _ in range(3))


def _walk(index: Index) -> int:
    total = 0
    for directory, _, names in os.walk(index.dir.entries):
        for name in names:
            try:
                size = os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:
                continue
            total += ONE if size > ONE // 2 else 0
    return total
