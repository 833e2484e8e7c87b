"""The script of docs/guides/electrai.md runs, with fewer and smaller data."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.chgcars import write_chgcar
from tests.support.ranks import run_ranks
from tests.support.training import zarrcache

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    m[1]: m[2]
    for m in re.finditer(
        r"^```\w+ (\S+)\n(.*?)^```$",
        (ROOT / "docs" / "guides" / "electrai.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
}
#: Text of the guide, and what replaces it here: smaller sizes.
TOY = {
    "epochs: 50": "epochs: 2",
    "train_workers: 8": "train_workers: 0",
    "val_workers: 2": "val_workers: 0",
}


def script(home: Path) -> None:
    """``python train.py config.yaml``, in a process that has imported Lightning."""
    os.chdir(home)
    sys.path.insert(0, str(home))
    sys.argv = ["train.py", "config.yaml"]
    runpy.run_path(str(home / "train.py"), run_name="__main__")


def test_the_guide_for_electrai(tmp_path: Path) -> None:
    """Files as electrai has them, warm, status, two epochs without a miss."""
    pytest.importorskip("hydra", reason="needs the extra 'test'")
    for name, text in FILES.items():
        for large, small in TOY.items():
            assert name != "config.yaml" or large in text
            text = text.replace(large, small)
        (tmp_path / name).write_text(text.replace("root: mp/", f"root: {tmp_path}/mp/"))
    for number in range(10):
        for seed, role in enumerate(("data", "label")):
            path = tmp_path / "mp" / role / f"mp-{number}.CHGCAR"
            write_chgcar(path, (4, 3, 3 + number % 2), 10 * number + seed)
    (tmp_path / "mp" / "mp_filelist.txt").write_text("".join(f"mp-{n}\n" for n in range(10)))
    environment = {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    config = tmp_path / "config.yaml"
    assert zarrcache("warm", config, env=environment).out.startswith("Warmed 10 of 10 ids")
    status = zarrcache("status", config, "--json", env=environment)
    assert status.document["coverage"]["warm"] == 10, json.dumps(status.document)
    output = tmp_path / "output"
    run_ranks(script, (tmp_path,), [environment], [output])
    # sanity check: 1; two epochs of nine, and one for validation; a sample is two densities
    assert "dataset 0: 42 hits, 0 misses" in output.read_text()
