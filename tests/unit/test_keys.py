"""Identities and digests: what is equal, what must never be, and which names are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zarrcache._keys import (
    ArrayKey,
    BlockKey,
    ObjectInfo,
    check_task_id,
    check_task_ids,
    source_digest,
)
from zarrcache.errors import ConfigError

KEY = ArrayKey("https://s3.example.org", "s3://bucket/label/mp-1.zarr", "charge_density_total")
OBJECT = ObjectInfo(
    "mp-1.zarr/charge_density_total/0.0.0", 1234, "5d41402abc4b2a76b9719d911017c592", 17.0
)


def test_digests_are_frozen() -> None:
    """Another digest for the same thing would make every entry on every disk a miss: that is a new
    FORMAT_VERSION.
    """
    assert KEY.digest == "97b3d87633da3a8cf3d369d9964a650f"
    assert source_digest([OBJECT]) == "31fcf2fb78e78e3ea834ade5ea9c542c"
    assert BlockKey("o", "u", OBJECT).digest == "350cc9471729be533b71b47444166dee"
    assert BlockKey("o", "u", OBJECT, 1, 65536).digest == "81a0d47c3c515de253d519dfc91860f4"


@pytest.mark.parametrize(
    "change",
    [{"origin": "file"}, {"url": "s3://bucket/label/mp-2.zarr"}, {"array": "charge_density_diff"}],
)
def test_array_key_differs_in_every_part(change: dict[str, str]) -> None:
    """The same URL on two endpoints is two things."""
    assert replace(KEY, **change).digest != KEY.digest


def test_parts_of_a_digest_do_not_run_into_each_other() -> None:
    """("ab", "c") is not ("a", "bc")."""
    assert ArrayKey("o", "ab", "c").digest != ArrayKey("o", "a", "bc").digest


@pytest.mark.parametrize(
    "change", [{"key": "mp-1.zarr/.zattrs"}, {"size_bytes": 1235}, {"etag": "x"}]
)
def test_changed_object_is_another_block_key(change: dict[str, object]) -> None:
    """A new ETag is a new entry; the old one is never served for it."""
    changed = replace(OBJECT, **change)  # type: ignore[arg-type]
    assert BlockKey("o", "u", changed).digest != BlockKey("o", "u", OBJECT).digest
    assert source_digest([changed]) != source_digest([OBJECT])


def test_block_of_another_size_is_another_entry() -> None:
    """Block 1 of 64 KiB and block 1 of 4 MiB are different bytes."""
    digests = {
        BlockKey("o", "u", OBJECT, number, size).digest
        for number in (0, 1)
        for size in (65536, 1 << 22)
    }
    assert len(digests | {BlockKey("o", "u", OBJECT).digest}) == 5


def test_source_digest_ignores_order_and_clock() -> None:
    """Equal digests mean "nothing changed", whatever order the listing has and whatever the clock
    says.
    """
    other = ObjectInfo("mp-1.zarr/.zarray", 300, "e")
    assert source_digest([OBJECT, other]) == source_digest(
        [other, replace(OBJECT, modified_s=99.0)]
    )
    assert source_digest([OBJECT]) != source_digest([OBJECT, other])


@pytest.mark.parametrize("task_id", ["mp-1", "mvc-12345", "A_1.b+c=d@e", "0", "two words"])
def test_plain_name_is_a_task_id(task_id: str) -> None:
    """It comes back as it was given."""
    assert check_task_id(task_id) == task_id
    assert check_task_ids(["mp-1", task_id]) == ["mp-1", task_id]


@pytest.mark.parametrize(
    "task_id",
    [
        "",
        "..",
        "a/b",
        "/etc/passwd",
        "a/../b",
        "..a",
        "a..b",
        ".hidden",
        "a\\b",
        "a\n",
        "a\0",
        "x" * 201,
        " mp-1",
        "mp-1 ",
        7,
        None,
    ],
)
def test_anything_that_could_leave_its_directory_is_refused(task_id: object) -> None:
    """The message shows the id and says what is allowed."""
    with pytest.raises(ConfigError, match="not a plain name") as caught:
        check_task_id(task_id)
    assert repr(task_id) in str(caught.value)
    with pytest.raises(ConfigError, match="not a plain name") as of_many:
        check_task_ids(["mp-1", task_id, "mp-2", ".."])
    assert str(of_many.value) == str(caught.value)
