"""Which answers are of the listed version, and which contents need a second reading."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from zarrcache._keys import ObjectInfo
from zarrcache.errors import IncompleteArrayError
from zarrcache.origin._content import (
    ContentCheck,
    etag_in,
    is_same_date,
    is_same_version,
    md5_in,
    other_shape,
    version_of,
)
from zarrcache.origin._requests import Received

BODY = b"a chunk"
MD5 = hashlib.md5(BODY).hexdigest()
OTHER = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "abc",
        '"abc"',
        'W/"abc"',
        'w/"abc"',
        "'abc'",
        "&quot;abc&quot;",
        "&#34;abc&#34;",
        ' "abc" ',
        '"W/"abc""',
        'W/W/"abc"',
        "W/&quot;'abc'&quot;",
    ],
)
def test_all_spellings_of_an_etag_are_one_version(text: str) -> None:
    assert version_of(text, 5.0) == version_of(text, 0.0) == "abc"


@pytest.mark.parametrize(
    ("etag", "modified_s", "version"),
    [
        ("", 5.9, "modified 5"),
        (None, 5.0, "modified 5"),
        ('""', 5.0, "modified 5"),
        ("W/", 5.0, "modified 5"),
        (None, 0.0, ""),
        ("", 0.0, ""),
        ("aBc-W/d", 5.0, "aBc-W/d"),
    ],
)
def test_without_an_etag_the_second_of_the_change_is_the_version(
    etag: str | None, modified_s: float, version: str
) -> None:
    assert version_of(etag, modified_s) == version
    assert etag_in(version) == ("" if version.startswith("modified") else version)


@pytest.mark.parametrize(
    ("version", "md5"),
    [
        (OTHER, OTHER),
        (OTHER.upper(), OTHER),
        (f"{OTHER}-2", None),
        (OTHER[:-1], None),
        (f"{OTHER}0", None),
        (f"{OTHER[:-1]}g", None),
        ("modified 5", None),
        ("", None),
    ],
)
def test_an_md5_has_32_hexadecimal_digits(version: str, md5: str | None) -> None:
    assert md5_in(version) == md5


@pytest.mark.parametrize(
    ("listed", "answer", "is_same"),
    [
        # ETags alone decide where both are known
        (("abc", 5.0), ("abc", 9.0), True),
        (("abc", 5.0), ("ABC", 5.0), False),
        (("abc", 5.0), ("abd", 5.0), False),
        ((OTHER, 5.0), (OTHER.upper(), 5.0), True),
        ((OTHER.upper(), 5.0), (OTHER, 5.0), True),
        ((f"{OTHER}-2", 5.0), (f"{OTHER.upper()}-2", 5.0), True),
        ((f"{OTHER}-2", 5.0), (f"{OTHER}-3", 5.0), False),
        ((OTHER, 5.0), (f"{OTHER}-2", 5.0), False),
        # otherwise the second of the change
        (("abc", 5.0), ("", 5.9), True),
        (("abc", 5.0), ("", 6.0), False),
        (("modified 5", 5.0), ("abc", 5.0), True),
        (("modified 5", 5.0), ("abc", 6.0), False),
        (("modified 5", 5.0), ("", 4.9), False),
        # otherwise nothing says that it is another one
        (("abc", 0.0), ("", 5.0), True),
        (("abc", 5.0), ("", 0.0), True),
        (("", 0.0), ("abc", 5.0), True),
        (("", 0.0), ("", 0.0), True),
    ],
)
def test_an_answer_is_of_the_listed_version_as_far_as_it_says(
    listed: tuple[str, float], answer: tuple[str, float], is_same: bool
) -> None:
    obj = ObjectInfo("x", 7, *listed)
    assert is_same_version(obj, Received(BODY, *answer)) is is_same


def test_a_date_is_the_same_only_where_both_are_known() -> None:
    obj = ObjectInfo("x", 7, "abc", 5.2)
    assert is_same_date(obj, Received(BODY, "", 5.0))
    assert not is_same_date(obj, Received(BODY, "", 6.0))
    assert not is_same_date(obj, Received(BODY, "", 0.0))
    assert not is_same_date(ObjectInfo("x", 7, "abc", 0.0), Received(BODY, "", 0.0))


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("etag", ["auto", "md5", "opaque"])
def test_what_needs_a_second_reading(etag: Any, is_plain: bool) -> None:
    """What its MD5 confirms needs none; nor does what TLS confirms and no MD5 contradicts."""
    check = ContentCheck(etag, is_plain=is_plain)
    opaque, empty = etag == "opaque", ObjectInfo("x", 0, OTHER)
    assert check.is_confirmed(ObjectInfo("x", 7, "not an md5"), BODY) is (opaque or not is_plain)
    assert check.is_confirmed(ObjectInfo("x", 7, OTHER), BODY) is opaque
    assert check.is_confirmed(empty, b"")
    assert check.is_doubtful(ObjectInfo("x", 7, OTHER)) is not opaque
    assert not check.is_doubtful(ObjectInfo("x", 7, f"{OTHER}-2"))
    assert check.asks_for_encryption is (etag == "auto")
    assert check.needs_sample is (etag == "auto")
    for spelling in (MD5, MD5.upper()):
        assert check.is_confirmed(ObjectInfo("x", 7, spelling), BODY)
        assert check.matches(ObjectInfo("x", 7, spelling), BODY)
    assert not check.matches(ObjectInfo("x", 7, "not an md5"), BODY)
    assert not check.needs_sample  # a match has shown what ETags are


@pytest.mark.parametrize(
    ("etag", "shown", "stuck", "sample", "why"),
    [
        ("auto", True, [OTHER], [], "other objects there match theirs: it is damaged"),
        ("auto", True, [OTHER], [OTHER[::-1]], "other objects there match theirs"),
        ("auto", False, [OTHER], [], "there is no other object to compare with"),
        ("auto", False, [OTHER, OTHER.upper()], [OTHER], "there is no other object"),
        ("auto", False, [OTHER, OTHER[::-1]], [], None),
        ("auto", False, [OTHER], [OTHER[::-1]], None),
        ("md5", False, [OTHER, OTHER[::-1]], [], "cache.fetch.etag is md5"),
        ("opaque", False, [OTHER], [], None),
    ],
)
def test_two_readings_alike_that_contradict_an_etag_are_judged_by_other_objects(
    caplog: pytest.LogCaptureFixture,
    etag: Any,
    shown: bool,
    stuck: list[str],
    sample: list[str],
    why: str | None,
) -> None:
    check = ContentCheck(etag, is_plain=False)
    if shown:
        assert check.matches(ObjectInfo("x", 7, MD5), BODY)
    one, other = ([ObjectInfo(f"k{tag}", 7, tag) for tag in tags] for tags in (stuck, sample))
    if why is not None:
        with pytest.raises(IncompleteArrayError, match=rf"s3://b/p/k{OTHER} .*{why}"):
            check.judge(one, other, "s3://b/p")
        return
    check.judge(one, other, "s3://b/p")
    assert not check.is_doubtful(one[0])
    check.judge(one[:1], [], "s3://b/p")  # decided for this origin, and said once
    assert caplog.text.count("are not MD5 sums (2 objects compared)") == (etag == "auto")


@pytest.mark.parametrize(
    ("start", "stop", "size_bytes", "ranges"),
    [
        (0, 10, 1000, [(0, 74)]),
        (100, 200, 1000, [(100, 264)]),
        (100, 200, 210, [(100, 210)]),
        (100, 200, 201, [(100, 201)]),
        (100, 200, 200, [(36, 200)]),
        (10, 200, 200, [(0, 200)]),
        (1, 2, 2, [(0, 2)]),
        (0, 200, 200, [(0, 100), (100, 200)]),
        (0, 3, 3, [(0, 1), (1, 3)]),
        (0, 2, 2, [(0, 1), (1, 2)]),
        (0, 1, 1, [(0, 1)]),
    ],
)
def test_a_second_reading_has_other_boundaries(
    start: int, stop: int, size_bytes: int, ranges: list[tuple[int, int]]
) -> None:
    assert other_shape(start, stop, size_bytes) == ranges
