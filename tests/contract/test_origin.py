"""The contract of an origin, for a directory, for S3 through s3fs and through obstore."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import multiprocessing
import os
import pickle
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import IncompleteArrayError, OriginNotFoundError
from zarrcache.origin import Origin, open_origin
from zarrcache.stats import Counters

ODD_KEYS = [
    "a b/c",
    "a+b",
    "100%25",
    "50%",
    "é/ü-密度",
    "x#y?z&w=1",
    "~(it's)!,;@$",
    "dot.d",
    "back\\slash",
    'quote"s',
    "<tag>&amp;",
]
N_MANY = 1003


@dataclass(frozen=True)
class Place:
    """Somewhere to put objects, and the origin under test that reads them."""

    url: str
    engine: str
    server: S3Server | None = None

    def open(
        self, url: str = "", endpoint_url: str = "", counters: Counters | None = None, **fetch: Any
    ) -> Origin:
        kwargs = (
            self.server.kwargs_at(endpoint_url or self.server.endpoint_url) if self.server else None
        )
        settings = FetchConfig(engine="auto" if self.engine == "local" else self.engine, **fetch)
        retry = RetryConfig(attempts=2, timeout=30)
        return open_origin(
            url or self.url, s3_kwargs=kwargs, fetch=settings, retry=retry, counters=counters
        )

    def put(self, key: str, body: bytes) -> None:
        if self.server is not None:
            bucket, root = self.split()
            client_of(self.server).put_object(
                Bucket=bucket, Key=f"{root}/{key}".lstrip("/"), Body=body
            )
            return
        path = Path(self.url, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        # file time stamps have a resolution of milliseconds
        os.utime(path, ns=(0, time.time_ns()))

    def put_many(self, bodies: dict[str, bytes]) -> dict[str, bytes]:
        for key, body in bodies.items():
            self.put(key, body)
        return bodies

    def delete(self, key: str) -> None:
        if self.server is not None:
            bucket, root = self.split()
            client_of(self.server).delete_object(Bucket=bucket, Key=f"{root}/{key}")
        else:
            Path(self.url, key).unlink()

    def split(self) -> tuple[str, str]:
        """Bucket and prefix."""
        bucket, _, root = self.url.removeprefix("s3://").partition("/")
        return bucket, root


@functools.cache
def client_of(server: S3Server) -> Any:
    """One boto3 client for all tests: creating one takes longer than a test."""
    return server.client()


@pytest.fixture(params=["local", "s3fs", "obstore"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty location for this test."""
    if request.param == "local":
        (tmp_path / "data").mkdir()
        return Place(str(tmp_path / "data"), "local")
    return _s3_place(request, request.param)


@pytest.fixture(params=["s3fs", "obstore"])
def s3_place(request: pytest.FixtureRequest) -> Place:
    """An empty place on S3."""
    return _s3_place(request, request.param)


def _s3_place(request: pytest.FixtureRequest, engine: str) -> Place:
    server: S3Server = request.getfixturevalue("s3_server")
    return Place(f"s3://{_shared_bucket(server)}/{uuid.uuid4().hex}/data", engine, server)


@functools.cache
def _shared_bucket(server: S3Server) -> str:
    """One bucket for all tests, each with its own prefix."""
    return server.new_bucket()


@pytest.fixture(scope="module")
def many(s3_server: S3Server) -> str:
    """A URL with more objects than one LIST page shows."""
    bucket, client = _shared_bucket(s3_server), client_of(s3_server)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda i: client.put_object(
                    Bucket=bucket, Key=f"many/store.zarr/{i:04d}", Body=b"x"
                ),
                range(N_MANY),
            )
        )
    return f"s3://{bucket}/many"


def some_store(prefix: str = "mp-1.zarr/", n: int = 7, seed: int = 1) -> dict[str, bytes]:
    """Objects of different sizes."""
    dice = random.Random(seed)
    return {f"{prefix}{i // 3}/{i}": dice.randbytes(1 + 1000 * i) for i in range(n)}


def fetched(origin: Origin, objects: list[ObjectInfo]) -> dict[str, bytes]:
    """Contents by key; fails if a key comes twice."""
    answers = [(obj.key, bytes(memoryview(body))) for obj, body in origin.fetch(objects)]
    assert len(answers) == len({key for key, _ in answers})
    return dict(answers)


