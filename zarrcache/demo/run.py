"""Run the demo: convert to an S3 server, train cold and warm epochs, and one without the server.

Every step uses what a user would run: the converter, ``zarrcache warm``, and a training script in
a separate process.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from zarrcache._units import counted, format_bytes
from zarrcache.convert import is_density_name, plan_convert, task_id_of
from zarrcache.demo.server import DemoServer, running_server
from zarrcache.demo.synthetic import write_pairs
from zarrcache.errors import ConfigError, ZarrCacheError
from zarrcache.origin import make_s3fs

__all__ = ["DemoReport", "Row", "run_demo"]

BUCKET = "densities"
FUNCTIONAL = "GGA"
#: What a request to an S3 service in the same region takes; on 127.0.0.1 it would take none.
LATENCY_S = 0.02
#: Directory names that distinguish inputs from labels.
_ROLES = {
    "input": "input",
    "inputs": "input",
    "data": "input",
    "label": "label",
    "labels": "label",
    "target": "label",
    "jsongz": "label",
}

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One epoch, as the S3 server counted it.

    ``waited_s`` is the part of ``seconds`` in which the training waited for data; ``hit_ratio`` is
    None without a cache.
    """

    epoch: str
    seconds: float
    waited_s: float
    samples_per_s: float
    requests: int
    fetched_bytes: int
    hit_ratio: float | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The result of the demo.

    Attributes
    ----------
    rows : tuple of Row
    identical : bool
        Every tensor of every epoch is bit-identical to a plain zarr read.
    directory : Path or None
        With sources, configs, caches and logs; None if it was removed.
    """

    rows: tuple[Row, ...]
    identical: bool
    directory: Path | None

    @property
    def is_good(self) -> bool:
        """Whether all tensors are identical and warm epochs sent no request."""
        return self.identical and all(
            row.requests == 0 for row in self.rows if row.epoch.startswith("warm")
        )


def run_demo(
    source: Path | None = None,
    samples: int = 8,
    *,
    keep: bool = False,
    say: Say = lambda line: None,
) -> DemoReport:
    """Run the demo.

    Parameters
    ----------
    source : Path, optional
        Directory with CHGCAR or Materials Project json.gz files. Pairs are matched by directory
        name (``input`` or ``data``, ``label`` or ``jsongz``) and task id. Default: synthetic pairs.
    samples : int
        Maximum number of pairs, from 2.
    keep : bool
        Keep the directory with sources, configs, caches and logs.
    say : callable
        Called with a line of text after each step.

    Raises
    ------
    ConfigError
        There are fewer than two pairs, or the extra ``demo`` is not installed.
    ZarrCacheError
        A step failed; the message has the last lines of its log.
    """
    if samples < 2:
        raise ConfigError(f"samples is {samples}; a split into training and test needs at least 2.")
    if find_spec("torch") is None:  # before the minute that the other steps take
        raise ConfigError("The demo needs PyTorch. Install it: pip install 'zarrcache[demo]'")
    directory = Path(tempfile.mkdtemp(prefix="zarrcache-demo-"))
    try:
        rows, identical = _run_all(directory, source, samples, say)
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)  # the temporary directory made above
    return DemoReport(tuple(rows), identical, directory if keep else None)


def _run_all(home: Path, source: Path | None, samples: int, say: Say) -> tuple[list[Row], bool]:
    """Rows of the epochs, and whether all their tensors are identical to a plain read."""
    with running_server(latency_s=LATENCY_S) as server:
        latency_ms = 1e3 * LATENCY_S
        say(f"S3 server at {server.endpoint_url}, {latency_ms:.0f} ms a request")
        say("every epoch starts from the same weights: equal losses mean equal data")
        if source is None:
            task_ids = write_pairs(home / "files", samples)
            say(f"made {len(task_ids)} synthetic pairs of densities (--source DIR: your own)")
        else:
            task_ids = _collect(source, home / "files", samples)
            say(f"took {counted(len(task_ids), 'pair')} of densities from {source}")
        make_s3fs(server.s3_kwargs).mkdir(BUCKET)
        task_ids = _convert(home / "files", task_ids, server, say)
        (home / "map.json").write_text(json.dumps({FUNCTIONAL: task_ids}))
        cold, warm = (_write_config(home, server, name) for name in ("cold", "warm"))

        plain = _epoch(home, cold, "no cache: zarr + s3fs", server, say, plain=True)
        first = _epoch(home, cold, "cold", server, say)
        _run([sys.executable, "-m", "zarrcache", "warm", str(warm)], home / "warm.log")
        done = _last_lines(home / "warm.log", 1)
        say(f"zarrcache warm, into another cache directory: {done}")
        second = _epoch(home, warm, "warm", server, say)
    say("S3 server stopped")
    offline = _epoch(home, warm, "warm, S3 switched off", server, say)
    epochs = (plain, first, second, offline)
    return [row for row, _ in epochs], all(digests == plain[1] for _, digests in epochs)


def _collect(source: Path, files: Path, samples: int) -> list[str]:
    """Link complete pairs below ``files/input`` and ``files/label``; return sorted task ids."""
    if not source.is_dir():
        raise ConfigError(
            f"{source} is not a directory. Give one with CHGCAR or json.gz files, or leave "
            "--source out."
        )
    found: dict[str, dict[str, Path]] = {"input": {}, "label": {}, "": {}}
    for path in sorted(source.rglob("*")):
        if not is_density_name(path.name) or not path.is_file():
            continue
        named = [_ROLES[part] for part in path.relative_to(source).parts[:-1] if part in _ROLES]
        with contextlib.suppress(ConfigError):  # no task id in the name
            found[named[-1] if named else ""].setdefault(task_id_of(path), path)
    unnamed = found.pop("")
    if not found["input"] and not found["label"]:
        # A single directory of densities: each is its own label.
        found = {"input": unnamed, "label": unnamed}
    task_ids = sorted(found["input"].keys() & found["label"].keys())[:samples]
    if len(task_ids) < 2:
        raise ConfigError(
            f"{source} holds {counted(len(task_ids), 'pair')} of densities "
            f"({counted(len(found['input']), 'input')}, {counted(len(found['label']), 'label')}); "
            "the demo needs 2. Put the inputs into a directory "
            "input/ and the labels into label/, with the same names."
        )
    for role, paths in found.items():
        (files / role).mkdir(parents=True)
        for task_id in task_ids:
            path = paths[task_id]
            # The converter takes the task id from the file name; for a bare CHGCAR it is that of
            # the directory.
            name = path.name if task_id in path.name else f"{task_id}.{path.name}"
            (files / role / name).symlink_to(path.resolve())
    return task_ids


def _convert(files: Path, task_ids: list[str], server: DemoServer, say: Say) -> list[str]:
    """Convert to the server; return the task ids whose two files were converted."""
    for role in ("input", "label"):
        start_s = time.perf_counter()
        report = plan_convert(
            files / role, f"s3://{BUCKET}/{role}", s3_kwargs=server.s3_kwargs
        ).execute()
        size, seconds = format_bytes(report.written_bytes), time.perf_counter() - start_s
        say(
            f"converted {counted(len(report.converted), 'file')} to s3://{BUCKET}/{role} ({size}) "
            f"in {seconds:.1f} s"
        )
        for result in report.converted:
            for warning in result.warnings:
                say(f"  {result.path.name}: {warning}")
        for result in report.failed:
            say(f"  left out: {result.error}")
        done = {result.task_id for result in report.converted}
        task_ids = [task_id for task_id in task_ids if task_id in done]
    if len(task_ids) < 2:
        raise ConfigError(
            f"{counted(len(task_ids), 'pair')} of densities could be converted; the demo needs 2."
        )
    return task_ids


def _write_config(home: Path, server: DemoServer, name: str) -> Path:
    config: dict[str, Any] = {
        "dataset_name": "zarr_s3_data",
        "data_dir": f"s3://{BUCKET}/input",
        "label_dir": f"s3://{BUCKET}/label",
        "map_dir": str(home / "map.json"),
        "functional": FUNCTIONAL,
        "density_type": "total",
        "normalize_data": True,
        "train_fraction": 0.8,
        "random_state": 42,
        "s3_kwargs": server.s3_kwargs,
        "cache": {"dir": str(home / f"cache-{name}"), "limit": "4 GiB", "min_free": "200 MB"},
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _epoch(
    home: Path, config: Path, name: str, server: DemoServer, say: Say, *, plain: bool = False
) -> tuple[Row, list[str]]:
    """Train one epoch in its own process; return its row and the digests of its tensors."""
    before = server.traffic
    out = home / "epoch.json"
    command = [sys.executable, "-m", "zarrcache.demo.train", str(config), str(out)]
    _run([*command, "--plain"] if plain else command, home / "train.log")
    result = json.loads(out.read_text())
    traffic = server.traffic - before
    say(
        f"epoch, {name}: {result['seconds']:.2f} s, of these {result['waited_s']:.2f} s waiting "
        f"for data; {traffic.requests} S3 requests, loss {result['loss']:.4f}"
    )
    row = Row(
        name,
        result["seconds"],
        result["waited_s"],
        result["samples"] / result["seconds"],
        traffic.requests,
        traffic.sent_bytes,
        result["hit_ratio"],
    )
    return row, result["digests"]


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        ).returncode
    if code:
        raise ZarrCacheError(f"{' '.join(command[1:4])} ended with {code}:\n{_last_lines(log, 20)}")


def _last_lines(log: Path, count: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
