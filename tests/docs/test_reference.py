"""docs/reference lists every public name, error and counter; the guide to install, every extra."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import zarrcache
from zarrcache import errors

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


def named(page: str) -> set[str]:
    """Words in code font on a page."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    return {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}


def test_every_public_name_is_in_the_reference() -> None:
    public = {name for name in zarrcache.__all__ if not name.startswith("__")}
    assert public - set(errors.__all__) <= named("api.md")


def test_every_error_is_in_the_reference() -> None:
    assert set(errors.__all__) <= named("errors.md")


def test_every_counter_is_in_the_reference() -> None:
    assert {field.name for field in dataclasses.fields(zarrcache.Stats)} <= named("counters.md")


def test_every_extra_for_users_is_in_the_guide_to_install() -> None:
    page = (ROOT / "docs" / "guides" / "installing.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].keys() - {"bench", "docs", "test"}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == extras
