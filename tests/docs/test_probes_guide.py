"""The script of docs/guides/probes.md runs, with fewer and smaller data."""

from __future__ import annotations

import os
import re
import runpy
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
        (ROOT / "docs" / "guides" / "probes.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
}
#: Text of the guide, and what replaces it here: smaller sizes.
TOY = {
    "EPOCHS = 50": "EPOCHS = 5",
    "lr=1e-3": "lr=6e-3",
    "PROBES = 200": "PROBES = 20",
    '"num_workers": 8': '"num_workers": 0',
}


def script(home: Path) -> None:
    """``python train_probes.py``."""
    os.chdir(home)
    runpy.run_path(str(home / "train_probes.py"), run_name="__main__")


def test_the_guide_for_probes(tmp_path: Path) -> None:
    """Map, warm, epochs without a miss, and an error that falls."""
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    for name, text in FILES.items():
        for large, small in TOY.items():
            assert name != "train_probes.py" or large in text
            text = text.replace(large, small)
        for path in ("mp/label", "map.json.gz"):
            text = text.replace(path, f"{tmp_path}/{path}")
        (tmp_path / name).write_text(text)
    for number in range(10):
        write_chgcar(tmp_path / f"mp/label/mp-{number}.CHGCAR", (4, 3, 3 + number % 2), number)
    environment = {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    made = zarrcache("map", tmp_path / "mp/label", "-o", tmp_path / "map.json.gz", env=environment)
    assert made.code == 0, made.err
    warmed = zarrcache("warm", tmp_path / "probes.yaml", env=environment)
    assert warmed.out.startswith("Warmed 10 of 10 ids"), warmed.err
    output = tmp_path / "output"
    run_ranks(script, (tmp_path,), [environment], [output])
    lines = output.read_text().splitlines()
    # five epochs of ten samples, each of which reads one density twice
    assert lines[-1] == "100 hits, 0 misses"
    errors = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("epoch")]
    assert len(errors) == 5
    assert errors[-1] < errors[0] / 2
