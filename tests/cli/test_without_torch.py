"""Without PyTorch and scikit-learn, every command runs; what trains names the extra to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import write_config, write_pairs

# Python imports this file at its start, so the processes that a command starts refuse them too.
_REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def python(
    home: Path, *arguments: str, absent: tuple[str, ...] = ("torch", "lightning", "sklearn")
) -> subprocess.CompletedProcess[str]:
    """Run Python in an environment that refuses to import PyTorch and scikit-learn."""
    (home / "site").mkdir(exist_ok=True)
    (home / "site" / "sitecustomize.py").write_text(_REFUSE.replace("{ABSENT}", repr(absent)))
    path = os.pathsep.join([str(home / "site"), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["torch", "sklearn.model_selection"])
def test_the_environment_refuses(tmp_path: Path, name: str) -> None:
    done = python(tmp_path, "-c", f"import {name}")
    assert "ModuleNotFoundError: No module named" in done.stderr


def test_commands_run_on_a_real_store(tmp_path: Path) -> None:
    """Two workers: the processes that read need neither library."""
    write_pairs(tmp_path, 3)
    config = str(write_config(tmp_path, tmp_path))
    for arguments, words in (
        (["--help"], "Usage: "),
        (["plan", config], "Training split"),
        (["report", config, "-o", str(tmp_path / "report.html")], ""),
        (["warm", config, "--workers", "2"], "Warmed 3 of 3 ids"),
        (["warm", config], "3 fresh already"),
        (["status", config], "3 of 3 ids"),
        (["verify", "--dir", str(tmp_path / "cache")], "0 corrupt"),
        (["evict", config, "--all", "--yes"], "Evicted"),
    ):
        done = python(tmp_path, "-m", "zarrcache", *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        assert words in done.stdout, (arguments, done.stdout)


def test_a_reader_splits_and_loads(tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    config = write_config(tmp_path, tmp_path)
    code = (
        "import yaml, zarrcache\n"
        f"cfg = yaml.safe_load(open({str(config)!r}))\n"
        "(data, *_), _ = zarrcache.get_dataset(cfg)\n"
        "print(len(data), data[0].dtype)"
    )
    done = python(tmp_path, "-c", code)
    assert done.stdout.split()[1:] == ["float32"], done.stderr


@pytest.mark.parametrize("name", ["ZarrDataset", "RhoData", "NodeSampler", "collate"])
@pytest.mark.parametrize("form", ["import zarrcache; zarrcache.{}", "from zarrcache import {}"])
def test_what_trains_names_the_extra(tmp_path: Path, name: str, form: str) -> None:
    done = python(tmp_path, "-c", form.format(name))
    assert done.stderr.splitlines()[-1] == (
        f"zarrcache.errors.ConfigError: {name} needs PyTorch (No module named 'torch'). "
        "Install it: pip install 'zarrcache[train]'"
    )


def test_the_data_module_names_the_extra(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", "import zarrcache.lightning")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: zarrcache.lightning needs PyTorch and Lightning (No module named 'torch'). "
        "Install them: pip install 'zarrcache[lightning]'"
    )


@pytest.mark.parametrize("arguments", [("doctor",), ("status", "--dir", ".")])
def test_a_library_that_is_missing_is_an_error_in_words(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = python(tmp_path, "-m", "zarrcache", *arguments, absent=("crc32c",))
    assert done.returncode == 1
    assert done.stderr == (
        "error: No module named 'crc32c'. --verbose shows the traceback. Install what is "
        "missing: pip install zarrcache\n"
    )
