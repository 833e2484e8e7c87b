"""``zarrcache serve`` in its own process, stopped by a signal."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.signed import authorization
from tests.support.training import start, write_config, write_pairs, zarrcache
from zarrcache import DataConfig, ZarrS3Reader, plan_warm
from zarrcache.data.reader import open_reader
from zarrcache.peers._seal import key_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two pairs, warm, and a token file."""
    write_pairs(tmp_path, 2)
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text("k" * 40)
    path = write_config(tmp_path)
    plan_warm(DataConfig.from_yaml(path)).execute()
    return path


def first_document(process: subprocess.Popen[str]) -> Any:
    """The JSON document that the server prints when it is ready."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith("}"):
            return json.loads(text)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT])
def test_serve_prints_its_url_serves_entries_and_exits_0_on_a_signal(
    config: Path, tmp_path: Path, ends: signal.Signals
) -> None:
    """While another client is connected and waits."""
    waiting = http.client.HTTPConnection("127.0.0.1")
    process = start("serve", config, "--port", "0", "--token-file", tmp_path / "token", "--json")
    try:
        document = first_document(process)
        assert document == {
            "url": document["url"],
            "directory": f"{tmp_path}/cache",
            "has_token": True,
        }
        block = {
            "peers": [document["url"]],
            "peer_token_file": str(tmp_path / "token"),
            "dir": str(tmp_path / "other"),
        }
        reader: ZarrS3Reader = open_reader(
            DataConfig.from_yaml(write_config(tmp_path, name="other.yaml", **block))
        )
        reader.load("mp-1", "data")
        assert reader.stats.peer_hits == 1
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(document["url"] + "/v2/entries/" + "0" * 32, timeout=30)
        waiting = http.client.HTTPConnection(document["url"].removeprefix("http://"), timeout=30)
        line = f"GET /v2/entries/{'0' * 32}?node=http://127.0.0.1:1"
        waiting.connect()
        sealed = authorization(line, document["url"], key=key_of("k" * 40))
        waiting.sock.sendall(f"{line} HTTP/1.1\r\n{sealed}\r\n\r\n".encode())
        assert b"Zarrcache-Answer: kind=lease" in waiting.sock.recv(65536)
        process.send_signal(ends)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        waiting.close()
        process.kill()
        process.wait()


def test_doctor_asks_the_peers(config: Path, tmp_path: Path) -> None:
    """One that answers, one with another token, one that is down: the last two are warnings."""
    (tmp_path / "token").write_text("k" * 40)
    (tmp_path / "token").chmod(0o600)
    process = start("serve", config, "--port", "0", "--token-file", tmp_path / "token", "--json")
    try:
        url = first_document(process)["url"]
        block = {"peers": [url, "http://127.0.0.1:9"], "dir": str(tmp_path / "other")}
        names = {}
        for name, token in (("right", "k" * 40), ("wrong", "x" * 40)):
            (tmp_path / name).write_text(token)
            (tmp_path / name).chmod(0o600)
            path = write_config(
                tmp_path, name=f"{name}.yaml", peer_token_file=str(tmp_path / name), **block
            )
            done = zarrcache("doctor", path, "--json")
            assert done.code == 0
            names[name] = {one["name"]: one for one in done.document["findings"]}
        assert names["right"][f"peer {url}"]["verdict"] == "ok"
        assert names["right"]["peer http://127.0.0.1:9"]["verdict"] == "warn"
        assert "zarrcache serve" in names["right"]["peer http://127.0.0.1:9"]["advice"]
        assert "does not accept this node's token" in names["wrong"][f"peer {url}"]["found"]
    finally:
        process.kill()
        process.communicate()


def test_serve_refuses_unsafe_settings_with_exit_2(config: Path, tmp_path: Path) -> None:
    """No token on a public address, a token file that others can read, a missing token file."""
    (tmp_path / "open").write_text("k" * 40)
    (tmp_path / "open").chmod(0o644)
    for arguments, words in (
        (("--host", "0.0.0.0"), "there is no token"),
        (("--token-file", tmp_path / "open"), "Run: chmod 600"),
        (("--token-file", tmp_path / "none"), "cannot be read"),
    ):
        done = zarrcache("serve", config, "--port", "0", *arguments)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
