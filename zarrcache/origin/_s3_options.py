"""Parse ``s3_kwargs`` (the arguments of ``s3fs.S3FileSystem``) for both engines. No connections."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from zarrcache.errors import ConfigError

__all__ = [
    "AWS_ENDPOINT",
    "S3Options",
    "configured_endpoint",
    "split_s3_url",
    "stores_checksum",
]

#: Identity of an origin without ``endpoint_url``. Bucket names are unique over all regions, so the
#: region is not part of it.
AWS_ENDPOINT = "https://s3.amazonaws.com"

_ALIASES = {"username": "key", "password": "secret"}
_CLIENT_ALIASES = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
}
#: Options of s3fs that do not affect reading and writing whole objects.
_IRRELEVANT = frozenset(
    "default_block_size default_fill_cache default_cache_type max_concurrency fixed_upload_size "
    "local_expiry_check "
    "use_listings_cache listings_expiry_time max_paths skip_instance_cache".split()
)
_READ_HERE = (
    frozenset(
        "anon key secret token profile endpoint_url use_ssl requester_pays client_kwargs "
        "config_kwargs".split()
    )
    | _ALIASES.keys()
)
_KNOWN = (
    _READ_HERE
    | _IRRELEVANT
    | frozenset(
        "version_aware s3_additional_kwargs session cache_regions asynchronous loop".split()
    )
)
#: botocore settings that obstore does not need or that ``cache.fetch`` sets.
_IRRELEVANT_CONFIG = frozenset(
    "retries max_pool_connections connect_timeout read_timeout tcp_keepalive user_agent "
    "user_agent_extra user_agent_appid "
    "request_checksum_calculation response_checksum_validation parameter_validation".split()
)


@dataclass(frozen=True)
class S3Options:
    """The settings of ``s3_kwargs``, the environment and the user's AWS config file.

    Attributes
    ----------
    kwargs : dict
        ``s3_kwargs`` as given, for s3fs.
    endpoint_url : str or None
        None: AWS.
    region : str or None
        For signatures. None, only with AWS: the bucket's region, which one request finds.
    virtual_hosted : bool or None
        None: path style for a given endpoint, virtual hosts for AWS.
    verify : bool or str
        Check certificates; a string is the path of a file of certificates to trust.
    only_s3fs : tuple of str
        Names of the settings that obstore does not support; usually empty.
    """

    kwargs: dict[str, Any] = field(repr=False)
    endpoint_url: str | None = None
    region: str | None = None
    anon: bool = False
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: str | None = None
    requester_pays: bool = False
    use_ssl: bool = True
    verify: bool | str = True
    virtual_hosted: bool | None = None
    only_s3fs: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """The endpoint, for ``ArrayKey.origin``."""
        return (self.endpoint_url or AWS_ENDPOINT).rstrip("/")

    @classmethod
    def of(
        cls, s3_kwargs: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ
    ) -> S3Options:
        """Read ``s3_kwargs``.

        Raises
        ------
        ConfigError
            An option is a misspelling of a known one or has the wrong type, a key has no secret, or
            a certificate file does not exist.
        """
        given = dict(s3_kwargs or {})
        for name in given.keys() - _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.75)
            if near:
                raise ConfigError(
                    f"s3_kwargs.{name} is not an option of s3fs. Did you mean {near[0]!r}?"
                )
        client, config = _mapping(given, "client_kwargs"), _mapping(given, "config_kwargs")

        def first(name: str) -> Any:
            # In the order of s3fs: its own argument, its alias, then the client's argument.
            aliases = [a for a, n in _ALIASES.items() if n == name]
            in_client = [a for a, n in _CLIENT_ALIASES.items() if n == name] or [name]
            for source, key in [
                (given, name),
                *((given, a) for a in aliases),
                *((client, a) for a in in_client),
            ]:
                if source.get(key) is not None:
                    return source[key]
            return None

        key, secret = first("key"), first("secret")
        if (key is None) != (secret is None) and not given.get("anon"):
            given_name, absent = ("key", "secret") if secret is None else ("secret", "key")
            raise ConfigError(
                f"s3_kwargs has {given_name} but not {absent}. Give both, or neither and a profile."
            )
        profile = given.get("profile")
        endpoint_url = _endpoint(first("endpoint_url") or configured_endpoint(profile, environ))
        region = client.get("region_name") or config.get("region_name")
        if region is None and endpoint_url is not None:
            region = configured_region(profile, environ) or "us-east-1"
        verify = client.get("verify")
        if verify is None:
            verify = environ.get("AWS_CA_BUNDLE") or True
        if isinstance(verify, str) and not os.access(verify, os.R_OK):
            raise ConfigError(
                f"the certificate file {verify} cannot be read. Correct client_kwargs.verify in "
                "s3_kwargs, or AWS_CA_BUNDLE."
            )
        style = _mapping(config, "s3").get("addressing_style")
        return cls(
            kwargs=given,
            endpoint_url=endpoint_url,
            region=region,
            anon=bool(given.get("anon", False)),
            key=key,
            secret=secret,
            token=first("token"),
            profile=profile,
            requester_pays=bool(given.get("requester_pays", False)),
            use_ssl=bool(client.get("use_ssl", given.get("use_ssl", True))),
            verify=verify,
            virtual_hosted={"virtual": True, "path": False}.get(str(style)),
            only_s3fs=_beyond_obstore(given, client, config),
        )


def configured_endpoint(profile: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The endpoint that the environment or the AWS config file sets for botocore, or None."""
    if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if environ.get(name):
            return environ[name]
    config, section = _configured(profile, environ)
    services = config.get("services", {}).get(section.get("services"), {})
    for found in (services.get("s3"), section):
        if isinstance(found, dict) and found.get("endpoint_url"):
            return str(found["endpoint_url"])
    return None


