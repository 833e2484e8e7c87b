"""Soak test: one of 20 requests fails, with a fixed seed, in every way of networks and servers. No
value is wrong and none is lost.
"""

from __future__ import annotations

import concurrent.futures
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from tests.support.stores import random_density, small_group
from zarrcache.origin import _requests as retry

ARRAY = "charge_density_total"
SHARE = 0.05
#: Whatever may happen to an object on its way; ``corrupt`` is one flipped bit, ``short`` half a
#: body with a length that matches.
OBJECT_FAULTS = (
    "reset",
    "reset_body",
    "truncate",
    "short",
    "corrupt",
    "stall",
    "hang",
    "500",
    "503",
    "502:",
    "429",
    "400:RequestTimeout",
)
LIST_FAULTS = ("reset", "reset_body", "truncate", "short", "hang", "500", "503")
ATTEMPTS = 5
N_OBJECTS = 10  # of each density: .zarray, eight chunks, and the attributes of the store


def upload(server: S3Server, bucket: str, root: Path, n: int, densities: dict[str, Any]) -> None:
    """``n`` stores with different values."""
    client = server.client()

    def one(i: int) -> None:
        values = random_density((8, 7, 6), seed=i)
        path = root / f"mp-{i}.zarr"
        small_group(path, {ARRAY: values})
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            client.put_object(
                Bucket=bucket,
                Key=f"data/{path.name}/{file.relative_to(path)}",
                Body=file.read_bytes(),
            )
        densities[f"mp-{i}"] = values

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(n)))


def soak(
    server: S3Server,
    proxy: FaultProxy,
    bucket: str,
    root: Path,
    densities: dict[str, Any],
    engine: str,
    *,
    threads: int,
) -> Counter[str]:
    """Read every store cold with faults; how often each fault happened."""
    (root / "map.json").write_text(json.dumps({"GGA": sorted(densities)}))
    url = f"s3://{bucket}/data"
    arguments: dict[str, Any] = {
        "data_dir": url,
        "label_dir": url,
        "train_fraction": 1,
        "s3_kwargs": server.kwargs_at(proxy.endpoint_url),
        "cache": {
            "dir": root / f"cache-{engine}",
            "retry": {"attempts": ATTEMPTS},
            "fetch": {"engine": engine, "read_timeout": 1.5, "connect_timeout": 5.0},
        },
    }
    reader = make_reader(root, **arguments)
    assert len(reader.task_ids) == len(densities)
    proxy.reset()
    proxy.rules(
        Rule(OBJECT_FAULTS, op="GET", dice=SHARE, seed=4),
        Rule(LIST_FAULTS, op="LIST", dice=SHARE, seed=4),
    )
    wrong = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for task_id, (values, gridsize) in zip(
            densities, pool.map(lambda i: reader.load(i, "data"), densities), strict=True
        ):
            if not np.array_equal(values.reshape(gridsize), densities[task_id]):
                wrong.append(task_id)
    assert wrong == []
    # The second detector: what was stored is what was uploaded, in a reader that has no origin to
    # ask.
    proxy.down()
    again = make_reader(root, **arguments)
    assert all(np.array_equal(again.load(i, "data")[0], densities[i].ravel()) for i in densities)
    assert again.stats.requests == 0
    proxy.up()

    seen = proxy.seen("GET")
    faults = Counter(s.outcome for s in seen if s.outcome in OBJECT_FAULTS) + Counter(
        s.outcome for s in seen if s.outcome in ("502",)
    )
    asked = Counter(s.path for s in seen)
    assert len(asked) == N_OBJECTS * len(densities)
    # aiohttp sends a request whose connection is cut before the answer once more by itself; obstore
    # is asked again for what is late.
    assert max(asked.values()) <= 2 * ATTEMPTS
    assert len(seen) >= len(asked) + faults.total()
    return faults + Counter(
        f"LIST {s.outcome}" for s in proxy.seen("LIST") if s.outcome in LIST_FAULTS
    )


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_every_sample_survives_a_bad_network(
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    bucket: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 stores, 240 objects; the waits are short, the bounds are those of a run."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(retry, "_pauses", {})
    densities: dict[str, Any] = {}
    upload(s3_server, bucket, tmp_path, 24, densities)
    faults = soak(s3_server, fault_proxy, bucket, tmp_path, densities, engine, threads=4)
    assert faults.total() >= 8
    assert len(faults) >= 5
    assert faults["corrupt"] >= 1


@pytest.mark.slow
def test_two_hundred_stores_survive_a_bad_network(
    s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path, bucket: str
) -> None:
    """1,800 objects per engine, with the waits of a real run; each kind of fault happens."""
    densities: dict[str, Any] = {}
    upload(s3_server, bucket, tmp_path, 200, densities)
    for engine in ("obstore", "s3fs"):
        faults = soak(s3_server, fault_proxy, bucket, tmp_path, densities, engine, threads=8)
        print(
            f"{engine}: {faults.total()} faults, 0 wrong, 0 failed of {len(densities)}: "
            f"{dict(sorted(faults.items()))}"
        )
        assert len(faults) >= len(OBJECT_FAULTS)