def version(obj: ObjectInfo) -> tuple[str, int, str]:
    """What tells whether an object changed; some servers show fractions of seconds in a LIST but
    not in a HEAD.
    """
    return obj.key, obj.size_bytes, obj.etag


class TestListing:
    def test_names_directly_below_the_root_are_sorted_and_complete(self, place: Place) -> None:
        """Directories and single objects of one level, without duplicates."""
        place.put_many(
            {
                "mp-2.zarr/.zgroup": b"{}",
                "mp-2.zarr/a/0.0.0": b"x",
                "mp-1.zarr.zip": b"zip",
                "mp-10.zarr/zarr.json": b"{}",
            }
        )
        assert place.open().list_names() == ["mp-1.zarr.zip", "mp-10.zarr", "mp-2.zarr"]

    def test_objects_below_a_prefix_have_keys_relative_to_the_root(self, place: Place) -> None:
        """Sorted, with sizes, and without objects of a prefix that begins with the same
        characters.
        """
        bodies = place.put_many(some_store())
        place.put("mp-1.zarr.zip", b"zip")
        place.put("mp-1.zarr2/x", b"other")
        objects = place.open().list_objects("mp-1.zarr/")
        assert [(o.key, o.size_bytes) for o in objects] == sorted(
            (key, len(body)) for key, body in bodies.items()
        )

    def test_without_a_prefix_everything_is_listed(self, place: Place) -> None:
        """Every object below the root."""
        bodies = place.put_many({**some_store("a/", 3), **some_store("b/", 3), "c.zip": b"1"})
        assert [o.key for o in place.open().list_objects()] == sorted(bodies)

    def test_one_object_is_listed_alone(self, place: Place) -> None:
        """A zipped store is one object, listed through its directory."""
        place.put("mp-1.zarr.zip", b"0123456789")
        place.put("mp-1.zarr.zip.bak", b"no")
        [alone] = place.open().list_objects("mp-1.zarr.zip")
        assert (alone.key, alone.size_bytes) == ("mp-1.zarr.zip", 10)
        assert version(alone) in [version(o) for o in place.open().list_objects()]

    def test_a_missing_prefix_is_an_empty_list(self, place: Place) -> None:
        """A directory is not an object, and an object is not a directory."""
        place.put("mp-1.zarr/0/0", b"x")
        place.put("mp-1.zarr.zip", b"x")
        origin = place.open()
        for prefix in ("mp-9.zarr/", "mp-9.zarr.zip", "mp-1.zarr", "mp-1.zarr.zip/", "mp-1.zarr/0"):
            assert origin.list_objects(prefix) == []

    def test_a_listing_has_a_time_and_a_version(self, place: Place) -> None:
        """The version changes with the content; the time is the origin's."""
        place.put("x", b"one")
        [before] = place.open().list_objects("x")
        place.put("x", b"two")
        [after] = place.open().list_objects("x")
        assert before.etag != after.etag
        assert abs(after.modified_s - time.time()) < 3600

    def test_odd_names_are_listed_and_read_as_they_are(self, place: Place) -> None:
        """Spaces, plus, percent, quotes, non-ASCII: each name is encoded and decoded once."""
        bodies = place.put_many({f"odd/{key}": key.encode() for key in ODD_KEYS})
        origin = place.open()
        objects = origin.list_objects("odd/")
        assert [o.key for o in objects] == sorted(bodies)
        assert fetched(origin, objects) == bodies
        for obj in objects:
            assert [version(o) for o in origin.list_objects(obj.key)] == [version(obj)]

    def test_a_root_that_is_not_there_is_an_error_with_its_name(self, place: Place) -> None:
        """An empty listing would look like a data set without stores."""
        url = f"{place.url}-absent"
        with pytest.raises(OriginNotFoundError) as caught:
            place.open(url).list_names()
        assert url in str(caught.value)

    def test_no_such_bucket_is_an_error_everywhere(self, s3_place: Place) -> None:
        """Also when a single store is requested: the bucket is missing, not the store."""
        origin = s3_place.open("s3://no-such-bucket-of-ours/data")
        for ask in (origin.list_names, lambda: origin.list_objects("mp-1.zarr/")):
            with pytest.raises(
                OriginNotFoundError, match="there is no bucket 'no-such-bucket-of-ours' at http"
            ):
                ask()

    def test_marker_objects_are_left_out(self, s3_place: Place) -> None:
        """Some tools write an empty object for a directory."""
        assert s3_place.server is not None
        client, (bucket, root) = client_of(s3_place.server), s3_place.split()
        for key in ("/", "/mp-1.zarr/", "/mp-1.zarr/a/", "/empty.zarr/"):
            client.put_object(Bucket=bucket, Key=root + key, Body=b"")
        s3_place.put("mp-1.zarr/a/0", b"x")
        assert [o.key for o in s3_place.open().list_objects()] == ["mp-1.zarr/a/0"]
        assert [o.key for o in s3_place.open().list_objects("mp-1.zarr/")] == ["mp-1.zarr/a/0"]
        assert s3_place.open().list_names() == ["empty.zarr", "mp-1.zarr"]

    @pytest.mark.parametrize("key", ["a//b", "a/./b", "a/../b", "../x", "/lead", "a\tb"])
    def test_keys_that_are_not_paths_can_be_read(self, s3_place: Place, key: str) -> None:
        """S3 accepts them as keys; botocore is used where obstore refuses."""
        assert s3_place.server is not None
        bucket, root = s3_place.split()
        client_of(s3_place.server).put_object(Bucket=bucket, Key=f"{root}/{key}/0", Body=b"odd")
        s3_place.put("plain", b"x")
        origin = s3_place.open()
        objects = origin.list_objects()
        assert fetched(origin, objects) == {f"{key}/0": b"odd", "plain": b"x"}
        assert origin.list_objects(f"{key}/") == [o for o in objects if o.key != "plain"]
        inside = s3_place.open(f"{s3_place.url}/{key}")
        [obj] = inside.list_objects()
        assert inside.fetch_range(obj, 0, 2) == b"od"

    def test_a_long_listing_is_followed_page_by_page(
        self, s3_place: Place, many: str, fault_proxy: FaultProxy
    ) -> None:
        """One LIST shows at most 1,000 objects; each page is counted."""
        counters = Counters()
        objects = s3_place.open(many, fault_proxy.endpoint_url, counters).list_objects(
            "store.zarr/"
        )
        assert [o.key for o in objects] == [f"store.zarr/{i:04d}" for i in range(N_MANY)]
        assert fault_proxy.count("LIST") == fault_proxy.count() == counters.snapshot().requests == 2

    def test_many_names_are_followed_page_by_page(self, s3_place: Place, many: str) -> None:
        """A directory of 200,000 stores has 200 pages."""
        assert s3_place.open(f"{many}/store.zarr").list_names() == [
            f"{i:04d}" for i in range(N_MANY)
        ]


