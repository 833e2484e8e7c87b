"""``s3_kwargs`` are read once for both engines, without a connection.

What botocore makes of them is tested by the requests: ``tests/contract/test_s3_settings.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zarrcache.errors import ConfigError
from zarrcache.origin._s3_options import AWS_ENDPOINT, S3Options, split_s3_url, typed_kwargs


def options(**s3_kwargs: Any) -> S3Options:
    """Options as read."""
    return S3Options.of(s3_kwargs)


def test_nothing_given_is_aws() -> None:
    """Both engines can be used."""
    read = options()
    assert (read.endpoint_url, read.region, read.anon, read.only_s3fs) == (None, None, False, ())
    assert read.identity == AWS_ENDPOINT
    assert S3Options.of(None) == read


def test_the_slash_at_the_end_of_an_endpoint_is_no_part_of_its_identity() -> None:
    assert options(endpoint_url="http://gw:9000/").identity == "http://gw:9000"
    assert options(client_kwargs={"endpoint_url": "http://gw:9000//"}).identity == "http://gw:9000"


def test_credentials_come_from_the_option_its_alias_or_the_client() -> None:
    client = {"aws_access_key_id": "ck", "aws_secret_access_key": "cs", "aws_session_token": "ct"}
    for given, expected in [
        ({"username": "u", "password": "p"}, ("u", "p", None)),
        ({"key": "ck", "secret": "cs", "client_kwargs": client}, ("ck", "cs", "ct")),
        ({"client_kwargs": client}, ("ck", "cs", "ct")),
        ({"key": "k", "secret": "s", "token": "t"}, ("k", "s", "t")),
        ({}, (None, None, None)),
    ]:
        read = options(**given)
        assert (read.key, read.secret, read.token) == expected


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {"endpoint_url": "http://a", "client_kwargs": {"endpoint_url": "http://b"}},
            "endpoint_url",
        ),
        ({"key": "k1", "secret": "s", "client_kwargs": {"aws_access_key_id": "k2"}}, "key"),
        ({"key": "k", "secret": "s1", "password": "s2"}, "secret"),
        ({"token": "t1", "client_kwargs": {"aws_session_token": "t2"}}, "token"),
    ],
)
def test_a_setting_with_two_values_is_refused_by_its_names(
    given: dict[str, Any], names: str
) -> None:
    """s3fs and botocore would end in a TypeError. Equal values are one."""
    with pytest.raises(ConfigError, match=f"different values for {names} and ") as caught:
        options(**given)
    assert "2" not in str(caught.value).replace("s3", "")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AWS_CONFIG_FILE", "endpoint_url = no section\n"),
        ("AWS_CONFIG_FILE", "[default]\nregion = cn-north-1\n[default\n"),
        ("AWS_SHARED_CREDENTIALS_FILE", "endpoint_url = no section\n"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    variable: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_text(text)
    monkeypatch.setenv(variable, str(tmp_path / "broken"))
    with pytest.raises(ConfigError, match=r"AWS config file cannot be read: .*broken"):
        options()


@pytest.mark.parametrize("endpoint", ["gw:9000", "ftp://gw", "http://user:word@gw:9000"])
def test_an_endpoint_that_cannot_be_used_is_refused(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes from, and without its password."""
    with pytest.raises(ConfigError, match="endpoint_url") as caught:
        options(endpoint_url=endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConfigError, match="endpoint_url"):
        options()
    assert "user" not in str(caught.value).replace("a user name", "")


