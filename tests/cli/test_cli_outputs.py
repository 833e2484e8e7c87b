"""Files that commands write: one of another kind that lies there already is never replaced."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import yaml

from tests.support.training import write_config, write_pairs, zarrcache
from zarrcache.cli.options import PAGE, check_output
from zarrcache.errors import ConfigError

CHGCAR = b"Si1\n   1.0\n     3.866975    0.000000    0.000000\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two pairs in a directory."""
    directory = tmp_path_factory.mktemp("outputs")
    write_pairs(directory, 2)
    return write_config(directory)


@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        ("lock {config} -o {file}", "a.CHGCAR", "a lock file"),
        ("lock {config} -o {file}", "a.CHGCAR.gz", "a lock file"),
        ("report {config} -o {file}", "a.html", "an HTML page"),
        ("audit {config} --html {file}", "a.html", "an HTML page"),
        ("plot {config} mp-0 -o {file}", "a.png", "a PNG picture"),
        ("top {config} --once --metrics-file {file}", "a.prom", "a file of metrics"),
        ("schema -o {file}", "a.json", "a JSON schema"),
    ],
)
def test_a_density_is_not_replaced(
    config: Path, tmp_path: Path, arguments: str, name: str, kind: str
) -> None:
    path = tmp_path / name
    content = gzip.compress(CHGCAR) if path.suffix == ".gz" else CHGCAR
    path.write_bytes(content)
    done = zarrcache(*arguments.format(config=config, file=path).split())
    assert (done.code, done.out) == (2, "")
    assert f"{path} exists and is not {kind}." in done.err
    assert path.read_bytes() == content


def test_a_config_is_not_replaced_by_a_lock_nor_a_page(config: Path) -> None:
    before = config.read_bytes()
    for command in ("lock", "report"):
        assert zarrcache(command, config, "-o", config).code == 2
    assert config.read_bytes() == before


def test_a_lock_is_replaced_by_one_of_the_same_settings_only(config: Path, tmp_path: Path) -> None:
    """Also a compressed one, and one that was cut off, whose error says to write it again."""
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"random_state": 7}))
    for name in ("data.lock", "lock.gz"):
        path = tmp_path / name
        for _ in range(2):
            assert zarrcache("lock", config, "-o", path).code == 0
        made = path.read_bytes()
        done = zarrcache("lock", other, "-o", path)
        assert done.code == 2
        assert f"{path} is a lock of other settings (random_state: 42, then 7)." in done.err
        assert path.read_bytes() == made
    whole = (tmp_path / "data.lock").read_bytes()
    (tmp_path / "data.lock").write_bytes(whole[:99])
    assert zarrcache("lock", config, "-o", tmp_path / "data.lock").code == 0
    assert (tmp_path / "data.lock").read_bytes() == whole


@pytest.mark.parametrize("content", [None, b"", b"<!doctype html>\n<html>"])
def test_a_new_an_empty_and_an_own_file_may_be_written(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "a.html"
    if content is not None:
        path.write_bytes(content)
    check_output(path, *PAGE)
    assert (path.read_bytes() if path.exists() else None) == content


def test_a_directory_is_no_file_to_write(config: Path, tmp_path: Path) -> None:
    """Of `init` also before it asks; of `map` it is no word about a config."""
    for arguments in (
        ("init", tmp_path, "--yes"),
        ("init", tmp_path, "--force"),
        ("map", config.parent / "data", "-o", tmp_path),
        ("lock", config, "-o", tmp_path),
    ):
        done = zarrcache(*arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: {tmp_path} cannot be written (Is a directory).")


def test_a_device_can_be_written_to(tmp_path: Path) -> None:
    check_output(Path("/dev/null"), *PAGE)
    with pytest.raises(ConfigError, match="Not a directory"):
        check_output(Path("/dev/null/x"), *PAGE)
