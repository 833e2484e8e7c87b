"""Versions and contents on servers whose ETags are no strong, quoted MD5s; and ranges, which no
ETag covers. Both engines.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr

from tests.support.tagserver import LONG_AGO, Tagged, TagServer, running_tag_server
from zarrcache import open_store
from zarrcache._keys import ObjectInfo, source_digest
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import IncompleteArrayError, OriginError, OriginUnavailableError
from zarrcache.origin import Origin, RangeIgnoredError, open_origin
from zarrcache.origin import _requests as retry
from zarrcache.stats import Counters

BODY = random.Random(1).randbytes(3001)
OTHER = random.Random(2).randbytes(3001)
KMS = {"x-amz-server-side-encryption": "aws:kms"}


def md5(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


def digest(body: bytes) -> str:
    """32 hexadecimal digits that are no MD5."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def tagged(body: bytes, etag: str, **more: Any) -> Tagged:
    return Tagged(body, f'"{etag}"', f'"{etag}"', **more)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def server() -> Iterator[TagServer]:
    with running_tag_server() as running:
        yield running


@pytest.fixture(params=["obstore", "s3fs"])
def opened(request: pytest.FixtureRequest, server: TagServer) -> Callable[..., Origin]:
    """``opened(etag=..., path=...)`` opens the origin ``s3://b/<path>``."""

    def make(
        etag: Any = "auto", path: str = "d", attempts: int = 3, counters: Counters | None = None
    ) -> Origin:
        return open_origin(
            f"s3://b/{path}",
            s3_kwargs=server.s3_kwargs,
            fetch=FetchConfig(engine=request.param, etag=etag),
            retry=RetryConfig(attempts=attempts, timeout=20),
            counters=counters,
        )

    return make


def read(origin: Origin, *keys: str) -> dict[str, bytes]:
    listed = {obj.key: obj for obj in origin.list_objects()}
    objects = [listed[key] for key in keys or listed]
    return {obj.key: bytes(memoryview(body)) for obj, body in origin.fetch(objects)}


def forget(origin: Any, *, can_match: bool = True) -> None:
    """As if the origin were new, but with its connections."""
    origin._reads._can_match, origin._reads._has_two_tags = can_match, False


M, MULTI = md5(BODY), f"{md5(BODY)}-2"
SPELLINGS = {
    "weak in answers": (f'"{M}"', f'W/"{M}"'),
    "weak in listings": (f'W/"{M}"', f'"{M}"'),
    "weak": (f'W/"{M}"', f'W/"{M}"'),
    "weak, lower case": (f'"{M}"', f'w/"{M}"'),
    "no quotes": (M, M),
    "quotes in listings only": (f'"{M}"', M),
    "quotes in answers only": (M, f'"{M}"'),
    "single quotes": (f"'{M}'", f'"{M}"'),
    "escaped twice": (f"&quot;{M}&quot;", f'"{M}"'),
    "upper case": (f'"{M.upper()}"', f'"{M.upper()}"'),
    "upper case in listings": (f'"{M.upper()}"', f'"{M}"'),
    "multipart": (f'"{MULTI}"', f'"{MULTI}"'),
    "multipart, weak in answers": (f'"{MULTI}"', f'W/"{MULTI}"'),
    "a text": ('"0x8DC9-v7"', '"0x8DC9-v7"'),
    "none": (None, None),
    "none in answers": (f'"{M}"', None),
    "none in listings": (None, f'"{M}"'),
    "empty": ('""', '""'),
    "two": (f'"{M}"', '"0x8DC9-v7"'),
    "two, with a suffix": (f'"{M}"', f'"{M}-gzip"'),
}


@pytest.mark.parametrize("if_match", ["ignored", "weak", "refused"])
def test_every_spelling_of_an_etag_is_read(
    server: TagServer, opened: Callable[..., Origin], if_match: str
) -> None:
    """Whole and in ranges, also if the server refuses If-Match for the version that it lists."""
    server.objects = {
        f"d/{name}": Tagged(BODY, *tags, if_match=if_match) for name, tags in SPELLINGS.items()
    }
    counters = Counters()
    origin = opened(counters=counters)
    for obj in origin.list_objects():
        forget(origin)
        assert origin.fetch_range(obj, 100, 900) == BODY[100:900], obj
        forget(origin)
        assert [bytes(memoryview(body)) for _, body in origin.fetch([obj])] == [BODY], obj
    assert counters.snapshot().requests == server.count().total()


