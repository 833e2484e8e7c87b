"""Which machine of a job this is: its name, and its place among the others as Slurm counts them."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from zarrcache.errors import ConfigError

__all__ = ["Place", "in_order", "node_name", "place_in_job_step"]


@dataclass(frozen=True)
class Place:
    """A node among those of a job step.

    Attributes
    ----------
    number, count : int
        From 0; of so many.
    is_first_here : bool
        This process is the first of the step's on its node.
    """

    number: int
    count: int
    is_first_here: bool = True


def node_name() -> str:
    """Name of this machine: as Slurm calls it, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_order(names: Iterable[str]) -> list[str]:
    """``node2`` before ``node10``: the order in which Slurm numbers the nodes of a job."""
    return sorted(names, key=lambda name: [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)])


def place_in_job_step() -> Place:
    """Where this process is among those that ``srun`` started, by the variables that it sets.

    Raises
    ------
    ConfigError
        ``srun`` did not start this process; then nobody starts it on the other nodes.
    """
    number, count = os.environ.get("SLURM_NODEID"), os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    # In a batch script, outside of srun, Slurm sets the first two as well: node 0 of so many, and the others would stay cold.
    is_step = "SLURM_STEP_ID" in os.environ or "SLURM_STEP_NUM_NODES" in os.environ or count == "1"
    try:
        if number is None or count is None or not is_step:
            raise KeyError("no srun")
        place = Place(int(number), int(count), os.environ.get("SLURM_LOCALID", "0") == "0")
        if not 0 <= place.number < place.count:
            raise ValueError(f"node {place.number} of {place.count}")
    except (KeyError, ValueError) as exc:
        raise ConfigError(
            "--each-node has to be started on every node: by `srun --ntasks-per-node=1 zarrcache warm ...` in a Slurm job (SLURM_NODEID and "
            f"SLURM_NNODES say which node this is; {exc}), or by --dask SCHEDULER over a Dask cluster."
        ) from exc
    return place
