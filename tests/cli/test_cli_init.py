"""``zarrcache init``, ``zarrcache schema`` and the shell's completion."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.training import command, zarrcache
from zarrcache.config import DataConfig


def test_a_config_is_written_without_questions_and_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "my config.yaml"
    done = zarrcache(
        "init", path, "--yes", "--data-dir", "/data/in", "--functional", "PBEsol", "--limit", "1 GB"
    )
    assert (done.code, done.out) == (0, "")
    next_steps = f"zarrcache doctor '{path}', then zarrcache warm '{path}'\n"
    assert done.err == (
        f"wrote {path}. Next: zarrcache map /data/in s3://my-bucket/densities/label -o "
        f"./data/map.json.gz --functional PBEsol, then {next_steps}"
    )
    (tmp_path / "map.json").touch()
    again = zarrcache("init", tmp_path / "my.yaml", "--yes", "--map-dir", tmp_path / "map.json")
    assert " map " not in again.err
    config = DataConfig.from_yaml(path)
    assert (config.data_dir, config.functional) == ("/data/in", "PBEsol")
    assert config.cache is not None
    assert config.cache.limit == 10**9
    assert f"#   zarrcache status '{path}'  " in path.read_text()
    assert f'yaml.safe_load(open("{path}"))' in path.read_text()


def test_an_existing_file_is_kept_unless_force_is_given(tmp_path: Path) -> None:
    path = tmp_path / "zarrcache.yaml"
    path.write_text("mine: 1\n")
    done = zarrcache("init", path, "--yes")
    assert done.code == 2
    assert "--force" in done.err
    assert path.read_text() == "mine: 1\n"
    assert zarrcache("init", path, "--yes", "--force").code == 0
    assert "data_dir" in path.read_text()


def test_a_file_that_cannot_be_looked_for_is_named(tmp_path: Path) -> None:
    done = zarrcache("init", tmp_path / ("a" * 300), "--yes")
    assert (done.code, "aaa cannot be written (File name too long)" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "many", "--yes"), "'many' is not a size"),
        (("--data-dir", "s3://b/x"), "There is no terminal to ask on"),
    ],
)
def test_wrong_input_writes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "a.yaml"
    done = zarrcache("init", path, *arguments)
    assert done.code == 2
    assert message in done.err
    assert not path.exists()


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    done = zarrcache("init", tmp_path / "none" / "a.yaml", "--yes")
    assert done.code == 2
    assert "cannot be written (No such file or directory)" in done.err


def test_on_a_terminal_it_asks_for_what_is_not_given(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("init", path, "--label-dir", "/label", "--map-dir", "/map.json"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        os.write(ours, b"/in\n\n/scratch\n\n")
        assert process.wait(60) == 0
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert "Where the input densities are" in said
    assert "label_dir" not in said
    config = yaml.safe_load(path.read_text())
    assert [config[key] for key in ("data_dir", "label_dir", "functional")] == [
        "/in",
        "/label",
        "GGA",
    ]
    assert config["cache"]["dir"] == "/scratch"


def test_the_schema_goes_to_stdout_or_to_a_file(tmp_path: Path) -> None:
    printed = zarrcache("schema")
    assert printed.code == 0
    assert json.loads(printed.out)["properties"]["cache"]
    path = tmp_path / "schema.json"
    written = zarrcache("schema", "-o", path)
    assert (written.code, written.out) == (0, "")
    assert f"$schema={path.as_uri()}" in written.err
    assert json.loads(path.read_text()) == json.loads(printed.out)


def test_the_shell_completes_commands_and_options() -> None:
    for words, expected in (("zarrcache wa", "warm"), ("zarrcache warm --rev", "--revalidate")):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.argv = ['zarrcache']; from zarrcache.cli import main; main()",
            ],
            env={
                **os.environ,
                "_ZARRCACHE_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout.split(), done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_on_a_full_disk_is_an_error_in_words() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("schema"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (
        1,
        "error: No space left on device. --verbose shows the traceback.\n",
    )
