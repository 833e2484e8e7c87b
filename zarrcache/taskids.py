"""Which materials a run is about: the users' map file, and their split into training and test ids."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zarrcache.errors import ConfigError
from zarrcache.expansion import read_bounded
from zarrcache.keys import check_task_id, shown

__all__ = ["ids_of", "read_map", "split_ids"]

#: The map of all 122,689 materials has 2 MB.
_MAX_BYTES = 128 * 1024**2


def read_map(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The map file: ``{functional: [task_id, ...]}`` as JSON, perhaps gzipped (found out by its content, not by its name).

    Raises
    ------
    ConfigError
        The file is not there, or is no such map.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = read_bounded(file, _MAX_BYTES)
        if raw[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
                raw = read_bounded(packed, _MAX_BYTES)
        document: Any = json.loads(raw)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, RecursionError) as exc:
        raise ConfigError(
            f"map file {os.fspath(path)} is not JSON ({exc}). It has to hold {{functional: [task_id, ...]}}, as JSON or JSON.gz."
        ) from exc
    except OSError as exc:
        raise ConfigError(f"map file {os.fspath(path)} cannot be read ({exc.strerror}). Set map_dir to a JSON or JSON.gz file.") from exc
    if not isinstance(document, Mapping) or not all(isinstance(ids, list) for ids in document.values()):
        raise ConfigError(f"map file {os.fspath(path)} does not hold {{functional: [task_id, ...]}}.")
    return dict(document)


def ids_of(mapping: Mapping[str, Sequence[str]], functional: str) -> list[str]:
    """The task ids of one functional, in the map's order.

    Raises
    ------
    ConfigError
        The functional is not in the map (a ``ValueError``; those in the map are named), or an id is not a plain name.
    """
    if functional not in mapping:
        raise ConfigError(f"Functional {functional!r} not found in mapping. Available: {shown(list(mapping))}")
    return [check_task_id(task_id) for task_id in mapping[functional]]


def split_ids(task_ids: Sequence[str], train_fraction: float, random_state: int | None) -> tuple[list[str], list[str]]:
    """Training and test ids: scikit-learn's ``train_test_split``, which depends on the number of ids and the seed alone.

    The same members in the same order as splitting the loaded lists.

    Raises
    ------
    ConfigError
        There are too few ids for the fraction; begins with scikit-learn's own words.
    """
    # Half a second, and only a run that trains needs it.
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(list(task_ids), train_size=train_fraction, random_state=random_state)
    except (ValueError, TypeError) as exc:
        hint = "No task id of the functional has both stores." if not task_ids else "Change train_fraction, or give more materials."
        raise ConfigError(f"{exc} {hint}") from exc
    return train, test
