"""A pickle sent to workers holds no secret found in a profile or the environment; each process
looks it up itself.
"""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from tests.support.stores import plain_read, small_group
from zarrcache import RhoData, ZarrDataset, ZarrS3Reader
from zarrcache.convert import plan_convert
from zarrcache.demo.synthetic import write_pairs
from zarrcache.errors import ConfigError
from zarrcache.ops import plan_warm
from zarrcache.origin import open_origin, secret_names


@dataclass(frozen=True)
class Secrets:
    """Strings that must not be in a pickle, and the ``s3_kwargs`` that lead to them."""

    words: tuple[str, ...]
    s3_kwargs: dict[str, Any]


@pytest.fixture(params=["environment", "profile", "profile of the environment"])
def secrets(
    request: pytest.FixtureRequest,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Secrets:
    """Credentials that the server accepts: its own, or, if it accepts any, names that occur nowhere
    else.
    """
    key, secret = ("A-KEY-OF-THIS-TEST", "a-secret-of-this-test")
    if s3_server.checks_credentials:
        key, secret = s3_server.key, s3_server.secret
    kwargs: dict[str, Any] = {"endpoint_url": s3_server.endpoint_url}
    if request.param == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    else:
        (tmp_path / "credentials").write_text(
            f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        if request.param == "profile":
            kwargs["profile"] = "lab"
        else:
            monkeypatch.setenv("AWS_PROFILE", "lab")
    return Secrets((key, secret), kwargs)


@pytest.fixture
def reader_of(s3_server: S3Server, bucket: str, tmp_path: Path) -> Any:
    """``reader_of(s3_kwargs, engine)`` is a reader of two materials on S3."""
    for role, i in itertools.product(("data", "label"), range(2)):
        small_group(
            tmp_path / role / f"mp-{i}.zarr", shape=(4, 4, 4), seed=i + 10 * (role == "label")
        )
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0", "mp-1"]}))

    def make(s3_kwargs: dict[str, Any], engine: str) -> ZarrS3Reader:
        cache = {"dir": tmp_path / engine, "fetch": {"engine": engine}}
        return make_reader(tmp_path, f"s3://{bucket}", s3_kwargs=s3_kwargs, cache=cache)

    return make


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_no_secret_that_was_found_travels(
    reader_of: Any, secrets: Secrets, bucket: str, tmp_path: Path, engine: str
) -> None:
    """In pickles of readers, datasets, caches and origins, before and after their clients are
    opened; the unpickled objects can still read.
    """
    reader = reader_of(secrets.s3_kwargs, engine)
    origin = open_origin(f"s3://{bucket}/data", s3_kwargs=secrets.s3_kwargs)
    for used in (False, True):
        if used:
            reader.load("mp-0", "data")
            group = reader.read_zarr_store(f"s3://{bucket}/label/mp-0.zarr")
            group["charge_density_total"][:2]
            origin.list_names()
        train = reader.data_split()[0]
        for thing in (
            reader,
            reader.cache,
            reader.origin("data"),
            ZarrDataset(reader, "all"),
            RhoData(*train),
            origin,
        ):
            raw = pickle.dumps(thing)
            found = [word for word in secrets.words if word.encode() in raw or word in repr(thing)]
            assert not found, f"{type(thing).__name__}, used: {used}"
    again = pickle.loads(pickle.dumps(reader))
    assert (
        again.load("mp-1", "label")[0] == plain_read(tmp_path / "label" / "mp-1.zarr").ravel()
    ).all()


def test_a_secret_that_was_given_travels_and_is_shown_nowhere(
    reader_of: Any, s3_server: S3Server
) -> None:
    """A worker could not find it elsewhere. No ``repr`` shows it, and such a pickle does not belong
    on a disk.
    """
    secret = s3_server.secret if s3_server.checks_credentials else "a-secret-of-this-test"
    key = s3_server.key if s3_server.checks_credentials else "A-KEY-OF-THIS-TEST"
    reader = reader_of(
        {"endpoint_url": s3_server.endpoint_url, "key": key, "secret": secret}, "s3fs"
    )
    assert secret.encode() in pickle.dumps(reader)
    assert secret not in repr(reader) + repr(vars(reader.origin("data")))


def _pickling_engine(sent: list[bytes]) -> Any:
    """An engine that, as a cluster does, sends the function and the items as pickles."""

    def spread(function: Any, items: Any) -> Any:
        for item in items:
            sent.append(pickle.dumps((function, item)))
            there, again = pickle.loads(sent[-1])
            yield item, there(again, lambda nbytes: None)

    return spread


def test_what_goes_to_a_cluster_holds_no_secret(
    reader_of: Any, secrets: Secrets, bucket: str, tmp_path: Path
) -> None:
    """The functions of ``convert`` and ``warm``; a worker resolves the profile or the environment
    itself.
    """
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    write_pairs(tmp_path / "pairs", 1)
    sent: list[bytes] = []
    plan = plan_convert(
        tmp_path / "pairs" / "label", f"s3://{bucket}/new", s3_kwargs=secrets.s3_kwargs
    )
    assert len(plan.execute(engine=_pickling_engine(sent)).converted) == 1
    warm = plan_warm(reader_of(secrets.s3_kwargs, "s3fs"))
    assert warm.execute(engine=_pickling_engine(sent)).failed == ()
    assert len(sent) == 5
    assert not [word for word in secrets.words for raw in sent if word.encode() in raw]


def test_a_secret_in_s3_kwargs_is_not_sent_to_a_cluster(
    reader_of: Any, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """The error names the option and what to do, and not the value; nothing has been sent."""
    pytest.importorskip("pymatgen", reason="needs the extra 'convert'")
    write_pairs(tmp_path / "pairs", 1)
    sent: list[bytes] = []
    reader = reader_of(s3_server.s3_kwargs, "s3fs")
    plan = plan_convert(
        tmp_path / "pairs" / "label", f"s3://{bucket}/new", s3_kwargs=s3_server.s3_kwargs
    )
    for planned in (plan, plan_warm(reader)):
        with pytest.raises(ConfigError, match=r"s3_kwargs holds secret, .*a profile in") as caught:
            planned.execute(engine=_pickling_engine(sent))
        assert s3_server.secret not in str(caught.value).replace("holds secret", "")
    assert sent == []


@pytest.mark.parametrize(
    ("s3_kwargs", "names"),
    [
        (None, []),
        ({"profile": "lab", "key": "A", "endpoint_url": "https://s3.example.org"}, []),
        ({"secret": None, "anon": True}, []),
        ({"key": "A", "secret": "B", "token": "C"}, ["secret", "token"]),
        ({"username": "A", "password": "B"}, ["password"]),
        (
            {"client_kwargs": {"aws_secret_access_key": "B"}},
            ["client_kwargs.aws_secret_access_key"],
        ),
        (
            {"config_kwargs": {"proxies": {"https": "http://me:pass@proxy:3128"}}},
            ["config_kwargs.proxies.https"],
        ),
        (
            {"s3_additional_kwargs": {"SSECustomerKey": "B"}},
            ["s3_additional_kwargs.SSECustomerKey"],
        ),
        ({"session": object()}, ["session"]),
    ],
)
def test_secrets_are_found_at_any_depth(s3_kwargs: Any, names: list[str]) -> None:
    assert secret_names(s3_kwargs) == names
