"""Check a node for use with the cache, one check per function (``zarrcache doctor``)."""

from __future__ import annotations

import fcntl
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from zarrcache._keys import ROLES, ArrayKey, Role, arrays_of, is_density, units_of
from zarrcache._units import counted, format_bytes
from zarrcache.arrays import (
    OriginArray,
    cell_volume,
    choose,
    examine_array,
    is_unconverted,
    kinds_of,
    list_array,
    names_of,
    read_array,
    sources_of,
)
from zarrcache.config import (
    SMALL_LIMIT_BYTES,
    CacheConfig,
    DataConfig,
    FetchConfig,
    RetryConfig,
)
from zarrcache.data import mapped_ids
from zarrcache.disk import (
    CACHE_FAULTS,
    CacheDir,
    Index,
    display_name,
    file_system_of,
    header_of,
    is_network,
    map_entry,
    min_free_bytes,
    publish,
    write_entry,
)
from zarrcache.errors import (
    ArrayNotFoundError,
    ConfigError,
    IncompleteArrayError,
    OriginNotFoundError,
    ZarrCacheError,
)
from zarrcache.ops.selection import Selection, open_if_present
from zarrcache.origin import ObjectInfo, Origin, open_origin
from zarrcache.peers import Peers

__all__ = ["Finding", "examine"]

Verdict = Literal["ok", "warn", "fail"]

_PACKAGES = (
    "zarr",
    "numcodecs",
    "numpy",
    "fsspec",
    "s3fs",
    "obstore",
    "diskcache",
    "crc32c",
)
_IN_MEMORY = ("tmpfs", "ramfs")
#: Seconds. An object with a later modification time than this from now means that a clock is wrong.
#: S3 refuses requests that are 15 minutes off.
_SKEW_S = 60.0
_IDS_TRIED = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and what to do unless it is ``ok``."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(config: DataConfig | CacheConfig | None = None) -> Iterator[Finding]:
    """Run every check that ``config`` allows. It writes nothing except the cache directory.

    Versions are always checked, the cache directory with either config, and the origin with a
    DataConfig.

    Yields
    ------
    Finding
        As soon as each check is done.
    """
    yield _versions()
    cache = config.cache if isinstance(config, DataConfig) else config
    if cache is None and config is not None:
        yield Finding(
            "cache",
            "warn",
            "the config has no cache block",
            "Nothing is cached. `zarrcache init` writes an example.",
        )
    if cache is not None:
        yield from _cache(cache)
        yield from _peers(cache)
    if isinstance(config, DataConfig):
        try:
            ids = mapped_ids(config.map_dir, config.functional)
        except ConfigError as exc:
            yield Finding("map", "fail", str(exc))
            return
        for role in ROLES:
            yield from _origin(config, role, ids[:_IDS_TRIED])
        if cache is not None:
            for text in _several_sources(config):
                yield Finding("sources", "warn", text)


def _several_sources(config: DataConfig) -> list[str]:
    try:
        selection = Selection(config)
        return selection.several_sources() if open_if_present(selection.index) else []
    except (*CACHE_FAULTS, ZarrCacheError):  # which other checks name
        return []


def _peers(cache: CacheConfig) -> Iterator[Finding]:
    try:
        for peer, failure in Peers(cache).probe():
            own = " (this node)" if peer == cache.advertise else ""
            name = f"peer {peer}{own}"
            if failure:
                advice = (
                    "Training goes on without it. Start `zarrcache serve` there, with the same "
                    "token file, and check that the port is reachable from this node."
                )
                yield Finding(name, "warn", failure, advice)
            else:
                yield Finding(name, "ok", "it answers and accepts this node's token")
    except ConfigError as exc:
        yield Finding("peers", "fail", str(exc))


