"""``zarrcache convert`` as a command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.s3server import S3Server
from tests.support.training import write_config, zarrcache
from zarrcache.demo.synthetic import write_pairs


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two densities, and a file that is not a density."""
    write_pairs(tmp_path / "files", 2)
    (tmp_path / "files" / "input" / "CHGCAR_mp-9").write_text("not a density\n")
    return tmp_path / "files" / "input"


def test_convert_reports_failures_and_skips_converted_files(files: Path, tmp_path: Path) -> None:
    """Exit 0 for a dry run, 1 with a bad file; a second run tries only the bad file."""
    dry = zarrcache("convert", files, tmp_path / "out", "--dry-run")
    assert (dry.code, dry.out.startswith("Would convert 3 files (")) == (0, True)
    assert [line.split() for line in dry.out.splitlines()[1:2]] == [
        ["mp-9", f"{files}/CHGCAR_mp-9"]
    ]
    assert "Dry run: nothing was written. Values were not read: a file that is cut" in dry.out
    assert not (tmp_path / "out").exists()
    done = zarrcache("convert", files, tmp_path / "out", "--workers", "1")
    assert done.code == 1
    assert done.out.startswith(f"Converted 2 of 3 files to {tmp_path}/out (")
    assert done.out.endswith("; 1 failed.\n")
    assert f"failed: {files}/CHGCAR_mp-9 " in done.err
    again = zarrcache("convert", files, tmp_path / "out", "--workers", "1", "--json")
    assert (again.code, len(again.document["converted"]), len(again.document["skipped"])) == (
        1,
        0,
        2,
    )
    assert [Path(result["path"]).name for result in again.document["failed"]] == ["CHGCAR_mp-9"]


def test_a_url_that_lost_a_slash_is_no_directory(files: Path) -> None:
    done = zarrcache("convert", files, Path("s3://bucket/input"))
    assert (done.code, done.out) == (2, "")
    assert "'s3:/bucket/input' has a URL scheme that is not supported. Write s3://" in done.err


