"""What botocore finds in ``s3_kwargs``, the environment and the AWS files is what both engines and
uploads send, and what the identity of entries is made of.

The judge is s3fs itself: the requests that arrive at a recording server are compared with its own.
Hosts of AWS are reached through the server as a proxy, so no name is looked up.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec.config
import pytest

from tests.support.recorder import BODY, Arrived, Recorder, recorder
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.convert.upload import S3Destination
from zarrcache.errors import ConfigError, OriginAccessError, OriginError
from zarrcache.origin import make_s3fs, open_origin
from zarrcache.origin._botocore import configured_endpoint
from zarrcache.origin._s3_options import AWS_ENDPOINT, _without_asking, typed_kwargs

KEYS = "aws_access_key_id = FILEKEY\naws_secret_access_key = s\n"
#: Requests to hosts of AWS arrive at the recorder as its proxy.
AWS = {"HTTP_PROXY": "{url}"}


@dataclass(frozen=True)
class Setting:
    """One way to write a setting. ``{url}`` stands for the server's address.

    ``only_s3fs``: obstore cannot do it.
    """

    config: str = ""
    credentials: str = "[default]\n" + KEYS
    environ: dict[str, str] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    bucket: str = "dens"
    only_s3fs: bool = False


def at(**more: Any) -> Setting:
    """A setting beside an endpoint in ``s3_kwargs``."""
    kwargs = {"endpoint_url": "{url}", **more.pop("kwargs", {})}
    return Setting(kwargs=kwargs, **more)


def aws(*, environ: dict[str, str] | None = None, **more: Any) -> Setting:
    """A setting without an endpoint."""
    kwargs = {"use_ssl": False, **more.pop("kwargs", {})}
    return Setting(kwargs=kwargs, environ={**AWS, **(environ or {})}, **more)


SETTINGS = {
    # where the endpoint stands
    "endpoint in the credentials file": Setting(
        credentials="[default]\nendpoint_url = {url}\n" + KEYS
    ),
    "endpoint of a profile of the credentials file": Setting(
        credentials="[lab]\nendpoint_url = {url}\nregion = eu-lab\n" + KEYS,
        kwargs={"profile": "lab"},
    ),
    "endpoint in the config file": Setting(config="[default]\nendpoint_url = {url}\n"),
    "endpoint of a service": Setting(
        config="[profile lab]\nservices = mine\nendpoint_url = http://other.invalid\n"
        "[services mine]\ns3 =\n  endpoint_url = {url}\n",
        credentials="[lab]\n" + KEYS,
        environ={"AWS_PROFILE": "lab"},
    ),
    "endpoint of the environment": Setting(
        environ={"AWS_ENDPOINT_URL": "http://other.invalid", "AWS_ENDPOINT_URL_S3": "{url}"}
    ),
    "endpoint of the environment before a file's": Setting(
        config="[default]\nendpoint_url = http://other.invalid\n",
        environ={"AWS_ENDPOINT_URL": "{url}"},
    ),
    "an endpoint with a path": Setting(environ={"AWS_ENDPOINT_URL": "{url}/api/v1/s3/"}),
    "endpoints switched off in the environment": aws(
        config="[default]\nendpoint_url = http://other.invalid\nregion = us-west-2\n",
        environ={
            "AWS_ENDPOINT_URL": "http://other.invalid",
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
        },
    ),
    "endpoints switched off in a file": aws(
        config="[default]\nignore_configured_endpoint_urls = true\nregion = us-west-2\n",
        environ={"AWS_ENDPOINT_URL": "http://other.invalid"},
    ),
    "endpoints switched off in s3_kwargs": aws(
        environ={"AWS_ENDPOINT_URL_S3": "http://other.invalid"},
        kwargs={"config_kwargs": {"ignore_configured_endpoint_urls": "true"}},
    ),
    "an option before the switch": at(
        environ={"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"},
    ),
    # region, profile
    "region in the credentials file": at(credentials="[default]\nregion = lab-1\n" + KEYS),
    "region of the environment before a file's": at(
        config="[default]\nregion = lab-1\n", environ={"AWS_DEFAULT_REGION": "lab-2"}
    ),
    "a region that only obstore reads": at(environ={"AWS_REGION": "lab-3", "AWS_ENDPOINT": "x"}),
    "region of the default profile": at(
        config="[profile two]\nregion = lab-4\n",
        credentials="[two]\naws_session_token = t\n" + KEYS,
        environ={"AWS_DEFAULT_PROFILE": "two"},
    ),
    "region of the client before that of the config": at(
        kwargs={"client_kwargs": {"region_name": "a"}, "config_kwargs": {"region_name": "b"}}
    ),
    # how the bucket is addressed
    "virtual hosts in the config file": Setting(
        config="[default]\nendpoint_url = http://s3.lab.test\nregion = lab\n"
        "s3 =\n  addressing_style = virtual\n",
        environ=AWS,
    ),
    "virtual hosts at an endpoint with a path": Setting(
        environ=AWS,
        kwargs={
            "endpoint_url": "http://s3.lab.test/gate",
            "config_kwargs": {"s3": {"addressing_style": "virtual"}},
        },
    ),
    "path style in the config file": aws(
        config="[default]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n"
    ),
    "a bucket with dots": aws(config="[default]\nregion = eu-west-1\n", bucket="dens.of.lab"),
    "a variable that only obstore reads": at(
        environ={"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true", "AWS_SKIP_SIGNATURE": "true"}
    ),
    # hosts of AWS
    "dual stack in the config file": aws(
        config="[default]\nregion = eu-west-1\nuse_dualstack_endpoint = true\n"
    ),
    "dual stack of S3 alone": aws(
        config="[default]\nregion = eu-west-1\ns3 =\n  use_dualstack_endpoint = true\n"
    ),
    "FIPS of the environment": aws(
        environ={"AWS_USE_FIPS_ENDPOINT": "true", "AWS_DEFAULT_REGION": "us-west-2"}
    ),
    "FIPS as text": aws(
        environ={"AWS_DEFAULT_REGION": "us-west-2"},
        kwargs={"config_kwargs": {"use_fips_endpoint": "true", "use_dualstack_endpoint": "no"}},
    ),
    "transfer acceleration": aws(
        config="[default]\nregion = us-west-2\n",
        kwargs={"config_kwargs": {"s3": {"use_accelerate_endpoint": "yes"}}},
    ),
    "the regional host of us-east-1": aws(
        environ={"AWS_DEFAULT_REGION": "us-east-1", "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "legacy"}
    ),
    "China": aws(config="[default]\nregion = cn-north-1\n"),
    "no region at all": aws(),
    # proxies
    "a proxy of the environment": Setting(
        environ={"http_proxy": "{url}"}, kwargs={"endpoint_url": "http://s3.lab.test:9000"}
    ),
    "a proxy in s3_kwargs": Setting(
        kwargs={
            "endpoint_url": "http://s3.lab.test:9000",
            "config_kwargs": {"proxies": {"http": "{host}"}},
        }
    ),
    "a proxy for all that botocore ignores": at(environ={"ALL_PROXY": "http://other.invalid:1"}),
    "a host without the proxy": at(
        environ={"HTTP_PROXY": "http://other.invalid:1", "NO_PROXY": "127.0.0.1"}
    ),
    # signatures, checksums, payment
    "signatures of version 4 by name": at(kwargs={"config_kwargs": {"signature_version": "s3v4"}}),
    "signatures of version 2": at(
        kwargs={"config_kwargs": {"signature_version": "s3"}}, only_s3fs=True
    ),
    "signatures of version 2 in a file": at(config="[default]\ns3 =\n  signature_version = s3\n"),
    "no checksums in the config file": at(
        config="[default]\nrequest_checksum_calculation = when_required\n"
    ),
    "no checksums in the environment": at(
        environ={"AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED"}
    ),
    "checksums in s3_kwargs before the environment": at(
        environ={"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"},
        kwargs={"config_kwargs": {"request_checksum_calculation": "when_supported"}},
    ),
    "a checksum that only obstore would send": at(
        environ={
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_CHECKSUM_ALGORITHM": "SHA256",
        },
        only_s3fs=True,
    ),
    "encryption that only obstore would ask for": at(
        environ={"AWS_SERVER_SIDE_ENCRYPTION": "AES256"}, only_s3fs=True
    ),
    "truth values as text": at(kwargs={"requester_pays": "True", "anon": "false"}),
    "false as text": at(kwargs={"requester_pays": "false", "anon": "0"}),
    "anonymous as text": at(kwargs={"anon": "yes"}),
    "empty text": at(
        kwargs={"profile": "", "key": "", "secret": "", "client_kwargs": {"region_name": ""}}
    ),
    "a key beside a token of the environment": at(
        environ={"AWS_SESSION_TOKEN": "other"}, kwargs={"key": "K", "secret": "s"}
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Recorder]:
    with recorder() as running:
        yield running


def _filled(value: Any, server: Recorder) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, server) for k, v in value.items()}
    if isinstance(value, str):
        return value.replace("{url}", server.url).replace("{host}", server.host)
    return value


@pytest.fixture
def prepared(server: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``prepared(setting)`` writes files and environment; its ``s3_kwargs``."""

    def prepare(setting: Setting, name: str = "aws") -> dict[str, Any]:
        for variable, file, text in (
            ("AWS_CONFIG_FILE", f"{name}-config", setting.config),
            ("AWS_SHARED_CREDENTIALS_FILE", f"{name}-credentials", setting.credentials),
        ):
            (tmp_path / file).write_text(_filled(text, server))
            monkeypatch.setenv(variable, str(tmp_path / file))
        if any(n.lower() == "http_proxy" for n in setting.environ):
            monkeypatch.delenv("NO_PROXY")
        for variable, value in setting.environ.items():
            monkeypatch.setenv(variable, _filled(value, server))
        server.arrived.clear()
        server.only_region = ""
        kwargs: dict[str, Any] = _filled(setting.kwargs, server)
        return kwargs

    return prepare


