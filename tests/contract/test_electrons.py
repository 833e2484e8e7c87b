"""Where the metadata of a store states its electrons, the values have to hold them."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

from tests.contract.test_missing_chunks import LAYOUTS, chunks_of, config_file, config_of, lose
from tests.support.gateway import BUCKET, running_gateway
from tests.support.readers import make_reader
from tests.support.stores import plain_read, random_density, small_group
from tests.support.training import zarrcache
from zarrcache import ops
from zarrcache.arrays import OriginArray, read_array
from zarrcache.arrays import read as reading
from zarrcache.errors import IncompleteArrayError, OriginAccessError, OriginError, SchemaError
from zarrcache.origin import ObjectInfo
from zarrcache.origin._local import LocalOrigin

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "charge_density_total"
SHAPE = (12, 10, 8)
VALUES = random_density(SHAPE)
ELECTRONS = float(VALUES.mean(dtype=np.float64))
ENGINES = ("obstore", "s3fs")


def write(
    directory: Path, electrons: Any = ELECTRONS, layout: str = "v2", **more: Any
) -> tuple[Path, Path]:
    """Input and label of mp-1, which state ``electrons``, and the map."""
    name = "mp-1.zarr.zip" if LAYOUTS[layout].get("as_zip") else "mp-1.zarr"
    stores = directory / "data" / name, directory / "label" / name
    for store in stores:
        arguments = {"metadata": {"electrons": electrons}, "arrays": {NAME: VALUES}, **more}
        small_group(store, **{**LAYOUTS[layout], **arguments})
    (directory / "map.json").write_text(json.dumps({"GGA": ["mp-1"]}))
    return stores


def attributes_of(store: Path) -> Path:
    """The document with the attributes of a directory store."""
    found = store / "zarr.json"
    return found if found.exists() else store / ".zattrs"


def state(store: Path, electrons: Any) -> None:
    """Change the electrons that a directory store states."""
    path = attributes_of(store)
    document = json.loads(path.read_text())
    attributes = document["attributes"] if path.name == "zarr.json" else document
    attributes["metadata"] = json.dumps({"electrons": electrons})
    path.write_text(json.dumps(document))


CACHES: dict[str, Any] = {
    "none": None,
    "arrays": {},
    "bytes": {"arrays": {"enabled": False}},
    "neither": {"arrays": {"enabled": False}, "bytes": {"enabled": False}},
    "fill": {"missing_chunks": "fill"},
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_disagree_are_refused_in_every_layout(
    tmp_path: Path, layout: str, normalize: bool
) -> None:
    """Whatever the cache; and a store that agrees is read."""
    store, _ = write(tmp_path, ELECTRONS + 0.5, layout)
    for cache in CACHES.values():
        reader = make_reader(tmp_path, cache=cache, normalize=normalize)
        with pytest.raises(IncompleteArrayError) as caught:
            reader.load("mp-1", "data")
        said = str(caught.value)
        assert said.startswith(f"{store}/{NAME}: ")
        assert f"{ELECTRONS:.7g}" in said
        assert f"{ELECTRONS + 0.5:.7g}" in said
    status = ops.read_status(config_of(tmp_path))
    assert status.array_tier.entries == status.listings
    if store.is_dir():
        state(store, ELECTRONS)
    else:
        shutil.rmtree(tmp_path / "data")
        shutil.rmtree(tmp_path / "label")
        write(tmp_path, ELECTRONS, layout)
    for cache in CACHES.values():
        reader = make_reader(tmp_path, cache=cache)
        assert np.array_equal(reader.load("mp-1", "data")[0].reshape(SHAPE), VALUES)


@pytest.mark.parametrize("layout", ["v2", "v3", "zip"])
def test_a_store_that_states_electrons_below_zero_is_refused(tmp_path: Path, layout: str) -> None:
    """A potential that was converted under the name of a density agrees with what it states."""
    values = -VALUES
    store, _ = write(tmp_path, -ELECTRONS, layout, arrays={NAME: values})
    for cache in CACHES.values():
        with pytest.raises(IncompleteArrayError, match=r"looks like a potential") as caught:
            make_reader(tmp_path, cache=cache).load("mp-1", "data")
        assert str(caught.value).startswith(f"{store}/{NAME}: ")


@pytest.mark.parametrize("layout", ["v2", "v3", "sharded"])
@pytest.mark.parametrize("change", ["doubled", "small", "other", "nan"])
def test_values_that_were_changed_are_refused(tmp_path: Path, layout: str, change: str) -> None:
    """Every object is intact, listed and decoded."""
    store, _ = write(tmp_path, layout=layout)
    array: Any = zarr.open_group(store, mode="r+")[NAME]
    if change == "doubled":
        array[...] = 2 * VALUES
    elif change == "small":
        array[:4] = 0.001
    elif change == "other":
        array[...] = random_density(SHAPE, seed=5) ** 2
    else:
        array[0, 0, 0] = np.nan
    for cache in (None, {}, {"missing_chunks": "fill"}):
        reader = make_reader(tmp_path, cache=cache)
        with pytest.raises(IncompleteArrayError, match=f"states {ELECTRONS:.7g}") as caught:
            reader.load("mp-1", "data")
        assert ("1 of its values are NaN" in str(caught.value)) == (change == "nan")
        assert np.array_equal(reader.load("mp-1", "label")[0].reshape(SHAPE), VALUES)


@pytest.mark.parametrize("layout", ["v2", "v3-dots", "sharded", "zip"])
def test_filling_absent_chunks_does_not_switch_the_check_off(tmp_path: Path, layout: str) -> None:
    """The number of absent chunks is part of the reason."""
    store, _ = write(tmp_path, layout=layout)
    lose(store, chunks_of(store)[:1])
    with pytest.raises(IncompleteArrayError, match="1 of its chunks are absent"):
        make_reader(tmp_path, cache={"missing_chunks": "fill"}).load("mp-1", "data")


def test_chunks_of_zeros_that_were_not_written_agree(tmp_path: Path) -> None:
    values = np.zeros(SHAPE, np.float32)
    values[0, 0, 0] = 96.0
    write(tmp_path, 0.1, arrays={NAME: values})
    reader = make_reader(tmp_path, cache={"missing_chunks": "fill"})
    assert np.array_equal(reader.load("mp-1", "data")[0].reshape(SHAPE), values)


NOTHING: dict[str, Any] = {
    "no metadata": {},
    "no electrons": {"metadata": json.dumps({"task_id": "mp-1"})},
    "text": {"metadata": json.dumps({"electrons": "8.0"})},
    "null": {"metadata": {"electrons": None}},
    "true": {"metadata": {"electrons": True}},
    "list": {"metadata": {"electrons": [8.0]}},
    "nan": {"metadata": '{"electrons": NaN}'},
    "infinity": {"metadata": '{"electrons": -Infinity}'},
    "huge": {"metadata": '{"electrons": 1%s}' % ("0" * 400)},
    "more digits": {"metadata": '{"electrons": 1%s}' % ("0" * 5000)},
    "not JSON": {"metadata": "{electrons: 8}"},
    "number": {"metadata": 8.0},
    "json of a list": {"metadata": "[8.0]"},
    "deep": {"metadata": "[" * 50_000},
    "surrogate": {"metadata": '{"electrons": "\ud800"}'},
    "elsewhere": {"electrons": 8.0, "structure": {"electrons": 8.0}},
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", NOTHING)
def test_anything_but_a_finite_number_says_nothing(
    tmp_path: Path, name: str, zarr_format: Any
) -> None:
    store, _ = write(tmp_path, layout="v2" if zarr_format == 2 else "v3")
    path = attributes_of(store)
    document = NOTHING[name]
    if zarr_format == 3:
        document = {**json.loads(path.read_text()), "attributes": document}
    path.write_text(json.dumps(document))
    for cache in (None, {"arrays": {"enabled": False}}):
        reader = make_reader(tmp_path, cache=cache)
        assert np.array_equal(reader.load("mp-1", "data")[0].reshape(SHAPE), VALUES)


@pytest.mark.parametrize("is_directory", [False, True])
def test_absent_attributes_say_nothing(tmp_path: Path, is_directory: bool) -> None:
    store, _ = write(tmp_path, 1.0)
    path = attributes_of(store)
    path.unlink()
    if is_directory:
        path.mkdir()
    values, _ = make_reader(tmp_path, cache={}).load("mp-1", "data")
    assert np.array_equal(values.reshape(SHAPE), VALUES)


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("cache", [None, {}, {"arrays": {"enabled": False}}])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"charge_density_units": "vol', "cannot be read"),
        (b"[]", r"does not hold attributes but \[\]"),
        (b"null", "does not hold attributes but None"),
        (b'{"a": [' + b"[]," * 300_000 + b"0]}", r"cannot be read \(it has too many lists"),
        (b"{}" + b" " * (5 * 2**20), "has 5242882 bytes"),
    ],
)
def test_attributes_that_cannot_be_read_are_an_error(
    tmp_path: Path, content: bytes, message: str, cache: Any, is_zipped: bool
) -> None:
    """They may say units, which a store without attributes does not have."""
    store, _ = write(tmp_path)
    attributes_of(store).write_bytes(content)
    if is_zipped:
        shutil.make_archive(str(store), "zip", store)
        shutil.rmtree(store)
    reader = make_reader(tmp_path, cache=cache)
    for read in (reader.load, reader.metadata):
        with pytest.raises(SchemaError, match=rf"mp-1\.zarr(\.zip)?/\.zattrs {message}"):
            read("mp-1", "data")


def test_attributes_that_may_not_be_read_are_an_error(tmp_path: Path) -> None:
    """As every fault but absence: a reader must not take it for "says nothing"."""
    store, _ = write(tmp_path)
    path = attributes_of(store)
    path.unlink()
    path.symlink_to(path.name)  # a loop: ELOOP for every user
    with pytest.raises(OriginError, match=r"mp-1\.zarr/\.zattrs could not be read"):
        make_reader(tmp_path, cache={}).load("mp-1", "data")
    path.unlink()
    os.mkfifo(path)  # whose opening would wait for a writer
    with pytest.raises(OriginError, match=r"mp-1\.zarr/\.zattrs is neither a file"):
        make_reader(tmp_path, cache={}).load("mp-1", "data")


@pytest.mark.parametrize("scale", [1, 0.01, 1e4])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i4"])
def test_one_per_mille_is_allowed_and_no_more(tmp_path: Path, dtype: str, scale: float) -> None:
    if (dtype, scale) in (("<f2", 1e4), ("<i4", 0.01)):
        pytest.skip("the type cannot hold these values")
    values = (VALUES * 100 * scale if "i" in dtype else VALUES * scale).astype(dtype)
    mean = float(values.astype("f8").mean())
    store, _ = write(tmp_path, arrays={NAME: values})
    reader = make_reader(tmp_path)
    for factor, is_good in ((0.9991, True), (1.0009, True), (0.9985, False), (1.0015, False)):
        state(store, mean * factor)
        if is_good:
            assert np.array_equal(reader.load("mp-1", "data")[0], values.ravel().astype(np.float32))
        else:
            with pytest.raises(IncompleteArrayError, match="states"):
                reader.load("mp-1", "data")


def test_the_spin_density_is_not_compared(tmp_path: Path) -> None:
    """Its mean is the moment."""
    diff = np.full(SHAPE, 0.5, np.float32)
    write(tmp_path, arrays={NAME: VALUES, "charge_density_diff": diff})
    reader = make_reader(tmp_path, cache={}, density_type="diff")
    assert np.array_equal(reader.load("mp-1", "data")[0], diff.ravel())


# -- over a socket


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", ["v2", "v3", "sharded", "zip-v3"])
def test_over_a_socket_each_object_is_requested_once(
    tmp_path: Path, layout: str, engine: str
) -> None:
    """One LIST, the objects of the array, and the attributes of the store; a zip has them."""
    store, _ = write(tmp_path / BUCKET, layout=layout)
    shutil.copy(tmp_path / BUCKET / "map.json", tmp_path)
    with running_gateway(tmp_path / BUCKET) as gateway:
        reader = make_reader(
            tmp_path,
            f"s3://{BUCKET}",
            s3_kwargs=gateway.s3_kwargs,
            cache={"fetch": {"engine": engine}},
        )
        assert reader.store_names("data")
        gateway.lists, gateway.gets[:] = 0, []
        values, _ = reader.load("mp-1", "data")
        assert np.array_equal(values.reshape(SHAPE), VALUES)
        prefix = f"data/{store.name}"
        if store.is_dir():
            wanted = Counter(
                f"{prefix}/{path.relative_to(store)}"
                for path in (store / NAME).rglob("*")
                if path.is_file() and path.name != ".zattrs"
            )
            wanted[f"{prefix}/{attributes_of(store).name}"] = 1
            assert Counter(gateway.gets) == wanted
            assert gateway.lists == 1
        gateway.gets.clear()
        reader.load("mp-1", "data")
        assert gateway.gets == []
        gateway.gets.clear()


@pytest.mark.parametrize("engine", ENGINES)
def test_over_a_socket_disagreement_fetches_nothing_again(tmp_path: Path, engine: str) -> None:
    """All objects are of the listed versions, the attributes too."""
    store, _ = write(tmp_path / BUCKET, ELECTRONS * 1.01)
    shutil.copy(tmp_path / BUCKET / "map.json", tmp_path)
    with running_gateway(tmp_path / BUCKET) as gateway:
        url, key = f"s3://{BUCKET}", "data/mp-1.zarr/.zattrs"
        reader = make_reader(
            tmp_path, url, s3_kwargs=gateway.s3_kwargs, cache={"fetch": {"engine": engine}}
        )
        with pytest.raises(IncompleteArrayError, match=f"{url}/data/mp-1.zarr/{NAME}: its values"):
            reader.load("mp-1", "data")
        assert gateway.gets.count(key) == 1
        assert {*Counter(gateway.gets).values()} == {1}
        (store / ".zattrs").unlink()  # the store says nothing
        gateway.gets.clear()
        assert np.array_equal(reader.load("mp-1", "data")[0], VALUES.ravel())
        assert gateway.gets.count(key) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("status", "error"), [(403, OriginAccessError), (500, OriginError)])
def test_over_a_socket_other_faults_of_the_attributes_are_errors(
    tmp_path: Path, engine: str, status: int, error: type[Exception]
) -> None:
    write(tmp_path / BUCKET)
    shutil.copy(tmp_path / BUCKET / "map.json", tmp_path)
    with running_gateway(tmp_path / BUCKET) as gateway:
        cache = {"fetch": {"engine": engine}, "retry": {"attempts": 1}}
        reader = make_reader(tmp_path, f"s3://{BUCKET}", s3_kwargs=gateway.s3_kwargs, cache=cache)
        gateway.faults["data/mp-1.zarr/.zattrs"] = status
        with pytest.raises(error, match=r"data/mp-1\.zarr/\.zattrs"):
            reader.load("mp-1", "data")
        gateway.faults.clear()
        assert np.array_equal(reader.load("mp-1", "data")[0], VALUES.ravel())


@pytest.mark.parametrize("engine", ENGINES)
def test_over_a_socket_attributes_that_are_too_large_are_not_requested(
    tmp_path: Path, engine: str
) -> None:
    """With the density, and where they alone are read: the listing has their size, which is
    refused.
    """
    store, _ = write(tmp_path / BUCKET)
    shutil.copy(tmp_path / BUCKET / "map.json", tmp_path)
    (store / ".zattrs").write_bytes(b" " * (64 * 2**20))
    with running_gateway(tmp_path / BUCKET) as gateway:
        cache = {"fetch": {"engine": engine}}
        reader = make_reader(tmp_path, f"s3://{BUCKET}", s3_kwargs=gateway.s3_kwargs, cache=cache)
        for read in (reader.load, reader.metadata):
            with pytest.raises(SchemaError, match=r"\.zattrs has 67108864 bytes"):
                read("mp-1", "data")
        assert "data/mp-1.zarr/.zattrs" not in gateway.gets


# -- stores that change


class Following(LocalOrigin):
    """A directory whose store is written by another program just after each reading."""

    def __init__(self, path: Path, *writes: Any) -> None:
        super().__init__(str(path))
        self.writes = list(writes)

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        yield from super().fetch(objects)
        if self.writes:
            self.writes.pop(0)()


def test_attributes_that_were_written_last_are_read_again(tmp_path: Path) -> None:
    """During an overwrite the attributes may be older than the values."""
    store, _ = write(tmp_path, 1.0)
    age(store)
    origin = Following(tmp_path / "data", lambda: state(store, ELECTRONS))
    assert np.array_equal(read_array(OriginArray(origin, "mp-1.zarr", NAME)).array, VALUES)


def test_array_that_was_written_last_is_read_again(tmp_path: Path) -> None:
    """Or newer: then the listing has changed as well."""
    store, _ = write(tmp_path)
    array: Any = zarr.open_group(store, mode="r+")[NAME]
    array[...] = 3 * VALUES
    age(store)

    def repair() -> None:
        array[...] = VALUES
        age(store)

    origin = Following(tmp_path / "data", repair)
    assert np.array_equal(read_array(OriginArray(origin, "mp-1.zarr", NAME)).array, VALUES)


def age(store: Path) -> None:
    """Have every file be written an hour ago, so that the listing counts as stable."""
    for file in store.rglob("*"):
        then = file.stat().st_mtime - 3600
        os.utime(file, (then, then))


# -- groups that are open


@pytest.mark.parametrize("layout", ["v2", "v3", "sharded"])
def test_group_that_is_open_is_checked(tmp_path: Path, layout: str) -> None:
    """Of zarr itself, and of the reader."""
    store, _ = write(tmp_path, ELECTRONS + 1, layout)
    reader = make_reader(tmp_path, cache={})
    for group in (zarr.open_group(store, mode="r"), reader.read_zarr_store(store)):
        with pytest.raises(IncompleteArrayError, match=f"states {ELECTRONS + 1:.7g}"):
            reader.read_charge_density(group)
    state(store, ELECTRONS)
    for group in (zarr.open_group(store, mode="r"), reader.read_zarr_store(store)):
        assert np.array_equal(reader.read_charge_density(group)[0], VALUES.ravel())


@pytest.mark.parametrize("layout", ["v2", "v2-slashes", "v3", "sharded"])
@pytest.mark.parametrize("n_lost", [1, None])
def test_absent_chunks_of_an_open_group_are_an_error_or_filled(
    tmp_path: Path, layout: str, n_lost: int | None
) -> None:
    store, _ = write(tmp_path, None, layout)
    keys = chunks_of(store)
    lose(store, keys[:n_lost])
    group = zarr.open_group(store, mode="r")
    said = f"{NAME}: {len(keys[:n_lost])} of {len(keys)} chunks are absent"
    with pytest.raises(IncompleteArrayError, match=said):
        make_reader(tmp_path).read_charge_density(group)
    reader = make_reader(tmp_path, cache={"missing_chunks": "fill"})
    assert np.array_equal(reader.read_charge_density(group)[0], plain_read(store).ravel())


def test_group_in_memory_is_checked(tmp_path: Path) -> None:
    """Its attribute ``metadata`` may be a mapping."""
    write(tmp_path)
    for stated, is_good in ((ELECTRONS, True), (ELECTRONS * 1.1, False), ("8", True)):
        group = zarr.create_group(
            zarr.storage.MemoryStore(), attributes={"metadata": {"electrons": stated}}
        )
        group.create_array(NAME, data=VALUES, chunks=(4, 4, 4))
        reader = make_reader(tmp_path)
        if is_good:
            assert np.array_equal(reader.read_charge_density(group)[0], VALUES.ravel())
        else:
            with pytest.raises(IncompleteArrayError, match="states"):
                reader.read_charge_density(group)


# -- commands


def test_warm_verify_and_doctor_name_stores_that_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``verify`` compares what is cached: an older version stored it without the check."""
    _, label = write(tmp_path)
    config = config_file(tmp_path)
    state(label, ELECTRONS + 0.5)
    with monkeypatch.context() as old:
        old.setattr(reading, "check_electrons", lambda *_: None)
        assert ops.plan_warm(config_of(tmp_path), workers=1).execute().is_good
    assert zarrcache("verify", config).code == 0
    done = zarrcache("verify", config, "--against-origin")
    assert done.code == 1
    assert f"{label}: its values hold {ELECTRONS:.7g} electrons" in done.err
    assert f"states {ELECTRONS + 0.5:.7g}" in done.err
    done = zarrcache("doctor", config)
    assert done.code == 1
    assert "holds the number that its metadata states" in done.out
    assert f"{label}/{NAME}: its values hold {ELECTRONS:.7g}" in done.out.replace("\n", " ")
    shutil.rmtree(tmp_path / "cache")
    done = zarrcache("warm", config)
    assert done.code == 1
    assert "mp-1 (label)" in done.err
    assert f"states {ELECTRONS + 0.5:.7g}" in done.err


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", ["v2", "v3", "zip"])
def test_verify_compares_normalized_entries_too(
    tmp_path: Path, layout: str, normalize: bool
) -> None:
    write(tmp_path, layout=layout)
    config = config_of(tmp_path).model_copy(update={"normalize_data": normalize})
    assert ops.plan_warm(config).execute().is_good
    assert ops.verify(config, against_origin=True).is_good
