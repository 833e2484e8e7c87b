#!/usr/bin/env python3
"""In place of Slurm's ``srun`` and ``scontrol``, for tests: the job's nodes are this machine,
several times, each with a disk of its own.

As ``srun [--ntasks=N] [--ntasks-per-node=N] [--distribution=block] COMMAND...`` it starts the
command once a task with the variables that the real one sets, passes SIGTERM and SIGUSR1 on, and
ends with the largest exit code. What lies below ``SLURM_TMPDIR`` is elsewhere on each node.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    nodes = int(os.environ["SLURM_NNODES"])
    if Path(sys.argv[0]).name == "scontrol":
        print("\n".join(f"node{number}" for number in range(nodes)))
        return 0
    each = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    while arguments[0].startswith("--"):
        option, _, value = arguments.pop(0).partition("=")
        assert option in ("--ntasks", "--ntasks-per-node", "--distribution"), option
        each = int(value) if option == "--ntasks-per-node" else each
    tasks = []
    for rank in range(nodes * each):
        node, local = divmod(rank, each)
        disk = os.environ["SLURM_TMPDIR"]
        environment = {
            name: value.replace(f"{disk}/", f"{disk}/node{node}/")
            for name, value in os.environ.items()
        }
        variables = {
            "NODEID": node,
            "PROCID": rank,
            "LOCALID": local,
            "NTASKS": nodes * each,
            "STEP_ID": 0,
            "STEP_TASKS_PER_NODE": f"{each}(x{nodes})",
        }
        environment |= {f"SLURM_{name}": str(value) for name, value in variables.items()} | {
            "SLURMD_NODENAME": f"node{node}"
        }
        tasks.append(subprocess.Popen(arguments, env=environment))
    for passed_on in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(
            passed_on,
            lambda number, _: [task.send_signal(number) for task in tasks if task.poll() is None],
        )
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
