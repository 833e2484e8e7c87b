"""``zarrcache::s3://…`` answers as s3fs does, method by method, over one real bucket."""

from __future__ import annotations

import datetime
import inspect
import io
import posixpath
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from fsspec.spec import AbstractFileSystem
from fsspec.tests.abstract import AbstractFixtures
from fsspec.tests.abstract.get import AbstractGetTests

from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache.errors import ConfigError
from zarrcache.filesystem import ZarrCacheFileSystem

BODY = bytes(range(256)) * 400
OBJECTS = {
    "list.json": b"[12]",
    "lines.txt": b"one\ntwo\nthree\n",
    "empty": b"",
    "a/x.bin": BODY,
    "a/b/list.json": b"[1]",
    "q?x=1/list.json": b"[2]",
    "br[0]/f": b"bracket",
    "a b/\u00e9+%20": b"blank",
    "d//s/f": b"double",
    "marked/": b"",
    "marked/f": b"1",
    "same": b"both",
    "same/child": b"c",
    "file.zarr": b"a file, not a store",
    "v3.zarr.zip": b"PK",
    "deep/1/2/3": b"3",
}
STORE = "a/mp-1.zarr"
FILES = [*OBJECTS, f"{STORE}/.zattrs", f"{STORE}/charge_density_total/0.0.0", "v3.zarr/zarr.json"]
FILES.remove("marked/")
DIRECTORIES = [
    *("", "a", "a/", "a/b", "marked", "d", "d//s", "br[0]", "q?x=1", "deep/1", "same"),
    *(
        STORE,
        f"{STORE}/",
        f"{STORE}/charge_density_total",
        "v3.zarr",
        "v3.zarr/charge_density_total",
    ),
]
ABSENT = ["nothing", "nothing/x", "a/x.bin/y", "none.zarr", "none.zarr/.zgroup", f"{STORE}/x"]
#: One of each kind. The others, of which some have surprised, run with the slow tests.
FEW = ["", "a", "a/x.bin", "same", "marked", STORE, f"{STORE}/.zattrs", "nothing", f"{STORE}/x"]
FEW_OR_ALL = pytest.mark.parametrize(
    "keys",
    [
        pytest.param(FEW, id="few"),
        pytest.param(
            [key for key in [*FILES, *DIRECTORIES, *ABSENT] if key not in FEW],
            id="others",
            marks=pytest.mark.slow,
        ),
    ],
)


@pytest.fixture(scope="module")
def both(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Any, ZarrCacheFileSystem]:
    """A bucket with objects and stores, an empty bucket, s3fs, and zarrcache over it."""
    tmp_path = tmp_path_factory.mktemp("parity")
    bucket, empty = s3_server.new_bucket(), s3_server.new_bucket("empty")
    for key, body in OBJECTS.items():
        s3_server.put(f"s3://{bucket}/{key}", body)
    small_group(tmp_path / "mp-1.zarr")
    small_group(tmp_path / "v3.zarr", zarr_format=3)
    s3_server.put_tree(tmp_path / "mp-1.zarr", f"s3://{bucket}/{STORE}")
    s3_server.put_tree(tmp_path / "v3.zarr", f"s3://{bucket}/v3.zarr")
    ours = fsspec.filesystem(
        "zarrcache",
        target_protocol="s3",
        target_options=s3_server.s3_kwargs,
        dir=str(tmp_path / "cache"),
        min_free=0,
    )
    return bucket, empty, s3_server.fs(), ours


def _outcome(call: Callable[[Any, str], Any], fs: Any, path: str) -> Any:
    """What a call returns or raises, without what the two file systems name differently."""
    try:
        return _plain(call(fs, path))
    except FileNotFoundError:
        return "FileNotFoundError"
    except (ValueError, OSError) as exc:
        return type(exc).__name__


def _plain(value: Any) -> Any:
    match value:
        case {"name": name, "type": kind}:
            return name, value["size"], kind
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case FileNotFoundError():
            return "FileNotFoundError"
        case datetime.datetime():
            return value.replace(microsecond=0)
    return value


