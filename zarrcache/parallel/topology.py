"""Which process of a distributed job this is, and which processes share its node: from the
variables of torchrun or Slurm.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from zarrcache.errors import ConfigError

__all__ = ["World"]

_SLURM_GROUP = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


@dataclass(frozen=True, slots=True)
class World:
    """A process of a job, and where all of them run.

    Attributes
    ----------
    rank : int
        Of this process, from 0.
    node_of_rank : tuple of int
        The node of each rank; nodes are numbered from 0.

    Raises
    ------
    ConfigError
        The rank is none of the job's, or the nodes are not numbered from 0 without a gap.
    """

    rank: int = 0
    node_of_rank: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < len(self.node_of_rank):
            raise ConfigError(
                f"rank {self.rank} of a job of {len(self.node_of_rank)} processes: ranks count "
                "from 0."
            )
        if set(self.node_of_rank) != set(range(self.nodes)):
            raise ConfigError(
                f"the nodes of the ranks are {self.node_of_rank}; they have to be numbered from 0, "
                "each with a rank."
            )

    @property
    def ranks(self) -> int:
        """Processes of the job."""
        return len(self.node_of_rank)

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return max(self.node_of_rank) + 1

    @property
    def node(self) -> int:
        """Number of this node."""
        return self.node_of_rank[self.rank]

    @property
    def local_rank(self) -> int:
        """Place of this process among those of its node."""
        return self.node_of_rank[: self.rank].count(self.node)

    @property
    def local_ranks(self) -> int:
        """Processes on this node."""
        return self.node_of_rank.count(self.node)

    @classmethod
    def even(cls, rank: int, ranks: int, nodes: int = 1) -> World:
        """As many processes on each node, numbered node by node, which is how torchrun and
        Lightning start them.

        Raises
        ------
        ConfigError
            The processes cannot be shared out evenly.
        """
        if nodes < 1 or ranks < 1 or ranks % nodes:
            raise ConfigError(
                f"{ranks} processes cannot be shared out evenly over {nodes} nodes. Give a World "
                "with the node of each rank."
            )
        return cls(rank, tuple(number // (ranks // nodes) for number in range(ranks)))

    @classmethod
    def here(cls) -> World:
        """Where this process is: by torch.distributed, where it is in use, and the variables of
        torchrun or Slurm.
        """
        torch = sys.modules.get("torch")  # whoever uses torch.distributed has imported it
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
        """What torchrun (``RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``) or Slurm
        (``SLURM_PROCID``, ``SLURM_TASKS_PER_NODE``) say.

        Without either it is one process on one node.

        Parameters
        ----------
        environ : mapping
            ``os.environ``.
        rank, ranks : int, optional
            As torch.distributed has them; they are right where the variables are not. If the
            variables are of another number of processes (``python train.py`` within a Slurm job),
            all are taken to be on this node.

        Raises
        ------
        ConfigError
            A variable is no number, or they contradict each other.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            found = cls._of_torchrun(environ)
        elif (
            "SLURM_STEP_ID" in environ
            and "SLURM_PROCID" in environ
            and "SLURM_NTASKS" in environ
            and not _is_shell(environ)
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
                f"WORLD_SIZE is {ranks} and LOCAL_WORLD_SIZE {local}: nodes of unequal size. Give "
                "NodeSampler a World."
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
                    f"SLURM_TASKS_PER_NODE is {text!r}; it has to look like 8(x4) or 8,4."
                )
            counts += [int(match[1])] * int(match[2] or 1)
        world = cls(rank, tuple(node for node, count in enumerate(counts) for _ in range(count)))
        node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else world.node
        if world.ranks != ranks or world.node != node:
            # srun --distribution=cyclic deals the ranks out; nothing in one process's variables
            # says which rank is where.
            raise ConfigError(
                f"Slurm says that process {rank} of {ranks} is on node {node}, and {text} "
                "processes a node. Start the job with "
                "srun --distribution=block, or give NodeSampler a World."
            )
        return world


def _is_shell(environ: Mapping[str, str]) -> bool:
    # `srun --pty bash` is a step of its own, in which a training is one process. A batch script
    # outside of srun is none: no SLURM_STEP_ID.
    return environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is {environ[name]!r}; it has to be a number."
        ) from None
