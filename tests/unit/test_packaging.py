"""What is installed: the wheel, the sdist, and the recipes beside them."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "No module named hatchling" in done.stderr:
        pytest.skip("hatchling is not here")
    assert done.returncode == 0, done.stderr
    return directory


def test_the_wheel_holds_the_package_its_types_and_the_sample_configs(wheel: Path) -> None:
    [path] = wheel.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    assert {"zarrcache/py.typed", "zarrcache/__init__.pyi"} <= names
    for sample in (ROOT / "configs").glob("*.yaml"):
        assert f"zarrcache/configs/{sample.name}" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]


def test_a_wheel_without_a_checkout_writes_a_config(wheel: Path, tmp_path: Path) -> None:
    """From the files of the wheel alone, which is how users have them."""
    [path] = wheel.glob("*.whl")
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "zarrcache", "init", "--yes", "config.yaml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sample = (ROOT / "configs" / "s3_cached.yaml").read_text()
    written = (tmp_path / "config.yaml").read_text()
    assert written == sample.replace("configs/s3_cached.yaml", "config.yaml")


def test_the_sdist_can_run_its_tests(wheel: Path) -> None:
    """Everything that ``tools/test`` needs is in it."""
    [path] = wheel.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "tools/test",
        "tools/_venv.sh",
        "constraints.txt",
        "tests/conftest.py",
        "tests/golden/entry_v1.bin",
        "configs/s3_cached.yaml",
        "docs/reference/metrics.md",
        "README.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
    ):
        assert needed in names, needed


def test_the_conda_recipe_requires_what_the_wheel_requires() -> None:
    recipe = yaml.safe_load((ROOT / "tools" / "conda" / "recipe.yaml").read_text())
    required = {one.replace(" ", "") for one in recipe["requirements"]["run"]}
    expected = {*PROJECT["dependencies"], f"python{PROJECT['requires-python']}"}
    assert required == expected
    assert recipe["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    assert recipe["about"]["summary"] == PROJECT["description"]


@pytest.mark.parametrize("name", ["Dockerfile", "zarrcache.def"])
def test_the_containers_install_extras_that_exist(name: str) -> None:
    text = (ROOT / "tools" / "container" / name).read_text()
    extras = re.search(r"EXTRAS=(\S+)|/src\[([a-z,]+)\]", text)
    assert extras is not None
    wanted = (extras[1] or extras[2]).split(",")
    assert set(wanted) <= PROJECT["optional-dependencies"].keys()


def test_workflows_run_scripts_that_exist() -> None:
    """And ask for no more rights than they need."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 45
            for step in job["steps"]:
                for script in re.findall(r"\btools/\w+", step.get("run", "")):
                    assert (ROOT / script).is_file(), script
