"""The map file and the split: which materials, and in which order."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zarrcache.data.splits import (
    Split,
    hold_out,
    mapped_ids,
    read_file_list,
    read_map,
    read_split,
    split_ids,
)
from zarrcache.errors import ConfigError


def train_test_split(*lists: Any, **how: Any) -> Any:
    """scikit-learn's, which takes seconds to import."""
    from sklearn.model_selection import train_test_split as split

    return split(*lists, **how)


MAP = {"GGA": ["mp-3", "mp-1", "mp-2"], "GGA+U": ["mp-9"], "SCAN": []}


@pytest.mark.parametrize("name", ["map.json", "map.json.gz", "map"])
@pytest.mark.parametrize("zipped", [False, True])
def test_map_is_read_by_its_content_not_by_its_name(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    """Browsers and rsync change names."""
    raw = json.dumps(MAP).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if zipped else raw)
    assert read_map(tmp_path / name) == MAP
    assert read_map(str(tmp_path / name)) == MAP


def test_map_in_the_home_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    assert read_map("~/map.json") == MAP


def map_of(directory: Path, content: object) -> Path:
    path = directory / "map.json"
    path.write_text(json.dumps(content))
    return path


def test_ids_keep_the_order_of_the_map(tmp_path: Path) -> None:
    """The split depends on it."""
    path = map_of(tmp_path, MAP)
    assert mapped_ids(path, "GGA") == ["mp-3", "mp-1", "mp-2"]
    assert mapped_ids(path, "SCAN") == []


@pytest.mark.parametrize("n", [2, 3, 7, 50, 1000])
@pytest.mark.parametrize("train_fraction", [0.5, 0.6, 0.8, 1])
@pytest.mark.parametrize("random_state", [0, 42, 2**32 - 1])
def test_split_is_the_one_of_the_loaded_lists(
    n: int, train_fraction: float, random_state: int
) -> None:
    """The users split four lists of loaded arrays."""
    ids = [f"mp-{i}" for i in np.random.default_rng(n).permutation(n)]
    arrays = [np.full(3, i) for i in range(n)]
    sizes = [(i, i, i) for i in range(n)]
    theirs = train_test_split(
        arrays, arrays, sizes, sizes, train_size=train_fraction, random_state=random_state
    )
    train, test = split_ids(ids, train_fraction, random_state)
    assert train == [ids[a[0]] for a in theirs[0]]
    assert test == [ids[a[0]] for a in theirs[1]]
    assert sorted(train + test) == sorted(ids)


