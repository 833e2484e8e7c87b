"""Read ``s3_kwargs`` (the arguments of ``s3fs.S3FileSystem``) for both engines, and find secrets.

Nothing connects.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fsspec.config import conf as fsspec_defaults

from zarrcache.errors import ConfigError
from zarrcache.origin import _botocore

__all__ = [
    "AWS_ENDPOINT",
    "S3Options",
    "check_certificates",
    "refuse_secrets",
    "secret_names",
    "split_s3_url",
    "typed_kwargs",
]

#: Identity of an origin without an endpoint. Bucket names are unique over all regions of a
#: partition, so the region is not part of it.
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
_OF_CLIENT = frozenset({"endpoint_url", "region_name", "verify", "use_ssl", *_CLIENT_ALIASES})
#: botocore settings that obstore does not need or that ``cache.fetch`` sets.
_IRRELEVANT_CONFIG = frozenset(
    "retries max_pool_connections connect_timeout read_timeout tcp_keepalive user_agent "
    "user_agent_extra user_agent_appid defaults_mode "
    "response_checksum_validation parameter_validation".split()
)
#: botocore settings whose effect is seen in the request that `_botocore.settings_of` prepares.
_ASKED_CONFIG = frozenset(
    "region_name signature_version s3 proxies use_dualstack_endpoint use_fips_endpoint "
    "ignore_configured_endpoint_urls request_checksum_calculation".split()
)

_NESTED = frozenset(
    "client_kwargs config_kwargs config_kwargs.s3 config_kwargs.retries config_kwargs.proxies "
    "config_kwargs.proxies_config".split()
)
#: Settings that are true or false, and settings that are numbers.
_TRUTH = frozenset(
    "anon use_ssl requester_pays version_aware cache_regions default_fill_cache asynchronous "
    "use_listings_cache skip_instance_cache fixed_upload_size local_expiry_check "
    "tcp_keepalive parameter_validation inject_host_prefix use_dualstack_endpoint "
    "use_fips_endpoint ignore_configured_endpoint_urls disable_request_compression "
    "s3_disable_express_session_auth use_accelerate_endpoint payload_signing_enabled "
    "use_arn_region proxy_use_forwarding_for_https".split()
)
_NUMBERS = frozenset(
    "default_block_size max_concurrency listings_expiry_time max_paths connect_timeout "
    "read_timeout max_pool_connections max_attempts total_max_attempts "
    "request_min_compression_size_bytes".split()
)
_SECRET = re.compile(r"secret|passw|token|customerkey|credential", re.IGNORECASE)
_USER_IN_URL = re.compile(r"://[^/@\s]+@")
#: As in the other keys of a config.
_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
#: The regions of the partition "aws", as botocore recognises them.
_PUBLIC_REGION = re.compile(r"(us|eu|ap|sa|ca|me|af|il|mx)-[a-z]+-\d+")


@dataclass(frozen=True)
class S3Options:
    """``s3_kwargs`` and the endpoint of their requests.

    Attributes
    ----------
    kwargs : dict
        ``s3_kwargs`` for s3fs, with fsspec's own defaults for it, and truth values and numbers that
        were given as text.
    endpoint_url : str or None
        None: AWS.
    partition : str
        AWS's group of regions, within which the names of buckets are unique.
    region : str or None
        The region that ``s3_kwargs`` name.
    only_s3fs : tuple of str
        Names in ``s3_kwargs`` that obstore does not support; usually empty.
    """

    kwargs: dict[str, Any] = field(repr=False)
    endpoint_url: str | None = None
    partition: str = "aws"
    region: str | None = None
    anon: bool = False
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: str | None = None
    requester_pays: bool = False
    use_ssl: bool = True
    only_s3fs: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """The endpoint, for ``ArrayKey.origin``."""
        if self.endpoint_url is not None:
            return self.endpoint_url
        return AWS_ENDPOINT if self.partition == "aws" else f"{AWS_ENDPOINT} ({self.partition})"

    @property
    def pinned_kwargs(self) -> dict[str, Any]:
        """``kwargs`` with which every process, on any node, finds the endpoint of ``identity``."""
        if self.endpoint_url is not None:
            return {**self.kwargs, "endpoint_url": self.endpoint_url}
        config = {**_mapping(self.kwargs, "config_kwargs"), "ignore_configured_endpoint_urls": True}
        return {**self.kwargs, "config_kwargs": config}

    @classmethod
    def of(cls, s3_kwargs: Mapping[str, Any] | None) -> S3Options:
        """Read ``s3_kwargs``, and find the endpoint.

        Raises
        ------
        ConfigError
            An option is a misspelling of a known one or has the wrong type, a key has no secret, or
            a certificate file does not exist.
        S3Error
            The profile that may name the endpoint does not exist.
        """
        given = typed_kwargs(s3_kwargs)
        for name in given.keys() - _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.75)
            if near:
                raise ConfigError(
                    f"s3_kwargs.{name} is not an option of s3fs. Did you mean {near[0]!r}?"
                )
        client, config = _mapping(given, "client_kwargs"), _mapping(given, "config_kwargs")
        _mapping(config, "s3")

        def first(name: str) -> Any:
            # In the order of s3fs: its own argument, its alias, then the client's argument.
            aliases = [a for a, n in _ALIASES.items() if n == name]
            in_client = [a for a, n in _CLIENT_ALIASES.items() if n == name] or [name]
            found = {
                path: source[key]
                for path, source, key in [
                    (name, given, name),
                    *((a, given, a) for a in aliases),
                    *((f"client_kwargs.{a}", client, a) for a in in_client),
                ]
                if source.get(key) is not None
            }
            if any(value != next(iter(found.values())) for value in found.values()):
                raise ConfigError(
                    f"s3_kwargs has different values for {' and '.join(found)}. Remove one of them."
                )
            return next(iter(found.values()), None)

        key, secret, token = first("key"), first("secret"), first("token")
        for name, value in (("key", key), ("secret", secret), ("token", token)):
            if value is not None and not isinstance(value, str):
                raise ConfigError(
                    f"s3_kwargs.{name} is of type {type(value).__name__}; it has to be text. Write "
                    "it in quotes."
                )
        if (key is None) != (secret is None) and not given.get("anon"):
            given_name, absent = ("key", "secret") if secret is None else ("secret", "key")
            raise ConfigError(
                f"s3_kwargs has {given_name} but not {absent}. Give both, or neither and a profile."
            )
        region = client.get("region_name") or config.get("region_name")
        endpoint_url, partition = _endpoint(first("endpoint_url"), "s3_kwargs.endpoint_url"), "aws"
        if endpoint_url is None:
            found = _without_asking(region, config)
            configured, partition = found or _botocore.configured_endpoint(given)
            endpoint_url = _endpoint(configured, "the endpoint_url of the environment or ~/.aws")
        check_certificates(client.get("verify"))
        return cls(
            kwargs=given,
            endpoint_url=endpoint_url,
            partition=partition if endpoint_url is None else "aws",
            region=region,
            anon=bool(given.get("anon", False)),
            key=key,
            secret=secret,
            token=first("token"),
            profile=given.get("profile"),
            requester_pays=bool(given.get("requester_pays", False)),
            use_ssl=bool(client.get("use_ssl", given.get("use_ssl", True))),
            only_s3fs=_beyond_obstore(given, client, config),
        )


def typed_kwargs(s3_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """``s3_kwargs`` with fsspec's defaults (``FSSPEC_S3_...``), and values of the types they need.

    A variable of the environment is text, and the text "false" is true to Python. An empty text
    is a setting that is not given.

    Raises
    ------
    ConfigError
        A text is neither of the values that the setting has.
    """
    defaults = {k: v for name in ("s3", "s3a") for k, v in fsspec_defaults.get(name, {}).items()}
    given = {**defaults, **(s3_kwargs or {})}
    return {
        name: typed for name, value in given.items() if (typed := _typed(name, value)) is not None
    }


def _typed(path: str, value: Any) -> Any:
    name = path.rpartition(".")[2]
    if isinstance(value, Mapping) and path in _NESTED:
        of = {str(k): _typed(f"{path}.{k}", v) for k, v in value.items()}
        return {k: v for k, v in of.items() if v is not None}
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not text:
        return None
    if name in _TRUTH or (name == "verify" and text.lower() in _WORDS):
        if text.lower() not in _WORDS:
            raise ConfigError(f"s3_kwargs.{path} is {value!r}; write true or false.")
        return _WORDS[text.lower()]
    if name in _NUMBERS:
        try:
            return float(text) if "." in text else int(text)
        except ValueError:
            raise ConfigError(f"s3_kwargs.{path} is {value!r}; write a number.") from None
    return value


def check_certificates(verify: bool | str | None) -> None:
    """Raise ConfigError if ``verify`` names a file without certificates."""
    if not isinstance(verify, str):
        return
    import ssl  # imported here because few readers name a file

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(verify)
    except OSError as exc:  # an SSLError is one
        raise ConfigError(
            f"the certificate file {verify} cannot be read ({exc.strerror or exc}). It has to be a "
            "file of certificates (PEM). Correct client_kwargs.verify in s3_kwargs, AWS_CA_BUNDLE "
            "or REQUESTS_CA_BUNDLE, or ca_bundle in ~/.aws/config."
        ) from exc


def _without_asking(region: str | None, config: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """The configured endpoint and the partition in the plain cases; None: ask botocore.

    The cases are: a variable of the environment sets the endpoint and nothing can switch that off;
    or nothing sets an endpoint and every region is in AWS's public partition. The AWS files are
    only searched for words; if one of them occurs, botocore finds out whether it applies.
    """
    environ = os.environ
    if "ignore_configured_endpoint_urls" in config or environ.get(
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"
    ):
        return None
    text = "\n".join(_botocore.aws_files()).lower()
    if "ignore_configured_endpoint_urls" in text:
        return None
    set_endpoints = [environ[n] for n in _ENDPOINT_VARIABLES if n in environ]
    if set_endpoints:
        return (set_endpoints[0], "aws") if all(set_endpoints) else None
    regions = [region or "", environ.get("AWS_DEFAULT_REGION", ""), environ.get("AWS_REGION", "")]
    regions += re.findall(r"region\s*=\s*(\S*)", text)
    if "endpoint_url" in text or not all(_PUBLIC_REGION.fullmatch(r) for r in regions if r):
        return None
    return None, "aws"


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


def _endpoint(value: Any, name: str) -> str | None:
    if value is None:
        return None
    for mark, what in (("@", "a user name"), ("?", "a query"), ("#", "a fragment")):
        if isinstance(value, str) and mark in value:
            raise ConfigError(
                f"{name} holds {what}. Give credentials as key and secret: endpoint_url is "
                "shown in messages and kept on disk."
            )
    if not isinstance(value, str) or not value.startswith(("http://", "https://")):
        raise ConfigError(f"{name} is {value!r}; it has to begin with http:// or https://.")
    return value.rstrip("/")


def _beyond_obstore(
    given: Mapping[str, Any], client: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, ...]:
    beyond = [
        name for name, value in given.items() if name not in _READ_HERE | _IRRELEVANT and value
    ]
    beyond += [
        f"client_kwargs.{name}"
        for name, value in client.items()
        if name not in _OF_CLIENT and value is not None
    ]
    beyond += [
        f"config_kwargs.{name}"
        for name, value in config.items()
        if name not in _ASKED_CONFIG | _IRRELEVANT_CONFIG and value is not None
    ]
    return tuple(sorted(beyond))


# -- secrets
# --------------------------------------------------------------------------------------------------


def secret_names(s3_kwargs: Mapping[str, Any] | None) -> list[str]:
    """Names of the options that hold a secret, at any depth, dotted: ``client_kwargs.proxy``."""
    return sorted(_secrets(s3_kwargs or {}, ""))


def _secrets(options: Mapping[str, Any], above: str) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value, f"{above}{name}.")
        elif value is not None and (
            _SECRET.search(str(name))
            or name == "session"  # an object with credentials
            or (isinstance(value, str) and _USER_IN_URL.search(value))
        ):
            yield f"{above}{name}"


def refuse_secrets(s3_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse options that must not be sent to a cluster.

    A Dask scheduler keeps what it distributes, sends it in clear unless TLS is set up, and its
    workers may spill it to their disks.

    Raises
    ------
    ConfigError
        Names the options, without their values.
    """
    names = secret_names(s3_kwargs)
    if names:
        raise ConfigError(
            f"s3_kwargs holds {' and '.join(names)}, which would pass through the scheduler of the "
            "cluster in clear and may be written to disks of its workers. Remove it, and give the "
            "workers credentials of their own: a profile in ~/.aws/credentials (s3_kwargs: "
            "{profile: NAME}), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in their environment, "
            "or the role of the machine."
        )
