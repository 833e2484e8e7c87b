"""Small data sets with a training config, and the command line in its own process, as users run
it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray

from tests.support.forkserver import ForkServer
from tests.support.stores import small_group

__all__ = ["Run", "command", "start", "write_config", "write_pairs", "zarrcache"]


@dataclass(frozen=True)
class Run:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.out)


def command(*args: object) -> list[str]:
    """``zarrcache ARGS`` for ``subprocess``."""
    return [sys.executable, "-m", "zarrcache", *map(str, args)]


def zarrcache(*args: object, answer: str | None = None, env: dict[str, str] | None = None) -> Run:
    """Run ``zarrcache ARGS`` to its end, in a process of its own. Stdin is no terminal; ``answer``
    is what can be read from it.
    """
    with tempfile.TemporaryDirectory() as directory:
        files = stdin, out, err = [Path(directory, name) for name in ("in", "out", "err")]
        for file in files:
            file.touch()
        stdin.write_text(answer or "")
        environment = {**os.environ, "COLUMNS": "200", **(env or {})}
        code = _fork_server(os.getpid()).run([*map(str, args)], environment, *files)
        return Run(code, out.read_text(), err.read_text())


@functools.cache
def _fork_server(pid: int) -> ForkServer:
    server = ForkServer()
    atexit.register(server.close)
    return server


def start(*args: object) -> subprocess.Popen[str]:
    """Start ``zarrcache ARGS`` in its own session, so that a signal reaches only its processes."""
    return subprocess.Popen(
        command(*args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def write_pairs(directory: Path, count: int, **layout: Any) -> dict[tuple[str, str], NDArray[Any]]:
    """Stores ``data/mp-N.zarr`` and ``label/mp-N.zarr`` and ``map.json``, which has one more id,
    ``mp-absent``; what is in them.
    """
    values = {}
    for role in ("data", "label"):
        for number in range(count):
            seed = number + (1000 if role == "label" else 0)
            arrays = small_group(
                directory / role / f"mp-{number}.zarr", seed=seed, **{"shape": (6, 5, 4), **layout}
            )
            values[f"mp-{number}", role] = arrays["charge_density_total"]
    (directory / "map.json").write_text(
        json.dumps({"GGA": [*(f"mp-{n}" for n in range(count)), "mp-absent"]})
    )
    return values


def write_config(
    directory: Path,
    root: object = None,
    *,
    s3_kwargs: dict[str, Any] | None = None,
    name: str = "train.yaml",
    **cache: Any,
) -> Path:
    """A training config over the stores below ``root`` (default: ``directory``) with a cache in
    ``directory/cache``.
    """
    root = directory if root is None else root
    document = {
        "data_dir": f"{root}/data",
        "label_dir": f"{root}/label",
        "map_dir": str(directory / "map.json"),
        "functional": "GGA",
        "train_fraction": 0.5,
        "s3_kwargs": s3_kwargs,
        "model": {"a key of": "the users' own"},
        "cache": {"dir": str(directory / "cache"), "limit": "1 GiB", "min_free": 0, **cache},
    }
    path = directory / name
    path.write_text(yaml.safe_dump(document))
    return path