def _walk(fs: Any, path: str, **options: Any) -> list[Any]:
    """Without empty levels: older versions of s3fs have none for a path that does not exist."""
    levels = fs.walk(path, **options)
    return sorted((base, sorted(d), sorted(f)) for base, d, f in levels if d or f)


def _ls(fs: Any, path: str) -> list[Any]:
    return sorted(fs.ls(path, detail=True), key=lambda info: str(info["name"]))


def _seek(fs: Any, path: str) -> Any:
    with fs.open(path) as file:
        start = file.read(2)
        file.seek(-1, 2)
        end = file.read()
        file.seek(1)
        return start, end, file.read(), file.tell()


def _get(fs: Any, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        fs.get_file(path, f"{directory}/file")
        return Path(directory, "file").read_bytes()


#: Calls that a path of any kind can be given.
LISTING: dict[str, Callable[[Any, str], Any]] = {
    "info": lambda fs, path: fs.info(path),
    "ls": _ls,
    "ls names": lambda fs, path: fs.ls(path, detail=False),
    "exists": lambda fs, path: fs.exists(path),
    "exists with protocol": lambda fs, path: fs.exists(f"s3://{path}"),
    "isfile": lambda fs, path: fs.isfile(path),
    "isdir": lambda fs, path: fs.isdir(path),
    "find": lambda fs, path: fs.find(path),
    "find with directories": lambda fs, path: fs.find(path, withdirs=True, detail=True),
    "find one level": lambda fs, path: fs.find(path, maxdepth=1, detail=True),
    "find two levels": lambda fs, path: fs.find(path, maxdepth=2, withdirs=True),
    "find prefix": lambda fs, path: fs.find(path, prefix="l"),
    "walk": _walk,
    "walk bottom up": lambda fs, path: _walk(fs, path, topdown=False),
    "walk one level": lambda fs, path: _walk(fs, path, maxdepth=1),
    "du": lambda fs, path: fs.du(path),
    "du by path": lambda fs, path: fs.du(path, total=False),
    "glob": lambda fs, path: fs.glob(path),
    "glob *": lambda fs, path: fs.glob(f"{path.rstrip('/')}/*"),
    "glob */": lambda fs, path: fs.glob(f"{path.rstrip('/')}/*/"),
    "glob **": lambda fs, path: fs.glob(f"{path.rstrip('/')}/**", maxdepth=2),
    "glob **/name": lambda fs, path: fs.glob(f"{path.rstrip('/')}/**/list.json", detail=True),
    "glob [a-l]?": lambda fs, path: fs.glob(f"{path.rstrip('/')}/[a-l]*[!n]"),
    "expand_path": lambda fs, path: fs.expand_path(path),
    "expand_path recursive": lambda fs, path: fs.expand_path(path, recursive=True, maxdepth=2),
    "tree": lambda fs, path: fs.tree(path),
    "stat": lambda fs, path: fs.stat(path),
    "lexists": lambda fs, path: fs.lexists(path),
    "modified": lambda fs, path: fs.modified(path),
    "get_mapper": lambda fs, path: sorted(fs.get_mapper(path)),
    "unstrip_protocol": lambda fs, path: fs.unstrip_protocol(path),
}
#: Calls that read a file, or find that there is none.
READING: dict[str, Callable[[Any, str], Any]] = {
    "cat_file": lambda fs, path: fs.cat_file(path),
    "cat_file range": lambda fs, path: fs.cat_file(path, start=1, end=3),
    "cat_file from": lambda fs, path: fs.cat_file(path, start=2),
    "cat_file end": lambda fs, path: fs.cat_file(path, start=-2),
    "cat": lambda fs, path: fs.cat(path),
    "cat list": lambda fs, path: fs.cat([path, path]),
    "cat_ranges": lambda fs, path: fs.cat_ranges([path] * 3, [0, 1, 0], [1, 3, 3]),
    "head": lambda fs, path: fs.head(path, 3),
    "tail": lambda fs, path: fs.tail(path, 3),
    "read_block": lambda fs, path: fs.read_block(path, 1, 5, b"\n"),
    "read_text": lambda fs, path: fs.read_text(path, encoding="latin1"),
    "read_bytes": lambda fs, path: fs.read_bytes(path),
    "open": lambda fs, path: fs.open(path).read(),
    "open text": lambda fs, path: fs.open(path, "r", encoding="latin1").readlines(),
    "seek": _seek,
    "get_file": _get,
    "size": lambda fs, path: fs.size(path),
    "sizes": lambda fs, path: fs.sizes([path, path]),
    "checksum": lambda fs, path: fs.checksum(path),
}


@FEW_OR_ALL
@pytest.mark.parametrize("call", LISTING.values(), ids=LISTING)
def test_paths_are_listed_as_by_s3fs(
    both: Any, call: Callable[[Any, str], Any], keys: list[str]
) -> None:
    if call is LISTING["find with directories"] and s3fs.__version__ < "2026":
        pytest.skip("this s3fs leaves out most directories")
    bucket, empty, plain, ours = both
    for path in [empty, "no-such-bucket", *(f"{bucket}/{key}" for key in keys)]:
        assert _outcome(call, ours, path) == _outcome(call, plain, path), path


@FEW_OR_ALL
@pytest.mark.parametrize("call", READING.values(), ids=READING)
def test_files_are_read_as_by_s3fs(
    both: Any, call: Callable[[Any, str], Any], keys: list[str]
) -> None:
    """Ranges past the end are left out: s3fs raises for some of them."""
    bucket, _, plain, ours = both
    short = {key for key, body in OBJECTS.items() if len(body) < 4}
    for key in set(keys) & {*FILES, *ABSENT} - short:
        path = f"{bucket}/{key}"
        if (call, key) == (_get, "same"):  # a directory too, which fsspec prefers here
            continue
        assert _outcome(call, ours, path) == _outcome(call, plain, path), path


def test_ranges_past_the_end_are_empty(both: Any) -> None:
    bucket, _, _, ours = both
    for key in ("empty", "list.json"):
        body = OBJECTS[key]
        assert ours.cat_file(f"{bucket}/{key}", 2, 9) == body[2:9]
        assert ours.cat_file(f"{bucket}/{key}", 9, 12) == b""
        assert ours.cat_file(f"{bucket}/{key}", 3, 1) == b""
        assert ours.cat_file(f"{bucket}/{key}", -9) == body


def test_the_root_lists_the_buckets(both: Any) -> None:
    bucket, empty, _, ours = both
    assert {bucket, empty} <= set(ours.ls("", detail=False))
    assert ours.info("")["type"] == "directory"
    assert ours.exists("")
    assert ours.isdir("s3://")
    for call in (ours.find, ours.glob, lambda path: list(ours.walk(path))):
        with pytest.raises(ValueError, match="Cannot traverse all of S3"):
            call("*" if call == ours.glob else "")


def test_cat_of_many_files_treats_errors_as_s3fs(both: Any) -> None:
    bucket, _, plain, ours = both
    paths = [f"{bucket}/list.json", f"{bucket}/nothing", f"{bucket}/{STORE}/.zgroup"]
    for on_error in ("omit", "return"):
        assert _plain(ours.cat(paths, on_error=on_error)) == _plain(
            plain.cat(paths, on_error=on_error)
        )
    with pytest.raises(FileNotFoundError):
        ours.cat(paths)
    pattern = f"{bucket}/**/list.json"
    assert ours.cat(pattern) == plain.cat(pattern)
    assert ours.cat(f"{bucket}/a", recursive=True, on_error="omit") == plain.cat(
        f"{bucket}/a", recursive=True, on_error="omit"
    )


def test_a_tree_is_downloaded_as_by_s3fs(both: Any, tmp_path: Path) -> None:
    bucket, _, plain, ours = both
    for name, fs in {"ours": ours, "plain": plain}.items():
        fs.get(f"{bucket}/a", str(tmp_path / name), recursive=True)
    trees = [
        {p.relative_to(tmp_path / name): p.is_file() and p.read_bytes() for p in found}
        for name in ("ours", "plain")
        for found in [list((tmp_path / name).rglob("*"))]
    ]
    assert trees[0] == trees[1]
    assert len(trees[0]) > 10


def test_directories_have_size_zero_and_one_shape(both: Any) -> None:
    bucket, _, _, ours = both
    for path in (bucket, f"{bucket}/a", f"{bucket}/{STORE}", f"{bucket}/v3.zarr"):
        assert ours.info(path) == {"name": path, "size": 0, "type": "directory"}
    below = {info["name"]: info for info in ours.ls(f"{bucket}/a")}
    assert below[f"{bucket}/{STORE}"] == ours.info(f"{bucket}/{STORE}")


def test_ukey_and_checksum_change_with_the_version_only(
    s3_server: S3Server, both: Any, bucket: str
) -> None:
    _, _, _, ours = both
    s3_server.put(f"s3://{bucket}/f", b"one")
    before = ours.ukey(f"{bucket}/f"), ours.checksum(f"{bucket}/f")
    assert (ours.ukey(f"{bucket}/f"), ours.checksum(f"{bucket}/f")) == before
    s3_server.put(f"s3://{bucket}/f", b"two")
    assert ours.ukey(f"{bucket}/f") != before[0]
    assert ours.checksum(f"{bucket}/f") != before[1]
    assert ours.ukey(bucket) == ours.ukey(bucket)


WRITES: dict[str, Callable[[Any, str, Path], Any]] = {
    "open wb": lambda fs, path, _: fs.open(path, "wb"),
    "open ab": lambda fs, path, _: fs.open(path, "ab"),
    "open w": lambda fs, path, _: fs.open(path, "w"),
    "open xb": lambda fs, path, _: fs.open(path, "xb"),
    "open r+b": lambda fs, path, _: fs.open(path, "r+b"),
    "pipe": lambda fs, path, _: fs.pipe(path, b"x"),
    "pipe mapping": lambda fs, path, _: fs.pipe({path: b"x"}),
    "pipe_file": lambda fs, path, _: fs.pipe_file(path, b"x"),
    "put": lambda fs, path, local: fs.put(str(local), path),
    "put_file": lambda fs, path, local: fs.put_file(str(local), path),
    "upload": lambda fs, path, local: fs.upload(str(local), path),
    "touch": lambda fs, path, _: fs.touch(path),
    "write_text": lambda fs, path, _: fs.write_text(path, "x"),
    "write_bytes": lambda fs, path, _: fs.write_bytes(path, b"x"),
    "mkdir": lambda fs, path, _: fs.mkdir(path),
    "makedir": lambda fs, path, _: fs.makedir(path),
    "makedirs": lambda fs, path, _: fs.makedirs(path, exist_ok=True),
    "mkdirs": lambda fs, path, _: fs.mkdirs(path),
    "rmdir": lambda fs, path, _: fs.rmdir(path),
    "rm": lambda fs, path, _: fs.rm(path, recursive=True),
    "rm_file": lambda fs, path, _: fs.rm_file(path),
    "delete": lambda fs, path, _: fs.delete(path),
    "cp_file": lambda fs, path, _: fs.cp_file(path, f"{path}2"),
    "copy": lambda fs, path, _: fs.copy(path, f"{path}2"),
    "cp": lambda fs, path, _: fs.cp(path, f"{path}2"),
    "mv": lambda fs, path, _: fs.mv(path, f"{path}2"),
    "move": lambda fs, path, _: fs.move(path, f"{path}2"),
    "rename": lambda fs, path, _: fs.rename(path, f"{path}2"),
    "start_transaction": lambda fs, path, _: fs.start_transaction(),
    "mapper": lambda fs, path, _: fs.get_mapper(path).__setitem__("key", b"x"),
    "mapper check": lambda fs, path, _: fs.get_mapper(posixpath.dirname(path), check=True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_refused_in_words(
    both: Any, tmp_path: Path, write: Callable[[Any, str, Path], Any]
) -> None:
    """The ``mkdir`` and ``rmdir`` of fsspec itself would do nothing, without an error."""
    bucket, _, plain, ours = both
    local = tmp_path / "local"
    local.write_bytes(b"x")
    before = plain.find(bucket)
    with pytest.raises(io.UnsupportedOperation, match=r"read-only.*its own filesystem"):
        write(ours, f"{bucket}/a/x.bin", local)
    assert plain.find(bucket) == before


def test_what_simplecache_can_do_and_zarrcache_cannot_is_refused_in_words(
    s3_server: S3Server, both: Any, tmp_path: Path
) -> None:
    bucket, _, _, ours = both
    path = f"{bucket}/a/x.bin"
    with pytest.raises(NotImplementedError, match=r"s3fs\.S3FileSystem"):
        ours.sign(path)
    with pytest.raises(NotImplementedError, match="version_aware"):
        ours.ls(path, versions=True)
    with pytest.raises(NotImplementedError, match="version_aware"):
        ours.info(path, version_id="1")
    with pytest.raises(NotImplementedError, match="max_gap"):
        ours.cat_ranges([path], [0], [1], max_gap=3)
    for method in ("clear_cache", "pop_from_cache", "clear_expired_cache", "cache_size"):
        with pytest.raises(NotImplementedError, match="zarrcache evict"):
            getattr(ours, method)()
    for option in ("cache_storage", "expiry_time", "compression", "same_names", "fs"):
        with pytest.raises(ConfigError, match=f"{option} is an option of simplecache"):
            fsspec.filesystem("zarrcache", target_protocol="s3", **{option: "x"})
    versioned = fsspec.filesystem(
        "zarrcache",
        target_protocol="s3",
        target_options={**s3_server.s3_kwargs, "version_aware": True},
        dir=str(tmp_path / "cache"),
    )
    with pytest.raises(NotImplementedError, match="version_aware"):
        versioned.cat_file(f"{path}?versionId=abc")
    assert versioned.cat_file(path) == BODY


def test_every_public_method_of_fsspec_is_in_a_table_here() -> None:
    """A method that a new fsspec adds is looked at before it reaches users."""
    text = Path(__file__).read_text()
    public = {
        name
        for name, member in inspect.getmembers(AbstractFileSystem)
        if callable(member) and not name.startswith("_")
    }
    elsewhere = {
        # about instances; the attribute is a class
        *("clear_instance_cache", "current", "from_dict", "from_json", "to_dict", "to_json"),
        *("transaction_type", "end_transaction"),
        # in test_filesystem.py; not implemented by s3fs either; alias of ls, get, du
        *("invalidate_cache", "created", "listdir", "download", "disk_usage"),
    }
    tested = set(re.findall(r"(?:fs|ours|plain)\.(\w+)", text))
    assert public - elsewhere - tested == set()


@pytest.mark.slow
class TestGet(AbstractFixtures, AbstractGetTests):
    """Tests of fsspec itself for downloads. Its others write."""

    @pytest.fixture
    def fs(self, s3_server: S3Server, tmp_path: Path) -> _WithWrites:
        return _WithWrites(
            fsspec.filesystem(
                "zarrcache",
                target_protocol="s3",
                target_options=s3_server.s3_kwargs,
                dir=str(tmp_path / "cache"),
                min_free=0,
            ),
            s3_server.fs(),
        )

    @pytest.fixture
    def fs_path(self, bucket: str) -> str:
        return bucket

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *parts: "/".join(map(str, parts))

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False


class _WithWrites:
    """The file system under test; what prepares a scenario is written through s3fs."""

    def __init__(self, fs: ZarrCacheFileSystem, plain: Any) -> None:
        self._fs, self._plain = fs, plain

    def __getattr__(self, name: str) -> Any:
        writes = {"touch", "makedirs", "mkdir", "pipe", "rm"}
        return getattr(self._plain if name in writes else self._fs, name)
