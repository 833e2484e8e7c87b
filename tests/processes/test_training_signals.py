"""A training script with DataLoader workers is interrupted: it ends within seconds, leaves no
process, and the next run starts warm.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.support.cachedirs import payload_files
from tests.support.faultproxy import FaultProxy, Rule
from tests.support.localnode import LocalNode
from tests.support.processes import HANG_S, end_all, members, until, wait_for_all
from tests.support.s3server import S3Server
from tests.support.training import write_config, write_pairs
from zarrcache import DataConfig
from zarrcache.data.reader import open_reader

#: A README's training loop without signal handlers. Persistent workers, because
#: torch's look for a parent that has gone begins when a worker has started: one whose parent is
#: killed before that waits forever, with any dataset.
SCRIPT = """
import sys, warnings
from torch.utils.data import DataLoader
from zarrcache import DataConfig, ZarrDataset
from zarrcache.registry import open_reader

warnings.simplefilter("ignore")
if __name__ == "__main__":
    dataset = ZarrDataset(open_reader(DataConfig.from_yaml(sys.argv[1])), "all")
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True,
        multiprocessing_context=sys.argv[2],
    )
    while True:
        for sample in loader:
            print(sample["index"], flush=True)
"""


@contextmanager
def training(
    tmp_path: Path, config: Path, method: str, text: str = SCRIPT
) -> Iterator[subprocess.Popen[str]]:
    """The script in its own process group, as a terminal or a batch system starts it."""
    script = tmp_path / "train.py"
    script.write_text(text)
    # not a pipe: it would fill up and block the script
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, str(script), str(config), method]
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        end_all(process)


def tell(process: subprocess.Popen[str], number: signal.Signals, to_all: bool) -> str:
    """Send the signal, and wait until no process is left; the stderr."""
    sent_s = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=HANG_S)
    wait_for_all(process)
    print(f"ended after {time.monotonic() - sent_s:.1f} s")
    return err


SHORT = {"attempts": 2, "timeout": "5 s"}
WAYS = [
    pytest.param(signal.SIGINT, True, "fork", id="Ctrl-C"),
    pytest.param(signal.SIGTERM, True, "fork", id="SIGTERM to all", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, False, "fork", id="SIGTERM to the first", marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, "spawn", id="Ctrl-C, spawned", marks=pytest.mark.slow),
    pytest.param(
        signal.SIGTERM, False, "spawn", id="SIGTERM to the first, spawned", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("number", "to_all", "method"), WAYS)
def test_a_training_ends_with_all_its_workers(
    tmp_path: Path, number: signal.Signals, to_all: bool, method: str
) -> None:
    """With Python's default handling: one traceback of KeyboardInterrupt, none of a worker; the
    exit code of the signal; no partial file.
    """
    node = LocalNode(tmp_path, 4)
    config = write_config(tmp_path)
    with training(tmp_path, config, method) as process:
        until(lambda: (tmp_path / "out").read_text().count("\n") > 8, process, "second epoch")
        until(lambda: len(members(process.pid)) >= 3, process, "worker")
        err = tell(process, number, to_all)
    assert process.returncode == -number, err
    assert err.count("Traceback") == (number == signal.SIGINT), err
    reader = open_reader(DataConfig.from_yaml(config))
    for (task_id, role), values in node.values.items():
        assert np.array_equal(
            reader.load(task_id, role)[0], values.ravel() / np.float32(values.size)
        )  # type: ignore[arg-type]
    assert (reader.stats.misses, reader.stats.purges, reader.stats.cache_errors) == (0, 0, 0)
    node.check_settled()


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        pytest.param(signal.SIGINT, True, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, id="SIGTERM to all", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, id="SIGTERM to the first"),
    ],
)
def test_a_training_that_waits_for_a_silent_server_ends_too(
    tmp_path: Path,
    s3_server: S3Server,
    bucket: str,
    fault_proxy: FaultProxy,
    number: signal.Signals,
    to_all: bool,
) -> None:
    """Its workers wait for an answer that never comes. Those that get no signal go on for at most
    ``cache.retry.timeout``.
    """
    write_pairs(tmp_path, 4)
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    config = write_config(
        tmp_path,
        f"s3://{bucket}",
        s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url),
        retry=SHORT,
    )
    fault_proxy.rules(Rule(op="GET", then="hang"))
    with training(tmp_path, config, "fork") as process:
        until(lambda: fault_proxy.count("GET") > 4, process, "fetch without an answer")
        err = tell(process, number, to_all)
    assert process.returncode == -number, err
    assert err.count("Traceback") <= (number == signal.SIGINT), err
    assert [path for path in payload_files(tmp_path) if ".partial-" in path.name] == []


#: The training process reads too, in its validation, so its workers are not forked.
MODULE = """
import sys, warnings

warnings.simplefilter("ignore")
if __name__ == "__main__":
    # not for the worker, which would import Lightning once more
    from zarrcache.lightning import ZarrDataModule

    data = ZarrDataModule(sys.argv[1], train_workers=1, val_workers=0)
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            print(batch["index"], flush=True)
"""


def test_workers_of_a_data_module_whose_training_is_killed_end_by_themselves(
    tmp_path: Path,
) -> None:
    """By SIGKILL: a worker notices that its parent has changed, which a child of a fork server
    would not.
    """
    if importlib.util.find_spec("lightning") is None:  # not imported, which takes seconds
        pytest.skip("the extra lightning is not installed")
    LocalNode(tmp_path, 4)
    with training(tmp_path, write_config(tmp_path), "", MODULE) as process:
        until(lambda: (tmp_path / "out").read_text().count("\n") > 8, process, "second epoch")
        until(lambda: len(members(process.pid)) >= 2, process, "worker")
        tell(process, signal.SIGKILL, False)
    assert process.returncode == -signal.SIGKILL