def _took(server: Recorder) -> list[Arrived]:
    """The different requests that arrived, in order. HEADs and DELETEs are not compared: they go
    through s3fs, or s3fs has none.
    """
    arrived = dict.fromkeys(r for r in server.arrived if r.op in ("LIST", "GET", "PUT"))
    server.arrived.clear()
    return list(arrived)


def by_s3fs_itself(server: Recorder, bucket: str, kwargs: dict[str, Any]) -> list[Arrived]:
    """LIST, GET and PUT of s3fs."""
    fs = make_s3fs({**kwargs, "skip_instance_cache": True})
    payer = fs.req_kw  # which older versions leave to the caller
    fs.call_s3("list_objects_v2", Bucket=bucket, Prefix="in/", **payer)
    fs.call_s3("get_object", Bucket=bucket, Key="in/x", **payer)
    fs.call_s3("put_object", Bucket=bucket, Key="in/new.zarr.zip", Body=BODY, **payer)
    return _took(server)


def by_engine(server: Recorder, bucket: str, kwargs: dict[str, Any], engine: str) -> list[Arrived]:
    """LIST, GET and PUT of an origin and an upload."""
    url, fetch = f"s3://{bucket}/in", FetchConfig(engine=engine)
    origin = open_origin(url, s3_kwargs=kwargs, fetch=fetch, retry=RetryConfig(attempts=1))
    [obj] = origin.list_objects()
    assert bytes(next(iter(origin.fetch([obj])))[1]) == BODY
    got = _took(server)
    destination = S3Destination(url, kwargs, retry=RetryConfig(attempts=1))
    destination._bucket.fetch = fetch
    destination.upload("new.zarr.zip", {"": BODY}, overwrite=True)
    return got + [r for r in _took(server) if r.op == "PUT"]


