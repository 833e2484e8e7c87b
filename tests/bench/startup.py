"""I1: what importing the package and the command line's help cost, as whole processes."""

from __future__ import annotations

import functools
import subprocess
import sys
import time

from tests.bench.harness import Bar, Context, Measured, Table, interleave

__all__ = ["run"]

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import zarr": ["-c", "import zarr"],
    "import zarrcache": ["-c", "import zarrcache"],
    "zarrcache --help": ["-m", "zarrcache", "--help"],
}


def run(context: Context) -> list[Table]:
    """Each from the start of the process to its end."""
    rounds = interleave(
        {name: functools.partial(_process, arguments) for name, arguments in COMMANDS.items()},
        context.rounds,
        warmup=2,
    )
    return [
        Table(
            "I1",
            "starting Python, importing, asking for help",
            "ms",
            "python -c pass",
            rounds,
            {
                "page cache": "warm",
                "bytecode": "compiled in the warm-up rounds",
                "measured": "from the start of the process to its end",
            },
            [
                Bar("import zarrcache", None, at_most=0.3),
                Bar("zarrcache --help", None, at_most=0.5),
            ],
        )
    ]


def _process(arguments: list[str]) -> Measured:
    start_s = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    return Measured(time.perf_counter() - start_s)