@pytest.mark.parametrize(
    "random_state",
    [None, np.int64(7), np.random.RandomState(7), 7],
    ids=["none", "numpy", "generator", "int"],
)
def test_any_seed_of_scikit_learn_draws_what_it_draws(random_state: Any) -> None:
    """Also without a seed, and for fractions that give a whole number or miss one by rounding."""
    for n in range(2, 60):
        for train_fraction in (0.07, 0.29, 0.57, 0.7, 1 / 3, 0.999, np.float64(0.5), n // 2, n - 1):
            ids = [str(number) for number in range(n)]
            if int(train_fraction * n) == 0:
                continue
            drawn = []
            for split in (
                train_test_split,
                lambda ids, train_size, random_state: split_ids(ids, train_size, random_state),
            ):
                np.random.seed(n)
                state = (
                    np.random.RandomState(3)
                    if isinstance(random_state, np.random.RandomState)
                    else random_state
                )
                drawn.append(
                    tuple(map(tuple, split(ids, train_size=train_fraction, random_state=state)))
                )
            assert drawn[0] == drawn[1], (n, train_fraction)


def test_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    ids = [f"mp-{i}" for i in range(100)]
    assert split_ids(ids, 0.8, 1) == split_ids(tuple(ids), 0.8, 1)
    assert split_ids(ids, 0.8, 1) != split_ids(ids, 0.8, 2)


def test_one_as_a_fraction_leaves_no_test_set() -> None:
    """In the order of the same permutation; ``1`` is one material."""
    ids = [f"mp-{i}" for i in range(10)]
    train, test = split_ids(ids, 1.0, 42)
    assert (sorted(train), test) == (sorted(ids), [])
    assert [len(part) for part in split_ids(ids, 1, 42)] == [1, 9]
    with pytest.raises(ConfigError, match="Nothing to split"):
        split_ids([], 1.0, 42)


def test_id_that_the_map_repeats_is_used_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it would be in the training and in the test set; a warning names such ids."""
    ids = ["mp-3", "mp-1", "mp-3", "mp-2", "mp-1", "mp-3"]
    path = map_of(tmp_path, {"GGA": ids, "SCAN": ["mp-1"]})
    assert mapped_ids(path, "GGA") == ["mp-3", "mp-1", "mp-2"]
    assert f"{path} repeats 2 task ids of GGA; each is used once: mp-3, mp-1" in caplog.text
    caplog.clear()
    assert mapped_ids(map_of(tmp_path, {"GGA": ids[:2]}), "GGA") == ids[:2]
    assert not caplog.text


def test_id_that_is_a_number_is_explained(tmp_path: Path) -> None:
    path = map_of(tmp_path, {"GGA": ["mp-1", 2351888]})
    with pytest.raises(ConfigError, match=rf'map file {path}, GGA: .*Write "2351888" with quotes'):
        mapped_ids(path, "GGA")


@pytest.mark.parametrize("read", [read_map, read_file_list])
def test_file_that_is_a_url_is_refused(read: Callable[[str], object]) -> None:
    """The error of a path would name a directory of this machine, ``s3:``."""
    with pytest.raises(ConfigError, match=r"s3://bucket/map is a URL.*Copy it here"):
        read("s3://bucket/map")


def test_whole_number_is_a_number_of_materials() -> None:
    """As scikit-learn takes it."""
    train, test = split_ids([f"mp-{i}" for i in range(10)], 3, 42)
    assert (len(train), len(test)) == (3, 7)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "train_fraction",
    [
        None,
        0.0,
        0.1,
        0.8,
        1.5,
        -0.5,
        float("nan"),
        float("inf"),
        3.0,
        np.float64(0.5),
        np.float32(0.5),
        Fraction(1, 2),
        0,
        1,
        4,
        5,
        6,
        -1,
        np.int64(3),
        True,
        np.True_,
        "most",
        [3],
        np.array(3),
    ],
    ids=repr,
)
def test_train_fraction_is_refused_where_scikit_learn_refuses_it(
    n: int, train_fraction: Any
) -> None:
    ids = [f"mp-{i}" for i in range(n)]
    try:
        theirs = train_test_split(ids, train_size=train_fraction, random_state=42)
    except ValueError:
        advice = "there are no task ids" if n == 0 else "Change train_fraction"
        with pytest.raises(ConfigError, match=advice) as caught:
            split_ids(ids, train_fraction, 42)
        assert n == 0 or repr(train_fraction) in str(caught.value)
    else:
        assert list(split_ids(ids, train_fraction, 42)) == theirs


@pytest.mark.parametrize(
    "random_state",
    [0, True, np.int64(4), 2**32 - 1, 2**32, -1, 1.0, np.True_, "a", np.random.default_rng(1)],
    ids=str,
)
def test_random_state_is_refused_where_scikit_learn_refuses_it(random_state: Any) -> None:
    ids = [f"mp-{i}" for i in range(7)]
    try:
        theirs = train_test_split(ids, train_size=0.5, random_state=random_state)
    except ValueError:
        with pytest.raises(ConfigError, match=r"random_state is .* from 0 to 4294967295"):
            split_ids(ids, 0.5, random_state)
    else:
        assert list(split_ids(ids, 0.5, random_state)) == theirs


@pytest.mark.parametrize(
    ("val_frac", "count"), [(0.005, 1), (0.1, 10), (0.07, 7), (0.101, 11), (0, 0)]
)
def test_validation_ids_are_a_share_of_the_training_ids(val_frac: float, count: int) -> None:
    """Rounded up; no id is lost, and the test ids stay."""
    train = [f"mp-{number}" for number in range(100)]
    split = hold_out(train, ["mp-900"], val_frac, 42)
    assert len(split.validation) == count
    assert sorted(split.train + split.validation) == sorted(train)
    assert split.test == ("mp-900",)


@pytest.mark.parametrize("val_frac", [-1, -0.5, -1e-9, 1, 1.5, math.nan, math.inf, "0.1", None])
def test_a_share_that_is_none_is_refused(val_frac: Any) -> None:
    with pytest.raises(ConfigError, match=r"^val_frac is .*from 0 to below 1"):
        hold_out([f"mp-{number}" for number in range(10)], [], val_frac, 42)


def test_a_share_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"all 1 training sample would be held out"):
        hold_out(["mp-1"], [], 0.5, 42)
    assert hold_out(["mp-1", "mp-2"], [], 0.5, 42).validation in (("mp-1",), ("mp-2",))
    assert hold_out([], ["mp-1"], 0.5, 42) == Split((), (), ("mp-1",))


def read(tmp_path: Path, content: Any, mapped: str = "abc", present: str = "abc") -> Split:
    """A split file over the map or list of these ids, of which those present have stores."""
    (tmp_path / "split.json").write_text(json.dumps(content))
    return read_split(tmp_path / "split.json", [*mapped], {*present}, "the map (GGA)")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_split_file_has_positions_in_the_map(tmp_path: Path, zipped: bool) -> None:
    """Validation and test may be left out."""
    raw = json.dumps({"train": [2, 0], "validation": [1]}).encode()
    (tmp_path / "split.json").write_bytes(gzip.compress(raw) if zipped else raw)
    split = read_split(tmp_path / "split.json", ["a", "b", "c"], {"a", "b", "c"}, "the map")
    assert split == Split(("c", "a"), ("b",))


def test_a_split_file_may_have_task_ids(tmp_path: Path) -> None:
    """Or both; in the file's order."""
    assert read(tmp_path, {"train": ["c", "a"], "val": ["b"]}) == Split(("c", "a"), ("b",))
    assert read(tmp_path, {"train": ["c", 0], "test": []}) == Split(("c", "a"))


@pytest.mark.parametrize("train", [[0, 2], ["a", "c"]], ids=["positions", "ids"])
def test_a_store_that_is_lost_does_not_shift_the_split(tmp_path: Path, train: Any) -> None:
    """Positions count the map's ids, with or without stores. One that the file does not use may be
    missing; one that it uses is named.
    """
    assert read(tmp_path, {"train": train}, present="ac") == Split(("a", "c"))
    with pytest.raises(
        ConfigError, match=r"1 of 3 materials that have no input.*: b \(test\)\. Put"
    ):
        read(tmp_path, {"train": train, "test": [1]}, present="ac")


def test_positions_in_a_map_that_repeats_ids_are_refused(tmp_path: Path) -> None:
    """They could count repetitions or not. Task ids are clear."""
    with pytest.raises(ConfigError, match=r"has positions in the map \(GGA\), which lists a more"):
        read(tmp_path, {"train": [0, 1]}, mapped="aba")
    assert read(tmp_path, {"train": ["b", "a"]}, mapped="aba") == Split(("b", "a"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": [0, 3]}, "train holds 3. It has to hold task ids, or whole numbers from 0 to 2"),
        ({"train": [0, -1]}, "train holds -1"),
        ({"train": [0, True]}, "train holds True"),
        ({"train": [0, 1.0]}, "train holds 1.0"),
        ({"train": [0, None]}, "train holds None"),
        ({"train": [[0]]}, r"train holds \[0\]"),
        ({"train": ["mp-1"]}, r"train holds 'mp-1', which is not in the map \(GGA\)"),
        ({"train": ["0"]}, "train holds '0', which is not in"),
        ({"train": [0, 0]}, "0 .a. is in train and again in train"),
        ({"train": [0, "a"]}, "'a' is in train and again in train"),
        ({"train": [0, 1], "test": [1]}, "1 .b. is in train and again in test"),
        ({"train": 5}, "train is a int"),
        ({"test": [1]}, r"holds the keys \['test'\]"),
        ({"train": [0], "dev": [1]}, r"holds the keys \['train', 'dev'\]"),
        ({"train": [0], "val": [], "validation": []}, "both val and validation"),
        ([0, 1], "holds a list"),
    ],
)
def test_a_split_file_that_cannot_be_meant_is_refused_with_what_is_wrong(
    tmp_path: Path, content: Any, message: str
) -> None:
    """A sample in two parts would flatter the result."""
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize("text", ["mp-2\nmp-1\n", "mp-2\r\nmp-1", "\ufeffmp-2 \n mp-1\n\n \n"])
def test_a_file_list_has_one_id_per_line(tmp_path: Path, text: str) -> None:
    """With or without a last line end, from Windows too."""
    (tmp_path / "mp_filelist.txt").write_bytes(text.encode())
    assert mapped_ids(tmp_path / "mp_filelist.txt", "of no meaning") == ["mp-2", "mp-1"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"mp-1\n\nmp-2\n", "line 2 is empty. Remove it"),
        (b"mp-1\ndata/mp-2.CHGCAR\n", "line 2: 'data/mp-2.CHGCAR' is not a task id"),
        (b"mp-1, mp-2\n", "line 1: 'mp-1, mp-2' is not a task id"),
        (b'["mp-1"]', "line 1: .* is not a task id"),
        (b"mp-1\nmp-2\nmp-1\n", "line 3: mp-1 is in line 1 already"),
        (b"\xff\xfem\x00p\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_list_that_cannot_be_meant_is_refused_with_its_line(
    tmp_path: Path, raw: bytes, message: str
) -> None:
    (tmp_path / "mp_filelist.txt").write_bytes(raw)
    with pytest.raises(ConfigError, match=rf"file list .*mp_filelist\.txt.*{message}"):
        mapped_ids(tmp_path / "mp_filelist.txt", "GGA")


def test_a_file_list_may_have_any_name(tmp_path: Path) -> None:
    """It does not begin as JSON does; one of JSON's names is JSON."""
    (tmp_path / "mp_list").write_text("mp-2\n mp-1 \ntwo words\n")
    assert mapped_ids(tmp_path / "mp_list", "GGA") == ["mp-2", "mp-1", "two words"]
    (tmp_path / "map").write_text(' {"GGA": ["mp-3"]}')
    assert mapped_ids(tmp_path / "map", "GGA") == ["mp-3"]
    (tmp_path / "map.json").write_text("mp-2\n")
    with pytest.raises(ConfigError, match="is not JSON"):
        mapped_ids(tmp_path / "map.json", "GGA")


def test_a_file_list_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file list .*none\.txt cannot be read \(No such file"):
        mapped_ids(tmp_path / "none.txt", "GGA")
