"""The memory that a function takes, measured in a child process with a limit."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.users import as_user

__all__ = ["MIB", "peak_of"]

MIB = 1024**2
#: A child that takes more is killed; every test allows less.
_MOST = 3 * 1024 * MIB


def peak_of(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """Result of ``function(*args)`` in a forked child, and the largest growth of its resident
    memory in bytes.
    """
    return as_user(None, _measured, function, args)  # type: ignore[no-any-return]


def _measured(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, int]:
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _MOST, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    result = function(*args)
    return result, _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