@pytest.mark.parametrize(
    ("listed", "answered"), [(f'"{M}"', f'"{M}"'), (f'"{M}"', '"v1"'), ('"v1"', f'"{M}"')]
)
def test_two_versions_of_one_second_are_told_apart(
    server: TagServer, opened: Callable[..., Origin], listed: str, answered: str
) -> None:
    """By the ETag alone; also where answers have another ETag than listings."""
    server.objects["d/x"] = Tagged(BODY, listed, answered, if_match="ignored")
    origin = opened()
    [obj] = origin.list_objects()
    new = [tag.replace(M, md5(OTHER)).replace("v1", "v2") for tag in (listed, answered)]
    server.objects["d/x"] = Tagged(OTHER, *new, if_match="ignored")
    for request in (
        lambda: list(origin.fetch([obj])),
        lambda: origin.fetch_range(obj, 100, 900),
    ):
        with pytest.raises(IncompleteArrayError, match="was changed while it was being read"):
            request()


@pytest.mark.parametrize("if_match", ["ignored", "weak", "refused"])
def test_another_version_of_the_same_size_is_refused(
    server: TagServer, opened: Callable[..., Origin], if_match: str
) -> None:
    """Whole and in ranges. Where an ETag is missing, the modification time tells."""
    server.objects = {
        f"d/{name}": Tagged(BODY, *tags, if_match=if_match) for name, tags in SPELLINGS.items()
    }
    origin = opened()
    before = origin.list_objects()
    for obj in server.objects.values():
        obj.body, obj.modified = OTHER, LONG_AGO + timedelta(seconds=2)
        obj.listed, obj.answered = (
            tag
            and tag.replace(M, md5(OTHER)).replace(M.upper(), md5(OTHER).upper()).replace("v7", "8")
            for tag in (obj.listed, obj.answered)
        )
    for old, new in zip(before, origin.list_objects(), strict=True):
        assert source_digest([old]) != source_digest([new])
        changed = re.escape(f"{origin.url_of(old.key)} was changed while it was being read")
        for can_match in (True, False):
            forget(origin, can_match=can_match)
            with pytest.raises(IncompleteArrayError, match=changed):
                list(origin.fetch([old]))
            forget(origin, can_match=can_match)
            with pytest.raises(IncompleteArrayError, match=changed):
                origin.fetch_range(old, 100, 900)


def test_both_engines_and_a_head_give_the_same_version(server: TagServer) -> None:
    """Or a cache that one filled would be stale for the other."""
    server.objects = {f"d/{name}": Tagged(BODY, *tags) for name, tags in SPELLINGS.items()}
    one, other = (
        open_origin("s3://b/d", s3_kwargs=server.s3_kwargs, fetch=FetchConfig(engine=engine))
        for engine in ("obstore", "s3fs")
    )
    assert one.list_objects() == other.list_objects()
    for obj in one.list_objects():
        assert one.list_objects(obj.key) == other.list_objects(obj.key)
        listed, answered = SPELLINGS[obj.key]
        if (listed is None) == (answered is None) and not obj.key.startswith("two"):
            assert one.list_objects(obj.key)[0].etag.lower() == obj.etag.lower()


def test_strong_etags_keep_their_text_so_that_stored_entries_stay_valid(
    server: TagServer, opened: Callable[..., Origin]
) -> None:
    server.objects = {"d/x": tagged(BODY, M), "d/y": tagged(BODY, "V-7%+.a")}
    assert [obj.etag for obj in opened().list_objects()] == [M, "V-7%+.a"]


