"""``zarrcache convert`` as a command."""

from __future__ import annotations

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
    assert dry.out.endswith("Dry run: nothing was written.\n")
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
        (("--s3-kwargs", "anon"), "error: --s3-kwargs is not JSON"),
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
