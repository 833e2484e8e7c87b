"""The place of a process in a job, from the variables of torchrun and Slurm."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from zarrcache.errors import ConfigError
from zarrcache.parallel.topology import World, node_name, sorted_nodes

#: Only processes that srun starts have it; a batch script has all the other variables.
STEP = {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        pytest.param({}, (0, 1, 0, 1, 0), id="nothing"),
        pytest.param(
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            (5, 8, 1, 2, 1),
            id="torchrun",
        ),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1, 1), id="set by hand"),
        pytest.param(
            {
                **STEP,
                "SLURM_PROCID": "9",
                "SLURM_NTASKS": "12",
                "SLURM_TASKS_PER_NODE": "4(x2),3,1",
                "SLURM_NODEID": "2",
            },
            (9, 12, 2, 4, 1),
            id="slurm",
        ),
        pytest.param(
            {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"},
            (0, 1, 0, 1, 0),
            id="a shell in a Slurm step",
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            (0, 1, 0, 1, 0),
            id="a batch script without srun",
        ),
        pytest.param(
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_WORLD_SIZE": "2",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
            },
            (3, 4, 1, 2, 1),
            id="torchrun in slurm",
        ),
    ],
)
def test_the_variables_say_where_a_process_is(
    environ: dict[str, str], place: tuple[int, ...]
) -> None:
    """``place``: rank, ranks, node, nodes, local rank."""
    world = World.of_environment(environ)
    assert (world.rank, world.ranks, world.node, world.nodes, world.local_rank) == place


def test_torch_takes_precedence_over_the_variables() -> None:
    """In one Slurm task, ``python train.py`` may start two processes by itself."""
    environ = {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}
    assert World.of_environment(environ, rank=1, ranks=2) == World(1, (0, 0))
    environ = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert World.of_environment(environ, rank=2, ranks=4) == World(2, (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: World(2, (0, 0)), "rank 2 is outside a job of 2"),
        (lambda: World(0, (1, 1)), "numbered from 0"),
        (lambda: World.even(0, 5, 2), "cannot be distributed evenly"),
        (lambda: World.of_environment({"RANK": "x", "WORLD_SIZE": "2"}), "RANK is 'x'"),
        (
            lambda: World.of_environment({"RANK": "0", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2"}),
            "nodes of unequal size",
        ),
        (
            lambda: World.of_environment(
                {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "two"}
            ),
            "8(x4) or 8,4",
        ),
        (
            lambda: World.of_environment(
                {
                    **STEP,
                    "SLURM_PROCID": "1",
                    "SLURM_NTASKS": "4",
                    "SLURM_TASKS_PER_NODE": "2(x2)",
                    "SLURM_NODEID": "1",
                }
            ),
            "--distribution=block",
        ),
    ],
)
def test_contradictions_are_refused(make: Any, words: str) -> None:
    """Ranks that disagree about their nodes would read samples twice, or never."""
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_nodes_are_sorted_as_slurm_numbers_them() -> None:
    """By numbers, not digits; with several racks, rack by rack."""
    assert sorted_nodes(["node10", "node2", "node1"]) == ["node1", "node2", "node10"]
    assert sorted_nodes(["r2n1", "r1n10", "r1n9", "login"]) == ["login", "r1n9", "r1n10", "r2n1"]


def test_the_name_of_a_node_is_slurms_or_the_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert node_name() == "node7"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert node_name() == socket.gethostname()
