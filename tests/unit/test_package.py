"""The package as a whole: what an import costs, which names are public, that every module is
documented.

The walls between rooms are contracts of import-linter in ``pyproject.toml``.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

import zarrcache

PACKAGE = Path(zarrcache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "sklearn", "zarr", "s3fs"}


def test_every_module_has_a_docstring() -> None:
    """And imports are absolute, so that a moved module fails loudly."""
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or path.name == "__main__.py", path
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        assert relative == [], path


def test_a_newcomer_sees_at_most_26_names() -> None:
    """A new room or top-level module is a decision: docs/explanation/architecture.md says why."""
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(names) <= 26
    assert not {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"} & names


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``code``."""
    tail = (
        "\nimport json, sys"
        "\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    """Naming a setting or an error loads nothing heavy either."""
    code = "import zarrcache; zarrcache.CacheConfig; zarrcache.OriginError; dir(zarrcache)"
    assert not loaded_by(code) & HEAVY


def test_processes_that_read_start_without_zarr() -> None:
    """The processes of look-ahead and of `warm` would start a quarter slower with it."""
    modules = "train.prefetch data.reader ops.warm origin._obstore".split()
    code = "import " + ", ".join(f"zarrcache.{name}" for name in modules)
    assert not loaded_by(code) & HEAVY


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    """Tab completion and ``--help`` are instant."""
    run = "try:\n    main()\nexcept SystemExit as exc:\n    assert not exc.code"
    code = f"import sys\nfrom zarrcache.cli import main\nsys.argv = ['zarrcache', '--help']\n{run}"
    assert not loaded_by(code) & HEAVY


@pytest.mark.parametrize("name", zarrcache.__all__)
def test_public_name_resolves_and_its_module_lists_it(name: str) -> None:
    """Public names are listed once, in ``zarrcache/__init__.pyi``."""
    assert name in dir(zarrcache)
    value = getattr(zarrcache, name)
    if hasattr(value, "__module__"):  # not a text or a dict
        assert name in sys.modules[value.__module__].__all__


def test_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="No zarrcache attribute Reader"):
        zarrcache.Reader  # noqa: B018


def test_package_says_that_it_is_typed_and_what_version_it_is() -> None:
    """``py.typed`` ships; the version is the distribution's."""
    assert resources.files("zarrcache").joinpath("py.typed").is_file()
    assert zarrcache.__version__ == metadata.version("zarrcache")
