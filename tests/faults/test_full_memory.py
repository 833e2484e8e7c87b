"""A node without memory: an error that says so, never a store that is called damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.stores import small_group

LAYOUTS: dict[str, dict[str, Any]] = {
    "v2": {"chunks": (32, 32, 32)},
    "chunks that blosc decodes in threads": {"chunks": (64, 64, 64)},
    "sharded": {"zarr_format": 3, "chunks": (64, 64, 64), "shards": (128, 128, 128)},
    "zip": {"as_zip": True, "chunks": (64, 64, 64)},
}
#: Reads a density of 8 MiB with 0 to 80 MiB of memory, and prints what came of each.
PROGRAM = """
import resource, sys
from pathlib import Path
from tests.support.readers import make_reader
from zarrcache import ZarrCacheError

expected = (Path(sys.argv[1]) / "expected").read_bytes()
reader = make_reader(Path(sys.argv[1]))
reader.load("mp-small", "data")  # starts threads, imports
for extra in range(0, 80, 4):
    used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    limit = int(used.split()[1]) * 1024 + extra * 1024**2
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        values, outcome = reader.load("mp-1", "data")[0], "read"
    except ZarrCacheError as exc:
        values, outcome = None, f"{type(exc).__name__}: {exc}"
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if values is not None and values.tobytes() != expected:
        outcome = "WRONG"
    print(outcome)
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_without_memory_does_not_call_the_store_damaged(
    tmp_path: Path, layout: str
) -> None:
    suffix = ".zarr.zip" if layout == "zip" else ".zarr"
    arrays = small_group(tmp_path / f"data/mp-1{suffix}", shape=(128,) * 3, **LAYOUTS[layout])
    (tmp_path / "expected").write_bytes(arrays["charge_density_total"].tobytes())
    small_group(tmp_path / f"data/mp-small{suffix}", as_zip=layout == "zip")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", "mp-small"]}))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    outcomes = done.stdout.splitlines()
    assert len(outcomes) == 20, done.stderr
    failed = [outcome for outcome in outcomes if outcome != "read"]
    assert 0 < len(failed) < len(outcomes)
    for words in failed:
        assert words.startswith("ZarrCacheError: mp-1 (data) could not be read, because"), words
        assert "this process gets no more memory" in words


ZARR_PROGRAM = """
import resource, sys
import zarr
from pathlib import Path
from tests.support.readers import make_reader
from zarrcache import ZarrCacheError

root = Path(sys.argv[1])
group = zarr.open_group(root / "data/big.zarr", mode="w")
group.create_array("charge_density_total", shape=(512,) * 3, chunks=(256,) * 3, dtype="f4")
reader = make_reader(root, cache={"missing_chunks": "fill"})
resource.setrlimit(resource.RLIMIT_DATA, (2**29, resource.RLIM_INFINITY))
opened = zarr.open_group(root / "data/big.zarr", mode="r")
try:
    reader.read_charge_density(opened)
except ZarrCacheError as exc:
    print(f"{type(exc).__name__}: {exc}")
"""


def test_an_array_that_zarr_has_no_memory_for_is_not_called_damaged(tmp_path: Path) -> None:
    """512 MiB, of which nothing was written."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["big"]}))
    done = subprocess.run(
        [sys.executable, "-c", ZARR_PROGRAM, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("ZarrCacheError: "), done.stderr
    assert "this process gets no more memory (MemoryError: Unable to allocate" in done.stdout


LIMITED_PROGRAM = """
import resource, sys
from pathlib import Path
from tests.support.readers import make_reader
from zarrcache import ZarrCacheError

reader = make_reader(Path(sys.argv[1]), cache={})
used = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = int(used.split()[1]) * 1024 + 2 * 1024**2
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    reader.load("mp-1", "data")
except ZarrCacheError as exc:
    print(f"{type(exc).__name__}: {exc}")
"""


def test_a_process_that_cannot_load_a_codec_does_not_call_the_store_damaged(
    tmp_path: Path,
) -> None:
    """A library is mapped when it is first used, which the limit of ``ulimit -v`` refuses."""
    small_group(tmp_path / "data/mp-1.zarr", shape=(128,) * 3, **LAYOUTS["v2"])
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1"]}))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_PROGRAM, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("ZarrCacheError: mp-1 (data) could not be read, bec"), done.stderr
    assert "raise the limit of the process (ulimit -v)" in done.stdout
