"""``s3_kwargs`` mean the same to both engines as to s3fs, judged by the requests that arrive.

moto accepts any credentials, so key names are made up there; a server that checks credentials gets
its own, and its answers prove the signatures.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import make_certificate, make_self_signed
from tests.support.faultproxy import FaultProxy
from tests.support.s3server import S3Server
from zarrcache._keys import ObjectInfo
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import ConfigError, OriginError, OriginNotFoundError
from zarrcache.origin import make_s3fs, open_origin

#: For servers that do not check credentials.
CREDENTIALS = {"key": "THEKEY", "secret": "the-secret"}
CONFIG = """
[profile lab]
region = eu-west-1
aws_access_key_id = {lab[key]}
aws_secret_access_key = {lab[secret]}
aws_session_token = lab-token

[profile gateway]
endpoint_url = http://of-other-services.invalid
services = lab-services
aws_access_key_id = {gate[key]}
aws_secret_access_key = {gate[secret]}

[services lab-services]
s3 =
    endpoint_url = {endpoint}
"""


#: See ``known``.
Known = Callable[[str], dict[str, str]]


@pytest.fixture
def url(s3_server: S3Server, bucket: str) -> str:
    """A public object, so that anonymous requests are answered too."""
    s3_server.client().put_object(
        Bucket=bucket, Key="data/x", Body=b"0123456789", ACL="public-read"
    )
    return f"s3://{bucket}/data"


@pytest.fixture
def known(s3_server: S3Server) -> Known:
    """``known("THEKEY")`` are credentials that the server accepts, under that name if it accepts
    any.
    """

    def make(name: str) -> dict[str, str]:
        if s3_server.checks_credentials:
            return {"key": s3_server.key, "secret": s3_server.secret}
        return {"key": name, "secret": f"secret of {name}"}

    return make


@pytest.fixture
def aws_files(
    tmp_path: Path, fault_proxy: FaultProxy, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's AWS config file."""
    (tmp_path / "config").write_text(
        CONFIG.format(endpoint=fault_proxy.endpoint_url, lab=known("LABKEY"), gate=known("GATEKEY"))
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def arrived(proxy: FaultProxy, url: str, s3_kwargs: dict[str, Any]) -> dict[str, str]:
    """The headers compared, after checking that s3fs itself and both engines send the same."""
    found = []
    for engine in ("s3fs", "obstore", "s3fs itself"):
        proxy.reset()
        if engine == "s3fs itself":
            bucket, _, prefix = url.removeprefix("s3://").partition("/")
            fs = make_s3fs({**s3_kwargs, "skip_instance_cache": True})
            fs.call_s3("get_object", Bucket=bucket, Key=f"{prefix}/x", **fs.req_kw)
        else:
            origin = open_origin(
                url,
                s3_kwargs=s3_kwargs,
                fetch=FetchConfig(engine=engine),
                retry=RetryConfig(attempts=1),
            )
            [obj] = origin.list_objects()
            assert origin.fetch_range(obj, 0, 3) == b"012"
        seen = proxy.seen("GET")[-1]
        headers = {name.lower(): value for name, value in seen.headers.items()}
        credential = (
            headers.get("authorization", "")
            .partition("Credential=")[2]
            .partition(",")[0]
            .split("/")
        )
        found.append(
            {
                "key": credential[0],
                "region": credential[2] if len(credential) > 2 else "",
                "token": headers.get("x-amz-security-token", ""),
                "payer": headers.get("x-amz-request-payer", ""),
                "host": headers["host"],
                "path": seen.path,
            }
        )
    assert found[0] == found[1] == found[2]
    return found[0]


def test_key_and_secret_sign_for_us_east_1_by_default(
    fault_proxy: FaultProxy, url: str, known: Known
) -> None:
    """As botocore does for a custom endpoint."""
    got = arrived(fault_proxy, url, {**known("THEKEY"), "endpoint_url": fault_proxy.endpoint_url})
    assert (got["key"], got["region"], got["token"], got["payer"]) == (
        known("THEKEY")["key"],
        "us-east-1",
        "",
        "",
    )
    assert got["path"] == f"/{url.removeprefix('s3://')}/x"


def test_a_token_of_the_environment_is_not_mixed_with_a_given_key(
    fault_proxy: FaultProxy, url: str, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They belong to different accounts."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "of-the-environment")
    got = arrived(fault_proxy, url, {**known("THEKEY"), "endpoint_url": fault_proxy.endpoint_url})
    assert (got["key"], got["token"]) == (known("THEKEY")["key"], "")


def test_credentials_of_the_environment_are_found(
    fault_proxy: FaultProxy, url: str, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three, and the region."""
    mine = known("MYKEY")
    for name, value in (
        ("AWS_ACCESS_KEY_ID", mine["key"]),
        ("AWS_SECRET_ACCESS_KEY", mine["secret"]),
        ("AWS_SESSION_TOKEN", "my-token"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-south-1")
    got = arrived(fault_proxy, url, {"endpoint_url": fault_proxy.endpoint_url})
    assert (got["key"], got["token"], got["region"]) == (mine["key"], "my-token", "eu-south-1")


def test_a_token_is_sent(fault_proxy: FaultProxy, url: str, known: Known) -> None:
    """Temporary credentials."""
    assert (
        arrived(
            fault_proxy,
            url,
            {**known("THEKEY"), "token": "tok", "endpoint_url": fault_proxy.endpoint_url},
        )["token"]
        == "tok"
    )


def test_anon_sends_no_authorization(
    fault_proxy: FaultProxy, url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with credentials in the environment; listing needs a policy that this server does not
    have, so only GET is compared.
    """
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOT_WANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-wanted")
    [obj] = open_origin(url, s3_kwargs=s3_server.s3_kwargs).list_objects()
    for engine in ("s3fs", "obstore"):
        fault_proxy.reset()
        origin = open_origin(
            url,
            s3_kwargs={"anon": True, "endpoint_url": fault_proxy.endpoint_url},
            fetch=FetchConfig(engine=engine),
        )
        assert origin.fetch_range(obj, 2, 5) == b"234"
        assert {seen.op for seen in fault_proxy.seen()} == {"GET"}
        assert not {"authorization", "x-amz-security-token"} & {
            name.lower() for name in fault_proxy.seen()[0].headers
        }


def test_a_profile_gives_key_token_and_region(
    fault_proxy: FaultProxy, url: str, known: Known, aws_files: None
) -> None:
    """From the AWS config file."""
    got = arrived(fault_proxy, url, {"profile": "lab", "endpoint_url": fault_proxy.endpoint_url})
    assert (got["key"], got["token"], got["region"]) == (
        known("LABKEY")["key"],
        "lab-token",
        "eu-west-1",
    )


def test_a_profile_gives_the_endpoint(
    fault_proxy: FaultProxy, url: str, known: Known, aws_files: None
) -> None:
    got = arrived(fault_proxy, url, {"profile": "gateway"})
    assert got["key"] == known("GATEKEY")["key"]
    assert open_origin(url, s3_kwargs={"profile": "gateway"}).identity == fault_proxy.endpoint_url


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_environment_gives_the_endpoint(
    name: str, fault_proxy: FaultProxy, url: str, known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By botocore's names."""
    monkeypatch.setenv(name, fault_proxy.endpoint_url)
    assert arrived(fault_proxy, url, known("THEKEY"))[
        "host"
    ] == fault_proxy.endpoint_url.removeprefix("http://")


def test_requester_pays_is_sent(fault_proxy: FaultProxy, url: str, known: Known) -> None:
    """The header is on every request."""
    got = arrived(
        fault_proxy,
        url,
        {**known("THEKEY"), "requester_pays": True, "endpoint_url": fault_proxy.endpoint_url},
    )
    assert got["payer"] == "requester"
    for engine in ("s3fs", "obstore"):
        fault_proxy.reset()
        kwargs = {
            **known("THEKEY"),
            "requester_pays": True,
            "endpoint_url": fault_proxy.endpoint_url,
        }
        origin = open_origin(url, s3_kwargs=kwargs, fetch=FetchConfig(engine=engine))
        origin.list_objects()
        origin.list_objects("x")
        payers = {
            seen.op: {k.lower(): v for k, v in seen.headers.items()}.get("x-amz-request-payer")
            for seen in fault_proxy.seen()
        }
        assert payers == {"LIST": "requester", "HEAD": "requester"}


def test_client_kwargs_give_endpoint_region_and_credentials(
    fault_proxy: FaultProxy, url: str, known: Known
) -> None:
    """The older way to write them."""
    mine = known("CLIENTKEY")
    client = {
        "endpoint_url": fault_proxy.endpoint_url,
        "region_name": "eu-north-1",
        "aws_access_key_id": mine["key"],
        "aws_secret_access_key": mine["secret"],
        "aws_session_token": "client-token",
    }
    got = arrived(fault_proxy, url, {"client_kwargs": client})
    assert (got["key"], got["region"], got["token"]) == (mine["key"], "eu-north-1", "client-token")
    assert (
        open_origin(url, s3_kwargs={"client_kwargs": client}).identity == fault_proxy.endpoint_url
    )


def test_config_kwargs_give_style_signature_and_region(
    fault_proxy: FaultProxy, url: str, known: Known
) -> None:
    """What obstore can do as well."""
    config = {
        "s3": {"addressing_style": "path"},
        "signature_version": "s3v4",
        "region_name": "ap-east-1",
        "retries": {"max_attempts": 9},
    }
    got = arrived(
        fault_proxy,
        url,
        {**known("THEKEY"), "endpoint_url": fault_proxy.endpoint_url, "config_kwargs": config},
    )
    assert got["region"] == "ap-east-1"


def test_username_and_password_are_key_and_secret(
    fault_proxy: FaultProxy, url: str, known: Known
) -> None:
    """The names of fsspec."""
    mine = known("UKEY")
    kwargs = {
        "username": mine["key"],
        "password": mine["secret"],
        "endpoint_url": fault_proxy.endpoint_url,
    }
    assert arrived(fault_proxy, url, kwargs)["key"] == mine["key"]


def signs_buckets_as_the_server_does(server: S3Server, url: str) -> bool:
    """Whether boto3 alone can list with the older signature version."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    config = Config(signature_version="s3", s3={"addressing_style": "path"})
    credentials = {"aws_access_key_id": server.key, "aws_secret_access_key": server.secret}
    try:
        boto3.client(
            "s3", endpoint_url=server.endpoint_url, config=config, **credentials
        ).list_objects_v2(Bucket=url.split("/")[2])
    except ClientError:
        return False
    return True


def test_an_older_signature_goes_through_s3fs(
    fault_proxy: FaultProxy, s3_server: S3Server, url: str, known: Known
) -> None:
    """Engine ``auto`` chooses the engine that supports it. Ceph rejects botocore's old signatures
    of buckets.
    """
    if s3_server.checks_credentials and not signs_buckets_as_the_server_does(s3_server, url):
        pytest.skip(
            "botocore itself is refused by this server when it lists with the older signature"
        )
    kwargs = {
        **known("THEKEY"),
        "endpoint_url": fault_proxy.endpoint_url,
        "config_kwargs": {"signature_version": "s3"},
    }
    origin = open_origin(url, s3_kwargs=kwargs)
    [obj] = origin.list_objects()
    assert origin.fetch_range(obj, 0, 2) == b"01"
    assert {seen.headers["Authorization"].split(":")[0] for seen in fault_proxy.seen()} == {
        f"AWS {known('THEKEY')['key']}"
    }


class _NoSuchBucket(BaseHTTPRequestHandler):
    """Gives every request the same answer."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = b"<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>"
        self.send_response(404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(params=[make_certificate, make_self_signed])
def tls(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A server with an unknown certificate: its URL, and the file of certificates to trust."""
    ca, cert = request.param(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchBucket)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}", str(ca)
    server.shutdown()
    thread.join()
    server.server_close()


def ask(endpoint_url: str, engine: str, *, listed: bool = True, **client: Any) -> None:
    """One LIST, or one GET without a LIST before it. The server has no such bucket."""
    kwargs = {**CREDENTIALS, "endpoint_url": endpoint_url, "client_kwargs": client}
    fetch = FetchConfig(engine=engine, connect_timeout=5.0)
    origin = open_origin(
        "s3://densities/data", s3_kwargs=kwargs, fetch=fetch, retry=RetryConfig(attempts=1)
    )
    if listed:
        origin.list_objects()
    else:
        list(origin.fetch([ObjectInfo("mp-1.zarr/x", 3, "")]))


@pytest.mark.parametrize("engine", ["s3fs", "auto"])
def test_certificates_are_checked_unless_one_says_otherwise(
    engine: str, tls: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``client_kwargs.verify``: a file, or False; or the names that botocore looks for. An unknown
    certificate is not retried, and the error says what to set.
    """
    endpoint_url, ca = tls
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(
        OriginError,
        match=f"the certificate of {endpoint_url} is not trusted. Name the file of its CA in "
        "s3_kwargs",
    ) as caught:
        ask(endpoint_url, engine)
    assert type(caught.value) is OriginError
    no_bucket = pytest.raises(OriginNotFoundError, match="there is no bucket 'densities'")
    for verify in (ca, False, "False"):
        with no_bucket:
            ask(endpoint_url, engine, verify=verify)
    with no_bucket:
        ask(endpoint_url, engine, listed=False, verify=ca)
    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        with monkeypatch.context() as patch, no_bucket:
            patch.setenv(variable, ca)
            ask(endpoint_url, engine)
    config = tmp_path / "config"
    config.write_text(f"[default]\nca_bundle = {ca}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    with no_bucket:
        ask(endpoint_url, engine)


@pytest.mark.parametrize("engine", ["s3fs", "auto"])
@pytest.mark.parametrize(
    "text",
    [None, "no certificate\n", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"],
)
@pytest.mark.parametrize("where", ["verify", "AWS_CA_BUNDLE", "config"])
def test_a_file_without_certificates_is_named(
    engine: str, text: str | None, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the file is named; not retried, and no request is made."""
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    if where == "AWS_CA_BUNDLE":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
    if where == "config":
        (tmp_path / "config").write_text(f"[default]\nca_bundle = {file}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = {"verify": str(file)} if where == "verify" else {}
    with pytest.raises(ConfigError, match=f"the certificate file {file} cannot be read"):
        ask("https://127.0.0.1:1", engine, **client)
