"""Stores in one zip file, as people zip them, and as zips break."""

from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zarrcache.arrays import zip as zipped
from zarrcache.arrays.zip import unzip
from zarrcache.errors import IncompleteArrayError, SchemaError

URL = "s3://b/mp-1.zarr.zip"
MEMBERS = {
    ".zgroup": b"{}",
    "total/.zarray": b"{...}",
    "total/0.0.0": b"chunk" * 20,
    "total/0.0.1": b"",
    "diff/.zarray": b"{}",
}


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file's bytes."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return file.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("root", ["", "mp-1.zarr/", "a/b/"])
def test_members_are_found_below_any_root(compression: int, root: str) -> None:
    """Zipping the directory itself, as people do, puts everything below its name."""
    data = zip_of(
        {f"{root}{name}": content for name, content in MEMBERS.items()} | {f"{root}total/": b""},
        compression,
    )
    assert unzip(data, URL) == MEMBERS


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_methods_are_refused_in_words(compression: int) -> None:
    """The message names the member, its method and the remedy."""
    with pytest.raises(
        SchemaError,
        match=rf"^{URL} member total/\.zarray uses zip method {compression}; only stored and "
        r"deflated members are read\. Zip the store again, uncompressed",
    ):
        unzip(zip_of(MEMBERS, compression), URL, "total/")


def test_only_what_is_asked_for_is_unpacked() -> None:
    """The rest is there by name, for messages."""
    assert unzip(zip_of(MEMBERS), URL, "total/") == {**MEMBERS, ".zgroup": b"", "diff/.zarray": b""}


def test_rewritten_member_is_the_last_one() -> None:
    """Zarr's own ZipStore appends a second copy."""
    file = io.BytesIO(zip_of({".zgroup": b"old"}))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(".zgroup", b"new")
    assert unzip(file.getvalue(), URL) == {".zgroup": b"new"}


@pytest.mark.parametrize(
    "data", [b"", b"no zip at all", zip_of(MEMBERS)[:-5], zip_of(MEMBERS)[30:]]
)
def test_what_is_no_zip_is_named(data: bytes) -> None:
    """URL, reason, and what to do."""
    with pytest.raises(
        IncompleteArrayError,
        match=r"^s3://b/mp-1\.zarr\.zip is not a readable zip file \(.*Zip the store again",
    ):
        unzip(data, URL)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_flipped_bit_never_is_another_error(compression: int, data: st.DataObject) -> None:
    """Wrong content is caught by the CRC; names and unused fields may differ; nothing but our own
    errors comes out.
    """
    raw = bytearray(zip_of(MEMBERS, compression))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        members = unzip(bytes(raw), URL)
    except (IncompleteArrayError, SchemaError):
        return
    assert set(members.values()) <= set(MEMBERS.values())


def test_zip_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it claims is counted first."""
    monkeypatch.setattr(zipped, "_ROOM_BYTES", 1000)
    data = zip_of({"total/0": bytes(9 * 2**20), "total/1": bytes(9 * 2**20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(
        SchemaError,
        match=rf"claims {18 * 2**20} bytes unpacked; more than {100 * len(data)} are refused\. Zip "
        r"the store again",
    ):
        unzip(data, URL)