def test_text_becomes_what_the_setting_needs() -> None:
    """Variables of the environment are text, and the text "false" is true to Python. Credentials
    and names stay text.
    """
    given = {
        "anon": "False",
        "requester_pays": " yes ",
        "use_ssl": "0",
        "key": "1234",
        "secret": "true",
        "profile": "",
        "max_concurrency": "4",
        "client_kwargs": {"verify": "no", "use_ssl": "on", "region_name": "1"},
        "config_kwargs": {
            "read_timeout": "2.5",
            "retries": {"max_attempts": "3", "mode": "standard"},
            "s3": {"addressing_style": "path", "use_accelerate_endpoint": "false"},
        },
        "s3_additional_kwargs": {"RequestPayer": ""},
    }
    assert typed_kwargs(given) == {
        "anon": False,
        "requester_pays": True,
        "use_ssl": False,
        "key": "1234",
        "secret": "true",
        "max_concurrency": 4,
        "client_kwargs": {"verify": False, "use_ssl": True, "region_name": "1"},
        "config_kwargs": {
            "read_timeout": 2.5,
            "retries": {"max_attempts": 3, "mode": "standard"},
            "s3": {"addressing_style": "path", "use_accelerate_endpoint": False},
        },
        "s3_additional_kwargs": {"RequestPayer": ""},
    }
    assert typed_kwargs({"client_kwargs": {"verify": "/etc/ca.pem"}}) == {
        "client_kwargs": {"verify": "/etc/ca.pem"}
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"anon": "maybe"}, "s3_kwargs.anon is 'maybe'; write true or false"),
        (
            {"config_kwargs": {"s3": {"use_accelerate_endpoint": "2"}}},
            r"s3_kwargs.config_kwargs.s3.use_accelerate_endpoint is '2'",
        ),
        (
            {"config_kwargs": {"read_timeout": "5 s"}},
            "s3_kwargs.config_kwargs.read_timeout is '5 s'; write a number",
        ),
    ],
)
def test_other_text_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options(**given)


@pytest.mark.parametrize(
    ("given", "only"),
    [
        ({"default_block_size": 1, "use_listings_cache": True, "skip_instance_cache": True}, ()),
        ({"config_kwargs": {"retries": {"max_attempts": 3}, "read_timeout": 3}}, ()),
        ({"config_kwargs": {"proxies": {"http": "p"}, "signature_version": "s3"}}, ()),
        ({"version_aware": False, "s3_additional_kwargs": None}, ()),
        ({"version_aware": True}, ("version_aware",)),
        ({"version_aware": "true"}, ("version_aware",)),
        ({"s3_additional_kwargs": {"SSECustomerKey": "x"}}, ("s3_additional_kwargs",)),
        ({"config_kwargs": {"client_cert": "x"}}, ("config_kwargs.client_cert",)),
        ({"client_kwargs": {"api_version": "x"}}, ("client_kwargs.api_version",)),
    ],
)
def test_options_that_obstore_does_not_have_are_listed(
    given: dict[str, Any], only: tuple[str, ...]
) -> None:
    """Those whose effect is in the request are left to `settings_of`."""
    assert options(**given).only_s3fs == only


def test_an_unknown_option_goes_to_s3fs() -> None:
    """A newer s3fs may have it."""
    assert options(frobnicate=1).only_s3fs == ("frobnicate",)


def test_a_lone_key_is_allowed_with_anon() -> None:
    assert options(key="k", anon=True).anon


def test_s3_kwargs_are_kept_for_s3fs_and_the_representation_has_no_secret() -> None:
    given = {"key": "AKEY", "secret": "ASECRET", "token": "ATOKEN", "endpoint_url": "http://gw"}
    read = options(**given)
    assert read.kwargs == given
    assert not [value for value in ("AKEY", "ASECRET", "ATOKEN") if value in repr(read)]


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket/a/b", ("bucket", "a/b")),
        ("s3://bucket/a/b/", ("bucket", "a/b")),
        ("s3://bucket/a b+%20/ü", ("bucket", "a b+%20/ü")),
    ],
)
def test_an_url_is_bucket_and_prefix(url: str, parts: tuple[str, str]) -> None:
    """Percent signs and spaces are part of the key."""
    assert split_s3_url(url) == parts


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://arn:aws:s3:x/y", "by its ARN"),
    ],
)
def test_an_url_without_a_bucket_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_s3_url(url)
