"""What the machines of a cluster are called, and in which order they are counted."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable

__all__ = ["in_order", "node_name"]


def node_name() -> str:
    """Name of this machine: as Slurm calls it, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_order(names: Iterable[str]) -> list[str]:
    """``node2`` before ``node10``: the order in which Slurm numbers the nodes of a job."""
    return sorted(
        names,
        key=lambda name: [
            (text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)
        ],
    )
