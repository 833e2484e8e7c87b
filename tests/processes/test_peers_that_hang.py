"""Nodes that hang instead of dying: stopped servers and readers, dropped packets."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cluster import Node, start_cluster
from tests.support.faultproxy import FaultProxy, Rule
from tests.support.localnode import LocalNode
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache.peers import EntryServer, read_token

#: Serves a cache until its standard input ends; prints the address.
SERVE = """
import sys
from pathlib import Path
from zarrcache.peers import EntryServer, read_token
directory, host, port, token = sys.argv[1:]
with EntryServer(Path(directory), host=host, port=int(port), token=read_token(Path(token))) as one:
    print(one.url, flush=True)
    sys.stdin.read()
"""
#: Reads all densities of a node; prints the seconds it took, and how many it fetched itself.
READ = """
import json, logging, sys, time
from pathlib import Path
from tests.support.cluster import Node
logging.basicConfig()
root, cache = Path(sys.argv[1]), json.loads(sys.argv[2])
reader = Node(root, str(root), None, cache).reader()
ids = reader.task_ids
print("ready", flush=True)
sys.stdin.readline()
start_s = time.monotonic()
for task_id in ids:
    reader.load(task_id, "data")
    time.sleep(0.02)
stats = reader.stats
print(json.dumps([time.monotonic() - start_s, stats.misses - stats.peer_hits]), flush=True)
"""
DENSITIES = 30
#: Two seconds for each density that needs the hanging node would be 40 s and more.
BOUND_S = 20.0


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(0o600)
    path.write_text("x" * 40)
    return path


class Processes:
    """Children of a test, each perhaps in a network namespace."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def start(self, code: str, *arguments: object, inside: str = "") -> subprocess.Popen[str]:
        prefix = ["ip", "netns", "exec", inside] if inside else []
        process = subprocess.Popen(
            [*prefix, sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line.strip()


def read_together(readers: list[subprocess.Popen[str]]) -> list[tuple[float, int, str]]:
    """Let all read at once: seconds, own fetches, and the log of each."""
    for reader in readers:
        assert first_line(reader) == "ready"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    results = []
    for reader in readers:
        out, err = reader.communicate(timeout=200)
        assert reader.returncode == 0, err
        seconds, fetched = json.loads(out)
        results.append((seconds, fetched, err))
    return results


def cache_of(directory: Path, urls: list[str], own: str, token: Path) -> str:
    return json.dumps(
        {
            "dir": str(directory),
            "peers": urls,
            "advertise": own,
            "peer_token_file": str(token),
            "min_free": 0,
        }
    )


def serve_one(directory: Path, token: Path, pipe: Any) -> None:
    with EntryServer(directory, token=read_token(token)) as server:
        pipe.send(server.url)
        with contextlib.suppress(EOFError):
            pipe.recv()


def read_all(node: Node, barrier: Any, pipe: Any) -> None:
    log = io.StringIO()
    logging.basicConfig(stream=log, force=True)
    reader = node.reader()
    ids = reader.task_ids
    barrier.wait(120)
    start_s = time.monotonic()
    for task_id in ids:
        reader.load(task_id, "data")
        time.sleep(0.02)
    stats = reader.stats
    pipe.send((time.monotonic() - start_s, stats.misses - stats.peer_hits, log.getvalue()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "how", ["killed", "stopped", pytest.param("flapping", marks=pytest.mark.slow)]
)
def test_one_server_that_does_not_answer_costs_each_node_a_few_seconds(
    tmp_path: Path, token: Path, how: str
) -> None:
    """Four nodes read 30 densities in the same order. All are fetched once, or nearly so; also by
    the node whose own server it is.
    """
    data = LocalNode(tmp_path / "data", DENSITIES)
    context = multiprocessing.get_context("fork")
    barrier, started = context.Barrier(4), []

    def start(function: Any, *arguments: Any) -> Any:
        here, there = context.Pipe()
        process = context.Process(target=function, args=(*arguments, there), daemon=True)
        process.start()
        started.append(process)
        return process, here

    try:
        servers = [start(serve_one, tmp_path / f"n{n}", token) for n in range(4)]
        urls = [pipe.recv() for _, pipe in servers]
        victim = servers[1][0]
        os.kill(victim.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        readers = []
        for n, url in enumerate(urls):
            cache = json.loads(cache_of(tmp_path / f"n{n}", urls, url, token))
            node = Node(data.directory, str(data.directory), None, cache)
            readers.append(start(read_all, node, barrier))
        while how == "flapping" and any(process.is_alive() for process, _ in readers):
            os.kill(victim.pid, signal.SIGCONT)
            time.sleep(0.3)
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(1.2)
        results = [pipe.recv() for _, pipe in readers]
    finally:
        for process in started:
            process.kill()
            process.join(60)
    fetched = sum(own for _, own, _ in results)
    assert max(seconds for seconds, _, _ in results) < BOUND_S
    assert fetched <= DENSITIES * (1.10 if how == "killed" else 1.2)
    if how != "flapping":
        for n, (_, _, log) in enumerate(results):
            words = "this node's own server" if n == 1 else f"peer {urls[1]} is left out"
            assert log.count(words) == 1


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """Three network namespaces, each with an address of its own, on one bridge."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 for network namespaces")
    prefix = f"zc{os.getpid() % 100_000}"
    names = [f"{prefix}n{n}" for n in range(3)]
    subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=60)

    try:
        try:
            ip("link", "add", f"{prefix}b", "type", "bridge")
            ip("link", "set", f"{prefix}b", "up")
            for n, name in enumerate(names):
                ip("netns", "add", name)
                ip("link", "add", f"{prefix}v{n}", "type", "veth", "peer", "name", "eth0",
                   "netns", name)  # fmt: skip
                ip("link", "set", f"{prefix}v{n}", "master", f"{prefix}b", "up")
                ip("-n", name, "addr", "add", f"{subnet}.{n + 1}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"network namespaces cannot be made here: {exc.stderr.decode().strip()}")
        yield [(name, f"{subnet}.{n + 1}") for n, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)
        subprocess.run(["ip", "link", "del", f"{prefix}b"], capture_output=True, timeout=60)


@pytest.mark.slow
def test_node_whose_packets_are_dropped_costs_the_others_a_few_seconds(
    tmp_path: Path, token: Path, namespaces: list[tuple[str, str]]
) -> None:
    """It had fetched a third of the densities, so its homes and the others' point to it."""
    data = LocalNode(tmp_path / "data", DENSITIES)
    urls = [f"http://{address}:7070" for _, address in namespaces]
    with contextlib.ExitStack() as stack:
        processes = Processes(stack)
        for n, (name, address) in enumerate(namespaces):
            server = processes.start(SERVE, tmp_path / f"n{n}", address, 7070, token, inside=name)
            assert first_line(server) == urls[n]

        def reader(n: int) -> subprocess.Popen[str]:
            cache = cache_of(tmp_path / f"n{n}", urls, urls[n], token)
            return processes.start(READ, data.directory, cache, inside=namespaces[n][0])

        ((_, fetched, _),) = read_together([reader(1)])
        assert fetched == DENSITIES
        # What it sends is dropped without a word; what is sent to it arrives.
        subprocess.run(
            ["ip", "-n", namespaces[1][0], "route", "replace", "blackhole",
             f"{namespaces[0][1].rpartition('.')[0]}.0/25"],
            check=True,
        )  # fmt: skip
        results = read_together([reader(0), reader(2)])
    assert max(seconds for seconds, _, _ in results) < BOUND_S
    assert sum(own for _, own, _ in results) <= 1.2 * DENSITIES
    for _, _, log in results:
        assert log.count(f"peer {urls[1]} is left out") == 1


def read_one(node: Node, pipe: Any) -> None:
    values, _ = node.reader(retry={"timeout": 5}, fetch={"read_timeout": 3}, verify="always").load(
        "mp-0", "data"
    )
    pipe.send(values)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_reader_suspended_in_a_fetch_delays_no_other_node_and_reads_its_sample(
    s3_server: S3Server, fault_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    """Suspended for longer than ``cache.retry.timeout``. Its lease goes to another node in seconds;
    when it wakes, its request fails, and the retries have the time that they had before.
    """
    for role in ("data", "label"):
        group = small_group(tmp_path / role / "mp-0.zarr", seed=1)
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
        if role == "data":
            wanted = group["charge_density_total"].ravel()
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    time.sleep(2.1)  # a stable listing
    fault_proxy.rules(Rule(("hang",), op="GET", key="charge_density_total/[0-9]"))
    with start_cluster(
        2,
        tmp_path,
        tmp_path,
        f"s3://{bucket}",
        s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url),
    ) as cluster:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        frozen = context.Process(target=read_one, args=(cluster.nodes[0], there))
        frozen.start()
        try:
            fault_proxy.wait_in_flight(1)
            os.kill(frozen.pid or 0, signal.SIGSTOP)
            stopped_s = time.monotonic()
            reader = cluster.nodes[1].reader()
            assert np.array_equal(reader.load("mp-0", "data")[0], wanted)
            assert time.monotonic() - stopped_s < 30.0  # not the 60 s of the retries
            assert reader.stats.peer_hits == 0
            time.sleep(max(0.0, stopped_s + 7.0 - time.monotonic()))
        finally:
            os.kill(frozen.pid or 0, signal.SIGCONT)
        assert here.poll(60)
        assert np.array_equal(here.recv(), wanted)
        frozen.join(60)
        assert frozen.exitcode == 0
