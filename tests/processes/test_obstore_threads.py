"""obstore starts one thread, unless the user wants another number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import os, pathlib, time
import obstore
from obstore.store import MemoryStore
from zarrcache.origin._obstore import _start_runtime
before = dict(os.environ)
_start_runtime()
assert dict(os.environ) == before, "children of this process would inherit it"
obstore.put(MemoryStore(), "key", b"")
time.sleep(0.2)  # a thread gets its name after it has started
names = [task.joinpath("comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
print(sum(name.startswith("tokio") for name in names))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize(("wanted", "threads"), [(None, 1), ("3", 3)])
def test_obstore_has_one_thread_unless_the_user_says_so(wanted: str | None, threads: int) -> None:
    """Its own default is one per core, and each costs CPU with every request."""
    environment = {k: v for k, v in os.environ.items() if k != "TOKIO_WORKER_THREADS"}
    if wanted is not None:
        environment["TOKIO_WORKER_THREADS"] = wanted
    ended = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) == threads
