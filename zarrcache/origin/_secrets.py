"""Find secrets in ``s3_kwargs``, so that they are not sent where others can read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from zarrcache.errors import ConfigError

__all__ = ["refuse_secrets", "secret_names"]

_SECRET = re.compile(r"secret|passw|token|customerkey|credential", re.IGNORECASE)
_USER_IN_URL = re.compile(r"://[^/@\s]+@")


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
