"""The scripts of the guides on training run, with fewer and smaller data."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import DEADLINE_S, free_port, run_ranks
from tests.support.s3server import S3Server
from tests.support.stores import small_group

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("training.md", "samples.md", "large-data.md", "workers.md")
DOCUMENT = "".join((ROOT / "docs" / "guides" / page).read_text() for page in PAGES)
FILES = {
    m[2]: m[3]
    for m in re.finditer(r"^```(\w+) (\S+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
}
#: Text of the document, and what replaces it here: smaller sizes.
TOY = {
    'accelerator="gpu"': 'accelerator="cpu"',
    "accelerator: gpu": "accelerator: cpu",
    "devices=8, num_nodes=4": "devices=1, num_nodes=2",
    "devices=8": "devices=2",
    "devices: 8": "devices: 2",
    "max_epochs=50": "max_epochs=2",
    "max_epochs: 50": "max_epochs: 2",
    "EPOCHS = 50": "EPOCHS = 2",
    "train_workers=8": "train_workers=1",
    "train_workers: 8": "train_workers: 1",
    "val_workers=2": "val_workers=1",
    "val_workers: 2": "val_workers: 1",
    "num_workers=8": "num_workers=1",
    "every_n_train_steps=500": "every_n_train_steps=2",
    "every_n_train_steps: 500": "every_n_train_steps: 2",
    "batches % 500": "batches % 2",
}


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten small materials."""
    root, name = tmp_path_factory.mktemp("stores"), s3_server.new_bucket()
    for number in range(10):
        shape = (4, 3, 3 + number % 2)
        for role in ("input", "label"):
            small_group(root / role / f"mp-{number}.zarr", shape=shape, chunks=shape, seed=number)
    s3_server.put_tree(root, f"s3://{name}/densities")
    return name


@pytest.fixture
def home(bucket: str, tmp_path: Path) -> Path:
    """A user's directory, with the scripts at toy size."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "conf").mkdir()
    config = (ROOT / "configs" / "s3_cached.yaml").read_text()
    assert "map.json.gz" in config
    (tmp_path / "configs" / "s3_cached.yaml").write_text(
        config.replace("s3://my-bucket", f"s3://{bucket}").replace("map.json.gz", "map.json")
    )
    (tmp_path / "data" / "map.json").write_text(
        json.dumps({"GGA": [f"mp-{number}" for number in range(10)]})
    )
    for name, text in FILES.items():
        for large, small in TOY.items():
            text = text.replace(large, small)
        (tmp_path / name).write_text(text)
    return tmp_path


def environment(home: Path, server: S3Server) -> dict[str, str]:
    """Endpoint and cache directory."""
    return {
        "AWS_ACCESS_KEY_ID": server.key,
        "AWS_SECRET_ACCESS_KEY": server.secret,
        "AWS_ENDPOINT_URL_S3": server.endpoint_url,
        "ZARRCACHE_DIR": str(home / "cache"),
        "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }


def script(home: Path, name: str, arguments: list[str]) -> None:
    """``python NAME ARGUMENTS``, in a process that has imported Lightning."""
    os.chdir(home)
    sys.path.insert(0, str(home))
    sys.argv = [name, *arguments]
    runpy.run_path(str(home / name), run_name="__main__")


def start(home: Path, name: str, ranks: list[Mapping[str, str]], *arguments: str) -> None:
    """Run the script in each rank to its end."""
    run_ranks(
        script,
        (home, name, list(arguments)),
        ranks,
        [home / f"{name}.{rank}.log" for rank in range(len(ranks))],
    )


def torchrun(ranks: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each process of one node."""
    port = str(free_port())
    job = {
        "TORCHELASTIC_RUN_ID": "docs",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "GROUP_RANK": "0",
    }
    return [
        job
        | {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        for r in range(ranks)
    ]


def slurm(nodes: int) -> list[dict[str, str]]:
    """The variables that srun sets, one process per node."""
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(nodes),
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": str(nodes),
        "SLURM_TASKS_PER_NODE": f"1(x{nodes})",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        job | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
        for node in range(nodes)
    ]


def state_of(home: Path) -> tuple[str, int, list[Any]]:
    """The data state of the last checkpoint: how samples are assigned, the next epoch, and what was
    read of it.
    """
    state = torch.load(home / "checkpoints" / "last.ckpt", weights_only=False)["ZarrDataModule"]
    return state["assignment"], state["epoch"], state["history"]


def test_the_list_of_what_is_smaller_here_is_up_to_date() -> None:
    """And each script of the document is run below."""
    assert {large for large in TOY if not any(large in text for text in FILES.values())} == set()
    assert set(FILES) == {
        "model.py", "train.py", "train_node.py", "train_slurm.py",
        "conf/train.yaml", "train_hydra.py", "train_plain.py", "look_ahead.py", "transform.py",
    }  # fmt: skip


def test_one_gpu(home: Path, s3_server: S3Server) -> None:
    """Two epochs."""
    start(home, "train.py", [environment(home, s3_server)])
    assert state_of(home) == ("global", 2, [])


def test_one_node_with_several_gpus(home: Path, s3_server: S3Server) -> None:
    """As torchrun starts it."""
    start(home, "train_node.py", [environment(home, s3_server) | rank for rank in torchrun(2)])
    assert state_of(home) == ("global", 2, [])


def test_several_nodes_under_slurm(home: Path, s3_server: S3Server) -> None:
    """Each process finds its rank and node, and each node has its own share."""
    ranks = [
        environment(home, s3_server) | rank | {"ZARRCACHE_DIR": f"{home}/node{node}"}
        for node, rank in enumerate(slurm(2))
    ]
    start(home, "train_slurm.py", ranks)
    assert state_of(home) == ("node", 2, [])


def test_hydra(home: Path, s3_server: S3Server) -> None:
    """With keys changed on the command line."""
    pytest.importorskip("hydra", reason="needs the extra 'test'")
    start(
        home,
        "train_hydra.py",
        [environment(home, s3_server) | rank for rank in torchrun(2)],
        "data.batch_size=2",
        "data.assignment=node",
    )
    assert state_of(home) == ("node", 2, [])


def test_without_lightning(home: Path, s3_server: S3Server) -> None:
    """With two ranks; one of them restarts and finds the epochs done."""
    start(home, "train_plain.py", [environment(home, s3_server) | rank for rank in torchrun(2)])
    state = torch.load(home / "checkpoints" / "plain.pt", weights_only=True)["sampler"]
    assert (state["epoch"], state["history"]) == (2, [])
    start(home, "train_plain.py", [environment(home, s3_server) | rank for rank in torchrun(1)])


def test_transform(home: Path, s3_server: S3Server) -> None:
    start(home, "transform.py", [environment(home, s3_server)])


def test_look_ahead(home: Path, s3_server: S3Server) -> None:
    """As a script: the process that look-ahead starts must not run the script again."""
    done = subprocess.run(
        [sys.executable, "look_ahead.py"],
        cwd=home,
        env={**os.environ, **environment(home, s3_server)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["python", "train_node.py"], ["torchrun", "--nproc-per-node=2", "train_node.py"]],
    ids=["python", "torchrun"],
)
def test_the_commands_themselves(home: Path, s3_server: S3Server, command: list[str]) -> None:
    """Lightning and torchrun start the processes; each imports everything, which is slow."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    begun = time.time()
    done = subprocess.run(
        command,
        cwd=home,
        env={**os.environ, **environment(home, s3_server), "PATH": path},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (home / "checkpoints" / "last.ckpt").stat().st_mtime >= begun - 1
    assert "Starting with 2 processes" in done.stdout + done.stderr
