"""A small file system of a test's own, mounted by root; elsewhere the test is skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["small_disk_at"]


@contextmanager
def small_disk_at(mount: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of ``size`` (``2m``) at ``mount``, which is made."""
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here ({made.stderr.strip() or 'mount failed'}); root may")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
