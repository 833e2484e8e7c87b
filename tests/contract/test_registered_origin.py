"""An origin of another package, the one of docs/guides/other-storage.md, over a real directory.

Everything here that is imported from zarrcache is public.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.readers import make_reader
from tests.support.stores import small_group
from zarrcache.errors import ConfigError, IncompleteArrayError, OriginNotFoundError
from zarrcache.origin import ObjectInfo, open_origin, register_origin

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "other-storage.md"
ARRAY = "charge_density_total"
IDS = ["mp-1", "mp-2"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on ``sys.path`` with the guide's class, for the local filesystem."""
    package = tmp_path / "site"
    package.mkdir()
    text = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert text is not None
    code = text[1].replace('protocol = "gs"', 'protocol = "file"')
    (package / "lab_storage.py").write_text(code)
    monkeypatch.syspath_prepend(str(package))
    yield package
    sys.modules.pop("lab_storage", None)


@pytest.fixture
def stores(tmp_path: Path) -> dict[tuple[str, str], Any]:
    """Values of two materials, input and label, that lie in a real directory."""
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    return {
        (role, task_id): small_group(tmp_path / role / f"{task_id}.zarr", seed=seed)[ARRAY]
        for seed, (role, task_id) in enumerate((r, i) for r in ("data", "label") for i in IDS)
    }


def test_a_density_is_read_cached_and_read_again_without_the_origin(
    tmp_path: Path, package: Path, stores: dict[tuple[str, str], Any]
) -> None:
    import lab_storage

    register_origin("lab", lab_storage.FsspecOrigin)
    lab = make_reader(tmp_path, f"lab://{tmp_path}", cache={})
    assert sorted(lab.task_ids) == IDS
    assert not lab.use_s3
    for (role, task_id), values in stores.items():
        density, gridsize = lab.load(task_id, role)
        assert np.array_equal(density.reshape(gridsize), values)
    (tmp_path / "data").rename(tmp_path / "gone")
    again = pickle.loads(pickle.dumps(lab))
    density, gridsize = again.load("mp-1", "data")
    assert np.array_equal(density.reshape(gridsize), stores["data", "mp-1"])


def test_an_entry_point_is_found_by_the_commands(
    tmp_path: Path, package: Path, stores: dict[tuple[str, str], Any]
) -> None:
    """In the command's process and in its workers, where no code of the package is called."""
    info = package / "lab_storage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-storage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[zarrcache.origins]\nshelf = lab_storage:FsspecOrigin\n"
    )
    config = {
        "data_dir": f"shelf://{tmp_path}/data",
        "label_dir": f"shelf://{tmp_path}/label",
        "map_dir": str(tmp_path / "map.json"),
        "functional": "GGA",
        "cache": {"dir": str(tmp_path / "cache"), "min_free": 0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "zarrcache", "warm", "config.yaml", "--workers", "2"]
    path = os.pathsep.join([str(package), os.getcwd()])
    done = subprocess.run(
        [*command, "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["warm"], report["failed"]) == (len(IDS), [])


def test_the_origin_of_the_guide_keeps_the_contract(tmp_path: Path, package: Path) -> None:
    import lab_storage

    register_origin("lab", lab_storage.FsspecOrigin)
    (tmp_path / "d" / "mp-1.zarr").mkdir(parents=True)
    (tmp_path / "d" / "mp-1.zarr" / "0").write_bytes(b"0123456789")
    origin = open_origin(f"lab://{tmp_path}/d")
    assert origin.list_names() == ["mp-1.zarr"]
    assert origin.list_objects("mp-2.zarr/") == []
    assert origin.list_objects("mp-2.zarr.zip") == []
    [obj] = origin.list_objects("mp-1.zarr/")
    assert (obj.key, obj.size_bytes) == ("mp-1.zarr/0", 10)
    assert isinstance(obj, ObjectInfo)
    assert [(o, bytes(body)) for o, body in origin.fetch([obj])] == [(obj, b"0123456789")]
    assert origin.fetch_range(obj, 2, 5) == b"234"
    (tmp_path / "d" / "mp-1.zarr" / "0").write_bytes(b"other")
    with pytest.raises(IncompleteArrayError, match="was changed"):
        list(origin.fetch([obj]))
    (tmp_path / "d" / "mp-1.zarr" / "0").unlink()
    with pytest.raises(IncompleteArrayError, match="is listed but gone"):
        origin.fetch_range(obj, 0, 1)
    with pytest.raises(OriginNotFoundError, match="does not exist"):
        open_origin(f"lab://{tmp_path}/none").list_names()


def test_a_scheme_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'ftp://h/d' is of scheme ftp://.*register_origin"):
        open_origin("ftp://h/d")


@pytest.mark.parametrize("scheme", ["", "lab://", "a b"])
def test_a_scheme_that_no_url_can_have_is_not_registered(scheme: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL scheme"):
        register_origin(scheme, open_origin)  # type: ignore[arg-type]