class TestFetching:
    def test_every_object_comes_once_with_its_bytes(self, place: Place) -> None:
        """In any order, empty objects included."""
        bodies = place.put_many({**some_store(), "mp-1.zarr/empty": b""})
        origin = place.open()
        assert fetched(origin, origin.list_objects("mp-1.zarr/")) == bodies

    def test_nothing_to_fetch_is_nothing_fetched(self, place: Place) -> None:
        """No object, no request."""
        counters = Counters()
        assert list(place.open(counters=counters).fetch([])) == []
        assert counters.snapshot().requests == 0

    def test_one_connection_is_enough(self, place: Place) -> None:
        """``concurrency: 1`` reads everything."""
        bodies = place.put_many(some_store())
        origin = place.open(concurrency=1)
        assert fetched(origin, origin.list_objects()) == bodies

    def test_a_range_is_start_to_stop_exclusive(self, place: Place) -> None:
        place.put("mp-1.zarr.zip", b"0123456789")
        origin = place.open()
        [obj] = origin.list_objects("mp-1.zarr.zip")
        for start, stop in ((0, 10), (0, 1), (9, 10), (3, 7), (5, 5)):
            assert origin.fetch_range(obj, start, stop) == b"0123456789"[start:stop]

    @pytest.mark.parametrize("body", [b"same size!", b"longer than before"])
    def test_a_changed_object_is_an_incomplete_array(self, place: Place, body: bytes) -> None:
        """Bytes of two versions must never be combined, whole or in ranges."""
        place.put_many({"mp-1.zarr/a": b"0123456789", "mp-1.zarr/b": b"stays"})
        origin = place.open()
        objects = origin.list_objects("mp-1.zarr/")
        place.put("mp-1.zarr/a", body)
        for read in (
            lambda: list(origin.fetch(objects)),
            lambda: origin.fetch_range(objects[0], 2, 5),
        ):
            with pytest.raises(IncompleteArrayError, match="was changed") as caught:
                read()
            assert origin.url_of("mp-1.zarr/a") in str(caught.value)

    def test_a_gone_object_is_an_incomplete_array(self, place: Place) -> None:
        """Not a FileNotFoundError, which zarr would replace by the fill value."""
        place.put_many({"mp-1.zarr/a": b"0123456789", "mp-1.zarr/b": b"stays"})
        origin = place.open()
        objects = origin.list_objects("mp-1.zarr/")
        place.delete("mp-1.zarr/a")
        for read in (
            lambda: list(origin.fetch(objects)),
            lambda: origin.fetch_range(objects[0], 2, 5),
        ):
            with pytest.raises(IncompleteArrayError) as caught:
                read()
            assert str(caught.value).startswith(
                f"{origin.url_of('mp-1.zarr/a')} is listed (10 bytes) but "
            )
            assert not isinstance(caught.value, OSError)

    def test_an_abandoned_fetch_leaves_the_origin_usable(self, place: Place) -> None:
        """A consumer may stop after the first object."""
        bodies = place.put_many(some_store())
        origin = place.open(concurrency=2)
        objects = origin.list_objects()
        first = origin.fetch(objects)
        next(first)
        first.close()  # type: ignore[attr-defined]
        assert fetched(origin, objects) == bodies


