"""The demo as ``tools/demo`` runs it: real processes and a real server, which is stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zarrcache.demo.run import LATENCY_S

ROOT = Path(__file__).resolve().parents[2]


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zarrcache", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def _check(*arguments: str) -> None:
    done = _demo("--samples", "2", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] is True
    rows = {row["epoch"]: row for row in report["rows"]}
    assert rows["cold"]["requests"] > 0
    # The server waits before it answers, and the table says how much of an epoch that is.
    assert rows["cold"]["waited_s"] >= LATENCY_S
    for row in rows.values():
        assert 0 < row["waited_s"] <= row["seconds"]
    for name in ("warm", "warm, S3 switched off"):
        assert rows[name]["requests"] == 0
        assert rows[name]["fetched_bytes"] == 0
        assert rows[name]["hit_ratio"] == 1.0


def test_the_demo_trains_on_real_densities_with_the_server_switched_off(real_data: Path) -> None:
    """Pairs are found by directory names; equal bits in every epoch, no request once warm."""
    _check("--source", str(real_data / "mp"))


# with generated densities, which test_readme.py converts, warms and trains on as well
@pytest.mark.slow
def test_the_demo_makes_up_densities() -> None:
    """Nothing is downloaded."""
    _check()


def test_an_unusable_source_is_named(tmp_path: Path) -> None:
    """Too few pairs; the error says how to lay them out."""
    (tmp_path / "input").mkdir()
    done = _demo("--source", str(tmp_path))
    assert done.returncode == 2
    assert "input/" in done.stderr
    assert "label/" in done.stderr
