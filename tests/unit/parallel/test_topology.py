"""Which process is where, by what torchrun and Slurm say."""

from __future__ import annotations

from typing import Any

import pytest

from zarrcache.errors import ConfigError
from zarrcache.parallel.topology import World

#: Of what srun starts; a batch script itself has all the others.
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
        pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, 1, 1), id="by hand"),
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
            id="a shell of slurm's",
        ),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
            (0, 1, 0, 1, 0),
            id="a batch script of slurm's, without srun",
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
    """Rank, ranks, node, nodes, place on the node."""
    world = World.of_environment(environ)
    assert (world.rank, world.ranks, world.node, world.nodes, world.local_rank) == place


def test_torch_is_right_where_the_variables_are_not() -> None:
    """``python train.py`` of one task of Slurm starts two processes by itself."""
    environ = {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}
    assert World.of_environment(environ, rank=1, ranks=2) == World(1, (0, 0))
    environ = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert World.of_environment(environ, rank=2, ranks=4) == World(2, (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: World(2, (0, 0)), "rank 2 of a job of 2"),
        (lambda: World(0, (1, 1)), "numbered from 0"),
        (lambda: World.even(0, 5, 2), "cannot be shared out evenly"),
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
def test_what_contradicts_itself_is_refused(make: Any, words: str) -> None:
    """Two ranks that believe in different nodes would read samples twice, or never."""
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()