class TestCounting:
    """Requests and bytes that operations cost."""

    def test_a_store_costs_one_list_and_one_get_per_object(
        self, s3_place: Place, fault_proxy: FaultProxy
    ) -> None:
        """No HEAD, nothing twice, and the counters say what the server saw."""
        bodies = s3_place.put_many(some_store(n=9))
        counters = Counters()
        origin = s3_place.open(endpoint_url=fault_proxy.endpoint_url, counters=counters)
        assert fetched(origin, origin.list_objects("mp-1.zarr/")) == bodies
        assert (fault_proxy.count("LIST"), fault_proxy.count("GET"), fault_proxy.count()) == (
            1,
            9,
            10,
        )
        assert fault_proxy.repeats() == 0
        stats = counters.snapshot()
        assert (stats.requests, stats.retries, stats.fetched_bytes) == (
            10,
            0,
            sum(map(len, bodies.values())),
        )

    def test_a_zipped_store_costs_two_requests(
        self, s3_place: Place, fault_proxy: FaultProxy
    ) -> None:
        """One HEAD for the version, one GET."""
        s3_place.put("mp-1.zarr.zip", b"zip" * 1000)
        counters = Counters()
        origin = s3_place.open(endpoint_url=fault_proxy.endpoint_url, counters=counters)
        assert fetched(origin, origin.list_objects("mp-1.zarr.zip")) == {
            "mp-1.zarr.zip": b"zip" * 1000
        }
        assert [s.op for s in fault_proxy.seen()] == ["HEAD", "GET"]
        assert counters.snapshot().requests == 2

    def test_an_absent_store_and_the_names_cost_one_request_each(
        self, s3_place: Place, fault_proxy: FaultProxy
    ) -> None:
        s3_place.put("mp-1.zarr/x", b"x")
        counters = Counters()
        origin = s3_place.open(endpoint_url=fault_proxy.endpoint_url, counters=counters)
        for n, ask in enumerate(
            (
                lambda: origin.list_objects("no.zarr/"),
                lambda: origin.list_objects("no.zip"),
                origin.list_names,
            ),
            start=1,
        ):
            ask()
            assert fault_proxy.count() == counters.snapshot().requests == n

    def test_a_range_over_http_is_confirmed_by_a_request_with_other_boundaries(
        self, s3_place: Place, fault_proxy: FaultProxy
    ) -> None:
        """The counters count the bytes that came."""
        s3_place.put("x", b"0123456789")
        counters = Counters()
        origin = s3_place.open(endpoint_url=fault_proxy.endpoint_url, counters=counters)
        [obj] = origin.list_objects("x")
        assert origin.fetch_range(obj, 2, 6) == b"2345"
        assert [seen.range for seen in fault_proxy.seen("GET")] == ["bytes=2-5", "bytes=2-9"]
        assert counters.snapshot().fetched_bytes == 4 + 8

    def test_requests_in_flight_reach_the_limit_and_stay_under_it(
        self, s3_place: Place, fault_proxy: FaultProxy
    ) -> None:
        """``concurrency: 5`` allows five at a time."""
        bodies = s3_place.put_many(some_store(n=20))
        origin = s3_place.open(endpoint_url=fault_proxy.endpoint_url, concurrency=5)
        objects = origin.list_objects()
        fault_proxy.rules(Rule(op="GET", latency_s=0.1))
        assert fetched(origin, objects) == bodies
        assert fault_proxy.peak() == 5

    def test_making_an_origin_makes_no_request(
        self, s3_place: Place, fault_proxy: FaultProxy
    ) -> None:
        """Its repr makes none either."""
        origin = s3_place.open(endpoint_url=fault_proxy.endpoint_url)
        pickle.dumps(origin)
        assert "testing" not in repr(origin)
        assert fault_proxy.count() == 0


