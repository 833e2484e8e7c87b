"""Every counter has a metric, and every metric is documented."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from zarrcache.config import CacheConfig
from zarrcache.ops import Monitor, exposition
from zarrcache.ops.metrics import METRICS
from zarrcache.stats import Counters, Stats

DOCS = Path(__file__).parents[3] / "docs" / "reference"


def test_each_counter_has_a_metric_of_its_own() -> None:
    assert {field.name for field in fields(Stats)} == METRICS.keys() | {"ahead_bytes"}


def test_each_metric_is_in_the_reference_with_its_type(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    config = CacheConfig(dir=tmp_path, limit=2**20)
    counters = Counters(shared=True, directory=tmp_path)
    counters.add(hits=3, ahead_bytes=5)
    text = exposition(Monitor(config)).decode()
    assert 'zarrcache_hits_total{directory="' in text
    documented = (DOCS / "metrics.md").read_text()
    counters_documented = (DOCS / "counters.md").read_text()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            if kind == "counter":
                stem = name.removeprefix("zarrcache_").removesuffix("_total")
                assert name == f"zarrcache_{stem}_total"
                assert f"`{stem}`" in counters_documented
            else:
                [row] = [row for row in documented.splitlines() if f"`{name}`" in row]
                assert f"| {kind}" in row, row