class TestMd5:
    """What 32 hexadecimal digits are, with ``cache.fetch.etag: auto`` unless the test says."""

    def test_a_server_whose_etags_are_another_digest_is_read_and_named_once(
        self,
        server: TagServer,
        opened: Callable[..., Origin],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        bodies = {f"{i}": random.Random(i).randbytes(500 + i) for i in range(6)}
        server.objects = {f"d/{k}": tagged(v, digest(v)) for k, v in bodies.items()}
        origin = opened()
        assert read(origin, "0") == {"0": bodies["0"]}  # others are read to find out
        assert read(origin) == bodies
        server.seen.clear()
        assert read(origin) == bodies
        assert server.count() == {"LIST": 1, "GET": 3 * 6}  # whole and in halves; no more HEADs
        lines = [r.getMessage() for r in caplog.records if "are not MD5 sums" in r.getMessage()]
        assert len(lines) == 1
        assert "s3://b/d" in lines[0]
        assert "cache.fetch.etag" in lines[0]

    def test_one_object_alone_is_refused_in_words(
        self, server: TagServer, opened: Callable[..., Origin]
    ) -> None:
        """It may as well be damaged. The setting decides."""
        server.objects["d/x.zip"] = tagged(BODY, digest(BODY))
        with pytest.raises(IncompleteArrayError, match=r"s3://b/d/x.zip .*fetch\.etag: opaque"):
            read(opened())
        assert read(opened("opaque")) == {"x.zip": BODY}

    @pytest.mark.parametrize("order", [("good", "bad"), ("bad",)])
    @pytest.mark.parametrize("setting", ["auto", "md5"])
    def test_an_object_that_is_damaged_at_the_origin_is_refused(
        self,
        server: TagServer,
        opened: Callable[..., Origin],
        setting: str,
        order: tuple[str, ...],
    ) -> None:
        """Every reading of it is alike. Other objects show that the ETags are MD5s."""
        damaged = bytearray(BODY)
        damaged[7] ^= 1
        server.objects = {"d/good": tagged(OTHER, md5(OTHER)), "d/bad": tagged(bytes(damaged), M)}
        origin = opened(setting)
        if order[0] == "good":
            read(origin, "good")
        why = "other objects there match theirs" if setting == "auto" else "etag is md5"
        with pytest.raises(IncompleteArrayError, match=rf"d/bad does not match its ETag .*{why}"):
            read(origin, "bad")
        assert read(origin, "good") == {"good": OTHER}

    def test_an_encrypted_object_does_not_switch_the_check_off_for_others(
        self, server: TagServer, opened: Callable[..., Origin]
    ) -> None:
        """Neither one nor many."""
        damaged = bytearray(BODY)
        damaged[7] ^= 1
        server.objects = {
            **{f"d/kms{i}": tagged(OTHER[i:], digest(OTHER[i:]), headers=KMS) for i in range(20)},
            "d/customer": tagged(
                OTHER[30:],
                digest(OTHER[30:]),
                headers={"x-amz-server-side-encryption-customer-algorithm": "AES256"},
            ),
            "d/good": tagged(BODY, M),
            "d/bad": tagged(bytes(damaged), M),
        }
        origin = opened()
        encrypted = [f"kms{i}" for i in range(20)]
        assert read(origin, *encrypted) == {f"kms{i}": OTHER[i:] for i in range(20)}
        assert read(origin, "customer") == {"customer": OTHER[30:]}
        with pytest.raises(IncompleteArrayError, match="s3://b/d/bad does not match its ETag"):
            read(origin, "bad")
        assert read(origin, "kms3", "good") == {"kms3": OTHER[3:], "good": BODY}

    def test_the_setting_md5_refuses_what_is_none(
        self, server: TagServer, opened: Callable[..., Origin]
    ) -> None:
        server.objects = {
            "d/kms": tagged(BODY, digest(BODY), headers=KMS),
            "d/multipart": tagged(BODY, MULTI),
        }
        with pytest.raises(IncompleteArrayError, match=r"d/kms .*cache\.fetch\.etag is md5"):
            read(opened("md5"), "kms")
        assert read(opened("md5"), "multipart") == {"multipart": BODY}

    def test_the_setting_opaque_costs_one_request_an_object(
        self, server: TagServer, opened: Callable[..., Origin]
    ) -> None:
        server.objects = {f"d/{i}": tagged(BODY[i:], digest(BODY[i:])) for i in range(5)}
        origin = opened("opaque")
        assert read(origin) == {f"{i}": BODY[i:] for i in range(5)}
        assert server.count() == {"LIST": 1, "GET": 5}

    def test_what_one_origin_shows_says_nothing_about_another(
        self, server: TagServer, opened: Callable[..., Origin]
    ) -> None:
        damaged = bytearray(BODY)
        damaged[7] ^= 1
        server.objects = {
            "d/1": tagged(BODY, digest(BODY)),
            "d/2": tagged(OTHER, digest(OTHER)),
            "e/bad": tagged(bytes(damaged), M),
            "e/good": tagged(OTHER, md5(OTHER)),
        }
        assert read(opened()) == {"1": BODY, "2": OTHER}
        with pytest.raises(IncompleteArrayError):
            read(opened(path="e"), "bad")


FLIPPED = {
    "another digest": (digest(BODY), digest(OTHER)),
    "multipart": (MULTI, f"{md5(OTHER)}-2"),
    "encrypted": (digest(BODY), digest(OTHER)),
    "a text": ("v1", "v2"),
    "none": (None, None),
    "an MD5": (M, md5(OTHER)),
}


@pytest.mark.parametrize("kind", FLIPPED)
def test_a_bit_that_flips_on_the_way_is_never_returned(
    server: TagServer, opened: Callable[..., Origin], kind: str
) -> None:
    """Whole objects and ranges over http://, whatever the ETags are."""
    tags = [None if tag is None else f'"{tag}"' for tag in FLIPPED[kind]]
    headers = KMS if kind == "encrypted" else {}
    server.objects = {
        f"d/{key}": Tagged(body, tag, tag, headers=headers)
        for key, body, tag in zip("xy", (BODY, OTHER), tags, strict=True)
    }
    origin = opened(attempts=6)
    [obj, _] = origin.list_objects()
    for flips in (1, 2, 3):
        server.objects["d/x"].flips = flips
        assert read(origin) == {"x": BODY, "y": OTHER}
        for start, stop in ((0, 40), (7, 8), (2000, 3001), (0, 3001), (3000, 3001)):
            server.objects["d/x"].flips = flips
            assert origin.fetch_range(obj, start, stop) == BODY[start:stop]


@pytest.mark.parametrize("kind", FLIPPED)
def test_bits_that_always_flip_are_an_error(
    server: TagServer, opened: Callable[..., Origin], kind: str
) -> None:
    """At the same place of each answer: the readings have different boundaries."""
    tags = [None if tag is None else f'"{tag}"' for tag in FLIPPED[kind]]
    server.objects = {
        "d/x": Tagged(BODY, tags[0], tags[0], flips=-1),
        "d/y": Tagged(OTHER, tags[1], tags[1], flips=-1),
    }
    origin = opened()
    [obj, _] = origin.list_objects()
    for request in (
        lambda: list(origin.fetch([obj])),
        lambda: origin.fetch_range(obj, 40, 900),
        lambda: origin.fetch_range(obj, 2500, 3001),
        lambda: origin.fetch_range(obj, 0, 3001),
    ):
        with pytest.raises(OriginUnavailableError, match="two readings of the same bytes differ"):
            request()


def test_a_server_that_ignores_ranges_is_read_whole_and_never_taken_for_a_range(
    server: TagServer, opened: Callable[..., Origin]
) -> None:
    server.objects = {
        "d/x": tagged(BODY, MULTI, flips=1, has_ranges=False),
        "d/y": tagged(OTHER, digest(OTHER), headers=KMS, has_ranges=False),
    }
    counters = Counters()
    origin = opened(counters=counters)
    assert read(origin) == {"x": BODY, "y": OTHER}
    assert counters.snapshot().requests == server.count().total()
    with pytest.raises(RangeIgnoredError, match="sent the whole object"):
        origin.fetch_range(origin.list_objects()[0], 0, 10)


@pytest.mark.parametrize("engine", ["auto", "s3fs", "obstore"])
def test_answers_without_content_length_are_read(server: TagServer, engine: Any) -> None:
    """A proxy may answer in chunks, and leave the length out of the answer to HEAD too."""
    server.objects = {
        "d/x": tagged(BODY, MULTI, has_length=False),
        "d/x2": tagged(OTHER, digest(OTHER)),
    }
    origin = open_origin(
        "s3://b/d",
        s3_kwargs=server.s3_kwargs,
        fetch=FetchConfig(engine=engine),
        retry=RetryConfig(attempts=2),
    )
    if engine == "obstore":
        with pytest.raises(OriginError, match="needs Content-Length in each answer"):
            origin.list_objects("x")
        return
    [obj] = origin.list_objects("x")
    assert (obj.key, obj.size_bytes, obj.etag) == ("x", len(BODY), MULTI)
    assert read(origin, "x") == {"x": BODY}
    assert origin.fetch_range(obj, 200, 300) == BODY[200:300]


#: What a server says that it sends for every range. Its length may be right, and a second reading
#: the same.
OTHER_RANGES = ["bytes 199-298/3001", "bytes 200-299", "bytes 200-2999/3001", "lines 1", ""]


@pytest.mark.parametrize("sent", OTHER_RANGES)
def test_another_range_than_the_requested_one_is_never_taken_for_it(
    server: TagServer, opened: Callable[..., Origin], sent: str
) -> None:
    server.objects = {"d/x": tagged(BODY, MULTI, range_sent=sent)}
    origin = opened()
    [obj] = origin.list_objects()
    with pytest.raises(RangeIgnoredError, match="or another range, for a range of it"):
        origin.fetch_range(obj, 200, 300)
    assert read(origin) == {"x": BODY}


RANGES: dict[str, dict[str, Any]] = {
    "none": {"has_ranges": False},
    "others": {"range_sent": "bytes 0-4095/9999"},
}


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("ranges", RANGES)
def test_large_objects_of_a_server_without_right_ranges_are_read_whole(
    server: TagServer, tmp_path: Path, ranges: str, engine: str, is_cached: bool
) -> None:
    """A sharded array, by `open_store`, and a file, by ``zarrcache::``. The byte tier keeps the
    whole object.
    """
    path = tmp_path / "mp-1.zarr"
    values = np.random.default_rng(1).random((64, 64, 64), dtype="float32")
    zarr.open_group(path, mode="w").create_array(
        "a", data=values, chunks=(16,) * 3, shards=(64,) * 3
    )
    for file in [f for f in path.rglob("*") if f.is_file()]:
        body = file.read_bytes()
        key = f"d/mp-1.zarr/{file.relative_to(path)}"
        server.objects[key] = tagged(body, md5(body), **RANGES[ranges])
    settings = {
        "dir": str(tmp_path / "cache"),
        "min_free": 0,
        "bytes": {"block_size": "64 KiB", "enabled": is_cached},
        "fetch": {"engine": engine},
    }
    store = open_store("s3://b/d/mp-1.zarr", s3_kwargs=server.s3_kwargs, cache=settings)
    array = zarr.open_group(store, mode="r")["a"]
    assert np.array_equal(array[3:40, 20:30, :2], values[3:40, 20:30, :2])
    n_requests = server.count()["GET"]
    assert np.array_equal(array[...], values)
    if is_cached:
        assert server.count()["GET"] == n_requests
    url, options = "zarrcache::s3://b/d/mp-1.zarr/a/c/0/0/0", {"s3": server.s3_kwargs}
    with fsspec.open(url, **options, zarrcache=settings) as file:
        file.seek(500_000)
        assert file.read(10_000) == server.objects["d/mp-1.zarr/a/c/0/0/0"].body[500_000:510_000]


def test_a_flipped_block_is_neither_returned_nor_kept(server: TagServer, tmp_path: Path) -> None:
    """Through the byte tier: the next read, from disk, is right too and sends nothing."""
    body = random.Random(3).randbytes(300_000)
    server.objects["d/x"] = tagged(body, md5(body))
    options = {
        "s3": server.s3_kwargs,
        "zarrcache": {"dir": str(tmp_path), "min_free": 0, "bytes": {"block_size": "64 KiB"}},
    }
    server.objects["d/x"].flips = 3

    def middle() -> bytes:
        with fsspec.open("zarrcache::s3://b/d/x", **options) as file:
            file.seek(130_000)
            return bytes(file.read(10_000))

    assert middle() == body[130_000:140_000]
    before = server.count()["GET"]
    assert middle() == body[130_000:140_000]
    assert server.count()["GET"] == before


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
@pytest.mark.parametrize("spelling", ["none", "weak in answers"])
def test_zarr_reads_a_store_through_every_engine(
    server: TagServer, tmp_path: Path, engine: str, spelling: str
) -> None:
    """An ETag that is missing once was a KeyError, which zarr takes for a missing group."""
    values = np.arange(60, dtype="f4").reshape(3, 4, 5)
    group = zarr.open_group(tmp_path / "mp-1.zarr", mode="w")
    group.create_array("a", shape=values.shape, chunks=(2, 2, 2), dtype="f4")[...] = values
    for file in (tmp_path / "mp-1.zarr").rglob("*"):
        if file.is_file():
            key = f"d/{file.relative_to(tmp_path).as_posix()}"
            body = file.read_bytes()
            tags = (tag and tag.replace(M, md5(body)) for tag in SPELLINGS[spelling])
            server.objects[key] = Tagged(body, *tags, if_match="ignored")
    cache = {"dir": tmp_path / "cache", "min_free": 0, "fetch": {"engine": engine}}
    store = open_store("s3://b/d/mp-1.zarr", s3_kwargs=server.s3_kwargs, cache=cache)
    assert np.array_equal(zarr.open_group(store, mode="r")["a"][...], values)


def test_the_version_is_not_part_of_a_request_without_an_etag(
    server: TagServer, opened: Callable[..., Origin], caplog: pytest.LogCaptureFixture
) -> None:
    """If-Match with a date would be refused by a server that is right."""
    caplog.set_level(logging.WARNING)
    server.objects["d/x"] = Tagged(BODY, None, None, if_match="refused")
    origin = opened()
    [obj] = origin.list_objects()
    assert obj == ObjectInfo(
        "x", len(BODY), f"modified {int(LONG_AGO.timestamp())}", obj.modified_s
    )
    assert read(origin) == {"x": BODY}
    assert server.count()["HEAD"] == 0
