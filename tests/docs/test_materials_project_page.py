"""docs/guides/materials-project.md, from top to bottom, over a bucket of the same layout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chgcars import SMALL
from tests.support.mpjson import write_json_pairs
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guides" / "materials-project.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
#: Text of the page, and what replaces it here.
HERE = {
    "s3://materialsproject-parsed": "s3://{bucket}",
    "~/zarrcache": "{home}/cache",
    "pip install 'zarrcache[train]'\n": "",
    "mp-1790998\nmp-2680643\n": "{ids}",
}


def test_every_block_of_the_page_works_in_its_order(
    tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    """Without credentials; the second training makes no request."""
    pytest.importorskip("torch", reason="needs the extra 'train'")
    ids = write_json_pairs(tmp_path / "made", 5, seed=SMALL)
    s3_server.client().put_bucket_acl(Bucket=bucket, ACL="public-read")
    for path in (tmp_path / "made" / "label").iterdir():
        url = f"s3://{bucket}/chgcars/{path.name}"
        s3_server.put(url, path.read_bytes(), ACL="public-read")
    values = {"bucket": bucket, "home": str(tmp_path), "ids": "".join(f"{id_}\n" for id_ in ids)}
    used = set()

    def at_home(text: str) -> str:
        for old, new in HERE.items():
            used.update([old] * (old in text))
            text = text.replace(old, new.format(**values))
        return text

    environment = {name: value for name, value in os.environ.items() if "AWS_" not in name} | {
        "AWS_ENDPOINT_URL_S3": s3_server.endpoint_url,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    printed = []
    for language, name, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(at_home(text))
        elif language == "bash":
            printed.append(run("bash", "-euo", "pipefail", "-c", at_home(text)))
    assert used == HERE.keys()
    assert "Wrote 5 ids as GGA to map.json.gz" in printed[0]
    assert "Warmed 5 of 5 ids" in printed[1]
    log = RequestLog(s3_server, bucket)
    assert "requests=0" in run(sys.executable, "train.py")
    assert log.seen() == []