def test_a_bucket_without_its_scheme_is_noticed(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a path; only that its first directory does not exist gives it away."""
    monkeypatch.chdir(tmp_path)
    note = "note: my-bucket is a new directory of this machine. For a bucket write s3://my-bucket/x"
    one = max(files.iterdir())
    done = zarrcache("convert", one, "my-bucket/x", "--dry-run")
    assert (done.code, note in done.err) == (0, True)
    done = zarrcache("convert", one, "my-bucket/x")
    assert (done.code, note in done.err) == (0, True)
    assert done.out.startswith(f"Converted 1 of 1 file to {tmp_path}/my-bucket/x (")
    for local in ("my-bucket/y", "new", "./new/z", tmp_path / "new" / "w", f"file://{tmp_path}/v"):
        assert "note:" not in zarrcache("convert", one, local, "--dry-run").err
    for option in (("--anon",), ("--endpoint-url", "http://localhost:1")):
        refused = zarrcache("convert", one, "my-bucket/x", *option)
        assert (refused.code, refused.out) == (2, "")
        assert f"{tmp_path}/my-bucket/x is a directory of this machine, and there" in refused.err


def test_more_than_two_paths_are_refused_with_a_way_to_give_them(files: Path) -> None:
    """As a shell makes them of ``CHGCAR_* out``."""
    done = zarrcache("convert", *sorted(files.iterdir()), "out")
    assert (done.code, done.out) == (2, "")
    assert "one SRC and one DST, and 4 paths are given. Give the directory" in done.err


def test_a_source_and_a_destination_that_are_swapped_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "stores" / "mp-1.zarr").mkdir(parents=True)
    done = zarrcache("convert", tmp_path / "stores", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "It holds Zarr stores: SRC comes before DST." in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "s3://bucket/chgcars", "out"),
        ("map", ".", "-o", "s3://bucket/map.json.gz"),
        ("init", "s3://bucket/train.yaml"),
        ("warm", "s3://bucket/train.yaml"),
        ("status", "--dir", "s3://bucket/cache"),
        ("diff", "s3://bucket/data.lock", "data.lock"),
    ],
)
def test_a_file_of_this_machine_is_no_url(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be read from, or written to, a directory ``s3:``."""
    monkeypatch.chdir(tmp_path)
    done = zarrcache(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "is a URL. Give a path of this machine" in done.err
    assert not list(tmp_path.iterdir())


def test_a_source_and_a_destination_that_cannot_be_looked_at_are_named(
    files: Path, tmp_path: Path
) -> None:
    long = tmp_path / ("a" * 300)
    for source, destination in ((long, tmp_path / "out"), (files, long)):
        done = zarrcache("convert", source, destination)
        assert (done.code, done.out) == (2, "")
        assert "aaa cannot be read (File name too long)" in done.err


def test_convert_uploads_with_the_settings_of_a_training_config(
    files: Path, tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    """``--s3-kwargs`` and ``--endpoint-url`` override ``s3_kwargs`` of the config."""
    config = write_config(tmp_path, s3_kwargs=s3_server.kwargs_at("http://127.0.0.1:9"))
    options = (
        "--config",
        config,
        "--endpoint-url",
        s3_server.endpoint_url,
        "--pattern",
        "*.CHGCAR",
        "--zip",
        "--workers",
        "1",
    )
    done = zarrcache("convert", files, f"s3://{bucket}/input", *options)
    assert (done.code, done.err) == (0, "")
    assert len(s3_server.keys(f"s3://{bucket}/input")) == 2
    assert all(key.endswith(".zarr.zip") for key in s3_server.keys(f"s3://{bucket}/input"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--chunks", "sixteen"),
            "error: --chunks 'sixteen' is not one or three numbers of grid points",
        ),
        (("--s3-kwargs", "anon"), "error: --s3-kwargs is not a JSON object"),
        (("--s3-kwargs", "[]"), "error: --s3-kwargs is not a JSON object"),
        (("--zarr-format", "4"), "Invalid value for '--zarr-format'"),
    ],
)
def test_a_wrong_option_of_convert_is_exit_2_and_writes_nothing(
    files: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done = zarrcache("convert", files, tmp_path / "out", *options)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_left_out_is_listed_with_its_reason(files: Path, tmp_path: Path) -> None:
    """On stderr, by a dry run and by a run; exit 0, because no density was chosen and lost."""
    (files / "CHGCAR_mp-9").unlink()
    (files / "below").mkdir()
    for name in ("CHGCAR.ncl", "Li_CHGCAR.nospin.gz", "INCAR"):
        (files / "below" / name).touch()
    for more in (("--dry-run",), ("--workers", "1")):
        done = zarrcache("convert", files, tmp_path / "out", *more)
        assert done.code == 0
        assert f"left out: {files}/below/CHGCAR.ncl: 'ncl' after CHGCAR is neither" in done.err
        assert f"left out: {files}/below/Li_CHGCAR.nospin.gz: 'nospin' after CHGCAR" in done.err
        assert "INCAR" not in done.err
    document = zarrcache("convert", files, tmp_path / "new", "--dry-run", "--json").document
    assert sorted(document["task_ids"].values()) == ["syn-0-0000", "syn-0-0001"]
    assert [Path(item["path"]).name for item in document["left_out"]] == [
        "CHGCAR.ncl",
        "Li_CHGCAR.nospin.gz",
    ]


def test_several_files_of_one_material_are_all_listed_and_one_can_be_preferred(
    files: Path, tmp_path: Path
) -> None:
    """Materials with one file are converted whatever is preferred."""
    (files / "CHGCAR_mp-9").unlink()
    one, two = sorted(files.iterdir())
    for name in ("mp-1/CHGCAR", "mp-1/CHGCAR.static", "mp-2/CHGCAR", "mp-2/CHGCAR.static"):
        (files / name).parent.mkdir(exist_ok=True)
        shutil.copy(one, files / name)
    (files / "mp-3").mkdir()
    two.rename(files / "mp-3" / "CHGCAR")
    for more in ((), ("--dry-run",), ("--prefer", "**/CHGCAR*")):
        done = zarrcache("convert", files, tmp_path / "out", *more)
        assert (done.code, done.out) == (2, "")
        for task_id in ("mp-1", "mp-2"):
            both = f"{files}/{task_id}/CHGCAR and {files}/{task_id}/CHGCAR.static are both"
            assert f"{both} {task_id}" in done.err
    assert "or choose one of each (--prefer '**/CHGCAR'), or name them by their path" in done.err
    done = zarrcache("convert", files, tmp_path / "out", "--prefer", "**/CHGCAR.static")
    assert (done.code, done.out.startswith("Converted 4 of 4 files")) == (0, True)
    for task_id in ("mp-1", "mp-2"):
        source = f"{files}/{task_id}/CHGCAR"
        assert f"left out: {source}: {task_id} is converted from {source}.static" in done.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["mp-1.zarr", "mp-2.zarr", "mp-3.zarr", f"{one.name.split('.')[0]}.zarr"]


def test_a_way_out_that_does_not_help_is_not_advised(files: Path, tmp_path: Path) -> None:
    """Two files of one directory whose path gives one id too."""
    (files / "CHGCAR_mp-9").unlink()
    (files / "mp-1").mkdir()
    for path, name in zip(sorted(files.glob("*CHGCAR*")), ("CHGCAR", "CHGCAR.vasp"), strict=True):
        path.rename(files / "mp-1" / name)
    done = zarrcache("convert", files, tmp_path / "out")
    assert (done.code, "--id-from" in done.err) == (2, False)
    assert "choose one of each (--prefer '**/CHGCAR')" in done.err
    assert zarrcache("convert", files, tmp_path / "out", "--prefer", "**/CHGCAR").code == 0


def test_a_file_without_an_id_is_named_by_a_dry_run_too(files: Path, tmp_path: Path) -> None:
    (files / "CHGCAR_mp-9").unlink()
    for more in (("--dry-run",), ()):
        rule = (r"--id-from", r"(mp-\d+)")
        done = zarrcache("convert", files, tmp_path / "out", *rule, *more)
        assert done.code == 1
        assert done.err.count(f"failed: {files}/syn-") == 2
        assert "gives no task id (id_from is" in done.err


def test_a_potential_is_refused_however_it_is_given(files: Path, tmp_path: Path) -> None:
    """Under the name of a density in a directory; under its own with a pattern, or as the file."""
    (files / "CHGCAR_mp-9").unlink()
    first, second = sorted(files.iterdir())
    lines = first.read_text().splitlines()
    grid = next(place for place, line in enumerate(lines) if not line.strip()) + 2
    lines[grid:] = [" ".join(str(-float(v)) for v in line.split()) for line in lines[grid:]]
    second.write_text("\n".join([*lines, ""]))
    (files / "LOCPOT").write_text("\n".join([*lines, ""]))
    done = zarrcache("convert", files, tmp_path / "out")
    assert (done.code, done.out.startswith("Converted 1 of 2 files")) == (1, True)
    assert f"failed: {second}: mean(total) is -" in done.err
    for given in ((files, "--pattern", "LOCPOT"), (files / "LOCPOT",)):
        source, *options = given
        dry = zarrcache("convert", source, tmp_path / "out", *options, "--dry-run")
        assert (dry.code, dry.out.startswith("Would convert 0 files")) == (1, True)
        done = zarrcache("convert", source, tmp_path / "out", *options)
        assert (done.code, done.out.startswith("Converted 0 of 1 file")) == (1, True)
        assert done.err == dry.err
        assert f"failed: {files / 'LOCPOT'}: its name is that of a potential (LOCPOT)" in done.err
        assert "Convert the CHGCAR of that calculation" in done.err
    assert [path.name for path in (tmp_path / "out").glob("*.zarr")] == [f"{first.stem}.zarr"]


@pytest.mark.parametrize("name", ["a-locpot.CHGCAR", "CHGCAR_LOCPOT", "LOCPOT.CHGCAR"])
def test_a_potential_named_like_a_density_and_a_potential_is_refused(
    files: Path, tmp_path: Path, name: str
) -> None:
    """As readers of such files refuse it."""
    (files / "CHGCAR_mp-9").unlink()
    first, second = sorted(files.iterdir())
    lines = first.read_text().splitlines()
    grid = next(place for place, line in enumerate(lines) if not line.strip()) + 2
    lines[grid:] = [" ".join(str(-float(v)) for v in line.split()) for line in lines[grid:]]
    second.unlink()
    (files / name).write_text("\n".join([*lines, ""]))
    done = zarrcache("convert", files, tmp_path / "out")
    assert (done.code, done.out.startswith("Converted 1 of 2 files")) == (1, True)
    assert f"failed: {files / name}: mean(total) is -" in done.err
    assert len([*(tmp_path / "out").glob("*.zarr")]) == 1
    done = zarrcache("convert", files, tmp_path / "out", "--pattern", name)
    assert (done.code, done.out.startswith("Converted 0 of 1 file")) == (1, True)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_without_pymatgen_one_line_says_so(files: Path, tmp_path: Path, workers: str) -> None:
    """Instead of one per file; in this process and with workers."""
    (tmp_path / "shadow" / "pymatgen").mkdir(parents=True)
    (tmp_path / "shadow" / "pymatgen" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pymatgen'\", name='pymatgen')\n"
    )
    command = ["-m", "zarrcache", "convert", files, tmp_path / "out", "--workers", workers]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "shadow"), *sys.path])},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: Reading the structure of CHGCAR and MP files needs pymatgen (No module named "
        "'pymatgen'). Install it: pip install 'zarrcache[convert]'\n"
    )


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_s3_kwargs_come_from_a_file_and_no_secret_from_the_command_line(
    files: Path, tmp_path: Path, s3_server: S3Server, bucket: str, suffix: str
) -> None:
    """The same on the command line works, with a warning that does not repeat the secret."""
    text = json.dumps(s3_server.s3_kwargs)
    given = tmp_path / f"s3.{suffix}"
    if suffix == "yaml":
        given.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in json.loads(text).items()))
    else:
        given.write_text(text)
    options = ("--pattern", "*.CHGCAR", "--zip", "--workers", "1")
    done = zarrcache("convert", files, f"s3://{bucket}/a", *options, "--s3-kwargs", f"@{given}")
    assert (done.code, done.err) == (0, "")
    inline = zarrcache("convert", files, f"s3://{bucket}/b", *options, "--s3-kwargs", text)
    assert inline.code == 0
    assert "warning: --s3-kwargs holds secret, and every user of this machine" in inline.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"s3.json cannot be read (No such file or directory)"),
        ("[1, 2]", "is not a JSON or YAML object"),
        ('{"secret": "hunter2"', "is not a JSON or YAML object"),
    ],
)
def test_a_file_of_s3_kwargs_that_cannot_be_used_is_named_without_its_content(
    files: Path, tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "s3.json").write_text(content)
    done = zarrcache("convert", files, "s3://bucket/x", "--s3-kwargs", f"@{tmp_path / 's3.json'}")
    assert done.code == 2
    assert words in done.err
    assert "hunter2" not in done.err


