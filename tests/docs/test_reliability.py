"""docs/explanation/reliability.md and SECURITY.md name tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["docs/explanation/reliability.md", "SECURITY.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    """File and function."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text())
    assert len(named) > 15
    for file, function in named:
        assert (ROOT / file).is_file(), file
        if function:
            assert re.search(rf"def {function}\(", (ROOT / file).read_text()), f"{file}::{function}"
