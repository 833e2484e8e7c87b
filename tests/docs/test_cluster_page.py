"""docs/guides/cluster.md: its Python runs, its commands have the options that it shows, its files
exist.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chgcars import SMALL
from tests.support.training import zarrcache
from zarrcache.demo.synthetic import write_pairs

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ROOT / "docs" / "guides"
PAGE = (GUIDES / "cluster.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


def test_every_option_that_the_page_shows_is_one_of_its_command() -> None:
    """Behaviour is tested in tests/processes/test_cluster.py and tests/processes/test_slurm.py."""
    matches = [re.search(r"zarrcache (convert|warm) (.*)", line) for line in COMMANDS]
    used = {
        (match[1], option)
        for match in matches
        if match
        for option in re.findall(r"--[\w-]+", match[2])
    }
    assert {verb for verb, _ in used} == {"convert", "warm"}
    for verb in ("convert", "warm"):
        helped = zarrcache(verb, "--help").out
        assert {
            option for its, option in used if its == verb and f"{option} " not in helped
        } == set()


def test_every_file_of_the_page_is_there() -> None:
    """Links, and files that its commands run."""
    links = {GUIDES / name for name in re.findall(r"\]\(([\w./-]+)[)#]", PAGE)}
    named = links | {
        ROOT / word for line in COMMANDS for word in line.split() if word.startswith("configs/")
    }
    assert len(named) >= 3
    assert {path for path in named if not path.is_file()} == set()


@pytest.mark.slow
def test_the_python_of_the_page_converts(tmp_path: Path) -> None:
    """As a script, with worker processes of Dask."""
    pytest.importorskip("distributed", reason="needs the extra 'dask'")
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    write_pairs(tmp_path / "chgcars", 2, seed=SMALL)
    (script,) = [text for language, text in BLOCKS if language == "python"]
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "2 0\n"), done.stderr