def configured_region(profile: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The region that the environment or the AWS config file sets for botocore, or None."""
    return environ.get("AWS_DEFAULT_REGION") or _configured(profile, environ)[1].get("region")


def stores_checksum(options: S3Options, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether botocore would send a checksum with each PUT, which the server stores.

    It does unless ``request_checksum_calculation`` is ``when_required``, for servers that do not
    support checksums.
    """
    name = "request_checksum_calculation"
    given = _mapping(options.kwargs, "config_kwargs").get(name)
    setting = given or environ.get(f"AWS_{name.upper()}")
    if setting is None:
        setting = _configured(options.profile, environ)[1].get(name)
    return str(setting).lower() != "when_required"


def _configured(
    profile: str | None, environ: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The user's AWS config file and its section for the profile; empty without a file."""
    path = os.path.expanduser(environ.get("AWS_CONFIG_FILE", "~/.aws/config"))
    if not os.path.isfile(path):
        return {}, {}
    # botocore's parser, because sections nest ("s3 =\n  endpoint_url = ..."). Imported here because
    # that takes 30 ms and most users have no such file.
    from botocore.configloader import load_config
    from botocore.exceptions import BotoCoreError

    try:
        config = load_config(path)
    except BotoCoreError as exc:
        raise ConfigError(
            f"the AWS config file {path} cannot be read: {exc}. Correct it, or name another one in "
            "AWS_CONFIG_FILE."
        ) from exc
    name = profile or environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    return config, config.get("profiles", {}).get(name, {})


def split_s3_url(url: str) -> tuple[str, str]:
    """Split ``s3://bucket/some/prefix/`` into ``("bucket", "some/prefix")``.

    Raises
    ------
    ConfigError
        The URL has no bucket, or an ARN in place of it.
    """
    rest = url.removeprefix("s3://")
    bucket, _, prefix = rest.partition("/")
    if bucket.startswith("arn:"):
        raise ConfigError(
            f"{url} names an access point by its ARN. Write its alias instead: s3://<alias>/prefix "
            "(aws s3control list-access-points shows it)."
        )
    if not bucket:
        raise ConfigError(f"{url!r} names no bucket. Write s3://bucket/prefix.")
    return bucket, prefix.strip("/")


def _mapping(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = source.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} in s3_kwargs is a {type(value).__name__}; it has to be a mapping of keys and "
            "values."
        )
    return dict(value)


def _endpoint(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith(("http://", "https://")):
        raise ConfigError(
            f"s3_kwargs.endpoint_url is {value!r}; it has to begin with http:// or https://."
        )
    if "@" in urlsplit(value).netloc:
        raise ConfigError(
            "s3_kwargs.endpoint_url holds a user name. Give it as key and secret: endpoint_url is "
            "shown in messages and kept on disk."
        )
    return value.rstrip("/")


def _beyond_obstore(
    given: Mapping[str, Any], client: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, ...]:
    beyond = [
        name for name, value in given.items() if name not in _READ_HERE | _IRRELEVANT and value
    ]
    known_client = {"endpoint_url", "region_name", "verify", "use_ssl", *_CLIENT_ALIASES}
    beyond += [
        f"client_kwargs.{name}"
        for name, value in client.items()
        if name not in known_client and value is not None
    ]
    for name, value in config.items():
        if name == "s3" and isinstance(value, Mapping):
            beyond += [
                f"config_kwargs.s3.{k}"
                for k, v in value.items()
                if (k, v) not in {("addressing_style", s) for s in ("auto", "path", "virtual")}
            ]
        elif name == "signature_version":
            beyond += [] if value in ("s3v4", "v4", None) else ["config_kwargs.signature_version"]
        elif name not in _IRRELEVANT_CONFIG and name != "region_name":
            beyond.append(f"config_kwargs.{name}")
    return tuple(sorted(beyond))
