"""``zarrcache top``, ``--metrics-file`` and ``/metrics``: running processes are seen, and not
disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.training import command, start, write_config, write_pairs, zarrcache
from zarrcache.stats import Counters, find_boards

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")

#: Reads one density again and again, a hundred times a second; says so once it has read some. Its
#: worker does the same.
TRAINING = """
import sys, time, yaml
from torch.utils.data import DataLoader, RandomSampler
from zarrcache import ZarrDataset
from zarrcache.registry import open_reader

if __name__ == "__main__":
    dataset = ZarrDataset(open_reader(yaml.safe_load(open(sys.argv[1]))), "train")
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=1)
    for number, sample in enumerate(loader):
        if number == 3:
            print("reading", flush=True)
        time.sleep(0.01)
"""
#: The same without torch, whose import takes longer than all else.
PLAIN_TRAINING = """
import multiprocessing, os, sys, time, yaml
from zarrcache.registry import open_reader

def read(reader):
    for number in range(10**9):
        reader.load(reader.task_ids[0], "data")
        if number == 3:
            print("reading", flush=True)
        time.sleep(0.01)

if __name__ == "__main__":
    reader = open_reader(yaml.safe_load(open(sys.argv[1])))
    multiprocessing.get_context("fork").Process(target=read, args=(reader,), daemon=True).start()
    read(reader)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of three warm pairs."""
    write_pairs(tmp_path, 3)
    path = write_config(tmp_path)
    assert zarrcache("warm", path).code == 0
    return path


@contextlib.contextmanager
def training(config: Path, program: str = PLAIN_TRAINING) -> Iterator[subprocess.Popen[str]]:
    """A process that trains; it and its worker are killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(config)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def cache_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["cache"]["dir"])


def test_a_training_is_seen_with_its_worker_and_forgotten_when_it_is_killed(config: Path) -> None:
    with training(config, TRAINING) as process:
        seen = zarrcache("top", config, "--once", "--json", "--interval", "0.3").document
        assert (seen["runs"], seen["processes"]) == (1, 2)
        assert process.pid in seen["pids"]
        assert seen["per_second"]["hits"] > 1
        assert seen["per_second"]["served_bytes"] > 480
        assert (seen["hit_ratio"], seen["total"]["misses"], seen["total"]["requests"]) == (1, 0, 0)
        assert 0 < seen["volume_bytes"] <= seen["limit_bytes"] == 2**30
    wait_until(lambda: not find_boards(cache_of(config)))
    seen = zarrcache("top", "--dir", cache_of(config), "--once", "--json").document
    assert (seen["runs"], seen["processes"], seen["limit_bytes"]) == (0, 0, None)
    assert seen["volume_bytes"] > 0


def test_two_trainings_add_up_and_other_caches_are_not_counted(
    config: Path, tmp_path: Path
) -> None:
    document = yaml.safe_load(config.read_text())
    document["cache"]["dir"] = str(tmp_path / "elsewhere")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(document))
    with training(config), training(config), training(other):
        seen = zarrcache("top", config, "--once", "--json", "--interval", "0.2").document
        assert (seen["runs"], seen["processes"]) == (2, 4)
        seen = zarrcache("top", other, "--once", "--json", "--interval", "0.2").document
        assert (seen["runs"], seen["total"]["misses"] > 0) == (1, True)


def test_a_link_to_the_directory_is_the_same_cache(config: Path, tmp_path: Path) -> None:
    counters = Counters(shared=True, directory=cache_of(config))
    counters.add(hits=2)
    (tmp_path / "link").symlink_to(cache_of(config))
    [board] = find_boards(tmp_path / "link")
    assert (board.pids, board.stats.hits) == ((os.getpid(),), 2)
    counters.set(ahead_bytes=7)
    counters.set(ahead_bytes=3)
    assert find_boards(cache_of(config))[0].stats.ahead_bytes == 3


