"""Errors of the origin say what, where and what to do: the same class and message from both
engines, and never a secret.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import (
    ConfigError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
)
from zarrcache.origin import Origin, open_origin

KEY, SECRET, TOKEN = "AKIAWITHOUTMEANING", "a-secret-nobody-may-see", "a-token-nobody-may-see"
ASK: dict[str, Callable[[Origin], Any]] = {
    "LIST": lambda origin: origin.list_objects("mp-1.zarr/"),
    "names": lambda origin: origin.list_names(),
    "GET": lambda origin: list(origin.fetch([ObjectInfo("mp-1.zarr/0", 500, "x")])),
    "range": lambda origin: origin.fetch_range(ObjectInfo("mp-1.zarr/0", 500, "x"), 0, 10),
}
WHERE = {
    "LIST": "s3://densities/data/mp-1.zarr/",
    "names": "s3://densities/data/",
    "GET": "s3://densities/data/mp-1.zarr/0",
}
WHERE["range"] = WHERE["GET"]


def failure(op: str, **s3_kwargs: Any) -> Exception:
    """The error of both engines, after checking that they agree and hold no secret."""
    found = []
    for engine in ("s3fs", "obstore"):
        fetch = FetchConfig(engine=engine, connect_timeout=2.0, read_timeout=5.0)
        origin: Any = open_origin(
            "s3://densities/data", s3_kwargs=s3_kwargs, fetch=fetch, retry=RetryConfig(attempts=1)
        )
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the callers check what it is
            ASK[op](origin)
        found.append(caught.value)
        for text in (
            str(caught.value),
            repr(caught.value),
            repr(origin),
            repr(origin._bucket.options),
        ):
            assert not [secret for secret in (KEY, SECRET, TOKEN) if secret in text]
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    first, second = found
    assert type(first) is type(second)
    assert str(first).split(" (1 attempt in ")[0] == str(second).split(" (1 attempt in ")[0]
    return first


@pytest.fixture
def at_proxy(fault_proxy: FaultProxy) -> dict[str, Any]:
    """Credentials, with the proxy's address."""
    return {"key": KEY, "secret": SECRET, "token": TOKEN, "endpoint_url": fault_proxy.endpoint_url}


@pytest.mark.parametrize("op", ASK)
def test_without_credentials_the_error_says_where_they_may_stand(
    op: str, fault_proxy: FaultProxy
) -> None:
    """No request is sent."""
    error = failure(op, endpoint_url=fault_proxy.endpoint_url)
    assert type(error) is OriginAccessError
    assert str(error).startswith(
        f"{WHERE[op]}: no credentials were found. Set key and secret or profile in s3_kwargs"
    )
    assert "anon: true" in str(error)
    assert fault_proxy.count() == 0


@pytest.mark.parametrize("op", ["LIST", "GET"])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "403:InvalidAccessKeyId",
            (
                "access refused: InvalidAccessKeyId (403): Scripted InvalidAccessKeyId. "
                "Check that the access key belongs"
            ),
        ),
        (
            "403:SignatureDoesNotMatch",
            (
                "access refused: SignatureDoesNotMatch (403): Scripted SignatureDoesNotMatch. "
                "Check the secret key"
            ),
        ),
        (
            "403:AccessDenied",
            (
                "access refused: AccessDenied (403): Scripted AccessDenied. "
                "These credentials may not read it: they need s3:ListBucket"
            ),
        ),
        (
            "400:ExpiredToken",
            (
                "access refused: ExpiredToken (400): Scripted ExpiredToken. The session token has "
                "expired: log in again"
            ),
        ),
        ("403:RequestTimeTooSkewed", "Set the clock of this machine."),
    ],
)
def test_wrong_credentials_say_which_part_is_wrong(
    op: str, answer: str, words: str, fault_proxy: FaultProxy, at_proxy: dict[str, Any]
) -> None:
    """One request, no retry; the key in the server's answer is not repeated."""
    fault_proxy.rules(Rule(then=answer))
    error = failure(op, **at_proxy)
    assert type(error) is OriginAccessError
    assert isinstance(error, PermissionError)
    assert str(error).startswith(WHERE[op])
    assert words in str(error)
    assert fault_proxy.count() == 2


def test_a_403_without_a_body_is_an_access_error_too(
    fault_proxy: FaultProxy, at_proxy: dict[str, Any]
) -> None:
    """A HEAD has no body, and some gateways never send one."""
    fault_proxy.rules(Rule(then="403"))
    ASK["HEAD"] = lambda origin: origin.list_objects("mp-1.zarr.zip")
    error = failure("HEAD", **at_proxy)
    del ASK["HEAD"]
    assert type(error) is OriginAccessError
    assert (
        "s3://densities/data/mp-1.zarr.zip: access refused: (403). These credentials may not read "
        "it" in str(error)
    )


