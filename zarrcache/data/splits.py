"""Read map and split files, and divide task ids into training, validation and test."""

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zarrcache._keys import check_task_ids, safe_repr
from zarrcache._units import read_bounded
from zarrcache.errors import ConfigError

__all__ = [
    "Split",
    "first_ids",
    "hold_out",
    "ids_of",
    "read_map",
    "read_split",
    "split_ids",
]

logger = logging.getLogger(__name__)

#: The map of all 122,689 materials is 2 MB.
_MAX_BYTES = 128 * 1024**2
_SPLIT = '{"train": [0, 5, ...], "validation": [...], "test": [...]}'


def read_map(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The map file: ``{functional: [task_id, ...]}`` as JSON or gzipped JSON.

    The content decides which of the two, not the name.

    Raises
    ------
    ConfigError
        The file is absent or holds something else.
    """
    document = _read_json(path, "map file", "map_dir", "{functional: [task_id, ...]}")
    if not isinstance(document, Mapping) or not all(
        isinstance(ids, list) for ids in document.values()
    ):
        raise ConfigError(
            f"map file {os.fspath(path)} does not hold {{functional: [task_id, ...]}}."
        )
    return dict(document)


def _read_json(path: str | os.PathLike[str], what: str, setting: str, content: str) -> Any:
    """A JSON or JSON.gz file."""
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = read_bounded(file, _MAX_BYTES)
        if raw[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                raw = read_bounded(packed, _MAX_BYTES)
        return json.loads(raw)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as exc:
        raise ConfigError(
            f"{what} {os.fspath(path)} is not JSON ({exc}). It has to hold {content}, as JSON or "
            "JSON.gz."
        ) from exc
    except OSError as exc:
        raise ConfigError(
            f"{what} {os.fspath(path)} cannot be read ({exc.strerror}). Set {setting} to a JSON or "
            "JSON.gz file."
        ) from exc


def ids_of(mapping: Mapping[str, Sequence[str]], functional: str) -> list[str]:
    """The task ids of one functional, in the map's order, each once.

    An id that the map repeats would be drawn for training and for testing; it is named in a
    warning.

    Raises
    ------
    ConfigError
        A ``ValueError``: the functional is not in the map (those in it are named), or an id is not
        a plain name.
    """
    if functional not in mapping:
        raise ConfigError(
            f"Functional {functional!r} not found in mapping. Available: {safe_repr(list(mapping))}"
        )
    ids = check_task_ids(mapping[functional])
    unique = list(dict.fromkeys(ids))
    if len(unique) < len(ids):
        repeated = [id_ for id_, times in Counter(ids).items() if times > 1]
        logger.warning(
            "The map repeats %d task ids of %s; each is used once: %s",
            len(repeated),
            functional,
            first_ids(repeated),
        )
    return unique


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
    kept = _training_count(count, train_fraction)
    places = _permutation(count, random_state)
    return (
        [task_ids[place] for place in places[count - kept :]],
        [task_ids[place] for place in places[: count - kept]],
    )


def _training_count(count: int, train_fraction: Any) -> int:
    if not count:
        raise ConfigError("Nothing to split: no task id of the functional has both stores.")
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
        ``val_frac`` is not in [0, 1), or leaves nothing to train on.
    """
    share: Any = val_frac
    if not isinstance(share, numbers.Real) or not 0 <= float(share) < 1:
        raise ConfigError(
            f"val_frac is {val_frac!r}; it has to be a number from 0 to below 1: the share of the "
            "training samples that is kept for validation."
        )
    count = math.ceil(round(float(share) * len(train), 6))  # 0.07 * 100 is a little more than 7
    if not count:
        return Split(tuple(train), (), tuple(test))
    if count == len(train):
        raise ConfigError(
            f"val_frac is {val_frac!r}: all {len(train)} training samples would be held out. Set "
            "val_frac to 0."
        )
    kept, held = split_ids(train, len(train) - count, random_state)
    return Split(tuple(kept), tuple(held), tuple(test))


def read_split(path: str | os.PathLike[str], task_ids: Sequence[str]) -> Split:
    """Read a split file: ``{"train": [0, 5, ...], "validation": [...], "test": [...]}``.

    Parameters
    ----------
    path : path
        JSON or JSON.gz. ``val`` is another name for ``validation``; validation and test are
        optional.
    task_ids : sequence of str
        ``ZarrS3Reader.task_ids``; the numbers in the file are positions in it, from 0.

    Raises
    ------
    ConfigError
        The file cannot be read or holds something else, or a number is out of range or occurs
        twice.
    """
    document = _read_json(path, "split file", "split_file", _SPLIT)
    where = f"split file {os.fspath(path)}"
    known = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
    if (
        not isinstance(document, Mapping)
        or not document.keys() <= known.keys()
        or "train" not in document
    ):
        keys = (
            f"the keys {safe_repr(list(document))}"
            if isinstance(document, Mapping)
            else f"a {type(document).__name__}"
        )
        raise ConfigError(
            f"{where} holds {keys}. It has to hold {_SPLIT}; val is another name for validation."
        )
    if {"val", "validation"} <= document.keys():
        raise ConfigError(
            f"{where} has both val and validation, which are the same part. Remove one of them."
        )
    sides: dict[str, tuple[str, ...]] = {}
    home: dict[int, str] = {}
    for key, indices in document.items():
        if not isinstance(indices, list):
            raise ConfigError(
                f"{where}: {key} is a {type(indices).__name__}; it has to be a list of indices, "
                "[0, 5, ...]."
            )
        for index in indices:
            if type(index) is not int or not 0 <= index < len(task_ids):
                raise ConfigError(
                    f"{where}: {key} holds {index!r}. It has to hold whole numbers from 0 to "
                    f"{len(task_ids) - 1}: positions in the reader's "
                    f"task_ids, the {len(task_ids)} materials of the map file that have both "
                    "stores."
                )
            if index in home:
                raise ConfigError(
                    f"{where}: {index} is in {home[index]} and again in {key}. List each sample "
                    "once."
                )
            home[index] = key
        sides[known[key]] = tuple(task_ids[index] for index in indices)
    return Split(**sides)