def test_text_fits_60_columns_and_names_what_there_is(config: Path) -> None:
    with training(config):
        done = zarrcache("top", config, "--once", "--interval", "0.2", env={"COLUMNS": "60"})
    lines = done.out.splitlines()
    assert (done.code, done.err, max(map(len, lines)) <= 60) == (0, "", True)
    assert lines[1].startswith("1 run, 2 processes (")
    shown = {line[:20].strip(): line[20:].split() for line in lines[3:]}
    assert shown["hit ratio"] == ["100.0", "%", "100.0", "%"]
    assert shown["on disk"][:4] == ["0", "%", "of", "1.0"]
    idle = zarrcache("top", config, "--once", "--interval", "0.1")
    assert "No process of this user uses this cache now." in idle.out


def test_on_a_terminal_it_is_redrawn_until_ctrl_c_which_is_no_error(config: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("top", config, "--interval", "0.1"), stdout=theirs, stderr=theirs, stdin=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while shown.count(b"hit ratio") < 3:
            shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while os.read(ours, 65536):
                pass
        assert process.wait(30) == 0
    os.close(ours)


def test_without_a_terminal_json_is_a_line_per_interval(config: Path) -> None:
    process = start("top", config, "--json", "--interval", "0.1")
    assert process.stdout is not None
    for _ in range(2):
        assert json.loads(process.stdout.readline())["runs"] == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.communicate()


def samples(text: str) -> dict[str, float]:
    """Values of an exposition by name, without labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"([a-z_]+)\{(.*)\} (\S+)", line):
            assert 'directory="' in match[2]
            found[match[1]] = float(match[3])
    return found


@pytest.fixture
def metrics() -> None:
    pytest.importorskip("prometheus_client", reason="needs the extra 'metrics'")


@pytest.mark.usefixtures("metrics")
def test_a_metrics_file_is_kept_whole_and_up_to_date(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "zarrcache.prom"
    with training(config) as process:
        watching = start("top", config, "--metrics-file", path, "--interval", "0.1")
        try:
            wait_until(path.exists)
            first = samples(path.read_text())
            wait_until(
                lambda: (
                    samples(path.read_text())["zarrcache_hits_total"]
                    > first["zarrcache_hits_total"]
                )
            )
            text = path.read_text()
        finally:
            watching.terminate()
            watching.communicate()
        assert f'pid="{process.pid}"' in text
        assert samples(text)["zarrcache_processes"] == 2
        assert samples(text)["zarrcache_limit_bytes"] == 2**30
    assert [file.name for file in tmp_path.iterdir() if "prom" in file.name] == [path.name]


@pytest.mark.usefixtures("metrics")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics-file", "a.txt"), "does not end in .prom"),
        (("--metrics-file", "/nowhere/a.prom"), "cannot be written (No such file or directory)"),
        (("--interval", "0"), "0.1"),
        (("--dir", "/nowhere"), "exclude each other"),
    ],
)
def test_wrong_use_is_named(config: Path, arguments: tuple[str, ...], message: str) -> None:
    done = zarrcache("top", config, "--once", *arguments)
    assert (done.code, message in done.err) == (2, True), done


@pytest.mark.usefixtures("metrics")
def test_serve_answers_prometheus_without_the_token_only_where_asked(
    config: Path, tmp_path: Path
) -> None:
    """The counters and the directory; entries still need the token."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    for arguments, expected in (((), 401), (("--metrics",), 200)):
        process = start("serve", config, "--port", 0, "--token-file", token, "--json", *arguments)
        try:
            assert process.stdout is not None
            lines: list[Any] = []
            while not lines or lines[-1] != "}\n":
                lines.append(process.stdout.readline())
                assert lines[-1], "it has ended"
            url = json.loads("".join(lines))["url"]
            request = urllib.request.Request(f"{url}/metrics")
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    found, status = samples(answer.read().decode()), answer.status
                assert found["zarrcache_sent_bytes_total"] == 0
                assert found["zarrcache_volume_bytes"] > 0
            except urllib.error.HTTPError as exc:
                status = exc.code
            assert status == expected
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/v2/entries/{'0' * 32}", timeout=30)
        finally:
            process.terminate()
            process.communicate()