def test_the_recorded_object_has_its_md5() -> None:
    """Or the engines would ask for the reason."""
    assert hashlib.md5(BODY).hexdigest() == "781e5e245d69b566979b86e28d23f2c7"


#: Those that the default run tries: each mechanism once.
QUICK = (
    "endpoint of a profile of the credentials file",
    "endpoint of a service",
    "endpoints switched off in the environment",
    "virtual hosts in the config file",
    "virtual hosts at an endpoint with a path",
    "a bucket with dots",
    "FIPS as text",
    "no region at all",
    "a proxy in s3_kwargs",
    "a host without the proxy",
    "signatures of version 2",
    "no checksums in the config file",
    "encryption that only obstore would ask for",
    "truth values as text",
)


NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS]


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_those_of_s3fs(name: str, server: Recorder, prepared: Any) -> None:
    """Host, path, signature and headers, of reads and of uploads. obstore sends them wherever it
    can.
    """
    setting = SETTINGS[name]
    kwargs = prepared(setting)
    expected = by_s3fs_itself(server, setting.bucket, kwargs)
    assert [(r.op, r.engine) for r in expected] == [(op, "s3fs") for op in ("LIST", "GET", "PUT")]
    got = by_engine(server, setting.bucket, kwargs, "auto")
    engine = "s3fs" if setting.only_s3fs else "obstore"
    assert [(r.op, r.engine) for r in got] == [("LIST", "s3fs"), ("GET", engine), ("PUT", engine)]
    assert [replace(r, engine="s3fs") for r in got] == expected
    if setting.only_s3fs:
        with pytest.raises(ConfigError, match="which cannot do"):
            by_engine(server, setting.bucket, kwargs, "obstore")


