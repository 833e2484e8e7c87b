"""Help pages: complete, with units and defaults, and fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import zarrcache
from zarrcache import __version__

COMMANDS = {
    "demo": ("--source DIR", "--samples N", "default: 8", "--keep"),
    "init": ("--data-dir TEXT", "--limit TEXT", "--yes", "--force"),
    "convert": (
        "--pattern GLOB",
        "--workers N",
        "--chunks N[,N,N]",
        "[default: 64]",
        "--zip",
        "--zarr-format 2|3",
        "--diff",
        "--overwrite",
        "--dask SCHEDULER",
        "--dry-run",
    ),
    "map": (
        "--output",
        "map.json.gz",
        "--functional NAME",
        "GGA",
        "--source KINDS",
        "--force",
        "--endpoint-url URL",
        "--profile NAME",
        "--anon",
        "--s3-kwargs",
        "--json",
    ),
    "warm": (
        "--split",
        "[default: all]",
        "--workers N",
        "--ids FILE",
        "--limit SIZE",
        "--dask SCHEDULER",
        "--each-node",
        "--dry-run",
        "--json",
    ),
    "evict": (
        "--all",
        "--older-than TIME",
        "30d",
        "--target SIZE",
        "50 GiB",
        "--ids FILE",
        "--stale",
        "--yes",
        "--dry-run",
        "--json",
    ),
    "status": ("--dir DIR", "--json"),
    "ls": ("--dir DIR", "--ids FILE", "--match GLOB", "--sort", "--reverse", "--json"),
    "verify": ("--against-origin", "--dir DIR", "--json"),
    "doctor": ("--dir DIR", "--json"),
    "plan": (
        "--nodes N",
        "--capacity SIZE",
        "--assignment",
        "--eviction",
        "--ranks-per-node N",
        "--epochs N",
        "--probe",
        "--seed N",
        "--json",
    ),
    "report": ("--output", "-o", "default: report.html", "--nodes N", "--epochs N"),
    "top": ("--dir DIR", "--once", "--interval SECONDS", "--metrics-file FILE.prom", "--json"),
    "audit": ("--ids FILE", "--html FILE", "--json"),
    "plot": ("--output", "-o", "[default: the terminal]", "--at X,Y,Z", "default: 0.5,0.5,0.5"),
    "lock": ("--output", "-o", "default: data.lock"),
    "diff": ("LOCK|CONFIG", "--json"),
    "serve": (
        "--host HOST",
        "default: 127.0.0.1",
        "--port N",
        "default: 7070",
        "--token-file FILE",
        "cache.peer_token_file",
        "--json",
    ),
    "schema": ("--output", "-o", "[default: standard output]"),
}


def test_commands_are_listed_in_the_order_of_use() -> None:
    listed = zarrcache("--help").out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_with_unit_and_default(name: str) -> None:
    done = zarrcache(name, "--help")
    assert done.code == 0
    for words in COMMANDS[name]:
        assert words in " ".join(done.out.split())
    options = [
        line
        for line in done.out.partition("Options:")[2].splitlines()
        if line.strip().startswith("-")
    ]
    assert [line for line in options if len(line.split("  ")) < 2 and not line.endswith(" ")] == []


def test_help_and_version_import_no_heavy_library() -> None:
    heavy = {
        "torch",
        "zarr",
        "s3fs",
        "obstore",
        "sklearn",
        "numpy",
        "pydantic",
        "rich",
        "diskcache",
    }
    script = f"""
import sys
from zarrcache.cli import main
sys.argv = ["zarrcache", "--help"]
try:
    main()
except SystemExit:
    print(sorted({heavy} & set(sys.modules)))
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"
    assert zarrcache("--version").out == f"{__version__}\n"


def test_no_command_or_an_unknown_one_is_exit_2_with_usage() -> None:
    for arguments in ((), ("wram",)):
        done = zarrcache(*arguments)
        assert done.code == 2
        assert "Usage:" in done.out + done.err


def test_the_scripts_in_tools_run_the_same_commands() -> None:
    tools = Path(__file__).resolve().parents[2] / "tools"
    for script, words in (
        ("warm.py", "--split"),
        ("evict.py", "--older-than"),
        ("convert_to_zarr.py", "--zarr-format"),
    ):
        out = subprocess.run(
            [sys.executable, tools / script, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert words in out


def test_each_command_can_be_quiet_or_say_every_step(tmp_path: Path) -> None:
    """With both there is no way to tell which is meant. What --quiet leaves of each command is in
    ``test_cli_quiet.py``.
    """
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.yaml").write_text("data_dir: here\n")
    noisy = zarrcache("status", "--dir", tmp_path / "empty", "-v")
    quiet = zarrcache("status", "--dir", tmp_path / "empty", "--quiet")
    assert noisy.out == quiet.out
    assert zarrcache("status", tmp_path / "a.yaml", "-q").err.startswith("error: ")
    assert "Traceback" in zarrcache("status", tmp_path / "a.yaml", "--verbose").err
    both = zarrcache("status", tmp_path / "a.yaml", "-q", "-v")
    assert (both.code, "exclude each other" in both.err) == (2, True)
