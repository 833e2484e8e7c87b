"""Faults of network and server: what is retried, how often, for how long, and what it leaves
behind. Both engines.
"""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import (
    IncompleteArrayError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
)
from zarrcache.origin import Origin, open_origin
from zarrcache.origin import _obstore as engine_obstore
from zarrcache.origin import _requests as retry
from zarrcache.stats import Counters

BODIES = {f"mp-1.zarr/{i}": random.Random(i).randbytes(2000 + i) for i in range(4)}
ANSWERS = ["500", "502:", "503", "504:", "429", "400:RequestTimeout"]
ASK: dict[str, Callable[[Origin, list[ObjectInfo]], Any]] = {
    "LIST": lambda origin, objects: origin.list_objects("mp-1.zarr/"),
    "HEAD": lambda origin, objects: [
        (o.key, o.size_bytes, o.etag) for o in origin.list_objects(objects[0].key)
    ],
    "GET": lambda origin, objects: {
        obj.key: bytes(memoryview(body)) for obj, body in origin.fetch(objects)
    },
    "range": lambda origin, objects: origin.fetch_range(objects[0], 100, 600),
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without waiting; no pause outlasts its test."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(retry, "_pauses", {})


@pytest.fixture(scope="module")
def plain_client(s3_server: S3Server) -> Any:
    """A client that stores no checksum with an object: only our check can find a changed bit."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint_url,
        aws_access_key_id=s3_server.key,
        aws_secret_access_key=s3_server.secret,
        region_name="us-east-1",
        config=Config(
            request_checksum_calculation="when_required", s3={"addressing_style": "path"}
        ),
    )


@pytest.fixture(scope="module")
def url(s3_server: S3Server, plain_client: Any) -> str:
    """A store of four objects."""
    bucket = s3_server.new_bucket()
    for key, body in BODIES.items():
        plain_client.put_object(Bucket=bucket, Key=f"data/{key}", Body=body)
    return f"s3://{bucket}/data"


@pytest.fixture(params=["s3fs", "obstore"])
def opened(
    request: pytest.FixtureRequest, s3_server: S3Server, fault_proxy: FaultProxy, url: str
) -> Callable[..., Origin]:
    """``opened(attempts=..., timeout=..., counters=..., **fetch)`` opens the store's origin behind
    the proxy.
    """

    def make(
        attempts: int = 3, timeout: float = 20.0, counters: Counters | None = None, **fetch: Any
    ) -> Origin:
        settings = FetchConfig(
            **{"engine": request.param, "read_timeout": 20.0, "connect_timeout": 5.0, **fetch}
        )
        kwargs = s3_server.kwargs_at(fault_proxy.endpoint_url)
        return open_origin(
            url,
            s3_kwargs=kwargs,
            fetch=settings,
            retry=RetryConfig(attempts=attempts, timeout=timeout),
            counters=counters,
        )

    return make


@pytest.fixture(scope="module")
def listed(s3_server: S3Server, url: str) -> list[ObjectInfo]:
    """The store's objects."""
    return open_origin(
        url, s3_kwargs=s3_server.s3_kwargs, fetch=FetchConfig(engine="s3fs")
    ).list_objects("mp-1.zarr/")


def expected(op: str, listed: list[ObjectInfo]) -> Any:
    """The result of ``ASK[op]`` without faults."""
    first = listed[0]
    return {
        "LIST": listed,
        "HEAD": [(first.key, first.size_bytes, first.etag)],
        "GET": BODIES,
        "range": BODIES[first.key][100:600],
    }[op]


def methods(op: str) -> str:
    """The proxy's names of the requests of ``ASK[op]``."""
    return "GET" if op == "range" else op


def sendings(origin: Any, op: str, fault: str) -> int:
    """Requests per attempt: aiohttp repeats a request once if its connection is cut before the
    answer begins. Listings go through it with both engines.
    """
    return 2 if fault == "reset" and (op == "LIST" or is_s3fs(origin)) else 1


def is_s3fs(origin: Any) -> bool:
    return type(origin._bucket.engine()).__name__ == "S3fsEngine"


class TestTransient:
    """Faults that go away."""

    @pytest.mark.parametrize(
        ("op", "fault"),
        [
            *(
                ("LIST", fault)
                for fault in [
                    "503",
                    "502:",
                    "429",
                    "reset",
                    "reset_body",
                    "truncate",
                    "short",
                    "hang",
                ]
            ),
            *(
                ("GET", fault)
                for fault in [
                    *ANSWERS,
                    "reset",
                    "reset_body",
                    "truncate",
                    "short",
                    "hang",
                    "stall",
                    "corrupt",
                ]
            ),
            *(("HEAD", fault) for fault in ["503", "502:", "reset", "hang"]),
            *(("range", fault) for fault in ["503", "reset_body", "truncate", "short"]),
        ],
    )
    def test_a_fault_that_goes_away_costs_one_more_request(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        op: str,
        fault: str,
    ) -> None:
        """The same answer as without it; the counters match the server's."""
        counters = Counters()
        # must not fail on a busy machine
        origin = opened(counters=counters, read_timeout=1.0 if fault in ("hang", "stall") else 20.0)
        sent = sendings(origin, op, fault)
        fault_proxy.rules(Rule((fault,) * sent, op=methods(op), key="/0$" if op == "GET" else ""))
        assert ASK[op](origin, listed) == expected(op, listed)
        n = len(listed) if op == "GET" else 1
        asked_for_encryption = int(fault == "corrupt")  # one HEAD: is the ETag an MD5 at all?
        # over http:// a range is read a second time, and so, in halves, is what is no MD5
        confirming = int(op == "range" or fault == "corrupt")
        assert fault_proxy.count(methods(op)) == n + sent + confirming
        assert fault_proxy.count() == n + sent + confirming + asked_for_encryption
        assert counters.snapshot().requests == n + 1 + confirming + asked_for_encryption
        assert counters.snapshot().retries == 1

    def test_each_object_has_its_own_second_attempt(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """If every object fails once, each is requested twice."""
        counters = Counters()
        fault_proxy.rules(Rule(("503",), op="GET", per_object=True))
        assert ASK["GET"](opened(counters=counters), listed) == BODIES
        assert (fault_proxy.count("GET"), fault_proxy.repeats(), counters.snapshot().retries) == (
            8,
            4,
            4,
        )

    def test_objects_that_have_arrived_are_not_requested_again(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """One of four fails twice: six requests."""
        fault_proxy.rules(Rule(("reset_body", "short"), op="GET", key="/2$"))
        assert ASK["GET"](opened(), listed) == BODIES
        assert sorted(s.path[-1] for s in fault_proxy.seen("GET")) == ["0", "1", "2", "2", "2", "3"]

    @pytest.mark.parametrize("op", ASK)
    def test_a_server_that_restarts_is_waited_for(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        up_at_retry: None,
        op: str,
    ) -> None:
        """It refuses connections until the first attempt has failed."""
        origin = opened()
        fault_proxy.down()
        assert ASK[op](origin, listed) == expected(op, listed)

    def test_a_flipped_bit_is_found_where_the_server_stores_a_checksum_too(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, s3_server: S3Server, url: str
    ) -> None:
        """There botocore finds it first, and it is the same transient fault."""
        s3_server.put(f"{url}/checked.zip", b"checked" * 100, ChecksumAlgorithm="SHA256")
        origin = opened()
        [obj] = origin.list_objects("checked.zip")
        fault_proxy.rules(Rule(("corrupt",), op="GET"))
        assert ASK["GET"](origin, [obj]) == {"checked.zip": b"checked" * 100}
        # botocore repeats it whole if the server sends the checksum along; after an MD5 that does
        # not match it is read again in halves
        assert fault_proxy.count("GET") in ((2, 3) if is_s3fs(origin) else (3,))

    def test_every_further_attempt_is_logged_with_url_and_cause(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        url: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """One line per attempt, on the package's logger."""
        fault_proxy.rules(Rule(("503", "500"), op="LIST"))
        ASK["LIST"](opened(), listed)
        lines = [
            r.getMessage() for r in caplog.records if r.getMessage().startswith("origin.retry ")
        ]
        assert [line.split(" wait_s=")[0] for line in lines] == [
            "origin.retry attempt=2",
            "origin.retry attempt=3",
        ]
        assert f"url={url}/mp-1.zarr/ cause=SlowDown (503): Scripted SlowDown at " in lines[0]

    @pytest.mark.parametrize("op", ASK)
    def test_answers_of_every_kind_show_that_the_server_has_recovered(
        self, opened: Callable[..., Any], listed: list[ObjectInfo], op: str
    ) -> None:
        """After ten answers the next pause has its first length again; it would be doubled."""
        origin = opened()
        origin._bucket.backoff.slow_down()
        for _ in range(10):
            ASK[op](origin, listed[:1])
        origin._bucket.backoff.slow_down()
        assert retry._pauses[origin.identity].length_s == retry.FIRST_PAUSE_S

    @pytest.mark.parametrize(
        ("op", "fault"),
        [
            *((op, fault) for op in ASK for fault in ("503:", "429:", "500:")),
            # an answer to HEAD has no body, so no code
            *((op, "400:SlowDown") for op in ASK if op != "HEAD"),
        ],
    )
    def test_a_pause_begins_for_the_code_or_the_status_alone(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        op: str,
        fault: str,
    ) -> None:
        """A load balancer sends a status without a code. Other transient errors pause nothing."""
        fault_proxy.rules(Rule((fault,), op=methods(op)))
        assert ASK[op](opened(), listed[:1])
        assert bool(retry._pauses) is (fault != "500:")

    @pytest.mark.parametrize(
        ("head", "error", "words"),
        [
            ("403", OriginAccessError, "access refused: (403). These credentials"),
            ("404", IncompleteArrayError, "is listed (2000 bytes) but returned 404"),
            ("400", OriginError, "refused the request: (400)"),
        ],
    )
    def test_an_error_of_the_head_after_an_md5_mismatch_is_explained(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        url: str,
        head: str,
        error: type[Exception],
        words: str,
    ) -> None:
        """That HEAD asks whether the ETag is an MD5 at all. Its errors name the object."""
        fault_proxy.rules(Rule(then="corrupt", op="GET"), Rule(then=head, op="HEAD"))
        with pytest.raises(error) as caught:
            ASK["GET"](opened(), listed[:1])
        assert str(caught.value).startswith(f"{url}/{listed[0].key}")
        assert words in str(caught.value)
        assert type(caught.value) is error

    @pytest.mark.parametrize(
        ("second", "error", "words"),
        [
            ("403", OriginAccessError, "access refused: AccessDenied (403)"),
            ("404", IncompleteArrayError, "is listed (2000 bytes) but returned 404"),
            ("412", IncompleteArrayError, "was changed while it was being read"),
        ],
    )
    def test_an_error_of_the_second_reading_after_an_md5_mismatch_is_explained(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        url: str,
        second: str,
        error: type[Exception],
        words: str,
    ) -> None:
        fault_proxy.rules(Rule(("corrupt",), then=second, op="GET"))
        with pytest.raises(error) as caught:
            ASK["GET"](opened(), listed[:1])
        assert str(caught.value).startswith(f"{url}/{listed[0].key}")
        assert words in str(caught.value)

    def test_a_transient_error_of_the_head_after_an_md5_mismatch_repeats_the_head(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        fault_proxy.rules(Rule(("corrupt",), op="GET"), Rule(("500:",), op="HEAD"))
        assert ASK["GET"](opened(), listed[:1]) == {listed[0].key: BODIES[listed[0].key]}
        assert (fault_proxy.count("GET"), fault_proxy.count("HEAD")) == (3, 2)


@pytest.fixture
def up_at_retry(fault_proxy: FaultProxy) -> Iterator[None]:
    """The proxy accepts connections again once an attempt has failed."""

    class Restart(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            fault_proxy.up()

    handler = Restart()
    logging.getLogger("zarrcache.origin._requests").addHandler(handler)
    yield
    logging.getLogger("zarrcache.origin._requests").removeHandler(handler)


class TestPermanent:
    """Faults that stay."""

    @pytest.mark.parametrize("op", ASK)
    @pytest.mark.parametrize("fault", ["503", "reset", "hang"])
    def test_attempts_are_the_requests_that_the_server_sees(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        url: str,
        op: str,
        fault: str,
    ) -> None:
        """No layer below retries: three attempts are three requests, and the error names URL,
        attempts and last cause.
        """
        counters = Counters()
        origin = opened(counters=counters, read_timeout=1.5 if fault == "hang" else 20.0)
        # on a busy machine the time would be over before a client that is new has sent its first
        # request
        if fault == "hang":
            ASK[op](origin, listed[:1])
        before, begun = counters.snapshot(), fault_proxy.count()
        fault_proxy.rules(Rule(then=fault))
        with pytest.raises(OriginUnavailableError) as caught:
            ASK[op](origin, listed[:1])
        assert [seen.op for seen in fault_proxy.seen()[begun:]] == [methods(op)] * 3 * sendings(
            origin, op, fault
        )
        assert (counters.snapshot() - before).requests == 3
        assert (counters.snapshot() - before).retries == 2
        where = f"{url}/mp-1.zarr/" if op == "LIST" else f"{url}/{listed[0].key}"
        cause = {
            "503": "(503)",
            "reset": "Connection: Connection reset by peer",
            "hang": "Timeout: no answer in time",
        }[fault]
        assert str(caught.value).startswith(f"{where} could not be read: ")
        assert cause in str(caught.value)
        assert "(3 attempts in " in str(caught.value)
        assert "cache.retry.attempts" in str(caught.value)
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("fault", ["truncate", "short", "corrupt"])
    def test_bytes_that_stay_wrong_are_never_handed_over(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        fault: str,
    ) -> None:
        """The result is an error, not an array."""
        fault_proxy.rules(Rule(then=fault, op="GET"))
        with pytest.raises(OriginUnavailableError):
            next(opened(attempts=2).fetch(listed[:1]))
        # content that does not match its MD5 is compared with a reading in halves, twice
        assert fault_proxy.count("GET") == (6 if fault == "corrupt" else 2)

    def test_a_store_costs_a_failing_server_its_objects_times_the_attempts(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """Four objects, three attempts, twelve requests."""
        fault_proxy.rules(Rule(then="500"))
        with pytest.raises(OriginUnavailableError):
            ASK["GET"](opened(), listed)
        assert fault_proxy.count() == 12

    def test_a_large_store_does_not_storm_a_server_that_is_down(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """Of 300 objects one pass requests only those in flight when the failures arrive."""
        fault_proxy.rules(Rule(then="500"))
        objects = [ObjectInfo(f"mp-1.zarr/{i}", 100, "x") for i in range(300)]
        with pytest.raises(OriginUnavailableError):
            ASK["GET"](opened(attempts=2, concurrency=4), objects)
        assert 2 * 4 <= fault_proxy.count() <= 2 * (2 * 4 - 1)

    def test_the_time_bound_ends_it_before_the_attempts(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """A server that hangs is given up after ``cache.retry.timeout``, however many attempts are
        left.
        """
        fault_proxy.rules(Rule(then="hang"))
        with pytest.raises(OriginUnavailableError, match="Timeout"):
            ASK["GET"](opened(attempts=100, timeout=1.0, read_timeout=0.3), listed)
        assert fault_proxy.count() <= 4 * len(listed)

    @pytest.mark.parametrize(
        ("op", "fault", "error", "words"),
        [
            *((op, "403", OriginAccessError, "access refused") for op in ASK),
            ("GET", "401:AccessDenied", OriginAccessError, "access refused"),
            *(
                (
                    op,
                    "404",
                    IncompleteArrayError,
                    "is listed (2000 bytes) but returned 404. The store is incomplete",
                )
                for op in ("GET", "range")
            ),
            *(
                (op, "404:NoSuchBucket", OriginNotFoundError, "there is no bucket")
                for op in ("GET", "range", "LIST")
            ),
            ("GET", "412", IncompleteArrayError, "was changed while it was being read"),
            (
                "range",
                "416:InvalidRange",
                IncompleteArrayError,
                "was changed while it was being read",
            ),
            ("GET", "400", OriginError, "refused the request: InvalidRequest (400)"),
            (
                "LIST",
                "501:NotImplemented",
                OriginError,
                "refused the request: NotImplemented (501)",
            ),
        ],
    )
    def test_a_permanent_error_is_not_retried(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        url: str,
        op: str,
        fault: str,
        error: type[Exception],
        words: str,
    ) -> None:
        """One request, and an error of its kind."""
        fault_proxy.rules(Rule(then=fault))
        with pytest.raises(error) as caught:
            ASK[op](opened(), listed[:1])
        assert fault_proxy.count(methods(op)) == 1
        # one HEAD: some servers refuse If-Match for the version that they list
        assert fault_proxy.count() == (2 if fault == "412" else 1)
        assert words in str(caught.value)
        assert str(caught.value).startswith(url)
        assert type(caught.value) is error

    def test_a_final_answer_ends_the_whole_fetch(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """Requests that still hang are cancelled, or end within QUICK_S; their timeouts do not
        matter.
        """
        fault_proxy.rules(Rule(then="403", op="GET", key="/1$"), Rule(then="hang", op="GET"))
        with pytest.raises(OriginAccessError):
            ASK["GET"](opened(read_timeout=300.0, timeout=300.0), listed)
        fault_proxy.wait_in_flight(0)


class TestLate:
    """Engine obstore asks for small objects in threads that cannot be interrupted: requests have a
    short timeout, and a long one when repeated.
    """

    @pytest.fixture
    def late(
        self,
        s3_server: S3Server,
        fault_proxy: FaultProxy,
        url: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Callable[..., Origin]:
        """``late(counters=...)`` opens the store's origin; a request is late after 0.3 s."""
        monkeypatch.setattr(engine_obstore, "QUICK_S", 0.3)
        kwargs = s3_server.kwargs_at(fault_proxy.endpoint_url)
        fetch = FetchConfig(engine="obstore")
        return lambda **more: open_origin(
            url, s3_kwargs=kwargs, fetch=fetch, retry=RetryConfig(attempts=1), **more
        )

    @pytest.mark.parametrize("fault", ["hang", "stall"])
    def test_a_late_object_is_requested_again_at_once(
        self,
        late: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        fault: str,
    ) -> None:
        """It is counted, and is not an attempt of ``cache.retry``."""
        counters = Counters()
        fault_proxy.rules(Rule((fault,), op="GET", key="/2$"))
        assert ASK["GET"](late(counters=counters), listed) == BODIES
        assert sorted(s.path[-1] for s in fault_proxy.seen("GET")) == ["0", "1", "2", "2", "3"]
        assert (counters.snapshot().requests, counters.snapshot().retries) == (5, 1)

    def test_a_slow_server_gets_no_repeated_requests(
        self, late: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """If many requests are late, later ones get the long timeout: every object is requested
        twice only once.
        """
        fault_proxy.rules(Rule(op="GET", latency_s=0.6))
        origin = late()
        for asked in (8, 12):
            assert ASK["GET"](origin, listed) == BODIES
            assert fault_proxy.count("GET") == asked

    def test_a_large_object_is_not_requested_twice(
        self, late: Callable[..., Origin], fault_proxy: FaultProxy, s3_server: S3Server, url: str
    ) -> None:
        body = random.Random(9).randbytes(engine_obstore.QUICK_BYTES + 1)
        s3_server.put(f"{url}/large/0", body)
        origin = late()
        objects = origin.list_objects("large/")
        fault_proxy.rules(Rule(op="GET", latency_s=0.6))
        assert ASK["GET"](origin, objects) == {"large/0": body}
        assert fault_proxy.count("GET") == 1


class TestCancel:
    """The consumer stops early."""

    def test_closing_the_iterator_cancels_what_is_in_flight(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """The proxy sees the client disconnect long before any timeout: at once, or within
        QUICK_S.
        """
        fault_proxy.rules(Rule(("ok",), then="hang", op="GET"))
        origin = opened(read_timeout=300.0, timeout=300.0)
        answers: Any = origin.fetch(listed)
        obj, body = next(answers)
        assert bytes(memoryview(body)) == BODIES[obj.key]
        fault_proxy.wait_in_flight(3)
        answers.close()
        fault_proxy.wait_in_flight(0)
        assert sorted(s.outcome for s in fault_proxy.seen("GET")) == ["200", *3 * ["hang"]]
        fault_proxy.rules()
        assert ASK["GET"](origin, listed) == BODIES

    @pytest.mark.parametrize("op", ASK)
    def test_ctrl_c_ends_a_request_that_hangs(
        self,
        opened: Callable[..., Origin],
        fault_proxy: FaultProxy,
        listed: list[ObjectInfo],
        op: str,
    ) -> None:
        """At once, and nothing is in flight for longer than QUICK_S."""
        fault_proxy.rules(Rule(then="hang", op=methods(op)))
        origin = opened(read_timeout=300.0, timeout=300.0)

        def press() -> None:
            fault_proxy.wait_in_flight(4 if op == "GET" else 1)
            time.sleep(0.05)  # until the main thread is back in its wait
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

        main = threading.main_thread()
        finger = threading.Thread(target=press)
        finger.start()
        with pytest.raises(KeyboardInterrupt):
            ASK[op](origin, listed)
        finger.join()
        fault_proxy.wait_in_flight(0)
        fault_proxy.rules()
        assert ASK[op](origin, listed) == expected(op, listed)

    def test_a_slow_consumer_does_not_use_up_the_time_bound(
        self, opened: Callable[..., Origin], fault_proxy: FaultProxy, listed: list[ObjectInfo]
    ) -> None:
        """Decoding takes longer than ``cache.retry.timeout``; a fault after it is still retried."""
        fault_proxy.rules(Rule(("ok", "503"), op="GET"))
        got = {}
        for obj, body in opened(timeout=2.0, concurrency=1).fetch(listed):
            got[obj.key] = bytes(memoryview(body))
            time.sleep(2.5 / len(listed))
        assert got == BODIES
