"""Tests that need root, run by another user as root of a user namespace: small file systems that
are full, and, where /etc/subuid has numbers for this user, several users of a node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.namespaces import unshared

HERE = Path(__file__).parents[2]
FULL = (
    "tests/faults/test_disk_faults.py::"
    "test_training_goes_on_with_the_same_bits_and_the_cache_comes_back"
)
#: Of the tests that root runs directly, those that show a promise.
TESTS = {
    "a full disk": ([], [f"{FULL}[full_disk]", f"{FULL}[no_inodes_disk]"]),
    "min_free": (
        [],
        [
            "tests/processes/test_limit.py::test_min_free_is_left_while_another_program_fills_the_disk"
        ],
    ),
    "several users": (["--map-auto"], ["tests/processes/test_shared_node.py"]),
}

pytestmark = pytest.mark.skipif(os.geteuid() == 0, reason="root runs these tests directly")


@pytest.mark.parametrize(("options", "tests"), TESTS.values(), ids=TESTS)
def test_what_needs_root_passes_as_root_of_a_namespace(
    tmp_path: Path, options: list[str], tests: list[str]
) -> None:
    if options and shutil.which("newuidmap") is None:
        pytest.skip("several users need newuidmap (package uidmap)")
    done = subprocess.run(
        [
            *unshared("--mount", *options),
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            f"--basetemp={tmp_path / 'namespace'}",
            *tests,
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout
