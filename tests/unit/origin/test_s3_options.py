"""``s3_kwargs`` are read once for both engines, without a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zarrcache.errors import ConfigError
from zarrcache.origin._s3_options import (
    AWS_ENDPOINT,
    S3Options,
    configured_endpoint,
    configured_region,
    split_s3_url,
    stores_checksum,
)

CONFIG = """
[default]
region = eu-central-1
[profile lab]
region = eu-west-1
endpoint_url = http://lab:1
[profile split]
endpoint_url = http://general:1
services = mine
[services mine]
s3 =
    endpoint_url = http://only-s3:1
"""


def options(environ: dict[str, str] | None = None, **s3_kwargs: Any) -> S3Options:
    """Options as read in an environment of the test's own."""
    return S3Options.of(s3_kwargs, {"AWS_CONFIG_FILE": "/no/such/file", **(environ or {})})


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment that names a config file."""
    (tmp_path / "config").write_text(CONFIG)
    return {"AWS_CONFIG_FILE": str(tmp_path / "config")}


def test_nothing_given_is_aws() -> None:
    """The region is the bucket's own, which a request finds; both engines can be used."""
    read = options()
    assert (
        read.endpoint_url,
        read.region,
        read.anon,
        read.verify,
        read.virtual_hosted,
        read.only_s3fs,
    ) == (None, None, False, True, None, ())
    assert read.identity == AWS_ENDPOINT
    assert S3Options.of(None, {"AWS_CONFIG_FILE": "/no/such/file"}) == read


def test_a_given_endpoint_signs_for_us_east_1() -> None:
    """Unless something says otherwise, as with botocore; the slash at the end is no part of its
    identity.
    """
    read = options(endpoint_url="http://gw:9000/")
    assert (read.region, read.identity) == ("us-east-1", "http://gw:9000")
    assert (
        options(endpoint_url="http://gw:9000", client_kwargs={"region_name": "r1"}).region == "r1"
    )
    assert (
        options(endpoint_url="http://gw:9000", config_kwargs={"region_name": "r2"}).region == "r2"
    )
    assert options({"AWS_DEFAULT_REGION": "r3"}, endpoint_url="http://gw:9000").region == "r3"


def test_credentials_come_from_the_option_its_alias_or_the_client() -> None:
    client = {"aws_access_key_id": "ck", "aws_secret_access_key": "cs", "aws_session_token": "ct"}
    for given, expected in [
        (
            {"key": "k", "secret": "s", "username": "u", "password": "p", "client_kwargs": client},
            ("k", "s", "ct"),
        ),
        ({"username": "u", "password": "p", "client_kwargs": client}, ("u", "p", "ct")),
        ({"client_kwargs": client}, ("ck", "cs", "ct")),
        ({"key": "k", "secret": "s", "token": "t"}, ("k", "s", "t")),
        ({}, (None, None, None)),
    ]:
        read = options(**given)
        assert (read.key, read.secret, read.token) == expected


def test_the_endpoint_comes_from_option_client_environment_or_file(environ: dict[str, str]) -> None:
    every = {
        **environ,
        "AWS_ENDPOINT_URL": "http://env:1",
        "AWS_ENDPOINT_URL_S3": "http://env-s3:1",
    }
    client = {"endpoint_url": "http://client:1"}
    assert (
        options(every, endpoint_url="http://option:1", client_kwargs=client).endpoint_url
        == "http://option:1"
    )
    assert options(every, client_kwargs=client).endpoint_url == "http://client:1"
    assert options(every).endpoint_url == "http://env-s3:1"
    assert options({**environ, "AWS_ENDPOINT_URL": "http://env:1"}).endpoint_url == "http://env:1"
    assert options(environ, profile="lab").endpoint_url == "http://lab:1"
    assert options({**environ, "AWS_PROFILE": "lab"}).endpoint_url == "http://lab:1"
    assert options(environ, profile="split").endpoint_url == "http://only-s3:1"
    assert options(environ).endpoint_url is None
    assert options(environ, profile="unknown").endpoint_url is None
    assert options({**every, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}).endpoint_url is None


