"""A listing decides what is absent, so one that may be incomplete is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.support.gateway import BUCKET, INCOMPLETE, Gateway, running_gateway
from tests.support.readers import make_reader
from tests.support.stores import plain_read, small_group
from zarrcache import open_store
from zarrcache.config import FetchConfig, RetryConfig
from zarrcache.errors import IncompleteArrayError, OriginError, OriginNotFoundError, ZarrCacheError
from zarrcache.origin import Origin, open_origin

ENGINES = ("obstore", "s3fs")
NAMES = [f"mp-{i}.zarr" for i in range(7)]


@pytest.fixture
def gateway(tmp_path: Path) -> Any:
    """Seven stores of one object each, three names per page."""
    for name in NAMES:
        (tmp_path / "bucket" / "data" / name).mkdir(parents=True)
        (tmp_path / "bucket" / "data" / name / "0").write_bytes(b"x")
    with running_gateway(tmp_path / "bucket", page=3) as server:
        yield server


def opened(gateway: Gateway, url: str = f"s3://{BUCKET}/data", engine: str = "obstore") -> Origin:
    return open_origin(
        url,
        s3_kwargs=gateway.s3_kwargs,
        fetch=FetchConfig(engine=engine),
        retry=RetryConfig(attempts=2),
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", INCOMPLETE)
def test_listing_that_may_be_incomplete_is_an_error(
    gateway: Gateway, fault: str, engine: str
) -> None:
    """With and without a delimiter; the message names the URL and the endpoint."""
    gateway.fault = fault
    origin = opened(gateway, engine=engine)
    for ask in (origin.list_objects, origin.list_names):
        with pytest.raises(OriginError, match="is not known to be complete") as caught:
            ask()
        assert not isinstance(caught.value, (FileNotFoundError, KeyError))
        assert f"s3://{BUCKET}/data" in str(caught.value)
        assert gateway.s3_kwargs["endpoint_url"] in str(caught.value)


@pytest.mark.parametrize("fault", ["", "token_only"])
def test_pages_are_followed_to_the_end(gateway: Gateway, fault: str) -> None:
    """Also if only the token says that there are more."""
    gateway.fault = fault
    assert opened(gateway).list_names() == NAMES
    assert [o.key for o in opened(gateway).list_objects()] == [f"{name}/0" for name in NAMES]


@pytest.mark.parametrize("fault", ["no_size", "negative_size"])
def test_object_without_a_size_is_an_error_of_the_origin(gateway: Gateway, fault: str) -> None:
    gateway.fault = fault
    with pytest.raises(OriginError, match="names an object without its key or size"):
        opened(gateway).list_objects()


def test_last_page_may_be_full(gateway: Gateway) -> None:
    """One more LIST shows that nothing follows; none is needed for a page with room."""
    gateway.page = len(NAMES)
    assert opened(gateway).list_names() == NAMES
    assert gateway.lists == 2
    gateway.page += 1
    assert opened(gateway).list_names() == NAMES
    assert gateway.lists == 3


def test_prefix_without_objects_is_absent(gateway: Gateway) -> None:
    """An empty listing that is complete proves it."""
    assert opened(gateway).list_objects("mp-99.zarr/") == []
    with pytest.raises(OriginNotFoundError):
        opened(gateway, f"s3://{BUCKET}/label").list_names()


@pytest.mark.parametrize("engine", ENGINES)
def test_name_that_is_listed_twice_does_not_stand_for_an_absent_chunk(
    tmp_path: Path, engine: str
) -> None:
    root = tmp_path / "bucket" / "data"
    small_group(root / "mp-1.zarr", chunks=(4, 4, 4))
    with running_gateway(tmp_path / "bucket") as gateway:
        gateway.fault = "names_twice"
        config = {"fetch": {"engine": engine}, "revalidate": "epoch"}
        reader = make_reader(tmp_path, f"s3://{BUCKET}", s3_kwargs=gateway.s3_kwargs, cache=config)
        wanted = plain_read(root / "mp-1.zarr")
        values, gridsize = reader.load("mp-1", "data")
        assert np.array_equal(values.reshape(gridsize), wanted)
        next(root.glob("mp-1.zarr/charge_density_total/[0-9]*")).unlink()
        with pytest.raises(IncompleteArrayError, match=r" 1 of \d+ chunks are absent"):
            reader.load("mp-1", "data")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", ["no_token", "one_page", "counts_more", "empty_body"])
def test_density_is_never_filled_up_from_an_incomplete_listing(
    tmp_path: Path, engine: str, fault: str
) -> None:
    """Neither by a reader nor by a zarr group; right values come when the server is repaired."""
    root = tmp_path / "bucket" / "data"
    small_group(root / "mp-1.zarr", chunks=(4, 4, 4))
    config = {"dir": tmp_path / "cache", "min_free": 0, "fetch": {"engine": engine}}
    with running_gateway(tmp_path / "bucket", page=5) as gateway:
        reader = make_reader(tmp_path, f"s3://{BUCKET}", s3_kwargs=gateway.s3_kwargs, cache=config)
        assert reader.store_names("data") == {"mp-1": "mp-1.zarr"}
        gateway.fault = fault
        with pytest.raises(OriginError, match="is not known to be complete"):
            reader.load("mp-1", "data")
        store = open_store(
            f"s3://{BUCKET}/data/mp-1.zarr", s3_kwargs=gateway.s3_kwargs, cache=config
        )
        with pytest.raises(ZarrCacheError, match="is not known to be complete"):
            zarr.open_group(store, mode="r")
        gateway.fault = ""
        wanted = plain_read(root / "mp-1.zarr")
        values, gridsize = reader.load("mp-1", "data")
        assert np.array_equal(values.reshape(gridsize), wanted)
        group = zarr.open_group(store, mode="r")
        assert np.array_equal(group["charge_density_total"][...], wanted)
