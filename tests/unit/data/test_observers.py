"""An observer of reads, as a user writes one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from zarrcache import Read, ReadObserver, ZarrDataset, ZarrS3Reader

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "observing-reads.md"


class Log:
    """Writes a line per call; it works in every process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_started(self, task_id: str, role: str) -> None:
        self._write("started", task_id, role)

    def read_finished(self, read: Read) -> None:
        assert read.seconds > 0
        self._write("finished", read.task_id, read.role, read.outcome, read.nbytes)

    def _write(self, *words: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(" ".join(map(str, (*words, os.getpid()))) + "\n")

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "reads.log")


@pytest.fixture
def reader(
    tmp_path: Path, small_group: Callable[..., Any], make_reader: Callable[..., ZarrS3Reader]
) -> ZarrS3Reader:
    for role in ("data", "label"):
        for task_id in ("mp-1", "mp-2", "mp-3"):
            small_group(tmp_path / role / f"{task_id}.zarr", shape=(5, 6, 7))
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-1", "mp-2", "mp-3"]}))
    return make_reader(cache={}, train_fraction=2)


def test_a_density_that_is_opened_is_reported_and_still_read_in_part(
    reader: ZarrS3Reader, log: Log
) -> None:
    """A monitor must not make a training on crops read and decode whole densities."""
    reader.load("mp-1", "data")
    reader.observe(log)
    before = reader.stats.served_bytes
    grid = reader.open_grid("mp-1", "data")
    assert reader.stats.served_bytes == before
    assert grid[0, 0, :2].shape == (2,)
    assert reader.stats.served_bytes == before + 8
    assert [line[:4] for line in log.lines()] == [
        ["started", "mp-1", "data", str(os.getpid())],
        ["finished", "mp-1", "data", "hit"],
    ]


def test_misses_and_hits_are_reported_with_their_bytes(reader: ZarrS3Reader, log: Log) -> None:
    observer: ReadObserver = log
    reader.observe(observer)
    for _ in range(2):
        reader.load("mp-1", "data")
    reader.unobserve(observer)
    reader.load("mp-1", "data")
    pid, nbytes = str(os.getpid()), str(4 * 5 * 6 * 7)
    assert log.lines() == [
        ["started", "mp-1", "data", pid],
        ["finished", "mp-1", "data", "miss", nbytes, pid],
        ["started", "mp-1", "data", pid],
        ["finished", "mp-1", "data", "hit", nbytes, pid],
    ]


def test_the_example_of_the_guide_runs(
    reader: ZarrS3Reader, capsys: pytest.CaptureFixture[str]
) -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("## Each read")[2]
    code = section.partition("```python")[2].partition("```")[0]
    reader.load("mp-1", "data")
    exec(compile(code, str(GUIDE), "exec"), {"reader": reader})
    assert capsys.readouterr().out.startswith("1 hits, ")


def test_reads_past_a_full_cache_are_bypasses(
    tmp_path: Path,
    small_group: Callable[..., Any],
    make_reader: Callable[..., ZarrS3Reader],
    log: Log,
) -> None:
    small_group(tmp_path / "data" / "mp-1.zarr")
    small_group(tmp_path / "label" / "mp-1.zarr")
    reader = make_reader(cache={"limit": 4096})
    reader.observe(log)
    reader.load("mp-1", "data")
    assert log.lines()[1][3] == "bypass"


def test_a_read_that_raises_is_started_and_not_finished(reader: ZarrS3Reader, log: Log) -> None:
    reader.observe(log)
    with pytest.raises(FileNotFoundError):
        reader.load("mp-9", "data")
    assert [line[0] for line in log.lines()] == ["started"]


def test_an_observer_goes_with_the_reader_where_it_is_pickled(
    reader: ZarrS3Reader, log: Log
) -> None:
    reader.observe(log)
    pickle.loads(pickle.dumps(reader)).load("mp-2", "label")
    assert [line[0] for line in log.lines()] == ["started", "finished"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_reads_of_dataloader_workers_are_reported_there(reader: ZarrS3Reader, log: Log) -> None:
    reader.observe(log)
    for _ in DataLoader(ZarrDataset(reader, "train"), batch_size=None, num_workers=2):
        pass
    finished = [line for line in log.lines() if line[0] == "finished"]
    train, _ = reader.split_task_ids()
    assert sorted(line[1:3] for line in finished) == sorted(
        [task_id, role] for task_id in train for role in ("data", "label")
    )
    assert str(os.getpid()) not in {line[-1] for line in finished}