def test_the_region_comes_from_environment_or_file(environ: dict[str, str]) -> None:
    assert configured_region(None, environ) == "eu-central-1"
    assert configured_region("lab", environ) == "eu-west-1"
    assert configured_region("split", environ) is None
    assert configured_region("lab", {**environ, "AWS_DEFAULT_REGION": "r"}) == "r"


def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("region = no section\n")
    with pytest.raises(ConfigError, match=r"the AWS config file .*config cannot be read") as caught:
        configured_endpoint(None, {"AWS_CONFIG_FILE": str(tmp_path / "config")})
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("style", "virtual"), [("virtual", True), ("path", False), ("auto", None), (None, None)]
)
def test_the_addressing_style_is_read(style: str | None, virtual: bool | None) -> None:
    read = options(config_kwargs={"s3": {"addressing_style": style}} if style else {})
    assert (read.virtual_hosted, read.only_s3fs) == (virtual, ())


def test_verify_is_read_from_the_client_or_the_environment(tmp_path: Path) -> None:
    """A certificate file has to exist."""
    (tmp_path / "ca.pem").touch()
    ca = str(tmp_path / "ca.pem")
    assert options(client_kwargs={"verify": False}).verify is False
    assert options(client_kwargs={"verify": ca}).verify == ca
    assert options({"AWS_CA_BUNDLE": ca}).verify == ca
    assert options({"AWS_CA_BUNDLE": ca}, client_kwargs={"verify": True}).verify is True
    for given, environ in [
        ({"client_kwargs": {"verify": "/no/ca"}}, {}),
        ({}, {"AWS_CA_BUNDLE": "/no/ca"}),
    ]:
        with pytest.raises(ConfigError, match="the certificate file /no/ca cannot be read"):
            options(environ, **given)


@pytest.mark.parametrize(
    ("given", "only"),
    [
        ({"default_block_size": 1, "use_listings_cache": True, "skip_instance_cache": True}, ()),
        (
            {
                "config_kwargs": {
                    "retries": {"max_attempts": 3},
                    "read_timeout": 3,
                    "signature_version": "s3v4",
                }
            },
            (),
        ),
        ({"version_aware": False, "s3_additional_kwargs": None}, ()),
        ({"version_aware": True}, ("version_aware",)),
        ({"s3_additional_kwargs": {"SSECustomerKey": "x"}}, ("s3_additional_kwargs",)),
        ({"config_kwargs": {"signature_version": "s3"}}, ("config_kwargs.signature_version",)),
        ({"config_kwargs": {"proxies": {"http": "p"}}}, ("config_kwargs.proxies",)),
        (
            {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}},
            ("config_kwargs.s3.use_accelerate_endpoint",),
        ),
        ({"client_kwargs": {"api_version": "x"}}, ("client_kwargs.api_version",)),
    ],
)
def test_options_that_obstore_does_not_have_are_listed(
    given: dict[str, Any], only: tuple[str, ...]
) -> None:
    assert options(**given).only_s3fs == only


@pytest.mark.parametrize(
    ("config_kwargs", "environ", "stores"),
    [
        ({}, {}, True),
        ({"request_checksum_calculation": "when_required"}, {}, False),
        ({}, {"AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED"}, False),
        (
            {"request_checksum_calculation": "when_supported"},
            {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"},
            True,
        ),
    ],
)
def test_uploads_store_a_checksum_unless_botocore_would_not(
    config_kwargs: dict[str, str], environ: dict[str, str], stores: bool
) -> None:
    environ = {"AWS_CONFIG_FILE": "/no/such/file", **environ}
    assert stores_checksum(options(config_kwargs=config_kwargs), environ) is stores


def test_the_checksum_setting_is_read_from_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("[profile lab]\nrequest_checksum_calculation = when_required\n")
    environ = {"AWS_CONFIG_FILE": str(file)}
    assert stores_checksum(options(), environ)
    assert not stores_checksum(options(profile="lab"), environ)


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