def test_anon_on_a_private_bucket_says_to_remove_anon(fault_proxy: FaultProxy) -> None:
    """Missing permissions would be the wrong advice: there are no credentials."""
    fault_proxy.rules(Rule(then="403"))
    error = failure("LIST", anon=True, endpoint_url=fault_proxy.endpoint_url)
    assert type(error) is OriginAccessError
    assert "The bucket is not public: remove anon: true from s3_kwargs" in str(error)
    assert all("authorization" not in map(str.lower, seen.headers) for seen in fault_proxy.seen())


@pytest.mark.parametrize("op", ASK)
def test_no_such_bucket_names_bucket_and_endpoint(
    op: str, fault_proxy: FaultProxy, s3_server: S3Server
) -> None:
    """From the real server's answer; a server that checks credentials tells only its owner."""
    error = failure(op, **s3_server.kwargs_at(fault_proxy.endpoint_url))
    assert type(error) is OriginNotFoundError
    assert isinstance(error, FileNotFoundError)
    assert str(error) == (
        f"{WHERE[op]}: there is no bucket 'densities' at {fault_proxy.endpoint_url}. Check the "
        "bucket's name and endpoint_url in s3_kwargs."
    )


@pytest.mark.parametrize("op", ASK)
def test_an_endpoint_that_refuses_says_so(
    op: str, fault_proxy: FaultProxy, at_proxy: dict[str, Any]
) -> None:
    """A port without a listener."""
    fault_proxy.down()
    error = failure(op, **at_proxy)
    assert type(error) is OriginUnavailableError
    assert str(error).startswith(
        f"{WHERE[op]} could not be read: Connection: Connection refused at "
        f"{fault_proxy.endpoint_url} (1 attempt in "
    )
    assert "Check that the server runs and is reachable from this node" in str(error)


def test_an_endpoint_whose_name_is_unknown_says_so(at_proxy: dict[str, Any]) -> None:
    """A misspelled host."""
    error = failure("LIST", **{**at_proxy, "endpoint_url": "http://no-such-host.invalid"})
    assert type(error) is OriginUnavailableError
    assert "could not be read: Connection: " in str(error)
    assert " at http://no-such-host.invalid (1 attempt in " in str(error)


def test_https_endpoint_that_is_plain_says_so(
    s3_server: S3Server, at_proxy: dict[str, Any]
) -> None:
    """The two TLS libraries say "wrong version number" and nothing at all."""
    endpoint_url = s3_server.endpoint_url.replace("http://", "https://")
    error = failure("LIST", **{**at_proxy, "endpoint_url": endpoint_url})
    assert type(error) is OriginUnavailableError
    assert "it does not answer in TLS; if it is a plain server, write http://" in str(error)


def test_a_missing_profile_is_named(fault_proxy: FaultProxy) -> None:
    """The error says where profiles are looked for."""
    error = failure("LIST", profile="laboratory", endpoint_url=fault_proxy.endpoint_url)
    assert type(error) is OriginAccessError
    assert (
        "ProfileNotFound: The config profile (laboratory) could not be found. Set profile in "
        "s3_kwargs" in str(error)
    )


@pytest.mark.parametrize("op", ["LIST", "GET"])
@pytest.mark.parametrize(
    "answer",
    [
        "301:PermanentRedirect",
        "400:AuthorizationHeaderMalformed",
        "400:IllegalLocationConstraintException",
    ],
)
def test_a_bucket_in_another_region_says_what_to_set(
    op: str, answer: str, fault_proxy: FaultProxy, at_proxy: dict[str, Any]
) -> None:
    """The library follows one redirect; a server that redirects endlessly ends there.

    Two engines, and two requests each at most.
    """
    fault_proxy.rules(Rule(then=answer, op="GET|LIST"))
    for engine in ("s3fs", "obstore"):
        origin: Any = open_origin(
            "s3://densities/data",
            s3_kwargs=at_proxy,
            fetch=FetchConfig(engine=engine),
            retry=RetryConfig(attempts=2),
        )
        with pytest.raises(OriginError, match="bucket 'densities' is in another region") as caught:
            ASK[op](origin)
        assert type(caught.value) is OriginError
        assert "Set client_kwargs: {region_name: ...} in s3_kwargs" in str(caught.value)
    assert fault_proxy.count("GET|LIST") <= 2 * 2


