"""``configs/slurm``: the scripts as users submit them, with real commands and stores and a fake
``srun``.
"""

from __future__ import annotations

import contextlib
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.chgcars import SMALL
from tests.support.training import write_config, write_pairs, zarrcache
from zarrcache import DataConfig
from zarrcache.data.reader import open_reader
from zarrcache.train.schedule import node_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"
EXAMPLE = ROOT / "configs" / "slurm" / "dask_convert.py"
HANG_S = 120.0

#: Reads everything, writes down its misses, saves on SIGUSR1 and goes on, as Lightning does, saves
#: on SIGTERM, and exits with the given code.
TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
from zarrcache import DataConfig
from zarrcache.registry import open_reader

out, code = Path(sys.argv[2]), int(sys.argv[3])
reader = open_reader(DataConfig.from_yaml(sys.argv[1]))
for task_id in reader.task_ids:
    reader.load(task_id, "data"), reader.load(task_id, "label")

def save(number, _):
    (out / f"saved-{signal.Signals(number).name}-{os.environ['SLURM_PROCID']}").touch()
    if number == signal.SIGTERM:
        sys.exit(code)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
directory, master = str(reader.cache.config.dir), os.environ["MASTER_ADDR"]
notes = {"misses": reader.stats.misses, "dir": directory, "master": master}
(out / f".{os.environ['SLURM_PROCID']}").write_text(json.dumps(notes))
(out / f".{os.environ['SLURM_PROCID']}").rename(out / f"rank-{os.environ['SLURM_PROCID']}.json")
time.sleep(int(sys.argv[4]))
sys.exit(code)
"""


class Job:
    """The environment of a job on two nodes: ``srun`` and ``scontrol`` on the path, a scratch
    directory, a training config, a training script.
    """

    def __init__(self, directory: Path) -> None:
        self.scratch, self.out, self.training = (
            directory / "scratch",
            directory / "out",
            directory / "train.py",
        )
        self.out.mkdir()
        for number in range(2):
            (self.scratch / f"node{number}").mkdir(parents=True)
        commands = directory / "bin"
        commands.mkdir()
        for name in ("srun", "scontrol"):
            shutil.copy(ROOT / "tests" / "support" / "srun.py", commands / name)
            (commands / name).chmod(0o755)
        (commands / "zarrcache").write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -m zarrcache "$@"\n'
        )
        (commands / "zarrcache").chmod(0o755)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join(
                [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "SLURM_JOB_ID": "4711",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_TMPDIR": str(self.scratch),
        }
        write_pairs(directory, 5)
        self.config = write_config(directory)
        self.training.write_text(TRAINING)

    def submit(self, *command: object) -> subprocess.Popen[str]:
        """Start the batch script in its own session."""
        return subprocess.Popen(
            ["bash", SCRIPT, *map(str, command)],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def train(self, code: int, seconds: int) -> subprocess.Popen[str]:
        """The training script."""
        return self.submit(
            self.config, sys.executable, self.training, self.config, self.out, code, seconds
        )

    def notes(self) -> list[dict[str, Any]]:
        """What each rank wrote, in the order of ranks."""
        return [json.loads(path.read_text()) for path in sorted(self.out.glob("rank-*.json"))]

    def left(self) -> list[Path]:
        """Files left on the disks of the nodes."""
        return [path for node in self.scratch.iterdir() for path in node.iterdir()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_shellcheck_accepts_the_scripts() -> None:
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not there; the extra 'test' brings it")
    done = subprocess.run(
        [shellcheck, "--severity=style", SCRIPT], capture_output=True, text=True, timeout=HANG_S
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_a_job_warms_every_node_trains_and_leaves_no_files(job: Job) -> None:
    """The exit code is that of the training, which makes no request."""
    out, err = (process := job.train(7, 0)).communicate(timeout=HANG_S)
    assert process.returncode == 7, err
    for node in ("node0", "node1"):
        assert f"{node}: Warmed 5 of 5 ids (" in out
    expected = [
        {"misses": 0, "dir": f"{job.scratch}/node{number}/zarrcache-4711", "master": "node0"}
        for number in range(2)
    ]
    assert job.notes() == expected
    assert out.count("Evicted 12 entries") == 2
    assert job.left() == []


def test_signals_reach_the_training_and_the_caches_are_removed(job: Job) -> None:
    """Slurm sends them to the batch script alone: SIGUSR1 before the time limit, then SIGTERM."""
    process = job.train(143, 300)

    def wait_for(pattern: str) -> None:
        deadline = time.monotonic() + HANG_S
        while len(list(job.out.glob(pattern))) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    try:
        wait_for("rank-*.json")
        process.send_signal(signal.SIGUSR1)
        wait_for("saved-SIGUSR1-*")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=HANG_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, err
    assert len(list(job.out.glob("saved-SIGTERM-*"))) == 2
    assert out.count("Evicted 12 entries") == 2
    assert job.left() == []


def test_a_wrong_config_or_command_line_ends_the_job_before_the_training(job: Job) -> None:
    out, err = (
        process := job.submit(job.out / "no.yaml", "touch", job.out / "trained")
    ).communicate(timeout=HANG_S)
    assert process.returncode == 2
    assert "no.yaml cannot be read" in err
    assert list(job.out.iterdir()) == []
    out, err = (process := job.submit(job.config)).communicate(timeout=HANG_S)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("usage: sbatch ")


def in_step(node: int, **more: str) -> Mapping[str, str]:
    """Environment of one task of ``srun --ntasks-per-node=1`` on three nodes."""
    variables = {
        "NODEID": str(node),
        "PROCID": str(node),
        "LOCALID": "0",
        "NTASKS": "3",
        "STEP_ID": "0",
        "STEP_TASKS_PER_NODE": "1(x3)",
    }
    return {f"SLURM_{name}": value for name, value in {**variables, **more}.items()} | {
        "SLURMD_NODENAME": f"node{node}"
    }


def test_under_srun_one_process_per_node_warms_its_share(tmp_path: Path) -> None:
    """The share of the training set and of the test set, as NodeSampler assigns them."""
    write_pairs(tmp_path, 9)
    config = write_config(tmp_path)
    done = zarrcache(
        "warm", config, "--each-node", "--assignment", "node", "--json", env=dict(in_step(1))
    )
    assert done.code == 0, done.err
    reader = open_reader(DataConfig.from_yaml(config))
    parts = reader.split_task_ids()
    owned = {
        task_id
        for part in parts
        for task_id, node in zip(part, node_of(part, 3), strict=True)
        if node == 1
    }
    assert 0 < len(owned) < 9
    assert [set(ids) for ids in reader.stored().values()] == [owned, owned]
    (of_node,) = done.document["nodes"]
    assert (of_node["node"], of_node["warm"], of_node["ids"]) == ("node1", len(owned), len(owned))
    second = zarrcache(
        "warm",
        config,
        "--each-node",
        env=dict(in_step(1, PROCID="3", LOCALID="1", NTASKS="6", STEP_TASKS_PER_NODE="2(x3)")),
    )
    assert (second.code, second.out, second.err) == (
        0,
        "",
        "node1: left to the first process of this node.\n",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--each-node",),
            (
                "--each-node has to be started on every node: `srun --ntasks-per-node=1 zarrcache "
                "warm "
                "CONFIG --each-node`"
            ),
        ),
        (
            ("--assignment", "node"),
            "--assignment is only for several nodes. Add --each-node.",
        ),
    ],
)
def test_options_that_would_warm_one_node_of_many_are_refused(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    """In a batch script outside of srun, Slurm's variables are those of node 0."""
    config = write_config(tmp_path)
    done = zarrcache(
        "warm",
        config,
        *options,
        env={"SLURM_NODEID": "0", "SLURM_NNODES": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
    )
    assert done.code == 2
    assert words in done.err


def test_the_dask_jobqueue_example_has_help_without_the_library(tmp_path: Path) -> None:
    py_compile.compile(str(EXAMPLE), str(tmp_path / "example.pyc"), doraise=True)
    done = subprocess.run(
        [sys.executable, "-S", EXAMPLE, "--help"], capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr
    assert "--jobs" in done.stdout


@pytest.mark.slow
def test_the_dask_jobqueue_example_converts(tmp_path: Path) -> None:
    """With local processes instead of Slurm jobs; a second run has nothing to do."""
    from zarrcache.demo.synthetic import write_pairs as write_densities

    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    write_densities(tmp_path / "pairs", 3, seed=SMALL)
    (tmp_path / "dask_jobqueue.py").write_text(
        "from distributed import LocalCluster\n"
        "class SLURMCluster(LocalCluster):\n"
        "    def __init__(self, cores, processes, memory, walltime, queue):\n"
        "        super().__init__(n_workers=0, threads_per_worker=1, dashboard_address=':0')\n"
        "    def adapt(self, maximum_jobs):\n"
        "        return super().adapt(maximum=maximum_jobs)\n"
    )
    command = [
        sys.executable,
        EXAMPLE,
        tmp_path / "pairs" / "label",
        tmp_path / "out",
        "--jobs",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "converted 3, failed 0, skipped 0"
    assert len(list((tmp_path / "out").iterdir())) == 3
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert "0 files to convert, 3 are converted already" in done.stderr