def _versions() -> Finding:
    found, absent = [f"python {platform.python_version()}"], []
    for package in (*_PACKAGES, "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            if package == "torch":  # needed to train, not to convert or to fill the cache
                found.append("no torch (to train: pip install 'zarrcache[train]')")
            else:
                absent.append(package)
    if absent:
        return Finding(
            "versions",
            "fail",
            f"{', '.join(absent)} not installed ({', '.join(found)})",
            "Install what is missing: pip install zarrcache",
        )
    return Finding("versions", "ok", ", ".join(found))


def _cache(cache: CacheConfig) -> Iterator[Finding]:
    name = "cache directory"
    try:
        index = Index(cache)
        index.open()
        total = sum(count for count, _ in index.totals().values())
        entries = counted(total, "entry", "entries")
    except ConfigError as exc:
        yield Finding(name, "fail", str(exc))
        return
    except CACHE_FAULTS as exc:
        advice = "Choose another cache.dir, or delete the directory."
        yield Finding(name, "fail", f"{cache.dir} cannot be used ({exc})", advice)
        return
    if index.is_read_only:
        yield Finding(
            name,
            "warn",
            f"{index.dir.root} can only be read; {entries}",
            "Entries are used, and nothing will be stored. To store, mount it writable, or choose "
            "a cache.dir that this user may write to.",
        )
        yield _file_system(index.dir.root)
        return
    yield Finding(name, "ok", f"{index.dir.root} is writable; {entries}")
    yield _permissions(index.dir)
    yield _file_system(index.dir.root)
    yield _space(cache, index)
    yield _in_directory("file locks", index.dir, _locks)
    yield _in_directory("mmap", index.dir, _mmap)


def _permissions(directory: CacheDir) -> Finding:
    mode = directory.root.stat().st_mode & 0o7777
    modes = [
        path.stat().st_mode
        for path in (directory.root, directory.entries, directory.bytes, directory.locks)
    ]
    problem = ""
    if not directory.shared and mode & 0o077:
        problem = "other users can read it"
        advice = f"Run chmod 700 {directory.root}, or set cache.shared: true."
    elif directory.shared and (
        any(m & 0o2070 != 0o2070 for m in modes) or directory.index.stat().st_mode & 0o060 != 0o060
    ):
        is_open = directory.parent.stat().st_mode & 0o070 == 0o070
        where = directory.root if is_open else directory.parent
        problem = "parts of it are not writable by the group"
        advice = (
            f"Ask its owner to run `chgrp -R GROUP {where} && chmod -R g+rwX,o-rwx {where} && find "
            f"{where} -type d -exec chmod g+s {{}} +`."
        )
    elif directory.shared and mode & 0o002:
        problem = "every user can write to it"
        advice = f"Ask its owner to run chmod -R o-rwx {directory.root}."
    found = f"mode {mode:04o}, shared: {str(directory.shared).lower()}"
    if problem:
        return Finding("permissions", "warn", f"{found}; {problem}", advice)
    return Finding("permissions", "ok", found)


def _file_system(path: Path) -> Finding:
    kind = file_system_of(path)
    if kind is None:
        return Finding(
            "file system",
            "warn",
            "unknown",
            "Make sure that cache.dir is on a local disk of this node.",
        )
    # Only with cache.allow_network_fs: otherwise the directory was refused above.
    if is_network(kind):
        found = f"{path} is on {display_name(kind)}, a network file system"
        advice = (
            "It is slow, and only processes of one node may use it. Choose a local disk of this "
            "node if there is one, for example $SLURM_TMPDIR."
        )
        return Finding("file system", "warn", found, advice)
    if kind in _IN_MEMORY:
        return Finding(
            "file system",
            "warn",
            f"{path} is in memory ({kind})",
            "Entries use memory that training needs, and are lost at a reboot.",
        )
    return Finding("file system", "ok", kind)


def _space(cache: CacheConfig, index: Index) -> Finding:
    usage = shutil.disk_usage(index.dir.root)
    volume, reserve = index.volume_bytes(), min_free_bytes(cache.min_free, usage.total)
    room = max(0, min(cache.limit - volume, usage.free - reserve))
    if volume > cache.limit:
        advice = (
            "Nothing more is stored. Raise cache.limit, or free space with `zarrcache evict "
            "--target SIZE`."
        )
        found = f"{format_bytes(volume)} used, more than the limit of {format_bytes(cache.limit)}"
        return Finding("space", "warn", found, advice)
    found = (
        f"{format_bytes(usage.free)} free, {format_bytes(volume)} used of the limit of "
        f"{format_bytes(cache.limit)}"
    )
    if cache.limit < SMALL_LIMIT_BYTES:
        advice = (
            "It does not hold a density of 64^3 points (1 MiB). Write cache.limit with its unit, "
            "for example 200 GiB."
        )
        return Finding("space", "warn", found, advice)
    if volume + usage.free - reserve < cache.limit:
        reachable = format_bytes(max(0, volume + usage.free - reserve))
        advice = (
            f"min_free ({format_bytes(reserve)}) stops the cache at {reachable}. Free space, lower "
            "cache.limit, or choose a larger disk."
        )
        return Finding("space", "warn" if room else "fail", found, advice)
    return Finding("space", "ok", found)


def _in_directory(name: str, directory: CacheDir, check: Callable[[Path], Finding]) -> Finding:
    """Run a check in a temporary directory on the file system of the cache."""
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=directory.root) as own:
            return check(Path(own))
    except (OSError, ZarrCacheError) as exc:
        return Finding(
            name,
            "fail",
            f"not usable in {directory.root} ({exc})",
            "Choose a local disk of this node for cache.dir.",
        )


def _locks(own: Path) -> Finding:
    with (own / "lock").open("w") as first, (own / "lock").open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("file locks", "ok", "one holder at a time")
    return Finding(
        "file locks",
        "warn",
        "two holders at once",
        "Objects may be fetched more than once; results stay correct. Choose a local disk of this "
        "node for cache.dir.",
    )


