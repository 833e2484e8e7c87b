"""Stores are overwritten while they are read: every array is one version, or an error that says
that the store is being written.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache.arrays import OriginArray, list_array, listing, read_array
from zarrcache.arrays import read as reading
from zarrcache.config import FetchConfig
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin import open_origin

ARRAY = "charge_density_total"
SHAPE = (8, 8, 8)
STEP = 1000
N_VERSIONS = 8
ENGINES = ("obstore", "s3fs")
_REALLY_WAIT = reading.wait_until


@pytest.fixture(autouse=True)
def really_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests patch this wait away."""
    for module in (reading, listing):
        monkeypatch.setattr(module, "wait_until", _REALLY_WAIT)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Objects of one store in eight versions: the same numbers, ``STEP`` higher in each."""
    root = tmp_path_factory.mktemp("versions")
    made = []
    for number in range(N_VERSIONS):
        values = np.arange(np.prod(SHAPE), dtype="float32").reshape(SHAPE) + STEP * number
        small_group(root / f"{number}.zarr", {ARRAY: values})
        made.append(
            {
                str(p.relative_to(root / f"{number}.zarr")): p.read_bytes()
                for p in sorted((root / f"{number}.zarr").rglob("*"))
                if p.is_file()
            }
        )
    return made


def version_of(values: NDArray[np.float32]) -> int | None:
    """Version of an array; None if it is mixed or incomplete."""
    found = values.reshape(-1) - np.arange(np.prod(SHAPE), dtype="float32")
    return int(found[0]) // STEP if np.all(found == found[0]) and found[0] % STEP == 0 else None


@dataclass
class Writer:
    """Overwrites stores version by version in a thread, and records which version was complete
    when.
    """

    server: S3Server
    url: str
    versions: list[dict[str, bytes]]
    dice: random.Random
    done: threading.Event = field(default_factory=threading.Event)
    newest: dict[str, int] = field(default_factory=dict)

    def put(self, store: str, number: int, *, gaps: bool) -> None:
        for key, body in self.versions[number % N_VERSIONS].items():
            self.server_put(store, key, body)
            if gaps and self.dice.random() < 0.3:
                time.sleep(self.dice.uniform(0.0, 0.6))  # longer than a read takes
        self.newest[store] = number

    def server_put(self, store: str, key: str, body: bytes) -> None:
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=f"{prefix}/{store}/{key}", Body=body)

    def run(self, stores: list[str], rest_s: float) -> None:
        for number in itertools.count(1):
            for store in stores:
                if self.done.is_set():
                    return
                self.put(store, number, gaps=True)
            self.done.wait(self.dice.uniform(0.0, rest_s))

    def __post_init__(self) -> None:
        self.client = self.server.client()


@pytest.fixture
def writer(s3_server: S3Server, bucket: str, versions: list[dict[str, bytes]]) -> Iterator[Writer]:
    """With its own bucket."""
    writer = Writer(s3_server, f"s3://{bucket}/data", versions, random.Random(7))
    yield writer
    writer.done.set()


@pytest.mark.parametrize(
    ("engine", "arrays", "is_new"),
    [
        ("obstore", True, False),
        ("s3fs", True, True),
        ("s3fs", True, False),
        ("obstore", False, False),
    ],
)
def test_a_writer_that_pauses_is_waited_for(
    writer: Writer,
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    engine: str,
    arrays: bool,
    is_new: bool,
) -> None:
    """It pauses in the middle of a store for longer than a read takes. Neither mixed versions nor
    zeros, in either tier.
    """
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    writer.put("mp-1.zarr", 0, gaps=False)
    reader = make_reader(
        tmp_path,
        data_dir=writer.url,
        label_dir=writer.url,
        train_fraction=1,
        s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url),
        cache={"arrays": {"enabled": arrays}, "fetch": {"engine": engine}},
    )
    assert reader.task_ids == ["mp-1"]
    # its client is open; the next request is quick
    reader.origin("data").list_objects("mp-2.zarr/")
    fault_proxy.reset()
    if is_new:
        for key in writer.versions[0]:
            s3_server.delete(f"{writer.url}/mp-1.zarr/{key}")
    half = len(writer.versions[1]) // 2 + 1
    first, second = list(writer.versions[1].items())[:half], list(writer.versions[1].items())[half:]
    assert sum(ARRAY in key for key, _ in second) >= 3

    def go_on() -> None:
        end_s = time.monotonic() + 60
        while (
            not [s for s in fault_proxy.seen() if "mp-1.zarr" in s.path]
            and time.monotonic() < end_s
        ):
            time.sleep(0.02)
        time.sleep(0.5)
        for key, body in second:
            writer.server_put("mp-1.zarr", key, body)

    later = threading.Thread(target=go_on)
    later.start()
    for key, body in first:
        writer.server_put("mp-1.zarr", key, body)
    values, _ = reader.load("mp-1", "data")
    later.join()
    assert version_of(values) == 1
    assert version_of(reader.load("mp-1", "data")[0]) == 1


@pytest.mark.parametrize("off_s", [-600.0, 0.0, 600.0])
def test_a_store_that_was_just_written_is_recognised_by_the_clock_of_the_server(
    writer: Writer, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    """Whatever this machine's clock says; and one written ten seconds ago needs no second LIST."""
    writer.put("mp-1.zarr", 0, gaps=False)
    now_s = time.time
    monkeypatch.setattr(time, "time", lambda: now_s() + off_s)
    origin = open_origin(writer.url, s3_kwargs=s3_server.s3_kwargs)
    listed = list_array(OriginArray(origin, "mp-1.zarr", ARRAY))
    assert 0.0 < listing.unstable_s(listed) <= 2.0
    older = [dataclasses.replace(o, modified_s=o.modified_s - 10) for o in listed]
    assert listing.unstable_s(older) == 0.0


