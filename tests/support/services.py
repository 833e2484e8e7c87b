"""botocore's descriptions of services, parsed once per process and its forks: parsing costs 150 ms
of CPU per s3fs client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import botocore.session

__all__ = ["parse_s3", "sharing_loader"]


def sharing_loader() -> Callable[..., Any]:
    """Replaces ``botocore.session.create_loader``."""
    create, loaders = botocore.session.create_loader, dict[str | None, Any]()
    return lambda path=None: loaders.setdefault(path, create(path))


def parse_s3() -> None:
    """Parse what a client of S3 needs. Nothing is opened."""
    botocore.session.Session().create_client(
        "s3", "us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
    )
