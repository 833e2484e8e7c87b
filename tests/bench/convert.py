"""B1 and B2: reading densities with all checks beside pymatgen's parser, and converting many.

The files are laid out as VASP writes them: ``E17.11``, five numbers in a line; no occupancies.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.harness import Bar, Context, Measured, Table, cores, interleave
from zarrcache.convert import read_density

__all__ = ["run"]

OURS, PYMATGEN, MONTY = "zarrcache read_density", "pymatgen parse_file", "monty loadfn"
_SCRIPT = """
import sys
from pathlib import Path
import numpy as np, zarr
from pymatgen.io.vasp.outputs import Chgcar
for path in sorted(Path(sys.argv[1]).glob("*.CHGCAR")):
    chgcar = Chgcar.from_file(str(path))
    group = zarr.create_group(f"{sys.argv[2]}/{path.stem}.zarr", zarr_format=2)
    group.attrs["structure"] = chgcar.structure.to_json()
    values = chgcar.data["total"].astype("f4")
    group.create_array("charge_density_total", data=values, chunks=(16,) * 3)
"""


def run(context: Context) -> list[Table]:
    """The time of reading a file in each form, and of whole commands over many files."""
    side, count = (32, 4) if context.quick else (108, 100)
    forms = _write_forms(context.workdir / "forms", side, context.seed)
    return [
        *(_reading(context, name, title, path, side) for name, title, path in forms),
        _converting(context, forms[0][2], side, count),
    ]


def _reading(context: Context, name: str, title: str, path: Path, side: int) -> Table:
    from monty.serialization import loadfn
    from pymatgen.io.vasp.outputs import VolumetricData

    peer, parse = (
        (MONTY, functools.partial(loadfn, path))
        if ".json" in path.name
        else (PYMATGEN, functools.partial(VolumetricData.parse_file, str(path)))
    )
    competitors = {peer: parse, OURS: functools.partial(read_density, path)}
    return Table(
        name,
        f"reading {title} of {side}³ points, every number counted",
        "ms",
        peer,
        interleave(
            {key: functools.partial(_timed, read) for key, read in competitors.items()},
            context.rounds,
        ),
        {
            "file": f"{path.stat().st_size:,} bytes, in the page cache",
            "result": f"{peer}: float64; zarrcache: checked, float32, with the structure",
        },
        [Bar(OURS, peer, at_most=1.3)],
    )


def _converting(context: Context, source: Path, side: int, count: int) -> Table:
    files = context.workdir / "files"
    files.mkdir()
    for number in range(count):
        os.link(source, files / f"mp-{number}.CHGCAR")
    out = context.workdir / "out"
    convert = ["-m", "zarrcache", "convert", files, out]
    competitors = {
        "pymatgen and zarr, 16³ chunks, one process": ["-c", _SCRIPT, files, out],
        "zarrcache convert --chunks 16": [*convert, "--chunks", "16"],
        "zarrcache convert": convert,
    }
    reference, _, ours = competitors
    return Table(
        "B2",
        f"converting {count} CHGCAR files of {side}³ points, whole commands",
        "files/s",
        reference,
        interleave(
            {
                name: functools.partial(_command, arguments, out, count)
                for name, arguments in competitors.items()
            },
            min(context.rounds, 3),
        ),
        {
            "files": f"{count} links to one of {source.stat().st_size:,} bytes",
            "processes": f"zarrcache: its default on {cores()} cores",
            "durable": "zarrcache: each store is synced to the disk; the script: not",
        },
        [Bar(ours, reference, at_least=3.0)],
    )


def _timed(read: Callable[[], Any]) -> Measured:
    cpu_s, start_s = time.process_time(), time.perf_counter()
    read()
    seconds = time.perf_counter() - start_s
    return Measured(seconds, extra={"cpu_ms": 1e3 * (time.process_time() - cpu_s)})


def _command(arguments: list[Any], out: Path, count: int) -> Measured:
    shutil.rmtree(out, ignore_errors=True)
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=1800,
        check=True,
    )
    seconds, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, count, extra={"cpu_ms": 1e3 * cpu_s / count})


def _write_forms(home: Path, side: int, seed: int) -> list[tuple[str, str, Path]]:
    home.mkdir()
    rng = np.random.default_rng(seed)
    values = rng.gamma(0.5, 16.0, side**3)
    values *= 8 / values.mean()
    text = _HEAD + f"  {side}  {side}  {side}\n" + _columns(values)
    plain, packed = home / "mp-1.CHGCAR", home / "mp-2.CHGCAR.gz"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode(), 6))
    from pymatgen.io.vasp.outputs import Chgcar

    document = home / "mp-3.json.gz"
    chgcar = Chgcar.from_file(str(plain)).as_dict()
    document.write_bytes(
        gzip.compress(json.dumps({"data": chgcar, "task_id": "mp-3"}, default=_plain).encode(), 6)
    )
    return [
        ("B1", "a CHGCAR", plain),
        ("B1-gz", "a CHGCAR.gz", packed),
        ("B1-json", "a json.gz of the Materials Project", document),
    ]


_HEAD = """two atoms of silicon
   1.00000000000000
     0.000000    2.700000    2.700000
     2.700000    0.000000    2.700000
     2.700000    2.700000    0.000000
   Si
     2
Direct
  0.000000  0.000000  0.000000
  0.250000  0.250000  0.250000

"""


def _columns(values: np.ndarray) -> str:
    words = []
    for value in values.tolist():
        mantissa, exponent = f"{value:.10E}".split("E")
        words.append(f" 0.{mantissa[0]}{mantissa[2:]}E{int(exponent) + 1:+03d}")
    return "".join("".join(words[first : first + 5]) + "\n" for first in range(0, len(words), 5))


def _plain(value: Any) -> Any:
    return value.tolist()
