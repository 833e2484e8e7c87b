"""Where figures come from: versions and the machine, and nothing that names it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from tests.bench.harness import cores
from zarrcache.ops.doctor import file_system_of

__all__ = ["commit", "machine", "versions"]

_PACKAGES = (
    "zarrcache numpy torch zarr numcodecs fsspec s3fs obstore diskcache "
    "tensorstore litdata mosaicml-streaming insitubatch"
).split()


def versions() -> dict[str, str]:
    """Python and every package that is measured, as far as it is installed."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(workdir: Path) -> dict[str, object]:
    """What the figures depend on, and nothing that names the machine."""
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return {
        "cores": cores(),
        "cpu": _cpu(),
        "memory_gib": round(memory / 1024**3),
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": file_system_of(workdir) or "file system not known",
        # Over 5 minutes. A run alone makes about as much as it has cores; more is of others.
        "load": round(os.getloadavg()[1], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def commit() -> str:
    """Short hash of the commit that is checked out."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "not known"
    return done.stdout.strip()
