"""One process is asked to slow down, and all processes of the node do: counted at the proxy."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.origin import Origin, open_origin
from zarrcache.origin import _requests as retry
from zarrcache.stats import Counters

PAUSE_S = 4.0
#: A neighbour looks every 0.1 s, and its last request has to arrive; the rest is for a machine that
#: is busy.
HEARD_S = 1.5
EARLY_S = 0.2
DEADLINE_S = 60.0
N = 12


@pytest.fixture(autouse=True)
def one_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough to differ from a busy machine."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", PAUSE_S)
    monkeypatch.setattr(retry, "_pauses", {})


@pytest.fixture(scope="module")
def url(s3_server: S3Server) -> str:
    """A few objects."""
    bucket = s3_server.new_bucket()
    for i in range(N):
        s3_server.put(f"s3://{bucket}/data/mp-1.zarr/{i}", bytes([i]) * 100)
    return f"s3://{bucket}/data"


def opened(
    url: str, server: S3Server, proxy: FaultProxy, node_dir: Path | None, **more: Any
) -> Origin:
    """The bucket behind the proxy, with two attempts."""
    kwargs = server.kwargs_at(proxy.endpoint_url)
    return open_origin(
        url, s3_kwargs=kwargs, retry=RetryConfig(attempts=2), node_dir=node_dir, **more
    )


def ask(origin: Origin, done: Any) -> None:
    """Request objects, one after the other, until there are enough."""
    objects = origin.list_objects("mp-1.zarr/")
    while not done.is_set():
        for obj in objects[1:]:
            list(origin.fetch([obj]))


def wait_until(condition: Any) -> None:
    """Wait; only a hang reaches the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def assert_all_paused(proxy: FaultProxy, told_key: str, n_askers: int) -> None:
    """No request arrives during the pause; many before and after it."""
    wait_until(lambda: _told_s(proxy, told_key) is not None)
    told_s = _told_s(proxy, told_key)
    assert told_s is not None
    wait_until(lambda: sum(s.time_s > told_s + PAUSE_S for s in proxy.seen("GET")) > 4 * n_askers)
    times = [s.time_s - told_s for s in proxy.seen()]
    assert sum(t < 0 for t in times) > n_askers
    assert [t for t in times if HEARD_S < t < PAUSE_S - EARLY_S] == []


def _told_s(proxy: FaultProxy, key: str) -> float | None:
    return next(
        (s.time_s for s in proxy.seen("GET") if s.path.endswith(key) and s.outcome == "503"), None
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_one_of_four_processes_is_asked_to_slow_down_and_all_pause(
    s3_server: S3Server, fault_proxy: FaultProxy, url: str, tmp_path: Path
) -> None:
    """They share only a cache directory. Every sample arrives."""
    context = multiprocessing.get_context("fork")
    done = context.Event()
    processes = [
        context.Process(target=ask, args=(opened(url, s3_server, fault_proxy, tmp_path), done))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    try:
        wait_until(lambda: fault_proxy.count("GET") > 30)
        # only this process requests it
        fault_proxy.rules(Rule(("503",), op="GET", key="/0$"))
        one = opened(url, s3_server, fault_proxy, tmp_path)
        [(_, body)] = one.fetch(one.list_objects("mp-1.zarr/")[:1])
        assert bytes(memoryview(body)) == bytes(100)
        assert_all_paused(fault_proxy, "/0", len(processes))
    finally:
        done.set()
        for process in processes:
            process.join(DEADLINE_S)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * 3


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_without_a_directory_all_threads_of_the_process_pause(
    s3_server: S3Server, fault_proxy: FaultProxy, url: str, engine: Any
) -> None:
    """Also those of other origins at the same endpoint."""
    done = threading.Event()
    fetch = FetchConfig(engine=engine)
    threads = [
        threading.Thread(
            target=ask, args=(opened(url, s3_server, fault_proxy, None, fetch=fetch), done)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: fault_proxy.count("GET") > 30)
        fault_proxy.rules(Rule(("503",), op="GET", key="/0$"))
        one = opened(url, s3_server, fault_proxy, None, fetch=fetch)
        list(one.fetch(one.list_objects("mp-1.zarr/")[:1]))
        assert_all_paused(fault_proxy, "/0", len(threads))
    finally:
        done.set()
        for thread in threads:
            thread.join(DEADLINE_S)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_S", 0.4)
    return


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_pauses_use_up_no_attempts(
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    url: str,
    engine: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each object is refused once, so every pass is cut short; with two attempts all objects still
    arrive.
    """
    counters = Counters()
    origin = opened(
        url,
        s3_server,
        fault_proxy,
        None,
        fetch=FetchConfig(engine=engine, concurrency=2),
        counters=counters,
    )
    objects = origin.list_objects("mp-1.zarr/")
    fault_proxy.rules(Rule(("503",), op="GET", per_object=True))
    with caplog.at_level(logging.WARNING, "zarrcache.origin._requests"):
        assert len({obj.key: body for obj, body in origin.fetch(objects)}) == N
    assert (fault_proxy.count("GET"), counters.snapshot().retries) == (2 * N, N)
    assert [r for r in caplog.records if r.getMessage().startswith("origin.slow_down wait_s=")]