def _mmap(own: Path) -> Finding:
    array = np.arange(4096, dtype="<f4")
    header = header_of(ArrayKey("file", "doctor", "array"), array, "doctor")
    publish(
        own / "entry",
        lambda file: write_entry(file, header, array),
        expected_bytes=header.file_bytes,
    )
    entry = map_entry(own / "entry")
    if not entry.is_intact():
        return Finding(
            "mmap",
            "fail",
            "mapped data differs from what was written",
            "Choose a local disk of this node for cache.dir.",
        )
    return Finding("mmap", "ok", "an entry can be written, mapped and read")


def _origin(config: DataConfig, role: Role, ids: Sequence[str]) -> Iterator[Finding]:
    """List one store of these ids and read one object of it."""
    url = config.data_dir if role == "data" else config.label_dir
    try:
        kinds = kinds_of(config.source)
        fetch = config.cache.fetch if config.cache is not None else FetchConfig()
        # Two attempts: a quick answer is worth more here than a third attempt.
        origin = open_origin(
            url, s3_kwargs=config.s3_kwargs, fetch=fetch, retry=RetryConfig(attempts=2)
        )
        for store in (name for task_id in ids for name in names_of(task_id, kinds)):
            try:
                yield from _store(config, role, origin, store)
                return
            except OriginNotFoundError:
                continue
        # Raises if the directory or the bucket does not exist. A prefix of a bucket cannot be
        # missing, only empty.
        stores = sorted(choose(sources_of(origin.list_names()), kinds).values())
    except ZarrCacheError as exc:
        yield Finding(f"{role} at {url}", "fail", str(exc))
        return
    if not ids:
        found = f"the map {config.map_dir} has no ids for {config.functional}"
    elif not stores:
        found = (
            "it answers, but holds no store (a name that ends in .zarr, .zarr.zip, .json.gz or "
            ".CHGCAR)"
        )
    else:
        found = (
            f"it answers and holds {counted(len(stores), 'store')} ({stores[0]}), but none of the "
            f"first ids of the map: {', '.join(ids)}"
        )
    verdict: Verdict = "warn" if ids and stores else "fail"
    advice = f"Check {role}_dir, map_dir and functional."
    yield Finding(f"{role} at {origin.url}", verdict, found, advice)


def _store(config: DataConfig, role: Role, origin: Origin, store: str) -> Iterator[Finding]:
    """List the arrays of a store, and read an object of each."""
    for array in arrays_of(config.density_type)[role]:
        start_s = time.perf_counter()
        what = OriginArray(origin, store, array)
        try:
            listed = list_array(what)
            yield from _array(config, role, what, listed, start_s)
        except ArrayNotFoundError as exc:  # of a zipped store when it is read
            verdict: Verdict = "fail" if config.missing == "error" else "ok"
            yield Finding(f"{role} at {origin.url}", verdict, str(exc))
            continue
        if is_unconverted(store):
            break  # one object for all; what is in it shows when it is decoded


def _array(
    config: DataConfig, role: Role, what: OriginArray, listed: list[ObjectInfo], start_s: float
) -> Iterator[Finding]:
    """Read one object of an array, and examine the array."""
    origin, store, array = what.origin, what.store, what.array
    ((_, body),) = origin.fetch([min(listed, key=lambda obj: obj.size_bytes)])
    took_ms = 1000 * (time.perf_counter() - start_s)
    found = (
        f"{store} lists {counted(len(listed), 'object')}; one of {memoryview(body).nbytes} bytes "
        f"was read ({took_ms:.0f} ms in total)"
    )
    yield Finding(f"{role} at {origin.url}", "ok", found)
    examined = examine_array(what, listed)
    if examined.electrons(array) is not None:
        name = f"electrons of {role}"
        try:
            read_array(OriginArray(origin, store, array, fills=True), listed=listed)
            found = f"{store} {array} holds the number that its metadata states"
            yield Finding(name, "ok", found)
        except IncompleteArrayError as exc:
            yield Finding(name, "fail", str(exc))
    is_per_volume = units_of(config.normalize_data) == "volume" and is_density(array)
    if is_per_volume and not is_unconverted(store):
        volume = cell_volume(examined.attributes, origin.url_of(store))
        found = f"{store} has a cell of {volume:.6g} cubic angstrom"
        yield Finding(f"volume of {role}", "ok", found)
    if examined.missing_chunks:
        fills = config.cache is not None and config.cache.missing_chunks == "fill"
        yield Finding(
            f"chunks of {role}",
            "warn" if fills else "fail",
            f"{origin.url_of(store)} {array} lacks {examined.missing_chunks} of "
            f"{counted(examined.chunks, 'chunk')}",
            "Convert the store again. Absent chunks are an error, or with "
            "cache.missing_chunks: fill, the fill value.",
        )
    ahead_s = max(obj.modified_s for obj in listed) - time.time()
    if ahead_s > _SKEW_S:
        yield Finding(
            f"clock against {role}",
            "warn",
            f"{store} was written {ahead_s:.0f} s in the future",
            "Set this node's clock (chronyc tracking shows it); S3 refuses requests that are 15 "
            "minutes off.",
        )
