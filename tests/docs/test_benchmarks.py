"""The README's table of benchmarks is what the results say."""

from __future__ import annotations

from pathlib import Path

from tests.bench import report

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_the_results_that_are_there() -> None:
    """Run ``tools/bench --readme`` if it does not."""
    readme = (ROOT / "README.md").read_text()
    assert (
        report.with_block(
            readme, report.readme_block(report.load(ROOT / "docs" / "benchmarks" / "results.json"))
        )
        == readme
    )