class TestIdentity:
    def test_url_and_identity_say_where_the_data_is(self, place: Place) -> None:
        """The same URL on two endpoints has two identities."""
        origin = place.open()
        assert origin.url == place.url
        assert origin.identity == ("file" if place.server is None else place.server.endpoint_url)
        assert origin.url_of("mp-1.zarr/a") == f"{place.url}/mp-1.zarr/a"

    def test_a_slash_at_the_end_changes_nothing(self, place: Place) -> None:
        bodies = place.put_many(some_store())
        origin = place.open(place.url + "/")
        assert origin.url == place.url
        assert fetched(origin, origin.list_objects("mp-1.zarr/")) == bodies

    def test_the_root_of_a_bucket_is_an_origin(self, s3_server: S3Server, bucket: str) -> None:
        """A URL without a prefix."""
        for engine in ("s3fs", "obstore"):
            place = Place(f"s3://{bucket}", engine, s3_server)
            bodies = place.put_many(some_store())
            origin = place.open()
            assert origin.list_names() == ["mp-1.zarr"]
            assert (
                fetched(origin, origin.list_objects("mp-1.zarr/"))
                == fetched(origin, origin.list_objects())
                == bodies
            )


def read_digest(origin: Origin) -> str:
    """Digest of what a process sees of a store: its listing and its bytes."""
    objects = origin.list_objects("mp-1.zarr/")
    return hashlib.sha256(
        repr((origin.list_names(), objects, sorted(fetched(origin, objects).items()))).encode()
    ).hexdigest()


def _report(origin: Origin, connection: Any) -> None:
    try:
        connection.send(read_digest(origin))
    except BaseException as exc:
        connection.send(repr(exc))
        raise


def in_child(method: str, origin: Origin) -> str:
    """``read_digest`` in a new process; a child that hangs is an error."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(origin, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(60):
            return "the child hangs"
        return str(ours.recv())
    except EOFError:
        return "the child died"
    finally:
        process.kill()
        process.join()


class TestProcessesAndThreads:
    def test_a_pickled_origin_works_like_the_one_it_came_from(self, place: Place) -> None:
        """Also after use, and pickled twice."""
        place.put_many(some_store())
        origin = place.open()
        expected = read_digest(origin)
        copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(origin))))
        assert read_digest(copy) == expected
        assert (copy.url, copy.identity) == (origin.url, origin.identity)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_an_origin_used_before_works_in_a_child_process(
        self, place: Place, method: str
    ) -> None:
        """DataLoader workers inherit origins without their clients and threads."""
        place.put_many(some_store())
        origin = place.open()
        expected = read_digest(origin)
        assert in_child(method, origin) == expected
        assert read_digest(origin) == expected

    def test_threads_share_an_origin(self, place: Place) -> None:
        """Eight threads at once; each sees every object."""
        place.put_many(some_store(n=20))
        origin = place.open(concurrency=4)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            digests = list(pool.map(lambda _: read_digest(origin), range(8)))
        assert len(set(digests)) == 1


def _engine_used(origin: Any) -> str:
    return type(origin._bucket.engine()).__name__


def _engine_of_child(origin: Origin, connection: Any) -> None:
    connection.send(_engine_used(origin))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "expected"), [("fork", "S3fsEngine"), ("spawn", "ObstoreEngine")]
)
def test_a_forked_child_leaves_obstore_alone(
    s3_server: S3Server, method: str, expected: str
) -> None:
    """It hangs in a child forked after its parent used it; a spawned child may use it."""
    origin: Callable[[], Any] = Place("s3://any/data", "auto", s3_server).open
    parent = origin()
    assert _engine_used(parent) == "ObstoreEngine"
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_engine_of_child, args=(parent, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == expected
    process.join()
