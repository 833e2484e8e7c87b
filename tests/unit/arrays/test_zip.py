"""Stores in one zip file, as people zip them, and as zips break."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.interleaved import interleaved
from zarrcache.arrays.zip import ZippedStore
from zarrcache.errors import IncompleteArrayError, SchemaError

URL = "s3://b/mp-1.zarr.zip"
MEMBERS = {
    ".zgroup": b"{}",
    "total/.zarray": b"{...}",
    "total/0.0.0": b"chunk" * 20,
    "total/0.0.1": b"",
    "diff/.zarray": b"{}",
}


def unzip(data: bytes, url: str, prefix: str = "") -> dict[str, bytes]:
    """All members below ``prefix``."""
    store = ZippedStore(data, url)
    return {name: store.read(name) for name in store.sizes if name.startswith(prefix)}


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


@pytest.mark.parametrize("spelling", ["./{}", "/{}", "mp-1.zarr\\{}", "./mp-1.zarr/{}"])
def test_members_are_found_however_a_tool_writes_their_names(spelling: str) -> None:
    """PowerShell writes backslashes, tar-like tools write ``./``."""
    members = {spelling.format(name): content for name, content in MEMBERS.items()}
    if "\\" in spelling:
        members = {name.replace("/", "\\"): content for name, content in members.items()}
    assert unzip(zip_of(members), URL) == MEMBERS


@pytest.mark.parametrize("root", ["", "mp-1.zarr/", "a/b/"])
def test_arrays_without_a_group_are_found(root: str) -> None:
    members = {name: content for name, content in MEMBERS.items() if name != ".zgroup"}
    data = zip_of({f"{root}{name}": content for name, content in members.items()})
    assert unzip(data, URL) == members


@pytest.mark.parametrize("document", [".zgroup", "zarr.json"])
def test_a_zip_of_several_stores_is_refused_and_a_store_inside_a_store_is_not(
    document: str,
) -> None:
    """None of them is known to be the one that is meant; a backup may come first."""
    both = {f"{root}/{document}": b"{}" for root in ("a_backup", "mp-1.zarr")}
    with pytest.raises(
        SchemaError, match=rf"^{URL} holds several stores \('a_backup', 'mp-1.zarr'\)"
    ):
        unzip(zip_of(both), URL)
    inside = {f"mp-1.zarr/{document}": b"{}", f"mp-1.zarr/backup/{document}": b"{}"}
    assert list(unzip(zip_of(inside), URL)) == [document, f"backup/{document}"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_methods_are_refused_in_words(compression: int) -> None:
    """The message names the member, its method and the remedy."""
    with pytest.raises(
        SchemaError,
        match=rf"^{URL} member total/\.zarray uses zip method {compression}; only stored and "
        r"deflated members are read\. Zip the store again, uncompressed",
    ):
        unzip(zip_of(MEMBERS, compression), URL, "total/")


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


def test_member_larger_than_its_chunk_is_refused_before_it_is_unpacked() -> None:
    """The decoder knows how large the chunk may be."""
    store = ZippedStore(zip_of({"total/0": bytes(9 * 2**20)}, zipfile.ZIP_DEFLATED), URL)
    with pytest.raises(
        SchemaError,
        match=rf"member total/0 claims {9 * 2**20} bytes unpacked; more than 2048 are refused\. "
        r"Zip the store again",
    ):
        store.read("total/0", 2048)
    assert store.read("total/0", 9 * 2**20) == bytes(9 * 2**20)


@pytest.mark.parametrize("comment", [b"", b"c" * 0xFFFF], ids=["bare", "commented"])
@pytest.mark.parametrize("is_large", [False, True])
def test_directory_is_measured_as_zipfile_reads_it(is_large: bool, comment: bytes) -> None:
    """Zipfile takes the records of a large zip wherever they are; the others may say less."""
    count = 120_000
    entry = b"PK\x01\x02" + struct.pack(
        "<4B4HL2L5H2L", 20, 0, 20, 0, 0, 0, 0, 33, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0
    )
    directory = b"".join(entry + b"%08x" % i for i in range(count))
    large = b"PK\x06\x06" + struct.pack(
        "<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), 0xFFFF
    )
    large += b"PK\x06\x07" + struct.pack("<LQL", 0, len(directory), 1)
    said = 1000 if is_large else len(directory)
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, said, 0xFFFF, len(comment))
    with pytest.raises(SchemaError, match=f"a directory of {len(directory)} bytes"):
        ZippedStore(directory + (large if is_large else b"") + end + comment, URL)


def test_another_thread_gets_its_own_member() -> None:
    """The last one is kept for the next read of it."""
    store = ZippedStore(zip_of(MEMBERS), URL)

    def twice() -> list[bytes]:
        return [store.read("total/0.0.0") for _ in range(2)]

    read = interleaved(ZippedStore.read, twice, lambda: store.read("diff/.zarray"))
    assert {tuple(found) for found in read} == {(MEMBERS["total/0.0.0"],) * 2}
