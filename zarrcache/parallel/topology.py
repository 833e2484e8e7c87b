"""The place of this process in a distributed job: its rank, its node, and the ranks of each node.

Taken from the environment variables of torchrun or Slurm.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zarrcache._units import counted
from zarrcache.errors import ConfigError

__all__ = ["World", "each_node_world", "node_name", "sorted_nodes"]

_SLURM_GROUP = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a job, the node of each, and which of them this process is.

    Attributes
    ----------
    rank : int
        Rank of this process, from 0.
    node_of_rank : tuple of int
        The node of each rank; nodes are numbered from 0.

    Raises
    ------
    ConfigError
        The rank is outside the job, or the nodes are not numbered from 0 without a gap.
    """

    rank: int = 0
    node_of_rank: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < len(self.node_of_rank):
            raise ConfigError(
                f"rank {self.rank} is outside a job of "
                f"{counted(len(self.node_of_rank), 'process', 'processes')}: ranks go from 0 to "
                f"{len(self.node_of_rank) - 1}."
            )
        if {*self.node_of_rank} != {*range(len({*self.node_of_rank}))}:
            raise ConfigError(
                f"the nodes of the ranks are {self.node_of_rank}; nodes have to be numbered from "
                "0 without a gap."
            )

    @property
    def ranks(self) -> int:
        """Number of processes of the job."""
        return len(self.node_of_rank)

    @property
    def nodes(self) -> int:
        """Number of nodes of the job."""
        return max(self.node_of_rank) + 1

    @property
    def node(self) -> int:
        """Number of this node."""
        return self.node_of_rank[self.rank]

    @property
    def local_rank(self) -> int:
        """Position of this process among those of its node, from 0."""
        return self.node_of_rank[: self.rank].count(self.node)

    @property
    def local_ranks(self) -> int:
        """Number of processes on this node."""
        return self.node_of_rank.count(self.node)

    @classmethod
    def even(cls, rank: int, ranks: int, nodes: int = 1) -> World:
        """The same number of processes per node, numbered node by node, as torchrun does.

        Raises
        ------
        ConfigError
            ``ranks`` is not a multiple of ``nodes``.
        """
        if nodes < 1 or ranks < 1 or ranks % nodes:
            raise ConfigError(
                f"{ranks} processes cannot be distributed evenly over {nodes} nodes. Pass a World "
                "with the node of each rank."
            )
        return cls(rank, tuple(number // (ranks // nodes) for number in range(ranks)))

    @classmethod
    def here(cls) -> World:
        """The place of this process.

        Taken from torch.distributed if it is initialized, and from the variables of torchrun or
        Slurm.
        """
        torch = sys.modules.get("torch")  # imported already if torch.distributed is in use
        if (
            torch is not None
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            return cls.of_environment(
                os.environ,
                rank=torch.distributed.get_rank(),
                ranks=torch.distributed.get_world_size(),
            )
        return cls.of_environment(os.environ)

    @classmethod
    def of_environment(
        cls, environ: Mapping[str, str], *, rank: int | None = None, ranks: int | None = None
    ) -> World:
        """The place of this process from the variables of torchrun or Slurm.

        torchrun sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_WORLD_SIZE``; Slurm sets ``SLURM_PROCID``
        and ``SLURM_TASKS_PER_NODE``. Without them it is one process on one node.

        Parameters
        ----------
        environ : mapping
            ``os.environ``.
        rank, ranks : int, optional
            From torch.distributed; they take precedence over the variables. If the variables
            describe another number of processes (``python train.py`` within a Slurm job), all
            ranks are taken to be on this node.

        Raises
        ------
        ConfigError
            A variable is not a number, or the variables contradict each other.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            found = cls._of_torchrun(environ)
        elif (
            {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"} <= environ.keys()
            # In `srun --pty bash`, a training script is one process although Slurm's variables
            # describe the whole step.
            and environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
        ):
            found = cls._of_slurm(environ)
        else:
            found = cls()
        if ranks is not None and rank is not None:
            nodes = found.node_of_rank if found.ranks == ranks else (0,) * ranks
            return cls(rank, nodes)
        return found

    @classmethod
    def _of_torchrun(cls, environ: Mapping[str, str]) -> World:
        ranks = _number(environ, "WORLD_SIZE")
        local = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else ranks
        if local < 1 or ranks % local:
            raise ConfigError(
                f"WORLD_SIZE is {ranks}, not a multiple of LOCAL_WORLD_SIZE ({local}): nodes of "
                "unequal size. Pass a World to NodeSampler."
            )
        return cls.even(_number(environ, "RANK"), ranks, ranks // local)

    @classmethod
    def _of_slurm(cls, environ: Mapping[str, str]) -> World:
        rank, ranks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
        text = (
            environ.get("SLURM_STEP_TASKS_PER_NODE")
            or environ.get("SLURM_TASKS_PER_NODE")
            or str(ranks)
        )
        counts: list[int] = []
        for part in text.split(","):
            match = _SLURM_GROUP.fullmatch(part.strip())
            if match is None:
                raise ConfigError(
                    f"SLURM_TASKS_PER_NODE is {text!r}; expected a form like 8(x4) or 8,4."
                )
            counts += [int(match[1])] * int(match[2] or 1)
        world = cls(rank, tuple(node for node, count in enumerate(counts) for _ in range(count)))
        node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else world.node
        if world.ranks != ranks or world.node != node:
            # With srun --distribution=cyclic, the variables of one process do not say on which
            # node the other ranks are.
            raise ConfigError(
                f"Slurm reports process {rank} of {ranks} on node {node}, which does not fit "
                f"{text} processes per node. Start the job with srun --distribution=block, or pass "
                "a World to NodeSampler."
            )
        return world


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is {environ[name]!r}; expected a number."
        ) from None


def each_node_world() -> World:
    """The place of this process among those that ``srun`` or ``torchrun`` started on every node.

    Raises
    ------
    ConfigError
        Neither of them started this process, so it does not run on the other nodes.
    """
    # A batch script outside srun has Slurm's other variables as well. It would run as node 0 only,
    # and the caches of the other nodes would stay cold.
    if not ("SLURM_STEP_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()):
        raise ConfigError(
            "--each-node has to be started on every node: `srun --ntasks-per-node=1 zarrcache warm "
            "CONFIG --each-node` does that in a Slurm job, and --dask SCHEDULER over a Dask "
            "cluster."
        )
    return World.of_environment(os.environ)


def node_name() -> str:
    """Name of this machine: Slurm's name if there is one, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def sorted_nodes(names: Iterable[str]) -> list[str]:
    """Names in the order in which Slurm numbers the nodes of a job: ``node2`` before ``node10``."""
    return sorted(
        names,
        key=lambda name: [
            (text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)
        ],
    )