@pytest.mark.parametrize(
    ("s3_kwargs", "words"),
    [
        ({"anonn": True}, "s3_kwargs.anonn is not an option of s3fs. Did you mean 'anon'?"),
        ({"end_point_url": "x"}, "Did you mean 'endpoint_url'?"),
        ({"key": KEY}, "s3_kwargs has key but not secret"),
        ({"secret": SECRET}, "s3_kwargs has secret but not key"),
        (
            {"endpoint_url": "minio:9000"},
            "s3_kwargs.endpoint_url is 'minio:9000'; it has to begin with http:// or https://",
        ),
        (
            {"endpoint_url": f"https://{KEY}:{SECRET}@minio"},
            "s3_kwargs.endpoint_url holds a user name",
        ),
        ({"endpoint_url": f"{KEY}:{SECRET}@minio:9000"}, "endpoint_url holds a user name"),
        ({"endpoint_url": f"https://minio/?X-Amz-Signature={SECRET}"}, "url holds a query"),
        ({"key": 12345678, "secret": SECRET}, "s3_kwargs.key is of type int; it has to be text"),
        ({"key": KEY, "secret": [SECRET]}, "s3_kwargs.secret is of type list; it has to be text"),
        (
            {"client_kwargs": f"aws_secret_access_key={SECRET}"},
            "client_kwargs in s3_kwargs is a str; it has to be a mapping",
        ),
        (
            {"client_kwargs": {"verify": "/no/such/ca.pem"}},
            "the certificate file /no/such/ca.pem cannot be read (No such file or directory)",
        ),
        ({"config_kwargs": {"s3": "virtual"}}, "s3 in s3_kwargs is a str; it has to be a mapping"),
    ],
)
def test_options_that_cannot_be_used_are_named_at_once(
    s3_kwargs: dict[str, Any], words: str
) -> None:
    """Before any request, and without the secret."""
    with pytest.raises(ConfigError) as caught:
        open_origin("s3://densities/data", s3_kwargs=s3_kwargs)
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "s3_kwargs",
    [
        {"frobnicate": 1},
        {"client_kwargs": {"regionname": "eu-west-1"}},
        {"config_kwargs": {"signature": "s3v4"}},
        {"token": "t", "x": 1},
    ],
)
@pytest.mark.parametrize("op", ["LIST", "GET"])
def test_options_that_s3fs_does_not_know_are_config_errors(
    op: str, s3_kwargs: dict[str, Any], at_proxy: dict[str, Any]
) -> None:
    """They are passed to s3fs, which rejects them when its client is made; obstore does not support
    them.
    """
    origin = open_origin("s3://densities/data", s3_kwargs={**at_proxy, **s3_kwargs})
    with pytest.raises(
        ConfigError, match=r"s3fs does not accept s3_kwargs: .*unexpected keyword argument"
    ):
        ASK[op](origin)
    with pytest.raises(
        ConfigError,
        match=r"cache.fetch.engine is obstore, which cannot do .*. Remove them, or "
        r"set engine: auto.",
    ):
        open_origin(
            "s3://densities/data",
            s3_kwargs={**at_proxy, **s3_kwargs},
            fetch=FetchConfig(engine="obstore"),
        )


@pytest.mark.parametrize("engine", ["s3fs", "obstore"])
def test_no_log_line_holds_a_secret(
    engine: str, fault_proxy: FaultProxy, at_proxy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """At every log level, while requests fail and are retried."""
    fault_proxy.rules(Rule(("503", "reset"), then="403:InvalidAccessKeyId"))
    origin = open_origin(
        "s3://densities/data", s3_kwargs=at_proxy, fetch=FetchConfig(engine=engine)
    )
    with caplog.at_level(logging.DEBUG, "zarrcache"), pytest.raises(OriginAccessError):
        ASK["LIST"](origin)
    lines = [
        record.getMessage() for record in caplog.records if record.name.startswith("zarrcache")
    ]
    assert lines
    assert not [line for line in lines for secret in (KEY, SECRET, TOKEN) if secret in line]


@pytest.mark.parametrize("url", ["gs://bucket/data", "http://server/data"])
def test_another_scheme_is_refused_with_the_ones_there_are(url: str) -> None:
    """It is not taken for a directory name."""
    with pytest.raises(
        ConfigError,
        match=r"is of scheme \w+://, which is not supported. Write s3://bucket/prefix, a path, or "
        r"file:///path.",
    ):
        open_origin(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://", "names no bucket"),
        (Path("s3://bucket/data"), "'s3:/bucket/data' has one slash"),
        ("s3:///data", "names no bucket"),
        ("s3://arn:aws:s3:eu:1:x/d", "ARN"),
    ],
)
def test_an_url_without_a_bucket_is_refused(url: str | Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_origin(url)


def test_a_directory_that_may_not_be_read_is_an_access_error(tmp_path: Path) -> None:
    """A file in place of a directory is not found; no file system error is taken for an absent
    store.
    """
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OriginError, match="could not be read: Too many levels of symbolic links"):
        open_origin(loop).list_names()
    with pytest.raises(OriginError, match="could not be read: Too many levels of symbolic links"):
        open_origin(tmp_path).list_objects("loop")
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "0.0.0").symlink_to(tmp_path / "gone")
    with pytest.raises(OriginError, match="broken symbolic link"):
        open_origin(tmp_path).list_objects("store.zarr/")


def test_a_root_that_vanished_is_not_an_absent_store(tmp_path: Path) -> None:
    """An unmounted file system must not look like a data set without this store."""
    with pytest.raises(
        OriginNotFoundError,
        match=r"is not a directory of this machine. Check the path, and that its file system is "
        r"mounted",
    ):
        open_origin(tmp_path / "unmounted").list_objects("mp-1.zarr/")
    with pytest.raises(OriginNotFoundError, match="is not a directory of this machine"):
        open_origin(tmp_path / "unmounted").list_objects("mp-1.zarr.zip")
