"""Let botocore resolve ``s3_kwargs``, the environment and the user's AWS files.

s3fs reads through botocore, and obstore has rules of its own. So that both send the same requests,
nothing of botocore's search is repeated here: one client is made as s3fs makes its own, one request
is prepared with it, and the request shows where it would go and how it is signed. Nothing is sent:
the request stops before the connection, and it is signed with made-up keys, because finding the
real ones can take requests.

Importing botocore takes 0.1 s and a question 0.1 s more, so a process that reads only what is in
the cache does neither: see `zarrcache.origin._s3_options.S3Options.of`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from zarrcache.errors import ConfigError
from zarrcache.origin._s3_errors import S3Error

__all__ = ["S3Settings", "aws_files", "configured_endpoint", "settings_of", "trusted_by"]

T = TypeVar("T")

_ALSO_READ = frozenset({"HOME", "REQUESTS_CA_BUNDLE"})
#: The client's arguments for credentials.
_CREDENTIALS = frozenset({"aws_access_key_id", "aws_secret_access_key", "aws_session_token"})
#: Settings of aiobotocore that botocore does not have. They do not change where a request goes.
_AIOBOTOCORE_ONLY = frozenset({"connector_args", "http_session_cls"})
#: Variables that obstore reads, and botocore does not. obstore has no option to ignore them.
_OF_OBSTORE = (
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
)


@dataclass(frozen=True)
class S3Settings:
    """The settings of botocore's requests to one bucket.

    Attributes
    ----------
    url : str
        Of requests, without the bucket if it is part of the path.
    is_virtual_hosted : bool
        The bucket is part of the host's name.
    region : str
        For signatures.
    is_signed : bool
    proxy_url : str or None
    verify : bool or str
        Check certificates; a string is the path of a file of certificates to trust.
    stores_checksum : bool
        A PUT carries a checksum, which the server keeps.
    only_s3fs : tuple of str
        Settings that obstore does not support, as named in messages; usually empty.
    """

    url: str
    is_virtual_hosted: bool
    region: str
    is_signed: bool
    proxy_url: str | None
    verify: bool | str
    stores_checksum: bool
    only_s3fs: tuple[str, ...]


_answers: dict[tuple[object, ...], Any] = {}
_ANSWERS_KEPT = 64


def _asked_once(ask: Callable[..., T]) -> Callable[..., T]:
    """Cache the answers in this process: the directories of a reader have the same settings.

    The key of the cache has all inputs of botocore: the environment and both files.
    """

    @functools.wraps(ask)
    def answer(*args: Any) -> T:
        read = (k for k in os.environ if k.startswith("AWS_") or k.lower().endswith("_proxy"))
        question = (
            ask.__name__,
            repr(args),
            *(
                (name, os.environ[name])
                for name in sorted((*read, *_ALSO_READ & os.environ.keys()))
            ),
            *aws_files(),
        )
        if question not in _answers:
            if len(_answers) >= _ANSWERS_KEPT:
                _answers.clear()
            _answers[question] = ask(*args)
        found: T = _answers[question]
        return found

    return answer


def aws_files() -> tuple[str, str]:
    """The text of the user's config file and credentials file; empty without one."""

    def text(variable: str, default: str) -> str:
        path = os.path.expanduser(os.environ.get(variable) or default)
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    return (
        text("AWS_CONFIG_FILE", "~/.aws/config"),
        text("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    )


@_asked_once
def configured_endpoint(kwargs: Mapping[str, Any]) -> tuple[str | None, str]:
    """The endpoint that the environment or a file sets, or None; and the partition of the region.

    Raises
    ------
    ConfigError, S3Error
    """
    with _as_config_error():
        client = _client(kwargs)
        aws = _client(kwargs, ignore_configured_endpoint_urls=True)
    url, aws_url = str(client.meta.endpoint_url), aws.meta.endpoint_url
    return (None if url == aws_url else url), str(client.meta.partition)


@_asked_once
def settings_of(kwargs: Mapping[str, Any], bucket: str, region: str | None = None) -> S3Settings:
    """Let botocore resolve the settings of requests to ``bucket``.

    Parameters
    ----------
    kwargs : mapping
        As for ``s3fs.S3FileSystem``.
    bucket : str
    region : str, optional
        The bucket's region, if it is known. Default: the configured one.

    Raises
    ------
    ConfigError
        botocore does not accept a setting.
    S3Error
        There is no such profile.
    """
    with _as_config_error():
        client = _client(kwargs, region)
        request = _prepared(client, bucket)
    url = urlsplit(request.url)
    in_path = url.path.rstrip("/").endswith(f"/{bucket}")
    path = url.path.rstrip("/").removesuffix(f"/{bucket}") if in_path else url.path.rstrip("/")
    scheme, scope = _signature(request)
    beyond = [f"{name} in the environment" for name in _OF_OBSTORE if os.environ.get(name)]
    if scheme not in ("", "AWS4-HMAC-SHA256"):
        beyond.append(f"signature version {client.meta.config.signature_version}")
    elif scheme and scope[3] != "s3":
        beyond.append(f"signatures for {scope[3]}")
    # Older versions of botocore have no such setting, and send no checksum.
    checksum = getattr(client.meta.config, "request_checksum_calculation", "when_required")
    stores = str(checksum).lower() != "when_required"
    if not stores and os.environ.get("AWS_CHECKSUM_ALGORITHM"):
        beyond.append("AWS_CHECKSUM_ALGORITHM in the environment")
    return S3Settings(
        url=f"{url.scheme}://{url.netloc}{path}",
        is_virtual_hosted=not in_path,
        region=scope[2] if len(scope) > 2 else str(client.meta.region_name),
        is_signed=bool(scheme),
        proxy_url=_proxy(client, url.scheme),
        verify=trusted_by(kwargs) if url.scheme == "https" else True,
        stores_checksum=stores,
        only_s3fs=tuple(beyond),
    )


def trusted_by(kwargs: Mapping[str, Any]) -> bool | str:
    """The setting of botocore for certificates, which a client does not show. A string is a path.

    Raises
    ------
    ConfigError, S3Error
    """
    verify = (kwargs.get("client_kwargs") or {}).get("verify")
    if verify is None:
        with _as_config_error():
            verify = _session(kwargs).get_config_variable("ca_bundle")
    if verify is None:
        verify = os.environ.get("REQUESTS_CA_BUNDLE")
    return True if verify is None else verify


def _session(kwargs: Mapping[str, Any]) -> Any:
    import botocore.session

    # A session that the user has made is aiobotocore's, whose clients cannot be asked like this.
    profile = getattr(kwargs.get("session"), "profile", None) or kwargs.get("profile")
    return botocore.session.Session(profile=profile)


def _client(kwargs: Mapping[str, Any], region: str | None = None, **more_config: Any) -> Any:
    """A client with the arguments with which s3fs makes its own, except for the credentials."""
    from botocore import UNSIGNED
    from botocore.config import Config

    client = {
        name: value
        for name, value in (kwargs.get("client_kwargs") or {}).items()
        if name not in _CREDENTIALS
    }
    client.setdefault("use_ssl", kwargs.get("use_ssl", True))
    if kwargs.get("endpoint_url"):
        client["endpoint_url"] = kwargs["endpoint_url"]
    if region is not None:
        client["region_name"] = region
    config = {
        name: value
        for name, value in (kwargs.get("config_kwargs") or {}).items()
        if name not in _AIOBOTOCORE_ONLY
    } | more_config
    config["retries"] = {"total_max_attempts": 1}  # as ours, whatever AWS_MAX_ATTEMPTS says
    if kwargs.get("anon"):
        config["signature_version"] = UNSIGNED
    return _session(kwargs).create_client(
        "s3",
        config=Config(**config),
        aws_access_key_id="not-sent",
        aws_secret_access_key="not-sent",
        **client,
    )


class _NoBody:
    """The body of the answer that `_prepared` gives in place of a server."""

    @staticmethod
    def stream() -> Iterator[bytes]:
        return iter(())


def _prepared(client: Any, bucket: str) -> Any:
    """The first request of a LIST, signed and not sent: a handler of ``before-send`` answers it."""
    from botocore.awsrequest import AWSResponse

    prepared: list[Any] = []

    def answer(request: Any, **_: Any) -> Any:
        prepared.append(request)
        return AWSResponse(request.url, 200, {}, _NoBody())

    client.meta.events.register_first("before-send.s3", answer)
    try:
        client.list_objects_v2(Bucket=bucket)
    except Exception:
        # A directory bucket's first request asks for a session, which the empty answer is not.
        if not prepared:
            raise
    return prepared[0]


def _signature(request: Any) -> tuple[str, list[str]]:
    """The scheme of a signature and its scope: key, date, region, service, "aws4_request"."""
    header = request.headers.get("Authorization", "")
    text = header.decode() if isinstance(header, bytes) else str(header)
    scheme, _, rest = text.partition(" ")
    return scheme, rest.partition("Credential=")[2].partition(",")[0].split("/")


def _proxy(client: Any, scheme: str) -> str | None:
    from botocore.utils import get_environ_proxies

    proxies = client.meta.config.proxies
    if proxies is None:  # as botocore: for the endpoint, whatever the bucket
        proxies = get_environ_proxies(client.meta.endpoint_url)
    url = proxies.get(scheme)
    return f"http://{url}" if url and "://" not in url else url or None


@contextmanager
def _as_config_error() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ConfigParseError, ProfileNotFound

    try:
        yield
    except ProfileNotFound as exc:
        raise S3Error(None, "ProfileNotFound", str(exc)) from exc
    except ConfigParseError as exc:
        raise ConfigError(
            f"an AWS config file cannot be read: {exc}. Correct it, or name another one in "
            "AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE."
        ) from exc
    except (BotoCoreError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"botocore does not accept the S3 settings: {str(exc).rstrip('.')}. Correct "
            "s3_kwargs, the AWS_ variables of the environment, or ~/.aws/config."
        ) from exc
