"""Credentials that expire during a run. They come from a process named in the AWS config, as on
many clusters; both engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import OriginAccessError
from zarrcache.origin import Origin, open_origin
from zarrcache.origin import _requests as retry

BODIES = {f"mp-1.zarr/{i}": bytes([i]) * 100 for i in range(4)}
PROGRAM = """#!/bin/sh
n=$(($(cat {count}) + 1))
echo $n > {count}
expires=$(date -u -d "+{lives_s} seconds" +%Y-%m-%dT%H:%M:%SZ)
printf '{{"Version": 1, "AccessKeyId": "ASIA%04d", "SecretAccessKey": "s", ' $n
printf '"SessionToken": "t%04d", "Expiration": "%s"}}' $n $expires
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    """Retry without waiting."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.02)
    if s3_server.checks_credentials:
        pytest.skip("the credentials are made up")


class Issuer:
    """The process behind ``credential_process``: every call returns new credentials."""

    def __init__(self, root: Path, lives_s: int) -> None:
        self.config = root / "config"
        self._count = root / "count"
        self._count.write_text("0")
        (root / "issue").write_text(PROGRAM.format(count=self._count, lives_s=lives_s))
        self.config.write_text(f"[profile lab]\ncredential_process = /bin/sh {root / 'issue'}\n")

    @property
    def issued(self) -> int:
        return int(self._count.read_text())

    def all_so_far(self) -> str:
        """A regular expression for every key issued so far."""
        return "|".join(f"ASIA{n:04d}/" for n in range(1, self.issued + 1))


@pytest.fixture(params=["obstore", "s3fs"])
def opened(
    request: pytest.FixtureRequest,
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Origin, Issuer]]:
    """``opened(lives_s, **s3_kwargs)``: an origin of four objects with credentials from a
    process.
    """
    client = s3_server.client()
    for key, body in BODIES.items():
        client.put_object(Bucket=bucket, Key=f"data/{key}", Body=body)

    def make(lives_s: int, attempts: int = 3, **s3_kwargs: Any) -> tuple[Origin, Issuer]:
        issuer = Issuer(tmp_path, lives_s)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(issuer.config))
        kwargs = {"endpoint_url": fault_proxy.endpoint_url, **(s3_kwargs or {"profile": "lab"})}
        fetch = FetchConfig(engine=request.param)
        return open_origin(
            f"s3://{bucket}/data",
            s3_kwargs=kwargs,
            fetch=fetch,
            retry=RetryConfig(attempts=attempts),
        ), issuer

    return make


def read(origin: Origin) -> dict[str, bytes]:
    """Everything of one store."""
    return {
        obj.key: bytes(memoryview(body))
        for obj, body in origin.fetch(origin.list_objects("mp-1.zarr/"))
    }


def test_short_lived_credentials_are_renewed_before_they_expire(
    opened: Callable[..., Any], fault_proxy: FaultProxy
) -> None:
    """The run outlives its first credentials, and no request is refused."""
    origin, issuer = opened(lives_s=30)
    assert read(origin) == BODIES
    for _ in range(3):
        fault_proxy.rules(Rule(then="400:ExpiredToken", signed_with=issuer.all_so_far()))
        # obstore asks for them at most every 0.1 s.
        time.sleep(0.15)
        assert read(origin) == BODIES
    assert {s.outcome for s in fault_proxy.seen()} == {"200"}
    assert issuer.issued >= 4


@pytest.mark.parametrize("answer", ["400:ExpiredToken", "403:ExpiredToken", "403:InvalidToken"])
def test_credentials_that_the_server_ends_early_are_renewed(
    opened: Callable[..., Any], fault_proxy: FaultProxy, answer: str
) -> None:
    """They were valid for another hour. Requests in flight are retried with new credentials, which
    serve the rest of the run.
    """
    origin, issuer = opened(lives_s=3600)
    objects = origin.list_objects("mp-1.zarr/")
    assert len(list(origin.fetch(objects))) == len(BODIES)  # with keys that are kept
    before = issuer.issued
    fault_proxy.rules(Rule(then=answer, signed_with=issuer.all_so_far()))
    assert {obj.key: bytes(memoryview(body)) for obj, body in origin.fetch(objects)} == BODIES
    assert issuer.issued > before
    refused = [s for s in fault_proxy.seen("GET") if s.outcome == answer]
    assert 1 <= len(refused) <= len(BODIES)
    assert read(origin) == BODIES  # the LIST may have credentials of its own
    assert [s for s in fault_proxy.seen("GET") if s.outcome == answer] == refused


def test_credentials_that_stay_expired_are_an_error_by_name(
    opened: Callable[..., Any], fault_proxy: FaultProxy
) -> None:
    """After one renewal: two requests, whatever the number of attempts."""
    origin, _ = opened(lives_s=3600, attempts=5)
    objects = origin.list_objects("mp-1.zarr/")[:1]
    fault_proxy.reset()
    fault_proxy.rules(Rule(then="400:ExpiredToken"))
    for ask in (
        lambda: list(origin.fetch(objects)),
        lambda: origin.list_objects("mp-1.zarr/"),
        lambda: origin.fetch_range(objects[0], 0, 9),
    ):
        before = fault_proxy.count()
        with pytest.raises(
            OriginAccessError,
            match=r"access refused: ExpiredToken .* The session token has expired: log in again",
        ):
            ask()
        assert fault_proxy.count() - before == 2


def test_explicit_keys_are_refused_at_once(
    opened: Callable[..., Any], fault_proxy: FaultProxy
) -> None:
    """They cannot be renewed."""
    origin, issuer = opened(lives_s=3600, attempts=5, key="ASIAGIVEN", secret="s", token="t")
    objects = origin.list_objects("mp-1.zarr/")[:1]
    fault_proxy.reset()
    fault_proxy.rules(Rule(then="400:ExpiredToken"))
    with pytest.raises(OriginAccessError, match="access refused: ExpiredToken"):
        list(origin.fetch(objects))
    assert (fault_proxy.count(), issuer.issued) == (1, 0)
