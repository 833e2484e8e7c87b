"""Stores are overwritten between two epochs: no stale read, one LIST each, and only those are
fetched again. Counted at the server.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import random_density, small_group
from zarrcache import ZarrS3Reader, plan_warm

ARRAY = "charge_density_total"
ROLES = ("data", "label")
#: What was written within two seconds is listed twice.
SETTLED_S = 2.1
SIZES = [
    pytest.param((20, 5), id="10 of 40"),
    pytest.param((100, 25), id="50 of 200", marks=pytest.mark.slow),
]


@dataclass
class Bucket:
    """Materials on S3, each a pair of stores, and their present values."""

    server: S3Server
    name: str
    root: Path
    n: int
    now: dict[tuple[str, str], NDArray[Any]] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return [f"mp-{i}" for i in range(self.n)]

    def write(self, ids: list[str], seed: int) -> None:
        """Write both stores of these materials with new values of the same shape."""
        client = self.server.client()

        def one(pair: tuple[str, str]) -> None:
            role, task_id = pair
            path = self.root / f"v{seed}" / role / f"{task_id}.zarr"
            values = random_density(
                (4, 4, 5), seed=hash((seed, int(task_id[3:]), role == "data")) % 2**31
            )
            small_group(path, {ARRAY: values})
            for file in (p for p in path.rglob("*") if p.is_file()):
                client.put_object(
                    Bucket=self.name,
                    Key=f"{role}/{path.name}/{file.relative_to(path)}",
                    Body=file.read_bytes(),
                )
            self.now[pair] = values

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(one, itertools.product(ROLES, ids)))
        time.sleep(SETTLED_S)

    def reader(self, revalidate: str) -> ZarrS3Reader:
        (self.root / "map.json").write_text(json.dumps({"GGA": self.ids}))
        return make_reader(
            self.root,
            f"s3://{self.name}",
            train_fraction=1,
            s3_kwargs=self.server.s3_kwargs,
            cache={"revalidate": revalidate},
        )

    def stale(self, reader: ZarrS3Reader) -> list[tuple[str, str]]:
        """Read one epoch; which densities differ from what S3 has."""
        return [
            (r, i)
            for (r, i), v in self.now.items()
            if not np.array_equal(reader.load(i, r)[0], v.ravel())
        ]  # type: ignore[arg-type]

    def listings(self) -> Counter[str]:
        return Counter(f"{role}/{task_id}.zarr/" for role, task_id in self.now)

    def objects(self, ids: list[str]) -> Counter[str]:
        """Each object of these densities and the attributes of their stores, once."""
        keys = (
            k
            for role, i in itertools.product(ROLES, ids)
            for k in self.server.keys(f"s3://{self.name}/{role}/{i}.zarr/")
        )
        return Counter(
            key
            for key in keys
            if key.endswith(".zarr/.zattrs")
            or (f"/{ARRAY}/" in key and not key.endswith("/.zattrs"))
        )


@pytest.fixture
def stores(s3_server: S3Server, bucket: str, tmp_path: Path) -> Callable[[int], Bucket]:
    """``stores(n)``: ``n`` materials, written a while ago."""

    def make(n: int) -> Bucket:
        made = Bucket(s3_server, bucket, tmp_path, n)
        made.write(made.ids, seed=1)
        return made

    return make


@pytest.mark.parametrize("size", SIZES)
def test_epoch_reads_what_was_overwritten_and_fetches_nothing_else(
    stores: Callable[[int], Bucket], s3_server: S3Server, size: tuple[int, int]
) -> None:
    """With ``revalidate: epoch``: one LIST per density and epoch. ``never`` makes no request and
    reads its entries until they are warmed again.
    """
    n, n_changed = size
    bucket = stores(n)
    epochs = bucket.reader("epoch")
    assert bucket.stale(epochs) == []
    changed = bucket.ids[2 : 2 + n_changed]
    bucket.write(changed, seed=2)

    log = RequestLog(s3_server, bucket.name)
    trusting = bucket.reader("never")
    assert sorted(bucket.stale(trusting)) == sorted(itertools.product(ROLES, changed))
    assert log.seen() == []

    wanted = bucket.objects(changed)
    log = RequestLog(s3_server, bucket.name)
    assert bucket.stale(epochs) == []
    assert log.paths("LIST") == bucket.listings()
    assert log.paths("GET") == wanted
    assert len(log.seen()) == 2 * n + sum(wanted.values())

    log = RequestLog(s3_server, bucket.name)
    assert bucket.stale(epochs) == []
    assert (log.paths("LIST"), log.paths("GET")) == (bucket.listings(), Counter())


@pytest.mark.parametrize("size", SIZES)
def test_warming_with_revalidate_does_the_same(
    stores: Callable[[int], Bucket], s3_server: S3Server, size: tuple[int, int]
) -> None:
    """``zarrcache warm --revalidate``: one LIST per density and directory; then ``never`` reads the
    present version without a request.
    """
    n, n_changed = size
    bucket = stores(n)
    assert plan_warm(bucket.reader("never"), workers=1).execute().failed == ()
    changed = bucket.ids[2 : 2 + n_changed]
    bucket.write(changed, seed=2)

    wanted = bucket.objects(changed)
    log = RequestLog(s3_server, bucket.name)
    assert plan_warm(bucket.reader("never"), workers=1).execute().failed == ()
    assert log.seen() == []
    report = plan_warm(bucket.reader("never"), revalidate=True, workers=1).execute()
    assert report.failed == ()
    assert log.paths("LIST") == bucket.listings() + Counter(f"{role}/" for role in ROLES)
    assert log.paths("GET") == wanted

    log = RequestLog(s3_server, bucket.name)
    assert bucket.stale(bucket.reader("never")) == []
    assert log.seen() == []