def hammer(
    writer: Writer, *, n_stores: int, n_readers: int, seconds: float, rest_s: float
) -> tuple[int, int]:
    """Read stores cold through both engines while they are overwritten; numbers of complete and of
    refused reads.
    """
    stores = [f"mp-{i}.zarr" for i in range(n_stores)]
    for store in stores:
        writer.put(store, 0, gaps=False)
    wrong: list[object] = []
    whole, refused = [], []
    end_s = time.monotonic() + seconds

    def read(number: int) -> None:
        dice = random.Random(number)
        fetch = FetchConfig(engine=ENGINES[number % 2])  # type: ignore[arg-type]
        origin = open_origin(writer.url, s3_kwargs=writer.server.s3_kwargs, fetch=fetch)
        while time.monotonic() < end_s:
            store = dice.choice(stores)
            at_least = writer.newest[store]
            try:
                found = version_of(read_array(OriginArray(origin, store, ARRAY)).array)
            except IncompleteArrayError as exc:
                (refused if "Wait until its writer has finished" in str(exc) else wrong).append(
                    str(exc)
                )
                continue
            # Versions come round again after eight of them; meanwhile at most the next one is
            # begun.
            newer = range(at_least, writer.newest[store] + 2)
            (whole if found in {n % N_VERSIONS for n in newer} else wrong).append(
                (store, found, at_least)
            )

    threads = [threading.Thread(target=read, args=(i,)) for i in range(n_readers)]
    threads.append(threading.Thread(target=writer.run, args=(stores, rest_s)))
    for thread in threads:
        thread.start()
    for thread in threads[:-1]:
        thread.join(seconds + 120)
    writer.done.set()
    threads[-1].join(60)
    assert wrong == []
    return len(whole), len(refused)


def test_readings_under_a_writer_are_of_one_version(writer: Writer) -> None:
    """Five stores are overwritten repeatedly, with pauses of up to 0.6 s between two objects."""
    whole, _ = hammer(writer, n_stores=5, n_readers=6, seconds=6.0, rest_s=0.5)
    assert whole >= 1
    assert max(writer.newest.values()) >= 1


@pytest.mark.slow
def test_readings_under_a_writer_are_of_one_version_for_two_minutes(writer: Writer) -> None:
    """Six stores and sixteen readers."""
    whole, _refused = hammer(writer, n_stores=6, n_readers=16, seconds=120.0, rest_s=0.5)
    assert whole >= 100


@pytest.mark.parametrize("engine", ENGINES)
def test_another_version_is_refused_by_the_server(
    s3_server: S3Server, fault_proxy: FaultProxy, bucket: str, engine: Any
) -> None:
    """Each GET, of an object or a range, is conditional on the listed version: not even its bytes
    are sent.
    """
    url = f"s3://{bucket}/data"
    s3_server.put(f"{url}/mp-1.zarr/0", b"0123456789")
    origin = open_origin(
        url,
        s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url),
        fetch=FetchConfig(engine=engine),
    )
    [obj] = origin.list_objects("mp-1.zarr/")
    assert list(origin.fetch([obj]))
    assert origin.fetch_range(obj, 2, 5) == b"234"
    s3_server.put(f"{url}/mp-1.zarr/0", b"9876543210")
    fault_proxy.rules(Rule())
    for read in (lambda: list(origin.fetch([obj])), lambda: origin.fetch_range(obj, 2, 5)):
        with pytest.raises(IncompleteArrayError, match="was changed while it was being read"):
            read()
    # over http:// a range is confirmed by a second request
    assert [s.outcome for s in fault_proxy.seen("GET")] == ["200", "206", "206", "412", "412"]
