"""``zarrcache warm`` interrupted or killed: the next run resumes, and no entry is torn."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.cacheprocess import die_at_step
from tests.support.chgcars import write_chgcar
from tests.support.faultproxy import FaultProxy, Rule
from tests.support.processes import wait_for_all
from tests.support.s3server import S3Server
from tests.support.stores import STRUCTURE
from tests.support.training import start, write_config, write_pairs, zarrcache
from zarrcache import DataConfig, plan_warm, verify
from zarrcache.data.reader import open_reader
from zarrcache.ops.entries import list_entries
from zarrcache.ops.status import read_status
from zarrcache.ops.warm import THREADS

#: Of one density: eight chunks, their description, and the attributes of the store.
OBJECTS = 10


@pytest.fixture
def pairs() -> int:
    """So few that a process works on one density at a time."""
    return 4


@pytest.fixture
def config(
    tmp_path: Path, s3_server: S3Server, bucket: str, fault_proxy: FaultProxy, pairs: int
) -> Path:
    """As many pairs on S3."""
    write_pairs(tmp_path, pairs, shape=(6, 6, 6), chunks=(3, 3, 3))
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    # Requests have to hang until the last process has sent one, on a busy machine too.
    patient = {"retry": {"attempts": 1, "timeout": 120}, "fetch": {"read_timeout": 120}}
    return write_config(
        tmp_path,
        f"s3://{bucket}",
        s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url),
        **patient,
    )


Stuck = Callable[[int], "subprocess.Popen[str]"]


@pytest.fixture
def stuck(config: Path, fault_proxy: FaultProxy, pairs: int) -> Iterator[Stuck]:
    """``stuck(workers)`` is a running ``warm`` that has stored all but two pairs and now waits for
    a silent server.
    """
    with contextlib.ExitStack() as stack:

        def run(workers: int) -> subprocess.Popen[str]:
            last = f"/mp-({pairs - 2}|{pairs - 1}).zarr/"
            waiting = OBJECTS * min(4, workers * (1 if pairs == 4 else THREADS))
            fault_proxy.rules(Rule(op="GET", key=last.replace(".", r"\."), then="hang"))
            process = start("warm", config, "--workers", workers)
            stack.callback(_kill_all, process)
            end = time.monotonic() + 60
            while (
                sum(
                    re.search(last, request.path) is not None for request in fault_proxy.seen("GET")
                )
                < waiting
            ):
                assert time.monotonic() < end, "the workers did not come to the stores that hang"
                time.sleep(0.1)
            fault_proxy.wait_in_flight(waiting)
            while (coverage := read_status(DataConfig.from_yaml(config)).coverage) is None or (
                coverage.warm,
                coverage.half,
            ) != (pairs - 2, 0):
                assert time.monotonic() < end, "the others were not stored"
                time.sleep(0.1)
            return process

        yield run


def _kill_all(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def goes_on(config: Path, proxy: FaultProxy, tmp_path: Path, pairs: int) -> None:
    """Run ``warm`` again: it fetches only the rest; entries are whole, no other file is left."""
    reader = open_reader(DataConfig.from_yaml(config))
    before = read_status(DataConfig.from_yaml(config))
    assert before.coverage is not None
    assert (before.coverage.warm, before.coverage.half) == (pairs - 2, 0)
    proxy.reset()
    again = zarrcache("warm", config, "--json")
    assert (again.code, again.document["warm"]) == (0, pairs), again.err
    assert (again.document["fresh"], again.document["stats"]["misses"]) == (pairs - 2, 4)
    assert proxy.count("GET") == 4 * OBJECTS
    report = verify(DataConfig.from_yaml(config))
    # Densities and two listings.
    assert (report.corrupt, report.strays, report.entries) == ((), (), 2 * pairs + 2)
    state = read_status(DataConfig.from_yaml(config))
    assert state.volume_bytes == state.array_tier.nbytes  # reservations of dead processes are gone
    before_s3 = proxy.count()
    for (task_id, role), values in write_pairs(
        tmp_path / "again", pairs, shape=(6, 6, 6), chunks=(3, 3, 3)
    ).items():
        assert np.array_equal(
            reader.load(task_id, role)[0], values.ravel() / np.float32(values.size)
        )  # type: ignore[arg-type]
    assert proxy.count() == before_s3


@pytest.mark.parametrize(
    ("workers", "pairs"),
    [
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
        (2, 18),
    ],
    ids=["here", "two processes", "threads for two"],
)
def test_after_kill_9_the_next_run_resumes(
    config: Path, fault_proxy: FaultProxy, tmp_path: Path, stuck: Stuck, pairs: int, workers: int
) -> None:
    """All processes at once, as at a preemption; no clean-up is needed."""
    process = stuck(workers)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    goes_on(config, fault_proxy, tmp_path, pairs)


CTRL_C, TERM = (signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")


@pytest.mark.parametrize(
    ("sent", "to_all", "workers", "pairs"),
    [
        pytest.param(CTRL_C, False, 1, 4, id="Ctrl-C here", marks=pytest.mark.slow),
        pytest.param(CTRL_C, False, 2, 18, id="Ctrl-C to the first of three"),
        pytest.param(TERM, False, 1, 4, id="SIGTERM here"),
        pytest.param(
            TERM, False, 2, 18, id="SIGTERM to the first of three", marks=pytest.mark.slow
        ),
        pytest.param(TERM, True, 2, 4, id="SIGTERM to all", marks=pytest.mark.slow),
    ],
)
def test_interrupted_it_ends_at_once_and_the_next_run_resumes(
    config: Path,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    stuck: Stuck,
    sent: tuple[signal.Signals, int, str],
    to_all: bool,
    pairs: int,
    workers: int,
) -> None:
    """While the server is silent: one line says how to resume, the exit code is that of the signal,
    no process and no traceback.
    """
    number, code, word = sent
    process = stuck(workers)
    sent_s = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    wait_for_all(process)
    print(f"ended after {time.monotonic() - sent_s:.1f} s")
    assert (process.returncode, out) == (code, "")
    assert (
        err.splitlines()[-1]
        == f"{word}. Finished work is kept; run the same command again to continue."
    )
    assert "Traceback" not in err
    goes_on(config, fault_proxy, tmp_path, pairs)


def test_ctrl_c_ends_the_workers_too(
    config: Path, fault_proxy: FaultProxy, tmp_path: Path, stuck: Stuck, pairs: int
) -> None:
    """A terminal sends it to every process of the job; the workers finish their item, here with an
    error, which is not reported.
    """
    process = stuck(2)
    os.killpg(process.pid, signal.SIGINT)
    fault_proxy.down()
    # returns when the workers too have closed their output
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert (
        err.splitlines()[-1]
        == "Interrupted. Finished work is kept; run the same command again to continue."
    )
    assert "Traceback" not in err
    goes_on(config, fault_proxy, tmp_path, pairs)


def test_workers_end_when_their_parent_is_killed(
    config: Path, fault_proxy: FaultProxy, tmp_path: Path, stuck: Stuck, pairs: int
) -> None:
    """Only the parent is killed, as by the out-of-memory killer; the workers notice once the server
    answers, and exit.
    """
    process = stuck(2)
    process.kill()
    fault_proxy.down()
    process.communicate(timeout=60)  # as above
    goes_on(config, fault_proxy, tmp_path, pairs)


class TestFiles:
    """CHGCAR and json.gz files as they lie are decoded by the workers."""

    PAIRS = 6

    @pytest.fixture
    def values(self, tmp_path: Path) -> dict[tuple[str, str], NDArray[Any]]:
        """Total and spin density of each file; inputs as text, labels as the Materials Project has
        them.
        """
        found = {}
        for number in range(self.PAIRS):
            for role in ("data", "label"):
                id_ = f"mp-{number}"
                path = tmp_path / role / f"{id_}.CHGCAR"
                seed = number + 100 * (role == "label")
                grids = write_chgcar(path, (9, 8, 7), seed, diff=True)
                found[id_, role] = np.stack(list(grids.values()))
                if role == "label":
                    data = {name: grid.tolist() for name, grid in grids.items()}
                    chgcar = {"data": data, "structure": STRUCTURE}
                    content = json.dumps({"data": chgcar, "task_id": id_}).encode()
                    path.with_name(f"{id_}.json.gz").write_bytes(gzip.compress(content))
                    path.unlink()
        (tmp_path / "map.json").write_text(json.dumps({"GGA": [f"mp-{n}" for n in range(6)]}))
        return found

    @pytest.fixture
    def config(
        self,
        tmp_path: Path,
        values: object,
        s3_server: S3Server,
        bucket: str,
        fault_proxy: FaultProxy,
    ) -> Path:
        for role in ("data", "label"):
            s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
        kwargs = s3_server.kwargs_at(fault_proxy.endpoint_url)
        path = write_config(
            tmp_path,
            f"s3://{bucket}",
            s3_kwargs=kwargs,
            retry={"attempts": 1, "timeout": 120},
            fetch={"read_timeout": 120},
        )
        path.write_text(path.read_text() + "density_type: [total, diff]\nnormalize_data: false\n")
        return path

    def goes_on(
        self, config: Path, proxy: FaultProxy, values: dict[tuple[str, str], NDArray[Any]]
    ) -> None:
        """Run ``warm`` again: it fetches only what is missing, and all bits are right."""
        before = list_entries(DataConfig.from_yaml(config))
        there = Counter((entry.task_id, entry.url.split("/")[-2]) for entry in before)
        proxy.reset()
        again = zarrcache("warm", config, "--json")
        assert (again.code, again.document["warm"]) == (0, self.PAIRS), again.err
        fetched = Counter(request.path.rsplit("/", 1)[-1] for request in proxy.seen("GET"))
        wanted = [one for one in values if there[one] < 2]
        assert len(fetched) == fetched.total() == len(wanted) < len(values)
        assert {name.partition(".")[0] for name in fetched} == {id_ for id_, _ in wanted}
        report = verify(DataConfig.from_yaml(config))
        assert (report.corrupt, report.strays) == ((), ())
        state = read_status(DataConfig.from_yaml(config))
        assert state.volume_bytes == state.array_tier.nbytes  # nothing of dead processes counts
        before_s3 = proxy.count()
        reader = open_reader(DataConfig.from_yaml(config))
        for (id_, role), expected in values.items():
            found, gridsize = reader.load(id_, role)  # type: ignore[arg-type]
            rounded = found.reshape(2, *gridsize)
            np.testing.assert_allclose(rounded, expected, rtol=1e-6)
            if role == "label":  # JSON has every bit
                np.testing.assert_array_equal(rounded, expected.astype(np.float32))
        assert proxy.count() == before_s3

    def test_after_kill_9_the_next_run_fetches_only_the_rest(
        self,
        config: Path,
        fault_proxy: FaultProxy,
        values: dict[tuple[str, str], NDArray[Any]],
    ) -> None:
        """All processes at once, while the server is silent about the last two materials."""
        fault_proxy.rules(Rule(op="GET", key=r"/mp-[45]\.", then="hang"))
        process = start("warm", config, "--workers", 2)
        try:
            end = time.monotonic() + 60
            fault_proxy.wait_in_flight(2)
            while len(list_entries(DataConfig.from_yaml(config))) < 2 * 2 * (self.PAIRS - 2):
                assert time.monotonic() < end, "the others were not stored"
                time.sleep(0.1)
        finally:
            _kill_all(process)
        self.goes_on(config, fault_proxy, values)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), 13])
    def test_a_file_that_was_being_stored_is_stored_by_the_next_run(
        self,
        config: Path,
        fault_proxy: FaultProxy,
        values: dict[tuple[str, str], NDArray[Any]],
        step: int,
    ) -> None:
        """Killed before a write into an entry of the array tier, whose file is there in part."""

        def warm() -> None:
            plan = plan_warm(DataConfig.from_yaml(config), workers=1)
            die_at_step(step, writes=True)
            plan.execute()

        child = get_context("fork").Process(target=warm)
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        root = next(config.parent.glob("cache/zarrcache-v1"))
        assert list(root.rglob(".*partial*")), "the step was not within a write"
        self.goes_on(config, fault_proxy, values)