@pytest.mark.parametrize("name", NAMES)
def test_botocore_would_say_what_is_known_without_it(name: str, prepared: Any) -> None:
    """The identity of entries is found without importing botocore where that is safe."""
    kwargs = typed_kwargs(prepared(SETTINGS[name]))
    client, config = kwargs.get("client_kwargs", {}), kwargs.get("config_kwargs", {})
    known = _without_asking(client.get("region_name"), config)
    if known is not None and "endpoint_url" not in kwargs:
        assert known == configured_endpoint(kwargs)


def test_profiles_with_endpoints_of_their_own_have_entries_of_their_own(
    server: Recorder, prepared: Any
) -> None:
    """Whichever file and engine."""
    prepared(
        Setting(
            config="[profile three]\nendpoint_url = http://three:1\n",
            credentials="[one]\nendpoint_url = http://one:1\n[two]\nendpoint_url = http://two:1\n"
            "[gov]\nregion = us-gov-west-1\n[cn]\nregion = cn-north-1\n[eu]\nregion = eu-west-1\n",
        )
    )
    for engine in ("auto", "s3fs"):
        found = {
            profile: open_origin(
                "s3://dens/in", s3_kwargs={"profile": profile}, fetch=FetchConfig(engine=engine)
            ).identity
            for profile in ("one", "two", "three", "gov", "cn", "eu")
        }
        assert found == {
            "one": "http://one:1",
            "two": "http://two:1",
            "three": "http://three:1",
            "gov": f"{AWS_ENDPOINT} (aws-us-gov)",
            "cn": f"{AWS_ENDPOINT} (aws-cn)",
            "eu": AWS_ENDPOINT,
        }


@pytest.mark.parametrize("engine", ["auto", "s3fs"])
def test_a_pickled_origin_keeps_its_endpoint(
    engine: str, server: Recorder, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process whose environment names another one, as on another node of a cluster."""
    prepared(Setting(environ={"AWS_ENDPOINT_URL": "{url}"}))
    fetch, retry = FetchConfig(engine=engine), RetryConfig(attempts=1)
    one = pickle.dumps(open_origin("s3://dens/in", fetch=fetch, retry=retry))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    kwargs = {"use_ssl": False}
    aws = pickle.dumps(open_origin("s3://dens/in", s3_kwargs=kwargs, fetch=fetch, retry=retry))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other.invalid")
    pickle.loads(one).list_objects()
    assert {r.host for r in server.arrived} == {server.host}
    server.arrived.clear()
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", server.url)
    pickle.loads(aws).list_objects()
    assert {r.host for r in server.arrived} == {"dens.s3.eu-west-1.amazonaws.com"}


def test_defaults_of_fsspec_hold_for_both_engines(
    server: Recorder, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``FSSPEC_S3_ANON=false`` and others are read into this dictionary, as text."""
    prepared(Setting())
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": server.url, "anon": "false", "key": "K"}
    )
    kwargs = {"secret": "s"}
    assert open_origin("s3://dens/in", s3_kwargs=kwargs).identity == server.url
    got = by_engine(server, "dens", kwargs, "auto")
    assert {(r.host, r.key) for r in got} == {(server.host, "K")}
    assert {r.engine for r in got} == {"s3fs", "obstore"}


