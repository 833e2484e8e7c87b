"""Both tiers of one directory: what they share, and the listings that they keep."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest

from tests.support.cachedirs import array_of, key_of, settings
from tests.support.interleaved import interleaved
from tests.support.stores import small_group
from zarrcache.cache.cache import Cache
from zarrcache.stats import Counters


def test_same_arguments_give_the_same_origin(tmp_path: Path) -> None:
    """An origin holds connections."""
    cache = Cache(None, Counters())
    assert cache.origin(str(tmp_path)) is cache.origin(str(tmp_path))
    assert cache.origin("s3://b/x", {"key": "a", "secret": "b"}) is not cache.origin(
        "s3://b/x", {"key": "a", "secret": "c"}
    )


def test_without_a_cache_there_are_no_tiers(tmp_path: Path) -> None:
    """Nor stored listings."""
    cache = Cache(None, Counters())
    origin = cache.origin(str(tmp_path))
    assert (cache.index, cache.arrays, cache.bytes(origin)) == (None, None, None)
    cache.store_listing(origin, "mp-1.zarr", {"a": 1})
    cache.forget_listing(origin, "mp-1.zarr")
    assert cache.stored_listing(origin, "mp-1.zarr") is None


def test_both_tiers_have_one_limit(tmp_path: Path) -> None:
    small_group(tmp_path / "data" / "mp-1.zarr")
    cache = Cache(settings(tmp_path, limit=8192), Counters())
    assert cache.arrays is not None
    assert cache.arrays.put(key_of(1), array_of(1), source="s")
    origin = cache.origin(str(tmp_path / "data"))
    tier = cache.bytes(origin)
    assert tier is not None
    tier.read(origin.list_objects("mp-1.zarr/")[0])
    assert cache.index is not None
    assert set(cache.index.totals()) == {"array"}


@pytest.mark.parametrize("arrays", [True, False])
def test_listing_is_kept_by_origin_and_name(tmp_path: Path, arrays: bool) -> None:
    """Also with the array tier switched off: without listings no run starts offline."""
    cache = Cache(settings(tmp_path, arrays={"enabled": arrays}), Counters())
    one, two = cache.origin(str(tmp_path / "one")), cache.origin(str(tmp_path / "two"))
    cache.store_listing(one, "", {"mp-1": "mp-1.zarr", "ü": 1})
    again = pickle.loads(pickle.dumps(cache))
    assert again.stored_listing(one, "") == {"mp-1": "mp-1.zarr", "ü": 1}
    assert again.stored_listing(one, "mp-1.zarr") is None
    assert again.stored_listing(two, "") is None
    again.forget_listing(one, "")
    assert cache.stored_listing(one, "") is None


def test_unusable_directory_is_no_listing_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("in the way")
    cache = Cache(settings(tmp_path), Counters())
    origin = cache.origin(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        cache.store_listing(origin, "", {})
        cache.forget_listing(origin, "")
        assert cache.stored_listing(origin, "") is None
    assert cache.counters.snapshot().cache_errors == 2


def test_a_directory_that_is_replaced_under_a_running_job_raises_nothing(tmp_path: Path) -> None:
    """Forgetting a listing is not worth an error."""
    cache = Cache(settings(tmp_path), Counters())
    origin = cache.origin(str(tmp_path))
    cache.store_listing(origin, "mp-1.zarr", {"a": 1})
    root = tmp_path / "cache" / "zarrcache-v1"
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    cache = Cache(settings(tmp_path), Counters())
    cache.forget_listing(origin, "mp-1.zarr")
    assert cache.stored_listing(origin, "mp-1.zarr") is None


def test_another_thread_gets_its_own_listing(tmp_path: Path) -> None:
    """The last one that was parsed is kept, because input and label often have the same."""
    cache = Cache(settings(tmp_path), Counters())
    one, two = cache.origin(str(tmp_path / "one")), cache.origin(str(tmp_path / "two"))
    for origin in (one, two):
        cache.store_listing(origin, "", [origin.url])
    found = interleaved(
        Cache.stored_listing,
        lambda: cache.stored_listing(one, ""),
        lambda: cache.stored_listing(two, ""),
    )
    assert {tuple(listing) for listing in found} == {(one.url,)}
