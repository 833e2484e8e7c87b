"""``--quiet`` has one meaning: results, errors and what failed; no progress, warnings, hints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.test_cli_help import COMMANDS
from tests.support.chgcars import write_chgcar
from tests.support.training import write_config, write_pairs, zarrcache

#: Arguments of each command, and how each line begins that it says with --quiet.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("--source {0}/nope", ("error: ",)),
    "init": ("{0}/new.yaml --yes --force", ()),
    "convert": ("{0}/files {0}/stores --overwrite", ("failed: ",)),
    "map": ("{0}/data {0}/more -o {0}/new.json --force", ()),
    "warm": ("{0}/train.yaml --revalidate", ("failed: ",)),
    "evict": ("{0}/train.yaml --older-than 1d --yes", ()),
    "status": ("{0}/train.yaml", ()),
    "ls": ("{0}/train.yaml", ()),
    "verify": ("{0}/train.yaml", ("corrupt: ",)),
    "doctor": ("", ()),
    "plan": ("{0}/train.yaml", ()),
    "report": ("{0}/train.yaml -o {0}/report.html", ()),
    "top": ("{0}/train.yaml --once --interval 0.1", ()),
    "audit": ("{0}/train.yaml --ids {0}/ids", ()),
    "plot": ("{0}/train.yaml mp-0 -o {0}/pair.png", ()),
    "lock": ("{0}/whole.yaml -o {0}/data.lock", ()),
    "diff": ("{0}/data.lock {0}/whole.yaml", ()),
    "serve": ("{0}/train.yaml --host 0.0.0.0", ("error: ",)),
    "schema": ("-o {0}/schema.json", ()),
}
#: Those that say more without it.
TALKATIVE = {
    "init", "convert", "map", "warm", "status", "verify", "doctor", "plan", "report", "audit",
    "plot", "lock", "schema",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm cache of pairs, of which one is broken and one has two sources; a config of the whole
    ones; and files of which one is broken and one is no density.
    """
    root = tmp_path_factory.mktemp("home")
    write_pairs(root, 4)
    (root / "data" / "mp-1.CHGCAR").touch()
    next((root / "label" / "mp-3.zarr").rglob("0.0.0")).write_bytes(b"no chunk")
    (root / "ids").write_text("mp-0\nmp-1\n")
    config = write_config(root)
    whole = config.read_text().replace("map.json", "whole.json")
    (root / "whole.yaml").write_text(whole)
    (root / "whole.json").write_text('{"GGA": ["mp-0", "mp-1", "mp-2"]}')
    (root / "more").mkdir()
    (root / "more" / "mp-0.zarr").mkdir()
    write_chgcar(root / "files" / "mp-1.CHGCAR", (4, 3, 2), 1)
    (root / "files" / "mp-2.CHGCAR").write_text("no density\n")
    (root / "files" / "LOCPOT").write_text("a potential\n")
    assert zarrcache("warm", config).code == 1
    return root


def test_every_command_is_in_the_table() -> None:
    assert list(CASES) == list(COMMANDS)


@pytest.mark.parametrize("name", CASES)
def test_quiet_leaves_results_errors_and_failures(home: Path, name: str) -> None:
    """On stdout nothing changes."""
    if name == "plot":
        pytest.importorskip("PIL", reason="pictures need the extra 'plot'")
    if name == "diff" and not (home / "data.lock").exists():
        zarrcache("lock", home / "whole.yaml", "-o", home / "data.lock")
    arguments, kept = CASES[name]

    def run(*options: str) -> tuple[str, list[str]]:
        if name == "verify":
            entries = (home / "cache" / "zarrcache-v1" / "entries").rglob("*")
            entry = max(filter(Path.is_file, entries), key=lambda path: path.stat().st_size)
            entry.write_bytes(entry.read_bytes()[:-1] + b"?")
        done = zarrcache(name, *arguments.format(home).split(), *options)
        return re.sub(r"[0-9.]+ (s\b|entries|KiB)", "", done.out), done.err.splitlines()

    quiet_out, quiet = run("--quiet")
    assert [line for line in quiet if not line.startswith(kept or ("?",))] == []
    assert bool(quiet) == bool(kept), quiet
    if name in TALKATIVE:
        out, said = run()
        assert out == quiet_out
        assert len(quiet) < len(said)
