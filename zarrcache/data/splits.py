"""Read maps, file lists and split files; divide task ids into training, validation and test."""

from __future__ import annotations

import gzip
import io
import json
import logging
import math
import numbers
import os
import zlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zarrcache._keys import check_task_id, check_task_ids, is_url, safe_repr
from zarrcache._units import counted, read_bounded
from zarrcache.errors import ConfigError

__all__ = [
    "Split",
    "first_ids",
    "full_path",
    "hold_out",
    "is_file_list",
    "listed_ids",
    "mapped_ids",
    "read_file_list",
    "read_map",
    "read_split",
    "share_of",
    "split_ids",
    "training_count",
]

logger = logging.getLogger(__name__)

#: The map of all 122,689 materials is 2 MB.
_MAX_BYTES = 128 * 1024**2
_SPLIT = '{"train": [0, 5, ...] or ["mp-5", ...], "validation": [...], "test": [...]}'


def read_map(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The map file: ``{functional: [task_id, ...]}`` as JSON or gzipped JSON.

    The content decides which of the two, not the name.

    Raises
    ------
    ConfigError
        The file is absent or has other content.
    """
    document = _read_json(
        path,
        "map file",
        "map_dir",
        "{functional: [task_id, ...]} (`zarrcache map` writes one; a list of ids is named .txt)",
    )
    if not isinstance(document, Mapping) or not all(
        isinstance(ids, list) for ids in document.values()
    ):
        raise ConfigError(
            f"map file {full_path(path)} does not hold {{functional: [task_id, ...]}}. Make one "
            "with `zarrcache map`; a list of ids is named .txt."
        )
    return dict(document)


def read_file_list(path: str | os.PathLike[str]) -> list[str]:
    """The task ids of a file list: one per line, as electrai's ``mp_filelist.txt``.

    Blank lines at the end are ignored, so the position of an id is its line number minus one.

    Raises
    ------
    ConfigError
        The file is absent, empty or not text, or a line is not one task id, or repeats an id.
    """
    raw = _read(path, "file list", "root (or map_dir) to a text file with one task id per line")
    where = f"file list {full_path(path)}"
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{where} is not UTF-8 text ({exc.reason} at byte {exc.start}). It has to hold one "
            "task id per line."
        ) from exc
    while lines and not lines[-1].strip():
        del lines[-1]
    if not lines:
        raise ConfigError(f"{where} is empty. It has to hold one task id per line.")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        task_id = line.strip()
        if not task_id:  # skipped, it would move the positions that a split file counts
            raise ConfigError(f"{where}, line {number} is empty. Remove it: one task id per line.")
        try:
            check_task_id(task_id)
        except ConfigError:
            raise ConfigError(
                f"{where}, line {number}: {safe_repr(line)} is not a task id such as mp-12345. "
                "Write one per line, without directory and without extension."
            ) from None
        if task_id in first:
            raise ConfigError(
                f"{where}, line {number}: {task_id} is in line {first[task_id]} already, so it "
                "could be trained on and tested on. Remove one of the lines."
            )
        first[task_id] = number
    return list(first)


def is_file_list(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a list and not a map, by its name, or otherwise by its first bytes."""
    name = os.fspath(path)
    if name.endswith((".txt", ".json", ".gz")):
        return name.endswith(".txt")
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(1024).lstrip()[:1].isalnum()  # JSON begins with a brace
    except OSError:
        return False  # whose error is that of a map


def listed_ids(path: str | os.PathLike[str], functional: str) -> list[str]:
    """The task ids of a file list, or of one functional of a map, with all repetitions.

    Raises
    ------
    ConfigError
        As `read_file_list`; or the map cannot be read, the functional is not in it (those in it are
        named), or an id is not a plain name.
    """
    if is_file_list(path):
        return read_file_list(path)
    mapping = read_map(path)
    if functional not in mapping:
        raise ConfigError(
            f"Functional {functional!r} not found in mapping. Available: "
            f"{safe_repr(list(mapping))}. Set functional to one of them; the map is "
            f"{full_path(path)}."
        )
    try:
        return check_task_ids(mapping[functional])
    except ConfigError as exc:
        raise ConfigError(f"map file {full_path(path)}, {functional}: {exc}") from None


def mapped_ids(path: str | os.PathLike[str], functional: str) -> list[str]:
    """Like `listed_ids`, with each id once.

    An id that a map repeats could be drawn for training and for testing. A warning lists such ids.
    """
    ids = listed_ids(path, functional)
    unique = list(dict.fromkeys(ids))
    if len(unique) < len(ids):
        repeated = [id_ for id_, times in Counter(ids).items() if times > 1]
        logger.warning(
            "map file %s repeats %s of %s; each is used once: %s",
            full_path(path),
            counted(len(repeated), "task id"),
            functional,
            first_ids(repeated),
        )
    return unique


def full_path(path: str | os.PathLike[str]) -> str:
    """The path of a file in messages."""
    return os.path.abspath(os.path.expanduser(path))


def _read(path: str | os.PathLike[str], what: str, setting: str) -> bytes:
    if is_url(path):
        raise ConfigError(
            f"{what} {os.fspath(path)} is a URL, and is read from this machine. Copy it here (`aws "
            f"s3 cp`) and set {setting}."
        )
    try:
        with Path(path).expanduser().open("rb") as file:
            return read_bounded(file, _MAX_BYTES)
    except OSError as exc:
        raise ConfigError(
            f"{what} {full_path(path)} cannot be read ({exc.strerror}). Set {setting}."
        ) from exc
    except ValueError as exc:
        raise ConfigError(
            f"{what} {full_path(path)} is too large to be one ({exc}). Set {setting}."
        ) from exc


def _read_json(path: str | os.PathLike[str], what: str, setting: str, content: str) -> Any:
    """A JSON or JSON.gz file."""
    raw = _read(path, what, f"{setting} to a JSON or JSON.gz file of {content}")
    try:
        if raw[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                raw = read_bounded(packed, _MAX_BYTES)
        return json.loads(raw)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as exc:
        raise ConfigError(
            f"{what} {full_path(path)} is not JSON ({exc}). It has to hold {content}, as JSON or "
            "JSON.gz."
        ) from exc


def first_ids(ids: Sequence[str]) -> str:
    """The first ids of a list, for messages."""
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")


def split_ids(
    task_ids: Sequence[str], train_fraction: float, random_state: int | None
) -> tuple[list[str], list[str]]:
    """Split task ids exactly as scikit-learn's ``train_test_split`` does.

    The draw depends only on the number of ids and the seed, so the ids come out with the same
    members in the same order as the original reader gets by splitting the loaded lists.

    Parameters
    ----------
    task_ids : sequence of str
    train_fraction : float or int
        The training ids: a fraction in (0, 1), rounded down to whole ids, or a number of ids.
        None is 0.75, rounded down, as in scikit-learn. 1.0 takes all, so that no id is left for
        testing; scikit-learn refuses it.
    random_state : int, numpy.random.RandomState or None
        Seed from 0 to 2**32 - 1. None draws from numpy's global generator.

    Raises
    ------
    ConfigError
        ``train_fraction`` leaves no id for training or none for testing, or ``random_state`` is
        not a seed.
    """
    count = len(task_ids)
    kept = training_count(count, train_fraction)
    places = _permutation(count, random_state)
    return (
        [task_ids[place] for place in places[count - kept :]],
        [task_ids[place] for place in places[: count - kept]],
    )


def training_count(count: int, train_fraction: Any) -> int:
    """Number of training ids among ``count`` ids. Raises as `split_ids`."""
    if not count:
        raise ConfigError("Nothing to split: there are no task ids.")
    if train_fraction is None:
        kept = count - math.ceil(0.25 * count)
    elif isinstance(train_fraction, float) and 0 < train_fraction <= 1:
        kept = math.floor(train_fraction * count)
    elif not isinstance(train_fraction, bool) and isinstance(train_fraction, numbers.Integral):
        kept = int(train_fraction)
    else:
        raise ConfigError(
            f"train_fraction is {train_fraction!r}; it has to be a fraction above 0 and up to 1.0 "
            "or a number of training ids. Change train_fraction."
        )
    is_all = isinstance(train_fraction, float) and train_fraction == 1
    if not 0 < kept < count + is_all:
        raise ConfigError(
            f"train_fraction is {train_fraction!r}: it takes {kept} of {count} task ids for "
            "training, which leaves the training or the test set empty. Change train_fraction or "
            "add materials."
        )
    return kept


def _permutation(count: int, random_state: Any) -> list[int]:
    # The same draw as scikit-learn's ShuffleSplit: one permutation by numpy's legacy generator,
    # whose numbers are frozen (NEP 19). tests/unit/data/test_splits.py compares the two. Importing
    # scikit-learn would cost each process 1.5 s of CPU time.
    from numpy.random import RandomState, permutation

    if random_state is None:
        drawn = permutation(count)
    elif isinstance(random_state, RandomState):
        drawn = random_state.permutation(count)
    elif isinstance(random_state, numbers.Integral) and 0 <= int(random_state) < 2**32:
        drawn = RandomState(int(random_state)).permutation(count)
    else:
        raise ConfigError(
            f"random_state is {random_state!r}; it has to be a whole number from 0 to {2**32 - 1}."
        )
    return list(map(int, drawn))


@dataclass(frozen=True, slots=True)
class Split:
    """Task ids for training, validation and testing; each id is in one of them.

    Attributes
    ----------
    train, validation, test : tuple of str
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def hold_out(
    train: Sequence[str], test: Sequence[str], val_frac: float, random_state: int
) -> Split:
    """Draw a share of the training ids for validation, with seed ``random_state``.

    At least one id is taken, unless the share is 0.

    Raises
    ------
    ConfigError
        ``val_frac`` is not a share, or leaves nothing to train on.
    """
    share = share_of(val_frac)
    count = math.ceil(round(share * len(train), 6))  # 0.07 * 100 is a little more than 7
    if not count:
        return Split(tuple(train), (), tuple(test))
    if count == len(train):
        raise ConfigError(
            f"val_frac is {val_frac!r}: all {counted(len(train), 'training sample')} would be "
            "held out. Set val_frac to 0."
        )
    kept, held = split_ids(train, len(train) - count, random_state)
    return Split(tuple(kept), tuple(held), tuple(test))


def share_of(val_frac: Any) -> float:
    """``val_frac`` as a number.

    Raises
    ------
    ConfigError
        It is not a number in [0, 1).
    """
    is_number = isinstance(val_frac, numbers.Real) and not isinstance(val_frac, bool)
    if not is_number or not 0 <= float(val_frac) < 1:
        raise ConfigError(
            f"val_frac is {val_frac!r}; it has to be a number from 0 to below 1: the share of the "
            "samples that is kept for validation."
        )
    return float(val_frac)


def read_split(
    path: str | os.PathLike[str], mapped: Sequence[str], present: Container[str], where: str
) -> Split:
    """Read a split file: ``{"train": [...], "validation": [...], "test": [...]}``.

    Parameters
    ----------
    path : path
        JSON or JSON.gz. ``val`` is another name for ``validation``; validation and test are
        optional. The lists hold task ids, or positions in ``mapped``, from 0. A position means the
        same material whether or not the origin has it: a store that is lost is an error, it does
        not move the others to other sets.
    mapped : sequence of str
        The task ids of the map or file list, exactly as it lists them.
    present : container of str
        Ids that have input and label.
    where : str
        Name of ``mapped`` in messages: ``"the map map.json.gz (GGA)"``.

    Raises
    ------
    ConfigError
        The file cannot be read or holds something else; a sample is not in the map, has no input or
        label, or is listed twice; or ``mapped`` repeats ids and the file has positions.
    """
    document = _read_json(path, "split file", "split_file", _SPLIT)
    name = f"split file {full_path(path)}"
    sides = _sides(document, name)
    given = [entry for entries in sides.values() for entry in entries]
    if any(type(entry) is int for entry in given) and len(set(mapped)) < len(mapped):
        repeated = [id_ for id_, times in Counter(mapped).items() if times > 1]
        raise ConfigError(
            f"{name} has positions in {where}, which lists {first_ids(repeated)} more than once. "
            "Write the task ids into the split file instead, or remove the repetitions and the "
            "positions that they shift."
        )
    known = set(mapped)
    home: dict[str, str] = {}
    ids: dict[str, tuple[str, ...]] = {}
    lost: list[str] = []
    for key, entries in sides.items():
        found = [_member(entry, key, name, mapped, known, where) for entry in entries]
        for id_, entry in zip(found, entries, strict=True):
            if id_ in home:
                also = "" if entry == id_ else f" ({id_})"
                raise ConfigError(
                    f"{name}: {entry!r}{also} is in {home[id_]} and again in {key}. List each "
                    "sample once."
                )
            home[id_] = key
            if id_ not in present:
                lost.append(f"{id_} ({key})")
        ids["validation" if key == "val" else key] = tuple(found)
    if lost:
        raise ConfigError(
            f"{name} lists {len(lost)} of {len(home)} materials that have no input or no label: "
            f"{first_ids(lost)}. Put the stores or files back, or remove the materials from the "
            "split file. If they are new, run `zarrcache warm` to list the origin again."
        )
    return Split(**ids)


def _sides(document: Any, name: str) -> dict[str, list[Any]]:
    """The lists of a split file by their keys."""
    known = {"train", "validation", "val", "test"}
    if not isinstance(document, Mapping) or not document.keys() <= known or "train" not in document:
        keys = (
            f"the keys {safe_repr(list(document))}"
            if isinstance(document, Mapping)
            else f"a {type(document).__name__}"
        )
        raise ConfigError(
            f"{name} holds {keys}. It has to hold {_SPLIT}; val is another name for validation."
        )
    if {"val", "validation"} <= document.keys():
        raise ConfigError(
            f"{name} has both val and validation, which are the same part. Remove one of them."
        )
    for key, entries in document.items():
        if not isinstance(entries, list):
            raise ConfigError(
                f"{name}: {key} is a {type(entries).__name__}; it has to be a list of positions, "
                '[0, 5, ...], or of task ids, ["mp-5", ...].'
            )
    return dict(document)


def _member(
    entry: Any, key: str, name: str, mapped: Sequence[str], known: Container[str], where: str
) -> str:
    """The task id for an entry of a split file."""
    if isinstance(entry, str):
        if entry in known:
            return entry
        raise ConfigError(f"{name}: {key} holds {safe_repr(entry)}, which is not in {where}.")
    if type(entry) is int and 0 <= entry < len(mapped):
        return mapped[entry]
    raise ConfigError(
        f"{name}: {key} holds {safe_repr(entry)}. It has to hold task ids, or whole numbers from "
        f"0 to {len(mapped) - 1}: positions in {where}, which lists {len(mapped)}."
    )