def test_a_bucket_in_another_region_is_read_through_s3fs(
    server: Recorder, prepared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It follows, as s3fs does; said once, whatever the number of requests. Engine obstore says
    what to set.
    """
    kwargs = {"key": "K", "secret": "s", "endpoint_url": server.url}
    prepared(Setting())
    server.only_region = "eu-lab"
    with pytest.raises(OriginError, match="is in another region"):
        by_engine(server, "dens", kwargs, "obstore")
    server.arrived.clear()
    origin = open_origin("s3://dens/in", s3_kwargs=kwargs, retry=RetryConfig(attempts=1))
    with caplog.at_level(logging.WARNING, "zarrcache"):
        [obj] = origin.list_objects()
        assert bytes(next(iter(origin.fetch([obj])))[1]) == BODY
        copy = open_origin("s3://dens/in", s3_kwargs=kwargs, retry=RetryConfig(attempts=1))
        assert bytes(next(iter(copy.fetch([obj])))[1]) == BODY  # no listing before
    [said] = [r.getMessage() for r in caplog.records if "through s3fs" in r.getMessage()]
    assert "AuthorizationHeaderMalformed (400)" in said
    assert server.url in said
    assert {(r.region, r.engine) for r in server.arrived} == {
        ("us-east-1", "obstore"),
        ("us-east-1", "s3fs"),
        ("eu-lab", "s3fs"),
    }


def test_what_obstore_cannot_do_is_said_once(
    server: Recorder, prepared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With the setting's name."""
    kwargs = {**prepared(at()), "s3_additional_kwargs": {"ExpectedBucketOwner": "1"}}
    with caplog.at_level(logging.WARNING, "zarrcache"):
        for _ in range(3):
            open_origin("s3://dens/in", s3_kwargs=kwargs).list_objects()
    [said] = [r.getMessage() for r in caplog.records if "through s3fs" in r.getMessage()]
    assert "s3_additional_kwargs" in said
    assert {r.engine for r in server.arrived} == {"s3fs"}


def test_attempts_of_the_environment_change_nothing(server: Recorder, prepared: Any) -> None:
    """One layer retries. A text that is no number is no error either."""
    kwargs = prepared(at(environ={"AWS_MAX_ATTEMPTS": "many", "AWS_RETRY_MODE": "adaptive"}))
    got = by_engine(server, "dens", kwargs, "auto")
    assert [r.engine for r in got] == ["s3fs", "obstore", "obstore"]


def test_a_certificate_file_that_does_not_exist_is_named(
    server: Recorder, prepared: Any, tmp_path: Path
) -> None:
    """Over plain http:// too, where it is needed for nothing and loaded nevertheless."""
    kwargs = prepared(at(environ={"AWS_CA_BUNDLE": f"{tmp_path}/ca.pem"}))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/ca\.pem cannot be read.*AWS_CA_BUNDLE"):
        open_origin("s3://dens/in", s3_kwargs=kwargs).list_objects()


def test_an_unknown_profile_is_named_where_the_endpoint_depends_on_it(prepared: Any) -> None:
    prepared(Setting(config="[profile a]\nendpoint_url = http://a:1\n"))
    with pytest.raises(OriginAccessError, match=r"profile \(b\) could not be found. Set profile"):
        open_origin("s3://dens/in", s3_kwargs={"profile": "b"})


def test_a_warm_process_does_not_import_botocore(tmp_path: Path) -> None:
    """Wherever the endpoint is plain: in s3_kwargs, in the environment, or AWS's own."""
    (tmp_path / "config").write_text("[default]\nregion = eu-central-1\n[profile b]\noutput=json\n")
    script = (
        "import os, sys\nfrom zarrcache.origin import open_origin\n"
        "assert open_origin('s3://b/in', s3_kwargs={'endpoint_url': 'http://a:1'}).identity == 'http://a:1'\n"
        f"assert open_origin('s3://b/in').identity == {AWS_ENDPOINT!r}\n"
        "os.environ['AWS_ENDPOINT_URL_S3'] = 'http://b:1'\n"
        "assert open_origin('s3://b/in').identity == 'http://b:1'\n"
        "sys.exit(any(name.startswith(('botocore', 's3fs', 'obstore')) for name in sys.modules))\n"
    )
    environ = {**os.environ, "AWS_CONFIG_FILE": str(tmp_path / "config")}
    subprocess.run([sys.executable, "-c", script], check=True, env=environ)
