"""What a notebook shows of a reader, a dataset and counters."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.support.training import write_config, write_pairs
from zarrcache import ZarrDataset
from zarrcache._keys import Role
from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.stats import Stats


class Cells(HTMLParser):
    """The text of each cell; every tag that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.opened: list[str] = []
        self.feed(text)
        self.close()
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)

    def __getitem__(self, name: str) -> str:
        return self.cells[self.cells.index(name) + 1]


def test_counters_have_units() -> None:
    shown = Cells(Stats(hits=3000, misses=1000, fetched_bytes=2**21)._repr_html_())
    assert (shown["hits"], shown["fetched_bytes"], shown["hit_ratio"]) == (
        "3,000",
        "2.0 MiB",
        "75.0 %",
    )


def test_a_reader_and_a_dataset_show_their_data_cache_and_counters(tmp_path: Path) -> None:
    """Markup in a path is shown as it is written, and credentials are not shown."""
    directory = tmp_path / "<b>a & b"
    directory.mkdir()
    write_pairs(directory, 5)
    config = write_config(directory, s3_kwargs={"key": "AKIDEXAMPLE", "secret": "hunter2hunter2"})
    reader = open_reader(DataConfig.from_yaml(config))
    shown = Cells(reader._repr_html_())
    assert shown["input"].endswith("/<b>a & b/data")
    assert (shown["functional"], shown["limit"], shown["hits"]) == ("GGA", "1.0 GiB", "0")
    assert "materials" not in shown.cells  # nothing is listed for it
    dataset = ZarrDataset(reader, "train")
    _ = dataset[0]
    text = dataset._repr_html_()
    shown = Cells(text)
    assert (shown["samples"], shown["misses"]) == ("2", "2")
    assert shown["materials"] == "5, 1 missing"
    assert "AKID" not in text
    assert "hunter2" not in text


class AnotherReader:
    def split_task_ids(self) -> tuple[list[str], list[str]]:
        return [], []

    def load(self, task_id: str, role: Role) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
        return np.zeros(1, np.float32), (1, 1, 1)


def test_a_dataset_of_another_reader_is_shown_without_counters() -> None:
    dataset = ZarrDataset(AnotherReader(), ["a", "b", "c", "d"])
    assert Cells(dataset._repr_html_())["task_ids"] == "a, b, c, ..."
