"""The command line of the benchmarks: ``python -m tests.bench [NAME ...]``, which ``tools/bench``
runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.bench import report
from tests.bench.harness import Context, Table

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "benchmarks"
ROUNDS, QUICK_ROUNDS = 15, 3

#: Name to the module whose ``run()`` it is; imported when it is asked for, because each brings
#: peers of its own along.
BENCHMARKS: dict[str, str] = {
    "warm": "tests.bench.warm_epochs",
    "rotated": "tests.bench.rotated",
    "probes": "tests.bench.probes",
    "memory": "tests.bench.memory",
    "checksum": "tests.bench.checksum",
    "processes": "tests.bench.processes",
    "startup": "tests.bench.startup",
    "cold": "tests.bench.cold_read",
    "epoch": "tests.bench.cold_epoch",
    "epochs": "tests.bench.epochs",
    "layouts": "tests.bench.layouts",
    "lookahead": "tests.bench.lookahead",
    "fill": "tests.bench.fill",
    "scale": "tests.bench.scale",
    "convert": "tests.bench.convert",
    "encodings": "tests.bench.encodings",
}
SEED = 20260


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for. 0: all ran; 1: some failed, with their traceback on standard error;
    2: usage.
    """
    options = _parse(arguments)
    if options.list:
        print("\n".join(BENCHMARKS))
        return 0
    if options.readme:
        report.write_readme(ROOT / "README.md", report.load(OUT / "results.json"))
        return 0
    names = options.names or list(BENCHMARKS)
    if len(names) > 1:
        # Each in a process of its own: forks, threads and clients of one must not be what the next
        # one starts from.
        failed = [
            name
            for name in names
            if subprocess.call([sys.executable, "-m", "tests.bench", name, *_flags(options)])
        ]
        if failed:
            print(f"Failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0
    return _one(names[0], options)


def _one(name: str, options: argparse.Namespace) -> int:
    start_s = time.perf_counter()
    tables = _run(
        name,
        options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        options.quick,
        options.workdir,
    )
    print(f"{name}: {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
    if tables is None:
        return 1
    document = report.document(
        tables, quick=options.quick, workdir=options.workdir or Path(tempfile.gettempdir())
    )
    print(report.markdown(document), flush=True)
    out = options.out or (None if options.quick else OUT)
    if out is not None:
        report.save(document, out)
    if out == OUT:
        report.write_readme(ROOT / "README.md", report.load(OUT / "results.json"))
    return 0


def _flags(options: argparse.Namespace) -> list[str]:
    given = {"--rounds": options.rounds, "--out": options.out, "--workdir": options.workdir}
    return [
        *(["--quick"] if options.quick else []),
        *(str(part) for pair in given.items() if pair[1] is not None for part in pair),
    ]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measure zarrcache against its peers, interleaved, and write the tables.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)} [default: all]"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smallest sizes, 3 rounds, nothing written unless --out is given: does everything "
        "run?",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"of each competitor [default: {ROUNDS}]"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results.json, tables and "
                                                                "plots; what other benchmarks left "
                                                                "there stays "
                        "[default: docs/benchmarks]")  # fmt: skip
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="for data and caches, on the disk to measure [default: the system's temporary one]",
    )
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="rewrite the table in README.md from docs/benchmarks/results.json; measure nothing",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(
            f"no benchmark {', '.join(map(repr, unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _run(name: str, rounds: int, quick: bool, parent: Path | None) -> list[Table] | None:
    """The tables of one benchmark; None if it failed: the others are worth having all the same."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    workdir = Path(tempfile.mkdtemp(prefix=f"zarrcache-bench-{name}-", dir=parent))
    try:
        tables: list[Table] = importlib.import_module(BENCHMARKS[name]).run(
            Context(rounds, quick, workdir, SEED)
        )
    except Exception:  # noqa: BLE001 - reported here, with its traceback, and in the exit code
        traceback.print_exc()
        return None
    finally:
        shutil.rmtree(workdir, ignore_errors=True)  # our own, made above
    return tables


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
