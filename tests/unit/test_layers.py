"""The house rules, read from the source itself: who imports whom, who may print, how long a module is, what an import costs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path

import pytest

import zarrcache

PACKAGE = Path(zarrcache.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}

#: A module imports from its own level and from those below, never in a circle.
LEVELS = {
    0: "errors quantities keys policy config stats sharedfile augment chgcar_names "
    "checksums mapping budget world assignment signals leases nodes course clairvoyant",
    1: "atomic simulate retry flight codec layout owner s3options faults pump decode expansion "
    "taskids sequences workpool mounts indexcheck renewal backoff indexlog entryfiles peertoken cluster eachnode interpreter",
    2: "engine_obstore engine_s3fs localorigin zipped indexfile index incoming peers",
    3: "origin arraycache settled ring",
    4: "bytecache readarray density neighbours",
    5: "tiers",
    6: "store materials cachedpath",
    7: "reader filesystem handover",
    8: "registry dataset sampler sizing forecast chgcar chgcar_files convert storewriter storeupload synthetic "
    "scope warming warmreport evicting verifying status doctor entryserver sidebyside lightning lookahead prefetching",
    9: "demo demo_server demo_train",
    10: "cli cliapp cliargs clicache clicluster clidata clinodes cliwords terminal __main__",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}

#: Libraries that are kept in one place, so that what is true of them has to be known there only.
IMPORTERS = {
    "tenacity": {"retry"},
    "awscrt": {"checksums"},
    "obstore": {"engine_obstore"},
    "s3fs": {"engine_s3fs"},
    "diskcache": {"indexfile"},
    "filelock": {"flight"},
    "torch": {"dataset", "demo_train", "handover", "lightning", "sampler", "sidebyside"},
    "lightning": {"lightning"},
    "sklearn": {"taskids"},
    "pymatgen": {"chgcar_files"},
    "monty": {"chgcar_files"},
    "typer": {"cliapp", "cliargs", "clicache", "clicluster", "clidata"},
    "rich": {"terminal"},
    "dask": {"cluster"},
    "distributed": {"cluster", "eachnode"},
    "moto": {"demo_server"},
    "pickle": set(),
}
HEAVY = {"torch", "sklearn", "zarr", "s3fs"}


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what a module imports anywhere, without what only a type checker sees."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    parts = (full.split(".") for full in imports(MODULES[name]))
    return {part[1] for part in parts if part[0] == "zarrcache" and len(part) > 1 and part[1] in MODULES}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_module_imports_nothing_from_above(name: str) -> None:
    """And it has a level; a new module is put into the table."""
    assert name in LEVEL, f"{name} has no level: add it to the table, and to docs/design.md"
    above = {other for other in siblings(name) if LEVEL.get(other, 99) > LEVEL[name]}
    assert not above


def test_the_table_of_modules_in_the_docs_is_this_one() -> None:
    """A newcomer reads docs/design.md."""
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: int(level) for level, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert told == LEVEL


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a level either."""
    remaining = {name: siblings(name) - {"__init__"} for name in MODULES if name != "__init__"}
    while free := {name for name, others in remaining.items() if not others & set(remaining)}:
        for name in free:
            del remaining[name]
    assert not remaining


@pytest.mark.parametrize("library", sorted(IMPORTERS))
def test_guarded_library_has_its_importers_only(library: str) -> None:
    """One place each."""
    found = {name for name, tree in MODULES.items() if any(full.split(".")[0] == library for full in imports(tree))}
    assert found <= IMPORTERS[library]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_is_documented_short_and_quiet(name: str) -> None:
    """A docstring, 400 lines at the most, and ``print`` in the command line alone."""
    tree = MODULES[name]
    assert ast.get_docstring(tree) or name == "__main__"
    assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 400
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls or name == "cliapp"


def test_there_is_no_drawer() -> None:
    """A module is named for what it knows."""
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``code``."""
    tail = "\nimport json, sys\nprint('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    """Neither does naming a setting or an error."""
    assert not loaded_by("import zarrcache; zarrcache.CacheConfig; zarrcache.OriginError; dir(zarrcache)") & HEAVY


def test_processes_that_read_start_without_zarr() -> None:
    """Of look-ahead and of `warm`: each would take a quarter longer to start."""
    assert not loaded_by("import zarrcache.prefetching, zarrcache.reader, zarrcache.warming, zarrcache.engine_obstore") & HEAVY


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    """Tab completion and ``--help`` are instant."""
    run = "try:\n    main()\nexcept SystemExit as exc:\n    assert not exc.code"
    code = f"import sys\nfrom zarrcache.cli import main\nsys.argv = ['zarrcache', '--help']\n{run}"
    assert not loaded_by(code) & HEAVY


def test_public_names_agree_in_all_three_lists() -> None:
    """``__all__``, the table of homes, and the imports that type checkers read."""
    tree = MODULES["__init__"]
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    for_types = {node.module: tuple(alias.name for alias in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert for_types == {f"zarrcache.{module}": names for module, names in zarrcache._HOME.items()}
    assert sorted(zarrcache.__all__) == sorted([*(name for names in zarrcache._HOME.values() for name in names), "__version__"])


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in zarrcache._HOME.items() for name in names])
def test_public_name_resolves_and_is_public_at_home(module: str, name: str) -> None:
    """At its first use, and the home lists it as its own."""
    home = importlib.import_module(f"zarrcache.{module}")
    assert getattr(zarrcache, name) is getattr(home, name)
    assert name in home.__all__
    assert name in dir(zarrcache)


def test_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="module 'zarrcache' has no attribute 'Reader'"):
        zarrcache.Reader  # noqa: B018


def test_package_says_that_it_is_typed_and_what_version_it_is() -> None:
    """``py.typed`` ships; the version is the distribution's."""
    assert resources.files("zarrcache").joinpath("py.typed").is_file()
    assert zarrcache.__version__ == metadata.version("zarrcache")