@pytest.mark.parametrize(
    "moments",
    [(0.06, 0.2, 0.4), pytest.param((0.1, 0.15, 0.25, 0.3, 0.5, 0.8), marks=pytest.mark.slow)],
)
def test_ctrl_c_during_the_imports_ends_without_a_traceback(
    files: Path, tmp_path: Path, moments: tuple[float, ...]
) -> None:
    """At any moment after the interpreter and the entry point are there; nothing is left."""
    ready = "import sys, runpy, zarrcache.cli; print(flush=True); sys.argv = sys.argv[1:]; "
    run = ready + "runpy.run_module('zarrcache', run_name='__main__', alter_sys=True)"
    for number, moment in enumerate(moments):
        out = tmp_path / f"out-{number}"
        process = subprocess.Popen(
            [sys.executable, "-c", run, "zarrcache", "convert", files, out, "--workers", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        # What is wrong with a file of the test is said once all files are done.
        is_done = "failed: " in err
        if process.returncode == 1 or (is_done and process.returncode == -signal.SIGINT):
            continue  # it was faster
        assert process.returncode == 130, err
        assert "Traceback" not in err
        said = [line for line in err.splitlines() if not line.startswith("failed: ")]
        assert said[0].startswith("Interrupted.")
        assert not list(out.glob(".*"))
        shutil.rmtree(out, ignore_errors=True)
