"""Namespaces of Linux for a test: a pid namespace as a container has it, a mount that is read-only.

Root may always make them; another user where the kernel allows user namespaces. Elsewhere the test
is skipped with the kernel's reason.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys

import pytest

__all__ = ["containered", "unshared"]


@functools.cache
def _refusal(*options: str) -> str:
    """Why ``unshare`` with these options does not work here, or ''."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "there is no unshare (util-linux)"
    made = subprocess.run(
        ["unshare", *options, "true"], capture_output=True, text=True, check=False
    )
    return made.stderr.strip() if made.returncode else ""


def unshared(*options: str) -> list[str]:
    """The beginning of a command that runs in namespaces of its own, as root of a user namespace.

    Skips the test if that is not allowed.
    """
    options = ("--user", "--map-root-user", *options)
    if why := _refusal(*options):
        pytest.skip(f"namespaces cannot be made here: {why}")
    return ["unshare", *options]


def containered() -> list[str]:
    """A command in a pid namespace and with a host name of its own; killed with its ``unshare``."""
    return [*unshared("--pid", "--uts", "--fork", "--mount-proc"), "--kill-child"]
