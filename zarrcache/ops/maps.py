"""Make a map file from the names in directories (``zarrcache map``)."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zarrcache._keys import check_task_id
from zarrcache._units import counted
from zarrcache.arrays import choose, ends_of, kinds_of, sources_of
from zarrcache.data import read_map
from zarrcache.disk import write_file
from zarrcache.errors import ConfigError, OriginNotFoundError
from zarrcache.origin import open_origin

__all__ = ["FoundIds", "find_ids", "write_map"]


@dataclass(frozen=True)
class FoundIds:
    """The task ids with a source in every directory, and the ids that are left out."""

    #: Sorted; the numbers in them by value, ``mp-2`` before ``mp-10``.
    ids: tuple[str, ...]
    #: Ids that only some of the directories have.
    partial: tuple[str, ...] = ()
    #: Names that end as those of sources do but give no task id.
    refused: tuple[str, ...] = ()


def find_ids(
    directories: Sequence[str],
    *,
    source: str | Sequence[str] = "auto",
    s3_kwargs: Mapping[str, Any] | None = None,
    beside: Path | None = None,
) -> FoundIds:
    """List directories (paths or ``s3://bucket/prefix``), one LIST per 1,000 names.

    No file is read. ``source`` is that of a training config. The map file ``beside`` may lie among
    the densities, and ``map.json.gz`` is not one of them.

    Raises
    ------
    OriginNotFoundError
        A directory holds no source.
    """
    kinds = kinds_of(source)
    every: list[set[str]] = []
    refused: list[str] = []
    for directory in directories:
        origin = open_origin(directory, s3_kwargs=s3_kwargs)
        names = origin.list_names()
        if beside is not None and os.path.realpath(origin.url) == os.path.realpath(beside.parent):
            names = [name for name in names if name != beside.name]
        found = set()
        for task_id, name in choose(sources_of(names), kinds).items():
            try:
                found.add(check_task_id(task_id))
            except ConfigError:
                refused.append(name)
        if not found:
            files = [kind for kind in kinds if kind != "directory"]
            ends = f": no name in it ends with {ends_of(files)}" if files else ""
            others = counted(len(names), "other name")
            seen = f" It holds {others}, such as {names[0]}." if names else ""
            raise OriginNotFoundError(
                f"{origin.url} holds no density{ends}.{seen} Give the directory that contains the "
                "densities directly, or --source directory if it has one directory per material."
            )
        every.append(found)
    common, together = set.intersection(*every), set.union(*every)
    return FoundIds(
        tuple(sorted(sorted(common), key=_natural)),
        tuple(sorted(sorted(together - common), key=_natural)),
        tuple(sorted(refused)),
    )


def _natural(task_id: str) -> list[str | int]:
    """Sort key: numbers by value. Text and numbers alternate, so only equal kinds are compared."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", task_id))]


def write_map(path: Path, functional: str, ids: Sequence[str], *, force: bool = False) -> int:
    """Write a map file, or add a functional to one that exists; with ``force`` replace its ids.

    Returns the number of other functionals in the map, which are kept.
    """
    if not functional.strip():
        raise ConfigError("the name of the functional is empty. Give one, for example GGA.")
    # A name that is too long, or a directory, is an error when it is written.
    document: dict[str, Sequence[str]] = dict(read_map(path)) if os.path.isfile(path) else {}
    if document.keys() & {"train", "test"}:
        raise ConfigError(f"{path} is a split file, not a map. Give another file.")
    if functional in document and not force:
        raise ConfigError(
            f"{path} has {counted(len(document[functional]), 'id')} of {functional}. Give --force "
            "to replace them, another --functional, or another file."
        )
    kept = len(document.keys() - {functional})
    document[functional] = list(ids)
    raw = json.dumps(document).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw, mtime=0)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, raw)
    return kept
